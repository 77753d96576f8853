"""Verifiable rewards: final answers out of responses, judged in processes that can be killed."""

from r2vpo_jax.verifiers.answers import canonical, exact, extract, math, numeric
from r2vpo_jax.verifiers.extraction import STYLES, format_score
from r2vpo_jax.verifiers.pool import KINDS, Check, Judgement, VerifierPool

__all__ = [
    "KINDS",
    "STYLES",
    "Check",
    "Judgement",
    "VerifierPool",
    "canonical",
    "exact",
    "extract",
    "format_score",
    "math",
    "numeric",
]
