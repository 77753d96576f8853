"""Sweeps: what is kept of each run, going on where it stopped, the two modes, and what is written at the end."""

import json
import types

import pyarrow.parquet
import pytest

from r2vpo_jax import config
from r2vpo_jax.config import SweepConfig, grid
from r2vpo_jax.errors import NonFiniteUpdateError, Stopped, UsageError
from r2vpo_jax.run import files
from r2vpo_jax.sweeps import sweep as sweep_module
from r2vpo_jax.sweeps.sweep import run_sweep
from r2vpo_jax.training import trainer
from tests.helpers.sweeps import leave_run
from tests.sweeps.test_runs import CLIP, METHODS

GRID = SweepConfig(cells=METHODS, seeds=(0, 1))
FIXED, ADAPTIVE, CLIPPED = "r2vpo_fixed_coef=0.5", "r2vpo_budget=0.01", "ppo_clip_clip=0.2"


@pytest.fixture
def base(tiny_sections):
    sections = tiny_sections | {"trainer": tiny_sections["trainer"] | {"num_iterations": 1, "test_samples": 8}}
    return config.make(**sections).to_dict()


@pytest.fixture
def training(monkeypatch):
    """A stand-in for trainer.train: `outcomes` by run (final score, None: stopped, or an exception), `calls` in order."""
    state = types.SimpleNamespace(outcomes={}, calls=[])

    def train(run_config, directory, say, started):
        state.calls.append(directory.name)
        outcome = state.outcomes.get(directory.name, 0.9)
        directory.mkdir(parents=True, exist_ok=True)
        if isinstance(outcome, Exception):
            raise outcome
        if outcome is None:
            raise Stopped("stopped after iteration 0 of 1")
        leave_run(directory, run_config, final=outcome)

    monkeypatch.setattr(trainer, "train", train)
    return state


@pytest.fixture
def fused(monkeypatch):
    """A stand-in for sweeps.fused: refuses the presets in `refused`; runs in `lost` collapse."""
    state = types.SimpleNamespace(refused=(), lost=(), calls=[], stop_after=None)
    state.refusal = lambda run: "it is refused" if run.objective.name in state.refused else None

    def run(configs, folder, scratch, *, say, runs_at_once, all_cores):
        state.calls.append((list(configs), scratch, runs_at_once))
        for number, (name, run_config) in enumerate(configs.items()):
            if number == state.stop_after:
                raise Stopped("stopped between chunks")
            leave_run(folder(name), run_config, collapsed_at=1 if name in state.lost else None)
        return {"train": 1.0}

    state.run = run
    monkeypatch.setattr(sweep_module, "fused", state)
    return state


def sweep(base, workdir, grid=GRID, **settings):
    return run_sweep(base, grid, workdir, **({"mode": "processes"} | settings), say=lambda _: None)


def results(workdir):
    return {row["run"]: row for row in json.loads((workdir / "results.json").read_text())}


def contents(workdir):
    return {path.name: path.read_bytes() for path in workdir.iterdir() if path.is_file()}


def test_a_stopped_sweep_goes_on_and_failures_are_results(base, tmp_path, training):
    training.outcomes = {
        f"{CLIPPED}_seed=0": ValueError("boom"), f"{ADAPTIVE}_seed=0": NonFiniteUpdateError("NaN"),
        f"{FIXED}_seed=1": None,
    }  # fmt: skip
    with pytest.raises(Stopped):  # in the fourth run
        sweep(base, tmp_path)
    assert training.calls[-1] == f"{FIXED}_seed=1"
    assert not (tmp_path / "table.md").exists()

    training.calls.clear()
    training.outcomes = {f"{FIXED}_seed=1": 0.7}
    table = sweep(base, tmp_path)
    assert training.calls == [f"{FIXED}_seed=1", f"{ADAPTIVE}_seed=1", f"{CLIPPED}_seed=1"]
    rows = results(tmp_path)
    assert [row["status"] for row in rows.values()] == [
        "finished", "collapsed", "failed", "finished", "finished", "finished",
    ]  # fmt: skip
    assert "boom" in rows[f"{CLIPPED}_seed=0"]["error"]
    failure = json.loads((tmp_path / "runs" / f"{CLIPPED}_seed=0" / "failed.json").read_text())
    assert "test_sweep.py" in failure["traceback"]
    assert (tmp_path / "table.md").read_text() == table + "\n"
    # Seeds 0.9 and 0.7 -> mean 0.8, half-width t(1) * s / sqrt(2) = 12.706 * 0.1414 / 1.414 = 1.271; only the first
    # reached 0.8, after 300 rollouts.
    assert "| r2vpo_fixed | 0.5 | – | – | 2 | 0 | 0 | 0.800 ± 1.271 | 0.800 ± 1.271 | 300 (1/2) | – |" in table
    # V is 0.001 of a budget of 0.01.
    assert "| r2vpo | 1 | 0.01 | – | 2 | 0 | 1 | 0.900 | 0.900 | 300 (1/2) | 0.10 |" in table
    assert "| ppo_clip | – | – | 0.2 | 2 | 1 | 0 | 0.900 |" in table
    assert "Equal tuning budgets: 1 cell for each objective." in table

    before = contents(tmp_path)
    training.calls.clear()
    assert sweep(base, tmp_path) == table
    assert training.calls == []
    assert contents(tmp_path) == before


