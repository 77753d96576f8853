"""Strings that end a response, as a table that finds them token by token, whatever tokens they are spelled with."""

import collections
from collections.abc import Iterable

import numpy as np

from r2vpo_jax.models.tokenizer import token_bytes


def stop_table(strings: Iterable[str], tokenizer) -> np.ndarray | None:
    """The automaton of Aho and Corasick (1975) over the bytes of a text, a whole token at a step.

    Args:
      strings: any of them ends a response.
      tokenizer: a Transformers tokenizer.

    Returns:
      int16 or int32 [S, V]: the state after a token, by the state before it and the token. A response begins in state 0;
      state S-1 says that one of the strings has been completed, and is never left. None without strings.

    Raises:
      ValueError: an empty string, or a tokenizer whose texts are not its tokens one after the other.
    """
    strings = [string.encode() for string in strings]
    if not strings:
        return None
    if not all(strings):
        raise ValueError("sampler.stop has an empty string, which would end every response before its first token")
    by_byte = _by_byte(strings)
    num_states = len(by_byte)
    tokens = token_bytes(tokenizer)
    lengths = np.array([len(token) for token in tokens])
    states = np.repeat(np.arange(num_states)[:, None], len(tokens), axis=1)
    for position in range(lengths.max()):
        longer = np.flatnonzero(lengths > position)
        bytes_there = np.array([tokens[i][position] for i in longer])
        states[:, longer] = by_byte[states[:, longer], bytes_there]
    return states.astype(np.int16 if num_states < 2**15 else np.int32)


def _by_byte(strings: list[bytes]) -> np.ndarray:
    """int [S, 256]: the state after a byte."""
    tries, ends = [{}], set()
    for string in strings:
        state = 0
        for byte in string:
            if byte not in tries[state]:
                tries.append({})
                tries[state][byte] = len(tries) - 1
            state = tries[state][byte]
        ends.add(state)
    table = np.zeros((len(tries) + 1, 256), np.int64)
    table[-1] = len(tries)
    shorter, queue = {}, collections.deque([0])  # state -> that of its longest proper suffix
    while queue:
        state = queue.popleft()
        if state:
            table[state] = table[shorter[state]]
        for byte, after in tries[state].items():
            shorter[after] = table[state, byte] if state else 0
            table[state, byte] = after
            queue.append(after)
    for state in range(len(tries)):
        suffix = state
        while suffix and suffix not in ends:
            suffix = shorter[suffix]
        if suffix:
            table[table == state] = len(tries)
    return table
