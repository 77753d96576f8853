"""GSM8K as a tensorflow_datasets data set of array_record files: random access, without TensorFlow.

`DATA_DIR/gsm8k/1.0.0` is used if it was prepared, by `download_and_prepare` with file_format="array_record" or by
`build` below, which makes it of a local copy of the rows, in their order, and needs no network. What `build` made is
made again when the local copy has changed.
"""

import contextlib
import functools
import hashlib
import io
import json
import pathlib
import shutil
import tempfile
from collections.abc import Iterator

from r2vpo_jax.data import files

_MARK = "made_of.json"
_INSTALL = "pip install 'r2vpo_jax[reasoning]'"


def prepared(folder: pathlib.Path) -> pathlib.Path | None:
    """The prepared data set in DATA_DIR/gsm8k, its newest version."""
    found = sorted(path.parent for path in folder.glob("*/dataset_info.json"))
    return found[-1] if found else None


def read_prepared(path: pathlib.Path, split: str) -> Iterator[tuple[int, dict]]:
    """(number, row) of a split of a prepared data set.

    Raises:
      ValueError: files that cannot be read without TensorFlow, or no such split.
    """
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise ValueError(f"{path} needs tensorflow-datasets and array_record: {_INSTALL} ({error})") from error
    info = json.loads((path / "dataset_info.json").read_text())
    if info.get("fileFormat") != "array_record":
        raise ValueError(
            f"{path} has files of format {info.get('fileFormat', 'tfrecord')}, which need TensorFlow; prepare it again "
            'with file_format="array_record"'
        )
    builder = tfds.builder_from_directory(path)
    if split not in builder.info.splits:
        raise ValueError(
            f"{path} has no split {split!r} but {', '.join(builder.info.splits)}; a part of another can stand in: "
            "gsm8k?split=train&rows=:500"
        )
    source = builder.as_data_source(split=split)
    for number in range(len(source)):
        row = source[number]
        yield number + 1, {key: value.decode() if isinstance(value, bytes) else value for key, value in row.items()}


def local_files(folder: pathlib.Path) -> dict[str, list[pathlib.Path]]:
    """The files of a local copy by split; {} if there is none."""
    found = {split: files.split_files(folder, split) for split in ("train", "test")}
    return {split: paths for split, paths in found.items() if paths}


def current(folder: pathlib.Path) -> pathlib.Path | None:
    """The prepared data set, made or made again of the local copy where needed. None: there is neither.

    Raises:
      ValueError: rows of the local copy that are not GSM8K's.
      OSError: the folder cannot be written.
    """
    path, copy = prepared(folder), local_files(folder)
    if path is not None and (not (path / _MARK).exists() or not copy):
        return path
    if not copy:
        return None
    made_of = {split: [_sha256(file) for file in paths] for split, paths in copy.items()}
    if path is not None and _is_made_of(path, made_of):
        return path
    return build(folder, copy, made_of)


def build(folder: pathlib.Path, copy: dict[str, list[pathlib.Path]], made_of: dict) -> pathlib.Path:
    """Makes the data set of a local copy: elsewhere first, so that no other process sees half of it."""
    _check_rows(copy)
    scratch = pathlib.Path(tempfile.mkdtemp(prefix=".building-", dir=folder))
    try:
        builder = _builder_class()(data_dir=scratch, file_format="array_record", copy=copy)
        with contextlib.redirect_stdout(io.StringIO()):  # it speaks of downloading
            builder.download_and_prepare()
        made = pathlib.Path(builder.data_dir)
        (made / _MARK).write_text(json.dumps(made_of))
        target = folder / made.name
        if target.exists() and not _is_made_of(target, made_of):
            with contextlib.suppress(FileNotFoundError):
                target.rename(scratch / "old")
        try:
            made.rename(target)
        except OSError:
            if not _is_made_of(target, made_of):  # another process was faster
                raise
        return target
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _is_made_of(path: pathlib.Path, made_of: dict) -> bool:
    mark = path / _MARK
    return mark.exists() and json.loads(mark.read_text()) == made_of


def _check_rows(copy: dict[str, list[pathlib.Path]]) -> None:
    """Here, where the messages are ours."""
    for path, number, row in (item for split in copy for item in _read(copy[split])):
        for key in ("question", "answer"):
            if not isinstance(row.get(key), str):
                raise ValueError(
                    f"{path}, row {number} has no text in {key!r}; its fields are {', '.join(sorted(row))}"
                )
        if "####" not in row["answer"]:
            raise ValueError(f"{path}, row {number} has no '#### ' before its final answer")


def _read(paths: list[pathlib.Path]) -> Iterator[tuple[pathlib.Path, int, dict]]:
    for path in paths:
        for number, row in files.read_rows(path, {"question", "answer"}):
            yield path, number, row


def _sha256(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@functools.cache
def _builder_class():
    """A subclass of tensorflow_datasets' own that reads a local copy, in its order."""
    try:
        import tensorflow_datasets as tfds
        from tensorflow_datasets.text.gsm8k.gsm8k import Gsm8k
    except ImportError as error:
        raise ValueError(f"building gsm8k needs tensorflow-datasets and array_record: {_INSTALL} ({error})") from error
    tfds.disable_progress_bar()
    with tfds.core.registered.skip_registration():

        class LocalGsm8k(Gsm8k):
            name = "gsm8k"
            url_infos = None  # nothing is downloaded; looking for it needs a package that is not installed with tfds

            def __init__(self, *, copy, **kwargs):
                self._copy = copy
                super().__init__(**kwargs)

            def _info(self):
                info = super()._info()
                return tfds.core.DatasetInfo(
                    builder=self,
                    description=info.description,
                    features=info.features,
                    homepage=info.homepage,
                    citation=info.citation,
                    disable_shuffling=True,
                )

            def _split_generators(self, dl_manager):
                return {split: self._generate_examples(paths) for split, paths in self._copy.items()}

            def _generate_examples(self, path):
                for key, (_, _, row) in enumerate(_read(path)):
                    annotation, _, short_answer = row["answer"].rpartition("####")
                    row = {"question": row["question"], "answer": row["answer"]}
                    yield key, row | {"annotation": annotation, "short_answer": short_answer.strip()}

    return LocalGsm8k
