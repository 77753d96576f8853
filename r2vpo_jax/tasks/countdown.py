"""The embedded countdown task: reach a target with given numbers.

    372>23=          the numbers 3, 7 and 2, and the target 23
    3*7+2            an answer: every number once, worked out from the left, (3*7)+2, then the end of the text

There are 6 orders and 9 choices of operations, and most problems have several right answers: a wide search, judged
only at its end. The base model learns from a demonstrator who writes any order and any operations on most occasions.
"""

import dataclasses
import functools
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from r2vpo_jax.tasks.embedded import DIGITS, EOS, PAD, EmbeddedTask, as_index, draw, hash_of, judge

OPERATIONS = ("+", "-", "*")
SYMBOLS = (PAD, EOS, *DIGITS, *OPERATIONS, ">", "=")
_ID = {symbol: i for i, symbol in enumerate(SYMBOLS)}
_ZERO, _FIRST_OPERATION = _ID["0"], _ID["+"]
_LARGEST_TARGET = 99


@dataclasses.dataclass(frozen=True)
class CountdownTask(EmbeddedTask):
    """Numbers from 1 to 9, and a target from 0 to 99 that can be reached with them.

    Raises:
      ValueError: for numbers outside the supported range.
    """

    num_numbers: int = 3
    name: str = "countdown"
    symbols: ClassVar[tuple[str, ...]] = SYMBOLS

    def __post_init__(self):
        if not 2 <= self.num_numbers <= 6:
            raise ValueError(f"task: num_numbers must be 2 to 6, got {self.num_numbers}")

    @property
    def max_prompt_length(self) -> int:
        return self.num_numbers + 4

    @property
    def max_response_length(self) -> int:
        """Exactly what an answer needs, end of text included."""
        return 2 * self.num_numbers

    def traced_problems(self, split: str, index):
        """`problems` that can be traced: (tokens int32 [N, P], lengths int32 [N]) at the positions index, int [N]."""
        numbers, _, target = _draw(self, split, index)
        columns = [_ZERO + numbers, jnp.full((len(index), 1), _ID[">"])]
        columns += [_ZERO + target[:, None] // 10, _ZERO + target[:, None] % 10, jnp.full((len(index), 1), _ID["="])]
        tokens = jnp.concatenate(columns, axis=1).astype(jnp.int32)
        return tokens, jnp.full(len(index), tokens.shape[1], jnp.int32)

    def traced_verify(self, split: str, index, responses, lengths):
        """`verify` that can be traced: (rewards f32 [B], outcomes int32 [B])."""
        numbers, _, target = _draw(self, split, index)
        written, operations = responses[:, : self.max_response_length - 1 : 2] - _ZERO, responses[:, 1:-1:2]
        operations = operations - _FIRST_OPERATION
        form = (operations >= 0) & (operations < len(OPERATIONS))
        right = jnp.all(form, axis=1) & (lengths == self.max_response_length) & (responses[:, -1] == _ID[EOS])
        right &= jnp.all(jnp.sort(written, axis=1) == jnp.sort(numbers, axis=1), axis=1)
        right &= _value(written, operations) == target
        return judge(right, responses, lengths, len(SYMBOLS))

    def answers(self, split: str, index, responses, lengths) -> list[str | None]:
        """The whole expression."""
        texts = [self.decode(row[:length]) for row, length in zip(responses, lengths, strict=True)]
        return [text.removesuffix(EOS) if text.endswith(EOS) else None for text in texts]

    def level(self, split: str, index) -> np.ndarray:
        """The decade of the target: 0 for 0 to 9, up to 9."""
        return np.asarray(_draw(self, split, as_index(index))[2]) // 10

    def demonstrations(self, split: str, index, key, guess: float):
        """What the demonstrator writes: an answer, or any order and operations.

        Args:
          split, index: the problems.
          key: PRNG key of the demonstrator's choices.
          guess: probability of the latter.

        Returns:
          (responses int32 [N, T], lengths int32 [N]).
        """
        return _demonstrate(self, split, as_index(index), key, guess)


def _value(numbers, operations):
    """What expressions come to, from the left: numbers [..., n], operations [..., n - 1] -> [...]."""
    value = numbers[..., 0]
    for i in range(operations.shape[-1]):
        after = numbers[..., i + 1]
        value = jnp.select([operations[..., i] == k for k in range(3)], [value + after, value - after, value * after])
    return value


@functools.partial(jax.jit, static_argnums=(0, 1))
def _draw(task, split, index):
    """(numbers int32 [N, n], an answer int32 [N, 2 n - 1], target int32 [N]).

    An answer is its n - 1 operations, and then for each of its numbers where that stands among those shown.
    """

    def candidate(key):
        number_key, operation_key, order_key = jax.random.split(key, 3)
        numbers = jax.random.randint(number_key, (task.num_numbers,), 1, 10)
        operations = jax.random.randint(operation_key, (task.num_numbers - 1,), 0, len(OPERATIONS))
        target = _value(numbers, operations)
        shown = jax.random.permutation(order_key, task.num_numbers)
        valid = (target >= 0) & (target <= _LARGEST_TARGET)
        # The order in which numbers are shown is no part of the problem.
        return (numbers, operations, target, shown), hash_of([*jnp.sort(numbers), target]), valid

    numbers, operations, target, shown = draw(split, index, 0xC0DE, candidate)
    answer = jnp.concatenate([operations, jnp.argsort(shown, axis=1)], axis=1)
    return jnp.take_along_axis(numbers, shown, axis=1), answer, target


@functools.partial(jax.jit, static_argnums=(0, 1))
def _demonstrate(task, split, index, key, guess):
    numbers, answer, _ = _draw(task, split, index)
    number = task.num_numbers

    def one(numbers, answer, index):
        guess_key, order_key, operation_key = jax.random.split(jax.random.fold_in(key, index), 3)
        guesses = jax.random.bernoulli(guess_key, guess)
        order = jnp.where(guesses, jax.random.permutation(order_key, number), answer[number - 1 :])
        drawn = jax.random.randint(operation_key, (number - 1,), 0, len(OPERATIONS))
        operations = jnp.where(guesses, drawn, answer[: number - 1])
        tokens = jnp.zeros(task.max_response_length, jnp.int32)
        tokens = tokens.at[::2].set(_ZERO + numbers[order]).at[1:-1:2].set(_FIRST_OPERATION + operations)
        return tokens.at[-1].set(_ID[EOS])

    return jax.vmap(one)(numbers, answer, index), jnp.full(len(index), task.max_response_length, jnp.int32)
