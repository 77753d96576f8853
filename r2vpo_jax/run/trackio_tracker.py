"""A run in the local database of Trackio (TRACKIO_DIR), which `trackio show` draws. The step is the iteration."""

import os
from collections.abc import Sequence

from r2vpo_jax.errors import UsageError
from r2vpo_jax.run.tracker import SAMPLES, History, Identity, Row, columns, scalars, split_of

_ELSEWHERE = ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL")


def check() -> None:
    """Whether a run can be opened: before anything is read.

    Raises:
      UsageError: the package is missing, or is told to write elsewhere, where what is there cannot be looked up.
    """
    try:
        import trackio  # noqa: F401
    except ImportError as error:
        raise UsageError(
            f"trainer.trackers=trackio needs the package trackio: pip install 'r2vpo_jax[trackers]' ({error})"
        ) from error
    for name in _ELSEWHERE:
        if os.environ.get(name):
            raise UsageError(
                f"trainer.trackers=trackio writes to the database of this machine, and {name} is set; unset it, and use "
                "`trackio sync` for what is to be elsewhere"
            )


def free_name(project: str, name: str, run_id: str) -> str:
    """A name that no run of the project has yet: by its name a run is found again."""
    from trackio.sqlite_storage import SQLiteStorage

    return f"{name}-{run_id}" if name in SQLiteStorage.get_runs(project) else name


class TrackioRun:
    """A tracker (`tracker.Tracker`)."""

    def __init__(self, identity: Identity, config: dict, history: History):
        """Begin the run, or go on with it.

        Args:
          identity: of the run.
          config: nested plain values.
          history: what it must have.
        """
        import trackio

        self._table, self._finish = trackio.Table, trackio.finish
        self._run = trackio.init(
            project=identity.project,
            name=identity.name,
            group=identity.group,
            config=config,
            resume="allow",
            embed=False,
        )
        self._there, self._given = self._places(), set()
        for row, samples in history:
            self.write(row, samples)

    def _places(self) -> set[tuple[int, str | None]]:
        """(iteration, split) of all rows that are there."""
        from trackio.sqlite_storage import SQLiteStorage

        logs = SQLiteStorage.get_logs(self._run.project, self._run.name, run_id=self._run.id)
        return {
            (log["step"], next((name.rpartition("/")[0] or None for name in log if name.endswith("iteration")), None))
            for log in logs
        }

    def write(self, row: Row, samples: Sequence[Row] = ()) -> None:
        place = (row["iteration"], split_of(row))
        self._given.add(place)
        if place in self._there:
            return
        values = scalars(row)
        if samples:
            names, data = columns(samples)
            values[SAMPLES] = self._table(columns=names, data=data)
        self._run.log(values, step=row["iteration"])

    def close(self, *, failed: bool = False) -> None:
        """Raises RuntimeError where rows did not arrive: Trackio itself only warns."""
        self._finish()
        if lost := self._given - self._places():
            raise RuntimeError(f"{len(lost)} of {len(self._given)} rows are not in its database")
