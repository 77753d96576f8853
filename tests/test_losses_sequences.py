"""Objectives whose tokens depend on the others of a response or of the batch, against numbers worked out by hand."""

import math

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from r2vpo_jax import losses
from tests.helpers.losses import COLUMNS, ROWS, batch, by_hand, evaluate, same_up_to_rounding

# Responses, by hand ---------------------------------------------------------------------------------

E = math.e
WIDE = {"clip_low": 0.2, "clip_high": 0.28}
SEQUENCE = {"penalty_scope": "sequence"}
LOG_2 = 0.6931472
CASES = [
    # Ratios of a response and its advantage; the sum of its tokens' values; their coefficients.
    # gspo: value and coefficient of a token are s A, s the geometric mean of the ratios.
    ("gspo", {}, [E**0.1, E**-0.1], 1.0, 2.0, [1, 1]),  # s = 1: no token is cut, though each is far outside
    ("gspo", {}, [2.0, 0.5, 1.0], -1.0, -3.0, [-1, -1, -1]),
    ("gspo", WIDE, [4.0, 1.0], 1.0, 2.56, [0, 0]),  # s = 2: 2 * 1.28, and both are cut
    ("gspo", WIDE, [4.0, 1.0], -1.0, -4.0, [-2, -2]),
    ("gspo", WIDE, [0.25, 1.0], -1.0, -1.6, [0, 0]),  # s = .5: -2 * .8
    ("gspo", WIDE, [0.25, 1.0], 1.0, 1.0, [0.5, 0.5]),
    ("gspo", WIDE, [4.0, 1.0], [1.0, -1.0], -0.72, [0, -2]),  # advantages of tokens: 1.28 - 2
    # luspo: times the number of tokens.
    ("luspo", {}, [E**0.1, E**-0.1], 1.0, 4.0, [2, 2]),
    ("luspo", {}, [2.0, 0.5, 1.0], -1.0, -9.0, [-3, -3, -3]),
    ("luspo", WIDE, [4.0, 1.0], -1.0, -8.0, [-4, -4]),
    ("luspo", WIDE, [4.0, 1.0], 1.0, 5.12, [0, 0]),
    # gmpo: rho A, rho = exp(mean of the clipped log-ratios), and no gradient for the tokens that were clipped.
    ("gmpo", {}, [E**0.1, E**-0.1], 1.0, 2.0, [1, 1]),
    ("gmpo", {}, [E, E**-0.2], 1.0, 2.2103418, [0, 1.1051709]),  # (.4 - .2) / 2: exp(.1)
    ("gmpo", {}, [1 / E, E**0.2], -1.0, -1.8096748, [0, -0.9048374]),  # (-.4 + .2) / 2: exp(-.1)
    ("gmpo", {}, [E, E**-0.2], -1.0, -2.9836494, [-1.4918247] * 2),  # one-sided: (1 - .2) / 2: exp(.4)
    ("gmpo", {"log_clip": 2.0}, [E, E**-0.2], 1.0, 2.9836494, [1.4918247] * 2),
    # vespo: phi(w) A, w the product of the ratios. The values are those times log w.
    ("vespo", {}, [2.0, 1.0], 1.0, 0.1991483 * LOG_2, [0.1991483] * 2),  # 4 exp(-3)
    ("vespo", {}, [4.0, 0.5], -1.0, -1.0826823 * LOG_2, [-1.0826823] * 2),  # 8 exp(-2)
    ("vespo", {}, [2.0, 0.5], 1.0, 0.0, [1, 1]),  # w = 1
    ("vespo", {}, [4.0, 0.5], [1.0, -1.0], 2 * 0.1991483 * LOG_2 + 1.0826823 * LOG_2, [0.1991483, -1.0826823]),
    # topr: A for A >= 0, min(w, 1) A for A < 0.
    ("topr", {}, [3.0, 1.0], -1.0, -math.log(3), [-1, -1]),
    ("topr", {}, [0.5, 0.5], -1.0, 0.5 * LOG_2, [-0.25, -0.25]),  # w = .25: -.25 * -2 log 2
    ("topr", {}, [0.5, 0.5], 2.0, -4 * LOG_2, [2, 2]),
    ("topr", {"max_ratio": 4.0}, [3.0, 1.0], -1.0, -3 * math.log(3), [-3, -3]),
    # log w is clamped at 20 and -20, for VESPO and TOPR alike.
    # phi = exp(-20 * .1) exp(1)
    ("vespo", {"power_positive": 0.1, "decay_positive": 1.0}, [E**-15] * 2, 1.0, -30 / E, [1 / E, 1 / E]),
    ("topr", {"max_ratio": math.inf}, [E**15] * 2, -1.0, -30 * E**20, [-(E**20)] * 2),
    # r2vpo: g = r A - 2 coef s (s-1), penalty coef (s-1)^2 for each token.
    # s = 2: 5 - 2 * .25        4 - .5 * 2, 1 - .5 * 2
    ("r2vpo", {"variance_coef": 0.25, **SEQUENCE}, [4.0, 1.0], 1.0, 4.5, [3, 0]),
    # s = .5: -1.25 - 2 * .5 * .25        -.25 + .5 * .5, -1 + .5 * .5
    ("r2vpo", {"variance_coef": 0.5, **SEQUENCE}, [0.25, 1.0], -1.0, -1.5, [0, -0.75]),
    ("r2vpo", {"variance_coef": 2.5, **SEQUENCE}, [2.0, 0.5], 1.0, 2.5, [2, 0.5]),  # s = 1: no penalty
    ("r2vpo", {"variance_coef": 2.5}, [2.0, 0.5], 1.0, -0.625, [-8, 1.75]),  # 2.5 - 2.5 * 1.25; 2 (1 - 5), .5 (1 + 2.5)
]


