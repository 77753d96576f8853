"""Objectives that fade a token's gradient smoothly, or weigh whole responses."""

import jax
import jax.numpy as jnp

from r2vpo_jax.losses.arrays import Advantages, Logp, Mask, Normalizer, Weights, clamp
from r2vpo_jax.losses.core import Loss, prepare, require


def sapo_loss(
    logp: Logp,
    behavior_logp: Logp,
    advantages: Advantages,
    mask: Mask,
    *,
    tau_positive: float = 1.0,
    tau_negative: float = 1.05,
    weights: Weights = None,
    reduction: str = "sequence_mean",
    normalizer: Normalizer = None,
) -> Loss:
    """Soft adaptive policy optimization: a sigmoid gate in place of the clip.

        L = -E[ (4 / tau) sigmoid(tau (r - 1)) A ],     g = 4 p (1 - p) r A  with p = sigmoid(tau (r - 1))

    tau is tau_positive for A > 0 and tau_negative else: the gradient of negative tokens fades faster.

    Source: arXiv 2511.20347, equations 5 to 8 (`sapo` of TRL and verl).

    Args: as `r2vpo_loss`, and
      tau_positive, tau_negative: > 0, temperatures of the gate.

    Returns, Raises: as `r2vpo_loss`; ValueError for temperatures out of range.

    Example, r = 1 and 2, A = 1; sigmoid(0) = 0.5, sigmoid(1) = 0.7311:
      >>> logp, behavior_logp = jnp.log(jnp.array([[[0.4, 0.4]], [[0.4, 0.2]]]))
      >>> ones = jnp.ones((1, 2))
      >>> loss, stats = sapo_loss(logp, behavior_logp, ones, ones)
      >>> round(float(loss), 4)  # -(4 * 0.5 + 4 * 0.7311) / 2
      -2.4621
    """
    require(
        lambda: tau_positive > 0 and tau_negative > 0,
        f"tau_positive and tau_negative must be > 0, got {tau_positive} and {tau_negative}",
    )
    x = prepare(logp, behavior_logp, advantages, mask, weights)
    tau = jnp.where(x.advantages > 0, tau_positive, tau_negative)
    return x.finish(4 / tau * jax.nn.sigmoid(tau * x.excess) * x.advantages, reduction, normalizer)


def vespo_loss(
    logp: Logp,
    behavior_logp: Logp,
    advantages: Advantages,
    mask: Mask,
    *,
    power_positive: float = 2.0,
    decay_positive: float = 3.0,
    power_negative: float = 3.0,
    decay_negative: float = 2.0,
    weights: Weights = None,
    reduction: str = "token_mean",
    normalizer: Normalizer = None,
) -> Loss:
    """Variational sequence-level soft policy optimization: a gamma-shaped weight of the whole response.

        L = -E[ sg(phi(w)) A log pi ],   phi(w) = w^power exp(decay (1 - w)),   w = prod_t r_t,     g = phi(w) A

    phi(1) = 1, largest at w = power / decay, and 0 as w goes to 0 or to infinity. power and decay go by the sign
    of the advantage; log w is clamped at +-20.

    Source: arXiv 2602.10693; constants of its code (FloyedShen/VESPO) and of TRL's `vespo`.

    Args: as `r2vpo_loss`, and
      power_positive, decay_positive: k and lambda for A >= 0; >= 0 and > 0.
      power_negative, decay_negative: k and lambda for A < 0.

    Returns, Raises: as `r2vpo_loss`; ValueError for constants out of range.

    Example, r = 2 and 1, so w = 2; A = 1:
      >>> logp, behavior_logp = jnp.array([[[-1.0, -1.0]], [[-1.6931472, -1.0]]])
      >>> ones = jnp.ones((1, 2))
      >>> loss, stats = vespo_loss(logp, behavior_logp, ones, ones)
      >>> round(float(loss), 4)  # -2^2 * exp(3 * (1 - 2)) * (-1 - 1) / 2
      0.1991
    """
    require(
        lambda: power_positive >= 0 and power_negative >= 0 and decay_positive > 0 and decay_negative > 0,
        f"powers must be >= 0 and decays > 0, got {power_positive}, {power_negative} and {decay_positive}, "
        f"{decay_negative}",
    )
    x = prepare(logp, behavior_logp, advantages, mask, weights)
    log_w = clamp(x.sequence_log_ratio())
    power = jnp.where(x.advantages >= 0, power_positive, power_negative)
    decay = jnp.where(x.advantages >= 0, decay_positive, decay_negative)
    phi = jnp.exp(power * log_w - decay * jnp.expm1(log_w))
    return x.finish(x.score_function(phi * x.advantages), reduction, normalizer)


def topr_loss(
    logp: Logp,
    behavior_logp: Logp,
    advantages: Advantages,
    mask: Mask,
    *,
    max_ratio: float = 1.0,
    weights: Weights = None,
    reduction: str = "token_mean",
    normalizer: Normalizer = None,
) -> Loss:
    """Tapered off-policy REINFORCE: supervised on good responses, importance-weighted on bad ones.

        A >= 0:  g = A          A < 0:  g = clip(w, 0, max_ratio) A,   w = prod_t r_t

    Once a bad response has become unlikely it is left alone, however stale the data. (Tokens beyond |log r| = 20 have
    no gradient, of either sign.)

    Source: arXiv 2503.14286, equation 8 (with the paper's recommended bounds: no weight on positives, 0 to 1 on
    negatives). The paper splits by the sign of the reward; with rewards of 0 and 1 and a baseline between them the sign
    of the advantage is the same, with graded rewards it is not.

    Args: as `r2vpo_loss`, and
      max_ratio: > 0, cap of the weight of negative responses.

    Returns, Raises: as `r2vpo_loss`; ValueError for max_ratio out of range.

    Example, log r = -0.5 and -0.5, so w = e^-1 = 0.3679; A = -1:
      >>> logp, behavior_logp = jnp.array([[[-2.0, -2.0]], [[-1.5, -1.5]]])
      >>> ones = jnp.ones((1, 2))
      >>> loss, stats = topr_loss(logp, behavior_logp, -ones, ones)
      >>> round(float(loss), 4)  # 0.3679 * (-2 - 2) / 2
      -0.7358
    """
    require(lambda: max_ratio > 0, f"max_ratio must be > 0, got {max_ratio}")
    x = prepare(logp, behavior_logp, advantages, mask, weights)
    w = jnp.exp(clamp(x.sequence_log_ratio()))
    factor = jnp.where(x.advantages >= 0, 1.0, jnp.minimum(w, max_ratio))
    return x.finish(x.score_function(factor * x.advantages), reduction, normalizer)
