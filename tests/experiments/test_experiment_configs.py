"""Every file of experiments/configs is a valid configuration, for every word that may follow its colon."""

import importlib
import pathlib

import pytest

from experiments.configs import math_reasoning
from r2vpo_jax import config

FOLDER = pathlib.Path(math_reasoning.__file__).parent
RUNS = sorted(p.stem for p in FOLDER.glob("*.py") if "math_run(choice" in p.read_text() and p.stem != "math_reasoning")
CHOICES = [*math_reasoning.METHODS, *(f"{method},smoke" for method in math_reasoning.METHODS)]


def get(name, *choice):
    return config.from_flags(importlib.import_module(f"experiments.configs.{name}").get_config(*choice))


def test_there_is_a_file_for_each_published_run():
    assert set(RUNS) == {
        "deepseek_r1_distill_qwen_1_5b", "openpangu_1b", "openpangu_7b", "qwen3_0_6b", "qwen3_1_7b", "qwen3_4b", "qwen3_8b",
    }  # fmt: skip


@pytest.mark.parametrize("name", ["arithmetic", "arithmetic_stale", "gsm8k_tiny"])
def test_small_runs(name):
    get(name)


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("name", RUNS)
def test_published_runs(name, choice):
    run = get(name, choice)
    assert run.task.name == "text"
    assert run.task.prompt.bos is (True if "pangu" in name else None)
    assert run.task.prompt.thinking is (True if "qwen3" in name else None)
    sizes = run.task.prompt.max_length, run.task.text.max_response_length
    sizes += run.trainer.prompts_per_rollout, run.sampler.group_size
    assert sizes == ((512, 32, 8, 4) if choice.endswith("smoke") else (2048, 8192, 128, 16))


def test_the_methods_are_what_they_are_called():
    on, off, grpo, dapo = (get("qwen3_8b", method) for method in math_reasoning.METHODS)
    assert on == get("qwen3_8b")
    assert on.objective == off.objective
    assert (on.objective.loss.name, on.objective.dual.adaptive) == ("r2vpo", True)
    assert (on.replay.lag, off.replay.lag) == (0, 4)
    assert (grpo.objective.loss.name, grpo.objective.loss.options["dual_clip"]) == ("ppo_clip", 3.0)
    assert grpo.objective.kl.coef == 0.0
    assert (dapo.objective.loss.options["clip_high"], dapo.objective.groups.zero_variance) == (0.28, "resample")
    assert dapo.objective.groups.overlong_penalty > 0
    # Everything else is the same for all.
    assert on.trainer == off.trainer == grpo.trainer == dapo.trainer
    assert on.task == off.task == grpo.task == dapo.task
    assert on.optimizer == off.optimizer == grpo.optimizer == dapo.optimizer


@pytest.mark.parametrize("choice", ["ppo", "r2vpo_on,tiny", "", "smoke"])
def test_unknown_choices_are_refused(choice):
    with pytest.raises(ValueError, match="METHOD or METHOD,SIZE"):
        get("qwen3_8b", choice)