@pytest.mark.parametrize(("name", "hyper", "ratio", "advantage", "value", "coefficients"), CASES)
def test_a_response(name, hyper, ratio, advantage, value, coefficients):
    # With a normalizer of 1 the loss is the negative sum, and its gradient the negative coefficients. The other
    # response, with advantage 0 and r = 1, must not matter.
    arrays = by_hand([[1.0, 1.0, 1.0], ratio], [0.0, advantage])
    loss, _, grad = evaluate(name, arrays, "constant_length", 1, **hyper)
    np.testing.assert_allclose(-loss, value, rtol=1e-5, atol=2e-6)
    np.testing.assert_allclose(-grad[1, : len(ratio)], coefficients, rtol=1e-5, atol=2e-6)
    others = np.ones(grad.shape, bool)
    others[1, : len(ratio)] = False
    np.testing.assert_array_equal(grad[others], 0.0)


@pytest.mark.parametrize("name", ["gspo", "gmpo", "r2vpo"])
def test_the_mean_log_ratio_does_not_depend_on_the_length(name):
    # Every token of row 0 twice: the same ratio of the response, hence the same coefficients, and under
    # sequence_mean the same loss.
    arrays = by_hand([[1.3, 0.9], [1.3, 0.9, 1.3, 0.9]], [-1.0, -1.0])
    hyper = {"variance_coef": 2.5, **SEQUENCE} if name == "r2vpo" else {}
    _, _, grad = evaluate(name, arrays, "constant_length", 1, **hyper)
    assert np.all(grad[1, :4] != 0)
    np.testing.assert_allclose(grad[1, :4], np.tile(grad[0, :2], 2), rtol=1e-5)
    each = [evaluate(name, arrays | {"mask": m}, "sequence_mean", **hyper)[0] for m in only_rows(arrays["mask"], 2)]
    np.testing.assert_allclose(each[0], each[1], rtol=1e-5)


def only_rows(mask, number):
    return [mask & (np.arange(ROWS) == row)[:, None] for row in range(number)]


