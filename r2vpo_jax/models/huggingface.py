"""Hugging Face directories in and out: config.json and safetensors, nothing executed, nothing pickled.

Weights stream: reading places one stacked parameter on the mesh before it reads the next, writing fetches one
tensor of one layer at a time. Neither ever holds the model a second time.
"""

import dataclasses
import functools
import json
import math
import pathlib
import re
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from r2vpo_jax import sharding, waits
from r2vpo_jax.models import families, lora, tensor_files, tokenizer_files
from r2vpo_jax.models.config import DecoderConfig
from r2vpo_jax.models.decoder import Decoder, abstract_params, logical_axes
from r2vpo_jax.models.families import Weight
from r2vpo_jax.models.tensor_files import INDEX, SINGLE, Tensors

# A weight or a bias that this decoder has no place for would be dropped: the logits would be wrong. Not so those of
# layers and heads beside the model: for the prediction of several tokens, or for values.
_LAYER_WEIGHT = re.compile(r"model\.layers\.(\d+)\..*")
_HARMLESS = re.compile(r".*\.(rotary_emb\.inv_freq|masked_bias|attn\.bias)|(model\.)?mtp.*|(v_head|value_head)\..*")
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_ROWS = 4096  # of embedding and head, compared at a time

# Reading ------------------------------------------------------------------------------------------------


def read_config(path) -> DecoderConfig:
    """The architecture described by `path/config.json`.

    Raises:
      FileNotFoundError: no such directory or no config.json in it.
      ValueError: an architecture, or a feature of it, that this decoder does not compute.
    """
    path = pathlib.Path(path)
    file = path / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{path} is not a Hugging Face checkpoint directory: it has no config.json")
    raw = tensor_files.read_object(file)
    try:
        return DecoderConfig(**families.read_fields(raw))
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def stored_dtype(path) -> np.dtype:
    """The dtype that the checkpoint's weights have (its embedding; norms may have another).

    Raises:
      FileNotFoundError, ValueError: there are no weights, or none of a dtype that is read.
    """
    return Tensors(path).dtype(_EMBEDDING)


def read_model(path, *, param_dtype=None, compute_dtype=jnp.float32, **runtime) -> Decoder:
    """The decoder of a local Hugging Face directory, without its weights.

    Args:
      path: directory with config.json (and, with `param_dtype` None, the weights: their header is read).
      param_dtype: dtype of the parameters, or its name; None keeps the checkpoint's.
      compute_dtype: dtype of activations and matrix products, or its name.
      **runtime: other run-time fields of `DecoderConfig` (scan_layers, remat, num_tokens, attention_block_size,
        matmul_precision, lora).

    Raises:
      FileNotFoundError: the directory or one of its files is missing.
      ValueError: an architecture, or a feature of it, that this decoder does not compute (named).
    """
    config = read_config(path)
    if param_dtype is None:
        param_dtype = stored_dtype(path)
    # As dtypes, not names or scalar types: the decoder compares them, and equal configs are to hash the same.
    dtypes = {"param_dtype": jnp.dtype(param_dtype), "compute_dtype": jnp.dtype(compute_dtype)}
    return Decoder(dataclasses.replace(config, **dtypes, **runtime))


