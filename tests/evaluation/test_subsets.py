"""Which problems are scored where not all are: each source's share, whatever the order, always the same."""

import collections
import json

import numpy as np
import pytest

from r2vpo_jax import tasks
from r2vpo_jax.config.fields import build
from r2vpo_jax.config.task import TaskConfig
from r2vpo_jax.evaluation import subsets
from r2vpo_jax.evaluation.subsets import positions
from tests.helpers.tokenizers import byte_tokenizer


@pytest.mark.parametrize(("available", "number"), [(200, 100), (7, 3), (1000, 1), (1319, 512), (2**40, 50), (5, 4)])
def test_one_of_each_stretch(available, number):
    found = positions(available, number)
    assert found.dtype == np.int64
    assert len(set(found.tolist())) == number
    assert np.all(np.diff(found) > 0)
    stretches = [range(i * available // number, (i + 1) * available // number) for i in range(number)]
    assert all(position in stretch for position, stretch in zip(found.tolist(), stretches, strict=True))
    np.testing.assert_array_equal(found, positions(available, number))


def test_all_where_there_are_no_more_and_the_first_of_an_endless_split():
    for available, number in ((5, 5), (5, 9), (None, 4)):
        assert positions(available, number).tolist() == list(range(number if available is None else available))


def test_shares_of_sources_and_of_sorted_and_periodic_files():
    """Two sources one after the other, subjects one after the other, and a file whose rows take turns."""
    found = positions(300, 60)
    assert np.histogram(found, [0, 150, 300])[0].tolist() == [30, 30]
    assert np.histogram(found, [0, 30, 100, 290, 300])[0].tolist() == [6, 14, 38, 2]
    assert 20 < (positions(200, 100) % 2).sum() < 80
    assert positions(300, 61).tolist() != found.tolist()


@pytest.fixture
def make(tmp_path):
    """A task whose test split is the problems of files with these numbers of rows."""
    made = []

    def write(name, numbers):
        rows = [{"question": f"What is {i} + {i}?", "answer": str(2 * i)} for i in numbers]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return f"{name}.jsonl"

    def make(**sizes):
        starts = {name: 1000 * (i + 1) for i, name in enumerate(sizes)}
        test = " + ".join(write(name, range(starts[name], starts[name] + size)) for name, size in sizes.items())
        text = {"data_dir": str(tmp_path), "train": "t.jsonl", "validation": "t.jsonl", "test": test}
        write("t", range(3))
        config = build(TaskConfig, {"name": "text", "text": text, "prompt": {"template": "plain"}})
        made.append(tasks.make(config, byte_tokenizer(), (257,), splits=("test",)))
        return made[-1]

    yield make
    for task in made:
        task.close()


def test_the_sample_is_said_with_the_shares_of_sources(make):
    task = make(a=40, b=20)
    (said,) = subsets.notices(task, "test", 30)
    assert said == "test: scored on a fixed sample of 30 of 60 problems, the same for all runs (a 20, b 10)"
    index = subsets.choose(task, "test", 30)
    assert collections.Counter(level.partition(" ")[0] for level in task.level("test", index)) == {"a": 20, "b": 10}
    assert subsets.notices(task, "test", 60) == []
    assert len(subsets.notices(make(a=40), "test", 30)) == 1
    (_, warning) = subsets.notices(make(a=200, b=1), "test", 2)
    assert warning == "warning: no problem of b is scored in test; score more problems"
