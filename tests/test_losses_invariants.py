"""What holds for every objective: reductions, weights, statistics, what must not leak, numerics."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from r2vpo_jax import losses
from tests.helpers.losses import (
    COLUMNS,
    COMPUTED,
    NAMES,
    REDUCTIONS,
    ROWS,
    batch,
    by_hand,
    evaluate,
    same_up_to_rounding,
    usual_normalizer,
)

# One reduction for the tests over all objectives, which take from it only what is common to them: the one that
# depends on the rows.
REDUCTION = "sequence_mean"
NAMES_AND_REDUCTIONS = [(n, REDUCTION) for n in NAMES] + [("r2vpo", r) for r in REDUCTIONS if r != REDUCTION]


def lengths(arrays):
    return np.sum(arrays["mask"], axis=1, keepdims=True)


# The coefficient at the behavior policy -------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_at_the_behavior_policy_every_coefficient_is_the_weighted_advantage(name):
    arrays = batch()
    arrays["logp"] = arrays["behavior_logp"].copy()
    arrays["advantages"][:2, :2] = [[1.0, 0.0], [-2.5, 0.75]]
    _, stats, grad = evaluate(name, arrays, REDUCTION)
    expected = arrays["weights"] * arrays["advantages"] * arrays["mask"] / lengths(arrays) / ROWS
    if name == "luspo":
        expected = expected * lengths(arrays)
    np.testing.assert_allclose(-grad, expected, rtol=1e-5, atol=1e-8)
    np.testing.assert_array_equal(stats["ratio_variance"], (0, ROWS))
    if "penalty" in stats:
        np.testing.assert_array_equal(stats["penalty"], (0, ROWS))


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
    arrays = by_hand([[1.0], [1.0, 1.0, 1.0]], advantages=[-1.0, 0.0])
    actual, _, _ = evaluate("policy_gradient", arrays, reduction, normalizer)
    np.testing.assert_allclose(actual, loss, rtol=1e-6)
    values = np.where(arrays["mask"], -arrays["advantages"], math.nan)
    np.testing.assert_allclose(losses.reduce(values, arrays["mask"], reduction, normalizer), loss, rtol=1e-6)

    arrays = by_hand([[1.0], [1.0, 1.0, 1.0]], advantages=[1.0, 1.0])
    _, _, grad = evaluate("policy_gradient", arrays, reduction, normalizer)
    shares = np.zeros((ROWS, COLUMNS))
    shares[0, 0], shares[1, :3] = coefficients
    np.testing.assert_allclose(-grad, shares, rtol=1e-6)
    np.testing.assert_allclose(losses.token_weights(arrays["mask"], reduction, normalizer), shares, rtol=1e-6)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_token_weights_are_the_derivative_of_reduce(reduction):
    arrays = batch()
    values, mask = arrays["logp"], arrays["mask"]
    normalizer = np.float32(7.0)
    weights = losses.token_weights(mask, reduction, normalizer)
    grad = jax.grad(lambda v: losses.reduce(v, mask, reduction, normalizer))(values)
    np.testing.assert_allclose(grad, weights, rtol=1e-6)
    assert weights.dtype == jnp.float32
    np.testing.assert_array_equal(weights[~mask], 0.0)
    np.testing.assert_allclose(losses.reduce(values, mask, reduction, normalizer), np.sum(values * weights), rtol=1e-5)


@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean"])
def test_default_normalizer_and_weights(reduction):
    arrays = batch()
    mask = arrays["mask"]
    del arrays["weights"]
    expected, expected_stats, _ = evaluate("r2vpo", arrays, reduction)
    loss, stats = losses.r2vpo_loss(**arrays, reduction=reduction, **COMPUTED["r2vpo"])
    jax.tree.map(same_up_to_rounding, (loss, stats), (expected, expected_stats))
    np.testing.assert_allclose(np.sum(losses.token_weights(mask, reduction)), 1.0, rtol=1e-6)
    np.testing.assert_allclose(losses.reduce(np.full(mask.shape, 3.0), mask, reduction), 3.0, rtol=1e-6)
    assert losses.count(mask, reduction) == usual_normalizer(reduction, mask)


def test_reduce_of_nothing_is_zero():
    mask = np.zeros((2, 3), bool)
    for reduction in ("token_mean", "sequence_mean"):
        assert losses.reduce(np.full((2, 3), math.nan), mask, reduction) == 0
        np.testing.assert_array_equal(losses.token_weights(mask, reduction), 0.0)
    assert losses.reduce(np.full((2, 3), math.nan), mask, "constant_length", 6) == 0


def test_reduce_accumulates_in_float32():
    # A running sum of ones in bfloat16 stops at 256, and 4101 is not a number in it.
    values = jnp.ones((3, 1367), jnp.bfloat16)
    mask = jnp.ones((3, 1367), jnp.bfloat16)
    total = losses.reduce(values, mask, "constant_length", 1)
    assert (total, total.dtype) == (4101, jnp.float32)
    assert losses.count(mask, "token_mean") == 4101


def test_sequence_mean_leaves_out_empty_sequences():
    # Row 1 is empty: -(1 + 3) / 2.
    arrays = by_hand([[1.0, 1.0], [], [1.0]], advantages=[1.0, 100.0, 3.0])
    assert losses.count(arrays["mask"], "sequence_mean") == 2
    assert losses.count(arrays["mask"], "token_mean") == 3
    loss, stats, _ = evaluate("policy_gradient", arrays, "sequence_mean")
    np.testing.assert_allclose(loss, -2.0, rtol=1e-6)
    assert stats["surrogate"] == (4.0, 2.0)


@pytest.mark.parametrize(("name", "reduction"), NAMES_AND_REDUCTIONS)
def test_weights_scale_loss_and_gradient_but_not_the_normalizer(name, reduction):
    arrays = batch()
    weights = arrays.pop("weights")
    plain, plain_stats, plain_grad = evaluate(name, arrays, reduction)
    doubled, stats, doubled_grad = evaluate(name, arrays | {"weights": np.full_like(weights, 2.0)}, reduction)
    _, _, weighted_grad = evaluate(name, arrays | {"weights": weights}, reduction)
    np.testing.assert_allclose(doubled, 2 * plain, rtol=1e-6)
    np.testing.assert_allclose(doubled_grad, 2 * plain_grad, rtol=1e-6)
    np.testing.assert_allclose(weighted_grad, weights * plain_grad, rtol=1e-5, atol=1e-7)
    assert np.sum(plain_grad != 0) >= 5
    np.testing.assert_allclose(stats["ratio_variance"], plain_stats["ratio_variance"] * np.asarray([2, 1]), rtol=1e-6)


def test_importance_corrections():
    # Tokens drawn by mu, a proximal policy that r is taken against, and w = proximal / mu = 2 in between.
    # r = 1.3: 2 (-1.3 + 2.5 * .09)       2 * 1.3 (1 - 5 * .3)
    arrays = by_hand([[1.3]], advantages=[1.0]) | {"weights": np.full((ROWS, COLUMNS), 2, np.float32)}
    loss, stats, grad = evaluate("r2vpo", arrays)
    np.testing.assert_allclose((loss, -grad[0, 0]), (-2.15, -1.3), rtol=1e-5)
    np.testing.assert_allclose(stats["ratio_variance"], (0.18, 1), rtol=1e-5)
    # Without a bound the two ratios are one again.
    arrays = batch()
    direct = evaluate("policy_gradient", arrays | {"weights": np.ones_like(arrays["weights"])})
    proximal_logp = arrays["behavior_logp"] + 0.2 * arrays["advantages"]
    weights = np.exp(proximal_logp - arrays["behavior_logp"])
    decoupled = evaluate("policy_gradient", arrays | {"behavior_logp": proximal_logp, "weights": weights})
    same_up_to_rounding(decoupled[0], direct[0])
    same_up_to_rounding(decoupled[2], direct[2])


@pytest.mark.parametrize(("name", "reduction"), NAMES_AND_REDUCTIONS)
def test_micro_batches_add_up(name, reduction):
    parts = [batch(seed=1), batch(seed=2)]
    whole = {k: np.concatenate([p[k] for p in parts]) for k in parts[0]}
    normalizer = usual_normalizer(reduction, whole["mask"])
    results = [evaluate(name, part, reduction, normalizer) for part in parts]
    loss, stats, grad = evaluate(name, whole, reduction, normalizer, jit=False)
    same_up_to_rounding(results[0][0] + results[1][0], loss)
    same_up_to_rounding(np.concatenate([r[2] for r in results]), grad)
    assert stats["ratio_variance"][0] > 0
    for key, expected in stats.items():
        same_up_to_rounding(np.add(results[0][1][key], results[1][1][key]), expected)


@pytest.mark.parametrize("name", NAMES)
def test_order_of_rows_does_not_matter(name):
    arrays, order = batch(), np.asarray([2, 0, 3, 1])
    loss, stats, grad = evaluate(name, arrays, REDUCTION)
    permuted = evaluate(name, {k: v[order] for k, v in arrays.items()}, REDUCTION)
    jax.tree.map(same_up_to_rounding, permuted, (loss, stats, grad[order]))


@pytest.mark.parametrize("name", NAMES)
def test_padding_columns_do_not_matter(name):
    arrays = batch(columns=COLUMNS - 2)
    # On both sides: the mask need not begin with the row.
    padding = ((0, 0), (1, 1))
    padded = {k: np.pad(v, padding, constant_values=False if k == "mask" else 7) for k, v in arrays.items()}
    loss, stats, grad = evaluate(name, arrays, REDUCTION, jit=False)
    jax.tree.map(same_up_to_rounding, evaluate(name, padded, REDUCTION), (loss, stats, np.pad(grad, padding)))


@pytest.mark.parametrize("name", NAMES)
def test_one_token_alone(name):
    # The rest of the batch masked, the result is that of arrays of one token.
    arrays = batch()
    alone = {k: v[1:2, 0:1] for k, v in arrays.items()}
    assert alone["mask"].item()
    arrays["mask"] = np.zeros_like(arrays["mask"])
    arrays["mask"][1, 0] = True
    loss, stats, grad = evaluate(name, alone, REDUCTION, jit=False)
    actual_loss, actual_stats, actual_grad = evaluate(name, arrays, REDUCTION)
    jax.tree.map(same_up_to_rounding, (actual_loss, actual_stats), (loss, stats))
    same_up_to_rounding(actual_grad[1, 0], grad[0, 0])
    assert loss != 0


@pytest.mark.parametrize("name", NAMES)
def test_one_advantage_a_sequence_is_broadcast_over_its_tokens(name):
    arrays = batch() | {"advantages": np.asarray([1.0, -1.0, 0.5, 0.0], np.float32)}
    per_token = arrays | {"advantages": np.repeat(arrays["advantages"][:, None], COLUMNS, axis=1)}
    expected = evaluate(name, per_token, REDUCTION, jit=False)
    jax.tree.map(np.testing.assert_array_equal, evaluate(name, arrays, REDUCTION, jit=False), expected)


# Statistics -----------------------------------------------------------------------------------------

CLIP_FRACTIONS = {"clip_fraction_low", "clip_fraction_high"}
EXTRA_STATISTICS = {
    **{name: {"penalty"} for name in ("r2vpo", "spo", "drpo", "dro")},
    **{name: CLIP_FRACTIONS for name in ("gspo", "luspo", "gmpo", "m2po", "aspo", "dppo_kl")},
    **{name: CLIP_FRACTIONS | {"dual_clip_fraction"} for name in ("ppo_clip", "gppo")},
    "dppo_tv": CLIP_FRACTIONS | {"penalty"},
}


@pytest.mark.parametrize("name", NAMES)
def test_the_loss_is_made_of_its_statistics(name):
    loss, stats, _ = evaluate(name, batch(), REDUCTION)
    assert set(stats) == {"surrogate", "ratio_variance", "clamped"} | EXTRA_STATISTICS.get(name, set())
    penalty = stats.get("penalty", (0.0,))[0]
    np.testing.assert_allclose(loss, (penalty - stats["surrogate"][0]) / ROWS, rtol=1e-5, atol=1e-6)
    assert {float(count) for _, count in stats.values()} == {ROWS}


def test_stats_of_r2vpo():
    arrays = by_hand([[1.0, 1.2, 0.5], [2.0]], advantages=[1.0, -1.0])
    arrays["weights"][0, 1] = 2.0
    _, stats, _ = evaluate("r2vpo", arrays)
    np.testing.assert_allclose(stats["surrogate"], (1.9, 4), rtol=1e-5)  # 1 + 2.4 + .5 - 2
    np.testing.assert_allclose(stats["ratio_variance"], (1.33, 4), rtol=1e-5)  # 0 + 2 * .04 + .25 + 1
    np.testing.assert_allclose(stats["penalty"], (3.325, 4), rtol=1e-5)  # 2.5 * 1.33
    np.testing.assert_allclose(stats["clamped"], (0, 4))


@pytest.mark.parametrize(
    ("name", "reduction", "expected"),
    # Rows (r - 1)^2 = (1 | 0, .25, .5): their token means are 1 and .25.
    [("r2vpo", "token_mean", (1.75, 4)), ("r2vpo", "constant_length", (1.75, 4))]
    + [(name, "sequence_mean", (1.25, 2)) for name in NAMES],
)
def test_ratio_variance_follows_the_reduction(name, reduction, expected):
    arrays = by_hand([[2.0], [1.0, 1.5, 1 + math.sqrt(0.5)]], advantages=[1.0, -1.0])
    _, stats, _ = evaluate(name, arrays, reduction)
    np.testing.assert_allclose(stats["ratio_variance"], expected, rtol=1e-5)


@pytest.mark.parametrize("name", [k for k, v in EXTRA_STATISTICS.items() if v >= CLIP_FRACTIONS])
def test_clip_fractions(name):
    # mu = .3: A = 1 and pi = .9 is cut above, A = -1 and pi = .06 below, and r = 3.3 by the dual clip.
    arrays = by_hand([[3.0, 3.0], [0.2], [3.3]], advantages=[1.0, -1.0, -1.0])
    arrays["logp"] += math.log(0.3)
    arrays["behavior_logp"] += math.log(0.3)
    hyper = {"dual_clip": 3.0} if name == "ppo_clip" else {}
    _, stats, _ = evaluate(name, arrays, jit=False, **hyper)
    fractions = {k: tuple(map(float, v)) for k, v in stats.items() if "fraction" in k}
    expected = {"clip_fraction_high": (2.0, 4.0), "clip_fraction_low": (1.0, 4.0), "dual_clip_fraction": (1.0, 4.0)}
    assert fractions == {k: v for k, v in expected.items() if k in EXTRA_STATISTICS[name]}


def test_a_token_without_an_advantage_is_not_clipped():
    arrays = by_hand([[4.0, 0.5], [1.3, 0.5, 5.0]], advantages=[0.0, 0.0])
    for name in ("ppo_clip", "gppo", "aspo", "gspo", "gmpo", "m2po"):
        _, stats, _ = evaluate(name, arrays, jit=False, **({"dual_clip": 3.0} if name == "ppo_clip" else {}))
        assert all(total == 0 for key, (total, _) in stats.items() if "fraction" in key)


def test_ratio_variance_is_accurate_near_one():
    # At log r = 1e-5, exp(log r) - 1 in float32 is off by up to 1 %; expm1 is not.
    arrays = by_hand([[1.0]], advantages=[1.0])
    arrays["logp"][0, 0] = 1e-5
    _, stats, _ = evaluate("r2vpo", arrays)
    np.testing.assert_allclose(stats["ratio_variance"][0], math.expm1(1e-5) ** 2, rtol=1e-5)


# What must not leak ---------------------------------------------------------------------------------


# The compiler may turn a product with the mask into a choice, which hides a NaN * 0; eager code does not.
@pytest.mark.parametrize("jit", [True, False], ids=["jit", "eager"])
@pytest.mark.parametrize("name", NAMES)
def test_masked_positions_contribute_nothing(name, jit):
    arrays = batch()
    masked = ~arrays["mask"]
    assert np.any(masked)
    expected = evaluate(name, arrays, REDUCTION, jit=jit)
    assert np.isfinite(expected[0])
    np.testing.assert_array_equal(expected[2][masked], 0.0)
    floats = ("logp", "behavior_logp", "advantages", "weights")
    for bad in (math.nan, math.inf, -math.inf):
        poisoned = {k: np.where(masked, np.float32(bad), arrays[k]) for k in floats}
        # One argument at a time where it costs little: inf - inf would hide what inf alone does.
        for change in [{k: poisoned[k]} for k in floats] if jit else [poisoned]:
            actual = evaluate(name, arrays | change, REDUCTION, jit=jit)
            jax.tree.map(np.testing.assert_array_equal, actual, expected)


@pytest.mark.parametrize("name", NAMES)
def test_a_masked_sequence_may_have_any_advantage(name):
    arrays = batch() | {"advantages": np.asarray([1.0, -1.0, 0.5, 2.0], np.float32)}
    arrays["mask"][2] = False
    expected = evaluate(name, arrays, REDUCTION, jit=False)
    arrays["advantages"][2] = math.nan
    actual = evaluate(name, arrays, REDUCTION, jit=False)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)
    assert np.isfinite(actual[0])


@pytest.mark.parametrize(("name", "reduction"), NAMES_AND_REDUCTIONS)
def test_an_empty_mask_gives_zero(name, reduction):
    arrays = batch() | {"mask": np.zeros((ROWS, COLUMNS), bool)}
    loss, stats, grad = evaluate(name, arrays, reduction, normalizer=0)
    assert loss == 0
    np.testing.assert_array_equal(grad, 0.0)
    jax.tree.map(lambda x: np.testing.assert_array_equal(x, 0.0), stats)


@pytest.mark.parametrize("name", NAMES)
def test_a_nan_that_counts_is_not_hidden(name):
    arrays = batch()
    arrays["logp"][0, 0] = math.nan
    loss, _, _ = evaluate(name, arrays, REDUCTION)
    assert np.isnan(loss)


@pytest.mark.parametrize("dtype", [np.int32, np.float32, jnp.bfloat16])
def test_the_mask_may_be_numbers(dtype):
    arrays = batch()
    for name in ("r2vpo", "luspo", "vespo"):
        expected = evaluate(name, arrays, REDUCTION)
        actual = evaluate(name, arrays | {"mask": arrays["mask"].astype(dtype)}, REDUCTION, jit=False)
        jax.tree.map(same_up_to_rounding, actual, expected)


# Numerics -------------------------------------------------------------------------------------------

# Their gradient vanishes for A < 0 as r grows: a gate, a gamma-shaped weight, a dual clip.
FADING = ("sapo", "vespo", "gppo")


@pytest.mark.parametrize("name", NAMES)
def test_log_ratio_clamp(name):
    arrays = by_hand([[1.0] * 3] * 2, advantages=[-1.0, -1.0])
    arrays["logp"][:2, :3] = [[19.5, 20.5, 1e4], [-19.5, -20.5, -1e4]]
    loss, stats, grad = evaluate(name, arrays, REDUCTION)
    assert np.isfinite(loss)
    assert grad[0, 0] > 0 or (name in FADING and grad[0, 0] == 0)
    np.testing.assert_array_equal(grad[:2, 1:], 0.0)
    np.testing.assert_allclose(stats["clamped"], (4 / 3, 2), rtol=1e-6)
    variance = math.expm1(19.5) ** 2 + 2 * math.expm1(20) ** 2 + 3
    np.testing.assert_allclose(stats["ratio_variance"], (variance / 3, 2), rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_inputs_are_computed_in_float32(name):
    arrays = batch()
    low = {k: v if k == "mask" else v.astype(jnp.bfloat16) for k, v in arrays.items()}
    exact = {k: v if k == "mask" else v.astype(np.float32) for k, v in low.items()}
    loss, stats, grad = evaluate(name, low, REDUCTION, jit=False)
    expected, expected_stats, expected_grad = evaluate(name, exact, REDUCTION)
    assert {x.dtype for x in jax.tree.leaves((loss, stats))} == {np.dtype(np.float32)}
    jax.tree.map(same_up_to_rounding, (loss, stats), (expected, expected_stats))
    assert grad.dtype == jnp.bfloat16
    np.testing.assert_allclose(grad.astype(np.float32), expected_grad, rtol=2**-7, atol=1e-8)


@pytest.mark.parametrize("name", NAMES)
def test_no_implicit_rank_promotion(name):
    arrays = batch() | {"advantages": np.ones(ROWS, np.float32)}
    with jax.numpy_rank_promotion("raise"):
        for reduction in REDUCTIONS if name == "r2vpo" else (REDUCTION,):
            evaluate(name, arrays, reduction, jit=False)
        if name == "r2vpo":
            evaluate(name, arrays, REDUCTION, jit=False, penalty_scope="sequence")
        if name == "m2po":
            del arrays["weights"]
            losses.m2po_threshold(**arrays)


def floats(limit):
    return hnp.arrays(np.float32, (ROWS, COLUMNS), elements=st.floats(-limit, limit, width=32))


ZEROS = np.zeros((ROWS, COLUMNS), np.float32)
ONE_TOKEN = np.arange(ROWS * COLUMNS).reshape(ROWS, COLUMNS) == 7


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(
    log_ratio=floats(1e4),
    behavior_logp=floats(128),
    advantages=floats(1024),
    mask=hnp.arrays(bool, (ROWS, COLUMNS)),
)
@example(ZEROS + 1e4, ZEROS - 128, ZEROS - 1024, ZEROS == 0)
@example(ZEROS - 1e4, ZEROS + 128, ZEROS + 1024, ZEROS == 0)
@example(ZEROS + 20, ZEROS - 20, ZEROS + 1024, ZEROS == 0)
@example(ZEROS - 20, ZEROS, ZEROS - 1024, ZEROS == 0)
@example(ZEROS + 1e4, ZEROS, ZEROS + 1, ZEROS == 1)
@example(ZEROS + 3, ZEROS - 4, ZEROS, ONE_TOKEN)
def test_extremes_stay_finite(name, log_ratio, behavior_logp, advantages, mask):
    arrays = {"behavior_logp": behavior_logp, "advantages": advantages, "mask": mask}
    hyper = {"r2vpo": {"variance_coef": 50.0}}.get(name, {})
    result = evaluate(name, arrays | {"logp": behavior_logp + log_ratio}, REDUCTION, **hyper)
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(result))
