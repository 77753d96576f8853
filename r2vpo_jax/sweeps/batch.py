"""Runs that are trained side by side, chunk by chunk, and what they leave on disk."""

import contextlib
import dataclasses
import json
import pathlib
import shutil
import time

import jax
import numpy as np

from r2vpo_jax import sharding
from r2vpo_jax.errors import Stopped
from r2vpo_jax.evaluation import validation
from r2vpo_jax.models.identity import refuse_others
from r2vpo_jax.run import console, directory, files
from r2vpo_jax.run import summary as run_summary
from r2vpo_jax.run.checkpoints import Checkpointer
from r2vpo_jax.sweeps import workers
from r2vpo_jax.sweeps.group import Group
from r2vpo_jax.sweeps.program import Measured
from r2vpo_jax.training import metrics, noise_floor

_GO_ON = "the same command goes on from there"
_COLLAPSED = (
    "an update of iteration {} had a non-finite loss or gradient and was not applied, more often in a row than "
    "trainer.max_nonfinite_updates allows"
)
_DRY = "in iteration {} too few groups were within replay.max_age and replay.max_uses; raise them, or replay.capacity"


@dataclasses.dataclass
class Progress:
    """What is known of one run on the host; goes into the checkpoints."""

    rollouts: int = 0
    rollout_tokens: int = 0
    trained_tokens: int = 0
    best_validation: float | None = None  # of those after an iteration, as of the ordinary trainer
    last_validation: float = 0.0
    noise_floor: float | None = None  # V of the first minibatch of all, before anything was learned
    error: str | None = None  # why it has ended before its time
    collapsed: bool = False


