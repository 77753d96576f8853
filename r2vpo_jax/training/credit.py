"""From verdicts to what the learner is given: shaped rewards, advantages, and which rows take part.

    verdict ──(shaping)──▶ reward ──(- beta KL)──▶ token rewards ──▶ advantages, value targets

A response without a verdict abstains, unless errors count as wrong: its reward is NaN, it is in no baseline and
takes no part in learning. All functions are pure, and can be traced but for `chosen_groups`; arrays may be NumPy's.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from r2vpo_jax import advantages, kl, sharding
from r2vpo_jax.config.objective import ObjectiveConfig
from r2vpo_jax.rollout import Rollout
from r2vpo_jax.verifiers.outcome import unjudged


def overlong_penalty(
    length: Int[Array, " batch"], max_length: int, *, buffer: float, penalty: float
) -> Float[Array, " batch"]:
    """DAPO's soft punishment of long responses (arXiv 2503.14476, equation 13), as a positive number.

    0 up to (1 - buffer) max_length, then linear, `penalty` at max_length. The paper has a buffer of 4,096 of
    20,480 tokens and a penalty of 1.

    Args:
      length: response tokens.
      max_length: the longest response that can be sampled.
      buffer: share of max_length over which the penalty grows, in (0, 1].
      penalty: at max_length.
    """
    free = (1.0 - buffer) * max_length
    return penalty * jnp.clip((jnp.asarray(length, jnp.float32) - free) / (max_length - free), 0.0, 1.0)


def judged_reward(rollout: Rollout, objective: ObjectiveConfig) -> jax.Array:
    """The reward that the verifier gave, f32 [B].

    NaN where there is no verdict, unless `objective.groups.verifier_errors` counts that as wrong.
    """
    reward = jnp.asarray(rollout.reward, jnp.float32)
    if objective.groups.verifier_errors == "abstain":
        reward = jnp.where(unjudged(rollout.outcome), jnp.nan, reward)
    return reward


def learning_reward(rollout: Rollout, objective: ObjectiveConfig) -> jax.Array:
    """Rewards as they are learned from, f32 [B]: the verdicts less the penalty for length.

    Args:
      rollout: verified; its own `reward` stays what the verifier said.
      objective: verifier_errors, overlong_buffer and overlong_penalty are used.
    """
    reward = judged_reward(rollout, objective)
    if objective.has_overlong_penalty:
        reward = reward - overlong_penalty(
            rollout.response_length,
            rollout.response_size,
            buffer=objective.groups.overlong_buffer,
            penalty=objective.groups.overlong_penalty,
        )
    return reward


def assign(rollout: Rollout, objective: ObjectiveConfig, group_size: int, kl_coef=0.0) -> Rollout:
    """Advantages, value targets if there are values, and `keep`: what takes part in learning.

    Abstentions do not, nor dropped groups, nor masked truncated responses (which do count in the baseline).

    Args:
      rollout: verified; with reference_logp if the KL goes into the reward; with value if there is a critic.
      objective: the estimator and its constants.
      group_size: G.
      kl_coef: beta now, for a KL in the reward.
    """
    reward = learning_reward(rollout, objective)
    keep = ~jnp.isnan(reward)
    if objective.groups.truncated == "mask":
        keep = keep & ~rollout.truncated
    if objective.groups.zero_variance != "keep":
        keep = keep & jnp.repeat(groups_differ(rollout, objective, group_size), group_size)
    mask = jnp.asarray(rollout.response_mask)
    last = jnp.cumsum(mask[:, ::-1], axis=1)[:, ::-1] == 1
    token_rewards = jnp.where(last & mask, reward[:, None], 0.0)
    if objective.needs_reference and objective.kl.where == "reward":
        # The tokens are the sampling policy's own, so this estimates the KL of that policy to the reference.
        estimate = kl.estimate(rollout.behavior_logp, rollout.reference_logp, objective.kl.estimator)
        token_rewards = token_rewards - kl_coef * jnp.where(mask, estimate, 0.0)
    estimator = advantages.estimator(objective.advantage.estimator)
    options = {name: getattr(objective.advantage, name) for name in estimator.options}
    parts = rollout.reward_parts
    if parts is not None:
        parts = jnp.where(jnp.isnan(reward)[:, None], jnp.nan, parts)
    elif estimator.parts:
        raise ValueError(
            f"objective.advantage.estimator={objective.advantage.estimator} normalizes each part of a reward by itself, "
            "and this task's reward has one part only; take group_relative"
        )
    rewards = advantages.Rewards(token_rewards, mask, group_size, rollout.value, parts)
    result = estimator.function(rewards, **options)
    advantage, target = result if estimator.critic else (result, None)
    if advantage.shape not in (mask.shape, mask.shape[:1]):
        raise ValueError(
            f"objective.advantage.estimator={objective.advantage.estimator} gave advantages of shape {advantage.shape} for "
            f"{mask.shape[0]} responses of {mask.shape[1]} tokens; [B] or [B, T] is needed"
        )
    return rollout.replace(advantage=advantage, value_target=target, keep=keep, reward_parts=None)


_assign = jax.jit(assign, static_argnames=("objective", "group_size"))


def fill_advantages(
    rollout: Rollout,
    objective: ObjectiveConfig,
    group_size: int,
    kl_coef: float = 0.0,
    *,
    placed: Rollout | None = None,
    fetch=sharding.to_host,
) -> Rollout:
    """`assign` from and to the host, jitted. Arguments as there.

    Args:
      placed: the whole batch on the devices, where `rollout` is only a part of it: some estimators normalize over all.
      fetch: brings arrays like those of `placed` to the host.
    """
    filled = _assign(rollout if placed is None else placed, objective, group_size, np.float32(kl_coef))
    # Only what has changed: the rest may be wider on the host than on a device.
    changed = {"advantage": filled.advantage, "value_target": filled.value_target, "keep": filled.keep}
    return rollout.replace(**fetch(changed), reward_parts=None)


def groups_differ(rollout: Rollout, objective: ObjectiveConfig, group_size: int) -> jax.Array:
    """bool [groups]: whether the verdicts on the group differ (penalties for length do not count, as in DAPO)."""
    flat = advantages.zero_variance(judged_reward(rollout, objective), group_size)
    return ~flat.reshape(-1, group_size)[:, 0]


def chosen_groups(rollout: Rollout, objective: ObjectiveConfig, group_size: int, num_groups: int) -> np.ndarray:
    """The first `num_groups` groups whose verdicts differ, filled up with the first others if there are too few.

    DAPO's dynamic sampling (arXiv 2503.14476, section 3.2), with a bound on how often more is sampled: the groups
    that fill up take no part in learning (`fill_advantages`).

    Args:
      rollout: verified, of NumPy arrays, at least num_groups groups. Rewards and outcomes are used.
      objective: `groups.verifier_errors` is used.
      group_size: G.
      num_groups: groups that are chosen.

    Returns:
      Their numbers, int [num_groups], in the order they were sampled in.
    """
    order = np.argsort(~np.asarray(groups_differ(rollout, objective, group_size)), kind="stable")
    return np.sort(order[:num_groups])
