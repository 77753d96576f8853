"""Data sets as other libraries leave them on a disk, in memory and streamed."""

import pathlib

import numpy as np
import pytest

from r2vpo_jax import data
from r2vpo_jax.data import prepared
from tests.data.test_datasets_gsm8k import prepare

HERE = pathlib.Path(__file__).parent
GSM8K = "answer_style=hash&kind=numeric"


def test_what_save_to_disk_of_datasets_5_wrote():
    """saved_by_datasets/: 9 and 3 rows, `DatasetDict.save_to_disk(num_shards={"train": 2, "test": 1})`, datasets 5.2.0."""
    for how in ("", "?stream=true", "?question=prompt.user.content&stream=true"):
        train, test = (data.load(f"saved_by_datasets/{how}", split, HERE, ("level",)) for split in ("train", "test"))
        assert [example.answer for example in train.examples()] == [str(2 * i) for i in range(9)]
        assert [example.question for example in test.examples()] == [f"What is {i} + {i}?" for i in range(9, 12)]
        assert train.example(3).columns == {"level": int(train.example(3).answer) // 2 % 3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """DATA_DIR with GSM8K as the real tensorflow_datasets prepares it."""
    folder = tmp_path_factory.mktemp("tfds")
    prepare(folder)
    return folder


def test_a_prepared_data_set_is_found_by_name_and_by_path_and_streamed(folder):
    named = data.load("gsm8k", "train", folder)
    paths = ("gsm8k/", "gsm8k/1.0.0", f"{folder}/gsm8k/1.0.0")
    others = [data.load(f"{path}?{GSM8K}{how}", "train", folder) for path in paths for how in ("", "&stream=true")]
    others.append(data.load("gsm8k?stream=true", "train", folder))
    for other in others:
        assert other.digest == named.digest
        assert [other.example(i).question for i in range(30)] == [named.example(i).question for i in range(30)]
    assert data.load(f"gsm8k/?{GSM8K}&split=train&rows=20:", "validation", folder).num_examples == 4
    with pytest.raises(ValueError, match="has no split 'validation' but train, test"):
        data.load(f"gsm8k/?{GSM8K}", "validation", folder)
    assert prepared.find(HERE / "saved_by_datasets") is None


def test_rows_are_those_of_the_data_source_that_grain_wraps(folder):
    tfds = pytest.importorskip("tensorflow_datasets")
    from array_record.python.array_record_data_source import ArrayRecordDataSource

    path = prepared.find(folder / "gsm8k")
    raw = ArrayRecordDataSource(sorted(str(file) for file in pathlib.Path(path).glob("*train.array_record*")))
    features = tfds.builder_from_directory(path).info.features
    there = [features.deserialize_example_np(raw[i])["question"].decode() for i in range(len(raw))]
    assert [row["question"] for _, _, row in prepared.Records(path, "train").rows()] == there


def test_features_of_several_fields_are_plain_values(tmp_path):
    tfds = pytest.importorskip("tensorflow_datasets")

    with tfds.core.registered.skip_registration():

        class Chats(tfds.core.GeneratorBasedBuilder):
            VERSION = tfds.core.Version("2.0.0")
            url_infos = None

            def _info(self):
                message = {"role": tfds.features.Text(), "content": tfds.features.Text()}
                features = {
                    "prompt": tfds.features.Sequence(message),
                    "reward_model": {"ground_truth": np.int64},
                    "tags": tfds.features.Sequence(tfds.features.Text()),
                }
                return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

            def _split_generators(self, dl_manager):
                return {"train": self._generate_examples()}

            def _generate_examples(self):
                for i in range(3):
                    prompt = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": f"{i} + 1?"}]
                    yield i, {"prompt": prompt, "reward_model": {"ground_truth": i + 1}, "tags": ["a", "b"]}

    Chats(data_dir=tmp_path, file_format="array_record").download_and_prepare()
    read = data.load("chats/?question=prompt.content.1&kind=numeric", "train", tmp_path, ("tags",))
    assert sorted((example.question, example.answer) for example in read.examples()) == [
        (f"{i} + 1?", str(i + 1)) for i in range(3)
    ]
    assert read.example(0).columns == {"tags": ["a", "b"]}
