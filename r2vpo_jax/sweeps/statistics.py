"""What a few seeds say about two methods: estimates, intervals that hold at 5 to 20 seeds, and tests. NumPy and SciPy.

Values are one number for each seed unless said otherwise. Paired functions take two vectors whose places are the same
seeds. docs/statistics.md says which function a report uses, and why. A source named by a number is on arxiv.org.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from scipy import optimize, special, stats

from r2vpo_jax.evaluation import estimators

_TRIMMED = 0.25  # of the values, on each side: what is left is the interquartile mean
_EXACT_SIGNS = 20  # seeds up to which every pattern of signs is enumerated
_RANDOM_SIGNS = 2**16  # patterns beyond that
_LEAST_POINTS = 4  # of a sigmoid, which has three free parameters


class Estimate(NamedTuple):
    """A number with its two-sided interval."""

    value: float
    low: float
    high: float


class PairedDifference(NamedTuple):
    """Ours minus theirs at the same seeds."""

    mean: float
    low: float
    high: float
    n: int
    p_value: float  # two-sided, by sign flips


class TimeToTarget(NamedTuple):
    """How long runs take to reach a target that some never reach."""

    median: float  # inf where half of the runs, by Kaplan-Meier, never reach it
    censored: int  # runs that did not reach it while they were watched
    n: int


class Speedup(NamedTuple):
    """Geometric mean of theirs / ours: above 1, ours needs less."""

    ratio: float
    low: float
    high: float
    n: int
    ours_censored: int
    theirs_censored: int

    @property
    def bound(self) -> str:
        """exact; at least, at most: what the ratio is if runs went on; unknown where both sides were cut off."""
        if self.ours_censored and self.theirs_censored:
            return "unknown"
        return "at least" if self.theirs_censored else "at most" if self.ours_censored else "exact"


class SigmoidFit(NamedTuple):
    """A curve R0 + (A - R0) / (1 + (C_mid / C)^B)."""

    ceiling: float  # A
    midpoint: float  # C_mid, in rollouts
    steepness: float  # B
    start: float  # R0, given
    converged: bool
    identified: bool  # it converged, rises by more than its residuals, and C_mid is within what was observed


# One method -------------------------------------------------------------------------------------------------------


def iqm(values) -> float:
    """Interquartile mean: the mean without the floor(n/4) smallest and largest values (2108.13264, section 4.3).

    Any n; at n < 4 nothing is cut, and it is the mean.

    Raises:
      ValueError: no values.
    """
    values = np.sort(_vector(values))
    cut = int(_TRIMMED * len(values))
    return float(values[cut : len(values) - cut].mean())


def iqm_interval(values, level: float = 0.95) -> Estimate:
    """The interquartile mean with the t interval of Tukey and McLaughlin (Sankhya A 25, 1963).

    With g = floor(n/4), h = n - 2g and S the sum of squares of the winsorized values about their mean, the squared
    standard error is S / (h (h - 1)), and Student's t has h - 1 degrees of freedom. Of nominal
    95 % it covers 92 to 95 % at n = 5 to 20, for normal and for moderately skewed values; one value has no interval (nan).

    Args:
      values: [seeds].
      level: two-sided.

    Raises:
      ValueError: no values.
    """
    values = np.sort(_vector(values))
    cut = int(_TRIMMED * len(values))
    kept = len(values) - 2 * cut
    center = float(values[cut : cut + kept].mean())
    if kept == 1:
        return Estimate(center, np.nan, np.nan)
    winsorized = np.clip(values, values[cut], values[cut + kept - 1])
    error = np.sqrt(np.square(winsorized - winsorized.mean()).sum() / (kept * (kept - 1)))
    half = float(special.stdtrit(kept - 1, (1 + level) / 2) * error)
    return Estimate(center, center - half, center + half)


def mean_interval(values, level: float = 0.95) -> Estimate:
    """The mean with Student's t interval. Of nominal 95 % it covers 92 to 96 % at n = 5 to 20; nan at n = 1.

    Raises:
      ValueError: no values.
    """
    center, half = estimators.mean_interval(_vector(values), level)
    return Estimate(center, center - half, center + half)


def bootstrap_interval(
    values_by_stratum: Sequence,
    statistic: Callable[..., float],
    *,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Estimate:
    """Percentile bootstrap that resamples seeds within each stratum, a task or a method (2108.13264, section 4.1).

    It is here for comparison with the literature. Few seeds are its weakness: of nominal 95 %, on normal values, it covers
    a mean 84 % of the time at n = 5 and 90 % at n = 10, an interquartile mean 91 % and 93 %. It holds from about n = 20 on.

    Args:
      values_by_stratum: vectors [seeds], whose lengths may differ.
      statistic: takes as many vectors; `lambda *tasks: iqm(np.concatenate(tasks))`, say.
      level: two-sided.
      resamples, seed: of the bootstrap.

    Raises:
      ValueError: no strata, or an empty one.
    """
    strata = [_vector(values) for values in values_by_stratum]
    if not strata:
        raise ValueError("a bootstrap needs at least one stratum")
    generator = np.random.default_rng(seed)
    drawn = [values[generator.integers(0, len(values), (resamples, len(values)))] for values in strata]
    found = [statistic(*parts) for parts in zip(*drawn, strict=True)]
    low, high = np.quantile(found, [(1 - level) / 2, (1 + level) / 2])
    return Estimate(float(statistic(*strata)), float(low), float(high))


def collapse_rate(lost: int, total: int, level: float = 0.95) -> Estimate:
    """The share of runs that were lost, with the interval of Clopper and Pearson (Biometrika 26, 1934).

    It covers at least its level at every n; none lost of 8 still allows a rate of 0.37.

    Raises:
      ValueError: not 0 <= lost <= total, or no runs.
    """
    if not 0 <= lost <= total or not total:
        raise ValueError(f"a rate needs 0 <= lost <= total and total > 0, got {lost} of {total}")
    interval = stats.binomtest(lost, total).proportion_ci(level, method="exact")
    return Estimate(lost / total, float(interval.low), float(interval.high))


def performance_profile(values, thresholds) -> np.ndarray:
    """The share of runs that score above each threshold (2108.13264, section 4.2).

    Args:
      values: [runs], of all tasks.
      thresholds: [thresholds].

    Returns:
      float64 [thresholds].

    Raises:
      ValueError: no values.
    """
    return (_vector(values)[:, None] > np.asarray(thresholds, np.float64)).mean(axis=0)


# Two methods ------------------------------------------------------------------------------------------------------


def paired_difference(ours, theirs, level: float = 0.95) -> PairedDifference:
    """The mean of ours minus theirs with Student's t interval, and the p value of a sign-flip test.

    If the methods are alike, the sign of each difference is a coin's. The p value is the share of the 2^n patterns of
    signs whose mean is at least as far from 0 as what was seen; beyond 20 seeds, of 65536 random patterns. It is exact
    at every n but cannot be below 2^(1-n): 0.06 at n = 5, 0.008 at n = 8. The t interval is that of `mean_interval`.

    Args:
      ours, theirs: [seeds], the same seeds in the same places.
      level: of the interval, two-sided.

    Raises:
      ValueError: no values, or lengths that differ.
    """
    differences = _paired(ours, theirs)
    differences = differences[0] - differences[1]
    center, low, high = mean_interval(differences, level)
    return PairedDifference(center, low, high, len(differences), _sign_flip(differences))


def _sign_flip(differences: np.ndarray) -> float:
    seen = abs(differences.sum()) * (1 - 1e-9)  # sums of the same numbers in another order differ in the last bits
    if len(differences) <= _EXACT_SIGNS:
        sums = np.zeros(1)
        for difference in differences:
            sums = np.concatenate([sums + difference, sums - difference])
        return float(np.mean(np.abs(sums) >= seen))
    signs = np.random.default_rng(0).choice([-1.0, 1.0], (_RANDOM_SIGNS, len(differences)))
    # The pattern that was seen is one of those drawn, so that the p value is never 0.
    return float((1 + np.sum(np.abs(signs @ differences) >= seen)) / (1 + _RANDOM_SIGNS))


def minimum_detectable_difference(deviation: float, n: int, *, level: float = 0.95, power: float = 0.8) -> float:
    """The mean difference that a paired t test finds with the given power, by the noncentral t distribution.

    Exact for normal differences at every n >= 2.

    Args:
      deviation: standard deviation of the differences between pairs.
      n: pairs.
      level: 1 minus the two-sided significance level.
      power: chance to find it.

    Raises:
      ValueError: n < 2, or a power that is not between 1 - level and 1.
    """
    if n < 2 or not 1 - level < power < 1:
        raise ValueError(f"needs n >= 2 and 1 - level < power < 1, got n={n}, level={level}, power={power}")
    freedom, critical = n - 1, special.stdtrit(n - 1, (1 + level) / 2)
    # Differences that are significant in the wrong direction do not count as found.
    shift = optimize.brentq(lambda x: stats.nct.sf(critical, freedom, x) - power, 0.0, 4 * critical + 10)
    return float(shift * deviation / np.sqrt(n))


def probability_of_improvement(ours, theirs, *, level: float = 0.95, resamples: int = 2000, seed: int = 0) -> Estimate:
    """The chance that a run of ours scores more than one of theirs, ties counted half (2108.13264, section 4.3).

    Seeds are not paired. With several tasks it is the mean over tasks. The interval is `bootstrap_interval` over each
    method's seeds in each task, and covers less than it says below about 20 seeds (79 to 90 % at n = 5, 87 to 93 % at
    n = 10); where all of ours are above all of theirs it has no width at all.

    Args:
      ours, theirs: [seeds], or as many such vectors as tasks.
      level, resamples, seed: of the interval.

    Raises:
      ValueError: no values, or not the same number of tasks.
    """
    ours, theirs = _tasks(ours), _tasks(theirs)
    if len(ours) != len(theirs):
        raise ValueError(f"the methods have {len(ours)} and {len(theirs)} tasks")

    def chance(*strata):
        pairs = zip(strata[: len(ours)], strata[len(ours) :], strict=True)
        return float(np.mean([(np.sign(x[:, None] - y).mean() + 1) / 2 for x, y in pairs]))

    return bootstrap_interval([*ours, *theirs], chance, level=level, resamples=resamples, seed=seed)


# Curves -----------------------------------------------------------------------------------------------------------


def rollouts_to_target(rollouts, reached) -> TimeToTarget:
    """The median number of rollouts until a target, by Kaplan and Meier (JASA 53, 1958).

    A run that did not reach the target took longer than it was watched. Leaving it out would favor methods that fail.
    Any n. A run that was lost will never reach the target: give it the rollouts of a whole run, not those at its loss.

    Args:
      rollouts: [runs], when the target was reached, or else when the run ended.
      reached: bool [runs].

    Raises:
      ValueError: no values, or lengths that differ.
    """
    rollouts, reached = _vector(rollouts), np.asarray(reached, bool)
    if rollouts.shape != reached.shape:
        raise ValueError(f"{len(rollouts)} runs, and {reached.shape} of them reached the target or not")
    survival = stats.ecdf(stats.CensoredData.right_censored(rollouts, ~reached)).sf
    below = survival.probabilities <= 0.5 + 1e-12
    median = float(survival.quantiles[np.argmax(below)]) if below.any() else np.inf
    return TimeToTarget(median, int(np.sum(~reached)), len(rollouts))


def speedup(ours, theirs, horizon: float, level: float = 0.95) -> Speedup:
    """How many times fewer rollouts ours needs: geometric mean of theirs / ours, Student's t interval on logarithms.

    A run that did not reach the target counts as the horizon, so that the ratio is a bound: `Speedup.bound` says which.
    It holds where `mean_interval` holds; censored on both sides, it says little.

    Args:
      ours, theirs: rollouts until the target, [seeds], the same seeds in the same places; inf or nan: not reached.
      horizon: rollouts of a whole run.
      level: two-sided.

    Raises:
      ValueError: no values, lengths that differ, or a number of rollouts that is not positive.
    """
    pairs = np.stack(_paired(ours, theirs))
    censored = ~np.isfinite(pairs)
    pairs = np.where(censored, horizon, pairs)
    if np.any(pairs <= 0):
        raise ValueError("a ratio needs positive numbers of rollouts; is the target below the base model?")
    found = np.exp(mean_interval(np.log(pairs[1] / pairs[0]), level))
    return Speedup(*map(float, found), pairs.shape[1], *(int(x) for x in censored.sum(axis=1)))


def area_under_curve(rollouts, scores) -> float:
    """The mean score over rollouts, by trapezoids: how fast and how far in one number. One run.

    Args:
      rollouts: [points], increasing.
      scores: [points].

    Raises:
      ValueError: fewer than two points, or rollouts that do not increase.
    """
    rollouts, scores = _curve(rollouts, scores)
    if len(rollouts) < 2:
        raise ValueError("an area needs at least two points")
    return float(np.trapezoid(scores, rollouts) / (rollouts[-1] - rollouts[0]))


def fit_sigmoid(rollouts, scores, *, highest: float = 1.0) -> SigmoidFit:
    """ScaleRL's curve of a run (2510.13786, equation 1), by least squares with bounds:

        R(C) = R0 + (A - R0) / (1 + (C_mid / C)^B)

    A says how far a method gets, C_mid how many rollouts half of that takes. A comparison of C_mid means little where A
    differs. R0 is the score at the first point, before training.

    Args:
      rollouts: [points], increasing, the first 0.
      scores: [points].
      highest: bound of A.

    Returns:
      The fit. It is not identified where C_mid lies outside of the positive rollouts seen, where the curve does not rise
      by twice the deviation of its residuals, or where the fit did not converge; with fewer than 4 points after the first,
      or with nothing but scores that are equal, A, C_mid and B are nan.

    Raises:
      ValueError: no points, rollouts that do not increase, or a first one that is not 0.
    """
    rollouts, scores = _curve(rollouts, scores)
    if rollouts[0] != 0:
        raise ValueError(f"a curve starts before training, at 0 rollouts, got {rollouts[0]}")
    start, x, y = float(scores[0]), rollouts[1:], scores[1:]
    nothing = SigmoidFit(np.nan, np.nan, np.nan, start, False, False)
    if len(x) < _LEAST_POINTS or start >= highest or np.ptp(scores) == 0:
        return nothing

    def curve(x, ceiling, log_midpoint, steepness):
        return start + (ceiling - start) * special.expit(steepness * (np.log(x) - log_midpoint))

    lowest = [start, np.log(x[0]) - 5, 0.1]
    most = [highest, np.log(x[-1]) + 5, 20.0]
    guess = [np.clip(y.max(), start + 1e-3 * (highest - start), highest), np.log(np.sqrt(x[0] * x[-1])), 1.0]
    try:
        (ceiling, log_midpoint, steepness), _ = optimize.curve_fit(
            curve, x, y, guess, bounds=(lowest, most), max_nfev=2000
        )
    except RuntimeError:  # how curve_fit says that it did not converge
        return nothing
    spread = np.sqrt(np.mean(np.square(y - curve(x, ceiling, log_midpoint, steepness))))
    seen = np.log(x[0]) <= log_midpoint <= np.log(x[-1])
    identified = bool(seen and ceiling - start > 2 * spread)
    return SigmoidFit(float(ceiling), float(np.exp(log_midpoint)), float(steepness), start, True, identified)


# Checks -----------------------------------------------------------------------------------------------------------


def _vector(values) -> np.ndarray:
    values = np.asarray(values, np.float64)
    if values.ndim != 1 or not len(values):
        raise ValueError(f"needs a vector with at least one value, got shape {values.shape}")
    return values


def _paired(ours, theirs) -> tuple[np.ndarray, np.ndarray]:
    ours, theirs = _vector(ours), _vector(theirs)
    if len(ours) != len(theirs):
        raise ValueError(f"pairs need as many of ours as of theirs, got {len(ours)} and {len(theirs)}")
    return ours, theirs


def _tasks(values) -> list[np.ndarray]:
    return [_vector(values)] if np.ndim(values[0]) == 0 else [_vector(of_task) for of_task in values]


def _curve(rollouts, scores) -> tuple[np.ndarray, np.ndarray]:
    rollouts, scores = _paired(rollouts, scores)
    if np.any(np.diff(rollouts) <= 0):
        raise ValueError("rollouts must increase")
    return rollouts, scores
