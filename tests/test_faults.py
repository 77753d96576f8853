"""Interrupted, killed, damaged: a run ends bit for bit like one that nothing happened to, or says what is wrong.

Killing is in run_and_kill.py: 28 processes resume one run, and all but the last kill themselves at moments spread over
its life. The other faults are made between two calls of train(), which share nothing but the run directory.
"""

import errno
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import pytest

from r2vpo_jax.errors import UsageError
from r2vpo_jax.run import files as run_files
from r2vpo_jax.run import instruments
from r2vpo_jax.run.checkpoints import Checkpointer
from r2vpo_jax.training.trainer import train
from tests import run_and_kill
from tests.helpers.paths import ROOT
from tests.helpers.runs import assert_same_run, final_state, rows, stop
from tests.helpers.trees import merged

SMALL = {
    "num_iterations": 6,
    "eval_every": 2,
    # The same shapes as training batches: one sampler is compiled for all three splits.
    "eval_problems": 4,
    "eval_samples": 4,
    "test_problems": 4,
    "test_samples": 4,
}
SCORES = {"batch_size": 64}
STALE = {"lag": 1, "capacity": 2, "draw": "mixed"}


def config_of(tiny_config, **sections):
    return tiny_config(trainer=SMALL, evaluation=SCORES, **sections)


def kinds(workdir):
    return [row["kind"] for row in rows(workdir) if row["kind"] != "evaluation"]


def events(workdir):
    return [(row["event"], row["iteration"]) for row in rows(workdir, "events")]


def files(directory):
    """What there is in a directory; of a step of a checkpoint only its name, for Orbax draws those of its files."""
    names = (path.relative_to(directory) for path in directory.rglob("*"))
    return sorted(
        str(name) for name in names if name.parts[0] != "checkpoints" or len(name.parts) < 3 or name.suffix == ".json"
    )


@pytest.fixture(scope="module")
def stale_config(tiny_config):
    return config_of(tiny_config, replay=STALE)


