"""KL estimators against numbers worked out by hand, and against what they promise in expectation."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r2vpo_jax import kl

POLICY_LOGITS = np.asarray([0.3, -1.0, 0.8, 0.1], np.float32)
REFERENCE_LOGITS = np.asarray([0.0, 0.5, -0.2, 0.4], np.float32)


@functools.cache
def _estimate(estimator, jit):
    function = functools.partial(kl.estimate, estimator=estimator)
    return jax.jit(function) if jit else function


@pytest.mark.parametrize("jit", [True, False], ids=["jit", "eager"])
@pytest.mark.parametrize(
    ("estimator", "expected"),
    [
        # x = log(.5 / .25) = log 2 for the first token, -log 2 for the second, 0 for the third.
        ("k1", [0.693147, -0.693147, 0.0]),
        ("k2", [0.240227, 0.240227, 0.0]),  # (log 2)^2 / 2
        ("k3", [0.193147, 0.306853, 0.0]),  # 1/2 - 1 + log 2,  2 - 1 - log 2
    ],
)
def test_estimates(estimator, expected, jit):
    logp, reference_logp = jnp.log(jnp.asarray([[0.5, 0.25, 0.3], [0.25, 0.5, 0.3]]))
    np.testing.assert_allclose(_estimate(estimator, jit)(logp, reference_logp), expected, atol=1e-6)


def test_k3_is_the_default():
    np.testing.assert_allclose(kl.estimate(jnp.log(0.5), jnp.log(0.25)), 0.193147, atol=1e-6)


def test_k3_is_never_negative():
    # Cancellation would show near 0, overflow at the far end.
    magnitude = np.logspace(-12, 4, 20_000, dtype=np.float32)
    x = jnp.asarray(np.concatenate([-magnitude, magnitude]))
    values = np.asarray(_estimate("k3", True)(x, jnp.zeros_like(x)))
    assert np.all(values >= 0)
    assert np.all(np.isfinite(values))
    np.testing.assert_allclose(kl.estimate(jnp.float32(1e-3), jnp.float32(0)), 5e-7, rtol=2e-3)  # x^2 / 2


@pytest.mark.parametrize(
    ("estimator", "expected"), [("k1", [1.0, 1.0]), ("k2", [0.5, -3.0]), ("k3", [1 - math.exp(-0.5), 1 - math.exp(3)])]
)
def test_gradients(estimator, expected):
    # d/dx at x = .5 and -3: 1,  x,  1 - exp(-x)
    grad = jax.jit(jax.vmap(jax.grad(_estimate(estimator, False))))(np.asarray([-3.5, -7.0]), np.full(2, -4.0))
    np.testing.assert_allclose(grad, expected, rtol=1e-5)


def _expected_gradient(estimator):
    """E_policy[ gradient of the estimate ] in the logits, as a loss on sampled tokens has it."""

    def value(logits):
        probabilities = jax.nn.softmax(jax.lax.stop_gradient(logits))
        estimates = kl.estimate(jax.nn.log_softmax(logits), jax.nn.log_softmax(REFERENCE_LOGITS), estimator)
        return jnp.sum(probabilities * estimates)

    return jax.jit(jax.grad(value))(POLICY_LOGITS)


def test_expected_values_and_gradients():
    # log-probabilities, and with x = log pi - log ref the gradients in the logits of pi:
    #   KL(pi || ref): pi (x - KL),    KL(ref || pi): pi - ref
    logp, reference_logp = (x - np.log(np.sum(np.exp(x))) for x in (POLICY_LOGITS, REFERENCE_LOGITS))
    policy, x = np.exp(logp), logp - reference_logp
    true = policy @ x
    assert true > 0.1
    for unbiased in ("k1", "k3"):
        np.testing.assert_allclose(policy @ _estimate(unbiased, True)(logp, reference_logp), true, rtol=1e-5)

    reverse, forward = policy * (x - true), policy - np.exp(reference_logp)
    np.testing.assert_allclose(_expected_gradient("k2"), reverse, atol=1e-6)
    np.testing.assert_allclose(_expected_gradient("k1"), 0.0, atol=1e-6)
    # The known trap: k3 in a loss follows the gradient of KL(reference || policy).
    np.testing.assert_allclose(_expected_gradient("k3"), forward, atol=1e-6)
    assert np.max(np.abs(reverse - forward)) > 0.01


@pytest.mark.parametrize("estimator", kl.ESTIMATORS)
def test_far_apart_is_finite(estimator):
    value, grad = jax.jit(jax.value_and_grad(_estimate(estimator, False)))(-1e4, 0.0)
    assert np.isfinite(value)
    assert grad == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("argument", [0, 1])
@pytest.mark.parametrize("estimator", kl.ESTIMATORS)
def test_masked_positions_contribute_nothing(estimator, argument, bad):
    logps = [np.asarray([-1.0, -2.0], np.float32), np.asarray([-1.5, -2.0], np.float32)]
    logps[argument][1] = bad
    value, grads = _masked_sum(estimator)(*logps)
    np.testing.assert_allclose(value, kl.estimate(np.float32(-1.0), np.float32(-1.5), estimator), rtol=1e-6)
    assert grads[0][0] != 0
    assert grads[0][1] == grads[1][1] == 0


@functools.cache
def _masked_sum(estimator):
    def value(logp, reference_logp):
        return jnp.sum(jnp.where(np.asarray([True, False]), kl.estimate(logp, reference_logp, estimator), 0.0))

    return jax.jit(jax.value_and_grad(value, argnums=(0, 1)))


@pytest.mark.parametrize("estimator", kl.ESTIMATORS)
def test_a_nan_that_counts_is_not_hidden(estimator):
    assert np.isnan(kl.estimate(jnp.float32(jnp.nan), jnp.float32(0), estimator))


def test_bfloat16_is_computed_in_float32():
    # -3 + 2.98828125 needs more bits than bfloat16 has between 2 and 4.
    logp, reference_logp = jnp.asarray(-3.0, jnp.bfloat16), jnp.asarray(-0.01171875, jnp.bfloat16)
    actual = kl.estimate(logp, reference_logp, "k1")
    assert actual.dtype == jnp.float32
    assert actual == -2.98828125


def test_refused():
    with pytest.raises(ValueError, match="unknown KL estimator 'k4'; one of"):
        kl.estimate(jnp.zeros(2), jnp.zeros(2), "k4")
    with pytest.raises(AssertionError, match="Chex"):
        kl.estimate(jnp.zeros((2, 3)), jnp.zeros(3))
