"""A run's configuration: frozen dataclasses with plain values, checked when they are made."""

import collections
import dataclasses

from r2vpo_jax.config import grid, presets
from r2vpo_jax.config.fields import (
    Options,
    build,
    option,
    require,
    require_integers,
    require_range,
    section,
)
from r2vpo_jax.config.lora import LoraConfig
from r2vpo_jax.config.objective import ObjectiveConfig
from r2vpo_jax.config.sampling import SamplerConfig, ScoreSamplingConfig
from r2vpo_jax.config.task import TASKS, TaskConfig

ATTENTION = ("auto", "einsum", "blockwise", "cudnn", "splash")
TRACKERS = ("tensorboard", "wandb", "trackio")
FLOAT32_SWITCHES = ("float32_residual", "float32_scores", "float32_logits")  # of model, where it computes in 16 bits
HOW_TO_COMPUTE = (  # what an evaluation takes over
    *("compute_dtype", *FLOAT32_SWITCHES, "scan_layers", "attention", "attention_block_size"),
)


def make_objective(name: str = presets.DEFAULT, **given) -> ObjectiveConfig:
    """The objective of a preset, with `section={field: value}` on top: make_objective("grpo", kl={"coef": 0.1}).

    Raises:
      ValueError: what is unknown, out of range, or does not go together.
    """
    return build(ObjectiveConfig, presets.resolve({"name": name, **given}), "objective.")


