"""Batched autoregressive sampling: prompts -> Rollout."""

from r2vpo_jax.sampler.decoding import sample
from r2vpo_jax.sampler.distribution import Sampling, sampling_logps
from r2vpo_jax.sampler.generation import SEGMENT_LENGTH, generate
from r2vpo_jax.sampler.protocol import OwnSampler, Published, Sampler
from r2vpo_jax.sampler.weights import rounded_weights

__all__ = [
    "SEGMENT_LENGTH", "OwnSampler", "Published", "Sampler", "Sampling", "generate", "rounded_weights", "sample", "sampling_logps",
]  # fmt: skip
