"""Sampling beside learning gives the numbers of taking turns, and ends when one of the two does."""

import threading
import time

import pytest

from r2vpo_jax.errors import UsageError
from r2vpo_jax.run import files
from r2vpo_jax.run.instruments import Timers
from r2vpo_jax.training.collector import Collector
from r2vpo_jax.training.learner import Learner
from r2vpo_jax.training.overlapped import Beside
from r2vpo_jax.training.trainer import train
from tests.helpers.runs import assert_same_run, rows, stop, undocumented

QUICK = {
    "num_iterations": 5,
    "eval_every": 9,
    "checkpoint_every": 2,
    "eval_problems": 4,
    "eval_samples": 4,
    "test_problems": 4,
    "test_samples": 4,
}
SCORES = {"batch_size": 64}


@pytest.fixture(scope="module")
def configure(tiny_config):
    def make(objective=None, **replay):
        return tiny_config(trainer=QUICK, evaluation=SCORES, replay=replay, objective=objective or {})

    return make


REPLAYS = {
    "lag 1": {"lag": 1},
    "lag 2, the share of older groups": {"lag": 2, "capacity": 2, "draw": "mixed"},
    "lag 1, by |A|, twice": {"lag": 1, "capacity": 3, "draw": "priority", "batches_per_iteration": 2, "max_age": 40},
}


@pytest.fixture(scope="module")
def in_turns(configure, tmp_path_factory):
    """The run directory of a run that takes turns, for each of REPLAYS."""
    made = {}

    def get(name):
        if name not in made:
            made[name] = tmp_path_factory.mktemp("turns") / "run"
            train(configure(**REPLAYS[name]), made[name])
        return made[name]

    return get


@pytest.mark.parametrize(
    "name", [*list(REPLAYS)[:1], *(pytest.param(name, marks=pytest.mark.slow) for name in list(REPLAYS)[1:])]
)
def test_sampling_beside_learning_gives_the_same_run(name, in_turns, configure, tiny_model, mesh, tmp_path):
    """Bit for bit: rows, samples, weights, optimizer and counters."""
    config = configure(**REPLAYS[name], overlap=True)
    train(config, tmp_path / "run")
    assert_same_run(tmp_path / "run", in_turns(name), config, tiny_model, mesh)
    assert not undocumented(name for row in files.read_jsonl(tmp_path / "run" / "metrics.jsonl") for name in row)


@pytest.mark.slow
def test_it_goes_on_from_a_checkpoint_and_may_change_its_mind(in_turns, configure, tiny_model, mesh, tmp_path):
    """Nothing is in flight in a checkpoint: each part of the run may sample as it likes."""
    name = "lag 1, by |A|, twice"
    for after, overlap in ((1, True), (2, False), (4, True)):
        stop(configure(**REPLAYS[name], overlap=overlap), tmp_path / "run", after)
    config = configure(**REPLAYS[name])
    train(config, tmp_path / "run")
    assert_same_run(tmp_path / "run", in_turns(name), config, tiny_model, mesh)


def threads():
    return [thread for thread in threading.enumerate() if thread.name == "rollouts"]


def test_it_samples_while_it_learns(configure, tmp_path, monkeypatch):
    """Learning does not end before the next responses are being verified, nor do these before it has begun."""
    verifying, learning = threading.Event(), threading.Event()
    verify, learn = Collector.verify, Learner.train_on_rollout

    def slow_verify(self, *args):
        if threading.current_thread() in threads():
            verifying.set()
            if seen:  # the queue is full
                assert learning.wait(120)
        return verify(self, *args)

    def slow_learn(self, *args):
        learning.set()
        assert verifying.wait(120)
        return learn(self, *args)

    def observe(iteration):
        seen.append(iteration)
        verifying.clear()
        learning.clear()

    seen = []
    monkeypatch.setattr(Collector, "verify", slow_verify)
    monkeypatch.setattr(Learner, "train_on_rollout", slow_learn)
    stop(configure(lag=1, overlap=True), tmp_path / "run", 3, on_iteration=observe)
    for iteration in seen[1:]:
        (verified,) = (span for span in iteration.spans if span.phase == "verify")
        updates = [span for span in iteration.spans if span.phase == "update"]
        assert any(span.start < verified.end and verified.start < span.end for span in updates)
        assert {"rollout", "wait"} <= {span.phase for span in iteration.spans}
    assert not threads()


@pytest.mark.parametrize("where", ["sampling", "learning"])
def test_what_one_of_the_two_raises_ends_the_run(where, configure, tmp_path, monkeypatch):
    """As it was raised; the last checkpoint is intact, and no thread is left."""
    config, workdir = configure(lag=1, overlap=True), tmp_path / "run"
    stop(config, workdir, 2)

    def fail(*_, **__):
        raise MemoryError(f"{where} has none left")

    with monkeypatch.context() as patch:
        patch.setattr(*((Collector, "verify") if where == "sampling" else (Learner, "train_on_rollout")), fail)
        if where == "sampling":  # not that of the noise floor, nor of the scores
            patch.setattr("r2vpo_jax.training.noise_floor.check", lambda *_, **__: 0.0)
        with pytest.raises(MemoryError, match=f"{where} has none left"):
            train(config, workdir)
    assert not threads()
    stop(config, workdir, 3)
    assert [row["iteration"] for row in rows(workdir) if row["kind"] != "evaluation"] == [1, 2, 3]


def test_waiting_has_an_end_and_says_for_what():
    timers, said, release = Timers(), [], threading.Event()

    def work():
        with timers("verify"):
            release.wait(60)

    def wait(limit, iteration, then):
        release.clear()
        with Beside(limit, timers, said.append) as beside:
            beside.start(work, f"the responses of iteration {iteration}")
            then(beside)

    def begin_more(beside):
        with pytest.raises(RuntimeError, match="the responses of iteration 3 have not been asked for yet"):
            beside.start(work, "more")
        beside.result()

    with pytest.raises(
        UsageError, match=r"learning has waited 0.2 s for the responses of iteration 3: they are being verified, \d+ s"
    ):
        wait(0.2, 3, begin_more)
    release.set()
    assert not said, "it does not wait a second time"
    assert timers.seconds["wait"] >= 0.2

    def fail(_):
        threading.Timer(1.5, release.set).start()
        raise KeyError

    with pytest.raises(KeyError):
        wait(30, 4, fail)
    (line,) = said
    assert line.startswith("the end waits, 30 s at most, for the responses of iteration 4: they are being verified")
    assert not threads()

    def interrupt(_):
        raise KeyboardInterrupt

    before = time.perf_counter()
    with pytest.raises(KeyboardInterrupt):
        wait(30, 5, interrupt)
    release.set()
    assert time.perf_counter() - before < 10, "it does not wait after Ctrl-C"


def test_what_makes_no_sense_is_refused(configure):
    for replay, message in (
        ({"lag": 0}, "replay.overlap needs replay.lag of at least 1"),
        (
            {"lag": 2, "max_age": 7},
            "with replay.lag=2 and replay.overlap a batch is 8 updates old .* more than replay.max_age=7",
        ),
        ({"lag": 1, "capacity_bytes": 10**6}, "replay.capacity_bytes does not go together with replay.overlap"),
        ({"lag": 1, "wait_limit": 0.0}, "replay.wait_limit must be > 0"),
    ):
        with pytest.raises(ValueError, match=message):
            configure(**replay, overlap=True)
    configure(lag=2, max_age=8, overlap=True)
    with pytest.raises(ValueError, match="estimator=gae has a critic, which values responses before"):
        configure({"advantage": {"estimator": "gae"}}, lag=1, overlap=True)
