"""Objectives against numbers worked out by hand.

The oracles give r = exp(logp - behavior_logp), and check the loss and the gradient coefficient
g = d(-loss)/d(logp) * count.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from r2vpo_jax import losses

# What each objective needs beyond its defaults; the tests over `losses.names()` take it from here.
REQUIRED = {"r2vpo": {"variance_coef": 2.5}}
NAMES = losses.names()
REDUCTIONS = losses.REDUCTIONS
TRACED = ("variance_coef", "weights", "normalizer")


@functools.cache
def _evaluator(name, jit, static):
    def call(logp, behavior_logp, advantages, mask, traced):
        return losses.get(name)(logp, behavior_logp, advantages, mask, **traced, **dict(static))

    function = jax.value_and_grad(call, has_aux=True)
    return jax.jit(function) if jit else function


def evaluate(name, logp, behavior_logp, advantages, mask, *, jit=True, **hyper):
    """(loss, stats, gradient in logp). Compiled once for each objective, shape and set of static arguments."""
    hyper = REQUIRED.get(name, {}) | hyper
    traced = {k: np.asarray(v, np.float32) for k, v in hyper.items() if k in TRACED}
    static = tuple(sorted((k, v) for k, v in hyper.items() if k not in TRACED))
    (loss, stats), grad = _evaluator(name, jit, static)(logp, behavior_logp, advantages, mask, traced)
    return loss, stats, grad


def one_token(name, advantage, ratio, jit, **hyper):
    """(loss, gradient coefficient) of a single token."""
    arrays = [[[math.log(ratio) - 1.5]], [[-1.5]], [advantage]]
    loss, _, grad = evaluate(
        name, *(np.asarray(x, np.float32) for x in arrays), np.ones((1, 1), bool), jit=jit, **hyper
    )
    return float(loss), -float(grad[0, 0])


# The arrays of most tests have one shape, so that they share compiled functions.
ROWS, COLUMNS = 4, 5


def batch(seed=0, rows=ROWS, columns=COLUMNS):
    """Random arrays as keyword arguments; ratios within a factor of about 2, some rows short, none empty."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, columns + 1, rows)
    behavior_logp = -rng.exponential(1.0, (rows, columns))
    arrays = {
        "logp": behavior_logp + rng.normal(0, 0.3, (rows, columns)),
        "behavior_logp": behavior_logp,
        "advantages": rng.normal(0, 1, (rows, columns)),
        "weights": rng.uniform(0.5, 2.0, (rows, columns)),
    }
    return {k: v.astype(np.float32) for k, v in arrays.items()} | {"mask": np.arange(columns) < lengths[:, None]}


def by_hand(ratio, advantages, weights=1.0):
    """Ragged rows of ratios and advantages (one number a row, or one a token) as arrays of the usual shape."""
    arrays = {k: np.zeros((ROWS, COLUMNS), np.float32) for k in ("logp", "behavior_logp", "advantages", "weights")}
    arrays["mask"] = np.zeros((ROWS, COLUMNS), bool)
    for i, row in enumerate(ratio):
        arrays["logp"][i, : len(row)] = np.log(row)
        arrays["advantages"][i, : len(row)] = advantages[i]
        arrays["mask"][i, : len(row)] = True
    arrays["weights"][:] = weights
    return arrays


def reduce_with(reduction, mask):
    """The arguments for a reduction by its usual normalizer."""
    normalizer = {
        "token_mean": np.sum(mask),
        "sequence_mean": np.sum(np.any(mask, axis=1)),
        "constant_length": np.size(mask),
    }[reduction]
    return {"reduction": reduction, "normalizer": normalizer}


def trace(name, arrays, **hyper):
    """Go through an objective without compiling anything."""
    hyper = REQUIRED.get(name, {}) | hyper
    return jax.eval_shape(lambda arrays: losses.get(name)(**arrays, **hyper), arrays)


def same_up_to_rounding(actual, expected):
    actual, expected = np.asarray(actual), np.asarray(expected)
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6 * np.max(np.abs(expected)))


