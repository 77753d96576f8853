"""Hugging Face directories in and out: config.json and safetensors, nothing executed, nothing pickled."""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from r2vpo_jax.models.config import DecoderConfig
from r2vpo_jax.models.decoder import Decoder, abstract_params

_INDEX = "model.safetensors.index.json"


@dataclasses.dataclass(frozen=True)
class _Weight:
    """How one parameter of ours is stored there: name (with {layer}), and axes of the torch matrix."""

    name: str
    transpose: bool = False  # torch Linear keeps [out, in]


# Our path -> theirs. Kernels [in..., out...] are flattened to two axes and transposed.
_QWEN2 = {
    ("embed",): _Weight("model.embed_tokens.weight"),
    ("final_norm", "scale"): _Weight("model.norm.weight"),
    ("lm_head",): _Weight("lm_head.weight", transpose=True),
    ("layers", "input_norm", "scale"): _Weight("model.layers.{layer}.input_layernorm.weight"),
    ("layers", "post_attention_norm", "scale"): _Weight("model.layers.{layer}.post_attention_layernorm.weight"),
    **{
        ("layers", "attention", f"{p}_proj", "kernel"): _Weight(
            f"model.layers.{{layer}}.self_attn.{p}_proj.weight", True
        )
        for p in "qkvo"
    },
    **{
        ("layers", "attention", f"{p}_proj", "bias"): _Weight(f"model.layers.{{layer}}.self_attn.{p}_proj.bias")
        for p in "qkv"
    },
    **{
        ("layers", "mlp", f"{p}_proj", "kernel"): _Weight(f"model.layers.{{layer}}.mlp.{p}_proj.weight", True)
        for p in ("gate", "up", "down")
    },
}


def _read_object(file: pathlib.Path) -> dict:
    try:
        value = json.loads(file.read_text())
    except ValueError as error:  # not JSON, or not even text
        raise ValueError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{file} does not hold a JSON object")
    return value


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
    raw = _read_object(file)
    if raw.get("model_type") != "qwen2":
        raise ValueError(f"{file}: model_type {raw.get('model_type')!r} is not supported; supported: 'qwen2'")
    for rope in (raw.get("rope_scaling") or {}, raw.get("rope_parameters") or {}):
        if any(isinstance(value, dict) for value in rope.values()):
            raise ValueError(f"{file}: rotary parameters that differ between layers are not implemented")
        rope_type = rope.get("rope_type") or rope.get("type") or "default"
        if rope_type != "default":
            raise ValueError(f"{file}: rotary scaling {rope_type!r} is not implemented; only 'default' is")
    # Where both are given, Transformers takes rope_scaling.
    rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    if raw.get("use_sliding_window") or set(raw.get("layer_types") or ()) - {"full_attention"}:
        raise ValueError(f"{file}: sliding-window attention is not implemented")
    if raw.get("quantization_config"):
        raise ValueError(f"{file}: quantized weights are not implemented")
    if raw.get("hidden_act", "silu") != "silu":
        raise ValueError(f"{file}: activation {raw['hidden_act']!r} is not implemented; only 'silu' is")
    try:
        return DecoderConfig(
            vocab_size=raw["vocab_size"],
            hidden_size=raw["hidden_size"],
            intermediate_size=raw["intermediate_size"],
            num_layers=raw["num_hidden_layers"],
            num_heads=raw["num_attention_heads"],
            num_kv_heads=raw.get("num_key_value_heads") or raw["num_attention_heads"],
            head_dim=raw.get("head_dim") or raw["hidden_size"] // raw["num_attention_heads"],
            rope_theta=float(rope.get("rope_theta") or raw.get("rope_theta") or 10_000.0),
            rms_norm_eps=raw.get("rms_norm_eps", 1e-6),
            tie_word_embeddings=raw.get("tie_word_embeddings", False),
            max_position_embeddings=raw.get("max_position_embeddings", 32_768),
        )
    except KeyError as error:
        raise ValueError(f"{file} lacks the field {error.args[0]!r}") from error


class _Tensors:
    """Tensors of one directory by name, from one safetensors file or several with an index."""

    def __init__(self, path: pathlib.Path):
        from safetensors import SafetensorError, safe_open

        self._path = path
        single, index = path / "model.safetensors", path / _INDEX
        weight_map = None
        if index.is_file() and not single.is_file():  # with both present, Transformers too reads the single file
            weight_map = _read_object(index).get("weight_map")
            if not isinstance(weight_map, dict) or not all(isinstance(n, str) for n in weight_map.values()):
                raise ValueError(f"{index} lacks a weight_map from tensor names to file names")
            outside = sorted(n for n in set(weight_map.values()) if n == ".." or pathlib.PurePath(n).name != n)
            if outside:
                raise ValueError(f"{index} names files outside its directory: {outside}")
        names = [single.name] if weight_map is None else sorted(set(weight_map.values()))
        missing = [n for n in names if not (path / n).is_file()]
        if missing:
            raise FileNotFoundError(f"{path} lacks the weight files {missing} (only safetensors are read)")
        try:
            files = {n: safe_open(path / n, framework="np") for n in names}
        except SafetensorError as error:
            raise ValueError(f"{path}: one of {names} is not a safetensors file: {error}") from error
        held = [(key, n) for n, file in files.items() for key in file.keys()]  # noqa: SIM118 (not a dict)
        self._owner = {key: files[n] for key, n in held if weight_map is None or weight_map.get(key) == n}

    def get(self, name, shape) -> np.ndarray:
        if name not in self._owner:
            raise ValueError(f"{self._path} lacks the tensor {name!r} of shape {tuple(shape)}")
        tensor = self._owner[name].get_tensor(name)
        if tensor.shape != tuple(shape):
            raise ValueError(
                f"{self._path}: tensor {name!r} has shape {tensor.shape}, but config.json implies {tuple(shape)}"
            )
        return tensor


