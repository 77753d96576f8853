"""A text task whose training data stay in their file: prompts, gold answers and digests are those of memory."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from r2vpo_jax import tasks
from r2vpo_jax.config.fields import build
from r2vpo_jax.config.task import TaskConfig
from r2vpo_jax.tasks import text
from tests.helpers.tokenizers import byte_tokenizer


def row(i, **more):
    return {"question": f"What is {i} + {i}?" + " please" * (i % 5), "answer": f"\\frac{{{2 * i}}}{{1}}", **more}


@pytest.fixture
def make(tmp_path):
    """Makes the task; the key `how` is added to the text of its training data."""
    bad = [row(7, question="Is this right?", answer="}{")]
    rows = [*map(row, range(40)), *bad, row(3), row(100)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "train.parquet", row_group_size=6)
    for split, first in (("validation", 100), ("test", 200)):
        lines = (json.dumps(row(i)) + "\n" for i in range(first, first + 3))
        (tmp_path / f"{split}.jsonl").write_text("".join(lines))
    made = []

    def make(how="", bad_gold="drop"):
        sections = {
            "text": {"data_dir": str(tmp_path), "max_response_length": 8, "train": f"train.parquet?kind=math{how}"}
            | {split: f"{split}.jsonl" for split in ("validation", "test")},
            "prompt": {"template": "plain", "max_length": 36},
            "verifier": {"num_workers": 1, "time_limit": 20.0, "bad_gold": bad_gold},
        }
        made.append(tasks.make(build(TaskConfig, {"name": "text"} | sections), byte_tokenizer(), (257,)))
        return made[-1]

    yield make
    for task in made:
        task.close()


def test_all_that_is_checked_at_the_start_finds_the_same(make, monkeypatch):
    here = make()
    monkeypatch.setattr(text, "_JUDGED_AT_ONCE", 7)
    streamed = make("&stream=true")
    assert streamed.digest == here.digest
    assert streamed.notices == here.notices
    for reason in ("duplicates 1", "too long", "also in validation or test 1", "gold answer not verifiable 1"):
        assert any(reason in notice for notice in here.notices), reason
    positions = np.arange(2 * here.num_problems("train"))
    one, other = (task.problems("train", positions) for task in (here, streamed))
    np.testing.assert_array_equal(one.tokens, other.tokens)
    assert list(here.level("train", positions)) == list(streamed.level("train", positions))
    with pytest.raises(
        ValueError, match="1 of .* gold answers of task.text.train do not verify .* first '}{' of the question 'Is"
    ):
        make("&stream=true", bad_gold="refuse")
