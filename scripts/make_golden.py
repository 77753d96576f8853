"""Write tests/models/golden: tiny checkpoints of every family, and what Transformers computes from them.

    python scripts/make_golden.py [--output DIRECTORY]

Needs torch and transformers (the library itself needs no torch); made with torch 2.13.0, transformers 5.23.0.
The weights come from NumPy and a seed and are the same wherever this runs; the logits are the same up to
float32 rounding. Nothing of r2vpo_jax is imported: the expected logits owe nothing to the code they test.

The weights are *informative*: a freshly initialized model has zero biases, unit norms and small logits, and
hides a dropped bias or a swapped norm. Here biases and norms deviate from their defaults with standard
deviation 0.2, matrices have 0.25 and the embedding 1, so that every parameter shows in the logits. (Norms of
queries and keys have 0.5: what they scale is of the same size everywhere.)

The tokens of greedy generation are only recorded where they are certain: at every step the two most likely
tokens are further apart than `MIN_GAP` times the largest logit.
"""

import argparse
import dataclasses
import json
import pathlib
import tempfile

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
from transformers.utils import logging

VOCAB, HIDDEN, INTERMEDIATE, LAYERS, HEADS = 48, 24, 32, 2, 4
GENERATED, MIN_GAP = 64, 3e-4
GOLDEN = pathlib.Path(__file__).resolve().parent.parent / "tests" / "models" / "golden"
ARCHITECTURES = {
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "PanguEmbedded": "PanguEmbeddedForCausalLM",
}
# Of four frequencies that theta = 50 gives 8 dimensions, one stays, one is interpolated, two are divided.
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


@dataclasses.dataclass(frozen=True)
class Case:
    """One checkpoint. Together the cases cover every choice, and the pairs that could interact."""

    kv_heads: int
    tied: bool
    rope_field: str  # "rope_theta": as written before Transformers 5; "rope_parameters": since
    rope_theta: float
    head_dim: int | None = None  # None: not in config.json, hidden / heads
    dtype: torch.dtype = torch.float32
    model_type: str = "qwen2"
    bias: bool = False  # on q, k, v and o, where the family leaves the choice
    scaling: dict | None = None  # of the rotary frequencies
    extra: dict | None = None  # further fields of config.json
    length: int = 12  # of the prompts
    seed: int = 0  # chosen so that the weakest parameter, usually a key bias, shows well
    label: str = ""
    generate: bool = False  # record a greedy generation too: one case a family and kind of rotary scaling

    @property
    def name(self) -> str:
        return self.label or f"kv{self.kv_heads}_{'tied' if self.tied else 'untied'}_{self.rope_field}"

    @property
    def biased(self) -> str:
        return "qkv" if self.model_type == "qwen2" else "qkvo" * self.bias


CASES = (
    Case(kv_heads=1, tied=True, rope_field="rope_theta", rope_theta=10_000.0, seed=90),
    Case(kv_heads=1, tied=False, rope_field="rope_parameters", rope_theta=1_000_000.0, seed=91),
    Case(kv_heads=2, tied=True, rope_field="rope_parameters", rope_theta=10_000.0, head_dim=8, seed=92),
    Case(kv_heads=2, tied=False, rope_field="rope_theta", rope_theta=1_000_000.0, seed=93, generate=True),
    Case(kv_heads=4, tied=True, rope_field="rope_theta", rope_theta=1_000_000.0, dtype=torch.bfloat16, seed=94),
    Case(
        kv_heads=4,
        tied=False,
        rope_field="rope_parameters",
        rope_theta=10_000.0,
        head_dim=8,
        dtype=torch.bfloat16,
        seed=95,
    ),
    Case(
        label="qwen3_tied",
        model_type="qwen3",
        kv_heads=2,
        tied=True,
        rope_field="rope_parameters",
        rope_theta=1_000_000.0,
        head_dim=8,
        dtype=torch.bfloat16,
        seed=106,
    ),
    Case(
        label="qwen3_untied_bias",
        generate=True,
        model_type="qwen3",
        kv_heads=1,
        tied=False,
        rope_field="rope_theta",
        rope_theta=10_000.0,
        head_dim=10,
        bias=True,
        seed=104,
    ),
    Case(
        label="llama_llama3_untied",
        generate=True,
        model_type="llama",
        kv_heads=2,
        tied=False,
        rope_field="rope_theta",
        rope_theta=50.0,
        head_dim=8,
        scaling=LLAMA3,
        length=40,
        dtype=torch.float16,
        seed=103,
    ),
    Case(
        label="llama_llama3_tied_bias",
        model_type="llama",
        kv_heads=1,
        tied=True,
        rope_field="rope_parameters",
        rope_theta=50.0,
        head_dim=8,
        bias=True,
        scaling=LLAMA3,
        length=40,
        dtype=torch.bfloat16,
        seed=102,
    ),
    Case(
        label="llama_linear",
        generate=True,
        model_type="llama",
        kv_heads=4,
        tied=True,
        rope_field="rope_theta",
        rope_theta=10_000.0,
        scaling={"type": "linear", "factor": 4.0},
        dtype=torch.bfloat16,
        seed=105,
    ),
    Case(
        label="mistral_untied",
        generate=True,
        model_type="mistral",
        kv_heads=2,
        tied=False,
        rope_field="rope_parameters",
        rope_theta=10_000.0,
        head_dim=8,
        extra={"sliding_window": None},
        seed=107,
    ),
    Case(
        label="mistral_tied_window_of_all",
        model_type="mistral",
        kv_heads=1,
        tied=True,
        rope_field="rope_theta",
        rope_theta=1_000_000.0,
        dtype=torch.bfloat16,
        extra={"sliding_window": 128},
        seed=100,
    ),
    Case(
        label="pangu_untied",
        generate=True,
        model_type="PanguEmbedded",
        kv_heads=2,
        tied=False,
        rope_field="rope_theta",
        rope_theta=16_000_000.0,
        bias=True,
        seed=106,
    ),
    Case(
        label="pangu_tied",
        model_type="PanguEmbedded",
        kv_heads=4,
        tied=True,
        rope_field="rope_theta",
        rope_theta=10_000.0,
        bias=True,
        dtype=torch.bfloat16,
        seed=100,
    ),
)