# One token, by hand ---------------------------------------------------------------------------------


@pytest.mark.parametrize("jit", [True, False], ids=["jit", "eager"])
@pytest.mark.parametrize(
    ("advantage", "coef", "ratio", "loss", "coefficient"),
    [
        # loss = -rA + coef (r-1)^2             g = r (A - 2 coef (r-1))
        (1.0, 2.5, 1.0, -1.0, 1.0),  # at r = 1 the penalty and its gradient vanish
        (1.0, 2.5, 1.3, -1.075, -0.65),  # -1.3 + 2.5 * .09          1.3 (1 - 5 * .3)
        (1.0, 0.5, 2.0, -1.5, 0.0),  # -2 + .5 * 1                   r* = 1 + 1 / (2 * .5) = 2
        (1.0, 2.5, 1.2, -1.1, 0.0),  # the objective's maximum, A + A^2 / (4 coef), at r* = 1.2
        (-1.0, 2.5, 0.8, 0.9, 0.0),  # .8 + 2.5 * .04                r* = 1 - 1 / 5
        (-1.0, 2.5, 0.1, 2.125, 0.35),  # .1 + 2.5 * .81             .1 (-1 + 5 * .9)
        (-1.0, 2.5, 2.0, 4.5, -12.0),  # 2 + 2.5 * 1                 2 (-1 - 5)
        (0.0, 2.5, 1.5, 0.625, -3.75),  # 2.5 * .25                  -5 * 1.5 * .5: back to r = 1
        (0.0, 2.5, 0.5, 0.625, 1.25),  # 2.5 * .25                   5 * .5 * .5
        (1.0, 0.0, 1.3, -1.3, 1.3),  # no penalty: r A
    ],
)
def test_r2vpo(advantage, coef, ratio, loss, coefficient, jit):
    actual = one_token("r2vpo", advantage, ratio, jit, variance_coef=coef)
    np.testing.assert_allclose(actual, (loss, coefficient), rtol=1e-5, atol=2e-6)


DAPO = {"clip_low": 0.2, "clip_high": 0.28}
DUAL = {"dual_clip": 3.0}


