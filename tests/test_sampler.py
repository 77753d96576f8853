"""The sampler: its log-probabilities are those of what it draws, and nothing but the keys decides a draw."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from r2vpo_jax import sampler, scoring
from r2vpo_jax.models import Decoder, DecoderConfig, stops
from r2vpo_jax.sampler import Sampling
from tests.helpers.compilations import compilations
from tests.helpers.params import random_params

NUM_TOKENS, EOS, PAD = 17, 16, 0
CONFIG = DecoderConfig(
    vocab_size=32,
    hidden_size=16,
    intermediate_size=24,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    num_tokens=NUM_TOKENS,
)
MODEL = Decoder(CONFIG)
PARAMS = random_params(MODEL)
PARAMS["embed"] *= 0.6  # flat enough that the end of the text comes early, late and not at all
GROUP, PROMPT, RESPONSE = 4, 8, 12
LENGTHS = np.array([8, 3, 1, 6, 4, 2], np.int32)
PROBLEMS = np.array([11, 5, 7, 1000, 2, 3], np.int32)
# With these no draw that is compared below is a close call, to be rounded either way: the two best of logit and noise
# are 0.003 apart at least.
KEY = jax.random.key(0)


def left_padded(lengths, seed=1, fill=PAD):
    generator = np.random.default_rng(seed)
    tokens = generator.integers(1, NUM_TOKENS, (len(lengths), PROMPT))
    return np.where(np.arange(PROMPT) >= PROMPT - lengths[:, None], tokens, fill).astype(np.int32)


TOKENS = left_padded(LENGTHS)


def sampling(**changes):
    defaults = {"group_size": GROUP, "max_response_length": RESPONSE, "eos_ids": (EOS,), "pad_id": PAD}
    return Sampling(**defaults | changes)


@pytest.fixture(scope="module")
def draw(mesh):
    """sampler.generate on the prompts above, unless told otherwise."""

    def generate(tokens=TOKENS, lengths=LENGTHS, key=KEY, settings=None, *, problem_ids=PROBLEMS, **kwargs):
        settings = settings or sampling()
        return sampler.generate(
            MODEL, PARAMS, tokens, lengths, key, settings, mesh=mesh, problem_ids=problem_ids, **kwargs
        )

    return generate


@jax.jit
def _logits(tokens, mask):
    return MODEL.apply({"params": PARAMS}, tokens, mask=mask)


def exact_logits(rollout):
    """float64 [B, T, NUM_TOKENS]: what a full forward pass says before each response token."""
    mask = scoring.prompt_and_response_mask(
        rollout.prompt_length, rollout.response_length, rollout.prompt_size, rollout.tokens.shape[1]
    )
    logits = _logits(rollout.tokens, mask)[:, rollout.prompt_size - 1 : -1, :NUM_TOKENS]
    return np.asarray(logits, np.float64)


def log_softmax(x):
    x = x - x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def chosen(logps, tokens):
    return np.take_along_axis(logps, np.minimum(tokens, logps.shape[-1] - 1)[..., None], axis=-1)[..., 0]


# ---- the log-probabilities ----


@jax.jit
def _score(tokens, prompt_length, response_length, temperature):
    return scoring.score(
        MODEL, PARAMS, tokens, prompt_length, response_length, temperature, prompt_size=PROMPT, chunk_size=5
    )[0]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_behavior_logp_is_what_scoring_says(temperature, draw):
    rollout = draw(settings=sampling(temperature=temperature))
    np.testing.assert_array_equal(rollout.temperature, np.float32(temperature))
    scored = _score(rollout.tokens, rollout.prompt_length, rollout.response_length, rollout.temperature)
    mask = rollout.response_mask
    assert mask.sum() > 100
    difference = np.abs(scored - rollout.behavior_logp)[mask]
    assert difference.max() <= 5e-5
    assert difference.mean() <= 5e-6
    # And both are those of a full forward pass, at that temperature and at no other.
    exact = chosen(log_softmax(exact_logits(rollout) / temperature), rollout.response_tokens)
    np.testing.assert_allclose(rollout.behavior_logp[mask], exact[mask], rtol=0, atol=5e-5)
    other = chosen(log_softmax(exact_logits(rollout) / (1.1 * temperature)), rollout.response_tokens)
    assert np.abs(rollout.behavior_logp - other)[mask].max() > 1e-2


# ---- the distribution ----

TINY = Decoder(
    DecoderConfig(
        vocab_size=8,
        hidden_size=8,
        intermediate_size=8,
        num_layers=1,
        num_heads=2,
        num_kv_heads=1,
        head_dim=4,
        num_tokens=5,
    )
)
TINY_PARAMS = random_params(TINY, seed=2)
TINY_PARAMS["embed"] *= 0.5  # flat enough that every pair of tokens is drawn now and then
NUM_DRAWS = 20_000


@functools.partial(jax.jit, static_argnames="settings_static")
def _sample_tiny(params, tokens, key, temperature, settings_static):
    settings = Sampling(temperature=temperature, group_size=NUM_DRAWS, **dict(settings_static))
    return sampler.sample(TINY, params, tokens, jnp.array([3]), key, settings)


@jax.jit
def _tiny_logits(tokens):
    return TINY.apply({"params": TINY_PARAMS}, tokens)


def pairs_of_tokens(temperature):
    """How often each pair of first and second token was drawn, [5, 5]."""
    drawn = _sample_tiny(TINY_PARAMS, jnp.array([[2, 4, 3]]), KEY, temperature, (("max_response_length", 2),))
    response = np.asarray(drawn.response_tokens)
    assert response.shape == (NUM_DRAWS, 2)
    assert np.all(drawn.truncated), "nothing was to end a text"
    assert np.all(drawn.response_length == 2)
    assert response.max() < 5, "a padding row of the vocabulary was drawn"
    counts = np.zeros((5, 5), int)
    np.add.at(counts, (response[:, 0], response[:, 1]), 1)
    return counts


def probabilities_of_pairs(temperature):
    """The same from full forward passes over the prompt and each first token, [5, 5]."""
    tokens = np.array([[2, 4, 3, first] for first in range(5)])
    logits = np.asarray(_tiny_logits(tokens), np.float64)[..., :5]
    logps = log_softmax(logits / temperature)
    return np.exp(logps[0, 2][:, None] + logps[:, 3])


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_draws_follow_the_exact_probabilities(temperature):
    counts = pairs_of_tokens(temperature)

    def p_value(probabilities):
        expected = (probabilities * NUM_DRAWS).reshape(-1)
        assert expected.min() > 5, "too rare for the chi-square test"
        return scipy.stats.chisquare(counts.reshape(-1), expected).pvalue

    assert p_value(probabilities_of_pairs(temperature)) > 1e-4
    # The same statistic would see a temperature that is 10 % off, and steps that share their random numbers.
    assert p_value(probabilities_of_pairs(1.1 * temperature)) < 1e-4
    assert p_value(probabilities_of_pairs(temperature).T) < 1e-4


def test_padding_rows_of_the_vocabulary_are_never_drawn():
    # Their logits would win every time: they point along the last hidden state.
    params = jax.tree.map(np.copy, TINY_PARAMS)
    hidden_states = jax.jit(functools.partial(TINY.apply, method="hidden_states"))
    hidden = hidden_states({"params": params}, np.array([[2, 4, 3]]))[0, -1]
    params["embed"][5:] = 100 * np.asarray(hidden)
    assert np.argmax(np.asarray(hidden) @ params["embed"].T) >= 5
    drawn = _sample_tiny(params, jnp.array([[2, 4, 3]]), KEY, 1.0, (("max_response_length", 2),))
    assert np.max(drawn.response_tokens) < 5
    assert np.all(np.isfinite(drawn.behavior_logp))
    assert len(np.unique(drawn.response_tokens)) > 1


# ---- what decides a draw ----


def same_draws(one, other, *, skip=0):
    np.testing.assert_array_equal(one.response_tokens, other.response_tokens)
    np.testing.assert_array_equal(one.response_length, other.response_length)
    np.testing.assert_array_equal(one.truncated, other.truncated)
    np.testing.assert_array_equal(one.group_id, other.group_id)
    np.testing.assert_allclose(one.behavior_logp, other.behavior_logp, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "how",
    [{"batch_size": 4}, {"batch_size": 4, "buckets": (4,)}, {"buckets": (100,)}],
    ids=["batches", "buckets", "bucket beyond"],
)
def test_batches_and_buckets_change_no_draw(how, draw):
    whole, split = draw(), draw(**how)
    same_draws(whole, split)
    np.testing.assert_array_equal(whole.tokens, split.tokens)
    np.testing.assert_array_equal(whole.prompt_length, split.prompt_length)
    np.testing.assert_array_equal(split.rollout_id, np.arange(len(LENGTHS) * GROUP))


def test_a_draw_belongs_to_the_problem_and_not_to_its_place(draw):
    order = np.array([3, 0, 5, 1, 4, 2])
    straight = draw()
    permuted = draw(TOKENS[order], LENGTHS[order], problem_ids=PROBLEMS[order])
    rows = (order[:, None] * GROUP + np.arange(GROUP)).reshape(-1)
    same_draws(jax.tree.map(lambda x: x[rows], straight), permuted)
    # Another key, or the same prompts under other names, and everything is drawn anew.
    for other in (draw(key=jax.random.key(1)), draw(problem_ids=PROBLEMS + 1)):
        assert np.mean(np.any(other.response_tokens != straight.response_tokens, axis=1)) > 0.9


def test_the_samples_of_a_group_differ(draw):
    responses = draw().response_tokens.reshape(len(LENGTHS), GROUP, RESPONSE)
    assert all(len(np.unique(group, axis=0)) == GROUP for group in responses)


def test_first_sample_continues_a_group(draw):
    settings = sampling(group_size=2)
    more = jax.jit(sampler.sample, static_argnums=0)(
        MODEL, PARAMS, TOKENS, LENGTHS, KEY, settings, problem_ids=PROBLEMS, first_sample=2
    )
    rows = (np.arange(len(LENGTHS))[:, None] * GROUP + np.array([2, 3])).reshape(-1)
    same_draws(jax.tree.map(lambda x: x[rows], draw()), more)


def test_what_stands_in_the_padding_of_a_prompt_does_not_matter(draw):
    junk = left_padded(LENGTHS, fill=9)
    assert np.any(junk != TOKENS)
    same_draws(draw(), draw(junk))


# ---- top-k, top-p, greedy ----

LOGITS = np.log(np.array([[0.05, 0.4, 0.1, 0.25, 0.2], [0.02, 0.03, 0.9, 0.04, 0.01]]))


@pytest.mark.parametrize(
    ("settings", "support"),
    [
        ({}, [[0, 1, 2, 3, 4], [0, 1, 2, 3, 4]]),
        ({"top_k": 2}, [[1, 3], [2, 3]]),
        ({"top_k": 1}, [[1], [2]]),
        ({"top_k": 7}, [[0, 1, 2, 3, 4], [0, 1, 2, 3, 4]]),
        # 0.4 + 0.25 < 0.7: the third is needed to reach it. 0.9 does so alone.
        ({"top_p": 0.7}, [[1, 3, 4], [2]]),
        ({"top_p": 0.3}, [[1], [2]]),
        ({"top_p": 0.92}, [[1, 2, 3, 4], [2, 3]]),
        # Of three: 0.4, 0.25, 0.2 are 0.47, 0.29, 0.24; two reach 0.7.
        ({"top_k": 3, "top_p": 0.7}, [[1, 3], [2]]),
        # Proportional to the squares: 0.16, 0.0625, 0.04, ... of 0.275: two reach 0.7.
        ({"top_p": 0.7, "temperature": 0.5}, [[1, 3], [2]]),
    ],
)
def test_truncation_keeps_the_support_and_renormalizes(settings, support):
    logps = np.asarray(sampler.sampling_logps(jnp.asarray(LOGITS, jnp.float32), Sampling(**settings)))
    for row, kept in enumerate(support):
        expected = np.full(5, -np.inf)
        expected[kept] = log_softmax(LOGITS[row, kept] / settings.get("temperature", 1.0))
        outside = np.delete(np.arange(5), kept)
        np.testing.assert_allclose(logps[row, kept], expected[kept], rtol=0, atol=1e-6)
        assert np.all(np.exp(logps[row, outside]) == 0)


@pytest.mark.parametrize(("top_k", "top_p"), [(3, 1.0), (0, 0.8), (4, 0.8)])
def test_truncated_draws_carry_the_truncated_logp(top_k, top_p, draw):
    rollout = draw(settings=sampling(temperature=0.7, top_k=top_k, top_p=top_p))
    mask = rollout.response_mask
    logits = exact_logits(rollout)
    kept = np.zeros(logits.shape, bool)
    for index in np.ndindex(mask.shape):
        order = np.argsort(-logits[index])[: top_k or None]
        probabilities = np.exp(log_softmax(logits[index][order] / 0.7))
        needed = 1 if top_p >= 1 else int(np.searchsorted(np.cumsum(probabilities), top_p)) + 1
        kept[index][order if top_p >= 1 else order[:needed]] = True
    exact = log_softmax(np.where(kept, logits / 0.7, -np.inf))
    assert np.all(chosen(kept, rollout.response_tokens)[mask]), "drawn from outside of the support"
    np.testing.assert_allclose(rollout.behavior_logp[mask], chosen(exact, rollout.response_tokens)[mask], atol=5e-5)
    whole = chosen(log_softmax(logits / 0.7), rollout.response_tokens)
    assert np.any(rollout.behavior_logp[mask] > whole[mask] + 1e-2)


def test_temperature_zero_is_greedy(draw):
    rollout = draw(settings=sampling(temperature=0.0))
    mask = rollout.response_mask
    best = exact_logits(rollout).argmax(axis=-1)
    np.testing.assert_array_equal(rollout.response_tokens[mask], best[mask])
    np.testing.assert_array_equal(rollout.behavior_logp[mask], 0.0)  # it could have been nothing else


# ---- the end of a text ----


def check_ends(rollout, eos_ids, pad_id):
    ended = 0
    for i in range(len(rollout.response_length)):
        response = rollout.response_tokens[i].tolist()
        ends = [t for t, token in enumerate(response) if token in eos_ids]
        # Padding may be an EOS id too: the first one is the end.
        length = ends[0] + 1 if ends else len(response)
        assert rollout.response_length[i] == length
        assert rollout.truncated[i] == (not ends)
        assert response[length:] == [pad_id] * (len(response) - length)
        assert np.all(rollout.behavior_logp[i, :length] < 0)
        assert np.all(rollout.behavior_logp[i, length:] == 0)
        ended += bool(ends)
    return ended


def test_a_response_ends_with_the_end_of_text(draw):
    rollout = draw()
    assert 0 < check_ends(rollout, (EOS,), PAD) < len(rollout.truncated), "both kinds are wanted"
    assert len(set(rollout.response_length.tolist())) > 3
    np.testing.assert_array_equal(rollout.response_mask.sum(axis=1), rollout.response_length)


def test_several_ends_of_text_and_padding_that_is_one_of_them(draw):
    rollout = draw(settings=sampling(eos_ids=(EOS, 13, 9), pad_id=13))
    check_ends(rollout, (EOS, 13, 9), 13)
    last = rollout.response_tokens[np.arange(len(rollout.truncated)), rollout.response_length - 1]
    assert len(set(last[~rollout.truncated].tolist())) > 1


# ---- the record ----


def test_the_rollout_says_where_it_comes_from(draw):
    rollout = draw(version=7)
    assert isinstance(rollout.tokens, np.ndarray)
    assert rollout.prompt_size == PROMPT
    assert rollout.response_size == RESPONSE
    np.testing.assert_array_equal(rollout.tokens[::GROUP, :PROMPT], TOKENS)
    np.testing.assert_array_equal(rollout.prompt_length, np.repeat(LENGTHS, GROUP))
    np.testing.assert_array_equal(rollout.group_id, np.repeat(PROBLEMS, GROUP))
    np.testing.assert_array_equal(rollout.rollout_id, np.arange(len(rollout.tokens)))
    np.testing.assert_array_equal(rollout.version, 7)
    np.testing.assert_array_equal(rollout.outcome, -1)
    assert np.all(np.isnan(rollout.reward))
    assert np.all(np.isnan(rollout.advantage))


@pytest.mark.parametrize("lengths", [[8, 3, 0, 6, 4, 2], [8, 3, 9, 6, 4, 2], [8, 3, -1, 6, 4, 2]])
def test_bad_prompt_lengths_raise(lengths, draw):
    with pytest.raises(ValueError, match="prompt lengths must be between 1 and 8"):
        draw(lengths=np.array(lengths))


def test_no_prompts_raise(draw):
    with pytest.raises(ValueError, match="prompt lengths"):
        draw(TOKENS[:0], LENGTHS[:0], problem_ids=PROBLEMS[:0])


@pytest.mark.parametrize("eos", [-1, 32])
def test_an_end_of_text_outside_of_the_vocabulary_raises(eos, draw):
    with pytest.raises(ValueError, match="end-of-text ids"):
        draw(settings=sampling(eos_ids=(EOS, eos)))


def test_temperature_and_truncation_do_not_recompile(draw):
    draw()
    key = jax.random.key(5)
    with compilations() as compiled:
        draw(settings=sampling(temperature=0.3, top_k=2, top_p=0.9), key=key)
    assert not compiled


def test_sampling_out_of_range_is_refused(tiny_model, task, mesh):
    model, params = tiny_model
    problems = task.problems("train", np.arange(1))
    for bad in ({"temperature": -1.0}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.5}):
        settings = sampler.Sampling(max_response_length=task.max_response_length, eos_ids=task.eos_ids, **bad)
        with pytest.raises(ValueError, match="sampling needs"):
            sampler.generate(
                model,
                params,
                problems.tokens,
                problems.length,
                jax.random.key(0),
                settings,
                mesh=mesh,
                problem_ids=problems.index,
            )


# ---- weights of lower precision ----


def test_bfloat16_weights_are_those_of_the_type():
    rounded = sampler.rounded_weights(PARAMS, "bfloat16")
    jax.tree.map(
        lambda new, old: np.testing.assert_array_equal(new, jnp.asarray(old).astype(jnp.bfloat16).astype(jnp.float32)),
        rounded,
        PARAMS,
    )


def test_int8_weights_have_255_levels_for_each_layer_and_channel():
    kernel = np.zeros((2, 3, 2), np.float32)  # layers, in, out
    kernel[0, :, 0], kernel[0, :, 1], kernel[1, :, 0] = (1.27, 0.504, -0.506), (2.54, 0.01, -2.54), (0.0127, 0.0, 1e-4)
    params = {"layers": {"kernel": kernel, "scale": kernel[:, :, 0]}, "embed": kernel[0]}
    rounded = jax.tree.map(np.asarray, sampler.rounded_weights(params, "int8"))
    expected = kernel.copy()
    expected[0, :, 0], expected[0, :, 1], expected[1, :, 0] = (
        (1.27, 0.50, -0.51),
        (2.54, 0.02, -2.54),
        (0.0127, 0, 1e-4),
    )
    expected[0, 1, 1] = 0.0  # half a level goes to the even one
    np.testing.assert_allclose(rounded["layers"]["kernel"], expected, atol=1e-6)
    np.testing.assert_allclose(rounded["embed"], expected[0], atol=1e-6)
    np.testing.assert_array_equal(rounded["layers"]["scale"], params["layers"]["scale"])  # vectors


def test_unknown_weights_are_refused():
    assert sampler.rounded_weights(PARAMS, "compute") is not None
    with pytest.raises(ValueError, match="unknown weights 'int4'"):
        sampler.rounded_weights(PARAMS, "int4")


# ---- strings that end a response ----


def test_a_string_ends_a_response_with_the_token_that_completes_it(draw):
    """The same draws up to there, their log-probabilities too, and nothing after; scoring agrees on what is left."""
    whole = draw()
    letters = "abcdefghijklmnopq"  # each token is one, so that a text is its tokens
    texts = [
        "".join(letters[t] for t in row[:n])
        for row, n in zip(whole.response_tokens, whole.response_length, strict=True)
    ]
    strings = (max(letters[1:-1], key="".join(texts).count), max(texts, key=len)[4:7])
    stop = stops._by_byte([string.encode() for string in strings])[:, [ord(letter) for letter in letters]]
    cut = draw(settings=sampling(stop=stop))
    ended = 0
    for i, (tokens, length) in enumerate(zip(whole.response_tokens, whole.response_length, strict=True)):
        ends = [texts[i].find(string) + len(string) for string in strings if string in texts[i]]
        end = min([length, *ends])
        assert cut.response_length[i] == end
        np.testing.assert_array_equal(cut.response_tokens[i, :end], tokens[:end])
        np.testing.assert_array_equal(cut.response_tokens[i, end:], PAD)
        np.testing.assert_allclose(cut.behavior_logp[i, :end], whole.behavior_logp[i, :end], rtol=0, atol=1e-6)
        np.testing.assert_array_equal(cut.behavior_logp[i, end:], 0)
        assert cut.truncated[i] == (whole.truncated[i] and not ends)
        ended += bool(ends)
    assert 4 < ended < len(whole.reward)
    scored = _score(cut.tokens, cut.prompt_length, cut.response_length, cut.temperature)
    assert np.abs(scored - cut.behavior_logp)[cut.response_mask].max() <= 5e-5
