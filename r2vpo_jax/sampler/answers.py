"""What an answer of /v1/completions must be for a run to learn from it. A server can answer anything: all is looked at."""

import re
from typing import Any, NamedTuple

import numpy as np

from r2vpo_jax.errors import UsageError
from r2vpo_jax.sampler.distribution import Sampling

_LEAST = -9999.0  # what vLLM writes for minus infinity
_ABOVE = 1e-3  # a log-probability may be this much above 0, by rounding
_TOKEN_ID = re.compile(r"token_id:(\d{1,9})")


class Answer(NamedTuple):
    """One response."""

    tokens: list[int]
    logps: list[float]
    finish: str  # "stop", "length", or something else
    weights: str | None  # version of the weights that it was sampled with, if the server says so


def read(answer: Any, prompt: list[int], sampling: Sampling, num_tokens: int) -> Answer:
    """The response in an answer.

    Args:
      answer: from JSON.
      prompt: ids that were sent.
      sampling: what was asked for.
      num_tokens: ids are below.

    Raises:
      UsageError: something is missing or cannot be; the message says what to change.
    """
    choices = answer.get("choices") if isinstance(answer, dict) else None
    if not isinstance(choices, list) or not all(isinstance(choice, dict) for choice in choices):
        raise _wrong("without choices", "it must be an OpenAI-compatible /v1/completions")
    if len(choices) != 1:
        raise _wrong(f"with {len(choices)} responses where one was asked for")
    choice = choices[0]
    logprobs = choice.get("logprobs") if isinstance(choice.get("logprobs"), dict) else {}
    echoed = choice.get("prompt_token_ids")
    if isinstance(echoed, list) and echoed != prompt:
        raise _wrong(
            f"to another prompt: {len(echoed)} tokens where {len(prompt)} were sent",
            "it must take token ids as they are, without adding or cutting any",
        )
    tokens = _tokens(choice, logprobs)
    longest = sampling.max_response_length
    if not 1 <= len(tokens) <= longest:
        raise _wrong(f"with {len(tokens)} tokens where 1 to {longest} were asked for")
    for token in tokens:
        if not 0 <= token < num_tokens:
            raise _wrong(
                f"with token {str(token)[:20]}, and there are {num_tokens}", "it must serve the model of this run"
            )
    logps = logprobs.get("token_logprobs")
    if not isinstance(logps, list) or len(logps) != len(tokens):
        found = f"{len(logps)} log-probabilities" if isinstance(logps, list) else "no log-probabilities"
        raise _wrong(
            f"with {found} for {len(tokens)} tokens",
            "it must give logprobs.token_logprobs, those of the sampled tokens",
        )
    for logp in logps:
        if not _is_number(logp) or not _LEAST < logp <= _ABOVE:  # NaN is neither
            raise _wrong(f"with {str(logp)[:40]} for the log-probability of a token that was sampled")
    finish, metadata = choice.get("finish_reason"), answer.get("metadata")
    version = metadata.get("weight_version") if isinstance(metadata, dict) else None
    return Answer(tokens, logps, str(finish)[:40], None if version is None else str(version)[:40])


def _tokens(choice: dict, logprobs: dict) -> list[int]:
    tokens = choice.get("token_ids")
    if isinstance(tokens, list) and all(isinstance(token, int) and not isinstance(token, bool) for token in tokens):
        return tokens
    spelled = logprobs.get("tokens")
    if isinstance(spelled, list):
        found = [_TOKEN_ID.fullmatch(token) if isinstance(token, str) else None for token in spelled]
        if found and all(found):
            return [int(match[1]) for match in found]
    raise _wrong(
        "without token ids",
        "it needs return_token_ids, which vLLM has from 0.10.2 on and SGLang since July 2026 (text would have to be cut into "
        "tokens anew, which gives others)",
    )


def cut(answer: Answer, sampling: Sampling, has_stop_strings: bool) -> tuple[int, bool]:
    """(length of the response, whether it has ended) by the run's own rules.

    The first token that ends a response is its last one, whatever comes after: the beginning of a sample is a sample.

    Args:
      answer: from `read`.
      sampling: ends of text, and the table of stop strings.
      has_stop_strings: whether the server was given some: it may find them elsewhere, in the text.

    Raises:
      UsageError: the server ended the response where it does not end.
    """
    stop = None if sampling.stop is None else np.asarray(sampling.stop)
    state, ends = 0, set(sampling.eos_ids)
    for number, token in enumerate(answer.tokens, 1):
        state = state if stop is None else int(stop[state, token])
        if token in ends or (stop is not None and state == len(stop) - 1):
            return number, True
    length = len(answer.tokens)
    if length == sampling.max_response_length:
        return length, False
    if answer.finish == "stop" and has_stop_strings:
        return length, True
    if answer.finish == "length":
        raise _wrong(
            f"that was cut off after {length} of {sampling.max_response_length} tokens",
            "its limit of prompt and response together must be as long (vLLM: --max-model-len, SGLang: --context-length)",
        )
    raise _wrong(
        f"that ended ({answer.finish}) after token {answer.tokens[-1]}, which is none of the ends of text "
        f"{sampling.eos_ids}",
        "it must have the ends of this model, and leave the last token in the response",
    )


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _wrong(what: str, remedy: str = "see docs/engines.md") -> UsageError:
    return UsageError(f"the engine gives an answer {what}: {remedy}")
