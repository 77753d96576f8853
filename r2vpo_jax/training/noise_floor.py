"""The ratio between scoring and sampling with the same weights: it should be 1.

If it is not, the constraint would act on noise, and the run is refused.
"""

import math

import numpy as np

from r2vpo_jax.config import Config
from r2vpo_jax.errors import UsageError
from r2vpo_jax.rollout import Rollout


def measure(logp: np.ndarray, rollout: Rollout) -> tuple[float, float]:
    """(E[(r-1)^2], largest |log r|) of log-probabilities [B, T] by the weights that sampled the rollout."""
    log_ratio = np.where(rollout.response_mask, logp - rollout.behavior_logp, 0.0)
    return float((np.expm1(log_ratio) ** 2).sum() / rollout.response_mask.sum()), float(np.abs(log_ratio).max())


def num_prompts(config: Config) -> int:
    """Prompts that it is measured on: those of one call of the sampler, filled up to whole micro-batches."""
    group = config.sampler.group_size
    whole = math.lcm(group, config.trainer.micro_batch_size) // group
    return min(whole * math.ceil(config.prompts_at_once / whole), config.trainer.prompts_per_rollout)


def check(logp: np.ndarray, rollout: Rollout, config: Config, *, first: bool, say, event) -> float:
    """The floor; a noisy set-up is refused at the start of a run, and warned of when one is continued.

    Args:
      logp: f32 [B, T] by the weights that sampled the rollout.
      rollout: B responses.
      config: trainer.max_noise_floor is the limit.
      first: whether the run starts.
      say: where lines for people go.
      event: (name, **details), for events.jsonl.

    Raises:
      UsageError: at the start, the floor is above the limit, or NaN.
    """
    floor, largest = measure(logp, rollout)
    limit = config.trainer.max_noise_floor
    say(
        f"noise floor: E[(r-1)^2] = {floor:.2e}, largest |log r| = {largest:.2e}; the limit of E[(r-1)^2] is {limit:.0e}"
    )
    if floor <= limit:
        return floor
    if first:
        refuse_if_noisy(floor, limit)
    say("warning: the noise floor has risen above its limit since the run was started")
    event("noise_floor", floor=floor, limit=limit)
    return floor


def refuse_if_noisy(floor: float, limit: float) -> None:
    """Raises UsageError where the floor is above its limit, or NaN."""
    if not floor <= limit:
        raise UsageError(
            f"with unchanged weights the ratio variance is {floor:.2e}, above {limit:.0e}: the constraint would act on "
            "numerical noise. Use model.compute_dtype=float32, or a larger objective.dual.budget, or raise "
            "trainer.max_noise_floor knowingly, in a new --workdir"
        )