def config_json(case: Case) -> dict:
    raw = {
        "architectures": [ARCHITECTURES[case.model_type]],
        "model_type": case.model_type,
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": case.kv_heads,
        "hidden_act": "silu",
        "max_position_embeddings": 64 if case.model_type == "qwen2" else 128,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": case.tied,
    }
    if case.model_type == "qwen2":
        raw["use_sliding_window"] = False
    elif case.model_type == "PanguEmbedded":
        raw["bias"] = case.bias
    elif case.model_type != "mistral":
        raw["attention_bias"] = case.bias
    raw |= case.extra or {}
    if case.head_dim is not None:
        raw["head_dim"] = case.head_dim
    dtype = str(case.dtype).removeprefix("torch.")
    if case.rope_field == "rope_theta":
        old = {"rope_theta": case.rope_theta, "torch_dtype": dtype}
        return raw | old | ({"rope_scaling": case.scaling} if case.scaling else {})
    scaling = case.scaling or {"rope_type": "default"}
    return raw | {"rope_parameters": scaling | {"rope_theta": case.rope_theta}, "dtype": dtype}


def weights(case: Case, seed: int) -> dict[str, torch.Tensor]:
    rng = np.random.default_rng(seed)

    def tensor(value):
        return torch.from_numpy(value.astype(np.float32)).to(case.dtype)

    def matrix(*shape):
        return tensor(0.25 * rng.standard_normal(shape))

    def near(center, size, spread=0.2):
        return tensor(center + spread * rng.standard_normal(size))

    head_dim = case.head_dim or HIDDEN // HEADS
    tensors = {"model.embed_tokens.weight": tensor(rng.standard_normal((VOCAB, HIDDEN)))}
    for i in range(LAYERS):
        layer = f"model.layers.{i}"
        for name, heads in (("q", HEADS), ("k", case.kv_heads), ("v", case.kv_heads)):
            tensors[f"{layer}.self_attn.{name}_proj.weight"] = matrix(heads * head_dim, HIDDEN)
            if name in case.biased:
                tensors[f"{layer}.self_attn.{name}_proj.bias"] = near(0.0, heads * head_dim)
        tensors[f"{layer}.self_attn.o_proj.weight"] = matrix(HIDDEN, HEADS * head_dim)
        if "o" in case.biased:
            tensors[f"{layer}.self_attn.o_proj.bias"] = near(0.0, HIDDEN)
        if case.model_type == "qwen3":
            tensors[f"{layer}.self_attn.q_norm.weight"] = near(1.0, head_dim, spread=0.5)
            tensors[f"{layer}.self_attn.k_norm.weight"] = near(1.0, head_dim, spread=0.5)
        tensors[f"{layer}.mlp.gate_proj.weight"] = matrix(INTERMEDIATE, HIDDEN)
        tensors[f"{layer}.mlp.up_proj.weight"] = matrix(INTERMEDIATE, HIDDEN)
        tensors[f"{layer}.mlp.down_proj.weight"] = matrix(HIDDEN, INTERMEDIATE)
        tensors[f"{layer}.input_layernorm.weight"] = near(1.0, HIDDEN)
        tensors[f"{layer}.post_attention_layernorm.weight"] = near(1.0, HIDDEN)
    tensors["model.norm.weight"] = near(1.0, HIDDEN)
    if not case.tied:
        tensors["lm_head.weight"] = matrix(VOCAB, HIDDEN)
    return tensors


