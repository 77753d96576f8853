"""Advantages from rewards. Groups (the G samples of one prompt) are contiguous rows."""

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

SCALES = ("std", "none")


def _grouped(rewards, group_size):
    rewards = jnp.asarray(rewards, jnp.float32)
    chex.assert_rank(rewards, 1)
    if group_size < 1 or rewards.shape[0] % group_size:
        raise ValueError(f"{rewards.shape[0]} rewards are not a whole number of groups of {group_size}")
    return rewards.reshape(-1, group_size)


def group_relative(
    rewards: Float[Array, " batch"], group_size: int, *, scale: str = "std", epsilon: float = 1e-6
) -> Float[Array, " batch"]:
    """Reward minus the mean of its group, divided by the group's standard deviation if asked.

        A_i = (R_i - mean(R)) / (std(R) + epsilon)

    `scale="std"` with the unbiased deviation (G - 1) is GRPO (arXiv 2402.03300; the choice of the unbiased
    estimator follows its public implementations); `scale="none"` is Dr. GRPO (arXiv 2503.20783). A group of
    equal rewards, or of one, gives zeros.

    Args:
      rewards: f32[B], groups contiguous.
      group_size: G.
      scale: "std" or "none".
      epsilon: keeps the quotient finite.

    Raises:
      ValueError: B is not a multiple of G, or an unknown scale.
    """
    if scale not in SCALES:
        raise ValueError(f"unknown scale {scale!r}; one of {SCALES}")
    grouped = _grouped(rewards, group_size)
    centered = grouped - jnp.mean(grouped, axis=1, keepdims=True)
    # Exactly equal rewards: no rounding residue may be blown up by 1 / epsilon.
    centered = jnp.where(jnp.all(grouped == grouped[:, :1], axis=1, keepdims=True), 0.0, centered)
    if scale == "none":
        return centered.reshape(-1)
    variance = jnp.sum(centered**2, axis=1, keepdims=True) / max(group_size - 1, 1)
    return (centered / (jnp.sqrt(variance) + epsilon)).reshape(-1)


def leave_one_out(rewards: Float[Array, " batch"], group_size: int) -> Float[Array, " batch"]:
    """Reward minus the mean of the *other* rewards of its group (RLOO, arXiv 2402.14740).

        A_i = R_i - mean_{j != i} R_j = G / (G - 1) (R_i - mean(R))

    Args:
      rewards: f32[B], groups contiguous.
      group_size: G; a group of one gives zeros.

    Raises:
      ValueError: B is not a multiple of G.
    """
    return group_relative(rewards, group_size, scale="none") * (group_size / max(group_size - 1, 1))


def gae(
    rewards: Float[Array, "batch time"],
    values: Float[Array, "batch time"],
    mask: Bool[Array, "batch time"],
    *,
    discount: float = 1.0,
    trace_decay: float = 0.95,
) -> Float[Array, "batch time"]:
    """Generalized advantage estimation (arXiv 1506.02438) over the unmasked tokens of each row.

        delta_t = R_t + discount V_{t+1} - V_t,    A_t = delta_t + discount trace_decay A_{t+1}

    `t + 1` is the next unmasked token; after the last one V and A are 0, for the response has ended. The
    targets of a value function are `gae(...) + values`.

    Args:
      rewards: of each token; an outcome reward stands at the last token.
      values: V_t, the value before token t is generated.
      mask: bool or 0/1. Masked positions are skipped, even if they hold NaN, and get advantage 0.
      discount, trace_decay: gamma and lambda, in [0, 1].

    Raises:
      AssertionError: shapes or ranks do not fit (chex).
    """
    chex.assert_rank([rewards, values, mask], 2)
    chex.assert_equal_shape([rewards, values, mask])
    mask = jnp.asarray(mask).astype(bool)
    rewards, values = (jnp.where(mask, jnp.asarray(x, jnp.float32), 0.0) for x in (rewards, values))

    def step(following, token):
        next_advantage, next_value = following
        reward, value, unmasked = token
        delta = reward + discount * next_value - value
        advantage = delta + discount * trace_decay * next_advantage
        following = jnp.where(unmasked, advantage, next_advantage), jnp.where(unmasked, value, next_value)
        return following, jnp.where(unmasked, advantage, 0.0)

    zeros = jnp.zeros(mask.shape[0], jnp.float32)
    _, advantages = jax.lax.scan(step, (zeros, zeros), (rewards.T, values.T, mask.T), reverse=True)
    return advantages.T
