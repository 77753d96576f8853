"""The replay buffer: what it keeps and gives on rollouts made by hand, its files, and training from it."""

import hashlib
import json
import os
import re

import jax
import numpy as np
import pytest

from r2vpo_jax import config as config_lib
from r2vpo_jax.config import ReplayConfig
from r2vpo_jax.rollout import Rollout
from r2vpo_jax.run import files
from r2vpo_jax.training.learner import Learner
from r2vpo_jax.training.replay import ReplayBuffer, ReplayError
from r2vpo_jax.training.trainer import train
from tests.helpers.paths import ROOT
from tests.training.test_trainer import rows

GROUPS, GROUP, PROMPT, RESPONSE = 4, 2, 3, 5
ROWS = GROUPS * GROUP
OPTIONAL = ("reference_logp", "value", "value_target", "proximal_logp", "weights")


def make(iteration, *, version=None, magnitude=None, **fields):
    """The batch of an iteration: 4 groups of 2; rollout ids go on from one to the next, version is the iteration's.

    Args:
      magnitude: |A| of each group; the two rows of a group have +|A| and -|A|.
    """
    generator = np.random.default_rng(iteration)
    magnitude = np.ones(GROUPS) if magnitude is None else np.asarray(magnitude)
    row = np.arange(ROWS, dtype=np.int32)
    values = {
        "tokens": generator.integers(0, 17, (ROWS, PROMPT + RESPONSE)).astype(np.int32),
        "prompt_length": np.full(ROWS, PROMPT, np.int32),
        "response_length": generator.integers(1, RESPONSE + 1, ROWS).astype(np.int32),
        "truncated": generator.random(ROWS) < 0.5,
        "behavior_logp": generator.standard_normal((ROWS, RESPONSE)).astype(np.float32),
        "temperature": np.ones(ROWS, np.float32),
        "reward": generator.random(ROWS).astype(np.float32),
        "outcome": np.zeros(ROWS, np.int32),
        "advantage": (np.repeat(magnitude, GROUP) * (-1) ** row).astype(np.float32),
        "keep": np.ones(ROWS, bool),
        "group_id": np.repeat(np.arange(GROUPS, dtype=np.int32) + 100 * iteration, GROUP),
        "rollout_id": row + ROWS * iteration,
        "version": np.full(ROWS, iteration if version is None else version, np.int32),
    }
    return Rollout(**values | fields)


def buffer(directory, *batches, **config):
    """A buffer to which these batches were added, each in the iteration that its ids tell."""
    result = ReplayBuffer(directory, ReplayConfig(**config), GROUP)
    for batch in batches:
        iteration = int(batch.rollout_id[0]) // ROWS
        result.add(iteration, batch, version=int(batch.version[0]))
    return result


def iterations(replay):
    return [batch["iteration"] for batch in replay.listing()["batches"]]


