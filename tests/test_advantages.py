"""Advantages against numbers worked out by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from r2vpo_jax import advantages

GROUP_RELATIVE = advantages.group_relative
UNSCALED = functools.partial(advantages.group_relative, scale="none")
LEAVE_ONE_OUT = advantages.leave_one_out
ESTIMATORS = pytest.mark.parametrize(
    "estimator", [GROUP_RELATIVE, UNSCALED, LEAVE_ONE_OUT], ids=["group_relative", "unscaled", "leave_one_out"]
)


# Many group sizes divide it, so that tests share compiled functions.
BATCH = 42


@functools.cache
def _jitted(estimator):
    return jax.jit(estimator, static_argnums=1)


@pytest.mark.parametrize("jit", [True, False], ids=["jit", "eager"])
@pytest.mark.parametrize(
    ("estimator", "expected"),
    [
        # Rewards (1, 0, 0, 0): mean 1/4, unbiased deviation sqrt((9 + 1 + 1 + 1) / 16 / 3) = 1/2.
        # Rewards (3, 3, 1, 1): mean 2, deviation sqrt(4 / 3).
        (GROUP_RELATIVE, [1.5, -0.5, -0.5, -0.5, *np.sqrt(0.75) * np.asarray([1, 1, -1, -1])]),
        (UNSCALED, [0.75, -0.25, -0.25, -0.25, 1, 1, -1, -1]),
        # The others' means are 0, 1/3 and 5/3, 7/3.
        (LEAVE_ONE_OUT, [1, -1 / 3, -1 / 3, -1 / 3, 4 / 3, 4 / 3, -4 / 3, -4 / 3]),
    ],
    ids=["group_relative", "unscaled", "leave_one_out"],
)
def test_two_groups_by_hand(estimator, expected, jit):
    function = _jitted(estimator) if jit else estimator
    rewards = jnp.asarray([1.0, 0.0, 0.0, 0.0, 3.0, 3.0, 1.0, 1.0])
    np.testing.assert_allclose(function(rewards, 4), expected, rtol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.bfloat16, jnp.bool_])
def test_rewards_of_other_types(dtype):
    rewards = np.tile([1, 0, 0], BATCH // 3)
    actual = _jitted(GROUP_RELATIVE)(rewards.astype(dtype), 3)
    assert actual.dtype == jnp.float32
    np.testing.assert_array_equal(actual, _jitted(GROUP_RELATIVE)(rewards.astype(np.float32), 3))


@pytest.mark.parametrize("group_size", [1, 3, 7])
@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1, 0.7, -1 / 3, 1e-8, 1e8])
@ESTIMATORS
def test_equal_rewards_give_exact_zeros(estimator, reward, group_size):
    # The mean of equal numbers is not always that number in float32; 1 / epsilon would blow the residue up.
    rewards = np.full(BATCH, reward, np.float32)
    np.testing.assert_array_equal(_jitted(estimator)(rewards, group_size), np.zeros(BATCH))


def test_a_plain_mean_would_leave_a_residue():
    # Guards the test above: among its cases there are some that round.
    rewards = np.full(7, 0.1, np.float32)
    assert np.any(rewards - np.asarray(jnp.mean(rewards)) != 0)


@ESTIMATORS
def test_group_of_one_gives_zeros(estimator):
    rewards = np.linspace(-7.0, 0.1, BATCH, dtype=np.float32)
    np.testing.assert_array_equal(_jitted(estimator)(rewards, 1), np.zeros(BATCH))


@ESTIMATORS
def test_groups_do_not_mix(estimator):
    # The first group holds a NaN and keeps it; the others do not see it.
    rewards = np.linspace(-7.0, 0.1, BATCH, dtype=np.float32)
    expected = _jitted(estimator)(rewards, 3)
    rewards[1] = np.nan
    actual = _jitted(estimator)(rewards, 3)
    assert np.all(np.isnan(actual[:3]))
    np.testing.assert_array_equal(actual[3:], expected[3:])


@ESTIMATORS
@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(hnp.arrays(np.float32, BATCH, elements=st.floats(-1e4, 1e4, width=32)), st.sampled_from([1, 3, 7]))
def test_finite_and_centered(estimator, rewards, group_size):
    actual = np.asarray(_jitted(estimator)(rewards, group_size))
    assert np.all(np.isfinite(actual))
    scale = np.max(np.abs(rewards)) if estimator is not GROUP_RELATIVE else 1 + np.max(np.abs(rewards))
    np.testing.assert_allclose(actual.reshape(-1, group_size).sum(axis=1), 0.0, atol=1e-5 * scale)


@pytest.mark.parametrize("group_size", [3, 7])
def test_scaled_advantages_have_unit_deviation(group_size):
    rewards = np.random.default_rng(0).normal(3.0, 2.0, BATCH).astype(np.float32)
    actual = np.asarray(_jitted(GROUP_RELATIVE)(rewards, group_size)).reshape(-1, group_size)
    np.testing.assert_allclose(actual.std(axis=1, ddof=1), 1.0, rtol=1e-5)


@pytest.mark.parametrize("group_size", [0, -1, 4, 12])
@ESTIMATORS
def test_not_a_whole_number_of_groups(estimator, group_size):
    with pytest.raises(ValueError, match=f"6 rewards are not a whole number of groups of {group_size}"):
        estimator(jnp.zeros(6), group_size)


@ESTIMATORS
def test_rewards_are_one_number_a_row(estimator):
    with pytest.raises(AssertionError, match="Chex"):
        estimator(jnp.zeros((2, 3)), 3)


def test_unknown_scale():
    with pytest.raises(ValueError, match="unknown scale 'max'; one of"):
        advantages.group_relative(jnp.zeros(4), 2, scale="max")


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


@pytest.mark.parametrize("shapes", [((2, 3), (2, 4), (2, 3)), ((2, 3), (2, 3), (2, 1)), ((3,), (3,), (3,))])
def test_gae_wrong_shapes(shapes):
    with pytest.raises(AssertionError, match="Chex"):
        advantages.gae(*map(np.ones, shapes))
