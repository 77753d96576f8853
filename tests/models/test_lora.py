"""Adapters beside the decoder's matrices: what they add, their gradients, and the weights that they are merged into."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open

from r2vpo_jax import models
from r2vpo_jax.config import LoraConfig
from r2vpo_jax.config.lora import TARGET_MODULES
from r2vpo_jax.models import lora, peft
from tests.helpers.params import random_params, with_config
from tests.models.goldens import assert_identical

RANK, ALPHA = 3, 4.5
PLAIN = models.Decoder(
    models.DecoderConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        num_tokens=29,
    )
)
ADAPTED = with_config(PLAIN, lora=LoraConfig(rank=RANK, alpha=ALPHA))
TOKENS = np.random.default_rng(0).integers(0, 29, (2, 7))


@pytest.fixture(scope="module")
def params():
    """Both factors away from zero, so that each has a gradient."""
    return random_params(ADAPTED)


@pytest.fixture(scope="module")
def merged(params):
    """The same function as parameters of the plain decoder."""

    def whole(leaf):
        if not isinstance(leaf, lora.Adapted):
            return leaf
        return np.stack([lora.merged(*x, leaf.scale) for x in zip(leaf.kernel, leaf.a, leaf.b, strict=True)])

    return jax.tree.map(whole, lora.adapted(params, ADAPTED.config.lora.scale))


def logits(model, params):
    return np.asarray(model.apply({"params": params}, TOKENS))


def test_parts_are_joined_again(params):
    trained, frozen = lora.split(params)
    assert_identical(lora.join(frozen, trained), params)
    assert {path[-1].key for path, _ in jax.tree_util.tree_leaves_with_path(trained)} == set(lora.FACTORS)
    assert jax.tree.structure(frozen) == jax.tree.structure(models.abstract_params(PLAIN))
    assert_identical(lora.without_adapters(params), frozen)
    # Without adapters all is trained, whatever kind of tree it is.
    assert lora.split(frozen) == (frozen, {})
    assert lora.split([1, 2]) == ([1, 2], {})
    assert lora.join({}, [1, 2]) == [1, 2]
    assert with_config(PLAIN, lora=LoraConfig()).config == PLAIN.config, "rank 0"


def test_each_target_has_factors_of_its_own_shape():
    some = models.abstract_params(
        with_config(PLAIN, lora=LoraConfig(rank=RANK, target_modules=("down_proj", "q_proj")))
    )
    adapters, _ = lora.split(some)
    assert jax.tree.map(lambda x: x.shape, adapters)["layers"] == {
        "attention": {"q_proj": {"lora_a": (2, 16, 3), "lora_b": (2, 3, 4, 8)}},
        "mlp": {"down_proj": {"lora_a": (2, 24, 3), "lora_b": (2, 3, 16)}},
    }
    axes = lora.split(models.logical_axes(ADAPTED))[0]["layers"]
    assert axes["attention"]["o_proj"] == {
        "lora_a": (None, "heads", None, None),
        "lora_b": (None, None, "embed"),
    }
    o_proj = lora.split(models.abstract_params(ADAPTED))[0]["layers"]["attention"]["o_proj"]
    assert o_proj["lora_a"].shape == (2, 4, 8, 3)


def test_they_begin_as_nothing(params):
    frozen = lora.without_adapters(params)
    first, again, other = (lora.init(ADAPTED, seed) for seed in (0, 0, 1))
    assert_identical(first, again)
    expected = logits(PLAIN, frozen)
    np.testing.assert_array_equal(logits(ADAPTED, lora.join(frozen, first)), expected)
    np.testing.assert_array_equal(logits(ADAPTED, frozen), expected)  # off
    for name in ("q_proj", "o_proj"):
        a, b, elsewhere = (first["layers"]["attention"][name][factor] for factor in (*lora.FACTORS, "lora_a"))
        elsewhere = other["layers"]["attention"][name]["lora_a"]
        bound = np.prod(a.shape[1:-1]) ** -0.5
        assert not b.any()
        assert 0.9 * bound < np.abs(a).max() <= bound
        assert abs(a.mean()) < 0.2 * bound
        assert (a[0] != a[1]).all(), "layers differ"
        assert (a != elsewhere).all(), "seeds differ"


def test_merged_weights_are_the_same_function(params, merged):
    expected = logits(PLAIN, merged)
    np.testing.assert_allclose(logits(ADAPTED, params), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(logits(with_config(ADAPTED, scan_layers=True), params), expected, rtol=1e-5, atol=1e-5)
    assert np.abs(logits(PLAIN, lora.without_adapters(params)) - expected).max() > 1
    root = LoraConfig(rank=4, alpha=2.0, use_rslora=True)
    assert (root.scale, LoraConfig(rank=4, alpha=2.0).scale) == (1.0, 0.5)


def test_gradients_follow_those_of_the_weights(params, merged):
    """W = W0 + s A B, so dA = s dW B^T and dB = s A^T dW."""
    weight = np.random.default_rng(1).standard_normal((*TOKENS.shape, 29)).astype(np.float32)

    def slopes(model, trained, frozen):
        def loss(trained):
            out = model.apply({"params": lora.join(frozen, trained)}, TOKENS)
            return jnp.sum(weight * jax.nn.log_softmax(out)[..., :29])

        return jax.jit(jax.grad(loss))(trained)

    grads = slopes(ADAPTED, *lora.split(params))
    dense, scale = slopes(PLAIN, merged, {}), ALPHA / RANK
    for module, names in (("attention", TARGET_MODULES[:4]), ("mlp", TARGET_MODULES[4:])):
        for name in names:
            found = grads["layers"][module][name]
            a, b = (np.asarray(params["layers"][module][name][factor], np.float64) for factor in lora.FACTORS)
            slope = np.asarray(dense["layers"][module][name]["kernel"], np.float64)
            a, b = a.reshape(2, -1, RANK), b.reshape(2, RANK, -1)
            slope = slope.reshape(2, a.shape[1], b.shape[2])
            for factor, expected in (
                ("lora_a", scale * slope @ b.swapaxes(1, 2)),
                ("lora_b", scale * a.swapaxes(1, 2) @ slope),
            ):
                largest = np.abs(expected).max()
                assert largest > 0.1, name
                actual = np.asarray(found[factor]).reshape(expected.shape)
                np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5 * largest, err_msg=f"{name} {factor}")


def read(path):
    with safe_open(path, "np") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)


def test_both_exports_say_the_same(params, merged, tmp_path):
    """Merged: kernels of the plain decoder. Alone: PEFT's W0 + scale * lora_B @ lora_A is that kernel. From devices too."""
    frozen = lora.without_adapters(params)
    models.save_pretrained(tmp_path / "base", PLAIN, frozen)
    models.save_pretrained(tmp_path / "host", ADAPTED, params)
    models.save_pretrained(tmp_path / "device", ADAPTED, jax.device_put(params))
    model, host = models.from_pretrained(tmp_path / "host")
    assert model.config.lora is None
    assert_identical(host, merged)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), read(tmp_path / "device" / "model.safetensors"), read(tmp_path / "host" / "model.safetensors"))  # fmt: skip

    peft.save_adapters(tmp_path / "peft", ADAPTED, jax.device_put(params), base="here")
    before, after, factors = (
        read(tmp_path / name)
        for name in ("base/model.safetensors", "host/model.safetensors", "peft/adapter_model.safetensors")
    )
    assert len(factors) == 2 * 2 * len(TARGET_MODULES)
    for name in before:
        parts = [factors.pop(f"base_model.model.{name.removesuffix('.weight')}.lora_{x}.weight", None) for x in "AB"]
        expected = before[name]
        if name.split(".")[-2] in TARGET_MODULES and name.endswith(".weight"):
            assert parts[0].shape == (RANK, expected.shape[1])
            expected = expected + ALPHA / RANK * parts[1] @ parts[0]
        np.testing.assert_allclose(after[name], expected, rtol=1e-5, atol=1e-6, err_msg=name)
    assert not factors, "all have a place"
    settings = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"], settings["base_model_name_or_path"]) == (RANK, ALPHA, "here")

    bad = jax.tree.map(lambda x: np.full_like(x, np.nan), lora.split(params)[0])
    for write in (lambda p: peft.save_adapters(tmp_path / "bad", ADAPTED, p, base=""), lambda p: models.save_pretrained(tmp_path / "bad", ADAPTED, p)):  # fmt: skip
        with pytest.raises(ValueError, match="is not finite"):
            write(lora.join(frozen, bad))
    with pytest.raises(ValueError, match="there are no adapters to write"):
        peft.save_adapters(tmp_path / "bad", PLAIN, frozen, base="")
    assert not (tmp_path / "bad").exists()


def test_frozen_weights_have_the_dtype_that_products_round_them_to(params):
    """So that in bfloat16 nothing is lost by it: the same logits, bit for bit."""

    def cast(base_dtype):
        config = LoraConfig(rank=RANK, alpha=ALPHA, base_dtype=base_dtype)
        model = with_config(ADAPTED, compute_dtype="bfloat16", lora=config)
        held = jax.tree.map(lambda x, leaf: x.astype(leaf.dtype), params, models.abstract_params(model))
        return held, logits(model, held)

    (small, found), (large, expected) = cast("compute"), cast("float32")
    np.testing.assert_array_equal(found, expected)
    assert {x.dtype.name for x in jax.tree.leaves(lora.without_adapters(small))} == {"bfloat16"}
    assert {x.dtype.name for x in jax.tree.leaves((lora.split(small)[0], large))} == {"float32"}
