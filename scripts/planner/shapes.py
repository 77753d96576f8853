"""Shapes of decoders that can be named."""

import dataclasses

from r2vpo_jax import models
from r2vpo_jax.models.base import find_directory

_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads")
_TIED = {"tie_word_embeddings": True}
_QWEN2 = {"head_dim": 128, "tie_word_embeddings": False, "max_position_embeddings": 131_072}
_QWEN3 = _QWEN2 | {"qkv_bias": False, "qk_norm": True, "family": "qwen3"}
_PANGU = _QWEN2 | {"o_bias": True, "family": "pangu"}


def _shape(base: dict, *sizes, **rest) -> dict:
    return base | dict(zip(_SIZES, sizes, strict=True)) | rest


MODELS = {
    # Qwen2.5-0.5B; then the shapes of DeepSeek-R1-Distill-Qwen-1.5B and -7B.
    "qwen2-0.5b": _shape(_QWEN2, 151_936, 896, 4864, 24, 14, 2, head_dim=64, **_TIED),
    "qwen2-1.5b": _shape(_QWEN2, 151_936, 1536, 8960, 28, 12, 2),
    "qwen2-7b": _shape(_QWEN2, 152_064, 3584, 18_944, 28, 28, 4),
    # From the models' cards; of openPangu, which states no width of the MLP, 4 and 3.125 times the hidden size.
    "qwen3-0.6b": _shape(_QWEN3, 151_936, 1024, 3072, 28, 16, 8, **_TIED),
    "qwen3-1.7b": _shape(_QWEN3, 151_936, 2048, 6144, 28, 16, 8, **_TIED),
    "qwen3-4b": _shape(_QWEN3, 151_936, 2560, 9728, 36, 32, 8, **_TIED),
    "qwen3-8b": _shape(_QWEN3, 151_936, 4096, 12_288, 36, 32, 8),
    "openpangu-1b": _shape(_PANGU, 153_376, 1536, 6144, 26, 12, 6),
    "openpangu-7b": _shape(_PANGU, 153_376, 4096, 12_800, 34, 32, 8),
}
SHIPPED = {"arithmetic": "arithmetic_base"}  # name -> the checkpoint whose config.json has the shape


def decoder_config(name: str, how: dict) -> models.DecoderConfig:
    """The shape with this name, or of the config.json in this directory; `how` it is computed.

    Raises:
      ValueError: there is no such name or directory, or its file is not of a model that is implemented.
    """
    if name in MODELS:
        return models.DecoderConfig(**MODELS[name], **how)
    directory, _ = find_directory(SHIPPED.get(name, name))
    if not directory.is_dir():
        raise ValueError(f"{name} is unknown; one of {', '.join([*MODELS, *SHIPPED])}, or a directory")
    try:
        return dataclasses.replace(models.read_config(directory), **how)
    except OSError as error:
        raise ValueError(str(error)) from error
