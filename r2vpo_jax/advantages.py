"""Advantages from rewards. Groups (the G samples of one prompt) are contiguous rows.

A reward of NaN is an abstention: there is no verdict on that response. It counts in no baseline and no deviation,
and its own advantage is 0.
"""

import dataclasses
import inspect
from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from r2vpo_jax.losses.arrays import Mask, PerToken, check_tokens, unmasked
from r2vpo_jax.losses.registry import import_own

SCALES = ("std", "std_biased", "batch", "mean", "none")


def _grouped(rewards, group_size):
    """(rewards [groups, G] with 0 for abstentions, their mask, number of votes [groups, 1])."""
    rewards = jnp.asarray(rewards, jnp.float32)
    chex.assert_rank(rewards, 1)
    if group_size < 1 or rewards.shape[0] % group_size:
        raise ValueError(f"{rewards.shape[0]} rewards are not a whole number of groups of {group_size}")
    grouped = rewards.reshape(-1, group_size)
    voted = ~jnp.isnan(grouped)
    return jnp.where(voted, grouped, 0.0), voted, jnp.sum(voted, axis=1, keepdims=True, dtype=jnp.float32)


def _all_equal(grouped, voted):
    """bool [groups, 1]: the rewards of the group do not differ (or there are fewer than two)."""
    lowest = jnp.min(jnp.where(voted, grouped, jnp.inf), axis=1, keepdims=True)
    highest = jnp.max(jnp.where(voted, grouped, -jnp.inf), axis=1, keepdims=True)
    return lowest >= highest


def zero_variance(rewards: Float[Array, " batch"], group_size: int) -> Bool[Array, " batch"]:
    """Rows of groups whose rewards do not differ: they give no gradient.

    Args:
      rewards: f32[B], groups contiguous; NaN for an abstention.
      group_size: G.

    Raises:
      ValueError: B is not a multiple of G.

    Example:
      >>> zero_variance(jnp.array([1.0, 0.0, 1.0, 1.0]), group_size=2).tolist()
      [False, False, True, True]
    """
    grouped, voted, _ = _grouped(rewards, group_size)
    return jnp.broadcast_to(_all_equal(grouped, voted), grouped.shape).reshape(-1)


def group_relative(
    rewards: Float[Array, " batch"], group_size: int, *, scale: str = "std", epsilon: float = 1e-6
) -> Float[Array, " batch"]:
    """Reward minus the mean of its group, divided by a scale if asked.

        A_i = (R_i - mean(R)) / (std(R) + epsilon)

    `scale="std"` is the unbiased deviation (over G - 1), GRPO (arXiv 2402.03300) as TRL and verl implement it;
    the paper does not say which, and "std_biased" is the one over G. `scale="batch"` is the unbiased deviation of all
    rewards of the batch, whatever their group (`scale_rewards="batch"` of TRL): take it over the global batch.
    `scale="mean"` divides by the mean of the group instead, MaxRL (arXiv 2602.02710; the estimator "maxrl" of its code,
    tajwarfahim/maxrl): with rewards of 0 and 1 and K right of G, a right answer gets G/K - 1 and a wrong one -1, the
    gradient of the log of the success rate. It is for rewards >= 0; a group whose mean is not above 0 gives zeros.
    `scale="none"` is Dr. GRPO (arXiv 2503.20783). A group of equal rewards, or of one, gives zeros.

    Args:
      rewards: f32[B], groups contiguous; NaN for an abstention.
      group_size: G.
      scale: "std", "std_biased", "batch", "mean" or "none".
      epsilon: keeps the quotient finite.

    Raises:
      ValueError: B is not a multiple of G, or an unknown scale.

    Example, mean 1/4, deviation sqrt((9 + 1 + 1 + 1) / 16 / 3) = 1/2:
      >>> np.asarray(group_relative(jnp.array([1.0, 0.0, 0.0, 0.0]), group_size=4)).round(3).tolist()
      [1.5, -0.5, -0.5, -0.5]
    """
    if scale not in SCALES:
        raise ValueError(f"unknown scale {scale!r}; one of {SCALES}")
    grouped, voted, votes = _grouped(rewards, group_size)
    lowest = jnp.min(jnp.where(voted, grouped, jnp.inf), axis=1, keepdims=True)
    # From the lowest reward of the group: a mean of large numbers would round their differences away.
    shifted = jnp.where(voted, grouped - lowest, 0.0)
    centered = shifted - jnp.sum(shifted, axis=1, keepdims=True) / jnp.maximum(votes, 1.0)
    # Exactly equal rewards: no rounding residue may be blown up by 1 / epsilon.
    centered = jnp.where(voted & ~_all_equal(grouped, voted), centered, 0.0)
    if scale == "none":
        return centered.reshape(-1)
    if scale == "mean":
        mean = jnp.sum(grouped, axis=1, keepdims=True) / jnp.maximum(votes, 1.0)
        return jnp.where(mean > 0, centered / (jnp.where(mean > 0, mean, 1.0) + epsilon), 0.0).reshape(-1)
    if scale == "batch":
        return (centered / (_deviation(grouped, voted) + epsilon)).reshape(-1)
    freedom = votes - 1.0 if scale == "std" else votes
    variance = jnp.sum(centered**2, axis=1, keepdims=True) / jnp.maximum(freedom, 1.0)
    return (centered / (jnp.sqrt(variance) + epsilon)).reshape(-1)


