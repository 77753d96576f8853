"""Arguments that the objectives refuse, and the bounds of those that they take."""

import math

import jax
import numpy as np
import pytest

from r2vpo_jax import losses
from tests.helpers.losses import COMPUTED, NAMES, batch, evaluate


def trace(name, arrays, **hyper):
    """Go through an objective without compiling or computing anything."""
    hyper = COMPUTED.get(name, {}) | hyper
    return jax.eval_shape(lambda arrays: losses.get(name)(**arrays, **hyper), arrays)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("argument", "shape"),
    [
        ("logp", (2, 4)),
        ("logp", (2,)),
        ("behavior_logp", (3, 3)),
        ("mask", (2, 1)),
        ("mask", (3,)),
        ("advantages", ()),
        ("advantages", (3,)),
        ("advantages", (2, 4)),
        ("advantages", (2, 3, 1)),
        ("weights", (2,)),
        ("weights", (2, 1)),
        ("normalizer", (2,)),
    ],
)
def test_wrong_shapes_raise(name, argument, shape):
    arrays = {k: np.ones((2, 3)) for k in ("logp", "behavior_logp", "advantages", "mask")}
    arrays[argument] = np.ones(shape)
    with pytest.raises(AssertionError, match="Chex"):
        trace(name, arrays)


@pytest.mark.parametrize("argument", ["logp", "behavior_logp", "advantages", "mask"])
def test_m2po_threshold_refuses_wrong_shapes(argument):
    arrays = {k: np.ones((2, 3)) for k in ("logp", "behavior_logp", "advantages", "mask")}
    arrays[argument] = np.ones((2, 1))
    with pytest.raises(AssertionError, match="Chex"):
        losses.m2po_threshold(**arrays)


@pytest.mark.parametrize(("name", "argument"), [("r2vpo", "variance_coef"), ("m2po", "threshold")])
def test_multipliers_and_thresholds_are_scalars(name, argument):
    with pytest.raises(AssertionError, match="Chex"):
        trace(name, batch(), **{argument: np.ones(5)})


def test_the_variance_coefficient_must_be_given():
    with pytest.raises(TypeError, match="required keyword-only argument: 'variance_coef'"):
        losses.r2vpo_loss(**batch())


def test_reduce_refuses_values_of_another_shape():
    with pytest.raises(AssertionError, match="Chex"):
        losses.reduce(np.ones((2, 1)), np.ones((2, 3), bool), "token_mean")
    with pytest.raises(AssertionError, match="Chex"):
        losses.token_weights(np.ones((2, 3), bool), "token_mean", np.ones(2))


@pytest.mark.parametrize("name", NAMES)
def test_constant_length_needs_a_normalizer(name):
    with pytest.raises(ValueError, match="normalizer"):
        trace(name, batch(), reduction="constant_length")


@pytest.mark.parametrize("name", NAMES)
def test_unknown_reduction(name):
    with pytest.raises(ValueError, match=r"unknown reduction 'sum'.*token_mean"):
        trace(name, batch(), reduction="sum", normalizer=1.0)


def test_reductions_of_ones_own_are_checked_too():
    mask = batch()["mask"]
    for function in (losses.count, losses.token_weights, lambda mask, *rest: losses.reduce(mask * 1.0, mask, *rest)):
        with pytest.raises(ValueError, match="normalizer"):
            function(mask, "constant_length")
        with pytest.raises(ValueError, match=r"unknown reduction 'sum'.*token_mean"):
            function(mask, "sum")
    with pytest.raises(ValueError, match=r"unknown reduction 'sum'.*token_mean"):
        losses.token_weights(mask, "sum", 1.0)


