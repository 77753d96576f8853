"""GSM8K as tensorflow_datasets prepares it, in array_record files: random access, without TensorFlow.

`DATA_DIR/gsm8k/1.0.0` is what `download_and_prepare` makes with file_format="array_record". Its rows are those of the
published files in another order.
"""

import json
import pathlib
from collections.abc import Iterator


def prepared(folder: pathlib.Path) -> pathlib.Path | None:
    """The prepared data set in DATA_DIR/gsm8k, its newest version; None if there is none."""
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
        raise ValueError(
            f"{path} needs tensorflow-datasets and array_record: pip install 'r2vpo_jax[reasoning]' ({error})"
        ) from error
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