@pytest.mark.parametrize("jit", [True, False], ids=["jit", "eager"])
@pytest.mark.parametrize(
    ("hyper", "advantage", "ratio", "loss", "coefficient"),
    [
        # loss = -min(rA, clip(r) A)         g = rA, or 0 where the clip binds
        ({}, 1.0, 1.0, -1.0, 1.0),
        ({}, 1.0, 1.1, -1.1, 1.1),  # inside the clip: r A
        ({}, 1.0, 1.3, -1.2, 0.0),  # min(1.3, 1.2)
        ({}, 1.0, 0.5, -0.5, 0.5),  # min(.5, .8): no clip against an improvement
        ({}, -1.0, 0.5, 0.8, 0.0),  # min(-.5, -.8)
        ({}, -1.0, 1.3, 1.3, -1.3),  # min(-1.3, -1.2)
        ({}, -1.0, 4.0, 4.0, -4.0),  # unbounded without the dual clip
        ({}, 0.0, 1.5, 0.0, 0.0),  # the clip does not pull a token with A = 0 back
        (DAPO, 1.0, 1.25, -1.25, 1.25),  # clipped at .2, not at .28
        (DAPO, 1.0, 1.29, -1.28, 0.0),
        (DAPO, -1.0, 0.79, 0.8, 0.0),  # the lower bound stays at .2
        (DAPO, -1.0, 0.81, 0.81, -0.81),
        (DUAL, -1.0, 4.0, 3.0, 0.0),  # max(-4, -3)
        (DUAL, -1.0, 2.0, 2.0, -2.0),
        (DUAL, -1.0, 0.5, 0.8, 0.0),
        (DUAL, 1.0, 4.0, -1.2, 0.0),  # for A > 0 only the usual clip
    ],
)
def test_ppo_clip(hyper, advantage, ratio, loss, coefficient, jit):
    actual = one_token("ppo_clip", advantage, ratio, jit, **hyper)
    np.testing.assert_allclose(actual, (loss, coefficient), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("jit", [True, False], ids=["jit", "eager"])
@pytest.mark.parametrize(
    ("advantage", "ratio"), [(1.0, 1.0), (1.0, 1.3), (1.0, 0.5), (-1.0, 0.5), (-2.0, 3.0), (0.0, 2.0)]
)
def test_policy_gradient(advantage, ratio, jit):
    actual = one_token("policy_gradient", advantage, ratio, jit)
    np.testing.assert_allclose(actual, (-ratio * advantage, ratio * advantage), rtol=1e-5)


@pytest.mark.parametrize("jit", [True, False], ids=["jit", "eager"])
@pytest.mark.parametrize("advantage", [1.0, -1.0, 0.75, -2.5, 0.0])
@pytest.mark.parametrize("name", NAMES)
def test_at_the_behavior_policy_every_coefficient_is_the_advantage(name, advantage, jit):
    assert one_token(name, advantage, 1.0, jit) == (-advantage, advantage)


@pytest.mark.parametrize("magnitude", [0.5, 1.0, 2.0])
def test_r2vpo_is_spo_where_the_coefficient_is_the_scaled_advantage(magnitude):
    # SPO (arXiv 2401.16025): r A - |A| (r - 1)^2 / (2 epsilon), coefficient r (A - |A| (r - 1) / epsilon).
    epsilon = 0.2
    ratio = np.asarray([[0.5, 0.8, 1.0, 1.2, 3.0]] * 2)
    advantages = np.asarray([[magnitude], [-magnitude]])
    arrays = by_hand(ratio, advantages)
    hyper = reduce_with("token_mean", arrays["mask"])
    loss, _, grad = evaluate("r2vpo", **arrays, variance_coef=magnitude / (2 * epsilon), **hyper)
    spo = ratio * advantages - np.abs(advantages) * (ratio - 1) ** 2 / (2 * epsilon)
    coefficient = ratio * (advantages - np.abs(advantages) * (ratio - 1) / epsilon)
    np.testing.assert_allclose(loss, -np.mean(spo), rtol=1e-5)
    np.testing.assert_allclose(-grad[:2] * ratio.size, coefficient, rtol=1e-5, atol=2e-5)
    # It turns back at 1 + sign(A) epsilon.
    np.testing.assert_allclose([grad[0, 3], grad[1, 1]], 0.0, atol=1e-6)


@pytest.mark.parametrize(("advantage", "coef"), [(1.0, 2.5), (-0.5, 1.0), (2.0, 5.0)])
def test_r2vpo_objective_is_concave_in_the_ratio(advantage, coef):
    turning = 1 + advantage / (2 * coef)
    ratios = [0.5 * turning, turning, 1.5 * turning]
    points = [one_token("r2vpo", advantage, r, True, variance_coef=coef) for r in ratios]
    np.testing.assert_allclose(-points[1][0], advantage + advantage**2 / (4 * coef), rtol=1e-5)
    assert points[0][0] > points[1][0] < points[2][0]
    assert points[0][1] > 0 > points[2][1]


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_r2vpo_without_penalty_is_the_policy_gradient(reduction):
    arrays = batch()
    hyper = reduce_with(reduction, arrays["mask"])
    ours, _, our_grad = evaluate("r2vpo", **arrays, variance_coef=0.0, **hyper)
    plain, _, plain_grad = evaluate("policy_gradient", **arrays, **hyper)
    np.testing.assert_array_equal(ours, plain)
    np.testing.assert_array_equal(our_grad, plain_grad)


# Statistics -----------------------------------------------------------------------------------------


def test_stats_of_r2vpo():
    arrays = by_hand([[1.0, 1.2, 0.5], [2.0]], advantages=[1.0, -1.0])
    arrays["weights"][0, 1] = 2.0
    _, stats, _ = evaluate("r2vpo", **arrays, **reduce_with("token_mean", arrays["mask"]))
    assert set(stats) == {"surrogate", "penalty", "ratio_variance", "clamped"}
    np.testing.assert_allclose(stats["surrogate"], (1.9, 4), rtol=1e-5)  # 1 + 2.4 + .5 - 2
    np.testing.assert_allclose(stats["ratio_variance"], (1.33, 4), rtol=1e-5)  # 0 + 2 * .04 + .25 + 1
    np.testing.assert_allclose(stats["penalty"], (3.325, 4), rtol=1e-5)  # 2.5 * 1.33
    np.testing.assert_allclose(stats["clamped"], (0, 4))


@pytest.mark.parametrize(
    ("reduction", "expected"),
    # Rows (r - 1)^2 = (1 | 0, .25, .5): their token means are 1 and .25.
    [("token_mean", (1.75, 4)), ("constant_length", (1.75, 4)), ("sequence_mean", (1.25, 2))],
)
@pytest.mark.parametrize("name", NAMES)
def test_ratio_variance_follows_the_reduction(name, reduction, expected):
    arrays = by_hand([[2.0], [1.0, 1.5, 1 + math.sqrt(0.5)]], advantages=[1.0, -1.0])
    _, stats, _ = evaluate(name, **arrays, **reduce_with(reduction, arrays["mask"]))
    np.testing.assert_allclose(stats["ratio_variance"], expected, rtol=1e-5)


def test_clip_fractions():
    # A > 0: r = 4 is cut above, r = .5 is not. A < 0: r = .5 is cut below; r = 5 by the dual clip. A = 0: never.
    arrays = by_hand([[4.0, 0.5], [1.3, 0.5, 5.0], [1.3]], advantages=[1.0, -1.0, 0.0])
    arrays["logp"][3] = 9.0  # masked
    _, stats, _ = evaluate("ppo_clip", **arrays, **DUAL)
    assert {k: tuple(map(float, stats[k])) for k in stats if "fraction" in k} == {
        "clip_fraction_high": (1.0, 6.0),
        "clip_fraction_low": (1.0, 6.0),
        "dual_clip_fraction": (1.0, 6.0),
    }


def test_ratio_variance_is_accurate_near_one():
    # At log r = 1e-5, exp(log r) - 1 in float32 is off by up to 1 %; expm1 is not.
    arrays = by_hand([[1.0]], advantages=[1.0])
    arrays["logp"][0, 0] = 1e-5
    _, stats, _ = evaluate("r2vpo", **arrays, **reduce_with("token_mean", arrays["mask"]))
    np.testing.assert_allclose(stats["ratio_variance"][0], math.expm1(1e-5) ** 2, rtol=1e-5)


# Reductions, weights and normalizers ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("reduction", "normalizer", "loss", "coefficients"),
    [
        # Rows of 1 and 3 tokens, with token losses 1 and 0 (advantages -1 and 0). The coefficients are those of
        # a token of each row with advantage 1: its share of the reduction.
        ("token_mean", 4, 1 / 4, (1 / 4, 1 / 4)),
        ("sequence_mean", 2, 1 / 2, (1 / 2, 1 / 6)),
        ("constant_length", 2 * 4, 1 / 8, (1 / 8, 1 / 8)),
    ],
)
def test_reductions(reduction, normalizer, loss, coefficients):
    hyper = {"reduction": reduction, "normalizer": normalizer}
    arrays = by_hand([[1.0], [1.0, 1.0, 1.0]], advantages=[-1.0, 0.0])
    actual, _, _ = evaluate("policy_gradient", **arrays, **hyper)
    np.testing.assert_allclose(actual, loss, rtol=1e-6)
    arrays = by_hand([[1.0], [1.0, 1.0, 1.0]], advantages=[1.0, 1.0])
    _, _, grad = evaluate("policy_gradient", **arrays, **hyper)
    np.testing.assert_allclose(-grad[:2], arrays["mask"][:2] * np.asarray(coefficients)[:, None], rtol=1e-6)


