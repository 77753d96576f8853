"""Sweeps: a grid of settings, each with the same seeds, and a table of what they did.

Paired seeds: runs with the same seed see the same problems, start from the same weights and sample with the same keys. A
failed run is a result. A sweep that was stopped goes on where it was: finished runs are kept.

There are two ways to make the runs, which leave the same files for each: many at once in one program (`fused`), or each
by the ordinary trainer (`processes`), one after another or several at a time.
"""

import dataclasses
import pathlib
import time
from collections.abc import Callable

from r2vpo_jax import hub
from r2vpo_jax.config import SweepConfig
from r2vpo_jax.config.flags import leaves
from r2vpo_jax.errors import UsageError
from r2vpo_jax.run import console, directory
from r2vpo_jax.sweeps import fused, results, runs, workers
from r2vpo_jax.sweeps.runs import Plan

MODES = ("auto", "fused", "processes")


def run_sweep(
    base: dict,
    sweep: SweepConfig,
    workdir,
    *,
    mode: str = "auto",
    processes: int | None = None,
    runs_at_once: int | None = None,
    all_cores: bool = False,
    retry_failed: bool = False,
    say: Callable[[str], None] = console.say,
) -> str:
    """Make the runs that have not ended yet, then write results and pictures.

    Args:
      base: plain nested values of a Config (`config.make(...).to_dict()`), shared by all runs.
      sweep: the grid and the seeds.
      workdir: holds sweep.json, runs/NAME/ and, at the end, results.parquet (a row for each run and evaluation),
        curves.parquet (for each run and iteration), results.json (for each run), table.md, sweep.png and curves.png.
      mode: fused, processes, or auto: fused where every run can be, unless `processes` is given.
      processes: runs at a time of the mode processes, each in a process of its own; 1 (the default): in this one.
      runs_at_once: runs in one program of the mode fused; by default as many as the device's memory holds.
      all_cores: mode fused on processors: make a device of each core (`fused.run`).
      retry_failed: try the runs again that have failed; those that collapsed are results and stay.
      say: where progress lines go.

    Returns:
      The table.

    Raises:
      Stopped: it was stopped before its end (Ctrl-C); the same call goes on there.
      UsageError: the directory holds another sweep or is in use, a run's configuration is invalid, or the mode does not
        fit.
    """
    workdir = directory.folder(workdir, store=False)
    plan = runs.plan(base, sweep)
    mode = _mode(plan, mode, processes, runs_at_once, say)

    def folder(name: str) -> pathlib.Path:
        return workdir / "runs" / name

    _claim(workdir, base, sweep, plan, mode, write=False)
    with directory.lock(workdir, say=say), directory.resolving(workdir):
        _claim(workdir, base, sweep, plan, mode)
        _resolve_names(plan)
        directory.record_names(workdir, say)
        if retry_failed:
            _forget_failures(plan, folder, say)
        return _make_and_write(plan, sweep, folder, workdir, mode, processes, runs_at_once, all_cores, say)


def _resolve_names(plan: Plan) -> None:
    """What has a name on the Hub is the same for all runs, whenever and in whichever process they begin."""
    texts = {str(value) for cell in plan.cells for _, value in leaves(dataclasses.asdict(cell.config))}
    for name in (name for text in sorted(texts) for name in hub.names_in(text)):
        hub.resolved().commit(name)


def _forget_failures(plan: Plan, folder: Callable[[str], pathlib.Path], say) -> None:
    """Runs that have failed have not ended."""
    failed = [run.name for run in plan.runs if results.status(folder(run.name)) == "failed"]
    if failed:
        say(f"trying {len(failed)} failed run{'s' * (len(failed) > 1)} again:")
    else:
        say("no run has failed: nothing to try again")
    for name in failed:
        say(f"  {name}: {workers.forget_failure(folder(name))}")


def _make_and_write(plan, sweep, folder, workdir, mode, processes, runs_at_once, all_cores, say) -> str:
    """The runs that have not ended, and then all files of results."""
    started, total = time.perf_counter(), len(plan.runs)
    todo = [run for run in plan.runs if results.status(folder(run.name)) is None]
    cells, seeds = len(plan.cells), len(sweep.seeds)
    before = f", {total - len(todo)} of them ended before" if len(todo) < total else ""
    say(f"{total} runs: {cells} cells × {seeds} seeds{before}; mode {mode}")
    if mode == "fused" and todo:
        # All of them, so that those left are in the same batches as before.
        configs = {run.name: run.config for run in plan.runs}
        seconds = fused.run(configs, folder, workdir / "fused", say=say, runs_at_once=runs_at_once, all_cores=all_cores)
        say("seconds: " + ", ".join(f"{phase} {spent:.0f}" for phase, spent in seconds.items()))
    elif todo:
        jobs = [workers.Job(run.name, run.config, folder(run.name)) for run in todo]
        if processes is None or processes == 1:
            workers.train_here(jobs, say)
        else:
            workers.train_in_processes(jobs, processes, say)
    found = results.write(plan, folder, workdir)
    lost = sum(row["status"] != "finished" for row in found)
    say(
        f"{len(todo)} runs in {time.perf_counter() - started:.0f} s, compilation included"
        + (f"; {lost} of {total} did not finish" if lost else "")
        + ("; --retry_failed tries those that failed again" if any(row["status"] == "failed" for row in found) else "")
    )
    return results.table(plan, found)


def _mode(plan: Plan, mode: str, processes: int | None, runs_at_once: int | None, say) -> str:
    """fused or processes.

    Raises:
      UsageError: an unknown mode, a flag of the other mode, or runs that cannot be fused.
    """
    if mode not in MODES:
        raise UsageError(f"--mode={mode} is unknown; one of {', '.join(MODES)}")
    for flag, value in (("processes", processes), ("runs_at_once", runs_at_once)):
        if value is not None and value < 1:
            raise UsageError(f"--{flag} must be at least 1, got {value}")
    if mode == "fused" and processes is not None:
        raise UsageError("--processes is for --mode=processes; of --mode=fused, --runs_at_once is what is alike")
    if mode == "auto" and processes is not None:
        mode = "processes"
    if mode != "processes":
        refusal = _refusal(plan)
        if refusal and mode == "fused":
            raise UsageError(f"--mode=fused: {refusal}")
        if refusal:
            say(f"the runs are made one by one, not fused: {refusal}")
        mode = "processes" if refusal else "fused"
    if mode == "processes" and (processes or 1) > 1:
        served = [run.name for run in plan.runs if run.config.sampler.engine != "own"]
        if served:
            raise UsageError(
                f"--processes={processes}: {served[0]} is sampled by a server, which has the weights of one run at a time; leave "
                "--processes out"
            )
    if mode == "processes" and runs_at_once is not None:
        raise UsageError("--runs_at_once is for --mode=fused; of --mode=processes, --processes is what is alike")
    return mode


def _refusal(plan: Plan) -> str | None:
    refusals = ((run.name, fused.refusal(run.config)) for run in plan.runs)
    return next((f"{name}: {reason}" for name, reason in refusals if reason), None)


def _claim(workdir: pathlib.Path, base: dict, sweep: SweepConfig, plan: Plan, mode: str, *, write=True) -> None:
    cells = {cell.name: dict(given) for cell, given in zip(plan.cells, sweep.cells, strict=True)}
    identity = {"base": base, "sweep": dataclasses.asdict(sweep) | {"cells": cells}, "mode": mode}
    directory.claim_file(workdir, "sweep.json", identity, write=write)
