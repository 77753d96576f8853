"""Statistics of few seeds, against hand numbers, closed forms, and how often simulated intervals cover."""

import numpy as np
import pytest
from scipy import stats

from r2vpo_jax.sweeps import statistics

NORMAL = (lambda generator, n: generator.normal(size=n), 0.0, 0.0)
# Skewness 1; its mean, and the mean of the middle half of its distribution.
SKEWED = (
    lambda generator, n: generator.gamma(4, size=n),
    4.0,
    float(stats.gamma(4).ppf(np.linspace(0.25, 0.75, 20001)).mean()),
)


# ---- one method ----


def test_iqm_by_hand():
    # 8 values: two are cut on each side, 2, 3, 4, 9 are left.
    values = [100, 3, 1, 4, 2, 9, 50, -7]
    assert statistics.iqm(values) == pytest.approx((2 + 3 + 4 + 9) / 4)
    # Winsorized: 2 2 2 3 4 9 9 9, mean 5, squared deviations 9 9 9 4 1 16 16 16 = 80; h (h - 1) = 12; t(3) = 3.182.
    found = statistics.iqm_interval(values)
    half = 3.18245 * np.sqrt(80 / 12)
    np.testing.assert_allclose(found, (4.5, 4.5 - half, 4.5 + half), rtol=1e-5)


def test_with_fewer_than_four_values_the_iqm_is_the_mean():
    values = [0.1, 0.5, 0.9]
    np.testing.assert_allclose(statistics.iqm_interval(values), statistics.mean_interval(values))
    center, low, high = statistics.iqm_interval([0.3])
    assert (center, np.isnan(low), np.isnan(high)) == (0.3, True, True)


@pytest.mark.parametrize("n", [4, 5, 7, 8, 20])
def test_iqm_is_the_trimmed_mean_of_scipy(n):
    values = np.random.default_rng(n).normal(size=n)
    assert statistics.iqm(values) == pytest.approx(stats.trim_mean(values, 0.25))
    assert statistics.iqm_interval(values).value == pytest.approx(statistics.iqm(values))


@pytest.mark.parametrize("distribution", [NORMAL, SKEWED], ids=["normal", "skewed"])
@pytest.mark.parametrize("n", [8, 10, 20])
def test_the_t_intervals_cover(n, distribution):
    draw, mean, middle = distribution
    generator = np.random.default_rng(n)
    samples = [draw(generator, n) for _ in range(1500)]

    def covered(interval, true):
        return np.mean([found.low <= true <= found.high for found in map(interval, samples)])

    assert covered(statistics.mean_interval, mean) >= 0.92
    assert covered(statistics.iqm_interval, middle) >= 0.92


def test_at_five_seeds_the_percentile_bootstrap_of_a_mean_covers_less_than_t():
    generator = np.random.default_rng(0)
    samples = generator.normal(size=(300, 5))
    by_t = [statistics.mean_interval(values) for values in samples]
    by_bootstrap = [statistics.bootstrap_interval([values], np.mean, resamples=200) for values in samples]
    covered = [np.mean([x.low <= 0 <= x.high for x in intervals]) for intervals in (by_t, by_bootstrap)]
    assert covered[0] >= 0.92
    assert covered[1] <= 0.88


def test_a_bootstrap_keeps_to_its_strata():
    # Strata are constant: a resample within them is what was seen.
    found = statistics.bootstrap_interval([[1.0, 1.0], [5.0] * 7], lambda a, b: a.mean() - b.mean())
    assert found == (-4.0, -4.0, -4.0)
    values = np.random.default_rng(0).normal(size=50)
    again = [statistics.bootstrap_interval([values], statistics.iqm, resamples=200, seed=s) for s in (0, 0, 1)]
    assert again[0] == again[1] != again[2]
    # Mean of 200 values by the normal approximation: 1.96 s / sqrt(n).
    values = np.random.default_rng(1).normal(size=200)
    center, low, high = statistics.bootstrap_interval([values], np.mean)
    half = 1.96 * values.std() / np.sqrt(200)
    np.testing.assert_allclose((low, high), (center - half, center + half), atol=0.15 * half)


def test_collapse_rate_by_closed_forms():
    # None of n: 1 - (1 - level) / 2 = (1 - p)^n gives the upper end; all of n is its mirror image.
    upper = 1 - 0.025 ** (1 / 8)
    np.testing.assert_allclose(statistics.collapse_rate(0, 8), (0, 0, upper))
    np.testing.assert_allclose(statistics.collapse_rate(8, 8), (1, 1 - upper, 1))
    # 2 of 10: the Beta quantiles of Clopper and Pearson.
    low, high = stats.beta.ppf(0.025, 2, 9), stats.beta.ppf(0.975, 3, 8)
    np.testing.assert_allclose(statistics.collapse_rate(2, 10), (0.2, low, high), rtol=1e-6)