def groups_of(batch):
    """The drawn groups, counted through all iterations: group g of iteration i is 4 i + g. They must be whole."""
    ids = batch.rollout_id.reshape(-1, GROUP)
    np.testing.assert_array_equal(ids, ids[:, :1] + np.arange(GROUP))
    assert not (ids[:, 0] % GROUP).any()
    return (ids[:, 0] // GROUP).tolist()


def assert_equal(actual, expected):
    """Every field, and its type."""
    for name, value in vars(expected).items():
        found = getattr(actual, name)
        assert (found is None) == (value is None), name
        if value is not None:
            assert found.dtype == value.dtype, name
            np.testing.assert_array_equal(found, value, err_msg=name)


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
        drawn = [replay.draw(iteration, GROUPS, version=iteration, seed=0, number=n) for n in range(2)]
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
        drawn = replay.draw(4, GROUPS, version=4, seed=0, number=number)
        groups = groups_of(drawn)
        assert len(set(groups)) == GROUPS
        seen.update(groups)
        where = (np.array(groups)[:, None] * GROUP + np.arange(GROUP)).reshape(-1)
        assert_equal(drawn, jax.tree.map(lambda x, where=where: x[where], everything))
    assert seen == set(range(4, 16))


@pytest.mark.parametrize("draw", DRAWS)
def test_draws_are_a_function_of_seed_iteration_number_and_contents(draw, tmp_path):
    def drawn(name, seed=0, iteration=3, number=0, **changes):
        replay = buffer(tmp_path / name, *(make(i, **changes) for i in range(4)), capacity=4, draw=draw)
        return groups_of(replay.draw(iteration, GROUPS, version=9, seed=seed, number=number))

    assert drawn("a") == drawn("b")
    for i, changes in enumerate(({"seed": 1}, {"iteration": 4}, {"number": 1})):
        # Eight tries: one draw may be like another by chance, eight may not.
        others = [drawn(f"{i}_{j}", **{k: v + j for k, v in changes.items()}) for j in range(8)]
        assert any(groups != drawn(f"{i}") for groups in others), changes
        assert len({tuple(groups) for groups in others}) > 1, changes


def test_uniform_is_uniform(tmp_path):
    """2 of 12 groups in 600 draws: 100 times each, with deviation sqrt(600 * 1/6 * 5/6) = 9.1."""
    replay = buffer(tmp_path, *map(make, range(3)), capacity=3, draw="uniform")
    drawn = [groups_of(replay.draw(2, 2, version=2, seed=0, number=n)) for n in range(600)]
    counts = np.bincount(np.ravel(drawn), minlength=12)
    assert counts.sum() == 1200
    assert 60 < counts.min() <= counts.max() < 140


@pytest.mark.parametrize(("fraction", "old"), [(0.0, 0), (0.25, 1), (0.5, 2), (0.75, 3), (1.0, 4)])
def test_mixed_counts_fresh_and_stale(fraction, old, tmp_path):
    replay = buffer(tmp_path, *map(make, range(3)), capacity=3, draw="mixed", stale_fraction=fraction)
    for number in range(10):
        groups = np.array(groups_of(replay.draw(2, GROUPS, version=2, seed=0, number=number)))
        assert (groups < 8).sum() == old
        assert (groups >= 8).sum() == GROUPS - old


def test_mixed_draws_of_an_iteration_share_the_fresh_batch_out(tmp_path):
    for seed in range(10):
        replay = buffer(tmp_path / str(seed), *map(make, range(2)), capacity=2, draw="mixed")
        drawn = [groups_of(replay.draw(1, GROUPS, version=1, seed=seed, number=n)) for n in range(2)]
        fresh = [group for groups in drawn for group in groups if group >= 4]
        assert sorted(fresh) == [4, 5, 6, 7]


def test_mixed_without_older_batches_is_fresh(tmp_path):
    replay = buffer(tmp_path, make(0), capacity=2, draw="mixed", stale_fraction=1.0)
    assert groups_of(replay.draw(0, GROUPS, version=0, seed=0)) == [0, 1, 2, 3]


def test_priority_is_proportional_to_the_advantage(tmp_path):
    """One group of |A| 1, 3, 0, 4 in 800 draws: 100, 300, 0, 400 times, with deviations of up to sqrt(800 / 4) = 14."""
    replay = buffer(tmp_path, make(0, magnitude=[1, 3, 0, 4]), capacity=2, draw="priority")
    drawn = [groups_of(replay.draw(0, 1, version=0, seed=0, number=n))[0] for n in range(800)]
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
        [groups_of(replay.draw(0, 1, version=0, seed=0, number=n))[0] for n in range(400)], minlength=4
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
        groups = set(groups_of(replay.draw(1, 4, version=1, seed=0, number=number)))
        assert {1, 4, 6} <= groups
        others |= groups - {1, 4, 6}
        assert set(groups_of(replay.draw(1, 2, version=1, seed=1, number=number))) <= {1, 4, 6}
    assert others == {0, 2, 3, 5, 7}


def test_priority_without_any_gradient_draws_all_the_same(tmp_path):
    replay = buffer(tmp_path, *(make(i, magnitude=np.zeros(4)) for i in range(2)), capacity=2, draw="priority")
    seen = {g for n in range(50) for g in groups_of(replay.draw(1, GROUPS, version=1, seed=0, number=n))}
    assert seen == set(range(8))


# ---- limits on age and use ----


def test_max_age_is_in_updates_and_spares_the_fresh_batch(tmp_path):
    """Versions 0, 10, 20, 30. At 40 the last is 10 updates old, fresh all the same with a limit of 5."""
    batches = [make(i, version=10 * i) for i in range(4)]
    for limit, oldest in ((5, 3), (19, 3), (20, 2), (29, 2), (40, 0)):
        replay = buffer(tmp_path / str(limit), *batches, capacity=4, draw="uniform", max_age=limit)
        seen = {g // 4 for n in range(60) for g in groups_of(replay.draw(3, GROUPS, version=40, seed=0, number=n))}
        assert seen == set(range(oldest, 4)), limit


@pytest.mark.parametrize("draw", DRAWS)
def test_max_uses(draw, tmp_path):
    """8 groups, each twice: 4 draws of 4 at most. What is refused is counted in no use."""
    replay = buffer(tmp_path, *map(make, range(2)), capacity=2, draw=draw, max_uses=2)
    counts, refused = np.zeros(8, int), []
    for number in range(8):
        try:
            counts += np.bincount(groups_of(replay.draw(1, GROUPS, version=1, seed=0, number=number)), minlength=8)
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
    drawn = [groups_of(replay.draw(2, GROUPS, version=2, seed=0, number=n)) for n in range(3)]
    assert sorted(np.ravel(drawn)) == list(range(12))


def test_statistics(tmp_path):
    replay = buffer(tmp_path, *(make(i, version=3 * i) for i in range(4)), capacity=2, draw="uniform")
    nothing = replay.statistics(None, 9)
    assert (nothing["replay/age_mean"], nothing["replay/age_max"], nothing["replay/uses_max"]) == (0, 0, 0)
    assert (nothing["replay/batches"], nothing["replay/evicted"]) == (2, 2)
    drawn = replay.draw(3, 8, version=11, seed=0)  # all of both batches: versions 6 and 9 at 11
    statistics = replay.statistics(drawn, 11)
    assert (statistics["replay/age_mean"], statistics["replay/age_max"]) == (3.5, 5)
    assert (statistics["replay/uses_mean"], statistics["replay/uses_max"]) == (1.0, 1)
    assert statistics["replay/bytes"] == sum(replay.path(i).stat().st_size for i in (2, 3))
    assert buffer(tmp_path / "none", capacity=2).statistics(None, 0)["replay/batches"] == 0


# ---- refusals ----


REFUSED = {
    "no rows": (1, lambda b: jax.tree.map(lambda x: x[:0], b), "not made of whole groups"),
    "half a group": (
        1,
        lambda b: jax.tree.map(lambda x: x[:-1], b),
        "rollout of 7 rows is not made of whole groups of 2",
    ),
    "torn groups": (1, lambda b: jax.tree.map(lambda x: np.roll(x, 1, axis=0), b), "not made of whole groups"),
    "an id twice": (1, lambda b: b.replace(rollout_id=np.where(np.arange(8) == 3, 8, b.rollout_id)), "not unique"),
    "two versions": (1, lambda b: b.replace(version=np.arange(8) // 4), "more than one behavior version"),
    "from the future": (1, lambda b: b.replace(version=b.version + 5), "version 6 is from the future: now is 5"),
    "the same iteration": (0, lambda b: b, "iteration 0 or its rollouts are not newer"),
    "the same ids": (1, lambda b: b.replace(rollout_id=b.rollout_id - 1), "iteration 1 or its rollouts are not newer"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_belong_is_refused(case, tmp_path):
    replay = buffer(tmp_path, make(0), capacity=3)
    iteration, change, message = REFUSED[case]
    before = replay.listing(), sorted(tmp_path.iterdir())
    with pytest.raises(ReplayError, match=message):
        replay.add(iteration, change(make(1)), version=5)
    assert (replay.listing(), sorted(tmp_path.iterdir())) == before
    replay.add(1, make(1), version=1)  # the same unchanged is taken


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        *(({"draw": d, "capacity": c}, "set replay.capacity to at least 2") for d in DRAWS for c in (0, 1)),
        ({"draw": "oldest"}, "replay.draw='oldest' is unknown; one of newest, uniform, mixed, priority"),
        ({"lag": -1}, "replay.lag must be at least 0, got -1"),
        ({"capacity": -1}, "replay.capacity must be at least 0"),
        ({"capacity_bytes": 0}, "replay.capacity_bytes must be at least 1"),
        ({"batches_per_iteration": 0}, "replay.batches_per_iteration must be at least 1"),
        ({"max_age": 0}, "replay.max_age must be at least 1"),
        ({"max_uses": 0}, "replay.max_uses must be at least 1"),
        ({"stale_fraction": 1.5}, r"replay.stale_fraction must be in \[0, 1\], got 1.5"),
        ({"stale_fraction": -0.5}, "replay.stale_fraction"),
    ],
)
def test_replay_config_refuses(fields, message):
    with pytest.raises(ValueError, match=message):
        ReplayConfig(**fields)


def test_replay_and_the_rest_of_the_config():
    def make(trainer=(), **replay):
        return config_lib.from_dict({"replay": replay, "trainer": dict(trainer)})

    single = {"num_minibatches": 1, "num_epochs": 1}
    with pytest.raises(ValueError, match=r"set replay\.lag"):
        make(single)
    assert make(single, lag=1).replay.enabled
    assert not make().replay.enabled
    assert make(capacity=1).replay.enabled
    assert make(batches_per_iteration=2).replay.enabled
    # 10 iterations of which 3 fill the queue, 2 batches each, 4 updates a batch.
    trainer = {"num_iterations": 10, "num_minibatches": 2, "num_epochs": 2}
    assert make(trainer, lag=3, batches_per_iteration=2).num_updates == 7 * 2 * 4
    assert make(trainer).num_updates == 40
    with pytest.raises(ValueError, match=r"replay\.lag"):
        make(trainer, lag=10)  # nothing would ever be trained


# ---- files ----


def test_a_file_is_written_once_and_is_the_same_for_the_same_rollout(tmp_path):
    first, second = (buffer(tmp_path / name, make(0), make(1), capacity=2) for name in "ab")
    paths = [first.path(i) for i in (0, 1)]
    assert sorted((tmp_path / "a").iterdir()) == paths
    assert [p.read_bytes() for p in paths] == [second.path(i).read_bytes() for i in (0, 1)]
    assert paths[0].read_bytes() != paths[1].read_bytes()
    for path, item in zip(paths, first.listing()["batches"], strict=True):
        assert hashlib.sha256(path.read_bytes()).hexdigest() == item["sha256"]
    before = paths[0].stat()
    first.draw(1, GROUPS, version=1, seed=0)
    first.add(2, make(2), version=2)
    first.listing()
    after = paths[0].stat()
    assert (after.st_mtime_ns, after.st_ino) == (before.st_mtime_ns, before.st_ino)


def test_a_file_holds_the_fields_without_pickle(tmp_path):
    batch = make(0, reference_logp=np.ones((ROWS, RESPONSE), np.float32))
    replay = buffer(tmp_path, batch, capacity=2)
    with np.load(replay.path(0), allow_pickle=False) as arrays:
        assert set(arrays.files) == {name for name, value in vars(batch).items() if value is not None}
        np.testing.assert_array_equal(arrays["tokens"], batch.tokens)


def test_readers_write_nothing(tmp_path):
    writer = buffer(tmp_path / "a", make(0), capacity=2)
    reader = ReplayBuffer(tmp_path / "b", ReplayConfig(capacity=2), GROUP, write=False)
    reader.add(0, make(0), version=0)
    assert not (tmp_path / "b").exists()
    assert reader.listing() == writer.listing()
    reader = ReplayBuffer(tmp_path / "a", ReplayConfig(capacity=2), GROUP, write=False)
    reader.collect_garbage([])
    assert writer.path(0).exists()


def by_token(offset):
    return (offset + np.arange(ROWS * RESPONSE, dtype=np.float32).reshape(ROWS, RESPONSE)) / 7


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"advantage": by_token(0), "value": by_token(1), "value_target": by_token(2)},
        {name: by_token(i) for i, name in enumerate(OPTIONAL)},
        {"reward": np.full(ROWS, np.nan, np.float32), "reference_logp": np.full((ROWS, RESPONSE), -np.inf, np.float32)},
    ],
    ids=["plain", "critic", "all", "not finite"],
)
def test_a_restored_buffer_is_the_same(fields, tmp_path):
    config = {"capacity": 3, "draw": "mixed"}
    replay = buffer(tmp_path, *(make(i, **fields) for i in range(5)), **config)
    replay.draw(4, GROUPS, version=4, seed=0)
    listing = json.loads(json.dumps(replay.listing()))
    restored = buffer(tmp_path, **config)
    restored.restore(listing)
    assert restored.listing() == replay.listing()
    assert restored.evicted == 2
    assert restored.statistics(None, 4) == replay.statistics(None, 4)
    for iteration in (5, 6):
        a, b = (r.draw(iteration, 8, version=9, seed=0) for r in (replay, restored))
        assert_equal(b, a)
        for r in (replay, restored):
            r.add(iteration, make(iteration, **fields), version=9)
        assert restored.listing() == replay.listing()


def truncate(path):
    os.truncate(path, path.stat().st_size - 1)


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (os.unlink, r"cannot read replay file .*rollout_00000001\.npz: No such file"),
        (truncate, r"replay file .*rollout_00000001\.npz is damaged"),
        (flip_a_bit, r"replay file .*rollout_00000001\.npz is damaged"),
    ],
)
def test_a_damaged_replay_file_is_refused_by_name(damage, message, tmp_path):
    replay = buffer(tmp_path, *map(make, range(3)), capacity=3)
    damage(replay.path(1))
    other = buffer(tmp_path / "other", make(7), capacity=3)
    other._directory = tmp_path
    before = other.listing()
    with pytest.raises(ReplayError, match=message):
        other.restore(replay.listing())
    assert other.listing() == before, "refused as a whole"
    other.restore({"evicted": 0, "batches": replay.listing()["batches"][2:]})  # what does not need it can be had
    assert iterations(other) == [2]


