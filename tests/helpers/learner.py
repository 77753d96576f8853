"""Updates whose gradients can be read off the parameters that they leave."""

import jax
import numpy as np

KEY = jax.random.key(0)
# A step that swamps the parameters: the new ones are -RATE * gradient to float32's last digits.
RATE = 2.0**20


def assert_same(actual, expected):
    """Gradients at the tolerance of float32 sums in another order.

    It is a sum over up to 224 tokens of terms as large as itself, which rounding moves by up to 224 units of 2^-24,
    or 1.3e-5 of the largest; two machines were 2e-6 apart. Leaving out the token that matters least moves it by 1e-4.
    """
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected))
    for (path, a), e in zip(jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True):
        assert np.abs(e).max() > 1e-3 * largest, path
        np.testing.assert_allclose(a, e, rtol=1e-5, atol=1e-5 * largest, err_msg=jax.tree_util.keystr(path))


def assert_same_stats(actual, expected, loss_atol=1e-6):
    """Every statistic of two updates, at the tolerance of float32 sums in another order.

    Args:
      actual, expected: statistics.
      loss_atol: more where log-probabilities differ in the last digits too: ratios carry these on, and terms of both signs
        leave less of a loss than there is rounding in them.
    """
    assert actual.sums.keys() == expected.sums.keys()
    for name, (total, number) in expected.sums.items():
        largest = float(np.max(number))  # some statistics are split: a vector of sums
        atol = loss_atol if name == "loss" else 1e-6 * largest
        np.testing.assert_allclose(actual.sums[name][0], total, rtol=1e-5, atol=atol, err_msg=name)
        np.testing.assert_allclose(actual.sums[name][1], number, rtol=1e-5, err_msg=name)
    for name, value in expected.maxima.items():
        np.testing.assert_allclose(actual.maxima[name], value, rtol=1e-5, err_msg=name)
    np.testing.assert_array_equal(actual.histogram, expected.histogram)
    for name, bins in expected.concentration.items():
        np.testing.assert_allclose(actual.concentration[name].sum(axis=1), bins.sum(axis=1), rtol=1e-5, err_msg=name)
