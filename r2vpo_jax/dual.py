"""The multiplier of the ratio-variance constraint, and its ascent.

The Lagrangian of  max E[r A]  subject to  V = E[(r - 1)^2] <= budget  is  -E[r A] + lambda (V - budget).
The policy descends it (`losses.r2vpo_loss`); lambda ascends it, once per rollout batch. `update` is one pure
controller: bounded integral steps of lambda or of log lambda, with averaging, a proportional part, and the excess over
the bound carried over, each of which is off by default.

lambda's natural scale follows that of the advantages: in the tabular bandit with an active constraint
lambda* = std(A) / (2 sqrt(budget)) (our derivation, checked in tests/test_theory.py). Advantages of unit deviation
(GRPO) and plain differences of rewards (Dr. GRPO) therefore need different multipliers; `advantage_scale` makes
one default serve both: give `advantage_scale(A, mask) * lambda` to the loss.
"""

import dataclasses

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from r2vpo_jax.losses.arrays import Advantages, Mask, Scalar, check_tokens, spread

RULES = ("projected", "multiplicative")
MEASURES = ("before", "corrected", "pooled", "after")
_SMALLEST = 1e-6  # the multiplicative rule cannot leave 0
_LARGEST = 1e30  # of an error: an infinite one times 0 would be NaN


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DualState:
    """The dual variable, and what its controller remembers. `init` makes it."""

    variance_coef: Scalar  # lambda >= 0, the multiplier in force
    integral: Scalar  # lambda without its proportional part
    carried: Scalar  # moves that were cut off and are still to be made: of lambda, or of log lambda
    average: Scalar  # exponential average of the error from 0
    weight: Scalar  # what `average` is to be divided by: 1 - smoothing^updates


def init(coef: float | Scalar) -> DualState:
    """The multiplier at the start of a run; near where it settles is a warm start.

    Args:
      coef: lambda. A traced one is not checked.

    Raises:
      ValueError: a negative or non-finite coefficient.

    Example:
      >>> float(init(1.0).variance_coef)
      1.0
    """
    if not isinstance(coef, jax.core.Tracer) and not 0 <= coef < float("inf"):
        raise ValueError(f"the variance coefficient must be a finite number >= 0, got {coef}")
    # `jnp.array` copies, as a state that is donated may hold no buffer twice.
    variance_coef, integral = (jnp.array(coef, jnp.float32) for _ in range(2))
    carried, average, weight = (jnp.zeros((), jnp.float32) for _ in range(3))
    return DualState(variance_coef, integral, carried, average, weight)


