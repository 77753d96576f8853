"""Objectives that cut something off at a bound of each token's ratio, or of its change of probability."""

import jax
import jax.numpy as jnp

from r2vpo_jax.losses.arrays import Advantages, Logp, Mask, Normalizer, Scalar, Weights, scalar
from r2vpo_jax.losses.core import Loss, check_clip, prepare, require


def ppo_clip_loss(
    logp: Logp,
    behavior_logp: Logp,
    advantages: Advantages,
    mask: Mask,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    weights: Weights = None,
    reduction: str = "token_mean",
    normalizer: Normalizer = None,
) -> Loss:
    """Clipped surrogate objective.

        L = -E[ min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) ]

    The gradient coefficient is r A, and 0 where the clip binds: A > 0 and r > 1 + clip_high, or A < 0 and
    r < 1 - clip_low. `dual_clip` c > 1 also bounds the loss where A < 0: max(..., c A), gradient 0 for r > c.

    Sources: arXiv 1707.06347 (PPO); asymmetric bounds, arXiv 2503.14476 (DAPO); dual clip, arXiv 1912.09729.

    Args: as `r2vpo_loss`, and
      clip_low, clip_high: distances of the bounds from 1.
      dual_clip: c, or None.

    Returns:
      (loss, stats); stats also has `clip_fraction_low`, `clip_fraction_high` and `dual_clip_fraction`.

    Raises:
      AssertionError, ValueError: as `r2vpo_loss`; ValueError for bounds out of range.

    Example, r = 1.5 and 0.5, A = 1:
      >>> logp, behavior_logp = jnp.log(jnp.array([[[0.6, 0.2]], [[0.4, 0.4]]]))
      >>> ones = jnp.ones((1, 2))
      >>> loss, stats = ppo_clip_loss(logp, behavior_logp, ones, ones)
      >>> round(float(loss), 4)  # -(min(1.5, 1.2) + min(0.5, 0.8)) / 2
      -0.85
    """
    check_clip(clip_low, clip_high, dual_clip)
    x = prepare(logp, behavior_logp, advantages, mask, weights)
    low, high = x.outside(x.ratio, 1 - clip_low, 1 + clip_high)
    # A choice, not a minimum: on the bound itself a minimum would share the gradient between its arguments.
    ratio = jnp.where(high, 1 + clip_high, jnp.where(low, 1 - clip_low, x.ratio))
    beyond = _beyond(x, dual_clip)
    if dual_clip is not None:
        ratio = jnp.where(beyond, dual_clip, ratio)
    return x.finish(ratio * x.advantages, reduction, normalizer, cut=(low, high), dual_clip_fraction=beyond)


def cispo_loss(
    logp: Logp,
    behavior_logp: Logp,
    advantages: Advantages,
    mask: Mask,
    *,
    min_ratio: float = 0.0,
    max_ratio: float = 5.0,
    weights: Weights = None,
    reduction: str = "token_mean",
    normalizer: Normalizer = None,
) -> Loss:
    """Clipped importance weights instead of a clipped objective: no token within |log r| <= 20 loses its gradient.

        L = -E[ sg(clip(r, min_ratio, max_ratio)) A log pi ],     g = clip(r, min_ratio, max_ratio) A

    Source: arXiv 2506.13585, equation 4 (MiniMax-M1), which leaves the lower bound open and does not print the upper
    one; 5 is that of ScaleRL (arXiv 2510.13786), as TRL's documentation has it.

    Args: as `r2vpo_loss`, and
      min_ratio, max_ratio: bounds of the weight.

    Returns, Raises: as `r2vpo_loss`; ValueError for bounds out of range.

    Example, r = e^2 and 1, A = 1:
      >>> logp, behavior_logp = jnp.array([[[-1.0, -1.0]], [[-3.0, -1.0]]])
      >>> ones = jnp.ones((1, 2))
      >>> loss, stats = cispo_loss(logp, behavior_logp, ones, ones, max_ratio=5.0)
      >>> round(float(loss), 4)  # -(5 * -1 + 1 * -1) / 2
      3.0
    """
    require(
        lambda: 0 <= min_ratio <= 1 <= max_ratio,
        f"0 <= min_ratio <= 1 <= max_ratio is needed, got {min_ratio} and {max_ratio}",
    )
    x = prepare(logp, behavior_logp, advantages, mask, weights)
    clipped = jnp.clip(x.ratio, min_ratio, max_ratio)
    return x.finish(x.score_function(clipped * x.advantages), reduction, normalizer)