def load_params(path, model: Decoder, mesh: Mesh | None = None) -> dict:
    """The weights of `path` as parameters of `model`, in its dtype of weights; adapters are not among them.

    Args:
      path: the directory that `model` was read from.
      model: from `read_model`.
      mesh: where to place each parameter, by the rules of sharding.py, as soon as it is read. The largest go
        first, so that the host never holds more than one stacked parameter above the model. Every process of
        a pod reads the whole file and keeps what its own devices hold.

    Returns:
      A nested dict with layers stacked on axis 0: NumPy arrays, or with a mesh jax.Arrays.

    Raises:
      FileNotFoundError: a file of weights is missing.
      ValueError: a tensor is missing, has the wrong shape or dtype, or has no place in this decoder (named).
    """
    tensors = Tensors(path)
    config, abstract = model.config, lora.without_adapters(abstract_params(model))
    leaves = list(_leaves(config, abstract))
    expected = {}
    for names, leaf, weight in leaves:
        shape = weight.stored_shape(_layer_shape(names, leaf))
        expected |= {weight.name.format(layer=i): shape for i in range(_num_tensors(names, leaf))}
    for name, shape in expected.items():
        tensors.check(name, shape)
    unused = tensors.names() - set(expected)
    if config.tie_word_embeddings and _HEAD in unused:
        _check_tied(tensors, path)
        unused.remove(_HEAD)
    _refuse_unused(unused, config, path)

    def read(names, leaf, weight):
        shape = _layer_shape(names, leaf)
        if names[0] != "layers":
            array = weight.from_stored(tensors.get(weight.name), shape).astype(leaf.dtype, copy=False)
            wait.add(array.nbytes)
            return array
        stacked = np.empty(leaf.shape, leaf.dtype)
        for i in range(len(stacked)):
            stacked[i] = weight.from_stored(tensors.get(weight.name.format(layer=i)), shape)
            wait.add(stacked[i].nbytes)
        return stacked

    with waits.told("reading weights", sum(leaf.size * leaf.dtype.itemsize for _, leaf, _ in leaves), "B") as wait:
        if mesh is None:
            return jax.tree.unflatten(jax.tree.structure(abstract), [read(*entry) for entry in leaves])
        axes = lora.without_adapters(logical_axes(model))
        shardings = jax.tree.leaves(sharding.tree_shardings(axes, abstract, mesh))
        placed: list[Any] = [None] * len(leaves)
        for i in sorted(range(len(leaves)), key=lambda i: -leaves[i][1].size):
            placed[i] = _place(read(*leaves[i]), shardings[i])
        return jax.tree.unflatten(jax.tree.structure(abstract), placed)


def from_pretrained(
    path, *, param_dtype=None, compute_dtype=jnp.float32, mesh: Mesh | None = None, **runtime
) -> tuple[Decoder, dict]:
    """`read_model` and `load_params` in one: (model, params). Arguments and errors are theirs."""
    model = read_model(path, param_dtype=param_dtype, compute_dtype=compute_dtype, **runtime)
    return model, load_params(path, model, mesh)


def _leaves(config, params) -> Iterator[tuple[tuple[str, ...], Any, Weight]]:
    """(our path, array, how it is stored) of every parameter."""
    table = families.FAMILIES[config.family].tensors
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        names = tuple(k.key for k in path)
        yield names, leaf, table[names]


def _layer_shape(names, leaf):
    return leaf.shape[1:] if names[0] == "layers" else leaf.shape


def _num_tensors(names, leaf):
    return leaf.shape[0] if names[0] == "layers" else 1


def _refuse_unused(names, config, path):
    unused = [
        name
        for name in sorted(names)
        if not _HARMLESS.fullmatch(name)
        and not ((layer := _LAYER_WEIGHT.fullmatch(name)) and int(layer[1]) >= config.num_layers)
    ]
    if unused:
        raise ValueError(f"{path} holds weights that a {config.family!r} decoder does not use: {unused[:4]}")


def _check_tied(tensors, path):
    """Raise ValueError if config.json ties the output head to the embedding and the file holds another head.

    Transformers 5 would compute with the one in the file, Transformers 4 with the embedding.
    """
    same = tensors.shape(_HEAD) == tensors.shape(_EMBEDDING) and all(
        np.array_equal(head.astype(np.float32), embedding.astype(np.float32))
        for head, embedding in zip(tensors.rows(_HEAD, _ROWS), tensors.rows(_EMBEDDING, _ROWS), strict=True)
    )
    if not same:
        raise ValueError(
            f"{path}: config.json says tie_word_embeddings, but {_HEAD} differs from {_EMBEDDING}; if the head in the file "
            'is meant, write "tie_word_embeddings": false into config.json, else take it out of the file'
        )


def _place(array, where):
    placed = jax.make_array_from_callback(array.shape, where, lambda index: array[index])
    return jax.block_until_ready(placed)  # the buffer is not needed any more when the next one is filled


# Writing ------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Entry:
    """One tensor of the export."""

    name: str
    weight: Weight
    leaf: Any  # our parameter
    layer: int | None  # None: not stacked
    dtype: np.dtype

    @property
    def shape(self):
        return self.weight.stored_shape(self.leaf.shape if self.layer is None else self.leaf.shape[1:])

    @property
    def nbytes(self):
        return self.dtype.itemsize * math.prod(self.shape)

    def fetch(self) -> np.ndarray:
        """It, on the host: on a pod every process takes part."""
        array = _of_layer(self.leaf, self.layer)
        return self.weight.to_stored(_cast(np.asarray(sharding.to_host(array)), self.dtype))


