"""Files that a kill cannot tear, and the line files of a run directory: metrics, samples, events, TensorBoard."""

import contextlib
import hashlib
import json
import math
import os
import pathlib

import numpy as np

from r2vpo_jax.errors import UsageError
from r2vpo_jax.run.tensorboard import TensorBoard

# Fields that measure the machine and not the run; everything else is reproducible bit for bit.
TIME_PREFIXES = ("time/", "throughput/")


def write_atomically(path, content: str | bytes) -> None:
    """Write a file that appears whole or not at all, and is on disk when this returns. Its folder is made if needed."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def sha256_of(source: bytes | os.PathLike) -> str:
    """The sha256 of bytes or of a file, hexadecimal."""
    if isinstance(source, bytes):
        return hashlib.sha256(source).hexdigest()
    with open(source, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
    """Appends one JSON object a line, flushed; can be cut back to a known position on resume."""

    def __init__(self, path, position: int | None = None):
        """Open for appending.

        Args:
          path: the file.
          position: bytes to keep; what was written after the checkpoint that is resumed is dropped. By default
            all complete lines are kept; a torn last one (a killed process) is dropped.

        Raises:
          ValueError: the file is shorter than `position`: it does not belong to the checkpoint.
        """
        path = pathlib.Path(path)
        size = path.stat().st_size if path.exists() else 0
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
        self._file.write(json.dumps({k: _plain(v) for k, v in row.items()}, ensure_ascii=False) + "\n")
        self._file.flush()

    def position(self) -> int:
        """Bytes written so far, on disk."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return self._file.tell()

    def close(self) -> None:
        self._file.close()


def _end_of_last_line(path: pathlib.Path) -> int:
    """Bytes up to and with the last line end."""
    return path.read_bytes().rfind(b"\n") + 1


class NullWriter:
    """Stands in on processes other than 0, which write nothing."""

    def write(self, row: dict) -> None:
        pass

    def position(self) -> int:
        return 0

    def close(self) -> None:
        pass


def read_jsonl(path) -> list[dict]:
    """All complete rows of a file; a torn last line (a killed process) is left out."""
    rows = []
    with open(path, encoding="utf-8") as file:
        for line in file:
            if line.endswith("\n"):
                rows.append(json.loads(line))
    return rows


class RunFiles:
    """The line files of a run directory: metrics, samples, events; and TensorBoard if asked for."""

    _NAMES = ("metrics", "samples")  # what a checkpoint knows the length of

    def __init__(self, workdir, positions: dict, *, write: bool, tensorboard: bool):
        """Open them for appending, cut back to where the checkpoint was written.

        Args:
          workdir: the run directory.
          positions: from `positions()` of the checkpoint; empty for a new run.
          write: False on processes other than 0.
          tensorboard: also write TensorBoard events.

        Raises:
          ValueError: a file is gone or shorter than its position.
          OSError: a file cannot be opened.
        """
        workdir = pathlib.Path(workdir)
        if write:
            files = {n: JsonlWriter(workdir / f"{n}.jsonl", positions.get(n, 0)) for n in self._NAMES}
            self._files = files | {"events": JsonlWriter(workdir / "events.jsonl")}
        else:
            self._files = {n: NullWriter() for n in (*self._NAMES, "events")}
        self._tensorboard = None
        if write and tensorboard:
            self._tensorboard = TensorBoard(workdir / "tensorboard", read_jsonl(workdir / "metrics.jsonl"))

    def metrics(self, row: dict) -> None:
        """One iteration or one evaluation."""
        self._files["metrics"].write(row)
        if self._tensorboard:
            self._tensorboard.write(row)

    def sample(self, row: dict) -> None:
        """One response."""
        self._files["samples"].write(row)

    def event(self, name: str, iteration: int, **details) -> None:
        """Something that is no number: a start, a resume, an alarm."""
        self._files["events"].write({"event": name, "iteration": iteration, **details})

    def positions(self) -> dict[str, int]:
        """Bytes written so far, on disk, for a checkpoint."""
        return {name: self._files[name].position() for name in self._NAMES}

    def close(self) -> None:
        for writer in (*self._files.values(), self._tensorboard):
            if writer is not None:
                writer.close()