@pytest.mark.parametrize("mode", ["processes", "fused"])
def test_failed_runs_are_tried_again_and_collapsed_ones_are_not(base, tmp_path, training, fused, mode):
    training.outcomes = {f"{CLIPPED}_seed=0": ValueError("boom"), f"{ADAPTIVE}_seed=0": NonFiniteUpdateError("NaN")}
    sweep(base, tmp_path, mode="processes")
    if mode == "fused":  # there a failure is a replay buffer that runs dry: it is made up
        identity = json.loads((tmp_path / "sweep.json").read_text())
        (tmp_path / "sweep.json").write_text(json.dumps(identity | {"mode": "fused"}))
    training.calls.clear()
    training.outcomes, said = {}, []
    table = run_sweep(base, GRID, tmp_path, mode=mode, retry_failed=True, say=said.append)
    assert "trying 1 failed run again:" in said
    assert f"  {CLIPPED}_seed=0: ValueError('boom')" in said
    assert training.calls == ([f"{CLIPPED}_seed=0"] if mode == "processes" else [])
    assert len(fused.calls) == (mode == "fused")
    statuses = {name: row["status"] for name, row in results(tmp_path).items()}
    assert statuses.pop(f"{ADAPTIVE}_seed=0") == "collapsed"
    assert set(statuses.values()) == {"finished"}
    assert (tmp_path / "table.md").read_text() == table + "\n"
    run_sweep(base, GRID, tmp_path, mode=mode, retry_failed=True, say=said.append)
    assert "no run has failed: nothing to try again" in said


def test_a_second_sweep_in_the_same_directory_is_refused_while_the_first_lives(base, tmp_path, training, monkeypatch):
    train, refused = trainer.train, []

    def training_while_another_comes(*args, **settings):
        with pytest.raises(UsageError, match="is in use by process"):
            sweep(base, tmp_path)
        refused.append(True)
        train(*args, **settings)

    monkeypatch.setattr(trainer, "train", training_while_another_comes)
    sweep(base, tmp_path)
    assert len(refused) == 6
    sweep(base, tmp_path)


def test_a_sweep_into_a_bucket_is_refused(base, tmp_path, training, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="--workdir=gs://bucket/sweep is an address"):
        sweep(base, "gs://bucket/sweep")
    assert list(tmp_path.iterdir()) == []


