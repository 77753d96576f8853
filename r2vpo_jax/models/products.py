"""Matrix products as a model computes them."""

import jax.numpy as jnp

from r2vpo_jax.models.config import DecoderConfig

MASKED = -1e30  # a score or logit that counts for nothing; finite, so that a row of them gives a mean and not NaN


def einsum(spec: str, x, y, config: DecoderConfig, **kwargs):
    """`jnp.einsum` at the precision of the model."""
    # By default float32 means float32: TPUs and TF32 GPUs would otherwise round the inputs.
    precision = config.matmul_precision if config.compute_dtype == jnp.float32 else None
    return jnp.einsum(spec, x, y, precision=precision, **kwargs)
