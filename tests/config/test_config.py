"""Configurations: presets, validation, and the way through flags."""

import dataclasses
import json

import pytest

from r2vpo_jax import config
from r2vpo_jax.config import (
    AlarmConfig,
    Config,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    ReplayConfig,
    SamplerConfig,
    TaskConfig,
    TrainerConfig,
)
from r2vpo_jax.config.task import PromptConfig, RewardConfig, VerifierConfig

ALLOWED = {"allow_single_update": True}


@pytest.mark.parametrize(
    ("name", "loss", "adaptive", "variance_coef"),
    [
        ("r2vpo", "r2vpo", True, 1.0),
        ("r2vpo_fixed", "r2vpo", False, 2.5),
        ("ppo_clip", "ppo_clip", False, 0.0),
        ("policy_gradient", "policy_gradient", False, 0.0),
    ],
)
def test_presets(name, loss, adaptive, variance_coef):
    objective = make_objective(name=name)
    assert (objective.loss.name, objective.dual.adaptive, objective.dual.coef) == (loss, adaptive, variance_coef)
    # What is given wins over the preset.
    assert make_objective(name=name, dual={"coef": 7.0}).variance_coef == 7.0


@pytest.mark.parametrize(
    ("section", "fields", "message"),
    [
        (ObjectiveConfig, {"name": "nope"}, "objective.name='nope' is not a preset"),
        (ObjectiveConfig, {"loss": "nope"}, "loss='nope' is unknown; one of r2vpo"),
        (ObjectiveConfig, {"variance_coef": -1.0}, "variance_coef must be >= 0"),
        (ObjectiveConfig, {"variance_budget": 0.0}, "variance_budget must be > 0"),
        (ObjectiveConfig, {"dual_step": 0.0}, "dual_step must be > 0"),
        (ObjectiveConfig, {"dual_max_step": 0.0}, "dual_max_step must be > 0"),
        (ObjectiveConfig, {"variance_coef": 60.0}, "max_variance_coef=50.0 is below"),
        (ObjectiveConfig, {"name": "ppo_clip", "adaptive": True}, "adaptive needs loss r2vpo"),
        (ObjectiveConfig, {"clip_low": 0.1}, "objective.loss.options.clip_low is not a hyper-parameter of loss r2vpo"),
        (
            ObjectiveConfig,
            {"name": "spo", "max_ratio": 2.0},
            "objective.loss.options.max_ratio is not a hyper-parameter of loss spo",
        ),
        (
            ObjectiveConfig,
            {"name": "ppo_clip", "m2_budget": 0.1},
            "objective.loss.options.budget is not a hyper-parameter of loss",
        ),
        (ObjectiveConfig, {"name": "ppo_clip", "clip_low": 1.5}, "objective: clip_low must be in"),
        (ObjectiveConfig, {"name": "gspo", "clip_high": -0.1}, "clip_high >= 0"),
        (ObjectiveConfig, {"name": "ppo_clip", "dual_clip": 1.0}, "dual_clip must be above 1"),
        (ObjectiveConfig, {"penalty_scope": "batch"}, "unknown penalty_scope"),
        (ObjectiveConfig, {"dual_rule": "newton"}, "dual_rule='newton' is unknown; one of projected"),
        (ObjectiveConfig, {"name": "ppo", "zero_variance": "drop"}, "needs a baseline from the group"),
        (ObjectiveConfig, {"kl_target": 0.1}, "kl_target adapts kl_coef, which must be > 0"),
        (
            ObjectiveConfig,
            {"kl_coef": 0.1, "kl_to": "behavior", "kl_in": "reward"},
            "kl_to=behavior goes into the loss",
        ),
        (ObjectiveConfig, {"kl_coef": 0.1, "kl_in": "reward", "kl_corrected": True}, "kl_corrected is for kl_in=loss"),
        (ObjectiveConfig, {"overlong_penalty": 1.0, "overlong_buffer": 0.0}, "needs overlong_buffer > 0"),
        (ObjectiveConfig, {"discount": 1.1}, r"discount must be in \[0, 1\]"),
        (ObjectiveConfig, {"max_weight": 0.5}, "max_weight must be >= 1"),
        (ObjectiveConfig, {"reduction": "sum"}, "reduction='sum' is unknown; one of token_mean"),
        (ObjectiveConfig, {"advantage": "td"}, "advantage='td' is unknown"),
        (ObjectiveConfig, {"advantage_scale": "mad"}, "advantage_scale='mad' is unknown"),
        (ObjectiveConfig, {"kl_coef": -0.1}, "kl_coef must be >= 0"),
        (ObjectiveConfig, {"kl_estimator": "k9"}, "kl_estimator='k9' is unknown; one of k1, k2, k3"),
        (TrainerConfig, {"num_iterations": 0}, "num_iterations must be at least 1"),
        (TrainerConfig, {"micro_batch_size": -2}, "micro_batch_size must be at least 1"),
        (TrainerConfig, {"samples_per_iteration": -1}, "samples_per_iteration must be at least 0"),
        (TrainerConfig, {"max_nonfinite_updates": -1}, "max_nonfinite_updates must be at least 0"),
        (TrainerConfig, {"prompts_per_rollout": 10}, "groups are not torn"),
        (ReplayConfig, {"lag": -1}, "replay.lag must be at least 0"),
        (ReplayConfig, {"capacity": 2, "draw": "oldest"}, "replay.draw='oldest' is unknown; one of newest"),
        (ReplayConfig, {"draw": "mixed"}, "needs older batches: set replay.capacity to at least 2"),
        (ReplayConfig, {"max_uses": 0}, "replay.max_uses must be at least 1"),
        (ReplayConfig, {"stale_fraction": 1.5}, r"stale_fraction must be in \[0, 1\]"),
        (AlarmConfig, {"patience": 0}, "alarms.patience must be at least 1"),
        (SamplerConfig, {"group_size": 1}, "group_size must be at least 2"),
        (SamplerConfig, {"temperature": 0.0}, "temperature must be > 0"),
        (OptimizerConfig, {"learning_rate": 0.0}, "learning_rate must be > 0"),
        (OptimizerConfig, {"warmup_updates": -1}, "warmup_updates must be >= 0"),
        (OptimizerConfig, {"schedule": "step"}, "schedule='step' is unknown"),
        (OptimizerConfig, {"final_fraction": 1.5}, "final_fraction must be in"),
        (OptimizerConfig, {"max_grad_norm": 0.0}, "max_grad_norm must be > 0"),
        (TaskConfig, {"name": "chess"}, "task.name='chess' is unknown"),
        (ModelConfig, {"compute_dtype": "float16"}, "model.compute_dtype='float16'"),
        (ModelConfig, {"param_dtype": "int8"}, "model.param_dtype='int8'"),
    ],
)
def test_values_out_of_range_name_their_field(section, fields, message):
    section()  # the defaults are fine
    with pytest.raises(ValueError, match=message):
        section(**fields)