def test_garbage_is_what_neither_the_buffer_nor_a_checkpoint_needs(tmp_path):
    replay, listings = ReplayBuffer(tmp_path, ReplayConfig(capacity=2), GROUP), []
    for iteration in range(6):
        replay.add(iteration, make(iteration), version=iteration)
        listings.append(replay.listing())

    def left():
        return sorted(int(path.stem.removeprefix("rollout_")) for path in tmp_path.glob("*.npz"))

    assert left() == [0, 1, 2, 3, 4, 5]
    replay.collect_garbage([listings[1], listings[3]])  # 0 and 1, 2 and 3; the buffer itself has 4 and 5
    assert left() == [0, 1, 2, 3, 4, 5]
    replay.collect_garbage([listings[2]])
    assert left() == [1, 2, 4, 5]
    replay.collect_garbage([])
    assert left() == [4, 5]
    replay.restore(listings[5])
    buffer(tmp_path / "never", capacity=2).collect_garbage([])


# ---- training from it ----

UPDATES, BATCH = 4, 16  # of the tiny run: updates a batch, rollouts a batch
QUICK = {
    "eval_every": 9,
    "checkpoint_every": 9,
    # The same shapes as training batches: one sampler is compiled for all three splits.
    "eval_problems": 4,
    "eval_samples": 4,
    "eval_batch_size": 64,
    "test_problems": 4,
    "test_samples": 4,
}


