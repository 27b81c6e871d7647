"""Stopping a run from outside without losing its work."""

import contextlib
import os
import signal

import jax


class StopFlag:
    """Inside `with StopFlag() as stop`, SIGTERM and SIGINT ask the loop to stop instead of ending the process.

    A second SIGINT interrupts at once. With several processes JAX's preemption service catches SIGTERM, so that all of
    them stop at the same step.
    """

    def __enter__(self) -> "StopFlag":
        self._caught = None
        self._previous = {}
        if jax.process_count() == 1:
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._catch)
        return self

    def __exit__(self, *exc_info):
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _catch(self, number, frame):
        if self._caught == signal.SIGINT == number:
            raise KeyboardInterrupt
        self._caught = number
        # Not by print, which the signal may have interrupted.
        with contextlib.suppress(OSError):
            os.write(2, f"{self.name}: stopping after this step; Ctrl-C stops at once.\n".encode())

    def requested(self, step: int) -> bool:
        """Whether to stop before step `step`."""
        if jax.process_count() > 1:
            from jax.experimental import multihost_utils

            return multihost_utils.reached_preemption_sync_point(step)
        return self._caught is not None

    @property
    def name(self) -> str:
        """Of the signal that came."""
        return signal.Signals(self._caught).name if self._caught else "SIGTERM"
