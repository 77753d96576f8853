"""The study: every sweep of it is valid, trials are equal in number, and labels belong to their cells."""

import collections
import json

import pytest

from experiments.configs import study
from r2vpo_jax.config import SweepConfig
from r2vpo_jax.sweeps import runs
from r2vpo_jax.sweeps.fused import refusal
from r2vpo_jax.sweeps.sharing import families
from scripts import choose_trials, study_results

CHOICES = [
    *study.AXES,
    *(f"{axis},{task}" for axis in ("tune", "headline") for task in ("countdown", "arithmetic")),
    "tune_stale,countdown",
]


def plan_of(choice):
    found = study.get_config(choice)
    return runs.plan(found.base.to_dict(), SweepConfig(**found.sweep.to_dict()))


@pytest.mark.parametrize("choice", CHOICES)
def test_every_sweep_is_valid_and_fused(choice):
    plan = plan_of(choice)
    assert not any(refusal(cell.config) for cell in plan.cells)
    tuning, test = {run.seed for run in plan_of("tune").runs}, {run.seed for run in plan.runs}
    assert choice.startswith("tune") or not tuning & test, "fresh seeds"


def test_every_method_has_as_many_trials():
    trials = study.trials("eureka")
    assert set(collections.Counter(name for name, _, _ in trials).values()) == {10}
    cells = plan_of("tune").cells
    assert len(cells) == len(trials)
    for cell, (name, _, rate) in zip(cells, trials, strict=True):
        assert cell.config.objective.name == study.METHODS[name][0]["objective.name"]
        assert cell.config.optimizer.learning_rate == rate


@pytest.mark.parametrize("choice", [choice for choice in CHOICES if not choice.startswith("tune")])
def test_labels_belong_to_their_cells(choice):
    choice, _, task = choice.partition(",")
    labels = study_results.cells_of(choice, task or "eureka")
    cells = plan_of(f"{choice},{task}" if task else choice).cells
    assert len(labels) == len(cells) == len(set(labels))
    for (method, level), cell in zip(labels, cells, strict=True):
        made, config = study.METHODS[method][0], cell.config
        assert config.objective.name == made["objective.name"]
        if "objective.loss.options.penalty_weight" in made:
            assert config.objective.loss.options["penalty_weight"] == made["objective.loss.options.penalty_weight"]
        there = {
            "headline": config.replay.lag,
            "lag": config.replay.lag,
            "stale": config.replay.lag,
            "decoupled": config.replay.lag,
            "updates": config.trainer.num_minibatches * config.trainer.num_epochs,
            "rarity": config.task.options.get("needed"),
            "precision": {"compute": "float32"}.get(config.sampler.weights, config.sampler.weights),
        }
        assert there.get(choice, level) == level


def test_methods_share_few_programs():
    """All of a tuning sweep but M2PO, whose threshold takes a pass of its own, and GRPO with its reference."""
    plan = plan_of("tune")
    found = families({run.name: run.config for run in plan.runs if run.seed == 0})
    assert [len(family.configs) for family in found] == [150, 10, 10]


def test_the_best_trial_is_chosen_by_validation_alone(tmp_path):
    import pyarrow
    import pyarrow.parquet

    trials = study.trials("eureka")
    cells = {f"cell {number}": {} for number in range(len(trials))}
    (tmp_path / "sweep.json").write_text(json.dumps({"sweep": {"cells": cells}}))
    rows = []
    for number in range(len(trials)):
        run = {"cell": f"cell {number}", "seed": 0, "status": "collapsed" if number == 5 else "finished"}
        scores = [0.9, 0.1 + (number == 3) * 0.2, 0.1 + (number == 5) * 0.8]  # the first half does not count
        rows += [run | {"split": "validation", "iteration": i, "pass_at_1": score} for i, score in enumerate(scores)]
        rows.append(run | {"split": "test", "iteration": 2, "pass_at_1": 1.0 - number / 1000})
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "results.parquet")
    best = choose_trials.choose(tmp_path, "eureka")
    name, value, rate = trials[3]
    assert (best[name]["value"], best[name]["rate"], best[name]["score"]) == (value, rate, 0.2)
    other = next(some for some in best if some != name)
    assert best[other]["rate"] == min(trial["rate"] for trial in best[other]["trials"]), "ties: the smaller rate"


def test_a_sweep_whose_tuning_was_not_made_says_so():
    with pytest.raises(ValueError, match=r"study_tuned.json has no arithmetic_stale: make its tuning sweep"):
        study.get_config("stale,arithmetic")
    assert len(plan_of("tune_stale,arithmetic").cells) == 10 * len(study.main_methods("arithmetic"))