def prompts(seed: int, length: int = 12) -> tuple[np.ndarray, np.ndarray]:
    """(tokens, mask) [2, length]: one full row and one that is padded on the left."""
    rng = np.random.default_rng(seed)
    mask = np.ones((2, length), np.int64)
    mask[1, :4] = 0
    return rng.integers(0, VOCAB, mask.shape) * mask, mask


def ragged_prompts(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(tokens [3, 9], lengths [3]), padded on the left."""
    lengths = np.array([9, 5, 1])
    mask = np.arange(9) >= 9 - lengths[:, None]
    return np.random.default_rng(seed + 1).integers(0, VOCAB, mask.shape) * mask, lengths


def write_checkpoint(path: pathlib.Path, case: Case, seed: int) -> None:
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config_json(case), indent=2) + "\n")
    save_file(weights(case, seed), path / "model.safetensors", metadata={"format": "pt"})


def open_in_transformers(path: pathlib.Path):
    """The model at `path`, in float32. Pangu has no class there: it is opened as the Llama that it is."""
    raw = json.loads((path / "config.json").read_text())
    if raw["model_type"] != "PanguEmbedded":
        return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()
    with tempfile.TemporaryDirectory() as directory:
        copy = pathlib.Path(directory)
        raw |= {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "attention_bias": raw.pop("bias")}
        (copy / "config.json").write_text(json.dumps(raw))
        (copy / "model.safetensors").write_bytes((path / "model.safetensors").read_bytes())
        return open_in_transformers(copy)


def reference_logits(path: pathlib.Path, tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Logits float32 [B, S, V] of Transformers for the checkpoint at `path`."""
    positions = np.maximum(np.cumsum(mask, axis=-1) - 1, 0)
    with torch.no_grad():
        output = open_in_transformers(path)(
            input_ids=torch.from_numpy(tokens),
            attention_mask=torch.from_numpy(mask),
            position_ids=torch.from_numpy(positions),
            use_cache=False,
        )
    return output.logits.numpy()


def reference_generation(path: pathlib.Path, tokens: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, float]:
    """Greedy continuations [B, GENERATED] of left-padded prompts by Transformers' `generate`, and how certain.

    That is the smallest gap between the two largest logits, in units of the largest logit.
    """
    output = open_in_transformers(path).generate(
        input_ids=torch.from_numpy(tokens),
        attention_mask=torch.from_numpy((np.arange(tokens.shape[1]) >= tokens.shape[1] - lengths[:, None]).astype(int)),
        max_new_tokens=GENERATED,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    logits = np.stack([x.numpy() for x in output.logits], axis=1)
    largest = np.sort(logits, axis=-1)[..., -2:]
    gap = np.min(largest[..., 1] - largest[..., 0]) / np.max(np.abs(logits))
    return output.sequences[:, tokens.shape[1] :].numpy(), float(gap)


def certain_generation(path: pathlib.Path, seed: int) -> dict[str, np.ndarray]:
    """The first ragged prompts, counting seeds up, whose greedy continuations are certain."""
    for attempt in range(20):
        tokens, lengths = ragged_prompts(seed + attempt)
        generated, gap = reference_generation(path, tokens, lengths)
        if gap >= MIN_GAP:
            return {"tokens": tokens, "lengths": lengths, "generated": generated.astype(np.int32)}
    raise ValueError(f"{path.name}: at every seed two tokens are as good as equally likely")


def make(output: pathlib.Path) -> None:
    for case in CASES:
        path = output / case.name
        write_checkpoint(path, case, case.seed)
        tokens, mask = prompts(case.seed, case.length)
        expected = {"tokens": tokens, "mask": mask, "logits": reference_logits(path, tokens, mask)}
        np.savez(path / "expected.npz", **expected)
        if case.generate:
            np.savez(path / "generated.npz", **certain_generation(path, case.seed))


if __name__ == "__main__":
    logging.disable_progress_bar()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=pathlib.Path, default=GOLDEN)
    make(parser.parse_args().output)
