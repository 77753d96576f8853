"""Importance weights for data that another policy generated, to be given to any objective as `weights`.

Two uses, one formula w = proximal / behavior, taken once before the first update on a batch:

  sampler mismatch   the sampler's log-probabilities differ from the learner's for the same weights (another
                     precision, another engine, quantized rollouts)
  decoupled form     the data is stale: w corrects for its age, and the objective constrains only what this
                     batch's updates change (arXiv 2110.00641; AReaL, arXiv 2505.24298)

    weights = corrections.importance_weights(proximal_logp, behavior_logp, mask, mode="truncate", max_weight=2.0)
    loss, stats = losses.r2vpo_loss(logp, proximal_logp, advantages, mask, weights=weights, variance_coef=2.5)

`sequence_filter` leaves out whole responses whose w says that they are not to be trusted, `off_policy_mask` those that are
bad and that the policy has left behind; both are weights of 0 and 1 to multiply by. `step_scale` says how much shorter a
step on stale responses should be.
"""

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from r2vpo_jax.losses.arrays import Advantages, Logp, Mask, PerToken, check_tokens, clamp, spread, unmasked
from r2vpo_jax.losses.core import require

MODES = ("truncate", "mask")
SCOPES = ("token", "sequence")
FILTERS = ("geometric", "mean_k3", "max_k2")
STEP_SCALINGS = ("sqrt", "linear")
_LEAST_TAIL = 1e-6  # of probability


def importance_weights(
    proximal_logp: Logp,
    behavior_logp: Logp,
    mask: Mask,
    *,
    mode: str = "truncate",
    scope: str = "token",
    max_weight: float = 2.0,
    min_weight: float = 0.0,
) -> PerToken:
    """w = clip(proximal / behavior) of each token, or of its whole response.

    "truncate" is min(w, max_weight), truncated importance sampling (arXiv 1802.01561, equation 1; for language
    models "TIS", cap 2 in verl and 3 in TRL). "mask" is w where min_weight <= w <= max_weight and 0 elsewhere
    (MIS, IcePop: 0.5 to 5 in NeMo-RL). The scope "sequence" takes w = exp(sum_t log w_t), the same for all
    tokens of a response.

    Args:
      proximal_logp: log-probabilities under the learner's policy before its first update on these tokens.
      behavior_logp: log-probabilities under the policy that generated them.
      mask: tokens that count; the others get weight 0, even if they hold NaN.
      mode: "truncate" or "mask".
      scope: "token" or "sequence".
      max_weight: upper bound, >= 1.
      min_weight: lower bound for "mask", in [0, 1].

    Returns:
      f32[B, T], without a gradient. A NaN that counts stays a NaN.

    Raises:
      AssertionError: shapes or ranks do not fit (chex).
      ValueError: unknown mode or scope, or bounds out of range.

    Example, w = 4 and 0.5:
      >>> proximal_logp, behavior_logp = jnp.log(jnp.array([[[0.8, 0.2]], [[0.2, 0.4]]]))
      >>> ones = jnp.ones((1, 2))
      >>> np.asarray(importance_weights(proximal_logp, behavior_logp, ones)).round(4).tolist()
      [[2.0, 0.5]]
      >>> np.asarray(importance_weights(proximal_logp, behavior_logp, ones, mode="mask")).round(4).tolist()
      [[0.0, 0.5]]
    """
    if mode not in MODES:
        raise ValueError(f"unknown correction mode {mode!r}; one of {MODES}")
    if scope not in SCOPES:
        raise ValueError(f"unknown correction scope {scope!r}; one of {SCOPES}")
    require(
        lambda: 0 <= min_weight <= 1 <= max_weight,
        f"0 <= min_weight <= 1 <= max_weight is needed, got {min_weight} and {max_weight}",
    )
    mask = check_tokens(mask, proximal_logp, behavior_logp)
    log_weight = unmasked(proximal_logp, mask) - unmasked(behavior_logp, mask)
    if scope == "sequence":
        log_weight = jnp.broadcast_to(jnp.sum(log_weight, axis=-1, keepdims=True), mask.shape)
    weight = jnp.exp(clamp(log_weight))
    if mode == "truncate":
        weight = jnp.minimum(weight, max_weight)
    else:
        weight = jnp.where((weight < min_weight) | (weight > max_weight), 0.0, weight)
    return jax.lax.stop_gradient(unmasked(weight, mask))


