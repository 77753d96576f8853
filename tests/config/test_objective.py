"""Presets set what their sources say; what a loss does not take, or what does not go together, is refused."""

import dataclasses
import inspect
import json
import re

import pytest

from r2vpo_jax import config, losses
from r2vpo_jax.config.objective import ADVANTAGES, GROUP_ADVANTAGES, PRESETS, ObjectiveConfig
from tests.helpers.paths import ROOT

FIELDS = {field.name: field for field in dataclasses.fields(ObjectiveConfig)}
TRACED = {"variance_coef", "threshold"}  # the learner computes them
HYPER = {name: set(losses.hyperparameters(name)) - TRACED for name in losses.names()}

# What a preset has unless its row below says otherwise.
COMMON = {
    "reduction": "token_mean",
    "adaptive": False,
    "variance_coef": 0.0,
    "variance_budget": 0.04,
    "dual_step": 0.5,
    "dual_max_step": 1.0,
    "dual_rule": "projected",
    "dual_signal": "auto",
    "max_variance_coef": 50.0,
    "normalize_variance_coef": False,
    "advantage": "group_relative",
    "advantage_scale": "std",
    "discount": 1.0,
    "trace_decay": 0.95,
    "whiten_advantages": True,
    "value_coef": 0.5,
    "value_clip": 0.2,
    "zero_variance": "keep",
    "max_resamples": 10,
    "verifier_errors": "abstain",
    "truncated": "keep",
    "overlong_buffer": 0.2,
    "overlong_penalty": 0.0,
    "entropy_coef": 0.0,
    "kl_coef": 0.0,
    "kl_to": "reference",
    "kl_in": "loss",
    "kl_estimator": "k3",
    "kl_corrected": False,
    "kl_target": None,
    "correction": "none",
    "correction_scope": "token",
    "max_weight": 2.0,
    "min_weight": 0.0,
    "m2_budget": None,
}
PPO = {"clip_low": 0.2, "clip_high": 0.2, "dual_clip": None}
GPPO = {"clip_low": 0.2, "clip_high": 0.28, "keep_low": 1.0, "keep_high": 1.0, "dual_clip": 3.0}
DPPO = {"max_ratio": 20.0}

