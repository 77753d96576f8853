"""Policy objectives on plain arrays.

Every objective is one pure function of arrays, safe under jit, vmap and grad:

    loss, stats = r2vpo_loss(logp, behavior_logp, advantages, mask, variance_coef=2.5)

Shapes: `logp`, `behavior_logp` f32[B, T]; `advantages` f32[B] (one a sequence) or f32[B, T]; `mask` bool or
0/1 [B, T]. Masked positions contribute exactly nothing, to value and gradient, even if they hold NaN or inf.
`r = exp(logp - behavior_logp)` is the policy ratio against the policy that *generated* the token.

Reductions (the count in parentheses is the default `normalizer`):
  token_mean       mean over unmasked tokens (number of unmasked tokens)
  sequence_mean    mean over sequences of per-sequence token means (sequences with an unmasked token)
  constant_length  sum divided by `normalizer`, then required: B * L_max (Dr. GRPO, arXiv 2503.20783)
Give the *global* count as `normalizer` when the batch is one micro-batch of many: the losses, and their
gradients, then add up to those of the whole batch. An empty mask gives 0.

`stats` maps names to (sum, count), additive over micro-batches. All objectives report
  surrogate       the objective's own policy term, to be maximized
  ratio_variance  (r - 1)^2 under the same weights, mask and count as the loss; the dual's constraint
  clamped         tokens whose |log-ratio| exceeds LOG_RATIO_CLAMP: their gradient is zero
For constant_length the count of a statistic is the number of unmasked tokens.
"""

import dataclasses
from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

# A numerical guard, not a trust region: exp(20)^2 is still finite in float32.
LOG_RATIO_CLAMP = 20.0

REDUCTIONS = ("token_mean", "sequence_mean", "constant_length")

Stats = dict[str, tuple[Array, Array]]
Loss = tuple[Float[Array, ""], Stats]


def count(mask: Bool[Array, "batch time"], reduction: str) -> Float[Array, ""]:
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


def r2vpo_loss(
    logp: Float[Array, "batch time"],
    behavior_logp: Float[Array, "batch time"],
    advantages: Float[Array, "batch"] | Float[Array, "batch time"],
    mask: Bool[Array, "batch time"],
    *,
    variance_coef: float | Float[Array, ""],
    weights: Float[Array, "batch time"] | None = None,
    reduction: str = "token_mean",
    normalizer: float | Float[Array, ""] | None = None,
) -> Loss:
    """Ratio-variance regularized policy optimization.

        L = -E[ r A ] + lambda E[ (r - 1)^2 ],     gradient coefficient  g(r) = r (A - 2 lambda (r - 1))

    The gradient fades smoothly and turns back at r* = 1 + A / (2 lambda); no token is cut off. With E[r] = 1
    the penalty is the variance of the ratio, which is the chi-square divergence of the policy from the
    behavior policy. The constant -lambda * budget is left out: it has no gradient.

    Source: the constraint and its primal-dual solution are stated in arXiv 2601.03320 and 2605.26784; the
    formula is our derivation from that statement (docs/algorithms/r2vpo.md).

    Args:
      logp: log-probabilities under the policy that is trained.
      behavior_logp: log-probabilities under the policy that generated the tokens. No gradient flows into it.
      advantages: no gradient flows into them.
      mask: response tokens that count.
      variance_coef: lambda >= 0, the multiplier (`dual.DualState.variance_coef` when it adapts).
      weights: multiply surrogate and penalty, never the normalizer (importance corrections); stop-gradient.
      reduction, normalizer: see the module.

    Returns:
      (loss, stats); stats also has `penalty`, lambda (r - 1)^2.

    Raises:
      AssertionError: shapes or ranks do not fit (chex).
      ValueError: unknown reduction, or `constant_length` without a normalizer.
    """
    x = _prepare(logp, behavior_logp, advantages, mask, weights)
    variance_coef = jax.lax.stop_gradient(jnp.asarray(variance_coef, jnp.float32))
    chex.assert_rank(variance_coef, 0)
    penalty = variance_coef * x.excess**2
    return x.finish(x.ratio * x.advantages, reduction, normalizer, penalty=penalty)


