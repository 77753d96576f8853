"""Checkpoints by themselves: what is saved, kept, found damaged, and resumed from."""

import contextlib
import dataclasses
import errno
import json
import math
import os
import pathlib
import re
import resource
import threading

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from r2vpo_jax.run import checkpoints, files
from r2vpo_jax.run.checkpoints import Checkpointer
from r2vpo_jax.training.lifecycle import Counters

WIDTH = 1000


def state_of(iteration):
    return {"params": {"w": jnp.full(WIDTH, float(iteration))}, "version": jnp.int32(10 * iteration)}


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "checkpoints"


@pytest.fixture
def open_at(folder):
    """Opens the directory again as another process would; all are closed at the end."""
    opened = []

    def make(**options):
        opened.append(Checkpointer(folder, **{"max_to_keep": 2} | options))
        return opened[-1]

    yield make
    for checkpointer in opened:
        with contextlib.suppress(Exception):  # of writes that tests made fail
            checkpointer.close()


@pytest.fixture
def saved(open_at, folder):
    """(checkpointer, folder) with intact steps 1, 2 and 3."""
    checkpointer = open_at(max_to_keep=3)
    for iteration in (1, 2, 3):
        save(checkpointer, iteration)
    return checkpointer, folder


def save(checkpointer, iteration, score=0.0, **progress):
    """Saved and committed."""
    checkpointer.save(iteration, state_of(iteration), {"problems": iteration, "replay": None} | progress, score=score)
    checkpointer.wait()


def restored(checkpointer, iteration):
    abstract = jax.eval_shape(lambda: state_of(0))
    where = jax.tree.map(lambda _: jax.sharding.SingleDeviceSharding(jax.devices()[0]), abstract)
    state, progress = checkpointer.restore(iteration, abstract, where)
    return jax.tree.map(np.asarray, state), progress


def assert_holds(checkpointer, iteration):
    state, progress = restored(checkpointer, iteration)
    np.testing.assert_array_equal(state["params"]["w"], np.full(WIDTH, iteration, np.float32))
    assert state["version"] == 10 * iteration
    assert progress["problems"] == iteration


# ---- saving ----


def test_resume_gives_back_what_was_saved(open_at):
    state = {
        "f32": jnp.array([0.1, -0.0, np.inf, np.nan, 1e-45], jnp.float32),
        "bf16": jnp.array([0.1, 3.0], jnp.bfloat16),
        "i32": jnp.int32(-7),
        "nested": {"none": None, "empty": {}},
    }
    progress = {"seconds": 0.1, "best": None, "replay": {"batches": [{"sha256": "ab", "uses": [1, 2]}]}, "name": "λ"}
    first = open_at()
    first.save(5, state, progress, score=0.5)
    first.close()
    second = open_at()
    assert second.latest() == 5
    abstract = jax.eval_shape(lambda: state)
    where = jax.tree.map(lambda _: jax.sharding.SingleDeviceSharding(jax.devices()[0]), abstract)
    found, found_progress = second.restore(5, abstract, where)
    assert jax.tree.structure(found) == jax.tree.structure(state)
    for leaf, expected in zip(jax.tree.leaves(found), jax.tree.leaves(state), strict=True):
        assert leaf.dtype == expected.dtype
        assert np.asarray(leaf).tobytes() == np.asarray(expected).tobytes()
    assert found_progress == progress
    assert second.replay_listings() == [progress["replay"]]


def test_buffers_may_be_overwritten_at_once(open_at):
    """The next update is given the very buffers to overwrite (donation) while they are still being written."""
    checkpointer = open_at(max_to_keep=9)
    overwrite = jax.jit(lambda x: x * 0 - 1, donate_argnums=0)
    for iteration in range(1, 9):
        # Large: writing takes longer than overwriting.
        state = {"w": jnp.full((512, 1024), float(iteration))}
        address = state["w"].unsafe_buffer_pointer()
        checkpointer.save(iteration, state, {"replay": None})
        over = overwrite(state["w"])
        assert state["w"].is_deleted()
        assert over.unsafe_buffer_pointer() == address, "the buffer was not overwritten: this test would show nothing"
        np.asarray(over)
    checkpointer.wait()
    abstract = {"w": jax.ShapeDtypeStruct((512, 1024), jnp.float32)}
    where = {"w": jax.sharding.SingleDeviceSharding(jax.devices()[0])}
    for iteration in range(1, 9):
        state, _ = checkpointer.restore(iteration, abstract, where)
        np.testing.assert_array_equal(state["w"], np.full((512, 1024), iteration, np.float32))


