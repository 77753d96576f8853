"""What the update takes of a batch besides the objective: counts, anchors, divergences, and the weights of its tokens."""

import jax
import jax.numpy as jnp

from r2vpo_jax import corrections, kl, losses, ratio_stats
from r2vpo_jax.config.objective import CorrectionConfig, ObjectiveConfig
from r2vpo_jax.rollout import Rollout
from r2vpo_jax.train_stats import TrainStats
from r2vpo_jax.verifiers.outcome import Outcome


def mean_over_tokens(x, mask) -> tuple[jax.Array, jax.Array]:
    """(sum, count) of a statistic of each token."""
    return jnp.sum(jnp.where(mask, x, 0.0)), jnp.sum(mask, dtype=jnp.float32)


def anchor(batch: Rollout) -> jax.Array:
    """The log-probabilities that the ratio is against: proximal ones if the data is corrected, else behavior."""
    return batch.behavior_logp if batch.proximal_logp is None else batch.proximal_logp


def normalizer(batch: Rollout, objective: ObjectiveConfig) -> jax.Array:
    """The count of the reduction over a whole minibatch, f32 []."""
    return _count(batch, batch.keep, objective)


def divergence(batch: Rollout, logp, objective: ObjectiveConfig) -> jax.Array:
    """The configured estimate of a KL divergence at each token, f32 [B, T]."""
    if objective.kl.to == "behavior":
        # KL(anchor || policy) over tokens that the sampler drew: where it is not the anchor, they are weighed, untruncated.
        drawn_by = None if batch.proximal_logp is None else batch.behavior_logp
        return kl.estimate(anchor(batch), logp, objective.kl.estimator, behavior_logp=drawn_by)
    behavior = batch.behavior_logp if objective.kl.corrected else None
    return kl.estimate(logp, batch.reference_logp, objective.kl.estimator, behavior_logp=behavior)


# Right responses, imitated ----------------------------------------------------------------------------------------


def right(batch: Rollout) -> jax.Array:
    """bool [B]: the rows that are right and take part in learning."""
    return batch.keep & (batch.outcome == Outcome.RIGHT)


def imitation_normalizer(batch: Rollout, objective: ObjectiveConfig) -> jax.Array | None:
    """The count of the reduction over the right responses of a whole minibatch, f32 []; None where nothing is imitated."""
    return _count(batch, right(batch), objective) if objective.imitates else None


def imitation(batch: Rollout, logp, reduction: str, normalizer) -> jax.Array:
    """The mean negative log-probability of the right responses, reduced as the loss is (GPPO's code, arXiv 2508.07629).

    Args:
      batch: rows of the minibatch.
      logp: f32 [B, T] under the policy.
      reduction: of the loss.
      normalizer: `imitation_normalizer` of the whole minibatch.
    """
    mask = batch.response_mask & right(batch)[:, None]
    return losses.reduce(-jnp.where(mask, logp, 0.0), mask, reduction, normalizer)


def _count(batch, rows, objective):
    if objective.loss.reduction == "constant_length":
        return jnp.sum(rows, dtype=jnp.float32) * batch.response_size
    return losses.count(batch.response_mask & rows[:, None], objective.loss.reduction)


# Data of another policy -------------------------------------------------------------------------------------------


def correction_weights(proximal_logp, rollout: Rollout, correction: CorrectionConfig) -> jax.Array:
    """The weights of a rollout's tokens before its first update, f32 [B, T]; 0 for responses that are left out."""
    logps = proximal_logp, rollout.behavior_logp, rollout.response_mask
    weights = jnp.where(rollout.response_mask, 1.0, 0.0)
    if correction.mode != "none":
        weights = corrections.importance_weights(
            *logps,
            mode=correction.mode,
            scope=correction.scope,
            max_weight=correction.max_weight,
            min_weight=correction.min_weight,
        )
    if correction.filter != "none":
        kept = corrections.sequence_filter(
            *logps, kind=correction.filter, low=correction.filter_low, high=correction.filter_bound
        )
        weights = weights * kept
    return weights