@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean"])
def test_default_normalizer_and_weights(reduction):
    arrays = batch() | {"weights": np.ones((ROWS, COLUMNS), np.float32)}
    expected = evaluate("r2vpo", **arrays, **reduce_with(reduction, arrays["mask"]))
    del arrays["weights"]
    jax.tree.map(same_up_to_rounding, evaluate("r2vpo", **arrays, reduction=reduction), expected)


def test_sequence_mean_leaves_out_empty_sequences():
    # Row 2 is empty: -(1 + 3) / 2.
    arrays = by_hand([[1.0, 1.0], [], [1.0]], advantages=[1.0, 100.0, 3.0])
    assert losses.count(arrays["mask"], "sequence_mean") == 2
    assert losses.count(arrays["mask"], "token_mean") == 3
    loss, stats, _ = evaluate("policy_gradient", **arrays, **reduce_with("sequence_mean", arrays["mask"]))
    np.testing.assert_allclose(loss, -2.0, rtol=1e-6)
    assert stats["surrogate"] == (4.0, 2.0)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_weights_scale_loss_and_gradient_but_not_the_normalizer(name, reduction):
    arrays = batch()
    weights = arrays.pop("weights")
    hyper = reduce_with(reduction, arrays["mask"])
    plain, _, plain_grad = evaluate(name, **arrays, weights=np.ones_like(weights), **hyper)
    doubled, _, doubled_grad = evaluate(name, **arrays, weights=np.full_like(weights, 2.0), **hyper)
    _, _, weighted_grad = evaluate(name, **arrays, weights=weights, **hyper)
    np.testing.assert_allclose(doubled, 2 * plain, rtol=1e-6)
    np.testing.assert_allclose(doubled_grad, 2 * plain_grad, rtol=1e-6)
    np.testing.assert_allclose(weighted_grad, weights * plain_grad, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("name", "reduction"), [(n, "token_mean") for n in NAMES] + [("r2vpo", r) for r in REDUCTIONS[1:]]
)
def test_micro_batches_add_up(name, reduction):
    parts = [batch(seed=1), batch(seed=2)]
    whole = {k: np.concatenate([p[k] for p in parts]) for k in parts[0]}
    hyper = reduce_with(reduction, whole["mask"])
    results = [evaluate(name, **part, **hyper) for part in parts]
    loss, stats, grad = evaluate(name, **whole, **hyper)
    same_up_to_rounding(results[0][0] + results[1][0], loss)
    same_up_to_rounding(np.concatenate([r[2] for r in results]), grad)
    assert stats["ratio_variance"][0] > 0
    for key, expected in stats.items():
        same_up_to_rounding(np.add(results[0][1][key], results[1][1][key]), expected)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_order_of_rows_does_not_matter(name, reduction):
    arrays, order = batch(), np.asarray([2, 0, 3, 1])
    hyper = reduce_with(reduction, arrays["mask"])
    loss, stats, grad = evaluate(name, **arrays, **hyper)
    permuted = evaluate(name, **{k: v[order] for k, v in arrays.items()}, **hyper)
    jax.tree.map(same_up_to_rounding, permuted, (loss, stats, grad[order]))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_padding_columns_do_not_matter(reduction):
    arrays = batch(columns=COLUMNS - 2)
    padding = ((0, 0), (0, 2))
    padded = {k: np.pad(v, padding, constant_values=False if k == "mask" else 7) for k, v in arrays.items()}
    hyper = reduce_with(reduction, arrays["mask"])
    loss, stats, grad = evaluate("r2vpo", **arrays, **hyper)
    jax.tree.map(same_up_to_rounding, evaluate("r2vpo", **padded, **hyper), (loss, stats, np.pad(grad, padding)))