def test_counters_may_be_changed_at_once(open_at, monkeypatch):
    """What is saved of them, those of the alarms for example, is as of the call, however late it is written."""
    go_on = threading.Event()
    write = ocp.JsonCheckpointHandler._save_fn

    async def late(handler, *args):
        assert go_on.wait(60)
        return await write(handler, *args)

    monkeypatch.setattr(ocp.JsonCheckpointHandler, "_save_fn", late)
    checkpointer = open_at()
    progress = {"problems": 1, "replay": {"batches": []}, "alarms": {"entropy": 1}}
    checkpointer.save(1, state_of(1), progress)
    progress["problems"] = 2
    progress["alarms"]["entropy"] = 2
    progress["replay"]["batches"].append(3)
    go_on.set()
    checkpointer.wait()
    _, found = restored(checkpointer, 1)
    assert found == {"problems": 1, "replay": {"batches": []}, "alarms": {"entropy": 1}}
    assert checkpointer.replay_listings() == [{"batches": []}]


def test_saving_goes_on_in_the_background(open_at, monkeypatch):
    """save() returns before the step is committed; until then it is not there for a process that resumes."""
    go_on = threading.Event()
    commit = files.write_atomically
    monkeypatch.setattr(files, "write_atomically", lambda *args: (go_on.wait(60), commit(*args)))
    checkpointer = open_at()
    checkpointer.save(1, state_of(1), {"problems": 1, "replay": None})
    assert checkpointer.problem(1) is not None
    go_on.set()
    checkpointer.wait()
    assert checkpointer.problem(1) is None
    assert open_at().latest() == 1


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"version": jnp.float32(0)}, r"\['version'\] is int32\[\] there and float32\[\] here"),
        ({"params": {"w": jnp.zeros(WIDTH, jnp.int32)}}, r"\['w'\] is float32\[1000\] there and int32\[1000\] here"),
        ({"params": {"w": jnp.zeros(9)}}, r"is float32\[1000\] there and float32\[9\] here"),
        ({"params": {}}, r"\['w'\] is float32\[1000\] there and absent here"),
    ],
)
def test_what_would_be_cut_or_cast_is_refused(changed, message, saved):
    """Orbax alone makes 0.5 of a float32 array 0 of an int32 one, and says nothing."""
    checkpointer, _ = saved
    state = state_of(3) | changed
    where = jax.tree.map(lambda _: jax.sharding.SingleDeviceSharding(jax.devices()[0]), state)
    with pytest.raises(ValueError, match=f"checkpoint 3 was written by other code: .*{message}"):
        checkpointer.restore(3, state, where)


def test_a_step_that_exists_is_left_alone(saved):
    checkpointer, folder = saved
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    checkpointer.save(3, state_of(99), {"problems": 99, "replay": None})
    checkpointer.wait()
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()} == before
    assert_holds(checkpointer, 3)


# ---- what is kept ----


@pytest.mark.parametrize(
    ("max_to_keep", "scores", "kept"),
    [
        (1, [0, 0, 0, 0, 0], [5]),  # the newer of equal ones is the best
        (2, [None, 0.2, None, 0.1, None], [2, 4, 5]),  # what was not scored is not the best
        (1, [None, None, None], [3]),
        (1, [0.4, float("nan"), 0.3, None], [1, 4]),  # NaN is no score: Orbax would take it for the best
        (1, [float("nan"), None, 0.0, float("inf"), None], [3, 5]),
        (2, [0, 0, 0, 0, 0], [4, 5]),
        (9, [0, 0, 0, 0, 0], [1, 2, 3, 4, 5]),
        (2, [0.1, 0.5, 0.3, 0.2, 0.1], [2, 4, 5]),
        (1, [0.9, 0.5, 0.3, 0.2, 0.1], [1, 5]),
        (2, [0.1, 0.5, 0.3, 0.2, 0.6], [4, 5]),
        (1, [0.5, 0.5, 0.3, 0.5, 0.1], [4, 5]),
    ],
)
def test_the_last_ones_and_the_best_are_kept(max_to_keep, scores, kept, open_at, folder):
    checkpointer = open_at(max_to_keep=max_to_keep)
    for iteration, score in enumerate(scores, start=1):
        save(checkpointer, iteration, score)
    assert checkpointer.steps() == kept[::-1]
    judged = [(score, step) for step, score in enumerate(scores, start=1) if score is not None and np.isfinite(score)]
    assert checkpoints.best(folder) == max(judged, default=(None, None))[1]
    for iteration in kept:
        assert checkpointer.problem(iteration) is None
        assert_holds(checkpointer, iteration)
    assert sorted(path.name for path in folder.iterdir()) == sorted([*map(str, kept), "manifests"])
    assert sorted(path.stem for path in (folder / "manifests").iterdir()) == sorted(map(str, kept))


