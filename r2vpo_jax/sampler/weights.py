"""Parameters as samplers of lower precision have them."""

import jax
import jax.numpy as jnp

from r2vpo_jax.config.sampling import SAMPLING_WEIGHTS
from r2vpo_jax.models import lora


def rounded_weights(params, how: str):
    """Parameters as a sampler of lower precision has them; activations stay as they are.

    It stands in for inference engines that compute otherwise than the learner: the ratio then is not 1 on fresh data.

    Args:
      params: of a `models.Decoder`.
      how: "compute" (unchanged), "bfloat16" (every weight to 8 bits of mantissa), or "int8" (every matrix to 255 levels, evenly
        spaced between plus and minus the largest weight of its layer and output channel; vectors and adapters unchanged).

    Raises:
      ValueError: an unknown `how`.
    """
    if how not in SAMPLING_WEIGHTS:
        raise ValueError(f"unknown weights {how!r}; one of {SAMPLING_WEIGHTS}")

    def rounded(path, x):
        stacked = path[0].key == "layers"  # axis 0 is the layer
        if how == "bfloat16":
            return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
        if how == "compute" or x.ndim < 2 + stacked or path[-1].key in lora.FACTORS:
            return x
        largest = jnp.max(jnp.abs(x), axis=tuple(range(stacked, x.ndim - 1)), keepdims=True)
        level = jnp.where(largest == 0, 1.0, largest / 127)
        return (jnp.round(x / level) * level).astype(x.dtype)

    return jax.tree_util.tree_map_with_path(rounded, params)
