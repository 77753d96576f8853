"""The files that numbers go to."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from r2vpo_jax.errors import UsageError
from r2vpo_jax.run import console, files
from r2vpo_jax.run.files import JsonlWriter, read_jsonl


def test_rows_come_back(tmp_path):
    file = tmp_path / "metrics.jsonl"
    writer = JsonlWriter(file)
    writer.write({"kind": "train", "iteration": 1, "reward/mean": np.float32(0.5), "ok": True, "none": None})
    writer.write({"iteration": jnp.int32(2), "text": "Löwe", "list": [np.float32(0.5), {"a": float("inf")}]})
    assert len(read_jsonl(file)) == 2, "each row is on disk at once"
    writer.close()
    assert read_jsonl(file) == [
        {"kind": "train", "iteration": 1, "reward/mean": 0.5, "ok": True, "none": None},
        {"iteration": 2, "text": "Löwe", "list": [0.5, {"a": "inf"}]},
    ]


def test_what_is_not_finite_is_a_name(tmp_path):
    """NaN is no JSON; strict readers must get through, and nobody may take it for a number."""
    writer = JsonlWriter(tmp_path / "m.jsonl")
    writer.write({"a": float("nan"), "b": np.float32("inf"), "c": -np.inf})

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    text = (tmp_path / "m.jsonl").read_text()
    assert json.loads(text, parse_constant=refuse) == {"a": "nan", "b": "inf", "c": "-inf"}


def test_a_writer_is_cut_back_to_a_position(tmp_path):
    file = tmp_path / "m.jsonl"
    writer = JsonlWriter(file)
    writer.write({"text": "ä"})
    position = writer.position()
    assert position == len(file.read_bytes()) > len(file.read_text()), "bytes, not characters"
    writer.write({"n": 2})
    writer.close()
    with file.open("a") as torn:
        torn.write('{"n": 3')
    writer = JsonlWriter(file, position)
    assert writer.position() == position
    writer.write({"n": 4})
    writer.close()
    assert read_jsonl(file) == [{"text": "ä"}, {"n": 4}]
    # Without a position nothing is lost.
    JsonlWriter(file).close()
    assert len(read_jsonl(file)) == 2


def test_a_file_of_another_run_is_refused(tmp_path):
    file = tmp_path / "m.jsonl"
    file.write_text("{}\n")
    with pytest.raises(ValueError, match=r"has 3 bytes, but the checkpoint was written at 100"):
        JsonlWriter(file, 100)
    assert file.read_text() == "{}\n"


def test_a_torn_last_line_is_left_out(tmp_path):
    file = tmp_path / "m.jsonl"
    file.write_text('{"n": 1}\n{"n": 2}\n{"n": 3')
    assert read_jsonl(file) == [{"n": 1}, {"n": 2}]


def test_the_null_writer_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    writer = files.NullWriter()
    writer.write({"n": 1})
    assert writer.position() == 0
    writer.close()
    assert list(tmp_path.iterdir()) == []


def test_progress_speaks_now_and_then(capsys):
    progress = console.ProgressBar(25, 0, every=10)
    for i in range(1, 26):
        progress.update(i, f"reward {i}")
    progress.close()
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[1] for line in lines] == ["10/25", "20/25", "25/25"]
    assert lines[0] == "iteration 10/25  reward 10  0 s left"
    console.ProgressBar(1, 0, enabled=False).update(1, "text")
    assert capsys.readouterr().err == ""


def test_progress_of_something_else(capsys):
    console.ProgressBar(16, 8, every=1, unit="problem").update(12, "half right")
    assert capsys.readouterr().err == "problem 12/16  half right  0 s left\n"


def test_a_file_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    file = tmp_path / "folder" / "file.json"
    files.write_atomically(file, "first ✓\n")
    assert file.read_text(encoding="utf-8") == "first ✓\n"

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", fail)
    said = r"cannot write to there \(No space left on device\)"
    with (
        pytest.raises(UsageError, match=rf"{said}; the first is intact: make"),
        files.disk_errors("there", "the first"),
    ):
        files.write_atomically(file, b"second")
    assert file.read_text(encoding="utf-8") == "first ✓\n"
    with pytest.raises(UsageError, match=f"^{said}$"), files.disk_errors("there"):
        files.write_atomically(file, b"second")


def test_the_sha256_of_a_file_is_that_of_its_bytes(tmp_path):
    (tmp_path / "file").write_bytes(b"abc")
    assert files.sha256_of(tmp_path / "file") == files.sha256_of(b"abc")
    assert files.sha256_of(b"abc").startswith("ba7816bf8f01cfea")


def test_progress_extrapolates_the_pace_of_this_process(capsys, monkeypatch):
    """Resumed at 10 of 30: ten iterations in 20 seconds leave another ten, and 20 seconds."""
    now = [100.0]
    monkeypatch.setattr(console.time, "perf_counter", lambda: now[0])
    progress = console.ProgressBar(30, 10)
    now[0] = 120.0
    progress.update(20, "text")
    assert capsys.readouterr().err == "iteration 20/30  text  20 s left\n"
