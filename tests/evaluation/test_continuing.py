"""Evaluations that are cut, killed, signaled, or continued with other settings."""

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest

from r2vpo_jax.errors import Stopped, UsageError
from r2vpo_jax.evaluation import benchmarks, model_source
from r2vpo_jax.run import files
from tests.helpers.evaluations import BATCH, FILES, NUM_PROBLEMS, TINY, K, contents, silent
from tests.helpers.paths import ROOT


def test_cut_anywhere_it_ends_the_same(make, finished, tmp_path):
    """Half a first line, within a batch, at its end, half a line of the second, all but the last byte."""
    whole = (finished[0] / "outcomes.jsonl").read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    for number, length in enumerate((20, ends[2], ends[BATCH - 1], ends[BATCH + 1] + 9, len(whole) - 1)):
        path = tmp_path / str(number)
        path.mkdir()
        shutil.copy(finished[0] / "config.json", path)
        (path / "outcomes.jsonl").write_bytes(whole[:length])
        assert silent(make(), path) == finished[1]
        assert contents(path) == contents(finished[0])


def test_a_finished_one_reads_no_weights(make, finished, tmp_path, monkeypatch):
    shutil.copytree(finished[0], tmp_path / "eval")
    (tmp_path / "eval" / "evaluation.md").unlink()
    monkeypatch.setattr(model_source.ModelSource, "load_params", None)
    assert silent(make(), tmp_path / "eval") == finished[1]
    assert contents(tmp_path / "eval") == contents(finished[0])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"k": 8}, "k: 4 there, 8 here"),
        ({"sections": {"evaluation": {"temperature": 0.6}}}, "evaluation.temperature: 1.0 there, 0.6 here"),
        ({"seed": 5}, "seed: 0 there, 5 here"),
        ({"num_problems": 20}, f"tasks.{TINY}.problems: 16 there, 20 here"),
        ({"greedy": False}, "greedy: True there, False here"),
    ],
)
def test_other_settings_in_the_same_directory_are_refused(changes, said, make, finished):
    before = contents(finished[0])
    with pytest.raises(UsageError, match="another configuration") as error:
        silent(make(**changes), finished[0])
    assert said in str(error.value)
    assert "choose another --output" in str(error.value)
    assert contents(finished[0]) == before


def test_other_weights_are_refused(make, finished, tiny_checkpoint, tmp_path):
    """The same path, shapes and file size; one number differs."""
    shutil.copytree(finished[0], tmp_path / "eval")
    shutil.copytree(tiny_checkpoint, tmp_path / "model")
    content = bytearray((tmp_path / "model" / "model.safetensors").read_bytes())
    content[-1] ^= 1
    config = json.loads((tmp_path / "eval" / "config.json").read_text())
    config["model"]["path"] = str(tmp_path / "model")
    (tmp_path / "eval" / "config.json").write_text(json.dumps(config))
    silent(make(model=str(tmp_path / "model")), tmp_path / "eval")
    (tmp_path / "model" / "model.safetensors").write_bytes(content)
    with pytest.raises(UsageError, match="model.digest"):
        silent(make(model=str(tmp_path / "model")), tmp_path / "eval")


def test_outcomes_of_something_else_are_refused(make, finished, tmp_path):
    shutil.copytree(finished[0], tmp_path / "eval")
    file = tmp_path / "eval" / "outcomes.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[1:]))
    with pytest.raises(UsageError, match="does not hold the problems"):
        silent(make(), tmp_path / "eval")
    file.write_text(lines[0] + "\0\0\n" + lines[1])
    with pytest.raises(UsageError, match="is damaged"):
        silent(make(), tmp_path / "eval")


def test_changed_code_is_said(make, finished, tmp_path, monkeypatch):
    shutil.copytree(finished[0], tmp_path / "eval")
    file = tmp_path / "eval" / "outcomes.jsonl"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:BATCH]))
    monkeypatch.setattr(benchmarks.instruments, "code_identity", lambda: "0123")
    said = []
    benchmarks.run(make(), tmp_path / "eval", say=said.append)
    assert any("the code has changed" in line for line in said)
    assert contents(tmp_path / "eval", FILES[2:]) == contents(finished[0], FILES[2:])


