"""Decoders, and Hugging Face directories in and out."""

from r2vpo_jax.models.config import DecoderConfig, RopeScaling
from r2vpo_jax.models.decoder import Cache, Decoder, abstract_params, init_cache, init_params, logical_axes
from r2vpo_jax.models.huggingface import (
    from_pretrained,
    load_params,
    read_config,
    read_model,
    save_pretrained,
    stored_dtype,
)

__all__ = [
    "Cache",
    "Decoder",
    "DecoderConfig",
    "RopeScaling",
    "abstract_params",
    "from_pretrained",
    "init_cache",
    "init_params",
    "load_params",
    "logical_axes",
    "read_config",
    "read_model",
    "save_pretrained",
    "stored_dtype",
]
