"""KL estimators against numbers worked out by hand, and against what they promise in expectation."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from r2vpo_jax import kl

POLICY_LOGITS = np.asarray([0.3, -1.0, 0.8, 0.1], np.float32)
REFERENCE_LOGITS = np.asarray([0.0, 0.5, -0.2, 0.4], np.float32)
BEHAVIOR_LOGITS = np.asarray([1.0, -0.3, 0.2, -0.6], np.float32)


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


# Tokens of another policy -----------------------------------------------------------------------------


@functools.cache
def _corrected(estimator, jit):
    def function(logp, reference_logp, behavior_logp):
        return kl.estimate(logp, reference_logp, estimator, behavior_logp=behavior_logp)

    return jax.jit(function) if jit else function


@pytest.mark.parametrize("jit", [True, False], ids=["jit", "eager"])
@pytest.mark.parametrize(
    ("estimator", "expected"),
    [
        # The estimates of test_estimates times r = .5 / .4, .25 / .5 and .3 / .6.
        ("k1", [1.25 * 0.693147, -0.5 * 0.693147, 0.0]),
        ("k2", [1.25 * 0.240227, 0.5 * 0.240227, 0.0]),
        ("k3", [1.25 * 0.193147, 0.5 * 0.306853, 0.0]),
    ],
)
def test_corrected_estimates(estimator, expected, jit):
    logps = jnp.log(jnp.asarray([[0.5, 0.25, 0.3], [0.25, 0.5, 0.3], [0.4, 0.5, 0.6]]))
    np.testing.assert_allclose(_corrected(estimator, jit)(*logps), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("estimator", "expected"),
    [
        # x = log 2 and -log 2, r = 1.25 and .5; the derivative of r k(x) is r (k(x) + k'(x)).
        ("k1", [1.25 * 1.693147, 0.5 * 0.306853]),  # r (x + 1)
        ("k2", [1.25 * 0.933373, -0.5 * 0.452921]),  # r (x^2 / 2 + x)
        ("k3", [1.25 * 0.693147, -0.5 * 0.693147]),  # r (e^-x - 1 + x + 1 - e^-x) = r x
    ],
)
def test_corrected_gradients(estimator, expected):
    logps = jnp.log(jnp.asarray([[0.5, 0.25], [0.25, 0.5], [0.4, 0.5]]))
    grad = jax.jit(jax.vmap(jax.grad(_corrected(estimator, False))))(*logps)
    np.testing.assert_allclose(grad, expected, rtol=1e-5)


def _logp(logits):
    return logits - np.log(np.sum(np.exp(logits)))


@functools.cache
def _expectation(estimator, corrected):
    """(value, gradient in the policy's logits) of E_behavior[ estimate ], exactly."""
    behavior_logp = _logp(BEHAVIOR_LOGITS)

    def value(logits):
        estimates = kl.estimate(
            jax.nn.log_softmax(logits),
            _logp(REFERENCE_LOGITS),
            estimator,
            behavior_logp=behavior_logp if corrected else None,
        )
        return jnp.sum(np.exp(behavior_logp) * estimates)

    return jax.jit(jax.value_and_grad(value))(POLICY_LOGITS)


def test_corrected_estimates_are_unbiased():
    # KL(pi || ref) has the gradient pi (x - KL) in the logits of pi, x = log pi - log ref.
    policy, x = np.exp(_logp(POLICY_LOGITS)), _logp(POLICY_LOGITS) - _logp(REFERENCE_LOGITS)
    true = policy @ x
    for estimator in ("k1", "k3"):
        value, grad = _expectation(estimator, True)
        np.testing.assert_allclose(value, true, rtol=1e-5)
        np.testing.assert_allclose(grad, policy * (x - true), atol=1e-6)
    # k2's value is not that of a divergence, so its corrected gradient is not either.
    value, grad = _expectation("k2", True)
    np.testing.assert_allclose(value, policy @ x**2 / 2, rtol=1e-5)
    assert abs(value - true) > 5e-3
    assert np.max(np.abs(grad - policy * (x - true))) > 0.01


@pytest.mark.parametrize("estimator", kl.ESTIMATORS)
def test_uncorrected_estimates_on_tokens_of_another_policy_are_biased(estimator):
    policy, x = np.exp(_logp(POLICY_LOGITS)), _logp(POLICY_LOGITS) - _logp(REFERENCE_LOGITS)
    value, grad = _expectation(estimator, False)
    assert abs(value - policy @ x) > 0.01
    assert np.max(np.abs(grad - policy * (x - policy @ x))) > 0.01


def test_on_tokens_of_the_policy_the_correction_is_in_the_gradient_only():
    # At r = 1 the value is k3 and the gradient x; without the correction it is 1 - exp(-x).
    logp, reference_logp = np.log(np.float32([0.5, 0.25])), np.log(np.float32([0.25, 0.5]))
    np.testing.assert_allclose(_corrected("k3", False)(logp, reference_logp, logp), [0.193147, 0.306853], atol=1e-6)
    grad = jax.vmap(jax.grad(_corrected("k3", False)))(logp, reference_logp, logp)
    np.testing.assert_allclose(grad, [0.693147, -0.693147], rtol=1e-5)


def test_swapped_arguments_penalize_leaving_the_behavior_policy():
    # k3 of (behavior, policy) is r - 1 - log r: r = 1.2: .2 - .182322, r = .5: -.5 + .693147, r = 1: 0.
    actual = _estimate("k3", True)(jnp.zeros(3), jnp.log(jnp.asarray([1.2, 0.5, 1.0])))
    np.testing.assert_allclose(actual, [0.017678, 0.193147, 0.0], atol=1e-6)

    # Its expectation under the behavior policy is KL(behavior || policy), whose gradient is policy - behavior.
    policy_logp, behavior_logp = _logp(POLICY_LOGITS), _logp(BEHAVIOR_LOGITS)
    policy, behavior = np.exp(policy_logp), np.exp(behavior_logp)

    def value(logits):
        return jnp.sum(behavior * kl.estimate(behavior_logp, jax.nn.log_softmax(logits), "k3"))

    actual, grad = jax.jit(jax.value_and_grad(value))(POLICY_LOGITS)
    np.testing.assert_allclose(actual, behavior @ (behavior_logp - policy_logp), rtol=1e-5)
    np.testing.assert_allclose(grad, policy - behavior, atol=1e-6)
    assert np.max(np.abs(grad)) > 0.1


# Edges ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", kl.ESTIMATORS)
def test_far_apart_is_finite(estimator):
    value, grad = jax.jit(jax.value_and_grad(_estimate(estimator, False)))(-1e4, 0.0)
    assert np.isfinite(value)
    assert grad == 0


@pytest.mark.parametrize("estimator", kl.ESTIMATORS)
@settings(max_examples=30, deadline=None, derandomize=True, database=None)
@given(hnp.arrays(np.float32, (3, 8), elements=st.floats(-1e4, 1e4, width=32)))
def test_extremes_are_finite(estimator, logps):
    values, grads = _value_and_grads(estimator)(*logps)
    assert np.all(np.isfinite(values))
    assert all(np.all(np.isfinite(x)) for x in grads)
    if estimator != "k1":
        assert np.all(np.asarray(values) >= 0)


@functools.cache
def _value_and_grads(estimator):
    return jax.jit(jax.vmap(jax.value_and_grad(_corrected(estimator, False), argnums=(0, 1, 2))))


@functools.cache
def _masked_sum(estimator, corrected):
    def value(logp, reference_logp, behavior_logp):
        values = kl.estimate(logp, reference_logp, estimator, behavior_logp=behavior_logp if corrected else None)
        return jnp.sum(jnp.where(np.asarray([True, False]), values, 0.0))

    return jax.jit(jax.value_and_grad(value, argnums=(0, 1, 2)))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("argument", ["logp", "reference_logp", "behavior_logp"])
@pytest.mark.parametrize("corrected", [False, True], ids=["plain", "corrected"])
@pytest.mark.parametrize("estimator", kl.ESTIMATORS)
def test_masked_positions_contribute_nothing(estimator, corrected, argument, bad):
    logps = {
        name: np.asarray([first, -2.0], np.float32)
        for name, first in (("logp", -1.0), ("reference_logp", -1.5), ("behavior_logp", -1.25))
    }
    expected = _masked_sum(estimator, corrected)(*logps.values())
    logps[argument][1] = bad
    value, grads = _masked_sum(estimator, corrected)(*logps.values())
    assert value == expected[0]
    for grad, clean in zip(grads, expected[1], strict=True):
        assert grad[0] == clean[0]
        assert grad[1] == 0
    assert grads[0][0] != 0


@pytest.mark.parametrize("argument", range(3))
@pytest.mark.parametrize("estimator", kl.ESTIMATORS)
def test_a_nan_that_counts_is_not_hidden_by_the_correction(estimator, argument):
    logps = np.full((3, 1), -1.0, np.float32)
    logps[argument] = np.nan
    assert np.all(np.isnan(_corrected(estimator, True)(*logps)))


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
    with pytest.raises(AssertionError, match="Chex"):
        kl.estimate(jnp.zeros(3), jnp.zeros(3), behavior_logp=jnp.zeros(()))


# The adaptive weight ----------------------------------------------------------------------------------


@functools.cache
def _adapt(jit, **kwargs):
    function = functools.partial(kl.adapt_coef, **kwargs)
    return jax.jit(function) if jit else function


@pytest.mark.parametrize("jit", [True, False], ids=["jit", "eager"])
@pytest.mark.parametrize(
    ("coef", "value", "changed", "expected"),
    [
        (1.0, 0.016, {}, 2.0),  # above .015
        (1.0, 0.0145, {}, 1.0),
        (1.0, 0.01, {}, 1.0),
        (1.0, 0.007, {}, 1.0),
        (1.0, 0.0066, {}, 0.5),  # below .006667
        (0.3, 100.0, {}, 0.6),  # the factor is 2, however far above
        (0.3, 0.0, {}, 0.15),
        # Exactly on the bounds, 2.25 and 1: unchanged.
        (0.3, 2.25, {"target": 1.5}, 0.3),
        (0.3, 1.0, {"target": 1.5}, 0.3),
        (0.3, 2.26, {"target": 1.5}, 0.6),
        (0.3, 0.99, {"target": 1.5}, 0.15),
        (6e3, 1.0, {}, 1e4),  # 12000, bounded
        (1.5e-4, 0.0, {}, 1e-4),  # .75e-4, bounded
        (1.0, 1.0, {"max_coef": 1.5}, 1.5),
        (1.0, 0.0, {"min_coef": 0.75}, 0.75),
        (0.3, math.nan, {}, 0.3),
        (0.3, math.inf, {}, 0.6),
        (0.3, -1e-3, {}, 0.15),  # a sampled k1 may be negative
    ],
)
def test_adapt_coef(coef, value, changed, expected, jit):
    actual = _adapt(jit, **{"target": 0.01} | changed)(jnp.float32(coef), jnp.float32(value))
    np.testing.assert_allclose(actual, expected, rtol=1e-6)
    assert actual.dtype == jnp.float32


def test_adapt_coef_has_no_gradient_and_maps():
    adapt = functools.partial(kl.adapt_coef, target=0.01)
    assert jax.grad(adapt, argnums=(0, 1))(1.0, 0.02) == (0.0, 0.0)
    actual = jax.vmap(adapt)(jnp.asarray([1.0, 2.0, 3.0]), jnp.asarray([0.02, 0.01, 0.001]))
    np.testing.assert_allclose(actual, [2.0, 2.0, 1.5])


def test_adapt_coef_settles_where_the_divergence_is_near_its_target():
    # A divergence of .08 / beta: from either side beta comes to rest with it within a factor of 1.5 of the target.
    for coef in (1e-2, 1e3):
        for _ in range(30):
            coef = _adapt(True, target=0.01)(jnp.float32(coef), jnp.float32(0.08 / coef))
        assert 0.01 / 1.5 <= 0.08 / coef <= 0.015


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(st.floats(2.0**-13, 1e4, width=32), st.floats(width=32))
def test_adapted_coef_stays_within_bounds(coef, value):
    after = _adapt(True, target=0.01)(np.float32(coef), np.float32(value))
    assert np.float32(1e-4) <= after <= 1e4


@pytest.mark.parametrize(
    "changed",
    [
        {"target": 0.0},
        {"target": -0.01},
        {"target": math.nan},
        {"min_coef": 0.0},
        {"min_coef": -1.0},
        {"min_coef": 2.0, "max_coef": 1.0},
        {"max_coef": math.nan},
    ],
)
def test_adapt_coef_refuses(changed):
    with pytest.raises(ValueError, match="target > 0 and 0 < min_coef <= max_coef"):
        kl.adapt_coef(1.0, 0.01, **{"target": 0.01} | changed)


@pytest.mark.parametrize("shapes", [((2,), ()), ((), (2,))])
def test_adapt_coef_takes_scalars(shapes):
    with pytest.raises(AssertionError, match="Chex"):
        kl.adapt_coef(*map(np.ones, shapes), target=0.01)


def test_no_implicit_rank_promotion():
    x = np.ones((2, 3), np.float32)
    with jax.numpy_rank_promotion("raise"):
        for estimator in kl.ESTIMATORS:
            jax.eval_shape(_estimate(estimator, False), x, x)
            jax.eval_shape(_corrected(estimator, False), x, x, x)
        jax.eval_shape(_adapt(False, target=0.01), x[0, 0], x[0, 0])
