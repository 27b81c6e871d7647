"""Sizes and variants of implicit neural representations."""

import dataclasses
import math

NETWORKS = ("deq", "one_pass", "siren", "ffn")
FILTERS = ("siren_like", "fourier", "gabor")


@dataclasses.dataclass(frozen=True, kw_only=True)
class INRConfig:
    """A network from coordinates to the values of one signal.

    Attributes:
      network: "deq" (the equilibrium of the filter network), "one_pass" (the same weights applied once: the multiplicative
        filter network of Fathony et al. 2021, and its sine analogue), "siren" (Sitzmann et al. 2020) or "ffn" (Gaussian
        Fourier features, Tancik et al. 2020).
      filter: of the first two networks.
      n_in: d, numbers in a coordinate.
      n_out: C, numbers in a value.
      n_hidden: D.
      n_layers: L, hidden layers inside f; of an explicit network, its hidden layers.
      input_scale: s, bandwidth of the filters at the start; of a SIREN, the factor inside its first sine. Half the number of
        samples along an axis is the rule of the published image recipes.
      gabor_alpha: shape of the gamma distribution that Gabor filters' inverse variances are drawn from.
      recipe: "zoo" (TorchDEQ) or "original" (the authors' first code: inverse variances pass a ReLU, and are drawn with
        alpha / (L + 1), those of the first filter with 6 / (L + 1)).
      omega: factor inside the hidden sines of a SIREN.
      n_features, feature_scale: number and standard deviation of the random frequencies of Fourier features.
      linear_output: whether "siren" or "ffn" ends without a sine; None takes the network's own choice: "siren" does, "ffn" does
        not. The other networks always do.
      dtype: of the products with hidden weights during a solve, e.g. "bfloat16"; None is the parameters' own. Coordinates and
        filters always have the parameters' precision: their phases reach thousands of radians.
      init_power_iters: power iterations of spectral normalisation before training.
    """

    network: str = "deq"
    filter: str = "siren_like"
    n_in: int
    n_out: int
    n_hidden: int = 256
    n_layers: int = 1
    input_scale: float = 256.0
    gabor_alpha: float = 3.0
    recipe: str = "zoo"
    omega: float = 30.0
    n_features: int = 256
    feature_scale: float = 10.0
    linear_output: bool | None = None
    dtype: str | None = None
    init_power_iters: int = 20

    def __post_init__(self):
        for name, allowed in (("network", NETWORKS), ("filter", FILTERS), ("recipe", ("zoo", "original"))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r}: must be one of {', '.join(map(repr, allowed))}.")
        for name in ("n_in", "n_out", "n_hidden", "n_layers", "n_features"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be positive.")
        for name in ("input_scale", "gabor_alpha", "omega", "feature_scale"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise ValueError(f"{name}={getattr(self, name)}: must be a positive number.")
        if self.linear_output is False and self.network not in ("siren", "ffn"):
            raise ValueError(f"linear_output=False: only 'siren' and 'ffn' have a sine at their end, not {self.network!r}.")
        if self.init_power_iters < 0:
            raise ValueError(f"init_power_iters={self.init_power_iters}: must be 0 or more.")
        if self.dtype not in (None, "float32", "bfloat16", "float16"):
            raise ValueError(f'dtype={self.dtype!r}: must be None, "float32", "bfloat16" or "float16".')
