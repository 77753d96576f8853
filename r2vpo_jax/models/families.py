"""What the families of decoders differ in: the fields of their config.json, and the names of their tensors.

`FAMILIES` is the only place that knows a family. A checkpoint is recognized by its `model_type`; what its
config.json leaves out has the value that the family's own configuration class gives it; a feature that the
decoder does not compute is refused by name, never ignored.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from r2vpo_jax.models.config import DecoderConfig, RopeScaling

# Tensors ------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Weight:
    """How one parameter of ours is stored there: a tensor a layer, kernels as [out, in], heads flattened."""

    name: str  # with {layer}
    inputs: int = 0  # leading axes of our kernel that are contracted; 0: not a kernel

    def stored_shape(self, shape) -> tuple[int, ...]:
        """Shape there of a parameter (of one layer) that has `shape` here."""
        if self.inputs:
            return math.prod(shape[self.inputs :]), math.prod(shape[: self.inputs])
        return (math.prod(shape),) if self.name.endswith(".bias") else tuple(shape)

    def to_stored(self, array: np.ndarray) -> np.ndarray:
        shape = self.stored_shape(array.shape)
        return array.reshape(shape[::-1]).T if self.inputs else array.reshape(shape)

    def from_stored(self, tensor: np.ndarray, shape) -> np.ndarray:
        return (tensor.T if self.inputs else tensor).reshape(shape)


_LAYER = "model.layers.{layer}."


def _projections(module, names, inputs=1):
    theirs = {"attention": "self_attn", "mlp": "mlp"}[module]
    return {
        ("layers", module, f"{p}_proj", "kernel"): Weight(f"{_LAYER}{theirs}.{p}_proj.weight", inputs) for p in names
    }


# Our path -> theirs. Entries that a checkpoint's features do without (biases, lm_head) are not looked up.
_LLAMA = {
    ("embed",): Weight("model.embed_tokens.weight"),
    ("final_norm", "scale"): Weight("model.norm.weight"),
    ("lm_head",): Weight("lm_head.weight", inputs=1),
    ("layers", "input_norm", "scale"): Weight(_LAYER + "input_layernorm.weight"),
    ("layers", "post_attention_norm", "scale"): Weight(_LAYER + "post_attention_layernorm.weight"),
    **_projections("attention", "qkv"),
    **_projections("attention", "o", inputs=2),
    **_projections("mlp", ("gate", "up", "down")),
    **{("layers", "attention", f"{p}_proj", "bias"): Weight(f"{_LAYER}self_attn.{p}_proj.bias") for p in "qkvo"},
}
_QWEN3 = _LLAMA | {
    ("layers", "attention", f"{p}_norm", "scale"): Weight(f"{_LAYER}self_attn.{p}_norm.weight") for p in "qk"
}

# Families -----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Family:
    """One row of the table."""

    model_type: str  # in config.json
    tensors: Mapping[tuple[str, ...], Weight]
    architecture: str  # in config.json; written on export, with `export_as`
    export_as: str | None = None  # model_type on export, where it is another
    bias_field: str | None = None  # the flag for biases on q, k, v and o; None: fixed, as `qkv_bias` says
    qkv_bias: bool = False
    qk_norm: bool = False
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # of fields that config.json leaves out
    export: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # further fields of the exported config.json
    refused: tuple[str, ...] = ()  # flags that must not be set


FAMILIES = {
    "qwen2": Family(
        model_type="qwen2",
        architecture="Qwen2ForCausalLM",
        tensors=_LLAMA,
        qkv_bias=True,
        defaults={"num_key_value_heads": 32},
        export={"use_sliding_window": False},
    ),
    "qwen3": Family(
        model_type="qwen3",
        architecture="Qwen3ForCausalLM",
        tensors=_QWEN3,
        bias_field="attention_bias",
        qk_norm=True,
        defaults={"num_key_value_heads": 32, "head_dim": 128},
        export={"use_sliding_window": False},
    ),
    "llama": Family(
        model_type="llama",
        architecture="LlamaForCausalLM",
        tensors=_LLAMA,
        bias_field="attention_bias",
        defaults={"max_position_embeddings": 2048},
        export={"mlp_bias": False},
    ),
    "mistral": Family(
        model_type="mistral",
        architecture="MistralForCausalLM",
        tensors=_LLAMA,
        defaults={"num_key_value_heads": 8, "max_position_embeddings": 131_072, "sliding_window": 4096},
        export={"sliding_window": None},
        refused=("attention_bias",),
    ),
    # openPangu-Embedded is Llama with biases on q, k, v and o, and is exported as that: Transformers has no class
    # of that name, and the code that comes with its checkpoints is not ours to run.
    "pangu": Family(
        model_type="PanguEmbedded",
        architecture="LlamaForCausalLM",
        export_as="llama",
        tensors=_LLAMA,
        bias_field="bias",
        defaults={"num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_theta": 16e6, "bias": True},
        export={"mlp_bias": False},
    ),
}
_DEFAULTS = {
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
    "max_position_embeddings": 32_768,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
}

# What the decoder does not compute, in any family: field -> what it is called.
_REFUSED = {
    "quantization_config": "quantized weights are",
    "use_sliding_window": "sliding-window attention is",
    "mlp_bias": "a bias in the MLP (mlp_bias) is",
    "attn_logit_softcapping": "soft-capping of attention logits (attn_logit_softcapping) is",
    "final_logit_softcapping": "soft-capping of the logits (final_logit_softcapping) is",
    "dual_chunk_attention_config": "dual-chunk attention (dual_chunk_attention_config: without it, texts shorter than a chunk stay the same) is",
    "sparse_attention_config": "sparse attention (sparse_attention_config) is",
    "attention_chunk_size": "attention in chunks (attention_chunk_size) is",
    "use_bidirectional_attention": "attention to later tokens (use_bidirectional_attention) is",
    "add_cross_attention": "cross-attention (add_cross_attention) is",
    "use_attention_sinks": "attention sinks (use_attention_sinks) are",
    "attn_temperature_tuning": "attention temperature by position (attn_temperature_tuning) is",
    "alibi": "positions by ALiBi (alibi) are",
    "rope_interleave": "interleaved rotary embedding (rope_interleave) is",
    "use_parallel_residual": "attention and MLP side by side (use_parallel_residual) are",
    "num_local_experts": "experts (num_local_experts) are",
    "num_experts": "experts (num_experts) are",
    "use_mrope": "multimodal rotary embedding (use_mrope) is",
    "no_rope_layers": "layers without rotary embedding (no_rope_layers) are",
    "use_qk_norm": "this kind of norm of queries and keys (use_qk_norm) is",
    "clip_qkv": "clipping of queries, keys and values (clip_qkv) is",
}
# Factors of other decoders: field -> the value at which it changes nothing.
_NEUTRAL = {
    "is_causal": True,
    "embedding_multiplier": 1,
    "attention_multiplier": None,  # stands for the scale of the attention itself
    "query_pre_attn_scalar": None,
    "residual_multiplier": 1,
    "logits_scaling": 1,
    "logit_scale": 1,
    "scale_emb": 1,
    "scale_depth": None,
    "dim_model_base": None,
    "lm_head_multiplier": 1,
}


def find(raw: Mapping[str, Any]) -> str:
    """Name in `FAMILIES` of the family that a config.json belongs to.

    Raises:
      ValueError: none of them.
    """
    for name, family in FAMILIES.items():
        if raw.get("model_type") == family.model_type:
            return name
    if raw.get("architectures") == ["PanguEmbeddedForCausalLM"]:
        return "pangu"
    supported = ", ".join(repr(family.model_type) for family in FAMILIES.values())
    raise ValueError(f"model_type {raw.get('model_type')!r} is not supported; supported: {supported}")


def _rope(raw):
    """The rotary parameters, wherever they stand; where both are given, Transformers takes rope_scaling."""
    for name in ("rope_scaling", "rope_parameters"):
        rope = raw.get(name) or {}
        if not isinstance(rope, dict):
            raise ValueError(f"{name} is not an object: {rope!r}")
        if any(isinstance(value, dict) for value in rope.values()):
            raise ValueError("rotary parameters that differ between layers are not implemented")
        if _rope_type(rope) not in ("default", "linear", "llama3"):
            raise ValueError(
                f"rotary scaling {_rope_type(rope)!r} is not implemented; 'default', 'linear' and 'llama3' are"
            )
    return raw.get("rope_scaling") or raw.get("rope_parameters") or {}


def _rope_type(rope):
    return rope.get("rope_type") or rope.get("type") or "default"


def _check_head(raw):
    """The same layers may carry another head (a classifier, a reward, none): that is no language model."""
    given = raw.get("architectures") or []
    for name in [given] if isinstance(given, str) else given:
        if not str(name).endswith("ForCausalLM"):
            raise ValueError(f"architectures names {name!r}, which is not a language model (those end in ForCausalLM)")


def _check_features(raw, family, field, number):
    for name, neutral in _NEUTRAL.items():
        if raw.get(name) is not None and raw[name] != neutral:
            raise ValueError(f"{name}={raw[name]!r} is not implemented")
    for name, what in _REFUSED.items():
        if raw.get(name):
            raise ValueError(f"{what} not implemented")
    for name in family.refused:
        if raw.get(name):
            raise ValueError(f"{name} in a {family.model_type!r} checkpoint is not implemented")
    if any(kind != "full_attention" for kind in raw.get("layer_types") or ()):
        raise ValueError("sliding-window attention is not implemented (layer_types)")
    # Qwen's sliding_window counts only with use_sliding_window, which is refused above.
    has_window = "use_sliding_window" not in family.export and field("sliding_window", None) is not None
    if has_window and (window := number("sliding_window")) < number("max_position_embeddings"):
        raise ValueError(f"sliding-window attention is not implemented (sliding_window={window})")
    if field("hidden_act") != "silu":
        raise ValueError(f"activation {field('hidden_act')!r} is not implemented; only 'silu' is")
    for part in (raw, _rope(raw)):
        if part.get("partial_rotary_factor") not in (None, 1):
            raise ValueError(f"partial_rotary_factor={part['partial_rotary_factor']} is not implemented; only 1 is")


def read_fields(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The architecture fields of `DecoderConfig` that a config.json describes.

    Raises:
      ValueError: a family, or a feature, that the decoder does not compute; a field missing or of the wrong type.
    """
    name = find(raw)
    family = FAMILIES[name]
    defaults = _DEFAULTS | dict(family.defaults)
    _check_head(raw)

    def field(key, *default):
        """As given, else the family's default; null only stands where null is what is meant."""
        if key in raw and (raw[key] is not None or key in ("sliding_window", "num_key_value_heads")):
            return raw[key]
        if key in defaults:
            return defaults[key]
        if default:
            return default[0]
        raise ValueError(f"lacks the field {key!r}")

    def number(key, *default, kind=int):
        value = field(key, *default)
        if isinstance(value, bool) or not isinstance(value, (int, float) if kind is float else int):
            raise ValueError(f"{key} is {value!r}, but must be a number" + " (integer)" * (kind is int))
        return kind(value)

    _check_features(raw, family, field, number)
    rope = _rope(raw)
    theta = rope.get("rope_theta") or number("rope_theta", kind=float)
    if isinstance(theta, bool) or not isinstance(theta, int | float) or not 0 < theta < math.inf:
        raise ValueError(f"rope_theta must be positive, got {theta!r}")
    heads = number("num_attention_heads")
    if field("num_key_value_heads", None) is None:
        raw = dict(raw, num_key_value_heads=heads)
    bias = bool(field(family.bias_field, False)) if family.bias_field else None
    return {
        "family": name,
        "vocab_size": number("vocab_size"),
        "hidden_size": number("hidden_size"),
        "intermediate_size": number("intermediate_size"),
        "num_layers": number("num_hidden_layers"),
        "num_heads": heads,
        "num_kv_heads": number("num_key_value_heads"),
        "head_dim": number("head_dim", number("hidden_size") // max(heads, 1)),
        "rope_theta": float(theta),
        "rms_norm_eps": number("rms_norm_eps", kind=float),
        "tie_word_embeddings": bool(field("tie_word_embeddings")),
        "max_position_embeddings": number("max_position_embeddings"),
        "qkv_bias": family.qkv_bias if bias is None else bias,
        "o_bias": bool(bias),
        "qk_norm": family.qk_norm,
        "rope_scaling": _read_scaling(raw, rope, number("max_position_embeddings")),
    }


def _read_scaling(raw, rope, max_positions):
    kind = _rope_type(rope)
    if kind == "default":
        return None
    scaling = {"factor": rope.get("factor")}
    if kind == "llama3":
        scaling |= {key: rope.get(key) for key in ("low_freq_factor", "high_freq_factor")}
        original = "original_max_position_embeddings"  # in this order of preference in Transformers too
        scaling[original] = raw.get(original) or rope.get(original) or max_positions
    return RopeScaling(kind, **scaling)


def hf_config(config: DecoderConfig, dtype) -> dict[str, Any]:
    """The config.json of this decoder, for Transformers 5 and (rope_theta, rope_scaling) for readers before it.

    Raises:
      ValueError: the family has no way to say what this decoder computes.
    """
    family = FAMILIES[config.family]
    bias = config.qkv_bias if family.bias_field else family.qkv_bias
    o_bias = bias if family.bias_field else False
    if (config.qkv_bias, config.o_bias, config.qk_norm) != (bias, o_bias, family.qk_norm):
        raise ValueError(
            f"family {config.family!r} cannot express qkv_bias={config.qkv_bias}, o_bias={config.o_bias}, "
            f"qk_norm={config.qk_norm}"
        )
    scaling = {"rope_type": "default"}
    if config.rope_scaling is not None:
        scaling = {key: value for key, value in dataclasses.asdict(config.rope_scaling).items() if value is not None}
    raw = {
        "architectures": [family.architecture],
        "model_type": family.export_as or family.model_type,
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
        "rope_parameters": scaling | {"rope_theta": config.rope_theta},
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tie_word_embeddings,
        "attention_dropout": 0.0,
        "dtype": np.dtype(dtype).name,
    }
    if config.rope_scaling is not None:
        raw["rope_scaling"] = scaling
    if family.bias_field:
        raw["attention_bias"] = bias
    return raw | dict(family.export)
