"""Every family computes what Transformers computes, and every way to compute something else shows.

`golden/` holds small checkpoints, the logits that Transformers computes from them and the tokens that it
generates greedily (scripts/make_golden.py).
"""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from r2vpo_jax import models, sampler
from r2vpo_jax.sampler import generation
from tests.models.goldens import CASES, GOLDEN, SHOWS, TOLERANCE, apply, copy, distance, golden, raw_config, replaced

BIASES = [
    (case, name)
    for case in CASES
    for name in ("qkvo" if golden(case)[0].config.o_bias else "qkv" * golden(case)[0].config.qkv_bias)
]
NORMS = [
    (case, norm)
    for case in CASES
    for norm in ("input_norm", "post_attention_norm", "final_norm", "q_norm", "k_norm")
    if norm[1] != "_" or golden(case)[0].config.qk_norm
]
GENERATED = [case for case in CASES if (GOLDEN / case / "generated.npz").is_file()]
SCALED = [case for case in CASES if golden(case)[0].config.rope_scaling]


def with_config(model, **changes):
    return models.Decoder(dataclasses.replace(model.config, **changes))


def test_golden_covers_what_it_should():
    raw = {case: raw_config(case) for case in CASES}
    qwen2 = [r for r in raw.values() if r["model_type"] == "qwen2"]
    assert {(r["num_key_value_heads"], r["tie_word_embeddings"]) for r in qwen2} == {
        (heads, tied) for heads in (1, 2, 4) for tied in (True, False)
    }
    for family in ("qwen2", "qwen3", "llama", "mistral", "PanguEmbedded"):
        of_family = [r for r in raw.values() if r["model_type"] == family]
        assert {r["tie_word_embeddings"] for r in of_family} == {True, False}, family
        assert family in {raw[case]["model_type"] for case in GENERATED}
    assert {r["num_attention_heads"] for r in raw.values()} == {4}
    assert {("rope_theta" in r, "rope_parameters" in r) for r in raw.values()} == {(True, False), (False, True)}
    assert {str(models.stored_dtype(GOLDEN / case)) for case in CASES} == {"float32", "float16", "bfloat16"}
    # Of the frequencies that 'llama3' scales, some stay, some are divided, some are in between.
    config = golden("llama_llama3_untied")[0].config
    scaled = models.decoder.rotary_frequencies(config)
    ratio = scaled / models.decoder.rotary_frequencies(dataclasses.replace(config, rope_scaling=None))
    assert set(np.round(np.asarray(ratio), 3)) > {1.0, 0.125}
    assert np.any((ratio > 0.13) & (ratio < 0.99))


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_transformers(case):
    model, params, tokens, mask, expected = golden(case)
    assert distance(apply(model, params, tokens, mask), expected, mask) <= TOLERANCE


@pytest.fixture
def unoptimized(monkeypatch):
    """Each of these programs runs once."""
    options = {"xla_backend_optimization_level": 0}
    quick = jax.jit(generation._sample.__wrapped__, static_argnames=("model", "mesh"), compiler_options=options)
    monkeypatch.setattr(generation, "_sample", quick)


@pytest.mark.usefixtures("unoptimized")
@pytest.mark.parametrize("case", GENERATED)
def test_greedy_generation_is_that_of_transformers(case, mesh):
    """64 tokens after prompts of 9, 5 and 1 tokens, padded on the left."""
    model, params, *_ = golden(case)
    expected = np.load(GOLDEN / case / "generated.npz", allow_pickle=False)
    assert expected["generated"].shape == (3, 64)
    rollout = sampler.generate(
        model,
        params,
        expected["tokens"],
        expected["lengths"],
        jax.random.key(0),
        sampler.Sampling(temperature=0.0, max_response_length=64),
        mesh=mesh,
        problem_ids=np.arange(3),
    )
    np.testing.assert_array_equal(rollout.response_tokens, expected["generated"])