@dataclasses.dataclass(frozen=True)
class TrainerConfig:
    """The loop."""

    num_iterations: int = option(100, "iterations, with one rollout batch each")
    prompts_per_rollout: int = option(64, "problems per rollout batch")
    num_minibatches: int = option(8, "optimizer updates per epoch over a rollout batch")
    num_epochs: int = option(1, "epochs over a rollout batch")
    micro_batch_size: int = option(
        32, "responses, or packs of them, whose activations exist at one time, all devices together"
    )
    packing: bool = option(
        False, "cut responses to their tokens and pack them, for updates and scoring: same result, less work"
    )
    scoring_chunk_size: int = option(128, "response columns whose logits exist at one time")
    eval_every: int = option(10, "iterations between validations")
    eval_problems: int = option(256, "validation problems, a fixed sample of a larger split")
    eval_samples: int = option(4, "samples per validation problem")
    test_problems: int = option(
        512, "test problems, for the base score and the final score; a fixed sample of a larger split"
    )
    test_samples: int = option(16, "samples per test problem: pass@1 from the first 8, pass@k from all")
    checkpoint_every: int = option(
        20, "iterations between checkpoints; a validation that is the best so far saves one too"
    )
    max_checkpoints: int = option(2, "checkpoints kept, besides the one with the best validation score of its own")
    samples_per_iteration: int = option(2, "responses written to samples.jsonl per iteration")
    report_every: int = option(
        10,
        "iterations between samples that say what was done to each token, and between writings of report/report.html, which "
        "is also written once it is two minutes old; the first iteration has both (0 = only the page at the end)",
    )
    max_nonfinite_updates: int = option(0, "updates in a row with NaN or inf that are skipped before the run stops")
    max_noise_floor: float = option(
        1e-6, "start-up limit on E[(r-1)^2] with unchanged weights (bfloat16: budget / 4)", derived=True
    )
    allow_single_update: bool = option(False, "allow one update per rollout, where r = 1 and all objectives agree")
    trackers: tuple[str, ...] = option(
        (), f"where metrics, scores and samples go besides the run directory's files: {', '.join(TRACKERS)}"
    )
    tracker_project: str | None = option(
        None,
        "project of wandb and trackio (default: for wandb WANDB_PROJECT, else r2vpo_jax)",
        when=lambda s: bool(set(s.trackers) - {"tensorboard"}),
    )

    def __post_init__(self):
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            if item.type is int and item.name != "max_nonfinite_updates":
                low = 0 if item.name in ("samples_per_iteration", "report_every") else 1
                require(value >= low, f"trainer.{item.name} must be at least {low}, got {value}")
        named = (self.trackers,) if isinstance(self.trackers, str) else self.trackers
        trackers = [name.strip() for text in named for name in str(text).split(",") if name.strip()]
        for name in trackers:
            require(name in TRACKERS, f"trainer.trackers={name!r} is unknown; any of {', '.join(TRACKERS)}")
        object.__setattr__(self, "trackers", tuple(dict.fromkeys(trackers)))
        require_range("trainer", self, "max_noise_floor", "> 0")
        require(self.max_nonfinite_updates >= 0, "trainer.max_nonfinite_updates must be at least 0")
        require(
            self.prompts_per_rollout % self.num_minibatches == 0,
            f"trainer.prompts_per_rollout={self.prompts_per_rollout} is not a multiple of "
            f"trainer.num_minibatches={self.num_minibatches} (groups are not torn)",
        )

    @property
    def updates_per_rollout(self) -> int:
        return self.num_minibatches * self.num_epochs

    @property
    def looks_at_tokens(self) -> bool:
        """Whether some samples say what was done to each of their tokens."""
        return self.report_every > 0 and self.samples_per_iteration > 0


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with warm-up and decay."""

    learning_rate: float = option(1e-4, "peak learning rate")
    warmup_updates: int = option(10, "updates of linear warm-up")
    schedule: str = option("constant", "after the warm-up: constant, linear or cosine")
    final_fraction: float = option(0.1, "last learning rate / peak, for linear and cosine")
    b1: float = option(0.9, "Adam: decay of the first moment")
    b2: float = option(0.99, "Adam: decay of the second moment")
    epsilon: float = option(1e-8, "Adam: added to the root of the second moment")
    weight_decay: float = option(0.0, "decoupled weight decay, on matrices only")
    max_grad_norm: float = option(1.0, "global-norm clip")
    value_learning_rate: float = option(1e-2, "constant learning rate of the value head, which starts at zero")

    def __post_init__(self):
        require(self.learning_rate > 0, f"optimizer.learning_rate must be > 0, got {self.learning_rate}")
        require(self.warmup_updates >= 0, f"optimizer.warmup_updates must be >= 0, got {self.warmup_updates}")
        require(
            self.schedule in ("constant", "linear", "cosine"),
            f"optimizer.schedule={self.schedule!r} is unknown; one of constant, linear, cosine",
        )
        require(
            0 <= self.final_fraction <= 1,
            f"optimizer.final_fraction must be in [0, 1], got {self.final_fraction}",
        )
        require(
            self.value_learning_rate > 0, f"optimizer.value_learning_rate must be > 0, got {self.value_learning_rate}"
        )
        require(self.max_grad_norm > 0, f"optimizer.max_grad_norm must be > 0, got {self.max_grad_norm}")


@dataclasses.dataclass(frozen=True)
class ReplayConfig:
    """Stale data. With lag 0, capacity 0 and one batch an iteration, each rollout batch is trained on once."""

    lag: int = option(0, "iterations between generating a batch and training on it")
    capacity: int = option(0, "rollout batches kept for replay, besides those that the lag holds back (0 = no replay)")
    capacity_bytes: int | None = option(None, "limit on the bytes of all batches kept (default: none)")
    draw: str = option("newest", "newest, uniform, mixed or priority (by |A|)")
    stale_fraction: float = option(0.5, "share of older groups in a training batch", when=lambda s: s.draw == "mixed")
    batches_per_iteration: int = option(1, "training batches drawn for each rollout batch generated")
    max_age: int | None = option(None, "optimizer updates after which an older group is not drawn (default: no limit)")
    max_uses: int | None = option(None, "times that a group may be drawn (default: no limit)")
    overlap: bool = option(False, "sample and verify while learning, with a lag: the same numbers, sooner")
    wait_limit: float = option(
        3600.0, "seconds that learning waits for responses, before the run ends", when=lambda s: s.overlap
    )

    def __post_init__(self):
        for name in ("lag", "capacity"):
            require(getattr(self, name) >= 0, f"replay.{name} must be at least 0, got {getattr(self, name)}")
        require_range("replay", self, "wait_limit", "> 0")
        for name in ("capacity_bytes", "batches_per_iteration", "max_age", "max_uses"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"replay.{name} must be at least 1, got {value}")
        draws = ("newest", "uniform", "mixed", "priority")
        require(self.draw in draws, f"replay.draw={self.draw!r} is unknown; one of {', '.join(draws)}")
        require(0 <= self.stale_fraction <= 1, f"replay.stale_fraction must be in [0, 1], got {self.stale_fraction}")
        require(
            self.draw == "newest" or self.capacity > 1,
            f"replay.draw={self.draw} needs older batches: set replay.capacity to at least 2",
        )
        require(
            self.lag > 0 or not self.overlap,
            "replay.overlap needs replay.lag of at least 1: with a lag of 0 a batch is learned from before the next is sampled",
        )
        require(
            self.capacity_bytes is None or not self.overlap,
            "replay.capacity_bytes does not go together with replay.overlap: how large a batch is is known once it is "
            "sampled, and learning goes on before; set replay.capacity",
        )

    @property
    def enabled(self) -> bool:
        """Whether batches go through the buffer at all."""
        return self.capacity > 0 or self.stale

    @property
    def slots(self) -> int:
        """Rollout batches kept at most: those that the lag holds back, and those that are drawn from."""
        return self.lag + max(self.capacity, 1)

    @property
    def stale(self) -> bool:
        """Whether the first update on a batch may find r != 1."""
        return self.lag > 0 or self.draw != "newest" or self.batches_per_iteration > 1


@dataclasses.dataclass(frozen=True)
class AlarmConfig:
    """Signs of a collapse. An alarm is said and written to events.jsonl once its sign has lasted."""

    patience: int = option(10, "iterations that a sign must last")
    stop: bool = option(False, "an alarm also ends the run, after a checkpoint")
    min_entropy: float = option(1e-3, "policy/entropy below this, nats per token")
    min_effective_sample_size: float = option(0.3, "ratio/effective_sample_size below this")
    max_ratio_variance: float = option(10.0, "ratio/variance above this")
    max_truncated: float = option(0.5, "response/truncated above this")
    max_zero_variance_groups: float = option(0.9, "reward/zero_variance_groups above this")
    min_judged: float = option(0.5, "outcome/judged below this; a run whose responses all have no verdict ends then")

    def __post_init__(self):
        require(self.patience >= 1, f"alarms.patience must be at least 1, got {self.patience}")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis; one may be -1: all that is left."""

    data: int = option(-1, "data parallel")
    fsdp: int = option(1, "parameters sharded, batch too")
    tensor: int = option(1, "heads, MLP and vocabulary sharded")


