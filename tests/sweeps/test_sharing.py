"""Which runs share a program, and the numbers that each has in it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r2vpo_jax import losses
from r2vpo_jax.config import structure
from r2vpo_jax.sweeps.sharing import families

OPTIONS = "objective.loss.options."


def configs_of(tiny_config, **objectives):
    return {name: tiny_config(objective=objective) for name, objective in objectives.items()}


def names_of(found):
    return [list(family.configs) for family in found]


def test_objectives_share_and_other_structure_does_not(tiny_config):
    configs = configs_of(
        tiny_config,
        clip={"name": "ppo_clip"},
        adaptive={"name": "r2vpo"},
        fixed={"name": "r2vpo_fixed"},
        sequence={"name": "gspo"},  # another reduction
        old={"name": "r2vpo_before"},  # another way to adapt
        m2po={"name": "m2po"},  # a threshold of the whole minibatch
        reference={"name": "ppo_clip", "kl": {"coef": 0.1}},
    )
    configs["lag"] = tiny_config(objective={"name": "cispo"}, replay={"lag": 1})
    found = families(configs)
    assert names_of(found) == [["clip", "adaptive", "fixed"], ["old"], ["sequence"], ["m2po"], ["reference"], ["lag"]]


def test_runs_of_one_structure_are_as_they_are(tiny_config):
    configs = configs_of(tiny_config, low={"dual": {"budget": 0.01}}, high={"dual": {"budget": 0.02}})
    (family,) = families(configs)
    assert family.config is configs["low"]
    assert structure(family.config) == structure(configs["high"])
    assert family.numbers("high")["objective.dual.budget"] == 0.02


def test_each_run_has_its_numbers(tiny_config):
    configs = configs_of(
        tiny_config,
        clip={"name": "ppo_clip", "loss": {"options": {"clip_low": 0.1}}},
        adaptive={"name": "r2vpo", "dual": {"coef": 3.0}},
        fixed={"name": "r2vpo_fixed", "dual": {"coef": 80.0}},
        nothing={"name": "policy_gradient"},
        sequence={"name": "r2vpo", "loss": {"options": {"penalty_scope": "sequence"}}},
    )
    (family,) = families(configs)
    numbers = {name: family.numbers(name) for name in configs}
    assert [numbers[name][f"{OPTIONS}which"] for name in configs] == [1, 2, 2, 3, 4]
    assert numbers["clip"][f"{OPTIONS}1__clip_low"] == 0.1
    coefs = [numbers[name]["objective.dual.coef"] for name in configs]
    assert coefs == [1e-30, 3.0, 80.0, 1e-30, numbers["sequence"]["objective.dual.coef"]]
    assert numbers["fixed"]["objective.dual.max_coef"] == 80
    assert numbers["adaptive"]["objective.dual.step"] == configs["adaptive"].objective.dual.step
    assert np.float32(80) + np.float32(numbers["fixed"]["objective.dual.max_step"]) == 80


@pytest.mark.parametrize("place", range(1, 5))
def test_alternatives_are_what_they_pick(place):
    """Value, gradient and statistics; and NaN under the mask reaches neither."""
    names, constants = ("ppo_clip", "r2vpo", "cispo", "policy_gradient"), ((), (("penalty_scope", "sequence"),), (), ())
    any_of = losses.Alternatives(names, constants)
    keys = jax.random.split(jax.random.key(0), 3)
    behavior, advantages = jax.random.normal(keys[0], (4, 6)), jax.random.normal(keys[1], (4,))
    logp = behavior + 0.3 * jax.random.normal(keys[2], (4, 6))
    mask = jnp.arange(6) < jnp.array([6, 2, 0, 5])[:, None]
    logp = jnp.where(mask, logp, jnp.nan)
    given = {key: value for key, value in any_of.hyperparameters().items() if key != "which"}

    def picked(logp):
        return any_of(logp, behavior, advantages, mask, which=place, variance_coef=0.7, **given)

    def own(logp):
        name, fixed = names[place - 1], dict(constants[place - 1])
        coef = {"variance_coef": 0.7} if name == "r2vpo" else {}
        return losses.get(name)(logp, behavior, advantages, mask, **fixed, **coef)

    (value, stats), gradient = jax.value_and_grad(picked, has_aux=True)(logp)
    (expected, own_stats), own_gradient = jax.value_and_grad(own, has_aux=True)(logp)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    np.testing.assert_allclose(gradient, own_gradient, rtol=1e-6)
    for name, pair in stats.items():
        np.testing.assert_allclose(pair, own_stats.get(name, (0, 1)), rtol=1e-6)


def test_an_infinity_stays_where_it_is():
    """A loss that is not finite at a token is nobody's but its own."""
    any_of = losses.Alternatives(("policy_gradient", "tests.sweeps.test_sharing:infinite_loss"), ((), ()))
    one = jnp.ones((1, 1))
    with_infinite = jax.grad(lambda x: any_of(x, one, one, one, which=1)[0])(one)
    assert float(with_infinite[0, 0]) == -1
    assert not np.isfinite(jax.grad(lambda x: any_of(x, one, one, one, which=2)[0])(one)).any()


def infinite_loss(logp, behavior_logp, advantages, mask, *, weights=None, reduction="token_mean", normalizer=None):
    loss = jnp.sum(jnp.sqrt(logp - behavior_logp))
    one = jnp.float32(1)
    return loss, {"surrogate": (loss, one), "ratio_variance": (loss, one), "clamped": (loss, one)}
