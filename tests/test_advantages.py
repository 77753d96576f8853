"""Advantages of responses from rewards of groups, against numbers worked out by hand."""

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
BIASED = functools.partial(advantages.group_relative, scale="std_biased")
UNSCALED = functools.partial(advantages.group_relative, scale="none")
LEAVE_ONE_OUT = advantages.leave_one_out
NAMED = {"group_relative": GROUP_RELATIVE, "biased": BIASED, "unscaled": UNSCALED, "leave_one_out": LEAVE_ONE_OUT}
ESTIMATORS = pytest.mark.parametrize("estimator", NAMED.values(), ids=NAMED)


# Many group sizes divide it, so that tests share compiled functions.
BATCH = 42


@functools.cache
def _jitted(estimator):
    return jax.jit(estimator, static_argnums=1)


ABSTAINS = np.nan


@pytest.mark.parametrize("jit", [True, False], ids=["jit", "eager"])
@pytest.mark.parametrize(
    ("estimator", "expected"),
    [
        # Rewards (1, 0, 0, 0): mean 1/4, unbiased deviation sqrt((9 + 1 + 1 + 1) / 16 / 3) = 1/2.
        # Rewards (3, 3, 1, 1): mean 2, deviation sqrt(4 / 3).
        (GROUP_RELATIVE, [1.5, -0.5, -0.5, -0.5, *np.sqrt(0.75) * np.asarray([1, 1, -1, -1])]),
        # Deviations sqrt(12 / 16 / 4) = sqrt(3) / 4 and sqrt(4 / 4) = 1.
        (BIASED, [np.sqrt(3), *[-1 / np.sqrt(3)] * 3, 1, 1, -1, -1]),
        (UNSCALED, [0.75, -0.25, -0.25, -0.25, 1, 1, -1, -1]),
        # The others' means are 0, 1/3 and 5/3, 7/3.
        (LEAVE_ONE_OUT, [1, -1 / 3, -1 / 3, -1 / 3, 4 / 3, 4 / 3, -4 / 3, -4 / 3]),
    ],
    ids=NAMED,
)
def test_two_groups_by_hand(estimator, expected, jit):
    function = _jitted(estimator) if jit else estimator
    rewards = jnp.asarray([1.0, 0.0, 0.0, 0.0, 3.0, 3.0, 1.0, 1.0])
    np.testing.assert_allclose(function(rewards, 4), expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("estimator", "expected"),
    [
        # Votes (1, 0, 0): mean 1/3, unbiased variance (4 + 1 + 1) / 9 / 2 = 1/3; 2/3 sqrt(3) and -1/3 sqrt(3).
        # Votes (5, 3): mean 4, unbiased variance (1 + 1) / 1 = 2.
        (GROUP_RELATIVE, [2 / 3**0.5, -1 / 3**0.5, 0, -1 / 3**0.5, 0, 0.5**0.5, 0, -(0.5**0.5)]),
        # Variance 6 / 9 / 3 = 2/9: 2/3 * 3 / sqrt(2) and -1/3 * 3 / sqrt(2). Then (1 + 1) / 2 = 1.
        (BIASED, [2**0.5, -(0.5**0.5), 0, -(0.5**0.5), 0, 1, 0, -1]),
        (UNSCALED, [2 / 3, -1 / 3, 0, -1 / 3, 0, 1, 0, -1]),
        # 1 - 0, 0 - 1/2, 0 - 1/2; 5 - 3, 3 - 5.
        (LEAVE_ONE_OUT, [1, -0.5, 0, -0.5, 0, 2, 0, -2]),
    ],
    ids=NAMED,
)
def test_abstentions_by_hand(estimator, expected):
    rewards = jnp.asarray([1.0, 0.0, ABSTAINS, 0.0, ABSTAINS, 5.0, ABSTAINS, 3.0])
    np.testing.assert_allclose(_jitted(estimator)(rewards, 4), expected, rtol=1e-5)


@ESTIMATORS
def test_fewer_than_two_votes_give_zeros(estimator):
    rewards = jnp.asarray([ABSTAINS, ABSTAINS, 0.3, ABSTAINS, *[ABSTAINS] * 4])
    np.testing.assert_array_equal(_jitted(estimator)(rewards, 4), np.zeros(8))


