"""What is exported reads back the same, bit by bit, and nothing of an earlier export is left among it."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open

from r2vpo_jax import models
from r2vpo_jax.models.tokenizer import load_tokenizer
from tests.helpers.tokenizers import byte_tokenizer
from tests.models.goldens import CASES, GOLDEN, apply, assert_identical, copy, golden, replaced

INDEX = "model.safetensors.index.json"


def tensors(path):
    """name -> array of all files of weights in a directory."""
    files = [safe_open(file, "np") for file in path.glob("*.safetensors")]
    names = [(name, file) for file in files for name in file.keys()]  # noqa: SIM118 (not a dict)
    assert len(names) == len(dict(names)), "a tensor stands in two files"
    return {name: file.get_tensor(name) for name, file in names}


def weight_files(path):
    return sorted(file.name for file in path.iterdir() if "safetensors" in file.name)


@pytest.mark.parametrize("max_shard_bytes", [10**9, 12_000], ids=["one_file", "several"])
@pytest.mark.parametrize("case", CASES)
def test_export_and_import_change_no_bit(case, max_shard_bytes, tmp_path):
    """float32, bfloat16 and float16, tied and untied: names, axes and values, in each file and on the way back."""
    model, params = models.from_pretrained(GOLDEN / case)
    models.save_pretrained(tmp_path / "new" / "directory", model, params, max_shard_bytes=max_shard_bytes)
    path = tmp_path / "new" / "directory"
    theirs, ours = tensors(GOLDEN / case), tensors(path)
    assert_identical(ours, theirs)
    again, params_again = models.from_pretrained(path)
    assert {**vars(again.config), "family": None} == {**vars(model.config), "family": None}
    assert_identical(params_again, params)
    if max_shard_bytes == 10**9:
        assert weight_files(path) == ["model.safetensors"]
    else:
        n = len(weight_files(path)) - 1
        assert n >= 2
        names = [f"model-{i:05d}-of-{n:05d}.safetensors" for i in range(1, n + 1)]
        assert weight_files(path) == [*names, INDEX]
        assert all((path / name).stat().st_size < max_shard_bytes + 4000 for name in names)
        index = json.loads((path / INDEX).read_text())
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in theirs.values())
        assert set(index["weight_map"]) == set(theirs)


def test_from_devices_the_same_is_written(tmp_path):
    for case in ("qwen3_tied", "pangu_untied"):
        model, params = models.from_pretrained(GOLDEN / case)
        models.save_pretrained(tmp_path / case / "host", model, params)
        models.save_pretrained(tmp_path / case / "device", model, jax.device_put(params))
        for file in (tmp_path / case / "host").iterdir():
            assert file.read_bytes() == (tmp_path / case / "device" / file.name).read_bytes()


def test_a_tensor_larger_than_a_file_may_be_has_one_to_itself(tmp_path):
    model, params = models.from_pretrained(GOLDEN / "qwen3_tied")
    models.save_pretrained(tmp_path, model, params, max_shard_bytes=1)
    assert len(weight_files(tmp_path)) == len(tensors(GOLDEN / "qwen3_tied")) + 1
    assert_identical(models.from_pretrained(tmp_path)[1], params)


def test_the_exported_dtype_may_be_another(tmp_path):
    model, params = golden("kv1_tied_rope_theta")[:2]
    models.save_pretrained(tmp_path, model, params, dtype="bfloat16")
    again, params_again = models.from_pretrained(tmp_path)
    assert models.stored_dtype(tmp_path) == again.config.param_dtype == jnp.bfloat16
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    assert_identical(params_again, jax.tree.map(lambda x: x.astype(jnp.bfloat16), params))


def test_all_processes_fetch_and_one_writes(tmp_path, monkeypatch):
    model, params = golden("kv1_tied_rope_theta")[:2]
    fetched = []
    fetch = models.huggingface._Entry.fetch
    monkeypatch.setattr(models.huggingface._Entry, "fetch", lambda self: fetched.append(self.name) or fetch(self))
    models.save_pretrained(tmp_path / "none", model, params, write=False)
    assert not (tmp_path / "none").exists()
    others, fetched[:] = list(fetched), []
    models.save_pretrained(tmp_path / "one", model, params)
    assert fetched == others  # in the same order, or they would wait for each other


@pytest.fixture
def earlier(tmp_path):
    """A directory with an export in several files, and one that was cut short."""
    models.save_pretrained(tmp_path, *golden("kv2_untied_rope_theta")[:2], max_shard_bytes=20_000)
    (tmp_path / ".model.safetensors.partial").write_bytes(b"half")
    return tmp_path


@pytest.mark.parametrize("max_shard_bytes", [10**9, 30_000])
def test_exporting_replaces_what_was_there(max_shard_bytes, earlier):
    """An index left behind would lead readers to the old files, and a single file would hide the index."""
    model, params = golden("kv1_tied_rope_theta")[:2]
    for size in (max_shard_bytes, 20_000, max_shard_bytes):
        models.save_pretrained(earlier, model, params, max_shard_bytes=size)
        again, params_again = models.from_pretrained(earlier)
        assert again.config == model.config
        assert_identical(params_again, params)
        assert set(tensors(earlier)) == set(tensors(GOLDEN / "kv1_tied_rope_theta"))
        assert (earlier / INDEX).exists() == (size < 10**9)
        assert not list(earlier.glob(".*"))


def test_an_export_that_fails_leaves_what_was_there(earlier, monkeypatch):
    model, params = golden("kv1_tied_rope_theta")[:2]
    expected = golden("kv2_untied_rope_theta")[1]

    def full(*_):
        raise OSError("no space left")

    monkeypatch.setattr(models.tensor_files, "write_tensors", full)
    with pytest.raises(OSError, match="no space"):
        models.save_pretrained(earlier, model, params)
    assert_identical(models.from_pretrained(earlier)[1], expected)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("path", [("embed",), ("layers", "mlp", "up_proj", "kernel")], ids="/".join)
@pytest.mark.parametrize("put", [np.asarray, jnp.asarray], ids=["host", "device"])
def test_parameters_that_are_not_finite_are_refused(put, path, value, tmp_path):
    model, params = golden("kv1_tied_rope_theta")[:2]

    def spoil(leaf):
        leaf = leaf.copy()
        leaf.flat[-1] = value
        return put(leaf)

    with pytest.raises(ValueError, match=f"parameter {'/'.join(path)} is not finite"):
        models.save_pretrained(tmp_path / "export", model, replaced(params, path, spoil))
    assert not (tmp_path / "export").exists()


def test_what_the_exported_dtype_cannot_hold_is_refused(tmp_path):
    model, params = golden("kv1_tied_rope_theta")[:2]
    params = replaced(params, ("embed",), lambda x: x + 1e5)
    with pytest.raises(ValueError, match="parameter embed is not finite as float16"):
        models.save_pretrained(tmp_path / "export", model, params, dtype="float16")
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


@pytest.mark.parametrize(
    ("eos_ids", "written"), [((3,), 3), ((3, 1), [3, 1]), (np.array([2, 3, 2]), [2, 3]), ((), None), (None, None)]
)
def test_every_id_that_ends_a_text_is_exported(eos_ids, written, tmp_path):
    models.save_pretrained(tmp_path, *golden("kv1_tied_rope_theta")[:2], eos_ids=eos_ids)
    # Not left out: Llama and Mistral would take 2.
    assert json.loads((tmp_path / "config.json").read_text())["eos_token_id"] == written
    generation = tmp_path / "generation_config.json"
    assert generation.exists() == (eos_ids is not None)
    if generation.exists():
        assert json.loads(generation.read_text()) == {"eos_token_id": written}


@pytest.fixture
def base(tmp_path):
    """A base model with a tokenizer, settings of its own for sampling, and bfloat16 weights."""
    path = copy("kv4_tied_rope_theta", tmp_path / "base")
    byte_tokenizer().save_pretrained(path)
    (path / "generation_config.json").write_text(json.dumps(GENERATION))
    return path


GENERATION = {"bos_token_id": 1, "eos_token_id": [2, 0], "do_sample": True, "temperature": 0.6, "top_p": 0.95}


def test_how_the_model_wants_to_be_sampled_is_kept(base, tmp_path):
    """Servers take their defaults from there. The ids are those of the tokenizer, and the base's where it has none."""
    model, params = models.from_pretrained(base)
    models.save_pretrained(tmp_path / "out", model, params, byte_tokenizer(), base=base, eos_ids=(5, 257))
    written = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert written == GENERATION | {"eos_token_id": [5, 257], "pad_token_id": 257}
    raw = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (raw["bos_token_id"], raw["eos_token_id"], raw["pad_token_id"]) == (1, [5, 257], 257)
    models.save_pretrained(tmp_path / "out", model, params, base=base)
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == GENERATION
    models.save_pretrained(tmp_path / "out", model, params, load_tokenizer(base)[0], eos_ids=(5, 257))  # of this base
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == written