def test_a_signal_ends_after_the_batch_in_hand(make, finished, tmp_path, monkeypatch):
    append, said = files.append_lines, []

    def append_and_interrupt(*args):
        append(*args)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(files, "append_lines", append_and_interrupt)
    with pytest.raises(Stopped, match=f"stopped after {BATCH} of {NUM_PROBLEMS} problems; the same command goes on"):
        benchmarks.run(make(), tmp_path, say=said.append)
    assert said == []
    assert len(files.read_jsonl(tmp_path / "outcomes.jsonl")) == BATCH
    assert not (tmp_path / "evaluation.json").exists()
    monkeypatch.undo()
    benchmarks.run(make(), tmp_path, say=said.append)
    assert f"continuing: {BATCH} of {NUM_PROBLEMS} problems are done" in said
    assert contents(tmp_path) == contents(finished[0])


# One evaluation, killed by SIGKILL at every moment in turn, and then left to finish; each in a child of one process that
# has imported everything and computed nothing.
KILLER = """
import json, os, signal, sys
from r2vpo_jax.evaluation import benchmarks, settings
from r2vpo_jax.run import files

values, path = json.loads(sys.argv[1]), sys.argv[2]

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

def before(owner, name, call=1):
    real, calls = getattr(owner, name), [0]
    def counted(*args, **kwargs):
        calls[0] += 1
        if calls[0] == call:
            die()
        return real(*args, **kwargs)
    setattr(owner, name, counted)

def torn(call):
    real, calls = files.append_lines, [0]
    def half(file, text):
        calls[0] += 1
        if calls[0] < call:
            return real(file, text)
        with open(file, "a") as f:
            f.write(text[: len(text) // 2])
        die()
    files.append_lines = half

def after_append():
    real = files.append_lines
    def appended(*args):
        real(*args)
        die()
    files.append_lines = appended

moments = {
    "nothing is written": lambda: before(benchmarks, "claim_file"),
    "no outcomes": lambda: before(files, "append_lines"),
    "half a batch": lambda: torn(1),
    "a batch": after_append,
    "half of another": lambda: torn(2),
    "no evaluation.json": lambda: before(benchmarks.benchmark_report, "markdown"),
    "no evaluation.md": lambda: before(files, "write_atomically", 2),
    "end": lambda: None,
}
for name in sys.argv[3:]:
    child = os.fork()
    if not child:
        moments[name]()
        benchmarks.run(settings.resolve(**values), path, say=lambda _: None)
        os._exit(0)
    print(name, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def killed(values, path, *moments):
    command = [sys.executable, "-c", KILLER, json.dumps(values), str(path), *moments]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert result.returncode == 0, result.stderr
    expected = [f"{name} {0 if name == 'end' else -signal.SIGKILL}" for name in moments]
    assert result.stdout.splitlines() == expected, result.stderr


@pytest.fixture
def values(tiny_checkpoint):
    """The keywords of settings.resolve that mean make()."""
    sections = {"evaluation": {"batch_size": BATCH * K}}
    return {"model": str(tiny_checkpoint), "tasks": TINY, "num_problems": NUM_PROBLEMS, "k": K, "sections": sections}


def test_killed_and_continued_it_ends_the_same(values, finished, tmp_path):
    killed(values, tmp_path / "eval", "half of another", "end")
    assert contents(tmp_path / "eval") == contents(finished[0])


@pytest.mark.slow
def test_killed_at_every_moment_it_ends_the_same(values, finished, tmp_path):
    moments = ["nothing is written", "no outcomes", "half a batch", "a batch", "half a batch"]
    killed(values, tmp_path / "eval", *moments, "no evaluation.json", "no evaluation.md", "end")
    assert contents(tmp_path / "eval") == contents(finished[0])
