"""Who works in a directory of a store."""

import json
import os
import signal
import subprocess
import sys
import threading

import pytest

from r2vpo_jax import storage
from r2vpo_jax.errors import UsageError
from r2vpo_jax.run import directory, lease
from tests.helpers.paths import ROOT

HOLDER = """
import sys, time
from r2vpo_jax.run import directory
with directory.lock(sys.argv[1], say=print):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def fast(monkeypatch):
    """Seconds become hundredths."""
    for name in ("BEAT_SECONDS", "EXPIRES_SECONDS", "_POLL_SECONDS"):
        monkeypatch.setattr(lease, name, getattr(lease, name) / 50)


def silent(_):
    raise AssertionError("nothing is to be said")


def content(store):
    (name,) = storage.sizes(store / "lease")
    return name, json.loads((store / "lease" / name).read_bytes())


def rewrite(store, **changes):
    name, now = content(store)
    storage.put(store / "lease" / name, json.dumps(now | changes).encode())


def test_two_cannot_work_in_one_directory_and_it_is_given_back(store, fast):
    directory.refuse_if_in_use(store)
    with directory.lock(store, say=silent) as check:
        check()
        assert content(store)[0] == "00001.json"
        said = []
        message = rf"is in use by process {os.getpid()} on .* since .*; wait until that has ended, stop it, or choose"
        with pytest.raises(UsageError, match=message), directory.lock(store, say=said.append):
            pass
        assert "it can be taken over in" in said[0]
        with pytest.raises(UsageError, match=message):
            directory.refuse_if_in_use(store)
    assert storage.sizes(store / "lease") == {}
    with directory.lock(store, say=silent):
        pass


def test_of_many_who_ask_at_once_one_is_first(store, monkeypatch):
    """All have seen that nobody is there, and then make the file."""
    together, create, first = threading.Barrier(4), storage.create, []

    def at_once(*args):
        together.wait(30)
        return create(*args)

    monkeypatch.setattr(storage, "create", at_once)
    held = []

    def ask():
        try:
            held.append(lease.take(store, "--workdir", silent))
        except UsageError as error:
            first.append(str(error))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(held), len(first)) == (1, 3)
    assert all("is in use by process" in message for message in first)
    held[0].close()


def test_a_process_of_this_machine_that_was_killed_holds_nothing(store):
    command = [sys.executable, "-c", HOLDER, str(store)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, env=os.environ)
    try:
        assert process.stdout.readline() == b"held\n"
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    directory.refuse_if_in_use(store)
    with directory.lock(store, say=silent) as check:
        check()
        assert content(store)[0] == "00002.json", "the dead one's is gone"


def test_one_of_another_machine_is_waited_out(store, fast):
    held = lease.take(store, "--workdir", silent)
    held._given_back.set()  # no more renewals, as if it were dead or had no network
    held._thread.join()
    rewrite(store, machine="another", host="there")
    said = []
    with directory.lock(store, say=said.append):
        assert content(store)[0] == "00002.json"
    assert said[0].startswith(f"{store} was in use by process {os.getpid()} on there since ")
    assert "it can be taken over in" in said[0]


def test_who_was_taken_over_finds_out(store, fast):
    with directory.lock(store, say=silent) as check:
        storage.create(store / "lease" / "00002.json", (store / "lease" / "00001.json").read_bytes())
        lease_thread = next(thread for thread in threading.enumerate() if thread.name == "lease")
        lease_thread.join(30)
        with pytest.raises(UsageError, match="was taken over by another process while this one could not renew"):
            check()
    assert "00002.json" in storage.sizes(store / "lease"), "what is another's stays"


def test_a_store_that_is_out_of_reach_for_a_while_loses_nothing(store, fast, monkeypatch):
    put, failed = storage.put, threading.Event()

    def fail(*args):
        if not failed.is_set():
            failed.set()
            raise OSError("no route to host")
        put(*args)

    monkeypatch.setattr(storage, "put", fail)
    with directory.lock(store, say=silent) as check:
        assert failed.wait(30)
        before = content(store)[1]["beat"]
        with pytest.raises(UsageError, match="in use"):
            directory.refuse_if_in_use(store)
        assert content(store)[1]["beat"] > before
        check()
