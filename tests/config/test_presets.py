"""Presets set what their sources say, and another loss on top of one leaves its foreign constants behind."""

import re

import pytest

from r2vpo_jax import config, losses
from r2vpo_jax.config import PRESETS, make_objective
from tests.helpers.paths import ROOT

R2VPO = {"penalty_scope": "token", "penalty_weight": "none", "negative_factor": 1.0}
# What a preset has unless its row below says otherwise.
COMMON = {
    "loss": {"reduction": "token_mean", "entropy_coef": 0.0, "imitation_coef": 0.0},
    "dual": {
        "adaptive": False,
        "coef": 0.0,
        "budget": 0.04,
        "step": 0.5,
        "max_step": 1.0,
        "max_coef": 50.0,
        "rule": "projected",
        "signal": "auto",
        "measure": "before",
        "smoothing": 0.0,
        "carry": 0.0,
        "proportional": 0.0,
        "normalize": False,
    },
    "advantage": {
        "estimator": "group_relative",
        "scale": "std",
        "baseline": "estimator",
        "discount": 1.0,
        "trace_decay": 0.95,
        "whiten": True,
        "value_coef": 0.5,
        "value_clip": 0.2,
    },
    "groups": {
        "zero_variance": "keep",
        "max_resamples": 10,
        "verifier_errors": "abstain",
        "truncated": "keep",
        "overlong_penalty": 0.0,
        "overlong_buffer": 0.2,
    },
    "kl": {"coef": 0.0, "to": "reference", "where": "loss", "estimator": "k3", "corrected": False, "target": None},
    "correction": {
        "mode": "none",
        "scope": "token",
        "max_weight": 2.0,
        "min_weight": 0.0,
        "filter": "none",
        "filter_high": None,
        "filter_low": 0.999,
        "off_policy_threshold": 0.0,
        "step_scaling": "none",
        "step_reference": 1.0,
    },
}
PPO = {"clip_low": 0.2, "clip_high": 0.2, "dual_clip": None}
GPPO = {"clip_low": 0.2, "clip_high": 0.28, "keep_low": 1.0, "keep_high": 1.0, "dual_clip": 10.0}
IMITATION = {"loss": {"imitation_coef": 0.1}}
DPPO = {"max_ratio": 1e4}
UNSCALED = {"advantage": {"scale": "none"}}
SEQUENCE_MEAN = {"loss": {"reduction": "sequence_mean"}}
CONSTANT_LENGTH = {"loss": {"reduction": "constant_length"}}

