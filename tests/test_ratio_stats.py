"""Statistics of the ratios against NumPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from r2vpo_jax import ratio_stats
from r2vpo_jax.train_stats import TrainStats
from tests.helpers.ratio_stats import COLUMNS, QUOTIENTS, ROWS, batch, by_hand, compute, extras


def reference(logp, behavior_logp, advantages, mask, coefficient=None, weights=None, age=None):
    """What `summarize` should say, by its definitions."""
    behavior_logp, probability = behavior_logp[mask].astype(np.float64), np.exp(behavior_logp[mask])
    log_ratio, advantages = logp[mask] - behavior_logp, advantages[mask]
    r, n = np.exp(log_ratio), mask.sum()
    weights = np.ones(n) if weights is None else weights[mask]
    age = np.broadcast_to(np.zeros(len(mask)) if age is None else age, mask.T.shape).T[mask]
    place = np.concatenate([np.arange(k) / k for k in mask.sum(axis=1)])
    clipped = ((advantages > 0) & (r > 1.2)) | ((advantages < 0) & (r < 0.8))
    unclipped = weights * r * advantages
    coefficient = unclipped if coefficient is None else coefficient[mask]
    gradient = np.abs(coefficient)
    squared = (r - 1) ** 2
    splits = {
        "": clipped,
        "_positive": advantages > 0,
        "_negative": advantages < 0,
        "_rare": probability < 0.05,
        "_uncertain": (probability >= 0.05) & (probability < 0.5),
        "_likely": probability >= 0.5,
        # Of n tokens the k-th (from 0) is in the first third where k / n < 1/3, and so on.
        "_start": place < 1 / 3 - 1e-9,
        "_middle": (place >= 1 / 3 - 1e-9) & (place < 2 / 3 - 1e-9),
        "_end": place >= 2 / 3 - 1e-9,
        "_age_0": age == 0,
        "_age_1_to_7": (age >= 1) & (age <= 7),
        "_age_8_to_63": (age >= 8) & (age <= 63),
        "_age_64_up": age >= 64,
    }

    def share(x, where):
        stake = np.abs(unclipped[clipped & where]).sum()
        return x[clipped & where].sum() / stake if stake > 0 else np.nan

    along = coefficient * np.sign(advantages)
    return {
        "ratio/mean": r.mean(),
        "ratio/token_second_moment": squared.mean(),
        "ratio/token_variance": r.var(),
        "ratio/token_second_moment_positive": squared[advantages > 0].mean(),
        "ratio/token_second_moment_negative": squared[advantages < 0].mean(),
        "ratio/effective_sample_size": r.sum() ** 2 / (n * (r**2).sum()),
        "ratio/max": r.max(),
        "ratio/max_abs_log": np.abs(log_ratio).max(),
        "ratio/mean_abs_log": np.abs(log_ratio).mean(),
        "ratio/top_token_share": (weights * squared).max() / (weights * squared).sum(),
        "clip/fraction": clipped.mean(),
        "clip/fraction_positive": clipped[advantages > 0].mean(),
        "clip/fraction_negative": clipped[advantages < 0].mean(),
        "clip/gradient_share": gradient[clipped].sum() / gradient.sum(),
        "keeps/at_stake": np.abs(unclipped[clipped]).sum() / np.abs(unclipped).sum(),
        **{f"keeps/retained{name}": share(np.maximum(along, 0), where) for name, where in splits.items()},
        **{f"keeps/restoring{name}": share(np.maximum(-along, 0), where) for name, where in splits.items()},
    }


def assert_summaries_close(actual, expected):
    for name, value in expected.items():
        np.testing.assert_allclose(actual[name], value, rtol=2e-5, atol=1e-6, err_msg=name)


SEEDS = range(8)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("with_extras", [False, True])
def test_against_numpy(seed, with_extras):
    arrays = batch(seed) | (extras(seed) if with_extras else {})
    expected = reference(**arrays)
    assert expected["clip/fraction"] > 0
    summary = ratio_stats.summarize(compute(**arrays))
    assert_summaries_close(summary, expected)
    assert summary.keys() - expected.keys() == {
        "ratio/log_p01",
        "ratio/log_p99",
        "ratio/top_permille_share",
        "keeps/top_permille_gradient",
    }
    assert expected.keys() >= QUOTIENTS
    assert all(type(value) is float for value in summary.values())


def test_every_split_is_met_above():
    met = [name for seed in SEEDS for name, x in reference(**batch(seed), **extras(seed)).items() if x > 0]
    assert set(met) >= QUOTIENTS


def test_by_hand():
    # r = (2, .5 | 1), A = (1 | -1): only r = 2 is clipped, with 2 of the 3.5 of sum |r A|.
    arrays = by_hand([np.log([2.0, 0.5]), [0.0]], advantages=[1.0, -1.0])
    summary = ratio_stats.summarize(compute(**arrays))
    expected = {
        "ratio/mean": 3.5 / 3,
        "ratio/token_second_moment": 1.25 / 3,
        "ratio/token_variance": 1.25 / 3 - (0.5 / 3) ** 2,
        "ratio/effective_sample_size": 3.5**2 / (3 * 5.25),
        "ratio/token_second_moment_positive": 1.25 / 2,
        "ratio/token_second_moment_negative": 0.0,
        "ratio/max": 2.0,
        "ratio/top_token_share": 0.8,
        "clip/fraction": 1 / 3,
        "clip/fraction_positive": 1 / 2,
        "clip/fraction_negative": 0.0,
        "clip/gradient_share": 2 / 3.5,
    }
    assert_summaries_close(summary, expected)


def test_one_advantage_a_sequence_and_an_integer_mask():
    arrays = by_hand([np.log([2.0, 0.5]), [0.0]], advantages=[1.0, -1.0])
    changed = {"advantages": np.asarray([1.0, -1.0, 7.0, np.nan], np.float32), "mask": arrays["mask"].astype(np.int32)}
    jax.tree.map(np.testing.assert_array_equal, compute(**arrays | changed), compute(**arrays))


@pytest.mark.parametrize(("low", "high", "expected"), [(0.2, 0.2, 2), (0.2, 0.28, 1), (0.1, 0.28, 2), (0.1, 0.1, 3)])
def test_clip_bounds(low, high, expected):
    # r = 1.25 with A > 0, r = .85 and .7 with A < 0; the other sign is never clipped.
    arrays = by_hand([np.log([1.25, 0.5]), np.log([0.85, 0.7, 1.5])], advantages=[1.0, -1.0])
    stats = compute(**arrays, clip_low=low, clip_high=high)
    assert stats.sums["clipped"] == (expected, 5)


def test_untouched_policy():
    # Nothing is clipped, so nothing is at stake. The gradient is that of the advantages.
    arrays = batch(spread=0.0)
    summary = ratio_stats.summarize(compute(**arrays))
    largest = np.abs(arrays["advantages"][arrays["mask"]])
    share = summary.pop("keeps/top_permille_gradient")
    np.testing.assert_allclose(share, largest.max() / largest.sum(), rtol=1e-5)
    ones = {"ratio/mean", "ratio/effective_sample_size", "ratio/max"}
    assert {name for name, value in summary.items() if np.isnan(value)} == QUOTIENTS
    assert {k: v for k, v in summary.items() if k not in QUOTIENTS} == {
        name: float(name in ones) for name in summary.keys() - QUOTIENTS
    }


def test_small_moves_are_resolved():
    # log r = +-1e-5: (r - 1)^2 from exp(log r) - 1 in float32 would be off by about 1 %.
    stats = compute(**by_hand([[1e-5, -1e-5]], advantages=[1.0]))
    np.testing.assert_allclose(stats.mean("excess_squared"), 1e-10, rtol=1e-4)


def test_empty_mask():
    arrays = batch() | extras() | {"mask": np.zeros((ROWS, COLUMNS), bool)}
    summary = ratio_stats.summarize(compute(**arrays))
    ones = {"ratio/mean", "ratio/effective_sample_size"}
    for name, value in summary.items():
        np.testing.assert_equal(value, np.nan if name in QUOTIENTS else float(name in ones), err_msg=name)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("argument", ["logp", "behavior_logp", "advantages", "coefficient", "weights"])
def test_masked_positions_contribute_nothing(argument, bad):
    arrays = batch() | extras()
    poisoned = arrays | {argument: np.where(arrays["mask"], arrays[argument], np.float32(bad))}
    expected = compute(**arrays)
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(expected))
    jax.tree.map(np.testing.assert_array_equal, compute(**poisoned), expected)


def test_merged_micro_batches_are_the_whole():
    parts = [batch(seed) | extras(seed) for seed in (1, 2, 3)]
    whole = {k: np.concatenate([p[k] for p in parts]) for k in parts[0]}
    stacked = jax.tree.map(lambda *x: np.stack(x), *[compute(**p) for p in parts])
    merged = stacked.reduce()
    assert_summaries_close(ratio_stats.summarize(merged), reference(**whole))
    log_ratio = (whole["logp"] - whole["behavior_logp"])[whole["mask"]]
    expected, _ = np.histogram(log_ratio, bins=np.concatenate([[-np.inf], ratio_stats.EDGES, [np.inf]]))
    np.testing.assert_array_equal(merged.histogram, expected)
    # The same under vmap.
    mapped = jax.jit(jax.vmap(lambda x: ratio_stats.compute(**x)))({k: np.stack([p[k] for p in parts]) for k in whole})

    def same(actual, expected):
        # Sums between edges are differences of sums beyond edges: each is as exact as the whole sum, and no more.
        atol = 1e-6 * max(1.0, float(np.abs(expected).sum()))
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=atol)

    jax.tree.map(same, mapped, stacked)


def _close(actual, expected, without=()):
    for name, value in ratio_stats.summarize(expected).items():
        if name not in without:
            np.testing.assert_allclose(ratio_stats.summarize(actual)[name], value, rtol=1e-5, atol=1e-7, err_msg=name)


def test_the_order_of_rows_and_padding_do_not_matter():
    arrays = batch(1) | extras(1)
    expected = compute(**arrays)
    order = np.asarray([2, 0, 3, 1])
    _close(compute(**{k: x[order] for k, x in arrays.items()}), expected)
    padded = {
        k: x if k == "age" else np.pad(x, ((0, 0), (1, 2)), constant_values=False if k == "mask" else np.nan)
        for k, x in arrays.items()
    }
    _close(ratio_stats.compute(**padded), expected)


def test_the_order_of_tokens_matters_to_thirds_only():
    arrays = batch(1) | extras(1)
    expected = compute(**arrays)
    flipped = compute(**{k: x if k == "age" else x[:, ::-1] for k, x in arrays.items()})
    thirds = {x for x in QUOTIENTS if x.endswith(("_start", "_middle", "_end"))}
    _close(flipped, expected, without=thirds)
    first, last = (ratio_stats.summarize(x) for x in (expected, flipped))
    assert any(first[name] != last[name] for name in thirds)


def test_reduce_and_mean():
    stacked = TrainStats(
        sums={"a": (jnp.asarray([1.0, 2.0]), jnp.asarray([2.0, 4.0])), "none": (jnp.zeros(2), jnp.zeros(2))},
        maxima={"b": jnp.asarray([3.0, -1.0])},
        histogram=jnp.asarray([[1.0, 0.0], [2.0, 5.0]]),
        concentration={"c": jnp.asarray([[[1.0, 2.0], [0.5, 3.0]], [[0.0, 1.0], [0.0, 4.0]]])},
    )
    stats = stacked.reduce()
    assert stats.sums["a"] == (3.0, 6.0)
    assert stats.maxima["b"] == 3.0
    np.testing.assert_array_equal(stats.histogram, [3.0, 5.0])
    np.testing.assert_array_equal(stats.concentration["c"], [[1.0, 3.0], [0.5, 7.0]])
    assert stats.mean("a") == 0.5
    assert stats.mean("none") == 0.0


def test_a_nan_that_counts_is_not_hidden():
    arrays = batch()
    arrays["logp"][0, 0] = np.nan
    summary = ratio_stats.summarize(compute(**arrays))
    names = ("mean", "token_second_moment", "token_variance", "effective_sample_size", "max", "max_abs_log")
    names = (*(f"ratio/{x}" for x in (*names, "top_token_share", "top_permille_share")), "keeps/at_stake")
    for name in (*names, "clip/gradient_share"):
        assert np.isnan(summary[name]), name


def test_a_coefficient_that_is_not_a_number_is_not_hidden():
    arrays = by_hand([np.log([2.0, 0.5]), [0.0]], advantages=[1.0, -1.0])
    arrays["coefficient"] = np.where(arrays["logp"] > 0, np.float32(np.nan), np.float32(0.5))
    summary = ratio_stats.summarize(compute(**arrays))
    for name in ("keeps/retained", "keeps/restoring", "keeps/top_permille_gradient", "clip/gradient_share"):
        assert np.isnan(summary[name]), name


def test_no_gradient():
    arrays = batch()
    logp = arrays.pop("logp")
    grad = jax.jit(jax.grad(lambda x: ratio_stats.compute(x, **arrays).mean("excess_squared")))(logp)
    np.testing.assert_array_equal(grad, 0.0)


def test_bfloat16_is_computed_in_float32():
    # -3 + .01171875 needs more bits than bfloat16 has between 2 and 4.
    logp, behavior_logp = (np.full((ROWS, COLUMNS), x, jnp.bfloat16) for x in (-3.0, -0.01171875))
    stats = compute(logp, behavior_logp, np.ones(ROWS, jnp.bfloat16), np.ones((ROWS, COLUMNS), bool))
    assert {x.dtype for x in jax.tree.leaves(stats)} == {jnp.dtype("float32")}
    assert stats.maxima["abs_log"] == 2.98828125


def test_no_implicit_rank_promotion():
    with jax.numpy_rank_promotion("raise"):
        for arrays in (batch() | {"advantages": np.ones(ROWS, np.float32)}, batch() | extras()):
            jax.eval_shape(lambda arrays: ratio_stats.compute(**arrays), arrays)


def floats(limit):
    return hnp.arrays(np.float32, (ROWS, COLUMNS), elements=st.floats(-limit, limit, width=32))


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(floats(1e4), floats(128), floats(1024), hnp.arrays(bool, (ROWS, COLUMNS)))
def test_extremes_stay_finite(log_ratio, behavior_logp, advantages, mask):
    summary = ratio_stats.summarize(compute(behavior_logp + log_ratio, behavior_logp, advantages, mask))
    # Without an objective's coefficient everything that is at stake is retained.
    for name in QUOTIENTS:
        assert np.isnan(summary[name]) or abs(summary[name] - ("retained" in name)) < 1e-5, name
    assert np.isnan(summary["keeps/retained"]) == (summary["clip/fraction"] == 0 or summary["keeps/at_stake"] == 0)
    assert all(np.isfinite(value) for name, value in summary.items() if name not in QUOTIENTS)
    for name in ("ratio/top_permille_share", "keeps/top_permille_gradient", "keeps/at_stake"):
        assert 0 <= summary[name] <= 1 + 1e-5, name
    assert 0 <= summary["ratio/effective_sample_size"] <= 1.001
    assert summary["ratio/token_variance"] >= 0


@pytest.mark.parametrize(("log_ratio", "mean"), [(-1e4, 0.0), (1e4, np.exp(20.0))])
def test_equal_ratios_have_full_effective_sample_size(log_ratio, mean):
    # exp(-20) - 1 rounds to -1: moments of r - 1 alone cannot tell such ratios from zero.
    summary = ratio_stats.summarize(compute(**by_hand([[log_ratio] * 3] * 2, advantages=[1.0, 1.0])))
    np.testing.assert_allclose(summary["ratio/effective_sample_size"], 1.0, rtol=1e-5)
    np.testing.assert_allclose(summary["ratio/mean"], mean, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("argument", "shape"),
    [
        ("logp", (2,)),
        ("behavior_logp", (2, 4)),
        ("mask", (2, 1)),
        ("advantages", (3,)),
        ("advantages", (2, 4)),
        ("coefficient", (2, 4)),
        ("coefficient", (2, 1)),
        ("coefficient", (3,)),
        ("weights", (2, 4)),
        ("weights", (2, 1)),
        ("weights", ()),
        ("age", (3,)),
        ("age", (1,)),
        ("age", (2, 3)),
    ],
)
def test_wrong_shapes_raise(argument, shape):
    arrays = {k: np.ones((2, 3)) for k in ("logp", "behavior_logp", "advantages", "mask")}
    with pytest.raises(AssertionError, match="Chex"):
        ratio_stats.compute(**arrays | {argument: np.ones(shape, int if argument == "age" else float)})
