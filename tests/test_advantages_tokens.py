"""Advantages of tokens, against numbers worked out by hand: whitening, REINFORCE++, generalized estimation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from r2vpo_jax import advantages

ABSTAINS = np.nan

# Whitening --------------------------------------------------------------------------------------------

whiten = jax.jit(advantages.whiten)


def _ragged(rows, columns, fill=np.nan):
    """Ragged rows as ([rows, columns] padded with `fill`, mask)."""
    values, mask = np.full((len(rows), columns), fill, np.float32), np.zeros((len(rows), columns), bool)
    for i, row in enumerate(rows):
        values[i, : len(row)], mask[i, : len(row)] = row, True
    return values, mask


@pytest.mark.parametrize("jit", [True, False], ids=["jit", "eager"])
@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([[1, 2], [3]], [[-1, 0], [1]]),  # mean 2, variance (1 + 0 + 1) / 2
        ([[0, 0, 4], [0]], [[-0.5, -0.5, 1.5], [-0.5]]),  # mean 1, variance (1 + 1 + 9 + 1) / 3 = 4
        ([[1], [5]], [[-(0.5**0.5)], [0.5**0.5]]),  # mean 3, variance (4 + 4) / 1; 2 / sqrt(8)
        ([[7], []], [[0], []]),  # one token has no deviation
        ([[0.1, 0.1, 0.1], [0.1, 0.1]], [[0, 0, 0], [0, 0]]),
        ([[], []], [[], []]),
    ],
)
def test_whiten(rows, expected, jit):
    actual = (whiten if jit else advantages.whiten)(*_ragged(rows, 3))
    np.testing.assert_allclose(actual, _ragged(expected, 3, fill=0)[0], rtol=1e-6, atol=1e-7)
    assert actual.dtype == jnp.float32


def test_epsilon_is_added_to_the_variance():
    # Variance 1: (-1, 0, 1) / sqrt(1 + 3).
    actual = advantages.whiten(*_ragged([[1, 2, 3]], 3), epsilon=3.0)
    np.testing.assert_allclose(actual, [[-0.5, 0, 0.5]], rtol=1e-6)


@pytest.mark.parametrize("value", [0.1, 0.7, -1 / 3, 1e-8, 1e8])
def test_equal_advantages_whiten_to_exact_zeros(value):
    # Guarded as the equal rewards above: 0.1 and others leave a residue of the plain mean.
    mask = np.arange(7) < np.asarray([[7], [4], [0]])
    actual = whiten(np.full((3, 7), value, np.float32), mask)
    np.testing.assert_array_equal(actual, np.zeros((3, 7)))


def _random_tokens(seed=0):
    generator = np.random.default_rng(seed)
    values = generator.normal(3.0, 2.0, (6, 7)).astype(np.float32)
    return values, generator.random((6, 7)) < 0.6


def test_whitened_tokens_are_standardized():
    values, mask = _random_tokens()
    actual = np.asarray(whiten(values, mask))
    np.testing.assert_allclose(actual[mask].mean(), 0.0, atol=1e-6)
    np.testing.assert_allclose(actual[mask].std(ddof=1), 1.0, rtol=1e-5)
    np.testing.assert_array_equal(actual[~mask], 0.0)
    # Neither scale nor offset of the advantages is left.
    np.testing.assert_allclose(whiten(100 * values - 50, mask), actual, rtol=1e-4, atol=1e-5)


def test_whitening_sees_tokens_not_places():
    values, mask = _random_tokens()
    expected = np.asarray(whiten(values, mask))
    order = np.random.default_rng(4).permutation(values.size)
    actual = whiten(values.reshape(-1)[order].reshape(6, 7), mask.reshape(-1)[order].reshape(6, 7))
    np.testing.assert_allclose(np.reshape(actual, -1), expected.reshape(-1)[order], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(jax.vmap(advantages.whiten)(values[None], mask[None])[0], expected, atol=1e-6)
    # Padding columns, and an integer mask.
    values, mask = (np.pad(x, ((0, 0), (0, 3)), constant_values=y) for x, y in ((values, np.nan), (mask, False)))
    actual = advantages.whiten(values, mask.astype(np.int32))
    np.testing.assert_allclose(actual[:, :7], expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(actual[:, 7:], 0.0)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_whitening_does_not_see_masked_positions(bad):
    values, mask = _random_tokens()
    np.testing.assert_array_equal(whiten(np.where(mask, values, np.float32(bad)), mask), whiten(values, mask))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_whitening_does_not_hide_a_token_that_is_not_finite(bad):
    # Zeros would be a run that silently stops to learn.
    values, mask = _random_tokens()
    mask[0, 0], values[0, 0] = True, bad
    assert np.any(np.isnan(whiten(values, mask)))


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(
    hnp.arrays(np.float32, (6, 7), elements=st.floats(-(2.0**100), 2.0**100, width=32)),
    hnp.arrays(bool, (6, 7)),
)
def test_whitened_extremes_are_finite(values, mask):
    actual = np.asarray(whiten(values, mask))
    assert np.all(np.isfinite(actual))
    # Of n numbers with unit deviation none exceeds (n - 1) / sqrt(n).
    assert np.max(np.abs(actual)) <= np.sqrt(values.size)


@pytest.mark.parametrize("shapes", [((2, 3), (2, 4)), ((2, 3), (2, 1)), ((3,), (3,)), ((1, 2, 3), (1, 2, 3))])
@pytest.mark.parametrize("function", [advantages.whiten, advantages.reinforce_pp], ids=["whiten", "reinforce_pp"])
def test_wrong_shapes_of_tokens(function, shapes):
    with pytest.raises(AssertionError, match="Chex"):
        function(*map(np.ones, shapes))


# REINFORCE++ ------------------------------------------------------------------------------------------


@functools.cache
def _reinforce_pp(jit=True, **kwargs):
    function = functools.partial(advantages.reinforce_pp, **kwargs)
    return jax.jit(function) if jit else function


@pytest.mark.parametrize("jit", [True, False], ids=["jit", "eager"])
@pytest.mark.parametrize(
    ("rows", "changed", "expected"),
    [
        # Returns 1, 1, 1 | 0: mean 3/4, variance (3/16 + 9/16) / 3 = 1/4.
        ([[0, 0, 1], [0], [], []], {}, [[0.5, 0.5, 0.5], [-1.5], [], []]),
        # Returns .7, .8, .9 | -.1, as with a penalty of .1 a token: mean .575, squares .015625 + .050625 +
        # .105625 + .455625 = .6275, deviation sqrt(.6275 / 3) = .457347.
        ([[-0.1, -0.1, 0.9], [-0.1], [], []], {}, [[0.273316, 0.491968, 0.710620], [-1.475903], [], []]),
        # Returns 1/4, 1/2, 1 | 0: mean 7/16; in sixteenths -3, 1, 9, -7: variance 140 / 256 / 3 = .182292,
        # deviation .426956.
        ([[0, 0, 1], [0], [], []], {"discount": 0.5}, [[-0.439155, 0.146385, 1.317465], [-1.024695], [], []]),
        # The second row abstains: only 1, 1, 1 | 0 | 0 is left, mean 3/5, variance (3 * .16 + 2 * .36) / 4 = .3.
        (
            [[0, 0, 1], [0, ABSTAINS], [0], [0]],
            {},
            [[0.730297] * 3, [0, 0], [-1.095445], [-1.095445]],
        ),
        # Rewards (1, 0 | 2, 2) less the means of their groups: .5 three times, -.5, 0, 0. Mean 1/6, variance
        # (3/9 + 4/9 + 2/36) / 5 = 1/6.
        ([[0, 0, 1], [0], [2], [2]], {"group_size": 2}, [[0.816497] * 3, [-1.632993], [-0.408248], [-0.408248]]),
        # The same rewards, the first spread over the tokens: the baseline takes their sum.
        ([[0.5, 0.25, 0.25], [0], [2], [2]], {"group_size": 2}, [[0.816497] * 3, [-1.632993], *[[-0.408248]] * 2]),
        # Votes (1, 0, 0) less 1/3: 2/3 three times, -1/3 twice; mean 4/15, variance (3 * .16 + 2 * .36) / 4 = .3.
        (
            [[0, 0, 1], [0], [ABSTAINS, 0], [0]],
            {"group_size": 4},
            [[0.730297] * 3, [-1.095445], [0, 0], [-1.095445]],
        ),
        # Equal rewards.
        ([[0, 0, 1], [1], [0, 1], [1]], {"group_size": 4}, [[0] * 3, [0], [0] * 2, [0]]),
        # A group of one is its own baseline.
        ([[0, 0, 1], [5], [0, 2], [1]], {"group_size": 1}, [[0] * 3, [0], [0] * 2, [0]]),
        ([[ABSTAINS], [ABSTAINS], [], []], {}, [[0], [0], [], []]),
        ([[], [], [], []], {"group_size": 2}, [[], [], [], []]),
    ],
)
def test_reinforce_pp(rows, changed, expected, jit):
    actual = _reinforce_pp(jit, **changed)(*_ragged(rows, 3, fill=np.inf))
    np.testing.assert_allclose(actual, _ragged(expected, 3, fill=0)[0], rtol=1e-5, atol=1e-6)


def _responses(seed=0):
    """Token rewards [8, 4] of ragged responses with an outcome at the last token and a penalty; one abstains."""
    generator = np.random.default_rng(seed)
    length = generator.integers(1, 5, 8)
    mask = np.arange(4) < length[:, None]
    rewards = np.where(mask, generator.normal(0.0, 0.1, (8, 4)), 0.0)
    rewards[np.arange(8), length - 1] += generator.normal(0.0, 1.0, 8)
    rewards[3, length[3] - 1] = ABSTAINS
    return rewards.astype(np.float32), mask


@pytest.mark.parametrize("group_size", [None, 4])
def test_reinforce_pp_is_standardized_and_masked(group_size):
    rewards, mask = _responses()
    actual = np.asarray(_reinforce_pp(group_size=group_size)(rewards, mask))
    counted = mask & (np.arange(8) != 3)[:, None]
    np.testing.assert_allclose(actual[counted].mean(), 0.0, atol=1e-6)
    np.testing.assert_allclose(actual[counted].std(ddof=1), 1.0, rtol=1e-5)
    np.testing.assert_array_equal(actual[~counted], 0.0)
    for bad in (np.nan, np.inf, 7.0):
        poisoned = np.where(mask, rewards, np.float32(bad))
        np.testing.assert_array_equal(_reinforce_pp(group_size=group_size)(poisoned, mask), actual)


@pytest.mark.parametrize("group_size", [None, 4])
def test_reinforce_pp_permutations_padding_and_vmap(group_size):
    function = _reinforce_pp(group_size=group_size)
    rewards, mask = _responses()
    expected = np.asarray(function(rewards, mask))
    order = np.asarray([6, 4, 7, 5, 1, 0, 3, 2])  # the groups swapped, and the rows of each
    np.testing.assert_allclose(function(rewards[order], mask[order]), expected[order], rtol=1e-5, atol=1e-6)
    padded = [np.pad(rewards, ((0, 0), (1, 1)), constant_values=np.nan), np.pad(mask, ((0, 0), (1, 1)))]
    np.testing.assert_allclose(function(*padded)[:, 1:-1], expected, rtol=1e-5, atol=1e-6)
    stacked = jax.vmap(function)(rewards[None], mask[None])
    np.testing.assert_allclose(stacked[0], expected, rtol=1e-5, atol=1e-6)


def test_reinforce_pp_needs_whole_groups():
    with pytest.raises(ValueError, match="8 rewards are not a whole number of groups of 3"):
        advantages.reinforce_pp(*_responses(), group_size=3)


# Generalized advantage estimation -------------------------------------------------------------------

REWARDS = [[0.0, 0.0, 1.0]]
VALUES = [[0.5, 0.5, 0.25]]


@pytest.mark.parametrize("jit", [True, False], ids=["jit", "eager"])
@pytest.mark.parametrize(
    ("discount", "trace_decay", "expected"),
    [
        (1.0, 1.0, [0.5, 0.5, 0.75]),  # return minus value
        (1.0, 0.0, [0.0, -0.25, 0.75]),  # delta: .5 - .5, .25 - .5, 1 - .25
        # delta: .45 - .5 = -.05, .225 - .5 = -.275, .75; decay .45: -.275 + .3375, -.05 + .45 * .0625
        (0.9, 0.5, [-0.021875, 0.0625, 0.75]),
        (0.0, 0.95, [-0.5, -0.5, 0.75]),  # each reward minus its value
    ],
)
def test_gae(discount, trace_decay, expected, jit):
    function = functools.partial(advantages.gae, discount=discount, trace_decay=trace_decay)
    function = jax.jit(function) if jit else function
    actual = function(jnp.asarray(REWARDS), jnp.asarray(VALUES), jnp.ones((1, 3), bool))
    np.testing.assert_allclose(actual, [expected], rtol=1e-5, atol=1e-7)


def test_gae_defaults():
    # discount 1, trace decay .95: .75, -.25 + .95 * .75, 0 + .95 * .4625
    actual = advantages.gae(jnp.asarray(REWARDS), jnp.asarray(VALUES), jnp.ones((1, 3), bool))
    np.testing.assert_allclose(actual, [[0.439375, 0.4625, 0.75]], rtol=1e-5)


@pytest.mark.parametrize("bad", [7.0, np.nan, np.inf])
def test_gae_skips_masked_positions(bad):
    # The three tokens of row 1, with a gap and padding; row 2 has none.
    mask = np.asarray([[1, 0, 1, 1, 0], [0, 0, 0, 0, 0]])
    rewards, values = np.full((2, 2, 5), bad, np.float32)
    rewards[0, mask[0] == 1], values[0, mask[0] == 1] = REWARDS[0], VALUES[0]
    actual = advantages.gae(rewards, values, mask)
    np.testing.assert_allclose(actual, [[0.439375, 0, 0.4625, 0.75, 0], [0] * 5], rtol=1e-5)


def test_gae_without_values_is_the_return_to_go():
    rewards, mask = _responses(seed=5)
    rewards = np.where(np.isnan(rewards), 1.0, rewards).astype(np.float32)
    actual = np.asarray(advantages.gae(rewards, np.zeros_like(rewards), mask, trace_decay=1.0))
    expected = np.where(mask, np.cumsum((rewards * mask)[:, ::-1], axis=1)[:, ::-1], 0.0)
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)


def test_gae_rows_and_padding():
    rewards, mask = _responses(seed=6)
    rewards = np.nan_to_num(rewards)
    values = np.random.default_rng(7).normal(0.0, 1.0, rewards.shape).astype(np.float32)
    arrays = (rewards, values, mask)
    expected = np.asarray(advantages.gae(*arrays))
    order = np.random.default_rng(8).permutation(8)
    np.testing.assert_array_equal(advantages.gae(*(x[order] for x in arrays)), expected[order])
    np.testing.assert_array_equal(jax.vmap(advantages.gae)(*(x[:, None] for x in arrays))[:, 0], expected)
    padded = (np.pad(x, ((0, 0), (1, 2)), constant_values=y) for x, y in zip(arrays, (9, -9, 0), strict=True))
    np.testing.assert_array_equal(advantages.gae(*padded)[:, 1:-2], expected)


@pytest.mark.parametrize("shapes", [((2, 3), (2, 4), (2, 3)), ((2, 3), (2, 3), (2, 1)), ((3,), (3,), (3,))])
def test_gae_wrong_shapes(shapes):
    with pytest.raises(AssertionError, match="Chex"):
        advantages.gae(*map(np.ones, shapes))


def test_no_implicit_rank_promotion():
    tokens, mask = np.ones((6, 2), np.float32), np.ones((6, 2), bool)
    with jax.numpy_rank_promotion("raise"):
        jax.eval_shape(advantages.whiten, tokens, mask)
        jax.eval_shape(advantages.gae, tokens, tokens, mask)
        for group_size in (None, 3):
            jax.eval_shape(functools.partial(advantages.reinforce_pp, group_size=group_size), tokens, mask)