class Run:
    """A tiny run: its rows by kind, and every batch that the learner was given.

    `noise` is added to the log-probabilities of the sampler that the learner is given.
    """

    def __init__(self, workdir, config, noise=0.0):
        self.batches, learn = [], Learner.train_on_rollout

        def spy(learner, state, rollout, key):
            now = int(state.version)
            self.batches.append((now, jax.tree.map(np.asarray, rollout)))
            return learn(learner, state, rollout.replace(behavior_logp=rollout.behavior_logp + noise), key)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Learner, "train_on_rollout", spy)
            self.summary = train(config, workdir)
        self.workdir, self.config = workdir, config
        self.by_iteration = [row for row in rows(workdir) if row["kind"] != "evaluation"]
        self.trained = [row for row in self.by_iteration if row["kind"] == "train"]

    def ids(self):
        return [batch.rollout_id for _, batch in self.batches]


@pytest.fixture(scope="module")
def run(tiny_config, tmp_path_factory):
    """Makes runs, each once: `run(iterations, objective, **replay)`."""
    made = {}

    def get(num_iterations, objective=None, noise=0.0, **replay):
        key = repr((num_iterations, objective, noise, replay))
        if key not in made:
            trainer = QUICK | {"num_iterations": num_iterations}
            config = tiny_config(trainer=trainer, replay=replay, objective=objective or {})
            made[key] = Run(tmp_path_factory.mktemp("run") / "run", config, noise)
        return made[key]

    return get


