"""Grids: how cells are put together (the docstrings have examples), and how they come through flags and files."""

import numpy as np
import pytest

from r2vpo_jax import config
from r2vpo_jax.config import SweepConfig, grid
from tests.config.test_flags import parsed

CLIP = ("objective.loss.options.clip_low", "objective.loss.options.clip_high")
CELLS = grid.product(
    grid.chain(
        grid.product(grid.values("objective.name", "r2vpo_fixed"), grid.values("objective.dual.coef", 0.5, 2)),
        grid.product(grid.values("objective.name", "ppo_clip"), grid.values(CLIP, 0.2)),
    ),
    grid.values("replay.lag", 0, 8),
)


def test_products_of_chains():
    assert len(CELLS) == 6
    assert CELLS[1] == {"objective.name": "r2vpo_fixed", "objective.dual.coef": 0.5, "replay.lag": 8}
    assert CELLS[-1] == {"objective.name": "ppo_clip", CLIP[0]: 0.2, CLIP[1]: 0.2, "replay.lag": 8}
    assert grid.product() == ({},)
    assert grid.product(CELLS, ()) == ()


def test_grids_are_not_changed_by_what_is_made_of_them():
    one = grid.values("replay.lag", 0)
    grid.chain(one)[0]["replay.lag"] = 5
    grid.product(one)[0]["replay.lag"] = 5
    assert one == ({"replay.lag": 0},)


def test_values_are_plain():
    cells = grid.values("optimizer.learning_rate", np.linspace(0.5, 1.0, 2))
    assert [type(cell["optimizer.learning_rate"]) for cell in cells] == [float, float]
    assert grid.values("objective.kl.target", None, 0.1)[0] == {"objective.kl.target": None}
    assert grid.values("sampler.prompt_buckets", [(16, 32)]) == ({"sampler.prompt_buckets": (16, 32)},)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: grid.values("replay.lag"), "replay.lag needs at least one value"),
        (lambda: grid.values("replay.lag", range(0)), "replay.lag needs at least one value"),
        (lambda: grid.values("replay.lag", 1, 2, 1), "replay.lag has the value 1 twice"),
        (lambda: grid.values((), 1), "a grid's path"),
        (lambda: grid.values(0.1, 0.2), "a grid's path"),
        (lambda: grid.values(("replay.lag", "replay.lag"), 1), "a path twice"),
        (lambda: grid.values("objective.dual", {"coef": 1}), "objective.dual has dict"),
        (lambda: grid.values("replay.lag", object()), "must be a number"),
        (lambda: grid.product(CELLS, grid.values("replay.lag", 1)), "both set replay.lag"),
        (lambda: grid.zip_(CELLS, CELLS), "two zipped grids both set objective.name"),
        (lambda: grid.zip_(CELLS, grid.values("seed", 1)), "the same length, got 6 and 1"),
        (lambda: grid.from_text("{"), "must be JSON"),
        (lambda: grid.from_text('{"replay.lag": 1}'), "a list of objects"),
    ],
)
def test_what_is_wrong_is_said(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"cells": ()}, "at least one cell"),
        ({"seeds": ()}, "at least one seed"),
        ({"seeds": (1, 1)}, "seeds has a value twice"),
        ({"cells": grid.chain(CELLS, CELLS[:1])}, "cells has a cell twice: .*r2vpo_fixed"),
        ({"cells": grid.values("seed", 1, 2)}, "sweep.seeds"),
    ],
)
def test_sweeps_that_make_no_sense_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        SweepConfig(**given)


def test_a_sweep_comes_through_its_config_dict_and_flags(tmp_path):
    sweep = SweepConfig(cells=CELLS, seeds=range(2))
    assert SweepConfig(**config.to_config_dict(sweep).to_dict()) == sweep
    assert (sweep.cells, sweep.seeds) == (CELLS, (0, 1))
    file = tmp_path / "own.py"
    file.write_text(
        "from ml_collections import config_dict\nfrom r2vpo_jax import config\n"
        "def get_config():\n    sweep = config.SweepConfig(cells=config.grid.values('replay.lag', 0, 8))\n"
        "    return config_dict.ConfigDict({'base': config.make(), 'sweep': config.to_config_dict(sweep)})\n"
    )
    values = parsed(
        file,
        "--config.sweep.seeds=(3, 4)",
        '--config.sweep.cells=[{"objective.name": "grpo"}]',
        "--config.base.trainer.num_epochs=7",
    )
    assert SweepConfig(**values.sweep.to_dict()) == SweepConfig(cells=({"objective.name": "grpo"},), seeds=(3, 4))
    assert values.base.trainer.num_epochs == 7
    assert SweepConfig(**parsed(file).sweep.to_dict()).cells == ({"replay.lag": 0}, {"replay.lag": 8})


def test_cells_are_shown_one_a_line():
    lines = config.describe(SweepConfig(cells=CELLS)).splitlines()
    assert lines[1].split() == [
        "*",
        "cells[1]",
        "objective.name=r2vpo_fixed",
        "objective.dual.coef=0.5",
        "replay.lag=8",
    ]
    assert "(the base)" in config.describe(SweepConfig())


@pytest.mark.parametrize("name", ["presets", "variance_coefs", "variance_budgets", "clips"])
def test_names_of_before_are_told_how_to_say_it_now(name):
    assert config.new_name(f"sweep.{name}").startswith("part of sweep.cells, in the config file: grid.values(")
