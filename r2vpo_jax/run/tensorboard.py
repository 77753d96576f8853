"""The TensorBoard of a run: what metrics.jsonl says, as scalars, by tensorboardX, which needs no TensorFlow."""

import html
import pathlib
import struct
from collections.abc import Iterator, Sequence

from r2vpo_jax.run.tracker import SAMPLES, History, Row, columns, scalars

_EVENT_FILES = "events.out.tfevents.*"
_LENGTH = struct.Struct("<Q")
_CHECKSUM_BYTES = 4  # behind the length of a record, and behind the record


class TensorBoard:
    """Writes the rows of metrics.jsonl to event files: those of evaluations as split/name, all at their iteration.

    A tracker (`tracker.Tracker`).
    """

    def __init__(self, directory, history: History = ()):
        """Begin anew with the rows that there are: what an earlier process wrote beyond them must not be seen.

        Args:
          directory: for the event files; those there are replaced, their points keep their times.
          history: of a run that goes on.
        """
        from tensorboardX import FileWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        earlier = sorted(pathlib.Path(directory).glob(_EVENT_FILES))
        times = {
            event.step: event.wall_time for file in earlier for event in _events(file) if event.HasField("summary")
        }
        for file in earlier:
            file.unlink()
        self._writer = FileWriter(str(directory))
        if earlier:  # a TensorBoard that has read them forgets what it has read
            self._writer.add_event(Event(session_log=SessionLog(status=SessionLog.START)), step=0)
        for row, samples in history:
            self.write(row, samples, times.get(row["iteration"]))

    def write(self, row: Row, samples: Sequence[Row] = (), time: float | None = None) -> None:
        """The numbers of a row, and a table; `time` in seconds of the epoch, default: now."""
        from tensorboardX.proto.summary_pb2 import Summary
        from tensorboardX.summary import text

        values = [Summary.Value(tag=name, simple_value=value) for name, value in scalars(row).items()]
        if samples:
            values.extend(text(SAMPLES, _markdown(samples)).value)
        self._writer.add_summary(Summary(value=values), row["iteration"], time)

    def close(self, *, failed: bool = False) -> None:
        """Everything is on disk."""
        self._writer.close()


def _markdown(samples: Sequence[Row]) -> str:
    """A table; texts stand as they are, whatever they hold."""
    names, data = columns(samples)
    cells = [[html.escape(str(value)).replace("|", "&#124;").replace("\n", "<br>") for value in row] for row in data]
    return "\n".join("|" + "|".join(row) + "|" for row in [names, ["---"] * len(names), *cells])


def _events(file: pathlib.Path) -> Iterator:
    """The events of a file, up to where a killed process left off."""
    from google.protobuf.message import DecodeError
    from tensorboardX.proto.event_pb2 import Event

    data, start = file.read_bytes(), 0
    while start + _LENGTH.size <= len(data):
        (size,) = _LENGTH.unpack_from(data, start)
        start += _LENGTH.size + _CHECKSUM_BYTES
        if start + size > len(data):
            return
        try:
            yield Event.FromString(data[start : start + size])
        except DecodeError:
            return  # damaged: only times are read here
        start += size + _CHECKSUM_BYTES