def gppo_loss(
    logp: Logp,
    behavior_logp: Logp,
    advantages: Advantages,
    mask: Mask,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    keep_low: float = 1.0,
    keep_high: float = 1.0,
    dual_clip: float | None = 3.0,
    weights: Weights = None,
    reduction: str = "token_mean",
    normalizer: Normalizer = None,
) -> Loss:
    """Gradient-preserving clip: PPO's clip, but the tokens that it would cut keep a bounded gradient.

        g = keep_high (1 + clip_high) A   for A > 0, r > 1 + clip_high
        g = keep_low (1 - clip_low) A     for A < 0, r < 1 - clip_low
        g = r A                           else

    The value of each token is its coefficient. keep_low = keep_high = 0 is PPO's clip in gradient.

    Sources: arXiv 2508.07629 (GPPO, both factors 1); arXiv 2509.20712 (CE-GPPO: keep_low 0.5 for 1.5B and 0.75
    for 7B models, keep_high 1). The dual clip at 3 is the default of their verl-based code; their scripts have 10, and
    so have the presets.

    Args: as `ppo_clip_loss`, and
      keep_low, keep_high: >= 0, beta_1 and beta_2 of CE-GPPO.

    Returns, Raises: as `ppo_clip_loss`.

    Example, r = 2 and 1, A = 1:
      >>> logp, behavior_logp = jnp.log(jnp.array([[[0.8, 0.4]], [[0.4, 0.4]]]))
      >>> ones = jnp.ones((1, 2))
      >>> loss, stats = gppo_loss(logp, behavior_logp, ones, ones, clip_high=0.28)
      >>> round(float(loss), 4)  # -(1.28 + 1) / 2
      -1.14
    """
    check_clip(clip_low, clip_high, dual_clip)
    require(
        lambda: keep_low >= 0 and keep_high >= 0, f"keep_low and keep_high must be >= 0, got {keep_low} and {keep_high}"
    )
    x = prepare(logp, behavior_logp, advantages, mask, weights)
    low, high = x.outside(x.ratio, 1 - clip_low, 1 + clip_high)
    factor = jnp.where(high, keep_high * (1 + clip_high), jnp.where(low, keep_low * (1 - clip_low), x.ratio))
    surrogate, beyond = x.with_coefficient(factor * x.advantages), _beyond(x, dual_clip)
    if dual_clip is not None:
        surrogate = jnp.where(beyond, dual_clip * x.advantages, surrogate)
    return x.finish(surrogate, reduction, normalizer, cut=(low, high), dual_clip_fraction=beyond)


def aspo_loss(
    logp: Logp,
    behavior_logp: Logp,
    advantages: Advantages,
    mask: Mask,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float = 3.0,
    weights: Weights = None,
    reduction: str = "token_mean",
    normalizer: Normalizer = None,
) -> Loss:
    """Asymmetric importance sampling: for A > 0 the weight is 1 / r, so that unlikely tokens learn faster.

        A > 0:  g = min(1 / r, dual_clip) A, and 0 for r > 1 + clip_high
        A < 0:  g = min(r, dual_clip) A, and 0 for r < 1 - clip_low

    The dual clip is soft: beyond it the gradient stays, bounded. The value of each token is its coefficient, or
    the coefficient at the bound where that is cut.

    Source: arXiv 2510.06062; constants as in its code (wizard-III/Archer2.0), whose second pair of bounds for
    tokens of high entropy is left out. Its scripts have a KL beside it, which the preset adds.

    Args: as `ppo_clip_loss`; dual_clip bounds both signs.

    Returns, Raises: as `ppo_clip_loss`, without `dual_clip_fraction`.

    Example, r = 0.5 and 1.5, A = 1:
      >>> logp, behavior_logp = jnp.log(jnp.array([[[0.2, 0.6]], [[0.4, 0.4]]]))
      >>> ones = jnp.ones((1, 2))
      >>> loss, stats = aspo_loss(logp, behavior_logp, ones, ones, clip_high=0.25)
      >>> round(float(loss), 4)  # -(1 / 0.5 + 1 / 1.25) / 2
      -1.4
    """
    check_clip(clip_low, clip_high, dual_clip)
    x = prepare(logp, behavior_logp, advantages, mask, weights)
    low, high = x.outside(x.ratio, 1 - clip_low, 1 + clip_high)
    positive = jnp.minimum(jnp.exp(-x.log_ratio), dual_clip)
    factor = jnp.where(x.advantages > 0, positive, jnp.minimum(x.ratio, dual_clip))
    cut = jnp.where(high, 1 / (1 + clip_high), 1 - clip_low) * x.advantages
    surrogate = jnp.where(low | high, cut, x.with_coefficient(factor * x.advantages))
    return x.finish(surrogate, reduction, normalizer, cut=(low, high))