@pytest.mark.parametrize("name", NAMES)
def test_one_advantage_a_sequence_is_broadcast_over_its_tokens(name):
    arrays = batch() | {"advantages": np.asarray([1.0, -1.0, 0.5, 0.0], np.float32)}
    per_token = arrays | {"advantages": np.repeat(arrays["advantages"][:, None], COLUMNS, axis=1)}
    hyper = reduce_with("sequence_mean", arrays["mask"])
    jax.tree.map(np.testing.assert_array_equal, evaluate(name, **arrays, **hyper), evaluate(name, **per_token, **hyper))


# What must not leak ---------------------------------------------------------------------------------


# The compiler may turn a product with the mask into a choice, which hides a NaN * 0; eager code does not.
@pytest.mark.parametrize(
    ("bad", "jit"),
    [(math.nan, True), (math.inf, True), (-math.inf, True), (math.nan, False)],
    ids=["nan", "inf", "minus_inf", "nan_eager"],
)
@pytest.mark.parametrize("argument", ["logp", "behavior_logp", "advantages", "weights"])
@pytest.mark.parametrize("name", NAMES)
def test_masked_positions_contribute_nothing(name, argument, bad, jit):
    arrays = batch()
    poisoned = arrays | {argument: np.where(arrays["mask"], arrays[argument], np.float32(bad))}
    assert not np.all(arrays["mask"])
    hyper = reduce_with("token_mean", arrays["mask"])
    expected, actual = (evaluate(name, **x, **hyper, jit=jit) for x in (arrays, poisoned))
    jax.tree.map(np.testing.assert_array_equal, actual, expected)
    assert np.isfinite(actual[0])
    np.testing.assert_array_equal(np.asarray(actual[2])[~np.asarray(arrays["mask"])], 0.0)


