"""Checkpoints in an object store, where Orbax writes and deletes by itself."""

import json

import pytest

from r2vpo_jax import storage
from r2vpo_jax.run import checkpoints
from r2vpo_jax.run.checkpoints import Checkpointer
from tests.run.test_checkpoints import assert_holds, save

MARK = "commit_success.txt"


@pytest.fixture
def open_at():
    """Opens directories, and closes them at the end."""
    opened = []

    def make(folder, **settings):
        opened.append(Checkpointer(folder, **{"max_to_keep": 2} | settings))
        return opened[-1]

    yield make
    for checkpointer in opened:
        checkpointer.close()


def copy(source, target, without=()):
    for name in storage.listing(source):
        if name.rpartition("/")[2] not in without:
            content = (source / name).read_bytes()
            if storage.is_store(target):
                storage.put(target / name, content)
            else:
                (target / name).parent.mkdir(parents=True, exist_ok=True)
                (target / name).write_bytes(content)


def test_what_was_saved_is_given_back_and_the_oldest_goes(store, open_at, monkeypatch):
    checkpointer = open_at(store)
    with monkeypatch.context() as patch:
        patch.setattr(storage.hashlib, "file_digest", None)  # nothing is read back
        for iteration, score in enumerate([0.5, 0.1, 0.2, 0.3], 1):
            save(checkpointer, iteration, score)
        assert checkpointer.steps() == [4, 3, 1], "the last two, and the best"
        assert open_at(store).latest() == 4
    assert checkpoints.best(store) == 1
    for step in (1, 3, 4):
        assert_holds(checkpointer, step)
    assert {name.partition("/")[0] for name in storage.listing(store)} == {"1", "3", "4", "manifests"}
    kept = json.loads(checkpoints.manifest(store, 4).read_bytes())["files"]
    assert all(value.startswith("md5:") for value in kept.values())


def test_an_object_that_is_missing_half_there_or_changed_is_noticed(store, open_at):
    checkpointer = open_at(store, max_to_keep=9)
    for iteration in range(1, 6):
        save(checkpointer, iteration)
    listed = {step: sorted(storage.listing(store / str(step))) for step in range(1, 6)}
    names = {step: next(name for name in listed[step] if "/d/" in name) for step in listed}
    files = {step: store / str(step) / name for step, name in names.items()}
    files[5].unlink()
    storage.put(files[4], files[4].read_bytes()[:-1])
    content = files[3].read_bytes()
    storage.put(files[3], content[:-1] + bytes([content[-1] ^ 1]))
    checkpoints.manifest(store, 2).unlink()
    said = {step: checkpoints.problem(store, step) for step in listed}
    assert said == {
        5: f"{names[5]} is missing",
        4: f"{names[4]} is damaged",
        3: f"{names[3]} is damaged",
        2: "it was not committed (no checksums)",
        1: None,
    }
    again = open_at(store)
    assert again.latest() == 1
    again.discard_after(1)
    assert {name.partition("/")[0] for name in storage.listing(store)} == {"1", "manifests"}


def test_a_step_copied_from_a_disk_is_not_taken_for_unfinished(store, tmp_path, open_at):
    """One of an earlier Orbax, which leaves no sign of a finished step on a disk; without a manifest it is unfinished."""
    local = open_at(tmp_path)
    for iteration in (1, 2):
        save(local, iteration)
    copy(tmp_path, store, without=[MARK])
    checkpoints.manifest(store, 2).unlink()
    listed = json.loads(checkpoints.manifest(store, 1).read_bytes())
    listed["files"] = {name: kept for name, kept in listed["files"].items() if not name.endswith(MARK)}
    storage.put(checkpoints.manifest(store, 1), json.dumps(listed).encode())
    checkpointer = open_at(store)
    assert checkpointer.latest() == 1
    checkpointer.discard_after(1)
    assert checkpointer.steps() == [1]
    assert_holds(checkpointer, 1)
    # And back to a disk.
    save(checkpointer, 3)
    copy(store, tmp_path / "back")
    assert checkpoints.steps(tmp_path / "back") == [3, 1]
    assert [checkpoints.problem(tmp_path / "back", step) for step in (1, 3)] == [None, None]
    assert_holds(open_at(tmp_path / "back"), 3)


def test_a_store_that_is_out_of_reach_says_nothing_of_a_step(store, open_at, monkeypatch):
    checkpointer = open_at(store)
    save(checkpointer, 1)

    def unreachable(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr(type(store), "read_bytes", unreachable)
    for ask in (lambda: checkpoints.latest(store), lambda: open_at(store), checkpointer.replay_listings):
        with pytest.raises(OSError, match="no route to host"):
            ask()
    monkeypatch.undo()
    assert checkpoints.latest(store) == 1