# preset: (loss, its constants in force, what else differs from COMMON)
EXPECTED = {
    "r2vpo": ("r2vpo", {"penalty_scope": "token"}, {"adaptive": True, "variance_coef": 1.0}),
    # 1 / (2 sqrt(0.04)), the multiplier of a budget of 0.04 with advantages of unit deviation.
    "r2vpo_fixed": ("r2vpo", {"penalty_scope": "token"}, {"variance_coef": 2.5}),
    "policy_gradient": ("policy_gradient", {}, {}),
    "ppo_clip": ("ppo_clip", PPO, {}),
    # arXiv 2402.03300: 1 / |o_i| in each response, KL k3 in the loss, beta 0.04 (section 4.2).
    "grpo": ("ppo_clip", PPO, {"reduction": "sequence_mean", "kl_coef": 0.04}),
    # arXiv 2503.20783: neither the deviation nor the length divides, no KL.
    "dr_grpo": ("ppo_clip", PPO, {"reduction": "constant_length", "advantage_scale": "none"}),
    # arXiv 2503.14476: bounds 0.2 and 0.28, dynamic sampling, a buffer of 4,096 of 20,480 tokens; no KL.
    "dapo": ("ppo_clip", PPO | {"clip_high": 0.28}, {"zero_variance": "resample", "overlong_penalty": 1.0}),
    # arXiv 2402.14740: REINFORCE of whole sequences, the KL is part of the return.
    "rloo": (
        "policy_gradient",
        {},
        {
            "reduction": "constant_length",
            "advantage": "leave_one_out",
            "kl_coef": 0.05,
            "kl_in": "reward",
            "kl_estimator": "k1",
        },
    ),
    # arXiv 2501.03262: k1 in the reward of each token; with a baseline k2 in the loss.
    "reinforce_pp": (
        "ppo_clip",
        PPO,
        {"advantage": "reinforce_pp", "kl_coef": 0.01, "kl_in": "reward", "kl_estimator": "k1"},
    ),
    "reinforce_pp_baseline": (
        "ppo_clip",
        PPO,
        {"advantage": "reinforce_pp_baseline", "kl_coef": 0.01, "kl_estimator": "k2"},
    ),
    # arXiv 1707.06347: clip 0.2, lambda 0.95; the value clip and coefficient are those of its implementation.
    "ppo": ("ppo_clip", PPO, {"advantage": "gae"}),
    # The same, section 4: no clip, KL(behavior || policy) steered to a target of 0.01.
    "ppo_kl": ("policy_gradient", {}, {"kl_coef": 1.0, "kl_to": "behavior", "kl_target": 0.01}),
    "cispo": ("cispo", {"min_ratio": 0.0, "max_ratio": 5.0}, {}),
    "gspo": ("gspo", {"clip_low": 3e-4, "clip_high": 4e-4}, {"reduction": "sequence_mean"}),
    "spo": ("spo", {"epsilon": 0.2}, {}),
    "m2po": ("m2po", {}, {"m2_budget": 0.04}),
    "gmpo": ("gmpo", {"log_clip": 0.4}, {"reduction": "sequence_mean"}),
    "sapo": ("sapo", {"tau_positive": 1.0, "tau_negative": 1.05}, {"reduction": "sequence_mean"}),
    "vespo": (
        "vespo",
        {"power_positive": 2.0, "decay_positive": 3.0, "power_negative": 3.0, "decay_negative": 2.0},
        {},
    ),
    "topr": ("topr", {"max_ratio": 1.0}, {"reduction": "constant_length"}),
    "drpo": ("drpo", {"epsilon": 12.5}, {}),
    "dro": ("dro", {"beta": 0.1}, {}),
    # Its penalty is written 0.001 (log r)^2, and beta multiplies (log r)^2 / 2.
    "prime_rl": (
        "dppo_tv",
        {"divergence_low": 0.2, "divergence_high": 0.2, "max_ratio": 5e8, "beta": 0.002},
        {"advantage_scale": "none"},
    ),
    "dppo_tv": (
        "dppo_tv",
        DPPO | {"divergence_low": 0.15, "divergence_high": 0.15, "beta": 0.0},
        {"reduction": "constant_length"},
    ),
    "dppo_kl": (
        "dppo_kl",
        DPPO | {"divergence_low": 0.05, "divergence_high": 0.05},
        {"reduction": "constant_length"},
    ),
    "gppo": ("gppo", GPPO, {}),
    "ce_gppo": ("gppo", GPPO | {"keep_low": 0.5}, {}),
    "aspo": ("aspo", {"clip_low": 0.2, "clip_high": 0.2, "dual_clip": 3.0}, {}),
    "luspo": ("luspo", {"clip_low": 2e-3, "clip_high": 2.5e-3}, {"reduction": "sequence_mean"}),
}


def in_force(objective):
    """The constants that the loss runs with: those that are set, over its own defaults."""
    parameters = inspect.signature(losses.get(objective.loss.name)).parameters
    return {name: parameters[name].default for name in HYPER[objective.loss.name]} | objective.hyperparameters()


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_what_its_source_says(name):
    objective = ObjectiveConfig(name=name)
    loss, constants, changes = EXPECTED[name]
    assert objective.loss.name == loss
    assert in_force(objective) == constants
    other = {field: getattr(objective, field) for field in FIELDS if field not in {"name", "loss", *constants}}
    unset = {field: None for field in other if field not in COMMON}  # the hyper-parameters of other losses
    assert other == COMMON | unset | changes


def test_every_preset_is_in_the_table_and_in_the_documentation():
    assert set(EXPECTED) == set(PRESETS)
    text = (ROOT / "docs" / "algorithms" / "objectives.md").read_text()
    headings = {name for bold in re.findall(r"\*\*(`[^*]+`)\*\*", text) for name in re.findall(r"`([^`]+)`", bold)}
    assert headings == set(PRESETS)
    assert {loss for loss, _, _ in EXPECTED.values()} == set(losses.names()), "every loss has a preset"


