"""The embedded eureka task: what is rewarded takes several rare tokens in a row.

    3817=            a number of four digits
    3817             what the base model mostly writes: the same again
    6187             now and then a digit is turned over (9 minus it); an answer is right if the first `needed` digits
                     are, as here the first three

Each digit is turned over with one probability in five by the demonstrator, independently of the others: the right answer for
three digits has a probability of 0.8 % a try under the base model, and none of its tokens is learned from unless all come together.
"""

import dataclasses
import functools
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from r2vpo_jax.tasks.embedded import DIGITS, EOS, PAD, EmbeddedTask, as_index, draw, hash_of, judge

SYMBOLS = (PAD, EOS, *DIGITS, "=")
_ID = {symbol: i for i, symbol in enumerate(SYMBOLS)}
_ZERO = _ID["0"]
NUM_DIGITS = 4


@dataclasses.dataclass(frozen=True)
class EurekaTask(EmbeddedTask):
    """Turn over the first `needed` of four digits.

    Raises:
      ValueError: `needed` is not 1 to 4.
    """

    needed: int = 3
    name: str = "eureka"
    symbols: ClassVar[tuple[str, ...]] = SYMBOLS

    def __post_init__(self):
        if not 1 <= self.needed <= NUM_DIGITS:
            raise ValueError(f"task: needed must be 1 to {NUM_DIGITS}, got {self.needed}")

    @property
    def max_prompt_length(self) -> int:
        return NUM_DIGITS + 1

    @property
    def max_response_length(self) -> int:
        """Four digits and the end of the text."""
        return NUM_DIGITS + 1

    def traced_problems(self, split: str, index):
        """`problems` that can be traced: (tokens int32 [N, P], lengths int32 [N]) at the positions index, int [N]."""
        digits = _draw(split, index)
        tokens = jnp.concatenate([_ZERO + digits, jnp.full((len(index), 1), _ID["="])], axis=1).astype(jnp.int32)
        return tokens, jnp.full(len(index), tokens.shape[1], jnp.int32)

    def traced_verify(self, split: str, index, responses, lengths):
        """`verify` that can be traced: (rewards f32 [B], outcomes int32 [B])."""
        written, digits = responses[:, :NUM_DIGITS] - _ZERO, _draw(split, index)
        form = jnp.all((written >= 0) & (written < 10), axis=1) & (responses[:, NUM_DIGITS] == _ID[EOS])
        turned = jnp.all((written == 9 - digits)[:, : self.needed], axis=1)
        right = form & turned & (lengths == NUM_DIGITS + 1)
        return judge(right, responses, lengths, len(SYMBOLS))

    def answers(self, split: str, index, responses, lengths) -> list[str | None]:
        """The first `needed` digits."""
        texts = [self.decode(row[:length]) for row, length in zip(responses, lengths, strict=True)]
        return [text[: self.needed] if text.endswith(EOS) else None for text in texts]

    def level(self, split: str, index) -> np.ndarray:
        """The first digit."""
        return np.asarray(_draw(split, as_index(index)))[:, 0]

    def demonstrations(self, split: str, index, key, turn: float):
        """What the demonstrator writes.

        Args:
          split, index: the problems.
          key: PRNG key of the demonstrator's choices.
          turn: probability that a digit is turned over.

        Returns:
          (responses int32 [N, T], lengths int32 [N]).
        """
        return _demonstrate(split, as_index(index), key, turn)


@functools.partial(jax.jit, static_argnums=0)
def _draw(split, index):
    """Digits int32 [N, 4]."""

    def candidate(key):
        digits = jax.random.randint(key, (NUM_DIGITS,), 0, 10)
        return digits, hash_of(digits), True

    return draw(split, index, 0xE0CA, candidate)


@functools.partial(jax.jit, static_argnums=0)
def _demonstrate(split, index, key, turn):
    digits = _draw(split, index)
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(index)
    turned = jax.vmap(lambda key: jax.random.bernoulli(key, turn, (NUM_DIGITS,)))(keys)
    written = _ZERO + jnp.where(turned, 9 - digits, digits)
    tokens = jnp.concatenate([written, jnp.full((len(index), 1), _ID[EOS])], axis=1).astype(jnp.int32)
    return tokens, jnp.full(len(index), tokens.shape[1], jnp.int32)