def dppo_tv_loss(
    logp: Logp,
    behavior_logp: Logp,
    advantages: Advantages,
    mask: Mask,
    *,
    divergence_low: float = 0.15,
    divergence_high: float = 0.15,
    max_ratio: float = 20.0,
    beta: float = 0.0,
    weights: Weights = None,
    reduction: str = "token_mean",
    normalizer: Normalizer = None,
) -> Loss:
    """Divergence PPO, binary total variation: cut where the *probability* moved too far, not the ratio.

        L = -E[ M sg(min(r, max_ratio)) A log pi - beta (log r)^2 / 2 ],     g = M min(r, max_ratio) A - beta log r
        M = 0 where A > 0 and pi - mu > divergence_high, or A <= 0 and mu - pi > divergence_low; else 1

    A token of probability 1e-5 may grow a hundredfold; one of 0.5 may not grow to 0.9.

    Sources: arXiv 2602.04879, section 5 (`dppo_tv` of verl-project/verl, whose fallback for max_ratio is 20; its
    script for it, and the preset, have 10,000). With both thresholds 0.2, no cap of the
    ratio and beta = 0.002 the gradient is that of the default loss of PrimeIntellect-ai/prime-rl, which writes
    the penalty as 0.001 (log r)^2.

    Args: as `r2vpo_loss`, and
      divergence_low, divergence_high: largest fall and rise of the probability, in (0, 1].
      max_ratio: >= 1, cap of the importance weight.
      beta: >= 0, weight of the quadratic in the log-ratio, on all tokens.

    Returns:
      (loss, stats); stats also has `clip_fraction_low` and `clip_fraction_high`, tokens with M = 0.

    Raises:
      AssertionError, ValueError: as `r2vpo_loss`; ValueError for bounds out of range.

    Example, pi - mu = 0 and e^-0.1 - e^-1 = 0.54, A = 1:
      >>> logp, behavior_logp = jnp.array([[[-1.0, -0.1]], [[-1.0, -1.0]]])
      >>> ones = jnp.ones((1, 2))
      >>> loss, stats = dppo_tv_loss(logp, behavior_logp, ones, ones)
      >>> round(float(loss), 4)  # -(1 * -1 + 0) / 2
      0.5
    """
    _check_divergences(divergence_low, divergence_high, 1.0)
    require(lambda: max_ratio >= 1, f"max_ratio must be >= 1, got {max_ratio}")
    require(lambda: beta >= 0, f"beta must be >= 0, got {beta}")
    x = prepare(logp, behavior_logp, advantages, mask, weights)
    pi, mu = _probabilities(x)
    high = (x.advantages > 0) & (pi - mu > divergence_high)
    low = (x.advantages <= 0) & (mu - pi > divergence_low)
    return _masked_score(x, low, high, max_ratio, reduction, normalizer, penalty=0.5 * beta * x.log_ratio**2)


