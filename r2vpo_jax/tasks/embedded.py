"""What the embedded tasks share: a language of single symbols, and problems that are drawn by position.

Everything in these tasks is JAX, generation and verification included, so that both can be part of a compiled program. A
problem is a pure function of (split, position); which problems belong to which split is decided by a hash of the
problem, so that the splits are disjoint as sets of problems.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from r2vpo_jax.tasks.base import SPLITS, Outcome, Problems, Verdicts

PAD, EOS = "<pad>", "<eos>"
DIGITS = tuple("0123456789")
_SPLIT_BOUNDS = {"train": (0, 13), "validation": (13, 14), "test": (14, 16)}  # sixteenths of all problems


class EmbeddedTask:
    """Methods of `Task` that follow from `symbols`, `traced_problems` and `traced_verify`."""

    symbols: ClassVar[tuple[str, ...]]  # by token id; the padding first, the end of the text second
    name: str
    digest: ClassVar[str] = ""  # the parameters say everything, and are in the configuration
    notices: ClassVar[tuple[str, ...]] = ()

    traced_problems: Callable
    traced_verify: Callable

    @property
    def eos_ids(self) -> tuple[int, ...]:
        return (self.symbols.index(EOS),)

    def problems(self, split: str, index) -> Problems:
        tokens, length = self.traced_problems(split, as_index(index))
        return Problems(index=np.asarray(index, np.int32), tokens=np.asarray(tokens), length=np.asarray(length))

    def verify(self, split: str, index, responses, lengths):
        reward, outcome = self.traced_verify(split, as_index(index), jnp.asarray(responses), jnp.asarray(lengths))
        return Verdicts(np.asarray(reward), np.asarray(outcome))

    def num_problems(self, split: str) -> None:
        return None

    def check_tokenizer(self, tokenizer) -> None:
        vocabulary = tokenizer.get_vocab()
        wrong = [symbol for i, symbol in enumerate(self.symbols) if vocabulary.get(symbol) != i]
        if wrong:
            raise ValueError(
                f"the checkpoint's tokenizer does not belong to the {self.name} task: symbols {wrong[:5]} have "
                "other ids or none; use the shipped base checkpoint or one made by experiments/pretrain.py"
            )

    def decode(self, tokens) -> str:
        return "".join(self.symbols[t] if 0 <= t < len(self.symbols) else "?" for t in np.asarray(tokens).tolist())

    def close(self) -> None:
        pass


def as_index(index):
    """Positions as uint32 [N].

    Raises:
      ValueError: no vector of non-negative integers.
    """
    index = np.asarray(index)
    if index.ndim != 1 or not np.issubdtype(index.dtype, np.integer) or (index.size and index.min() < 0):
        raise ValueError(f"problem indices are a vector of non-negative integers, got {index!r}")
    return jnp.asarray(index, jnp.uint32)


def mix(x):
    """A 32-bit finalizer: every input bit moves every output bit."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)


def hash_of(numbers):
    """uint32 [] of a sequence of integers."""
    code = jnp.uint32(0)
    for number in numbers:
        code = mix(code * jnp.uint32(31) + jnp.asarray(number).astype(jnp.uint32))
    return code


def judge(right, responses, lengths, num_symbols: int):
    """(rewards f32 [B], outcomes int32 [B]): right or wrong, and an error where a response has a token of no symbol.

    Args:
      right: bool [B].
      responses, lengths: int32 [B, T] and [B].
      num_symbols: of the language.
    """
    known = (responses >= 0) & (responses < num_symbols) | (jnp.arange(responses.shape[1]) >= lengths[:, None])
    outcome = jnp.where(right, Outcome.RIGHT, Outcome.WRONG)
    outcome = jnp.where(jnp.all(known, axis=-1), outcome, Outcome.ERROR)
    return (outcome == Outcome.RIGHT).astype(jnp.float32), outcome.astype(jnp.int32)


def draw(split: str, index, family: int, candidate: Callable[[jax.Array], tuple[Any, jax.Array, jax.Array]]):
    """The problems of a split at the positions index, each the first candidate that is one and belongs to the split.

    Args:
      split: of `SPLITS`.
      index: [N].
      family: a number of the task's own, the seed of its problems.
      candidate: key -> (problem, hash uint32 [], whether it is a problem, bool []).

    Returns:
      The problems, axis 0 the position.

    Raises:
      ValueError: an unknown split.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; the splits are {SPLITS}")
    low, high = _SPLIT_BOUNDS[split]
    base_key = jax.random.fold_in(jax.random.key(family), SPLITS.index(split))

    def try_(key):
        problem, code, valid = candidate(key)
        return problem, valid & (code % 16 >= low) & (code % 16 < high)

    def one(index):
        key = jax.random.fold_in(base_key, index)

        def again(state):
            attempt, _ = state
            return attempt + 1, try_(jax.random.fold_in(key, attempt))

        _, (problem, _) = jax.lax.while_loop(lambda state: ~state[1][1], again, (1, try_(key)))
        return problem

    return jax.vmap(one)(index.astype(jnp.uint32))


def make_tokenizer(symbols):
    """The language of a task as a Transformers object: one token per symbol."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({symbol: i for i, symbol in enumerate(symbols)}, unk_token=PAD))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    # Without unk_token, loading the tokenizer next to a Qwen2 config.json would add one to the vocabulary.
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS, unk_token=PAD)