def test_train_with_lag_fills_the_queue_first(run):
    """Lag 2 in 6 iterations: 1 and 2 train nothing, 3 to 6 train on what 1 to 4 sampled."""
    lagged = run(6, lag=2)
    assert [row["kind"] for row in lagged.by_iteration] == ["fill"] * 2 + ["train"] * 4
    assert [row["iteration"] for row in lagged.by_iteration] == [1, 2, 3, 4, 5, 6]
    assert [row["rollouts"] for row in lagged.by_iteration] == [BATCH * i for i in range(1, 7)]
    assert [row["version"] for row in lagged.by_iteration] == [0, 0, 4, 8, 12, 16]
    np.testing.assert_array_equal(lagged.ids(), np.arange(4 * BATCH).reshape(4, BATCH))
    assert lagged.summary["num_updates"] == 4 * UPDATES
    assert lagged.summary["num_rollouts"] == 6 * BATCH


def test_train_with_lag_counts_ages_in_updates(run):
    """1 to 3 were sampled at version 0, 4 at 4; they are trained on at 0, 4, 8, 12: ages 0, 4, 8 = 2 * 4, and 8 again."""
    lagged = run(6, lag=2)
    assert [row["replay/age_mean"] for row in lagged.trained] == [0, 4, 8, 8]
    assert [row["replay/age_max"] for row in lagged.trained] == [0, 4, 8, 8]
    assert [(now, set((now - batch.version).tolist())) for now, batch in lagged.batches] == [
        (0, {0}), (4, {4}), (8, {8}), (12, {8})
    ]  # fmt: skip
    assert [row["replay/batches"] for row in lagged.by_iteration] == [1, 2, 3, 3, 3, 3]
    assert [row["replay/evicted"] for row in lagged.by_iteration] == [0, 0, 0, 1, 2, 3]
    # Two epochs over each batch; all that was sampled so far.
    tokens = np.cumsum([2 * batch.response_length.sum() for _, batch in lagged.batches])
    sampled = np.array([row["rollout_tokens"] for row in lagged.trained])
    np.testing.assert_allclose([row["replay/ratio"] for row in lagged.trained], tokens / sampled)
    assert [row["replay/ratio"] for row in lagged.by_iteration[:2]] == [0, 0]