def test_settings_of_sampling_in_config_json_are_kept(base, tmp_path):
    """Where older models have them."""
    (base / "generation_config.json").unlink()
    raw = json.loads((base / "config.json").read_text()) | {"do_sample": True, "temperature": 0.7, "top_k": None}
    (base / "config.json").write_text(json.dumps(raw))
    model, params = models.from_pretrained(base)
    models.save_pretrained(tmp_path / "out", model, params, byte_tokenizer(), base=base)
    written = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert written == {"do_sample": True, "temperature": 0.7, "eos_token_id": 257, "pad_token_id": 257}


def test_the_share_of_weights_that_rounding_left_alone(base, tmp_path):
    model, params = models.from_pretrained(base, param_dtype="float32")
    assert models.save_pretrained(tmp_path / "none", model, params, dtype="bfloat16") is None
    assert models.save_pretrained(tmp_path / "other", model, params, base=base, write=False) is None

    def share(params, **settings):
        return models.save_pretrained(tmp_path / "out", model, params, base=base, **settings)

    assert share(params, dtype="bfloat16", max_shard_bytes=20_000) == share(params) == 1.0
    size, all_sizes = params["embed"].size, sum(leaf.size for leaf in jax.tree.leaves(params))
    half = replaced(params, ("embed",), lambda x: np.where(np.arange(x.shape[1]) % 2, x, x * 1.5))
    np.testing.assert_allclose(share(half, dtype="bfloat16"), 1 - size / 2 / all_sizes, atol=1e-3)
    tiny = jax.tree.map(lambda x: x * np.float32(1 + 1e-6), params)
    assert share(tiny, dtype="bfloat16") == 1.0
    assert share(tiny) < 0.01
    # Into the directory of the base itself: what is compared with is what was there.
    assert models.save_pretrained(base, model, params, base=base, dtype="bfloat16") == 1.0
    assert_identical(models.from_pretrained(base, param_dtype="float32")[1], params)


