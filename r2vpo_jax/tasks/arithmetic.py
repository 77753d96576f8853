"""The embedded task: sums written out digit by digit, with an explicit carry.

    47+85+36=        the problem (the sum is taken modulo 100: the last carry is dropped)
    7+5=2c           units column of 47+85: 12, write 2, `c` says "carry" (`-` says "none")
    8+4=3;           tens column: 4+8+1 = 13, write 3; the running total is 32
    2+6=8-3+3=6;     32+36 = 68
    68               the answer, then the end of the text

Either order of the two digits of a column (7+5 or 5+7) is fine: like real text, the working has free choices.

The base model learns from an *imperfect* demonstrator whose mistakes are systematic. On most occasions it
forgets to write the carry, and goes on with the wrong total; and on a fixed third of all column sums (34 of
110, the hard facts, chosen by a hash) it usually is off by one. So the right behavior is in the base model's
distribution, but wherever a carry or a hard fact occurs it is not the mode, and rare where several do; and
there are many separate things to discover, not one.

Problems are drawn as embedded.py says; what is hashed are the operands.
"""

import dataclasses
import functools
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from r2vpo_jax.tasks.embedded import DIGITS, EOS, PAD, EmbeddedTask, as_index, draw, judge, mix

SYMBOLS = (PAD, EOS, *DIGITS, "+", "=", "c", "-", ";")
_ID = {symbol: i for i, symbol in enumerate(SYMBOLS)}
_ZERO = _ID["0"]


@dataclasses.dataclass(frozen=True)
class ArithmeticTask(EmbeddedTask):
    """Chained addition. Difficulty: how many operands, and how many digits each.

    Raises:
      ValueError: for numbers outside the supported range.
    """

    min_operands: int = 2
    max_operands: int = 4
    num_digits: int = 2
    name: str = "arithmetic"
    symbols: ClassVar[tuple[str, ...]] = SYMBOLS

    def __post_init__(self):
        if not 2 <= self.min_operands <= self.max_operands <= 9:
            raise ValueError(
                f"task: 2 <= min_operands <= max_operands <= 9 is needed, got {self.min_operands} and "
                f"{self.max_operands}"
            )
        if not 1 <= self.num_digits <= 6:
            raise ValueError(f"task: num_digits must be 1 to 6, got {self.num_digits}")

    @property
    def max_prompt_length(self) -> int:
        return self.max_operands * (self.num_digits + 1)

    @property
    def max_response_length(self) -> int:
        """Exactly what a full solution of the longest problem needs, end of text included."""
        return (self.max_operands - 1) * 6 * self.num_digits + self.num_digits + 1

    def traced_problems(self, split: str, index):
        """`problems` that can be traced: (tokens int32 [N, P], lengths int32 [N]) at the positions index, int [N]."""
        return _prompts(self, *_operands(self, split, index.astype(jnp.uint32)))

    def traced_verify(self, split: str, index, responses, lengths):
        """`verify` that can be traced: (rewards f32 [B], outcomes int32 [B])."""
        return _verify(self, split, index.astype(jnp.uint32), responses, lengths)

    def answers(self, split: str, index, responses, lengths) -> list[str | None]:
        """What is written after the last `;`."""
        texts = [self.decode(row[:length]) for row, length in zip(responses, lengths, strict=True)]
        return [
            text.removesuffix(EOS).rpartition(";")[2] if ";" in text and text.endswith(EOS) else None for text in texts
        ]

    def level(self, split: str, index) -> np.ndarray:
        """The number of operands."""
        return np.asarray(_operands(self, split, as_index(index))[1])

    def demonstrations(self, split: str, index, key, forget_carry: float, slip: float):
        """What the imperfect demonstrator writes.

        Args:
          split, index: the problems.
          key: PRNG key of the demonstrator's mistakes and free choices.
          forget_carry: probability that a carry is forgotten.
          slip: probability that a hard fact comes out one too large.

        Returns:
          (responses int32 [N, T], lengths int32 [N]).
        """
        return _demonstrate(self, split, as_index(index), key, forget_carry, slip)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _operands(task, split, index):
    """(operands int32 [N, max_operands], number of operands int32 [N]); unused operands are 0."""

    def candidate(key):
        count_key, operand_key = jax.random.split(key)
        count = jax.random.randint(count_key, (), task.min_operands, task.max_operands + 1)
        operands = jax.random.randint(operand_key, (task.max_operands,), 0, 10**task.num_digits)
        operands = jnp.where(jnp.arange(task.max_operands) < count, operands, 0)
        code = mix(count.astype(jnp.uint32))
        for i in range(task.max_operands):
            code = mix(code * jnp.uint32(31) + operands[i].astype(jnp.uint32))
        return (operands, count), code, True

    return draw(split, index, 0xA217, candidate)


