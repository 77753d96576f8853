"""Where the time goes: phases inside of each other, and beside each other, add up to the clock."""

import threading
import types

import pytest

from r2vpo_jax.run import instruments
from r2vpo_jax.run.instruments import Timers


@pytest.fixture
def clock(monkeypatch):
    """A clock that is put forward by hand, and compilation that takes as long as one says."""
    clock, compiled = types.SimpleNamespace(now=100.0), threading.local()
    monkeypatch.setattr(instruments, "time", types.SimpleNamespace(perf_counter=lambda: clock.now))
    monkeypatch.setattr(instruments.compiling, "seconds", lambda: getattr(compiled, "seconds", 0.0))

    def compiles(seconds):
        clock.now += seconds
        compiled.seconds = getattr(compiled, "seconds", 0.0) + seconds

    clock.compiles = compiles
    return clock


def test_an_inner_phase_is_taken_out_of_the_outer_one(clock):
    timers = Timers()
    with timers("evaluation"):
        clock.now += 1.0
        clock.compiles(0.25)
        with timers("weights"):
            clock.now += 2.0
            clock.compiles(0.5)
        clock.now += 4.0
    assert timers.seconds == {"evaluation": 5.0, "weights": 2.0, "compile": 0.75}
    assert [(span.phase, span.end - span.start) for span in timers.take_spans()] == [
        ("weights", 2.5),
        ("evaluation", 7.75),
    ]


def test_laps_add_up_to_the_clock(clock):
    """What another thread does is counted, and told apart."""
    timers = Timers()
    clock.now += 7.0  # before the first lap
    timers.lap()

    def beside():
        with timers("rollout"):
            clock.now += 3.0
            clock.compiles(0.5)
        assert timers.phase_of(threading.get_ident()) is None

    with timers("update"):
        clock.now += 1.0
    clock.now += 0.25  # in no phase
    thread = threading.Thread(target=beside)
    thread.start()
    thread.join()
    lap = timers.lap()
    assert lap == {"update": 1.0, "rollout": 3.0, "compile": 0.5, "beside": 3.5, "iteration": 4.75}
    assert lap["iteration"] == 1.0 + 0.25 + lap["beside"], "the thread passed while the loop waited, in no phase"
    with timers("update"):
        clock.now += 2.0
    assert timers.lap() == {"update": 2.0, "rollout": 0.0, "compile": 0.0, "beside": 0.0, "iteration": 2.0}


def test_a_phase_that_fails_is_timed_and_left(clock):
    timers = Timers()

    def fail():
        with timers("verify"):
            assert timers.phase_of(threading.get_ident()) == "verify"
            clock.now += 1.0
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert timers.seconds["verify"] == 1.0
    assert timers.phase_of(threading.get_ident()) is None
