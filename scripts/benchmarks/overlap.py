"""Sampling beside learning against taking turns, where both take the same time, and when which of the two was at work.

    python scripts/benchmark.py overlap --png=overlap.png
    XLA_FLAGS=--xla_force_host_platform_device_count=8 python scripts/benchmark.py overlap     # four sample, four learn

Two real runs of the shipped task with a lag of 1, on one mesh, or on two where there are several devices. Half of the
devices sample then. The verifier sleeps as long as it takes that sampling and verifying last as long as learning: it
stands for verifiers that keep the host waiting. On processors, where all devices share the cores, this is the part that
can be gained; on accelerators with devices of their own sampling itself is, too.
"""

import argparse
import contextlib
import dataclasses
import itertools
import json
import os
import pathlib
import statistics
import tempfile
import time

import jax

from experiments.configs import arithmetic
from r2vpo_jax import config as config_lib
from r2vpo_jax.errors import Stopped
from r2vpo_jax.run import files
from r2vpo_jax.tasks import ArithmeticTask
from r2vpo_jax.training.trainer import train

LANES = ("rollout", "verify", "update", "weights")
LAG = 1


@dataclasses.dataclass(frozen=True)
class SlowArithmetic(ArithmeticTask):
    """The shipped task, whose verifier sleeps for so many seconds."""

    delay: float = 0.0

    def verify(self, split, index, responses, lengths):
        if split == "train":
            time.sleep(self.delay)
        return super().verify(split, index, responses, lengths)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument(
        "--iterations", type=int, default=8, help="that are measured, of each run (default: %(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=2, help="runs of each kind, in turn (default: %(default)s)")
    parser.add_argument(
        "--prompts", type=int, default=16, help="problems of an iteration, 16 samples each (default: 16)"
    )
    parser.add_argument("--json", metavar="PATH", help="write numbers and spans here")
    parser.add_argument("--png", metavar="PATH", help="draw when which phase was at work")


def run(arguments: argparse.Namespace) -> None:
    """Measure, print and write everything.

    Args:
      arguments: those of `add_arguments`.

    Raises:
      SystemExit: the two runs did not come to the same numbers, or an argument is out of range.
    """
    if arguments.iterations < 2 or arguments.rounds < 1 or arguments.prompts < 4 or arguments.prompts % 4:
        raise SystemExit("--iterations must be at least 2, --rounds at least 1, and --prompts a multiple of 4")
    own = jax.device_count() // 2
    print(
        f"{jax.device_count()} x {jax.devices()[0].device_kind}"
        + (f": {own} sample, the others learn" if own else ": it samples and learns")
        + f"; {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"
    )
    with tempfile.TemporaryDirectory() as folder:
        first = _Measured()
        first.add(pathlib.Path(folder, "first"), arguments, own, overlap=False, delay=0.0)
        delay = max(first.seconds("update") - first.seconds("rollout", "verify", "weights"), 0.0)
        turns, beside = (_Measured() for _ in range(2))
        for number in range(arguments.rounds):  # in turn, since other work on the machine comes and goes
            turns.add(pathlib.Path(folder, f"turns{number}"), arguments, own, overlap=False, delay=delay)
            beside.add(pathlib.Path(folder, f"beside{number}"), arguments, own, overlap=True, delay=delay)
    if turns.rows != beside.rows:
        raise SystemExit("the two runs did not come to the same numbers")
    last = beside.rows[-1]
    print(
        f"in turns: sampling {turns.seconds('rollout'):.2f} s, verifying {turns.seconds('verify'):.2f} s (of which "
        f"{delay:.2f} s sleep), moving the weights {turns.seconds('weights'):.3f} s, learning {turns.seconds('update'):.2f} s\n"
        f"seconds an iteration (median of {arguments.rounds * arguments.iterations}): in turns {turns.iteration:.2f}, beside "
        f"{beside.iteration:.2f}: {turns.iteration / beside.iteration:.2f} x as fast\n"
        f"the same rows, bit for bit; in the last one age {last['replay/age_max']} updates, V {last['ratio/variance_after']:.6f}"
    )
    runs = {"in turns": turns, "beside": beside}
    if arguments.json:
        facts = {"devices": jax.device_count(), "sampler_devices": own, "cores": os.cpu_count(), "delay": delay}
        facts["runs"] = {
            name: {"seconds_an_iteration": found.iteration, "spans": found.spans} for name, found in runs.items()
        }
        pathlib.Path(arguments.json).write_text(json.dumps(facts, indent=1) + "\n")
    if arguments.png:
        _draw(runs, arguments.png)


class _Measured:
    """Equal runs: seconds of their iterations, their rows without times, and when the phases of the last were at work."""

    def __init__(self):
        self._seconds, self._iterations = [], []
        self.rows, self.spans = [], []

    def add(
        self, workdir: pathlib.Path, arguments: argparse.Namespace, own: int, *, overlap: bool, delay: float
    ) -> None:
        """One run more."""
        skipped = LAG + 2  # the queue fills, and programs are compiled
        last, ends, phases = skipped + arguments.iterations, [], []

        def observe(iteration):
            ends.append(time.perf_counter())
            phases.append(iteration.spans)

        config = _config(arguments.prompts, own, last + 1, overlap, delay)
        with contextlib.suppress(Stopped):  # no last score is wanted
            train(config, workdir, stop_after_iteration=last, say=lambda _: None, on_iteration=observe)
        begin, measured = ends[skipped - 1], phases[skipped:]
        self._seconds += [end - start for start, end in itertools.pairwise(ends[skipped - 1 :])]
        self._iterations += measured
        self.spans = [
            {"phase": phase, "start": start - begin, "end": end - begin}
            for spans in measured
            for phase, start, end in spans
        ]
        self.rows += [
            {key: value for key, value in row.items() if not key.startswith(files.TIME_PREFIXES)}
            for row in files.read_jsonl(workdir / "metrics.jsonl")
        ]

    @property
    def iteration(self) -> float:
        """The median of the seconds of an iteration."""
        return statistics.median(self._seconds)

    def seconds(self, *phases: str) -> float:
        """The median over iterations of the seconds that these phases took together."""
        return statistics.median(
            sum(span.end - span.start for span in spans if span.phase in phases) for spans in self._iterations
        )


def _config(prompts: int, own: int, iterations: int, overlap: bool, delay: float):
    config = arithmetic.get_config()
    config.task.update(name="benchmarks.overlap:SlowArithmetic", options={"delay": delay})
    config.trainer.update(
        num_iterations=iterations, prompts_per_rollout=prompts, eval_every=iterations, checkpoint_every=iterations,
        eval_problems=8, eval_samples=1, test_problems=8, test_samples=1,
    )  # fmt: skip
    config.replay.update(lag=LAG, overlap=overlap)
    config.mesh.sampler_devices = own
    return config_lib.from_flags(config)


def _draw(runs: dict[str, _Measured], path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(len(runs), 1, figsize=(9, 3.6), sharex=True, layout="constrained")
    for panel, (name, found) in zip(panels, runs.items(), strict=True):
        for lane, phase in enumerate(LANES):
            spans = [span for span in found.spans if span["phase"] == phase]
            panel.broken_barh(
                [(span["start"], span["end"] - span["start"]) for span in spans], (lane - 0.4, 0.8), color=f"C{lane}"
            )
        panel.set_yticks(range(len(LANES)), ("sampling", "verifying", "learning", "weights"))
        panel.invert_yaxis()
        panel.set_title(f"{name}: {found.iteration:.2f} s an iteration", loc="left")
    panels[-1].set_xlabel("seconds")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