def _digits(number, num_digits):
    """Decimal digits [..., num_digits], most significant first."""
    return number[..., None] // (10 ** jnp.arange(num_digits - 1, -1, -1)) % 10


@functools.partial(jax.jit, static_argnums=0)
def _prompts(task, operands, count):
    symbols = _ZERO + _digits(operands, task.num_digits)  # [N, operands, digits]
    last = jnp.arange(task.max_operands) == count[:, None] - 1
    separator = jnp.where(last, _ID["="], _ID["+"])
    tokens = jnp.concatenate([symbols, separator[..., None]], axis=-1).reshape(operands.shape[0], -1)
    length = count * (task.num_digits + 1)
    # Shift to the right: left padding.
    column = jnp.arange(tokens.shape[1]) - (tokens.shape[1] - length)[:, None]
    tokens = jnp.take_along_axis(tokens, jnp.maximum(column, 0), axis=1)
    return jnp.where(column >= 0, tokens, _ID[PAD]).astype(jnp.int32), length.astype(jnp.int32)


def _is_hard_fact(x, y, carry):
    """34 of the 110 column sums, the same in either order of the digits."""
    code = (jnp.minimum(x, y) * 10 + jnp.maximum(x, y)) * 2 + carry
    return mix(code.astype(jnp.uint32) + jnp.uint32(0x51ED)) % 4 == 0


@functools.partial(jax.jit, static_argnums=(0, 1))
def _demonstrate(task, split, index, key, forget_carry, slip):
    operands, count = _operands(task, split, index)
    digits = task.num_digits

    def one(operands, count, index):
        forget_key, slip_key, order_key = jax.random.split(jax.random.fold_in(key, index), 3)
        shape = (task.max_operands, digits)
        forgets = jax.random.bernoulli(forget_key, forget_carry, shape)
        slips = jax.random.bernoulli(slip_key, slip, shape)
        swaps = jax.random.bernoulli(order_key, 0.5, shape)
        total = _digits(operands[0], digits)[::-1]  # least significant first
        steps = []
        for i in range(1, task.max_operands):
            addend, carry, new_total = _digits(operands[i], digits)[::-1], 0, []
            for j in range(digits):
                x, y = total[j], addend[j]
                value = x + y + carry
                written = (value + (_is_hard_fact(x, y, carry) & slips[i, j])) % 10
                carry = ((value >= 10) & ~forgets[i, j]).astype(jnp.int32)
                mark = jnp.where(carry == 1, _ID["c"], _ID["-"]) if j < digits - 1 else _ID[";"]
                x, y = jnp.where(swaps[i, j], y, x), jnp.where(swaps[i, j], x, y)
                equation = (_ZERO + x, _ID["+"], _ZERO + y, _ID["="], _ZERO + written, mark)
                steps.append(jnp.stack([jnp.asarray(t, jnp.int32) for t in equation]))
                new_total.append(written)
            total = jnp.where(i < count, jnp.stack(new_total), total)
        working = jnp.concatenate(steps)
        length = (count - 1) * 6 * digits
        ending = jnp.concatenate([_ZERO + total[::-1], jnp.array([_ID[EOS]])])
        tokens = jnp.full((task.max_response_length,), _ID[PAD], jnp.int32)
        tokens = tokens.at[: working.shape[0]].set(working)
        tokens = jax.lax.dynamic_update_slice(tokens, ending.astype(jnp.int32), (length,))
        length = length + digits + 1
        return jnp.where(jnp.arange(tokens.shape[0]) < length, tokens, _ID[PAD]), length

    return jax.vmap(one)(operands, count, index)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _verify(task, split, index, responses, lengths):
    """Right: the text ends with `;`, the digits of the sum, and the end of the text."""
    operands, _ = _operands(task, split, index)
    # int32 holds any chain: at most 9 operands of 6 digits.
    answer = _digits(jnp.sum(operands, axis=-1) % 10**task.num_digits, task.num_digits)
    expected = jnp.concatenate(
        [
            jnp.full((answer.shape[0], 1), _ID[";"]),
            _ZERO + answer,
            jnp.full((answer.shape[0], 1), _ID[EOS]),
        ],
        axis=-1,
    )
    column = lengths[:, None] - expected.shape[1] + jnp.arange(expected.shape[1])
    ending = jnp.take_along_axis(responses, jnp.clip(column, 0, responses.shape[1] - 1), axis=1)
    right = jnp.all((ending == expected) & (column >= 0), axis=-1)
    return judge(right, responses, lengths, len(SYMBOLS))
