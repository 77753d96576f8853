"""What a run says of itself: where its time goes, the JAX profiler, and which code ran."""

import contextlib
import hashlib
import os
import pathlib
import threading
import time
from collections.abc import Sequence
from typing import NamedTuple

import jax

from r2vpo_jax import cluster
from r2vpo_jax.run import compiling


class Span(NamedTuple):
    """When a phase was at work, by time.perf_counter(); compilation is not taken out."""

    phase: str
    start: float
    end: float


class _Running:
    """A phase that a thread is in."""

    def __init__(self, phase: str):
        self.phase, self.inner, self.inner_compiling = phase, 0.0, 0.0  # seconds of phases inside of it


class Timers:
    """Seconds by phase, which is also what this process is doing. Compilation inside a phase is moved to the phase "compile".

    Threads may share it. A phase inside of another is taken out of it, so the phases of one thread add up.

    Args:
      programs: what will be compiled, for people (run/compiling.py).
    """

    def __init__(self, programs: Sequence[str] = ()):
        """Nothing is timed yet; the thread that makes it is the one that others are beside of (`lap`)."""
        compiling.expect(programs)
        self.seconds = {"compile": 0.0}
        self._lock, self._spans = threading.Lock(), []
        self._running: dict[int, list[_Running]] = {}  # by thread, the innermost last
        self._thread, self._beside = threading.get_ident(), 0.0
        self._before: dict[str, float] = {}
        self.lap()

    @contextlib.contextmanager
    def __call__(self, phase: str):
        thread, start, compiled = threading.get_ident(), time.perf_counter(), compiling.seconds()
        mine, stack = _Running(phase), self._running.setdefault(thread, [])
        stack.append(mine)
        try:
            with cluster.phase(phase):
                yield
        finally:
            end, spent = time.perf_counter(), compiling.seconds() - compiled
            compiling.done()
            stack.pop()
            if stack:
                stack[-1].inner += end - start
                stack[-1].inner_compiling += spent
            own, own_compiling = end - start - mine.inner, spent - mine.inner_compiling
            with self._lock:
                self.seconds[phase] = self.seconds.get(phase, 0.0) + max(own - own_compiling, 0.0)
                self.seconds["compile"] += own_compiling
                if thread != self._thread:
                    self._beside += own
                self._spans.append(Span(phase, start, end))

    def phase_of(self, thread: int | None) -> str | None:
        """The phase that a thread is in, by its identifier; None: in none."""
        stack = self._running.get(thread)
        return stack[-1].phase if stack else None

    def take_spans(self) -> list[Span]:
        """The phases that have ended since they were last asked for, in the order of their ends."""
        with self._lock:
            taken, self._spans = self._spans, []
        return taken

    def lap(self) -> dict[str, float]:
        """Seconds by phase since the last lap; also "beside", those of all phases in other threads, and "iteration", all.

        The phases less "beside" are part of "iteration"; the rest of it was in no phase.
        """
        now = time.perf_counter()
        with self._lock:
            seconds = dict(self.seconds) | {"beside": self._beside, "iteration": now}
        before, self._before = self._before, seconds
        return {name: value - before.get(name, 0.0) for name, value in seconds.items()}


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
