"""The report of a sweep: what its page says of known runs, and that it needs nothing but itself."""

import base64
import re

import numpy as np
import pytest

from r2vpo_jax import config
from r2vpo_jax.config import SweepConfig, grid
from r2vpo_jax.errors import UsageError
from r2vpo_jax.sweeps import runs, study, study_pictures, study_report
from r2vpo_jax.sweeps.sweep import run_sweep
from tests.helpers.sweeps import leave_run
from tests.sweeps.test_runs import CLIP

SEEDS = (0, 1, 2, 3, 4)
# Two coefficients of each method, at two learning rates.
GRID = grid.product(
    grid.chain(
        grid.product(grid.values("objective.name", "r2vpo"), grid.values("objective.dual.budget", 0.001, 0.01)),
        grid.product(grid.values("objective.name", "ppo_clip"), grid.values(CLIP, 0.1, 0.2)),
    ),
    grid.values("optimizer.learning_rate", 1e-4, 1e-3),
)
FINAL = {"r2vpo": 0.9, "ppo_clip": 0.8}


def final_score(run):
    """0.9 or 0.8 for the first coefficient, less for the second; at the high rate less; the seeds are shared."""
    settings = run.cell.settings
    second = settings.get("objective.dual.budget") == 0.01 or settings.get(CLIP[0]) == 0.2
    fast = settings.get("optimizer.learning_rate") == 1e-3
    own = 0.001 * (run.seed if run.cell.objective == "r2vpo" else -run.seed)
    return FINAL[run.cell.objective] - 0.1 * second - 0.2 * fast + 0.01 * run.seed + own


def leave_sweep(workdir, base, cells=GRID, seeds=SEEDS, lost=(), iterations=6):
    """The directory of a sweep that has ended; the runs in `lost` have collapsed."""
    sweep = SweepConfig(cells=cells, seeds=seeds)
    for run in runs.plan(base, sweep).runs:
        left = {"final": final_score(run), "collapsed_at": 2 if run.name in lost else None}
        leave_run(workdir / "runs" / run.name, run.config, iterations=iterations, **left)
    run_sweep(base, sweep, workdir, mode="processes", say=lambda _: None)


@pytest.fixture
def base(tiny_sections):
    return config.make(**tiny_sections).to_dict()


LOST = "r2vpo_budget=0.001_learning_rate=0.0001_seed=4"


@pytest.fixture
def workdir(tmp_path, base):
    leave_sweep(tmp_path / "my_sweep", base, lost=(LOST,))
    return tmp_path / "my_sweep"


def tables(page):
    """Rows of each table of the page, as lists of texts."""
    found = []
    for table in re.findall(r"<table>(.*?)</table>", page, flags=re.DOTALL):
        rows = [re.findall(r"<t[hd]>(.*?)</t[hd]>", row) for row in re.findall(r"<tr>(.*?)</tr>", table)]
        found.append([dict(zip(rows[0], row, strict=True)) for row in rows[1:]])
    return found


def test_a_study_tells_methods_coefficients_and_settings_apart(workdir):
    read = study.read(workdir)
    assert read.methods == ["r2vpo", "ppo_clip"]
    assert read.settings == ["learning_rate 0.0001", "learning_rate 0.001"]
    assert [axis.name for axis in read.axes(of_objective=True)] == ["budget", "clip"]
    assert [axis.name for axis in read.axes(of_objective=False)] == ["learning_rate"]
    chosen = {key: group.coefficients for key, group in read.chosen.items()}
    # One run of budget 0.001 was lost at the low rate, so the other is chosen there.
    assert chosen == {
        ("learning_rate 0.0001", "r2vpo"): "budget 0.01",
        ("learning_rate 0.001", "r2vpo"): "budget 0.001",
        ("learning_rate 0.0001", "ppo_clip"): "clip 0.1",
        ("learning_rate 0.001", "ppo_clip"): "clip 0.1",
    }
    first = read.groups[0]
    assert (len(first.finished), first.count("collapsed"), first.count("failed")) == (4, 1, 0)
    run = first.finished[0]
    np.testing.assert_array_equal(run.validation["rollouts"], 100 * np.arange(7))
    assert (run.mean("keeps/retained"), run.last("policy/entropy")) == pytest.approx((0.5, 0.09))


