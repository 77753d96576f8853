"""Updates whose gradients can be read off the parameters that they leave."""

import jax
import numpy as np

KEY = jax.random.key(0)
# A step that swamps the parameters: the new ones are -RATE * gradient to float32's last digits.
RATE = 2.0**20


def assert_same(actual, expected):
    """Gradients at the tolerance of float32 sums in another order."""
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected))
    for (path, a), e in zip(jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True):
        assert np.abs(e).max() > 1e-3 * largest, path
        np.testing.assert_allclose(a, e, rtol=1e-5, atol=1e-6 * largest, err_msg=jax.tree_util.keystr(path))
