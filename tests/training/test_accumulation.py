"""Gradient accumulation: sums over micro-batches are those of the batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r2vpo_jax.training import accumulation

ROWS = 6


@pytest.fixture(scope="module")
def batch():
    generator = np.random.default_rng(0)
    return {
        "x": generator.standard_normal((ROWS, 3)).astype(np.float32),
        "y": generator.standard_normal(ROWS).astype(np.float32),
    }


def loss_fn(params, batch):
    """Squared error, divided by the global number of rows."""
    error = batch["x"] @ params["w"].astype(jnp.float32) - batch["y"]
    return jnp.sum(error**2) / ROWS, {"largest": jnp.max(error), "rows": jnp.float32(len(error))}


def test_rows_are_dealt_out_in_turn():
    split = accumulation.split_rows({"a": np.arange(6), "b": np.arange(12).reshape(6, 2)}, 3)
    np.testing.assert_array_equal(split["a"], [[0, 3], [1, 4], [2, 5]])
    np.testing.assert_array_equal(split["b"], [[[0, 1], [6, 7]], [[2, 3], [8, 9]], [[4, 5], [10, 11]]])


@pytest.mark.parametrize("num_micro_batches", [1, 2, 3, 6])
def test_gradients_are_those_of_the_batch(num_micro_batches, batch):
    """d/dw sum (x w - y)^2 / n = 2 x' (x w - y) / n, by hand in NumPy."""
    w = np.array([0.5, -1.0, 2.0], np.float32)
    loss, aux, grads = jax.jit(accumulation.value_and_grad, static_argnums=(0, 3))(
        loss_fn, {"w": w}, batch, num_micro_batches
    )
    error = batch["x"] @ w - batch["y"]
    np.testing.assert_allclose(loss, np.mean(error**2), rtol=1e-6)
    np.testing.assert_allclose(grads["w"], 2 * batch["x"].T @ error / ROWS, rtol=1e-5)
    # What the loss reports comes back micro-batch by micro-batch.
    np.testing.assert_allclose(aux["largest"], error.reshape(-1, num_micro_batches).max(axis=0), rtol=1e-6)
    np.testing.assert_array_equal(aux["rows"], np.full(num_micro_batches, ROWS / num_micro_batches))


@pytest.mark.parametrize("num_micro_batches", [1, 3])
def test_sums_are_float32_whatever_the_parameters_are(num_micro_batches, batch):
    loss, _, grads = accumulation.value_and_grad(loss_fn, {"w": jnp.ones(3, jnp.bfloat16)}, batch, num_micro_batches)
    assert loss.dtype == grads["w"].dtype == jnp.float32
