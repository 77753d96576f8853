"""Attention by the kernels of a platform: splash attention on TPUs, cuDNN's flash attention on NVIDIA GPUs.

Both come with JAX, compute scores tile by tile, and leave out tiles that are wholly in the future. Padding is a segment
like any other, so that every token attends at least to itself and no row of scores is empty. Sizes in comments as in
attention.py. On a mesh each device computes the rows and heads that it holds: a kernel is opaque to the partitioner,
which would otherwise gather its arguments.
"""

import concurrent.futures
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel_lib
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as mask_lib

from r2vpo_jax import sharding
from r2vpo_jax.models.config import DecoderConfig

SPLASH_HEAD_SIZES = (64, 128)
_SPLASH_LANES, _SPLASH_BLOCK = 128, 512  # blocks are multiples of the first, of about the second


def unsuited(way: str, config: DecoderConfig, device) -> str | None:
    """Why "splash" or "cudnn" cannot compute this model's attention on `device`; None: it can."""
    if config.float32_scores:
        return "it may round the weights of attention, and float32_scores=True"
    if way == "splash":
        if device.platform != "tpu":
            return f"it is a kernel for TPUs, and the device is {device.platform!r}"
        if config.head_dim not in SPLASH_HEAD_SIZES:
            return f"it is for heads of {' or '.join(map(str, SPLASH_HEAD_SIZES))} channels, and head_dim={config.head_dim}"
        if config.compute_dtype != jnp.bfloat16:  # it leaves the precision of float32 products to the chip
            return f"it computes in bfloat16, and compute_dtype={config.compute_dtype}"
        return None
    if device.platform != "gpu" or "cuda" not in device.client.platform_version.lower():
        return f"it is a kernel for NVIDIA GPUs, and the device is {device.platform!r}"
    if config.compute_dtype not in (jnp.bfloat16, jnp.float16):
        return f"it computes in 16 bits, and compute_dtype={config.compute_dtype}"
    capability = tuple(int(part) for part in device.compute_capability.split("."))
    if capability < (8, 0):
        return f"it needs compute capability 8.0, and the device has {device.compute_capability}"
    largest = 256 if capability >= (9, 0) else 128
    if config.head_dim % 8 or config.head_dim > largest:
        return f"it is for heads of a multiple of 8, up to {largest} channels, and head_dim={config.head_dim}"
    return None


def splash(query, key, value, segments, config: DecoderConfig, *, interpret: bool = False):
    """`attention.full` by splash attention; `interpret` runs the kernel on any device, slowly."""
    size = query.shape[1]
    num_blocks = -(-size // _SPLASH_BLOCK)
    block = -(-size // (num_blocks * _SPLASH_LANES)) * _SPLASH_LANES
    padding = num_blocks * block - size
    query, key, value, segments = (_pad_columns(x, padding) for x in (query, key, value, segments))

    def attend(query, key, value, segments):
        rows, columns, kv_heads, group, _ = query.shape
        heads = query.reshape(rows, columns, kv_heads * group, -1)
        kernel = _splash_kernel(kv_heads * group, columns, block, interpret)
        ids = kernel_lib.SegmentIds(q=segments, kv=segments)
        out = jax.vmap(kernel)(*(jnp.swapaxes(x, 1, 2) for x in (heads, key, value)), ids)
        return jnp.swapaxes(out, 1, 2).reshape(query.shape)

    return _on_shards(attend, query, key, value, segments)[:, :size]


@functools.lru_cache(maxsize=16)
def _splash_kernel(num_heads: int, size: int, block: int, interpret: bool):
    """The causal kernel for rows of one length; what it knows of the mask is made once, on the host."""
    mask = mask_lib.MultiHeadMask([mask_lib.CausalMask((size, size))] * num_heads)
    sizes = kernel_lib.BlockSizes(
        block_q=block, block_kv=block, block_q_dkv=block, block_kv_dkv=block, block_q_dq=block, block_kv_dq=block
    )

    def make():
        kernel = kernel_lib.make_splash_mha(mask, block_sizes=sizes, head_shards=1, q_seq_shards=1, interpret=interpret)
        return jax.tree.map(np.asarray, kernel)

    # In a thread of its own, where nothing is being traced: `jax.ensure_compile_time_eval` gives tracers in a scan of Flax.
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        return pool.submit(make).result()


def cudnn(query, key, value, segments, config: DecoderConfig):
    """`attention.full` by cuDNN. Its mask, 16 bits for each two columns of a row, is quadratic in the length; scores are not."""
    size = query.shape[1]
    query, key, value, segments = (_pad_columns(x, size % 2) for x in (query, key, value, segments))  # its condition

    def attend(query, key, value, segments):
        rows, columns, kv_heads, group, _ = query.shape
        heads = query.reshape(rows, columns, kv_heads * group, -1)
        same = segments[:, None, :, None] == segments[:, None, None, :]
        out = jax.nn.dot_product_attention(
            heads, key, value, mask=same, scale=1.0, is_causal=True, implementation="cudnn"
        )
        return out.reshape(query.shape)

    return _on_shards(attend, query, key, value, segments)[:, :size]


def _pad_columns(x, padding: int):
    return jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2))


def _on_shards(attend, query, key, value, segments):
    """Key-value heads are split as the rules say; where there are too few, the query heads of each are."""
    kv, rest = ("batch", None, "kv_heads", None), ("batch", None)
    heads = (*kv[:3], None, None)
    if not sharding.is_split(heads, query.shape, axis=2):
        kv, heads = ("batch", None, None, None), ("batch", None, None, "heads", None)
    return sharding.on_shards(attend, (query, key, value, segments), (heads, kv, kv, rest))