def test_nothing_is_deleted_before_the_next_one_is_committed(open_at, monkeypatch):
    checkpointer = open_at(max_to_keep=1)
    save(checkpointer, 1)
    seen, commit = [], files.write_atomically

    def watched(*args):
        seen.append(checkpointer.problem(1))
        commit(*args)

    monkeypatch.setattr(files, "write_atomically", watched)
    save(checkpointer, 2)
    assert seen == [None], "1 was intact when 2 was about to be committed"
    assert checkpointer.steps() == [2]


def test_what_is_left_of_an_interrupted_deletion_goes_with_the_next(open_at, monkeypatch):
    """A process that was killed after it had taken a step's checksums away, and before the step."""
    checkpointer = open_at(max_to_keep=1)
    save(checkpointer, 1)
    with monkeypatch.context() as patch:
        patch.setattr(ocp.CheckpointManager, "delete", lambda *_: None)
        save(checkpointer, 2)
    assert checkpointer.steps() == [2, 1]
    assert checkpointer.problem(1) is not None
    checkpointer = open_at(max_to_keep=1)
    checkpointer.discard_after(checkpointer.latest())
    save(checkpointer, 3)
    assert checkpointer.steps() == [3]


# ---- damage ----


def largest_file(folder):
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def files_of(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def truncate(path):
    os.truncate(path, path.stat().st_size - 1)


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "what"), [(truncate, "damaged"), (flip_a_bit, "damaged"), (pathlib.Path.unlink, "missing")]
)
def test_resume_notices_damage_to_any_file(damage, what, saved):
    """One file after the other, put back each time; empty ones (they mark a commit) have nothing to cut or flip."""
    checkpointer, folder = saved
    paths = [path for path in files_of(folder / "3") if path.stat().st_size or damage is pathlib.Path.unlink]
    assert len(paths) >= 5
    assert len({path.relative_to(folder / "3").parts[0] for path in paths}) >= 3, (
        "the arrays, the counters, and Orbax's"
    )
    for path in paths:
        data = path.read_bytes()
        damage(path)
        assert checkpointer.problem(3) == f"{path.relative_to(folder / '3')} is {what}"
        assert checkpointer.latest() == 2
        path.write_bytes(data)
        assert checkpointer.problem(3) is None


