"""What a run says on the console."""

import math
import resource
import sys
from collections.abc import Mapping

import jax

from deqjax.training.state import count_parameters, named_leaves


def say(text: str) -> None:
    """To the console, from the first process only."""
    if jax.process_index() == 0:
        print(text, flush=True)


def parameter_overview(shapes, shardings) -> str:
    """A table of all parameters, where each is split, and their number."""
    rows = [("parameter", "shape", "dtype", "numbers", "split over")]
    places = named_leaves(shardings)
    for path, leaf in named_leaves(shapes).items():
        split = ", ".join(f"{axis} on {name}" for axis, name in enumerate(places[path].spec) if name) or "-"
        rows.append(("/".join(path), "x".join(map(str, leaf.shape)) or "1", str(leaf.dtype), f"{leaf.size:,}", split))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    size = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))
    return "\n".join([*lines, f"Parameters: {count_parameters(shapes):,} ({size / 2**20:,.1f} MiB)"])


def peak_memory() -> float:
    """The most memory that one of this process's devices has used, in GiB; of a CPU, that the process has."""
    statistics = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [entry["peak_bytes_in_use"] for entry in statistics if "peak_bytes_in_use" in entry]
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes
    return (max(peaks) if peaks else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit) / 2**30


def console_line(step, total, values, speed, items) -> str:
    """Progress, speed, memory and the vitals, on one line."""
    parts = [f"[{step}/{total}]"]
    if speed:
        rate = speed["time/steps_per_s"]
        parts.append(f"{short(rate)} steps/s" + (f" {short(rate * items[1])} {items[0]}/s" if items else ""))
        parts.append(f"ETA {duration(speed['time/eta_s'])} {short(speed['time/memory_gib'])} GiB")
    first = [name for name in ("loss", "grad_norm", "lr") if name in values]
    rest = sorted(name for name in values if name not in first and _worth_a_place(name, values[name]))
    return " ".join(parts) + " | " + shown({name: values[name] for name in first + rest})


def _worth_a_place(name, value) -> bool:
    """The log file has everything; the line leaves out absolute residuals, and counts of trouble while there is none."""
    kind = name.rpartition("/")[2]
    return kind != "abs" and (kind not in ("skipped", "non_finite") or value > 0)


def shown(values: Mapping[str, float]) -> str:
    """Metrics as `name number` on one line."""
    return " ".join(f"{name} {short(float(value))}" for name, value in values.items())


def duration(seconds: float) -> str:
    """E.g. `2h05m`, `3m20s`, `12s`."""
    seconds = round(seconds)
    if seconds >= 3600:
        return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"
    return f"{seconds // 60}m{seconds % 60:02d}s" if seconds >= 60 else f"{seconds}s"


def short(value: float) -> str:
    """A number for the console."""
    return f"{value:.2e}" if value and not 1e-2 <= abs(value) < 1e5 else f"{value:.4g}"
