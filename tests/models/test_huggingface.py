"""Hugging Face directories: the logits are those of Transformers, and what is written reads back the same.

`golden/` holds small checkpoints and the logits that Transformers computes from them (scripts/make_golden.py).
The tests at the end compare with the installed Transformers directly and run where torch is installed.
"""

import dataclasses
import functools
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from r2vpo_jax import models

GOLDEN = pathlib.Path(__file__).parent / "golden"
CASES = sorted(path.name for path in GOLDEN.iterdir())
TOLERANCE = 2e-4  # times the largest logit
NORMS = (("layers", "input_norm"), ("layers", "post_attention_norm"), ("final_norm",))


# Each program runs a few times at most: it needs no optimized code.
@functools.partial(jax.jit, static_argnums=0, compiler_options={"xla_backend_optimization_level": 0})
def jitted_apply(model, params, tokens, mask):
    return model.apply({"params": params}, tokens, mask=mask)


def apply(model, params, tokens, mask):
    return np.asarray(jitted_apply(model, params, tokens, mask))


@functools.cache
def golden(case):
    """(model, params, tokens, mask, expected logits), everything in float32."""
    expected = np.load(GOLDEN / case / "expected.npz", allow_pickle=False)
    model, params = models.from_pretrained(GOLDEN / case, param_dtype=jnp.float32)
    return model, params, expected["tokens"], expected["mask"].astype(bool), expected["logits"]


def distance(logits, expected, mask):
    """Largest difference on valid positions, in units of the largest expected logit."""
    return np.max(np.abs(logits - expected)[mask]) / np.max(np.abs(expected[mask]))


def copy(case, destination, **changes):
    """A golden checkpoint with some fields of its config.json replaced; None removes a field."""
    shutil.copytree(GOLDEN / case, destination)
    raw = json.loads((destination / "config.json").read_text()) | changes
    raw = {key: value for key, value in raw.items() if value is not None}
    (destination / "config.json").write_text(json.dumps(raw))
    return destination


def replaced(params, path, value):
    """The tree with `value(leaf)` in place of one leaf."""
    if len(path) == 1:
        return params | {path[0]: value(params[path[0]])}
    return params | {path[0]: replaced(params[path[0]], path[1:], value)}


