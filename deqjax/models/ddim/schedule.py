"""Noise schedules, selections of timesteps, and the coefficients of a sampling chain: NumPy in float64 throughout."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from deqjax.core.naming import did_you_mean

SCHEDULES = ("linear", "quad", "const", "jsd", "sigmoid", "geometric")
SELECTIONS = ("uniform", "quad", "custom")


def betas(name: str = "linear", n: int = 1000, start: float = 1e-4, end: float = 0.02) -> np.ndarray:
    """Variances of the forward process, `[n]`.

    Args:
      name: "linear", "quad", "const", "jsd", "sigmoid" or "geometric".
      n: number of timesteps N.
      start, end: first and last variance, where the schedule has such.

    Raises:
      ValueError: no schedule has this name, or a number cannot be.
    """
    if n < 1:
        raise ValueError(f"a schedule of {n} timesteps: it must have 1 or more.")
    if name not in SCHEDULES:
        raise ValueError(
            f"no noise schedule is called {name!r}{did_you_mean(name, SCHEDULES)} There are: {', '.join(SCHEDULES)}."
        )
    if not 0 < end < 1 or not 0 < start < 1:
        raise ValueError(f"variances from {start} to {end}: both must lie between 0 and 1.")
    if name == "linear":
        return np.linspace(start, end, n)
    if name == "quad":
        return np.linspace(start**0.5, end**0.5, n) ** 2
    if name == "const":
        return np.full(n, end)
    if name == "jsd":
        return 1 / np.linspace(n, 1, n)
    if name == "sigmoid":
        return (end - start) / (1 + np.exp(-np.linspace(-6, 6, n))) + start
    return (1 - end) ** np.arange(1, n + 1)


def signal_rates(variances: np.ndarray) -> np.ndarray:
    """alpha_bar(t) = prod over i <= t of (1 - beta_i), `[N]`."""
    return np.cumprod(1 - variances)


def select_timesteps(selection: str | Sequence[int], steps: int, n: int = 1000, *, dedupe: bool = True) -> np.ndarray:
    """The timesteps of a sampling chain, ascending.

    Args:
      selection: "uniform" takes every (n // steps)-th from 0 on, so there are more than `steps` unless that divides n, and
        the last is before n - 1; "quad" spaces them quadratically up to 0.8 n, which favours images with little noise (and
        was tuned on CIFAR-10); "custom" is a fixed list of two densities, for n = 1000; or give the timesteps themselves.
      steps: T.
      n: timesteps of the schedule.
      dedupe: drop what "quad" lists twice. A step from a timestep to itself changes nothing where eta = 0.

    Raises:
      ValueError: there are not so many timesteps, or the selection is unknown.
    """
    if not isinstance(selection, str):
        chosen = np.asarray(selection, np.int64)
        if chosen.ndim != 1 or not len(chosen) or np.any(np.diff(chosen) < 0) or chosen[0] < 0 or chosen[-1] >= n:
            raise ValueError(f"timesteps {list(selection)}: must ascend and lie between 0 and {n - 1}.")
        return np.unique(chosen) if dedupe else chosen
    if selection not in SELECTIONS:
        hint = did_you_mean(selection, SELECTIONS)
        raise ValueError(f"no selection of timesteps is called {selection!r}{hint} There are: {', '.join(SELECTIONS)}.")
    if not 1 <= steps <= n:
        raise ValueError(f"{steps} sampling steps: there must be 1 or more, and at most {n}, the timesteps of the schedule.")
    if selection == "uniform":
        return np.arange(0, n, n // steps)
    if selection == "quad":
        chosen = (np.linspace(0, np.sqrt(0.8 * n), steps) ** 2).astype(np.int64)
        return np.unique(chosen) if dedupe else chosen
    if n != 1000:
        raise ValueError(f'the selection "custom" is made for schedules of 1000 timesteps, not of {n}.')
    return np.concatenate([np.arange(0, 500, 2), np.arange(499, 1000, 4)])


@dataclasses.dataclass(frozen=True, eq=False)
class Chain:
    """The steps of one sampling chain, in the order in which they are taken: from the noisiest timestep down.

    Step k goes from timestep t_k to t_{k+1}, and the last from t_{T-1} to the image, whose alpha_bar is 1. With the predicted
    noise e it is x <- carry * x + push * e + sigma * z, where z is fresh noise.

    Attributes:
      t: `[T]` timesteps.
      a, b: `[T]` alpha_bar before and after each step.
      sigma: `[T]` standard deviation of the fresh noise.
    """

    t: np.ndarray
    a: np.ndarray
    b: np.ndarray
    sigma: np.ndarray

    @classmethod
    def create(cls, rates: np.ndarray, timesteps: np.ndarray, eta: float = 0.0) -> "Chain":
        """A DDIM chain (Song et al. 2021, equation 12).

        Args:
          rates: alpha_bar of every timestep, see `signal_rates`.
          timesteps: ascending, see `select_timesteps`.
          eta: 0 is deterministic, 1 has the fresh noise of DDPM.

        Raises:
          ValueError: eta is not in [0, 1], the timesteps do not ascend or are not of the schedule, or nothing is left of the
            image at the last of them, by which a step would divide.
        """
        if not 0 <= eta <= 1:
            raise ValueError(f"eta={eta}: must lie between 0 (deterministic) and 1 (as much fresh noise as DDPM).")
        t = np.asarray(timesteps, np.int64)[::-1]
        if not len(t) or t[0] >= len(rates) or t[-1] < 0:
            raise ValueError(
                f"timesteps {list(t)} for a schedule of {len(rates)}: each must lie between 0 and {len(rates) - 1}."
            )
        if np.any(np.diff(t) > 0):
            raise ValueError(f"timesteps {list(t[::-1])}: must ascend.")
        a = np.asarray(rates, np.float64)[t]
        if not a[0] > 0:
            raise ValueError(
                f"alpha_bar is {a[0]:g} at timestep {t[0]}, where a chain cannot begin: take a schedule that leaves something "
                "of the image, or fewer timesteps."
            )
        b = np.append(a[1:], 1.0)
        sigma = eta * np.sqrt((1 - a / b) * (1 - b) / (1 - a))
        return cls(t, a, b, sigma)

    def __len__(self) -> int:
        return len(self.t)

    @property
    def carry(self) -> np.ndarray:
        """`[T]` factor of the state."""
        return np.sqrt(self.b / self.a)

    @property
    def push(self) -> np.ndarray:
        """`[T]` factor of the predicted noise."""
        # Rounding must not make the root of what is left of the noise imaginary.
        direction = np.sqrt(np.maximum(1 - self.b - self.sigma**2, 0))
        return direction - np.sqrt((1 - self.a) * self.b / self.a)
