"""A few responses of an iteration, readable, as rows of samples.jsonl."""

import itertools
from collections.abc import Callable, Sequence

import numpy as np

from r2vpo_jax.rollout import Rollout
from r2vpo_jax.rows import Rows
from r2vpo_jax.tasks.base import Outcome, Task
from r2vpo_jax.training.token_gradients import TokenGradients

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"  # what bytes of a character are decoded to that is not complete
_LONGEST = 8  # tokens waited for; a character has four bytes at most, and what no character is may go on for ever


def of_batch(
    rollout: Rollout, number: int, task: Task, rows: Rows, *, version: int = 0, tokens: TokenGradients | None = None
) -> list[dict]:
    """Responses of a batch, the first or those of `tokens`: the same on all processes.

    Args:
      rollout: verified, with advantages, this process's rows.
      number: of responses.
      task: decodes tokens.
      rows: how the batch is spread over processes.
      version: optimizer updates done when `tokens` were computed.
      tokens: what the objective does with each token of them, on the host, where that is known.
    """
    if number == 0:
        return []
    here, mine = {row: i for i, row in enumerate(rows.index.tolist())}, []
    for place, row in enumerate(range(number) if tokens is None else tokens.rows.tolist()):
        if (i := here.get(row)) is None:
            continue
        sample = _sample(rollout, task, i)
        if tokens is not None:
            sample |= {"age": version - sample["version"], "learned": bool(rollout.keep[i])}
            sample |= _tokens(rollout, task, i, tokens.log_ratio[place], tokens.kept[place])
        mine.append((place, sample))
    return [sample for _, sample in sorted(itertools.chain(*rows.exchange(mine)), key=lambda pair: pair[0])]


def _sample(rollout: Rollout, task: Task, i: int) -> dict:
    prompt = rollout.tokens[i, rollout.prompt_size - rollout.prompt_length[i] : rollout.prompt_size]
    advantage = rollout.advantage[i]
    if advantage.ndim == 1:  # of each token, from a critic
        advantage = np.mean(advantage, where=rollout.response_mask[i])
    return {
        "version": int(rollout.version[i]),
        "problem": int(rollout.group_id[i]),
        "prompt": task.decode(prompt),
        "response": task.decode(rollout.response_tokens[i, : rollout.response_length[i]]),
        "reward": float(rollout.reward[i]),
        "outcome": Outcome(int(rollout.outcome[i])).name.lower(),
        "advantage": float(advantage),
    }


def _tokens(rollout: Rollout, task: Task, i: int, log_ratio: np.ndarray, kept: np.ndarray) -> dict:
    """The tokens of a response: their texts, log r, and what is kept of their gradient (None: nothing is at stake)."""
    length = int(rollout.response_length[i])
    return {
        "token_texts": pieces(rollout.response_tokens[i, :length], task.decode),
        "log_ratios": [round(float(x), 7) for x in log_ratio[:length]],
        "kept": [round(float(x), 6) if np.isfinite(x) else None for x in kept[:length]],
    }


def pieces(tokens: Sequence[int], decode: Callable[[Sequence[int]], str]) -> list[str]:
    """What each token adds to the text. A character of several tokens is with the last of them, "" with the others.

    Args:
      tokens: ids.
      decode: ids to text. A token may look different at the beginning of a text, so each is decoded with those before it,
        as far as these belong to the last piece.
    """
    found, start, read = [], 0, 0  # decoded from `start` on, of which the tokens up to `read` are in a piece already
    for end in range(1, len(tokens) + 1):
        before, now = decode(tokens[start:read]) if read > start else "", decode(tokens[start:end])
        if now.endswith(_INCOMPLETE) and end < len(tokens) and end - read < _LONGEST:
            found.append("")
            continue
        found.append(now[len(before) :])
        start, read = read, end
    return found
