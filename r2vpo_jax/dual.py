"""The multiplier of the ratio-variance constraint, and its ascent.

The Lagrangian of  max E[r A]  subject to  V = E[(r - 1)^2] <= budget  is  -E[r A] + lambda (V - budget).
The policy descends it (`losses.r2vpo_loss`); lambda ascends it, once per rollout batch.

lambda's natural scale follows that of the advantages: in the tabular bandit with an active constraint
lambda* = std(A) / (2 sqrt(budget)) (our derivation, checked in tests/test_theory.py). Advantages of unit deviation
(GRPO) and plain differences of rewards (Dr. GRPO) therefore need different multipliers; `advantage_scale` makes
one default serve both: give `advantage_scale(A, mask) * lambda` to the loss.
"""

import dataclasses

import chex
import jax
import jax.numpy as jnp

from r2vpo_jax.losses.arrays import Advantages, Mask, Scalar, check_tokens, spread

RULES = ("projected", "multiplicative")
_SMALLEST = 1e-6  # the multiplicative rule cannot leave 0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DualState:
    """The dual variable."""

    variance_coef: Scalar  # lambda >= 0


def init(coef: float) -> DualState:
    """The multiplier at the start of a run; near where it settles is a warm start.

    Raises:
      ValueError: a negative or non-finite coefficient.

    Example:
      >>> float(init(1.0).variance_coef)
      1.0
    """
    if not isinstance(coef, jax.core.Tracer) and not 0 <= coef < float("inf"):
        raise ValueError(f"the variance coefficient must be a finite number >= 0, got {coef}")
    return DualState(variance_coef=jnp.asarray(coef, jnp.float32))


def update(
    state: DualState,
    ratio_variance: Scalar,
    *,
    budget: float,
    step: float,
    max_coef: float,
    max_step: float | None = None,
    rule: str = "projected",
) -> DualState:
    """One ascent step.

        projected        lambda <- clip(lambda + clip(step (V / budget - 1), +-max_step), 0, max_coef)
        multiplicative   lambda <- clip(lambda exp(clip(step (V / budget - 1), +-max_step)), 1e-6, max_coef)

    The projected rule is gradient ascent of the Lagrangian. The multiplicative one is the same in log lambda: it
    moves by a share of lambda, so it needs no guess of lambda's scale, and never reaches 0.

    Args:
      state: the multiplier.
      ratio_variance: V, measured over the global batch with the penalty's own mask and count. A NaN makes
        lambda NaN: nothing is hidden.
      budget: delta, the bound on V.
      step: c, relative to the budget: at V = 2 budget one move is c, at V = 0 it is -c.
      max_coef: cap of lambda.
      max_step: bound on one move, of lambda or of log lambda. Without it a single outlier token (r = 100 in ten
        thousand tokens makes V = 1) throws lambda to its cap, and it takes hundreds of rollouts to come back.
      rule: "projected" or "multiplicative".

    Returns:
      The new state. No gradient flows through it.

    Raises:
      AssertionError: ratio_variance is not a scalar (chex).
      ValueError: unknown rule.

    Example, V at twice the budget:
      >>> state = update(init(1.0), jnp.float32(0.08), budget=0.04, step=0.5, max_coef=50.0)
      >>> float(state.variance_coef)  # 1 + 0.5 * (0.08 / 0.04 - 1)
      1.5
    """
    if rule not in RULES:
        raise ValueError(f"unknown dual rule {rule!r}; one of {RULES}")
    chex.assert_rank(ratio_variance, 0)
    move = step * (jnp.asarray(ratio_variance, jnp.float32) / budget - 1)
    if max_step is not None:
        move = jnp.clip(move, -max_step, max_step)
    if rule == "projected":
        coef = jnp.clip(state.variance_coef + move, 0.0, max_coef)
    else:
        coef = jnp.clip(state.variance_coef * jnp.exp(jnp.clip(move, -60.0, 60.0)), _SMALLEST, max_coef)
    return DualState(variance_coef=jax.lax.stop_gradient(coef))


def advantage_scale(advantages: Advantages, mask: Mask) -> Scalar:
    """sigma_A: the root mean square of the advantages over the unmasked tokens; 0 for an empty mask.

    Advantages are centered by construction, so this is their deviation. With sigma_A lambda as the multiplier
    r2vpo's loss is proportional to the advantages, and turns back at r* = 1 + (A / sigma_A) / (2 lambda): the
    lambda of the bandit becomes 1 / (2 sqrt(budget)), whatever the scale of rewards (ours).

    Args:
      advantages: f32[B] or f32[B, T].
      mask: [B, T]. Masked positions may hold NaN.

    Returns:
      f32[], without a gradient.

    Raises:
      AssertionError: shapes or ranks do not fit (chex).

    Example:
      >>> float(advantage_scale(jnp.array([7.0, -1.0]), jnp.ones((2, 3))))  # sqrt((49 + 1) / 2)
      5.0
    """
    mask = check_tokens(mask)
    advantages = spread(advantages, mask)
    number = jnp.maximum(jnp.sum(mask, dtype=jnp.float32), 1.0)
    return jax.lax.stop_gradient(jnp.sqrt(jnp.sum(advantages**2) / number))
