"""Decoding in segments draws what decoding in one loop draws, with less to hold and less to compute."""

import jax
import numpy as np
import pytest

from r2vpo_jax import sampler
from r2vpo_jax.sampler import segments
from tests.helpers.compilations import compilations
from tests.test_sampler import KEY, LENGTHS, MODEL, PARAMS, PROBLEMS, TOKENS, same_draws, sampling

LONGEST = 40  # responses of the model here: most of 1 to 24 tokens, some never end


@pytest.fixture(scope="module")
def draw(mesh):
    def generate(order=slice(None), mesh=mesh, **how):
        arrays = TOKENS[order], LENGTHS[order]
        settings = sampling(max_response_length=LONGEST)
        return sampler.generate(
            MODEL, PARAMS, *arrays, KEY, settings, mesh=mesh, problem_ids=PROBLEMS[order], **how
        )

    return generate


@pytest.fixture(scope="module")
def whole(draw):
    return draw(segment_length=0)


def test_segments_change_no_draw(draw, whole):
    """One batch: the rows that are left move into smaller ones. Then nothing is compiled any more."""
    same_draws(whole, draw(segment_length=10))
    with compilations() as compiled:
        again = draw(segment_length=10)
    assert not compiled
    np.testing.assert_array_equal(again.tokens, whole.tokens)
    np.testing.assert_array_equal(again.rollout_id, whole.rollout_id)


@pytest.mark.slow
@pytest.mark.parametrize(
    "how",
    [
        {"segment_length": 7, "batch_size": 2},  # the rest of three batches goes on together
        {"segment_length": 16, "batch_size": 4},  # the second batch is filled up
        {"segment_length": 39},
        {"segment_length": 3, "batch_size": 1},
        {"segment_length": 10, "batch_size": 2, "buckets": (4,)},
    ],
    ids=str,
)
def test_segments_batches_and_buckets_change_no_draw(how, draw, whole):
    same_draws(whole, draw(**how))


def test_the_order_of_the_prompts_changes_no_draw(draw, whole):
    order = np.array([3, 0, 5, 1, 4, 2])
    rows = (order[:, None] * 4 + np.arange(4)).reshape(-1)
    same_draws(jax.tree.map(lambda x: x[rows], whole), draw(order, segment_length=10))


def test_what_is_left_moves_to_smaller_batches(draw, whole, monkeypatch):
    shapes = []
    advance = segments._advance

    def watched(model, params, state, *arguments):
        shapes.append((state.done.size, state.cache.response_key.shape[3]))
        return advance(model, params, state, *arguments)

    monkeypatch.setattr(segments, "_advance", watched)
    draw(segment_length=10)
    # As many rows as there are in each segment, rounded up to a half, a quarter, ... of all 24; a cache just as long.
    alive = [int(np.sum(whole.response_length > step)) + int(np.sum(_unfinished(whole, step))) for step in (10, 20, 30)]
    fitting = [next(size for size in (1, 2, 3, 6, 12, 24) if size >= number) for number in alive]
    assert shapes == list(zip(fitting, (20, 30, 40), strict=True))
    assert fitting[-1] < 24


def _unfinished(rollout, step):
    """Rows that are as long as that and have not ended."""
    return (rollout.response_length == step) & rollout.truncated


def test_sizes():
    assert segments.column_sizes(10, 100) == [10, 20, 30, 40, 60, 80, 100]
    assert segments.column_sizes(128, 512) == [128, 256, 384, 512]
    assert segments.column_sizes(128, 200) == [128, 200]
    assert segments.row_sizes(256, 1) == [8, 16, 32, 64, 128, 256]
    assert segments.row_sizes(24, 8) == [8, 16, 24]
    assert segments.row_sizes(6, 8) == [6]

