"""Write tests/models/golden: tiny Qwen2 checkpoints and the logits that Transformers computes from them.

    python scripts/make_golden.py [--output DIRECTORY]

Needs torch and transformers (the library itself needs no torch); made with torch 2.13.0, transformers 5.23.0.
The weights come from NumPy and a seed and are the same wherever this runs; the logits are the same up to
float32 rounding. Nothing of r2vpo_jax is imported: the expected logits owe nothing to the code they test.

The weights are *informative*: a freshly initialized model has zero biases, unit norms and small logits, and
hides a dropped bias or a swapped norm. Here biases and norms deviate from their defaults with standard
deviation 0.2, matrices have 0.25 and the embedding 1, so that every parameter shows in the logits.
"""

import argparse
import dataclasses
import json
import pathlib

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import Qwen2ForCausalLM
from transformers.utils import logging

VOCAB, HIDDEN, INTERMEDIATE, LAYERS, HEADS = 48, 24, 32, 2, 4
SEED = 90  # of eleven tried, the one at which the weakest parameter, a key bias, shows best
GOLDEN = pathlib.Path(__file__).resolve().parent.parent / "tests" / "models" / "golden"


@dataclasses.dataclass(frozen=True)
class Case:
    """One checkpoint. Together the cases cover every choice, and the pairs that could interact."""

    kv_heads: int
    tied: bool
    rope_field: str  # "rope_theta": as written before Transformers 5; "rope_parameters": since
    rope_theta: float
    head_dim: int | None = None  # None: not in config.json, hidden / heads
    dtype: torch.dtype = torch.float32

    @property
    def name(self) -> str:
        return f"kv{self.kv_heads}_{'tied' if self.tied else 'untied'}_{self.rope_field}"


CASES = (
    Case(kv_heads=1, tied=True, rope_field="rope_theta", rope_theta=10_000.0),
    Case(kv_heads=1, tied=False, rope_field="rope_parameters", rope_theta=1_000_000.0),
    Case(kv_heads=2, tied=True, rope_field="rope_parameters", rope_theta=10_000.0, head_dim=8),
    Case(kv_heads=2, tied=False, rope_field="rope_theta", rope_theta=1_000_000.0),
    Case(kv_heads=4, tied=True, rope_field="rope_theta", rope_theta=1_000_000.0, dtype=torch.bfloat16),
    Case(kv_heads=4, tied=False, rope_field="rope_parameters", rope_theta=10_000.0, head_dim=8, dtype=torch.bfloat16),
)


def config_json(case: Case) -> dict:
    raw = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": case.kv_heads,
        "hidden_act": "silu",
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": case.tied,
        "use_sliding_window": False,
    }
    if case.head_dim is not None:
        raw["head_dim"] = case.head_dim
    dtype = str(case.dtype).removeprefix("torch.")
    if case.rope_field == "rope_theta":
        return raw | {"rope_theta": case.rope_theta, "torch_dtype": dtype}
    return raw | {"rope_parameters": {"rope_type": "default", "rope_theta": case.rope_theta}, "dtype": dtype}


def weights(case: Case, seed: int) -> dict[str, torch.Tensor]:
    rng = np.random.default_rng(seed)

    def tensor(value):
        return torch.from_numpy(value.astype(np.float32)).to(case.dtype)

    def matrix(*shape):
        return tensor(0.25 * rng.standard_normal(shape))

    def near(center, size):
        return tensor(center + 0.2 * rng.standard_normal(size))

    head_dim = case.head_dim or HIDDEN // HEADS
    tensors = {"model.embed_tokens.weight": tensor(rng.standard_normal((VOCAB, HIDDEN)))}
    for i in range(LAYERS):
        layer = f"model.layers.{i}"
        for name, heads in (("q", HEADS), ("k", case.kv_heads), ("v", case.kv_heads)):
            tensors[f"{layer}.self_attn.{name}_proj.weight"] = matrix(heads * head_dim, HIDDEN)
            tensors[f"{layer}.self_attn.{name}_proj.bias"] = near(0.0, heads * head_dim)
        tensors[f"{layer}.self_attn.o_proj.weight"] = matrix(HIDDEN, HEADS * head_dim)
        tensors[f"{layer}.mlp.gate_proj.weight"] = matrix(INTERMEDIATE, HIDDEN)
        tensors[f"{layer}.mlp.up_proj.weight"] = matrix(INTERMEDIATE, HIDDEN)
        tensors[f"{layer}.mlp.down_proj.weight"] = matrix(HIDDEN, INTERMEDIATE)
        tensors[f"{layer}.input_layernorm.weight"] = near(1.0, HIDDEN)
        tensors[f"{layer}.post_attention_layernorm.weight"] = near(1.0, HIDDEN)
    tensors["model.norm.weight"] = near(1.0, HIDDEN)
    if not case.tied:
        tensors["lm_head.weight"] = matrix(VOCAB, HIDDEN)
    return tensors


def prompts(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(tokens, mask) [2, 12]: one full row and one that is padded on the left."""
    rng = np.random.default_rng(seed)
    mask = np.ones((2, 12), np.int64)
    mask[1, :4] = 0
    return rng.integers(0, VOCAB, mask.shape) * mask, mask


def write_checkpoint(path: pathlib.Path, case: Case, seed: int) -> None:
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config_json(case), indent=2) + "\n")
    save_file(weights(case, seed), path / "model.safetensors", metadata={"format": "pt"})


def reference_logits(path: pathlib.Path, tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Logits float32 [B, S, V] of Transformers for the checkpoint at `path`."""
    model = Qwen2ForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()
    positions = np.maximum(np.cumsum(mask, axis=-1) - 1, 0)
    with torch.no_grad():
        output = model(
            input_ids=torch.from_numpy(tokens),
            attention_mask=torch.from_numpy(mask),
            position_ids=torch.from_numpy(positions),
            use_cache=False,
        )
    return output.logits.numpy()


def make(output: pathlib.Path) -> None:
    for seed, case in enumerate(CASES, start=SEED):
        path = output / case.name
        write_checkpoint(path, case, seed)
        tokens, mask = prompts(seed)
        expected = {"tokens": tokens, "mask": mask, "logits": reference_logits(path, tokens, mask)}
        np.savez(path / "expected.npz", **expected)


if __name__ == "__main__":
    logging.disable_progress_bar()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=pathlib.Path, default=GOLDEN)
    make(parser.parse_args().output)
