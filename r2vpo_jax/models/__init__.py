"""Decoders, and Hugging Face directories in and out."""

from r2vpo_jax.models.config import DecoderConfig
from r2vpo_jax.models.decoder import Cache, Decoder, abstract_params, init_cache, init_params, logical_axes
from r2vpo_jax.models.huggingface import from_pretrained, read_config, save_pretrained

__all__ = [
    "Cache",
    "Decoder",
    "DecoderConfig",
    "abstract_params",
    "from_pretrained",
    "init_cache",
    "init_params",
    "logical_axes",
    "read_config",
    "save_pretrained",
]
