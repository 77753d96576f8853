"""The TensorBoard of a run: what is on it, and that a run which goes on leaves no point twice."""

import collections

import numpy as np

from r2vpo_jax import config
from r2vpo_jax.run import files
from r2vpo_jax.run.files import RunFiles
from r2vpo_jax.run.tensorboard import TensorBoard, _events
from r2vpo_jax.run.trackers import Trackers


def points(directory):
    """((step, tag) -> values, (step, tag) -> times, marks of a restart) of all event files, in their order."""
    values, times, restarts = collections.defaultdict(list), {}, 0
    for file in sorted(directory.glob("events.out.tfevents.*")):
        for event in _events(file):
            restarts += event.HasField("session_log")
            for value in event.summary.value:
                if value.HasField("tensor"):
                    continue
                values[event.step, value.tag].append(value.simple_value)
                times[event.step, value.tag] = event.wall_time
    return dict(values), times, restarts


def tables(directory):
    """[(step, Markdown)] of all event files, in their order."""
    return [
        (event.step, value.tensor.string_val[0].decode())
        for file in sorted(directory.glob("events.out.tfevents.*"))
        for event in _events(file)
        for value in event.summary.value
        if value.HasField("tensor")
    ]


def opened(directory, positions):
    tracked = config.from_dict({"trainer": {"trackers": ("tensorboard",)}})
    trackers = Trackers(tracked, directory, resumed=bool(positions), say=print)
    return RunFiles(directory, positions, write=True, trackers=trackers)


def row(iteration, reward=0.5):
    return {"kind": "train", "iteration": iteration, "reward/mean": reward}


def test_the_numbers_are_there_those_that_are_finite(tmp_path):
    board = TensorBoard(tmp_path)
    values = {"flag": True, "text": "nan", "nan": float("nan"), "inf": -np.inf, "count": 2, "double": np.float64(0.25)}
    board.write(row(3) | values)
    board.write({"kind": "evaluation", "iteration": 3, "split": "validation", "pass_at_1": 0.75})
    board.write({"kind": "evaluation", "iteration": 3, "split": "test", "pass_at_1": 0.25})
    board.close()
    found, _, restarts = points(tmp_path)
    assert restarts == 0
    assert {tag: values for (step, tag), values in found.items() if "iteration" not in tag and step == 3} == {
        "reward/mean": [0.5], "count": [2], "double": [0.25], "validation/pass_at_1": [0.75], "test/pass_at_1": [0.25],
    }  # fmt: skip


def test_a_run_that_goes_on_leaves_no_point_twice(tmp_path):
    """Killed after 4, with a checkpoint at 2: the board goes back to 2 as metrics.jsonl does, and keeps its times."""
    first = opened(tmp_path, {})
    for iteration in (1, 2):
        first.record(row(iteration), [{"iteration": iteration, "response": f"<b>|{iteration}\n"}])
    positions = first.positions()
    for iteration in (3, 4):
        first.record(row(iteration, reward=-1.0), [{"iteration": iteration, "response": "beyond"}])
    first.close()
    board = tmp_path / "tensorboard"
    _, before, _ = points(board)
    (file,) = board.iterdir()
    with file.open("ab") as torn:
        torn.write(b"\x20\x00\x00\x00")
    (board / "notes.txt").write_text("by hand")

    second = opened(tmp_path, positions)
    second.record(row(3))
    second.close()
    found, times, restarts = points(board)
    rewards = {step: values for (step, tag), values in found.items() if tag == "reward/mean"}
    assert rewards == {1: [0.5], 2: [0.5], 3: [0.5]}
    assert restarts == 1, "a TensorBoard that is open has to forget what it has read"
    assert [times[step, "reward/mean"] for step in (1, 2)] == [before[step, "reward/mean"] for step in (1, 2)]
    assert tables(board) == [(n, f"|iteration|response|\n|---|---|\n|{n}|&lt;b&gt;&#124;{n}<br>|") for n in (1, 2)]
    assert (board / "notes.txt").exists()


def test_a_board_that_is_asked_for_later_has_the_run_from_its_beginning(tmp_path):
    without = RunFiles(tmp_path, {}, write=True)
    without.record(row(1))
    positions = without.positions()
    without.close()
    assert not (tmp_path / "tensorboard").exists()
    opened(tmp_path, positions).close()
    assert (1, "reward/mean") in points(tmp_path / "tensorboard")[0]
    assert len(files.read_jsonl(tmp_path / "metrics.jsonl")) == 1