def assert_identical(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


# ---- parity with the recorded logits ----


def test_golden_covers_what_it_should():
    raw = [json.loads((GOLDEN / case / "config.json").read_text()) for case in CASES]
    assert {(r["num_key_value_heads"], r["tie_word_embeddings"]) for r in raw} == {
        (heads, tied) for heads in (1, 2, 4) for tied in (True, False)
    }
    assert {r["num_attention_heads"] for r in raw} == {4}
    assert {("rope_theta" in r, "rope_parameters" in r) for r in raw} == {(True, False), (False, True)}


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_transformers(case):
    model, params, tokens, mask, expected = golden(case)
    assert distance(apply(model, params, tokens, mask), expected, mask) <= TOLERANCE


@pytest.mark.parametrize("case", CASES)
def test_a_wrong_rope_theta_shows(case, tmp_path):
    _, params, tokens, mask, expected = golden(case)
    theta = models.read_config(GOLDEN / case).rope_theta
    wrong = {10_000.0: 1_000_000.0, 1_000_000.0: 10_000.0}[theta]
    path = copy(case, tmp_path / "wrong", rope_theta=wrong, rope_parameters=None)
    model, _ = models.from_pretrained(path, param_dtype=jnp.float32)
    assert model.config.rope_theta == wrong
    assert distance(apply(model, params, tokens, mask), expected, mask) > 100 * TOLERANCE


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("projection", ["q_proj", "k_proj", "v_proj"])
@pytest.mark.parametrize("case", CASES)
def test_a_dropped_bias_shows(case, projection, layer):
    model, params, tokens, mask, expected = golden(case)
    path = ("layers", "attention", projection, "bias")
    params = replaced(params, path, lambda bias: np.where(np.arange(len(bias))[:, None, None] == layer, 0, bias))
    assert distance(apply(model, params, tokens, mask), expected, mask) > 100 * TOLERANCE


@pytest.mark.parametrize("norm", NORMS, ids="/".join)
@pytest.mark.parametrize("case", CASES)
def test_a_missing_norm_weight_shows(case, norm):
    model, params, tokens, mask, expected = golden(case)
    for layer in range(1 if norm == ("final_norm",) else 2):

        def ones(scale, layer=layer):
            return np.ones_like(scale) if scale.ndim == 1 else np.where(np.arange(2)[:, None] == layer, 1, scale)

        changed = replaced(params, (*norm, "scale"), ones)
        assert distance(apply(model, changed, tokens, mask), expected, mask) > 100 * TOLERANCE, layer


# ---- config.json ----


@pytest.mark.parametrize("case", CASES)
def test_both_rope_fields_read_the_same(case, tmp_path):
    config = models.read_config(GOLDEN / case)
    old = copy(case, tmp_path / "old", rope_theta=config.rope_theta, rope_parameters=None)
    new_field = {"rope_type": "default", "rope_theta": config.rope_theta}
    new = copy(case, tmp_path / "new", rope_theta=None, rope_parameters=new_field)
    assert models.read_config(old) == models.read_config(new) == config


@pytest.mark.parametrize(
    ("fields", "theta"),
    [
        ({}, 10_000.0),  # the default of Transformers
        ({"rope_theta": 5e5, "rope_scaling": {"type": "default"}}, 5e5),
        ({"rope_parameters": {"rope_theta": 5e5}}, 5e5),
        ({"rope_parameters": {"rope_type": "default"}, "rope_theta": 5e5}, 5e5),
        ({"rope_parameters": {"rope_theta": 5e5}, "rope_theta": 1e6}, 5e5),
        ({"rope_scaling": {"rope_type": "default", "rope_theta": 5e5}, "rope_theta": 1e6}, 5e5),
    ],
)
def test_rope_theta_is_found_where_transformers_finds_it(fields, theta, tmp_path):
    path = copy("kv1_tied_rope_theta", tmp_path / "x", **({"rope_theta": None} | fields))
    assert models.read_config(path).rope_theta == theta


def test_config_defaults(tmp_path):
    absent = dict.fromkeys(["num_key_value_heads", "rms_norm_eps", "tie_word_embeddings", "max_position_embeddings"])
    config = models.read_config(copy("kv1_tied_rope_theta", tmp_path / "x", **absent))
    assert config.num_kv_heads == config.num_heads == 4
    assert config.head_dim == 6  # 24 / 4
    assert config.rms_norm_eps == 1e-6
    assert not config.tie_word_embeddings
    assert config.max_position_embeddings == 32_768


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "llama"}, "model_type 'llama' is not supported"),
        ({"model_type": None}, "model_type None is not supported"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rotary scaling 'linear'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rotary scaling 'yarn'"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4}}, "rotary scaling 'dynamic'"),
        ({"rope_parameters": {"type": "yarn", "rope_theta": 1e4}}, "rotary scaling 'yarn'"),
        ({"rope_parameters": {"rope_type": "default"}, "rope_scaling": {"type": "yarn"}}, "rotary scaling 'yarn'"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "differ between layers"),
        ({"use_sliding_window": True, "sliding_window": 4}, "sliding-window"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding-window"),
        ({"hidden_act": "gelu"}, "activation 'gelu'"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantized"),
        ({"num_hidden_layers": None}, "lacks the field 'num_hidden_layers'"),
        ({"num_key_value_heads": 3}, "not a multiple of num_kv_heads=3"),
    ],
)
def test_what_the_decoder_does_not_compute_is_refused(fields, message, tmp_path):
    path = copy("kv1_tied_rope_theta", tmp_path / "x", **fields)
    with pytest.raises(ValueError, match=message):
        models.from_pretrained(path)


@pytest.mark.parametrize("text", ["{", "[1]", b"\xff\xfe\x00"])
def test_a_broken_config_is_refused(text, tmp_path):
    (tmp_path / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match="JSON"):
        models.read_config(tmp_path)


@pytest.mark.parametrize("name", ["", "no_such_directory"])
def test_a_directory_without_config_is_refused(name, tmp_path):
    with pytest.raises(FileNotFoundError, match="no config.json"):
        models.from_pretrained(tmp_path / name)


# ---- weights ----


@pytest.fixture
def checkpoint(tmp_path):
    """(path, tensors, write): an untied checkpoint whose tensors a test may change."""
    path = copy("kv2_untied_rope_theta", tmp_path / "checkpoint")
    file = path / "model.safetensors"
    return path, load_file(file), functools.partial(save_file, filename=file)


@pytest.mark.parametrize("name", ["lm_head.weight", "model.norm.weight", "model.layers.1.self_attn.k_proj.bias"])
def test_a_missing_tensor_is_named(name, checkpoint):
    path, tensors, write = checkpoint
    del tensors[name]
    write(tensors)
    with pytest.raises(ValueError, match=f"lacks the tensor '{name}'"):
        models.from_pretrained(path)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("model.embed_tokens.weight", (48, 24)),
        ("model.layers.0.self_attn.k_proj.weight", (12, 24)),  # 2 heads of 6
        ("model.layers.1.mlp.down_proj.weight", (24, 32)),
        ("model.layers.0.input_layernorm.weight", (24,)),
    ],
)
def test_a_tensor_of_the_wrong_shape_is_named_with_both_shapes(name, shape, checkpoint):
    path, tensors, write = checkpoint
    assert tensors[name].shape == shape
    wrong = (shape[0] + 1, *shape[1:])
    tensors[name] = np.zeros(wrong, np.float32)
    write(tensors)
    with pytest.raises(ValueError, match=name) as error:
        models.from_pretrained(path)
    assert str(wrong) in str(error.value)
    assert str(shape) in str(error.value)


