"""The decoder: RMSNorm, rotary embedding, grouped-query attention, SwiGLU.

Biases, norms of queries and keys, and scaled rotary frequencies are fields of `DecoderConfig`; which family has
which is in families.py.

One parameter tree, stacked over layers, runs scanned or unrolled. Decoding attends to two caches: the
prompt's, shared by the G samples of that prompt, and each sample's own response.

Sizes in comments: N prompts, G samples a prompt, P prompt columns, T response columns, B rows,
S columns of the tokens at hand, K key-value heads, R query heads a key-value head, D head size, V vocabulary.
"""

import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from r2vpo_jax.models import attention
from r2vpo_jax.models.config import DecoderConfig
from r2vpo_jax.models.products import MASKED, einsum, product_in_parts, project
from r2vpo_jax.models.projection import Projection
from r2vpo_jax.sharding import constrain

_ONE_HOT_VOCAB = 256  # up to here a one-hot matmul beats gather and scatter-add (measured on CPU)


@struct.dataclass
class Cache:
    """Keys and values of what was read so far. `response_length` columns of the response part are filled.

    For a loop over tokens there is another form, of `split_cache`.
    """

    prompt_key: jax.Array  # [layers, N, K, P, D]
    prompt_value: jax.Array  # [layers, N, K, P, D]
    prompt_mask: jax.Array  # bool [N, P]
    response_key: jax.Array  # [layers, N, G, K, T, D]
    response_value: jax.Array  # [layers, N, G, K, T, D]
    response_length: jax.Array  # int32 []


def init_cache(config: DecoderConfig, num_prompts: int, prompt_size: int, group_size: int, response_size: int) -> Cache:
    """An empty cache for `num_prompts` prompts of `group_size` samples each."""
    prompt = (config.num_layers, num_prompts, config.num_kv_heads, prompt_size, config.head_dim)
    response = (
        config.num_layers,
        num_prompts,
        group_size,
        config.num_kv_heads,
        response_size,
        config.head_dim,
    )
    zeros = functools.partial(jnp.zeros, dtype=config.compute_dtype)
    return Cache(
        prompt_key=zeros(prompt),
        prompt_value=zeros(prompt),
        prompt_mask=jnp.zeros((num_prompts, prompt_size), bool),
        response_key=zeros(response),
        response_value=zeros(response),
        response_length=jnp.zeros((), jnp.int32),
    )


def split_cache(model: "Decoder", cache: Cache) -> Cache:
    """The form of `cache` for a loop over tokens, with parameters of `gather_layers`.

    Where the layers are scanned, it is the same. Elsewhere the arrays are tuples of one a layer: prompts' keys [N, K, D, P]
    and values [N, K, P, D], responses' keys [N * G, K, D, T] and values [N * G, K, T, D]. They are written in place and
    read without a copy, which CPUs would make of a part of an array, or of another order of axes, at every token.
    """
    if model.config.scan_layers:
        return cache

    def layers(x, transpose=False):
        x = jnp.swapaxes(x, -1, -2) if transpose else x
        return tuple(part.reshape(-1, *part.shape[-3:]) for part in x)

    return cache.replace(
        prompt_key=layers(cache.prompt_key, transpose=True),
        prompt_value=layers(cache.prompt_value),
        response_key=layers(cache.response_key, transpose=True),
        response_value=layers(cache.response_value),
    )


def join_cache(cache: Cache) -> Cache:
    """What `split_cache` was given, with what was written since."""
    if not isinstance(cache.prompt_key, tuple):
        return cache
    num_prompts = len(cache.prompt_mask)

    def responses(parts):
        x = jnp.stack(parts)
        return x.reshape(len(parts), num_prompts, -1, *x.shape[2:])

    return cache.replace(
        prompt_key=jnp.swapaxes(jnp.stack(cache.prompt_key), -1, -2),
        prompt_value=jnp.stack(cache.prompt_value),
        response_key=jnp.swapaxes(responses(cache.response_key), -1, -2),
        response_value=responses(cache.response_value),
    )


class RMSNorm(nn.Module):
    """Over the last axis (arXiv 1910.07467)."""

    config: DecoderConfig
    dtype: Any = None  # of the result; None: the compute dtype

    @nn.compact
    def __call__(self, x):
        scale = self.param(
            "scale",
            nn.with_logical_partitioning(nn.initializers.ones, (None,)),
            x.shape[-1:],
            self.config.weights_dtype,
        )
        x32 = x.astype(jnp.float32)
        x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.config.rms_norm_eps)
        return scale.astype(self.config.compute_dtype) * x32.astype(self.dtype or self.config.compute_dtype)