def test_fields_that_must_fit_each_other():
    with pytest.raises(ValueError, match=r"a minibatch has 128 rows .*trainer\.micro_batch_size=48"):
        Config(trainer=TrainerConfig(micro_batch_size=48))
    with pytest.raises(ValueError, match="seed must be >= 0"):
        Config(seed=-1)
    single = {"num_minibatches": 1, "num_epochs": 1}
    with pytest.raises(ValueError, match="with one update a rollout on fresh data"):
        Config(trainer=TrainerConfig(**single))
    Config(trainer=TrainerConfig(**single, **ALLOWED))
    Config(trainer=TrainerConfig(**single), replay=ReplayConfig(lag=1))
    assert TrainerConfig(num_minibatches=1, num_epochs=1, **ALLOWED).updates_per_rollout == 1
    assert TrainerConfig(num_minibatches=4, num_epochs=3).updates_per_rollout == 12


def test_every_field_has_help():
    sections = [f.default_factory for f in dataclasses.fields(Config) if f.name != "seed"]
    assert {ObjectiveConfig, ReplayConfig, AlarmConfig} < set(sections)
    number = 1  # the seed
    for section in sections:
        for field in dataclasses.fields(section):
            if dataclasses.is_dataclass(field.type):
                sections.append(field.type)
            else:
                assert field.metadata["help"], (section, field.name)
                number += 1
    assert {PromptConfig, VerifierConfig, RewardConfig} < set(sections)
    assert len(config.describe(Config()).splitlines()) == number


# ---- from a config file through flags to the frozen dataclasses ----


def test_the_way_through_flags_changes_nothing():
    assert config.from_flags(config.make()) == Config()
    assert config.from_flags(config.to_config_dict(Config())) == Config()
    # And through the file in the run directory.
    made = config.from_flags(config.make(seed=3, sampler={"group_size": 8}, objective={"name": "ppo_clip"}))
    assert config.from_dict(json.loads(json.dumps(dataclasses.asdict(made)))) == made
    assert (made.seed, made.sampler.group_size, made.objective.loss.name) == (3, 8, "ppo_clip")


def test_overrides_leave_the_other_fields_open_to_flags():
    values = config.make(
        sampler={"group_size": 8}, objective={"name": "ppo_clip", "loss": {"options": {"clip_low": 0.1}}}
    )
    values.sampler.temperature = 0.5
    values.objective.loss.options.clip_high = 0.3
    made = config.from_flags(values)
    assert (made.sampler.group_size, made.sampler.temperature) == (8, 0.5)
    assert (made.objective.loss.options.clip_low, made.objective.loss.options.clip_high) == (0.1, 0.3)
    for section, kind in (("sampler", SamplerConfig), ("objective", ObjectiveConfig)):
        assert set(values[section]) == {field.name for field in dataclasses.fields(kind)}


def test_a_preset_chosen_by_a_flag_fills_the_rest():
    """The config file leaves the preset's fields open; what it sets stays."""
    values = config.make(objective={"dual": {"budget": 0.5}})
    values.objective.name = "r2vpo_fixed"
    objective = config.from_flags(values).objective
    assert (objective.dual.adaptive, objective.dual.coef, objective.dual.budget) == (False, 2.5, 0.5)


def test_flags_have_types():
    """A field that is None may be set to a value of its type only."""
    values = config.make()
    values.objective.dual.budget = 0.1
    values.model.path = "somewhere"
    with pytest.raises(TypeError):
        values.objective.dual.budget = "much"
    with pytest.raises((TypeError, ValueError)):
        values.trainer.num_iterations = "many"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"nonsense": 1}, "unknown config field nonsense; known: .*objective.*trainer"),
        ({"trainer": {"nonsense": 1}}, r"unknown config field trainer\.nonsense; known: .*num_iterations"),
    ],
)
def test_unknown_fields_are_named(values, message):
    with pytest.raises(ValueError, match=message):
        config.from_dict(values)


def test_configs_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().seed = 1
