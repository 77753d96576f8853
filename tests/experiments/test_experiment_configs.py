"""Every file of experiments/configs is a valid configuration, for every word that may follow its colon."""

import collections
import dataclasses
import importlib
import pathlib

import pytest

from experiments.configs import math_reasoning
from r2vpo_jax import config
from r2vpo_jax.sweeps import runs

CHOICES = [f"{method}{size}" for method in math_reasoning.METHODS for size in ("", ",smoke")]


def get(name, *choice):
    return config.from_flags(importlib.import_module(f"experiments.configs.{name}").get_config(*choice))


def published(choice):
    return config.from_flags(math_reasoning.get_config(choice))


def test_every_file_is_a_configuration_that_is_tried():
    files = {path.stem for path in pathlib.Path(math_reasoning.__file__).parent.glob("*.py")} - {"__init__"}
    sweeps = {name for name in files if name.startswith("sweep_")} | {"study"}  # test_study.py
    assert files - sweeps == {"arithmetic", "arithmetic_stale", "word_problems", "math_reasoning"}


@pytest.mark.parametrize("name", ["arithmetic", "arithmetic_stale", "word_problems"])
def test_small_runs(name):
    get(name)


@pytest.mark.parametrize(
    ("name", "choice", "cells", "number"),
    [
        ("sweep_variance", (), {"r2vpo_fixed": 4, "r2vpo": 4, "ppo_clip": 4}, 36),
        ("sweep_variance", ("smoke",), {"r2vpo_fixed": 2, "r2vpo": 2, "ppo_clip": 2}, 24),
        ("sweep_lora", (), {"r2vpo": 4}, 12),
        ("sweep_presets", (), dict.fromkeys(config.PRESETS, 1), len(config.PRESETS)),
    ],
)
def test_sweeps(name, choice, cells, number):
    values = importlib.import_module(f"experiments.configs.{name}").get_config(*choice)
    plan = runs.plan(values.base.to_dict(), config.SweepConfig(**values.sweep.to_dict()))
    assert collections.Counter(cell.objective for cell in plan.cells) == cells
    assert len(plan.runs) == number


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("name", math_reasoning.MODELS)
def test_published_runs(name, choice):
    run = published(f"{name},{choice}")
    assert run.task.name == "text"
    assert run.task.prompt.bos is (True if "pangu" in name else None)
    assert run.task.prompt.thinking is (True if "qwen3" in name else None)
    sizes = run.task.prompt.max_length, run.task.text.max_response_length
    sizes += run.trainer.prompts_per_rollout, run.sampler.group_size
    assert sizes == ((512, 32, 8, 4) if choice.endswith("smoke") else (2048, 8192, 128, 16))


def test_the_methods_are_what_they_are_called():
    on, off, grpo, dapo = (published(f"qwen3_8b,{method}") for method in math_reasoning.METHODS)
    assert on == published("qwen3_8b") == published("qwen3_8b,full")
    assert on.objective == off.objective
    assert (on.objective.loss.name, on.objective.dual.adaptive) == ("r2vpo", True)
    assert (on.replay.lag, off.replay.lag) == (0, 4)
    assert (grpo.objective.loss.name, grpo.objective.loss.options["dual_clip"], grpo.objective.kl.coef) == (
        "ppo_clip",
        3.0,
        0.0,
    )
    assert (dapo.objective.loss.options["clip_high"], dapo.objective.groups.zero_variance) == (0.28, "resample")
    assert dapo.objective.groups.overlong_penalty > 0
    # Everything else is the same for all, but what follows from the budget: 0.004 / 4, or the default of 0.04 / 4.
    floors = [run.trainer.max_noise_floor for run in (on, off, grpo, dapo)]
    assert floors == [on.objective.dual.budget / 4] * 2 + [0.01] * 2
    trainers = [dataclasses.replace(run.trainer, max_noise_floor=1.0) for run in (on, off, grpo, dapo)]
    assert trainers == [trainers[0]] * 4
    assert on.task == off.task == grpo.task == dapo.task
    assert on.optimizer == off.optimizer == grpo.optimizer == dapo.optimizer


def test_each_word_may_be_left_out_and_their_order_does_not_matter():
    assert get("math_reasoning") == published("deepseek_r1_distill_qwen_1_5b,r2vpo_on,full") == published("full")
    assert published("grpo") == published("deepseek_r1_distill_qwen_1_5b,grpo")
    assert published("smoke,qwen3_8b,dapo") == published("qwen3_8b,dapo,smoke")


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ("qwen3_8b,ppo", "'ppo' is unknown: .*methods: r2vpo_on, r2vpo_off, grpo, dapo; sizes: full, smoke"),
        ("qwen2_7b", "'qwen2_7b' is unknown: .*models: deepseek_r1_distill_qwen_1_5b, openpangu_1b"),
        ("qwen3_8b,grpo,tiny", "'tiny' is unknown: write MODEL,METHOD,SIZE"),
        ("", "'' is unknown"),
        ("qwen3_8b,,smoke", "'' is unknown"),
        ("qwen3_8b,qwen3_4b", "more than one model: qwen3_8b, qwen3_4b"),
        ("grpo,dapo", "more than one method: grpo, dapo"),
    ],
)
def test_other_choices_are_refused(choice, message):
    with pytest.raises(ValueError, match=message):
        published(choice)