def test_under_its_reduction_luspo_weighs_all_tokens_alike():
    arrays = by_hand([[1.0], [1.0, 1.0, 1.0]], [1.0, 1.0])
    _, _, grad = evaluate("luspo", arrays, "sequence_mean")
    np.testing.assert_allclose(-grad[:2, :3], [[1 / 2, 0, 0], [1 / 2] * 3])


@pytest.mark.parametrize(
    ("name", "reduction"),
    [("gspo", "sequence_mean"), ("luspo", "sequence_mean"), ("gmpo", "sequence_mean"), ("sapo", "sequence_mean")]
    + [(name, "token_mean") for name in losses.names() if name not in ("gspo", "luspo", "gmpo", "sapo")],
)
def test_default_reduction(name, reduction):
    arrays = by_hand([[1.0], [1.0, 1.0, 1.0]], [1.0, -0.5])
    hyper = {"r2vpo": {"variance_coef": 2.5}, "m2po": {"threshold": 0.3}}.get(name, {})
    grad = jax.grad(lambda logp: losses.get(name)(**(arrays | {"logp": logp}), **hyper)[0])(arrays["logp"])
    first, second = {"token_mean": (1 / 4, 1 / 4), "sequence_mean": (1 / 2, 1 / 6)}[reduction]
    length = 3 if name == "luspo" else 1
    np.testing.assert_allclose(-grad[:2, :3], [[first, 0, 0], [-0.5 * second * length] * 3], rtol=1e-6)


def test_the_constraint_of_a_sequence_penalty_is_that_of_the_sequence_ratio():
    # s = 2 and .5, whatever the ratios of the tokens: (s-1)^2 = 1 and .25 for each of two tokens, and 2.5 times that.
    arrays = by_hand([[4.0, 1.0], [0.25, 1.0]], [1.0, -1.0])
    _, stats, _ = evaluate("r2vpo", arrays, variance_coef=2.5, **SEQUENCE)
    np.testing.assert_allclose(stats["ratio_variance"], (2.5, 4), rtol=1e-5)
    np.testing.assert_allclose(stats["penalty"], (6.25, 4), rtol=1e-5)
    _, stats, _ = evaluate("r2vpo", arrays, "sequence_mean", variance_coef=2.5, **SEQUENCE)
    np.testing.assert_allclose(stats["ratio_variance"], (1.25, 2), rtol=1e-5)


def test_the_sequence_penalty_is_accurate_near_one():
    # Tokens that nearly cancel: the gradient's stand-in must not leave its rounding in the value.
    arrays = by_hand([[1.0, 1.0]], [0.0])
    arrays["logp"][0, :2] = (0.3, -0.3 + 2e-5)
    mean = np.mean(arrays["logp"][0, :2].astype(np.float64))
    loss, stats, _ = evaluate("r2vpo", arrays, variance_coef=1.0, **SEQUENCE)
    np.testing.assert_allclose(stats["penalty"][0], 2 * math.expm1(mean) ** 2, rtol=1e-4)
    np.testing.assert_allclose(loss, math.expm1(mean) ** 2, rtol=1e-4)


# The threshold of M2PO ------------------------------------------------------------------------------


def tokens(log_ratio, advantages):
    """One row of tokens as arrays of the usual shape, logp their log-ratios."""
    arrays = {k: np.zeros((ROWS, COLUMNS), np.float32) for k in ("logp", "behavior_logp", "advantages")}
    arrays["logp"][1, : len(log_ratio)] = log_ratio
    arrays["advantages"][1, : len(log_ratio)] = advantages
    arrays["mask"] = np.zeros((ROWS, COLUMNS), bool)
    arrays["mask"][1, : len(log_ratio)] = True
    return arrays


def batch_with_a_threshold():
    """(arrays for `m2po_threshold`, weights); the budget binds."""
    arrays = batch(seed=4)
    weights = arrays.pop("weights")
    arrays["logp"] += arrays["logp"] - arrays["behavior_logp"]
    return arrays, weights