def rotary_frequencies(config: DecoderConfig):
    """Angle that each pair turns from one position to the next, f32 [D/2], after `RopeScaling`."""
    half = config.head_dim // 2
    frequency = config.rope_theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    scaling = config.rope_scaling
    if scaling is None:
        return frequency
    if scaling.rope_type == "linear":
        return frequency / scaling.factor
    turns = scaling.original_max_position_embeddings * frequency / (2 * math.pi)  # in the original context
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = jnp.clip((turns - low) / (high - low), 0.0, 1.0)
    return kept * frequency + (1.0 - kept) * frequency / scaling.factor


def rotary(x, positions, frequency):
    """Rotate pairs (i, i + D/2) of x [..., S, heads, D] by positions [..., S] (RoFormer, arXiv 2104.09864)."""
    angle = positions[..., None].astype(jnp.float32) * frequency  # [..., S, D/2]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    # Whole vectors at a time: of halves that are cut apart, XLA on CPUs makes a slow backward pass (four times as long).
    cos, sin = (jnp.concatenate(pair, axis=-1)[..., None, :] for pair in ((cos, cos), (-sin, sin)))
    wide = x.astype(jnp.float32)
    return (wide * cos + jnp.roll(wide, x.shape[-1] // 2, axis=-1) * sin).astype(x.dtype)


class Attention(nn.Module):
    config: DecoderConfig

    @nn.compact
    def __call__(self, x, positions, mask, cache, layer):
        """x [..., S, hidden] -> (out, new keys and values, response cache); see `Layer`."""
        c = self.config
        projection = functools.partial(Projection, c, num_inputs=1, use_bias=c.qkv_bias)
        query = projection(
            "...e,ehd->...hd",
            (c.hidden_size, c.num_heads, c.head_dim),
            ("embed", "heads", None),
            name="q_proj",
        )(x)
        kv_shape, kv_axes = (c.hidden_size, c.num_kv_heads, c.head_dim), ("embed", "kv_heads", None)
        key = projection("...e,ehd->...hd", kv_shape, kv_axes, name="k_proj")(x)
        value = projection("...e,ehd->...hd", kv_shape, kv_axes, name="v_proj")(x)
        if c.qk_norm:
            query, key = RMSNorm(c, name="q_norm")(query), RMSNorm(c, name="k_norm")(key)
        frequency = rotary_frequencies(c)
        query = rotary(query, positions, frequency) * (c.head_dim**-0.5)
        key = rotary(key, positions, frequency)
        query = query.reshape(*query.shape[:-2], c.num_kv_heads, c.num_heads // c.num_kv_heads, c.head_dim)

        if cache is None:
            out, response = attention.full(query, key, value, mask, c), None
        else:
            out, response = attention.cached(query, key, value, mask, cache, layer, c)
        out = out.reshape(*x.shape[:-1], c.num_heads, c.head_dim)
        out = Projection(
            c,
            "...hd,hde->...e",
            (c.num_heads, c.head_dim, c.hidden_size),
            ("heads", None, "embed"),
            num_inputs=2,
            use_bias=c.o_bias,
            dtype=c.residual_dtype,
            name="o_proj",
        )(out)
        return out, (key, value), response


class MLP(nn.Module):
    config: DecoderConfig

    @nn.compact
    def __call__(self, x):
        c = self.config
        up_shape, up_axes = (c.hidden_size, c.intermediate_size), ("embed", "mlp")
        gate = Projection(c, "...e,ef->...f", up_shape, up_axes, name="gate_proj")(x)
        up = Projection(c, "...e,ef->...f", up_shape, up_axes, name="up_proj")(x)
        down = Projection(c, "...f,fe->...e", up_shape[::-1], up_axes[::-1], dtype=c.residual_dtype, name="down_proj")
        return down(nn.silu(gate) * up)


class Layer(nn.Module):
    """One block; the carry of the scan over layers is (activations, response cache of all layers)."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, carry, layer, prompt_cache, positions, mask, response_length):
        x, response_cache = carry
        axes = ("batch",) + (None,) * (x.ndim - 1)
        x = constrain(x, *axes)
        cache = None if prompt_cache is None else (*prompt_cache, *response_cache, response_length)
        hidden = RMSNorm(self.config, name="input_norm")(x)
        out, keys_values, new_cache = Attention(self.config, name="attention")(hidden, positions, mask, cache, layer)
        x = x + out
        x = x + MLP(self.config, name="mlp")(RMSNorm(self.config, name="post_attention_norm")(x))
        if response_cache is None or prompt_cache is not None:
            return (constrain(x, *axes), new_cache or response_cache), None
        kept = tuple(jnp.swapaxes(x, 1, 2) for x in keys_values)  # of a prefill: [N, K, P, D]
        return (constrain(x, *axes), response_cache), kept


class Decoder(nn.Module):
    """`model.apply({"params": params}, tokens, positions=None, mask=None) -> logits`.

    With `cache=` the answer is `(logits, cache)`: tokens [N, P] fill the prompt part, tokens [N, G, S]
    append S tokens to each sample's response.
    """

    config: DecoderConfig

    def setup(self):
        c = self.config
        layer = nn.remat(Layer, prevent_cse=not c.scan_layers) if c.remat else Layer
        self.embed = self.param(
            "embed",
            nn.with_logical_partitioning(nn.initializers.normal(c.hidden_size**-0.5), ("vocab", "embed")),
            (c.vocab_size, c.hidden_size),
            c.weights_dtype,
        )
        self.layers = nn.scan(
            layer,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, 0, nn.broadcast, nn.broadcast, nn.broadcast),
            length=c.num_layers,
            unroll=1 if c.scan_layers else c.num_layers,
            metadata_params={nn.PARTITION_NAME: None},
        )(c)
        self.final_norm = RMSNorm(c, dtype=jnp.float32 if c.float32_logits else None)
        if not c.tie_word_embeddings:
            self.lm_head = self.param(
                "lm_head",
                nn.with_logical_partitioning(nn.initializers.lecun_normal(), ("embed", "logits")),
                (c.hidden_size, c.vocab_size),
                c.weights_dtype,
            )

    def __call__(self, tokens, positions=None, mask=None, cache: Cache | None = None):
        hidden = self.hidden_states(tokens, positions, mask, cache)
        if cache is None:
            return self.unembed(hidden)
        hidden, cache = hidden
        return self.unembed(hidden), cache

    def hidden_states(self, tokens, positions=None, mask=None, cache: Cache | None = None) -> Any:
        """Last hidden states, after the final norm.

        Args:
          tokens: int32 [B, S]; with a cache [N, P] (prefill) or [N, G, S] (decode).
          positions: int32, like tokens. Default: counted from each row's first valid token, in decode
            from the length of the row's prompt.
          mask: bool [B, S], False for padding (default: all valid); or int32 [B, S], the segment that a token belongs to,
            0 for padding: tokens attend within their segment only, and `positions` must be given. Decode takes the
            prompt's from the cache.
          cache: see `Cache`.

        Returns:
          [..., S, hidden], float32 with `float32_logits`; with a cache `(hidden, cache)`.
        """
        c = self.config
        decode = cache is not None and tokens.ndim == 3
        if decode:
            mask = cache.prompt_mask
            if positions is None:
                start = jnp.sum(mask, axis=-1)[:, None, None] + cache.response_length
                positions = start + jnp.arange(tokens.shape[-1])
        else:
            mask = jnp.ones(tokens.shape, bool) if mask is None else mask
            if positions is None:
                positions = jnp.maximum(jnp.cumsum(mask != 0, axis=-1) - 1, 0)
        positions = jnp.broadcast_to(positions, tokens.shape)

        embed = self.embed.astype(c.compute_dtype)
        if c.vocab_size <= _ONE_HOT_VOCAB:
            one_hot = jax.nn.one_hot(tokens, c.vocab_size, dtype=c.compute_dtype)
            x = einsum("...v,ve->...e", one_hot, embed, c)
        else:
            x = jnp.take(embed, tokens, axis=0)
        x = x.astype(c.residual_dtype)

        response_cache = None if cache is None else (cache.response_key, cache.response_value)
        prompt_cache = (cache.prompt_key, cache.prompt_value) if decode else None
        length = cache.response_length if decode else None
        apart = self.variables["params"]["layers"] if self.has_variable("params", "layers") else None
        if isinstance(apart, tuple):
            x, response_cache, keys_values = self._apart(
                apart, x, response_cache, prompt_cache, positions, mask, length
            )
        else:
            layers = jnp.arange(c.num_layers)
            carry = (x, response_cache)
            (x, response_cache), keys_values = self.layers(carry, layers, prompt_cache, positions, mask, length)
        x = self.final_norm(x)
        if cache is None:
            return x
        if decode:
            response_key, response_value = response_cache
            return x, cache.replace(
                response_key=response_key,
                response_value=response_value,
                response_length=cache.response_length + tokens.shape[-1],
            )
        prompt_key, prompt_value = keys_values
        return x, cache.replace(prompt_key=prompt_key, prompt_value=prompt_value, prompt_mask=mask.astype(bool))

    def _apart(self, params, x, response_cache, prompt_cache, positions, mask, length):
        """The layers with parameters of `gather_layers`, one tree a layer; and with a cache of either form."""
        split = response_cache is not None and isinstance(response_cache[0], tuple)
        caches, kept = [], []
        for number, of_layer in enumerate(params):
            prompt = prompt_cache and tuple(part[number] for part in prompt_cache)
            response = tuple(part[number] for part in response_cache) if split else response_cache
            run = Layer(self.config, parent=None)
            inputs = (None if split else number, prompt, positions, mask, length)
            (x, response), keys_values = run.apply({"params": of_layer}, (x, response), *inputs)
            caches.append(response)
            kept.append(keys_values)
            response_cache = response_cache if split else response
        if split:
            response_cache = tuple(zip(*caches, strict=True))
        return (
            x,
            response_cache,
            None if kept[0] is None else tuple(jnp.stack(parts) for parts in zip(*kept, strict=True)),
        )

    def unembedding(self):
        """The kernel [hidden, V] of `unembed`, in its layout: made once before a loop that unembeds."""
        return constrain(self.embed.T if self.config.tie_word_embeddings else self.lm_head, None, "logits")

    def unembed(self, hidden, kernel=None):
        """Hidden states [..., hidden] -> float32 logits [..., V]; padding rows of the vocabulary get -1e30."""
        kernel = (self.unembedding() if kernel is None else kernel).astype(self.config.compute_dtype)

        def product(x):
            return project("...e,ev->...v", x, kernel, 1, self.config, preferred_element_type=jnp.float32)

        in_parts = self.config.float32_logits
        logits = product_in_parts(product, hidden, kernel.dtype) if in_parts else product(hidden)
        if self.config.num_tokens is not None:
            logits = jnp.where(jnp.arange(logits.shape[-1]) < self.config.num_tokens, logits, MASKED)
        return constrain(logits, *(("batch",) + (None,) * (logits.ndim - 2) + ("logits",)))


def init_params(model: Decoder, key) -> dict:
    """Random parameters: a plain nested dict without an outer "params" and without Flax boxes."""
    return nn.unbox(model.init(key, jnp.zeros((1, 2), jnp.int32)))["params"]


def abstract_params(model: Decoder) -> dict:
    """Shapes and dtypes of the parameters; nothing is allocated."""
    return jax.eval_shape(functools.partial(init_params, model), jax.random.key(0))


def gather_layers(model: Decoder, params: dict) -> dict:
    """Parameters for a loop over tokens: what is gathered, or cut out, here is not gathered or copied at every token.

    The layers' "embed" axes are replicated. Where layers are not scanned, "layers" is a tuple of one tree a layer.
    """

    def gather(axes, x):
        return constrain(x, *(None if name == "embed" else name for name in axes))

    axes = logical_axes(model)["layers"]
    layers = jax.tree.map(gather, axes, params["layers"], is_leaf=lambda x: isinstance(x, tuple))
    if not model.config.scan_layers:
        layers = tuple(jax.tree.map(lambda x, n=n: x[n], layers) for n in range(model.config.num_layers))
    return params | {"layers": layers}


def logical_axes(model: Decoder) -> dict:
    """The parameters' logical axis names: the tree of `init_params` with tuples as leaves."""
    boxed = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]

    def names(leaf):
        return tuple(leaf.names) if isinstance(leaf, nn.LogicallyPartitioned) else (None,) * leaf.ndim

    return jax.tree.map(names, boxed, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned))
