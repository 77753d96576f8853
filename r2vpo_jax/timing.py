"""Where the time goes: phases of a run, with compilation counted apart."""

import contextlib
import time

import jax

_compile_seconds = 0.0


def _on_duration(event: str, seconds: float, **_) -> None:
    global _compile_seconds
    if event.startswith("/jax/core/compile/"):  # tracing, lowering and the backend compiler
        _compile_seconds += seconds


jax.monitoring.register_event_duration_secs_listener(_on_duration)


class Timers:
    """Seconds by phase. Compilation inside a phase is moved to the phase "compile"."""

    def __init__(self):
        self.seconds = {"compile": 0.0}

    @contextlib.contextmanager
    def __call__(self, phase: str):
        start, compiled = time.perf_counter(), _compile_seconds
        try:
            yield
        finally:
            compiling = _compile_seconds - compiled
            elapsed = max(time.perf_counter() - start - compiling, 0.0)
            self.seconds[phase] = self.seconds.get(phase, 0.0) + elapsed
            self.seconds["compile"] += compiling
