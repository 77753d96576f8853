"""What one token is drawn from: temperature, top-k, top-p."""

import jax
import jax.numpy as jnp
from flax import struct

_NEVER = -1e30


@struct.dataclass
class Sampling:
    """How to sample. The first three are traced: changing them does not recompile."""

    temperature: jax.Array | float = 1.0  # 0: greedy
    top_k: jax.Array | int = 0  # keep the k most likely tokens; 0: all
    top_p: jax.Array | float = 1.0  # keep the smallest set of tokens with this much probability; 1: all
    group_size: int = struct.field(pytree_node=False, default=1)  # samples a prompt
    max_response_length: int = struct.field(pytree_node=False, default=128)
    eos_ids: tuple[int, ...] = struct.field(pytree_node=False, default=())
    pad_id: int = struct.field(pytree_node=False, default=0)  # what is written past the end
    stop: jax.Array | None = None  # int [S, V] of `models.stops.stop_table`: strings that end a response as an EOS does


def _truncated_logits(logits, top_k, top_p):
    """Logits with everything outside top-k and top-p at -1e30. [..., V]"""

    def truncate(logits):
        descending = jnp.sort(logits, axis=-1)[..., ::-1]
        k = jnp.where(top_k > 0, jnp.minimum(top_k, logits.shape[-1]), logits.shape[-1])
        kth = jnp.take_along_axis(descending, jnp.full((*logits.shape[:-1], 1), k - 1), axis=-1)
        probabilities = jax.nn.softmax(jnp.where(descending >= kth, descending, _NEVER), axis=-1)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities  # mass of the more likely tokens
        inside = (before < top_p) & (descending >= kth)
        threshold = jnp.min(jnp.where(inside, descending, jnp.inf), axis=-1, keepdims=True)
        return jnp.where(logits >= threshold, logits, _NEVER)

    return jax.lax.cond((top_k > 0) | (top_p < 1), truncate, lambda x: x, logits)


def sampling_logps(logits, sampling: Sampling):
    """Log-probabilities [..., V] of the distribution that is really sampled from: temperature, top-k, top-p.

    At temperature 0 it is a point mass on the most likely token.
    """
    temperature = jnp.asarray(sampling.temperature, jnp.float32)
    greedy = temperature == 0
    scaled = logits.astype(jnp.float32) / jnp.where(greedy, 1.0, temperature)
    logps = jax.nn.log_softmax(_truncated_logits(scaled, sampling.top_k, sampling.top_p), axis=-1)
    best = jnp.arange(logits.shape[-1]) == jnp.argmax(logits, axis=-1, keepdims=True)
    return jnp.where(greedy, jnp.where(best, 0.0, _NEVER), logps)
