"""The base models are made by code that makes smaller ones in seconds."""

import dataclasses

import jax
import numpy as np
import pytest

from experiments.base_models import pretraining
from experiments.base_models.pretraining import PretrainConfig
from r2vpo_jax import models
from r2vpo_jax.config import ModelConfig
from r2vpo_jax.evaluation.validation import evaluate
from r2vpo_jax.models.base import open_base_model
from r2vpo_jax.tasks.arithmetic import SYMBOLS
from tests.helpers.params import random_params
from tests.make_tiny_base import CONFIG


@pytest.fixture(scope="module")
def pretrained(task):
    """(model, params, losses by step)."""
    losses = {}
    model, params = pretraining.pretrain(CONFIG, task, len(SYMBOLS), losses.__setitem__)
    return model, params, losses


def test_the_loss_falls_and_answers_come(pretrained, tiny_model, task, mesh):
    """With bounds that any seed meets: of four seeds, losses[100] is 0.85 to 0.96, losses[300] 0.67 to 0.76 of it."""
    model, params, losses = pretrained
    assert sorted(losses) == [100, 200, 300]
    # Guessing among the symbols costs log 17 = 2.83 nats a token; a model that has stopped to learn stays where it is.
    assert losses[100] < 1.5
    assert losses[300] < 0.9 * losses[100]
    settings = {"split": "test", "num_problems": 16, "num_samples": 16, "mesh": mesh, "batch_size": 16}
    trained = evaluate(model, params, task, **settings)
    untrained = evaluate(model, random_params(model), task, **settings)
    # 256 samples, of which 20 to 41 are right, and 0 to 6 reach no end of text; untrained it is 0 and 242.
    assert untrained.right.mean() < 0.01
    assert trained.right.mean() > 0.03
    assert trained.truncated.mean() < 0.2 < 0.8 < untrained.truncated.mean()
    assert model.config == tiny_model[0].config, "tests/tiny_base is another model"


def test_the_model_is_the_one_asked_for(pretrained):
    model, params, _ = pretrained
    config = model.config
    assert (config.hidden_size, config.intermediate_size, config.num_layers) == (16, 32, 1)
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (2, 1, 8)
    assert (config.vocab_size, config.num_tokens) == (32, len(SYMBOLS))
    jax.tree.map(lambda x, a: np.testing.assert_equal(x.shape, a.shape), params, models.abstract_params(model))


def test_a_seed_decides_the_weights(pretrained, task):
    (_, same), (_, other) = (
        pretraining.pretrain(dataclasses.replace(CONFIG, seed=CONFIG.seed + i), task, len(SYMBOLS)) for i in (0, 1)
    )
    jax.tree.map(np.testing.assert_array_equal, same, pretrained[1])
    assert np.any(np.asarray(same["embed"]) != other["embed"])


def test_word_problems_make_a_checkpoint_that_runs_can_open(tmp_path):
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1}
    config = dataclasses.replace(
        pretraining.CONFIGS["word_problems"], num_steps=4, batch_size=4, micro_batch_size=4, **sizes
    )
    losses = {}
    pretraining.make_checkpoint(tmp_path, "word_problems", config, losses.__setitem__)
    assert list(losses) == [4]
    base = open_base_model(ModelConfig(path=str(tmp_path)))
    assert [base.tokenizer.convert_ids_to_tokens(i) for i in base.eos_ids] == ["<|im_end|>", "<|endoftext|>"]
    assert base.model.config.num_tokens == len(base.tokenizer)
    assert (base.model.config.hidden_size, base.model.config.vocab_size) == (16, 512)
    _, params = models.from_pretrained(tmp_path)
    assert {x.dtype.name for x in jax.tree.leaves(params)} == {"bfloat16"}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_steps": 0}, "num_steps must be at least 1"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"micro_batch_size": 48}, "batch_size=128 is not a multiple of"),
        ({"forget_carry": 1.5}, "forget_carry is a probability"),
        ({"misread": 2.0}, "misread is a probability"),
        ({"slip": -0.1}, "slip is a probability"),
    ],
)
def test_bad_settings_raise(fields, message):
    with pytest.raises(ValueError, match=message):
        PretrainConfig(**fields)
