"""What the policy ratios looked like: moments, effective sample size, histogram, what a clip would have cut."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float

_CLAMP = 20.0  # numerical guard, as in losses.LOG_RATIO_CLAMP

# Fixed edges of the histogram of |log r|, fine near zero, mirrored for negative values.
_MAGNITUDES = np.logspace(-6, np.log10(_CLAMP), 60)
EDGES = np.concatenate([-_MAGNITUDES[::-1], _MAGNITUDES]).astype(np.float32)


@struct.dataclass
class Stats:
    """Statistics that survive micro-batches and minibatches: sums add, maxima are maxed, histograms add."""

    sums: dict[str, tuple[Array, Array]]  # name -> (sum, count)
    maxima: dict[str, Array]
    histogram: Array  # f32 [len(EDGES) + 1] counts of log r

    def reduce(self) -> "Stats":
        """Merge statistics that are stacked along axis 0."""
        return Stats(
            sums=jax.tree.map(lambda x: jnp.sum(x, axis=0), self.sums),
            maxima=jax.tree.map(lambda x: jnp.max(x, axis=0), self.maxima),
            histogram=jnp.sum(self.histogram, axis=0),
        )

    def mean(self, name: str) -> Array:
        """The mean of one summed statistic; 0 where nothing was counted."""
        total, number = self.sums[name]
        return total / jnp.where(number == 0, 1.0, number)


def compute(
    logp: Float[Array, "batch time"],
    behavior_logp: Float[Array, "batch time"],
    advantages: Float[Array, "batch"] | Float[Array, "batch time"],
    mask: Bool[Array, "batch time"],
    *,
    coefficient: Float[Array, "batch time"] | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
) -> Stats:
    """Statistics of r = exp(logp - behavior_logp) over the unmasked tokens of one micro-batch.

    Args:
      logp, behavior_logp, mask: [B, T].
      advantages: f32[B] or f32[B, T].
      coefficient: the objective's gradient coefficient of each token, d(objective)/d(logp), at any common
        scale. Default r A, the unclipped one.
      clip_low, clip_high: the clip whose victims are counted: tokens where its gradient is 0.

    Returns:
      Stats. `summarize` turns merged Stats into named numbers.

    Raises:
      AssertionError: shapes or ranks do not fit (chex).
    """
    chex.assert_rank([logp, behavior_logp, mask], 2)
    chex.assert_equal_shape([logp, behavior_logp, mask])
    chex.assert_rank(advantages, {1, 2})
    chex.assert_equal_shape_prefix([advantages, mask], jnp.ndim(advantages))
    mask = jnp.asarray(mask).astype(bool)

    def unmasked(x):
        return jnp.where(mask, jnp.asarray(x, jnp.float32), 0.0)

    advantages = unmasked(advantages[:, None] if jnp.ndim(advantages) == 1 else advantages)
    log_ratio = unmasked(logp) - unmasked(behavior_logp)
    bounded = jnp.clip(log_ratio, -_CLAMP, _CLAMP)
    ratio, excess = jnp.exp(bounded), jnp.expm1(bounded)
    positive, negative = mask & (advantages > 0), mask & (advantages < 0)
    clipped = (positive & (ratio > 1 + clip_high)) | (negative & (ratio < 1 - clip_low))
    magnitude = jnp.abs(ratio * advantages if coefficient is None else unmasked(coefficient))

    def mean_over(x, where):
        return jnp.sum(jnp.where(where, x, 0.0)), jnp.sum(where, dtype=jnp.float32)

    sums = {
        "ratio": mean_over(ratio, mask),
        "ratio_squared": mean_over(ratio**2, mask),
        "excess": mean_over(excess, mask),
        "excess_squared": mean_over(excess**2, mask),
        "excess_squared_positive": mean_over(excess**2, positive),
        "excess_squared_negative": mean_over(excess**2, negative),
        "abs_log": mean_over(jnp.abs(log_ratio), mask),
        "clipped": mean_over(clipped.astype(jnp.float32), mask),
        "clipped_positive": mean_over(clipped.astype(jnp.float32), positive),
        "clipped_negative": mean_over(clipped.astype(jnp.float32), negative),
        "clipped_gradient": (jnp.sum(jnp.where(clipped, magnitude, 0.0)), jnp.sum(magnitude)),
    }
    maxima = {
        "ratio": jnp.max(jnp.where(mask, ratio, 0.0)),
        "abs_log": jnp.max(jnp.abs(log_ratio)),
        "excess_squared": jnp.max(jnp.where(mask, excess**2, 0.0)),
    }
    # Counts above each edge, and their differences: no scatter, which is slow on every backend.
    above = jnp.sum(mask[..., None] & (log_ratio[..., None] > EDGES[None, None]), axis=(0, 1), dtype=jnp.float32)
    histogram = -jnp.diff(above, prepend=jnp.sum(mask, dtype=jnp.float32), append=0.0)
    return jax.lax.stop_gradient(Stats(sums=sums, maxima=maxima, histogram=histogram))


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


def summarize(stats: Stats) -> dict[str, float]:
    """Named numbers of merged statistics, on the host. docs/metrics.md explains each."""
    stats = jax.tree.map(np.asarray, stats)

    def mean(name):
        total, number = stats.sums[name]
        return float(total / number) if number > 0 else 0.0

    first, second = mean("excess"), mean("excess_squared")
    total, number = stats.sums["excess_squared"]
    # From r itself, not from r - 1: where every r is tiny, 1 + E[r - 1] cancels to 0 / 0.
    ess = mean("ratio") ** 2 / mean("ratio_squared") if number > 0 else 1.0
    return {
        "ratio/mean": 1 + first,
        "ratio/second_moment_mean": second,
        "ratio/variance": max(second - first**2, 0.0),  # rounding may leave it below zero
        "ratio/second_moment_positive": mean("excess_squared_positive"),
        "ratio/second_moment_negative": mean("excess_squared_negative"),
        "ratio/effective_sample_size": ess,
        "ratio/max": float(stats.maxima["ratio"]),
        "ratio/max_abs_log": float(stats.maxima["abs_log"]),
        "ratio/mean_abs_log": mean("abs_log"),
        "ratio/log_p01": quantile(stats.histogram, 0.01),
        "ratio/log_p99": quantile(stats.histogram, 0.99),
        "ratio/top_token_share": float(stats.maxima["excess_squared"] / total) if total > 0 else 0.0,
        "clip/fraction": mean("clipped"),
        "clip/fraction_positive": mean("clipped_positive"),
        "clip/fraction_negative": mean("clipped_negative"),
        "clip/gradient_share": mean("clipped_gradient"),
    }
