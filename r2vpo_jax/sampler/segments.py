"""Decoding in segments: responses that are done leave, and the others close ranks.

A batch that decodes until its last response ends computes mostly nothing where lengths are long-tailed. Here the loop
stops when what is left fits the next of a few smaller sizes, and at the end of each segment: at an eighth of the longest
response, a quarter, a half. The cache starts with room for the first segment; rows that are left move to one of their
number and their length. While prompts still wait, few rows at the end of a segment are set aside, and go on together
with those of another batch at the same step: rows of a batch are always equally long, so that a step writes one column
and attends to the filled ones.

A row's draws are functions of its key and its step alone, so segments, sizes and the order of the prompts decide
nothing. Each pair of a size and a cache length is a program of its own, compiled when it is first needed. That they be
few, no cache is smaller than the first one: half of the rows have room for twice as many tokens from the start. So a
prompt size has at most 14 programs that decode, however long responses are, and small ones that move rows.
"""

import collections
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from r2vpo_jax import sharding
from r2vpo_jax.models.decoder import gather_layers
from r2vpo_jax.rows import rows_of_groups
from r2vpo_jax.sampler.decoding import Decoding, decode, placed, prefill, row_keys
from r2vpo_jax.sampler.distribution import Sampling

SHARES = (1, 3 / 4, 1 / 2, 1 / 4, 1 / 8, 1 / 16)  # of the rows of a batch: the sizes that there are programs for
_BY_ROW = ("logits", "keys", "done", "length", "found")  # the parts of a state that are [N, G, ...]


@functools.partial(jax.jit, static_argnames=("model", "columns", "mesh"))
def _start(model, params, tokens, lengths, wanted, key, sampling, problem_ids, first_sample, enough, columns, mesh):
    """Prefill and first segment; prompts that are not wanted fill the batch up."""
    with sharding.activate(mesh):
        keys = row_keys(key, problem_ids, first_sample + jnp.arange(sampling.group_size))
        params = gather_layers(model, params)
        state = prefill(model, params, sharding.constrain(tokens, "batch", None), lengths, keys, sampling, columns)
        state = state.replace(done=state.done | ~wanted[:, None])
        state, *drawn = decode(model, params, state, sampling, enough=enough)
        return placed(state), *drawn


@functools.partial(jax.jit, static_argnames=("model", "mesh"), donate_argnames="state")
def _advance(model, params, state, sampling, enough, until, mesh):
    with sharding.activate(mesh):
        params = gather_layers(model, params)
        state, *drawn = decode(model, params, state, sampling, enough=enough, until=until)
        return placed(state), *drawn


@functools.partial(jax.jit, static_argnames=("columns", "mesh"))
def _widen(state, columns, mesh):
    with sharding.activate(mesh):
        return placed(_with_room(state, columns))


@functools.partial(jax.jit, static_argnames=("columns", "mesh"))
def _regroup(state, other, index, columns, mesh):
    """Rows `index` [R] of one state, or of two at the same step one after the other, as [R, 1]; -1: none."""
    with sharding.activate(mesh):
        taken = _rows(state, index)
        if other is not None:
            after = index - state.done.size
            taken, others = _with_room(taken, columns), _with_room(_rows(other, after), columns)
            taken = _merged(after < 0, taken, others)
        return placed(_with_room(taken.replace(done=taken.done | (index < 0)[:, None]), columns))


def _rows(state: Decoding, index) -> Decoding:
    """Rows of [N, G] as [R, 1], each with a prompt of its own; what is out of range is some row."""
    group, cache = state.done.shape[1], state.cache
    index = jnp.clip(index, 0, state.done.size - 1)
    prompt = index // group

    def row(x):
        return jnp.take(x.reshape(-1, *x.shape[2:]), index, 0)[:, None]

    def layer_by_layer(of, x, *axes):
        # What devices hold for each other exists unsplit for a while: of one layer, then, and not of all.
        return jax.lax.map(lambda layer: sharding.constrain(of(layer), *axes), x)

    def prompts(x):
        return layer_by_layer(lambda x: jnp.take(x, prompt, 0), x, "batch", "kv_heads", None, None)

    def responses(x):
        return layer_by_layer(row, x, "batch", None, "kv_heads", None, None)

    return Decoding(
        **{name: jax.tree.map(row, getattr(state, name)) for name in _BY_ROW},
        cache=cache.replace(
            prompt_key=prompts(cache.prompt_key),
            prompt_value=prompts(cache.prompt_value),
            prompt_mask=jnp.take(cache.prompt_mask, prompt, 0),
            response_key=responses(cache.response_key),
            response_value=responses(cache.response_value),
        ),
    )


