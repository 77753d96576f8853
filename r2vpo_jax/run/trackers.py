"""The trackers of a run: TensorBoard, Weights & Biases, Trackio. They have what metrics.jsonl and samples.jsonl have.

Only metrics.jsonl counts. A tracker that cannot be had is refused before a run begins; one that fails later is said once,
counted, and tried again with the next row, while the run goes on.
"""

import contextlib
import dataclasses
import json
import os
import secrets
from collections.abc import Callable, Iterable, Iterator, Sequence

from r2vpo_jax import config as config_lib
from r2vpo_jax import storage
from r2vpo_jax.config import Config
from r2vpo_jax.errors import UsageError
from r2vpo_jax.run import files, trackio_tracker, wandb_tracker
from r2vpo_jax.run.tensorboard import TensorBoard
from r2vpo_jax.run.tracker import History, Identity, Row, Tracker

PROJECT = "r2vpo_jax"
_FILE = "trackers.json"
_CHECKS = {"wandb": wandb_tracker.check, "trackio": trackio_tracker.check}


def check(names: Iterable[str]) -> None:
    """Whether the trackers can be had on this machine.

    Raises:
      UsageError: a package is missing, or nobody is logged in.
    """
    for name in names:
        _CHECKS.get(name, lambda: None)()


class Trackers:
    """All trackers of a run. What one of them cannot do does not end the run."""

    def __init__(self, config: Config, workdir, *, resumed: bool, say: Callable[[str], None]):
        """None is open yet.

        Args:
          config: the run's.
          workdir: the run directory.
          resumed: whether the run goes on: then it is not ended by a tracker that cannot be opened either.
          say: where lines for people go.
        """
        self._config, self._workdir, self._resumed, self._say = config, workdir, resumed, say
        self._open: dict[str, Tracker] = {}
        self._iteration, self._event = 0, None
        self._lost = dict.fromkeys(config.trainer.trackers, 0)

    def open(self, history: Sequence[tuple[Row, Sequence[Row]]], event: Callable[..., None]) -> None:
        """Begin, or go on.

        Args:
          history: the rows that the run goes on from, each with its samples.
          event: (name, iteration, **details) to events.jsonl.

        Raises:
          UsageError: a run that begins cannot have one of its trackers.
        """
        self._event = event
        if history:
            self._iteration = history[-1][0]["iteration"]
        for name in self._config.trainer.trackers:
            with self._going_on(name, "cannot be opened", ends=not self._resumed):
                self._open[name] = self._opened(name, history)

    def _opened(self, name: str, history: History) -> Tracker:
        if name == "tensorboard":
            return TensorBoard(self._workdir / "tensorboard", history)
        identity, values = self._identity(name), config_lib.to_dict(self._config)
        if name == "trackio":
            return trackio_tracker.TrackioRun(identity, values, history)
        elsewhere = storage.is_store(self._workdir) or os.environ.get("WANDB_DIR")
        return wandb_tracker.WandbRun(identity, None if elsewhere else self._workdir, values, history)

    def _identity(self, name: str) -> Identity:
        """What the run is called there, as the run directory says; a new one for another project."""
        file = self._workdir / _FILE
        kept = json.loads(file.read_text()) if file.exists() else {}
        project = (
            self._config.trainer.tracker_project or (name == "wandb" and os.environ.get("WANDB_PROJECT")) or PROJECT
        )
        if kept.get(name, {}).get("project") != project:
            kept[name] = dataclasses.asdict(self._new_identity(name, project))
            files.write_atomically(file, json.dumps(kept, indent=2) + "\n")
        return Identity(**kept[name])

    def _new_identity(self, name: str, project: str) -> Identity:
        folder, run_id = storage.absolute(self._workdir), secrets.token_hex(4)
        sweep = folder.parent.parent
        group = sweep.name if folder.parent.name == "runs" and (sweep / "sweep.json").exists() else None
        called = trackio_tracker.free_name(project, folder.name, run_id) if name == "trackio" else folder.name
        return Identity(project, called, run_id, group)

    def write(self, row: Row, samples: Sequence[Row] = ()) -> None:
        """A row of metrics.jsonl, with the samples of its iteration."""
        self._iteration = row["iteration"]
        for name, tracker in self._open.items():
            with self._going_on(name, "did not take a row"):
                tracker.write(row, samples)

    def close(self, *, failed: bool = False) -> None:
        """Everything is where it should be, or it is said what is not; `failed`: whether the run ended by an error."""
        for name, tracker in self._open.items():
            with self._going_on(name, "cannot be closed"):
                tracker.close(failed=failed)
        for name, count in self._lost.items():
            if count:
                self._say(f"TRACKER {name} failed {count}x: it does not have all rows; metrics.jsonl has")

    @contextlib.contextmanager
    def _going_on(self, name: str, what: str, *, ends=False) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            reason = f"{what} ({type(error).__name__}: {error})"
            if ends:
                self.close(failed=True)
                raise UsageError(f"trainer.trackers={name} {reason}; leave it out, or put it right") from error
            self._lost[name] += 1
            if self._lost[name] == 1:
                self._say(f"TRACKER {name} {reason}: the run goes on without it, and metrics.jsonl has everything")
                self._event("tracker_failed", self._iteration, tracker=name, message=reason)
