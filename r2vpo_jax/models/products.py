"""Matrix products as a model computes them."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from r2vpo_jax.models.config import DecoderConfig

MASKED = -1e30  # a score or logit that counts for nothing; finite, so that a row of them gives a mean and not NaN


def einsum(spec: str, x, y, config: DecoderConfig, **kwargs):
    """`jnp.einsum` at the precision of the model."""
    # By default float32 means float32: TPUs and TF32 GPUs would otherwise round the inputs.
    precision = config.matmul_precision if config.compute_dtype == jnp.float32 else None
    return jnp.einsum(spec, x, y, precision=precision, **kwargs)


def project(spec: str, x, kernel, num_inputs: int, config: DecoderConfig, **kwargs):
    """`einsum(spec, x, kernel)` of a kernel whose first `num_inputs` axes are the last of x.

    Whole rows [B, S, ...] are multiplied as B * S rows. With two axes to sum over in the gradient of the kernel, XLA on CPUs
    transposes what they are axes of, and all the elementwise work that makes it with it, at a tenth of its speed.
    """
    leading = x.shape[: x.ndim - num_inputs]
    if len(leading) != 2:  # decoding: no gradient
        return einsum(spec, x, kernel, config, **kwargs)
    y = einsum(spec, x.reshape(-1, *x.shape[2:]), kernel, config, **kwargs)
    return y.reshape(*leading, *y.shape[1:])


def product_in_parts(product: Callable, x, dtype):
    """`product(x)`, linear and with a float32 result, of a float32 x with something in `dtype`, which has 16 bits.

    It is the product of x rounded to `dtype`, plus that of what the rounding took away: twice the multiplications, each
    as fast as 16 bits are, and no float32 copy of the other factor. The gradient is that of the first part.
    """
    kind = jnp.finfo(dtype)
    rounded = jax.lax.reduce_precision(x, kind.nexp, kind.nmant)  # XLA may leave out a cast to and fro, but not this
    rest = (x - rounded).astype(dtype)
    return product(rounded.astype(dtype)) + jax.lax.stop_gradient(product(rest))
