"""Which numbers can be traced, and which configurations share a program."""

import copy

import jax
import jax.numpy as jnp
import pytest

from r2vpo_jax import config
from r2vpo_jax.config import Config, OptimizerConfig, make_objective, numbers, structure, with_numbers
from tests.helpers.trees import merged

OPTIMIZER = {
    "optimizer.learning_rate": 1e-4,
    "optimizer.final_fraction": 0.1,
    "optimizer.b1": 0.9,
    "optimizer.b2": 0.99,
    "optimizer.epsilon": 1e-8,
    "optimizer.max_grad_norm": 1.0,
    "optimizer.value_learning_rate": 1e-2,
}
CLIP = {"loss.options.clip_low": 0.2, "loss.options.clip_high": 0.2}
R2VPO = {"loss.options.negative_factor": 1.0}
CRITIC = {"discount": 1.0, "trace_decay": 0.95, "value_coef": 0.5, "value_clip": 0.2}
OBJECTIVES = {
    "r2vpo": R2VPO
    | {
        "dual.coef": 1.0,
        "dual.budget": 0.04,
        "dual.step": 0.5,
        "dual.max_step": 1.0,
        "dual.max_coef": 50.0,
        "dual.carry": 4.0,
    },
    "r2vpo_fixed": R2VPO | {"dual.coef": 2.5},
    "policy_gradient": {},
    "ppo_clip": CLIP,
    "grpo": CLIP | {"kl.coef": 0.04},
    "dapo": CLIP | {"loss.options.clip_high": 0.28, "groups.overlong_penalty": 0.5, "groups.overlong_buffer": 0.2},
    "ppo": CLIP | {f"advantage.{name}": value for name, value in CRITIC.items()},
    "ppo_kl": {"kl.coef": 1.0, "kl.target": 0.01},
    "cispo": {"loss.options.max_ratio": 5.0},
    "m2po": {"loss.options.budget": 0.04},
    "gppo": CLIP
    | {"loss.imitation_coef": 0.1, "loss.options.clip_high": 0.28, "loss.options.dual_clip": 10.0}
    | {"loss.options.keep_low": 1.0, "loss.options.keep_high": 1.0},
}


def make(name="r2vpo", **sections):
    return config.from_dict(merged({"objective": {"name": name}}, sections))


@pytest.mark.parametrize(("name", "expected"), OBJECTIVES.items())
def test_the_numbers_of_a_preset(name, expected):
    expected = {f"objective.{path}": value for path, value in expected.items()}
    assert numbers(make(name)) == expected | OPTIMIZER | {"sampler.temperature": 1.0}


def test_what_is_on_is_traced_and_what_is_zero_is_not():
    on = make(
        "cispo",
        objective={
            "loss": {"entropy_coef": 0.5, "options": {"min_ratio": 1}},
            "correction": {"mode": "mask", "min_weight": 0.5},
        },
        optimizer={"weight_decay": 0.1, "final_fraction": 0.0},
    )
    new = {
        "objective.loss.entropy_coef": 0.5,
        "objective.loss.options.min_ratio": 1.0,
        "objective.correction.max_weight": 2.0,
        "objective.correction.min_weight": 0.5,
        "optimizer.weight_decay": 0.1,
    }
    before = numbers(make("cispo"))
    del before["optimizer.final_fraction"]
    assert numbers(on) == before | new
    assert isinstance(numbers(on)["objective.loss.options.min_ratio"], float)


def test_options_of_ones_own_loss():
    own = make(objective={"loss": {"name": "tests.helpers.own_losses:tempered_loss"}})
    options = {path for path in numbers(own) if path.startswith("objective.loss.options")}
    assert options == {"objective.loss.options.power"}


@pytest.mark.parametrize("name", config.PRESETS)
def test_the_same_numbers_give_the_same_configuration(name):
    made = make(name)
    before = copy.deepcopy(made)
    assert with_numbers(made, numbers(made)) == made
    doubled = with_numbers(made, {path: 2 * value for path, value in numbers(made).items()})
    assert numbers(doubled) == {path: 2 * value for path, value in numbers(made).items()}
    assert structure(doubled) == structure(made)
    assert made == before, "a new one is made"


def test_other_numbers_are_those_of_a_configuration_made_with_them():
    values = {"objective.loss.options.clip_low": 0.1, "objective.kl.coef": 0.5, "optimizer.b1": 0.5}
    other = make("grpo", objective={"loss": {"options": {"clip_low": 0.1}}, "kl": {"coef": 0.5}}, optimizer={"b1": 0.5})
    assert with_numbers(make("grpo"), values) == other


