"""Estimators of KL(policy || reference) from tokens that the policy generated.

With x = log pi(a) - log ref(a) (http://joschu.net/blog/kl-approx.html):

    k1 = x                 unbiased, high variance, may be negative
    k2 = x^2 / 2           biased value; its gradient is the gradient of the KL
    k3 = exp(-x) - 1 + x   unbiased, never negative
"""

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

ESTIMATORS = ("k1", "k2", "k3")
_CLAMP = 20.0  # numerical guard, as in losses.LOG_RATIO_CLAMP


def estimate(
    logp: Float[Array, "..."], reference_logp: Float[Array, "..."], estimator: str = "k3"
) -> Float[Array, "..."]:
    """Per-token estimate, elementwise; differentiable in `logp`.

    A NaN stays a NaN but has no gradient, so `where(mask, estimate(...), 0)` is safe with NaN under the mask.

    Raises:
      AssertionError: the shapes differ (chex).
      ValueError: unknown estimator.
    """
    logp, reference_logp = jnp.asarray(logp, jnp.float32), jnp.asarray(reference_logp, jnp.float32)
    chex.assert_equal_shape([logp, reference_logp])
    x = logp - reference_logp
    x = jnp.where(jnp.abs(x) <= _CLAMP, x, jax.lax.stop_gradient(jnp.clip(x, -_CLAMP, _CLAMP)))
    if estimator == "k1":
        return x
    if estimator == "k2":
        return 0.5 * x**2
    if estimator == "k3":
        return jnp.expm1(-x) + x
    raise ValueError(f"unknown KL estimator {estimator!r}; one of {ESTIMATORS}")