def sequence_filter(
    proximal_logp: Logp,
    behavior_logp: Logp,
    mask: Mask,
    *,
    kind: str,
    low: float = 0.0,
    high: float,
) -> PerToken:
    """1 for the tokens of responses that are kept, 0 for those of the others. With x = log proximal - log behavior:

        geometric   low <= exp(mean_t x) <= high       the ratio of the response, whatever its length
        mean_k3     mean_t (exp(x) - 1 - x) <= high    an estimate of KL(behavior || proximal) per token
        max_k2      max_t x^2 / 2 <= high              no token of it has moved far

    Sources: "geometric" is the geometric-mean filter of verl (`seq_mean_k1`, bounds 0.999 and 1.001), and with the weights
    of `importance_weights` beside it the masked sequence importance sampling ("seq-mask-tis", 0.999 and 1.002) of NeMo-RL
    and OpenRLHF. "mean_k3" (0.01 in verl) and "max_k2" are trust region masking, arXiv 2512.23075, as in verl, where a
    mean of x alone would let differences of either sign cancel.

    Args:
      proximal_logp, behavior_logp, mask: as for `importance_weights`.
      kind: "geometric", "mean_k3" or "max_k2".
      low: lower bound, for "geometric".
      high: upper bound.

    Returns:
      f32[B, T], 0 where masked, without a gradient. A NaN that counts makes its response NaN.

    Raises:
      AssertionError: shapes or ranks do not fit (chex).
      ValueError: unknown kind, or bounds out of range.

    Example, ratios 2 and 0.5, whose geometric mean is 1; k3 is 0.3069 and 0.1931, 0.25 on average:
      >>> logps, ones = jnp.log(jnp.array([[[0.8, 0.2]], [[0.4, 0.4]]])), jnp.ones((1, 2))
      >>> sequence_filter(*logps, ones, kind="geometric", low=0.999, high=1.001).tolist()
      [[1.0, 1.0]]
      >>> sequence_filter(*logps, ones, kind="mean_k3", high=0.1).tolist()
      [[0.0, 0.0]]
    """
    if kind not in FILTERS:
        raise ValueError(f"unknown sequence filter {kind!r}; one of {FILTERS}")
    if kind == "geometric":
        require(lambda: 0 <= low <= 1 <= high, f"0 <= low <= 1 <= high is needed, got {low} and {high}")
    require(lambda: high > 0, f"high must be > 0, got {high}")
    mask = check_tokens(mask, proximal_logp, behavior_logp)
    x = clamp(unmasked(proximal_logp, mask) - unmasked(behavior_logp, mask))
    length = jnp.maximum(jnp.sum(mask, axis=-1, keepdims=True), 1)
    if kind == "geometric":
        ratio = jnp.exp(jnp.sum(x, axis=-1, keepdims=True) / length)
        keep = (ratio >= low) & (ratio <= high)
    elif kind == "mean_k3":
        keep = jnp.sum(jnp.expm1(x) - x, axis=-1, keepdims=True) / length <= high
    else:
        keep = jnp.max(0.5 * x**2, axis=-1, keepdims=True) <= high
    unknown = jnp.any(jnp.isnan(x), axis=-1, keepdims=True)
    return unmasked(jnp.broadcast_to(jnp.where(unknown, jnp.nan, keep), mask.shape), mask)


