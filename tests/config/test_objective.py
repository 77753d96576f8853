"""What a loss does not take, what is out of range, and what does not go together, is refused by its name."""

import pytest

from r2vpo_jax import losses
from r2vpo_jax.advantages import ESTIMATORS
from r2vpo_jax.config import make_objective
from tests.helpers.trees import nested

HYPER = {name: losses.hyperparameters(name) for name in losses.names()}


def objective(settings):
    """The objective with fields by their paths."""
    return make_objective(**nested(settings))


def value_at(node, path):
    for name in path.split("."):
        node = node[name] if isinstance(node, dict) else getattr(node, name)
    return node


# ---- hyper-parameters of the loss ----


@pytest.mark.parametrize("loss", losses.names())
def test_a_hyper_parameter_that_the_loss_does_not_take_is_refused(loss):
    """policy_gradient as the preset, for it sets none. What training computes is set by nobody."""
    foreign = {name for taken in HYPER.values() for name in taken} | {"variance_coef", "threshold"}
    foreign -= set(HYPER[loss])
    assert len(foreign) > 15
    takes = f"it takes {', '.join(HYPER[loss])}" if HYPER[loss] else "it takes none"
    for name in sorted(foreign):
        with pytest.raises(
            ValueError, match=f"^objective.loss.options.{name} is not a hyper-parameter of loss {loss}; {takes}$"
        ):
            objective({"name": "policy_gradient", "loss.name": loss, f"loss.options.{name}": 1.0})


@pytest.mark.parametrize("loss", [loss for loss in losses.names() if HYPER[loss]])
def test_each_hyper_parameter_reaches_its_loss(loss):
    values = {
        "penalty_scope": "sequence",
        "penalty_weight": "both",
        "dual_clip": 1.5,
        "max_ratio": 1.25,
        "power_positive": 1.0,
    }
    given = {name: values.get(name, 0.125) for name in HYPER[loss]}
    plain = make_objective("policy_gradient", loss={"name": loss})
    made = make_objective("policy_gradient", loss={"name": loss, "options": given})
    assert made.loss.options == given != plain.loss.options == HYPER[loss]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("ppo_clip", {"clip_low": 1.5}, "clip_low must be in"),
        ("ppo_clip", {"dual_clip": 1.0}, "dual_clip must be above 1"),
        ("gspo", {"clip_high": -0.1}, "clip_high >= 0"),
        ("luspo", {"clip_low": -0.1}, "clip_low must be in"),
        ("aspo", {"dual_clip": 0.5}, "dual_clip must be above 1"),
        ("cispo", {"min_ratio": 1.5}, "min_ratio <= 1 <= max_ratio"),
        ("spo", {"epsilon": 0.0}, "epsilon must be > 0"),
        ("drpo", {"epsilon": -1.0}, "epsilon must be > 0"),
        ("dro", {"beta": -0.1}, "beta must be >= 0"),
        ("gmpo", {"log_clip": -0.1}, "log_clip must be >= 0"),
        ("m2po", {"budget": 0.0}, "budget must be > 0"),
        ("gppo", {"keep_low": -1.0}, "keep_low and keep_high must be >= 0"),
        ("dppo_tv", {"divergence_low": 1.5}, r"must be in \(0, 1\]"),
        ("dppo_kl", {"divergence_high": 0.0}, r"must be in \(0, inf\]"),
        ("dppo_kl", {"max_ratio": 0.5}, "max_ratio must be >= 1"),
        ("sapo", {"tau_negative": 0.0}, "tau_positive and tau_negative must be > 0"),
        ("vespo", {"decay_negative": 0.0}, "decays > 0"),
        ("topr", {"max_ratio": 0.0}, "max_ratio must be > 0"),
        ("r2vpo", {"penalty_scope": "batch"}, "unknown penalty_scope 'batch'"),
        ("spo", {"epsilon": "much"}, "epsilon must be of the type of its default 0.2, got 'much'"),
        ("r2vpo", {"penalty_scope": 1.0}, "penalty_scope must be of the type of its default 'token'"),
    ],
)
def test_the_loss_says_which_constant_is_out_of_range(name, options, message):
    with pytest.raises(ValueError, match=f"^objective.loss: .*{message}"):
        make_objective(name, loss={"options": options})


def test_an_objective_can_be_a_static_argument():
    one, other = (make_objective("dapo", loss={"entropy_coef": c}) for c in (0.25, 0.5))
    assert one == make_objective("dapo", loss={"entropy_coef": 0.25})
    assert hash(one) == hash(make_objective("dapo", loss={"entropy_coef": 0.25}))
    assert one != other
    assert make_objective("ppo_clip", loss={"options": {"clip_low": 0.1}}) != make_objective("ppo_clip")


