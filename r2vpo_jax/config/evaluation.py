"""The configuration of an evaluation: what only an evaluation has, and the sections that it shares with a run."""

import dataclasses
import json
import urllib.parse
from typing import Any

from r2vpo_jax import storage
from r2vpo_jax.config.fields import Options, build, option, require, section
from r2vpo_jax.config.flags import to_dict, to_open_config_dict
from r2vpo_jax.config.lora import LoraConfig
from r2vpo_jax.config.run import (
    HOW_TO_COMPUTE,
    ComputeConfig,
    MeshConfig,
    ModelConfig,
)
from r2vpo_jax.config.sampling import ScoreSamplingConfig, StopConfig
from r2vpo_jax.config.task import (
    ArithmeticConfig,
    DataConfig,
    PromptConfig,
    RewardConfig,
    TaskConfig,
    TextConfig,
    VerifierConfig,
    is_task,
)


@dataclasses.dataclass(frozen=True)
class DataTaskConfig:
    """How the problems of data sets are put to the model and judged."""

    text: DataConfig = section(DataConfig)
    prompt: PromptConfig = section(PromptConfig)
    verifier: VerifierConfig = section(VerifierConfig)
    # Correctness alone decides, except in a run whose own reward gives it no weight.
    reward: RewardConfig = section(RewardConfig, when=lambda s: not s.reward.correct)


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """Everything that the scores of an evaluation depend on, besides the weights, the code and the devices.

    The first fields are flags of experiments/evaluate.py; the sections have the names and flags of a run's.
    """

    tasks: tuple[str, ...] = option((), "benchmarks: arithmetic, data sets as in docs/data.md, or module:Class")
    checkpoint: str | None = option(
        None, "checkpoint of a run: an iteration, last or best (default: its hf/ if it has finished, else last)"
    )
    num_problems: int | None = option(
        None, "problems per benchmark, a fixed sample of a larger one (default: all; 256 of an endless source)"
    )
    k: int = option(16, "samples per problem")
    greedy: bool = option(True, "also draw one sample per problem at temperature 0")
    seed: int = option(0, "seed of the samples")
    texts: int = option(1, "responses per problem whose text is kept in outcomes.jsonl")
    model: ComputeConfig = section(ComputeConfig)
    mesh: MeshConfig = section(MeshConfig)
    evaluation: ScoreSamplingConfig = section(ScoreSamplingConfig)
    sampler: StopConfig = section(StopConfig, when=lambda s: s.has_data)
    task: DataTaskConfig = section(DataTaskConfig, when=lambda s: s.has_data)

    def __post_init__(self):
        require(self.tasks and all(self.tasks), "--tasks is required, for example --tasks=arithmetic,word_problems")
        require(len(set(self.tasks)) == len(self.tasks), f"--tasks={','.join(self.tasks)} names a benchmark twice")
        for name, low in {"num_problems": 1, "k": 1, "seed": 0, "texts": 0}.items():
            value = getattr(self, name)
            require(value is None or value >= low, f"--{name} must be at least {low}, got {value}")
        folder = self.task.text.data_dir
        there = not self.has_data or folder is None or storage.path(folder, "task.text.data_dir").is_dir()
        require(there, f"task.text.data_dir={folder} is not a folder")

    @property
    def has_data(self) -> bool:
        """Whether a benchmark is a data set."""
        return any(kind_of(spec) == "text" for spec in self.tasks)

    @property
    def problems_at_once(self) -> int:
        """Problems that are sampled at one time, k samples each or as many as there is room for."""
        return max(1, self.evaluation.batch_size // self.k)

    def model_config(self, path, lora: LoraConfig = LoraConfig()) -> ModelConfig:  # noqa: B008 (frozen)
        """The model in directory `path`, held and computed in one dtype, and beside it adapters as in a run."""
        held = {"path": str(path), "param_dtype": self.model.compute_dtype, "lora": lora}
        return ModelConfig(**vars(self.model) | held)

    def task_config(self, spec: str) -> TaskConfig:
        """The task behind a name in --tasks: all that a run has of it, of which the test split is read.

        Raises:
          ValueError: an option that the task does not have.
        """
        kind = kind_of(spec)
        if kind == "text":
            shared = self.task
            text = TextConfig(**vars(shared.text), train=spec, validation=spec, test=spec)
            return TaskConfig(
                name="text", text=text, prompt=shared.prompt, verifier=shared.verifier, reward=shared.reward
            )
        options = _options(spec)
        if kind != "arithmetic":
            return TaskConfig(name=kind, options=Options(options))
        wrong = [f"{name}={value}" for name, value in options.items() if not isinstance(value, int)]
        require(not wrong, f"{spec}: {wrong[:1]} is not a whole number")
        try:
            return TaskConfig(arithmetic=build(ArithmeticConfig, options))
        except ValueError as error:
            raise ValueError(f"{spec}: {error}") from error


# Settings that say where data lie, how fast it goes, and what is kept besides the scores: they may change within one
# evaluation. All other settings are its identity.
NOT_IDENTITY = (
    "mesh", "evaluation.batch_size", "evaluation.segment_length", "model.scan_layers", "model.attention", "model.attention_block_size",
    "task.verifier.num_workers", "task.text.data_dir", "num_problems", "texts",
)  # fmt: skip


def identity(config: EvaluationConfig) -> dict[str, Any]:
    """What is in force, as nested values, without NOT_IDENTITY."""
    values = to_dict(config)
    for path in NOT_IDENTITY:
        *parents, name = path.split(".")
        node = values
        for parent in parents:
            node = node.get(parent, {})
        node.pop(name, None)
    return values


# Names in --tasks ------------------------------------------------------------------------------------------


def kind_of(spec: str) -> str:
    """`task.name` of a name in --tasks: a row of `TASKS`, module:Class, or text for all that data.load knows."""
    name = spec.partition("?")[0]
    return name if is_task(name) else "text"


def spec_of(task: TaskConfig) -> str:
    """The name in --tasks of the test problems of a run's task."""
    if task.name == "text":
        return task.text.test
    options = to_dict(task.arithmetic) if task.name == "arithmetic" else task.options
    query = "&".join(f"{name}={_quoted(value)}" for name, value in options.items())
    return f"{task.name}?{query}" if query else task.name


def _options(spec: str) -> dict[str, Any]:
    """The part after the question mark: numbers, booleans and so on are written as in JSON, all else is text."""
    query = spec.partition("?")[2]
    return {name: _value(text) for name, text in urllib.parse.parse_qsl(query, keep_blank_values=True)}


def _value(text: str):
    try:
        return json.loads(text)
    except ValueError:
        return text


def _quoted(value) -> str:
    text = value if isinstance(value, str) and _value(value) == value else json.dumps(value)
    return urllib.parse.quote(text, safe="/:")


# Flags -----------------------------------------------------------------------------------------------------


def flag_sections():
    """The ConfigDict behind --config: the shared sections, with every field open."""
    shared = to_open_config_dict(EvaluationConfig)
    for field in dataclasses.fields(EvaluationConfig):
        if field.name not in ("model", "mesh", "evaluation", "sampler", "task"):
            del shared[field.name]
    del shared.model.path, shared.task.reward
    return shared


# Flag -> the one that says it now.
RENAMED_FLAGS = {
    "config.model.path": "--model",
    "config.task.text.test": "--tasks",
    "max_length": "--config.task.text.max_response_length",
    "max_prompt_length": "--config.task.prompt.max_length",
    "prompt_text": "--config.task.prompt.text",
    "data_dir": "--config.task.text.data_dir",
    "batch_size": "--config.evaluation.batch_size, which counts responses",
    "samples_at_once": "--config.evaluation.batch_size, which counts responses",
    **{name: f"--config.evaluation.{name}" for name in ("temperature", "top_p", "top_k")},
    **{name: f"--config.task.prompt.{name}" for name in ("template", "system", "thinking", "bos")},
    **{field.name: f"--config.task.verifier.{field.name}" for field in dataclasses.fields(VerifierConfig)},
    **{name: f"--config.model.{name}" for name in HOW_TO_COMPUTE},
    **{f"mesh_{field.name}": f"--config.mesh.{field.name}" for field in dataclasses.fields(MeshConfig)},
}
