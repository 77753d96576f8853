"""How concentrated a sum is, and quantiles of the log-ratio, from histograms."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from r2vpo_jax import ratio_stats
from tests.helpers.ratio_stats import COLUMNS, ROWS, batch, by_hand, compute, extras

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
