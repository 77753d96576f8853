"""What the objective does with each token of a few responses, once the updates on their batch have been made.

For people who look at a run, not for learning. Of a token with ratio r = π/μ (π after the last update on the batch, μ
the policy that sampled it) and advantage A,

    log ratio   log r
    kept        g / (r A)

where g is the token's coefficient in the gradient of the objective, taken from the loss by its derivative at π, with the
multipliers as they are then: what one more update on the batch would give the token. r A is the policy gradient that
nothing holds back. So kept is 1 where the objective leaves a token alone, 0 where a clip cuts it, 1 - 2 λ (r - 1) / A for
R²VPO, negative where the token is pulled back, and above 1 where its weight is larger than r. As everywhere, g has
importance weights and a KL penalty in the loss in it, and no entropy bonus, imitation or critic.

What a loss takes of a whole minibatch (M2PO's threshold, the scale of λ) is that of the minibatch which the first rows of
the batch make.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from r2vpo_jax.losses.arrays import clamp, spread, unmasked
from r2vpo_jax.rollout import Rollout
from r2vpo_jax.training import terms, update
from r2vpo_jax.training.settings import UpdateSettings
from r2vpo_jax.training.update import LearnerState


class TokenGradients(NamedTuple):
    """Of the first rows of a batch."""

    log_ratio: jax.Array  # f32 [rows, T], 0 beyond the response
    kept: jax.Array  # f32 [rows, T]; NaN where nothing is at stake (A = 0), and beyond the response


def first_minibatch(rollout: Rollout, settings: UpdateSettings) -> Rollout:
    """The first rows of a rollout batch, as many as a minibatch has."""
    size = rollout.tokens.shape[0] // settings.num_minibatches
    return jax.tree.map(lambda x: x[:size], rollout)


def of_first_rows(
    state: LearnerState, minibatch: Rollout, number: int, model, settings: UpdateSettings
) -> TokenGradients:
    """What the objective gives the tokens of the first `number` responses. Can be traced.

    Args:
      state: after the updates on the batch.
      minibatch: `first_minibatch` of it, as `update.before_updates` leaves it.
      number: of responses, at most those of the minibatch.
      model, settings: of the run.
    """
    objective = settings.objective
    computed = update.computed_arguments(state, minibatch, model, settings)
    micro = settings.micro_batch_size or len(minibatch.keep)
    batch = jax.tree.map(lambda x: x[: -(-number // micro) * micro], minibatch)
    logp = update.score(state.params, batch, model, settings)
    weights, _ = terms.update_weights(batch, logp, objective)
    batch = batch.replace(weights=weights)
    reduction = {"reduction": objective.loss.reduction, "normalizer": terms.normalizer(batch, objective)}
    shared = {"batch": batch, "kl_coef": state.kl_coef, "objective": objective}
    loss_of = functools.partial(terms.policy_loss, **shared, **reduction, **computed)
    mask = batch.response_mask
    coefficient = terms.gradient_coefficient(lambda x: loss_of(x)[0], logp, batch.learning_mask, reduction)
    log_ratio = unmasked(logp, mask) - unmasked(batch.behavior_logp, mask)
    unclipped = jnp.exp(clamp(log_ratio)) * spread(batch.advantage, mask)
    there = mask & (unclipped != 0) & jnp.isfinite(unclipped)
    kept = jnp.where(there, unmasked(coefficient, batch.learning_mask) / jnp.where(there, unclipped, 1.0), jnp.nan)
    return jax.tree.map(lambda x: x[:number], TokenGradients(log_ratio, kept))
