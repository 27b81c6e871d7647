"""Sizes and variants of the implicit graph networks."""

import dataclasses
import itertools
import math

from deqjax.models.ignn.aggregation import METHODS

NETWORKS = ("chains", "amazon", "ppi", "graphs")


@dataclasses.dataclass(frozen=True, kw_only=True)
class IGNNConfig:
    """One of the four published networks.

    Attributes:
      network: "chains" (one implicit layer, states of unit length per node, a linear map), "amazon" (the same without the
        unit length, and without features: each node is its own), "ppi" (five layers of 4h, 2h, 2h, h and c features with
        linear skips and ELU) or "graphs" (three layers of h, the sum over nodes, a hidden layer of h).
      n_features: F of the nodes; for "amazon" their number.
      n_hidden: h.
      n_classes: c.
      kappa: |W|_inf <= kappa / spectral radius of the adjacency; below 1.
      spectral_radius: one radius for all graphs; None takes each graph's own from its `globals`, so that a graph's
        prediction does not depend on those it is batched with.
      dropout: rate before the last linear map; the PPI network has none.
      omega_2: whether B = Omega_1 U A + Omega_2 U has its second term. None takes the network's own choice: all but "graphs"
        have it. The original repository has it nowhere.
      samples: what has a residual and stops by itself: "graphs", or "features" (all nodes of the batch together), the rule
        of TorchDEQ's code. That rule is wrong, because features are coupled by W; it only serves to repeat the original's runs.
      init_weight: "uniform" as in the originals, or "identity": kappa times the identity, with which every feature is handed
        on at any distance from the start (after Le et al. 2015, for recurrent networks). Long chains need it to be learned
        from every seed.
      init_power_iters: power iterations of spectral normalisation before training. The original has none, so its first
        estimate may be tiny or negative.
      aggregation: see `deqjax.models.ignn.aggregation`.
    """

    network: str
    n_features: int
    n_hidden: int
    n_classes: int
    kappa: float = 0.9
    spectral_radius: float | None = None
    dropout: float = 0.5
    omega_2: bool | None = None
    samples: str = "graphs"
    init_weight: str = "uniform"
    init_power_iters: int = 20
    aggregation: str = "auto"

    def __post_init__(self):
        for name, allowed in (
            ("network", NETWORKS),
            ("samples", ("graphs", "features")),
            ("init_weight", ("uniform", "identity")),
            ("aggregation", METHODS),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r}: must be one of {', '.join(map(repr, allowed))}.")
        for name in ("n_features", "n_hidden", "n_classes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be positive.")
        if not 0 < self.kappa < 1:
            raise ValueError(
                f"kappa={self.kappa}: must lie between 0 and 1. The layer is well-posed if |W|_inf is below 1 over the "
                "spectral radius of the adjacency; from kappa=1 on it may have no equilibrium, or several."
            )
        radius = self.spectral_radius
        if radius is not None and not (math.isfinite(radius) and radius > 0):
            raise ValueError(f"spectral_radius={radius}: must be a positive number, or None to take each graph's own.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout}: must lie between 0 and 1.")
        if self.init_power_iters < 0:
            raise ValueError(f"init_power_iters={self.init_power_iters}: must be 0 or more.")

    @property
    def has_omega_2(self) -> bool:
        return self.network != "graphs" if self.omega_2 is None else self.omega_2

    @property
    def widths(self) -> list[tuple[int, int]]:
        """Input and output features of the implicit layers."""
        F, h, c = self.n_features, self.n_hidden, self.n_classes
        sizes = {"ppi": [F, 4 * h, 2 * h, 2 * h, h, c], "graphs": [F, h, h, h]}.get(self.network, [F, h])
        return list(itertools.pairwise(sizes))

    @property
    def starts_from_zero(self) -> bool:
        """Where the originals start: from zeros, or from the injection."""
        return self.network in ("chains", "amazon")
