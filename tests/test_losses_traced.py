"""Objectives whose hyper-parameters are traced values give what plain numbers give."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r2vpo_jax import corrections, kl, losses
from tests.helpers.losses import COMPUTED, NAMES, batch, evaluate

# Numbers for hyper-parameters that are off by default, and tighter ones for bounds that the arrays here stay within.
OTHERS = {
    "ppo_clip": {"dual_clip": 1.5},
    "cispo": {"min_ratio": 0.9},
    "dppo_tv": {"beta": 0.2},
    "gmpo": {"log_clip": 0.2},
    "dppo_kl": {"max_ratio": 1.4},
}


def numbers(name):
    """Every number that the objective takes, none of them off."""
    taken = {k: v for k, v in losses.hyperparameters(name).items() if not isinstance(v, str)}
    taken |= COMPUTED.get(name, {}) | OTHERS.get(name, {})
    assert all(taken.values())
    return taken


def traced(name):
    """(numbers, arrays) -> (loss, stats, gradient in logp)."""

    def call(numbers, arrays):
        def loss(logp):
            return losses.get(name)(**arrays | {"logp": logp}, reduction="token_mean", **numbers)

        (value, stats), grad = jax.value_and_grad(loss, has_aux=True)(arrays["logp"])
        return value, stats, grad

    return call


def assert_same(actual, expected):
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, e, rtol=1e-6, atol=1e-6 * np.max(np.abs(e)))


@pytest.mark.parametrize("name", NAMES)
def test_traced_numbers_give_what_plain_ones_do(name):
    arrays, given = batch(), numbers(name)
    actual = jax.jit(traced(name))(given, arrays)
    assert_same(actual, evaluate(name, arrays, **given))


@pytest.mark.parametrize("name", NAMES)
def test_runs_side_by_side_are_those_runs(name):
    arrays, one = batch(), numbers(name)
    other = {k: 0.75 * v for k, v in one.items()}
    both = {k: jnp.array([one[k], other[k]]) for k in one}
    both_batches = {k: np.stack([v, v]) for k, v in arrays.items()}
    actual = jax.jit(jax.vmap(traced(name)))(both, both_batches)
    for number, values in enumerate((one, other)):
        assert_same(jax.tree.map(lambda x: x[number], actual), evaluate(name, arrays, **values))  # noqa: B023
    loss, _, grad = actual
    assert not one or loss[0] != loss[1] or np.any(grad[0] != grad[1]), "the numbers matter"


def test_what_is_not_traced_is_still_checked():
    given = numbers("dppo_tv")
    max_ratio = given.pop("max_ratio")
    for bad in ({"max_ratio": 0.9}, {"max_ratio": np.float32("nan")}):
        with pytest.raises(ValueError, match="max_ratio must be >= 1, got"):
            jax.eval_shape(lambda numbers: traced("dppo_tv")(numbers | bad, batch()), given)  # noqa: B023
    jax.eval_shape(lambda numbers: traced("dppo_tv")(numbers | {"max_ratio": max_ratio}, batch()), given)


def test_bounds_of_importance_weights_can_be_traced():
    arrays = batch()
    given = {"max_weight": 1.25, "min_weight": 0.75}
    for mode in corrections.MODES:
        weights = functools.partial(
            corrections.importance_weights, arrays["logp"], arrays["behavior_logp"], arrays["mask"], mode=mode
        )
        np.testing.assert_array_equal(jax.jit(lambda given: weights(**given))(given), weights(**given))  # noqa: B023
        assert np.any(weights(**given) != weights()), "the bounds matter"


def test_the_target_of_a_divergence_can_be_traced():
    steps = jax.vmap(lambda target: kl.adapt_coef(jnp.float32(0.5), jnp.float32(0.02), target=target))
    np.testing.assert_array_equal(steps(jnp.array([0.01, 0.02, 0.04])), [1.0, 0.5, 0.25])
