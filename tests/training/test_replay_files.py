"""The replay buffer: what it refuses, and its files."""

import hashlib
import json
import os

import jax
import numpy as np
import pytest

from r2vpo_jax import config as config_lib
from r2vpo_jax.config import ReplayConfig
from r2vpo_jax.training.replay import ReplayBuffer, ReplayError
from tests.helpers.rollouts import GROUP, GROUPS, KEY, RESPONSE, ROWS, assert_equal, buffer, iterations, make

DRAWS = ("uniform", "mixed", "priority")
OPTIONAL = ("reference_logp", "value", "value_target", "proximal_logp", "weights")

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
    first.draw(1, GROUPS, version=1, key=KEY)
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
    replay.draw(4, GROUPS, version=4, key=KEY)
    listing = json.loads(json.dumps(replay.listing()))
    restored = buffer(tmp_path, **config)
    restored.restore(listing)
    assert restored.listing() == replay.listing()
    assert restored.evicted == 2
    assert restored.statistics(None, 4) == replay.statistics(None, 4)
    for iteration in (5, 6):
        a, b = (r.draw(iteration, 8, version=9, key=KEY) for r in (replay, restored))
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
    other = buffer(tmp_path, make(7), capacity=3)
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
