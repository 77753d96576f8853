"""The configuration of an evaluation. The fields of `EvaluationConfig` are the flags of experiments/evaluate.py."""

import contextlib
import dataclasses
import pathlib

from r2vpo_jax.config.fields import option, require
from r2vpo_jax.config.run import ModelConfig
from r2vpo_jax.config.task import VerifierConfig
from r2vpo_jax.errors import UsageError


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """What is evaluated, and how."""

    tasks: str | None = option(
        None, "comma-separated: arithmetic, or data sets as in docs/data.md: word_problems,aime24"
    )
    model: str | None = option(
        None, "Hugging Face or run directory, or name of a shipped model; default: arithmetic_base"
    )
    checkpoint: str | None = option(
        None, "of a run directory: an iteration, latest or best; default: the exported model, else latest"
    )
    num_problems: int | None = option(None, "a benchmark; default: all, and 256 of an endless one")
    k: int = option(16, "samples a problem")
    greedy: bool = option(True, "also one sample a problem at temperature 0")
    temperature: float = option(1.0, "of the k samples")
    top_p: float = option(1.0, "the most likely tokens with this much probability; 1: all")
    top_k: int = option(0, "so many of the most likely tokens; 0: all")
    seed: int = option(0, "of the samples")
    max_length: int | None = option(None, "response tokens of data sets; default: 1024, less if the model has no room")
    max_prompt_length: int | None = option(
        None,
        "prompt tokens of data sets, problems with longer ones are dropped; default: 1024, at most 3/4 of the model's",
    )
    template: str = option("auto", "prompts of data sets: chat, plain, or auto: chat if the tokenizer has a template")
    prompt_text: str = option("{question}", "what is said; {question} stands for the problem")
    system: str | None = option(None, "system prompt")
    thinking: bool | None = option(None, "enable_thinking of the chat template")
    bos: bool | None = option(None, "prompts start with the BOS token; default: as template or tokenizer")
    data_dir: str | None = option(None, "folder of local data sets")
    bad_gold: str = option("refuse", "gold answers that do not verify against themselves: refuse, or drop and count")
    tolerance: float = option(1e-6, "relative, of numeric answers")
    time_limit: float = option(5.0, "seconds that judging a response may take")
    max_chars: int = option(200_000, "characters of a response; a longer one counts as a verifier error")
    memory_limit_mb: int = option(2048, "of a verifier process, MiB")
    num_workers: int = option(2, "verifier processes a benchmark")
    batch_size: int = option(64, "problems sampled at one time, all devices together")
    samples_at_once: int | None = option(
        None, "samples of a problem drawn at one time, where memory is short; default: k"
    )
    texts: int = option(1, "responses a problem that are kept as text in outcomes.jsonl")
    compute_dtype: str = option("float32", "weights, activations and matrix products: float32 or bfloat16")
    scan_layers: bool = option(False, "compile one layer and loop (large models)")
    attention_block_size: int = option(0, "queries whose attention scores exist at one time; 0: all")
    mesh_data: int = option(-1, "devices in data parallel; -1: all that are left")
    mesh_fsdp: int = option(1, "devices over which parameters are sharded")
    mesh_tensor: int = option(1, "devices over which heads, MLP and vocabulary are sharded")

    def __post_init__(self):
        specs = self.specs
        require(specs and all(specs), "--tasks is required, for example --tasks=arithmetic,word_problems")
        require(len(set(specs)) == len(specs), f"--tasks={self.tasks} names a benchmark twice")
        for name in (
            "num_problems",
            "k",
            "max_length",
            "max_prompt_length",
            "batch_size",
            "samples_at_once",
            "num_workers",
        ):
            value = getattr(self, name)
            require(value is None or value >= 1, f"--{name} must be at least 1, got {value}")
        for name in ("temperature", "top_k", "seed", "texts", "attention_block_size"):
            require(getattr(self, name) >= 0, f"--{name} must be at least 0, got {getattr(self, name)}")
        require(0 < self.top_p <= 1, f"--top_p must be above 0 and at most 1, got {self.top_p}")
        templates = ("auto", "chat", "plain")
        require(self.template in templates, f"--template={self.template} is unknown; one of {', '.join(templates)}")
        dtypes = ("float32", "bfloat16")
        require(
            self.compute_dtype in dtypes, f"--compute_dtype={self.compute_dtype} is unknown; one of {', '.join(dtypes)}"
        )
        require("{question}" in self.prompt_text, "--prompt_text must contain {question}")
        require(
            self.data_dir is None or pathlib.Path(self.data_dir).is_dir(), f"--data_dir={self.data_dir} is not a folder"
        )
        with flag_names():
            self.verifier_config()

    @property
    def specs(self) -> list[str]:
        return [spec.strip() for spec in (self.tasks or "").split(",")]

    def verifier_config(self) -> VerifierConfig:
        return VerifierConfig(**{f.name: getattr(self, f.name) for f in dataclasses.fields(VerifierConfig)})

    def identity(self) -> dict:
        """What the outcomes depend on besides model, problems, code and rounding."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in _NOT_IDENTITY}

    def model_config(self, path) -> ModelConfig:
        return ModelConfig(
            path=str(path),
            param_dtype=self.compute_dtype,
            compute_dtype=self.compute_dtype,
            scan_layers=self.scan_layers,
            attention_block_size=self.attention_block_size,
        )


# Fields that change how fast it goes, or what is kept besides the scores.
_NOT_IDENTITY = {
    "tasks", "model", "checkpoint", "num_problems", "max_length", "max_prompt_length", "data_dir", "num_workers", "batch_size",
    "samples_at_once", "texts", "scan_layers", "attention_block_size", "mesh_data", "mesh_fsdp", "mesh_tensor",
}  # fmt: skip

_FLAG_OF = {
    "task.prompt.text": "--prompt_text",
    "task.prompt.max_length": "--max_prompt_length",
    "task.prompt.": "--",
    "task.verifier.": "--",
    "task.max_response_length": "--max_length",
    "task.data_dir": "--data_dir",
    "task.test": "--tasks",
    "--config.mesh.data/fsdp/tensor": "--mesh_data, --mesh_fsdp, --mesh_tensor",
    "--workdir": "--output",
}


def in_flags(text: str) -> str:
    """A text about a run's configuration, in terms of the flags of an evaluation."""
    for field, flag in _FLAG_OF.items():
        text = text.replace(field, flag)
    return text


@contextlib.contextmanager
def flag_names():
    """Inside, complaints about fields of a run's configuration name the flags of an evaluation."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise UsageError(in_flags(str(error))) from error
