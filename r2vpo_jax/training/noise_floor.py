"""The ratio between scoring and sampling with the same weights: it should be 1.

If it is not, the constraint would act on noise, and the run is refused.
"""

import math
from collections.abc import Callable

import numpy as np

from r2vpo_jax import sharding
from r2vpo_jax.config import Config
from r2vpo_jax.config.run import FLOAT32_SWITCHES
from r2vpo_jax.errors import UsageError
from r2vpo_jax.models.attention import KERNELS
from r2vpo_jax.rollout import Rollout
from r2vpo_jax.training.collector import Collector
from r2vpo_jax.training.learner import Learner
from r2vpo_jax.training.update import LearnerState


def measure(logp: np.ndarray, rollout: Rollout) -> tuple[float, float]:
    """(E[(r-1)^2], largest |log r|) of log-probabilities [B, T] by the weights that sampled the rollout."""
    log_ratio = np.where(rollout.response_mask, logp - rollout.behavior_logp, 0.0)
    return float((np.expm1(log_ratio) ** 2).sum() / rollout.response_mask.sum()), float(np.abs(log_ratio).max())


def _of_all(logp: np.ndarray, rollout: Rollout, exchange) -> tuple[float, float]:
    """`measure` over the rows of all processes."""
    said = exchange([*measure(logp, rollout), int(rollout.response_mask.sum())])
    floors, largest, tokens = zip(*said, strict=True)
    floor = floors[0] if len(floors) == 1 else float(np.average(floors, weights=tokens))
    return floor, float(np.max(largest))


def sampled_and_scored(
    config: Config, state: LearnerState, iteration: int, learner: Learner, collector: Collector, weights
) -> tuple[np.ndarray, Rollout]:
    """(log-probabilities, rollout) as `check` takes them: responses to the first problems of the train split.

    Args:
      config: the run's.
      state: whose weights sample and score.
      iteration: whose key they are sampled with.
      learner, collector, weights: of a run, or made for another way to compute its model.
    """
    params = weights.for_rollouts(state, iteration)
    index = collector.problem_index(0)[: num_prompts(config)]
    version = int(sharding.to_host(state.version))
    rollout = collector.sample(params, index, iteration=iteration, version=version)
    collector.statistics()  # no part of the next row
    rows = collector.learner_rows_of(len(index))
    return rows.fetch(learner.score(state.params, rows.put(rollout))), rollout


def num_prompts(config: Config) -> int:
    """Prompts that it is measured on: those of one call of the sampler, filled up to whole micro-batches."""
    group = config.sampler.group_size
    whole = math.lcm(group, config.trainer.micro_batch_size) // group
    return min(whole * math.ceil(config.prompts_at_once / whole), config.trainer.prompts_per_rollout)


# Switches of `model` that may lower the floor of 16 bits, by presumed cost, the cheapest first (docs/performance.md).
_REMEDIES = (
    ("float32_residual",),
    ("float32_scores",),
    ("float32_residual", "float32_scores"),
    FLOAT32_SWITCHES,
)

_OF_AN_ENGINE = (
    "The engine at {url} computes otherwise than the learner: start it in the learner's precision (--dtype float32), and have it "
    "give log-probabilities of what it samples from (vLLM: --logprobs-mode processed_logprobs; SGLang: without "
    "SGLANG_RETURN_ORIGINAL_LOGPROB). Or correct what is left (objective.correction, docs/engines.md)"
)


def check(
    logp: np.ndarray,
    rollout: Rollout,
    config: Config,
    *,
    first: bool,
    say,
    event,
    again: Callable[[dict[str, bool]], tuple[np.ndarray, Rollout]],
    exchange: Callable[[list], list[list]] = lambda value: [value],
) -> float:
    """The floor; a noisy set-up is refused at the start of a run, and warned of when one is continued.

    Args:
      logp: f32 [B, T] by the weights that sampled the rollout.
      rollout: B responses.
      config: trainer.max_noise_floor is the limit.
      first: whether the run starts.
      say: where lines for people go.
      event: (name, **details), for events.jsonl.
      again: from fields of config.model to a `logp` and a rollout of the model computed so: asked before a refusal.
      exchange: from what is said here to what is said for each part of the rows, where these are only a part (`rows.Rows`).

    Raises:
      UsageError: at the start, the floor is above the limit, or NaN.
    """
    floor, largest = _of_all(logp, rollout, exchange)
    limit = config.trainer.max_noise_floor
    say(
        f"noise floor: E[(r-1)^2] = {floor:.2e}, largest |log r| = {largest:.2e}; the limit of E[(r-1)^2] is {limit:.0e}"
    )
    if floor <= limit:
        return floor
    if first:
        raise UsageError(_refusal(floor, limit, _remedy(config, again, say, exchange)))
    say("warning: the noise floor has risen above its limit since the run was started")
    event("noise_floor", floor=floor, limit=limit)
    return floor


def refuse_if_noisy(floor: float, limit: float) -> None:
    """Raises UsageError where the floor is above its limit, or NaN."""
    if not floor <= limit:
        raise UsageError(_refusal(floor, limit, "Use model.compute_dtype=float32"))


def _refusal(floor: float, limit: float, remedy: str) -> str:
    return (
        f"with unchanged weights the ratio variance is {floor:.2e}, above {limit:.0e}: the constraint would act on "
        f"numerical noise. {remedy}, or a larger objective.dual.budget, or raise trainer.max_noise_floor knowingly, in a "
        "new --workdir"
    )


def _remedy(config: Config, again, say, exchange) -> str:
    """What to change of the model: the cheapest switches under which the floor is within its limit, as measured."""
    model, measured = config.model, []
    if config.sampler.engine == "endpoint":
        return _OF_AN_ENGINE.format(url=config.sampler.endpoint.url)
    if model.compute_dtype == "float32":
        return "Use model.compute_dtype=float32"
    missing = [tuple(name for name in names if not getattr(model, name)) for names in _REMEDIES]
    for names in dict.fromkeys(filter(None, missing)):
        if "float32_scores" in names and model.attention in KERNELS:
            continue
        say(f"noise floor: measuring it with {' and '.join(names)}")
        floor, _ = _of_all(*again(dict.fromkeys(names, True)), exchange)
        measured.append((names, floor))
        if floor <= config.trainer.max_noise_floor:
            break
    floors = ", ".join(f"{floor:.2e} with {' and '.join(names)}" for names, floor in measured)
    if measured and measured[-1][1] <= config.trainer.max_noise_floor:
        flags = " ".join(f"--config.model.{name}=True" for name in measured[-1][0])
        return f"Measured here: {floors}. Use {flags}"
    return f"{f'No switch is enough (measured here: {floors}). ' if measured else ''}Use model.compute_dtype=float32"
