"""Runs an hour of both modes of a sweep, where the fused mode's time goes, and what it costs by the number of runs.

    python scripts/benchmark.py sweep
    python scripts/benchmark.py sweep --config=shipped --runs=64 --process_runs=4

Both modes make real runs, evaluation and files included; the table and the pictures of a sweep, which are the same for
both, are left out. Compilation is told apart: that of the fused mode is measured with nothing cached, and can be
subtracted; the processes find every program in the persistent compilation cache, which uncounted runs have filled.
"""

import argparse
import contextlib
import dataclasses
import math
import pathlib
import runpy
import tempfile
import time

import jax
import numpy as np

from experiments.configs import arithmetic
from r2vpo_jax import config as config_lib
from r2vpo_jax.config import grid
from r2vpo_jax.run import report
from r2vpo_jax.sweeps import fused, results, runs, workers
from r2vpo_jax.sweeps.group import Group
from r2vpo_jax.sweeps.sharing import Family

MODES = ("fused", "processes")
ROUNDS = 3  # calls of a program whose median is taken


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    numbers = {"type": _numbers, "metavar": "N,N,…"}
    parser.add_argument(
        "--config",
        default="experiments/configs/sweep_variance.py:smoke",
        help="a sweep's config file, or shipped: the shipped run at several seeds (default: %(default)s)",
    )
    parser.add_argument("--runs", type=int, help="runs, in whole seeds of the grid (default: the grid's, or 16 seeds)")
    parser.add_argument("--iterations", type=int, help="of each run (default: the config's)")
    parser.add_argument("--modes", type=lambda text: tuple(text.split(",")), default=MODES, help="fused,processes")
    parser.add_argument("--processes", type=int, default=2, help="runs at a time of the mode processes (default: 2)")
    parser.add_argument(
        "--process_runs", type=int, help="runs that the mode processes is measured on, the first ones (default: all)"
    )
    parser.add_argument("--runs_at_once", type=int, help="runs in one fused program (default: what memory holds)")
    parser.add_argument(
        "--sizes", **numbers, default=(1, 2, 4, 8), help="runs side by side, for the last table; empty: no table"
    )


def run(arguments: argparse.Namespace) -> None:
    """Measure and print everything.

    Args:
      arguments: those of `add_arguments`.
    """
    if unknown := set(arguments.modes) - set(MODES):
        raise SystemExit(f"--modes: {', '.join(unknown)} is none of {', '.join(MODES)}")
    plan = _plan(arguments)
    trainer = plan.runs[0].config.trainer
    print(
        f"{len(plan.runs)} runs ({len(plan.cells)} cells), {trainer.num_iterations} iterations each, "
        f"validation every {trainer.eval_every}; JAX {jax.__version__}"
    )
    rates = {}
    with tempfile.TemporaryDirectory() as directory:
        workdir = pathlib.Path(directory)
        if "processes" in arguments.modes:  # before this process takes the memory of a GPU
            jax.config.update("jax_compilation_cache_dir", str(workdir / "cache"))  # the workers'
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
            rates["processes"] = _processes(plan.runs, arguments, workdir)
        jax.config.update("jax_enable_compilation_cache", False)
        if "fused" in arguments.modes:
            rates |= _fused(plan.runs, arguments, workdir)
    if set(MODES) <= set(rates):
        print(f"\n{'':32} {'runs/hour':>10}   ratio")
        for name, rate in rates.items():
            print(f"{name:32} {rate:10.0f}   x {rate / rates['processes']:.2f}")
    if arguments.sizes:
        _by_size(plan.runs[0], arguments.sizes)


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(",") if part)


def _plan(arguments) -> runs.Plan:
    if arguments.config == "shipped":
        base = arithmetic.get_config().to_dict()
        sweep = config_lib.SweepConfig(cells=grid.values("objective.name", "r2vpo"), seeds=range(16))
    else:
        file, _, choice = arguments.config.partition(":")
        found = runpy.run_path(file)["get_config"](*([choice] if choice else []))
        base, sweep = found.base.to_dict(), config_lib.SweepConfig(**found.sweep.to_dict())
    if arguments.iterations:
        base["trainer"]["num_iterations"] = arguments.iterations
    if arguments.runs:
        sweep = dataclasses.replace(sweep, seeds=range(math.ceil(arguments.runs / len(sweep.cells))))
    return runs.plan(base, sweep)


def _refuse_failures(some, folder) -> None:
    """A rate of runs that did not finish means nothing."""
    lost = [run.name for run in some if results.status(folder(run.name)) != "finished"]
    if lost:
        raise SystemExit(f"{lost[0]} did not finish: {(folder(lost[0]) / 'failed.json').read_text()}")


def _indented(text: str) -> None:
    print(f"  {text}", flush=True)


def _quiet(text: str) -> None:
    pass


# Both modes -----------------------------------------------------------------------------------------------------