@pytest.fixture(scope="module")
def whole(stale_config, tmp_path_factory):
    """The directory of a run on stale data that nothing happened to."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    assert train(stale_config, workdir) is not None
    assert kinds(workdir) == ["fill"] + 5 * ["train"]
    return workdir


@pytest.fixture(scope="module")
def stopped_at_4(stale_config, tmp_path_factory):
    """The directory of the same run stopped after 4 of 6 iterations: checkpoints 2 and 4. Copy it before changing it."""
    workdir = tmp_path_factory.mktemp("stopped") / "run"
    stop(stale_config, workdir, 4)
    assert {"checkpoints/2", "checkpoints/4", "checkpoints/manifests/4.json"} <= set(files(workdir))
    return workdir


@pytest.fixture
def stopped(stopped_at_4, tmp_path):
    """A copy of it to be damaged."""
    return pathlib.Path(shutil.copytree(stopped_at_4, tmp_path / "run"))


# ---- N and then N again is 2 N ----


@pytest.mark.slow
@pytest.mark.parametrize("stale", [{}, {"lag": 2}], ids=["on_policy", "lag"])
def test_resume_is_exact(stale, tiny_config, tiny_model, mesh, tmp_path):
    config = config_of(tiny_config, replay=stale)
    train(config, tmp_path / "whole")
    stop(config, tmp_path / "halves", 3)
    assert len(kinds(tmp_path / "halves")) == 3
    train(config, tmp_path / "halves")
    assert_same_run(tmp_path / "halves", tmp_path / "whole", config, tiny_model, mesh)
    assert kinds(tmp_path / "whole") == stale.get("lag", 0) * ["fill"] + (6 - stale.get("lag", 0)) * ["train"]


@pytest.mark.slow
def test_resume_is_exact_with_replay(whole, stopped, stale_config, tiny_model, mesh):
    train(stale_config, stopped)
    assert_same_run(stopped, whole, stale_config, tiny_model, mesh)
    assert events(stopped) == [("start", 0), ("resume", 4)]
    assert files(stopped) == files(whole)
    # Something is at stake: old groups were drawn, and how often is part of what is resumed.
    drawn = [row for row in rows(whole) if row["kind"] == "train"]
    assert max(row["replay/age_max"] for row in drawn) > max(row["replay/age_mean"] for row in drawn) > 0
    _, progress = final_state(whole, stale_config, tiny_model, mesh)
    assert any(max(batch["uses"]) > 1 for batch in progress["replay"]["batches"])


# ---- SIGKILL ----


@pytest.mark.slow
def test_faults_sigkill_at_any_moment(whole, tiny_sections, stale_config, tiny_model, mesh, tmp_path):
    sections = merged(tiny_sections, {"replay": STALE, "trainer": SMALL, "evaluation": SCORES})
    (tmp_path / "sections.json").write_text(json.dumps(sections))
    workdir = tmp_path / "killed" / "run"
    result = subprocess.run(
        [sys.executable, "-m", "tests.run_and_kill", str(tmp_path / "sections.json"), str(workdir)],
        cwd=ROOT, capture_output=True, text=True, timeout=1800,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    *killed, last = json.loads(result.stdout)
    assert len(killed) >= 20
    for child, moment in zip(killed, run_and_kill.MOMENTS, strict=True):
        assert child | {"began": None} == {"moment": moment, "code": -signal.SIGKILL, "reached": moment, "began": None}
    assert last == {"moment": None, "code": 0, "reached": None, "began": 6}
    # Ten from the start, eight from the checkpoint of 2, four from that of 4; all that was done has been kept since.
    assert [child["began"] for child in killed] == 10 * [0] + 8 * [2] + 4 * [4] + (len(killed) - 22) * [6]

    assert_same_run(workdir, whole, stale_config, tiny_model, mesh)
    for file in ("hf/model.safetensors", "samples.jsonl", "config.json"):
        assert (workdir / file).read_bytes() == (whole / file).read_bytes()
    coefs = [[row["dual/variance_coef"] for row in rows(w) if row["kind"] == "train"] for w in (workdir, whole)]
    assert coefs[0] == coefs[1]
    assert len(set(coefs[0])) == 5, "the multiplier moves"
    assert events(workdir)[0] == ("start", 0)
    assert {("torn", 2), ("torn", 4), ("torn", 6)} <= set(events(workdir))
    # No half-written file stays behind, and no half-deleted checkpoint.
    assert files(workdir) == files(whole)


# ---- files damaged between two processes ----


def largest_file(workdir, iteration):
    folder = workdir / "checkpoints" / str(iteration)
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def truncate(path):
    os.truncate(path, path.stat().st_size - 1)


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def newest_replay_file(workdir):
    return sorted((workdir / "replay").glob("rollout_*.npz"))[-1]


@pytest.mark.slow
@pytest.mark.parametrize("damage", [truncate, flip_a_bit, pathlib.Path.unlink])
@pytest.mark.parametrize("of", ["checkpoint", "manifest", "replay"])
def test_faults_damaged_file(damage, of, whole, stopped, stale_config, tiny_model, mesh):
    """The run falls back to the checkpoint before, says which file and why, and still ends the same."""
    path = {
        "checkpoint": largest_file(stopped, 4),
        "manifest": stopped / "checkpoints" / "manifests" / "4.json",
        "replay": newest_replay_file(stopped),
    }[of]
    # Of the batches that checkpoint 4 lists, 2 has no part in the newest: generated by iterations 2, 3 and 4 there.
    assert newest_replay_file(stopped).name == "rollout_00000003.npz"
    if of == "manifest" and damage is flip_a_bit:
        text = path.read_text()
        path.write_text(text.replace('"files"', '"viles"'))  # f is 0b1100110, v is 0b1110110
    else:
        damage(path)
    said = []
    assert train(stale_config, stopped, say=said.append) is not None
    (line,) = [line for line in said if "torn" in line]
    assert line.startswith("checkpoint 4 is torn (")
    assert "falling back to the one before" in line
    name = {"checkpoint": path.name, "manifest": "checksums", "replay": path.name}[of]
    assert name in line
    assert any(line.endswith("from iteration 2") for line in said)
    torn = [row for row in rows(stopped, "events") if row["event"] == "torn"]
    assert [(row["iteration"], row["message"] in line) for row in torn] == [(4, True)]
    assert events(stopped) == [("start", 0), ("torn", 4), ("resume", 2)]
    assert_same_run(stopped, whole, stale_config, tiny_model, mesh)
    assert files(stopped) == files(whole)


@pytest.mark.slow
def test_faults_all_checkpoints_damaged(whole, stopped, stale_config, tiny_model, mesh):
    """Then the run starts again, and ends the same."""
    for iteration in (2, 4):
        flip_a_bit(largest_file(stopped, iteration))
    said = []
    assert train(stale_config, stopped, say=said.append) is not None
    assert [line.partition(" (")[0] for line in said if "torn" in line] == [
        "checkpoint 4 is torn",
        "checkpoint 2 is torn",
    ]
    assert not any(line.startswith("continuing") for line in said)
    assert events(stopped) == [("start", 0), ("torn", 4), ("torn", 2), ("start", 0)]
    assert_same_run(stopped, whole, stale_config, tiny_model, mesh)


@pytest.mark.slow
def test_faults_older_manifest_damaged(whole, stopped, stale_config, tiny_model, mesh):
    """The newest checkpoint is intact: that the other one is not must not end the run."""
    truncate(stopped / "checkpoints" / "manifests" / "2.json")
    truncate(stopped / "checkpoints" / "manifests" / "2.json")
    said = []
    assert train(stale_config, stopped, say=said.append) is not None
    assert any(line.endswith("from iteration 4") for line in said)
    assert_same_run(stopped, whole, stale_config, tiny_model, mesh)


# ---- a full disk ----


FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def full_disk(monkeypatch, owner, name, when):
    """owner.name raises "No space left on device" when it is called with arguments for which when(...) holds."""
    function = getattr(owner, name)

    def failing(*args, **kwargs):
        if when(*args, **kwargs):
            raise FULL
        return function(*args, **kwargs)

    monkeypatch.setattr(owner, name, failing)


WRITES = {
    "metrics": (run_files.JsonlWriter, "write", lambda _, row: row.get("kind") == "train" and row["iteration"] == 3),
    "samples": (run_files.JsonlWriter, "write", lambda _, row: "prompt" in row and row["iteration"] == 4),
    "replay": (run_files, "write_atomically", lambda path, _: path.name == "rollout_00000002.npz"),
    # Written in the background: it comes to light when the next checkpoint is due.
    "checkpoint": (run_files, "write_atomically", lambda path, _: path.match("manifests/4.json")),
    # ... or at the very end, when all else is written.
    "last checkpoint": (run_files, "write_atomically", lambda path, _: path.match("manifests/6.json")),
}


@pytest.mark.slow
@pytest.mark.parametrize("write", WRITES)
def test_faults_full_disk(write, whole, stale_config, tiny_model, mesh, tmp_path, monkeypatch):
    workdir = tmp_path / "run"
    with monkeypatch.context() as patch:
        owner, name, when = WRITES[write]
        full_disk(patch, owner, name, when)
        with pytest.raises(UsageError, match=r"cannot write to .*run \(No space left on device\)") as caught:
            train(stale_config, workdir)
    assert "\n" not in str(caught.value)
    assert "the last checkpoint is intact" in str(caught.value)
    assert not (workdir / "report" / "summary.json").exists()
    assert Checkpointer(workdir / "checkpoints", max_to_keep=2).latest() == (4 if write == "last checkpoint" else 2)
    assert train(stale_config, workdir) is not None
    assert_same_run(workdir, whole, stale_config, tiny_model, mesh)


def test_faults_full_disk_when_stopping(stopped_at_4, stale_config, tmp_path, monkeypatch):
    """A run that is stopped has not saved before its last checkpoint is on disk."""
    workdir = shutil.copytree(stopped_at_4, tmp_path / "run")
    full_disk(monkeypatch, run_files, "write_atomically", lambda path, _: path.match("manifests/5.json"))
    with pytest.raises(UsageError, match="No space left on device"):  # and not Stopped
        train(stale_config, workdir, stop_after_iteration=5)


# ---- signals ----


@pytest.mark.slow
def test_faults_sigterm_saves_and_exits_with_0(config_file, tiny_config, tmp_path):
    """As a machine is taken away: sent once there are rows; a run of 60 iterations is then still going."""
    trainer = {"num_iterations": 60, "eval_every": 60, "checkpoint_every": 60}
    workdir = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, "-m", "experiments.train", f"--config={config_file}", f"--workdir={workdir}",
         *(f"--config.trainer.{name}={value}" for name, value in trainer.items())],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    file = workdir / "metrics.jsonl"
    deadline = time.monotonic() + 200
    while process.poll() is None and time.monotonic() < deadline:
        if file.exists() and '"kind": "train"' in file.read_text():
            break
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors
    assert "SIGTERM: stopping after the iteration" in errors
    assert "Traceback" not in errors
    done = len([row for row in run_files.read_jsonl(file) if row["kind"] == "train"])
    assert 1 <= done < 60
    assert f"stopped after iteration {done} of 60" in output
    assert Checkpointer(workdir / "checkpoints", max_to_keep=2).latest() == done
    said = []
    stop(tiny_config(trainer=trainer), workdir, done + 1, say=said.append)
    assert any(line.endswith(f"from iteration {done}") for line in said)
    assert [row["iteration"] for row in rows(workdir) if row["kind"] == "train"] == list(range(1, done + 2))


# ---- another run, other code, no right to write ----


def test_faults_another_config(stopped_at_4, tiny_config):
    before = {path: path.read_bytes() for path in stopped_at_4.rglob("*") if path.is_file()}
    other = config_of(tiny_config, replay=STALE | {"lag": 3, "draw": "uniform"})
    with pytest.raises(UsageError, match=r"replay\.draw: mixed there, uniform here; replay\.lag: 1 there, 3 here"):
        train(other, stopped_at_4)
    assert {path: path.read_bytes() for path in stopped_at_4.rglob("*") if path.is_file()} == before


def test_faults_changed_code(stopped, stale_config, monkeypatch):
    """Said once, and the run goes on."""
    real = instruments.code_identity()
    monkeypatch.setattr(instruments, "code_identity", lambda: "0123456789abcdef")
    said = []
    stop(stale_config, stopped, 5, say=said.append)
    assert sum("the code has changed" in line for line in said) == 1
    (row,) = [row for row in rows(stopped, "events") if row["event"] == "code_changed"]
    assert row == {"event": "code_changed", "iteration": 4, "before": real, "now": "0123456789abcdef"}
    said.clear()
    stop(stale_config, stopped, 5, say=said.append)
    assert any(line.endswith("from iteration 5") for line in said)
    assert not any("the code has changed" in line for line in said)


def test_the_identity_of_the_code_is_that_of_names_and_contents(tmp_path, monkeypatch):
    package = tmp_path / "package"
    (package / "inner").mkdir(parents=True)
    (package / "code_identity.py").write_text("a = 1\n")
    (package / "inner" / "b.py").write_text("b = 1\n")
    monkeypatch.setattr(instruments, "__file__", str(package / "run" / "instruments.py"))
    seen = [instruments.code_identity()]
    (package / "notes.txt").write_text("no code")
    assert instruments.code_identity() == seen[0]
    (package / "inner" / "b.py").write_text("b = 2\n")
    seen.append(instruments.code_identity())
    (package / "inner" / "b.py").rename(package / "inner" / "c.py")
    seen.append(instruments.code_identity())
    (package / "inner" / "c.py").write_text("")
    seen.append(instruments.code_identity())
    assert len(set(seen)) == 4
    assert all(len(identity) == 16 for identity in seen)


# Root may write anywhere, unless it gives up the capabilities for that (CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH and
# CAP_FOWNER, by PR_CAPBSET_DROP) and then starts anew.
WITHOUT_PRIVILEGES = """
import ctypes, os, sys
for capability in (1, 2, 3):
    ctypes.CDLL(None).prctl(24, capability, 0, 0, 0)
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""


