"""The history of a run from its files, which may be growing."""

import contextlib
import json

from r2vpo_jax import storage
from r2vpo_jax.run import files, parts
from r2vpo_jax.run.pages.history import History

_FILES = ("metrics", "samples", "events")


class Reader:
    """The history of a run in its directory, which may be going on: `read` looks again."""

    def __init__(self, workdir):
        """Nothing is read yet; `workdir` is a path of `storage.path`."""
        self._workdir, self.history = workdir, History()
        self._lines = {name: _Lines(workdir / f"{name}.jsonl") for name in _FILES}

    def read(self) -> History:
        """With all complete lines that there are now.

        Raises:
          OSError: a file cannot be read.
          ValueError: a line is not JSON.
        """
        found = {name: lines.read() for name, lines in self._lines.items()}
        if any(again for again, _ in found.values()):  # cut back: the run went on from an earlier checkpoint
            self.history = History()
            for lines in self._lines.values():
                lines.forget()
            found = {name: lines.read() for name, lines in self._lines.items()}
        for name, (_, rows) in found.items():
            for row in rows:
                self.history.add(name, row)
        return self.history

    def wrote(self) -> float | None:
        """When a line was last written, seconds of the epoch; None: not known (in a store), or never."""
        if storage.is_store(self._workdir):
            return None
        pieces = [piece for name in _FILES for piece in parts.files_of(self._workdir / f"{name}.jsonl")]
        return max((piece.stat().st_mtime for piece in pieces), default=None)


class _Lines:
    """A line file, of which each call gives what is new."""

    def __init__(self, path):
        self._path = path
        self.forget()

    def forget(self) -> None:
        """Begin again."""
        self._position, self._last, self._sizes = 0, b"", {}

    def read(self) -> tuple[bool, list[dict]]:
        """(whether what was read before is no longer true, the new rows)."""
        if not storage.is_store(self._path) and self._path.is_file():
            with contextlib.suppress(FileNotFoundError):
                return self._grown()
        return self._whole()

    def _grown(self) -> tuple[bool, list[dict]]:
        with open(self._path, "rb") as file:
            start = self._position - len(self._last)
            file.seek(start)
            if file.read(len(self._last)) != self._last:
                return True, []
            content = file.read()
        end = content.rfind(b"\n") + 1
        lines = content[:end].splitlines(keepends=True)
        if lines:
            self._position, self._last = self._position + end, lines[-1]
        return False, [json.loads(line) for line in lines]

    def _whole(self) -> tuple[bool, list[dict]]:
        """Of a file in parts, which has few of them: read again when one has changed."""
        pieces = parts.sizes_of(self._path)
        if pieces == self._sizes:
            return False, []
        if self._sizes:
            return True, []
        self._sizes = pieces
        return False, files.read_jsonl(self._path)
