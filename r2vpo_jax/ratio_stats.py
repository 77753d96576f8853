"""What the policy ratios looked like, and what an objective does with the tokens that a clip would cut.

Z is the set of tokens where PPO's clip at 0.2 has gradient 0: A > 0 and r > 1.2, or A < 0 and r < 0.8. With g the
gradient coefficient of the objective at hand,

    retained   sum_Z max(g sign A, 0) / sum_Z r |A|     it still follows the advantage (the clip: 0)
    restoring  sum_Z max(-g sign A, 0) / sum_Z r |A|    it pulls the ratio back towards 1 (the clip: 0)

in units of the unclipped policy gradient, whose own values are 1 and 0.
"""

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from r2vpo_jax.losses.arrays import (
    LOG_RATIO_CLAMP,
    Advantages,
    Logp,
    Mask,
    PerToken,
    Weights,
    check_tokens,
    clamp,
    spread,
    unmasked,
)
from r2vpo_jax.train_stats import TrainStats

# Fixed edges of the histogram of |log r|, fine near zero, mirrored for negative values.
_MAGNITUDES = np.logspace(-6, np.log10(LOG_RATIO_CLAMP), 60)
EDGES = np.concatenate([-_MAGNITUDES[::-1], _MAGNITUDES]).astype(np.float32)

# Fixed edges, a quarter of a decade apart, of the histograms that say how concentrated a sum is.
CONCENTRATION_EDGES = np.logspace(-12, 18, 121).astype(np.float32)

# How Z is split: by the sign of A, the token's probability under the behavior policy, the third of the response it
# stands in, and its age in optimizer updates.
SPLITS = (
    "all",
    *("positive", "negative"),
    *("rare", "uncertain", "likely"),
    *("start", "middle", "end"),
    *("age_0", "age_1_to_7", "age_8_to_63", "age_64_up"),
)
_PROBABILITY_BOUNDS = (0.05, 0.5)
_AGE_BOUNDS = (1, 8, 64)


def compute(
    logp: Logp,
    behavior_logp: Logp,
    advantages: Advantages,
    mask: Mask,
    *,
    coefficient: PerToken | None = None,
    weights: Weights = None,
    age: Int[Array, " batch"] | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
) -> TrainStats:
    """Statistics of r = exp(logp - behavior_logp) over the unmasked tokens of one micro-batch.

    Args:
      logp, behavior_logp, mask: [B, T].
      advantages: f32[B] or f32[B, T].
      coefficient: the objective's gradient coefficient g of each token, weights included: the derivative of its
        loss by -logp over `losses.token_weights`. Default weights r A, the unclipped one.
      weights: importance weights that the objective was given (default 1).
      age: int32 [B], optimizer updates since each response was sampled (default 0).
      clip_low, clip_high: the clip whose victims are counted: tokens where its gradient is 0.

    Returns:
      TrainStats. `summarize` turns merged TrainStats into named numbers.

    Raises:
      AssertionError: shapes or ranks do not fit (chex).
    """
    mask = check_tokens(mask, logp, behavior_logp, coefficient, weights)
    if age is not None:
        chex.assert_shape(age, mask.shape[:1])
    advantages = spread(advantages, mask)
    weights = unmasked(jnp.ones(mask.shape) if weights is None else weights, mask)
    behavior_logp = unmasked(behavior_logp, mask)
    log_ratio = unmasked(logp, mask) - behavior_logp
    bounded = clamp(log_ratio)
    ratio, excess = jnp.exp(bounded), jnp.expm1(bounded)
    positive, negative = mask & (advantages > 0), mask & (advantages < 0)
    clipped = (positive & (ratio > 1 + clip_high)) | (negative & (ratio < 1 - clip_low))
    unclipped_coefficient = weights * ratio * advantages
    coefficient = unclipped_coefficient if coefficient is None else unmasked(coefficient, mask)
    magnitude = jnp.abs(coefficient)

    def mean_over(x, where):
        return jnp.sum(unmasked(x, where)), jnp.sum(where, dtype=jnp.float32)

    splits = _splits(mask, positive, negative, behavior_logp, age)
    at_stake = unmasked(jnp.abs(unclipped_coefficient), clipped)
    along = unmasked(coefficient * jnp.sign(advantages), clipped)

    def by_split(x):
        return jnp.sum(jnp.where(splits, x[None], 0.0), axis=(1, 2))

    sums = {
        "ratio": mean_over(ratio, mask),
        "ratio_squared": mean_over(ratio**2, mask),
        "excess": mean_over(excess, mask),
        "excess_squared": mean_over(excess**2, mask),
        "excess_squared_weighted": mean_over(weights * excess**2, mask),
        "excess_squared_positive": mean_over(excess**2, positive),
        "excess_squared_negative": mean_over(excess**2, negative),
        "abs_log": mean_over(jnp.abs(log_ratio), mask),
        "clipped": mean_over(clipped.astype(jnp.float32), mask),
        "clipped_positive": mean_over(clipped.astype(jnp.float32), positive),
        "clipped_negative": mean_over(clipped.astype(jnp.float32), negative),
        "clipped_gradient": (jnp.sum(unmasked(magnitude, clipped)), jnp.sum(magnitude)),
        "at_stake": (jnp.sum(at_stake), jnp.sum(jnp.abs(unclipped_coefficient))),
        "retained": (by_split(jnp.maximum(along, 0.0)), by_split(at_stake)),
        "restoring": (by_split(jnp.maximum(-along, 0.0)), by_split(at_stake)),
    }
    maxima = {
        "ratio": jnp.max(unmasked(ratio, mask)),
        "abs_log": jnp.max(jnp.abs(log_ratio)),
        "excess_squared": jnp.max(unmasked(weights * excess**2, mask)),
    }
    histogram = _binned(log_ratio, mask, EDGES, jnp.ones_like(log_ratio))
    concentration = {
        name: jnp.stack([_binned(x, mask, CONCENTRATION_EDGES, y) for y in (jnp.ones_like(x), x)])
        for name, x in (("excess_squared", weights * excess**2), ("gradient", magnitude))
    }
    return jax.lax.stop_gradient(TrainStats(sums, maxima, histogram, concentration))


