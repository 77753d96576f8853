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


@pytest.mark.parametrize("name", REPLAYS)
def test_sampling_beside_learning_gives_the_same_run(name, in_turns, configure, tiny_model, mesh, tmp_path):
    """Bit for bit: rows, samples, weights, optimizer and counters."""
    config = configure(**REPLAYS[name], overlap=True)
    train(config, tmp_path / "run")
    assert_same_run(tmp_path / "run", in_turns(name), config, tiny_model, mesh)
    assert not undocumented(name for row in files.read_jsonl(tmp_path / "run" / "metrics.jsonl") for name in row)
