"""Line files where nothing can be appended to: `metrics.jsonl` is there a folder `metrics` of numbered parts.

A part is written whole. The last one is written again as rows come, at most every 30 seconds, until a position is asked
for (at a checkpoint): then it is finished, and the next one begins. A position counts the bytes of all parts, so it means the
same as that of a file. A run that was copied there from a disk keeps its metrics.jsonl, which stands before the parts.
"""

import re
import time

from r2vpo_jax import storage

_EVERY_SECONDS = 30.0  # at most so much of what was written is lost when the process is killed
_PART = re.compile(r"(\d{5,})\.jsonl")


def files_of(path) -> list:
    """The file of this name, if there is one, and its parts, in their order: together they are the line file."""
    return list(sizes_of(path))


def sizes_of(path) -> dict:
    """File -> bytes of the file of this name, if there is one, and of its parts, in their order."""
    folder = path.with_suffix("")
    found = storage.sizes(folder)
    numbered = sorted((int(match[1]), name) for name in found if (match := _PART.fullmatch(name)))
    whole = {path: storage.size(path)} if path.exists() else {}
    return whole | {folder / name: found[name] for _, name in numbered}


class PartsWriter:
    """Writes lines to the parts of a line file; can be cut back to a known position on resume."""

    def __init__(self, path, position: int | None = None):
        """Begin a new part.

        Args:
          path: of the line file, in a store.
          position: bytes to keep; what was written after the checkpoint that is resumed is dropped. None: all.

        Raises:
          ValueError: there are fewer bytes: they do not belong to the checkpoint.
        """
        self._folder = path.with_suffix("")
        found = sizes_of(path)
        there, sizes = list(found), list(found.values())
        if position is not None and sum(sizes) < position:
            raise ValueError(
                f"{path} and its parts have {sum(sizes)} bytes, but the checkpoint was written at {position}: restore them, "
                "or start again in a new --workdir"
            )
        # From the end: if this is killed, what is left is still a beginning of what there was.
        while position is not None and sum(sizes) > position:
            file, beyond = there.pop(), sum(sizes) - position
            if beyond < sizes[-1]:
                storage.put(file, file.read_bytes()[:-beyond])
                there.append(file)
                sizes[-1] -= beyond
            else:
                file.unlink()
                sizes.pop()
        parts = [file for file in there if file != path]
        self._next = int(parts[-1].stem) + 1 if parts else 0
        self._finished, self._lines, self._unwritten, self._last = sum(sizes), [], False, -_EVERY_SECONDS

    def write(self, line: str) -> None:
        """Add a line, with its end."""
        self._lines.append(line.encode())
        self._unwritten = True
        if time.monotonic() - self._last >= _EVERY_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Everything is in the store."""
        if self._unwritten:
            storage.put(self._folder / f"{self._next:05d}.jsonl", b"".join(self._lines))
            self._unwritten, self._last = False, time.monotonic()

    def position(self) -> int:
        """Bytes written so far, in the store; the next line begins a new part."""
        self.flush()
        if self._lines:
            self._finished += sum(len(line) for line in self._lines)
            self._lines, self._next = [], self._next + 1
        return self._finished
