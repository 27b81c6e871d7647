"""Pictures of what a solve did."""

import numpy as np

from deqjax.core.stats import SolverStats

# Up to so many samples each get a line of their own.
_LINES = 12


def plot_convergence(stats: SolverStats, ax=None, *, mode: str = "rel", tol: float | None = None):
    """Residual against evaluations of f, one line a sample, or the median and the bands around it when there are many.

    Args:
      stats: of a solve, or of many under `vmap`; outside `jit`.
      ax: Matplotlib axes to draw on; None makes a figure.
      mode: "rel" or "abs".
      tol: draws the tolerance as a line.

    Returns:
      The axes.

    Raises:
      ImportError: Matplotlib is not installed.
      ValueError: there is no such residual, or no trace to draw.
    """
    if mode not in ("abs", "rel"):
        raise ValueError(f'mode={mode!r}: must be "abs" or "rel".')
    trace_BN = np.asarray(getattr(stats, f"{mode}_trace"), np.float64)
    trace_BN = trace_BN.reshape(stats.status.size, trace_BN.shape[-1])
    if not stats.status.size:
        raise ValueError("these statistics are of no samples: there is nothing to draw.")
    if not np.any(np.asarray(stats.steps)):
        raise ValueError("these statistics have no trace: the solve took no steps.")
    if not np.any(np.isfinite(trace_BN)):
        raise ValueError("no residual of these statistics is finite: f gave NaN or infinity from the first step on.")
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError('plotting needs Matplotlib: pip install "deqjax[viz]"') from error

    ax = plt.figure(figsize=(6, 4)).add_subplot() if ax is None else ax
    taken_B = np.ravel(stats.steps)
    # A solve without monitoring measures at its end only.
    steps = np.arange(1, trace_BN.shape[1] + 1) if trace_BN.shape[1] > 1 else taken_B[:1]
    # The padding after a sample's end is not a measurement.
    trace_BN = np.where((steps[None] <= taken_B[:, None]) & np.isfinite(trace_BN), trace_BN, np.nan)
    if len(trace_BN) <= _LINES:
        for i, trace in enumerate(trace_BN):
            ax.plot(steps, trace, marker=".", linewidth=1, label=f"sample {i}")
        if len(trace_BN) > 1:
            ax.legend(fontsize="small")
    else:
        shown = np.any(np.isfinite(trace_BN), axis=0)
        levels = np.nanquantile(trace_BN[:, shown], [0.0, 0.25, 0.5, 0.75, 1.0], axis=0)
        for low, high, alpha, label in ((0, 4, 0.15, "all"), (1, 3, 0.3, "middle half")):
            ax.fill_between(steps[shown], levels[low], levels[high], alpha=alpha, color="tab:blue", label=label, linewidth=0)
        ax.plot(steps[shown], levels[2], color="tab:blue", label="median of those still running")
        ax.legend(fontsize="small")
    if tol is not None:
        ax.axhline(tol, color="grey", linestyle="--", linewidth=1)
    ax.set_yscale("log")
    ax.set_xlabel("evaluations of f")
    ax.set_ylabel("|f(z) - z| / |f(z)|" if mode == "rel" else "|f(z) - z|")
    return ax