@pytest.mark.parametrize("n", [8, 10, 20])
def test_the_interval_of_a_collapse_rate_covers_at_every_rate(n):
    intervals = [statistics.collapse_rate(lost, n) for lost in range(n + 1)]
    for rate in np.linspace(0.01, 0.99, 50):
        chances = stats.binom.pmf(np.arange(n + 1), n, rate)
        assert sum(p for p, (_, low, high) in zip(chances, intervals, strict=True) if low <= rate <= high) >= 0.95


def test_performance_profile():
    np.testing.assert_allclose(statistics.performance_profile([0.1, 0.5, 0.5, 0.9], [0, 0.5, 1]), [1, 0.25, 0])


# ---- two methods ----


def test_paired_difference_by_hand():
    # Differences 1, 2, 3: mean 2, t(2) s / sqrt(3) = 4.303 / sqrt(3); all positive: 2 of 8 patterns are as far from 0.
    mean, low, high, n, p = statistics.paired_difference([1, 4, 3], [0, 2, 0])
    np.testing.assert_allclose((mean, low, high), (2, 2 - 4.30265 / np.sqrt(3), 2 + 4.30265 / np.sqrt(3)), rtol=1e-5)
    assert (n, p) == (3, 0.25)
    assert statistics.paired_difference([1, 1], [1, 1]).p_value == 1.0


def test_pairs_do_away_with_what_seeds_share():
    generator = np.random.default_rng(0)
    shared, noise = generator.normal(size=10), 0.01 * generator.normal(size=10)
    found = statistics.paired_difference(shared + 0.05 + noise, shared)
    assert found.low > 0.03
    assert found.p_value == 2 / 2**10


@pytest.mark.parametrize("n", [8, 12])
def test_sign_flips_are_those_of_scipy(n):
    differences = np.random.default_rng(n).normal(0.4, 1, size=n)
    expected = stats.permutation_test((differences,), np.mean, permutation_type="samples", n_resamples=2**n).pvalue
    assert statistics.paired_difference(differences, np.zeros(n)).p_value == pytest.approx(expected)


def test_sign_flips_of_many_pairs_are_drawn():
    differences = np.random.default_rng(3).normal(0.3, 1, size=30)
    by_t = stats.ttest_1samp(differences, 0).pvalue
    assert statistics.paired_difference(differences, np.zeros(30)).p_value == pytest.approx(by_t, rel=0.15)
    assert statistics.paired_difference(np.ones(30), np.zeros(30)).p_value == 1 / (1 + 2**16)


def test_minimum_detectable_difference_is_that_of_the_tables():
    # Cohen's table for a paired test at 0.05, two-sided, power 0.8: 34 pairs for d = 0.5, 15 for d = 0.8.
    detectable = statistics.minimum_detectable_difference
    assert detectable(1.0, 34) < 0.5 < detectable(1.0, 33)
    assert detectable(1.0, 15) < 0.8 < detectable(1.0, 14)
    # Large n: z(0.975) + z(0.8) = 2.802.
    assert detectable(0.02, 10_000) == pytest.approx(0.02 * 2.802 / 100, rel=1e-3)
    assert detectable(1.0, 2) > 3
    with pytest.raises(ValueError, match="n >= 2"):
        detectable(1.0, 1)


def test_what_is_detectable_is_detected_as_often_as_said():
    n = 8
    shift = statistics.minimum_detectable_difference(1.0, n)
    samples = np.random.default_rng(0).normal(shift, 1, size=(4000, n))
    assert np.mean(stats.ttest_1samp(samples, 0, axis=1).pvalue < 0.05) == pytest.approx(0.8, abs=0.02)


def test_probability_of_improvement_is_that_of_mann_and_whitney():
    # 2 > 1, 2 = 2, 4 > both: (1 + 1/2 + 1 + 1) / 4.
    assert statistics.probability_of_improvement([2, 4], [1, 2]).value == pytest.approx(3.5 / 4)
    generator = np.random.default_rng(0)
    ours, theirs = generator.normal(0.5, 1, 12), generator.normal(0, 1, 9)
    found = statistics.probability_of_improvement(ours, theirs, resamples=300)
    assert found.value == pytest.approx(stats.mannwhitneyu(ours, theirs).statistic / (12 * 9))
    assert found.low < found.value < found.high


def test_probability_of_improvement_is_a_mean_over_tasks():
    found = statistics.probability_of_improvement([[1, 1], [0, 0, 0]], [[0, 0], [0]], resamples=50)
    assert found == (0.75, 0.75, 0.75)
    with pytest.raises(ValueError, match="2 and 1 tasks"):
        statistics.probability_of_improvement([[1], [2]], [[1]])


# ---- curves ----


