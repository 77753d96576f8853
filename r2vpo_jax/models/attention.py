"""Attention over whole rows, and of a decode step over what is cached.

Sizes in comments: N prompts, G samples a prompt, P prompt columns, T response columns, B rows, S columns of the tokens at
hand, K key-value heads, R query heads a key-value head, D head size. Queries come divided by the square root of D.
"""

import functools

import jax
import jax.numpy as jnp

from r2vpo_jax import sharding
from r2vpo_jax.models import flash
from r2vpo_jax.models.config import DecoderConfig
from r2vpo_jax.models.products import MASKED, einsum, product_in_parts

KERNELS = ("cudnn", "splash")
_SHORTEST = {"cudnn": 0, "splash": 128}  # rows that a kernel is chosen for
_BLOCK = 512  # queries at a time where the configuration names no number
_LONG = 1024  # columns from which on blocks are used then
_PARTS = 4  # of a row, at most, that have a program each: of the keys, a block leaves out those of later parts


def way(config: DecoderConfig, size: int, device) -> str:
    """How `full` computes rows of `size` columns on `device`: "einsum", "blockwise", "splash" or "cudnn".

    Raises:
      ValueError: the configuration asks for a kernel that does not compute this model on this device.
    """
    if config.attention in KERNELS:
        reason = flash.unsuited(config.attention, config, device)
        if reason is not None:
            raise ValueError(f"model.attention={config.attention!r}: {reason}; use auto, einsum or blockwise")
        return config.attention
    if config.attention != "auto":
        return config.attention
    for name in KERNELS:
        if size >= _SHORTEST[name] and flash.unsuited(name, config, device) is None:
            return name
    return "blockwise" if size > (config.attention_block_size or _LONG) else "einsum"


def check(config: DecoderConfig, device) -> None:
    """Raises ValueError where the configuration asks for a kernel that does not compute this model on `device`."""
    way(config, 1, device)


def without_kernel(config: DecoderConfig, device) -> tuple[str, ...]:
    """What to tell a user whose device has a kernel that "auto" cannot choose for this model: a line, or none."""
    name = {"gpu": "cudnn", "tpu": "splash"}.get(device.platform)
    reason = name and config.attention == "auto" and flash.unsuited(name, config, device)
    return (f"attention is computed without {name}: {reason}",) if reason else ()


def full(query, key, value, segments, config: DecoderConfig):
    """Causal attention within the segments of each row, computed in one of several ways (`way`).

    Args:
      query: [B, S, K, R, D].
      key, value: [B, S, K, D].
      segments: int32 [B, S], 0 for padding; or bool, False for padding and one segment a row.
      config: of the model.

    Returns:
      [B, S, K, R, D]; what stands at padding is finite and has no meaning.

    Raises:
      ValueError: as `way`.
    """
    ways = {"einsum": _einsum, "blockwise": _blockwise, "splash": flash.splash, "cudnn": flash.cudnn}
    attend = ways[way(config, query.shape[1], sharding.device())]
    return attend(query, key, value, segments.astype(jnp.int32), config)


def _einsum(query, key, value, segments, config):
    return _attend(query, segments, 0, key=key, value=value, segments=segments, config=config)