# preset: (loss, its constants in force, what else differs from COMMON)
EXPECTED = {
    "r2vpo": (
        "r2vpo",
        R2VPO,
        {"dual": {"adaptive": True, "coef": 1.0, "measure": "after", "carry": 4.0}},
    ),
    "r2vpo_before": ("r2vpo", R2VPO, {"dual": {"adaptive": True, "coef": 1.0}}),
    # 1 / (2 sqrt(0.04)), the multiplier of a budget of 0.04 with advantages of unit deviation.
    "r2vpo_fixed": ("r2vpo", R2VPO, {"dual": {"coef": 2.5}}),
    "policy_gradient": ("policy_gradient", {}, {}),
    "ppo_clip": ("ppo_clip", PPO, {}),
    # arXiv 2402.03300: 1 / |o_i| in each response, KL k3 in the loss, beta 0.04 (section 4.2).
    "grpo": ("ppo_clip", PPO, SEQUENCE_MEAN | {"kl": {"coef": 0.04}}),
    # arXiv 2503.20783: neither the deviation nor the length divides, no KL.
    "dr_grpo": ("ppo_clip", PPO, CONSTANT_LENGTH | {"advantage": {"scale": "none"}}),
    # arXiv 2503.14476: bounds 0.2 and 0.28, dynamic sampling, a buffer of 4,096 of 20,480 tokens; no KL. Its penalty of 1
    # is half of what lies between its rewards -1 and 1.
    "dapo": (
        "ppo_clip",
        PPO | {"clip_high": 0.28},
        {"groups": {"zero_variance": "resample", "overlong_penalty": 0.5}},
    ),
    # arXiv 2402.14740: REINFORCE of whole sequences, the KL is part of the return.
    "rloo": (
        "policy_gradient",
        {},
        CONSTANT_LENGTH
        | {
            "advantage": {"estimator": "leave_one_out"},
            "kl": {"coef": 0.05, "where": "reward", "estimator": "k1"},
        },
    ),
    # arXiv 2501.03262: k1 in the reward of each token; with a baseline k2 in the loss.
    "reinforce_pp": (
        "ppo_clip",
        PPO,
        {"advantage": {"estimator": "reinforce_pp"}, "kl": {"coef": 0.01, "where": "reward", "estimator": "k1"}},
    ),
    "reinforce_pp_baseline": (
        "ppo_clip",
        PPO,
        {"advantage": {"estimator": "reinforce_pp_baseline"}, "kl": {"coef": 0.01, "estimator": "k2"}},
    ),
    # arXiv 1707.06347: clip 0.2, lambda 0.95; the value clip and coefficient are those of its implementation.
    "ppo": ("ppo_clip", PPO, {"advantage": {"estimator": "gae"}}),
    # The same, section 4: no clip, KL(behavior || policy) steered to a target of 0.01.
    "ppo_kl": ("policy_gradient", {}, {"kl": {"coef": 1.0, "to": "behavior", "target": 0.01}}),
    "cispo": ("cispo", {"min_ratio": 0.0, "max_ratio": 5.0}, {}),
    "gspo": ("gspo", {"clip_low": 3e-4, "clip_high": 4e-4}, SEQUENCE_MEAN),
    "spo": ("spo", {"epsilon": 0.2}, {}),
    "m2po": ("m2po", {"budget": 0.04}, {}),
    "gmpo": ("gmpo", {"log_clip": 0.4}, SEQUENCE_MEAN),
    "sapo": ("sapo", {"tau_positive": 1.0, "tau_negative": 1.05}, SEQUENCE_MEAN),
    "vespo": (
        "vespo",
        {"power_positive": 2.0, "decay_positive": 3.0, "power_negative": 3.0, "decay_negative": 2.0},
        {},
    ),
    "topr": ("topr", {"max_ratio": 1.0}, CONSTANT_LENGTH),
    # The authors' code (UniRL) sums tokens over a constant and does not divide by the deviation.
    "drpo": ("drpo", {"epsilon": 12.5}, CONSTANT_LENGTH | UNSCALED),
    "dro": ("dro", {"beta": 0.1}, {}),
    # Its penalty is written 0.001 (log r)^2, and beta multiplies (log r)^2 / 2.
    "prime_rl": (
        "dppo_tv",
        {"divergence_low": 0.2, "divergence_high": 0.2, "max_ratio": 5e8, "beta": 0.002},
        UNSCALED,
    ),
    # verl's script for both: no deviation, a cap of 10,000.
    "dppo_tv": (
        "dppo_tv",
        DPPO | {"divergence_low": 0.15, "divergence_high": 0.15, "beta": 0.0},
        CONSTANT_LENGTH | UNSCALED,
    ),
    "dppo_kl": ("dppo_kl", DPPO | {"divergence_low": 0.05, "divergence_high": 0.05}, CONSTANT_LENGTH | UNSCALED),
    # KlearReasoner's scripts: 1.28, a dual clip of 10, and 0.1 times the mean -log pi of right responses.
    "gppo": ("gppo", GPPO, IMITATION),
    # The scripts of the published beta_1: 1.2 and 10.
    "ce_gppo": ("gppo", GPPO | {"clip_high": 0.2, "keep_low": 0.5}, IMITATION),
    # Archer2.0's scripts: k3 in the loss.
    "aspo": ("aspo", {"clip_low": 0.2, "clip_high": 0.2, "dual_clip": 3.0}, {"kl": {"coef": 0.001}}),
    "luspo": ("luspo", {"clip_low": 2e-3, "clip_high": 2.5e-3}, SEQUENCE_MEAN),
    # The scripts of tajwarfahim/maxrl: bounds of 0.2, no KL.
    "max_rl": ("ppo_clip", PPO, {"advantage": {"scale": "mean"}}),
    # The scripts of mit-han-lab/vcpo: no clip, sequence weights up to 8, the root of the sample size, its own baseline.
    "vcpo": (
        "policy_gradient",
        {},
        SEQUENCE_MEAN
        | {
            "advantage": {"baseline": "minimum_variance"},
            "correction": {"mode": "truncate", "scope": "sequence", "max_weight": 8.0, "step_scaling": "sqrt"},
        },
    ),
}