@pytest.mark.parametrize("case", CASES)
def test_a_wrong_rope_theta_shows(case):
    model, params, tokens, mask, expected = golden(case)
    wrong = with_config(model, rope_theta=1e6 if model.config.rope_theta < 1e6 else 1e4)
    assert distance(apply(wrong, params, tokens, mask), expected, mask) > SHOWS


def rope_fields(case):
    """What there is to get wrong; a factor is all that linear scaling has."""
    linear = golden(case)[0].config.rope_scaling.rope_type == "linear"
    more = () if linear else ("low_freq_factor", "high_freq_factor", "original")
    return ("rope_type", "factor", *more)


@pytest.mark.parametrize(("case", "field"), [(case, field) for case in SCALED for field in rope_fields(case)])
def test_a_wrong_rope_scaling_shows(case, field, tmp_path):
    model, params, tokens, mask, expected = golden(case)
    scaling = model.config.rope_scaling
    if field == "rope_type":
        scaling = None
    elif field == "factor":
        scaling = dataclasses.replace(scaling, factor=scaling.factor / 2)
    else:
        wrong = {"low_freq_factor": 2.0, "high_freq_factor": 2.0, "original": 64}[field]
        scaling = dataclasses.replace(scaling, **{field.replace("original", "original_max_position_embeddings"): wrong})
    wrong = with_config(model, rope_scaling=scaling)
    assert distance(apply(wrong, params, tokens, mask), expected, mask) > SHOWS


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize(("case", "name"), BIASES)
def test_a_dropped_bias_shows(case, name, layer):
    model, params, tokens, mask, expected = golden(case)

    def drop(bias):
        bias = bias.copy()
        bias[layer] = 0
        return bias

    params = replaced(params, ("layers", "attention", f"{name}_proj", "bias"), drop)
    assert distance(apply(model, params, tokens, mask), expected, mask) > SHOWS


@pytest.mark.parametrize(("case", "norm"), NORMS)
def test_a_missing_norm_weight_shows(case, norm):
    model, params, tokens, mask, expected = golden(case)
    path = {"final_norm": (norm,), "q_norm": ("layers", "attention", norm), "k_norm": ("layers", "attention", norm)}
    for layer in range(1 if norm == "final_norm" else 2):

        def ones(scale, layer=layer):
            return np.ones_like(scale) if scale.ndim == 1 else np.where(np.arange(2)[:, None] == layer, 1, scale)

        changed = replaced(params, (*path.get(norm, ("layers", norm)), "scale"), ones)
        assert distance(apply(model, changed, tokens, mask), expected, mask) > SHOWS, layer


@pytest.mark.parametrize("norm", ["q_norm", "k_norm"])
@pytest.mark.parametrize("case", [case for case in CASES if golden(case)[0].config.qk_norm])
def test_a_norm_of_queries_or_keys_that_is_not_taken_shows(case, norm, monkeypatch):
    model, params, tokens, mask, expected = golden(case)
    taken = models.decoder.RMSNorm.__call__
    monkeypatch.setattr(models.decoder.RMSNorm, "__call__", lambda self, x: x if self.name == norm else taken(self, x))

    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    def forward(params):  # traced here and now, not taken from a cache
        return model.apply({"params": params}, tokens, mask=mask)

    assert distance(np.asarray(forward(params)), expected, mask) > SHOWS


def test_pangu_is_llama_with_biases(tmp_path):
    """Rewriting the config.json, as its users do, changes nothing."""
    case = "pangu_untied"
    _, expected, tokens, mask, logits = golden(case)
    path = copy(case, tmp_path / "x", model_type="llama", attention_bias=True, mlp_bias=False, bias=None)
    model, params = models.from_pretrained(path)
    assert model.config == dataclasses.replace(golden(case)[0].config, family="llama")
    jax.tree.map(np.testing.assert_array_equal, params, expected)
    assert distance(apply(model, params, tokens, mask), logits, mask) <= TOLERANCE