def _matrix_shape(path, weight, shape):
    """Shape of one layer's tensor as stored there."""
    if not weight.transpose:
        return (shape[0], shape[1]) if path == ("embed",) else (int(np.prod(shape)),)
    num_inputs = 2 if path[-2:] == ("o_proj", "kernel") else 1
    return int(np.prod(shape[num_inputs:])), int(np.prod(shape[:num_inputs]))


def _leaves(params):
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        path = tuple(k.key for k in path)
        yield path, leaf, _QWEN2[path]


def from_pretrained(path, *, param_dtype=None, compute_dtype=jnp.float32, **runtime) -> tuple[Decoder, dict]:
    """Read a local Hugging Face directory.

    Args:
      path: directory with config.json and model.safetensors (or several files and their index).
      param_dtype: dtype of the parameters, or its name; None keeps the checkpoint's.
      compute_dtype: dtype of activations and matrix products, or its name.
      **runtime: other run-time fields of `DecoderConfig` (scan_layers, remat, num_tokens).

    Returns:
      (model, params): params is a nested dict of NumPy arrays, layers stacked on axis 0.

    Raises:
      FileNotFoundError: the directory or one of its files is missing.
      ValueError: unsupported architecture, missing tensor, or a tensor of the wrong shape (named).
    """
    path = pathlib.Path(path)
    config = read_config(path)
    tensors = _Tensors(path)
    if param_dtype is None:
        param_dtype = tensors.get("model.norm.weight", (config.hidden_size,)).dtype
    # As dtypes, not names or scalar types: the decoder compares them, and equal configs are to hash the same.
    dtypes = {"param_dtype": jnp.dtype(param_dtype), "compute_dtype": jnp.dtype(compute_dtype)}
    config = dataclasses.replace(config, **dtypes, **runtime)
    model = Decoder(config)

    def read(path, leaf, weight):
        stacked = path[0] == "layers"
        shape = leaf.shape[1:] if stacked else leaf.shape
        stored = _matrix_shape(path, weight, shape)

        def one(layer):
            tensor = tensors.get(weight.name.format(layer=layer), stored)
            return (tensor.T if weight.transpose else tensor).reshape(shape).astype(param_dtype)

        return np.stack([one(i) for i in range(config.num_layers)]) if stacked else one(0)

    abstract = abstract_params(model)
    flat = [read(*entry) for entry in _leaves(abstract)]
    return model, jax.tree.unflatten(jax.tree.structure(abstract), flat)


def hf_config(config: DecoderConfig, dtype) -> dict:
    """The config.json of this decoder."""
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "rope_theta": config.rope_theta,  # readers before Transformers 5
        "tie_word_embeddings": config.tie_word_embeddings,
        "use_sliding_window": False,
        "attention_dropout": 0.0,
        "dtype": np.dtype(dtype).name,
    }


def save_pretrained(path, model: Decoder, params, tokenizer=None) -> None:
    """Write a directory that `Qwen2ForCausalLM.from_pretrained` (and `from_pretrained` above) opens.

    Args:
      path: directory, made if needed; its config.json, model.safetensors and tokenizer files are replaced.
      model: the decoder.
      params: its parameters, on the host or on devices of this process.
      tokenizer: a Transformers tokenizer, saved along with its EOS in generation_config.json.

    Raises:
      ValueError: a parameter is not finite: such weights are of no use to anybody.
    """
    from safetensors.numpy import save_file

    path = pathlib.Path(path)
    tensors = {}
    for names, leaf, weight in _leaves(params):
        leaf = np.asarray(leaf)
        if not np.all(np.isfinite(leaf.astype(np.float32))):
            raise ValueError(f"parameter {'/'.join(names)} is not finite; nothing was exported to {path}")
        stacked = names[0] == "layers"
        for layer in range(leaf.shape[0]) if stacked else (0,):
            tensor = leaf[layer] if stacked else leaf
            tensor = tensor.reshape(_matrix_shape(names, weight, tensor.shape)[::-1]).T if weight.transpose else tensor
            if not weight.transpose and names != ("embed",):
                tensor = tensor.reshape(-1)
            tensors[weight.name.format(layer=layer)] = np.ascontiguousarray(tensor)
    path.mkdir(parents=True, exist_ok=True)
    (path / _INDEX).unlink(missing_ok=True)  # it would lead readers to the weights that were here before
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    dtype = tensors["model.norm.weight"].dtype
    (path / "config.json").write_text(json.dumps(hf_config(model.config, dtype), indent=2) + "\n")
    # safetensors keeps its file to the owner; readable to whoever may read the directory's other files.
    (path / "model.safetensors").chmod((path / "config.json").stat().st_mode)
    if tokenizer is not None:
        tokenizer.save_pretrained(path)
        generation = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
        (path / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