def test_train_metrics_of_replay_are_documented(run):
    words = set(re.findall(r"`([^`]+)`", (ROOT / "docs" / "metrics.md").read_text()))
    lagged = run(6, lag=2)
    fill, trained = set(lagged.by_iteration[0]), set(lagged.trained[0])
    assert fill < trained
    names = {name for name in trained if name.startswith("replay/")}
    assert names <= fill
    assert len(names) == 8
    assert not names - words
    assert len({tuple(row) for row in lagged.trained}) == 1


def test_train_dual_signal_is_what_the_updates_added(run):
    """On stale data V of the last minibatch less V of the first; on fresh data V of the last."""
    lagged = run(6, lag=2)
    budget = lagged.config.objective.dual.budget
    coef = lagged.config.objective.dual.coef
    for row in lagged.trained:
        last, first = np.float32(row["ratio/second_moment"]), np.float32(row["ratio/second_moment_first"])
        assert row["dual/signal"] == last - first
        assert row["dual/constraint_violation"] == row["dual/signal"] - budget
        # c = 0.1; one move is at most 1, and lambda stays within its cap.
        coef = max(coef + 0.1 * (row["dual/signal"] / budget - 1), 0.0)
        np.testing.assert_allclose(row["dual/variance_coef"], coef, rtol=1e-5)
    assert lagged.trained[0]["ratio/second_moment_first"] < 1e-6, "the first batch is as old as the learner"
    for row in lagged.trained[1:]:
        assert row["ratio/second_moment_first"] > 1e-4
    # V of the first minibatch is that of noise of 0.01: large enough that subtracting it would show.
    fresh = run(1, noise=0.01)
    assert [row["dual/signal"] for row in fresh.trained] == [row["ratio/second_moment"] for row in fresh.trained]
    np.testing.assert_allclose(fresh.trained[0]["ratio/second_moment_first"], 1e-4, rtol=0.05)
    assert not any(name.startswith("replay/") for name in fresh.trained[0])
    assert not (fresh.workdir / "replay").exists()


