"""What every objective shares: the ratio, and the reduction of tokens to a loss and statistics."""

import dataclasses
from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array

from r2vpo_jax.losses.arrays import (
    LOG_RATIO_CLAMP,
    Mask,
    Normalizer,
    PerToken,
    Scalar,
    check_tokens,
    clamp,
    spread,
    unmasked,
)

REDUCTIONS = ("token_mean", "sequence_mean", "constant_length")

Statistics = dict[str, tuple[Array, Array]]
Loss = tuple[Scalar, Statistics]


def count(mask: Mask, reduction: str) -> Scalar:
    """The default normalizer of a reduction, for a whole batch or one micro-batch (they add up).

    Raises:
      ValueError: for `constant_length`, whose normalizer is B * L_max and not in the mask; or an unknown name.
    """
    mask = jnp.asarray(mask).astype(bool)
    if reduction == "token_mean":
        return jnp.sum(mask, dtype=jnp.float32)
    if reduction == "sequence_mean":
        return jnp.sum(jnp.any(mask, axis=-1), dtype=jnp.float32)
    if reduction == "constant_length":
        raise ValueError("reduction 'constant_length' needs normalizer=B * L_max")
    raise ValueError(f"unknown reduction {reduction!r}; one of {REDUCTIONS}")


def token_weights(mask: Mask, reduction: str, normalizer: Normalizer = None) -> PerToken:
    """What one unit at each token adds to a loss: the derivative of `reduce` by its values.

    Raises:
      ValueError: as `count`.
    """
    mask = jnp.asarray(mask).astype(bool)
    if normalizer is None:
        normalizer = count(mask, reduction)
    normalizer = jnp.asarray(normalizer, jnp.float32)
    chex.assert_rank(normalizer, 0)
    return _sum_weights(mask, reduction) / jnp.where(normalizer == 0, 1.0, normalizer)


def reduce(values: PerToken, mask: Mask, reduction: str, normalizer: Normalizer = None) -> Scalar:
    """Reduce a term of one's own (a KL penalty, an entropy bonus) exactly as the objectives reduce theirs.

    Args:
      values: f32[B, T]. Masked positions contribute exactly nothing.
      mask, reduction, normalizer: see the package.

    Raises:
      AssertionError: shapes differ (chex).
      ValueError: as `count`.
    """
    mask = check_tokens(mask, values)
    return jnp.sum(unmasked(values, mask) * token_weights(mask, reduction, normalizer))


def _sum_weights(mask, reduction):
    """The weight of each token in the numerator of a reduction."""
    if reduction == "sequence_mean":
        return mask / jnp.maximum(jnp.sum(mask, axis=-1, keepdims=True, dtype=jnp.float32), 1.0)
    if reduction in REDUCTIONS:
        return mask.astype(jnp.float32)
    raise ValueError(f"unknown reduction {reduction!r}; one of {REDUCTIONS}")


