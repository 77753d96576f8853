"""GSM8K from local copies, and as tensorflow_datasets prepares it, without TensorFlow."""

import json
import pathlib
import shutil
import subprocess
import sys

import pytest

from r2vpo_jax import data

FIXTURES = pathlib.Path(__file__).parent / "fixtures"
# The answer of problem i of the fixtures is (3 + i % 7) * (250 + 11 * i); 24 of train, then 8 of test.
GOLDS = [str((3 + i % 7) * (250 + 11 * i)) for i in range(32)]


@pytest.fixture
def data_dir(tmp_path):
    shutil.copytree(FIXTURES / "gsm8k", tmp_path / "gsm8k")
    return tmp_path


def prepare(folder):
    """As `download_and_prepare` of tensorflow_datasets leaves GSM8K in `folder`, from the rows of the fixtures."""
    tfds = pytest.importorskip("tensorflow_datasets")
    rows = {
        split: [json.loads(line) for line in (FIXTURES / "gsm8k" / f"{split}.jsonl").read_text().splitlines()]
        for split in ("train", "test")
    }

    with tfds.core.registered.skip_registration():

        class Prepared(tfds.core.GeneratorBasedBuilder):
            name = "gsm8k"
            VERSION = tfds.core.Version("1.0.0")
            url_infos = None  # looking for them needs a package that does not come with tfds

            def _info(self):
                texts = {name: tfds.features.Text() for name in ("question", "answer", "annotation", "short_answer")}
                return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(texts))

            def _split_generators(self, dl_manager):
                return {split: self._generate_examples(split) for split in rows}

            def _generate_examples(self, split):
                for key, row in enumerate(rows[split]):
                    annotation, _, short_answer = row["answer"].rpartition("####")
                    yield key, row | {"annotation": annotation, "short_answer": short_answer.strip()}

    builder = Prepared(data_dir=folder, file_format="array_record")
    builder.download_and_prepare()
    return pathlib.Path(builder.data_dir)


def test_a_local_copy_is_read_in_its_order(data_dir):
    for split, golds in (("train", GOLDS[:24]), ("test", GOLDS[24:])):
        dataset = data.load("gsm8k", split, data_dir)
        examples = list(dataset.examples())
        assert [e.gold for e in examples] == golds
        assert dataset.counts == {"rows": len(golds)}
        assert (examples[0].kind, examples[0].source, examples[0].level) == ("numeric", "gsm8k", "")
    assert sorted(p.name for p in (data_dir / "gsm8k").iterdir()) == ["test.jsonl", "train.jsonl"]


def test_bad_rows_are_named(data_dir):
    path = data_dir / "gsm8k" / "test.jsonl"
    path.write_text(path.read_text() + json.dumps({"question": "1 + 1?", "answer": "2"}) + "\n")
    with pytest.raises(ValueError, match=r"test\.jsonl, row 9 has no answer after its last ####"):
        data.load("gsm8k", "test", data_dir)
    assert data.load("gsm8k", "train", data_dir).num_examples == 24


def test_prepared_data_are_read_without_tensorflow(tmp_path):
    prepare(tmp_path)
    code = f"""
import sys
from r2vpo_jax import data
for split in ("train", "test"):
    print(*(example.gold for example in data.load("gsm8k", split, {str(tmp_path)!r}).examples()))
print([name for name in ("tensorflow", "jax") if name in sys.modules], "array_record" in sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=FIXTURES.parents[2], capture_output=True, text=True, check=True
    )
    train, test, imported = done.stdout.strip().splitlines()
    assert imported == "[] True"
    # tensorflow_datasets shuffles, so that the order is not that of the files.
    assert sorted(train.split()) == sorted(GOLDS[:24])
    assert sorted(test.split()) == sorted(GOLDS[24:])


def test_prepared_data_go_before_files_and_have_their_own_splits(data_dir):
    assert prepare(data_dir) == data_dir / "gsm8k" / "1.0.0"
    for name in ("train.jsonl", "test.jsonl"):
        (data_dir / "gsm8k" / name).write_text("")
    assert data.load("gsm8k?split=train&rows=20:", "validation", data_dir).num_examples == 4
    with pytest.raises(ValueError, match=r"has no split 'validation' but train, test; a part of another can stand in"):
        data.load("gsm8k", "validation", data_dir)


def test_prepared_data_that_cannot_be_read_are_refused(tmp_path, monkeypatch):
    info = prepare(tmp_path) / "dataset_info.json"
    stated = json.loads(info.read_text())
    info.write_text(json.dumps(stated | {"fileFormat": "tfrecord"}))
    with pytest.raises(ValueError, match=r"files of format tfrecord, which need TensorFlow; prepare it again"):
        data.load("gsm8k", "train", tmp_path)
    info.write_text(json.dumps(stated))
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(ValueError, match=r"needs tensorflow-datasets and array_record: pip install"):
        data.load("gsm8k", "train", tmp_path)


def test_what_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"put it into .*gsm8k\.jsonl"):
        data.load("gsm8k", "train", tmp_path)
    with pytest.raises(ValueError, match="needs a data folder"):
        data.load("gsm8k", "train")


def test_parquet_copies_and_folders_of_published_layout(tmp_path):
    import pyarrow
    from pyarrow import parquet

    folder = tmp_path / "gsm8k" / "main"
    folder.mkdir(parents=True)
    for split in ("train", "test"):
        table = pyarrow.Table.from_pylist([{"question": f"{split} 2 + 2?", "answer": "#### 4"}])
        parquet.write_table(table, folder / f"{split}-00000-of-00001.parquet")
    assert data.load("gsm8k", "test", tmp_path).example(0).question == "test 2 + 2?"
