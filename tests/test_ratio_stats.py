"""Statistics of the ratios against NumPy in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from r2vpo_jax import losses, ratio_stats

# One shape for most tests, so that they share a compiled function.
ROWS, COLUMNS = 4, 6
compute = jax.jit(ratio_stats.compute)
# NaN where no token is in Z.
QUOTIENTS = {
    f"keeps/{name}" + ("" if split == "all" else f"_{split}")
    for name in ("retained", "restoring")
    for split in ratio_stats.SPLITS
}


def batch(seed=0, spread=0.4, rows=ROWS):
    rng = np.random.default_rng(seed)
    behavior_logp = -rng.exponential(2.0, (rows, COLUMNS)).astype(np.float32)
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


def extras(seed=0):
    """A coefficient, weights and ages to go with a batch."""
    rng = np.random.default_rng(100 + seed)
    return {
        "coefficient": rng.normal(0, 1, (ROWS, COLUMNS)).astype(np.float32),
        "weights": rng.uniform(0.5, 2.0, (ROWS, COLUMNS)).astype(np.float32),
        "age": rng.choice([0, 1, 7, 8, 63, 64, 500], ROWS).astype(np.int32),
    }


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
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), mapped, stacked)


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
    stacked = ratio_stats.Stats(
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
    names = ("mean", "second_moment_mean", "variance", "effective_sample_size", "max", "max_abs_log")
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


# What an objective keeps ------------------------------------------------------------------------------


@functools.cache
def _slope(name, items):
    def loss(logp, behavior_logp, advantages, mask):
        return losses.get(name)(logp, behavior_logp, advantages, mask, **dict(items))[0]

    return jax.jit(jax.grad(loss))


def keeps(name, arrays, **hyper):
    """The summary of an objective on a batch, by the coefficients that its gradient has."""
    weight = losses.token_weights(arrays["mask"], "token_mean")
    slope = _slope(name, tuple(hyper.items()))(*arrays.values())
    coefficient = -slope / jnp.where(weight == 0, 1.0, weight)
    return ratio_stats.summarize(compute(**arrays, coefficient=coefficient))


@pytest.mark.parametrize(("name", "retained"), [("ppo_clip", 0.0), ("policy_gradient", 1.0)])
def test_the_clip_keeps_nothing_and_the_policy_gradient_all(name, retained):
    for seed in range(4):
        summary = keeps(name, batch(seed))
        assert 0 < summary["keeps/at_stake"] < 1
        for split in QUOTIENTS:
            expected = retained if "retained" in split else 0.0
            assert np.isnan(summary[split]) or abs(summary[split] - expected) < 1e-6, split
        assert not np.isnan(summary["keeps/retained"])
        np.testing.assert_allclose(summary["clip/gradient_share"], retained * summary["keeps/at_stake"], rtol=1e-5)


# lambda = 1 / (2 clip) at a clip of .2; g = r (A - 5 (r - 1)).
COEF = 2.5


@pytest.mark.parametrize(
    ("ratio", "advantages", "expected"),
    [
        # |A| = 1 turns back at the clip's edges. g = 1.3 * -.5 = -.65 of 1.3, and .6 * (-1 + 2) = .6 of .6.
        ([[1.3, 1.0], [0.6]], [1, -1], {"retained": 0.0, "restoring": 1.25 / 1.9, "at_stake": 1.9 / 2.9}),
        ([[1.3, 1.0], [0.6]], [1, -1], {"restoring_positive": 0.5, "restoring_negative": 1.0}),
        # |A| = 3 turns back at 1.6 and .4. g = 1.4 * (3 - 2) = 1.4 of 4.2, 1.7 * (3 - 3.5) = -.85 of 5.1, and
        # .7 * (-3 + 1.5) = -1.05 of 2.1; 3 at r = 1 is not at stake.
        (
            [[1.4, 1.7, 1.0], [0.7]],
            [3, -3],
            {"retained": 2.45 / 11.4, "restoring": 0.85 / 11.4, "at_stake": 11.4 / 14.4},
        ),
        (
            [[1.4, 1.7, 1.0], [0.7]],
            [3, -3],
            {"retained_positive": 1.4 / 9.3, "restoring_positive": 0.85 / 9.3, "retained_negative": 0.5},
        ),
        ([[1.21], [0.41]], [3, -3], {"restoring": 0.0}),
        ([[1.61], [0.39]], [3, -3], {"retained": 0.0}),
    ],
)
def test_what_r2vpo_keeps(ratio, advantages, expected):
    summary = keeps("r2vpo", by_hand([np.log(x) for x in ratio], advantages), variance_coef=COEF)
    for name, value in expected.items():
        np.testing.assert_allclose(summary[f"keeps/{name}"], value, rtol=1e-4, err_msg=name)


@pytest.mark.parametrize("ratio", [1.201, 1.25, 1.4, 1.59, 1.61, 3.0, 0.799, 0.6, 0.41, 0.39, 0.1])
def test_where_r2vpo_turns_back(ratio):
    sign = 1 if ratio > 1 else -1
    unit = keeps("r2vpo", by_hand([[np.log(ratio)]], [sign]), variance_coef=COEF)
    assert unit["keeps/retained"] == 0
    assert unit["keeps/restoring"] > 0
    large = keeps("r2vpo", by_hand([[np.log(ratio)]], [3 * sign]), variance_coef=COEF)
    inside = 0.4 < ratio < 1.6
    assert (large["keeps/retained"] > 0) == inside
    assert (large["keeps/restoring"] > 0) == (not inside)


def by_split(g, **changed):
    """Summary of a batch in which every token is in Z with r |A| = 1, A = -2, and g = -`g` (so `g` is kept)."""
    arrays = by_hand([np.full(COLUMNS, np.log(0.5))] * ROWS, advantages=[-2.0] * ROWS)
    arrays |= {"coefficient": -np.broadcast_to(np.asarray(g, np.float32), (ROWS, COLUMNS))} | changed
    arrays["logp"] = arrays["behavior_logp"] + np.float32(np.log(0.5))
    return ratio_stats.summarize(compute(**arrays))


def assert_kept(summary, **expected):
    for name, value in expected.items():
        np.testing.assert_allclose(summary[f"keeps/{name}"], value, rtol=1e-5, err_msg=name)


def test_split_by_sign():
    # r |A| = 2 * .5 and .5 * 2; A > 0 keeps .25 and .75, A < 0 keeps .125 and turns .5 back.
    arrays = by_hand([np.log([2.0, 2.0]), np.log([0.5, 0.5])], advantages=[0.5, -2.0])
    arrays["coefficient"] = np.zeros((ROWS, COLUMNS), np.float32)
    arrays["coefficient"][:2, :2] = [[0.25, 0.75], [-0.125, 0.5]]
    summary = ratio_stats.summarize(compute(**arrays))
    assert_kept(summary, retained=1.125 / 4, retained_positive=0.5, retained_negative=0.0625)
    assert_kept(summary, restoring=0.125, restoring_positive=0.0, restoring_negative=0.25)


def test_split_by_probability():
    # Two of each, close to the bounds .05 and .5: means (.1 + .3) / 2, (.2 + .6) / 2, (.4 + 1) / 2.
    probability = np.asarray([0.01, 0.0499, 0.0501, 0.499, 0.501, 0.9], np.float32)
    summary = by_split(
        [0.1, 0.3, 0.2, 0.6, 0.4, 1.0], behavior_logp=np.broadcast_to(np.log(probability), (ROWS, COLUMNS))
    )
    assert_kept(summary, retained_rare=0.2, retained_uncertain=0.4, retained_likely=0.7, retained=2.6 / 6)


def test_split_by_third():
    # Responses of 6, 4 and 3 tokens, the last with gaps, and of 1, which is a start. Of 4 the thirds have 2, 1, 1.
    mask = np.asarray([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0], [1, 0, 1, 0, 1, 0], [0, 0, 0, 0, 0, 1]], bool)
    g = np.zeros((ROWS, COLUMNS))
    g[mask] = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.1, 0.1, 0.2, 0.3, 0.1, 0.2, 0.3, 0.5]
    # start .1 + .2 | .1 + .1 | .1 | .5, middle .3 + .4 | .2 | .2, end .5 + .6 | .3 | .3
    assert_kept(by_split(g, mask=mask), retained_start=1.1 / 6, retained_middle=1.1 / 4, retained_end=1.7 / 4)


@pytest.mark.parametrize(
    ("age", "expected"),
    [
        ([0, 1, 7, 8], [0.1, 0.25, 0.4, np.nan]),
        ([63, 64, 1000, 0], [0.4, np.nan, 0.1, 0.25]),
        (None, [0.25, np.nan, np.nan, np.nan]),
    ],
)
def test_split_by_age(age, expected):
    # Rows keep .1, .2, .3, .4.
    changed = {} if age is None else {"age": np.asarray(age, np.int32)}
    summary = by_split([[0.1], [0.2], [0.3], [0.4]], **changed)
    names = ("age_0", "age_1_to_7", "age_8_to_63", "age_64_up")
    assert_kept(summary, **{f"retained_{name}": value for name, value in zip(names, expected, strict=True)})


def test_splits_are_partitions():
    stats = compute(**batch(2), **extras(2))
    for name in ("retained", "restoring"):
        for x in stats.sums[name]:
            whole, sign, probability, third, age = np.split(np.asarray(x), [1, 3, 6, 9])
            assert whole[0] > 0
            for part in (sign, probability, third, age):
                np.testing.assert_allclose(part.sum(), whole[0], rtol=1e-5)


def test_weights_by_hand():
    # r = 2, A = .5, weights 2 and 1: 2 and 1 at stake of 2 + 1 + 3 * 1 * 1, g = 1 and .5.
    arrays = by_hand([np.log([2.0, 2.0]), [0.0]], advantages=[0.5, 1.0])
    arrays["weights"] = np.zeros((ROWS, COLUMNS), np.float32)
    arrays["weights"][:2, :2] = [[2, 1], [3, 0]]
    arrays["coefficient"] = np.where(arrays["mask"], np.float32(0), np.float32(np.nan))
    arrays["coefficient"][0, :2] = [1.0, 0.5]
    summary = ratio_stats.summarize(compute(**arrays))
    assert_kept(summary, at_stake=0.5, retained=0.5, restoring=0.0)
    # Weighted squares 2 * 1, 1 * 1 and 0; the others are not weighted.
    np.testing.assert_allclose(summary["ratio/top_permille_share"], 2 / 3, rtol=1e-5)
    np.testing.assert_allclose(summary["ratio/second_moment_mean"], 2 / 3, rtol=1e-5)


def test_without_a_coefficient_it_is_the_weighted_policy_gradient():
    arrays = batch(3) | extras(3)
    log_ratio = arrays["logp"] - arrays["behavior_logp"]
    explicit = arrays["weights"] * np.exp(log_ratio) * arrays["advantages"]
    del arrays["coefficient"]
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6),
        compute(**arrays),
        compute(**arrays, coefficient=explicit),
    )


# How concentrated a sum is ----------------------------------------------------------------------------


def test_concentration_edges():
    edges = ratio_stats.CONCENTRATION_EDGES
    np.testing.assert_allclose(edges[1:] / edges[:-1], 10**0.25, rtol=1e-5)
    np.testing.assert_allclose(edges[[0, -1]], [1e-12, 1e18], rtol=1e-5)
    # No (r - 1)^2 is beyond the last, whatever r is.
    assert np.expm1(20.0) ** 2 < edges[-1]


def test_concentration_histograms():
    arrays = batch(2, spread=1.0) | extras(2)
    mask, weights = arrays["mask"], arrays["weights"].astype(np.float64)
    square = weights * np.expm1(arrays["logp"].astype(np.float64) - arrays["behavior_logp"]) ** 2
    bins = np.concatenate([[-np.inf], ratio_stats.CONCENTRATION_EDGES, [np.inf]])
    actual = compute(**arrays).concentration
    assert actual.keys() == {"excess_squared", "gradient"}
    for name, x in (("excess_squared", square[mask]), ("gradient", np.abs(arrays["coefficient"][mask]))):
        np.testing.assert_array_equal(actual[name][0], np.histogram(x, bins)[0])
        np.testing.assert_allclose(actual[name][1], np.histogram(x, bins, weights=x)[0], rtol=1e-4, atol=1e-5)


def concentration(*bins):
    """A histogram from (bin, tokens, their sum)."""
    result = np.zeros((2, len(ratio_stats.CONCENTRATION_EDGES) + 1), np.float32)
    for index, tokens, total in bins:
        result[:, index] = tokens, total
    return result


@pytest.mark.parametrize(
    ("fraction", "expected"),
    [
        (0.01, 0.73),
        (1e-6, 0.73),  # at least one token
        (0.0, 0.73),
        (0.05, 0.81),  # and 4 of the 9 tokens that hold .18
        (0.10, 0.91),
        (0.50, 0.95),  # and 40 of the 90 that hold .09
        (1.0, 1.0),
    ],
)
def test_top_share(fraction, expected):
    histogram = concentration((10, 90, 9.0), (50, 9, 18.0), (100, 1, 73.0))
    np.testing.assert_allclose(ratio_stats.top_share(histogram, fraction), expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("bins", "fraction", "expected"),
    [
        ([(60, 4, 80.0), (20, 4, 20.0)], 1e-3, 0.2),  # one of four alike
        ([(60, 1, 5.0)], 1e-3, 1.0),
        ([(121, 1, 1e30), (0, 9999, 1e-9)], 1e-3, 1.0),
        ([(0, 10, 0.0)], 0.5, 0.0),  # zeros have no top
        ([], 0.5, 0.0),
    ],
)
def test_top_share_at_the_edges(bins, fraction, expected):
    actual = ratio_stats.top_share(concentration(*bins), fraction)
    assert type(actual) is float
    np.testing.assert_allclose(actual, expected, rtol=1e-6)


@pytest.mark.parametrize("fraction", [1e-3, 0.02, 0.1, 0.5])
@pytest.mark.parametrize("spread", [0.1, 1.5])
def test_top_share_against_a_sort(spread, fraction):
    parts = [batch(seed, spread=spread) | {"mask": np.ones((ROWS, COLUMNS), bool)} for seed in range(10)]
    log_ratio = np.stack([x["logp"] - x["behavior_logp"] for x in parts]).astype(np.float64)
    terms = np.sort(np.expm1(log_ratio.reshape(-1)) ** 2)[::-1]
    number = max(fraction * terms.size, 1)
    exact = terms[: int(number)].sum() + (number % 1) * terms[min(int(number), terms.size - 1)]
    exact /= terms.sum()
    histogram = sum(compute(**x).concentration["excess_squared"] for x in parts)
    # Never more, and not less than a bin is wide: a quarter of a decade.
    actual = ratio_stats.top_share(histogram, fraction)
    assert exact / 10**0.25 - 1e-5 <= actual <= exact * (1 + 1e-4)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(st.lists(st.tuples(st.integers(0, 121), st.integers(1, 10**6), st.floats(0, 2.0**60)), max_size=8))
def test_top_share_grows_with_the_fraction(bins):
    histogram = concentration(*bins)
    shares = [ratio_stats.top_share(histogram, fraction) for fraction in (0.0, 1e-3, 0.1, 0.6, 1.0)]
    assert all(0 <= share <= 1 for share in shares)
    assert np.all(np.diff(shares) >= -1e-9)
    np.testing.assert_allclose(shares[-1], float(histogram[1].sum() > 0), rtol=1e-6)


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
    # Without an objective's coefficient everything that is at stake is retained.
    for name in QUOTIENTS:
        assert np.isnan(summary[name]) or abs(summary[name] - ("retained" in name)) < 1e-5, name
    assert np.isnan(summary["keeps/retained"]) == (summary["clip/fraction"] == 0 or summary["keeps/at_stake"] == 0)
    assert all(np.isfinite(value) for name, value in summary.items() if name not in QUOTIENTS)
    for name in ("ratio/top_permille_share", "keeps/top_permille_gradient", "keeps/at_stake"):
        assert 0 <= summary[name] <= 1 + 1e-5, name
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
