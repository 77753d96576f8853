"""A tiny evaluation, and a run directory in the middle of a run."""

import functools
import json

import jax
import numpy as np
import pytest

from r2vpo_jax import config as config_lib
from r2vpo_jax import sharding
from r2vpo_jax.models.base import open_base_model
from r2vpo_jax.run import checkpoints
from r2vpo_jax.training.learner import Learner
from tests.helpers.evaluations import silent, tiny


@pytest.fixture(scope="session")
def make(tiny_checkpoint):
    """The configuration of a tiny evaluation, changed by keywords."""
    return lambda sections=None, *, model=tiny_checkpoint, **changes: tiny(model, sections, **changes)


@pytest.fixture(scope="session")
def finished(make, tmp_path_factory):
    """(directory, summary) of an evaluation that nobody disturbed. Copy it before changing it."""
    path = tmp_path_factory.mktemp("finished") / "eval"
    return path, silent(make(), path)


@pytest.fixture(scope="session")
def unfinished(tiny_config, tiny_model, tmp_path_factory):
    """A run directory with checkpoints 2, 4 and 6, the 6 torn; validation was best at 2. Weights: i + those of the base."""
    path = tmp_path_factory.mktemp("run") / "run"
    model, params = tiny_model
    config = tiny_config()
    mesh = sharding.make_mesh((1, 1, 1), jax.devices()[:1])
    learner = Learner(model, config, mesh)
    base = open_base_model(config.model)
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config_lib.to_dict(config)))
    saver = checkpoints.Checkpointer(path / "checkpoints", max_to_keep=9)
    for step in (2, 4, 6):
        state = learner.init_state(jax.tree.map(functools.partial(np.add, step), params))
        saver.save(step, state, {"model": base.identity()}, score=1 / step)
    saver.close()
    file = max((path / "checkpoints" / "6").rglob("*"), key=lambda p: p.stat().st_size if p.is_file() else 0)
    file.write_bytes(file.read_bytes()[:-1])
    return path