@pytest.mark.parametrize(
    ("log_ratio", "advantages", "budget", "expected"),
    [
        # Squares .01, .04, .09, .25: running means .01, .025, .0467, .0975.
        ([0.1, 0.2, 0.3, 0.5], 1.0, 0.04, 0.25),  # two are kept: halfway between .2 and .3
        ([0.5, 0.1, 0.3, 0.2], 1.0, 0.04, 0.25),  # in any order
        ([0.1, 0.2, 0.3, 0.5], 1.0, 0.05, 0.4),
        ([0.1, 0.2, 0.3, 0.5], 1.0, 0.1, math.inf),
        ([0.1, 0.2, 0.3, 0.5], 1.0, 0.001, 0.05),  # not even .01 fits
        ([-0.1, 0.2, -0.3, 0.5], [-1, 1, -1, 1], 0.04, 0.25),  # falls of A < 0 are as harmful
        # Mean .04 for two: within a budget just above, and beyond one just below.
        ([0.2, -0.2], [1, -1], 0.0401, math.inf),
        ([0.2, -0.2], [1, -1], 0.0399, 0.1),
        ([0.25, -0.25], [1, -1], 0.0625, math.inf),  # exactly the budget, in binary too
        # A token that a step along its advantage brings back is not counted, nor one without an advantage.
        ([-3.0, 3.0, 5.0], [1, -1, 0], 0.04, math.inf),
        ([0.1, -3.0, 0.3], [1, 1, 1], 0.04, 0.2),  # .01 fits, (.01 + .09) / 2 does not
        ([0.7], 1.0, 0.04, 0.35),  # a group of one
        ([0.1], 1.0, 0.04, math.inf),
    ],
)
def test_m2po_threshold(log_ratio, advantages, budget, expected):
    actual = losses.m2po_threshold(**tokens(log_ratio, advantages), budget=budget)
    np.testing.assert_allclose(actual, expected, rtol=1e-5)


def test_m2po_threshold_cuts_all_tokens_of_one_log_ratio_or_none():
    # .01 and .09 fit in .055, a second .09 does not: which of the equals stays cannot be told, so none does.
    # Log-probabilities in bfloat16 make such ties.
    arrays = tokens([0.1, 0.3, 0.3], 1.0)
    bound = losses.m2po_threshold(**arrays, budget=0.055)
    np.testing.assert_allclose(bound, 0.2, rtol=1e-5)
    _, _, grad = evaluate("m2po", arrays, threshold=bound)
    np.testing.assert_allclose(-3 * grad[1, :3], [math.exp(0.1), 0, 0], rtol=1e-5)


def test_m2po_threshold_of_nothing_is_infinite():
    arrays = tokens([9.0, 9.0], 1.0) | {"mask": np.zeros((ROWS, COLUMNS), bool)}
    assert losses.m2po_threshold(**arrays) == math.inf


def test_m2po_threshold_defaults_to_the_published_budget():
    # Running means .01, .025, .0467 again.
    np.testing.assert_allclose(losses.m2po_threshold(**tokens([0.1, 0.2, 0.3, 0.5], 1.0)), 0.25, rtol=1e-5)


def test_m2po_threshold_does_not_depend_on_order_or_padding():
    arrays, _ = batch_with_a_threshold()
    expected = losses.m2po_threshold(**arrays)
    assert 0 < expected < 1, "something is cut"
    order = np.asarray([2, 0, 3, 1])
    assert losses.m2po_threshold(**{k: v[order] for k, v in arrays.items()}) == expected
    fill = {"logp": math.nan, "behavior_logp": 0, "advantages": math.inf, "mask": False}
    padded = {k: np.pad(v, ((0, 1), (2, 3)), constant_values=fill[k]) for k, v in arrays.items()}
    assert losses.m2po_threshold(**padded) == expected
    assert jax.jit(losses.m2po_threshold)(**arrays) == expected