def _processes(all_runs, arguments, workdir: pathlib.Path) -> float:
    """Runs an hour of the mode processes."""
    some = all_runs[: arguments.process_runs]
    print(f"\nprocesses: {len(some)} runs, {arguments.processes} at a time")

    def train(which, where: str) -> float:
        def folder(name):
            return workdir / where / name

        jobs = [workers.Job(run.name, run.config, folder(run.name)) for run in which]
        start = time.perf_counter()
        workers.train_in_processes(jobs, arguments.processes, _quiet)
        seconds = time.perf_counter() - start
        _refuse_failures(which, folder)
        return seconds

    # A cell's numbers are constants of the ordinary trainer's programs; seeds are not.
    firsts = list({run.cell.name: run for run in reversed(some)}.values())
    _indented(f"not counted, to fill the compilation cache: {len(firsts)} runs in {train(firsts, 'first'):.0f} s")
    seconds = train(some, "processes")
    phases = [report.read_summary(workdir / "processes" / run.name)["phase_seconds"] for run in some]
    means = {name: np.mean([one.get(name, 0.0) for one in phases]) for name in phases[0]}
    _indented(f"{len(some)} runs in {seconds:.1f} s, the start of the processes included")
    means["other"] = seconds * min(arguments.processes, len(some)) / len(some) - sum(means.values())
    _indented(f"seconds of a run (compile: tracing, and reading the cache; other: start, report, …): {_phases(means)}")
    return 3600 * len(some) / seconds


def _fused(all_runs, arguments, workdir: pathlib.Path) -> dict[str, float]:
    """Runs an hour of the mode fused, with and without compilation."""
    print(f"\nfused: {len(all_runs)} runs")

    def folder(name):
        return workdir / "runs" / name

    start = time.perf_counter()
    configs = {run.name: run.config for run in all_runs}
    phases = fused.run(
        configs, folder, workdir / "fused", say=_indented, runs_at_once=arguments.runs_at_once, all_cores=True
    )
    seconds = time.perf_counter() - start
    _refuse_failures(all_runs, folder)
    iterations = len(all_runs) * all_runs[0].config.trainer.num_iterations
    _indented(f"{len(all_runs)} runs in {seconds:.1f} s, {phases['compile']:.1f} s of it compilation")
    _indented(f"seconds of all: {_phases(phases)}, other {seconds - sum(phases.values()):.1f}")
    _indented(f"training: {1000 * phases['train'] / iterations:.1f} ms for each run and iteration")
    rate = 3600 * len(all_runs)
    return {"fused": rate / seconds, "fused, compilation left out": rate / (seconds - phases["compile"])}


def _phases(seconds) -> str:
    return ", ".join(f"{name} {spent:.1f}" for name, spent in seconds.items())


# By the number of runs --------------------------------------------------------------------------------------------


def _by_size(run: runs.Run, sizes) -> None:
    """Cost and memory of one compiled program by the number of runs in it: seeds 0, 1, … of the cell of `run`."""
    devices = f"{jax.local_device_count()} x {jax.devices()[0].device_kind}"
    print(f"\nruns like {run.name} side by side in one program, on {devices}; milliseconds are those of one run")
    columns = ("runs", "ms/iteration", "ms/validation", "MiB/device", "MiB/run", "compile s")
    print("  ".join(f"{name:>13}" for name in columns))
    for size in sizes:
        configs = {f"seed={seed}": dataclasses.replace(run.config, seed=seed) for seed in range(size)}
        with contextlib.closing(Group(Family(configs), size, _quiet)) as group:
            training, validation = _seconds(group)
            memory = group.bytes_per_device / 2**20
            cells = (
                str(group.size),
                f"{1000 * training / group.size:.1f}",
                f"{1000 * validation / group.size:.1f}",
                f"{memory:.1f}",
                f"{memory * jax.local_device_count() / group.size:.1f}",
                f"{group.timers.seconds['compile']:.1f}",
            )
        print("  ".join(f"{cell:>13}" for cell in cells), flush=True)


def _seconds(group: Group) -> tuple[float, float]:
    """Median seconds of one iteration, and of one validation, of all runs of a batch."""
    numbers, seeds = group.traced(list(group.family.configs))
    state, done, count = group.start(group.params, numbers), 0, group.chunk_size
    training, validation = [], []
    for _ in range(1 + ROUNDS):
        start = time.perf_counter()
        state, measured = group.advance(state, numbers, seeds, group.params, np.int32(done), np.int32(count))
        jax.block_until_ready((state, measured))
        training.append((time.perf_counter() - start) / count)
        done += count
    for _ in range(1 + ROUNDS):
        start = time.perf_counter()
        group.evaluate(state, "validation")
        validation.append(time.perf_counter() - start)
    return float(np.median(training[1:])), float(np.median(validation[1:]))