def fields(objective):
    """{section: {field: value}} of everything but the names and the loss's own constants."""
    return {
        section: {
            name: value
            for name, value in vars(getattr(objective, section)).items()
            if (section, name) not in {("loss", "name"), ("loss", "options")}
        }
        for section in COMMON
    }


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_what_its_source_says(name):
    objective = make_objective(name)
    loss, constants, changes = EXPECTED[name]
    assert (objective.name, objective.loss.name) == (name, loss)
    assert objective.loss.options == constants
    assert fields(objective) == {section: COMMON[section] | changes.get(section, {}) for section in COMMON}
    # The same by way of a whole configuration, where fields without effect are those of the defaults anyway.
    assert config.from_dict({"objective": {"name": name}}).objective == objective


def test_every_preset_is_in_the_table_and_in_the_documentation():
    assert set(EXPECTED) == set(PRESETS)
    text = (ROOT / "docs" / "algorithms" / "objectives.md").read_text()
    headings = {name for bold in re.findall(r"\*\*(`[^*]+`)\*\*", text) for name in re.findall(r"`([^`]+)`", bold)}
    assert headings == set(PRESETS)
    assert {loss for loss, _, _ in EXPECTED.values()} == set(losses.names()), "every loss has a preset"


def test_the_default_is_r2vpo():
    assert config.Config().objective == make_objective() == make_objective("r2vpo")


@pytest.mark.parametrize("name", PRESETS)
def test_what_a_preset_needs(name):
    objective = make_objective(name)
    assert objective.critic == (name == "ppo")
    assert objective.needs_reference == (name in ("grpo", "rloo", "reinforce_pp", "reinforce_pp_baseline", "aspo"))
    assert objective.has_multiplier == name.startswith("r2vpo")
    assert objective.variance_budget == (0.04 if name in ("r2vpo", "r2vpo_before") else None)


def test_a_critic_and_a_reference_come_with_what_needs_them():
    assert make_objective(advantage={"estimator": "gae"}).critic
    assert make_objective(kl={"coef": 0.1}).needs_reference
    assert not make_objective(kl={"coef": 0.1, "to": "behavior"}).needs_reference
    assert not make_objective("grpo", kl={"coef": 0.0}).needs_reference


def test_another_loss_on_top_of_a_preset_leaves_its_foreign_constants_behind():
    """DAPO's sampling with R2VPO's loss: its clip has no meaning there; what is given stays refused."""
    objective = make_objective("dapo", loss={"name": "r2vpo"}, dual={"adaptive": True})
    assert objective.loss.options == R2VPO
    assert (objective.groups.zero_variance, objective.groups.overlong_penalty) == ("resample", 0.5)
    assert make_objective("m2po", loss={"name": "ppo_clip"}).loss.options == PPO
    assert make_objective("ppo_clip", loss={"name": "m2po"}).loss.options == {"budget": 0.04}
    # A constant that both have is the preset's.
    assert make_objective("dapo", loss={"name": "aspo"}).loss.options["clip_high"] == 0.28
    with pytest.raises(ValueError, match="loss.options.clip_high is not a hyper-parameter of loss r2vpo"):
        make_objective("dapo", loss={"name": "r2vpo", "options": {"clip_high": 0.3}})


def test_what_is_given_wins_over_the_preset():
    objective = make_objective(
        "dapo",
        loss={"options": {"clip_high": 0.4}},
        groups={"zero_variance": "drop", "overlong_penalty": 0.0},
    )
    assert objective.loss.options == PPO | {"clip_high": 0.4}
    assert (objective.groups.zero_variance, objective.groups.overlong_penalty) == ("drop", 0.0)
    assert make_objective("ppo", advantage={"whiten": False}).advantage.whiten is False
    assert make_objective("r2vpo", dual={"adaptive": False}).dual.adaptive is False
    for name in ("r2vpo", "r2vpo_fixed", "policy_gradient"):
        assert make_objective(name, dual={"coef": 7.0}).dual.coef == 7.0


def test_none_is_as_good_as_absent():
    blank = {"loss": {"name": None, "options": {"clip_low": None}}, "kl": {"coef": None}, "groups": {"truncated": None}}
    assert make_objective("grpo", **blank) == make_objective("grpo")