def test_m2po_threshold_has_no_gradient():
    arrays, _ = batch_with_a_threshold()
    grad = jax.grad(lambda logp: losses.m2po_threshold(**(arrays | {"logp": logp})))(arrays["logp"])
    np.testing.assert_array_equal(grad, 0.0)
    # Nor does the loss give it one.
    grad = jax.grad(lambda t: losses.m2po_loss(**arrays, threshold=t)[0])(np.float32(0.1))
    assert grad == 0


@pytest.mark.parametrize("budget", [0.01, 0.04])
def test_m2po_without_a_threshold_takes_that_of_its_arrays(budget):
    arrays, weights = batch_with_a_threshold()
    bound = losses.m2po_threshold(**arrays, budget=budget)
    assert 0 < bound < 1, "something is cut"
    arrays["weights"] = weights
    expected = evaluate("m2po", arrays, threshold=bound, jit=False)
    actual = jax.value_and_grad(lambda logp: losses.m2po_loss(**(arrays | {"logp": logp}), budget=budget), has_aux=True)
    (loss, stats), grad = actual(arrays["logp"])
    jax.tree.map(np.testing.assert_array_equal, (loss, stats, grad), expected)
    assert budget == 0.01 or losses.m2po_loss(**arrays)[0] == loss, "the published budget is the default"


@settings(max_examples=50, deadline=None, derandomize=True, database=None)
@given(
    # Distinct, and no mean of their squares on the budget.
    log_ratio=hnp.arrays(np.int16, (ROWS, COLUMNS), elements=st.integers(1, 1500), unique=True),
    sign=hnp.arrays(np.int8, (ROWS, COLUMNS), elements=st.sampled_from([-1, 1])),
    advantages=hnp.arrays(np.int8, (ROWS, COLUMNS), elements=st.integers(-2, 2)),
    mask=hnp.arrays(bool, (ROWS, COLUMNS)),
    budget=st.floats(0.0025, 1.0),
)
def test_m2po_cuts_the_largest_harmful_tokens_until_the_mean_fits(log_ratio, sign, advantages, mask, budget):
    log_ratio = (sign * log_ratio / 1000).astype(np.float32)
    advantages = advantages.astype(np.float32)
    arrays = {"logp": log_ratio, "behavior_logp": np.zeros_like(log_ratio), "advantages": advantages, "mask": mask}
    budget = np.float32(budget + 1e-7)
    harmful = sorted(float(abs(x)) for x in log_ratio[mask & (advantages * log_ratio > 0)])
    kept = list(harmful)
    while kept and np.mean(np.square(kept)) > budget:
        kept.pop()
    bound = float(losses.m2po_threshold(**arrays, budget=budget))
    assert bound > 0
    if len(kept) == len(harmful):
        assert bound == math.inf
    else:
        assert max(kept, default=0.0) < bound < harmful[len(kept)]
    # And the loss cuts just those.
    _, stats, grad = evaluate("m2po", arrays, threshold=bound)
    cut = mask & (advantages * log_ratio > 0) & (np.abs(log_ratio) > bound)
    assert stats["clip_fraction_low"][0] + stats["clip_fraction_high"][0] == np.sum(cut) == len(harmful) - len(kept)
    np.testing.assert_array_equal(grad != 0, mask & (advantages != 0) & ~cut)


def test_m2po_is_exact_for_any_split_into_micro_batches():
    arrays, weights = batch_with_a_threshold()
    bound = losses.m2po_threshold(**arrays)
    arrays["weights"] = weights
    whole, _, grad = evaluate("m2po", arrays, normalizer=np.sum(arrays["mask"]), threshold=bound)
    assert 0 < np.sum(grad != 0) < np.sum(arrays["mask"]), "some are cut"
    masks = [arrays["mask"] & (np.arange(ROWS) < 2)[:, None], arrays["mask"] & (np.arange(ROWS) >= 2)[:, None]]
    parts = [evaluate("m2po", arrays | {"mask": m}, normalizer=np.sum(arrays["mask"]), threshold=bound) for m in masks]
    same_up_to_rounding(parts[0][0] + parts[1][0], whole)
    same_up_to_rounding(parts[0][2] + parts[1][2], grad)
