"""The replay buffer: what it keeps and gives, on rollouts made by hand."""

import re

import jax
import numpy as np
import pytest

from r2vpo_jax.config import ReplayConfig
from r2vpo_jax.training.replay import ReplayBuffer, ReplayError
from tests.helpers.rollouts import GROUP, GROUPS, KEY, RESPONSE, ROWS, assert_equal, buffer, groups_of, iterations, make

# ---- what is kept ----


@pytest.mark.parametrize(
    ("config", "kept"),
    [
        ({"capacity": 2}, [3, 4]),
        ({"capacity": 4}, [1, 2, 3, 4]),
        ({"batches_per_iteration": 2}, [4]),
        ({"lag": 2}, [2, 3, 4]),  # 2 is drawn now, 3 and 4 wait
        ({"lag": 2, "capacity": 1}, [2, 3, 4]),
        ({"lag": 2, "capacity": 2}, [1, 2, 3, 4]),
        ({"capacity": 9, "capacity_bytes": 1}, [4]),
        ({"capacity": 9, "lag": 2, "capacity_bytes": 1}, [2, 3, 4]),  # what the lag holds back stays
    ],
)
def test_first_in_first_out(config, kept, tmp_path):
    replay = buffer(tmp_path, *map(make, range(5)), **config)
    assert iterations(replay) == kept
    assert len(replay) == len(kept)
    assert replay.evicted == 5 - len(kept)


def test_eviction_by_bytes(tmp_path):
    size = buffer(tmp_path / "one", make(0), capacity=9).statistics(None, 0)["replay/bytes"]
    assert size == (tmp_path / "one" / "rollout_00000000.npz").stat().st_size
    batches = [make(i) for i in range(5)]
    for limit, kept in ((3 * size, [2, 3, 4]), (3 * size - 1, [3, 4]), (5 * size, [0, 1, 2, 3, 4])):
        replay = buffer(tmp_path / str(limit), *batches, capacity=9, capacity_bytes=limit)
        assert iterations(replay) == kept
        assert replay.statistics(None, 0)["replay/bytes"] == size * len(kept)


@pytest.mark.parametrize("lag", [0, 1, 3])
def test_the_lag_delays_by_so_many_iterations(lag, tmp_path):
    replay = ReplayBuffer(tmp_path, ReplayConfig(lag=lag, batches_per_iteration=2), GROUP)
    for iteration in range(6):
        replay.add(iteration, make(iteration), version=iteration)
        drawn = [replay.draw(iteration, GROUPS, version=iteration, key=KEY, number=n) for n in range(2)]
        if iteration < lag:
            assert drawn == [None, None]
        else:
            for batch in drawn:
                assert_equal(batch, make(iteration - lag))


# ---- what is drawn ----

DRAWS = ("uniform", "mixed", "priority")


@pytest.mark.parametrize("draw", DRAWS)
def test_groups_are_whole_and_drawn_once(draw, tmp_path):
    """Of iterations 1 to 3, which are kept; not of 4, which the lag holds back."""
    batches = [make(i, magnitude=1 + np.arange(GROUPS)) for i in range(5)]
    replay = buffer(tmp_path, *batches, capacity=3, lag=1, draw=draw)
    assert iterations(replay) == [1, 2, 3, 4]
    everything = jax.tree.map(lambda *x: np.concatenate(x), *batches)
    seen = set()
    for number in range(60):
        drawn = replay.draw(4, GROUPS, version=4, key=KEY, number=number)
        groups = groups_of(drawn)
        assert len(set(groups)) == GROUPS
        seen.update(groups)
        where = (np.array(groups)[:, None] * GROUP + np.arange(GROUP)).reshape(-1)
        assert_equal(drawn, jax.tree.map(lambda x, where=where: x[where], everything))
    assert seen == set(range(4, 16))


@pytest.mark.parametrize("draw", DRAWS)
def test_draws_are_a_function_of_key_iteration_number_and_contents(draw, tmp_path):
    def drawn(name, seed=0, iteration=3, number=0, **changes):
        replay = buffer(tmp_path / name, *(make(i, **changes) for i in range(4)), capacity=4, draw=draw)
        return groups_of(replay.draw(iteration, GROUPS, version=9, key=jax.random.key(seed), number=number))

    assert drawn("a") == drawn("b")
    for i, changes in enumerate(({"seed": 1}, {"iteration": 4}, {"number": 1})):
        # Eight tries: one draw may be like another by chance, eight may not.
        others = [drawn(f"{i}_{j}", **{k: v + j for k, v in changes.items()}) for j in range(8)]
        assert any(groups != drawn(f"{i}") for groups in others), changes
        assert len({tuple(groups) for groups in others}) > 1, changes