def test_a_transposed_kernel_is_refused(checkpoint):
    path, tensors, write = checkpoint
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = np.ascontiguousarray(tensors[name].T)
    write(tensors)
    with pytest.raises(ValueError, match=r"\(24, 32\).*\(32, 24\)"):
        models.from_pretrained(path)


def test_tensors_that_are_not_ours_are_ignored(tmp_path):
    """Old exports carry rotary buffers, and tied ones a copy of the embedding as lm_head."""
    path = copy("kv1_tied_rope_theta", tmp_path / "x")
    tensors = load_file(path / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(3, np.float32)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1
    save_file(tensors, path / "model.safetensors")
    assert_identical(models.from_pretrained(path)[1], golden("kv1_tied_rope_theta")[1])


def test_a_directory_without_weights_is_refused(tmp_path):
    path = copy("kv1_tied_rope_theta", tmp_path / "x")
    (path / "model.safetensors").rename(path / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match="model.safetensors"):
        models.from_pretrained(path)


def test_a_truncated_file_is_refused(checkpoint):
    path, _, _ = checkpoint
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match="not a safetensors file"):
        models.from_pretrained(path)


# ---- several weight files and their index ----


@pytest.fixture
def sharded(checkpoint):
    """(path, weight map): the same weights in two files and an index."""
    path, tensors, _ = checkpoint
    (path / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {"model-00001-of-00002.safetensors": names[:10], "model-00002-of-00002.safetensors": names[10:]}
    for file, keys in parts.items():
        save_file({key: tensors[key] for key in keys}, path / file)
    weight_map = {key: file for file, keys in parts.items() for key in keys}
    write_index(path, weight_map)
    return path, weight_map


def write_index(path, weight_map):
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


def test_two_files_and_an_index_read_the_same(sharded):
    model, params = models.from_pretrained(sharded[0])
    expected_model, expected = golden("kv2_untied_rope_theta")[:2]
    assert model.config == expected_model.config
    assert_identical(params, expected)


def test_the_index_says_which_file_holds_a_tensor(sharded):
    """A stray copy of a tensor in the other file is not read."""
    path, weight_map = sharded
    name = "model.norm.weight"
    other = next(file for file in set(weight_map.values()) if file != weight_map[name])
    save_file(load_file(path / other) | {name: np.zeros(24, np.float32)}, path / other)
    assert_identical(models.from_pretrained(path)[1], golden("kv2_untied_rope_theta")[1])


@pytest.mark.parametrize("outside", ["../other.safetensors", "/other.safetensors", "..", "sub/other.safetensors"])
def test_an_index_may_not_leave_its_directory(outside, sharded):
    path, weight_map = sharded
    write_index(path, weight_map | {"lm_head.weight": outside})
    with pytest.raises(ValueError, match="outside its directory"):
        models.from_pretrained(path)


def test_an_index_that_does_not_fit_its_files_is_refused(sharded):
    path, weight_map = sharded
    write_index(path, weight_map | {"lm_head.weight": "model-00003-of-00002.safetensors"})
    with pytest.raises(FileNotFoundError, match="model-00003-of-00002.safetensors"):
        models.from_pretrained(path)
    write_index(path, {name: file for name, file in weight_map.items() if name != "lm_head.weight"})
    with pytest.raises(ValueError, match="lacks the tensor 'lm_head.weight'"):
        models.from_pretrained(path)
    write_index(path, list(weight_map))
    with pytest.raises(ValueError, match="weight_map"):
        models.from_pretrained(path)


# ---- export ----


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("case", ["kv2_tied_rope_parameters", "kv2_untied_rope_theta"])
def test_export_and_import_change_no_bit(case, dtype, tmp_path):
    _, _, tokens, mask, _ = golden(case)
    model, params = models.from_pretrained(GOLDEN / case, param_dtype=dtype)
    models.save_pretrained(tmp_path / "new" / "directory", model, jax.device_put(params))
    again, params_again = models.from_pretrained(tmp_path / "new" / "directory")
    assert again.config == model.config
    assert_identical(params_again, params)
    np.testing.assert_array_equal(apply(again, params_again, tokens, mask), apply(model, params, tokens, mask))


def test_the_exported_tensors_are_those_that_were_read(tmp_path):
    """Names, axes, values: not only the way back, but each file on its own."""
    case = "kv4_untied_rope_parameters"
    models.save_pretrained(tmp_path, *models.from_pretrained(GOLDEN / case))
    theirs, ours = (safe_open(root / "model.safetensors", "np") for root in (GOLDEN / case, tmp_path))
    assert set(ours.keys()) == set(theirs.keys())
    for name in theirs.keys():  # noqa: SIM118 (not a dict)
        assert ours.get_tensor(name).dtype == jnp.bfloat16
        np.testing.assert_array_equal(ours.get_tensor(name), theirs.get_tensor(name), err_msg=name)


def test_dtypes_and_run_time_fields(tmp_path):
    path = GOLDEN / "kv4_tied_rope_theta"
    model, params = models.from_pretrained(
        path, compute_dtype=jnp.bfloat16, scan_layers=True, remat=True, num_tokens=40
    )
    assert model.config.param_dtype == jnp.bfloat16  # the checkpoint's
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(jnp.bfloat16)}
    assert model.config.compute_dtype == jnp.bfloat16
    assert (model.config.scan_layers, model.config.remat, model.config.num_tokens) == (True, True, 40)
    with pytest.raises(ValueError, match="the tokenizer knows 49 tokens"):
        models.from_pretrained(path, num_tokens=49)


