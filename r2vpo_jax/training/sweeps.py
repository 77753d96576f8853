"""Sweeps: a grid of coefficients per method, or presets as they are; the same seeds for all, one run after another.

Paired seeds: runs with the same seed see the same problems, start from the same weights and sample with the
same keys. Every method has the same number of runs per value and the same data, and a failed run is a result.
A sweep that was stopped goes on where it was: finished runs are kept, the one at hand resumes.
"""

import copy
import dataclasses
import json
import pathlib
import time
import traceback
from collections.abc import Iterator

import numpy as np

from r2vpo_jax import config as config_lib
from r2vpo_jax.config import Config, SweepConfig
from r2vpo_jax.errors import Stopped, UsageError
from r2vpo_jax.evaluation import estimators
from r2vpo_jax.run import console, directory, files, report
from r2vpo_jax.training import trainer

TARGET = 0.8  # "rollouts to": first validation score of at least this

# Method -> (preset, fields of `objective` that take the swept value, label of the value). The values of "preset" are names.
METHODS = {
    "preset": (None, (), "preset"),
    "variance_coef": ("r2vpo_fixed", ("dual.coef",), "variance coefficient λ (fixed)"),
    "variance_budget": ("r2vpo", ("dual.budget",), "variance budget δ (adaptive λ)"),
    "clip": ("ppo_clip", ("loss.options.clip_low", "loss.options.clip_high"), "clip ε (PPO)"),
}


@dataclasses.dataclass(frozen=True)
class Run:
    """One cell of the grid at one seed."""

    method: str
    value: float | str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.method}={_text(self.value)}_seed={self.seed}"


def _text(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:g}"


def runs(sweep: SweepConfig) -> list[Run]:
    """All runs, seeds outermost: a sweep that is stopped early has complete grids for the first seeds."""
    values = {
        "preset": sweep.presets,
        "variance_coef": [float(v) for v in sweep.variance_coefs],
        "variance_budget": [float(v) for v in sweep.variance_budgets],
        "clip": [float(v) for v in sweep.clips],
    }
    return [Run(method, v, seed) for seed in sweep.seeds for method in METHODS for v in values[method]]


def run_config(base: dict, run: Run) -> Config:
    """The configuration of one run: the base, with this method's preset, value and seed."""
    preset, fields, _ = METHODS[run.method]
    objective = copy.deepcopy(base["objective"]) | {"name": preset or run.value}
    for field in fields:
        *sections, name = field.split(".")
        node = objective
        for section in sections:
            node = node.setdefault(section, {})
        node[name] = run.value
    return config_lib.from_dict({**base, "objective": objective, "seed": run.seed})


def run_sweep(base: dict, sweep: SweepConfig, workdir, say=console.say) -> list[dict]:
    """Run what is not done yet, then write table and picture.

    Args:
      base: plain nested values of a Config (`config.make(...).to_dict()`), shared by all runs.
      sweep: the grid.
      workdir: holds sweep.json, runs/NAME/ and, at the end, table.md, results.json and sweep.png.
      say: where progress lines go.

    Returns:
      One result per run.

    Raises:
      Stopped: a run was stopped before its end (Ctrl-C); the same call goes on there.
      UsageError: the directory holds another sweep, or a run's configuration is invalid.
    """
    todo = runs(sweep)
    configs = {run: run_config(base, run) for run in todo}  # all are validated before the first starts
    workdir = pathlib.Path(workdir)
    _claim(workdir, base, sweep)
    results = []
    for number, run in enumerate(todo, 1):
        folder = workdir / "runs" / run.name
        say(f"[{number}/{len(todo)}] {run.name}")
        result = _result(folder, run)
        if result is None:
            try:
                trainer.train(configs[run], folder, say=lambda _: None, started=time.perf_counter())
            except (UsageError, Stopped):
                raise
            except Exception as error:  # a run that dies is a result; the next one is tried
                say(f"{run.name} failed: {error}")
                (folder / "failed.json").write_text(
                    json.dumps({"error": repr(error), "traceback": traceback.format_exc()}, indent=2) + "\n"
                )
            result = _result(folder, run)
        results.append(result)
    write_results(workdir, results)
    return results


def _claim(workdir: pathlib.Path, base: dict, sweep: SweepConfig) -> None:
    identity = json.loads(json.dumps({"base": base, "sweep": dataclasses.asdict(sweep)}))
    directory.claim_file(workdir, "sweep.json", identity)