def test_train_dual_signal_can_be_absolute_on_stale_data(run):
    absolute = run(4, {"dual_signal": "absolute"}, lag=2)
    assert [row["dual/signal"] for row in absolute.trained] == [row["ratio/second_moment"] for row in absolute.trained]
    assert absolute.trained[1]["ratio/second_moment_first"] > 1e-4


def test_train_decoupled_starts_each_batch_at_a_ratio_of_1(run):
    """The correction moves the ratio's denominator to the learner's policy before its first update on the batch."""
    corrected, direct = run(4, {"correction": "truncate"}, lag=2), run(6, lag=2)
    old = corrected.trained[1]
    assert old["replay/age_mean"] == direct.trained[1]["replay/age_mean"] == 4
    assert old["ratio/second_moment_first"] < 1e-6
    assert direct.trained[1]["ratio/second_moment_first"] > 1e-4
    assert corrected.trained[0]["correction/effective_sample_size"] > 1 - 1e-6 > old["correction/effective_sample_size"]


@pytest.mark.parametrize("objective", ["ppo_clip", "policy_gradient"])
def test_train_replay_serves_other_objectives_alike(objective, run):
    """The same problems and, until the first update, the same responses; the draws differ in nothing."""
    replay = {"lag": 1, "capacity": 2, "draw": "mixed"}
    other, ours = (run(4, {"name": name}, **replay) for name in (objective, "r2vpo"))
    np.testing.assert_array_equal(other.ids(), ours.ids())
    assert [row["kind"] for row in other.by_iteration] == ["fill"] + ["train"] * 3
    assert other.trained[1]["replay/age_max"] == ours.trained[1]["replay/age_max"] > 0
    assert all(row["dual/variance_coef"] == 0 for row in other.trained)
    assert all(np.isfinite(row["loss/total"]) for row in other.trained)
    assert other.trained[2]["loss/total"] != ours.trained[2]["loss/total"]


