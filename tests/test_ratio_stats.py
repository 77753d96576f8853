"""Statistics of the ratios against NumPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from r2vpo_jax import ratio_stats

# One shape for most tests, so that they share a compiled function.
ROWS, COLUMNS = 4, 6
compute = jax.jit(ratio_stats.compute)


def batch(seed=0, spread=0.4, rows=ROWS):
    rng = np.random.default_rng(seed)
    behavior_logp = -rng.exponential(1.0, (rows, COLUMNS)).astype(np.float32)
    return {
        "logp": behavior_logp + rng.normal(0, spread, (rows, COLUMNS)).astype(np.float32),
        "behavior_logp": behavior_logp,
        "advantages": rng.choice([-1.5, -0.5, 0.0, 1.0], (rows, COLUMNS)).astype(np.float32),
        "mask": np.arange(COLUMNS) < rng.integers(2, COLUMNS, (rows, 1)),
    }


def by_hand(log_ratio, advantages):
    """Ragged rows of log-ratios and advantages (one number a row, or one a token) as arrays of that shape."""
    arrays = {k: np.zeros((ROWS, COLUMNS), np.float32) for k in ("logp", "behavior_logp", "advantages")}
    arrays["mask"] = np.zeros((ROWS, COLUMNS), bool)
    for i, row in enumerate(log_ratio):
        arrays["logp"][i, : len(row)] = row
        arrays["advantages"][i, : len(row)] = advantages[i]
        arrays["mask"][i, : len(row)] = True
    return arrays


def reference(logp, behavior_logp, advantages, mask, coefficient=None):
    """What `summarize` should say, by its definitions."""
    log_ratio = (logp.astype(np.float64) - behavior_logp)[mask]
    advantages = advantages[mask]
    r, n = np.exp(log_ratio), mask.sum()
    clipped = ((advantages > 0) & (r > 1.2)) | ((advantages < 0) & (r < 0.8))
    gradient = np.abs(r * advantages if coefficient is None else coefficient[mask])
    squared = (r - 1) ** 2
    return {
        "ratio/mean": r.mean(),
        "ratio/second_moment_mean": squared.mean(),
        "ratio/variance": r.var(),
        "ratio/second_moment_positive": squared[advantages > 0].mean(),
        "ratio/second_moment_negative": squared[advantages < 0].mean(),
        "ratio/effective_sample_size": r.sum() ** 2 / (n * (r**2).sum()),
        "ratio/max": r.max(),
        "ratio/max_abs_log": np.abs(log_ratio).max(),
        "ratio/mean_abs_log": np.abs(log_ratio).mean(),
        "ratio/top_token_share": squared.max() / squared.sum(),
        "clip/fraction": clipped.mean(),
        "clip/fraction_positive": clipped[advantages > 0].mean(),
        "clip/fraction_negative": clipped[advantages < 0].mean(),
        "clip/gradient_share": gradient[clipped].sum() / gradient.sum(),
    }


def assert_summaries_close(actual, expected):
    for name, value in expected.items():
        np.testing.assert_allclose(actual[name], value, rtol=2e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("with_coefficient", [False, True])
def test_against_numpy(seed, with_coefficient):
    arrays = batch(seed)
    if with_coefficient:
        arrays["coefficient"] = np.random.default_rng(9).normal(0, 1, (ROWS, COLUMNS)).astype(np.float32)
    expected = reference(**arrays)
    assert expected["clip/fraction"] > 0
    summary = ratio_stats.summarize(compute(**arrays))
    assert_summaries_close(summary, expected)
    assert summary.keys() - expected.keys() == {"ratio/log_p01", "ratio/log_p99"}
    assert all(type(value) is float for value in summary.values())


def test_by_hand():
    # r = (2, .5 | 1), A = (1 | -1): only r = 2 is clipped, with 2 of the 3.5 of sum |r A|.
    arrays = by_hand([np.log([2.0, 0.5]), [0.0]], advantages=[1.0, -1.0])
    summary = ratio_stats.summarize(compute(**arrays))
    expected = {
        "ratio/mean": 3.5 / 3,
        "ratio/second_moment_mean": 1.25 / 3,
        "ratio/variance": 1.25 / 3 - (0.5 / 3) ** 2,
        "ratio/effective_sample_size": 3.5**2 / (3 * 5.25),
        "ratio/second_moment_positive": 1.25 / 2,
        "ratio/second_moment_negative": 0.0,
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
    arrays = batch(spread=0.0)
    summary = ratio_stats.summarize(compute(**arrays))
    ones = {"ratio/mean", "ratio/effective_sample_size", "ratio/max"}
    assert summary == {name: float(name in ones) for name in summary}


def test_small_moves_are_resolved():
    # log r = +-1e-5: (r - 1)^2 from exp(log r) - 1 in float32 would be off by about 1 %.
    stats = compute(**by_hand([[1e-5, -1e-5]], advantages=[1.0]))
    np.testing.assert_allclose(stats.mean("excess_squared"), 1e-10, rtol=1e-4)


def test_empty_mask():
    summary = ratio_stats.summarize(compute(**batch() | {"mask": np.zeros((ROWS, COLUMNS), bool)}))
    ones = {"ratio/mean", "ratio/effective_sample_size"}
    assert summary == {name: float(name in ones) for name in summary}


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("argument", ["logp", "behavior_logp", "advantages", "coefficient"])
def test_masked_positions_contribute_nothing(argument, bad):
    arrays = batch() | {"coefficient": np.ones((ROWS, COLUMNS), np.float32)}
    poisoned = arrays | {argument: np.where(arrays["mask"], arrays[argument], np.float32(bad))}
    expected = compute(**arrays)
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(expected))
    jax.tree.map(np.testing.assert_array_equal, compute(**poisoned), expected)


def test_merged_micro_batches_are_the_whole():
    parts = [batch(seed) for seed in (1, 2, 3)]
    whole = {k: np.concatenate([p[k] for p in parts]) for k in parts[0]}
    merged = jax.tree.map(lambda *x: np.stack(x), *[compute(**p) for p in parts]).reduce()
    assert_summaries_close(ratio_stats.summarize(merged), reference(**whole))
    log_ratio = (whole["logp"] - whole["behavior_logp"])[whole["mask"]]
    expected, _ = np.histogram(log_ratio, bins=np.concatenate([[-np.inf], ratio_stats.EDGES, [np.inf]]))
    np.testing.assert_array_equal(merged.histogram, expected)


def test_reduce_and_mean():
    stacked = ratio_stats.Stats(
        sums={"a": (jnp.asarray([1.0, 2.0]), jnp.asarray([2.0, 4.0])), "none": (jnp.zeros(2), jnp.zeros(2))},
        maxima={"b": jnp.asarray([3.0, -1.0])},
        histogram=jnp.asarray([[1.0, 0.0], [2.0, 5.0]]),
    )
    stats = stacked.reduce()
    assert stats.sums["a"] == (3.0, 6.0)
    assert stats.maxima["b"] == 3.0
    np.testing.assert_array_equal(stats.histogram, [3.0, 5.0])
    assert stats.mean("a") == 0.5
    assert stats.mean("none") == 0.0


def test_a_nan_that_counts_is_not_hidden():
    arrays = batch()
    arrays["logp"][0, 0] = np.nan
    summary = ratio_stats.summarize(compute(**arrays))
    for name in ("mean", "second_moment_mean", "variance", "effective_sample_size", "max", "max_abs_log"):
        assert np.isnan(summary[f"ratio/{name}"]), name


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
    arrays = batch() | {"advantages": np.ones(ROWS, np.float32)}
    with jax.numpy_rank_promotion("raise"):
        jax.eval_shape(lambda arrays: ratio_stats.compute(**arrays), arrays)


# Histogram and quantiles ----------------------------------------------------------------------------


def histogram_of(log_ratios):
    """The histogram of any number of log-ratios."""
    rows = np.asarray(log_ratios, np.float32).reshape(-1, 2)
    batches = [rows[i : i + ROWS] for i in range(0, len(rows), ROWS)]
    return np.sum([compute(**by_hand(b, advantages=[1.0] * ROWS)).histogram for b in batches], axis=0)


def test_edges():
    assert np.all(np.diff(ratio_stats.EDGES) > 0)
    np.testing.assert_array_equal(ratio_stats.EDGES, -ratio_stats.EDGES[::-1])
    np.testing.assert_allclose(ratio_stats.EDGES[[0, -1]], [-20, 20])


def test_histogram_counts():
    # Below, around zero, above; NumPy's bins are closed on the other side, which no value here touches.
    values = [-30.0, -1.7, -1e-7, 0.0, 1e-7, 0.03, 1.7, 25.0]
    expected, _ = np.histogram(values, bins=np.concatenate([[-np.inf], ratio_stats.EDGES, [np.inf]]))
    np.testing.assert_array_equal(histogram_of(values), expected)


@pytest.mark.parametrize("q", [0.0, 0.01, 0.25, 0.5, 0.9, 0.99, 1.0])
def test_quantile_is_the_inner_edge_of_its_bin(q):
    values = np.random.default_rng(0).normal(0.02, 0.1, 200).astype(np.float32)
    true = np.quantile(values, q, method="inverted_cdf")
    actual = ratio_stats.quantile(histogram_of(values), q)
    magnitudes = ratio_stats.EDGES[ratio_stats.EDGES > 0]
    inner = magnitudes[magnitudes <= abs(true)].max(initial=0.0)
    np.testing.assert_allclose(actual, np.sign(true) * inner, rtol=1e-6)
    assert inner > 0


def test_quantiles_of_extremes():
    assert ratio_stats.quantile(histogram_of([0.0] * 6), 0.99) == 0.0
    assert ratio_stats.quantile(histogram_of([30.0] * 6), 0.5) == 20.0
    assert ratio_stats.quantile(histogram_of([-30.0] * 6), 0.5) == -20.0
    assert ratio_stats.quantile(np.zeros(len(ratio_stats.EDGES) + 1), 0.5) == 0.0


def floats(limit):
    return hnp.arrays(np.float32, (ROWS, COLUMNS), elements=st.floats(-limit, limit, width=32))


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(floats(1e4), floats(128), floats(1024), hnp.arrays(bool, (ROWS, COLUMNS)))
def test_extremes_stay_finite(log_ratio, behavior_logp, advantages, mask):
    summary = ratio_stats.summarize(compute(behavior_logp + log_ratio, behavior_logp, advantages, mask))
    assert all(np.isfinite(value) for value in summary.values())
    assert 0 <= summary["ratio/effective_sample_size"] <= 1.001
    assert summary["ratio/variance"] >= 0


@pytest.mark.parametrize(("log_ratio", "mean"), [(-1e4, 0.0), (1e4, np.exp(20.0))])
def test_equal_ratios_have_full_effective_sample_size(log_ratio, mean):
    # exp(-20) - 1 rounds to -1: moments of r - 1 alone cannot tell such ratios from zero.
    summary = ratio_stats.summarize(compute(**by_hand([[log_ratio] * 3] * 2, advantages=[1.0, 1.0])))
    np.testing.assert_allclose(summary["ratio/effective_sample_size"], 1.0, rtol=1e-5)
    np.testing.assert_allclose(summary["ratio/mean"], mean, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("argument", "shape"),
    [("logp", (2,)), ("behavior_logp", (2, 4)), ("mask", (2, 1)), ("advantages", (3,)), ("advantages", (2, 4))],
)
def test_wrong_shapes_raise(argument, shape):
    arrays = {k: np.ones((2, 3)) for k in ("logp", "behavior_logp", "advantages", "mask")}
    with pytest.raises(AssertionError, match="Chex"):
        ratio_stats.compute(**arrays | {argument: np.ones(shape)})