def _cast(array, dtype):
    with np.errstate(over="ignore"):  # what became infinite is refused by name
        return array.astype(dtype, copy=False)


def _of_layer(leaf, layer):
    """One layer of a parameter (None: all of it), on devices if it is; an adapter is merged into it."""
    if isinstance(leaf, lora.Adapted):
        return lora.merged(*(_of_layer(x, layer) for x in (leaf.kernel, leaf.a, leaf.b)), leaf.scale)
    if isinstance(leaf, jax.Array):
        return _take(leaf, layer)
    return leaf if layer is None else leaf[layer]


def _take(leaf, layer):
    """One layer of a parameter (None: all of it) in an array of its own, its shards where they are.

    An array keeps the NumPy value that was once taken from it: the parameter must not.
    """
    where = leaf.sharding
    if isinstance(where, NamedSharding):
        where = where if layer is None else NamedSharding(where.mesh, PartitionSpec(*where.spec[1:]))
    else:
        where = None
    return _copy(where)(leaf) if layer is None else _index(where)(leaf, layer)


@functools.cache
def _copy(where):
    return jax.jit(jnp.copy, out_shardings=where)


@functools.cache
def _index(where):
    return jax.jit(lambda x, i: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), out_shardings=where)


@functools.partial(jax.jit, static_argnames="dtype")
def _finite_on_devices(leaf, dtype):
    return jnp.all(jnp.isfinite(leaf.astype(dtype)))


def _is_finite(leaf, dtype) -> bool:
    """On a pod every process takes part."""
    if isinstance(leaf, lora.Adapted):
        return all(_is_finite(_of_layer(leaf, layer), dtype) for layer in range(leaf.shape[0]))
    if isinstance(leaf, jax.Array):
        return bool(sharding.to_host(_finite_on_devices(leaf, dtype)))
    parts = np.array_split(leaf, min(len(leaf), 64))  # no second copy of a stacked parameter
    return all(np.all(np.isfinite(_cast(part, dtype).astype(np.float32))) for part in parts)