@dataclasses.dataclass(frozen=True)
class RunMeshConfig(MeshConfig):
    """The same for a run, which may sample on devices of their own: data, fsdp and tensor are of those that learn."""

    sampler_devices: int = option(
        0, "devices that only sample, as many of each process, while the others only learn (0 = all do both)"
    )
    sampler_tensor: int = option(
        1,
        "heads, MLP and vocabulary sharded where they sample; the rest is data parallel",
        when=lambda s: s.sampler_devices > 0,
    )

    def __post_init__(self):
        require_range("mesh", self, "sampler_devices", ">= 0")
        require_range("mesh", self, "sampler_tensor", ">= 1")
        require(
            self.sampler_devices % self.sampler_tensor == 0 or not self.sampler_devices,
            f"mesh.sampler_devices={self.sampler_devices} is not a multiple of mesh.sampler_tensor={self.sampler_tensor}",
        )


def _in_16_bits(model) -> bool:
    return model.compute_dtype != "float32"


@dataclasses.dataclass(frozen=True)
class ComputeConfig:
    """Which model, and how its forward pass is computed."""

    path: str = option(
        "arithmetic_base",
        "Hugging Face directory, its name on the Hub (hf://OWNER/NAME@REVISION), or a shipped model, such as arithmetic_base or "
        "word_problems_base",
    )
    compute_dtype: str = option("float32", "dtype of activations and matrix products: float32 or bfloat16")
    float32_residual: bool = option(
        False, "keep the sums over layers in float32: sampling and scoring agree better", when=_in_16_bits
    )
    float32_scores: bool = option(
        False, "do not round the weights of attention to 16 bits: likewise; without cudnn and splash", when=_in_16_bits
    )
    float32_logits: bool = option(
        False, "do not round the last hidden states to 16 bits: likewise; unembeds twice", when=_in_16_bits
    )
    scan_layers: bool = option(False, "compile one layer and loop (large models); False is faster on CPU")
    attention: str = option(
        "auto",
        "over whole rows: einsum (all scores at once), blockwise, cudnn (NVIDIA GPUs, 16 bits), splash (TPUs, bfloat16), or "
        "auto: the device's kernel where it can compute the model, else by the length",
    )
    attention_block_size: int = option(
        0,
        "queries whose scores exist at one time, blockwise, on rows that are longer (0 = 512; auto: on rows above 1,024)",
    )

    def __post_init__(self):
        dtypes = ("float32", "bfloat16")
        require(self.compute_dtype in dtypes, f"model.compute_dtype={self.compute_dtype!r}; one of {', '.join(dtypes)}")
        require(self.attention in ATTENTION, f"model.attention={self.attention!r}; one of {', '.join(ATTENTION)}")
        require(self.attention_block_size >= 0, "model.attention_block_size must be at least 0")