@pytest.mark.parametrize(
    "path", ["optimizer.rate", "optimizer.weight_decay", "optimizer.warmup_updates", "seed", "objective.dual.budget"]
)
def test_what_is_not_among_the_numbers_is_refused(path):
    with pytest.raises(ValueError, match=f"{path} is not a number of this configuration that may be traced"):
        with_numbers(make("grpo"), {path: 1.0})


@pytest.mark.parametrize(
    ("name", "sections"),
    [
        ("r2vpo", {"objective": {"dual": {"budget": 0.01, "coef": 2}}}),
        ("r2vpo", {"optimizer": {"learning_rate": 1.0}, "sampler": {"temperature": 0.5}, "seed": 7}),
        ("r2vpo", {"alarms": {"patience": 3}, "trainer": {"max_noise_floor": 1.0}}),
        ("r2vpo", {"trainer": {"packing": True}}),
        ("cispo", {"objective": {"loss": {"options": {"max_ratio": 2.0}}}}),
        ("grpo", {"objective": {"kl": {"coef": 0.5}}}),
    ],
)
def test_what_differs_in_numbers_shares_a_program(name, sections):
    one, other = make(name), make(name, **sections)
    assert one != other
    assert structure(one) == structure(other)
    assert hash(structure(one)) == hash(structure(other))


def test_presets_that_differ_in_numbers_share_a_program():
    assert structure(make("gppo")) == structure(make("ce_gppo"))
    assert structure(make("r2vpo")) != structure(make("r2vpo_fixed"))
    assert len({structure(make(name)) for name in config.PRESETS}) == len(config.PRESETS) - 1


def test_fields_without_effect_are_not_compared():
    plain = Config(objective=make_objective("cispo"))
    assert structure(plain) == structure(Config(objective=make_objective("cispo", dual={"budget": 0.5})))
    assert structure(plain) == structure(make("cispo"))


@pytest.mark.parametrize(
    "sections",
    [
        {"objective": {"loss": {"entropy_coef": 0.5}}},
        {"objective": {"kl": {"coef": 0.5}}},
        {"objective": {"loss": {"reduction": "sequence_mean"}}},
        {"objective": {"loss": {"name": "gspo"}}},
        {"objective": {"loss": {"options": {"dual_clip": 3.0}}}},
        {"objective": {"loss": {"options": {"clip_low": 0.0}}}},
        {"objective": {"correction": {"mode": "mask"}}},
        {"optimizer": {"weight_decay": 0.1}},
        {"optimizer": {"schedule": "cosine"}},
        {"optimizer": {"warmup_updates": 3}},
        {"trainer": {"num_epochs": 2}},
        {"trainer": {"num_minibatches": 4}},
        {"sampler": {"group_size": 8}},
        {"replay": {"lag": 2}},
        {"task": {"arithmetic": {"max_operands": 3}}},
        {"model": {"scan_layers": True}},
        {"mesh": {"data": 1}},
        {"evaluation": {"temperature": 0.5}},
    ],
)
def test_what_differs_in_anything_else_does_not(sections):
    assert structure(make("ppo_clip")) != structure(make("ppo_clip", **sections))


def test_traced_numbers():
    """In the traced function the configuration has tracers, and is on where it is on."""
    made = make("grpo", objective={"loss": {"entropy_coef": 0.5}, "groups": {"overlong_penalty": 1.0}})
    seen = []

    def program(values):
        traced = with_numbers(made, values)
        seen.append(traced)
        objective = traced.objective
        assert objective.has_kl
        assert objective.needs_reference
        assert objective.has_entropy_bonus
        assert objective.has_overlong_penalty
        return objective.kl.coef * traced.optimizer.learning_rate

    both = {path: jnp.array([value, 3 * value]) for path, value in numbers(made).items()}
    assert jax.jit(jax.vmap(program))(both).tolist() == pytest.approx([4e-6, 36e-6])
    assert len(seen) == 1
    assert isinstance(seen[0].objective.loss.options["clip_low"], jax.core.Tracer)
    assert (seen[0].trainer, seen[0].replay, seen[0].seed) == (made.trainer, made.replay, made.seed)


@pytest.mark.parametrize(("value", "expected"), [(0, False), (0.0, False), (0.5, True), (jnp.ones(()), True)])
def test_is_on(value, expected):
    assert config.is_on(value) is expected
    assert jax.jit(lambda: jnp.float32(config.is_on(value)))() == expected, "where operations on arrays are traced"


def test_a_plain_number_out_of_range_is_refused_as_before():
    with pytest.raises(ValueError, match=r"objective.loss: clip_low must be in \[0, 1\] and clip_high >= 0, got 2"):
        make_objective("ppo_clip", loss={"options": {"clip_low": 2.0}})
    with pytest.raises(ValueError, match="optimizer.learning_rate must be > 0, got 0"):
        OptimizerConfig(learning_rate=0.0)