def _result(folder: pathlib.Path, run: Run) -> dict | None:
    """What is known of a run: its result, its failure, or None if it has not ended."""
    row = {"method": run.method, "value": run.value, "seed": run.seed, "failed": False}
    if (folder / "failed.json").exists():
        return row | {"failed": True}
    if not (folder / "report" / "summary.json").exists():
        return None
    summary = report.read_summary(folder)
    reached = [
        r["rollouts"]
        for r in files.read_jsonl(folder / "metrics.jsonl")
        if r["kind"] == "evaluation" and r["split"] == "validation" and r["pass_at_1"] >= TARGET
    ]
    return row | {
        "base_pass_at_1": summary["base_pass_at_1"],
        "final_pass_at_1": summary["final_pass_at_1"],
        "best_validation": summary["best_pass_at_1"],
        "final_entropy": summary["final_entropy"],
        "rollouts_to_target": reached[0] if reached else None,
    }


def _cells(results: list[dict]) -> Iterator[tuple[str, float | str, list[dict]]]:
    for method in METHODS:
        values = list(dict.fromkeys(r["value"] for r in results if r["method"] == method))
        for value in values if method == "preset" else sorted(values):
            yield method, value, [r for r in results if r["method"] == method and r["value"] == value]


def table(results: list[dict]) -> str:
    """A Markdown table, one row per cell: mean ± half of the 95 % interval over seeds."""
    lines = [
        "| method | value | runs | failed | final pass@1 (test) | best pass@1 (validation) "
        f"| rollouts to {TARGET:g} | final entropy |",
        "|---|---|---|---|---|---|---|---|",
    ]

    def mean(rows, name, digits=3):
        if not rows:
            return "–"
        center, half = estimators.mean_interval([r[name] for r in rows])
        return f"{center:.{digits}f}" + (f" ± {half:.{digits}f}" if np.isfinite(half) else "")

    for method, value, rows in _cells(results):
        done = [r for r in rows if not r["failed"]]
        reached = [r for r in done if r["rollouts_to_target"] is not None]
        target = f"{mean(reached, 'rollouts_to_target', 0)} ({len(reached)}/{len(rows)})"
        lines.append(
            f"| {METHODS[method][2]} | {_text(value)} | {len(rows)} | {len(rows) - len(done)} "
            f"| {mean(done, 'final_pass_at_1')} | {mean(done, 'best_validation')} | {target} "
            f"| {mean(done, 'final_entropy')} |"
        )
    seeds = len({r["seed"] for r in results})
    bases = sorted({f"{r['base_pass_at_1']:.3f}" for r in results if not r["failed"]})
    note = (
        f"{seeds} paired seeds; pass@1 of the base model on the test problems: {', '.join(bases) or '–'};  ± is half of the 95 % interval of the mean (Student's t). "
        "A cell whose seeds did not all reach the target averages those that did (count in parentheses)."
    )
    return "\n".join([*lines, "", note])


def write_results(workdir: pathlib.Path, results: list[dict]) -> None:
    """results.json, table.md and sweep.png."""
    (workdir / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    (workdir / "table.md").write_text(table(results) + "\n", encoding="utf-8")
    plot(results, workdir / "sweep.png")


def plot(results: list[dict], file) -> None:
    """Final pass@1 against the value, one panel per method, every seed a dot."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4), layout="constrained")
    FigureCanvasAgg(figure)
    shown = {m: label for m, (_, _, label) in METHODS.items() if any(r["method"] == m for r in results)}
    axes = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
    for ax, (method, label) in zip(axes, shown.items(), strict=True):
        cells = [(v, rows) for m, v, rows in _cells(results) if m == method]
        positions = range(len(cells))
        for x, (_, rows) in zip(positions, cells, strict=True):
            done = [r["final_pass_at_1"] for r in rows if not r["failed"]]
            ax.plot([x] * len(done), done, "o", color="C0", alpha=0.5, ms=5)
            failed = len(rows) - len(done)
            if failed:
                ax.annotate(f"{failed} failed", (x, 0.02), ha="center", color="C3", fontsize=8)
        means = [np.mean([r["final_pass_at_1"] for r in rows if not r["failed"]] or [np.nan]) for _, rows in cells]
        line = "_" if method == "preset" else "-"
        ax.plot(list(positions), means, line, color="C0", ms=8, label="mean over seeds")
        base = [r["base_pass_at_1"] for r in results if not r["failed"]]
        if base:
            ax.axhline(base[0], color="C3", ls=":", label="base")
        ax.set(title=label, xlabel="value", ylim=(0, 1.02))
        rotation = 90 if method == "preset" else 0
        ax.set_xticks(list(positions), [_text(v) for v, _ in cells], rotation=rotation)
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("final pass@1 (test)")
    axes[0].legend(loc="lower right", fontsize=8)
    figure.savefig(file, dpi=110)
