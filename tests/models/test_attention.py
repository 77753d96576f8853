"""The ways to compute attention, held against the plain products; what chooses between them; what they cost in memory.

The kernels' numbers come from JAX's interpreter of TPU kernels, on the CPU. cuDNN's cannot be run without a GPU: what is
tested is when it is chosen, and that JAX accepts the call and makes cuDNN's of it.
"""

import dataclasses
import functools
import re
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r2vpo_jax import models
from r2vpo_jax.models import attention, flash
from tests.models.test_decoder import informative

KV_HEADS, HEAD_DIM, COLUMNS = 2, 64, 140
WAYS = {
    "blocks": (attention._blockwise, {"attention_block_size": 40}),  # that do not divide the row
    "a block a part": (attention._blockwise, {"attention_block_size": 35}),
    "splash": (functools.partial(flash.splash, interpret=True), {}),
}
FAMILIES = {
    "qwen2": {},
    "qwen3": {"qkv_bias": False, "qk_norm": True},
    "llama": {"qkv_bias": False, "rope_scaling": models.RopeScaling("linear", 2.0)},
    "mistral": {"qkv_bias": False},
    "pangu": {"o_bias": True},
}


def config_of(dtype="float32", group=2, head_dim=HEAD_DIM, **changes):
    sizes = {"vocab_size": 16, "hidden_size": 32, "intermediate_size": 16, "num_layers": 1}
    heads = {"num_heads": KV_HEADS * group, "num_kv_heads": KV_HEADS, "head_dim": head_dim}
    return models.DecoderConfig(**sizes, **heads, compute_dtype=dtype, **changes)


def packed():
    """Rows of segments: one that is padded on the left, one of three with padding behind, one of padding alone."""
    segments = np.zeros((3, COLUMNS), np.int32)
    segments[0, 30:] = 1
    segments[1, :50], segments[1, 50:70], segments[1, 70:-5] = 1, 2, 3
    return segments


def arrays(config, size=COLUMNS, rows=3, seed=0):
    rng, heads = np.random.default_rng(seed), config.num_kv_heads
    shapes = (heads, config.num_heads // heads, config.head_dim), (heads, config.head_dim), (heads, config.head_dim)
    q, k, v = (jnp.asarray(rng.standard_normal((rows, size, *shape)), config.compute_dtype) for shape in shapes)
    return (q * (3 * config.head_dim**-0.5)).astype(q.dtype), k, v


def outcome(attend, config, query, key, value, segments):
    """Outputs at tokens, and the gradients of a random sum of them, as float32."""
    valid = (np.asarray(segments) != 0)[:, :, None, None, None]
    weight = np.random.default_rng(9).standard_normal(query.shape)

    @jax.jit
    def run(query, key, value):
        def loss(*qkv):
            out = attend(*qkv, jnp.asarray(segments, jnp.int32), config)
            return jnp.sum(jnp.where(valid, out, 0).astype(jnp.float32) * weight), out

        gradients, out = jax.grad(loss, (0, 1, 2), has_aux=True)(query, key, value)
        return {"out": jnp.where(valid, out, 0), "finite": out} | dict(
            zip(("query", "key", "value"), gradients, strict=True)
        )

    return {name: np.asarray(x, np.float32) for name, x in run(query, key, value).items()}


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "group", "head_dim"), [("float32", 1, 128), ("float32", 3, 64), ("bfloat16", 2, 64)])
def test_every_way_gives_the_same_outputs_and_gradients(dtype, group, head_dim):
    config = config_of(dtype, group, head_dim)
    given, segments = arrays(config), packed()
    expected = outcome(attention._einsum, config, *given, segments)
    for name, (attend, changes) in WAYS.items():
        actual = outcome(attend, dataclasses.replace(config, **changes), *given, segments)
        assert np.all(np.isfinite(actual.pop("finite"))), name
        for what, x in actual.items():
            error = np.max(np.abs(x - expected[what])) / np.max(np.abs(expected[what]))
            assert error < {"float32": 1e-5, "bfloat16": 2e-2}[dtype], (name, what, error)


