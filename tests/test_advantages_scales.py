"""Other scales and baselines of a group, rewards of several functions: against numbers worked out by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r2vpo_jax import advantages

NONE = np.nan


def test_large_rewards_keep_their_differences():
    """The mean 1e8 + 2 is not a float32 beside 1e8 and 1e8 + 8; deviation sqrt((4 + 36 + 4 + 4) / 3) = 4."""
    rewards = jnp.float32(1e8) + jnp.array([0.0, 8.0, 0.0, 0.0])
    np.testing.assert_allclose(advantages.group_relative(rewards, 4), [-0.5, 1.5, -0.5, -0.5], rtol=1e-5)
    np.testing.assert_array_equal(advantages.group_relative(rewards, 4, scale="none"), [-2, 6, -2, -2])
    np.testing.assert_allclose(advantages.leave_one_out(rewards, 4), [-8 / 3, 8, -8 / 3, -8 / 3], rtol=1e-6)


@pytest.mark.parametrize(
    ("rewards", "scale", "expected"),
    [
        # All six votes: mean 1/2, deviation sqrt(6/4 / 5); the third group has no gradient whatever the batch is.
        ([1, 0, 1, 0, 1, 0], "batch", np.array([1, -1, 1, -1, 1, -1]) / 2 / np.sqrt(0.3)),
        # Four votes (3, 1, 5, 5): mean 7/2, deviation sqrt((1/4 + 25/4 + 9/4 + 9/4) / 3); groups (3, 1), (5, 5), (-).
        ([3, 1, 5, 5, NONE, NONE], "batch", np.array([1, -1, 0, 0, 0, 0]) / np.sqrt(11 / 3)),
        ([2, 2, 2, 2, 2, 2], "batch", np.zeros(6)),
        # MaxRL: K right of G give G/K - 1 and -1; none right and all right give nothing.
        ([1, 0, 0, 0, 0, 0], "mean", [2, -1, -1, 0, 0, 0]),
        ([1, 1, 0, 1, 1, 1], "mean", [0.5, 0.5, -1, 0, 0, 0]),
        ([1, 0, NONE, NONE, NONE, 1], "mean", [1, -1, 0, 0, 0, 0]),
        # Not for negative rewards: a group whose mean is not above 0 is left out.
        ([-1, 1, -1, 3, 0, 0], "mean", [0, 0, 0, 2, -1, -1]),
    ],
)
@pytest.mark.parametrize("jit", [True, False], ids=["jit", "eager"])
def test_scales_by_hand(rewards, scale, expected, jit):
    size = 2 if scale == "batch" else 3
    function = advantages.group_relative
    function = jax.jit(function, static_argnames=("group_size", "scale")) if jit else function
    actual = function(jnp.asarray(rewards, jnp.float32), group_size=size, scale=scale)
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-7)


def test_max_rl_is_the_gradient_of_the_log_of_the_success_rate():
    """Over all groups of 4 that a policy with success rate p draws, by p itself: 1 / p, as a series that ends early.

    The score of a right answer is 1 / p, of a wrong one -1 / (1 - p). E[mean of A times score] is then
    sum_{k < G - 1} (1 - p)^k, where all k would give 1 / p = d log p / dp.
    """
    p, size, total = 0.3, 4, 0.0
    for number in range(2**size):
        right = np.array([number >> i & 1 for i in range(size)], np.float32)
        probability = np.prod(np.where(right, p, 1 - p))
        score = np.where(right, 1 / p, -1 / (1 - p))
        advantage = np.asarray(advantages.group_relative(jnp.asarray(right), size, scale="mean", epsilon=0.0))
        total += probability * np.mean(advantage * score)
    np.testing.assert_allclose(total, 1 + 0.7 + 0.7**2, rtol=1e-5)


@pytest.mark.parametrize("jit", [True, False], ids=["jit", "eager"])
def test_gdpo_by_hand(jit):
    """Two groups of two, three functions; a = sqrt(1/2) is what a group (x, y) is normalized to.

    First: (1, 0) -> (a, -a), (0, 100) -> (-a, a), (5, 5) -> (0, 0); weights 1, 1/2, 9: S = (a/2, -a/2).
    Second: (0, 1) -> (-a, a), (100, 0) -> (a, -a), one vote -> (0, 0): S = (-a/2, a/2).
    Mean 0, deviation sqrt(4 a^2 / 4 / 3) = a / sqrt(3).
    """
    parts = jnp.array([[1.0, 0.0, 5.0], [0.0, 100.0, 5.0], [0.0, 100.0, 7.0], [1.0, 0.0, NONE]])
    function = jax.jit(advantages.gdpo, static_argnums=1) if jit else advantages.gdpo
    actual = function(parts, 2, jnp.array([1.0, 0.5, 9.0]))
    np.testing.assert_allclose(actual, np.sqrt(3) / 2 * np.array([1, -1, -1, 1]), rtol=1e-5)


def test_gdpo_leaves_out_what_no_function_applies_to():
    parts = jnp.array([[1.0, 2.0], [NONE, NONE], [0.0, 4.0], [3.0, NONE], [1.0, 1.0], [2.0, 1.0]])
    actual = np.asarray(advantages.gdpo(parts, 3))
    # Group 1: (1, -, 0) -> (a, 0, -a), (2, -, 4) -> (-a, 0, a): S = 0. Group 2: (3, 1, 2) -> (1, -1, 0), (1, 1) -> 0.
    np.testing.assert_allclose(actual, np.array([0, 0, 0, 1, -1, 0]) / np.sqrt(2 / 4), rtol=1e-5, atol=1e-6)


def test_gdpo_of_one_function_is_group_relative_scaled_over_the_batch():
    rewards = np.random.default_rng(0).normal(size=(12, 1)).astype(np.float32)
    alone = np.asarray(advantages.group_relative(jnp.asarray(rewards[:, 0]), 4))
    expected = (alone - alone.mean()) / alone.std(ddof=1)
    np.testing.assert_allclose(advantages.gdpo(jnp.asarray(rewards), 4), expected, rtol=1e-4)
    # The scale of a function does not matter, and equal sums have no gradient, not a blown-up rounding.
    np.testing.assert_allclose(advantages.gdpo(jnp.asarray(1000 * rewards), 4), expected, rtol=1e-4)
    both = np.concatenate([rewards, -rewards], axis=1)
    np.testing.assert_array_equal(advantages.gdpo(jnp.asarray(both), 4), np.zeros(12))


def test_responses_with_other_rewards_have_other_advantages():
    """What GDPO is for: (0, 1) and (1, 0) and (0.9, 0.1) all add up to 1."""
    parts = np.array([[0.0, 1.0], [1.0, 0.0], [0.9, 0.1], [0.0, 0.0]], np.float32)
    assert len(np.unique(np.asarray(advantages.group_relative(jnp.asarray(parts.sum(axis=1)), 4)).round(5))) == 2
    assert len(np.unique(np.asarray(advantages.gdpo(jnp.asarray(parts), 4)).round(5))) == 4


def test_gdpo_refuses_what_does_not_fit():
    with pytest.raises(AssertionError):
        advantages.gdpo(jnp.ones(4), 2)
    with pytest.raises(AssertionError):
        advantages.gdpo(jnp.ones((4, 2)), 2, jnp.ones(3))
    with pytest.raises(ValueError, match="not a whole number of groups"):
        advantages.gdpo(jnp.ones((4, 2)), 3)


def test_the_baseline_of_least_variance():
    """Against a search over baselines, and independent of the baseline and the scale that the advantages come with."""
    generator = np.random.default_rng(1)
    rewards, size = generator.normal(size=8), 4
    weights = generator.uniform(0.5, 3.0, 8) ** 2
    moved = np.asarray(advantages.minimum_variance(jnp.asarray(rewards, jnp.float32), size, jnp.asarray(weights)))
    for group in range(2):
        r, w = rewards[4 * group : 4 * group + 4], weights[4 * group : 4 * group + 4]
        tried = np.linspace(-4, 4, 80001)
        best = tried[np.argmin(np.sum(w * (r - tried[:, None]) ** 2, axis=1))]
        np.testing.assert_allclose(moved[4 * group : 4 * group + 4], r - best, atol=2e-4)
    centered = advantages.group_relative(jnp.asarray(rewards, jnp.float32), size, scale="none")
    again = advantages.minimum_variance(centered, size, jnp.asarray(weights))
    np.testing.assert_allclose(again, moved, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        advantages.minimum_variance(3 * centered, size, weights), 3 * moved, rtol=1e-4, atol=1e-5
    )


def test_responses_without_a_weight_move_no_baseline():
    given = jnp.array([1.0, jnp.nan, 3.0, -5.0])
    moved = np.asarray(advantages.minimum_variance(given, 4, jnp.array([1e30, 0.0, 1e30, 0.0])))
    np.testing.assert_allclose(moved[[0, 2]], [-1, 1], rtol=1e-6)
    np.testing.assert_array_equal(advantages.minimum_variance(jnp.array([1.0, 2.0]), 2, jnp.zeros(2)), [1, 2])
