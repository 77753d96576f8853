"""The multiplier of the ratio-variance constraint, and its ascent.

The Lagrangian of  max E[r A]  subject to  V = E[(r - 1)^2] <= budget  is  -E[r A] + lambda (V - budget).
The policy descends it (`losses.r2vpo_loss`); lambda ascends it, once per rollout batch. In the tabular
bandit with an active constraint lambda* = std(A) / (2 sqrt(budget)) (our derivation): lambda's natural scale
follows the scale of the advantages.
"""

import chex
import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float


@struct.dataclass
class DualState:
    """The dual variable."""

    variance_coef: Float[Array, ""]  # lambda >= 0


def init(coef: float) -> DualState:
    """The multiplier at the start of a run.

    Raises:
      ValueError: a negative or non-finite coefficient.
    """
    if not 0 <= coef < float("inf"):
        raise ValueError(f"the variance coefficient must be a finite number >= 0, got {coef}")
    return DualState(variance_coef=jnp.asarray(coef, jnp.float32))


def update(
    state: DualState,
    ratio_variance: Float[Array, ""],
    *,
    budget: float,
    step_size: float,
    max_coef: float,
    max_step: float | None = None,
) -> DualState:
    """One projected ascent step:  lambda <- clip(lambda + clip(step_size (V - budget), +-max_step), 0, max_coef).

    Args:
      state: the multiplier.
      ratio_variance: V, measured over the global batch with the penalty's own mask and count. A NaN makes
        lambda NaN: nothing is hidden.
      budget: delta, the bound on V.
      step_size: eta; it scales as c / budget for a step of c at twice the budget.
      max_coef: cap of lambda.
      max_step: bound on one move. Without it a single outlier token (r = 100 in ten thousand tokens makes
        V = 1) throws lambda to its cap, and it takes hundreds of rollouts to come back.

    Returns:
      The new state. No gradient flows through it.

    Raises:
      AssertionError: ratio_variance is not a scalar (chex).
    """
    chex.assert_rank(ratio_variance, 0)
    step = step_size * (jnp.asarray(ratio_variance, jnp.float32) - budget)
    if max_step is not None:
        step = jnp.clip(step, -max_step, max_step)
    return DualState(variance_coef=jax.lax.stop_gradient(jnp.clip(state.variance_coef + step, 0.0, max_coef)))
