"""Fixed-point correction: supervising several states of one solve, later ones more."""

from collections.abc import Callable

import jax.numpy as jnp

from deqjax.core.naming import did_you_mean


def _exponential(n: int, k: int, gamma: float = 0.8) -> float:
    return gamma ** (n - 1 - k)


def _linear(n: int, k: int, gamma: float = 0.9, bias: float = 0.0) -> float:
    return 1 - (n - 1 - k) / n * gamma + bias


def _constant(n: int, k: int, c: float = 1.0, gamma: float = 1.0) -> float:
    # A config's gamma goes to every weighting; this one does not decay.
    return c


_WEIGHTINGS: dict[str, Callable[..., float]] = {"exp": _exponential, "linear": _linear, "const": _constant}


def register_weighting(name: str, weighting: Callable[..., float]) -> None:
    """Adds `weighting(n, k, **options)`, the weight of state k of n, under a name."""
    _WEIGHTINGS[name] = weighting


def correction_weights(n: int, weighting: str = "exp", **options) -> list[float]:
    """The weights of n states, earliest first.

    Raises:
      ValueError: no weighting has this name.
    """
    if weighting not in _WEIGHTINGS:
        hint = did_you_mean(weighting, _WEIGHTINGS)
        raise ValueError(f"no weighting is called {weighting!r}{hint} There are: {', '.join(_WEIGHTINGS)}.")
    return [_WEIGHTINGS[weighting](n, k, **options) for k in range(n)]


def fixed_point_correction(criterion: Callable, *args, weighting: str = "exp", return_values: bool = False, **options):
    """Sum over states of weight_k * criterion(args_k) (Bai et al. 2022, section 3.3), not normalised.

    Args:
      criterion: loss of one state.
      *args: lists of states or targets, or single ones. Shorter ones repeat from their beginning.
      weighting: "exp" (gamma 0.8), "linear" (gamma 0.9, bias 0), "const" (c 1), or a registered name.
      return_values: also return the list of unweighted losses.
      **options: of the weighting.

    Raises:
      ValueError: no weighting has this name, or there is nothing to sum.
    """
    columns = [a if isinstance(a, (list, tuple)) else [a] for a in args]
    if not columns or not all(columns):
        raise ValueError("there is no state to supervise: an argument of the criterion is an empty list, or there is none.")
    n = max(map(len, columns))
    values = [criterion(*(column[k % len(column)] for column in columns)) for k in range(n)]
    weights = correction_weights(n, weighting, **options)
    total = sum(weight * value for weight, value in zip(weights, values, strict=True))
    return (total, jnp.stack(values)) if return_values else total
