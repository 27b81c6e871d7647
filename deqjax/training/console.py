"""What a run says on the console."""

from collections.abc import Mapping

import jax


def say(text: str) -> None:
    """To the console, from the first process only."""
    if jax.process_index() == 0:
        print(text, flush=True)


def console_line(step, total, values, speed, items) -> str:
    """Progress, speed and the vitals, on one line."""
    parts = [f"[{step}/{total}]"]
    if speed:
        rate = speed["time/steps_per_s"]
        parts.append(f"{short(rate)} steps/s" + (f" {short(rate * items[1])} {items[0]}/s" if items else ""))
        parts.append(f"ETA {duration(speed['time/eta_s'])}")
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