def save_pretrained(
    path,
    model: Decoder,
    params,
    tokenizer=None,
    *,
    base=None,
    dtype=None,
    eos_ids=None,
    max_shard_bytes: int = 5_000_000_000,
    write: bool = True,
    compare: bool = True,
) -> float | None:
    """Write a directory that Transformers 4 and 5 (and `from_pretrained` above) open.

    The tensors have the names of the model's own family. openPangu-Embedded, which Transformers does not know,
    is written as `LlamaForCausalLM` with attention_bias, the same function of the same weights.

    Args:
      path: directory, made if needed; the weights, config.json and tokenizer files in it are replaced.
      model: the decoder.
      params: its parameters: NumPy, or on devices; fetched a tensor of one layer at a time, adapters merged.
      tokenizer: a Transformers tokenizer; saved along unless there is a `base`.
      base: directory of the model that these weights have come from. Its tokenizer files are copied, and what its
        generation_config.json says of sampling is kept (without a base: that of the tokenizer's directory, if it has one).
      dtype: of the written weights, or its name; None keeps the parameters'.
      eos_ids: the ids that end a text, for generation_config.json; None: the tokenizer's.
      max_shard_bytes: weights beyond this go to several files with an index (at least one tensor a file).
      write: False on all processes of a pod but one: they only take part in fetching.
      compare: whether the weights are compared with those of `base`, which are read for that.

    Returns:
      The share of the written weights that are those of `base`, rounded to the same dtype, bit for bit: small updates
      are lost in rounding. None without a base, and where nothing is written or compared.

    Raises:
      ValueError: a parameter is not finite (in `dtype`): such weights are of no use to anybody. Or the family
        cannot express this decoder, or a file of `base` cannot be read. Nothing was written then.
      FileNotFoundError: a file of `base` is missing.
    """
    path = pathlib.Path(path)
    if model.config.lora is not None:
        params = lora.adapted(params, model.config.lora.scale)
    leaves = list(_leaves(model.config, params))
    dtypes = [np.dtype(leaf.dtype if dtype is None else jnp.dtype(dtype)) for _, leaf, _ in leaves]
    raw = families.hf_config(model.config, dtypes[[names for names, _, _ in leaves].index(("embed",))])
    for (names, leaf, _), kept in zip(leaves, dtypes, strict=True):
        if not _is_finite(leaf, kept):
            raise ValueError(f"parameter {'/'.join(names)} is not finite as {kept}; nothing was exported to {path}")
    entries = [
        _Entry(weight.name.format(layer=layer), weight, leaf, layer, kept)
        for (names, leaf, weight), kept in zip(leaves, dtypes, strict=True)
        for layer in (range(leaf.shape[0]) if names[0] == "layers" else (None,))
    ]
    shards = _split(entries, max_shard_bytes)
    source = _directory_of(tokenizer) if base is None else base
    settings = {} if source is None else tokenizer_files.generation_settings(source)
    generation = _generation_config(settings, tokenizer, eos_ids)
    if not write:
        for entry in entries:
            entry.fetch()
        return None
    counted = _Unchanged(Tensors(base)) if base is not None and compare else None

    path.mkdir(parents=True, exist_ok=True)
    for stale in path.glob(".model*.safetensors.partial"):
        stale.unlink()
    for name, shard in shards.items():
        with open(path / f".{name}.partial", "wb") as file:
            headers = [(e.name, e.dtype, e.shape) for e in shard]
            arrays = ((e.name, e.fetch()) for e in shard)
            tensor_files.write_tensors(
                file, headers, (array if counted is None else counted(name, array) for name, array in arrays)
            )
    for stale in (path / SINGLE, path / INDEX, *path.glob("model-*-of-*.safetensors")):
        stale.unlink(missing_ok=True)  # readers would find the weights that were here before
    for name in shards:
        (path / f".{name}.partial").rename(path / name)
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(e.nbytes for e in entries)},
            "weight_map": {e.name: name for name, shard in shards.items() for e in shard},
        }
        _write_object(path / INDEX, index)
    special = {key: generation.get(key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    _write_object(path / "config.json", raw | special)  # spelled out: families have defaults of their own
    if base is not None:
        tokenizer_files.copy_tokenizer(base, path)
    elif tokenizer is not None:
        tokenizer.save_pretrained(path)
        tokenizer_files.respell(path)
    if generation:
        _write_object(path / "generation_config.json", generation)
    return None if counted is None else counted.share


def _split(entries, max_bytes) -> dict[str, list[_Entry]]:
    """File name -> its tensors, in order."""
    shards, size = [[]], 0
    for entry in entries:
        if shards[-1] and size + entry.nbytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += entry.nbytes
    if len(shards) == 1:
        return {SINGLE: shards[0]}
    return {f"model-{i:05d}-of-{len(shards):05d}.safetensors": shard for i, shard in enumerate(shards, start=1)}


class _Unchanged:
    """Counts the weights that are the base model's, bit for bit, as they pass."""

    def __init__(self, base: Tensors):
        self._base, self._same, self._all = base, 0, 0

    def __call__(self, name: str, array: np.ndarray) -> np.ndarray:
        self._all += array.size
        if name in self._base.names() and self._base.shape(name) == array.shape:
            bits = f"u{array.itemsize}"
            before = _cast(self._base.get(name), array.dtype)
            self._same += int(np.sum(np.ascontiguousarray(array).view(bits) == before.view(bits)))
        return array

    @property
    def share(self) -> float:
        return self._same / self._all


def _directory_of(tokenizer) -> pathlib.Path | None:
    """The model's directory that a tokenizer was read from."""
    name = getattr(tokenizer, "name_or_path", None)
    return pathlib.Path(name) if name and (pathlib.Path(name) / "config.json").is_file() else None


def _generation_config(settings, tokenizer, eos_ids) -> dict[str, Any]:
    """generation_config.json: the base model's, its special tokens brought up to date; {} if nothing is known."""
    generation = dict(settings)
    if tokenizer is not None:
        generation["pad_token_id"] = (
            settings.get("pad_token_id") if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        )
    if getattr(tokenizer, "bos_token_id", None) is not None:
        generation["bos_token_id"] = tokenizer.bos_token_id
    if eos_ids is None and tokenizer is not None:
        generation["eos_token_id"] = tokenizer.eos_token_id
    elif eos_ids is not None:
        ids = list(dict.fromkeys(int(i) for i in eos_ids))
        generation["eos_token_id"] = ids[0] if len(ids) == 1 else ids or None
    return generation


def _write_object(file, value):
    file.write_text(json.dumps(value, indent=2) + "\n")