NAN, INF = math.nan, math.inf
CLIPS = [("clip_low", -0.1), ("clip_low", 1.1), ("clip_low", NAN), ("clip_high", -0.1), ("clip_high", NAN)]
DUAL_CLIPS = [("dual_clip", 1.0), ("dual_clip", 0.5), ("dual_clip", NAN)]
POSITIVE = (0.0, -1.0, NAN)
NOT_NEGATIVE = (-0.1, NAN)
OUT_OF_RANGE = {
    "r2vpo": [
        ("penalty_scope", "response"),
        ("penalty_scope", None),
        ("penalty_weight", "mu"),
        ("negative_factor", -1.0),
    ],
    "policy_gradient": [],
    "ppo_clip": CLIPS + DUAL_CLIPS,
    "cispo": [("min_ratio", -0.1), ("min_ratio", 1.1), ("min_ratio", NAN), ("max_ratio", 0.9), ("max_ratio", NAN)],
    "gspo": CLIPS,
    "spo": [("epsilon", x) for x in POSITIVE],
    "m2po": [("budget", x) for x in POSITIVE],
    "gmpo": [("log_clip", x) for x in NOT_NEGATIVE],
    "sapo": [(k, x) for k in ("tau_positive", "tau_negative") for x in POSITIVE],
    "vespo": [(k, x) for k in ("power_positive", "power_negative") for x in NOT_NEGATIVE]
    + [(k, x) for k in ("decay_positive", "decay_negative") for x in POSITIVE],
    "topr": [("max_ratio", x) for x in POSITIVE],
    "drpo": [("epsilon", x) for x in POSITIVE],
    "dro": [("beta", x) for x in NOT_NEGATIVE],
    "dppo_tv": [(k, x) for k in ("divergence_low", "divergence_high") for x in (0.0, -0.1, 1.1, NAN)]
    + [("max_ratio", 0.9), ("max_ratio", NAN), ("beta", -0.1), ("beta", NAN)],
    "dppo_kl": [(k, x) for k in ("divergence_low", "divergence_high") for x in (0.0, -0.1, NAN)]
    + [("max_ratio", 0.9), ("max_ratio", NAN)],
    "gppo": CLIPS + DUAL_CLIPS + [(k, x) for k in ("keep_low", "keep_high") for x in NOT_NEGATIVE],
    "aspo": CLIPS + DUAL_CLIPS,
    "luspo": CLIPS,
}
OUT_OF_RANGE_CASES = [(name, *case) for name, cases in OUT_OF_RANGE.items() for case in cases]


@pytest.mark.parametrize(("name", "argument", "value"), OUT_OF_RANGE_CASES)
def test_hyperparameters_out_of_range(name, argument, value):
    # The message names what is out of range; VESPO's says powers and decays.
    with pytest.raises(ValueError, match=argument.split("_")[0] if name == "vespo" else argument):
        trace(name, batch(), **{argument: value})


@pytest.mark.parametrize("name", NAMES)
def test_all_hyperparameters_have_a_range(name):
    assert set(losses.hyperparameters(name)) == {argument for argument, _ in OUT_OF_RANGE[name]}


@pytest.mark.parametrize("budget", POSITIVE)
def test_the_budget_of_m2po_is_positive(budget):
    arrays = batch()
    del arrays["weights"]
    with pytest.raises(ValueError, match="budget"):
        losses.m2po_threshold(**arrays, budget=budget)


@pytest.mark.parametrize(
    ("name", "hyper"),
    [
        ("ppo_clip", {"clip_low": 0.0, "clip_high": 0.0}),
        ("ppo_clip", {"clip_low": 1.0, "clip_high": INF, "dual_clip": INF}),
        ("gspo", {"clip_low": 1.0, "clip_high": INF}),
        ("luspo", {"clip_low": 0.0, "clip_high": 0.0}),
        ("cispo", {"min_ratio": 1.0, "max_ratio": 1.0}),
        ("gmpo", {"log_clip": 0.0}),
        ("gmpo", {"log_clip": INF}),
        ("vespo", {"power_positive": 0.0, "power_negative": 0.0}),
        ("topr", {"max_ratio": INF}),
        ("spo", {"epsilon": INF}),
        ("dro", {"beta": 0.0}),
        ("dppo_tv", {"divergence_low": 1.0, "divergence_high": 1.0, "max_ratio": 1.0, "beta": 0.0}),
        ("dppo_kl", {"divergence_low": INF, "divergence_high": INF, "max_ratio": INF}),
        ("gppo", {"keep_low": 0.0, "keep_high": 0.0, "dual_clip": None}),
    ],
)
def test_the_ends_of_the_ranges_are_taken(name, hyper):
    result = evaluate(name, batch(), jit=False, **hyper)
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(result))