def test_uniform_is_uniform(tmp_path):
    """2 of 12 groups in 600 draws: 100 times each, with deviation sqrt(600 * 1/6 * 5/6) = 9.1."""
    replay = buffer(tmp_path, *map(make, range(3)), capacity=3, draw="uniform")
    drawn = [groups_of(replay.draw(2, 2, version=2, key=KEY, number=n)) for n in range(600)]
    counts = np.bincount(np.ravel(drawn), minlength=12)
    assert counts.sum() == 1200
    assert 60 < counts.min() <= counts.max() < 140


@pytest.mark.parametrize(("fraction", "old"), [(0.0, 0), (0.25, 1), (0.5, 2), (0.75, 3), (1.0, 4)])
def test_mixed_counts_fresh_and_stale(fraction, old, tmp_path):
    replay = buffer(tmp_path, *map(make, range(3)), capacity=3, draw="mixed", stale_fraction=fraction)
    for number in range(10):
        groups = np.array(groups_of(replay.draw(2, GROUPS, version=2, key=KEY, number=number)))
        assert (groups < 8).sum() == old
        assert (groups >= 8).sum() == GROUPS - old


def test_mixed_draws_of_an_iteration_share_the_fresh_batch_out(tmp_path):
    for seed in range(10):
        replay = buffer(tmp_path / str(seed), *map(make, range(2)), capacity=2, draw="mixed")
        drawn = [groups_of(replay.draw(1, GROUPS, version=1, key=jax.random.key(seed), number=n)) for n in range(2)]
        fresh = [group for groups in drawn for group in groups if group >= 4]
        assert sorted(fresh) == [4, 5, 6, 7]


def test_mixed_without_older_batches_is_fresh(tmp_path):
    replay = buffer(tmp_path, make(0), capacity=2, draw="mixed", stale_fraction=1.0)
    assert groups_of(replay.draw(0, GROUPS, version=0, key=KEY)) == [0, 1, 2, 3]


def test_priority_is_proportional_to_the_advantage(tmp_path):
    """One group of |A| 1, 3, 0, 4 in 800 draws: 100, 300, 0, 400 times, with deviations of up to sqrt(800 / 4) = 14."""
    replay = buffer(tmp_path, make(0, magnitude=[1, 3, 0, 4]), capacity=2, draw="priority")
    drawn = [groups_of(replay.draw(0, 1, version=0, key=KEY, number=n))[0] for n in range(800)]
    counts = np.bincount(drawn, minlength=4)
    assert counts[2] == 0
    np.testing.assert_allclose(counts, [100, 300, 0, 400], atol=60)


def test_priority_counts_what_takes_part(tmp_path):
    """Neither rows that are left out nor what lies behind the end; the mean is over tokens, not over rows."""
    length = np.array([1, 3, 2, 2, 5, 5, 1, 1], np.int32)
    advantage = np.full((ROWS, RESPONSE), np.nan, np.float32)
    for row, value in enumerate([4, 0, 0, 0, 0, 0, 0, 0]):
        advantage[row, : length[row]] = value  # group 0: 4 over 1 + 3 tokens, so 1
    advantage[2:4] = 1e6  # group 1: left out
    advantage[4, 4] = 30  # group 2: 30 over 10 tokens, so 3
    keep = np.array([1, 1, 0, 0, 1, 1, 1, 1], bool)
    batch = make(0, advantage=advantage, response_length=length, keep=keep)
    replay = buffer(tmp_path, batch, capacity=2, draw="priority")
    counts = np.bincount(
        [groups_of(replay.draw(0, 1, version=0, key=KEY, number=n))[0] for n in range(400)], minlength=4
    )
    assert counts[1] == counts[3] == 0
    # 1 to 3: 100 and 300, with deviation sqrt(400 * 3/16) = 8.7.
    np.testing.assert_allclose(counts, [100, 0, 300, 0], atol=40)


