"""Rows in packs: the plan, and that nothing which is learned or measured depends on it."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from r2vpo_jax import losses
from r2vpo_jax.config import make_objective
from r2vpo_jax.training import packing, update
from r2vpo_jax.training.settings import UpdateSettings
from r2vpo_jax.training.update import Optimizers
from tests.helpers.learner import RATE, assert_same_stats
from tests.helpers.params import with_config
from tests.helpers.rollouts import empty
from tests.models.goldens import golden

# ---- the plan ----

PROMPT, RESPONSE = 20, 60
plan_of = jax.jit(packing.plan, static_argnames=("row_size", "response_size"))


def plan(prompt_length, response_length, take=None):
    take = np.ones(len(prompt_length), bool) if take is None else take
    made = plan_of(prompt_length, response_length, take, row_size=PROMPT + RESPONSE, response_size=RESPONSE)
    return jax.tree.map(np.asarray, made)


def assert_is_a_plan(made, prompt, response, take):
    """Each row that is wanted has one place, and no pack holds more than fits."""
    placed = made.rows[made.rows >= 0]
    wanted = np.flatnonzero(take & (response > 0))
    np.testing.assert_array_equal(np.sort(placed), wanted)
    np.testing.assert_array_equal(np.flatnonzero(made.pack >= 0), wanted)
    for number, rows in enumerate(made.rows):
        there = rows[rows >= 0]
        np.testing.assert_array_equal(rows[: len(there)], there, "slots are filled from the first on")
        assert (len(there) > 0) == (number < made.count)
        assert np.sum(prompt[there] + response[there]) <= PROMPT + RESPONSE
        assert np.sum(response[there]) <= RESPONSE
        np.testing.assert_array_equal(made.pack[there], number)
        np.testing.assert_array_equal(made.offset[there], np.cumsum(response[there]) - response[there])


@pytest.mark.parametrize("rows", [1, 24, 96])
def test_every_row_has_one_place_and_packs_are_few(rows):
    for seed in range(20):
        generator = np.random.default_rng(seed)
        prompt = generator.integers(1, PROMPT + 1, rows).astype(np.int32)
        response = np.clip(generator.lognormal(math.log(RESPONSE / 4) - 0.5, 1.0, rows), 1, RESPONSE).astype(np.int32)
        take = np.ones(rows, bool)
        if seed % 2:
            take = generator.random(rows) < 0.7
            response[generator.random(rows) < 0.1] = 0
        made = plan(prompt, response, take)
        assert_is_a_plan(made, prompt, response, take)
        prompt, response = prompt[take & (response > 0)], response[take & (response > 0)]
        least = max(
            math.ceil((prompt + response).sum() / (PROMPT + RESPONSE)),
            math.ceil(response.sum() / RESPONSE),
            math.ceil(len(response) / packing.SLOTS),
        )
        assert made.count <= max(1.25 * least, least + 1), (seed, made.count, least)


@pytest.mark.parametrize(
    ("prompt", "response", "count"),
    [
        (np.full(5, PROMPT), np.full(5, RESPONSE), 5),  # nothing shares a pack
        (np.full(5, PROMPT), np.zeros(5), 0),
        (np.ones(2 * packing.SLOTS), np.ones(2 * packing.SLOTS), 2),  # tokens would fit, slots do not
        (np.full(4, PROMPT), np.full(4, RESPONSE // 4), 2),  # prompts count: 35 tokens each
        (np.ones(4), np.full(4, RESPONSE // 2), 2),
    ],
)
def test_plans_by_hand(prompt, response, count):
    prompt, response = prompt.astype(np.int32), response.astype(np.int32)
    made = plan(prompt, response)
    assert_is_a_plan(made, prompt, response, np.ones(len(prompt), bool))
    assert made.count == count


# ---- updates ----

ROWS, COLUMNS = 12, (5, 9)


class Table:
    """As a decoder is called: a hidden state is the mean of the embeddings so far, each turned by its position."""

    config = type("Config", (), {"hidden_size": 4})

    def apply(self, variables, *args, method):
        embed = variables["params"]["embed"]
        if method == "unembedding":
            return embed.T
        if method == "unembed":
            return args[0] @ args[1]
        tokens, positions, segments = args
        segments = segments.astype(jnp.int32)
        size = tokens.shape[1]
        seen = (segments[:, :, None] == segments[:, None, :]) & (jnp.arange(size)[:, None] >= jnp.arange(size))
        seen = (seen & (segments != 0)[:, None, :]).astype(jnp.float32)
        turned = embed[tokens] * jnp.cos(positions[..., None] + jnp.arange(4.0))
        return jnp.einsum("bst,bte->bse", seen, turned) / jnp.maximum(seen.sum(-1, keepdims=True), 1.0)


def make_rollout(num_tokens, rows=ROWS, columns=COLUMNS):
    """Ragged rows; two take no part, and one has no response."""
    generator = np.random.default_rng(0)
    prompt, size = columns
    response_length = np.clip(generator.lognormal(math.log(size / 3), 0.8, rows), 1, size).astype(np.int32)
    response_length[4] = 0
    keep = np.ones(rows, bool)
    keep[[2, 7]] = False
    return empty(
        rows,
        prompt,
        size,
        tokens=generator.integers(0, num_tokens, (rows, prompt + size)).astype(np.int32),
        prompt_length=generator.integers(1, prompt + 1, rows).astype(np.int32),
        response_length=response_length,
        behavior_logp=(-np.log(num_tokens) + 0.3 * generator.standard_normal((rows, size))).astype(np.float32),
        temperature=generator.uniform(0.8, 1.2, rows).astype(np.float32),
        advantage=generator.standard_normal(rows).astype(np.float32),
        keep=keep,
        version=-generator.integers(0, 70, rows).astype(np.int32),
    )


@functools.partial(jax.jit, static_argnums=(2, 3), compiler_options={"xla_backend_optimization_level": 0})
def one_update(params, rollout, model, settings):
    """(gradients, statistics, log-probabilities, V) of one update."""
    optimizers = Optimizers(optax.sgd(RATE))
    state = update.init_state(params, model, optimizers, settings)
    after, stats = update.update(state, rollout, model, optimizers, settings)
    grads = jax.tree.map(lambda new, old: (old - new) / RATE, after.params, params)
    return (
        grads,
        stats,
        update.score(params, rollout, model, settings),
        update.variance(state, rollout, model, settings),
    )


def assert_packing_changes_nothing(params, rollout, model, settings, packed_model=None):
    packed_settings = dataclasses.replace(settings, packing=True)
    actual = jax.tree.map(np.asarray, one_update(params, rollout, packed_model or model, packed_settings))
    expected = jax.tree.map(np.asarray, one_update(params, rollout, model, settings))
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected[0]))
    assert largest > 1e-3
    for (path, a), e in zip(jax.tree_util.tree_leaves_with_path(actual[0]), jax.tree.leaves(expected[0]), strict=True):
        np.testing.assert_allclose(a, e, rtol=1e-5, atol=1e-5 * largest, err_msg=jax.tree_util.keystr(path))
    assert_same_stats(actual[1], expected[1])
    mask = np.asarray(rollout.response_mask)
    np.testing.assert_allclose(actual[2][mask], expected[2][mask], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(actual[3], expected[3], rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "micro_batch_size"),
    [
        case if case[0] == "gspo" else pytest.param(*case, marks=pytest.mark.slow)
        for case in zip(losses.names(), (3, 6, 12, None) * len(losses.names()), strict=False)
    ],
)
def test_packing_changes_no_objective(name, micro_batch_size):
    settings = UpdateSettings(
        make_objective(name, loss={"entropy_coef": 0.3}), 2, 1, micro_batch_size=micro_batch_size, scoring_chunk_size=4
    )
    params = {"embed": np.random.default_rng(1).standard_normal((11, 4)).astype(np.float32)}
    rollout = make_rollout(11)  # some objectives come with a KL divergence to a reference
    rollout = rollout.replace(reference_logp=0.9 * rollout.behavior_logp)
    assert_packing_changes_nothing(params, rollout, Table(), settings)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "block"),
    [
        ("kv2_untied_rope_theta", 0),
        ("kv2_untied_rope_theta", 4),
        ("qwen3_tied", 0),
        ("llama_llama3_tied_bias", 4),
        ("mistral_untied", 0),
        ("pangu_tied", 4),
    ],
)
def test_packing_changes_no_family(case, block):
    """Packed with attention in blocks against whole rows with all queries at one time."""
    model, params, *_ = golden(case)
    settings = UpdateSettings(make_objective("r2vpo_fixed"), 2, 1, micro_batch_size=4, scoring_chunk_size=4)
    rollout = make_rollout(model.config.num_tokens or model.config.vocab_size)
    packed_model = with_config(model, attention_block_size=block)
    assert_packing_changes_nothing(params, rollout, model, settings, packed_model)


def test_a_batch_without_anything_to_learn_is_an_update_of_nothing():
    settings = UpdateSettings(make_objective("r2vpo"), 2, 1, micro_batch_size=3, packing=True)
    params = {"embed": np.ones((11, 4), np.float32)}
    rollout = make_rollout(11).replace(keep=np.zeros(ROWS, bool))
    grads, stats, logp, variance = one_update(params, rollout, Table(), settings)
    assert not np.any(grads["embed"])
    assert stats.mean("loss") == variance == stats.sums["ratio"][1] == 0
    assert np.all(np.asarray(logp)[np.asarray(rollout.response_mask)] != 0), "scores are of all rows"
