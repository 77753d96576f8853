"""Estimates and intervals, against enumeration and textbook values."""

import itertools

import numpy as np
import pytest

from r2vpo_jax.evaluation import estimators


@pytest.mark.parametrize(("n", "k"), [(n, k) for n in (1, 2, 5, 6) for k in range(1, n + 1)])
def test_pass_at_k_counts_subsets(n, k):
    """The share of all k-subsets of n samples that hold at least one of the c right ones."""
    for c in range(n + 1):
        subsets = list(itertools.combinations(range(n), k))
        expected = np.mean([any(i < c for i in subset) for subset in subsets])
        np.testing.assert_allclose(estimators.pass_at_k(n, [c], k), [expected], atol=1e-12)


def test_pass_at_1_is_the_mean_and_large_n_is_stable():
    right = np.array([0, 3, 16])
    np.testing.assert_allclose(estimators.pass_at_k(16, right, 1), right / 16)
    # 1 - C(999, 500) / C(1000, 500) = 500 / 1000
    np.testing.assert_allclose(estimators.pass_at_k(1000, [1], 500), [0.5], rtol=1e-9)


@pytest.mark.parametrize(("n", "c", "k"), [(4, [1], 0), (4, [1], 5), (4, [5], 2), (4, [-1], 2)])
def test_pass_at_k_out_of_range_raises(n, c, k):
    with pytest.raises(ValueError, match=r"pass@k needs|number of right samples"):
        estimators.pass_at_k(n, c, k)


def test_the_bootstrap_interval_covers():
    """The mean of 60 Bernoulli(0.3) problems: a 95 % interval holds 0.3 in about 95 of 100 repetitions."""
    generator = np.random.default_rng(0)
    intervals = [estimators.bootstrap_interval(generator.random(60) < 0.3, resamples=500, seed=i) for i in range(300)]
    covered = np.mean([low <= 0.3 <= high for low, high in intervals])
    assert 0.89 < covered < 0.98
    # Its width is that of the normal approximation, 2 x 1.96 sqrt(0.3 x 0.7 / 60) = 0.232.
    assert abs(np.mean([high - low for low, high in intervals]) - 0.232) < 0.015


def test_the_bootstrap_resamples_problems():
    """Two halves of a million zeros and ones would have a narrow interval; two problems have the widest."""
    assert estimators.bootstrap_interval([0.0, 1.0]) == (0.0, 1.0)
    assert estimators.bootstrap_interval([0.25] * 10) == (0.25, 0.25)
    values = np.random.default_rng(1).random(50)
    assert estimators.bootstrap_interval(values) == estimators.bootstrap_interval(values)
    narrow, wide = (estimators.bootstrap_interval(values, confidence=c) for c in (0.5, 0.99))
    assert wide[0] < narrow[0] < values.mean() < narrow[1] < wide[1]


@pytest.mark.parametrize("values", [[], [[0.5, 0.5]], 0.5])
def test_a_bootstrap_needs_a_vector(values):
    with pytest.raises(ValueError, match="non-empty vector"):
        estimators.bootstrap_interval(values)


def test_mean_interval():
    """1, 2, 3: mean 2, standard deviation 1, t(0.975, 2) = 4.303: 4.303 / sqrt(3) = 2.484."""
    mean, half = estimators.mean_interval([1.0, 2.0, 3.0])
    assert mean == 2.0
    np.testing.assert_allclose(half, 2.484, atol=1e-3)
    # Five seeds: t(0.975, 4) = 2.776, standard deviation of 0, 0, 0, 0, 1 is sqrt(0.2).
    mean, half = estimators.mean_interval([0, 0, 0, 0, 1])
    np.testing.assert_allclose((mean, half), (0.2, 2.776 * 0.2), atol=1e-3)
    mean, half = estimators.mean_interval([0.4])
    assert mean == 0.4
    assert np.isnan(half)
    with pytest.raises(ValueError, match="at least one value"):
        estimators.mean_interval([])


def test_mean_interval_at_other_levels_and_many_values():
    # Tables of Student's t: t(0.95, 4) = 2.132, t(0.975, 30) = 2.042.
    np.testing.assert_allclose(estimators.mean_interval([0, 0, 0, 0, 1], 0.9)[1], 2.132 * 0.2, atol=1e-3)
    values = np.arange(31.0)
    np.testing.assert_allclose(estimators.mean_interval(values)[1], 2.042 * values.std(ddof=1) / np.sqrt(31), rtol=1e-3)


MAJORITIES = {
    "two of three right": ([1, 1, 0], ["7", "7", "8"], 1.0),
    "two of three wrong": ([0, 0, 1], ["8", "8", "7"], 0.0),
    "a tie of right and wrong": ([1, 0], ["7", "8"], 1 / 2),
    "a tie of one right and two wrong": ([0, 1, 0], ["8", "7", "9"], 1 / 3),
    "the third has fewer votes": ([0, 0, 1, 1, 1], ["8", "8", "7", "7", "9"], 1 / 2),
    "no answer, no vote": ([0, 0, 0, 1, 0], [None, None, None, "7", None], 1.0),
    "nobody votes": ([0, 0], [None, None], 0.0),
    # Equal answers on which the verifier does not agree, because it ran out of time on one: right in half of its votes.
    "one answer, two verdicts": ([1, 0, 0], ["7", "7", "8"], 1 / 2),
    "one vote": ([1], ["7"], 1.0),
}


@pytest.mark.parametrize("name", MAJORITIES)
def test_majorities_by_hand(name):
    right, answers, expected = MAJORITIES[name]
    np.testing.assert_allclose(estimators.majority_at_k([right], [answers]), [expected])


def test_majorities_are_by_problem_and_in_any_order():
    right = [row for row, answers, _ in MAJORITIES.values() if len(row) == 3]
    answers = [answers for row, answers, _ in MAJORITIES.values() if len(row) == 3]
    expected = [value for row, _, value in MAJORITIES.values() if len(row) == 3]
    assert len(expected) == 4
    np.testing.assert_allclose(estimators.majority_at_k(right, answers), expected)
    turned = [row[::-1] for row in right], [row[::-1] for row in answers]
    np.testing.assert_allclose(estimators.majority_at_k(*turned), expected)


@pytest.mark.parametrize(("right", "answers"), [([[1, 0]], [["7"]]), ([[1, 0]], []), ([1, 0], ["7", "8"])])
def test_a_majority_needs_an_answer_a_sample(right, answers):
    with pytest.raises(ValueError, match="an answer to each"):
        estimators.majority_at_k(right, answers)