def test_segments_are_rows_of_their_own():
    """A packed row gives what its segments give each in a row, and a bool mask what one segment gives."""
    config = config_of()
    query, key, value = arrays(config)
    segments = packed()
    full = functools.partial(attention.full, config=config)
    together = full(query, key, value, jnp.asarray(segments))
    for number in (1, 2, 3):
        part = (slice(1, 2), np.flatnonzero(segments[1] == number))
        alone = full(query[part], key[part], value[part], jnp.ones((1, len(part[1])), bool))
        np.testing.assert_allclose(together[part], alone, atol=1e-5)
    masked = full(query, key, value, jnp.asarray(segments == 1))
    np.testing.assert_allclose(masked[0, 30:], together[0, 30:], atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_log_probabilities_and_gradients_of_every_family(family, monkeypatch):
    """Of the whole decoder, packed: as the plain products give them, in blocks and by the TPU's kernel."""
    config = config_of(family=family, **FAMILIES[family])
    params = informative(models.abstract_params(models.Decoder(config)))
    segments = packed()[:2]
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, segments.shape)
    positions = np.zeros_like(segments)
    for row, number in ((0, 1), (1, 1), (1, 2), (1, 3)):
        positions[row, segments[row] == number] = np.arange(np.sum(segments[row] == number))
    valid = (segments != 0)[..., None]

    def run(config):
        @jax.jit
        def value_and_grad(params):
            def loss(params):
                logits = models.Decoder(config).apply({"params": params}, tokens, positions, segments)
                logps = jnp.where(valid, jax.nn.log_softmax(logits), 0.0)
                return jnp.sum(logps**2), logps

            return jax.grad(loss, has_aux=True)(params)

        gradient, logps = value_and_grad(params)
        return [logps, *jax.tree.leaves(gradient)]

    expected = run(dataclasses.replace(config, attention="einsum"))
    blocks = run(dataclasses.replace(config, attention="blockwise", attention_block_size=48))
    monkeypatch.setattr(flash, "unsuited", lambda *_: None)
    monkeypatch.setattr(flash, "splash", functools.partial(flash.splash, interpret=True))
    splash = run(dataclasses.replace(config, attention="splash"))
    largest = max(np.max(np.abs(x)) for x in expected[1:])
    for name, actual in (("blockwise", blocks), ("splash", splash)):
        for number, (a, b) in enumerate(zip(actual, expected, strict=True)):
            scale = largest if number else np.max(np.abs(b))
            np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * scale, err_msg=f"{name}, {number}")


# ---- the choice ----


def device(platform, capability="9.0", version="PJRT C API\ncuda 12090"):
    client = types.SimpleNamespace(platform_version=version)
    return types.SimpleNamespace(platform=platform, compute_capability=capability, client=client)


GPU, TPU, CPU = device("gpu"), device("tpu"), device("cpu")


@pytest.mark.parametrize(
    ("where", "size", "changes", "expected"),
    [
        (CPU, 1024, {}, "einsum"),
        (CPU, 1025, {}, "blockwise"),
        (CPU, 1025, {"attention": "einsum"}, "einsum"),
        (CPU, 9, {"attention_block_size": 8}, "blockwise"),
        (CPU, 8, {"attention_block_size": 8}, "einsum"),
        (CPU, 8, {"attention": "blockwise"}, "blockwise"),
        (GPU, 8, {"dtype": "bfloat16"}, "cudnn"),
        (GPU, 8, {}, "einsum"),
        (GPU, 8, {"dtype": "bfloat16", "head_dim": 100}, "einsum"),
        (GPU, 8, {"dtype": "bfloat16", "head_dim": 256}, "cudnn"),
        (device("gpu", "8.0"), 8, {"dtype": "bfloat16", "head_dim": 256}, "einsum"),
        (device("gpu", "7.5"), 2000, {"dtype": "bfloat16"}, "blockwise"),
        (device("gpu", "gfx942", "rocm 60300"), 8, {"dtype": "bfloat16"}, "einsum"),
        (TPU, 128, {"dtype": "bfloat16"}, "splash"),
        (TPU, 5000, {"dtype": "bfloat16", "head_dim": 128}, "splash"),
        (TPU, 127, {"dtype": "bfloat16"}, "einsum"),
        (TPU, 5000, {}, "blockwise"),
        (TPU, 512, {"dtype": "bfloat16", "head_dim": 80}, "einsum"),
    ],
)
def test_the_way_follows_device_dtype_and_length(where, size, changes, expected):
    assert attention.way(config_of(**changes), size, where) == expected