def _splits(mask, positive, negative, behavior_logp, age):
    """bool [len(SPLITS), B, T]."""
    probability = jnp.exp(behavior_logp)
    low, high = _PROBABILITY_BOUNDS
    order = jnp.cumsum(mask, axis=1) - 1
    third = 3 * order // jnp.maximum(jnp.sum(mask, axis=1, keepdims=True), 1)
    age = jnp.zeros(mask.shape[0], jnp.int32) if age is None else age
    age_bin = jnp.sum(age[:, None] >= jnp.asarray(_AGE_BOUNDS)[None], axis=1)[:, None]
    parts = [mask, positive, negative]
    parts += [probability < low, (probability >= low) & (probability < high), probability >= high]
    parts += [third == i for i in range(3)]
    parts += [jnp.broadcast_to(age_bin == i, mask.shape) for i in range(len(_AGE_BOUNDS) + 1)]
    return jnp.stack(parts)


def _binned(x, mask, edges, y):
    """Sum of y over the unmasked tokens whose x falls between each two edges, f32 [len(edges) + 1]."""
    # Sums above each edge, and their differences: no scatter, which is slow on every backend.
    y = unmasked(y, mask)
    above = jnp.sum(jnp.where(x[..., None] > edges[None, None], y[..., None], 0.0), axis=(0, 1))
    return -jnp.diff(above, prepend=jnp.sum(y), append=0.0)


def quantile(histogram, q: float) -> float:
    """A quantile of log r: the edge of the histogram nearest to zero that bounds the bin it falls into."""
    histogram = np.asarray(histogram, np.float64)
    total = histogram.sum()
    if total == 0:
        return 0.0
    # The ceil(q N)-th smallest, and the smallest for q = 0.
    bin_index = int(np.searchsorted(np.cumsum(histogram), max(q * total, 1)))
    low = EDGES[max(bin_index - 1, 0)]
    high = EDGES[min(bin_index, len(EDGES) - 1)]
    return float(0.0 if low < 0 < high else min(low, high, key=abs))


def top_share(concentration, fraction: float) -> float:
    """The share of a sum that its largest terms hold: the top `fraction` of the tokens, at least one.

    From the histogram: the terms of the bin at the border count with the mean of that bin.
    """
    tokens, total = np.asarray(concentration, np.float64)
    if total.sum() <= 0:
        return 0.0
    wanted = max(fraction * tokens.sum(), 1.0)
    tokens, total = tokens[::-1], total[::-1]
    before = np.cumsum(tokens) - tokens
    taken = np.clip((wanted - before) / np.maximum(tokens, 1e-12), 0.0, 1.0)
    return float(np.clip((taken * total).sum() / total.sum(), 0.0, 1.0))


def summarize(stats: TrainStats) -> dict[str, float]:
    """Named numbers of merged statistics, on the host. docs/metrics.md explains each."""
    stats = jax.tree.map(np.asarray, stats)

    def mean(name):
        total, number = stats.sums[name]
        return float(total / number) if number != 0 else 0.0

    first, second = mean("excess"), mean("excess_squared")
    total, number = stats.sums["excess_squared_weighted"]
    # From r itself, not from r - 1: where every r is tiny, 1 + E[r - 1] cancels to 0 / 0.
    ess = mean("ratio") ** 2 / mean("ratio_squared") if number > 0 else 1.0
    return {
        "ratio/mean": 1 + first,
        "ratio/token_second_moment": second,
        "ratio/token_variance": max(second - first**2, 0.0),  # rounding may leave it below zero
        "ratio/token_second_moment_positive": mean("excess_squared_positive"),
        "ratio/token_second_moment_negative": mean("excess_squared_negative"),
        "ratio/effective_sample_size": ess,
        "ratio/max": float(stats.maxima["ratio"]),
        "ratio/max_abs_log": float(stats.maxima["abs_log"]),
        "ratio/mean_abs_log": mean("abs_log"),
        "ratio/log_p01": quantile(stats.histogram, 0.01),
        "ratio/log_p99": quantile(stats.histogram, 0.99),
        "ratio/top_token_share": float(stats.maxima["excess_squared"] / total) if total != 0 else 0.0,
        "clip/fraction": mean("clipped"),
        "clip/fraction_positive": mean("clipped_positive"),
        "clip/fraction_negative": mean("clipped_negative"),
        "clip/gradient_share": mean("clipped_gradient"),
        "ratio/top_permille_share": top_share(stats.concentration["excess_squared"], 1e-3),
        "keeps/top_permille_gradient": top_share(stats.concentration["gradient"], 1e-3),
        "keeps/at_stake": mean("at_stake"),
        **{
            f"keeps/{name}" + ("" if split == "all" else f"_{split}"): value
            for name in ("retained", "restoring")
            for split, value in zip(SPLITS, _quotients(*stats.sums[name]), strict=True)
        },
    }


def _quotients(numerators, denominators):
    """Elementwise; NaN where there was nothing."""
    return [float(n / d) if d > 0 else float("nan") for n, d in zip(numerators, denominators, strict=True)]
