"""Shape of a decoder, and how it is to be computed."""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp

from r2vpo_jax.config.lora import LoraConfig
from r2vpo_jax.config.run import ATTENTION, FLOAT32_SWITCHES


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How the rotary frequencies of a longer context come from those of a shorter one.

    "linear": every frequency is divided by `factor` (position interpolation, arXiv 2306.15595). "llama3": only
    those that turn less than `low_freq_factor` times in the original context; those that turn more than
    `high_freq_factor` times stay, and between the two it is interpolated (Llama 3.1, arXiv 2407.21783).

    Raises:
      ValueError: another type, or factors that are not positive or not in order.
    """

    rope_type: str
    factor: float
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    original_max_position_embeddings: int | None = None

    def __post_init__(self):
        needed = {
            "linear": ("factor",),
            "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
        }
        if self.rope_type not in needed:
            raise ValueError(f"rotary scaling {self.rope_type!r} is not implemented; {', '.join(needed)} are")
        for field in needed[self.rope_type]:
            value = getattr(self, field)
            if not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
                raise ValueError(f"rotary scaling {self.rope_type!r}: {field} must be positive, got {value!r}")
        if self.rope_type == "llama3" and self.low_freq_factor >= self.high_freq_factor:
            raise ValueError(
                f"rotary scaling 'llama3': low_freq_factor={self.low_freq_factor} is not below "
                f"high_freq_factor={self.high_freq_factor}"
            )


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """A decoder of the Llama kind: what differs between families is a field, not a class.

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
    qkv_bias: bool = True
    o_bias: bool = False
    qk_norm: bool = False  # RMSNorm over head_dim of queries and keys, before the rotation
    rope_scaling: RopeScaling | None = None
    family: str = "qwen2"  # names of its tensors, and of its export (models/families.py); not read by the decoder

    num_tokens: int | None = None  # tokens the tokenizer knows; rows from there on are padding, never sampled
    param_dtype: Any = jnp.float32
    compute_dtype: Any = jnp.float32
    float32_residual: bool = (
        False  # this and the next two matter where compute_dtype has 16 bits, and are False elsewhere
    )
    float32_scores: bool = False
    float32_logits: bool = False
    scan_layers: bool = False  # False: unrolled (faster on CPU); True: compiles one layer (large models)
    remat: bool = False  # recompute each layer in the backward pass
    matmul_precision: str = "highest"  # of float32 products on TPUs and GPUs: highest, high, or default
    attention: str = "auto"  # over whole rows: one of ATTENTION
    attention_block_size: int = 0  # queries at a time of "blockwise"; 0: 512, in "auto" from 1,024 columns on
    lora: LoraConfig | None = None  # adapters, which have param_dtype; None, which rank 0 becomes: there are none

    def __post_init__(self):
        # Names and scalar types become dtypes: the decoder compares them, and equal configs must hash the same.
        for field in ("param_dtype", "compute_dtype"):
            object.__setattr__(self, field, jnp.dtype(getattr(self, field)))
        if self.lora is not None and not self.lora.rank:
            object.__setattr__(self, "lora", None)
        if self.compute_dtype.itemsize > 2:
            for field in FLOAT32_SWITCHES:
                object.__setattr__(self, field, False)
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
        if self.attention not in ATTENTION:
            raise ValueError(f"model.attention={self.attention!r}; one of {', '.join(ATTENTION)}")
        if self.attention_block_size < 0:
            raise ValueError(
                f"model.attention_block_size must be at least 0 (0: chosen), got {self.attention_block_size}"
            )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}")
        if self.num_tokens is not None and not 1 <= self.num_tokens <= self.vocab_size:
            raise ValueError(
                f"the tokenizer knows {self.num_tokens} tokens, but the embedding has {self.vocab_size} rows; "
                "use the tokenizer that belongs to this checkpoint"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} must be even (rotary embedding turns pairs)")

    @property
    def weights_dtype(self):
        """Of the weights that are no adapters."""
        if self.lora is None:
            return self.param_dtype
        return self.compute_dtype if self.lora.base_dtype == "compute" else jnp.dtype(self.lora.base_dtype)

    @property
    def residual_dtype(self):
        """Of the sum that each layer adds to."""
        return jnp.dtype(jnp.float32) if self.float32_residual else self.compute_dtype