# ---- choices, ranges and combinations ----


@pytest.mark.parametrize(
    ("field", "choices"),
    {
        "loss.reduction": ("token_mean", "sequence_mean", "constant_length"),
        "dual.rule": ("projected", "multiplicative"),
        "dual.signal": ("auto", "absolute", "excess"),
        "dual.measure": ("before", "corrected", "pooled", "after"),
        "advantage.scale": ("std", "std_biased", "batch", "mean", "none"),
        "advantage.baseline": ("estimator", "minimum_variance"),
        "groups.zero_variance": ("keep", "drop", "resample"),
        "groups.verifier_errors": ("abstain", "wrong"),
        "groups.truncated": ("keep", "mask"),
        "kl.to": ("reference", "behavior"),
        "kl.where": ("loss", "reward"),
        "kl.estimator": ("k1", "k2", "k3"),
        "correction.mode": ("none", "truncate", "mask"),
        "correction.scope": ("token", "sequence"),
        "correction.filter": ("none", "geometric", "mean_k3", "max_k2"),
        "correction.step_scaling": ("none", "sqrt", "linear"),
    }.items(),
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_choices(field, choices):
    with pytest.raises(ValueError, match=f"^objective.{field}='nope' is unknown; one of {', '.join(choices)}$"):
        objective({field: "nope"})
    beside = {"correction.filter_high": 2.0} if field == "correction.filter" else {}
    for choice in choices:
        assert value_at(objective({field: choice} | beside), field) == choice


def test_the_estimators_are_those_of_the_library():
    names = ("group_relative", "leave_one_out", "gdpo", "reinforce_pp", "reinforce_pp_baseline", "gae")
    assert tuple(ESTIMATORS) == names
    with pytest.raises(
        ValueError, match=f"^objective.advantage.estimator: .*'nope'; one of {', '.join(names)}, or module:function$"
    ):
        objective({"advantage.estimator": "nope"})
    for name in names:
        assert objective({"advantage.estimator": name}).advantage.estimator == name


def test_the_losses_are_those_of_the_library():
    with pytest.raises(
        ValueError,
        match=f"^objective.loss.name='nope': .*one of {', '.join(losses.names())}, or module:function$",
    ):
        objective({"name": "policy_gradient", "loss.name": "nope"})
    for name in losses.names():
        assert objective({"name": "policy_gradient", "loss.name": name}).loss.name == name


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("field", "good", "bad"),
    [
        ("loss.entropy_coef", [0.0, 2.0], [-0.1, NAN]),
        ("loss.imitation_coef", [0.0, 2.0], [-0.1, NAN]),
        ("dual.coef", [0.0, 50.0], [-0.1, 50.1, NAN, INF]),
        ("dual.budget", [1e-6], [0.0, -1.0, NAN]),
        ("dual.step", [1e-6], [0.0, NAN]),
        ("dual.max_step", [1e-6], [0.0, NAN]),
        ("dual.max_coef", [1.0, 1e6], [0.9, NAN]),  # r2vpo starts at 1
        ("dual.smoothing", [0.0, 0.99], [-0.1, 1.0, NAN]),
        ("dual.carry", [0.0, 3.0, INF], [-0.1, NAN]),
        ("dual.proportional", [0.0, 2.0], [-0.1, NAN]),
        ("advantage.discount", [0.0, 1.0], [-0.1, 1.1, NAN]),
        ("advantage.trace_decay", [0.0, 1.0], [-0.1, 1.1, NAN]),
        ("advantage.value_coef", [0.0, 2.0], [-0.1, NAN]),
        ("advantage.value_clip", [0.0, 2.0], [-0.1, NAN]),
        ("groups.max_resamples", [1, 100], [0, -1]),
        ("groups.overlong_penalty", [0.0, 2.0], [-0.1, NAN]),
        ("groups.overlong_buffer", [0.0, 1.0], [-0.1, 1.1, NAN]),
        ("kl.coef", [0.0, 2.0], [-0.1, NAN]),
        ("correction.max_weight", [1.0, 100.0], [0.9, NAN]),
        ("correction.min_weight", [0.0, 1.0], [-0.1, 1.1, NAN]),
        ("correction.filter_low", [0.0, 1.0], [-0.1, 1.1, NAN]),
        ("correction.filter_high", [1e-6, 5.0], [0.0, NAN]),
        ("correction.off_policy_threshold", [0.0, 5.0], [-0.1, NAN]),
        ("correction.step_reference", [1e-6, 1.0], [0.0, 1.1, NAN]),
    ],
)
def test_ranges(field, good, bad):
    for value in good:
        assert value_at(objective({field: value}), field) == value
    for value in bad:
        with pytest.raises(ValueError, match=f"objective.{field}"):
            objective({field: value})


