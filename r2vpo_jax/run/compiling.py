"""Compilation: the seconds that each thread has spent on it, and what is being compiled, told while it lasts (waits.py)."""

import re
import threading
from collections.abc import Sequence

import jax

from r2vpo_jax import waits

# Functions under jit -> what people call it. Of several programs of one function (other shapes), each is told.
_CALLED = {
    **dict.fromkeys(("_sample", "_start", "_advance"), "sampling"),
    **{"score": "scoring", "update": "update", "advance": "training", "respond": "sampling", "start": "start"},
    "of_rows": "scoring of samples",  # training/token_gradients.py
}
TRAINING = ("sampling", "scoring", "update")  # what a run compiles at least
FUSED = ("start", "training", "sampling")
# An event of each compilation, or look into the cache of compiled programs, at its beginning: there is none for all.
_BEGINNINGS = ("/jax/compilation_cache/compile_requests_use_cache", "/jax/compilation_cache/task_disabled_cache")

_expected: tuple[str, ...] = ()
_met: list[str] = []


class _Here(threading.local):
    seconds = 0.0  # of each thread: one may compile while another computes
    function = ""
    end = None  # of the wait that is told


_here = _Here()


def expect(programs: Sequence[str]) -> None:
    """What will be compiled from now on, as people call it, such as `TRAINING`; so that it can be said how many there are."""
    global _expected
    _expected = tuple(programs)
    _met.clear()


def seconds() -> float:
    """Those that this thread has spent on compilation."""
    return _here.seconds


def done() -> None:
    """Nothing is being compiled in this thread, also where a compilation has failed."""
    if _here.end is not None:
        _here.end()
        _here.end = None


def _text(function: str) -> str:
    name = re.sub(r"^jit\((.*)\)$|^jit_(.*)$", r"\1\2", function)
    called = _CALLED.get(name, name)
    if called not in _expected:
        return f"compiling {called or 'a program'}"
    if called not in _met:
        _met.append(called)
    return f"compiling {called} ({_met.index(called) + 1} of {len(_expected)})"


def _on_event(event: str, **_) -> None:
    if event in _BEGINNINGS:
        done()
        _here.end = waits.start(waits.Wait(_text(_here.function)))


def _on_duration(event: str, spent: float, *, fun_name: str = "", **_) -> None:
    if not event.startswith("/jax/core/compile/"):  # tracing, lowering and the backend compiler
        return
    _here.seconds += spent
    if event.endswith("/jaxpr_to_mlir_module_duration"):
        _here.function = fun_name
    elif event.endswith("/backend_compile_duration"):
        done()


jax.monitoring.register_event_listener(_on_event)
jax.monitoring.register_event_duration_secs_listener(_on_duration)
