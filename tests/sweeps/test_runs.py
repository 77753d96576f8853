"""The runs of a sweep: each configuration is what its cell says, and names are short, unique and fit for files."""

import re

import pytest

from r2vpo_jax import config
from r2vpo_jax.config import SweepConfig, grid
from r2vpo_jax.errors import UsageError
from r2vpo_jax.sweeps import runs

CLIP = ("objective.loss.options.clip_low", "objective.loss.options.clip_high")
METHODS = grid.chain(
    grid.product(grid.values("objective.name", "r2vpo_fixed"), grid.values("objective.dual.coef", 0.5)),
    grid.product(grid.values("objective.name", "r2vpo"), grid.values("objective.dual.budget", 0.01)),
    grid.product(grid.values("objective.name", "ppo_clip"), grid.values(CLIP, 0.2)),
)


@pytest.fixture
def base(tiny_sections):
    return config.make(**tiny_sections).to_dict()


def plan(base, cells, seeds=(0,)):
    return runs.plan(base, SweepConfig(cells=cells, seeds=seeds))


def names(base, *grids):
    return [cell.name for cell in plan(base, grid.product(*grids)).cells]


def test_runs_are_paired_and_configured(base):
    before = repr(base)
    made = plan(base, grid.product(METHODS, grid.values("trainer.num_epochs", 1, 3)), seeds=(0, 7))
    assert [run.name for run in made.runs] == [
        "r2vpo_fixed_coef=0.5_num_epochs=1_seed=0", "r2vpo_fixed_coef=0.5_num_epochs=3_seed=0",
        "r2vpo_budget=0.01_num_epochs=1_seed=0", "r2vpo_budget=0.01_num_epochs=3_seed=0",
        "ppo_clip_clip=0.2_num_epochs=1_seed=0", "ppo_clip_clip=0.2_num_epochs=3_seed=0",
        "r2vpo_fixed_coef=0.5_num_epochs=1_seed=7", "r2vpo_fixed_coef=0.5_num_epochs=3_seed=7",
        "r2vpo_budget=0.01_num_epochs=1_seed=7", "r2vpo_budget=0.01_num_epochs=3_seed=7",
        "ppo_clip_clip=0.2_num_epochs=1_seed=7", "ppo_clip_clip=0.2_num_epochs=3_seed=7",
    ]  # fmt: skip
    fixed, _, adaptive, _, clip, _ = (run.config for run in made.runs[:6])
    assert (fixed.objective.name, fixed.objective.dual.coef) == ("r2vpo_fixed", 0.5)
    assert (adaptive.objective.variance_budget, fixed.objective.variance_budget) == (0.01, None)
    assert clip.objective.loss.options == {"clip_low": 0.2, "clip_high": 0.2, "dual_clip": None}
    assert fixed.trainer == adaptive.trainer == clip.trainer
    assert made.runs[7].config.trainer.num_epochs == 3
    assert made.runs[7].config == config.from_dict(config.to_dict(made.runs[1].config) | {"seed": 7})
    assert repr(base) == before


def test_settings_are_those_in_force(base):
    fixed, adaptive, clip = plan(base, METHODS).cells
    assert [axis.name for axis in plan(base, METHODS).axes] == ["objective", "coef", "budget", "clip"]
    assert fixed.settings == {
        "objective.name": "r2vpo_fixed", "objective.dual.coef": 0.5, "objective.dual.budget": None,
        CLIP[0]: None, CLIP[1]: None,
    }  # fmt: skip
    assert adaptive.settings["objective.dual.coef"] == 1.0, "of its preset"
    assert (clip.settings[CLIP[1]], clip.settings["objective.dual.coef"]) == (0.2, None)
    assert (fixed.label, clip.label) == ("r2vpo_fixed, coef=0.5", "ppo_clip, clip=0.2")


def test_names_grow_where_short_ones_mean_two_fields(base):
    assert names(base, grid.values("objective.dual.coef", 0.5), grid.values("objective.kl.coef", 0.1)) == [
        "dual.coef=0.5_kl.coef=0.1"
    ]
    assert names(
        base, grid.values("objective.loss.name", "cispo"), grid.values("objective.advantage.scale", "none")
    ) == ["loss=cispo_scale=none"]
    assert names(base, grid.values("optimizer.learning_rate", 1e-5, 0.12345678)) == [
        "learning_rate=1e-05", "learning_rate=0.12345678",
    ]  # fmt: skip
    assert names(base, grid.values("objective.kl.target", None)) == ["target=none"]
    assert names(base) == ["base"]
    # Two fields of one section with the same values, and no word in common.
    assert names(base, grid.values(("optimizer.learning_rate", "optimizer.weight_decay"), 0.5)) == [
        "learning_rate+weight_decay=0.5"
    ]


def test_names_are_fit_for_files_and_unique(base):
    cells = grid.product(
        grid.values("model.path", "a/b c", "a:b c", "x" * 300, "x" * 299 + "y"),
        grid.values("objective.name", "grpo", "ppo"),
    )
    found = names(base, cells)
    assert len(set(found)) == len(cells) == 8
    assert all(re.fullmatch(r"[A-Za-z0-9_.=+-]{1,140}", name) for name in found)
    assert found[0] == "path=a-b-c_grpo"
    assert names(base, cells) == found, "the same each time"


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        (grid.values("objective.dual.nonsense", 1), "nonsense=1: unknown config field objective.dual.nonsense; known: .*coef"),
        (grid.values("nonsense.field", 1), "unknown config field nonsense"),
        (grid.values("seed.of.all", 1), "seed is no section"),
        (grid.values("objective.dual", 1), "objective.dual is a section"),
        (grid.values("objective.kl_coef", 1), "objective.kl_coef is now objective.kl.coef"),
        (grid.values("objective.name", "nope"), "objective.name='nope'"),
        (grid.values("trainer.num_epochs", 0), "num_epochs=0: .*trainer.num_epochs"),
        (grid.product(grid.values("objective.name", "ppo_clip"), grid.values(CLIP, 0.2, 1.5)), "clip=1.5: .*clip_low"),
        (
            grid.product(grid.values("objective.name", "ppo_clip"), grid.values("objective.dual.coef", 1, 2)),
            "cells ppo_clip_coef=1 and ppo_clip_coef=2 are the same run",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_run_is_refused_by_name(base, cells, message):
    with pytest.raises(UsageError, match=message):
        plan(base, cells)