def _deviation(values, counted):
    """The unbiased deviation of the values that count, all groups together; f32 []."""
    number = jnp.sum(counted, dtype=jnp.float32)
    shifted = jnp.where(counted, values - jnp.min(jnp.where(counted, values, jnp.inf)), 0.0)
    centered = jnp.where(counted, shifted - jnp.sum(shifted) / jnp.maximum(number, 1.0), 0.0)
    return jnp.sqrt(jnp.sum(centered**2) / jnp.maximum(number - 1.0, 1.0))


def gdpo(
    parts: Float[Array, "batch functions"],
    group_size: int,
    weights: Float[Array, " functions"] | None = None,
    *,
    epsilon: float = 1e-6,
) -> Float[Array, " batch"]:
    """GDPO: each reward function is normalized within the group by itself, before they are added up.

        A_k = (R_k - mean(R_k)) / (std(R_k) + epsilon),   S = sum_k w_k A_k,   A = (S - mean S) / (std S + epsilon)

    The first mean and deviation are those of the group, the last of the batch; all deviations are unbiased. Adding up
    first would let two responses with different rewards, (1, 0) and (0, 1), have one advantage, and would let the
    function with the largest numbers decide.

    Source: arXiv 2601.05242, as TRL has it (`multi_objective_aggregation="normalize_then_sum"`; its epsilon is 1e-4).

    Args:
      parts: rewards by function, groups contiguous. NaN where a function does not apply to a response: it adds nothing
        there and is in no mean. A response to which none applies abstains.
      group_size: G.
      weights: of the functions; their size does not reach `parts`. Default: 1 each.
      epsilon: keeps the quotients finite.

    Raises:
      AssertionError: shapes or ranks do not fit (chex).
      ValueError: B is not a multiple of G.

    Example, one group; the functions give (0.7071, -0.7071) and half of (-0.7071, 0.7071), so S = (0.3536, -0.3536):
      >>> parts = jnp.array([[1.0, 0.0], [0.0, 100.0]])
      >>> [round(float(a), 4) for a in gdpo(parts, 2, jnp.array([1.0, 0.5]))]
      [0.7071, -0.7071]
    """
    parts = jnp.asarray(parts, jnp.float32)
    chex.assert_rank(parts, 2)
    weights = jnp.ones(parts.shape[1]) if weights is None else jnp.asarray(weights, jnp.float32)
    chex.assert_shape(weights, parts.shape[1:])
    each = [group_relative(part, group_size, epsilon=epsilon) for part in parts.T]
    total = jnp.sum(weights * jnp.stack(each, axis=1), axis=1)
    voted = ~jnp.all(jnp.isnan(parts), axis=1)
    mean = jnp.sum(jnp.where(voted, total, 0.0)) / jnp.maximum(jnp.sum(voted), 1)
    deviation = _deviation(total, voted)
    # Equal sums: what is left of them is rounding.
    scaled = jnp.where(deviation > epsilon * jnp.sum(jnp.abs(weights)), (total - mean) / (deviation + epsilon), 0.0)
    return jnp.where(voted, scaled, 0.0)