GAE, PLUS = ({"advantage.estimator": name} for name in ("gae", "reinforce_pp"))


@pytest.mark.parametrize(
    ("settings", "message", "cure"),
    [
        (
            {"name": "ppo_clip", "dual.adaptive": True},
            "objective.dual.adaptive needs a loss with a variance coefficient, such as r2vpo; the loss is ppo_clip",
            {"name": "r2vpo"},
        ),
        (
            {"dual.coef": 60.0},
            "objective.dual.max_coef=50.0 is below objective.dual.coef=60",
            {"dual.max_coef": 60.0},
        ),
        ({"dual.coef": 60.0}, "max_coef=50.0 is below", {"dual.adaptive": False}),  # then there is no cap
        *(
            (
                {"groups.zero_variance": z} | estimator,
                f"groups.zero_variance={z} needs a baseline .*advantage.estimator={estimator['advantage.estimator']} ",
                {"advantage.estimator": cure},
            )
            for z in ("drop", "resample")
            for estimator, cure in zip((GAE, PLUS), ("leave_one_out", "reinforce_pp_baseline"), strict=True)
        ),
        ({"kl.target": 0.1}, "objective.kl.target adapts objective.kl.coef, which must be > 0", {"kl.coef": 0.1}),
        ({"kl.target": 0.0, "kl.coef": 0.1}, "objective.kl.target must be > 0", {"kl.target": 0.1}),
        (
            {"kl.to": "behavior", "kl.where": "reward"},
            "objective.kl.to=behavior goes into the loss",
            {"kl.where": "loss"},
        ),
        ({"kl.to": "behavior", "kl.corrected": True}, "is weighed by itself", {"kl.to": "reference"}),
        (
            {"correction.filter": "geometric", "correction.filter_high": 0.5},
            "bounds a ratio with filter=geometric, and must be >= 1",
            {"correction.filter": "mean_k3"},
        ),
        (
            {"correction.filter": "max_k2"},
            "max_k2 has no published bound: set objective.correction.filter_high",
            {"correction.filter_high": 0.5},
        ),
        (
            {"advantage.baseline": "minimum_variance"} | GAE,
            "minimum_variance moves the baseline of a group; with objective.advantage.estimator=gae there is none",
            {"advantage.estimator": "leave_one_out"},
        ),
        *(
            ({"advantage.scale": "mean"} | taken, "nothing may be taken off the reward", {"advantage.scale": "std"})
            for taken in ({"groups.overlong_penalty": 0.5}, {"kl.coef": 0.1, "kl.where": "reward"})
        ),
        (
            {"advantage.estimator": "gdpo", "groups.overlong_penalty": 0.5},
            "nothing may be taken off the reward",
            {"groups.overlong_penalty": 0.0},
        ),
        (
            {"kl.where": "reward", "kl.corrected": True},
            "objective.kl.corrected is for objective.kl.where=loss",
            {"kl.where": "loss"},
        ),
        (
            {"groups.overlong_penalty": 1.0, "groups.overlong_buffer": 0.0},
            "objective.groups.overlong_penalty needs overlong_buffer > 0",
            {"groups.overlong_buffer": 0.1},
        ),
        ({"name": "spo", "loss.options.budget": 0.1}, "budget is not a hyper-parameter of loss", {"name": "m2po"}),
        ({"name": "nope"}, "objective.name='nope' is not a preset; one of aspo, ce_gppo, ", {"name": "aspo"}),
    ],
)
def test_what_does_not_go_together_is_refused_and_the_cure_is_not(settings, message, cure):
    with pytest.raises(ValueError, match=message):
        objective(settings)
    objective(settings | cure)


def test_a_group_is_the_baseline_of_those_that_can_drop_it():
    group = {name for name, row in ESTIMATORS.items() if row.group_baseline}
    assert group == set(ESTIMATORS) - {"gae", "reinforce_pp", "gdpo"}
    for advantage in group:
        settings = {"advantage.estimator": advantage, "groups.zero_variance": "drop"}
        assert objective(settings).groups.zero_variance == "drop"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"nonsense": 1}, r"unknown config field objective\.nonsense; known: .*correction, dual, groups"),
        ({"dual.nonsense": 1}, r"unknown config field objective\.dual\.nonsense; known: .*budget"),
        ({"loss.nonsense": 1}, r"unknown config field objective\.loss\.nonsense; known: .*options"),
    ],
)
def test_unknown_fields_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        objective(settings)
