"""Rows cut to their real tokens and packed, several to a row of the model; scores come out as those of whole rows.

A batch of B rows [left-padded prompt | response] takes B passes of P + T columns, however short its responses are. Here
they take as many packs of P + T columns as their tokens fill: first-fit decreasing puts each row into the first pack that
has room for it. Tokens attend within their row only (segments), and count their positions from its first token, so a row's
scores do not depend on its neighbors. How many packs there are is known on the device only: the loop over micro-batches
of packs ends where they do. Losses and statistics get [rows, T] and never see packs.

Sizes in comments: B rows, P prompt columns, T response columns, n micro-batches at most, m packs in each, K = SLOTS of a pack, for
rows, S = P + T columns of a pack. A row needs a prompt of at least one token.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from r2vpo_jax import scoring
from r2vpo_jax.rollout import Rollout
from r2vpo_jax.scoring import Scores
from r2vpo_jax.sharding import constrain
from r2vpo_jax.training import accumulation, critic
from r2vpo_jax.training.settings import UpdateSettings

# Rows in a pack at most. A slot costs the elementwise work of a loss on T columns, whether a row is in it or not.
SLOTS = 16


# Which row goes where -----------------------------------------------------------------------------------------------


class Plan(NamedTuple):
    """Where rows go; there are as many packs as rows, and the first `count` are used."""

    rows: Int[Array, "packs slots"]  # the row in each slot, -1 where there is none; those of a pack from slot 0 on
    pack: Int[Array, " batch"]  # of each row, -1 if it has no place
    offset: Int[Array, " batch"]  # response tokens that stand before its own in the pack
    count: Int[Array, ""]


def plan(
    prompt_length: Int[Array, " batch"],
    response_length: Int[Array, " batch"],
    take: Bool[Array, " batch"],
    *,
    row_size: int,
    response_size: int,
) -> Plan:
    """First-fit decreasing: from the longest row on, each goes into the first pack with room for it.

    Args:
      prompt_length, response_length: int32 [B], at most row_size - response_size and response_size: each row fits a pack.
      take: bool [B], False for rows that need no place; those without a response get none either.
      row_size: tokens in a pack at most.
      response_size: response tokens in a pack at most.
    """
    take = take & (response_length > 0)
    length = jnp.where(take, prompt_length + response_length, 0)
    order = jnp.argsort(-length)
    capacity = jnp.array([row_size, response_size, SLOTS], jnp.int32)

    def place(used, row):
        needed = jnp.stack([length[row], response_length[row], jnp.int32(1)])
        pack = jnp.argmax(jnp.all(used + needed <= capacity, axis=-1))
        before = used[pack]
        taken = take[row]
        return used.at[pack].add(jnp.where(taken, needed, 0)), (jnp.where(taken, pack, -1), before[2], before[1])

    size = len(length)
    used, (pack, slot, offset) = jax.lax.scan(place, jnp.zeros((size, 3), jnp.int32), order)
    # Behind the last pack, for rows without a place: those writes are dropped.
    rows = jnp.full((size, SLOTS), -1, jnp.int32).at[jnp.where(pack < 0, size, pack), slot].set(order, mode="drop")
    back = jnp.argsort(order)
    return Plan(rows, pack[back], offset[back], jnp.sum(used[:, 2] > 0))


@struct.dataclass
class Packed:
    """A batch and its plan: n micro-batches of m packs, of which those before `count` hold anything."""

    batch: Rollout
    plan: Plan
    num_micro_batches: int = struct.field(pytree_node=False)  # n

    @property
    def packs(self) -> int:
        """m."""
        return len(self.plan.rows) // self.num_micro_batches

    @property
    def count(self) -> Int[Array, ""]:
        """Micro-batches that hold anything."""
        return -(-self.plan.count // self.packs)

    def micro_batch(self, number: Int[Array, ""]) -> Rollout:
        """The m * K rows of a micro-batch; an empty slot is a row of zeros that does not take part."""
        rows = jax.lax.dynamic_slice_in_dim(self.plan.rows, number * self.packs, self.packs).reshape(-1)

        def of_rows(x):
            there = (rows >= 0).reshape(-1, *(1,) * (x.ndim - 1))
            x = jnp.where(there, x[jnp.maximum(rows, 0)], jnp.zeros((), x.dtype))
            return constrain(x, "batch", *(None,) * (x.ndim - 1))

        return jax.tree.map(of_rows, self.batch)

    def buffers(self, with_values: bool) -> Scores:
        """Zeros [n, m, T], for scores in packed order."""
        shape = self.num_micro_batches, self.packs, self.batch.response_size
        zeros = constrain(jnp.zeros(shape), None, "batch", None)
        return Scores(zeros, zeros, zeros if with_values else None)

    def unpack(self, scores: Scores) -> Scores:
        """Scores [n, m, T] in packed order -> those of the batch's rows, [B, T]; 0 where there is none."""
        column = jnp.arange(self.batch.response_size)
        place = (self.plan.pack * len(column) + self.plan.offset)[:, None] + column
        there = self.batch.response_mask & (self.plan.pack >= 0)[:, None]

        def of_rows(x):
            x = constrain(x.reshape(-1), None)
            return constrain(jnp.where(there, x[jnp.where(there, place, 0)], 0.0), "batch", None)

        return jax.tree.map(of_rows, scores)


