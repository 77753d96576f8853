"""Importance weights for data that another policy generated, to be given to any objective as `weights`.

Two uses, one formula w = proximal / behavior, taken once before the first update on a batch:

  sampler mismatch   the sampler's log-probabilities differ from the learner's for the same weights (another
                     precision, another engine, quantized rollouts)
  decoupled form     the data is stale: w corrects for its age, and the objective constrains only what this
                     batch's updates change (arXiv 2110.00641; AReaL, arXiv 2505.24298)

    weights = corrections.importance_weights(proximal_logp, behavior_logp, mask, mode="truncate", max_weight=2.0)
    loss, stats = losses.r2vpo_loss(logp, proximal_logp, advantages, mask, weights=weights, variance_coef=2.5)
"""

import jax
import jax.numpy as jnp

from r2vpo_jax.losses.arrays import Logp, Mask, PerToken, check_tokens, clamp, unmasked
from r2vpo_jax.losses.core import require

MODES = ("truncate", "mask")
SCOPES = ("token", "sequence")


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
