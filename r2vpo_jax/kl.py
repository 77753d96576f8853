"""Estimators of a KL divergence from sampled tokens, and an adaptive weight for it.

For tokens that the *first* policy generated, with x = log first(a) - log second(a), KL(first || second) is
estimated by (http://joschu.net/blog/kl-approx.html)

    k1 = x                 unbiased, high variance, may be negative
    k2 = x^2 / 2           biased value
    k3 = exp(-x) - 1 + x   unbiased, never negative

As a loss on tokens of the policy itself, only k2 has the gradient of KL(policy || reference): that of k1 is
zero in expectation, that of k3 belongs to the other direction. On tokens of an older policy none is unbiased
until it is weighted by r = policy / behavior; r k3 then is unbiased in value and gradient (DeepSeek-V3.2, arXiv
2512.02556; "bias correction" in TRL).
"""

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from r2vpo_jax.losses.arrays import LOG_RATIO_CLAMP, clamp
from r2vpo_jax.losses.core import require

ESTIMATORS = ("k1", "k2", "k3")


def estimate(
    logp: Float[Array, "..."],
    reference_logp: Float[Array, "..."],
    estimator: str = "k3",
    *,
    behavior_logp: Float[Array, "..."] | None = None,
) -> Float[Array, "..."]:
    """Per-token estimate of KL(policy || reference), elementwise; differentiable in both log-probabilities.

    With the arguments swapped, on tokens of a behavior policy, `estimate(behavior_logp, logp, "k3")` is
    r - 1 - log r, the unbiased estimate of KL(behavior || policy), the penalty of adaptive-KL PPO.

    Args:
      logp: under the policy.
      reference_logp: under the reference.
      estimator: "k1", "k2" or "k3".
      behavior_logp: under the policy that generated the tokens, if it is another one: the estimate is then
        multiplied by r = exp(logp - behavior_logp), with r's gradient (the importance-corrected estimate).

    A NaN stays a NaN but has no gradient, so `where(mask, estimate(...), 0)` is safe with NaN under the mask.

    Raises:
      AssertionError: the shapes differ (chex).
      ValueError: unknown estimator.

    Example, x = log(0.4 / 0.2) = 0.6931:
      >>> logp, reference_logp = jnp.log(jnp.array([0.4, 0.2]))
      >>> [round(float(estimate(logp, reference_logp, name)), 4) for name in ESTIMATORS]  # x, x^2 / 2, 1/2 - 1 + x
      [0.6931, 0.2402, 0.1931]
    """
    x = _log_ratio(logp, reference_logp)
    if behavior_logp is not None:
        log_r = _log_ratio(logp, behavior_logp)
        nan = jnp.isnan(x + log_r)
        x, log_r = jnp.where(nan, 0.0, x), jnp.where(nan, 0.0, log_r)
    if estimator == "k1":
        value = x
    elif estimator == "k2":
        value = 0.5 * x**2
    elif estimator == "k3":
        value = jnp.expm1(-x) + x
    else:
        raise ValueError(f"unknown KL estimator {estimator!r}; one of {ESTIMATORS}")
    if behavior_logp is None:
        return value
    return jnp.where(nan, jnp.nan, jnp.exp(log_r) * value)


def adapt_coef(
    coef: Float[Array, ""],
    value: Float[Array, ""],
    *,
    target: float,
    min_coef: float = 1e-4,
    max_coef: float = 1e4,
) -> Float[Array, ""]:
    """PPO's rule for the weight of its KL penalty: double it above 1.5 times the target, halve it below 2/3.

    The classical relative of a dual variable: it steers a soft penalty to a target instead of ascending a
    Lagrangian. Source: arXiv 1707.06347, section 4. The bounds are ours: doubling has none of its own.

    Args:
      coef: beta.
      value: the measured divergence; a NaN leaves beta as it is.
      target: > 0, d_targ.
      min_coef, max_coef: bounds of beta.

    Raises:
      AssertionError: coef or value is not a scalar (chex).
      ValueError: target or bounds out of range.

    Example, twice the target:
      >>> float(adapt_coef(jnp.float32(0.5), jnp.float32(0.02), target=0.01))
      1.0
    """
    require(
        lambda: target > 0 and 0 < min_coef <= max_coef,
        f"target > 0 and 0 < min_coef <= max_coef is needed, got {target}, {min_coef}, {max_coef}",
    )
    chex.assert_rank([coef, value], 0)
    factor = jnp.where(value > 1.5 * target, 2.0, jnp.where(value < target / 1.5, 0.5, 1.0))
    return jax.lax.stop_gradient(jnp.clip(coef * factor, min_coef, max_coef))


def _log_ratio(first, second):
    first, second = jnp.asarray(first, jnp.float32), jnp.asarray(second, jnp.float32)
    chex.assert_equal_shape([first, second])
    x = first - second
    return jnp.where(jnp.abs(x) <= LOG_RATIO_CLAMP, x, clamp(x))