def off_policy_mask(
    logp: Logp, behavior_logp: Logp, advantages: Advantages, mask: Mask, *, threshold: float
) -> PerToken:
    """0 for the tokens with A < 0 of responses that the policy has left behind, 1 for the others.

        0 where A < 0 and mean_t (log behavior - log pi) > threshold

    Unlike `sequence_filter` it looks at the policy that is trained, anew in each update, and at bad responses only: learning
    from a mistake that one would not make any more does harm.

    Source: DeepSeek-V3.2, arXiv 2512.02556 (`off_policy_mask_threshold` of TRL). The paper does not print its threshold;
    TRL suggests 0.5, nats per token.

    Args:
      logp: under the policy that is trained; no gradient flows into it.
      behavior_logp: under the policy that generated the tokens.
      advantages: f32[B] or f32[B, T].
      mask: tokens that count.
      threshold: > 0, nats per token.

    Returns:
      f32[B, T], 0 where masked.

    Raises:
      AssertionError: shapes or ranks do not fit (chex).
      ValueError: threshold out of range.

    Example, means of log behavior - log pi of 1 and 1; only the second is bad:
      >>> logp, behavior_logp = jnp.full((2, 2), -2.0), jnp.full((2, 2), -1.0)
      >>> off_policy_mask(logp, behavior_logp, jnp.array([1.0, -1.0]), jnp.ones((2, 2)), threshold=0.5).tolist()
      [[1.0, 1.0], [0.0, 0.0]]
    """
    require(lambda: threshold > 0, f"threshold must be > 0, got {threshold}")
    mask = check_tokens(mask, logp, behavior_logp)
    moved = clamp(unmasked(behavior_logp, mask) - unmasked(logp, mask))
    mean = jnp.sum(moved, axis=-1, keepdims=True) / jnp.maximum(jnp.sum(mask, axis=-1, keepdims=True), 1)
    left = (spread(advantages, mask) < 0) & (mean > threshold)
    return unmasked(jnp.where(left, 0.0, 1.0), mask)


def sequence_weights(logp: Logp, behavior_logp: Logp, mask: Mask) -> Float[Array, " batch"]:
    """pi / behavior of each whole response, not truncated (but for the clamp of its logarithm at +-20), without a gradient.

    Raises:
      AssertionError: shapes or ranks do not fit (chex).

    Example, token ratios 2 and 3:
      >>> logp, behavior_logp = jnp.log(jnp.array([[[0.4, 0.6]], [[0.2, 0.2]]]))
      >>> [round(float(w), 4) for w in sequence_weights(logp, behavior_logp, jnp.ones((1, 2)))]
      [6.0]
    """
    mask = check_tokens(mask, logp, behavior_logp)
    return jnp.exp(clamp(jnp.sum(unmasked(logp, mask) - unmasked(behavior_logp, mask), axis=-1)))


def step_scale(
    weight_sum: Float[Array, ""],
    squared_sum: Float[Array, ""],
    number: Float[Array, ""],
    *,
    rule: str = "sqrt",
    reference: float = 1.0,
) -> Float[Array, ""]:
    """What a step is multiplied by, from the effective sample size of the responses it was taken on.

        rho = (sum_i w_i)^2 / (n sum_i w_i^2),     scale = min(1, rho / reference), or its root for "sqrt"

    Source: arXiv 2602.17616, equation 5: sqrt(rho / rho on-policy), for optimizers like Adam. Its code (mit-han-lab/vcpo)
    has "sqrt" and "linear", the minimum, and a reference of 1.

    Args:
      weight_sum, squared_sum: sums over the n responses of `sequence_weights` and of their squares.
      number: n; for none the scale is 1.
      rule: "sqrt" or "linear".
      reference: in (0, 1], rho at which the step is whole.

    Raises:
      ValueError: unknown rule, or reference out of range.

    Example, w = 1, 1, 1 and 9: 12^2 / (4 * 84) = 3 / 7:
      >>> round(float(step_scale(jnp.float32(12), jnp.float32(84), jnp.float32(4))), 4)
      0.6547
    """
    if rule not in STEP_SCALINGS:
        raise ValueError(f"unknown step scaling {rule!r}; one of {STEP_SCALINGS}")
    require(lambda: 0 < reference <= 1, f"reference must be in (0, 1], got {reference}")
    share = weight_sum**2 / jnp.where(number > 0, number * squared_sum, 1.0)
    scale = jnp.where(number > 0, jnp.minimum(share / reference, 1.0), 1.0)
    return jnp.sqrt(scale) if rule == "sqrt" else scale