def _attend(query, query_segments, start, *, key, value, segments, config):
    """The same for queries [B, s, K, R, D] that stand in columns `start` to `start + s` of the rows."""
    columns = jnp.arange(key.shape[1])
    causal = start + jnp.arange(query.shape[1])[:, None] >= columns  # [s, S]
    # Padding is a segment like any other: every token attends to itself at least.
    allowed = causal & (query_segments[:, :, None] == segments[:, None, :])  # [B, s, S]
    scores = einsum("bskrd,btkd->bkrst", query, key, config, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(jnp.where(allowed[:, None, None], scores, MASKED), axis=-1)
    return _average(
        lambda x, **kind: einsum("bkrst,btkd->bskrd", x, value, config, **kind), weights, value.dtype, config
    )


def _average(product, weights, dtype, config):
    """`product(weights)` with values in `dtype`, in that dtype; weights are float32."""
    if not config.float32_scores:
        return product(weights.astype(dtype))
    exact = functools.partial(product, preferred_element_type=jnp.float32)
    return product_in_parts(exact, weights, dtype).astype(dtype)


def _blockwise(query, key, value, segments, config):
    """A block of queries at a time: its scores live while it is computed, and are computed again in the backward pass."""
    size, block = query.shape[1], config.attention_block_size or _BLOCK
    num_blocks = -(-size // block)
    each = -(-num_blocks // _PARTS)  # blocks of a part

    def blocks(x):
        x = jnp.pad(x, [(0, 0), (0, num_blocks * block - size)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(x.shape[0], num_blocks, block, *x.shape[2:]), 1, 0)

    queries, query_segments, starts = blocks(query), blocks(segments), jnp.arange(num_blocks) * block
    parts = []
    for first in range(0, num_blocks, each):
        part, end = slice(first, first + each), (first + each) * block

        @functools.partial(jax.checkpoint, prevent_cse=False)
        def attend(query, query_segments, start, end=end):
            past = {"key": key[:, :end], "value": value[:, :end], "segments": segments[:, :end]}
            return _attend(query, query_segments, start, **past, config=config)

        parts.append(
            jax.lax.map(lambda x, attend=attend: attend(*x), (queries[part], query_segments[part], starts[part]))
        )
    out = jnp.moveaxis(jnp.concatenate(parts), 0, 1)
    return out.reshape(query.shape[0], -1, *query.shape[2:])[:, :size]


def cached(query, key, value, prompt_mask, cache, layer, config: DecoderConfig):
    """Attention of S new tokens of each sample to the group's prompt and to the sample's own response.

    Args:
      query: [N, G, S, K, R, D].
      key, value: [N, G, S, K, D].
      prompt_mask: bool [N, P].
      cache: keys and values of the layer's prompts; those of the responses; how many columns of these are filled, int32 [].
        As in a `decoder.Cache`: of the prompts a layer's, of the responses all layers'; or, split, all of one layer's.
      layer: int32 []; None: the cache is split.
      config: of the model.

    Returns:
      [N, G, S, K, R, D], and the responses' keys and values with the new ones in.
    """
    prompt_key, prompt_value, *responses, start = cache
    num_prompts, group, size, kv_heads = key.shape[:4]
    key, value = (jnp.moveaxis(x, 2, 3) for x in (key, value))  # [N, G, K, S, D]
    if layer is None:
        key, value = (x.reshape(-1, *x.shape[2:]) for x in (key, value))
        response_key = jax.lax.dynamic_update_slice(responses[0], jnp.swapaxes(key, 2, 3), (0, 0, 0, start))
        response_value = jax.lax.dynamic_update_slice(responses[1], value, (0, 0, start, 0))
        prompt_key, keys = jnp.swapaxes(prompt_key, 2, 3), jnp.swapaxes(response_key, 2, 3)
        values = response_value
    else:
        index = (layer, 0, 0, 0, start, 0)
        response_key = jax.lax.dynamic_update_slice(responses[0], key[None], index)
        response_value = jax.lax.dynamic_update_slice(responses[1], value[None], index)
        of_layer = (jax.lax.dynamic_index_in_dim(x, layer, keepdims=False) for x in (response_key, response_value))
        keys, values = (x.reshape(-1, *x.shape[2:]) for x in of_layer)  # [N * G, K, T, D]

    # Products whose leading axes are the batch's: of an array in another order, XLA would make a copy at every token.
    split, columns = prompt_key.shape[2], keys.shape[2]
    by_prompt = jnp.moveaxis(query, 3, 1).reshape(num_prompts, kv_heads, -1, query.shape[-1])  # [N, K, G * S * R, D]
    by_sample = jnp.moveaxis(query, 3, 2).reshape(
        num_prompts * group, kv_heads, -1, query.shape[-1]
    )  # [N * G, K, S * R, D]
    f32 = {"preferred_element_type": jnp.float32}
    to_prompt = einsum("nkqd,nkpd->nkqp", by_prompt, prompt_key, config, **f32)
    to_response = einsum("bkqd,bktd->bkqt", by_sample, keys, config, **f32)
    filled = jnp.arange(columns) <= (start + jnp.arange(size))[:, None]  # [S, T]
    to_prompt = jnp.where(prompt_mask[:, None, None], to_prompt, MASKED)
    to_prompt = jnp.moveaxis(to_prompt.reshape(num_prompts, kv_heads, group, size, -1, split), 1, 2)
    to_response = to_response.reshape(num_prompts, group, kv_heads, size, -1, columns)
    to_response = jnp.where(filled[:, None], to_response, MASKED)
    scores = jnp.concatenate([to_prompt, to_response], axis=-1)  # [N, G, K, S, R, P + T]

    def product(weights, **kind):
        by_prompt = jnp.moveaxis(weights[..., :split], 2, 1).reshape(num_prompts, kv_heads, -1, split)
        by_sample = weights[..., split:].reshape(num_prompts * group, kv_heads, -1, columns)
        prompt_out = einsum("nkqp,nkpd->nkqd", by_prompt, prompt_value, config, **kind)
        response_out = einsum("bkqt,bktd->bkqd", by_sample, values, config, **kind)
        prompt_out = prompt_out.reshape(num_prompts, kv_heads, *query.shape[1:3], *query.shape[4:])
        response_out = response_out.reshape(num_prompts, group, kv_heads, size, *query.shape[4:])
        return jnp.moveaxis(prompt_out, 1, 3) + jnp.moveaxis(response_out, 2, 3)

    out = _average(product, jax.nn.softmax(scores, axis=-1), value.dtype, config)
    return out, (response_key, response_value)
