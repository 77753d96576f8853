"""What a run says of itself: where its time goes, the JAX profiler, and which code ran."""

import contextlib
import hashlib
import os
import pathlib
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
            self.close()

    def close(self) -> None:
        """End a recording that is under way."""
        if self._running:
            jax.effects_barrier()
            jax.profiler.stop_trace()
            self._running = False


CODE_CHANGED = "warning: the code has changed since this {} was started; the rest of it runs the new code"


def machine() -> dict[str, str | int]:
    """What decides the last digits besides configuration and code: JAX, the devices and, where they are several, the
    processes; on processors the cores.

    XLA shares a sum out over the threads of its pool, one for each core that the process may use.
    """
    device = jax.devices()[0]
    said = {"jax": jax.__version__, "device": device.device_kind, "devices": jax.device_count()}
    if jax.process_count() > 1:
        said["processes"] = jax.process_count()
    if device.platform == "cpu":
        said["cores"] = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return said


def machine_changed(before: dict | None, now: dict) -> str:
    """A line for people about two different results of `machine`."""
    one = {"processes": 1}  # said of several only
    before, now = one | (before or {}), one | now
    changes = [
        f"{name} {before.get(name, 'unknown')} there, {now.get(name, 'none')} here"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
    ]
    return (
        f"warning: the run goes on with {'; '.join(changes)}: from here on the last digits may differ from those of a run "
        "on one machine"
    )


def code_identity() -> str:
    """The first 16 hex digits of the sha256 of all .py files of this package, names and contents."""
    root = pathlib.Path(__file__).parents[1]
    digest = hashlib.sha256()
    for file in sorted(root.rglob("*.py")):
        digest.update(str(file.relative_to(root)).encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()[:16]
