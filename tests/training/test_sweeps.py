"""Sweeps: the grid, what is kept of each run, going on where it stopped, and the table."""

import json

import pytest

from r2vpo_jax import config
from r2vpo_jax.config import SweepConfig
from r2vpo_jax.errors import Stopped, UsageError
from r2vpo_jax.training import sweeps, trainer

GRID = SweepConfig(variance_coefs=(0.5,), variance_budgets=(0.01,), clips=(0.2,), seeds=(0, 1))


@pytest.fixture
def base(tiny_sections):
    sections = tiny_sections | {"trainer": tiny_sections["trainer"] | {"num_iterations": 1, "test_samples": 8}}
    return config.make(**sections).to_dict()


def fake_train(outcomes, calls):
    """A stand-in for trainer.train that writes what a finished run leaves behind."""

    def train(run_config, directory, say, started):
        calls.append(directory.name)
        outcome = outcomes.get(directory.name, 0.9)
        directory.mkdir(parents=True, exist_ok=True)
        if isinstance(outcome, Exception):
            raise outcome
        if outcome is None:
            raise Stopped("stopped after iteration 0 of 1")
        (directory / "report").mkdir()
        summary = {
            "base_pass_at_1": 0.3, "final_pass_at_1": outcome, "best_pass_at_1": outcome, "final_entropy": 0.1,
        }  # fmt: skip
        rows = [
            {"kind": "evaluation", "split": "validation", "rollouts": 100 * i, "pass_at_1": score}
            for i, score in enumerate((0.5, outcome))
        ]
        (directory / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        (directory / "report" / "summary.json").write_text(json.dumps(summary))
        return summary

    return train


def test_runs_are_paired_and_configured(base):
    runs = sweeps.runs(GRID)
    assert [r.name for r in runs] == [
        "variance_coef=0.5_seed=0", "variance_budget=0.01_seed=0", "clip=0.2_seed=0",
        "variance_coef=0.5_seed=1", "variance_budget=0.01_seed=1", "clip=0.2_seed=1",
    ]  # fmt: skip
    fixed, adaptive, clip = (sweeps.run_config(base, r) for r in runs[:3])
    assert (fixed.objective.name, fixed.objective.dual.coef, fixed.objective.dual.adaptive) == (
        "r2vpo_fixed",
        0.5,
        False,
    )
    assert (adaptive.objective.dual.budget, adaptive.objective.dual.adaptive) == (0.01, True)
    assert clip.objective.loss.name == "ppo_clip"
    assert clip.objective.loss.options == {"clip_low": 0.2, "clip_high": 0.2, "dual_clip": None}
    assert fixed.trainer == adaptive.trainer == clip.trainer
    assert sweeps.run_config(base, runs[4]).seed == 1


def test_stopped_sweep_goes_on_and_failures_are_results(base, tmp_path, monkeypatch):
    calls = []
    outcomes = {"clip=0.2_seed=0": FloatingPointError("boom"), "variance_coef=0.5_seed=1": None}
    monkeypatch.setattr(trainer, "train", fake_train(outcomes, calls))
    with pytest.raises(Stopped):  # in the fourth run
        sweeps.run_sweep(base, GRID, tmp_path, say=lambda _: None)
    assert calls[-1] == "variance_coef=0.5_seed=1"
    assert not (tmp_path / "table.md").exists()

    calls.clear()
    monkeypatch.setattr(trainer, "train", fake_train({"variance_budget=0.01_seed=1": 0.7}, calls))
    results = sweeps.run_sweep(base, GRID, tmp_path, say=lambda _: None)
    assert calls == ["variance_coef=0.5_seed=1", "variance_budget=0.01_seed=1", "clip=0.2_seed=1"]
    assert [r["failed"] for r in results] == [False, False, True, False, False, False]
    assert "boom" in json.loads((tmp_path / "runs" / "clip=0.2_seed=0" / "failed.json").read_text())["error"]
    table = (tmp_path / "table.md").read_text()
    # budget 0.01: seeds 0.9 and 0.7 -> mean 0.8, half-width t(1) * s / sqrt(2) = 12.706 * 0.1414 / 1.414 = 1.271;
    # only the first reached 0.8, after 100 rollouts.
    assert "| 0.01 | 2 | 0 | 0.800 ± 1.271 |" in table
    assert "100 (1/2)" in table
    assert "| 0.2 | 2 | 1 | 0.900 |" in table
    assert (tmp_path / "sweep.png").stat().st_size > 10_000

    again = sweeps.run_sweep(base, GRID, tmp_path, say=lambda _: None)
    assert again == results
    assert (tmp_path / "table.md").read_text() == table


def test_bad_input_is_refused_before_anything_runs(base, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(trainer, "train", fake_train({}, calls))
    with pytest.raises(ValueError, match="clip_low"):
        sweeps.run_sweep(base, SweepConfig(variance_coefs=(1.0,), clips=(1.5,)), tmp_path / "a", say=lambda _: None)
    sweeps.run_sweep(base, GRID, tmp_path / "b", say=lambda _: None)
    calls.clear()
    other = SweepConfig(variance_coefs=(0.5,), variance_budgets=(0.01,), clips=(0.3,), seeds=(0, 1))
    with pytest.raises(UsageError, match=r"another configuration \(sweep.clips"):
        sweeps.run_sweep(base, other, tmp_path / "b", say=lambda _: None)
    assert calls == []
    with pytest.raises(ValueError, match="twice"):
        SweepConfig(clips=(0.2, 0.2))


@pytest.mark.slow
def test_real_runs_give_the_same_table_twice(base, tmp_path):
    grid = SweepConfig(variance_coefs=(0.5,), variance_budgets=(0.01,), clips=(0.2,), seeds=(0,))
    first = sweeps.run_sweep(base, grid, tmp_path / "a", say=lambda _: None)
    second = sweeps.run_sweep(base, grid, tmp_path / "b", say=lambda _: None)
    assert first == second
    assert len({r["base_pass_at_1"] for r in first}) == 1, "paired runs start from the same score"
