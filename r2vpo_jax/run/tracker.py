"""What a tracker is: somewhere else than in its run directory where a run is looked at."""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

Row = Mapping[str, Any]  # of metrics.jsonl, or of samples.jsonl
History = Iterable[tuple[Row, Sequence[Row]]]  # rows of metrics.jsonl, each with the samples of its iteration
SAMPLES = "samples"  # the name of the table


class Tracker(Protocol):
    """One that is open. It was given the history of the run first, and has every row of it once."""

    def write(self, row: Row, samples: Sequence[Row] = ()) -> None:
        """The next row of metrics.jsonl; samples: of its iteration, as a table."""

    def close(self, *, failed: bool = False) -> None:
        """Everything is where it should be; whether the run ended by an error."""


@dataclasses.dataclass(frozen=True)
class Identity:
    """What a run is called elsewhere. It is kept in the run directory, so that a run which goes on is the same there."""

    project: str
    name: str
    id: str
    group: str | None = None  # the sweep that the run is of


def split_of(row: Row) -> str | None:
    """Of an evaluation the split that was scored."""
    return row["split"] if row["kind"] == "evaluation" else None


def scalars(row: Row) -> dict[str, float]:
    """The numbers of a row that are finite, under the names of metrics.jsonl; of an evaluation as split/name."""
    split = split_of(row)
    prefix = f"{split}/" if split else ""
    # A NaN (nothing was cut, say) would be drawn as nothing, and complained of each time.
    return {
        prefix + name: value
        for name, value in row.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    }


def columns(samples: Sequence[Row]) -> tuple[list[str], list[list]]:
    """(names, rows of values) of a table, without what has a value for each token: the run's own pages show that."""
    plain = (name for sample in samples for name, value in sample.items() if not isinstance(value, (list, tuple)))
    names = list(dict.fromkeys(plain))
    return names, [[sample.get(name) for name in names] for sample in samples]