def update(
    state: DualState,
    ratio_variance: Scalar,
    *,
    budget: float | Scalar,
    step: float | Scalar,
    max_coef: float | Scalar,
    max_step: float | Scalar | None = None,
    rule: str = "projected",
    smoothing: float | Scalar = 0.0,
    carry: float | Scalar = 0.0,
    proportional: float | Scalar = 0.0,
) -> DualState:
    """One ascent step.

        error      e = V / budget - 1;  a = its exponential average over the updates so far (smoothing = 0: e)
        move       m = clip(carried + step a, +-max_step)
        carried    clip(carried + step a - m, +-carry max_step), and no more than I's range has room for
        integral   I <- clip(I + m, 0, max_coef)                                projected
                   I <- clip(I exp(m), 1e-6, max_coef)                          multiplicative
        lambda     clip(I + p, 0, max_coef) or clip(I exp(p), 1e-6, max_coef), p = clip(proportional a, +-max_step)

    With the last three arguments at 0, lambda is I and moves by clip(step (V / budget - 1), +-max_step). The
    projected rule is then gradient ascent of the Lagrangian. The multiplicative one is the same in log lambda: it
    moves by a share of lambda, so it needs no guess of lambda's scale, and never reaches 0. The proportional part
    makes it PI control (arXiv 2007.03964, without its derivative); the carrying is ours.

    Every number may be traced, and mapped over with vmap. An option that is a plain 0 costs nothing.

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
      smoothing: in [0, 1), share of the old average in the new one. Divided by the sum of its weights, as Adam's.
      carry: how much of what `max_step` cuts off is moved in later updates, at most, in moves of max_step (0: it is
        lost, infinity: all of it). As long as it stays below that, and lambda within its range, the moves add up
        to the uncut ones, and lambda holds the mean of V rather than a truncated one.
      proportional: k >= 0, gain of the part of lambda that follows the error at once and is not summed.

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
    # As arrays, so that a number gives the same result whether it is traced or not.
    ratio_variance, budget, step, max_coef = (
        jnp.asarray(x, jnp.float32) for x in (ratio_variance, budget, step, max_coef)
    )
    max_step = jnp.asarray(jnp.inf if max_step is None else max_step, jnp.float32)
    advance, room = (_advance, _room) if rule == "projected" else (_advance_log, _room_log)
    error = jnp.minimum(ratio_variance / budget - 1, _LARGEST)

    average, weight, smooth = state.average, state.weight, error
    if _on(smoothing):
        smoothing = jnp.asarray(smoothing, jnp.float32)
        average = smoothing * average + (1 - smoothing) * error
        weight = smoothing * weight + (1 - smoothing)
        smooth = average / weight

    carried, wanted = state.carried, step * smooth
    if _on(carry):
        wanted = carried + wanted
    move = jnp.clip(wanted, -max_step, max_step)
    integral = advance(state.integral, move, max_coef)
    if _on(carry):
        # What lambda's range has no room for would only hold lambda at its bound after V has turned (wind-up).
        carried = jnp.clip(wanted - move, *room(integral, max_coef))
        carry = jnp.asarray(carry, jnp.float32)
        limit = jnp.where(carry > 0, carry * max_step, 0.0)  # 0 times an infinite max_step is NaN
        carried = jnp.clip(carried, -limit, limit)

    coef = integral + 0  # a buffer of its own: a state that is donated may hold none twice
    if _on(proportional):
        part = jnp.clip(jnp.asarray(proportional, jnp.float32) * smooth, -max_step, max_step)
        coef = advance(integral, part, max_coef)
    return jax.lax.stop_gradient(DualState(coef, integral, carried, average, weight))


def _on(number) -> bool:
    """Whether an option can have an effect: a traced 0 is one too, to rounding."""
    return isinstance(number, jax.Array) or number != 0


def _advance(coef, move, max_coef):
    return jnp.clip(coef + move, 0.0, max_coef)


def _advance_log(coef, move, max_coef):
    return jnp.clip(coef * jnp.exp(jnp.clip(move, -60.0, 60.0)), _SMALLEST, max_coef)


def _room(coef, max_coef):
    """The largest moves down and up that lambda's range takes."""
    return -coef, max_coef - coef


def _room_log(coef, max_coef):
    coef = jnp.maximum(coef, _SMALLEST)
    return jnp.log(_SMALLEST / coef), jnp.log(max_coef / coef)


def end_of_batch_variance(ratio_variance: Scalar, num_updates: int) -> Scalar:
    """V after the last of N updates, extrapolated from V before it: V (N / (N - 1))^2.

    With equal steps r - 1 grows in proportion to the updates done, so V as their square: N - 1 updates are behind
    the one measured, N behind the one wanted (ours; the factor is exact to first order in the step, as
    tests/test_theory.py shows with a bandit). On stale data it holds for what this batch's updates added.

    Args:
      ratio_variance: V of the last minibatch, before its own update.
      num_updates: N, updates on the rollout batch.

    Raises:
      ValueError: fewer than two updates: before the first one r = 1, which says nothing.

    Example:
      >>> end_of_batch_variance(0.03, 2)
      0.12
    """
    _check_updates(num_updates)
    return ratio_variance * (num_updates / (num_updates - 1)) ** 2


def pooled_variance(added: Float[Array, "updates"], counts: Float[Array, "updates"]) -> Scalar:
    """V after the last of N updates, estimated from every minibatch of the batch rather than from the last alone.

        sum_k n_k V_k / sum_k n_k ((k - 1) / N)^2,   V_k of n_k tokens, measured with k - 1 updates done

    The growth is that of `end_of_batch_variance`, fitted to all V_k at once, each weighed by its tokens and by what it
    should be: more tokens under the same heavy tail, at no cost (ours).

    Args:
      added: f32[N] V of each minibatch before its own update; on stale data less that of the first.
      counts: f32[N] tokens of each.

    Returns:
      f32[]; NaN if a V is.

    Raises:
      ValueError: fewer than two updates.

    Example, of V that grows as it should to 0.04:
      >>> float(pooled_variance(jnp.array([0.0, 0.01]), jnp.array([7.0, 5.0]))).__round__(6)
      0.04
    """
    num_updates = len(added)
    _check_updates(num_updates)
    growth = (jnp.arange(num_updates, dtype=jnp.float32) / num_updates) ** 2
    return jnp.sum(counts * added) / jnp.sum(counts * growth)


def _check_updates(number: int) -> None:
    if number < 2:
        raise ValueError(f"V after the last update cannot be told from {number} update: it takes at least 2")


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