def update_weights(batch: Rollout, logp, objective: ObjectiveConfig) -> tuple[jax.Array | None, dict]:
    """(weights of the tokens in this update, f32 [B, T] or None; statistics of them).

    Args:
      batch: rows of the minibatch, corrected if that is configured.
      logp: f32 [B, T] under the policy.
      objective: of the run.
    """
    correction, mask = objective.correction, batch.learning_mask
    weights, stats = batch.weights, {}
    if weights is not None:
        stats["weight"] = mean_over_tokens(weights, mask)
        stats["weight_squared"] = mean_over_tokens(weights**2, mask)
    if correction.masks_off_policy:
        kept = corrections.off_policy_mask(
            logp, batch.behavior_logp, batch.advantage, mask, threshold=correction.off_policy_threshold
        )
        weights = kept if weights is None else kept * weights
    if correction.leaves_out:
        stats["left_out"] = mean_over_tokens(weights == 0, mask)
    if correction.step_scaling != "none":
        sequence = corrections.sequence_weights(logp, batch.behavior_logp, mask)
        rows = jnp.any(mask, axis=-1)
        stats["sequence_weight"] = mean_over_tokens(sequence, rows)
        stats["sequence_weight_squared"] = mean_over_tokens(sequence**2, rows)
    return weights, stats


def step_scale(stats: TrainStats, correction: CorrectionConfig) -> jax.Array:
    """What the step of a minibatch is multiplied by, f32 []; 1 unless `objective.correction.step_scaling` is on."""
    if correction.step_scaling == "none":
        return jnp.float32(1)
    total, number = stats.sums["sequence_weight"]
    squared, _ = stats.sums["sequence_weight_squared"]
    return corrections.step_scale(
        total, squared, number, rule=correction.step_scaling, reference=correction.step_reference
    )


# The objective ----------------------------------------------------------------------------------------------------


def policy_loss(logp, *, batch: Rollout, kl_coef, objective: ObjectiveConfig, reduction, normalizer, **given):
    """(loss, stats) of the objective and its KL divergence, as a function of the log-probabilities.

    Args:
      logp: f32 [B, T] under the policy.
      batch: rows of the minibatch, with the weights of `update_weights`.
      kl_coef: f32 [], beta.
      objective: of the run.
      reduction, normalizer: of the loss.
      **given: what else the loss takes (`losses.computed`).
    """
    mask = batch.learning_mask
    shared = {"reduction": reduction, "normalizer": normalizer}
    loss, stats = losses.get(objective.loss.name)(
        logp, anchor(batch), batch.advantage, mask, weights=batch.weights, **shared, **objective.loss.options, **given
    )
    if objective.has_kl:
        estimate = divergence(batch, logp, objective)
        stats["kl"] = mean_over_tokens(estimate, mask)
        if objective.kl.where == "loss":
            loss = loss + kl_coef * losses.reduce(estimate, mask, **shared)
    return loss, stats


def gradient_coefficient(loss_fn, logp, mask, reduction) -> jax.Array:
    """g of each token, f32 [B, T], whatever the objective: elementwise, so cheap.

    Args:
      loss_fn: the loss as a function of log-probabilities.
      logp: f32 [B, T], where the derivative is taken.
      mask: bool [B, T].
      reduction: {"reduction": …, "normalizer": …} of the loss.
    """
    slope = jax.grad(loss_fn)(jax.lax.stop_gradient(logp))
    weight = losses.token_weights(mask, **reduction)
    return -slope / jnp.where(weight == 0, 1.0, weight)


def gradient_stats(loss_fn, logp, batch: Rollout, version, reduction) -> TrainStats:
    """`ratio_stats.compute` with g of each token."""
    return ratio_stats.compute(
        logp,
        anchor(batch),
        batch.advantage,
        batch.learning_mask,
        coefficient=gradient_coefficient(loss_fn, logp, batch.learning_mask, reduction),
        weights=batch.weights,
        age=version - batch.version,
    )
