"""Examples that stay in their files: of each only the place is held, and what is asked for is read again.

Parquet is read by row groups, of which the last few are kept; Arrow files are mapped into memory; of JSONL the line is read.
"""

import collections
import functools
import os
import pathlib
import threading
from array import array
from collections.abc import Iterator, Sequence

import numpy as np

from r2vpo_jax import waits
from r2vpo_jax.data.base import Dataset, Example
from r2vpo_jax.data.files import json_line, open_table, read_places
from r2vpo_jax.data.positions import row_of_position

SUFFIXES = (".parquet", ".arrow", ".jsonl")
KEPT_BYTES = 256 << 20  # of row groups that were read, of all files together; one is always kept


class Places:
    """Where examples are: the file, the place in it (a row from 0, of JSONL a byte), and the number of the row for messages."""

    def __init__(self, file=(), place=(), number=()):
        self.file, self.place, self.number = array("i", file), array("q", place), array("q", number)

    def add(self, file: int, place: int, number: int) -> None:
        self.file.append(file)
        self.place.append(place)
        self.number.append(number)

    def __len__(self) -> int:
        return len(self.file)

    def chosen(self, index: np.ndarray) -> "Places":
        return Places(*(np.asarray(column)[index].tolist() for column in (self.file, self.place, self.number)))


class StreamedDataset(Dataset):
    """Examples in files; the same as `InMemoryDataset` would hold.

    Args:
      files: of the data, each a `File` or what has its methods.
      places: of the examples, in the order of the files.
      make: (file, row) -> Example.
      split, counts: as of any data set.
    """

    def __init__(self, files: Sequence, places: Places, make, split: str, counts: dict[str, int] | None = None):
        self.split, self.counts, self.num_examples = split, dict(counts or {}), len(places)
        self._files, self._places, self._make = files, places, make

    def example(self, position: int) -> Example:
        size = len(self._places)
        if position < 0 or not size or (self.split != "train" and position >= size):
            raise IndexError(f"position {position} of {self.split}, which has {size} problems")
        row = row_of_position(position, size) if self.split == "train" else position
        file = self._places.file[row]
        return self._make(file, self._files[file].row(self._places.place[row]))

    def examples(self) -> Iterator[Example]:
        """All in order, read once from the beginning of each file to its end."""
        return waits.each(self._in_order(), f"reading {self._files[0].path.name}", len(self._places), "rows")

    def _in_order(self) -> Iterator[Example]:
        following = 0
        for number, file in enumerate(self._files):
            for place, _, row in file.rows():
                if following == len(self._places) or self._places.file[following] != number:
                    break
                if place == self._places.place[following]:
                    following += 1
                    yield self._make(number, row)

    def select(self, keep: Sequence[bool], reason: str) -> "StreamedDataset":
        index = np.flatnonzero(np.fromiter(keep, bool))
        counts = self.counts | {reason: self.counts.get(reason, 0) + len(self._places) - len(index)}
        return StreamedDataset(self._files, self._places.chosen(index), self._make, self.split, counts)

    def identity(self) -> Iterator[str]:
        for example in self.examples():
            yield from (example.question, example.gold, example.kind)


class Groups:
    """Row groups that were read last, of several files. Threads may share them."""

    def __init__(self):
        self._kept, self._bytes, self._lock = collections.OrderedDict(), 0, threading.Lock()

    def get(self, key, read):
        """What is kept under `key`, or what `read` returns, a table."""
        with self._lock:
            if key not in self._kept:
                self._kept[key] = table = read()
                self._bytes += table.nbytes
                while self._bytes > KEPT_BYTES and len(self._kept) > 1:
                    self._bytes -= self._kept.popitem(last=False)[1].nbytes
            self._kept.move_to_end(key)
            return self._kept[key]


class File:
    """A file that is read row by row, at any place.

    Args:
      path: with one of `SUFFIXES`.
      columns: top-level ones that are read; None: all.
      groups: shared by the files of a data set.

    Raises:
      ValueError: a file of another kind.
    """

    def __init__(self, path: pathlib.Path, columns: set[str] | None, groups: Groups):
        if path.suffix not in SUFFIXES:
            raise ValueError(f"{path} cannot be streamed, only {', '.join(SUFFIXES)}: leave stream= out, or convert it")
        self.path, self._columns, self._groups = path, columns, groups

    def rows(self) -> Iterator[tuple[int, int, dict]]:
        """(place, number from 1, row) of all rows in order."""
        return read_places(self.path, self._columns)

    def row(self, place: int) -> dict:
        """The row at a place."""
        if self.path.suffix == ".jsonl":
            return json_line(self.path, self._descriptor, place)
        if self.path.suffix == ".arrow":
            table = self._mapped
        else:
            group = int(np.searchsorted(self._starts, place, side="right")) - 1
            place -= int(self._starts[group])
            read = functools.partial(self._parquet.read_row_group, group, columns=self._names)
            table = self._groups.get((self.path, group), read)
        return table.slice(place, 1).to_pylist()[0]

    @functools.cached_property
    def _names(self) -> list[str]:
        there = open_table(self.path)[0]
        return [name for name in there if self._columns is None or name in self._columns]

    @functools.cached_property
    def _parquet(self):
        import pyarrow.parquet

        return pyarrow.parquet.ParquetFile(self.path)

    @functools.cached_property
    def _starts(self) -> np.ndarray:
        """The first row of each row group."""
        of_file = self._parquet.metadata
        sizes = [of_file.row_group(group).num_rows for group in range(of_file.num_row_groups)]
        return np.cumsum([0, *sizes])[:-1]

    @functools.cached_property
    def _mapped(self):
        import pyarrow

        mapped = pyarrow.memory_map(str(self.path))
        opened = pyarrow.ipc.open_file(mapped) if mapped.read(6) == b"ARROW1" else None
        mapped.seek(0)
        return (opened or pyarrow.ipc.open_stream(mapped)).read_all().select(self._names)

    @functools.cached_property
    def _descriptor(self) -> int:
        return os.open(self.path, os.O_RDONLY)

    def __del__(self):
        if "_descriptor" in self.__dict__:
            os.close(self._descriptor)
