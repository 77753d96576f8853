"""Scoring: what a full forward pass says, whatever the chunks and the padding, and without its memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r2vpo_jax import scoring
from r2vpo_jax.models import Decoder, DecoderConfig, abstract_params
from tests.helpers.params import jaxpr_sizes, random_params, with_config

MODEL = Decoder(
    DecoderConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_layers=1,
        num_heads=4,
        num_kv_heads=2,
        head_dim=4,
        num_tokens=17,
    )
)
PARAMS = random_params(MODEL)
BATCH, PROMPT, RESPONSE = 4, 6, 11
TEMPERATURE = np.array([1.0, 0.7, 1.3, 1.0], np.float32)


@pytest.fixture(scope="module")
def rows():
    """tokens [B, P + T] with junk outside of the lengths, prompt lengths, response lengths."""
    tokens = np.random.default_rng(0).integers(0, 17, (BATCH, PROMPT + RESPONSE)).astype(np.int32)
    return tokens, np.array([6, 1, 4, 3], np.int32), np.array([11, 4, 1, 7], np.int32)


@functools.partial(jax.jit, static_argnames=("prompt_size", "chunk_size"))
def score(
    params, tokens, prompt_length, response_length, temperature=TEMPERATURE, *, prompt_size=PROMPT, chunk_size=128
):
    lengths = prompt_length, response_length
    return scoring.score(MODEL, params, tokens, *lengths, temperature, prompt_size=prompt_size, chunk_size=chunk_size)[
        :2
    ]


@functools.partial(jax.jit, static_argnames="chunk_size")
def weighted_sum(params, tokens, prompt_length, response_length, chunk_size):
    """A scalar whose gradient depends on every log-probability and every entropy that counts."""
    logps, entropy = score(params, tokens, prompt_length, response_length, chunk_size=chunk_size)
    mask = jnp.arange(logps.shape[1]) < response_length[:, None]
    weight = jnp.cos(jnp.arange(logps.size).reshape(logps.shape))
    return jnp.sum(jnp.where(mask, weight * logps + 0.3 * weight**2 * entropy, 0.0))


def response_mask(response_length):
    return np.arange(RESPONSE) < response_length[:, None]


def test_values_are_those_of_a_full_forward_pass(rows):
    """Log-softmax and entropy in NumPy float64, each row by itself and without any padding."""
    forward = jax.jit(lambda tokens: MODEL.apply({"params": PARAMS}, tokens))
    tokens, prompt_length, response_length = rows
    logps, entropy = score(PARAMS, *rows)
    assert logps.dtype == entropy.dtype == jnp.float32
    assert logps.shape == entropy.shape == (BATCH, RESPONSE)
    for i in (0, 1):
        first, last = PROMPT - prompt_length[i], PROMPT + response_length[i]
        logits = np.asarray(forward(tokens[i : i + 1, first:last]), np.float64)[0, :, :17]
        logits = logits[prompt_length[i] - 1 : -1] / TEMPERATURE[i]
        exact = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        targets = tokens[i, PROMPT:last]
        n = response_length[i]
        np.testing.assert_allclose(logps[i, :n], exact[np.arange(n), targets], rtol=0, atol=2e-5)
        np.testing.assert_allclose(entropy[i, :n], -(np.exp(exact) * exact).sum(axis=-1), rtol=0, atol=2e-5)


def test_the_temperature_is_each_rows_own(rows):
    temperature = TEMPERATURE * np.array([1, 2, 1, 1], np.float32)
    before, after = (np.asarray(score(PARAMS, *rows, t)[1]) for t in (TEMPERATURE, temperature))
    np.testing.assert_array_equal(before[[0, 2, 3]], after[[0, 2, 3]])
    assert np.all(before[1] < after[1])  # entropy grows with the temperature
    assert np.all(after[1] < np.log(17))


@pytest.mark.parametrize("chunk_size", [4, 11])  # 11 = 4 + 4 + 3, and one chunk of exactly everything
def test_chunks_change_nothing(chunk_size, rows):
    mask = response_mask(rows[2])
    for whole, chunked in zip(score(PARAMS, *rows), score(PARAMS, *rows, chunk_size=chunk_size), strict=True):
        assert chunked.shape == whole.shape
        np.testing.assert_allclose(np.asarray(chunked)[mask], np.asarray(whole)[mask], rtol=1e-5, atol=1e-6)


def test_chunks_change_no_gradient(rows):
    whole, chunked = (jax.grad(weighted_sum)(PARAMS, *rows, size) for size in (128, 4))
    for path, expected in jax.tree_util.tree_leaves_with_path(whole):
        actual = functools.reduce(lambda tree, key: tree[key.key], path, chunked)
        largest = np.abs(expected).max()
        assert largest > 0, path
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6 * largest, err_msg=str(path))


def test_padding_changes_nothing(rows):
    """More columns on both sides, and other junk in all of them."""
    tokens, prompt_length, response_length = rows
    more = np.random.default_rng(1).integers(0, 17, (BATCH, PROMPT + RESPONSE + 5)).astype(np.int32)
    for i in range(BATCH):
        used = slice(PROMPT - prompt_length[i], PROMPT + response_length[i])
        more[i, 3:-2][used] = tokens[i, used]
    mask = response_mask(response_length)
    padded = score(PARAMS, more, prompt_length, response_length, prompt_size=PROMPT + 3)
    for expected, actual in zip(score(PARAMS, *rows), padded, strict=True):
        np.testing.assert_allclose(np.asarray(actual)[:, :-2][mask], np.asarray(expected)[mask], rtol=1e-5, atol=1e-6)


def test_a_token_is_scored_given_what_stands_before_it(rows):
    """Column t changes with token t and with nothing after it."""
    tokens, *lengths = rows
    changed = tokens.copy()
    changed[0, PROMPT + 5] = (changed[0, PROMPT + 5] + 1) % 17
    before, after = (np.asarray(score(PARAMS, t, *lengths)[0]) for t in (tokens, changed))
    np.testing.assert_array_equal(before[0, :5], after[0, :5])
    assert np.all(np.abs(before[0, 5:] - after[0, 5:]) > 1e-6)
    np.testing.assert_array_equal(before[1:], after[1:])


# ---- sums over the vocabulary, by themselves ----


def test_scores_of_logits_that_can_be_done_by_hand():
    """Probabilities 1/2, 1/4, 1/4, a padding row beside them; the second row at temperature 2 from squared odds."""
    odds = jnp.log(jnp.array([[2.0, 1.0, 1.0], [4.0, 1.0, 1.0]]))
    logits = jnp.pad(odds, ((0, 0), (0, 1)), constant_values=-1e30)[:, None]
    temperature, targets = jnp.array([[1.0], [2.0]]), jnp.array([[0], [2]])
    logp, entropy = scoring.scores_of(logits, targets, temperature)
    np.testing.assert_allclose(logp[:, 0], np.log([1 / 2, 1 / 4]), rtol=1e-6)
    np.testing.assert_allclose(entropy[:, 0], [1.5 * np.log(2)] * 2, rtol=1e-6)
    of_logp = jax.grad(lambda x: jnp.sum(scoring.scores_of(x, targets, temperature)[0]))(logits)[:, 0]
    np.testing.assert_allclose(of_logp, [[1 / 2, -1 / 4, -1 / 4, 0], [-1 / 4, -1 / 8, 3 / 8, 0]], atol=1e-7)
    # dH/dz_j = -p_j (log p_j + H) / temperature, with H = 1.5 log 2
    of_entropy = jax.grad(lambda x: jnp.sum(scoring.scores_of(x, targets, temperature)[1]))(logits)[:, 0]
    by_hand = np.log(2) * np.array([-1 / 4, 1 / 8, 1 / 8, 0])
    np.testing.assert_allclose(of_entropy, [by_hand, by_hand / 2], atol=1e-7)


@pytest.mark.parametrize(("scale", "offset"), [(1.0, 0.0), (30.0, 0.0), (3.0, 1e4)])
def test_gradients_of_scores_are_those_of_log_softmax(scale, offset):
    generator = np.random.default_rng(3)
    logits = (scale * generator.standard_normal((4, 5, 33)) + offset).astype(np.float32)
    logits[..., 29:] = -1e30
    targets = generator.integers(0, 29, (4, 5))
    weights = generator.standard_normal((2, 4, 5)).astype(np.float32)

    def plain(logits):
        logps = jax.nn.log_softmax(logits / TEMPERATURE[:, None, None], axis=-1)
        return jnp.take_along_axis(logps, targets[..., None], axis=-1)[..., 0], -jnp.sum(
            jnp.exp(logps) * logps, axis=-1
        )

    def ours(logits, entropy_gradient=True):
        return scoring.scores_of(logits, targets, TEMPERATURE[:, None], entropy_gradient)

    for actual, expected in zip(ours(logits), plain(logits), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=max(1e-6, 1e-6 * offset))
    for where, weighed in (("log-probability", weights * [[[1]], [[0]]]), ("both", weights)):
        actual, expected = (jax.grad(lambda x: jnp.sum(weighed * jnp.stack(f(x))))(logits) for f in (ours, plain))  # noqa: B023
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=max(2e-6, 1e-6 * offset), err_msg=where)
    without = jax.grad(lambda x: jnp.sum(ours(x, False)[1]))(logits)
    np.testing.assert_array_equal(without, np.zeros_like(logits))


# ---- memory ----


@pytest.mark.parametrize(("chunk_size", "whole"), [(4, False), (11, True)])
def test_the_logits_of_a_batch_never_exist_at_once(chunk_size, whole, rows):
    """Neither in the forward nor in the backward pass is there an array of B x T x V elements."""
    # Above 256 the embedding is a gather; below it is a one-hot product, whose operand has the size of logits.
    model = with_config(MODEL, vocab_size=300, num_tokens=None)

    def loss(params):
        logps, entropy, _ = scoring.score(model, params, *rows, TEMPERATURE, prompt_size=PROMPT, chunk_size=chunk_size)
        return jnp.sum(logps) + jnp.sum(entropy)

    jaxpr = jax.make_jaxpr(jax.value_and_grad(loss))(abstract_params(model))
    largest = max(jaxpr_sizes(jaxpr.jaxpr))
    assert largest >= 300 * 16, "the walk did not even see the embedding"
    assert (largest >= BATCH * RESPONSE * 300) == whole
