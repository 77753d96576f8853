"""Objectives by name, their hyper-parameters, and objectives of a user's own."""

import inspect
import math
import sys

import numpy as np
import pytest

from r2vpo_jax import losses
from tests.helpers.losses import COMPUTED, NAMES, batch

OWN = "tests.helpers.own_losses"
COMMON = ("logp", "behavior_logp", "advantages", "mask", "weights", "reduction", "normalizer")


def test_names():
    assert {"r2vpo", "ppo_clip", "policy_gradient"} <= set(NAMES)
    assert len(NAMES) == len(set(NAMES)) == 18
    for name in NAMES:
        assert losses.get(name) is getattr(losses, f"{name}_loss")
    with pytest.raises(ValueError, match=r"unknown objective 'ppo'; one of .*ppo_clip.*, or module:function$"):
        losses.get("ppo")


def test_hyperparameters_are_what_a_user_sets_with_its_default():
    assert losses.hyperparameters("r2vpo") == {
        "penalty_scope": "token",
        "penalty_weight": "none",
        "negative_factor": 1.0,
    }
    assert losses.hyperparameters("policy_gradient") == {}
    assert losses.hyperparameters("m2po") == {"budget": 0.04}
    gppo = {"clip_low": 0.2, "clip_high": 0.28, "keep_low": 1.0, "keep_high": 1.0, "dual_clip": 3.0}
    assert losses.hyperparameters("gppo") == gppo
    assert list(losses.hyperparameters("gppo")) == list(gppo), "in the order of the signature"
    with pytest.raises(ValueError, match="unknown objective"):
        losses.hyperparameters("ppo")


def test_what_training_computes():
    assert {name: losses.computed(name) for name in NAMES if losses.computed(name)} == {
        name: tuple(arguments) for name, arguments in COMPUTED.items()
    }
    with pytest.raises(ValueError, match="unknown objective"):
        losses.computed("ppo")


@pytest.mark.parametrize("name", NAMES)
def test_an_objective_takes_its_hyperparameters_and_what_all_take(name):
    parameters = inspect.signature(losses.get(name)).parameters
    assert sorted(parameters) == sorted((*COMMON, *losses.computed(name), *losses.hyperparameters(name)))
    keywords = [p for k, p in parameters.items() if k not in COMMON[:4]]
    assert all(p.kind is inspect.Parameter.KEYWORD_ONLY for p in keywords)
    without_default = [p.name for p in keywords if p.default is inspect.Parameter.empty]
    assert without_default == (["variance_coef"] if name == "r2vpo" else [])


@pytest.mark.parametrize("name", [name for name in NAMES if name != "r2vpo"])
def test_the_arrays_are_enough(name):
    loss, stats = losses.get(name)(**batch())
    assert np.isfinite(loss)
    assert "ratio_variance" in stats


# Checks ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_the_defaults_pass_their_own_check(name):
    losses.check_hyperparameters(name)
    losses.check_hyperparameters(name, **losses.hyperparameters(name))


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("ppo_clip", {"clip_low": 1.5}, "clip_low must be in"),
        ("ppo_clip", {"dual_clip": 1}, "dual_clip must be above 1"),
        ("m2po", {"budget": 0.0}, "budget must be > 0"),
        ("r2vpo", {"penalty_scope": "batch"}, "unknown penalty_scope 'batch'"),
        ("spo", {"epsilon": math.nan}, "epsilon must be > 0"),
        ("spo", {"clip_low": 0.1}, "clip_low is not a hyper-parameter of loss spo; it takes epsilon$"),
        ("policy_gradient", {"beta": 1.0}, "beta is not a hyper-parameter of loss policy_gradient; it takes none$"),
        ("r2vpo", {"variance_coef": 1.0}, "variance_coef is not a hyper-parameter"),
        ("m2po", {"threshold": 1.0}, "threshold is not a hyper-parameter"),
        ("spo", {"epsilon": "0.2"}, "epsilon must be of the type of its default 0.2, got '0.2'"),
        ("spo", {"epsilon": None}, "epsilon must be of the type"),
        ("spo", {"epsilon": True}, "epsilon must be of the type"),
        ("ppo_clip", {"dual_clip": "3"}, "dual_clip must be of the type"),
        ("r2vpo", {"penalty_scope": 1.0}, "penalty_scope must be of the type"),
        ("ppo", {}, "unknown objective 'ppo'"),
    ],
)
def test_check_hyperparameters_refuses(name, values, message):
    with pytest.raises(ValueError, match=message):
        losses.check_hyperparameters(name, **values)


def test_a_default_of_none_stands_for_an_optional_number():
    for value in (None, 3, 3.5):
        losses.check_hyperparameters("ppo_clip", dual_clip=value)


# Objectives of one's own ----------------------------------------------------------------------------


def test_an_objective_of_ones_own():
    name = f"{OWN}:tempered_loss"
    assert losses.computed(name) == ("variance_coef",)
    assert losses.hyperparameters(name) == {"power": 0.5, "cap": None, "scope": "token"}
    losses.check_hyperparameters(name, power=2, cap=1.5, scope="sequence")
    with pytest.raises(ValueError, match="power must be > 0, got 0"):
        losses.check_hyperparameters(name, power=0)
    # One token with r = 4 and A = 1: -(4^.5) + .25 * 9.
    arrays = {k: np.full((1, 1), v, np.float32) for k, v in (("logp", math.log(4)), ("behavior_logp", 0))}
    loss, stats = losses.get(name)(**arrays, advantages=1.0, mask=np.ones((1, 1), bool), variance_coef=0.25)
    np.testing.assert_allclose(loss, 0.25, rtol=1e-5)
    np.testing.assert_allclose(stats["ratio_variance"], (9, 1), rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere:loss", "objective 'nowhere:loss': there is no module 'nowhere'"),
        ("tests.nowhere:loss", "there is no module 'tests.nowhere'"),
        ("tests.nowhere.deeper:loss", "there is no module 'tests.nowhere.deeper'"),
        (f"{OWN}:missing", "has no function or class 'missing'"),
        (f"{OWN}:", "is not of the form module:name"),
        (".own_losses:loss", "is not of the form module:name"),
        (f"{OWN}:NOT_A_FUNCTION", "has no function or class 'NOT_A_FUNCTION'"),
        (":loss", "is not of the form module:name"),
        (f"{OWN}:without_weights_loss", "does not take weights, which all objectives take"),
        (f"{OWN}:without_a_default_loss", "has no default for power"),
    ],
)
def test_an_objective_of_ones_own_that_cannot_be_used(name, message):
    with pytest.raises(ValueError, match=message):
        losses.get(name)


def test_a_module_that_lacks_what_it_imports_says_so_itself(tmp_path, monkeypatch):
    (tmp_path / "lacking_losses.py").write_text("import a_library_that_is_not_there\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="a_library_that_is_not_there"):
        losses.get("lacking_losses:loss")
    assert "lacking_losses" not in sys.modules
