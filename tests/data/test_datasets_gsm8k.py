"""GSM8K as array_record files, made and read without TensorFlow."""

import json
import pathlib
import shutil
import subprocess
import sys

import pytest

from r2vpo_jax import data
from r2vpo_jax.data import gsm8k

pytest.importorskip("tensorflow_datasets")

FIXTURES = pathlib.Path(__file__).parent / "fixtures"


@pytest.fixture
def data_dir(tmp_path):
    shutil.copytree(FIXTURES / "gsm8k", tmp_path / "gsm8k")
    return tmp_path


def stored(data_dir):
    return sorted(p.name for p in (data_dir / "gsm8k" / "1.0.0").iterdir())


def test_made_of_a_local_copy_in_its_order_and_read_again(data_dir):
    code = f"""
import sys
from r2vpo_jax import data
dataset = data.load("gsm8k", "train", {str(data_dir)!r})
print(dataset.example(5).question)
print([name for name in ("tensorflow", "jax") if name in sys.modules], "array_record" in sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=FIXTURES.parents[2], capture_output=True, text=True, check=True
    )
    question, imported = done.stdout.strip().splitlines()
    assert imported == "[] True"
    assert sum(name.count("array_record-00000-of-00001") for name in stored(data_dir)) == 2
    for split, start, size in (("train", 0, 24), ("test", 24, 8)):
        dataset = data.load("gsm8k", split, data_dir)
        examples = list(dataset.examples())
        # The answer of problem i is (3 + i % 7) * (250 + 11 * i).
        assert [e.gold for e in examples] == [str((3 + i % 7) * (250 + 11 * i)) for i in range(start, start + size)]
        assert dataset.counts == {"rows": size}
        assert (examples[0].kind, examples[0].source, examples[0].level) == ("numeric", "gsm8k", "")
    assert data.load("gsm8k", "train", data_dir).example(5).question == question
    shutil.rmtree(data_dir / "gsm8k" / "1.0.0")
    assert not list((data_dir / "gsm8k").glob(".building*"))


def test_the_prepared_data_are_enough(data_dir):
    examples = list(data.load("gsm8k?split=train&rows=20:", "validation", data_dir).examples())
    for name in ("train.jsonl", "test.jsonl"):
        (data_dir / "gsm8k" / name).unlink()
    assert list(data.load("gsm8k?split=train&rows=20:", "validation", data_dir).examples()) == examples
    assert len(examples) == 4
    with pytest.raises(ValueError, match=r"has no split 'validation' but train, test; a part of another can stand in"):
        data.load("gsm8k", "validation", data_dir)


def test_a_changed_copy_is_made_again(data_dir):
    assert data.load("gsm8k", "test", data_dir).num_examples == 8
    path = data_dir / "gsm8k" / "test.jsonl"
    path.write_text(path.read_text() + json.dumps({"question": "1 + 1?", "answer": "#### 2"}) + "\n")
    assert [e.gold for e in data.load("gsm8k", "test", data_dir).examples()][8:] == ["2"]
    made = json.loads((data_dir / "gsm8k" / "1.0.0" / "made_of.json").read_text())
    before = (data_dir / "gsm8k" / "1.0.0").stat().st_ino
    assert data.load("gsm8k", "test", data_dir).num_examples == 9
    assert (data_dir / "gsm8k" / "1.0.0").stat().st_ino == before
    assert sorted(made) == ["test", "train"]


def test_bad_rows_are_named(data_dir):
    path = data_dir / "gsm8k" / "test.jsonl"
    path.write_text(path.read_text() + json.dumps({"question": "1 + 1?", "answer": "2"}) + "\n")
    with pytest.raises(ValueError, match=r"test\.jsonl, row 9 has no answer after its last ####"):
        data.load("gsm8k", "test", data_dir)
    assert data.load("gsm8k", "train", data_dir).num_examples == 24


def test_without_the_packages_rows_are_read_as_they_are(data_dir, monkeypatch):
    expected = list(data.load("gsm8k", "train", data_dir).examples())
    shutil.rmtree(data_dir / "gsm8k" / "1.0.0")
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    gsm8k._builder_class.cache_clear()
    assert list(data.load("gsm8k", "train", data_dir).examples()) == expected
    assert not (data_dir / "gsm8k" / "1.0.0").exists()
    assert [p.name for p in (data_dir / "gsm8k").iterdir() if p.name.startswith(".")] == []


def test_prepared_data_that_need_tensorflow_are_refused(data_dir):
    data.load("gsm8k", "train", data_dir)
    info = data_dir / "gsm8k" / "1.0.0" / "dataset_info.json"
    for split in ("train", "test"):
        (data_dir / "gsm8k" / f"{split}.jsonl").unlink()
    info.write_text(json.dumps(json.loads(info.read_text()) | {"fileFormat": "tfrecord"}))
    with pytest.raises(ValueError, match=r"files of format tfrecord, which need TensorFlow; prepare it again"):
        data.load("gsm8k", "train", data_dir)


def test_what_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"put it into .*gsm8k\.jsonl"):
        data.load("gsm8k", "train", tmp_path)
    with pytest.raises(ValueError, match="needs a data folder"):
        data.load("gsm8k", "train")


def test_parquet_copies_and_folders_of_published_layout(tmp_path):
    import pyarrow
    import pyarrow.parquet

    folder = tmp_path / "gsm8k" / "main"
    folder.mkdir(parents=True)
    for split in ("train", "test"):
        table = pyarrow.Table.from_pylist([{"question": f"{split} 2 + 2?", "answer": "#### 4"}])
        pyarrow.parquet.write_table(table, folder / f"{split}-00000-of-00001.parquet")
    assert data.load("gsm8k", "test", tmp_path).example(0).question == "test 2 + 2?"
    assert (tmp_path / "gsm8k" / "1.0.0").is_dir()