@pytest.mark.parametrize("name", NAMES)
def test_a_masked_sequence_may_have_any_advantage(name):
    arrays = batch() | {"advantages": np.asarray([1.0, -1.0, 0.5, 2.0], np.float32)}
    arrays["mask"][2] = False
    hyper = reduce_with("sequence_mean", arrays["mask"])
    expected = evaluate(name, **arrays, **hyper)
    arrays["advantages"][2] = math.nan
    actual = evaluate(name, **arrays, **hyper)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)
    assert np.isfinite(actual[0])


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("name", NAMES)
def test_an_empty_mask_gives_zero(name, reduction):
    arrays = batch() | {"mask": np.zeros((ROWS, COLUMNS), bool)}
    loss, stats, grad = evaluate(name, **arrays, reduction=reduction, normalizer=0)
    assert loss == 0
    np.testing.assert_array_equal(grad, 0.0)
    jax.tree.map(lambda x: np.testing.assert_array_equal(x, 0.0), stats)


@pytest.mark.parametrize("name", NAMES)
def test_a_nan_that_counts_is_not_hidden(name):
    arrays = batch()
    arrays["logp"][0, 0] = math.nan
    loss, _, _ = evaluate(name, **arrays, **reduce_with("token_mean", arrays["mask"]))
    assert np.isnan(loss)


@pytest.mark.parametrize("name", NAMES)
def test_only_logp_has_a_gradient(name):
    arrays = batch()
    traced = {"weights": arrays.pop("weights"), "variance_coef": np.float32(2.5)}
    if name not in REQUIRED:
        del traced["variance_coef"]
    names = ("behavior_logp", "advantages", *traced)

    def loss(differentiated):
        return losses.get(name)(**{**arrays, **traced, **differentiated})[0]

    grads = jax.jit(jax.grad(loss))({k: {**arrays, **traced}[k] for k in names})
    jax.tree.map(lambda x: np.testing.assert_array_equal(x, 0.0), grads)
    assert np.any(jax.jit(jax.grad(loss))({"logp": arrays["logp"]})["logp"])


def test_stats_have_no_gradient():
    arrays = batch()

    def statistics(logp):
        return sum(total for total, _ in losses.r2vpo_loss(**{**arrays, "logp": logp}, variance_coef=1.0)[1].values())

    np.testing.assert_array_equal(jax.jit(jax.grad(statistics))(arrays["logp"]), 0.0)