def _merged(first, state: Decoding, other: Decoding) -> Decoding:
    """Of each row [R, 1] the one state or the other."""

    def choose(axis):
        return lambda x, y: jnp.where(first.reshape((1,) * axis + (-1,) + (1,) * (x.ndim - axis - 1)), x, y)

    rows, layers = choose(0), choose(1)
    cache, theirs = state.cache, other.cache
    return Decoding(
        **{name: jax.tree.map(rows, getattr(state, name), getattr(other, name)) for name in _BY_ROW},
        cache=cache.replace(
            prompt_key=layers(cache.prompt_key, theirs.prompt_key),
            prompt_value=layers(cache.prompt_value, theirs.prompt_value),
            prompt_mask=rows(cache.prompt_mask, theirs.prompt_mask),
            response_key=layers(cache.response_key, theirs.response_key),
            response_value=layers(cache.response_value, theirs.response_value),
        ),
    )


def _with_room(state: Decoding, columns: int) -> Decoding:
    """With a cache for as many tokens; none of those that are there is beyond."""

    def fitted(x):
        padding = [(0, 0)] * x.ndim
        padding[4] = (0, max(columns - x.shape[4], 0))
        return jnp.pad(x[..., :columns, :], padding)

    cache = state.cache
    return state.replace(
        cache=cache.replace(response_key=fitted(cache.response_key), response_value=fitted(cache.response_value))
    )


