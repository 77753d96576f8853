"""Write a small checkpoint with random weights, to rehearse a run without the real one.

    python scripts/make_random_checkpoint.py --family=qwen2 --output=models/rehearsal

A Hugging Face directory in the layout of the family (config.json, safetensors, generation_config.json), with the tokenizer
and chat template of the shipped word-problem model. It computes; it knows nothing.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout, installed or not

from r2vpo_jax import cli

# isort: split
from absl import flags

_OUTPUT = flags.DEFINE_string("output", None, "Directory to write.")
_FAMILY = flags.DEFINE_enum("family", "qwen2", ["qwen2", "qwen3", "llama", "mistral", "pangu"], "Layout.")
_LAYERS = flags.DEFINE_integer("layers", 2, "Depth.", lower_bound=1)
_HIDDEN = flags.DEFINE_integer("hidden_size", 64, "Width; a multiple of 16.", lower_bound=16)
_DTYPE = flags.DEFINE_enum("dtype", "bfloat16", ["float32", "bfloat16", "float16"], "Of the weights.")
_SEED = flags.DEFINE_integer("seed", 0, "Of the weights.", lower_bound=0)


def main():
    cli.require_flag(_OUTPUT, "models/rehearsal")
    if _HIDDEN.value % 16:
        raise cli.UsageError(f"--hidden_size={_HIDDEN.value} is not a multiple of 16")
    if (Path(_OUTPUT.value) / "config.json").exists():
        raise cli.UsageError(f"--output={_OUTPUT.value} holds a checkpoint already; choose another directory")
    import jax

    from r2vpo_jax import models
    from r2vpo_jax.config import ModelConfig
    from r2vpo_jax.models.base import open_base_model

    shipped = open_base_model(ModelConfig(path="word_problems_base"))
    config = models.DecoderConfig(
        family=_FAMILY.value,
        vocab_size=shipped.model.config.vocab_size,
        hidden_size=_HIDDEN.value,
        intermediate_size=2 * _HIDDEN.value,
        num_layers=_LAYERS.value,
        num_heads=4,
        num_kv_heads=2,
        head_dim=_HIDDEN.value // 4,
        qkv_bias=_FAMILY.value in ("qwen2", "pangu"),
        o_bias=_FAMILY.value == "pangu",
        qk_norm=_FAMILY.value == "qwen3",
        rope_theta=1e6,
        param_dtype=_DTYPE.value,
        max_position_embeddings=32_768,
    )
    model = models.Decoder(config)
    params = models.init_params(model, jax.random.key(_SEED.value))
    models.save_pretrained(_OUTPUT.value, model, params, shipped.tokenizer, eos_ids=shipped.eos_ids)
    print(f"wrote {_OUTPUT.value}: {_FAMILY.value}, {sum(x.size for x in jax.tree.leaves(params)):,} random parameters")


if __name__ == "__main__":
    cli.run(main)