@pytest.mark.parametrize("draw", DRAWS)
def test_train_from_replay_twice_an_iteration(draw, run):
    """Two batches of 4 groups an iteration, each of 4 updates; the second is counted 4 updates older."""
    replayed = run(3, capacity=3, draw=draw, batches_per_iteration=2)
    assert [row["version"] for row in replayed.trained] == [8, 16, 24]
    assert replayed.summary["num_updates"] == 24
    assert [now for now, _ in replayed.batches] == [0, 4, 8, 12, 16, 20]
    for i, (_, batch) in enumerate(replayed.batches):
        ids = batch.rollout_id.reshape(4, 4)
        np.testing.assert_array_equal(ids, ids[:, :1] + np.arange(4))
        assert len(np.unique(ids)) == BATCH
        assert ids.max() < BATCH * (i // 2 + 1)
        np.testing.assert_array_equal(batch.version, 8 * (batch.rollout_id // BATCH))
    counts = np.bincount(np.concatenate(replayed.ids())[::4] // 4, minlength=12)  # uses of each of the 3 * 4 groups
    assert counts.sum() == 24
    assert replayed.trained[-1]["replay/uses_mean"] == 2
    assert replayed.trained[-1]["replay/uses_max"] == counts.max()
    # The last batch, at the beginning of its iteration, at version 16.
    age = 16 - replayed.batches[-1][1].version
    assert (replayed.trained[-1]["replay/age_mean"], replayed.trained[-1]["replay/age_max"]) == (age.mean(), age.max())
    if draw == "uniform":  # two draws of an iteration differ
        assert set(replayed.ids()[4].tolist()) != set(replayed.ids()[5].tolist())
    if draw == "mixed":  # 2 old groups and 2 fresh ones, which two draws share out
        fresh = [ids // 4 for ids in map(lambda b: b[::4], replayed.ids()[4:])]
        assert sorted(g for groups in fresh for g in groups if g >= 8) == [8, 9, 10, 11]
    if draw == "priority":  # of the groups to be had, none without advantage before all those with one are drawn
        for number, (_, batch) in enumerate(replayed.batches):
            seen = [b for _, b in replayed.batches[: number + 1]]
            flat = [np.all(b.advantage.reshape(4, 4) == 0, axis=1) for b in seen]
            if flat[-1].any():
                drawn = set((batch.rollout_id[::4] // 4).tolist())
                for b, without in zip(seen, flat, strict=True):
                    assert set((b.rollout_id[::4] // 4)[~without].tolist()) <= drawn


def test_train_writes_a_file_an_iteration_and_deletes_what_is_not_needed(run):
    lagged = run(6, lag=2)
    names = sorted(path.name for path in (lagged.workdir / "replay").iterdir())
    assert names == [f"rollout_{i:08d}.npz" for i in (3, 4, 5)]
    with np.load(lagged.workdir / "replay" / names[0]) as arrays:
        batch = next(b for _, b in lagged.batches if b.rollout_id[0] == 3 * BATCH)
        np.testing.assert_array_equal(arrays["behavior_logp"], batch.behavior_logp)
        np.testing.assert_array_equal(arrays["advantage"], batch.advantage)


def test_train_rate_of_rollouts_counts_the_fill(run):
    """Tokens over the seconds that they took, those of iterations that trained nothing too."""
    lagged = run(6, lag=2)
    seconds = sum(r["time/rollout"] for r in files.read_jsonl(lagged.workdir / "metrics.jsonl") if "time/rollout" in r)
    expected = lagged.summary["num_rollout_tokens"] / seconds
    np.testing.assert_allclose(lagged.summary["rollout_tokens_per_second"], expected, rtol=1e-6)
