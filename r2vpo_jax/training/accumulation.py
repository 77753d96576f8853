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
    if num_micro_batches == 1:
        (loss, aux), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, batch)
        return loss, jax.tree.map(lambda x: x[None], aux), _as_float32(grads)
    add = _adds(loss_fn, params)
    (loss, grads), aux = jax.lax.scan(add, _nothing(params), split_rows(batch, num_micro_batches))
    return loss, aux, grads


def value_and_grad_of_some(loss_fn, params, count, outputs):
    """The same over micro-batches 0 to `count` - 1, a number that only the device knows.

    Args:
      loss_fn: (params, number of the micro-batch, int32 []) -> (loss, aux).
      params: differentiated.
      count: int32 [].
      outputs: what is returned of aux for the micro-batches that are not reached; a leading micro-batch axis.

    Returns:
      (loss, aux with that axis, float32 gradients).
    """
    add = _adds(loss_fn, params)

    def body(number, carry):
        sums, outputs = carry
        sums, aux = add(sums, number)
        return sums, write(outputs, aux, number)

    (loss, grads), aux = jax.lax.fori_loop(0, count, body, (_nothing(params), outputs))
    return loss, aux, grads


def write(outputs, new, number):
    """`outputs` with `new` at an index of the leading axis of its leaves."""
    return jax.tree.map(lambda out, x: jax.lax.dynamic_update_index_in_dim(out, x, number, axis=0), outputs, new)


def _adds(loss_fn, params):
    """((loss, gradients) so far, micro-batch) -> (those with it, aux)."""
    grad_fn = jax.value_and_grad(loss_fn, has_aux=True)

    def add(sums, micro_batch):
        loss_sum, grad_sum = sums
        (loss, aux), grads = grad_fn(params, micro_batch)
        return (loss_sum + loss, jax.tree.map(jnp.add, grad_sum, _as_float32(grads))), aux

    return add


def _nothing(params):
    return jnp.float32(0), jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), params)


def _as_float32(tree):
    return jax.tree.map(lambda x: x.astype(jnp.float32), tree)