def pack(batch: Rollout, take: Bool[Array, " batch"], settings: UpdateSettings) -> Packed:
    """The plan of a batch.

    Args:
      batch: B rows.
      take: bool [B], the rows whose scores are wanted.
      settings: of the run.
    """
    # Each device has all rows, so that those of its packs need not be fetched in the loop.
    batch = jax.tree.map(lambda x: constrain(x, *(None,) * x.ndim), batch)
    num_micro_batches = settings.num_micro_batches(len(batch.keep))
    sizes = {"row_size": batch.tokens.shape[1], "response_size": batch.response_size}
    return Packed(batch, plan(batch.prompt_length, batch.response_length, take, **sizes), num_micro_batches)


# Packs through the model --------------------------------------------------------------------------------------------


class _Layout(NamedTuple):
    """m packs, made of m * K rows. Indices are into the axes named, -1 where there is nothing."""

    tokens: Int[Array, "packs columns"]
    positions: Int[Array, "packs columns"]
    segments: Int[Array, "packs columns"]
    targets: Int[Array, "packs time"]
    temperature: Float[Array, "packs time"]
    column_of_place: Int[Array, "packs time"]  # whose hidden state says the response token at a place
    place_of_column: Int[Array, "packs columns"]
    cell_of_place: Int[Array, "packs time"]  # in [K * T], the rows' own columns one after the other
    place_of_cell: Int[Array, "packs cells"]


def _layout(rows: Rollout) -> _Layout:
    size, response_size, prompt_size = rows.tokens.shape[1], rows.response_size, rows.prompt_size
    prompt, response = (x.reshape(-1, SLOTS) for x in (rows.prompt_length, rows.response_length))
    tokens = rows.tokens.reshape(len(prompt), -1)
    end, response_end = (jnp.cumsum(x, axis=1) for x in (prompt + response, response))
    start, response_start = end - prompt - response, response_end - response

    def slot_at(ends, size):
        """(the slot that each of `size` columns belongs to, whether there is one)."""
        slot = jnp.sum(jnp.arange(size)[:, None] >= ends[:, None, :], axis=-1)
        return jnp.minimum(slot, SLOTS - 1), slot < SLOTS

    def of(x, slot):
        return jnp.take_along_axis(x, slot, axis=1)

    slot, used = slot_at(end, size)
    position = jnp.where(used, jnp.arange(size) - of(start, slot), 0)
    source = slot * size + prompt_size - of(prompt, slot) + position
    # A hidden state says the next token: that of the last prompt token says the response's first.
    said = position + 1 - of(prompt, slot)
    says = used & (said >= 0) & (said < of(response, slot))

    place_slot, filled = slot_at(response_end, response_size)
    time = jnp.where(filled, jnp.arange(response_size) - of(response_start, place_slot), 0)
    column = of(start + prompt, place_slot) - 1 + time
    target = place_slot * size + prompt_size + time

    times = jnp.arange(response_size)
    place = jnp.where(times < response[..., None], response_start[..., None] + times, -1)
    temperature = rows.temperature.reshape(-1, SLOTS)
    return _Layout(
        tokens=jnp.where(used, of(tokens, source), 0),
        positions=position,
        segments=jnp.where(used, slot + 1, 0),
        targets=jnp.where(filled, of(tokens, target), 0),
        temperature=jnp.where(filled, of(temperature, place_slot), 1.0),
        column_of_place=jnp.where(filled, column, -1),
        place_of_column=jnp.where(says, of(response_start, slot) + said, -1),
        cell_of_place=jnp.where(filled, place_slot * response_size + time, -1),
        place_of_cell=place.reshape(len(prompt), -1),
    )


