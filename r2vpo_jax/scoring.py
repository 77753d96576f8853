"""Tokens -> log-probabilities of the responses, entropies, and values if there is a critic, in one pass.

The learner and every check use this function, at the temperature of the rollout. The logits of a whole
batch, float32 [B, T, V], never exist: they are made chunk by chunk and recomputed in the backward pass.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from r2vpo_jax.sharding import constrain

_SUMS = "sums over the vocabulary"


class Scores(NamedTuple):
    """Of each response token given all before it. Columns past the response's length have no meaning: mask them."""

    logp: Float[Array, "batch time"]
    entropy: Float[Array, "batch time"]  # nats
    value: Float[Array, "batch time"] | None  # before the token, if there is a value head


def prompt_and_response_mask(prompt_length, response_length, prompt_size: int, size: int):
    """bool [B, size]: the valid columns of rows [left-padded prompt | response], from lengths alone."""
    column = jnp.arange(size)
    first = (prompt_size - prompt_length)[:, None]
    last = (prompt_size + response_length)[:, None]
    return (column >= first) & (column < last)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def scores_of(
    logits: Float[Array, "batch time vocabulary"],
    targets: Int[Array, "batch time"],
    temperature: Float[Array, "batch time"],
    entropy_gradient: bool = True,
) -> tuple[Array, Array]:
    """(log-probabilities of the targets, entropies), f32 [B, T], of softmax(logits / temperature).

    The backward pass starts from the saved sums over the vocabulary instead of taking them again: the slope of the
    logits is one elementwise pass. All of it shards over the vocabulary.

    Args:
      logits: float32; differentiated.
      targets: int32; not differentiated, nor is
      temperature: of each token.
      entropy_gradient: whether the entropy is differentiated too.
    """
    return _scores_forward(logits, targets, temperature, entropy_gradient)[0]


def _scores_forward(logits, targets, temperature, entropy_gradient):
    del entropy_gradient
    largest = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    shifted = (logits - largest) / temperature[..., None]  # from the largest: no digits are lost to its size
    weights = jnp.exp(shifted)
    total = jnp.sum(weights, axis=-1)
    log_total = jnp.log(total)
    # A comparison instead of a gather: it shards over the vocabulary.
    chosen = jnp.sum(jnp.where(_is_target(logits, targets), shifted, 0.0), axis=-1)
    entropy = log_total - jnp.sum(weights * shifted, axis=-1) / total
    sums = checkpoint_name((largest, log_total, entropy), _SUMS)
    return (chosen - log_total, entropy), (logits, targets, temperature, sums)


def _scores_backward(entropy_gradient, saved, slopes):
    logits, targets, temperature, (largest, log_total, entropy) = saved
    logp_slope, entropy_slope = (x[..., None] for x in slopes)
    logps = (logits - largest) / temperature[..., None] - log_total[..., None]
    probability = jnp.exp(logps)
    slope = logp_slope * (_is_target(logits, targets) - probability)
    if entropy_gradient:
        slope = slope - entropy_slope * probability * (logps + entropy[..., None])
    return slope / temperature[..., None], None, None


scores_of.defvjp(_scores_forward, _scores_backward)


def _is_target(logits, targets):
    return jnp.arange(logits.shape[-1]) == targets[..., None]


def score(
    model,
    params,
    tokens: Int[Array, "batch columns"],
    prompt_length: Int[Array, " batch"],
    response_length: Int[Array, " batch"],
    temperature: Float[Array, " batch"],
    *,
    prompt_size: int,
    chunk_size: int = 128,
    value_head: Callable[[Array], Array] | None = None,
    entropy_gradient: bool = True,
) -> Scores:
    """Log-probability, entropy and value of each response token under the model at `temperature`.

    Args:
      model: a `models.Decoder`.
      params: its parameters.
      tokens: int32 [B, P + T]; the prompt, left-padded, in the first P columns, then the response.
      prompt_length, response_length: int32 [B].
      temperature: float32 [B]; logits are divided by it, as in the sampler.
      prompt_size: P.
      chunk_size: response columns whose logits exist at one time. The backward pass computes those of several chunks
        again; those of a single one are kept.
      value_head: hidden states [B, T, hidden size] to values f32 [B, T], if there is a critic.
      entropy_gradient: whether the entropies are differentiated; without it their gradient is 0, and costs nothing.
    """
    mask = prompt_and_response_mask(prompt_length, response_length, prompt_size, tokens.shape[1])
    positions = jnp.maximum(jnp.arange(tokens.shape[1]) - (prompt_size - prompt_length)[:, None], 0)
    hidden = model.apply({"params": params}, tokens, positions, mask, method="hidden_states")
    return token_scores(
        model,
        params,
        hidden[:, prompt_size - 1 : -1],
        tokens[:, prompt_size:],
        jnp.broadcast_to(temperature[:, None], (tokens.shape[0], tokens.shape[1] - prompt_size)),
        chunk_size=chunk_size,
        value_head=value_head,
        entropy_gradient=entropy_gradient,
    )


def token_scores(
    model,
    params,
    hidden: Float[Array, "batch time hidden"],
    targets: Int[Array, "batch time"],
    temperature: Float[Array, "batch time"],
    *,
    chunk_size: int = 128,
    value_head: Callable[[Array], Array] | None = None,
    entropy_gradient: bool = True,
) -> Scores:
    """Scores of tokens, each given the hidden state before it.

    Args:
      model, params, chunk_size, value_head, entropy_gradient: as for `score`.
      hidden: [B, T, hidden size], last hidden states.
      targets: int32 [B, T], the tokens that come after them.
      temperature: float32 [B, T], of each token.
    """
    value = None if value_head is None else value_head(hidden)
    kernel = model.apply({"params": params}, method="unembedding")  # laid out once, not once a chunk

    def unembed(hidden):
        return model.apply({"params": params}, hidden, kernel, method="unembed")

    size = targets.shape[1]
    if size <= chunk_size:
        return Scores(*scores_of(unembed(hidden), targets, temperature, entropy_gradient), value)
    padding = -size % chunk_size

    # The backward pass makes a chunk's logits again, but not their sums.
    saved = jax.checkpoint_policies.save_only_these_names(_SUMS)

    @functools.partial(jax.checkpoint, prevent_cse=False, policy=saved)
    def chunk_scores(hidden, targets, temperature):
        return scores_of(unembed(hidden), targets, temperature, entropy_gradient)

    def chunked(x, filler=0):
        x = jnp.pad(x, ((0, 0), (0, padding)) + ((0, 0),) * (x.ndim - 2), constant_values=filler)
        x = x.reshape(x.shape[0], -1, chunk_size, *x.shape[2:]).swapaxes(0, 1)
        return constrain(x, None, "batch", *(None,) * (x.ndim - 2))

    chunks = chunked(hidden), chunked(targets), chunked(temperature, 1)
    _, scores = jax.lax.scan(lambda _, xs: (None, chunk_scores(*xs)), None, chunks)
    logps, entropy = (x.swapaxes(0, 1).reshape(x.shape[1], -1)[:, :size] for x in scores)
    return Scores(logps, entropy, value)
