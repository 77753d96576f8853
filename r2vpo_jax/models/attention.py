"""Attention over whole rows, and of a decode step over what is cached.

Sizes in comments: N prompts, G samples a prompt, P prompt columns, T response columns, B rows, S columns of the tokens at
hand, K key-value heads, R query heads a key-value head, D head size. Queries come divided by the square root of D.
"""

import functools

import jax
import jax.numpy as jnp

from r2vpo_jax.models.config import DecoderConfig
from r2vpo_jax.models.products import MASKED, einsum


def full(query, key, value, segments, config: DecoderConfig):
    """Causal attention within the segments of each row.

    Args:
      query: [B, S, K, R, D].
      key, value: [B, S, K, D].
      segments: int32 [B, S], 0 for padding; or bool, False for padding and one segment a row.
      config: of the model.

    Returns:
      [B, S, K, R, D]; what stands at padding has no meaning.
    """
    size, block = query.shape[1], config.attention_block_size
    attend = functools.partial(_attend, key=key, value=value, segments=segments, config=config)
    if not 0 < block < size:
        return attend(query, segments, 0)
    # A block's scores live while it is computed, and are computed again in the backward pass.
    num_blocks = -(-size // block)

    def blocks(x):
        x = jnp.pad(x, [(0, 0), (0, num_blocks * block - size)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(x.shape[0], num_blocks, block, *x.shape[2:]), 1, 0)

    attend = jax.checkpoint(attend, prevent_cse=False)
    out = jax.lax.map(lambda x: attend(*x), (blocks(query), blocks(segments), jnp.arange(num_blocks) * block))
    return jnp.moveaxis(out, 0, 1).reshape(query.shape[0], -1, *query.shape[2:])[:, :size]


def _attend(query, query_segments, start, *, key, value, segments, config):
    """The same for queries [B, s, K, R, D] that stand in columns `start` to `start + s` of the rows."""
    columns = jnp.arange(key.shape[1])
    causal = start + jnp.arange(query.shape[1])[:, None] >= columns  # [s, S]
    allowed = causal & (segments != 0)[:, None, :]  # [B, s, S]
    if segments.dtype != bool:
        allowed &= query_segments[:, :, None] == segments[:, None, :]
    scores = einsum("bskrd,btkd->bkrst", query, key, config, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(jnp.where(allowed[:, None, None], scores, MASKED), axis=-1)
    return einsum("bkrst,btkd->bskrd", weights.astype(value.dtype), value, config)


def cached(query, key, value, prompt_mask, cache, layer, config: DecoderConfig):
    """Attention of S new tokens of each sample to the group's prompt and to the sample's own response.

    Args:
      query: [N, G, S, K, R, D].
      key, value: [N, G, S, K, D].
      prompt_mask: bool [N, P].
      cache: keys and values [N, P, K, D] of the layer's prompts, those [layers, N, G, T, K, D] of all layers' responses, and
        how many columns of these are filled, int32 [].
      layer: int32 [].
      config: of the model.

    Returns:
      [N, G, S, K, R, D], and the responses' keys and values with the new ones in.
    """
    prompt_key, prompt_value, response_key, response_value, start = cache
    index = (layer, 0, 0, start, 0, 0)
    response_key = jax.lax.dynamic_update_slice(response_key, key[None], index)
    response_value = jax.lax.dynamic_update_slice(response_value, value[None], index)
    keys = jax.lax.dynamic_index_in_dim(response_key, layer, keepdims=False)  # [N, G, T, K, D]
    values = jax.lax.dynamic_index_in_dim(response_value, layer, keepdims=False)
    f32 = {"preferred_element_type": jnp.float32}
    to_prompt = einsum("ngskrd,npkd->ngkrsp", query, prompt_key, config, **f32)
    to_response = einsum("ngskrd,ngtkd->ngkrst", query, keys, config, **f32)
    steps = start + jnp.arange(query.shape[2])
    filled = jnp.arange(keys.shape[2]) <= steps[:, None]  # [S, T]
    to_prompt = jnp.where(prompt_mask[:, None, None, None, None, :], to_prompt, MASKED)
    to_response = jnp.where(filled, to_response, MASKED)
    weights = jax.nn.softmax(jnp.concatenate([to_prompt, to_response], axis=-1), axis=-1).astype(value.dtype)
    split = prompt_key.shape[1]
    out = einsum("ngkrsp,npkd->ngskrd", weights[..., :split], prompt_value, config)
    out = out + einsum("ngkrst,ngtkd->ngskrd", weights[..., split:], values, config)
    return out, (response_key, response_value)