def dppo_kl_loss(
    logp: Logp,
    behavior_logp: Logp,
    advantages: Advantages,
    mask: Mask,
    *,
    divergence_low: float = 0.05,
    divergence_high: float = 0.05,
    max_ratio: float = 20.0,
    weights: Weights = None,
    reduction: str = "token_mean",
    normalizer: Normalizer = None,
) -> Loss:
    """Divergence PPO, binary KL: as `dppo_tv_loss`, with KL(Bernoulli(mu) || Bernoulli(pi)) as the divergence.

        D = mu log(mu / pi) + (1 - mu) log((1 - mu) / (1 - pi)),     g = M min(r, max_ratio) A
        M = 0 where A > 0, pi > mu and D > divergence_high, or A <= 0, pi < mu and D > divergence_low; else 1

    Source: arXiv 2602.04879, section 5 (`dppo_kl` of verl-project/verl).

    Args: as `r2vpo_loss`, and
      divergence_low, divergence_high: largest divergence, in nats, of a probability that fell and that rose.
      max_ratio: >= 1, cap of the importance weight.

    Returns, Raises: as `dppo_tv_loss`.

    Example, D = 0 and 0.87, A = 1:
      >>> logp, behavior_logp = jnp.array([[[-1.0, -0.1]], [[-1.0, -1.0]]])
      >>> ones = jnp.ones((1, 2))
      >>> loss, stats = dppo_kl_loss(logp, behavior_logp, ones, ones)
      >>> round(float(loss), 4)  # -(1 * -1 + 0) / 2
      0.5
    """
    _check_divergences(divergence_low, divergence_high, float("inf"))
    require(lambda: max_ratio >= 1, f"max_ratio must be >= 1, got {max_ratio}")
    x = prepare(logp, behavior_logp, advantages, mask, weights)
    pi, mu = _probabilities(x)
    rest = jnp.log(jnp.maximum(1 - mu, 1e-8) / jnp.maximum(1 - pi, 1e-8))
    divergence = -mu * jax.lax.stop_gradient(x.log_ratio) + (1 - mu) * rest
    high = (x.advantages > 0) & (pi > mu) & (divergence > divergence_high)
    low = (x.advantages <= 0) & (pi < mu) & (divergence > divergence_low)
    return _masked_score(x, low, high, max_ratio, reduction, normalizer)


def m2po_threshold(
    logp: Logp, behavior_logp: Logp, advantages: Advantages, mask: Mask, *, budget: float = 0.04
) -> Scalar:
    """The |log r| beyond which `m2po_loss` cuts: the second moment of what is kept stays within the budget.

    Harmful tokens are those that a step along the advantage moves further away: A > 0 and r > 1, or A < 0 and
    r < 1. Those with the largest (log r)^2 are cut until the mean of (log r)^2 over the harmful tokens that
    remain is at most `budget`. Infinite if nothing need be cut. Halfway between the last token kept and the
    first one cut, so that rounding does not move a token across.

    Call it on the whole minibatch, with log-probabilities of a scoring pass; the loss is then exact for any
    split into micro-batches.

    Source: arXiv 2510.01161, algorithm 1; budget 0.04 as published. (The released code caps |log r| instead of
    masking, and its bounds have minimal widths: the upper one is never below 1.5, the lower never above 0.7. AReaL's
    masking is another rule: by the (log r)^2 of proximal against behavior, before any update, over all tokens whatever
    the sign of the advantage; it keeps at least one token, and clips as PPO besides.)

    Args: as `r2vpo_loss`, and
      budget: > 0, bound on the mean of (log r)^2.

    Returns:
      f32[], > 0 or inf. No gradient.

    Raises:
      AssertionError: shapes or ranks do not fit (chex).
      ValueError: budget out of range.

    Example, squares 0.01, 0.04 and 0.09, running means 0.01, 0.025 and 0.047:
      >>> logp, behavior_logp = jnp.array([[[-0.9, -0.8, -0.7]], [[-1.0, -1.0, -1.0]]])
      >>> ones = jnp.ones((1, 3))
      >>> threshold = m2po_threshold(logp, behavior_logp, ones, ones, budget=0.04)
      >>> round(float(threshold), 4)  # two are kept: (0.2 + 0.3) / 2
      0.25
    """
    _check_budget(budget)
    x = prepare(logp, behavior_logp, advantages, mask, None)
    harmful = x.advantages * x.log_ratio > 0
    magnitude = jnp.sort(jnp.where(harmful, jnp.abs(jax.lax.stop_gradient(x.log_ratio)), jnp.inf).reshape(-1))
    counted = jnp.isfinite(magnitude)
    running_mean = jnp.cumsum(jnp.where(counted, magnitude, 0.0) ** 2) / jnp.arange(1, magnitude.size + 1)
    # Sorted, so the running mean only grows: what fits is a prefix.
    kept = jnp.sum(counted & (running_mean <= budget))
    # Equal ones are cut together, all or none.
    first_cut = magnitude[jnp.minimum(kept, magnitude.size - 1)]
    kept = jnp.where(kept < magnitude.size, jnp.searchsorted(magnitude, first_cut), kept)
    largest_kept = jnp.where(kept > 0, magnitude[jnp.maximum(kept - 1, 0)], 0.0)
    smallest_cut = jnp.where(kept < magnitude.size, first_cut, jnp.inf)
    return 0.5 * (largest_kept + smallest_cut)