def minimum_variance(
    advantages: Float[Array, " batch"],
    group_size: int,
    weights: Float[Array, " batch"],
) -> Float[Array, " batch"]:
    """The advantages with the baseline of each group moved to where the variance of the gradient is least.

        A_i <- A_i - b,     b = sum_j W_j A_j / sum_j W_j,     W_j = w_j^2 |grad log pi(response j)|^2

    with w the importance weight of the whole response. Whatever baseline A was taken from, and whatever scale the group
    was divided by, the result is (R_i - b*) over that scale, with b* the same mean of the rewards.

    Source: arXiv 2602.17616, the off-policy optimal baseline of VCPO (mit-han-lab/vcpo, scope "group").

    Args:
      advantages: groups contiguous.
      group_size: G.
      weights: W >= 0; 0 for responses that take no part. A group in which all are 0 stays as it is.

    Raises:
      ValueError: B is not a multiple of G.

    Example, b = (1 * 1 + 3 * -1) / 4 = -1/2:
      >>> minimum_variance(jnp.array([1.0, -1.0]), 2, jnp.array([1.0, 3.0])).tolist()
      [1.5, -0.5]
    """
    chex.assert_equal_shape([advantages, weights])
    grouped, _, _ = _grouped(advantages, group_size)
    weights = jnp.asarray(weights, jnp.float32).reshape(grouped.shape)
    # Relative to the largest: squares of importance weights span more than float32 adds up.
    largest = jnp.max(weights, axis=1, keepdims=True)
    share = weights / jnp.where(largest > 0, largest, 1.0)
    total = jnp.sum(share, axis=1, keepdims=True)
    counted = jnp.where(share > 0, grouped, 0.0)
    return (grouped - jnp.sum(share * counted, axis=1, keepdims=True) / jnp.where(total > 0, total, 1.0)).reshape(-1)


def leave_one_out(rewards: Float[Array, " batch"], group_size: int) -> Float[Array, " batch"]:
    """Reward minus the mean of the *other* rewards of its group (RLOO, arXiv 2402.14740).

        A_i = R_i - mean_{j != i} R_j = G / (G - 1) (R_i - mean(R))

    Args:
      rewards: f32[B], groups contiguous; NaN for an abstention (G is then the number of the others).
      group_size: G; a group of one gives zeros.

    Raises:
      ValueError: B is not a multiple of G.

    Example, the others' means are 0.5, 1.5 and 1:
      >>> leave_one_out(jnp.array([2.0, 0.0, 1.0]), group_size=3).tolist()
      [1.5, -1.5, 0.0]
    """
    _, _, votes = _grouped(rewards, group_size)
    centered = group_relative(rewards, group_size, scale="none").reshape(-1, group_size)
    return (centered * (votes / jnp.maximum(votes - 1.0, 1.0))).reshape(-1)


def whiten(advantages: PerToken, mask: Mask, *, epsilon: float = 1e-8) -> PerToken:
    """Zero mean and unit (unbiased) deviation over the unmasked tokens of the whole batch.

        A <- (A - mean(A)) / sqrt(var(A) + epsilon)

    The last step of REINFORCE++ (arXiv 2501.03262) and, in its implementations for language models, of PPO. A
    statistic of the batch: take it over the global one, before it is split.

    Args:
      advantages: f32[B, T]; masked positions may hold NaN and come out as 0.
      mask: [B, T].
      epsilon: keeps the quotient finite. Equal advantages give zeros.

    Raises:
      AssertionError: shapes or ranks do not fit (chex).

    Example, mean 2, variance (1 + 0 + 1) / 2 = 1:
      >>> advantages, mask = jnp.array([[1.0, 2.0], [3.0, 9.0]]), jnp.array([[1, 1], [1, 0]])
      >>> np.asarray(whiten(advantages, mask)).round(3).tolist()
      [[-1.0, 0.0], [1.0, 0.0]]
    """
    mask = check_tokens(mask, advantages)
    advantages = unmasked(advantages, mask)
    number = jnp.sum(mask, dtype=jnp.float32)
    lowest = jnp.min(jnp.where(mask, advantages, jnp.inf))
    differ = ~(lowest >= jnp.max(jnp.where(mask, advantages, -jnp.inf)))  # true for a NaN too: nothing is hidden
    mean = jnp.sum(advantages) / jnp.maximum(number, 1.0)
    centered = unmasked(advantages - mean, mask & differ)
    variance = jnp.sum(centered**2) / jnp.maximum(number - 1.0, 1.0)
    return centered * jax.lax.rsqrt(variance + epsilon)