@ESTIMATORS
def test_a_group_with_abstentions_is_the_smaller_group_of_its_votes(estimator):
    rewards = np.random.default_rng(1).normal(0.0, 2.0, (BATCH // 7, 7)).astype(np.float32)
    votes = rewards[:, [0, 2, 5]]
    rewards[:, [1, 3, 4, 6]] = ABSTAINS
    actual = np.asarray(_jitted(estimator)(rewards.reshape(-1), 7)).reshape(-1, 7)
    expected = np.asarray(estimator(votes.reshape(-1), 3)).reshape(-1, 3)
    np.testing.assert_allclose(actual[:, [0, 2, 5]], expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(actual[:, [1, 3, 4, 6]], 0.0)


def test_epsilon_is_added_to_the_deviation():
    # Rewards (1, 0, 0, 0): 3/4 / (1/2 + 1/4) = 1 and -1/4 / (3/4) = -1/3.
    actual = advantages.group_relative(jnp.asarray([1.0, 0.0, 0.0, 0.0]), 4, epsilon=0.25)
    np.testing.assert_allclose(actual, [1, -1 / 3, -1 / 3, -1 / 3], rtol=1e-6)


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


def _random_rewards(seed=0):
    """Rewards with some abstentions, and a group of 7 (and of 3) in which all are equal."""
    generator = np.random.default_rng(seed)
    rewards = generator.normal(0.0, 2.0, BATCH).astype(np.float32)
    rewards[generator.integers(0, BATCH, 6)] = ABSTAINS
    rewards[14:21] = 0.7
    return rewards


@ESTIMATORS
def test_groups_do_not_mix(estimator):
    rewards = np.linspace(-7.0, 0.1, BATCH, dtype=np.float32)
    expected = np.asarray(_jitted(estimator)(rewards, 3))
    for other in (ABSTAINS, np.inf, 1e6):
        rewards[1] = other
        actual = np.asarray(_jitted(estimator)(rewards, 3))
        np.testing.assert_array_equal(actual[3:], expected[3:])
        assert not np.array_equal(actual[:3], expected[:3])


@ESTIMATORS
@pytest.mark.parametrize("group_size", [3, 7])
def test_permutations(estimator, group_size):
    generator = np.random.default_rng(2)
    rewards = _random_rewards().reshape(-1, group_size)
    expected = np.asarray(_jitted(estimator)(rewards.reshape(-1), group_size)).reshape(rewards.shape)
    groups = generator.permutation(len(rewards))
    actual = np.asarray(_jitted(estimator)(rewards[groups].reshape(-1), group_size)).reshape(rewards.shape)
    np.testing.assert_array_equal(actual, expected[groups])
    rows = generator.permutation(group_size)
    actual = np.asarray(_jitted(estimator)(rewards[:, rows].reshape(-1), group_size)).reshape(rewards.shape)
    np.testing.assert_allclose(actual, expected[:, rows], rtol=1e-5, atol=1e-6)


@ESTIMATORS
def test_whole_groups_may_be_taken_apart(estimator):
    rewards = _random_rewards()
    whole = _jitted(estimator)(rewards, 7)
    parts = [estimator(part, 7) for part in (rewards[:14], rewards[14:])]
    np.testing.assert_allclose(np.concatenate(parts), whole, rtol=1e-6, atol=1e-7)


@ESTIMATORS
def test_vmap(estimator):
    rewards = np.stack([_random_rewards(seed) for seed in range(2)])
    actual = jax.vmap(lambda x: estimator(x, 7))(rewards)
    for one, expected in zip(actual, rewards, strict=True):
        np.testing.assert_allclose(one, _jitted(estimator)(expected, 7), rtol=1e-6, atol=1e-7)


@ESTIMATORS
def test_a_common_offset_of_the_rewards_does_not_matter(estimator):
    # Powers of two, so that the offset costs no digits.
    rewards = np.random.default_rng(3).integers(-3, 4, BATCH).astype(np.float32)
    expected = _jitted(estimator)(rewards, 7)
    np.testing.assert_allclose(_jitted(estimator)(rewards + 8, 7), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("estimator", "power"), [(GROUP_RELATIVE, 0), (BIASED, 0), (UNSCALED, 1), (LEAVE_ONE_OUT, 1)], ids=NAMED
)
def test_the_scale_of_the_rewards(estimator, power):
    rewards = _random_rewards()
    expected = np.asarray(_jitted(estimator)(rewards, 7)) * 100.0**power
    np.testing.assert_allclose(_jitted(estimator)(rewards * 100, 7), expected, rtol=1e-5, atol=1e-5)


@ESTIMATORS
@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(
    hnp.arrays(np.float32, BATCH, elements=st.floats(-1e4, 1e4, width=32) | st.just(ABSTAINS)),
    st.sampled_from([1, 3, 7]),
)
def test_finite_and_centered(estimator, rewards, group_size):
    actual = np.asarray(_jitted(estimator)(rewards, group_size))
    assert np.all(np.isfinite(actual))
    assert np.all(actual[np.isnan(rewards)] == 0)
    scale = np.max(np.abs(np.nan_to_num(rewards))) + (estimator in (GROUP_RELATIVE, BIASED))
    np.testing.assert_allclose(actual.reshape(-1, group_size).sum(axis=1), 0.0, atol=1e-5 * scale)


@pytest.mark.parametrize("group_size", [3, 7])
@pytest.mark.parametrize(("estimator", "ddof"), [(GROUP_RELATIVE, 1), (BIASED, 0)], ids=["group_relative", "biased"])
def test_scaled_advantages_have_unit_deviation(estimator, ddof, group_size):
    rewards = np.random.default_rng(0).normal(3.0, 2.0, BATCH).astype(np.float32)
    actual = np.asarray(_jitted(estimator)(rewards, group_size)).reshape(-1, group_size)
    np.testing.assert_allclose(actual.std(axis=1, ddof=ddof), 1.0, rtol=1e-5)


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


# Groups without a gradient ----------------------------------------------------------------------------


@pytest.mark.parametrize("jit", [True, False], ids=["jit", "eager"])
@pytest.mark.parametrize(
    ("rewards", "group_size", "expected"),
    [
        ([1, 0, 1, 1, ABSTAINS, 2, ABSTAINS, ABSTAINS], 2, [0, 0, 1, 1, 1, 1, 1, 1]),
        ([1, 0, ABSTAINS, 0, 1, ABSTAINS, 1, 1], 4, [0, 0, 0, 0, 1, 1, 1, 1]),
        ([1, 1, 1, 1, 1, 1, 1, 1 + 2**-20], 8, [0] * 8),
        ([0.1] * 8, 8, [1] * 8),
        ([1, 0, 3, ABSTAINS, -2, 7, 1, 1], 1, [1] * 8),
    ],
)
def test_zero_variance(rewards, group_size, expected, jit):
    function = _jitted(advantages.zero_variance) if jit else advantages.zero_variance
    actual = function(jnp.asarray(rewards, jnp.float32), group_size)
    assert actual.dtype == jnp.bool_
    np.testing.assert_array_equal(actual, np.asarray(expected, bool))


@ESTIMATORS
@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(hnp.arrays(np.float32, BATCH, elements=st.sampled_from([0.0, 0.1, 1.0, ABSTAINS])), st.sampled_from([1, 3, 7]))
def test_zero_variance_says_which_groups_have_no_advantage(estimator, rewards, group_size):
    actual = np.asarray(_jitted(estimator)(rewards, group_size)).reshape(-1, group_size)
    without = np.repeat(np.all(actual == 0, axis=1), group_size)
    np.testing.assert_array_equal(_jitted(advantages.zero_variance)(rewards, group_size), without)


def test_zero_variance_refuses():
    with pytest.raises(ValueError, match="6 rewards are not a whole number of groups of 4"):
        advantages.zero_variance(jnp.zeros(6), 4)
    with pytest.raises(AssertionError, match="Chex"):
        advantages.zero_variance(jnp.zeros((2, 3)), 3)


def test_no_implicit_rank_promotion():
    with jax.numpy_rank_promotion("raise"):
        for estimator in (*NAMED.values(), advantages.zero_variance):
            jax.eval_shape(lambda x, function=estimator: function(x, 3), np.ones(6, np.float32))
