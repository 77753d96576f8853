"""What a sweep found, read from the files of its runs: results.parquet, curves.parquet, results.json, table.md, pictures."""

import collections
import io
import json
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from r2vpo_jax.evaluation import estimators
from r2vpo_jax.run import files, report
from r2vpo_jax.sweeps import pictures
from r2vpo_jax.sweeps.runs import Axis, Plan, Run, value_text

TARGET = 0.8  # "rollouts to": first validation score of at least this
_FROM_SUMMARY = {  # name in results.json -> name in report/summary.json
    "base_pass_at_1": "base_pass_at_1",
    "final_pass_at_1": "final_pass_at_1",
    "best_validation": "best_pass_at_1",
    "final_entropy": "final_entropy",
    "ratio_variance_second_half": "ratio_variance_second_half",
}


def status(folder) -> str | None:
    """How a run ended: finished, collapsed (it became non-finite) or failed; None if it has not ended."""
    failure = pathlib.Path(folder) / "failed.json"
    if failure.exists():
        return "collapsed" if json.loads(failure.read_text()).get("collapsed") else "failed"
    return "finished" if report.is_finished(folder) else None


def result(run: Run, folder: pathlib.Path, lines: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """What is known of a run that has ended, in one row; numbers only if it finished.

    Args:
      run: which.
      folder: its directory.
      lines: of its metrics.jsonl.
    """
    ended = status(folder)
    row = {
        "run": run.name,
        "cell": run.cell.name,
        "seed": run.seed,
        "status": ended,
        "variance_budget": run.config.objective.variance_budget,
        **run.cell.settings,
    }
    if ended != "finished":
        return row | {"error": json.loads((folder / "failed.json").read_text())["error"]}
    summary = report.read_summary(folder)
    reached = [
        line["rollouts"]
        for line in lines
        if line["kind"] == "evaluation" and line["split"] == "validation" and line["pass_at_1"] >= TARGET
    ]
    return (
        row
        | {name: summary[source] for name, source in _FROM_SUMMARY.items()}
        | {"rollouts_to_target": reached[0] if reached else None}
    )


def write(plan: Plan, folder: Callable[[str], pathlib.Path], workdir) -> list[dict]:
    """Every file of results, each whole or not at all.

    Args:
      plan: of the sweep; all runs have ended.
      folder: run name -> its directory.
      workdir: where results.parquet and the others go.

    Returns:
      One result per run.
    """
    workdir = pathlib.Path(workdir)
    results, evaluations, iterations, drawn = [], [], [], {}
    for run in plan.runs:  # thousands, perhaps: of the lines of one only columns are kept
        metrics = folder(run.name) / "metrics.jsonl"
        lines = files.read_jsonl(metrics) if metrics.exists() else []
        results.append(result(run, folder(run.name), lines))
        # A run without an evaluation has a row too: it must not be missing from a count of runs.
        scores = [line for line in lines if line["kind"] == "evaluation"] or [{"split": None}]
        evaluations.append(_columns(scores, without="kind"))
        trained = [line for line in lines if line["kind"] == "train"]
        drawn[run.name] = {name: [of(line) for line in trained] for name, of in pictures.CURVES.items()}
        iterations.append(_columns([line for line in lines if line["kind"] != "evaluation"]))
    who = [
        {"run": run.name, "cell": run.cell.name, "seed": run.seed, "status": row["status"], **run.cell.settings}
        for run, row in zip(plan.runs, results, strict=True)
    ]
    _write_parquet(workdir / "results.parquet", who, evaluations)
    _write_parquet(workdir / "curves.parquet", who, iterations)
    files.write_atomically(workdir / "results.json", json.dumps(results, indent=2) + "\n")
    files.write_atomically(workdir / "table.md", table(plan, results) + "\n")
    files.write_atomically(workdir / "sweep.png", pictures.final_scores(plan, results))
    files.write_atomically(workdir / "curves.png", pictures.curves(plan, results, drawn))
    return results


# Parquet ----------------------------------------------------------------------------------------------------------


def _write_parquet(path: pathlib.Path, who: Sequence[Mapping[str, Any]], tables: Sequence) -> None:
    """The rows of all runs; in front of each the row of `who` that says whose it is."""
    import pyarrow
    import pyarrow.parquet

    owners = np.repeat(np.arange(len(who)), [len(table) for table in tables])
    whole = _columns(who).take(owners)
    rows = pyarrow.concat_tables(tables, promote_options="permissive")  # not all runs have the same metrics
    for name in rows.column_names:
        whole = whole.append_column(name, rows[name])
    content = io.BytesIO()
    pyarrow.parquet.write_table(whole, content)
    files.write_atomically(path, content.getvalue())


def _columns(rows: Sequence[Mapping[str, Any]], without: str | None = None):
    import pyarrow

    names = dict.fromkeys(name for row in rows for name in row if name != without)
    return pyarrow.table({name: _column([row.get(name) for row in rows]) for name in names})


def _column(values: list):
    """One type for all: bool, int64, float64, or else text. What metrics.jsonl calls "nan" is a number."""
    import pyarrow

    numbers = [_number(value) for value in values]
    kinds = {type(value) for value in numbers if value is not None}
    if not kinds:
        return pyarrow.nulls(len(values))
    if kinds == {bool}:
        return pyarrow.array(numbers, pyarrow.bool_())
    if kinds == {int}:
        return pyarrow.array(numbers, pyarrow.int64())
    if kinds <= {int, float}:
        return pyarrow.array([None if value is None else float(value) for value in numbers], pyarrow.float64())
    return pyarrow.array([None if value is None else value_text(value) for value in values], pyarrow.string())


def _number(value):
    return float(value) if value in ("nan", "inf", "-inf") else value


# The table --------------------------------------------------------------------------------------------------------


def table(plan: Plan, results: Sequence[Mapping[str, Any]]) -> str:
    """A Markdown table, one row per cell: mean ± half of the 95 % interval over seeds; failures are counted."""
    by_cell = collections.defaultdict(list)
    for row in results:
        by_cell[row["cell"]].append(row)
    budgets = any(row["variance_budget"] is not None for row in results)
    titles = [
        *(axis.name for axis in plan.axes),
        "runs", "failed", "collapsed", "final pass@1 (test)", "best pass@1 (validation)", f"rollouts to {TARGET:g}",
        *(["V / δ (second half)"] if budgets else []),
        "final entropy",
    ]  # fmt: skip
    lines = [f"| {' | '.join(titles)} |", "|" + "---|" * len(titles)]
    for cell in plan.cells:
        rows = by_cell[cell.name]
        done = [row for row in rows if row["status"] == "finished"]
        reached = [row["rollouts_to_target"] for row in done if row["rollouts_to_target"] is not None]
        held = [row["ratio_variance_second_half"] / row["variance_budget"] for row in done if row["variance_budget"]]
        texts = [
            *(_setting(axis, cell.settings) for axis in plan.axes),
            str(len(rows)),
            *(str(sum(row["status"] == ended for row in rows)) for ended in ("failed", "collapsed")),
            _mean(row["final_pass_at_1"] for row in done),
            _mean(row["best_validation"] for row in done),
            f"{_mean(reached, 0)} ({len(reached)}/{len(rows)})",
            *([_mean(held, 2)] if budgets else []),
            _mean(row["final_entropy"] for row in done),
        ]
        lines.append(f"| {' | '.join(texts)} |")
    return "\n".join([*lines, "", *_notes(plan, results)])


def _setting(axis: Axis, settings: Mapping[str, Any]) -> str:
    """The value in force; a dash where it has no effect."""
    value = settings[axis.paths[0]]
    return "–" if value is None else value_text(value)


def _mean(values: Iterable[float], digits=3) -> str:
    values = list(values)
    if not values:
        return "–"
    center, half = estimators.mean_interval(values)
    return f"{center:.{digits}f}" + (f" ± {half:.{digits}f}" if np.isfinite(half) else "")


def _notes(plan: Plan, results: Sequence[Mapping[str, Any]]) -> list[str]:
    seeds = len({row["seed"] for row in results})
    bases = sorted({f"{row['base_pass_at_1']:.3f}" for row in results if row["status"] == "finished"})
    counts = collections.Counter(cell.objective for cell in plan.cells)
    notes = [
        f"{f'{seeds} paired seeds' if seeds > 1 else 'One seed'}; pass@1 of the base model on the test problems: "
        f"{', '.join(bases) or '–'}; ± is half of the 95 % interval of the mean over seeds (Student's t). Means are over "
        "the runs that finished; a run is collapsed if it became non-finite. A cell whose seeds did not all reach the "
        "target averages those that did (count in parentheses).",
        "",
    ]
    if len(set(counts.values())) == 1:
        cells = next(iter(counts.values()))
        return [*notes, f"Equal tuning budgets: {cells} cell{'s' * (cells > 1)} for each objective."]
    tried = ", ".join(f"{objective} {count}" for objective, count in counts.items())
    return [
        *notes,
        f"**Unequal tuning budgets**, in cells: {tried}. More cells are more chances at a good one; compare cells, not "
        "the best of each objective.",
    ]