@dataclasses.dataclass(frozen=True)
class Tokens:
    """What every objective computes first; masked positions hold harmless numbers (ratio 1, advantage 0)."""

    logp: Array  # no gradient where clamped
    behavior_logp: Array
    log_ratio: Array  # clamped, and without a gradient there
    advantages: Array
    mask: Array
    weights: Array
    clamped: Array

    @property
    def ratio(self) -> Array:
        """r."""
        return jnp.exp(self.log_ratio)

    @property
    def excess(self) -> Array:
        """r - 1, accurate near 0."""
        return jnp.expm1(self.log_ratio)

    @property
    def length(self) -> Array:
        """f32[B, 1]: unmasked tokens of each row."""
        return jnp.sum(self.mask, axis=-1, keepdims=True, dtype=jnp.float32)

    def sequence_log_ratio(self) -> Array:
        """f32[B, T]: each token holds the sum of its row's log-ratios, without a gradient."""
        total = jnp.sum(jax.lax.stop_gradient(self.log_ratio), axis=-1, keepdims=True)
        return jnp.broadcast_to(total, self.mask.shape)

    def mean_log_ratio(self) -> Array:
        """f32[B, T]: each token holds the mean of its row's log-ratios, without a gradient."""
        return self.sequence_log_ratio() / jnp.maximum(self.length, 1.0)

    def with_coefficient(self, value) -> Array:
        """`value` [B, T], with `value` as the gradient coefficient of each token too.

        The token form of a sequence-level term: for s = exp(mean_t log r_t), common to the T tokens of a row,
        the sum over the row of s A has derivative s A by each log r_t, and so has this.
        """
        # The inner brackets make the second factor exactly 1 in value.
        return jax.lax.stop_gradient(value) * (1.0 + (self.log_ratio - jax.lax.stop_gradient(self.log_ratio)))

    def score_function(self, coefficient) -> Array:
        """sg(coefficient) log pi: a REINFORCE term with that gradient coefficient."""
        return jax.lax.stop_gradient(coefficient) * self.logp

    def outside(self, value, low, high) -> tuple[Array, Array]:
        """Tokens where a clip of `value` to [low, high] binds: (A < 0 and below it, A > 0 and above it)."""
        return (self.advantages < 0) & (value < low), (self.advantages > 0) & (value > high)

    def finish(self, surrogate, reduction, normalizer, *, penalty=None, excess=None, cut=None, **extra) -> Loss:
        """Reduce -surrogate + penalty to the loss, and the per-token statistics to (sum, count).

        Args:
          surrogate: [B, T], to be maximized.
          reduction, normalizer: see the package.
          penalty: [B, T], subtracted from the surrogate.
          excess: what `ratio_variance` is the square of, if not r - 1.
          cut: (low, high), tokens that a bound took the gradient from, reported as `clip_fraction_low` and `_high`.
          **extra: further statistics [B, T].
        """
        weighted = {"surrogate": self.weights * surrogate}
        objective = weighted["surrogate"]
        if penalty is not None:
            weighted["penalty"] = self.weights * penalty
            objective = objective - weighted["penalty"]
        loss = -reduce(objective, self.mask, reduction, normalizer)
        if cut is not None:
            extra |= {"clip_fraction_low": cut[0], "clip_fraction_high": cut[1]}

        stat_reduction = "token_mean" if reduction == "constant_length" else reduction
        stat_count = count(self.mask, stat_reduction)
        per_token = {
            **weighted,
            "ratio_variance": self.weights * (self.excess if excess is None else excess) ** 2,
            "clamped": self.clamped,
            **extra,
        }
        stats = {
            k: (jax.lax.stop_gradient(reduce(v, self.mask, stat_reduction, 1.0)), stat_count)
            for k, v in per_token.items()
        }
        return loss, stats


def prepare(logp, behavior_logp, advantages, mask, weights) -> Tokens:
    """Check shapes, drop what is masked, and take the log-ratio in float32.

    Raises:
      AssertionError: shapes or ranks do not fit (chex).
    """
    mask = check_tokens(mask, logp, behavior_logp, weights)
    weights = jnp.ones(mask.shape, jnp.float32) if weights is None else weights
    logp, behavior_logp = unmasked(logp, mask), jax.lax.stop_gradient(unmasked(behavior_logp, mask))
    log_ratio = logp - behavior_logp
    clamped = jnp.abs(log_ratio) > LOG_RATIO_CLAMP
    return Tokens(
        logp=jnp.where(clamped, jax.lax.stop_gradient(logp), logp),
        behavior_logp=behavior_logp,
        log_ratio=jnp.where(clamped, clamp(log_ratio), log_ratio),
        advantages=jax.lax.stop_gradient(spread(advantages, mask)),
        mask=mask,
        weights=jax.lax.stop_gradient(unmasked(weights, mask)),
        clamped=clamped,
    )


def require(condition: Callable[[], bool], message: str) -> None:
    """Raise ValueError for a hyper-parameter out of range.

    Under jit, vmap or scan a hyper-parameter may be a traced value, of which nothing can be said while the program is
    made: what depends on one passes. Whoever traces a value checks it beforehand (`losses.check_hyperparameters`).

    Args:
      condition: says whether the hyper-parameter is in range.
      message: of the error.
    """
    try:
        holds = bool(condition())
    except jax.errors.TracerBoolConversionError:
        return
    if not holds:
        raise ValueError(message)


def check_clip(clip_low, clip_high, dual_clip=None) -> None:
    """Bounds 1 - clip_low and 1 + clip_high of a ratio, and dual_clip beyond 1."""
    require(
        lambda: 0 <= clip_low <= 1 and clip_high >= 0,
        f"clip_low must be in [0, 1] and clip_high >= 0, got {clip_low} and {clip_high}",
    )
    require(lambda: dual_clip is None or dual_clip > 1, f"dual_clip must be above 1, got {dual_clip}")