# Numerics -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_log_ratio_clamp(name):
    # -A r of a negative advantage, and the penalty, grow with r: outside the clamp they are constant.
    arrays = by_hand([[1.0] * 3] * 2, advantages=[-1.0, -1.0])
    arrays["logp"][:2, :3] = [[19.5, 20.5, 1e4], [-19.5, -20.5, -1e4]]
    loss, stats, grad = evaluate(name, **arrays, **reduce_with("token_mean", arrays["mask"]))
    assert np.isfinite(loss)
    assert grad[0, 0] > 0
    np.testing.assert_array_equal(grad[:2, 1:], 0.0)
    np.testing.assert_allclose(stats["clamped"], (4, 6))
    variance = math.expm1(19.5) ** 2 + 2 * math.expm1(20) ** 2 + 3
    np.testing.assert_allclose(stats["ratio_variance"], (variance, 6), rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_inputs_are_computed_in_float32(name):
    arrays = batch()
    hyper = reduce_with("token_mean", arrays["mask"])
    low = {k: v if k == "mask" else v.astype(jnp.bfloat16) for k, v in arrays.items()}
    exact = {k: v if k == "mask" else v.astype(jnp.float32) for k, v in low.items()}
    (loss, stats, _), (expected, expected_stats, _) = evaluate(name, **low, **hyper), evaluate(name, **exact, **hyper)
    assert {x.dtype for x in jax.tree.leaves((loss, stats))} == {jnp.dtype("float32")}
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    for key, value in stats.items():
        np.testing.assert_allclose(value, expected_stats[key], rtol=1e-6)


def test_vmap_over_the_variance_coefficient():
    arrays = batch()
    coefs = np.asarray([0.0, 0.5, 2.5])
    many, _ = jax.jit(jax.vmap(lambda c: losses.r2vpo_loss(**arrays, variance_coef=c)))(coefs)
    hyper = reduce_with("token_mean", arrays["mask"])
    each = [evaluate("r2vpo", **arrays, variance_coef=c, **hyper)[0] for c in coefs]
    np.testing.assert_allclose(many, each, rtol=1e-6)
    assert len(set(np.asarray(many).tolist())) == 3


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("name", NAMES)
def test_no_implicit_rank_promotion(name, reduction):
    arrays = batch() | {"advantages": np.ones(ROWS)}
    with jax.numpy_rank_promotion("raise"):
        trace(name, arrays, **reduce_with(reduction, arrays["mask"]))


# Away from the kinks of the clip at .8 and 1.2; both signs of A; clipped and unclipped tokens.
FINITE_DIFFERENCE_RATIOS = np.asarray([[0.6, 1.0, 1.5], [0.9, 1.1, 1.6]])
ANALYTIC = {
    "r2vpo": lambda r, a: r * (a - 2 * 2.5 * (r - 1)),
    "ppo_clip": lambda r, a: np.where(((a > 0) & (r > 1.2)) | ((a < 0) & (r < 0.8)), 0.0, r * a),
    "policy_gradient": lambda r, a: r * a,
}


@pytest.mark.parametrize("name", NAMES)
def test_finite_differences_through_the_softmax(name):
    rng = np.random.default_rng(1)
    logits = rng.normal(0, 1, (2, 3, 4)).astype(np.float32)
    tokens = rng.integers(0, 4, (2, 3))
    advantages = np.asarray([[-1.0, 1.0, 1.0], [1.0, -0.5, -1.0]])
    mask = np.asarray([[1, 1, 1], [1, 1, 0]])

    def take(logits):
        return jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[..., None], axis=-1)[..., 0]

    behavior_logp = take(logits) - np.log(FINITE_DIFFERENCE_RATIOS)

    def loss(logits):
        hyper = REQUIRED.get(name, {})
        return losses.get(name)(take(logits), behavior_logp, advantages, mask, **hyper)[0]

    # d(log pi(a)) / d(logits) = one_hot(a) - pi, and 5 tokens count.
    softmax_grad = np.eye(4)[tokens] - jax.nn.softmax(logits)
    coefficient = ANALYTIC[name](FINITE_DIFFERENCE_RATIOS, advantages) * mask
    expected = np.asarray(-coefficient[..., None] * softmax_grad / 5)

    # Fourth-order central differences: a step that float32 resolves still truncates little.
    step = 0.03
    directions = np.eye(logits.size).reshape(-1, *logits.shape) * step
    offsets = np.asarray([-2.0, -1.0, 1.0, 2.0])[:, None, None, None, None] * directions
    values = jax.jit(lambda points: jax.lax.map(loss, points))(logits + offsets.reshape(-1, *logits.shape))
    numeric = np.asarray([1, -8, 8, -1]) @ np.asarray(values).reshape(4, -1) / (12 * step)
    np.testing.assert_allclose(numeric.reshape(logits.shape), expected, atol=2e-4)
    np.testing.assert_allclose(jax.jit(jax.grad(loss))(logits), expected, rtol=1e-4, atol=1e-6)
    assert np.max(np.abs(expected)) > 0.1