def test_the_page_says_what_was_found(workdir):
    page = study_report.write(workdir).read_text()
    assert "40 runs: 8 cells × 5 seeds; 39 finished, 1 collapsed (became non-finite), 0 failed" in page
    assert "base model on the test problems: 0.300" in page
    quality, speed = tables(page)
    rows = {(row["coefficients"], row["setting"]): row for row in quality}
    lossy = rows["budget 0.001", "learning_rate 0.0001"]
    assert (lossy["method"], lossy["finished"]) == ("r2vpo", "4/5")
    assert lossy["collapse rate"].startswith("0.20 [0.01, 0.72")
    assert lossy["verdict"] == "better, among survivors"
    # Differences of the pairs: 0.1 + 0.002 · seed, seeds 0, 1, 2, 4; their mean is 0.1035.
    assert lossy["difference to ppo_clip"].startswith("+0.103 [") or lossy["difference to ppo_clip"].startswith(
        "+0.104 ["
    )
    assert lossy["difference to ppo_clip"].endswith("n = 4")
    fast = rows["budget 0.001", "learning_rate 0.001"]
    assert (fast["method"], fast["verdict"], fast["p"]) == ("r2vpo *", "better", f"{2 / 2**5:.3f}")
    assert fast["probability of improvement"] == "1.00 [1.00, 1.00]"
    reference = rows["clip 0.1", "learning_rate 0.001"]
    assert (reference["method"], reference["verdict"], reference["collapse rate"]) == (
        "ppo_clip *",
        "–",
        "0.00 [0.00, 0.52]",
    )
    assert rows["clip 0.2", "learning_rate 0.001"]["verdict"] == "worse"

    rows = {(row["coefficients"], row["setting"]): row for row in speed}
    # Scores rise evenly from 0.3: to 0.9 + 0.011 · seed in 600 rollouts, 0.8 is reached at 500; a lost run is censored.
    assert rows["budget 0.001", "learning_rate 0.0001"]["rollouts to 0.8"] == "500 (1 of 5 censored)"
    assert rows["clip 0.2", "learning_rate 0.001"]["rollouts to 0.8"] == "&gt; 600 (5 of 5 censored)"
    # Against 600 of ppo_clip; the lost run counts as 600 too: (6/5)^(4/5) = 1.157.
    assert rows["budget 0.001", "learning_rate 0.0001"]["times fewer than ppo_clip"].startswith("at most 1.16 [")
    assert rows["clip 0.2", "learning_rate 0.001"]["times fewer than ppo_clip"] == "–"
    # The mean of the ends, (0.3 + 0.5 + 0.009 · 2) / 2.
    assert rows["clip 0.2", "learning_rate 0.001"]["area under validation curve"].startswith("0.409 [")


def test_the_page_needs_nothing_else(workdir):
    page = study_report.write(workdir).read_text()
    names = ["constraint", "dead_zone", "displacement", "over_learning_rate", "sensitivity", "validation"]
    files = sorted((workdir / "report").iterdir())
    assert [file.stem for file in files] == names
    sources = re.findall(r"src='([^']*)'", page)
    embedded = {base64.b64decode(source.removeprefix("data:image/png;base64,")) for source in sources}
    assert embedded == {file.read_bytes() for file in files}
    rest = re.sub(r"src='data:[^']*'", "", page)
    assert not re.search(r"http|<script|<link|src=|url\(|@import", rest)
    assert study_report.write(workdir).read_text() == page


def test_other_references_and_targets(workdir):
    page = study_report.write(workdir, reference="r2vpo", target=0.6).read_text()
    quality, speed = tables(page)
    assert {row["verdict"] for row in quality if row["method"].startswith("ppo_clip")} <= {"worse", "cannot be told"}
    assert "rollouts to 0.6" in speed[0]
    with pytest.raises(UsageError, match="--reference=grpo is not in this sweep; it has r2vpo, ppo_clip"):
        study_report.write(workdir, reference="grpo")
    (workdir / "results.json").unlink()
    with pytest.raises(UsageError, match="has not ended"):
        study_report.write(workdir)


def test_only_sections_for_which_there_is_data(tmp_path, base):
    """One method without coefficients and settings, one seed: no comparison, no sensitivity."""
    leave_sweep(tmp_path, base, grid.values("objective.name", "r2vpo"), seeds=(0,), iterations=3)
    assert study.is_sweep(tmp_path)
    page = study_report.write(tmp_path).read_text()
    quality, _ = tables(page)
    assert list(quality[0]) == ["method", "finished", "final pass@1 (test), IQM", "collapse rate"]
    names = {picture.name for picture in study_pictures.draw(study.read(tmp_path))}
    assert names == {"validation", "constraint", "dead_zone", "displacement"}


def test_a_sweep_of_failures_has_a_report_too(tmp_path, base):
    cells = grid.values("objective.name", "r2vpo", "ppo_clip")
    lost = [f"{cell}_seed={seed}" for cell in ("r2vpo", "ppo_clip") for seed in (0, 1)]
    leave_sweep(tmp_path, base, cells, seeds=(0, 1), lost=lost)
    page = study_report.write(tmp_path).read_text()
    assert "0 finished, 4 collapsed" in page
    assert "<img" not in page
    assert {row["collapse rate"] for row in tables(page)[0]} == {"1.00 [0.16, 1.00]"}
