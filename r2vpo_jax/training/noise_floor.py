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
    at_once = config.sampler.batch_size or config.trainer.prompts_per_rollout
    return min(whole * math.ceil(at_once / whole), config.trainer.prompts_per_rollout)


def limit(config: Config) -> float:
    """The largest floor that is accepted: 1e-6, or a quarter of the budget for bfloat16."""
    if config.trainer.max_noise_floor is not None:
        return config.trainer.max_noise_floor
    return config.objective.variance_budget / 4 if config.model.compute_dtype == "bfloat16" else 1e-6


def check(floor: float, config: Config) -> None:
    """Refuse a noisy set-up.

    Raises:
      UsageError: the floor is above the limit, or NaN.
    """
    if not floor <= limit(config):
        raise UsageError(
            f"with unchanged weights the ratio's second moment is {floor:.2e}, above {limit(config):.0e}: the "
            "constraint would act on numerical noise. Use model.compute_dtype=float32, or a larger "
            "objective.variance_budget, or raise trainer.max_noise_floor knowingly, in a new --workdir"
        )
