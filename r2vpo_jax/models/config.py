"""Shape of a decoder, and how it is to be computed."""

import dataclasses
from typing import Any

import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """A Qwen2-style decoder.

    The first block is the architecture and comes from the checkpoint's `config.json`; the second says how
    to compute it and belongs to the run.

    Raises:
      ValueError: when the numbers cannot describe a decoder (message names the field).
    """

    vocab_size: int  # rows of the embedding, padding rows included
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float = 10_000.0
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = True
    max_position_embeddings: int = 32_768

    num_tokens: int | None = None  # tokens the tokenizer knows; rows from there on are padding, never sampled
    param_dtype: Any = jnp.float32
    compute_dtype: Any = jnp.float32
    scan_layers: bool = False  # False: unrolled (faster on CPU); True: compiles one layer (large models)
    remat: bool = False  # recompute each layer in the backward pass

    def __post_init__(self):
        # Names and scalar types become dtypes: the decoder compares them, and equal configs must hash the same.
        for field in ("param_dtype", "compute_dtype"):
            object.__setattr__(self, field, jnp.dtype(getattr(self, field)))
        for field in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "max_position_embeddings",
        ):
            if getattr(self, field) < 1:
                raise ValueError(f"model.{field} must be at least 1, got {getattr(self, field)}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}")
        if self.num_tokens is not None and not 1 <= self.num_tokens <= self.vocab_size:
            raise ValueError(
                f"the tokenizer knows {self.num_tokens} tokens, but the embedding has {self.vocab_size} rows; "
                "use the tokenizer that belongs to this checkpoint"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} must be even (rotary embedding turns pairs)")