def centering_term(
    head_logp: Float[Array, "batch time head"],
    sampler_head_logp: Float[Array, "batch time head"],
    mask: Mask,
    *,
    max_weight: float | None = None,
) -> PerToken:
    """C of score centering, to be added as A C to the loss of each token of a policy gradient without a clip.

        C = sum_{v in H} sg(m_v - a p_v) log p_v,     dC = E_q[ w dlog p ]
        m = q, a = rho                                   w = 1
        m = min(p, max_weight q), a = min(1, max_weight rho)     w = min(p / q, max_weight)
        rho = (1 - sum_H q) / (1 - sum_H p)

    p is the policy, q the sampler's and H its likeliest tokens at each position; of the tail q is taken to be rho p. The
    expectation of A dlog p under q is a covariance, which is what there is to learn, plus E_q[A] E_q[dlog p], which pulls p
    towards q whatever A says, and adds up over updates. With -w A log p as the loss, A C takes the second part off.

    Source: arXiv 2609.20807 (equation 14 and its top-k estimator), as NeMo-RL's documentation of
    `compute_score_centering_term` has it.

    Args:
      head_logp: log p of the tokens of H, over the whole vocabulary; the gradient flows into it.
      sampler_head_logp: log q of them.
      mask: tokens that count.
      max_weight: of the token weights w that the loss itself has (`importance_weights`, scope "token", "truncate"); None for
        a loss without weights.

    Returns:
      f32[B, T], 0 where masked.

    Raises:
      AssertionError: shapes or ranks do not fit (chex).
      ValueError: max_weight out of range.

    Example, p = (0.6, 0.4), q = (0.5, 0.5), all of the vocabulary: 0.5 log 0.6 + 0.5 log 0.4
      >>> head_logp = jnp.log(jnp.array([[[0.6, 0.4]]]))
      >>> round(float(centering_term(head_logp, jnp.log(jnp.array([[[0.5, 0.5]]])), jnp.ones((1, 1)))[0, 0]), 4)
      -0.7136
    """
    require(lambda: max_weight is None or max_weight > 0, f"max_weight must be > 0, got {max_weight}")
    chex.assert_rank([head_logp, sampler_head_logp], 3)
    chex.assert_equal_shape([head_logp, sampler_head_logp])
    mask = check_tokens(mask, head_logp[..., 0])
    head_logp = jnp.where(mask[..., None], head_logp.astype(jnp.float32), -1.0)
    p = jax.lax.stop_gradient(jnp.exp(head_logp))
    q = jax.lax.stop_gradient(jnp.exp(jnp.where(mask[..., None], sampler_head_logp, -1.0)))
    tail_p, tail_q = (jnp.maximum(1 - jnp.sum(x, axis=-1, keepdims=True), 0.0) for x in (p, q))
    # A head of the whole vocabulary has no tail but rounding: its share is taken to be 1, of next to nothing.
    rho = jnp.where(tail_p > _LEAST_TAIL, tail_q / jnp.maximum(tail_p, _LEAST_TAIL), 1.0)
    if max_weight is None:
        mass, tail = q, rho
    else:
        mass, tail = jnp.minimum(p, max_weight * q), jnp.minimum(1.0, max_weight * rho)
    # Where there is no tail, a p adds up to a gradient of 0 over the head: it is left out rather than rounded.
    coefficient = mass - jnp.where(tail_p > _LEAST_TAIL, tail, 0.0) * p
    return unmasked(jnp.sum(coefficient * head_logp, axis=-1), mask)
