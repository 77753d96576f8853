"""The TensorBoard of a run: what is on it, and that a run which goes on leaves no point twice."""

import collections

import numpy as np

from r2vpo_jax.run import files
from r2vpo_jax.run.files import RunFiles
from r2vpo_jax.run.tensorboard import TensorBoard, _events


def points(directory):
    """((step, tag) -> values, (step, tag) -> times, marks of a restart) of all event files, in their order."""
    values, times, restarts = collections.defaultdict(list), {}, 0
    for file in sorted(directory.glob("events.out.tfevents.*")):
        for event in _events(file):
            restarts += event.HasField("session_log")
            for value in event.summary.value:
                values[event.step, value.tag].append(value.simple_value)
                times[event.step, value.tag] = event.wall_time
    return dict(values), times, restarts


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

    def opened(positions):
        return RunFiles(tmp_path, positions, write=True, tensorboard=True)

    first = opened({})
    for iteration in (1, 2):
        first.metrics(row(iteration))
    positions = first.positions()
    for iteration in (3, 4):
        first.metrics(row(iteration, reward=-1.0))
    first.close()
    board = tmp_path / "tensorboard"
    _, before, _ = points(board)
    (file,) = board.iterdir()
    with file.open("ab") as torn:
        torn.write(b"\x20\x00\x00\x00")
    (board / "notes.txt").write_text("by hand")

    second = opened(positions)
    second.metrics(row(3))
    second.close()
    found, times, restarts = points(board)
    rewards = {step: values for (step, tag), values in found.items() if tag == "reward/mean"}
    assert rewards == {1: [0.5], 2: [0.5], 3: [0.5]}
    assert restarts == 1, "a TensorBoard that is open has to forget what it has read"
    assert [times[step, "reward/mean"] for step in (1, 2)] == [before[step, "reward/mean"] for step in (1, 2)]
    assert (board / "notes.txt").exists()


def test_a_board_that_is_asked_for_later_has_the_run_from_its_beginning(tmp_path):
    without = RunFiles(tmp_path, {}, write=True, tensorboard=False)
    without.metrics(row(1))
    positions = without.positions()
    without.close()
    assert not (tmp_path / "tensorboard").exists()
    RunFiles(tmp_path, positions, write=True, tensorboard=True).close()
    assert (1, "reward/mean") in points(tmp_path / "tensorboard")[0]
    assert len(files.read_jsonl(tmp_path / "metrics.jsonl")) == 1
