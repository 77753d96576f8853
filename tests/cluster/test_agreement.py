"""What processes have in common, told through the store: one process at a time, with the others' answers there already."""

import json

import pytest

from r2vpo_jax.cluster import agreement
from r2vpo_jax.errors import ClusterError, UsageError
from tests.cluster.test_watch import Store


@pytest.fixture
def store(monkeypatch):
    """Of a run of three, where this is process 1."""
    store = Store()
    monkeypatch.setattr(agreement, "Store", lambda: store)
    monkeypatch.setattr(agreement, "processes", lambda: (1, 3))
    monkeypatch.setattr(agreement, "_counts", {})
    return store


def answer(store, question, number=1, **facts):
    for process, value in facts.items():
        store.set(f"{question}/{number}/{process.removeprefix('p')}", json.dumps(value))


def test_the_same(store):
    for number in (1, 2):
        answer(store, "data", number, p0={"train": "a"}, p2={"train": "a"})
        agreement.agree("data", {"train": "a"})


def test_a_difference_names_fields_and_processes(store):
    answer(store, "weights", p0={"weights": "a"}, p2={"weights": "b"})
    with pytest.raises(UsageError) as error:
        agreement.agree("weights", {"weights": "a"}, how="read other files", advice="copy them")
    assert (
        str(error.value)
        == "the processes of this run read other files (weights: a on process 0, b on process 2); copy them"
    )


def test_who_does_not_answer_is_named(store):
    answer(store, "data", p0={})
    with pytest.raises(ClusterError, match="process 2 did not say for 0 s what data it has"):
        agreement.agree("data", {}, timeout=0.2)


def test_what_process_0_says_counts(store):
    answer(store, "finished", p0=True)
    assert agreement.of_first("finished", False) is True


def test_a_process_that_is_alone_does_not_ask(monkeypatch):
    agreement.agree("data", {})
    agreement.agree_on_folder("nowhere")
    assert agreement.of_first("finished", 3) == 3


def as_process(monkeypatch, number, total=2):
    monkeypatch.setattr(agreement, "processes", lambda: (number, total))
    monkeypatch.setattr(agreement, "_counts", {})


@pytest.mark.parametrize("seen", [True, False])
def test_a_folder(store, monkeypatch, tmp_path, seen):
    workdir = tmp_path / "run"
    as_process(monkeypatch, 0)
    store.set("run directory/1/1", "seen" if seen else "not seen")
    if seen:
        agreement.agree_on_folder(workdir)
    else:
        with pytest.raises(UsageError, match="is not the same folder on all hosts: process 1 did not see"):
            agreement.agree_on_folder(workdir)
    assert list(workdir.iterdir()) == [], "the token is gone"

    as_process(monkeypatch, 1)
    if seen:
        (workdir / store.values["run directory/1/0"]).touch()
        agreement.agree_on_folder(workdir)
    else:
        with pytest.raises(UsageError, match="process 1 did not see within 0 s"):
            agreement.agree_on_folder(tmp_path / "elsewhere", timeout=0.1)
    assert store.values["run directory/1/1"] == ("seen" if seen else "not seen")
