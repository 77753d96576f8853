"""Gradients of a batch, one micro-batch at a time."""

import jax
import jax.numpy as jnp

from r2vpo_jax.sharding import constrain


def split_rows(batch, num_micro_batches: int):
    """[B, ...] leaves -> [num_micro_batches, B / num_micro_batches, ...].

    Row i goes to micro-batch i % num_micro_batches, so that rows spread over devices stay where they are.
    """

    def split(x):
        x = x.reshape(-1, num_micro_batches, *x.shape[1:]).swapaxes(0, 1)
        return constrain(x, None, "batch", *(None,) * (x.ndim - 2))

    return jax.tree.map(split, batch)


def value_and_grad(loss_fn, params, batch, num_micro_batches: int):
    """Sum of losses and gradients over micro-batches; memory of one.

    Args:
      loss_fn: (params, micro_batch) -> (loss, aux). Losses must add up, so each is divided by the *global* count.
      params: differentiated.
      batch: pytree with rows on axis 0 of every leaf.
      num_micro_batches: divides the number of rows.

    Returns:
      (loss, aux with a leading micro-batch axis, float32 gradients).
    """
    grad_fn = jax.value_and_grad(loss_fn, has_aux=True)

    def as_float32(tree):
        return jax.tree.map(lambda x: x.astype(jnp.float32), tree)

    if num_micro_batches == 1:
        (loss, aux), grads = grad_fn(params, batch)
        return loss, jax.tree.map(lambda x: x[None], aux), as_float32(grads)

    def body(carry, micro_batch):
        loss_sum, grad_sum = carry
        (loss, aux), grads = grad_fn(params, micro_batch)
        return (loss_sum + loss, jax.tree.map(jnp.add, grad_sum, as_float32(grads))), aux

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), params)
    (loss, grads), aux = jax.lax.scan(body, (jnp.float32(0), zeros), split_rows(batch, num_micro_batches))
    return loss, aux, grads