def column_sizes(segment_length: int, longest: int) -> list[int]:
    """Ends of segments, and cache lengths: the longest response, its half, ..., none below `segment_length`."""
    sizes = [longest // 2**halvings for halvings in range(4)]
    return sorted({size for size in sizes if size == longest or size >= segment_length})


def row_sizes(rows: int, devices: int) -> list[int]:
    """Batches that there are programs for: all rows, and shares of them that the devices divide."""
    return sorted({min(-(-int(np.ceil(rows * share)) // devices) * devices, rows) for share in SHARES})


@dataclasses.dataclass
class _Batch:
    state: Decoding
    rows: np.ndarray  # int [R], the place of the response that each row of the state makes; -1: none, or done
    step: int  # tokens drawn of each

    @property
    def live(self) -> int:
        return int(np.sum(self.rows >= 0))

    @property
    def columns(self) -> int:
        return self.state.cache.response_key.shape[4]


class SegmentedDecoding:
    """Responses to any number of prompts of one size, to where they are kept.

    Args:
      model, params, key, sampling, first_sample: as for `sample`.
      mesh: the run's mesh.
      batch_size: prompts that start together.
      columns: where segments end, ascending; the last is the longest response (`column_sizes`).
    """

    def __init__(self, model, params, key, sampling: Sampling, *, mesh, first_sample, batch_size: int, columns):
        self._model, self._params, self._key, self._sampling = model, params, key, sampling
        self._mesh, self._first_sample, self._batch_size, self._columns = mesh, first_sample, batch_size, columns
        devices = mesh.shape["data"] * mesh.shape["fsdp"]
        self._sizes = row_sizes(batch_size * sampling.group_size, devices)
        # Only a batch that never shrank has all rows: its groups share their prompts.
        self._most_together = self._sizes[-2] if len(self._sizes) > 1 else 0

    def __call__(self, tokens, lengths, problem_ids, home, places):
        """Draws them.

        Args:
          tokens, lengths, problem_ids: NumPy, int32 [N, P], [N] and [N].
          home: keeps them (`sampler.home`).
          places: int [N * G], the place there of each.
        """
        self._home, self._places = home, places
        waiting = collections.deque(range(0, len(tokens), self._batch_size))
        aside: dict[int, _Batch] = {}  # by their step
        while waiting or aside:
            if waiting:
                first = waiting.popleft()
                batch = self._begin(tokens, lengths, problem_ids, first)
            else:
                batch = aside.pop(min(aside))
            while batch.live:
                other = aside.get(batch.step)
                if other is not None and batch.live + other.live <= self._most_together:
                    batch = self._moved(batch, aside.pop(batch.step))
                if waiting and batch.step in self._columns and batch.live <= self._most_together // 2:
                    aside[batch.step] = self._moved(batch)
                    break
                batch = self._go_on(batch)

    def _begin(self, tokens, lengths, problem_ids, first: int) -> _Batch:
        chosen = np.arange(first, min(first + self._batch_size, len(tokens)))
        filled = np.resize(chosen, self._batch_size)
        wanted = np.arange(self._batch_size) < len(chosen)
        group = self._sampling.group_size
        rows = self._places[rows_of_groups(filled, group)]
        rows[len(chosen) * group :] = -1
        state, out, logps = _start(
            self._model,
            self._params,
            *(sharding.put_batch(x, self._mesh) for x in (tokens[filled], lengths[filled], wanted)),
            self._key,
            self._sampling,
            sharding.put_batch(problem_ids[filled], self._mesh),
            self._first_sample,
            self._enough(len(rows)),
            self._columns[0],
            self._mesh,
        )
        return self._harvest(_Batch(state, rows, 0), state, out, logps)

    def _go_on(self, batch: _Batch) -> _Batch:
        """One segment more, in the smallest batch that holds what is left."""
        columns = self._room(batch.step, len(batch.rows))
        if self._size(batch.live) < len(batch.rows):
            batch = self._moved(batch)
        elif columns > batch.columns:
            batch = _Batch(_widen(batch.state, columns, self._mesh), batch.rows, batch.step)
        until = next(end for end in self._columns if end > batch.step)
        state, out, logps = _advance(
            self._model,
            self._params,
            batch.state,
            self._sampling,
            self._enough(len(batch.rows)),
            np.int32(until),
            self._mesh,
        )
        return self._harvest(batch, state, out, logps)

    def _harvest(self, batch: _Batch, state: Decoding, out, logps) -> _Batch:
        """Keeps what a segment has drawn."""
        drawn = out, logps, state.length, state.done
        done, end = self._home.keep(batch.rows, *drawn, start=batch.step, end=state.cache.response_length)
        left = np.where(done | (end == self._columns[-1]), -1, batch.rows)
        return _Batch(state, left, end)

    def _moved(self, batch: _Batch, other: _Batch | None = None) -> _Batch:
        """What is left of a batch, or of two, in the smallest that holds it."""
        rows = batch.rows if other is None else np.concatenate([batch.rows, other.rows])
        left = np.flatnonzero(rows >= 0)
        size = self._size(len(left))
        index = np.full(size, -1, np.int32)
        index[: len(left)] = left
        state = _regroup(
            batch.state,
            None if other is None else other.state,
            sharding.put_batch(index, self._mesh),
            self._room(batch.step, size),
            self._mesh,
        )
        return _Batch(state, np.where(index < 0, -1, rows[index]), batch.step)

    def _size(self, live: int) -> int:
        return next(size for size in self._sizes if size >= live)

    def _enough(self, size: int) -> np.int32:
        """The next smaller size; 0 if there is none."""
        return np.int32(max((other for other in self._sizes if other < size), default=0))

    def _room(self, step: int, size: int) -> int:
        """Columns for a token more; as many as the memory of the first cache has room for, if that is more."""
        entries = self._sizes[-1] * self._columns[0]
        return next(n for n in self._columns if n > step and n >= max(m for m in self._columns if m * size <= entries))