@pytest.mark.parametrize("name", PRESETS)
def test_what_a_preset_needs(name):
    objective = ObjectiveConfig(name=name)
    assert objective.critic == (name == "ppo")
    assert objective.needs_reference == (name in ("grpo", "rloo", "reinforce_pp", "reinforce_pp_baseline"))


def test_a_critic_and_a_reference_come_with_what_needs_them():
    assert ObjectiveConfig(advantage="gae").critic
    assert ObjectiveConfig(kl_coef=0.1).needs_reference
    assert not ObjectiveConfig(kl_coef=0.1, kl_to="behavior").needs_reference
    assert not ObjectiveConfig(name="grpo", kl_coef=0.0).needs_reference


@pytest.mark.parametrize("name", PRESETS)
def test_through_json_and_flags_and_back(name):
    objective = ObjectiveConfig(name=name, entropy_coef=0.25, max_resamples=3)
    assert ObjectiveConfig(**json.loads(json.dumps(dataclasses.asdict(objective)))) == objective
    assert hash(dataclasses.replace(objective)) == hash(objective)  # it is a static argument of jitted functions
    whole = config.Config(objective=objective)
    assert config.from_dict(json.loads(json.dumps(dataclasses.asdict(whole)))) == whole
    assert config.from_flags(config.to_config_dict(whole)) == whole
    made = config.make(objective={"name": name, "entropy_coef": 0.25, "max_resamples": 3})
    assert config.from_flags(made) == whole


def test_another_loss_on_top_of_a_preset_leaves_its_foreign_constants_behind():
    """DAPO's sampling with R2VPO's loss: its clip has no meaning there; what is given stays refused."""
    objective = ObjectiveConfig(name="dapo", loss="r2vpo", adaptive=True)
    assert (objective.loss.options.clip_high, objective.groups.zero_variance, objective.groups.overlong_penalty) == (
        None,
        "resample",
        1.0,
    )
    assert ObjectiveConfig(name="m2po", loss="ppo_clip").m2_budget is None
    assert ObjectiveConfig(name="ppo_clip", loss="m2po").m2_budget == 0.04
    with pytest.raises(ValueError, match="clip_high is not a hyper-parameter of loss r2vpo"):
        ObjectiveConfig(name="dapo", loss="r2vpo", clip_high=0.3)


def test_what_is_given_wins_over_the_preset():
    objective = ObjectiveConfig(name="dapo", clip_high=0.4, zero_variance="drop", overlong_penalty=0.0)
    assert in_force(objective) == PPO | {"clip_high": 0.4}
    assert (objective.groups.zero_variance, objective.groups.overlong_penalty) == ("drop", 0.0)
    assert ObjectiveConfig(name="ppo", whiten_advantages=False).whiten_advantages is False
    assert ObjectiveConfig(name="r2vpo", adaptive=False).adaptive is False


# ---- hyper-parameters ----


def test_every_hyper_parameter_is_a_field_whose_help_says_whose_it_is():
    owners = {}
    for loss, names in HYPER.items():
        for name in names:
            owners.setdefault(name, set()).add(loss)
    assert len(owners) > 15
    for name, takers in owners.items():
        assert FIELDS[name].default is None, name
        said, colon, _ = FIELDS[name].metadata["help"].partition(":")
        assert colon, name
        assert set(said.split(", ")) == takers, name


@pytest.mark.parametrize("loss", losses.names())
def test_a_hyper_parameter_that_the_loss_does_not_take_is_refused(loss):
    """policy_gradient as the preset, for it sets none."""
    foreign = set().union(*HYPER.values()) - HYPER[loss]
    assert foreign
    for name in sorted(foreign):
        with pytest.raises(ValueError, match=f"objective.{name} is not a hyper-parameter of loss {loss}$"):
            ObjectiveConfig(name="policy_gradient", loss=loss, **{name: "token" if name == "penalty_scope" else 1.0})
    if loss != "m2po":
        with pytest.raises(ValueError, match="objective.loss.options.budget is not a hyper-parameter of loss"):
            ObjectiveConfig(name="policy_gradient", loss=loss, m2_budget=0.1)


