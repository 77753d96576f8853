"""Where drawn tokens are kept until all are there: on the host that wants all of them, else on the devices.

Sampling goes through prompts in an order and in batches of its own. Here each response has its place in the order that was
asked for. Hosts plan by which rows are done and nothing else; with several shares of rows (`rows.Rows`) the tokens stay on
the devices of the one who keeps them, and each host fetches its own at the end.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from r2vpo_jax import sharding
from r2vpo_jax.rows import Rows
from r2vpo_jax.sampler.distribution import Sampling


def make_home(rows: Rows, sampling: Sampling):
    """Places for the responses of a batch, none of them there yet."""
    return (HostHome if rows.is_all else DeviceHome)(rows, sampling)


class HostHome:
    """On the host: every process gets all responses.

    Args:
      rows: of B responses.
      sampling: T and the padding token are used.
    """

    def __init__(self, rows: Rows, sampling: Sampling):
        number, longest = len(rows.index), sampling.max_response_length
        self._tokens = np.full((number, longest), sampling.pad_id, np.int32)
        self._logps = np.zeros((number, longest), np.float32)
        self._lengths, self._ended = np.zeros(number, np.int32), np.zeros(number, bool)

    def keep(self, places: np.ndarray, out, logps, length, ended, *, start: int, end) -> tuple[np.ndarray, int]:
        """Keeps what was drawn of R responses.

        Args:
          places: int [R], the place of each; -1: none.
          out, logps: of R rows, [R, C] or [N, G, C], on the devices.
          length, ended: [R] or [N, G].
          start: columns from here,
          end: and before here, an int or int32 [] on the devices.

        Returns:
          `ended`, bool [R], and `end`, on the host.
        """
        out, logps, length, ended, end = sharding.to_host((out, logps, length, ended, end))  # the same on all processes
        here, end, ended = places >= 0, int(end), ended.reshape(-1)
        at = places[here]
        self._tokens[at, start:end] = out.reshape(len(here), -1)[here, start:end]
        self._logps[at, start:end] = logps.reshape(len(here), -1)[here, start:end]
        self._lengths[at], self._ended[at] = length.reshape(-1)[here], ended[here]
        return ended, end

    def fetch(self) -> tuple[np.ndarray, ...]:
        """Tokens int32 [B, T], log-probabilities f32 [B, T], lengths int32 [B], whether each has ended, bool [B]."""
        return self._tokens, self._logps, self._lengths, self._ended


class DeviceHome:
    """On the devices: a process gets the responses of its own share. Arguments and methods as those of `HostHome`."""

    def __init__(self, rows: Rows, sampling: Sampling):
        self._rows, self._total = rows, rows.num_groups * rows.group_size
        self._arrays = _empty(self._total, sampling.max_response_length, sampling.pad_id, rows.mesh)

    def keep(self, places, out, logps, length, ended, *, start, end):
        source = np.full(self._total, -1, np.int32)
        here = places >= 0
        source[places[here]] = np.flatnonzero(here)
        source = sharding.put_batch(source, self._rows.mesh)
        new = out, logps, length, ended
        self._arrays = _settle(self._arrays, new, source, np.int32(start), end, self._rows.mesh)
        ended, end = sharding.to_host((ended, end))
        return ended.reshape(-1), int(end)

    def fetch(self):
        return self._rows.fetch(self._arrays)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _empty(number, longest, pad_id, mesh):
    tokens = jnp.full((number, longest), pad_id, jnp.int32)
    return _by_row(
        (tokens, jnp.zeros(tokens.shape, jnp.float32), jnp.zeros(number, jnp.int32), jnp.zeros(number, bool)), mesh
    )


@functools.partial(jax.jit, static_argnames="mesh", donate_argnums=0)
def _settle(arrays, new, source, start, end, mesh):
    """`arrays` with row source[r] of what is new in row r, where that is not negative."""
    tokens, logps, length, ended = arrays
    here, row = source >= 0, jnp.maximum(source, 0)
    number = new[2].size

    def of(x):
        # One batch of the sampler, gathered on each device: every device then takes the rows of its places.
        x = jax.lax.with_sharding_constraint(x.reshape(number, *x.shape[new[2].ndim :]), sharding.replicated(mesh))
        return jnp.take(x, row, axis=0)

    def with_columns(x, drawn):
        columns = jnp.arange(drawn.shape[-1])
        inside = here[:, None] & (columns >= start) & (columns < end)
        return x.at[:, : len(columns)].set(jnp.where(inside, of(drawn), x[:, : len(columns)]))

    return _by_row(
        (
            with_columns(tokens, new[0]),
            with_columns(logps, new[1]),
            jnp.where(here, of(new[2]), length),
            jnp.where(here, of(new[3]), ended),
        ),
        mesh,
    )


def _by_row(arrays, mesh):
    return tuple(jax.lax.with_sharding_constraint(x, sharding.batch_sharding(x.shape, mesh)) for x in arrays)
