"""Responses to any number of prompts, from and to the host."""

import functools

import jax
import numpy as np

from r2vpo_jax import sharding
from r2vpo_jax.config.sampling import SEGMENT_LENGTH
from r2vpo_jax.rollout import Rollout
from r2vpo_jax.rows import Rows, all_rows, rows_of_groups
from r2vpo_jax.sampler.decoding import assemble, sample
from r2vpo_jax.sampler.distribution import Sampling
from r2vpo_jax.sampler.home import make_home
from r2vpo_jax.sampler.segments import SegmentedDecoding, column_sizes


@functools.partial(jax.jit, static_argnames=("model", "mesh"))
def _sample(model, params, tokens, lengths, problem_ids, key, sampling, first_sample, mesh):
    """Response tokens [B, T], log-probabilities [B, T], lengths [B], and whether each has ended [B]."""
    how = {"problem_ids": problem_ids, "first_sample": first_sample}
    with sharding.activate(mesh):
        drawn = sample(model, params, tokens, lengths, key, sampling, **how)
    return drawn.response_tokens, drawn.behavior_logp, drawn.response_length, ~drawn.truncated


def generate(
    model,
    params,
    tokens,
    lengths,
    key,
    sampling: Sampling,
    *,
    mesh,
    problem_ids,
    first_sample=0,
    version=0,
    batch_size=None,
    buckets=(),
    segment_length: int = SEGMENT_LENGTH,
    rows: Rows | None = None,
) -> Rollout:
    """`sample` for any number of prompts, from and to the host.

    Args:
      model, params, key, sampling, first_sample, version: as for `sample`.
      tokens: int32 [N, P] NumPy, left-padded.
      lengths: int32 [N].
      mesh: the run's mesh.
      problem_ids: int32 [N].
      batch_size: prompts in one call (default all); the last batch is filled up and cut again.
      buckets: prompt sizes below P; a prompt is computed at the smallest that holds it. One program each.
      segment_length: tokens that the cache of responses holds at least. Where `max_response_length` is twice as many or
        more, it starts short and grows, and responses that are done leave (`segments`); else, and with 0, it holds
        `max_response_length` from the start, and the rows of a batch end together. It decides cost, not results.
      rows: how the N groups are spread over processes (`rows.rows_of`); default: every process gets all of them.

    Returns:
      A Rollout of NumPy arrays in the order of the prompts, with prompt size P: of this process's rows. `rollout_id` is
      the number of a row among all.

    Raises:
      ValueError: a prompt is empty or longer than P, an EOS id is outside of the vocabulary, or temperature,
        top_k, top_p or segment_length is out of range.
    """
    tokens, lengths = np.asarray(tokens, np.int32), np.asarray(lengths, np.int32)
    problem_ids = np.asarray(problem_ids, np.int32)
    num_prompts, prompt_size = tokens.shape
    if num_prompts == 0 or lengths.min() < 1 or lengths.max() > prompt_size:
        raise ValueError(
            f"prompt lengths must be between 1 and {prompt_size}, got {lengths.min(initial=0)} to {lengths.max(initial=0)}"
        )
    if not (sampling.temperature >= 0 and sampling.top_k >= 0 and 0 < sampling.top_p <= 1):
        raise ValueError(
            f"sampling needs temperature >= 0, top_k >= 0 and 0 < top_p <= 1, got {sampling.temperature}, "
            f"{sampling.top_k} and {sampling.top_p}"
        )
    if not all(0 <= i < model.config.vocab_size for i in sampling.eos_ids):
        raise ValueError(
            f"end-of-text ids {sampling.eos_ids} are not all in the vocabulary of {model.config.vocab_size}"
        )
    if segment_length < 0:
        raise ValueError(f"segment_length must be at least 0 (no segments), got {segment_length}")
    batch_size = min(batch_size or num_prompts, num_prompts)
    longest = sampling.max_response_length
    columns = column_sizes(segment_length or longest, longest)

    rows = rows or all_rows(mesh, num_prompts, sampling.group_size)
    home = make_home(rows, sampling)
    sizes = sorted({min(b, prompt_size) for b in buckets} | {prompt_size})
    bucket_of = np.searchsorted(sizes, lengths)
    for number, size in enumerate(sizes):
        members = np.flatnonzero(bucket_of == number)
        if not len(members):
            continue
        prompts = tokens[members, prompt_size - size :], lengths[members], problem_ids[members]
        places = rows_of_groups(members, sampling.group_size)
        how = {"mesh": mesh, "first_sample": first_sample, "batch_size": batch_size}
        if len(columns) > 1:
            SegmentedDecoding(model, params, key, sampling, columns=columns, **how)(*prompts, home, places)
        else:
            _in_lock_step(model, params, *prompts, home, places, key, sampling, **how)
    prompts = (x[rows.groups] for x in (tokens, lengths, problem_ids))
    rollout = assemble(np, *prompts, *home.fetch(), sampling=sampling, version=version)
    return rollout.replace(rollout_id=rows.index.astype(np.int32))


def _in_lock_step(
    model, params, tokens, lengths, problem_ids, home, places, key, sampling, *, mesh, first_sample, batch_size
):
    """What `SegmentedDecoding` does, in batches that decode until their last response ends."""
    group = sampling.group_size
    for start in range(0, len(tokens), batch_size):
        chosen = np.arange(start, min(start + batch_size, len(tokens)))
        filled = np.resize(chosen, batch_size)
        arrays = sharding.put_batch([x[filled] for x in (tokens, lengths, problem_ids)], mesh)
        drawn = _sample(model, params, *arrays, key, sampling, first_sample, mesh)
        there = np.full(batch_size * group, -1)
        there[: len(chosen) * group] = places[rows_of_groups(chosen, group)]
        home.keep(there, *drawn, start=0, end=sampling.max_response_length)