@pytest.mark.parametrize("loss", [loss for loss in losses.names() if HYPER[loss]])
def test_each_hyper_parameter_reaches_its_loss(loss):
    values = {"penalty_scope": "sequence", "dual_clip": 1.5, "max_ratio": 1.25, "power_positive": 1.0}
    given = {name: values.get(name, 0.125) for name in HYPER[loss]}
    objective = ObjectiveConfig(name="policy_gradient", loss=loss, **given)
    assert objective.hyperparameters() == given
    assert in_force(ObjectiveConfig(name="policy_gradient", loss=loss)) != given


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "ppo_clip", "clip_low": 1.5}, "clip_low must be in"),
        ({"name": "ppo_clip", "dual_clip": 1.0}, "dual_clip must be above 1"),
        ({"name": "gspo", "clip_high": -0.1}, "clip_high >= 0"),
        ({"name": "luspo", "clip_low": -0.1}, "clip_low must be in"),
        ({"name": "aspo", "dual_clip": 0.5}, "dual_clip must be above 1"),
        ({"name": "cispo", "min_ratio": 1.5}, "min_ratio <= 1 <= max_ratio"),
        ({"name": "spo", "epsilon": 0.0}, "epsilon must be > 0"),
        ({"name": "drpo", "epsilon": -1.0}, "epsilon must be > 0"),
        ({"name": "dro", "beta": -0.1}, "beta must be >= 0"),
        ({"name": "gmpo", "log_clip": -0.1}, "log_clip must be >= 0"),
        ({"name": "gppo", "keep_low": -1.0}, "keep_low and keep_high must be >= 0"),
        ({"name": "dppo_tv", "divergence_low": 1.5}, r"must be in \(0, 1\]"),
        ({"name": "dppo_kl", "divergence_high": 0.0}, r"must be in \(0, inf\]"),
        ({"name": "dppo_kl", "max_ratio": 0.5}, "max_ratio must be >= 1"),
        ({"name": "sapo", "tau_negative": 0.0}, "tau_positive and tau_negative must be > 0"),
        ({"name": "vespo", "decay_negative": 0.0}, "decays > 0"),
        ({"name": "topr", "max_ratio": 0.0}, "max_ratio must be > 0"),
        ({"name": "r2vpo", "penalty_scope": "batch"}, "unknown penalty_scope 'batch'"),
    ],
)
def test_the_loss_says_which_constant_is_out_of_range(settings, message):
    with pytest.raises(ValueError, match=f"^objective: .*{message}"):
        ObjectiveConfig(**settings)


# ---- choices, ranges and combinations ----


