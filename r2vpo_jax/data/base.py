"""What a data set is: examples by position, and what was done to get at them."""

import abc
import dataclasses
import functools
import hashlib
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence

from r2vpo_jax.data.positions import row_of_position


@dataclasses.dataclass(frozen=True)
class Example:
    """A problem, and what its verifier needs."""

    question: str
    answer: str  # the final answer
    gold: str  # what the verifier gets
    kind: str  # the verifier: math, numeric, exact or reasoning_gym
    level: str  # as the source states it; "" if it does not
    source: str  # name of the data set
    columns: Mapping[str, object] = dataclasses.field(
        default_factory=dict, compare=False
    )  # of its row, as far as asked for


def same_question(text: str) -> str:
    """A key that is equal for questions that differ only in white space, letter case and Unicode form."""
    return re.sub(r"\s+", " ", unicodedata.normalize("NFC", text)).strip().casefold()


class Dataset(abc.ABC):
    """Random access to examples.

    Attributes:
      split: train, validation or test.
      num_examples: different problems; None if there is no end to them.
      counts: rows read, and how many were dropped, by reason.
    """

    split: str
    num_examples: int | None
    counts: dict[str, int]

    @abc.abstractmethod
    def example(self, position: int) -> Example:
        """The example at a position: always the same one, in every process and on every platform.

        train: any position >= 0; every epoch visits each problem once (positions.py).
        validation, test: positions [0, num_examples), in the order of the source.

        Raises:
          IndexError: a position that is not there.
        """

    @abc.abstractmethod
    def examples(self) -> Iterator[Example]:
        """All examples of the finite part, in the order of their sources."""

    @abc.abstractmethod
    def select(self, keep: Sequence[bool], reason: str) -> "Dataset":
        """Keeps those of `examples()` where `keep` is true; `counts[reason]` grows by the others."""

    @abc.abstractmethod
    def identity(self) -> Iterable[str]:
        """Texts that identify the data set: equal data sets have equal texts."""

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256, hexadecimal: of all questions and gold answers of the finite part, and how the rest is made."""
        hashed = hashlib.sha256()
        for text in self.identity():
            data = text.encode()
            hashed.update(len(data).to_bytes(8, "big") + data)
        return hashed.hexdigest()


class InMemoryDataset(Dataset):
    """Examples held in memory."""

    def __init__(self, examples: Sequence[Example], split: str, counts: dict[str, int] | None = None):
        self.split = split
        self.counts = dict(counts or {})
        self._examples = list(examples)
        self.num_examples = len(self._examples)

    def example(self, position: int) -> Example:
        if position < 0 or not self._examples or (self.split != "train" and position >= len(self._examples)):
            raise IndexError(f"position {position} of {self.split}, which has {len(self._examples)} problems")
        row = row_of_position(position, len(self._examples)) if self.split == "train" else position
        return self._examples[row]

    def examples(self) -> Iterator[Example]:
        return iter(self._examples)

    def select(self, keep: Sequence[bool], reason: str) -> "InMemoryDataset":
        kept = [example for example, stays in zip(self._examples, keep, strict=True) if stays]
        dropped = len(self._examples) - len(kept)
        return InMemoryDataset(kept, self.split, self.counts | {reason: self.counts.get(reason, 0) + dropped})

    def identity(self) -> Iterator[str]:
        for example in self._examples:
            yield from (example.question, example.gold, example.kind)