def test_rollouts_to_target_by_hand():
    # Survival after 100: 3/4; 200 is censored; after 300: 3/4 · 1/2 = 3/8 <= 1/2.
    assert statistics.rollouts_to_target([100, 200, 300, 400], [True, False, True, True]) == (300, 1, 4)
    # All reach it: the lower median.
    assert statistics.rollouts_to_target([4, 1, 3, 2], [True] * 4) == (2, 0, 4)
    # Leaving out the runs that did not reach it would say 100.
    assert statistics.rollouts_to_target([100, 900, 900], [True, False, False]) == (np.inf, 2, 3)


def test_speedup_by_hand():
    # Ratios 2, 2, 8: geometric mean (32)^(1/3).
    found = statistics.speedup([100, 50, 100], [200, 100, 800], horizon=1000)
    assert found.ratio == pytest.approx(32 ** (1 / 3))
    logs = np.log([2, 2, 8])
    assert np.log(found.high) == pytest.approx(logs.mean() + 4.30265 * logs.std(ddof=1) / np.sqrt(3), rel=1e-5)
    assert found.bound == "exact"


def test_speedup_says_which_bound_it_is():
    ours_reach = statistics.speedup([100, 100], [np.inf, 400], horizon=400)
    assert (ours_reach.ratio, ours_reach.theirs_censored, ours_reach.bound) == (pytest.approx(4), 1, "at least")
    assert statistics.speedup([np.nan, 100], [400, 400], horizon=400).bound == "at most"
    assert statistics.speedup([np.inf, 100], [400, np.inf], horizon=400).bound == "unknown"
    with pytest.raises(ValueError, match="below the base model"):
        statistics.speedup([0, 100], [100, 100], horizon=400)


def test_area_under_a_curve():
    assert statistics.area_under_curve([0, 100], [0.2, 0.4]) == pytest.approx(0.3)
    # Trapezoids of width 1 and 3: (0.1 + 3 · 0.2) / 4.
    assert statistics.area_under_curve([0, 1, 4], [0.0, 0.2, 0.2]) == pytest.approx(0.175)
    with pytest.raises(ValueError, match="increase"):
        statistics.area_under_curve([0, 5, 5], [0, 0, 0])


ROLLOUTS = np.arange(0, 4001, 200)


def sigmoid(ceiling, midpoint, steepness, start=0.2):
    rest = start + (ceiling - start) / (1 + (midpoint / ROLLOUTS[1:]) ** steepness)
    return np.concatenate([[start], rest])


@pytest.mark.parametrize(("ceiling", "midpoint", "steepness"), [(0.9, 1000, 2.0), (0.5, 600, 1.2), (1.0, 2500, 4.0)])
def test_a_sigmoid_is_found_again(ceiling, midpoint, steepness):
    noise = 0.003 * np.random.default_rng(0).normal(size=len(ROLLOUTS))
    noise[0] = 0
    exact = statistics.fit_sigmoid(ROLLOUTS, sigmoid(ceiling, midpoint, steepness))
    np.testing.assert_allclose(exact[:4], (ceiling, midpoint, steepness, 0.2), rtol=1e-3)
    noisy = statistics.fit_sigmoid(ROLLOUTS, sigmoid(ceiling, midpoint, steepness) + noise)
    np.testing.assert_allclose(noisy[:2], (ceiling, midpoint), rtol=0.1)
    assert exact.identified
    assert noisy.identified


def test_a_sigmoid_that_cannot_be_told_is_not_identified():
    beyond = statistics.fit_sigmoid(ROLLOUTS, sigmoid(0.9, 30_000, 1.5))
    assert (beyond.converged, beyond.identified) == (True, False)
    noise = np.random.default_rng(0).normal(0.5, 0.05, size=len(ROLLOUTS))
    assert not statistics.fit_sigmoid(ROLLOUTS, noise).identified
    falls = statistics.fit_sigmoid(ROLLOUTS, sigmoid(0.05, 1000, 2.0))
    assert not falls.identified
    assert not statistics.fit_sigmoid(ROLLOUTS, np.full(len(ROLLOUTS), 0.3)).converged
    assert not statistics.fit_sigmoid(ROLLOUTS[:4], sigmoid(0.9, 300, 2.0)[:4]).converged, "three points, three numbers"
    with pytest.raises(ValueError, match="before training"):
        statistics.fit_sigmoid([100, 200], [0.1, 0.2])


# ---- bad input ----


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: statistics.iqm([]), "at least one value"),
        (lambda: statistics.iqm_interval([[1.0]]), "needs a vector"),
        (lambda: statistics.bootstrap_interval([], np.mean), "at least one stratum"),
        (lambda: statistics.bootstrap_interval([[]], np.mean), "at least one value"),
        (lambda: statistics.paired_difference([1, 2], [1]), "got 2 and 1"),
        (lambda: statistics.collapse_rate(3, 2), "got 3 of 2"),
        (lambda: statistics.collapse_rate(0, 0), "got 0 of 0"),
        (lambda: statistics.rollouts_to_target([1, 2], [True]), "2 runs"),
        (lambda: statistics.area_under_curve([0], [1]), "at least two points"),
    ],
)
def test_what_has_no_answer_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
