"""A run at Weights & Biases: online, or (WANDB_MODE=offline) in files that `wandb sync` uploads later.

Its step is the line number of a row in metrics.jsonl, so that a run that goes on knows which rows are there. They stay: rows
that a killed process had written beyond its checkpoint are the same ones again. The charts' axis is the iteration.
"""

import pathlib
import struct
from collections.abc import Iterator, Sequence

from r2vpo_jax.errors import UsageError
from r2vpo_jax.run.tracker import SAMPLES, History, Identity, Row, columns, scalars

_OFFLINE = ("offline", "dryrun")
_FINISH_SECONDS = 300.0  # for what is not uploaded at the end; it stays on disk
# The files are LevelDB's logs: after 7 bytes, blocks of records with checksum, length, and whole, first, middle or last.
_FILE_HEADER, _BLOCK, _RECORD = 7, 32768, struct.Struct("<IHB")
_ENDS = (1, 4)


def check() -> None:
    """Whether a run can be opened: before anything is read.

    Raises:
      UsageError: the package is missing, or nobody is logged in, or the server does not answer.
    """
    try:
        import wandb
    except ImportError as error:
        raise UsageError(
            f"trainer.trackers=wandb needs the package wandb: pip install 'r2vpo_jax[trackers]' ({error})"
        ) from error
    if wandb.setup().settings.mode != "online":
        return
    otherwise = "set WANDB_MODE=offline to keep the run on this machine"
    try:
        logged_in = wandb.login(prompt=False)
    except wandb.errors.Error as error:
        raise UsageError(f"trainer.trackers=wandb: {error}; {otherwise}") from error
    if not logged_in:
        raise UsageError(
            f"trainer.trackers=wandb: nobody is logged in; run `wandb login` or set WANDB_API_KEY, or {otherwise}"
        )


class WandbRun:
    """A tracker (`tracker.Tracker`)."""

    def __init__(self, identity: Identity, directory: pathlib.Path | None, config: dict, history: History):
        """Begin the run, or go on with it.

        Args:
          identity: of the run.
          directory: where its files go, into a folder wandb/; None: where W&B puts them (WANDB_DIR, or the working directory).
          config: nested plain values.
          history: what it must have.
        """
        import wandb

        self._table = wandb.Table
        offline = wandb.setup().settings.mode in _OFFLINE
        self._run = wandb.init(
            project=identity.project,
            name=identity.name,
            id=identity.id,
            group=identity.group,
            dir=directory,
            config=config,
            allow_val_change=True,
            resume=None if offline else "allow",
            settings=wandb.Settings(
                reinit="create_new", finish_timeout=_FINISH_SECONDS, finish_timeout_raises=True
            ),
        )  # fmt: skip
        self._run.define_metric("iteration", hidden=True)
        self._run.define_metric("*", step_metric="iteration")
        folder = pathlib.Path(self._run.settings.wandb_dir)
        self._there = _steps_in(folder, identity.id) if offline else self._run.step
        self._number = 0
        for row, samples in history:
            self.write(row, samples)

    def write(self, row: Row, samples: Sequence[Row] = ()) -> None:
        number, self._number = self._number, self._number + 1
        if number < self._there:
            return
        values = scalars(row) | {"iteration": row["iteration"]}
        if samples:
            names, data = columns(samples)
            values[SAMPLES] = self._table(columns=names, data=data)
        self._run.log(values, step=number, commit=True)

    def close(self, *, failed: bool = False) -> None:
        self._run.finish(exit_code=int(failed))


def _steps_in(folder: pathlib.Path, run_id: str) -> int:
    """Steps of a run in the files that its processes have left on this machine."""
    found = (record.history.step.num for file in folder.glob(f"*run-*-{run_id}/*.wandb") for record in records(file))
    return max(found, default=-1) + 1


def records(file: pathlib.Path) -> Iterator:
    """The history records of a file of W&B, up to where a killed process left off."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, start, whole = file.read_bytes(), _FILE_HEADER, b""
    while start + _RECORD.size <= len(data):
        if (left := _BLOCK - start % _BLOCK) < _RECORD.size:
            start += left  # too little for a record: zeros
            continue
        _, size, kind = _RECORD.unpack_from(data, start)
        start += _RECORD.size
        if kind == 0 or start + size > len(data):
            return
        whole += data[start : start + size]
        start += size
        if kind in _ENDS:
            record, whole = Record.FromString(whole), b""
            if record.HasField("history"):
                yield record
