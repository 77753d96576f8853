"""The weights of Hugging Face directories: one file or several, every tensor named that does not fit."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from r2vpo_jax import models
from tests.models.goldens import GOLDEN, assert_identical, copy, golden, write_index


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
    """Old exports carry rotary buffers, tied ones a copy of the embedding as lm_head, PPO's the head of a critic."""
    path = copy("kv1_tied_rope_theta", tmp_path / "x")
    tensors = load_file(path / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(3, np.float32)
    tensors["model.rotary_emb.inv_freq"] = tensors["v_head.summary.bias"] = np.ones(3, np.float32)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    save_file(tensors, path / "model.safetensors")
    assert_identical(models.from_pretrained(path)[1], golden("kv1_tied_rope_theta")[1])


@pytest.mark.parametrize("case", ["kv1_tied_rope_theta", "qwen3_tied", "llama_llama3_tied_bias", "kv4_tied_rope_theta"])
def test_a_head_that_differs_from_the_embedding_it_is_tied_to_is_refused(case, tmp_path, monkeypatch):
    """Transformers 5 computes with the head, 4 with the embedding. Untied by hand, the file's head is used."""
    monkeypatch.setattr(models.huggingface, "_ROWS", 10)  # several pieces, the last one smaller
    path = copy(case, tmp_path / "x")
    tensors = load_file(path / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"]
    for same in (embedding, embedding.astype(np.float32)):
        save_file(tensors | {"lm_head.weight": same.copy()}, path / "model.safetensors")
        assert models.from_pretrained(path)[0].config.tie_word_embeddings
    head = embedding.copy()
    head[-1, -1] += 1
    for other in (head, head[:-1], np.concatenate([embedding, head])):
        save_file(tensors | {"lm_head.weight": other}, path / "model.safetensors")
        with pytest.raises(ValueError, match="tie_word_embeddings, but lm_head.weight differs"):
            models.from_pretrained(path)
    save_file(tensors | {"lm_head.weight": head}, path / "model.safetensors")
    raw = json.loads((path / "config.json").read_text()) | {"tie_word_embeddings": False}
    (path / "config.json").write_text(json.dumps(raw))
    np.testing.assert_array_equal(models.from_pretrained(path)[1]["lm_head"], head.T)


@pytest.mark.parametrize(
    "name",
    ["score.weight", "classifier.bias", "lm_head.bias", "model.norm.bias", "lm_head.weight_scale", "qa_outputs.weight"],
)
def test_a_weight_beside_the_layers_that_is_not_used_is_refused(name, checkpoint):
    """A classifier's head, a bias of the output, quantized weights: what is read would be another model."""
    path, tensors, write = checkpoint
    write(tensors | {name: np.ones(24, np.float32)})
    with pytest.raises(ValueError, match=f"does not use: .*{name}"):
        models.from_pretrained(path)


def test_a_weight_that_the_decoder_has_no_place_for_is_refused(tmp_path):
    """Dropped, it would be missing in the logits: here the biases of a Llama whose config.json denies them."""
    path = copy("llama_llama3_tied_bias", tmp_path / "x", attention_bias=False)
    with pytest.raises(ValueError, match="does not use: .*self_attn.k_proj.bias"):
        models.from_pretrained(path)
    tensors = load_file(path / "model.safetensors")
    del_biases = {name: tensor for name, tensor in tensors.items() if not name.endswith("_proj.bias")}
    norms = {f"model.layers.1.self_attn.{p}_norm.weight": np.ones(8, np.float32) for p in "qk"}
    save_file(del_biases | norms, path / "model.safetensors")
    with pytest.raises(ValueError, match="does not use: .*layers.1.self_attn.k_norm.weight"):
        models.from_pretrained(path)
    layers = {"model.layers.2.mlp.up_proj.weight": np.ones((2, 2), np.float32)}  # for another kind of prediction
    save_file(del_biases | layers, path / "model.safetensors")
    models.from_pretrained(path)


@pytest.mark.parametrize("dtype", [np.int8, np.float64])
@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.layers.1.mlp.gate_proj.weight"])
def test_weights_of_another_dtype_are_refused(name, dtype, checkpoint):
    path, tensors, write = checkpoint
    tensors[name] = np.ones(tensors[name].shape, dtype)
    write(tensors)
    with pytest.raises(ValueError, match=f"{name}' is stored as (I8|F64)"):
        models.from_pretrained(path, param_dtype="float32")


def test_all_tensors_are_looked_at_before_one_is_read(checkpoint, monkeypatch):
    path, tensors, write = checkpoint
    tensors["lm_head.weight"] = tensors["lm_head.weight"][1:]
    write(tensors)
    monkeypatch.setattr(models.huggingface.Tensors, "get", None)
    with pytest.raises(ValueError, match="lm_head.weight"):
        models.from_pretrained(path)


def test_a_directory_without_weights_is_refused(tmp_path):
    path = copy("kv1_tied_rope_theta", tmp_path / "x")
    (path / "model.safetensors").rename(path / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match="model.safetensors"):
        models.from_pretrained(path)


@pytest.mark.parametrize("size", [0, 4, 1000, 40_000, -1])
def test_a_truncated_file_is_refused(size, checkpoint):
    path, _, _ = checkpoint
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
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


def test_two_files_and_an_index_read_the_same(sharded):
    model, params = models.from_pretrained(sharded[0])
    expected_model, expected = golden("kv2_untied_rope_theta")[:2]
    assert model.config == expected_model.config
    assert_identical(params, expected)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (POINTER, "is a Git LFS pointer.*git lfs pull"),
        (b"<html>", "not a safetensors file"),
        (b"", "not a safetensors"),
    ],
    ids=["pointer", "page", "empty"],
)
def test_the_file_that_is_broken_is_named(content, said, sharded):
    path, weight_map = sharded
    broken, intact = "model-00002-of-00002.safetensors", "model-00001-of-00002.safetensors"
    (path / broken).write_bytes(content)
    with pytest.raises(ValueError, match=f"{broken} {said}" if content == POINTER else f"{broken} is {said}") as error:
        models.from_pretrained(path)
    assert intact not in str(error.value)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_a_pointer_in_place_of_json_is_named(name, sharded):
    (sharded[0] / name).write_bytes(POINTER)
    with pytest.raises(ValueError, match=f"{name} is a Git LFS pointer.*git lfs pull"):
        models.from_pretrained(sharded[0])


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


def test_a_single_file_wins_over_an_index(sharded):
    """As in Transformers."""
    path, _ = sharded
    tensors = load_file(GOLDEN / "kv2_untied_rope_theta" / "model.safetensors")
    save_file(tensors | {"model.norm.weight": np.full(24, 3, np.float32)}, path / "model.safetensors")
    _, params = models.from_pretrained(path)
    np.testing.assert_array_equal(params["final_norm"]["scale"], np.full(24, 3))


# ---- dtypes and run-time fields ----


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