@pytest.mark.parametrize(
    ("field", "choices"),
    {
        "loss": losses.names(),
        "reduction": ("token_mean", "sequence_mean", "constant_length"),
        "dual_rule": ("projected", "multiplicative"),
        "dual_signal": ("auto", "absolute", "excess"),
        "advantage": ("group_relative", "leave_one_out", "reinforce_pp", "reinforce_pp_baseline", "gae"),
        "advantage_scale": ("std", "std_biased", "none"),
        "zero_variance": ("keep", "drop", "resample"),
        "verifier_errors": ("abstain", "wrong"),
        "truncated": ("keep", "mask"),
        "kl_to": ("reference", "behavior"),
        "kl_in": ("loss", "reward"),
        "kl_estimator": ("k1", "k2", "k3"),
        "correction": ("none", "truncate", "mask"),
        "correction_scope": ("token", "sequence"),
    }.items(),
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_choices(field, choices):
    with pytest.raises(ValueError, match=f"objective.{field}='nope' is unknown; one of {', '.join(choices)}$"):
        ObjectiveConfig(**{"name": "policy_gradient", field: "nope"})
    for choice in choices:
        assert getattr(ObjectiveConfig(**{"name": "policy_gradient", field: choice}), field) == choice


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("field", "good", "bad"),
    [
        ("variance_coef", [0.0, 50.0], [-0.1, 50.1, NAN, INF]),
        ("variance_budget", [1e-6], [0.0, -1.0, NAN]),
        ("dual_step", [1e-6], [0.0, NAN]),
        ("dual_max_step", [1e-6], [0.0, NAN]),
        ("max_variance_coef", [1.0, 1e6], [0.9, NAN]),  # r2vpo starts at 1
        ("discount", [0.0, 1.0], [-0.1, 1.1, NAN]),
        ("trace_decay", [0.0, 1.0], [-0.1, 1.1, NAN]),
        ("value_coef", [0.0, 2.0], [-0.1, NAN]),
        ("value_clip", [0.0, 2.0], [-0.1, NAN]),
        ("max_resamples", [1, 100], [0, -1]),
        ("overlong_buffer", [0.0, 1.0], [-0.1, 1.1, NAN]),
        ("overlong_penalty", [0.0, 2.0], [-0.1, NAN]),
        ("entropy_coef", [0.0, 2.0], [-0.1, NAN]),
        ("kl_coef", [0.0, 2.0], [-0.1, NAN]),
        ("max_weight", [1.0, 100.0], [0.9, NAN]),
        ("min_weight", [0.0, 1.0], [-0.1, 1.1, NAN]),
    ],
)
def test_ranges(field, good, bad):
    for value in good:
        assert getattr(ObjectiveConfig(**{field: value}), field) == value
    for value in bad:
        with pytest.raises(ValueError, match=f"objective.*{field}"):
            ObjectiveConfig(**{field: value})


@pytest.mark.parametrize(
    ("settings", "message", "cure"),
    [
        ({"name": "ppo_clip", "adaptive": True}, "adaptive needs loss r2vpo, .* is ppo_clip", {"name": "r2vpo"}),
        ({"variance_coef": 60.0}, "max_variance_coef=50.0 is below variance_coef=60", {"max_variance_coef": 60.0}),
        *(
            (
                {"advantage": a, "zero_variance": z},
                f"zero_variance={z} needs a baseline .*advantage={a} ",
                {"advantage": g},
            )
            for z in ("drop", "resample")
            for a, g in zip(("gae", "reinforce_pp"), GROUP_ADVANTAGES[1:], strict=True)
        ),
        ({"kl_target": 0.1}, "kl_target adapts kl_coef, which must be > 0", {"kl_coef": 0.1}),
        ({"kl_target": 0.0, "kl_coef": 0.1}, "kl_target must be > 0", {"kl_target": 0.1}),
        ({"kl_to": "behavior", "kl_in": "reward"}, "kl_to=behavior goes into the loss", {"kl_in": "loss"}),
        ({"kl_to": "behavior", "kl_corrected": True}, "needs no correction", {"kl_to": "reference"}),
        ({"kl_in": "reward", "kl_corrected": True}, "kl_corrected is for kl_in=loss", {"kl_in": "loss"}),
        ({"overlong_penalty": 1.0, "overlong_buffer": 0.0}, "needs overlong_buffer > 0", {"overlong_buffer": 0.1}),
        ({"name": "spo", "m2_budget": 0.1}, "m2_budget is not a hyper-parameter of loss", {"name": "m2po"}),
        ({"name": "m2po", "m2_budget": 0.0}, "m2_budget must be > 0", {"m2_budget": 0.1}),
        ({"name": "nope"}, "name='nope' is not a preset; one of aspo, ce_gppo, ", {"name": "aspo"}),
    ],
)
def test_what_does_not_go_together_is_refused_and_the_cure_is_not(settings, message, cure):
    with pytest.raises(ValueError, match=f"objective.*{message}"):
        ObjectiveConfig(**settings)
    ObjectiveConfig(**settings | cure)


def test_a_group_is_the_baseline_of_those_that_can_drop_it():
    assert set(GROUP_ADVANTAGES) == set(ADVANTAGES) - {"gae", "reinforce_pp"}
    for advantage in GROUP_ADVANTAGES:
        assert ObjectiveConfig(advantage=advantage, zero_variance="drop").zero_variance == "drop"
