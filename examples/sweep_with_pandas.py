"""What a sweep has found, with pandas: final scores by cell, differences of paired seeds, and curves.

    pip install -e '.[examples]'
    python -m experiments.sweep --config=experiments/configs/sweep_variance.py:smoke --workdir=runs/sweep
    python -m examples.sweep_with_pandas --workdir=runs/sweep

A sweep leaves results.parquet (a row for each run and evaluation) and curves.parquet (a row for each run and iteration); every
row begins with run, cell, seed, status and one column for each swept field (docs/metrics.md, "Sweeps").
"""

import argparse
import pathlib

try:
    import pandas as pd
except ModuleNotFoundError as error:
    raise SystemExit(f"error: {error}: pip install -e '.[examples]'") from error


def final_scores(results: pd.DataFrame) -> pd.DataFrame:
    """pass@1 of the last test of each finished run: cells down, seeds across."""
    tests = results[(results["split"] == "test") & (results["status"] == "finished")]
    last = tests.sort_values("iteration").groupby(["cell", "seed"], sort=False).tail(1)
    return last.pivot(index="cell", columns="seed", values="pass_at_1")


def summary(scores: pd.DataFrame, reference: str) -> pd.DataFrame:
    """By cell: mean and standard error over seeds, and the same of the differences to the reference at equal seeds."""
    differences = scores - scores.loc[reference]
    table = {"pass@1": scores.mean(axis=1), "±": scores.sem(axis=1)}
    table |= {"difference": differences.mean(axis=1), "± ": differences.sem(axis=1), "seeds": scores.count(axis=1)}
    return pd.DataFrame(table).sort_values("pass@1", ascending=False)


def curve(curves: pd.DataFrame, name: str) -> pd.DataFrame:
    """Means over seeds of a column of curves.parquet: iterations down, cells across."""
    return curves.pivot_table(index="iteration", columns="cell", values=name)


def main(workdir: str, reference: str | None = None) -> pd.DataFrame:
    folder = pathlib.Path(workdir)
    results = pd.read_parquet(folder / "results.parquet")
    curves = pd.read_parquet(folder / "curves.parquet")
    runs = results.drop_duplicates("run")
    print(f"{len(runs)} runs: " + ", ".join(f"{n} {status}" for status, n in runs["status"].value_counts().items()))
    scores = final_scores(results)
    table = summary(scores, reference or scores.index[0])
    print(f"\nTest pass@1, and its difference to {reference or scores.index[0]} at the same seeds:\n{table.round(3)}")
    print(f"\nE[(r-1)^2] by iteration:\n{curve(curves, 'ratio/variance').round(5)}")
    return table


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", default="runs/sweep", help="of a sweep that has ended")
    parser.add_argument("--reference", help="the cell to compare with; default: the first")
    main(**vars(parser.parse_args()))