def test_what_is_written_can_be_read_back(base, tmp_path, training):
    training.outcomes = {f"{CLIPPED}_seed=1": ValueError("boom")}
    sweep(base, tmp_path)
    rows = pyarrow.parquet.read_table(tmp_path / "results.parquet").to_pylist()
    by_run = {}
    for row in rows:
        by_run.setdefault(row["run"], []).append(row)
    assert [len(of_run) for of_run in by_run.values()] == [6, 6, 6, 6, 6, 1]
    first, last = by_run[f"{FIXED}_seed=0"][0], by_run[f"{FIXED}_seed=0"][-1]
    assert {**last, "objective.dual.coef": 0.5} == last
    assert (last["split"], last["iteration"], last["rollouts"], last["pass_at_1"]) == ("test", 3, 300, 0.9)
    assert (last["pass_at_1_low"], last["pass_at_1_high"], last["pass_at_k"]) == pytest.approx((0.8, 1.0, 0.95))
    assert (first["objective.dual.budget"], first[CLIP[0]], first["seed"], first["status"]) == (
        None,
        None,
        0,
        "finished",
    )
    (failed,) = by_run[f"{CLIPPED}_seed=1"]
    assert (failed["status"], failed["split"], failed["pass_at_1"], failed[CLIP[1]]) == ("failed", None, None, 0.2)

    curves = pyarrow.parquet.read_table(tmp_path / "curves.parquet")
    assert curves.num_rows == 5 * 3
    assert curves.schema.field("keeps/retained").type == "double"
    assert curves["iteration"].to_pylist()[:3] == [1, 2, 3]
    assert curves.schema.field("objective.name").type == "string"
    assert all((tmp_path / name).stat().st_size > 10_000 for name in ("sweep.png", "curves.png"))
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_sweep_of_failures_has_results_too(base, tmp_path, training):
    training.outcomes = {f"{cell}_seed=0": ValueError("boom") for cell in (FIXED, ADAPTIVE, CLIPPED)}
    table = sweep(base, tmp_path, SweepConfig(cells=METHODS, seeds=(0,)))
    assert table.count("| 1 | 1 | 0 | – | – | – (0/1) | – | – |") == 3
    rows = pyarrow.parquet.read_table(tmp_path / "results.parquet").to_pylist()
    assert [(row["status"], row["split"]) for row in rows] == [("failed", None)] * 3
    assert pyarrow.parquet.read_table(tmp_path / "curves.parquet").num_rows == 0


def test_unequal_budgets_and_columns_of_all_kinds(base, tmp_path, training):
    cells = grid.chain(
        grid.product(
            grid.values("objective.name", "grpo"),
            grid.values("objective.kl.target", None, 0.1),
            grid.values("objective.advantage.whiten", True),
        ),
        grid.product(
            grid.values("objective.name", "ppo"),
            grid.values("objective.advantage.whiten", True, False),
            grid.values("sampler.prompt_buckets", [(16, 32)]),
            grid.values("replay.max_age", 3, 2.5),
        ),
    )
    base["replay"]["capacity"] = 4
    table = sweep(base, tmp_path, SweepConfig(cells=cells, seeds=(0,)))
    assert "**Unequal tuning budgets**, in cells: grpo 2, ppo 4." in table
    rows = pyarrow.parquet.read_table(tmp_path / "results.parquet")
    types = {name: str(rows.schema.field(name).type) for name in rows.column_names}
    assert {name: types[name] for cell in cells for name in cell} == {
        "objective.name": "string", "objective.kl.target": "double", "objective.advantage.whiten": "bool",
        "sampler.prompt_buckets": "string", "replay.max_age": "double",
    }  # fmt: skip
    assert set(rows["sampler.prompt_buckets"].to_pylist()) == {"16-32", ""}


def test_bad_input_is_refused_before_anything_runs(base, tmp_path, training):
    bad = SweepConfig(cells=grid.product(grid.values("objective.name", "ppo_clip"), grid.values(CLIP, 0.2, 1.5)))
    with pytest.raises(UsageError, match="clip_low"):
        sweep(base, tmp_path / "a", bad)
    served = base | {"sampler": base.get("sampler", {}) | {"engine": "endpoint"}}
    with pytest.raises(
        UsageError, match="--processes=2: .* is sampled by a server, which has the weights of one run at a time"
    ):
        sweep(served, tmp_path / "a", processes=2)
    assert training.calls == []
    assert not (tmp_path / "a").exists()
    sweep(base, tmp_path / "b")
    training.calls.clear()
    other = SweepConfig(cells=grid.chain(METHODS[:2], grid.values("objective.name", "grpo")), seeds=(0, 1))
    with pytest.raises(UsageError, match=rf"another configuration \(sweep.cells.*{CLIPPED}.*absent here"):
        sweep(base, tmp_path / "b", other)
    with pytest.raises(UsageError, match="trainer.num_epochs: 2 there, 5 here"):
        sweep(base | {"trainer": base["trainer"] | {"num_epochs": 5}}, tmp_path / "b")
    assert training.calls == []