def run_without_privileges(*arguments):
    command = [sys.executable, "-c", WITHOUT_PRIVILEGES, *map(str, arguments)]
    # No other platform is looked for: libtpu would say on stderr that there is no TPU.
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_faults_read_only_workdir(stopped, config_file, tmp_path):
    """One line, exit code 2: a new run below a directory without the right to write, and one that exists."""
    (tmp_path / "closed").mkdir(mode=0o555)
    for path in (*stopped.rglob("*"), stopped):
        path.chmod(0o555 if path.is_dir() else 0o444)
    before = {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file()}
    if run_without_privileges("-c", f"open({str(tmp_path / 'closed' / 'probe')!r}, 'w')").returncode == 0:
        pytest.skip("this user may write anywhere")
    settings = {f"replay.{name}": value for name, value in STALE.items()}
    settings |= {f"trainer.{name}": value for name, value in SMALL.items()}
    settings |= {f"evaluation.{name}": value for name, value in SCORES.items()}
    flags = [f"--config.{name}={value}" for name, value in settings.items()]
    try:
        for workdir in (tmp_path / "closed" / "run", stopped):
            result = run_without_privileges(
                "-m", "experiments.train", f"--config={config_file}", f"--workdir={workdir}", *flags
            )
            lines = [line for line in result.stderr.splitlines() if line.strip()]
            assert result.returncode == 2, result.stderr[-3000:]
            assert len(lines) == 1, result.stderr[-3000:]
            assert lines[0].startswith("error: ")
            assert str(workdir) in lines[0]
            assert "ermission denied" in lines[0]
    finally:
        for path in (stopped, *stopped.rglob("*")):
            path.chmod(0o755)
    assert {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file()} == before