def _at(x, index):
    """x [m, A, ...] at index [m, C], 0 where that is negative."""
    shape = *index.shape, *(1,) * (x.ndim - 2)
    there = (index >= 0).reshape(shape)
    return jnp.where(there, jnp.take_along_axis(x, jnp.maximum(index, 0).reshape(shape), axis=1), 0)


@jax.custom_vjp
def _move(x, index, back):
    """`_at(x, index)`, where nothing goes to two places: `back` [m, A] says where each went, -1 for nowhere.

    The gradient is then a gather too; that of a general one adds up into zeros one by one, which is slow everywhere.
    """
    return _at(x, index)


_move.defvjp(lambda x, index, back: (_at(x, index), back), lambda back, slope: (_at(slope, back), None, None))


def _score_packs(trained, rows: Rollout, model, settings: UpdateSettings) -> tuple[Scores, _Layout]:
    """Scores of m * K rows in packed order, f32 [m, T], and where they are."""
    params, head = trained
    layout = _layout(rows)
    tokens, positions, segments = (
        constrain(x, "batch", None) for x in (layout.tokens, layout.positions, layout.segments)
    )
    hidden = model.apply({"params": params}, tokens, positions, segments, method="hidden_states")
    hidden = constrain(_move(hidden, layout.column_of_place, layout.place_of_column), "batch", None, None)
    scores = scoring.token_scores(
        model,
        params,
        hidden,
        layout.targets,
        layout.temperature,
        chunk_size=settings.scoring_chunk_size,
        value_head=None if head is None else functools.partial(critic.values, head),
        entropy_gradient=settings.objective.has_entropy_bonus,
    )
    return scores, layout


def _of_rows(scores: Scores, layout: _Layout) -> Scores:
    """Scores in packed order, [m, T] -> those of the m * K rows, [m * K, T]."""

    def of_rows(x):
        size = x.shape[1]
        return constrain(_move(x, layout.place_of_cell, layout.cell_of_place).reshape(-1, size), "batch", None)

    return jax.tree.map(of_rows, scores)


# A batch ------------------------------------------------------------------------------------------------------------


def score(trained, batch: Rollout, model, settings: UpdateSettings, *, take=None) -> Scores:
    """Scores of a batch's responses, f32 [B, T], one micro-batch of packs at a time.

    Args:
      trained: (params, value head or None).
      batch: B rows.
      model: the decoder.
      settings: of the run.
      take: bool [B], the rows whose scores are wanted; default all. Others get 0.
    """
    packed = pack(batch, jnp.ones(len(batch.keep), bool) if take is None else take, settings)

    def body(number, scores):
        new, _ = _score_packs(trained, packed.micro_batch(number), model, settings)
        return accumulation.write(scores, new, number)

    buffers = packed.buffers(trained[1] is not None)
    return packed.unpack(jax.lax.fori_loop(0, packed.count, body, buffers))


def value_and_grad(
    loss_of: Callable,
    trained,
    batch: Rollout,
    model,
    settings: UpdateSettings,
    full: Callable = lambda trained: trained,
) -> tuple[jax.Array, Scores, tuple]:
    """Sum of losses and gradients over the micro-batches of packs, and the scores of all rows that take part.

    Args:
      loss_of: (scores, rows) -> (loss, anything); losses add up over rows.
      trained: what gradients are taken of.
      model, settings: as for `score`.
      batch: B rows, of which those with `keep` take part.
      full: trained -> (params, value head or None), where more parameters than those make the model.

    Returns:
      (loss, scores f32 [B, T], float32 gradients).
    """
    packed = pack(batch, batch.keep, settings)

    def loss_fn(trained, number):
        rows = packed.micro_batch(number)
        scores, layout = _score_packs(full(trained), rows, model, settings)
        return loss_of(_of_rows(scores, layout), rows)[0], scores

    loss, scores, grads = accumulation.value_and_grad_of_some(
        loss_fn, trained, packed.count, packed.buffers(trained[1] is not None)
    )
    return loss, packed.unpack(scores), grads
