"""In 16 bits: what is kept in float32 brings scores closer to what the sampler recorded."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r2vpo_jax import models, sampler, scoring, sharding
from r2vpo_jax.config.run import FLOAT32_SWITCHES
from r2vpo_jax.models import attention
from r2vpo_jax.models.products import product_in_parts
from r2vpo_jax.training import noise_floor
from tests.helpers.params import with_config

PROMPTS, GROUP, PROMPT, RESPONSE = 4, 4, 8, 24
MODEL = models.Decoder(
    models.DecoderConfig(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=64,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        compute_dtype="bfloat16",
    )
)


def floor_of(model):
    """E[(r-1)^2] of float32 masters that score what their rounded copy has sampled."""
    params = models.decoder.init_params(model, jax.random.key(0))
    params["final_norm"]["scale"] *= 2.0  # so that the distributions are not flat
    rounded = jax.tree.map(lambda x: x.astype(model.config.compute_dtype), params)
    rollout = sampler.generate(
        model,
        rounded,
        np.random.default_rng(0).integers(0, 320, (PROMPTS, PROMPT)).astype(np.int32),
        np.full(PROMPTS, PROMPT, np.int32),
        jax.random.key(1),
        sampler.Sampling(temperature=1.0, group_size=GROUP, max_response_length=RESPONSE, eos_ids=()),
        mesh=sharding.make_mesh((1, 1, 1), devices=jax.devices()[:1]),
        problem_ids=np.arange(PROMPTS),
    )
    score = jax.jit(functools.partial(scoring.score, model, prompt_size=PROMPT))
    fields = (rollout.tokens, rollout.prompt_length, rollout.response_length, rollout.temperature)
    return noise_floor.measure(np.asarray(score(params, *fields).logp), rollout)[0]


@pytest.mark.slow  # four samplers to compile
def test_each_step_of_the_switches_lowers_the_floor():
    rounded = floor_of(MODEL)
    scores = floor_of(with_config(MODEL, float32_scores=True, float32_residual=True))
    everything = floor_of(with_config(MODEL, **dict.fromkeys(FLOAT32_SWITCHES, True)))
    exact = floor_of(with_config(MODEL, compute_dtype="float32"))
    assert exact < 1e-9
    assert everything < rounded / 3, (everything, rounded)
    assert scores < rounded / 2, (scores, rounded)


def test_in_float32_they_change_nothing():
    exact = with_config(MODEL, compute_dtype="float32")
    assert with_config(exact, **dict.fromkeys(FLOAT32_SWITCHES, True)).config == exact.config


def test_logits_are_those_of_float32_hidden_states():
    """To 16 bits of mantissa, with the kernel rounded as the sampler has it; the slopes are those of rounded states."""
    generator = np.random.default_rng(0)
    hidden = jnp.asarray(generator.standard_normal((3, 5, 32)), jnp.float32)
    model = with_config(MODEL, float32_logits=True)
    params = models.decoder.init_params(model, jax.random.key(0))

    def unembed(model, params, hidden):
        return model.apply({"params": params}, hidden, method="unembed")

    kernel = params["embed"].astype(jnp.bfloat16).astype(jnp.float32).T
    expected = jnp.einsum("...e,ev->...v", hidden, kernel, precision="highest")
    size = float(jnp.abs(expected).max())
    np.testing.assert_allclose(jax.jit(unembed, static_argnums=0)(model, params, hidden), expected, atol=2e-5 * size)
    coarse = unembed(MODEL, params, hidden.astype(jnp.bfloat16))
    assert float(jnp.abs(coarse - expected).max()) > 1e-4 * size

    slopes = jax.grad(lambda p, h: unembed(model, p, h).sum(), argnums=(0, 1))(params, hidden)
    rounded = jax.grad(lambda p, h: unembed(MODEL, p, h.astype(jnp.bfloat16)).sum(), argnums=(0, 1))(params, hidden)
    jax.tree.map(np.testing.assert_array_equal, slopes, rounded)


def test_a_product_in_parts_is_not_simplified_away():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((4, 64)), jnp.float32)
    ones = jnp.eye(64, dtype=jnp.bfloat16)
    product = functools.partial(jnp.matmul, preferred_element_type=jnp.float32)
    out = jax.jit(lambda x: product_in_parts(lambda part: product(part, ones), x, ones.dtype))(x)
    np.testing.assert_allclose(out, x, rtol=2.0**-15)


@pytest.mark.parametrize("name", ["cudnn", "splash"])
def test_kernels_that_round_the_weights_are_refused(name):
    config = dataclasses.replace(MODEL.config, float32_scores=True, attention=name)
    with pytest.raises(ValueError, match=re.escape(f"model.attention={name!r}: it may round the weights of attention")):
        attention.check(config, jax.devices()[0])
