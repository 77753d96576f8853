"""Verifiable rewards: final answers out of responses, judged in processes that can be killed."""

from r2vpo_jax.verifiers.answers import canonical, exact, extract, math, numeric
from r2vpo_jax.verifiers.extraction import RESPONSE_STYLES, format_score
from r2vpo_jax.verifiers.kinds import KINDS, Kind
from r2vpo_jax.verifiers.pool import Check, Judgement, VerifierPool

__all__ = [
    "KINDS",
    "RESPONSE_STYLES",
    "Check",
    "Judgement",
    "Kind",
    "VerifierPool",
    "canonical",
    "exact",
    "extract",
    "format_score",
    "math",
    "numeric",
]