def ppo_clip_loss(
    logp: Float[Array, "batch time"],
    behavior_logp: Float[Array, "batch time"],
    advantages: Float[Array, "batch"] | Float[Array, "batch time"],
    mask: Bool[Array, "batch time"],
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    weights: Float[Array, "batch time"] | None = None,
    reduction: str = "token_mean",
    normalizer: float | Float[Array, ""] | None = None,
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
    """
    if not (0 <= clip_low <= 1 and clip_high >= 0):
        raise ValueError(f"clip_low must be in [0, 1] and clip_high >= 0, got {clip_low} and {clip_high}")
    if dual_clip is not None and not dual_clip > 1:
        raise ValueError(f"dual_clip must be above 1, got {dual_clip}")
    x = _prepare(logp, behavior_logp, advantages, mask, weights)
    clipped = jnp.clip(x.ratio, 1 - clip_low, 1 + clip_high)
    surrogate = jnp.minimum(x.ratio * x.advantages, clipped * x.advantages)
    bounded = jnp.zeros_like(x.mask)
    if dual_clip is not None:
        bounded = (x.advantages < 0) & (x.ratio > dual_clip)
        surrogate = jnp.where(x.advantages < 0, jnp.maximum(surrogate, dual_clip * x.advantages), surrogate)
    return x.finish(
        surrogate,
        reduction,
        normalizer,
        clip_fraction_low=((x.advantages < 0) & (x.ratio < 1 - clip_low)).astype(jnp.float32),
        clip_fraction_high=((x.advantages > 0) & (x.ratio > 1 + clip_high)).astype(jnp.float32),
        dual_clip_fraction=bounded.astype(jnp.float32),
    )


def policy_gradient_loss(
    logp: Float[Array, "batch time"],
    behavior_logp: Float[Array, "batch time"],
    advantages: Float[Array, "batch"] | Float[Array, "batch time"],
    mask: Bool[Array, "batch time"],
    *,
    weights: Float[Array, "batch time"] | None = None,
    reduction: str = "token_mean",
    normalizer: float | Float[Array, ""] | None = None,
) -> Loss:
    """Importance-weighted policy gradient without any trust region: L = -E[ r A ], coefficient r A.

    It is `r2vpo_loss` at variance_coef 0. Source: conservative policy iteration's surrogate, as in
    arXiv 1707.06347, equation 6.

    Args, Returns, Raises: as `r2vpo_loss`.
    """
    x = _prepare(logp, behavior_logp, advantages, mask, weights)
    return x.finish(x.ratio * x.advantages, reduction, normalizer)


_LOSSES: dict[str, Callable[..., Loss]] = {
    "r2vpo": r2vpo_loss,
    "ppo_clip": ppo_clip_loss,
    "policy_gradient": policy_gradient_loss,
}


def names() -> tuple[str, ...]:
    """The names that `get` knows."""
    return tuple(_LOSSES)


def get(name: str) -> Callable[..., Loss]:
    """The objective of that name.

    Raises:
      ValueError: no such objective; the message lists those there are.
    """
    if name not in _LOSSES:
        raise ValueError(f"unknown objective {name!r}; one of {', '.join(_LOSSES)}")
    return _LOSSES[name]


@dataclasses.dataclass(frozen=True)
class _Tokens:
    """What every objective computes first; masked positions hold harmless numbers (ratio 1, advantage 0)."""

    ratio: Array  # r
    excess: Array  # r - 1, accurate near 0
    advantages: Array
    mask: Array
    weights: Array
    clamped: Array

    def finish(self, surrogate, reduction, normalizer, *, penalty=None, **extra) -> Loss:
        """Reduce -surrogate + penalty to the loss, and the per-token statistics to (sum, count)."""
        weighted = {"surrogate": self.weights * surrogate}
        objective = weighted["surrogate"]
        if penalty is not None:
            weighted["penalty"] = self.weights * penalty
            objective = objective - weighted["penalty"]
        total = -_reduced_sum(objective, self.mask, reduction)
        if normalizer is None:
            normalizer = count(self.mask, reduction)
        normalizer = jnp.asarray(normalizer, jnp.float32)
        chex.assert_rank(normalizer, 0)
        loss = total / jnp.where(normalizer == 0, 1.0, normalizer)

        stat_reduction = "token_mean" if reduction == "constant_length" else reduction
        stat_count = count(self.mask, stat_reduction)
        per_token = {
            **weighted,
            "ratio_variance": self.weights * self.excess**2,
            "clamped": self.clamped.astype(jnp.float32),
            **extra,
        }
        stats = {
            k: (jax.lax.stop_gradient(_reduced_sum(v, self.mask, stat_reduction)), stat_count)
            for k, v in per_token.items()
        }
        return loss, stats


def _prepare(logp, behavior_logp, advantages, mask, weights) -> _Tokens:
    mask = jnp.asarray(mask)
    chex.assert_rank([logp, behavior_logp, mask], 2)
    chex.assert_equal_shape([logp, behavior_logp, mask])
    chex.assert_rank(advantages, {1, 2})
    chex.assert_equal_shape_prefix([advantages, mask], jnp.ndim(advantages))
    mask = mask.astype(bool)
    advantages = jnp.asarray(advantages, jnp.float32)
    if advantages.ndim == 1:
        advantages = jnp.broadcast_to(advantages[:, None], mask.shape)
    if weights is None:
        weights = jnp.ones(mask.shape, jnp.float32)
    chex.assert_equal_shape([weights, mask])

    def unmasked(x):
        # Chosen before any arithmetic, so that a NaN under the mask reaches neither value nor gradient.
        return jnp.where(mask, jnp.asarray(x, jnp.float32), 0.0)

    log_ratio = unmasked(logp) - jax.lax.stop_gradient(unmasked(behavior_logp))
    clamped = jnp.abs(log_ratio) > LOG_RATIO_CLAMP
    log_ratio = jnp.clip(log_ratio, -LOG_RATIO_CLAMP, LOG_RATIO_CLAMP)
    return _Tokens(
        ratio=jnp.exp(log_ratio),
        excess=jnp.expm1(log_ratio),
        advantages=jax.lax.stop_gradient(unmasked(advantages)),
        mask=mask,
        weights=jax.lax.stop_gradient(unmasked(weights)),
        clamped=clamped,
    )


def _reduced_sum(x, mask, reduction):
    """The numerator of a reduction."""
    x = jnp.where(mask, x, 0.0)
    if reduction == "sequence_mean":
        return jnp.sum(jnp.sum(x, axis=-1) / jnp.maximum(jnp.sum(mask, axis=-1), 1))
    if reduction in REDUCTIONS:
        return jnp.sum(x)
    raise ValueError(f"unknown reduction {reduction!r}; one of {REDUCTIONS}")
