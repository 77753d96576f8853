"""The best trial of each method of the study, from its tuning sweep, by validation alone.

    python -m scripts.choose_trials runs/study_tune_eureka eureka
    python -m scripts.choose_trials runs/study_tune_again eureka_again
    python -m scripts.choose_trials runs/study_tune_stale eureka_stale

Writes experiments/configs/study_tuned.json: task -> method -> value of its own coefficient, learning rate, validation
score, and the scores of all ten trials. The score of a trial is the mean over seeds of the mean validation pass@1 over the
second half of the evaluations; a run that did not finish counts as 0. Ties go to the smaller learning rate.
"""

import json
import pathlib
import sys

import numpy as np
import pyarrow.parquet

from experiments.configs import study


def score(rows) -> float:
    """Of the rows of one cell."""
    scores = []
    for seed in sorted({row["seed"] for row in rows}):
        run = [row for row in rows if row["seed"] == seed]
        scored = sorted((row["iteration"], row["pass_at_1"]) for row in run if row["split"] == "validation")
        finished = run[0]["status"] == "finished"
        scores.append(np.mean([value for _, value in scored[len(scored) // 2 :]]) if finished else 0.0)
    return float(np.mean(scores))


def choose(workdir: pathlib.Path, task: str) -> dict:
    """method -> its best trial."""
    rows = pyarrow.parquet.read_table(
        workdir / "results.parquet", columns=["cell", "seed", "status", "split", "iteration", "pass_at_1"]
    ).to_pylist()
    cells = json.loads((workdir / "sweep.json").read_text())["sweep"]["cells"]
    found: dict = {}
    for cell, (name, value, rate) in zip(cells, study.trials(task), strict=True):
        one = {"value": value, "rate": rate, "score": round(score([row for row in rows if row["cell"] == cell]), 4)}
        found.setdefault(name, []).append(one)
    return {
        name: max(some, key=lambda one: (one["score"], -one["rate"])) | {"trials": some} for name, some in found.items()
    }


def main():
    workdir, task = sys.argv[1:]
    there = json.loads(study.TUNED.read_text()) if study.TUNED.exists() else {}
    there[task] = choose(pathlib.Path(workdir), task)
    study.TUNED.write_text(json.dumps(there, indent=1) + "\n")
    for name, best in there[task].items():
        print(f"{name:18} {best['value']:<8g} {best['rate']:<8g} {best['score']:.3f}")


if __name__ == "__main__":
    main()