def reinforce_pp(
    token_rewards: PerToken,
    mask: Mask,
    *,
    group_size: int | None = None,
    discount: float = 1.0,
) -> PerToken:
    """REINFORCE++ (arXiv 2501.03262): returns to go, whitened over all tokens of the batch.

    With `group_size` it is the paper's variant with a baseline: the mean return of the group is taken off first,
    so the advantage is the same for all tokens of a response.

    Args:
      token_rewards: f32[B, T]; an outcome reward stands at the last token, a KL penalty at every token. A row
        with a NaN among its unmasked tokens abstains.
      mask: [B, T].
      group_size: G for the baseline, or None.
      discount: gamma of the returns (without a baseline).

    Returns:
      f32[B, T]; 0 where masked and for abstentions.

    Raises:
      AssertionError: shapes or ranks do not fit (chex).
      ValueError: B is not a multiple of G.

    Example, returns 1, 1, 1 and 0: mean 3/4, variance (3/16 + 9/16) / 3 = 1/4:
      >>> token_rewards = jnp.array([[0.0, 0.0, 1.0], [0.0, 0.0, 0.0]])
      >>> mask = jnp.array([[1, 1, 1], [1, 0, 0]])
      >>> np.asarray(reinforce_pp(token_rewards, mask)).round(3).tolist()
      [[0.5, 0.5, 0.5], [-1.5, 0.0, 0.0]]
    """
    mask = check_tokens(mask, token_rewards)
    token_rewards = unmasked(token_rewards, mask)
    voted = ~jnp.any(jnp.isnan(token_rewards), axis=1, keepdims=True)
    counted = mask & voted
    if group_size is None:
        rewards = unmasked(token_rewards, counted)
        returns = gae(rewards, jnp.zeros_like(rewards), mask, discount=discount, trace_decay=1.0)
    else:
        centered = group_relative(jnp.sum(token_rewards, axis=1), group_size, scale="none")
        returns = jnp.broadcast_to(centered[:, None], mask.shape)
    return whiten(returns, counted)


def gae(
    rewards: PerToken,
    values: PerToken,
    mask: Mask,
    *,
    discount: float = 1.0,
    trace_decay: float = 0.95,
) -> PerToken:
    """Generalized advantage estimation (arXiv 1506.02438) over the unmasked tokens of each row.

        delta_t = R_t + discount V_{t+1} - V_t,    A_t = delta_t + discount trace_decay A_{t+1}

    `t + 1` is the next unmasked token; after the last one V and A are 0, for the response has ended. The
    targets of a value function are `gae(...) + values`. With values 0 and trace_decay 1 it is the return to go.

    Args:
      rewards: of each token; an outcome reward stands at the last token.
      values: V_t, the value before token t is generated.
      mask: bool or 0/1. Masked positions are skipped, even if they hold NaN, and get advantage 0.
      discount, trace_decay: gamma and lambda, in [0, 1].

    Raises:
      AssertionError: shapes or ranks do not fit (chex).

    Example, delta = 0, -0.25 and 0.75; A = 0 + 0.5 * 0.125, -0.25 + 0.5 * 0.75 and 0.75:
      >>> rewards, values = jnp.array([[[0.0, 0.0, 1.0]], [[0.5, 0.5, 0.25]]])
      >>> gae(rewards, values, jnp.ones((1, 3)), trace_decay=0.5).tolist()
      [[0.0625, 0.125, 0.75]]
    """
    mask = check_tokens(mask, rewards, values)
    rewards, values = unmasked(rewards, mask), unmasked(values, mask)

    def step(following, token):
        next_advantage, next_value = following
        reward, value, unmasked = token
        delta = reward + discount * next_value - value
        advantage = delta + discount * trace_decay * next_advantage
        following = jnp.where(unmasked, advantage, next_advantage), jnp.where(unmasked, value, next_value)
        return following, jnp.where(unmasked, advantage, 0.0)

    zeros = jnp.zeros(mask.shape[0], jnp.float32)
    _, advantages = jax.lax.scan(step, (zeros, zeros), (rewards.T, values.T, mask.T), reverse=True)
    return advantages.T


# Estimators by name ------------------------------------------------------------------------------------------


