"""Objectives as a user would write them, for `losses.get("tests.helpers.own_losses:...")`."""

import jax.numpy as jnp

from r2vpo_jax import losses

NOT_A_FUNCTION = 3.0


def tempered_loss(
    logp,
    behavior_logp,
    advantages,
    mask,
    *,
    variance_coef,
    power=0.5,
    cap=None,
    scope="token",
    weights=None,
    reduction="token_mean",
    normalizer=None,
):
    """-E[r^power A] + variance_coef E[(r - 1)^2]."""
    if not power > 0:
        raise ValueError(f"power must be > 0, got {power}")
    ratio = jnp.exp(logp - behavior_logp)
    value = ratio**power * advantages - variance_coef * (ratio - 1) ** 2
    stats = {"ratio_variance": (jnp.sum((ratio - 1) ** 2), losses.count(mask, "token_mean"))}
    return -losses.reduce(value, mask, reduction, normalizer), stats


def without_weights_loss(logp, behavior_logp, advantages, mask, *, reduction="token_mean", normalizer=None):
    raise NotImplementedError


def without_a_default_loss(
    logp, behavior_logp, advantages, mask, *, power, weights=None, reduction="token_mean", normalizer=None
):
    raise NotImplementedError
