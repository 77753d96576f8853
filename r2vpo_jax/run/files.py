"""Files that a kill cannot tear, and the line files of a run directory: metrics, samples, events."""

import collections
import contextlib
import errno
import hashlib
import io
import json
import math
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TextIO

import numpy as np

from r2vpo_jax import storage
from r2vpo_jax.errors import Stopped, UsageError
from r2vpo_jax.run import parts
from r2vpo_jax.run.pages.history import History

# Fields that measure the machine and not the run; everything else is reproducible bit for bit.
TIME_PREFIXES = ("time/", "throughput/")


def write_atomically(path, content: str | bytes) -> None:
    """Write a file that appears whole or not at all, and is on disk when this returns. Its folder is made if needed."""
    path, content = storage.path(path), content.encode() if isinstance(content, str) else content
    if storage.is_store(path):
        storage.put(path, content)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_arrays(path, arrays: Mapping[str, np.ndarray]) -> None:
    """An .npz of named arrays."""
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    write_atomically(path, buffer.getvalue())


def sha256_of(source: bytes | os.PathLike) -> str:
    """The sha256 of bytes or of a file, hexadecimal."""
    return hashlib.sha256(source).hexdigest() if isinstance(source, bytes) else storage.checksum(storage.path(source))


@contextlib.contextmanager
def disk_errors(path, intact: str | None = None):
    """Inside, a full or vanished disk is one line.

    Args:
      path: what cannot be written.
      intact: what is safe in spite of it, where there is something to go on from.

    Raises:
      UsageError: for any OSError.
    """
    try:
        with storage.spoken(path):
            yield
    except OSError as error:
        advice = f"; {intact} is intact: make room, and the same command goes on from there" if intact else ""
        raise UsageError(f"cannot write to {path} ({error.strerror or error}){advice}") from error


def _plain(value):
    if isinstance(value, (bool, str, int)) or value is None:
        return value
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    number = float(np.asarray(value))
    # JSON has no NaN; a name is readable and cannot pass for a number.
    return number if math.isfinite(number) else repr(number)


class JsonlWriter:
    """Appends one JSON object a line, flushed; can be cut back to a known position on resume. In a store: in parts."""

    def __init__(self, path, position: int | None = None):
        """Open for appending.

        Args:
          path: the file.
          position: bytes to keep; what was written after the checkpoint that is resumed is dropped. By default
            all complete lines are kept; a torn last one (a killed process) is dropped.

        Raises:
          ValueError: the file is shorter than `position`: it does not belong to the checkpoint.
        """
        path = storage.path(path)
        self._parts = parts.PartsWriter(path, position) if storage.is_store(path) else None
        if self._parts:
            return
        _join_parts(path)
        size = storage.size(path)
        if position is None:
            position = _end_of_last_line(path) if size else 0
        if size != position:
            if size < position:
                raise ValueError(
                    f"{path} has {size} bytes, but the checkpoint was written at {position}: restore the file, or "
                    "start again in a new --workdir"
                )
            os.truncate(path, position)
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115

    def write(self, row: dict) -> None:
        line = json.dumps({k: _plain(v) for k, v in row.items()}, ensure_ascii=False) + "\n"
        if self._parts:
            self._parts.write(line)
            return
        self._file.write(line)
        self._file.flush()

    def flush(self) -> None:
        """Others can read what was written."""
        if self._parts:
            self._parts.flush()

    def position(self) -> int:
        """Bytes written so far, on disk."""
        if self._parts:
            return self._parts.position()
        self._file.flush()
        os.fsync(self._file.fileno())
        return self._file.tell()

    def close(self) -> None:
        self.flush()
        if not self._parts:
            self._file.close()


