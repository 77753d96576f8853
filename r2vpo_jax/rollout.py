"""The one record that travels from the sampler to the learner."""

import jax
import jax.numpy as jnp
from flax import struct


@struct.dataclass
class Rollout:
    """B responses, groups (the G samples of one prompt) contiguous.

    Prompts are left-padded into the first P columns of `tokens`, so that every per-token array is
    response-aligned: column t belongs to response token t given all before it. The end-of-text token counts
    as a response token. Masks come from lengths, never from comparing tokens with a padding id.
    """

    tokens: jax.Array  # int32 [B, P + T]
    prompt_length: jax.Array  # int32 [B]
    response_length: jax.Array  # int32 [B]
    truncated: jax.Array  # bool [B] no end of text within T tokens
    behavior_logp: jax.Array  # f32 [B, T] of the distribution really sampled from
    temperature: jax.Array  # f32 [B]
    reward: jax.Array  # f32 [B] NaN until verified
    outcome: jax.Array  # int32 [B] tasks.base.Outcome, -1 until verified
    advantage: jax.Array  # f32 [B], or f32 [B, T] from a critic; NaN until filled
    keep: jax.Array  # bool [B] whether the row takes part in learning
    group_id: jax.Array  # int32 [B] index of the problem in its split
    rollout_id: jax.Array  # int32 [B] unique within a run
    version: jax.Array  # int32 [B] optimizer updates done when it was sampled
    reference_logp: jax.Array | None = None  # f32 [B, T] under the frozen reference, when a KL term needs it
    value: jax.Array | None = None  # f32 [B, T] before each token, when there is a critic
    value_target: jax.Array | None = None  # f32 [B, T]
    proximal_logp: jax.Array | None = None  # f32 [B, T] under the learner before its first update on this batch
    weights: jax.Array | None = None  # f32 [B, T] importance weights of proximal against behavior
    reward_parts: jax.Array | None = None  # f32 [B, F] by function, until advantages are filled, if these need them

    @property
    def response_size(self) -> int:
        """T."""
        return self.behavior_logp.shape[1]

    @property
    def prompt_size(self) -> int:
        """P."""
        return self.tokens.shape[1] - self.response_size

    @property
    def response_tokens(self) -> jax.Array:
        """int32 [B, T]."""
        return self.tokens[:, self.prompt_size :]

    @property
    def response_mask(self) -> jax.Array:
        """bool [B, T]: the tokens of the response, end of text included."""
        return jnp.arange(self.response_size) < self.response_length[:, None]

    @property
    def learning_mask(self) -> jax.Array:
        """bool [B, T]: the tokens that learning counts."""
        return self.response_mask & self.keep[:, None]
