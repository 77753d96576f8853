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
import numpy as np

from r2vpo_jax.losses.arrays import clamp, spread, unmasked
from r2vpo_jax.rollout import Rollout
from r2vpo_jax.training import terms, update
from r2vpo_jax.training.settings import UpdateSettings
from r2vpo_jax.training.update import LearnerState


class TokenGradients(NamedTuple):
    """Of some rows of a batch."""

    rows: jax.Array  # int32 [n], their numbers in the batch
    log_ratio: jax.Array  # f32 [n, T], 0 beyond the response
    kept: jax.Array  # f32 [n, T]; NaN where nothing is at stake (A = 0), and beyond the response


def worth_a_look(outline: Rollout, number: int, settings: UpdateSettings) -> np.ndarray:
    """Rows of the first minibatch: of each problem a good response and a bad one, where there are, and then any others.

    Args:
      outline: of the batch, with advantages, on the host (`rows.Rows.outline`).
      number: of rows.
      settings: of the run.

    Returns:
      int32 [number], or fewer where a minibatch has fewer.
    """
    size, group = len(outline.keep) // settings.num_minibatches, settings.group_size
    found = []
    if outline.advantage.ndim == 1:  # where it is of each token, no process knows that of all rows
        advantage = np.where(outline.keep, outline.advantage, 0.0)[:size]
        for first in range(0, size, group):
            for sign in (1, -1):
                found += (first + np.flatnonzero(sign * advantage[first : first + group] > 0)[:1]).tolist()
    return np.array([*found, *(row for row in range(size) if row not in found)][:number], np.int32)


def first_minibatch(rollout: Rollout, settings: UpdateSettings) -> Rollout:
    """The first rows of a rollout batch, as many as a minibatch has."""
    size = rollout.tokens.shape[0] // settings.num_minibatches
    return jax.tree.map(lambda x: x[:size], rollout)


def of_rows(state: LearnerState, minibatch: Rollout, rows, model, settings: UpdateSettings) -> TokenGradients:
    """What the objective gives the tokens of some responses. Can be traced.

    Args:
      state: after the updates on the batch.
      minibatch: `first_minibatch` of it, as `update.before_updates` leaves it.
      rows: int32 [n], numbers of rows in it.
      model, settings: of the run.
    """
    objective = settings.objective
    computed = update.computed_arguments(state, minibatch, model, settings)
    # Whole micro-batches, as scoring takes them: the last row is there several times.
    filled = jnp.pad(rows, (0, -len(rows) % (settings.micro_batch_size or len(minibatch.keep))), mode="edge")
    batch = jax.tree.map(lambda x: x[filled], minibatch)
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
    return TokenGradients(rows, log_ratio[: len(rows)], kept[: len(rows)])