class Batch:
    """The runs that are trained side by side."""

    def __init__(self, group: Group, names: list[str], folder, scratch: pathlib.Path, stop):
        self._group, self._names, self._folder, self._stop = group, names, folder, stop
        self._scratch = scratch
        self._trainer = group.config.trainer
        self._numbers, self._seeds = group.traced(names)

    def go(self) -> None:
        """All iterations that are left, and the results."""
        group, total, start = self._group, self._trainer.num_iterations, time.perf_counter()
        self._scratch.mkdir(parents=True, exist_ok=True)
        with contextlib.closing(Checkpointer(self._scratch / "checkpoints", max_to_keep=1)) as checkpointer:
            iteration, seconds, runs = self._restore(checkpointer)
            with contextlib.closing(self._rows):
                bar = console.ProgressBar(total, iteration, every=self._trainer.eval_every)
                while iteration < total and not self._stop.requested and any(p.error is None for p in self._progress):
                    boundary = min(total, (iteration // self._trainer.eval_every + 1) * self._trainer.eval_every)
                    count = min(group.chunk_size, boundary - iteration)
                    with group.timers("train"):
                        runs, measured = group.advance(
                            runs, self._numbers, self._seeds, group.params, np.int32(iteration), np.int32(count)
                        )
                        measured = sharding.to_host(measured)
                    with group.timers("rows"):
                        self._write_iterations(measured, iteration, count)
                    iteration += count
                    if iteration == boundary:
                        self._write_scores(self._evaluate(runs, "validation"), iteration)
                    with group.timers("checkpoint"):
                        self._save(checkpointer, iteration, runs, seconds + time.perf_counter() - start)
                    bar.update(iteration, self._text(measured, count))
                bar.close()
                if self._stop.requested and iteration < total:
                    raise Stopped(
                        f"stopped after iteration {iteration} of {total} of {len(self._names)} runs; {_GO_ON}"
                    )
                self._finish(runs, iteration, seconds + time.perf_counter() - start)
        shutil.rmtree(self._scratch)

    # States on disk ------------------------------------------------------------------------------------------

    def _restore(self, checkpointer: Checkpointer):
        """(iteration, seconds so far, states): of the last intact checkpoint, or of the beginning."""
        group, last = self._group, checkpointer.latest()
        self._progress = [Progress() for _ in self._names]
        if last is None:
            checkpointer.discard_after(None)
            self._rows = files.JsonlWriter(self._scratch / "rows.jsonl", 0)
            for evaluation in group.base:
                self._write_scores([(evaluation, self._scores(evaluation))] * len(self._names), 0)
            return 0, 0.0, group.start(group.params, self._numbers)
        shardings = jax.tree.map(lambda _: group.by_run, group.abstract_runs)
        runs, saved = checkpointer.restore(last, group.abstract_runs, shardings)
        refuse_others(saved.get("model", {}), group.base_identity, self._scratch.parent.parent)
        checkpointer.discard_after(last)
        self._progress = [Progress(**progress) for progress in saved["progress"]]
        self._rows = files.JsonlWriter(self._scratch / "rows.jsonl", saved["position"])
        return last, saved["seconds"], runs

    def _save(self, checkpointer: Checkpointer, iteration: int, runs, seconds: float) -> None:
        saved = {
            "position": self._rows.position(),
            "progress": [dataclasses.asdict(progress) for progress in self._progress],
            "seconds": seconds,
            "model": self._group.base_identity,
        }
        checkpointer.save(iteration, runs, saved)

    # Rows ----------------------------------------------------------------------------------------------------

    def _write_iterations(self, measured: Measured, done: int, count: int) -> None:
        for i, progress in enumerate(self._progress):
            for number in range(count):
                if progress.error is not None:
                    break
                this = jax.tree.map(lambda x: x[i, number], measured)  # noqa: B023
                self._write_iteration(i, this, done + number + 1)

    def _write_iteration(self, i: int, measured: Measured, iteration: int) -> None:
        name, progress, trainer = self._names[i], self._progress[i], self._trainer
        config, measured = self._group.family.configs[name], self._group.family.own(name, measured)
        progress.rollouts += trainer.prompts_per_rollout * config.sampler.group_size
        progress.rollout_tokens += int(measured.tokens)
        progress.trained_tokens += int(measured.trained_tokens)
        if measured.dry or measured.collapsed:
            progress.error = (_DRY if measured.dry else _COLLAPSED).format(iteration)
            progress.collapsed = not measured.dry  # what is learned from too few groups may be non-finite
            return
        report = None if iteration <= config.replay.lag else measured.report
        if report is not None and progress.noise_floor is None:
            progress.noise_floor = float(measured.variance_first)
            noise_floor.refuse_if_noisy(progress.noise_floor, config.trainer.max_noise_floor)
        counters = {"iteration": iteration, "version": int(measured.version)}
        counters |= {"rollouts": progress.rollouts, "rollout_tokens": progress.rollout_tokens}
        if measured.replay:
            counters |= measured.replay
            counters["replay/ratio"] = progress.trained_tokens / max(progress.rollout_tokens, 1)
        row = metrics.row(
            config.objective,
            measured.sampled,
            float(measured.kept),
            report,
            counters=counters,
            variance_coef=float(measured.variance_coef),
            kl_coef=float(measured.kl_coef),
            learning_rate=float(measured.learning_rate),
        )
        self._rows.write({"run": name, **row})

    def _scores(self, evaluation: validation.Evaluation) -> dict:
        """What the ordinary trainer says of an evaluation of that split."""
        if evaluation.split == "validation":
            return {"pass_at_1": evaluation.average_at(self._trainer.eval_samples)}
        return evaluation.scores(validation.average_over(self._group.config))

    def _evaluate(self, runs, split: str) -> list[tuple[validation.Evaluation, dict]]:
        """The evaluation of each run, and its scores."""
        evaluations = self._group.evaluate(runs, split)[: len(self._names)]
        return [(evaluation, self._scores(evaluation)) for evaluation in evaluations]

    def _write_scores(self, evaluated, iteration: int) -> None:
        """The rows of one evaluation of each run."""
        for name, progress, (evaluation, scores) in zip(self._names, self._progress, evaluated, strict=True):
            if progress.error is not None:
                continue
            if evaluation.split == "validation":
                progress.last_validation = scores["pass_at_1"]
                if iteration > 0:
                    progress.best_validation = max(progress.best_validation or 0.0, scores["pass_at_1"])
            counts = {"iteration": iteration, "rollouts": progress.rollouts}
            self._rows.write({"run": name, "kind": "evaluation", **counts, **evaluation.row(scores)})

    def _text(self, measured: Measured, count: int) -> str:
        going = [i for i, progress in enumerate(self._progress) if progress.error is None]
        reward = np.mean(measured.sampled["reward/mean"][going, count - 1]) if going else float("nan")
        validated = np.mean([self._progress[i].last_validation for i in going] or [float("nan")])
        ended = len(self._names) - len(going)
        return f"{len(going)} runs  reward {reward:.3f}  val {validated:.3f}" + f"  {ended} failed" * (ended > 0)

    # Results -------------------------------------------------------------------------------------------------

    def _finish(self, runs, iteration: int, seconds: float) -> None:
        """The test scores, and the results of each run in its folder."""
        evaluated = self._evaluate(runs, "test")
        self._write_scores(evaluated, iteration)
        base = self._scores(self._group.base[0])
        self._rows.position()
        rows: dict = {name: [] for name in self._names}
        for row in files.read_jsonl(self._scratch / "rows.jsonl"):
            rows[row.pop("run")].append(row)
        for i, name in enumerate(self._names):
            scores = {"base": base, "final": evaluated[i][1]}
            self._write_run(name, self._progress[i], rows[name], scores, seconds / len(self._names))

    def _write_run(self, name: str, progress: Progress, rows, scores: dict, seconds: float) -> None:
        config, folder = self._group.family.configs[name], self._folder(name)
        directory.claim(folder, config)
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        files.write_atomically(folder / "metrics.jsonl", lines)
        if progress.error is not None:
            workers.write_failure(folder, progress.error, collapsed=progress.collapsed)
            return
        summary = run_summary.summarize(
            config,
            rows,
            **scores,
            progress=dataclasses.asdict(progress),
            train_seconds=seconds,
            phases={},
            peak_memory_bytes=None,
        )
        (folder / "report").mkdir(exist_ok=True)
        files.write_atomically(folder / "report" / "summary.json", json.dumps(summary, indent=2) + "\n")