MANIFESTS = {
    "missing": (pathlib.Path.unlink, r"it was not committed \(no checksums\)"),
    "empty": (lambda path: path.write_text(""), "its checksums cannot be read"),
    "half": (lambda path: os.truncate(path, path.stat().st_size // 2), "its checksums cannot be read"),
    "not text": (lambda path: path.write_bytes(b"\xff" * 100), "its checksums cannot be read"),
    "without files": (lambda path: path.write_text('{"score": 0.0}'), "its checksums cannot be read"),
    "not an object": (lambda path: path.write_text("[]"), "its checksums cannot be read"),
    "no list of files": (lambda path: path.write_text('{"files": 3}'), "its checksums cannot be read"),
}


@pytest.mark.parametrize("case", MANIFESTS)
def test_resume_notices_damaged_checksums(case, saved, open_at):
    """Of the last step, which is then torn, and of the first, which must be in nobody's way."""
    _, folder = saved
    damage, message = MANIFESTS[case]
    for iteration, latest in ((1, 3), (3, 2)):
        damage(folder / "manifests" / f"{iteration}.json")
        checkpointer = open_at()
        assert re.search(message, checkpointer.problem(iteration))
        assert checkpointer.latest() == latest
    checkpointer = open_at(max_to_keep=2)
    checkpointer.discard_after(2)
    assert checkpointer.steps()[0] == 2
    assert checkpointer.replay_listings() == []
    save(checkpointer, 4)
    assert checkpointer.latest() == 4
    assert_holds(checkpointer, 4)
    assert_holds(checkpointer, 2)


def test_another_file_in_a_step_is_no_damage(saved):
    checkpointer, folder = saved
    (folder / "3" / "notes.txt").write_text("by hand")
    assert checkpointer.latest() == 3


def test_without_an_intact_step_there_is_none(saved):
    checkpointer, folder = saved
    for iteration in (1, 2, 3):
        flip_a_bit(largest_file(folder / str(iteration)))
    assert checkpointer.latest() is None
    assert checkpointer.steps() == [3, 2, 1]
    checkpointer.discard_after(None)
    assert checkpointer.steps() == []
    assert list((folder / "manifests").iterdir()) == []


def test_resume_falls_back_and_writes_the_torn_step_again(saved, open_at):
    _, folder = saved
    flip_a_bit(largest_file(folder / "3"))
    checkpointer = open_at(max_to_keep=3)
    assert checkpointer.latest() == 2
    assert_holds(checkpointer, 2)
    checkpointer.discard_after(2)
    assert checkpointer.steps() == [2, 1]
    assert sorted(path.name for path in (folder / "manifests").iterdir()) == ["1.json", "2.json"]
    save(checkpointer, 3)
    assert checkpointer.latest() == 3
    assert_holds(checkpointer, 3)


def test_readers_delete_no_checksums(saved, open_at):
    _, folder = saved
    before = files_of(folder / "manifests")
    reader = open_at(write=False, max_to_keep=1)
    assert reader.latest() == 3
    assert_holds(reader, 3)
    reader.close()
    assert files_of(folder / "manifests") == before


def test_processes_that_write_no_checksums_need_not_find_them(open_at):
    """Process 1 of 2 goes on when the arrays are on disk; process 0 may not have written the checksums yet."""
    other = open_at(write=False)
    save(other, 1, replay={"batches": []})
    assert other.replay_listings() == []
    assert other.problem(1) is not None


# ---- writes that fail ----


@pytest.fixture
def no_large_files():
    """A real failing write, as on a full disk: from now on no file may be larger than 64 KiB."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_faults_array_that_cannot_be_written(open_at, no_large_files):
    """Surfaces as an OSError when it is waited for; the step before is intact and the next one can be saved."""
    checkpointer = open_at()
    save(checkpointer, 1)
    noise = np.random.default_rng(0).random(1 << 18, np.float32)  # 1 MiB that cannot be compressed
    checkpointer.save(2, {"w": jnp.asarray(noise)}, {"replay": None})
    with pytest.raises(OSError, match="File too large"):
        checkpointer.wait()
    checkpointer.close()  # said once
    other = open_at()
    assert other.latest() == 1
    assert_holds(other, 1)
    save(other, 2)
    assert other.latest() == 2


FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def fail(*_, **__):
    raise FULL


@pytest.mark.parametrize("when", ["save", "close", "wait", "replay_listings"])
@pytest.mark.parametrize("what", ["manifest", "half a manifest"])
def test_faults_failing_write_surfaces(what, when, open_at, monkeypatch):
    checkpointer = open_at()
    save(checkpointer, 1)
    with monkeypatch.context() as patch:
        if what == "manifest":
            patch.setattr(files, "write_atomically", fail)
        else:
            patch.setattr(os, "fsync", fail)
        checkpointer.save(2, state_of(2), {"problems": 2, "replay": None})  # does not raise: nothing is known yet
        for thread in threading.enumerate():
            if thread.name == "checkpoint":
                thread.join()
    call = {
        "save": lambda: save(checkpointer, 3),
        "close": checkpointer.close,
        "wait": checkpointer.wait,
        "replay_listings": checkpointer.replay_listings,
    }[when]
    with pytest.raises(OSError, match="No space left on device"):
        call()
    # What was there before is intact, and 2 is not taken for a checkpoint.
    other = open_at()
    assert other.latest() == 1
    assert_holds(other, 1)
    other.discard_after(1)
    save(other, 2)
    assert other.latest() == 2
    assert_holds(other, 2)


def test_faults_failing_write_deletes_nothing(open_at, folder, monkeypatch):
    """Of a directory that keeps one step, the one before stays as long as the next is not committed."""
    checkpointer = open_at(max_to_keep=1)
    save(checkpointer, 1)
    monkeypatch.setattr(files, "write_atomically", fail)
    for iteration in (2, 3):
        with pytest.raises(OSError, match="No space"):
            save(checkpointer, iteration)
    assert open_at(write=False).latest() == 1
    assert json.loads(checkpoints.manifest(folder, 1).read_text())["score"] == 0.0


def test_a_validation_in_which_nothing_was_judged_is_no_score():
    counters = Counters(code="", data="", iteration=3).after_validation(0.25)
    assert (counters.own_score, counters.best_validation) == (0.25, 0.25)
    unjudged = dataclasses.replace(counters, iteration=4).after_validation(math.nan)
    assert math.isnan(unjudged.own_score), "which a checkpoint takes for none"
    assert unjudged.best_validation == 0.25