def m2po_loss(
    logp: Logp,
    behavior_logp: Logp,
    advantages: Advantages,
    mask: Mask,
    *,
    budget: float = 0.04,
    threshold: float | Scalar | None = None,
    weights: Weights = None,
    reduction: str = "token_mean",
    normalizer: Normalizer = None,
) -> Loss:
    """Second-moment trust policy optimization: PPO's clip with one bound for the batch, taken from the data.

        L = -E[ min(r A, clip(r, exp(-threshold), exp(threshold)) A) ]

    g = r A, and 0 where A > 0 and log r > threshold, or A < 0 and log r < -threshold.

    Source: arXiv 2510.01161; see `m2po_threshold`.

    Args: as `r2vpo_loss`, and
      budget: > 0, of `m2po_threshold`.
      threshold: of |log r|; inf is the unclipped policy gradient. None takes `m2po_threshold` of the arrays given;
        where these are one micro-batch of many, give that of the whole minibatch instead.

    Returns:
      (loss, stats); stats also has `clip_fraction_low` and `clip_fraction_high`.

    Raises:
      AssertionError, ValueError: as `r2vpo_loss`; ValueError for a budget out of range.

    Example, r = 1.44 and 1, A = 1; (log 1.44)^2 = 0.13, so the threshold is log(1.44) / 2 = log 1.2:
      >>> logp, behavior_logp = jnp.log(jnp.array([[[0.72, 0.5]], [[0.5, 0.5]]]))
      >>> ones = jnp.ones((1, 2))
      >>> loss, stats = m2po_loss(logp, behavior_logp, ones, ones)
      >>> round(float(loss), 4)  # -(1.2 + 1) / 2
      -1.1
    """
    _check_budget(budget)
    x = prepare(logp, behavior_logp, advantages, mask, weights)
    if threshold is None:
        threshold = m2po_threshold(logp, behavior_logp, advantages, mask, budget=budget)
    threshold = scalar(threshold)
    low, high = x.outside(x.log_ratio, -threshold, threshold)
    bound = jnp.exp(jnp.clip(jax.lax.stop_gradient(x.log_ratio), -threshold, threshold))
    surrogate = jnp.where(low | high, bound, x.ratio) * x.advantages
    return x.finish(surrogate, reduction, normalizer, cut=(low, high))


def _beyond(x, dual_clip):
    """Tokens that the dual clip cuts: A < 0 and r above it. None cuts nothing."""
    return jnp.zeros_like(x.mask) if dual_clip is None else (x.advantages < 0) & (x.ratio > dual_clip)


def _check_budget(budget):
    require(lambda: budget > 0, f"budget must be > 0, got {budget}")


def _check_divergences(low, high, largest):
    require(
        lambda: 0 < low <= largest and 0 < high <= largest,
        f"divergence_low and divergence_high must be in (0, {largest:g}], got {low} and {high}",
    )


def _probabilities(x):
    """(pi, mu); what rounding put above 1 is 1."""
    logp = jax.lax.stop_gradient(x.behavior_logp + x.log_ratio)
    return jnp.exp(jnp.minimum(logp, 0.0)), jnp.exp(jnp.minimum(x.behavior_logp, 0.0))


def _masked_score(x, low, high, max_ratio, reduction, normalizer, penalty=None):
    factor = jnp.where(low | high, 0.0, jnp.minimum(x.ratio, max_ratio))
    return x.finish(x.score_function(factor * x.advantages), reduction, normalizer, penalty=penalty, cut=(low, high))