@dataclasses.dataclass(frozen=True)
class ModelConfig(ComputeConfig):
    """The base model and how to compute it."""

    param_dtype: str = option("float32", "dtype of the master weights: float32 or bfloat16")
    matmul_precision: str = option(
        "highest",
        "float32 matrix products on GPUs and TPUs: highest (float32), high (three passes) or default (TF32, bfloat16)",
    )
    remat: bool = option(False, "recompute activations in the backward pass")
    export_dtype: str = option(
        "stored",
        "dtype of the weights in hf/: float32, bfloat16 or float16; stored: the base model's, to which small updates round away",
    )
    # Without adapters a configuration is what it was before there were any: --config.model.lora.rank brings them.
    lora: LoraConfig = section(LoraConfig, when=lambda s: s.lora.rank > 0)

    def __post_init__(self):
        super().__post_init__()
        dtypes = ("float32", "bfloat16")
        require(self.param_dtype in dtypes, f"model.param_dtype={self.param_dtype!r}; one of {', '.join(dtypes)}")
        precisions = ("highest", "high", "default")
        require(
            self.matmul_precision in precisions,
            f"model.matmul_precision={self.matmul_precision!r}; one of {', '.join(precisions)}",
        )
        exports = ("stored", "float32", "bfloat16", "float16")
        require(self.export_dtype in exports, f"model.export_dtype={self.export_dtype!r}; one of {', '.join(exports)}")


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything a run depends on, besides the code and the devices."""

    objective: ObjectiveConfig = section(make_objective)
    trainer: TrainerConfig = section(TrainerConfig)
    sampler: SamplerConfig = section(SamplerConfig)
    optimizer: OptimizerConfig = section(OptimizerConfig)
    replay: ReplayConfig = section(ReplayConfig)
    alarms: AlarmConfig = section(AlarmConfig)
    mesh: RunMeshConfig = section(RunMeshConfig)
    evaluation: ScoreSamplingConfig = section(ScoreSamplingConfig)
    task: TaskConfig = section(TaskConfig)
    model: ModelConfig = section(ModelConfig)
    seed: int = option(0, "decides the order of problems, the samples and the minibatches (weights are given)")

    def __post_init__(self):
        rows = self.trainer.prompts_per_rollout * self.sampler.group_size // self.trainer.num_minibatches
        require(
            rows % self.trainer.micro_batch_size == 0,
            f"a minibatch has {rows} rows (prompts_per_rollout * group_size / num_minibatches), which is not a "
            f"multiple of trainer.micro_batch_size={self.trainer.micro_batch_size}",
        )
        require(
            not self.sampler.stop or self.task.name == "text",
            f"sampler.stop is for task.name=text: task {self.task.name} says itself where its responses end",
        )
        require(self.seed >= 0, f"seed must be >= 0, got {self.seed}")
        require(
            self.sampler.engine == "own" or not self.mesh.sampler_devices,
            f"with sampler.engine={self.sampler.engine} no device here samples rollouts: leave mesh.sampler_devices out",
        )
        require(
            not self.objective.advantage.by_function
            or self.task.name not in TASKS  # one's own: its first verdicts tell
            or (self.task.name == "text" and self.task.reward.num_parts > 1),
            f"objective.advantage.estimator={self.objective.advantage.estimator} normalizes each part of a reward by itself, "
            f"and the reward of task.name={self.task.name} has one part only",
        )
        require(
            self.replay.lag < self.trainer.num_iterations,
            f"with replay.lag={self.replay.lag} and trainer.num_iterations={self.trainer.num_iterations} the queue "
            "would fill and nothing be trained",
        )
        age = self.replay.lag * self.replay.batches_per_iteration * self.trainer.updates_per_rollout
        require(
            not self.replay.overlap or self.replay.max_age is None or age <= self.replay.max_age,
            f"with replay.lag={self.replay.lag} and replay.overlap a batch is {age} updates old when it is learned from, "
            f"which is more than replay.max_age={self.replay.max_age}",
        )
        require(
            not (self.replay.overlap and self.objective.critic),
            f"objective.advantage.estimator={self.objective.advantage.estimator} has a critic, which values responses "
            "before the updates that replay.overlap makes meanwhile; switch one of them off",
        )
        require(
            self.trainer.updates_per_rollout > 1 or self.trainer.allow_single_update or self.stale,
            "with one update a rollout on fresh data the ratio is 1 throughout and every objective is the same; raise "
            "trainer.num_minibatches or trainer.num_epochs, set replay.lag, or say "
            "--config.trainer.allow_single_update=True",
        )

    @property
    def prompts_at_once(self) -> int:
        """Prompts whose groups are sampled at one time."""
        return min(self.sampler.batch_size // self.sampler.group_size, self.trainer.prompts_per_rollout)

    @property
    def stale(self) -> bool:
        """Whether the first update on a batch may find r != 1: by replay, or since an engine has older weights."""
        return self.replay.stale or (self.sampler.engine == "endpoint" and self.sampler.endpoint.publish_every > 1)

    @property
    def num_updates(self) -> int:
        """Optimizer updates of the whole run."""
        trained = max(self.trainer.num_iterations - self.replay.lag, 0) * self.replay.batches_per_iteration
        return trained * self.trainer.updates_per_rollout


@dataclasses.dataclass(frozen=True)
class SweepConfig:
    """A grid of cells (config/grid.py), each run with every seed."""

    cells: tuple[Options, ...] = option(
        (Options(),), "what each cell sets, {path of a field: value}; from grid.values(…)"
    )
    seeds: tuple[int, ...] = option((0, 1, 2), "seeds, paired over all cells")

    def __post_init__(self):
        cells = grid.from_text(self.cells) if isinstance(self.cells, str) else self.cells
        object.__setattr__(self, "cells", tuple(Options(cell) for cell in cells))
        object.__setattr__(self, "seeds", tuple(self.seeds))
        require(self.cells, "sweep.cells must have at least one cell; ({},) is the base alone")
        require(self.seeds, "sweep.seeds must name at least one seed")
        require_integers("sweep", self, "seeds", ">= 0")
        require(len(set(self.seeds)) == len(self.seeds), f"sweep.seeds has a value twice: {self.seeds}")
        counts = collections.Counter(grid.to_text([cell]) for cell in self.cells)
        for text, count in counts.items():
            require(count == 1, f"sweep.cells has a cell twice: {text[1:-1]}")
        require(
            not any("seed" in cell for cell in self.cells),
            "sweep.cells sets seed; seeds are named once, in sweep.seeds",
        )