@pytest.mark.parametrize(
    ("where", "changes", "message"),
    [
        (
            CPU,
            {"attention": "cudnn"},
            "model.attention='cudnn': it is a kernel for NVIDIA GPUs, and the device is 'cpu'",
        ),
        (GPU, {"attention": "cudnn"}, "it computes in 16 bits, and compute_dtype=float32"),
        (GPU, {"attention": "cudnn", "dtype": "bfloat16", "head_dim": 100}, "a multiple of 8, up to 256 channels"),
        (
            device("gpu", "7.5"),
            {"attention": "cudnn", "dtype": "bfloat16"},
            "compute capability 8.0, and the device has 7.5",
        ),
        (
            CPU,
            {"attention": "splash"},
            "it is a kernel for TPUs, and the device is 'cpu'; use auto, einsum or blockwise",
        ),
        (TPU, {"attention": "splash"}, "it computes in bfloat16, and compute_dtype=float32"),
        (
            TPU,
            {"attention": "splash", "dtype": "bfloat16", "head_dim": 80},
            "heads of 64 or 128 channels, and head_dim=80",
        ),
    ],
)
def test_a_kernel_that_cannot_be_is_refused_by_name_and_said_of_auto(where, changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        attention.check(config_of(**changes), where)
    auto = attention.without_kernel(config_of(**changes | {"attention": "auto"}), where)
    assert len(auto) == (where is not CPU)
    assert attention.without_kernel(config_of("bfloat16"), where) == () or where.compute_capability == "7.5"


def test_an_unknown_way_is_refused():
    with pytest.raises(ValueError, match="model.attention='flash'; one of auto, einsum, blockwise, cudnn, splash"):
        config_of(attention="flash")


# ---- programs ----


@pytest.mark.slow
def test_memory_of_blocks_is_linear_in_the_length():
    """Forward and backward, by what the compiler allocates: twice the length, twice the memory, where scores have four times."""

    def temporaries(attend, size, **changes):
        config = config_of(**changes)
        q, k, v = (jax.ShapeDtypeStruct((1, size, *x.shape[2:]), x.dtype) for x in arrays(config, 2))
        ones = jax.ShapeDtypeStruct((1, size), jnp.int32)

        def gradient(q, k, v, segments):
            return jax.grad(lambda *qkv: jnp.sum(attend(*qkv, segments, config) ** 2), (0, 1, 2))(q, k, v)

        return jax.jit(gradient).lower(q, k, v, ones).compile().memory_analysis().temp_size_in_bytes

    short, long = (temporaries(attention._blockwise, size, attention_block_size=64) for size in (1024, 2048))
    assert long < 2.2 * short
    short, long = (temporaries(attention._einsum, size) for size in (1024, 2048))
    assert long > 3.5 * short


@pytest.mark.parametrize("remat", [False, True])
def test_the_kernel_for_tpus_is_made_while_layers_are_scanned(remat):
    """Flax traces the body of a scan in a way of its own; the kernel's tables must come out as arrays all the same."""

    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            flash._splash_kernel(1, 128, 128, True)
            return x, None

    flash._splash_kernel.cache_clear()
    layers = nn.scan(nn.remat(Layer) if remat else Layer, variable_axes={"params": 0}, length=2)
    assert layers().apply({}, jnp.ones(()), None)[0] == 1


def test_cudnn_is_what_jax_makes_of_the_call(monkeypatch):
    """Lowered for CUDA, without a GPU; an odd length too. JAX asks the library for its version, which is not here."""
    library = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
    monkeypatch.setattr(library, "check_cudnn_version", lambda: 91002, raising=True)
    config = config_of("bfloat16")
    given = arrays(config, size=33)

    def gradient(*qkv):
        segments = jnp.asarray(packed()[:, :33])
        return jax.grad(lambda *x: jnp.sum(flash.cudnn(*x, segments, config).astype(jnp.float32)), (0, 1, 2))(*qkv)

    text = jax.jit(gradient).trace(*given).lower(lowering_platforms=("cuda",)).as_text()
    assert "__cudnn$fmhaScaleBiasSoftmax" in text
    assert "__cudnn$fmhaScaleBiasSoftmaxBackward" in text
