"""Advantages from rewards. Groups (the G samples of one prompt) are contiguous rows."""

import chex
import jax.numpy as jnp
from jaxtyping import Array, Float

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
    grouped = _grouped(rewards, group_size)
    centered = grouped - jnp.mean(grouped, axis=1, keepdims=True)
    # Exactly equal rewards: no rounding residue may be blown up by 1 / epsilon.
    centered = jnp.where(jnp.all(grouped == grouped[:, :1], axis=1, keepdims=True), 0.0, centered)
    if scale == "none":
        return centered.reshape(-1)
    if scale != "std":
        raise ValueError(f"unknown scale {scale!r}; one of {SCALES}")
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
