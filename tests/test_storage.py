"""Files on a disk and in a store: the same to callers."""

import pathlib

import pytest

from r2vpo_jax import data, storage
from r2vpo_jax.errors import UsageError
from r2vpo_jax.evaluation import model_source
from r2vpo_jax.models.base import open_base_model
from tests.helpers.paths import TINY_BASE


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Where copies are kept."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "r2vpo_jax"


def upload(folder, to):
    for file in storage.listing(folder):
        storage.put(to / file, (folder / file).read_bytes())


def test_what_is_no_address_is_a_path_of_the_disk():
    for name in ("runs/a:b", "C:", "/tmp/x", "runs/gs:/x", pathlib.Path("x")):
        assert not storage.is_address(name)
        assert storage.path(name) == pathlib.Path(name)
        assert type(storage.path(name)) is type(pathlib.Path())
        assert not storage.is_store(storage.path(name))


def test_an_address_that_cannot_be_used_is_refused(monkeypatch):
    for name, message in {
        "gs:/bucket/run": r"^--x=gs:/bucket/run is an address, and only folders of this machine or gs://BUCKET/NAME",
        "hdfs://host:1/x": r"^--x=hdfs://host:1/x is an address",
        "~/run": r"^--x=~/run: the shell does not replace ~ there",
    }.items():
        with pytest.raises(UsageError, match=message):
            storage.path(name, "--x")


def test_a_store_whose_library_is_absent_says_what_to_install(monkeypatch):
    import fsspec

    def absent(_):
        raise ImportError("Please install gcsfs to access Google Storage")

    monkeypatch.setattr(fsspec, "filesystem", absent)
    storage._file_system.cache_clear()
    try:
        with pytest.raises(UsageError, match=r"^--x=gs://b/x: gs:// needs .* pip install 'r2vpo_jax\[gcs\]'"):
            storage.path("gs://b/x", "--x")
    finally:
        storage._file_system.cache_clear()


def test_a_bucket_that_is_not_there_is_said_with_the_rights_that_it_takes(bucket):
    for name, there in {"gs://no-such-bucket/run": False, f"{bucket}/run": True}.items():
        path = storage.path(name, "--workdir")
        if there:
            storage.check(path, "--workdir")
        else:
            with pytest.raises(UsageError, match=r"no bucket no-such-bucket.*storage\.legacyBucketReader"):
                storage.check(path, "--workdir")


def test_files_are_written_read_and_listed(store):
    storage.put(store / "a", b"first")
    storage.put(store / "a", b"second")
    assert not storage.create(store / "a", b"third")
    assert storage.create(store / "folder" / "b", b"third")
    assert storage.read_all([store / "a", store / "folder" / "b"]) == [b"second", b"third"]
    assert storage.sizes(store) == {"a": 6}
    assert (storage.size(store / "a"), storage.size(store / "c")) == (6, 0)
    assert storage.sizes(store / "nothing") == {} == storage.listing(store / "nothing")
    assert (store / "folder").is_dir()
    assert not (store / "fold").exists()
    assert list(storage.listing(store)) == ["a", "folder/b"]


def test_a_checksum_is_what_the_store_keeps_or_what_the_contents_give(store, tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    storage.put(store / "a", b"abc")
    kept = storage.listing(store)["a"]
    assert kept == "md5:900150983cd24fb0d6963f7d28e17f72" == storage.checksum(store / "a", kept)
    sha256 = storage.checksum(tmp_path / "a")
    assert sha256.startswith("ba7816bf8f01cfea")
    assert storage.listing(tmp_path) == {"a": None}
    # Of the kind that was written down, wherever the file has gone since.
    assert storage.checksum(store / "a", kept, like=sha256) == sha256
    assert storage.checksum(tmp_path / "a", None, like=kept) == kept


def test_a_copy_is_fetched_once_and_again_when_the_store_has_another(store, cache, monkeypatch):
    file = store / "folder" / "my.jsonl"
    storage.put(file, b"1")
    storage.put(store / "folder" / "deep" / "b.json", b"2")
    storage.put(store / "folder" / "pytorch_model.bin", b"3")
    first = storage.local_copy(file)
    assert (first.name, first.read_bytes()) == ("my.jsonl", b"1")
    folder = storage.local_copy(store / "folder", ("*.json", "*.jsonl"))
    assert list(storage.listing(folder)) == ["deep/b.json", "my.jsonl"]
    with monkeypatch.context() as patch:
        patch.setattr(type(storage._file_system("gs")), "get_file", None)  # nothing is fetched
        assert storage.local_copy(file) == first
    storage.put(file, b"4")
    again = storage.local_copy(file)
    assert (first.read_bytes(), again.read_bytes()) == (b"1", b"4")
    assert not list(cache.glob("part.*"))
    with pytest.raises(FileNotFoundError, match="there is nothing at gs://"):
        storage.local_copy(store / "nothing")
    assert storage.local_copy(pathlib.Path("here")) == pathlib.Path("here")


def test_a_staged_folder_takes_the_place_of_what_was_there(store, tmp_path):
    with storage.staged(tmp_path, last="config.json") as folder:
        assert folder == tmp_path
    for names in (("a", "config.json", "z"), ("config.json", "z", "deep/b")):
        with storage.staged(store, last="config.json") as folder:
            for name in names:
                (folder / name).parent.mkdir(exist_ok=True)
                (folder / name).write_text(name)
        assert not folder.exists()
        assert list(storage.listing(store)) == sorted(names)

    def fail():
        with storage.staged(store, last="config.json") as folder:
            (folder / "half").write_text("")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert "half" not in storage.listing(store)


def test_a_base_model_in_a_store_is_the_one_on_the_disk(store, cache, tiny_config):
    upload(TINY_BASE, store / "tiny")
    there, here = (
        open_base_model(tiny_config(model={"path": str(path)}).model) for path in (store / "tiny", TINY_BASE)
    )
    assert there.identity() == here.identity()
    assert there.eos_ids == here.eos_ids
    assert model_source.find(str(store / "tiny")).directory == store / "tiny"
    with pytest.raises(UsageError, match="cannot load the base model: there is nothing at gs://"):
        open_base_model(tiny_config(model={"path": str(store / "no")}).model)


def test_data_in_a_store_are_those_on_the_disk(store, cache, tmp_path):
    rows = b'{"question": "1+1", "answer": "2"}\n{"question": "1+2", "answer": "3"}\n'
    for name in ("mine.jsonl", "set/train.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(rows)
        storage.put(store / name, rows)
    loaded = [
        data.load(f"{tmp_path}/mine.jsonl", "train"),
        data.load(f"{store}/mine.jsonl", "train"),
        data.load("./mine.jsonl", "train", str(store)),
        data.load(f"{store}/set?rows=:2", "train"),
    ]
    assert len({dataset.digest for dataset in loaded[:3]}) == 1
    assert [dataset.num_examples for dataset in loaded] == [2] * 4
    with pytest.raises(FileNotFoundError, match="there is no gs://"):
        data.load(f"{store}/none.jsonl", "train")
