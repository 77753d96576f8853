"""Objectives without a cliff: the importance-weighted policy gradient, and what subtracts a penalty from it."""

import jax.numpy as jnp

from r2vpo_jax.losses.arrays import Advantages, Logp, Mask, Normalizer, Scalar, Weights, scalar
from r2vpo_jax.losses.core import Loss, prepare, require

PENALTY_SCOPES = ("token", "sequence")
PENALTY_WEIGHTS = ("none", "advantage", "probability", "both")


def r2vpo_loss(
    logp: Logp,
    behavior_logp: Logp,
    advantages: Advantages,
    mask: Mask,
    *,
    variance_coef: float | Scalar,
    penalty_scope: str = "token",
    penalty_weight: str = "none",
    negative_factor: float = 1.0,
    weights: Weights = None,
    reduction: str = "token_mean",
    normalizer: Normalizer = None,
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
      penalty_scope: "token", or "sequence": the penalty is (s - 1)^2 with s = exp(mean_t log r_t), the same
        for all tokens of a row, and g = r A - 2 lambda s (s - 1) (ours).
      penalty_weight: what multiplies the penalty of each token: "none"; "advantage", |A|, as spo has it; "probability",
        mu, the probability at which the token was sampled; or "both", |A| mu, as in DRPO (arXiv 2606.09821). lambda's
        constraint stays the unweighted E[(r - 1)^2], so that the four can be compared at one budget (ours).
      negative_factor: >= 0, multiplies lambda where A < 0 (ours).
      weights: multiply surrogate and penalty, never the normalizer (importance corrections); stop-gradient.
      reduction, normalizer: see the package.

    Returns:
      (loss, stats); stats also has `penalty`, lambda (r - 1)^2.

    Raises:
      AssertionError: shapes or ranks do not fit (chex).
      ValueError: unknown reduction, scope or weight, a negative factor below 0, or `constant_length` without a
        normalizer.

    Example, r = 2 and 1/2, A = 1:
      >>> logp, behavior_logp = jnp.log(jnp.array([[[0.4, 0.2]], [[0.2, 0.4]]]))
      >>> ones = jnp.ones((1, 2))
      >>> loss, stats = r2vpo_loss(logp, behavior_logp, ones, ones, variance_coef=0.5)
      >>> round(float(loss), 4)  # -(2 + 0.5) / 2 + 0.5 * (1 + 0.25) / 2
      -0.9375
    """
    require(
        lambda: penalty_scope in PENALTY_SCOPES, f"unknown penalty_scope {penalty_scope!r}; one of {PENALTY_SCOPES}"
    )
    require(
        lambda: penalty_weight in PENALTY_WEIGHTS,
        f"unknown penalty_weight {penalty_weight!r}; one of {PENALTY_WEIGHTS}",
    )
    require(lambda: negative_factor >= 0, f"negative_factor must be >= 0, got {negative_factor}")
    x = prepare(logp, behavior_logp, advantages, mask, weights)
    if penalty_scope == "token":
        excess, square = x.excess, x.excess**2
    else:
        # (s - 1)^2 in value, and its derivative 2 s (s - 1) as the gradient coefficient of each token.
        mean = x.mean_log_ratio()
        excess = jnp.expm1(mean)
        slope = 2 * jnp.exp(mean) * excess
        square = excess**2 + (x.with_coefficient(slope) - slope)
    coef = scalar(variance_coef) * jnp.where(x.advantages < 0, scalar(negative_factor), 1.0)
    if penalty_weight in ("advantage", "both"):
        coef = coef * jnp.abs(x.advantages)
    if penalty_weight in ("probability", "both"):
        coef = coef * jnp.exp(x.behavior_logp)
    return x.finish(x.ratio * x.advantages, reduction, normalizer, penalty=coef * square, excess=excess)


def policy_gradient_loss(
    logp: Logp,
    behavior_logp: Logp,
    advantages: Advantages,
    mask: Mask,
    *,
    weights: Weights = None,
    reduction: str = "token_mean",
    normalizer: Normalizer = None,
) -> Loss:
    """Importance-weighted policy gradient without any trust region: L = -E[ r A ], coefficient r A.

    It is `r2vpo_loss` at variance_coef 0. Source: conservative policy iteration's surrogate, as in
    arXiv 1707.06347, equation 6.

    Args, Returns, Raises: as `r2vpo_loss`.

    Example, r = 2 and 1/2, A = 1:
      >>> logp, behavior_logp = jnp.log(jnp.array([[[0.4, 0.2]], [[0.2, 0.4]]]))
      >>> ones = jnp.ones((1, 2))
      >>> loss, stats = policy_gradient_loss(logp, behavior_logp, ones, ones)
      >>> round(float(loss), 4)  # -(2 + 0.5) / 2
      -1.25
    """
    x = prepare(logp, behavior_logp, advantages, mask, weights)
    return x.finish(x.ratio * x.advantages, reduction, normalizer)


def spo_loss(
    logp: Logp,
    behavior_logp: Logp,
    advantages: Advantages,
    mask: Mask,
    *,
    epsilon: float = 0.2,
    weights: Weights = None,
    reduction: str = "token_mean",
    normalizer: Normalizer = None,
) -> Loss:
    """Simple policy optimization: a quadratic that turns back at the edge of PPO's clip, for every advantage.

        L = -E[ r A - |A| (r - 1)^2 / (2 epsilon) ],     g = r (A - |A| (r - 1) / epsilon)

    It is `r2vpo_loss` with a multiplier |A| / (2 epsilon) of each token's own: r* = 1 + sign(A) epsilon whatever
    the size of A. CFPO (arXiv 2601.22801) is the same for language models.

    Source: arXiv 2401.16025, equation 12; the reference trainer's epsilon is 0.2.

    Args: as `r2vpo_loss`, and
      epsilon: > 0, where the gradient turns back.

    Returns, Raises: as `r2vpo_loss`; ValueError for epsilon out of range.

    Example, r = 1.4 and 0.8, A = 1:
      >>> logp, behavior_logp = jnp.log(jnp.array([[[0.7, 0.4]], [[0.5, 0.5]]]))
      >>> ones = jnp.ones((1, 2))
      >>> loss, stats = spo_loss(logp, behavior_logp, ones, ones, epsilon=0.2)
      >>> round(float(loss), 4)  # -(1.4 - 0.16 / 0.4 + 0.8 - 0.04 / 0.4) / 2
      -0.85
    """
    require(lambda: epsilon > 0, f"epsilon must be > 0, got {epsilon}")
    x = prepare(logp, behavior_logp, advantages, mask, weights)
    penalty = jnp.abs(x.advantages) * x.excess**2 / (2 * epsilon)
    return x.finish(x.ratio * x.advantages, reduction, normalizer, penalty=penalty)


def drpo_loss(
    logp: Logp,
    behavior_logp: Logp,
    advantages: Advantages,
    mask: Mask,
    *,
    epsilon: float = 12.5,
    weights: Weights = None,
    reduction: str = "token_mean",
    normalizer: Normalizer = None,
) -> Loss:
    """Divergence-regularized policy optimization: SPO's quadratic, weighted by the token's own probability.

        L = -E[ r A - |A| mu (r - 1)^2 / (2 epsilon) ],     g = r (A - |A| (pi - mu) / epsilon)

    mu = exp(behavior_logp), pi = r mu: what is bounded is the change of probability, not of the ratio, so a rare
    token may move far. The paper's threshold of 12.5 is weak: |pi - mu| <= 1, so g stays within 8 % of r A.

    Source: arXiv 2606.09821, section 3, as in the authors' code (Tencent-Hunyuan/UniRL, drpo.py).

    Args: as `r2vpo_loss`, and
      epsilon: > 0, the regularization threshold.

    Returns, Raises: as `r2vpo_loss`; ValueError for epsilon out of range.

    Example, r = 1.6 and 1, A = 1:
      >>> logp, behavior_logp = jnp.log(jnp.array([[[0.8, 0.1]], [[0.5, 0.1]]]))
      >>> ones = jnp.ones((1, 2))
      >>> loss, stats = drpo_loss(logp, behavior_logp, ones, ones, epsilon=0.1)
      >>> round(float(loss), 4)  # -(1.6 - 0.5 * 0.36 / 0.2 + 1) / 2
      -0.85
    """
    require(lambda: epsilon > 0, f"epsilon must be > 0, got {epsilon}")
    x = prepare(logp, behavior_logp, advantages, mask, weights)
    mu = jnp.exp(jnp.minimum(x.behavior_logp, 0.0))
    penalty = jnp.abs(x.advantages) * mu * x.excess**2 / (2 * epsilon)
    return x.finish(x.ratio * x.advantages, reduction, normalizer, penalty=penalty)


def dro_loss(
    logp: Logp,
    behavior_logp: Logp,
    advantages: Advantages,
    mask: Mask,
    *,
    beta: float = 0.1,
    weights: Weights = None,
    reduction: str = "token_mean",
    normalizer: Normalizer = None,
) -> Loss:
    """Direct reward optimization's quadratic in the log-ratio.

        L = -E[ A log pi - beta (log r)^2 / 2 ],     g = A - beta log r

    No importance weight: an unlikely token pulls as hard as a likely one, and unlike (r - 1)^2 the penalty grows
    as r goes to 0, up to the guard at |log r| = 20. prime-rl's default loss has the same quadratic (`dppo_tv_loss` with
    beta).

    Source: the `dro` policy loss of verl-project/verl, per token and against mu; beta 0.1 as in its ports. The paper,
    arXiv 2405.19107, regresses on whole responses against the reference policy, with a learned value.

    Args: as `r2vpo_loss`, and
      beta: >= 0, weight of the penalty.

    Returns, Raises: as `r2vpo_loss`; ValueError for beta out of range.

    Example, log r = 1 and 0, A = 1:
      >>> logp, behavior_logp = jnp.array([[[-1.0, -1.0]], [[-2.0, -1.0]]])
      >>> ones = jnp.ones((1, 2))
      >>> loss, stats = dro_loss(logp, behavior_logp, ones, ones, beta=0.1)
      >>> round(float(loss), 4)  # (1 + 0.1 * 1 / 2 + 1) / 2
      1.025
    """
    require(lambda: beta >= 0, f"beta must be >= 0, got {beta}")
    x = prepare(logp, behavior_logp, advantages, mask, weights)
    return x.finish(x.score_function(x.advantages), reduction, normalizer, penalty=0.5 * beta * x.log_ratio**2)
