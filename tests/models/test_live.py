"""Against Transformers itself, where torch is installed: other weights than the golden ones, and our exports."""

import dataclasses
import json

import numpy as np
import pytest

from r2vpo_jax import models
from r2vpo_jax.models import families
from tests.models.goldens import CASES, GOLDEN, TOLERANCE, apply, distance, golden


@pytest.fixture(scope="module")
def make_golden():
    pytest.importorskip("torch", reason="compares with Transformers, which needs torch")
    from scripts import make_golden

    return make_golden


def check(case, make_golden, path):
    """Parity with weights that are not the golden ones; then the same of the export."""
    make_golden.write_checkpoint(path / "theirs", case, seed=100)
    tokens, mask = make_golden.prompts(seed=100)
    expected = make_golden.reference_logits(path / "theirs", tokens, mask)
    model, params = models.from_pretrained(path / "theirs")
    assert model.config.rope_theta == case.rope_theta
    mask = mask.astype(bool)
    if case.dtype == np.float32 or str(case.dtype) == "torch.float32":
        assert distance(apply(model, params, tokens, mask), expected, mask) <= TOLERANCE
    models.save_pretrained(path / "ours", model, params, max_shard_bytes=20_000)
    exported = make_golden.reference_logits(path / "ours", tokens, mask.astype(np.int64))
    np.testing.assert_array_equal(exported[mask], expected[mask])


@pytest.mark.parametrize("rope_field", ["rope_theta", "rope_parameters"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_live_parity(kv_heads, tied, rope_field, make_golden, tmp_path):
    case = make_golden.Case(kv_heads=kv_heads, tied=tied, rope_field=rope_field, rope_theta=300_000.0)
    check(case, make_golden, tmp_path)


@pytest.mark.parametrize("name", [case for case in CASES if not case.startswith("kv")])
def test_live_parity_of_every_family(name, make_golden, tmp_path):
    (case,) = (case for case in make_golden.CASES if case.name == name)
    check(dataclasses.replace(case, rope_theta=3 * case.rope_theta), make_golden, tmp_path)


@pytest.mark.parametrize("name", ["qwen3_tied", "llama_llama3_untied", "llama_linear", "mistral_untied", "pangu_tied"])
def test_greedy_generation_of_the_export(name, make_golden, tmp_path):
    """Through config.json, generation_config.json and several files of weights."""
    model, params, *_ = golden(name)
    models.save_pretrained(tmp_path, model, params, eos_ids=(1, 2), max_shard_bytes=20_000)
    tokens, lengths = make_golden.ragged_prompts(seed=7)
    expected, _ = make_golden.reference_generation(GOLDEN / name, tokens, lengths)
    actual, _ = make_golden.reference_generation(tmp_path, tokens, lengths)
    np.testing.assert_array_equal(actual, expected)
    assert make_golden.open_in_transformers(tmp_path).generation_config.eos_token_id == [1, 2]


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama", "mistral"])
def test_what_config_json_leaves_out_is_what_transformers_takes(family, make_golden, tmp_path):
    from transformers import AutoConfig

    raw = {"model_type": family, "vocab_size": 8, "hidden_size": 512, "intermediate_size": 8, "num_hidden_layers": 1}
    raw |= {"num_attention_heads": 64}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    theirs = AutoConfig.from_pretrained(tmp_path)
    ours = families.read_fields(raw | {"sliding_window": None})
    assert ours["num_kv_heads"] == theirs.num_key_value_heads
    assert ours["head_dim"] == (getattr(theirs, "head_dim", None) or 512 // 64)
    assert ours["rms_norm_eps"] == theirs.rms_norm_eps
    assert ours["rope_theta"] == theirs.rope_parameters["rope_theta"]
    assert ours["max_position_embeddings"] == theirs.max_position_embeddings
    assert ours["tie_word_embeddings"] == theirs.tie_word_embeddings
    assert ours["o_bias"] == getattr(theirs, "attention_bias", False)
    assert theirs.architectures is None or theirs.architectures == [families.FAMILIES[family].architecture]
    if family == "mistral":
        assert theirs.sliding_window == families.FAMILIES[family].defaults["sliding_window"]


def test_transformers_reads_every_field_of_our_config(make_golden, tmp_path):
    from transformers import AutoConfig

    case = make_golden.CASES[2]
    model, params = models.from_pretrained(GOLDEN / case.name)
    config = dataclasses.replace(model.config, rope_theta=5e5, max_position_embeddings=99, rms_norm_eps=3e-6)
    models.save_pretrained(tmp_path, models.Decoder(config), params)
    theirs = AutoConfig.from_pretrained(tmp_path)
    assert theirs.rope_parameters == {"rope_type": "default", "rope_theta": 5e5}
    assert (theirs.max_position_embeddings, theirs.rms_norm_eps, theirs.head_dim) == (99, 3e-6, 8)
    assert theirs.tie_word_embeddings
    assert models.read_config(tmp_path) == config


def test_the_golden_files_are_those_of_the_script(make_golden, tmp_path):
    make_golden.make(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == CASES
    for case in CASES:
        assert {file.name for file in (tmp_path / case).iterdir()} == {f.name for f in (GOLDEN / case).iterdir()}
        for file in ("config.json", "model.safetensors"):
            assert (tmp_path / case / file).read_bytes() == (GOLDEN / case / file).read_bytes(), (case, file)
        ours, theirs = (np.load(root / case / "expected.npz", allow_pickle=False) for root in (GOLDEN, tmp_path))
        np.testing.assert_array_equal(ours["tokens"], theirs["tokens"])
        np.testing.assert_array_equal(ours["mask"], theirs["mask"])
        mask = ours["mask"].astype(bool)
        assert distance(ours["logits"], theirs["logits"], mask) <= 1e-5  # torch versions round differently
        if (GOLDEN / case / "generated.npz").exists():
            ours, theirs = (np.load(root / case / "generated.npz", allow_pickle=False) for root in (GOLDEN, tmp_path))
            for name in ours:
                np.testing.assert_array_equal(ours[name], theirs[name])
