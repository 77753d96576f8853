"""Whose a directory is, who works in it now, and what may change in between."""

import os
import signal
import subprocess
import sys

import pytest

from r2vpo_jax.errors import UsageError
from r2vpo_jax.run import directory
from tests.helpers.paths import ROOT

HOLDER = """
import sys, time
from r2vpo_jax.run import directory
with directory.lock(sys.argv[1], say=print):
    print("held", flush=True)
    time.sleep(600)
"""


def silent(_):
    raise AssertionError("nothing is to be said")


def assert_in_use(path, who):
    message = rf"run is in use by process {who} on .*; wait until that has ended, stop it, or choose another --workdir"
    with pytest.raises(UsageError, match=message), directory.lock(path, say=silent):
        pass
    with pytest.raises(UsageError, match=message):
        directory.refuse_if_in_use(path)


def test_two_cannot_work_in_one_directory_and_the_dead_hold_nothing(tmp_path):
    path = tmp_path / "run"
    directory.refuse_if_in_use(path)
    assert not path.exists(), "asking writes nothing"
    with directory.lock(path, say=silent):
        assert_in_use(path, os.getpid())
    assert list(path.iterdir()) == [], "nothing is left of it"
    directory.refuse_if_in_use(path)
    with pytest.raises(KeyError), directory.lock(path, say=silent):
        raise KeyError
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(path)], cwd=ROOT, stdout=subprocess.PIPE, env=os.environ
    )
    try:
        assert process.stdout.readline() == b"held\n"
        assert_in_use(path, process.pid)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    with directory.lock(path, say=silent):
        assert_in_use(path, os.getpid())


def test_a_lock_that_was_given_back_in_between_is_taken_anew(tmp_path, monkeypatch):
    """Opened while another held it, locked after that one has taken the file away: the next one makes a new file."""
    flock, first = directory.fcntl.flock, []

    def late(descriptor, how):
        if not first:
            first.append(descriptor)
            (tmp_path / "lock").unlink()
        flock(descriptor, how)

    monkeypatch.setattr(directory.fcntl, "flock", late)
    with (
        directory.lock(tmp_path, say=silent),
        pytest.raises(UsageError, match="in use"),
        directory.lock(tmp_path, say=silent),
    ):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch):
    def unsupported(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(directory.fcntl, "flock", unsupported)
    said = []
    with directory.lock(tmp_path, say=said.append):
        pass
    assert said == [
        f"note: {tmp_path} cannot be locked (Operation not supported): see to it that nobody else works in it"
    ]
    directory.refuse_if_in_use(tmp_path)


@pytest.mark.parametrize(
    "path", ["gs://bucket/run", "gs:/bucket/run", "s3://bucket", "file:///tmp/run", "hdfs://host:1/x", "~/run", "~"]
)
def test_what_is_no_folder_of_this_machine_is_refused(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    calls = [lambda: directory.folder(path, "--output", store=False)]
    if path != "gs://bucket/run":  # where runs may be
        calls += [
            lambda: directory.folder(path, "--output"),
            lambda: directory.claim_file(path, "config.json", {}, flag="--output"),
            lambda: directory.lock(path, say=silent, flag="--output").__enter__(),
        ]
    for call in calls:
        with pytest.raises(UsageError, match=rf"^--output={path}.*(is an address|does not replace ~)"):
            call()
    assert list(tmp_path.iterdir()) == []


def test_ordinary_names_are_folders():
    for path in ("runs/a:b", "a=b~", "C:", "/tmp/x", "runs/gs:/x", "x"):
        assert str(directory.folder(path)) == path
