"""Decoding in segments draws what decoding in one loop draws, with less to hold and less to compute."""

import jax
import numpy as np
import pytest

from r2vpo_jax import sampler
from r2vpo_jax.sampler import segments
from tests.helpers.compilations import compilations
from tests.test_sampler import GROUP, KEY, LENGTHS, MODEL, PARAMS, PROBLEMS, TOKENS, same_draws, sampling

LONGEST = 40  # responses of the model here: most of 1 to 24 tokens, some never end
ROWS = len(LENGTHS) * GROUP


@pytest.fixture(scope="module")
def draw(mesh):
    def generate(order=slice(None), settings=None, key=KEY, **how):
        settings = settings or sampling(max_response_length=LONGEST)
        arrays = TOKENS[order], LENGTHS[order]
        return sampler.generate(MODEL, PARAMS, *arrays, key, settings, mesh=mesh, problem_ids=PROBLEMS[order], **how)

    return generate


@pytest.fixture(scope="module")
def whole(draw):
    return draw(segment_length=0)


@pytest.fixture
def states(monkeypatch):
    """(rows, columns) of each state that decodes, in order."""
    seen = []
    advance = segments._advance

    def watched(model, params, state, *arguments):
        seen.append((state.done.size, state.cache.response_key.shape[4]))
        return advance(model, params, state, *arguments)

    monkeypatch.setattr(segments, "_advance", watched)
    return seen


def by_first_token(lengths):
    """Sampling in which a response that begins with token v ends after `lengths[v]` tokens, by a table of stop strings."""
    last = LONGEST
    table = np.tile(np.minimum(np.arange(last + 1) + 1, last)[:, None], len(lengths)).astype(np.int32)
    table[0] = last + 1 - np.asarray(lengths)
    return sampling(max_response_length=LONGEST, eos_ids=(), stop=table)


def test_segments_change_no_draw(draw, whole):
    """One batch: the rows that are left move into smaller ones. Then nothing is compiled any more."""
    same_draws(whole, draw(segment_length=20))
    for changes in ({"temperature": 0.0}, {"top_p": 0.8, "temperature": 1.3}, {"top_k": 3}):
        settings = sampling(max_response_length=LONGEST, **changes)
        same_draws(draw(settings=settings, segment_length=0), draw(settings=settings, segment_length=20))
    with compilations() as compiled:
        again = draw(segment_length=20)
    assert not compiled
    np.testing.assert_array_equal(again.tokens, whole.tokens)
    np.testing.assert_array_equal(again.rollout_id, whole.rollout_id)
    np.testing.assert_array_equal(again.prompt_length, whole.prompt_length)
    order = np.array([3, 0, 5, 1, 4, 2])
    rows = (order[:, None] * GROUP + np.arange(GROUP)).reshape(-1)
    same_draws(jax.tree.map(lambda x: x[rows], whole), draw(order, segment_length=20))


@pytest.mark.slow
@pytest.mark.parametrize(
    "how",
    [
        {"segment_length": 7, "batch_size": 2},  # the rest of three batches goes on together
        {"segment_length": 16, "batch_size": 4, "buckets": (4,)},  # batches are filled up
        {"segment_length": 39},  # nothing to cut
    ],
    ids=str,
)
def test_segments_batches_and_buckets_change_no_draw(how, draw, whole):
    same_draws(whole, draw(**how))


@pytest.mark.slow
def test_leftovers_of_several_batches_go_on_together(draw, monkeypatch):
    merged = []
    regroup = segments._regroup

    def watched(state, other, *arguments):
        merged.append(other is not None)
        return regroup(state, other, *arguments)

    monkeypatch.setattr(segments, "_regroup", watched)
    settings = by_first_token(np.where(np.arange(MODEL.config.vocab_size) % 5 == 0, LONGEST, 3))
    lock_step = draw(settings=settings, segment_length=0)
    assert set(lock_step.response_length.tolist()) == {3, LONGEST}
    same_draws(lock_step, draw(settings=settings, segment_length=5, batch_size=2))
    assert sum(merged) >= 2


@pytest.mark.slow
def test_the_cache_is_as_long_as_what_is_left(draw, whole, states):
    """Longest response eight times the mean: never more cache than an eighth of what lock-step holds."""
    first, count = np.unique(whole.response_tokens[:, 0], return_counts=True)
    settings = by_first_token(np.where(np.arange(MODEL.config.vocab_size) == first[count.argmin()], LONGEST, 2))
    drawn = draw(settings=settings, segment_length=5)
    assert drawn.response_length.max() == LONGEST >= 8 * drawn.response_length.mean()
    assert states
    assert max(rows * columns for rows, columns in states) <= ROWS * LONGEST // 8
    same_draws(drawn, draw(settings=settings, segment_length=0))


@pytest.mark.slow
def test_programs_are_few(draw, states):
    """Whatever the lengths: every batch is one of 15, and those that were there before compile nothing."""
    for seed in range(12):
        lengths = np.random.default_rng(seed).geometric(1 / 12, MODEL.config.vocab_size)
        before = set(states)
        with compilations() as compiled:
            draw(settings=by_first_token(np.minimum(lengths, LONGEST)), segment_length=5, key=jax.random.key(seed))
        assert compiled.count("jit(_advance)") <= len(set(states) - before)
    assert len(set(states)) <= 14  # and the one that starts


def test_the_loop_stops_when_a_smaller_batch_would_do(draw, whole, states):
    draw(segment_length=20)
    assert (segments.column_sizes(20, LONGEST), segments.row_sizes(ROWS, 1)) == ([20, 40], [2, 3, 6, 12, 18, 24])
    # Each state is the smallest that holds what is left, once the state before it held more than that.
    expected, rows = [], ROWS
    for step in range(1, LONGEST):
        left = int(np.sum(whole.response_length > step))
        fitting = next(size for size in segments.row_sizes(ROWS, 1) if size >= left)
        if fitting < rows or step == 20:
            rows = min(rows, fitting)
            expected.append((rows, 20 if step < 20 and rows > ROWS // 2 else 40))
    assert states == expected


def test_sizes():
    assert segments.column_sizes(10, 100) == [12, 25, 50, 100]
    assert segments.column_sizes(64, 512) == [64, 128, 256, 512]
    assert segments.column_sizes(128, 255) == [255]
    assert segments.column_sizes(1, 3) == [1, 3]
    assert segments.row_sizes(256, 1) == [16, 32, 64, 128, 192, 256]
    assert segments.row_sizes(24, 8) == [8, 16, 24]
    assert segments.row_sizes(6, 8) == [6]


def test_a_negative_segment_is_refused(draw):
    with pytest.raises(ValueError, match="segment_length must be at least 0"):
        draw(segment_length=-1)
