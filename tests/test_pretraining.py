"""The base model is made by code that makes a smaller one in seconds."""

import dataclasses

import jax
import numpy as np
import pytest

from r2vpo_jax import models, pretraining
from r2vpo_jax.evaluation import evaluate
from r2vpo_jax.pretraining import PretrainConfig
from r2vpo_jax.tasks.arithmetic import SYMBOLS
from tests.conftest import PRETRAIN, random_params


def test_the_loss_falls_and_answers_come(pretrained, task, mesh):
    model, params, losses = pretrained
    assert sorted(losses) == [100, 200, 300]
    # Guessing among the symbols costs log 17 = 2.83 nats a token.
    assert losses[100] < 1.5
    assert losses[300] < 0.75 * losses[100]
    settings = {"split": "test", "num_problems": 16, "num_samples": 16, "mesh": mesh, "batch_size": 16}
    trained = evaluate(model, params, task, **settings)
    untrained = evaluate(model, random_params(model), task, **settings)
    assert trained.right.mean() > 0.05 + untrained.right.mean()
    assert trained.truncated.mean() < 0.5


def test_the_model_is_the_one_asked_for(pretrained):
    model, params, _ = pretrained
    config = model.config
    assert (config.hidden_size, config.intermediate_size, config.num_layers) == (16, 32, 1)
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (2, 1, 8)
    assert (config.vocab_size, config.num_tokens) == (32, len(SYMBOLS))
    jax.tree.map(lambda x, a: np.testing.assert_equal(x.shape, a.shape), params, models.abstract_params(model))


def test_a_seed_decides_the_weights(pretrained, task):
    (_, same), (_, other) = (
        pretraining.pretrain(dataclasses.replace(PRETRAIN, seed=seed), task, len(SYMBOLS)) for seed in (0, 1)
    )
    jax.tree.map(np.testing.assert_array_equal, same, pretrained[1])
    assert np.any(np.asarray(same["embed"]) != other["embed"])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_steps": 0}, "num_steps must be at least 1"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"micro_batch_size": 48}, "batch_size=128 is not a multiple of"),
        ({"forget_carry": 1.5}, "forget_carry is a probability"),
        ({"slip": -0.1}, "slip is a probability"),
    ],
)
def test_bad_settings_raise(fields, message):
    with pytest.raises(ValueError, match=message):
        PretrainConfig(**fields)
