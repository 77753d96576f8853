"""What all of the mathematics shares: names of array types, checks of shapes, masking, and one numerical guard.

Imports nothing of ours, so that every module of the mathematics may import it.
"""

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

# A numerical guard, not a trust region: exp(20)^2 is still finite in float32.
LOG_RATIO_CLAMP = 20.0

Scalar = Float[Array, ""]
PerToken = Float[Array, "batch time"]
Logp = PerToken
Advantages = Float[Array, "batch"] | PerToken
Mask = Bool[Array, "batch time"]
Weights = PerToken | None
Normalizer = float | Scalar | None


def check_tokens(mask, *values) -> Mask:
    """Check that mask and values are all [B, T], and return the mask as booleans.

    Args:
      mask: bool or 0/1 [B, T].
      *values: [B, T] each; None stands for an optional array that was not given.

    Raises:
      AssertionError: shapes or ranks do not fit (chex).
    """
    mask = jnp.asarray(mask)
    arrays = [mask, *(x for x in values if x is not None)]
    chex.assert_rank(arrays, 2)
    chex.assert_equal_shape(arrays)
    return mask.astype(bool)


def unmasked(values, mask: Mask) -> PerToken:
    """The values as f32[B, T], 0 where masked.

    It comes before any arithmetic, so that a NaN under the mask reaches neither value nor gradient.
    """
    return jnp.where(mask, jnp.asarray(values, jnp.float32), 0.0)


def spread(advantages: Advantages, mask: Mask) -> PerToken:
    """Advantages [B] (one for each sequence) or [B, T] as f32[B, T], 0 where masked.

    Raises:
      AssertionError: shapes or ranks do not fit (chex).
    """
    chex.assert_rank(advantages, {1, 2})
    chex.assert_equal_shape_prefix([advantages, mask], jnp.ndim(advantages))
    advantages = jnp.asarray(advantages, jnp.float32)
    return unmasked(advantages[:, None] if advantages.ndim == 1 else advantages, mask)


def clamp(log_ratio: Float[Array, "..."]) -> Float[Array, "..."]:
    """The log-ratio within +-LOG_RATIO_CLAMP, without a gradient."""
    return jax.lax.stop_gradient(jnp.clip(log_ratio, -LOG_RATIO_CLAMP, LOG_RATIO_CLAMP))


def scalar(value: float | Scalar) -> Scalar:
    """A number as f32[], without a gradient.

    Raises:
      AssertionError: not a scalar (chex).
    """
    value = jax.lax.stop_gradient(jnp.asarray(value, jnp.float32))
    chex.assert_rank(value, 0)
    return value
