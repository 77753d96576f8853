"""The JAX profiler over a range of iterations."""

import contextlib

import jax


class Profiler:
    """Records iterations first to last (counted from 1) under workdir/profile; nothing if there is no range."""

    def __init__(self, workdir, steps):
        self._directory = str(workdir / "profile")
        self._first, self._last = steps or (0, -1)
        self._running = False

    @contextlib.contextmanager
    def iteration(self, number: int):
        """Around an iteration."""
        if self._first <= number <= self._last and not self._running:
            jax.profiler.start_trace(self._directory)
            self._running = True
        with jax.profiler.StepTraceAnnotation("iteration", step_num=number):
            yield
        if number == self._last:
            self.stop()

    def stop(self) -> None:
        """End a recording that is under way."""
        if self._running:
            jax.effects_barrier()
            jax.profiler.stop_trace()
            self._running = False
