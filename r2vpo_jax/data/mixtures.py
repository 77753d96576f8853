"""Several sources as one data set.

Training positions are cut into blocks. A block has as many places as the weights have shares in lowest terms, and
each source exactly its share of them, in an order that (stretch, block) decides. Weights of 2 and 1: blocks of three,
two of which are the first source's. Each source counts its own places, so its epochs are what they are without the
others. Validation and test are the sources one after the other.
"""

import bisect
import fractions
import functools
import itertools
import math
from collections.abc import Iterator, Sequence

import numpy as np

from r2vpo_jax.data.base import Dataset, Example
from r2vpo_jax.data.positions import STRETCH_BITS, permutation, split_position

_LARGEST_BLOCK = 1000
_BLOCKS = 1 << 40  # sets the orders of blocks apart from those of epochs


class Mixture(Dataset):
    """Sources in fixed shares (train), or one after the other.

    Raises:
      ValueError: shares that need blocks of more than 1000; validation or test with an endless source.
    """

    def __init__(self, parts: Sequence[Dataset], weights: Sequence[fractions.Fraction], split: str):
        self.split, self.parts, self._weights = split, list(parts), tuple(weights)
        sizes = [part.num_examples for part in parts]
        if split != "train" and None in sizes:
            raise ValueError(
                f"source {sizes.index(None) + 1} of the {split} mixture is endless; say how many problems of it: size=200"
            )
        self.num_examples = None if None in sizes else sum(sizes)
        self.counts = {}
        for part in parts:
            for name, count in part.counts.items():
                self.counts[name] = self.counts.get(name, 0) + count
        self._ends = list(itertools.accumulate(sizes)) if None not in sizes else []
        self._shares = shares(weights)
        self._block = functools.lru_cache(maxsize=64)(self._make_block)

    def locate(self, position: int) -> tuple[int, int]:
        """(source, position within it) at a position."""
        if self.split != "train":
            if not 0 <= position < self.num_examples:
                raise IndexError(f"position {position} of {self.split}, which has {self.num_examples} problems")
            source = bisect.bisect_right(self._ends, position)
            return source, position - (self._ends[source - 1] if source else 0)
        if position < 0:
            raise IndexError(f"position {position} of train")
        stretch, offset = split_position(position)
        block, place = divmod(offset, sum(self._shares))
        sources, ranks = self._block(stretch, block)
        source = int(sources[place])
        return source, (stretch << STRETCH_BITS) + block * self._shares[source] + int(ranks[place])

    def example(self, position: int) -> Example:
        source, inner = self.locate(position)
        return self.parts[source].example(inner)

    def examples(self) -> Iterator[Example]:
        return itertools.chain.from_iterable(part.examples() for part in self.parts)

    def select(self, keep: Sequence[bool], reason: str) -> "Mixture":
        keep, parts = iter(keep), []
        for part in self.parts:
            size = part.num_examples
            parts.append(part if size is None else part.select(list(itertools.islice(keep, size)), reason))
        if next(keep, None) is not None:
            raise ValueError("more values than examples")
        for i, (old, new) in enumerate(zip(self.parts, parts, strict=True)):
            if old.num_examples and not new.num_examples:
                raise ValueError(f"source {i + 1} of the {self.split} mixture has no problems left ({new.counts})")
        return Mixture(parts, self._weights, self.split)

    def identity(self) -> Iterator[str]:
        for part, share in zip(self.parts, self._shares, strict=True):
            yield str(share)
            yield from part.identity()

    def _make_block(self, stretch: int, block: int) -> tuple[np.ndarray, np.ndarray]:
        """(source, rank among that source's places) of each place in a block."""
        size = sum(self._shares)
        sources = np.repeat(np.arange(len(self._shares)), self._shares)[permutation(size, stretch, _BLOCKS + block)]
        ranks = np.empty(size, np.int64)
        for source, share in enumerate(self._shares):
            ranks[sources == source] = np.arange(share)
        return sources, ranks


def shares(weights: Sequence[fractions.Fraction]) -> tuple[int, ...]:
    """Weights in lowest terms.

    Raises:
      ValueError: their sum is above 1000.
    """
    scale = math.lcm(*(weight.denominator for weight in weights))
    whole = [int(weight * scale) for weight in weights]
    whole = [share // math.gcd(*whole) for share in whole]
    if sum(whole) > _LARGEST_BLOCK:
        raise ValueError(
            f"weights {', '.join(map(str, map(float, weights)))} have shares of {':'.join(map(str, whole))} in lowest "
            f"terms; choose rounder ones, such as 2 and 1 (their sum may be {_LARGEST_BLOCK})"
        )
    return tuple(whole)