def test_dtypes_may_be_given_by_name():
    """The name "float32" must not lose the full precision that float32 asks for."""
    path = GOLDEN / "kv4_tied_rope_theta"
    model, params = models.from_pretrained(path, param_dtype=jnp.float32, compute_dtype=jnp.float32)
    named, _ = models.from_pretrained(path, param_dtype="float32", compute_dtype="float32")
    assert named.config == model.config
    assert hash(named.config) == hash(model.config)  # or equal models would be compiled twice
    tokens = jnp.zeros((1, 2), jnp.int32)
    program = jax.make_jaxpr(lambda params: named.apply({"params": params}, tokens))(params)
    assert "Precision.HIGHEST" in str(program)
    assert str(program) == str(jax.make_jaxpr(lambda params: model.apply({"params": params}, tokens))(params))


def test_exporting_replaces_what_was_there(sharded):
    """An index left behind would lead readers to the old files."""
    path, _ = sharded
    model, params, tokens, mask, _ = golden("kv1_tied_rope_theta")
    models.save_pretrained(path, model, params)
    assert not (path / "model.safetensors.index.json").exists()
    again, params_again = models.from_pretrained(path)
    assert again.config == model.config
    assert_identical(params_again, params)


def test_a_single_file_wins_over_an_index(sharded):
    """As in Transformers."""
    path, _ = sharded
    tensors = load_file(GOLDEN / "kv2_untied_rope_theta" / "model.safetensors")
    save_file(tensors | {"model.norm.weight": np.full(24, 3, np.float32)}, path / "model.safetensors")
    _, params = models.from_pretrained(path)
    np.testing.assert_array_equal(params["final_norm"]["scale"], np.full(24, 3))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("path", [("embed",), ("layers", "mlp", "up_proj", "kernel")], ids="/".join)