def floats(limit):
    return hnp.arrays(np.float32, (ROWS, COLUMNS), elements=st.floats(-limit, limit, width=32))


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=30, deadline=None, derandomize=True, database=None)
@given(
    log_ratio=floats(1e4),
    behavior_logp=floats(128),
    advantages=floats(1024),
    mask=hnp.arrays(bool, (ROWS, COLUMNS)),
    reduction=st.sampled_from(REDUCTIONS),
)
def test_extremes_stay_finite(name, log_ratio, behavior_logp, advantages, mask, reduction):
    hyper = reduce_with(reduction, mask) | ({"variance_coef": 50.0} if name == "r2vpo" else {})
    logp, weights = behavior_logp + log_ratio, np.ones_like(log_ratio)
    result = evaluate(name, logp, behavior_logp, advantages, mask, weights=weights, **hyper)
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(result))


# What is refused ------------------------------------------------------------------------------------


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


def test_the_variance_coefficient_is_a_scalar():
    arrays = batch()
    with pytest.raises(AssertionError, match="Chex"):
        trace("r2vpo", arrays, variance_coef=np.ones(5))


@pytest.mark.parametrize("name", NAMES)
def test_constant_length_needs_a_normalizer(name):
    arrays = batch()
    with pytest.raises(ValueError, match="normalizer"):
        trace(name, arrays, reduction="constant_length")
    with pytest.raises(ValueError, match="normalizer"):
        losses.count(arrays["mask"], "constant_length")


@pytest.mark.parametrize("name", NAMES)
def test_unknown_reduction(name):
    arrays = batch()
    with pytest.raises(ValueError, match=r"unknown reduction 'sum'.*token_mean"):
        trace(name, arrays, reduction="sum", normalizer=1.0)
    with pytest.raises(ValueError, match=r"unknown reduction 'sum'.*token_mean"):
        losses.count(arrays["mask"], "sum")


@pytest.mark.parametrize(
    "hyper",
    [
        {"clip_low": -0.1},
        {"clip_low": 1.1},
        {"clip_high": -0.1},
        {"clip_high": math.nan},
        {"dual_clip": 1.0},
        {"dual_clip": math.nan},
    ],
    ids=str,
)
def test_clips_out_of_range(hyper):
    arrays = batch()
    with pytest.raises(ValueError, match="clip"):
        trace("ppo_clip", arrays, **hyper)


def test_names():
    assert {"r2vpo", "ppo_clip", "policy_gradient"} <= set(NAMES)
    for name in NAMES:
        assert losses.get(name) is getattr(losses, f"{name}_loss")
    with pytest.raises(ValueError, match=r"unknown objective 'ppo'; one of .*ppo_clip"):
        losses.get("ppo")