@pytest.mark.parametrize("scale", [1.0, 1e-9])
def test_priority_takes_groups_without_advantage_last(scale, tmp_path):
    """Of 8 groups 3 have a gradient, however small it is: of 4 that are drawn they are 3, of 2 both."""
    magnitudes = scale * np.array([[0, 1, 0, 0], [1e-3, 0, 2, 0]])
    replay = buffer(tmp_path, *(make(i, magnitude=m) for i, m in enumerate(magnitudes)), capacity=2, draw="priority")
    others = set()
    for number in range(200):
        groups = set(groups_of(replay.draw(1, 4, version=1, key=KEY, number=number)))
        assert {1, 4, 6} <= groups
        others |= groups - {1, 4, 6}
        assert set(groups_of(replay.draw(1, 2, version=1, key=jax.random.key(1), number=number))) <= {1, 4, 6}
    assert others == {0, 2, 3, 5, 7}


def test_priority_without_any_gradient_draws_all_the_same(tmp_path):
    replay = buffer(tmp_path, *(make(i, magnitude=np.zeros(4)) for i in range(2)), capacity=2, draw="priority")
    seen = {g for n in range(50) for g in groups_of(replay.draw(1, GROUPS, version=1, key=KEY, number=n))}
    assert seen == set(range(8))


# ---- limits on age and use ----


def test_max_age_is_in_updates_and_spares_the_fresh_batch(tmp_path):
    """Versions 0, 10, 20, 30. At 40 the last is 10 updates old, fresh all the same with a limit of 5."""
    batches = [make(i, version=10 * i) for i in range(4)]
    for limit, oldest in ((5, 3), (19, 3), (20, 2), (29, 2), (40, 0)):
        replay = buffer(tmp_path / str(limit), *batches, capacity=4, draw="uniform", max_age=limit)
        seen = {g // 4 for n in range(60) for g in groups_of(replay.draw(3, GROUPS, version=40, key=KEY, number=n))}
        assert seen == set(range(oldest, 4)), limit


@pytest.mark.parametrize("draw", DRAWS)
def test_max_uses(draw, tmp_path):
    """8 groups, each twice: 4 draws of 4 at most. What is refused is counted in no use."""
    replay = buffer(tmp_path, *map(make, range(2)), capacity=2, draw=draw, max_uses=2)
    counts, refused = np.zeros(8, int), []
    for number in range(8):
        try:
            counts += np.bincount(groups_of(replay.draw(1, GROUPS, version=1, key=KEY, number=number)), minlength=8)
        except ReplayError as error:
            refused.append(str(error))
    assert len(refused) >= 4
    for message in refused:
        assert re.search(r"only \d of 4 groups .*replay\.max_age=None .*replay\.max_uses=2", message)
    assert counts.max() == 2
    uses = [batch["uses"] for batch in replay.listing()["batches"]]
    assert np.concatenate(uses).tolist() == counts.tolist()
    statistics = replay.statistics(None, 1)
    assert statistics["replay/uses_max"] == 2
    assert statistics["replay/uses_mean"] == counts.mean()


def test_mixed_fills_up_with_older_groups_when_the_fresh_ones_are_used_up(tmp_path):
    """Two draws share out the 4 fresh groups; a third finds 8 older ones of which 4 were used, and 4 were not."""
    replay = buffer(tmp_path, *map(make, range(3)), capacity=3, draw="mixed", max_uses=1)
    drawn = [groups_of(replay.draw(2, GROUPS, version=2, key=KEY, number=n)) for n in range(3)]
    assert sorted(np.ravel(drawn)) == list(range(12))


def test_statistics(tmp_path):
    replay = buffer(tmp_path, *(make(i, version=3 * i) for i in range(4)), capacity=2, draw="uniform")
    nothing = replay.statistics(None, 9)
    assert (nothing["replay/age_mean"], nothing["replay/age_max"], nothing["replay/uses_max"]) == (0, 0, 0)
    assert (nothing["replay/batches"], nothing["replay/evicted"]) == (2, 2)
    drawn = replay.draw(3, 8, version=11, key=KEY)  # all of both batches: versions 6 and 9 at 11
    statistics = replay.statistics(drawn, 11)
    assert (statistics["replay/age_mean"], statistics["replay/age_max"]) == (3.5, 5)
    assert (statistics["replay/uses_mean"], statistics["replay/uses_max"]) == (1.0, 1)
    assert statistics["replay/bytes"] == sum(replay.path(i).stat().st_size for i in (2, 3))
    assert buffer(tmp_path / "none", capacity=2).statistics(None, 0)["replay/batches"] == 0