def test_parameters_that_are_not_finite_are_refused(path, value, tmp_path):
    model, params = golden("kv1_tied_rope_theta")[:2]

    def spoil(leaf):
        leaf = leaf.copy()
        leaf.flat[-1] = value
        return leaf

    with pytest.raises(ValueError, match=f"parameter {'/'.join(path)} is not finite"):
        models.save_pretrained(tmp_path / "export", model, replaced(params, path, spoil))
    assert not (tmp_path / "export").exists()


def test_the_exported_files_have_the_same_permissions(tmp_path):
    models.save_pretrained(tmp_path, *golden("kv1_tied_rope_theta")[:2])
    assert len({file.stat().st_mode for file in tmp_path.iterdir()}) == 1


def test_the_tokenizer_is_exported_too(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    vocabulary = {"<pad>": 0, "<eos>": 1, "a": 2, "b": 3}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<pad>")),
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<pad>",  # or AutoTokenizer, which reads a Qwen2 directory as Qwen's own, adds <|endoftext|>
    )
    models.save_pretrained(tmp_path, *golden("kv1_tied_rope_theta")[:2], tokenizer=tokenizer)
    again = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert again.get_vocab() == vocabulary
    assert again.eos_token_id == 1
    generation = json.loads((tmp_path / "generation_config.json").read_text())
    assert generation == {"eos_token_id": 1, "pad_token_id": 0}


# ---- against Transformers itself, where torch is installed ----


@pytest.fixture(scope="module")
def make_golden():
    pytest.importorskip("torch", reason="compares with Transformers, which needs torch")
    from scripts import make_golden

    return make_golden


@pytest.mark.parametrize("rope_field", ["rope_theta", "rope_parameters"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_live_parity(kv_heads, tied, rope_field, make_golden, tmp_path):
    """Every combination, with weights that are not the golden ones; then the same of the export."""
    case = make_golden.Case(kv_heads=kv_heads, tied=tied, rope_field=rope_field, rope_theta=300_000.0)
    make_golden.write_checkpoint(tmp_path / "theirs", case, seed=100)
    tokens, mask = make_golden.prompts(seed=100)
    expected = make_golden.reference_logits(tmp_path / "theirs", tokens, mask)
    model, params = models.from_pretrained(tmp_path / "theirs")
    assert model.config.rope_theta == 300_000.0
    mask = mask.astype(bool)
    assert distance(apply(model, params, tokens, mask), expected, mask) <= TOLERANCE

    models.save_pretrained(tmp_path / "ours", model, params)
    exported = make_golden.reference_logits(tmp_path / "ours", tokens, mask.astype(np.int64))
    np.testing.assert_array_equal(exported[mask], expected[mask])


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
        for file in ("config.json", "model.safetensors"):
            assert (tmp_path / case / file).read_bytes() == (GOLDEN / case / file).read_bytes(), (case, file)
        ours, theirs = (np.load(root / case / "expected.npz", allow_pickle=False) for root in (GOLDEN, tmp_path))
        np.testing.assert_array_equal(ours["tokens"], theirs["tokens"])
        np.testing.assert_array_equal(ours["mask"], theirs["mask"])
        mask = ours["mask"].astype(bool)
        assert distance(ours["logits"], theirs["logits"], mask) <= 1e-5  # torch versions round differently