def test_what_a_user_can_put_right_ends_the_sweep(base, tmp_path, training):
    training.outcomes = {f"{ADAPTIVE}_seed=0": UsageError("no such model")}
    with pytest.raises(UsageError, match="no such model"):
        sweep(base, tmp_path)
    assert len(training.calls) == 2
    assert not (tmp_path / "runs" / f"{ADAPTIVE}_seed=0" / "failed.json").exists()


# ---- modes ----


def test_auto_is_fused_where_every_run_can_be(base, tmp_path, training, fused):
    fused.lost = (f"{FIXED}_seed=1",)
    table = sweep(base, tmp_path, mode="auto", runs_at_once=5)
    ((names, scratch, runs_at_once),) = fused.calls
    assert (len(names), scratch, runs_at_once) == (6, tmp_path / "fused", 5)
    assert training.calls == []
    assert results(tmp_path)[f"{FIXED}_seed=1"]["status"] == "collapsed"
    assert "| r2vpo_fixed | 0.5 | – | – | 2 | 0 | 1 | 0.900 |" in table
    assert json.loads((tmp_path / "sweep.json").read_text())["mode"] == "fused"
    assert sweep(base, tmp_path, mode="fused") == table
    assert len(fused.calls) == 1, "nothing was left to do"
    with pytest.raises(UsageError, match="mode: fused there, processes here"):
        sweep(base, tmp_path, mode="processes")


def test_a_fused_sweep_that_was_stopped_goes_on_with_all_its_runs(base, tmp_path, fused):
    fused.stop_after = 2
    with pytest.raises(Stopped):
        sweep(base, tmp_path, mode="fused")
    fused.stop_after = None
    sweep(base, tmp_path, mode="fused")
    assert [len(names) for names, *_ in fused.calls] == [6, 6]
    sweep(base, tmp_path / "whole", mode="fused")
    for file in ("table.md", "results.parquet", "curves.parquet", "sweep.png"):
        assert (tmp_path / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


def test_both_modes_give_the_same_results(base, tmp_path, training, fused):
    assert sweep(base, tmp_path / "a", mode="fused") == sweep(base, tmp_path / "b", mode="processes")
    assert results(tmp_path / "a") == results(tmp_path / "b")


def test_auto_is_processes_where_a_run_cannot_be_fused_and_says_why(base, tmp_path, training, fused):
    fused.refused, said = ("ppo_clip",), []
    run_sweep(base, GRID, tmp_path, say=said.append)
    assert f"the runs are made one by one, not fused: {CLIPPED}_seed=0: it is refused" in said
    assert len(training.calls) == 6
    assert fused.calls == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "fused"}, f"--mode=fused: {CLIPPED}_seed=0: it is refused"),
        ({"mode": "fused", "processes": 2}, "--processes is for"),
        ({"mode": "processes", "runs_at_once": 2}, "--runs_at_once is for"),
        ({"mode": "auto", "processes": 2, "runs_at_once": 2}, "--runs_at_once is for"),
        ({"processes": 0}, "--processes must be at least 1, got 0"),
        ({"mode": "auto", "runs_at_once": 0}, "--runs_at_once must be at least 1, got 0"),
        ({"mode": "magic"}, "--mode=magic is unknown; one of auto, fused, processes"),
    ],
)
def test_modes_that_do_not_fit_are_refused(base, tmp_path, training, fused, settings, message):
    fused.refused = ("ppo_clip",)
    with pytest.raises(UsageError, match=message):
        sweep(base, tmp_path / "run", **settings)
    assert not (tmp_path / "run").exists()
    assert training.calls == fused.calls == []


# ---- whole runs ----


@pytest.mark.slow
def test_real_runs_give_the_same_table_however_many_at_a_time(base, tmp_path):
    grid_of_two = SweepConfig(cells=METHODS[:2], seeds=(0,))
    first = sweep(base, tmp_path / "a", grid_of_two)
    assert sweep(base, tmp_path / "b", grid_of_two, processes=2) == first
    rows = results(tmp_path / "a").values()
    assert len({row["base_pass_at_1"] for row in rows}) == 1, "paired runs start from the same score"
    assert results(tmp_path / "b") == results(tmp_path / "a")
    assert files.read_jsonl(tmp_path / "b" / "runs" / f"{FIXED}_seed=0" / "metrics.jsonl")
    assert "iteration 1/1" in (tmp_path / "b" / "runs" / f"{FIXED}_seed=0" / "log.txt").read_text()
