"""Objectives of one ratio for a whole response, the geometric mean of its tokens' ratios.

In token form (`core.Tokens.with_coefficient`), so that weights and per-token advantages mean the same as
everywhere else; with one advantage a response the gradient is exactly that of the sequence-level objective. A second
derivative is not: in token form it is 0.
"""

import jax
import jax.numpy as jnp

from r2vpo_jax.losses.arrays import Advantages, Logp, Mask, Normalizer, Weights
from r2vpo_jax.losses.core import Loss, check_clip, prepare, require


def gspo_loss(
    logp: Logp,
    behavior_logp: Logp,
    advantages: Advantages,
    mask: Mask,
    *,
    clip_low: float = 3e-4,
    clip_high: float = 4e-4,
    weights: Weights = None,
    reduction: str = "sequence_mean",
    normalizer: Normalizer = None,
) -> Loss:
    """Group sequence policy optimization: PPO's clip on the length-normalized ratio of the response.

        L = -E[ min(s A, clip(s, 1 - clip_low, 1 + clip_high) A) ],   s = exp(mean_t log r_t)

    g = s A for each token, and 0 for all tokens of a response where the clip binds.

    Source: arXiv 2507.18071, equations 5 to 7 (and 13 to 14: the token form); bounds of its section 5.1.

    Args: as `ppo_clip_loss`, without dual_clip; the bounds are those of s, hence small.

    Returns, Raises: as `ppo_clip_loss`, without `dual_clip_fraction`.

    Example, r = 4 and 1, so s = 2; A = 1:
      >>> logp, behavior_logp = jnp.log(jnp.array([[[0.8, 0.2]], [[0.2, 0.2]]]))
      >>> ones = jnp.ones((1, 2))
      >>> loss, stats = gspo_loss(logp, behavior_logp, ones, ones, clip_high=0.25)
      >>> round(float(loss), 4)  # -min(2, 1.25)
      -1.25
    """
    check_clip(clip_low, clip_high)
    x = prepare(logp, behavior_logp, advantages, mask, weights)
    surrogate, cut = _clipped(x, clip_low, clip_high)
    return x.finish(surrogate, reduction, normalizer, cut=cut)


def luspo_loss(
    logp: Logp,
    behavior_logp: Logp,
    advantages: Advantages,
    mask: Mask,
    *,
    clip_low: float = 2e-3,
    clip_high: float = 2.5e-3,
    weights: Weights = None,
    reduction: str = "sequence_mean",
    normalizer: Normalizer = None,
) -> Loss:
    """Length-unbiased sequence policy optimization: GSPO times the length of the response.

        L = -E[ T min(s A, clip(s, 1 - clip_low, 1 + clip_high) A) ]

    Under `sequence_mean`, its reduction, every token of every response then weighs the same, as in Dr. GRPO.

    Source: arXiv 2602.05261 (`luspo` of TRL).

    Args, Returns, Raises: as `gspo_loss`.

    Example, r = 4 and 1, so s = 2; A = 1, T = 2:
      >>> logp, behavior_logp = jnp.log(jnp.array([[[0.8, 0.2]], [[0.2, 0.2]]]))
      >>> ones = jnp.ones((1, 2))
      >>> loss, stats = luspo_loss(logp, behavior_logp, ones, ones, clip_high=0.25)
      >>> round(float(loss), 4)  # -2 * min(2, 1.25)
      -2.5
    """
    check_clip(clip_low, clip_high)
    x = prepare(logp, behavior_logp, advantages, mask, weights)
    surrogate, cut = _clipped(x, clip_low, clip_high)
    return x.finish(x.length * surrogate, reduction, normalizer, cut=cut)


def gmpo_loss(
    logp: Logp,
    behavior_logp: Logp,
    advantages: Advantages,
    mask: Mask,
    *,
    log_clip: float = 0.4,
    weights: Weights = None,
    reduction: str = "sequence_mean",
    normalizer: Normalizer = None,
) -> Loss:
    """Geometric-mean policy optimization: each token's log-ratio is clipped, then they are averaged.

        L = -E[ A exp(mean_t c_t) ],   c_t = min(log r_t, log_clip) for A > 0, max(log r_t, -log_clip) for A < 0

    g = A rho with rho = exp(mean_t c_t), and 0 for the tokens where the clip binds.

    Source: arXiv 2507.20673, equation 4 and algorithm 1 (`geo_mean` of verl); bounds exp(-0.4), exp(0.4).

    Args: as `r2vpo_loss`, and
      log_clip: >= 0, bound of |log r|.

    Returns:
      (loss, stats); stats also has `clip_fraction_low` and `clip_fraction_high`.

    Raises:
      AssertionError, ValueError: as `r2vpo_loss`; ValueError for log_clip out of range.

    Example, log r = 1 and -0.2, A = 1:
      >>> logp, behavior_logp = jnp.array([[[-1.0, -2.2]], [[-2.0, -2.0]]])
      >>> ones = jnp.ones((1, 2))
      >>> loss, stats = gmpo_loss(logp, behavior_logp, ones, ones, log_clip=0.4)
      >>> round(float(loss), 4)  # -exp((0.4 - 0.2) / 2)
      -1.1052
    """
    require(lambda: log_clip >= 0, f"log_clip must be >= 0, got {log_clip}")
    x = prepare(logp, behavior_logp, advantages, mask, weights)
    low, high = x.outside(x.log_ratio, -log_clip, log_clip)
    clipped = jnp.where(low | high, jnp.clip(x.log_ratio, -log_clip, log_clip), x.log_ratio)
    mean = jnp.sum(clipped, axis=-1, keepdims=True) / jnp.maximum(x.length, 1.0)
    value = jnp.exp(mean) * x.advantages
    surrogate = jnp.where(low | high, jax.lax.stop_gradient(value), x.with_coefficient(value))
    return x.finish(surrogate, reduction, normalizer, cut=(low, high))


def _clipped(x, clip_low, clip_high):
    """(min(s A, clip(s) A) of each token, the tokens where the clip binds)."""
    s = jnp.exp(x.mean_log_ratio())
    low, high = x.outside(s, 1 - clip_low, 1 + clip_high)
    bound = jnp.where(high, 1 + clip_high, 1 - clip_low) * x.advantages
    return jnp.where(low | high, bound, x.with_coefficient(s * x.advantages)), (low, high)
