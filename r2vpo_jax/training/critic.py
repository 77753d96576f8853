"""The value head of PPO proper: one linear map of the decoder's hidden states, and its clipped loss."""

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jaxtyping import Array, Bool, Float

from r2vpo_jax import losses
from r2vpo_jax.config.fields import is_on
from r2vpo_jax.losses.arrays import check_tokens, unmasked
from r2vpo_jax.losses.core import require


@struct.dataclass
class CriticState:
    """The value head and its optimizer. The decoder under it is the policy's own."""

    kernel: Float[Array, "hidden"]
    bias: Float[Array, ""]
    opt_state: optax.OptState


def make_optimizer(learning_rate: float, max_grad_norm: float) -> optax.GradientTransformation:
    """Adam with a norm clip of its own: the value loss must not eat the policy's."""
    return optax.chain(optax.clip_by_global_norm(max_grad_norm), optax.adam(learning_rate))


def init(hidden_size: int, optimizer: optax.GradientTransformation) -> CriticState:
    """A head that says 0 everywhere."""
    kernel, bias = jnp.zeros(hidden_size, jnp.float32), jnp.zeros((), jnp.float32)
    return CriticState(kernel=kernel, bias=bias, opt_state=optimizer.init((kernel, bias)))


def values(head: tuple[Array, Array], hidden: Float[Array, "... hidden"]) -> Float[Array, "..."]:
    """float32 values of hidden states: their mean product with the kernel, plus the bias.

    The mean over the width, not the sum, makes one learning rate serve kernel and bias under Adam, whatever the
    width (the readout of muP, arXiv 2203.03466): the baseline is found first, and differences between tokens after.

    Args:
      head: (kernel, bias).
      hidden: the decoder's.
    """
    kernel, bias = head
    product = jnp.einsum("...e,e->...", hidden.astype(jnp.float32), kernel, precision=jax.lax.Precision.HIGHEST)
    return product / kernel.shape[0] + bias


def value_loss(
    values: Float[Array, "batch time"],
    old_values: Float[Array, "batch time"],
    targets: Float[Array, "batch time"],
    mask: Bool[Array, "batch time"],
    *,
    clip: float = 0.2,
    reduction: str = "token_mean",
    normalizer: float | Float[Array, ""] | None = None,
) -> losses.Loss:
    """PPO's clipped value loss: L = E[ max((V - R)^2, (V_old + clip(V - V_old, +-clip) - R)^2) ] / 2.

    Source: the reference implementation of arXiv 1707.06347 (openai/baselines ppo2), as in CleanRL, TRL and verl.

    Args:
      values: V, with a gradient.
      old_values: V when the tokens were sampled.
      targets: R, `advantages.gae(...) + old_values`.
      mask: tokens that count; masked positions may hold NaN.
      clip: bound on a move that lowers the loss; 0 is off.
      reduction, normalizer: as for the objectives (`losses`).

    Returns:
      (loss, stats) with `value_loss`, `value_clip_fraction`, and the sums that `explained_variance` takes:
      `value_target`, `value_target_squared`, `value_error`, `value_error_squared`, each over tokens.

    Raises:
      AssertionError: shapes or ranks do not fit (chex).
      ValueError: clip is negative; or as for the objectives.
    """
    require(lambda: clip >= 0, f"the value clip must be >= 0, got {clip}")
    mask = check_tokens(mask, values, old_values, targets)
    values, old_values, targets = (unmasked(x, mask) for x in (values, old_values, targets))
    old_values, targets = jax.lax.stop_gradient((old_values, targets))
    error = values - targets
    per_token = 0.5 * error**2
    bounded = jnp.zeros_like(mask)
    if is_on(clip):
        clipped = 0.5 * (old_values + jnp.clip(values - old_values, -clip, clip) - targets) ** 2
        bounded = mask & (clipped > per_token) & (jnp.abs(values - old_values) > clip)
        per_token = jnp.maximum(per_token, clipped)
    tokens = jnp.sum(mask, dtype=jnp.float32)
    stats = {
        "value_loss": per_token,
        "value_clip_fraction": bounded.astype(jnp.float32),
        "value_target": targets,
        "value_target_squared": targets**2,
        "value_error": error,
        "value_error_squared": error**2,
    }
    stats = {k: (jax.lax.stop_gradient(jnp.sum(v)), tokens) for k, v in stats.items()}
    return losses.reduce(per_token, mask, reduction, normalizer), stats


def explained_variance(stats) -> float:
    """1 - Var(R - V) / Var(R) from merged statistics of `value_loss`; NaN where the targets do not vary.

    1 is a perfect critic, 0 is as good as the mean, negative is worse.

    Args:
      stats: has `mean(name)`, as `TrainStats`.
    """
    mean_square = float(stats.mean("value_target_squared"))
    variance = mean_square - float(stats.mean("value_target")) ** 2
    residual = float(stats.mean("value_error_squared") - stats.mean("value_error") ** 2)
    # Relative to the mean square: less is what rounding leaves of targets that are all the same.
    return 1.0 - residual / variance if variance > 1e-6 * mean_square else float("nan")
