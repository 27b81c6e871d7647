"""A trace of some training steps, for TensorBoard's profiler or Perfetto."""

import jax

from deqjax.training.console import say


class Profile:
    """Inside `with Profile(...)`, `before(step)` starts the trace at the first step and stops it after the last."""

    def __init__(self, folder, first: int, steps: int):
        """Args:
        folder: where the trace goes.
        first: the first step to trace; the ones before compile and warm up.
        steps: how many; 0 traces nothing.
        """
        self._folder, self._first, self._last, self._running = folder, first, first + steps, False

    def before(self, step: int, state) -> None:
        """To be called before each step, with the state that the one before leaves."""
        if step == self._last:
            jax.block_until_ready(state)
            self._stop()
        elif step == self._first and not self._running:
            jax.profiler.start_trace(str(self._folder))
            self._running = True

    def _stop(self):
        if self._running:
            self._running = False
            try:
                jax.profiler.stop_trace()
            except (RuntimeError, OSError) as error:  # what only watches a run must not end it
                say(f"The trace could not be written to {self._folder}: {error}.")
            else:
                say(f"Wrote a trace to {self._folder}: tensorboard --logdir {self._folder}")

    def __enter__(self) -> "Profile":
        return self

    def __exit__(self, *exc_info):
        self._stop()