class Rewards(NamedTuple):
    """What an estimator is given of a rollout batch of B responses, groups contiguous."""

    tokens: PerToken  # f32[B, T] the reward at the last token, less a KL penalty at each; a row that abstains has NaN
    mask: Mask  # [B, T] tokens of the response
    group_size: int  # G
    values: PerToken | None = None  # f32[B, T] of the critic, before each token
    parts: Float[Array, "batch functions"] | None = (
        None  # the reward by function, if it has several; NaN as in `tokens`
    )

    @property
    def totals(self) -> Float[Array, " batch"]:
        """f32[B]: the reward of each response; NaN where it abstains."""
        return jnp.sum(self.tokens, axis=1)


@dataclasses.dataclass(frozen=True)
class Estimator:
    """One row of `ESTIMATORS`.

    Attributes:
      function: (Rewards, **options) -> advantages f32[B] or f32[B, T]; with a critic (advantages, value targets).
      group_baseline: whether the baseline is the group, so that a group of equal rewards has no gradient.
      critic: whether it needs a critic's values.
      parts: whether it needs the reward by function.
    """

    function: Callable
    group_baseline: bool = False
    critic: bool = False
    parts: bool = False

    @property
    def options(self) -> tuple[str, ...]:
        """The settings of the section `objective.advantage` that the function takes."""
        return tuple(name for name in inspect.signature(self.function).parameters if name in OPTIONS)


OPTIONS = ("scale", "discount", "trace_decay", "whiten")


def _group_relative(rewards: Rewards, *, scale):
    return group_relative(rewards.totals, rewards.group_size, scale=scale)


def _leave_one_out(rewards: Rewards):
    return leave_one_out(rewards.totals, rewards.group_size)


def _gdpo(rewards: Rewards):
    if rewards.parts is None:
        raise ValueError("estimator gdpo needs a reward of several parts")
    return gdpo(rewards.parts, rewards.group_size)


def _reinforce_pp(rewards: Rewards, *, discount):
    return reinforce_pp(rewards.tokens, rewards.mask, discount=discount)


def _reinforce_pp_baseline(rewards: Rewards):
    return reinforce_pp(rewards.tokens, rewards.mask, group_size=rewards.group_size)


def _gae(rewards: Rewards, *, discount, trace_decay, whiten):
    tokens = jnp.nan_to_num(rewards.tokens, nan=0.0)  # an abstention, which takes no part
    estimate = gae(tokens, rewards.values, rewards.mask, discount=discount, trace_decay=trace_decay)
    voted = rewards.mask & ~jnp.isnan(rewards.totals)[:, None]
    advantage = _whiten(estimate, voted) if whiten else estimate
    return advantage, estimate + jnp.where(rewards.mask, rewards.values, 0.0)


_whiten = whiten  # the option has the name of the function

ESTIMATORS = {
    "group_relative": Estimator(_group_relative, group_baseline=True),
    "leave_one_out": Estimator(_leave_one_out, group_baseline=True),
    "gdpo": Estimator(_gdpo, parts=True),
    "reinforce_pp": Estimator(_reinforce_pp),
    "reinforce_pp_baseline": Estimator(_reinforce_pp_baseline, group_baseline=True),
    "gae": Estimator(_gae, critic=True),
}


def estimator(name: str) -> Estimator:
    """The estimator of that name, or a function of your own as "module:function".

    Your function takes `Rewards`, and as keywords those of `OPTIONS` that it names.

    Raises:
      ValueError: no such estimator, module or function.

    Example:
      >>> row = estimator("leave_one_out")
      >>> rewards = Rewards(jnp.array([[0.0, 1.0], [0.0, 0.0]]), jnp.ones((2, 2), bool), group_size=2)
      >>> row.function(rewards).tolist(), row.group_baseline  # 1 - 0 and 0 - 1
      ([1.0, -1.0], True)
    """
    if name in ESTIMATORS:
        return ESTIMATORS[name]
    if ":" in name:
        function = import_own(name, "estimator")
        more = list(inspect.signature(function).parameters.values())[1:]
        unknown = [p.name for p in more if p.default is p.empty and p.name not in OPTIONS]
        if unknown:
            raise ValueError(f"estimator {name!r} wants {unknown[0]}; an estimator may take {', '.join(OPTIONS)}")
        return Estimator(function)
    raise ValueError(f"unknown estimator {name!r}; one of {', '.join(ESTIMATORS)}, or module:function")