def append_lines(path, text: str) -> None:
    """Append whole lines to a file, which are on disk when this returns. In a store they are a part of their own."""
    path = storage.path(path)
    if storage.is_store(path):
        writer = parts.PartsWriter(path)
        writer.write(text)
        writer.flush()
        return
    with open(path, "a", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _join_parts(path: pathlib.Path) -> None:
    """Of a run that was copied here from a store: one file, as a disk has it."""
    pieces = parts.files_of(path)
    if any(piece != path for piece in pieces):
        write_atomically(path, b"".join(storage.read_all(pieces)))
        for piece in pieces:
            if piece != path:
                piece.unlink()


def _end_of_last_line(path: pathlib.Path) -> int:
    """Bytes up to and with the last line end."""
    return path.read_bytes().rfind(b"\n") + 1


class NullWriter:
    """Stands in on processes other than 0, which write nothing."""

    def write(self, row: dict) -> None:
        pass

    def flush(self) -> None:
        pass

    def position(self) -> int:
        return 0

    def close(self) -> None:
        pass


def read_jsonl(path) -> list[dict]:
    """All complete rows of a line file, in one piece or in parts; a torn last line (a killed process) is left out.

    Raises:
      FileNotFoundError: there is neither.
    """
    path = storage.path(path)
    pieces = parts.files_of(path)
    if not pieces:
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", str(path))
    rows = []
    for file in _opened(pieces):
        for line in file:
            if line.endswith("\n"):
                rows.append(json.loads(line))
    return rows


def _opened(pieces) -> Iterator[TextIO]:
    """The files of a line file, each open for reading."""
    if storage.is_store(pieces[0]):  # all at once: there are as many as checkpoints
        yield from (io.TextIOWrapper(io.BytesIO(content), encoding="utf-8") for content in storage.read_all(pieces))
        return
    for piece in pieces:
        with open(piece, encoding="utf-8") as file:
            yield file


class RunFiles:
    """The line files of a run directory: metrics, samples, events; and the trackers that have the same rows."""

    _NAMES = ("metrics", "samples")  # what a checkpoint knows the length of

    def __init__(self, workdir, positions: dict, *, write: bool, trackers=None):
        """Open them for appending, cut back to where the checkpoint was written.

        Args:
          workdir: the run directory.
          positions: from `positions()` of the checkpoint; empty for a new run.
          write: False on processes other than 0.
          trackers: `trackers.Trackers` that are not open yet, or None.

        Raises:
          ValueError: a file is gone or shorter than its position.
          OSError: a file cannot be opened.
          UsageError: a tracker cannot be had.
        """
        workdir = storage.path(workdir)
        if write:
            files = {n: JsonlWriter(workdir / f"{n}.jsonl", positions.get(n, 0)) for n in self._NAMES}
            self._files = files | {"events": JsonlWriter(workdir / "events.jsonl")}
        else:
            self._files = {n: NullWriter() for n in (*self._NAMES, "events")}
        self._history, self._trackers = History(), trackers
        if trackers:
            trackers.open(_rows_so_far(workdir), self.event)

    def __enter__(self):
        return self

    def __exit__(self, kind, *_) -> None:
        self.close(failed=kind is not None and not issubclass(kind, Stopped))

    def record(self, row: dict, samples: Sequence[dict] = ()) -> None:
        """One iteration with its samples, or one evaluation: in the files, and in the trackers."""
        self.metrics(row)
        for sample in samples:
            self.sample(sample)
        if self._trackers:
            self._trackers.write({name: _plain(value) for name, value in row.items()}, samples)

    def metrics(self, row: dict) -> None:
        """One iteration or one evaluation."""
        self._write("metrics", row)

    def sample(self, row: dict) -> None:
        """One response."""
        self._write("samples", row)

    def event(self, name: str, iteration: int, **details) -> None:
        """Something that is no number: a start, a resume, an alarm."""
        self._write("events", {"event": name, "iteration": iteration, **details})

    def _write(self, file: str, row: dict) -> None:
        self._files[file].write(row)
        self._history.add(file, row)

    def follow(self, history: History) -> None:
        """Every line that is written from now on is also added to what the pages of the run show."""
        self._history = history

    def positions(self) -> dict[str, int]:
        """Bytes written so far, on disk, for a checkpoint."""
        self._files["events"].position()
        return {name: self._files[name].position() for name in self._NAMES}

    def flush(self) -> None:
        """Others can read what was written."""
        for writer in self._files.values():
            writer.flush()

    def close(self, *, failed: bool = False) -> None:
        """Everything is written; `failed`: whether the run ended by an error, which trackers show."""
        if self._trackers:
            self._trackers.close(failed=failed)
        for writer in self._files.values():
            writer.close()


def _rows_so_far(workdir) -> list[tuple[dict, list[dict]]]:
    """The rows of metrics.jsonl, those of iterations with their samples."""
    samples = collections.defaultdict(list)
    for sample in _rows_of(workdir / "samples.jsonl"):
        samples[sample["iteration"]].append(sample)
    return [
        (row, [] if row["kind"] == "evaluation" else samples[row["iteration"]])
        for row in _rows_of(workdir / "metrics.jsonl")
    ]


def _rows_of(path) -> list[dict]:
    """Of a line file, which in a store is not there before its first rows are."""
    return read_jsonl(path) if parts.files_of(storage.path(path)) else []
