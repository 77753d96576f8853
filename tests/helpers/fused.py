"""Fused runs as tests make them: a program is compiled once for each structure and size, and what was drawn is kept."""

import collections
import json
import pathlib
import signal

import jax
import numpy as np
import pytest
from flax import struct

from r2vpo_jax.config import structure
from r2vpo_jax.run import console, files
from r2vpo_jax.sweeps import batch, fused, group
from r2vpo_jax.sweeps.program import Measured, Program
from r2vpo_jax.training import trainer

# What is compared between programs must not hang on rounding. With a minibatch of groups without advantages, on fresh
# data, the first gradient is nothing else, and Adam would make full steps of it if its epsilon were not above it.
# Evaluation takes several calls of the sampler.
STEADY = {"optimizer": {"epsilon": 1e-5}, "evaluation": {"batch_size": 32}}
_COMPILED = ("abstract_runs", "start", "advance", "_respond")  # of a Group
_compiled: dict = {}  # (structure, size) -> those of the first Group that had it


class Run:
    """What a run has left: its rows without times, its summary, and what each iteration drew.

    `drawn` has for each iteration (tokens int32 [B, T], length int32 [B], log-probabilities f32 [B, T]).
    """

    def __init__(self, folder: pathlib.Path, drawn):
        self.folder, self.drawn = folder, drawn
        self.rows = [
            {name: value for name, value in row.items() if not name.startswith(files.TIME_PREFIXES)}
            for row in files.read_jsonl(folder / "metrics.jsonl")
        ]
        self.trained = [row for row in self.rows if row["kind"] == "train"]
        self.validated = [row for row in self.rows if row.get("split") == "validation"]
        self.summary = _read(folder / "report" / "summary.json")
        self.failure = _read(folder / "failed.json")


def _read(path):
    return json.loads(path.read_text()) if path.exists() else None


def ordinary(config, workdir) -> Run:
    """The run by the ordinary trainer."""
    drawn = []
    trainer.train(
        config, workdir, say=lambda _: None, on_iteration=lambda made: drawn.append(_drawn(made.collected.rollout))
    )
    return Run(workdir, drawn)


def side_by_side(configs, workdir, *, runs_at_once=None, stop_after=None, lockstep=False) -> dict[str, Run]:
    """These runs by the fused mode; those that have ended.

    Args:
      configs: name -> configuration.
      workdir: where runs/NAME and scratch are.
      runs_at_once: as for `fused.run`.
      lockstep: as on an accelerator.
      stop_after: chunks; then a signal is sent, as Ctrl-C sends it, and `fused.run` raises Stopped.
    """
    drawn, chunks = collections.defaultdict(list), 0
    write, show = batch.Batch._write_iteration, console.ProgressBar.update

    def writing(self, i, measured, iteration):
        if self._progress[i].error is None:
            drawn[self._names[i]].append(measured.drawn)
        write(self, i, measured, iteration)

    def showing(*args):
        nonlocal chunks
        chunks += 1
        if chunks == stop_after:
            signal.raise_signal(signal.SIGTERM)
        show(*args)

    def folder(name):
        return workdir / "runs" / name

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused, "Group", SharedGroup)
        patch.setattr(group, "Program", _Observed)
        patch.setattr(group, "_in_lockstep", lambda: lockstep)
        patch.setattr(batch.Batch, "_write_iteration", writing)
        patch.setattr(console.ProgressBar, "update", showing)
        fused.run(configs, folder, workdir / "fused", say=lambda _: None, runs_at_once=runs_at_once)
    return {name: Run(folder(name), drawn[name]) for name in configs}


class SharedGroup(group.Group):
    """A Group that takes the programs of another one of the same family and size, if there was one."""

    def _compile_for(self, size):
        key = structure(self.config), size, self._program.axis_name
        if key not in _compiled:
            super()._compile_for(size)
            _compiled[key] = {name: getattr(self, name) for name in _COMPILED}
        vars(self).update(_compiled[key])


def forget() -> None:
    """Drop all compiled programs of this process: those of runs side by side are large."""
    _compiled.clear()
    jax.clear_caches()


@struct.dataclass
class _Seen(Measured):
    drawn: tuple


class _Observed(Program):
    """A Program whose measurements hold what was drawn."""

    def __init__(self, *args, **settings):
        super().__init__(*args, observe=lambda made: _drawn(made.collected), **settings)

    def advance(self, *args):
        runs, measured, drawn = super().advance(*args)
        return runs, _Seen(**vars(measured), drawn=drawn), {}


def _drawn(rollout):
    return rollout.response_tokens, rollout.response_length, rollout.behavior_logp


def parted(ours: Run, theirs: Run) -> str | None:
    """Where two runs first drew another token, and how probable each was; None if they drew the same."""
    for iteration, (mine, other) in enumerate(zip(ours.drawn, theirs.drawn, strict=True), 1):
        differs = np.asarray(mine[0]) != np.asarray(other[0])
        if differs.any():
            row, position = np.argwhere(differs)[0]
            drew = " against ".join(
                f"token {tokens[row, position]} of log-probability {logp[row, position]:.7f}"
                for tokens, _, logp in (mine, other)
            )
            return f"iteration {iteration}, response {row}, position {position}: {drew}"
    return None


def assert_same(ours: Run, theirs: Run):
    """The same draws, and curves that agree to 1e-5; a V that is large, of a few tokens that are rare, to 1e-4 of it."""
    flip = parted(ours, theirs)
    assert flip is None, flip
    for name in (
        "reward/mean",
        "ratio/variance",
        "ratio/variance_first",
        "ratio/variance_mean",
        "ratio/variance_after",
    ):
        curve, other = ([row.get(name, 0.0) for row in run.trained] for run in (ours, theirs))
        np.testing.assert_allclose(curve, other, rtol=1e-4, atol=1e-5, err_msg=name)
    scores, others = ([(row["iteration"], row["pass_at_1"]) for row in run.validated] for run in (ours, theirs))
    assert scores == others
