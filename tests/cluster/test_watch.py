"""Who is gone, told from beats in a store; the clock is the test's."""

import json

import pytest

from r2vpo_jax.cluster import watch
from r2vpo_jax.cluster.watch import LOST, Watch


class Store:
    """A `store.Store` in memory; may be gone."""

    def __init__(self):
        self.values, self.gone = {}, False

    def set(self, key, value):
        if self.gone:
            raise RuntimeError("UNAVAILABLE: Socket closed")
        self.values[key] = value

    def under(self, folder):
        if self.gone:
            raise RuntimeError("UNAVAILABLE: Socket closed")
        return {key.rpartition("/")[2]: value for key, value in self.values.items() if key.rpartition("/")[0] == folder}


class Run:
    """Three processes."""

    def __init__(self):
        self.now, self.store = 0.0, Store()
        self.watches = [
            Watch(self.store, i, ["a", "b", "c"], timeout=100, reachable=lambda: True, clock=lambda: self.now)
            for i in range(3)
        ]

    def go(self, seconds, alive=(0, 1, 2), asleep=()):
        """Time passes; these beat and look."""
        until = self.now + seconds
        while self.now < until:
            self.now += 2
            for i in set(alive) - set(asleep):
                self.watches[i].beat()
                if found := self.watches[i].verdict():
                    return i, found
        return None


@pytest.fixture
def run(monkeypatch):
    monkeypatch.setattr(watch, "where", watch.Where(3, "update"))
    run = Run()
    assert run.go(500) is None
    return run


def test_a_peer_without_a_beat_is_gone_within_the_heartbeat(run):
    assert run.go(90, alive=(0, 1)) is None
    _, found = run.go(10, alive=(0, 1))
    assert (found.code, found.gone) == (LOST, (2,))
    assert (
        found.why
        == "process 2 on c (last heard of in iteration 3, update) is gone or stopped: no sign of life for 96 s"
    )


def test_several(run):
    _, found = run.go(100, alive=(0,))
    assert found.why.startswith("processes 1, 2 are gone or stopped")


def test_after_an_error_it_is_told_sooner(run):
    run.watches[1]._failed = True
    who, found = run.go(14, alive=(0, 1))
    assert (who, found.gone) == (1, (2,))


def test_process_0_takes_the_store_with_it(run):
    run.store.gone = True
    assert run.go(94, alive=(1, 2)) is None
    _, found = run.go(6, alive=(1, 2))
    assert found.gone == (0,)
    assert "process 0 on a" in found.why


def test_who_stood_still_does_not_blame_the_others(run):
    assert run.go(80, alive=(0, 1)) is None
    assert run.go(200, alive=(), asleep=(0, 1, 2)) is None
    assert run.go(50) is None, "all went on"
    run.store.set("end/0", json.dumps({"code": LOST, "gone": [2]}))
    found = run.watches[2].beat() or run.watches[2].verdict()
    assert found.why.startswith("the other processes have ended: they had no sign of life of this one")


@pytest.mark.parametrize(("code", "mine", "how"), [(2, 2, "refused to go on"), (1, LOST, "ended")])
def test_a_process_that_says_why_it_ends(run, code, mine, how):
    run.store.set("end/1", json.dumps({"code": code, "error": "no such file"}))
    who, found = run.go(2, alive=(0,))
    assert (who, found.code, found.why) == (0, mine, f"process 1 on b {how}: no such file")


def test_one_that_was_told_of_a_third_tells_the_same(run):
    run.store.set("end/1", json.dumps({"code": LOST, "gone": [2]}))
    _, found = run.go(2, alive=(0,))
    assert found.gone == (2,)
    assert "process 2 on c" in found.why


def test_a_peer_that_is_done_is_not_missed(run):
    run.store.set("end/2", json.dumps({"code": 0}))
    run.store.set("end/1", json.dumps({"code": 0}))
    assert run.go(500, alive=(0,)) is None
    assert run.watches[0]._all_ended()
    assert not run.watches[1]._all_ended()


def test_what_to_do(monkeypatch):
    monkeypatch.setattr(watch, "where", watch.Where(saved=12))
    assert "goes on from checkpoint 12, or a later one; scripts/run_until_done.sh" in watch.what_to_do(LOST)
    assert "put that right" in watch.what_to_do(2)
    monkeypatch.setattr(watch, "where", watch.Where())
    with watch.phase("reading"):
        assert str(watch.where) == "reading"
        with pytest.raises(KeyError), watch.phase("failing"):
            raise KeyError
        assert str(watch.where) == "failing", "the line says where it happened"