VIEWS = {
    "transposed": lambda x: np.ascontiguousarray(x.T).T,
    "in_fortran_order": np.asfortranarray,
    "every_other_row": lambda x: np.repeat(x, 2, axis=0)[::2],
    "last_columns": lambda x: np.concatenate([x, x], axis=-1)[..., x.shape[-1] :],
    "backwards": lambda x: np.ascontiguousarray(x[::-1])[::-1],
}


@pytest.mark.parametrize("view", VIEWS)
def test_arrays_that_are_views_are_written_as_they_read(view, tmp_path):
    """safetensors' own writer takes the buffer as it lies in memory."""
    model, params = golden("kv2_untied_rope_theta")[:2]
    models.save_pretrained(tmp_path, model, jax.tree.map(VIEWS[view], params))
    assert_identical(models.from_pretrained(tmp_path)[1], params)
    with open(tmp_path / "one.safetensors", "wb") as file:
        array = np.arange(24, dtype=np.float32).reshape(4, 6)
        models.tensor_files.write_tensors(file, [("x", array.dtype, array.shape)], iter([VIEWS[view](array)]))
    with safe_open(tmp_path / "one.safetensors", "np") as file:
        np.testing.assert_array_equal(file.get_tensor("x"), array)


def test_pangu_is_exported_as_llama(tmp_path):
    model, params, tokens, mask, _ = golden("pangu_untied")
    models.save_pretrained(tmp_path, model, params)
    raw = json.loads((tmp_path / "config.json").read_text())
    assert (raw["architectures"], raw["model_type"]) == (["LlamaForCausalLM"], "llama")
    assert (raw["attention_bias"], raw["mlp_bias"]) == (True, False)
    assert not {"auto_map", "bias"} & set(raw)
    again, params_again = models.from_pretrained(tmp_path)
    np.testing.assert_array_equal(apply(again, params_again, tokens, mask), apply(model, params, tokens, mask))
