"""Data sets as tensorflow_datasets prepares them, in array_record files: random access, without TensorFlow.

`DATA_DIR/NAME/1.0.0` is what `download_and_prepare` makes with file_format="array_record"; its rows are in an order of its own.
Grain's data sources read the same files.
"""

import functools
import json
import pathlib
import threading
from collections.abc import Iterator


def find(folder: pathlib.Path) -> pathlib.Path | None:
    """The prepared data set that a folder is or has, the newest version of its last configuration; None if there is none."""
    found = [folder] if _is_prepared(folder) else []
    for pattern in ("*", "*/*"):
        found = found or sorted(path for path in folder.glob(pattern) if _is_prepared(path))
    return found[-1] if found else None


def _is_prepared(path: pathlib.Path) -> bool:
    # save_to_disk of the package datasets writes a dataset_info.json too, without features.json
    return (path / "dataset_info.json").is_file() and (path / "features.json").is_file()


class Records:
    """The rows of one split; the interface is that of `streams.File`.

    Args:
      path: of the prepared data set.
      split: the split.

    Raises:
      ValueError: files that cannot be read without TensorFlow, or no such split.
    """

    def __init__(self, path: pathlib.Path, split: str):
        self.path, self._split, self._lock = path, split, threading.Lock()
        try:
            import tensorflow_datasets as tfds
        except ImportError as error:
            raise ValueError(
                f"{path} needs tensorflow-datasets and array_record: pip install 'r2vpo_jax[reasoning]' ({error})"
            ) from error
        info = json.loads((path / "dataset_info.json").read_text())
        if info.get("fileFormat") != "array_record":
            raise ValueError(
                f"{path} has files of format {info.get('fileFormat', 'tfrecord')}, which need TensorFlow; prepare it again "
                'with file_format="array_record"'
            )
        self._builder = tfds.builder_from_directory(path)
        there = self._builder.info.splits
        if split not in there:
            raise ValueError(
                f"{path} has no split {split!r} but {', '.join(there)}; a part of another can stand in: split=train&rows=:500"
            )

    def rows(self) -> Iterator[tuple[int, int, dict]]:
        """(place, number from 1, row) of all rows in order."""
        return ((place, place + 1, self.row(place)) for place in range(len(self._source)))

    def row(self, place: int) -> dict:
        """The row at a place, from 0."""
        with self._lock:
            row = self._source[place]
        return {key: _plain(value) for key, value in row.items()}

    @functools.cached_property
    def _source(self):
        return self._builder.as_data_source(split=self._split)


def _plain(value):
    """What JSON has for a value: of texts, which are bytes there, of arrays, and of features of several fields."""
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if hasattr(value, "tolist"):
        value = value.tolist()
    return [_plain(item) for item in value] if isinstance(value, list) else value
