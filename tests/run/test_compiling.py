"""What is being compiled is told while it lasts, by the real trainer too."""

import threading

import jax
import jax.numpy as jnp
import pytest

from r2vpo_jax import waits
from r2vpo_jax.run import compiling
from r2vpo_jax.run.instruments import Timers
from tests.helpers.runs import stop


@pytest.fixture
def told(monkeypatch):
    """The waits that were begun, in their order, as text; each must have been ended."""
    begun, open_ = [], []

    def start(wait):
        begun.append(wait.what)
        open_.append(wait)
        return lambda done=True: open_.remove(wait)

    monkeypatch.setattr(waits, "start", start)
    yield begun
    assert not open_


def test_programs_are_told_and_counted(told):
    Timers(("update", "sampling"))

    def update(x):
        return jnp.sin(x) @ x

    x = jnp.ones((7, 7))
    told.clear()
    program = jax.jit(update)
    program(x)
    program(x)
    assert told == ["compiling update (1 of 2)"]
    jax.jit(update).lower(x)  # not compiled
    jax.jit(lambda x: x + 2)(x)
    program(jnp.ones((8, 8)))
    assert told[-1] == "compiling update (1 of 2)"
    assert "compiling <lambda>" in told


def test_a_compilation_that_fails_ends_with_its_phase(told):
    timers = Timers()

    def fail():
        with timers("update"):
            compiling._on_event("/jax/compilation_cache/compile_requests_use_cache")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert len(told) == 1


@pytest.mark.slow
def test_a_run_tells_its_programs(tiny_config, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(waits, "FIRST", 0.0005)
    monkeypatch.setattr(waits, "LONGEST", 0.05)
    monkeypatch.setattr(waits, "_silent", False)
    jax.clear_caches()
    stop(tiny_config(trainer={"eval_problems": 4, "test_problems": 4, "test_samples": 8}), tmp_path, 1)
    said = capfd.readouterr().err
    for program in ("sampling", "scoring", "update"):
        assert f"compiling {program} (" in said
    assert "of 3)" in said
    assert not [thread for thread in threading.enumerate() if thread.name == "waits"]
