"""Policy objectives on plain arrays.

Every objective is one pure function of arrays, safe under jit, vmap and a first derivative (second ones are not those
of the formulas: coefficients are constants in many of them):

    loss, stats = r2vpo_loss(logp, behavior_logp, advantages, mask, variance_coef=2.5)

Shapes: `logp`, `behavior_logp` f32[B, T]; `advantages` f32[B] (one a sequence) or f32[B, T]; `mask` bool or
0/1 [B, T]. Masked positions contribute exactly nothing, to value and gradient, even if they hold NaN or inf.
`r = exp(logp - behavior_logp)` is the policy ratio against the policy that *generated* the token, and g the
coefficient of each token in the gradient of what is maximized, E[ g grad log pi ].

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
and `penalty`, if they have one. For constant_length the count of a statistic is the number of unmasked tokens.

To add an objective: one function in one of the modules here (its name goes into the lists below), one row in
`registry._LOSSES`, its oracles in tests/test_losses*.py, and its paragraph in docs/algorithms/objectives.md. Its
hyper-parameters are the keyword arguments of its signature: `hyperparameters` reads them there. An objective outside
this package needs none of this: `get("module:function")` takes it as it is.
"""

from r2vpo_jax.losses.alternatives import SEPARATOR, Alternatives
from r2vpo_jax.losses.arrays import LOG_RATIO_CLAMP
from r2vpo_jax.losses.clipped import (
    aspo_loss,
    cispo_loss,
    dppo_kl_loss,
    dppo_tv_loss,
    gppo_loss,
    m2po_loss,
    m2po_threshold,
    ppo_clip_loss,
)
from r2vpo_jax.losses.core import REDUCTIONS, Loss, Statistics, count, reduce, token_weights
from r2vpo_jax.losses.penalized import (
    PENALTY_SCOPES,
    PENALTY_WEIGHTS,
    dro_loss,
    drpo_loss,
    policy_gradient_loss,
    r2vpo_loss,
    spo_loss,
)
from r2vpo_jax.losses.registry import check_hyperparameters, computed, get, hyperparameters, names
from r2vpo_jax.losses.sequence import gmpo_loss, gspo_loss, luspo_loss
from r2vpo_jax.losses.soft import sapo_loss, topr_loss, vespo_loss

__all__ = [
    "LOG_RATIO_CLAMP",
    "PENALTY_SCOPES",
    "PENALTY_WEIGHTS",
    "REDUCTIONS",
    "SEPARATOR",
    "Alternatives",
    "Loss",
    "Statistics",
    "aspo_loss",
    "check_hyperparameters",
    "cispo_loss",
    "computed",
    "count",
    "dppo_kl_loss",
    "dppo_tv_loss",
    "dro_loss",
    "drpo_loss",
    "get",
    "gmpo_loss",
    "gppo_loss",
    "gspo_loss",
    "hyperparameters",
    "luspo_loss",
    "m2po_loss",
    "m2po_threshold",
    "names",
    "policy_gradient_loss",
    "ppo_clip_loss",
    "r2vpo_loss",
    "reduce",
    "sapo_loss",
    "spo_loss",
    "token_weights",
    "topr_loss",
    "vespo_loss",
]
