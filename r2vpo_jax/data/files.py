"""Rows of .jsonl, .json, .csv, .tsv, .parquet and .arrow files, and which files a data set is in."""

import csv
import json
import os
import pathlib
from collections.abc import Iterator

from r2vpo_jax.errors import refuse_pointer

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".arrow")
_TABLES = (".parquet", ".arrow")  # with a schema, read by pyarrow
_SAVED = "data-*-of-*.arrow"  # the files of `save_to_disk` of the package datasets, in a folder for each split


def read_rows(path: pathlib.Path, columns: set[str] | None) -> Iterator[tuple[int, dict]]:
    """(row number from 1, row) of a file, in its order; of Parquet and Arrow only the top-level `columns` (None: all), read in
    pieces.

    A .json file holds an array of objects, or is read like a .jsonl file: one object per line. The first row of a .csv or
    .tsv file names its fields, and all values are text. A byte order mark and empty lines at the end are ignored.

    Raises:
      ValueError: a file that is no such thing; the message names the row.
    """
    refuse_pointer(path)
    with path.open("rb") as file:
        head = file.read(64)
    if path.suffix in _TABLES:
        return _table(path, columns)
    if path.suffix in (".csv", ".tsv"):
        return _separated(path)
    if path.suffix == ".json":
        return _json(path, head, columns)
    return _json_lines(path)


def columns_of(path: pathlib.Path) -> list[str]:
    """The columns, for messages: fields of nested ones by dotted path."""
    if path.suffix in _TABLES:
        top = open_table(path)[0]
        _, first = next(read_rows(path, set(top)), (0, dict.fromkeys(top)))
    else:
        _, first = next(read_rows(path, set()), (0, {}))
    return [name for key, value in first.items() for name in _nested(key, value)]


def find(base: pathlib.Path, split: str, *, stated: bool = False, one_split: bool = False) -> list[pathlib.Path]:
    """The files of a split: `base` itself, base.jsonl, base/<split>.jsonl, base/<split>-00000-of-00002.parquet, ...

    Args:
      base: path of the data set, without suffix; or of a file.
      split: the split.
      stated: the split was asked for by name: a file without splits will not do.
      one_split: the data set is published as a single split, which is used whatever the name of its file.

    Raises:
      FileNotFoundError: there is none.
      ValueError: there are several candidates.
    """
    whole = [base] if base.is_file() else [p for s in SUFFIXES if (p := base.with_name(base.name + s)).is_file()]
    whole = whole or sorted(base.glob(_SAVED))
    parts = split_files(base, split) or (split_files(base, "*") if one_split and not stated else [])
    if whole and base.suffix not in SUFFIXES and base.is_file():
        raise ValueError(f"{base} is none of {', '.join(SUFFIXES)}; unpack it, or write it as one of them")
    if stated and whole and not parts:
        raise ValueError(f"{whole[0]} has no splits: leave split={split} out, or choose rows by rows=a:b")
    suffixes = {path.suffix for path in parts}
    if len({_stem(p) if p.parent == base else p for p in whole}) + len(suffixes) > 1 or (
        one_split and not whole and len({_stem(p) for p in parts}) > 1
    ):
        raise ValueError(f"several candidates for {base.name}: {', '.join(map(str, [*whole, *parts]))}; keep one")
    if found := whole or parts:
        return found
    message = (
        f"no {split} data at {base}: put it into {base}.jsonl (or .parquet), {base}/{split}.jsonl or "
        f"{base}/{split}-00000-of-00001.parquet"
    )
    if base.is_dir():
        message += f"; that folder has {', '.join(sorted(p.name for p in base.iterdir())[:8]) or 'nothing'}"
        if any(p.stem.isdigit() for folder in ("", "*/", "*/*/") for p in base.glob(f"{folder}*.json")):
            message += "; files of one problem each are not read: make them the rows of one .jsonl"
    if split != "train" and not one_split:
        message += "; a part of another split can stand in: split=train&rows=:500"
    raise FileNotFoundError(message)


def split_files(base: pathlib.Path, split: str) -> list[pathlib.Path]:
    """The files of a split in a folder, or one folder below; of all splits, for "*"."""
    if not base.is_dir():
        return []
    stems = ("*",) if split == "*" else (split, f"{split}-*-of-*")
    names = [f"{folder}{stem}{suffix}" for folder in ("", "*/") for stem in stems for suffix in SUFFIXES]
    names += [f"{stems[0]}/{_SAVED}"]
    found = sorted({path for name in names for path in base.glob(name)})
    found = [p for p in found if not any(part.startswith(".") for part in p.relative_to(base).parts)]
    # Copies come with .json files that are no data, and with tables of the same rows beside the file with types.
    return [p for p in found if p.suffix not in (".json", ".csv", ".tsv")] or found


def _stem(path: pathlib.Path) -> str:
    """The name without the number of the piece."""
    return path.parent.name if path.match(_SAVED) else path.stem.partition("-0")[0]


def read_places(path: pathlib.Path, columns: set[str] | None) -> Iterator[tuple[int, int, dict]]:
    """(place, row number from 1, row) of a .jsonl, .parquet or .arrow file as `read_rows` reads it; the place is where the line
    of a .jsonl begins, in bytes, and of the others the number of the row from 0."""
    refuse_pointer(path)
    if path.suffix in _TABLES:
        return ((number - 1, number, row) for number, row in _table(path, columns))
    return _placed_lines(path)


def json_line(path: pathlib.Path, descriptor: int, place: int) -> dict:
    """The row of a .jsonl file, opened as `descriptor`, whose line begins at a place."""
    parts = []
    while not parts or (parts[-1] and b"\n" not in parts[-1]):
        parts.append(os.pread(descriptor, 1 << 14, place + sum(map(len, parts))))
    line = b"".join(parts).partition(b"\n")[0]
    return _object(path, 0, _loads(path, f"byte {place}", line))


def _json_lines(path: pathlib.Path) -> Iterator[tuple[int, dict]]:
    return ((number, row) for _, number, row in _placed_lines(path))


def _placed_lines(path: pathlib.Path) -> Iterator[tuple[int, int, dict]]:
    empty, place = None, 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):  # on \n only: text may hold other line separators
            begin, place = place, place + len(line)
            line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            if not line.strip():
                empty = empty or number
                continue
            if empty:
                raise ValueError(f"{path}, row {empty} is empty")
            yield begin, number, _object(path, number, _loads(path, f"row {number}", line))


def _json(path: pathlib.Path, head: bytes, columns: set[str] | None) -> Iterator[tuple[int, dict]]:
    """The rows of a .json file, of whichever kind."""
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if start.startswith(b"["):
        return _json_array(path)
    if _has_lines(path):
        return _json_lines(path)
    try:
        whole = json.loads(path.read_bytes()) if start.startswith(b"{") else None
    except (ValueError, RecursionError):  # more than one object: the reader of lines says what is wrong with which
        whole = None
    if whole is None:
        return _json_lines(path)
    if columns and not columns & whole.keys():
        raise ValueError(
            f"{path} is one object with the fields {', '.join(whole)}; put an array of rows into it, or one row on each line"
        )
    return iter([(1, whole)])


def _separated(path: pathlib.Path) -> Iterator[tuple[int, dict]]:
    number = 0
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ",", strict=True)
        try:
            if len(set(reader.fieldnames or ())) < len(reader.fieldnames or ()):
                raise ValueError(f"{path} names a field twice: {', '.join(reader.fieldnames)}")
            for number, row in enumerate(reader, start=1):
                if None in row or None in row.values():
                    raise ValueError(f"{path}, row {number} has not as many values as there are fields")
                yield number, row
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{path}, row {number + 1} or one soon after is not UTF-8 ({error}); convert the file"
            ) from error
        except csv.Error as error:
            raise ValueError(f"{path}, row {number + 1} cannot be read: {error}") from error


def _json_array(path: pathlib.Path) -> Iterator[tuple[int, dict]]:
    for number, row in enumerate(_loads(path, "as a whole", path.read_bytes()), start=1):
        yield number, _object(path, number, row)


def _loads(path: pathlib.Path, where: str, data: bytes):
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}, {where} is not UTF-8 ({error}); convert the file") from error
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}, {where} is not JSON: {error}") from error


def _has_lines(path: pathlib.Path) -> bool:
    """Whether the first line is an object by itself and more follows: such a file is never read as a whole."""
    with path.open("rb") as file:
        first, more = file.readline().removeprefix(b"\xef\xbb\xbf"), file.readline()
    try:
        return bool(more.strip()) and isinstance(json.loads(first), dict)
    except (ValueError, RecursionError):
        return False


def _object(path: pathlib.Path, number: int, row) -> dict:
    if not isinstance(row, dict):
        raise ValueError(f"{path}, row {number} is not an object with fields, but {str(row)[:40]!r}")
    return row


def open_table(path: pathlib.Path):
    """(names of the columns, columns -> batches of rows) of a Parquet or Arrow file.

    Raises:
      ValueError: it is none, or broken.
    """
    import pyarrow.parquet

    try:
        if path.suffix == ".parquet":
            table = pyarrow.parquet.ParquetFile(path)
            return table.schema_arrow.names, lambda names: table.iter_batches(batch_size=4096, columns=names)
        with path.open("rb") as file:
            is_file = file.read(6) == b"ARROW1"
        if is_file:  # the other of Arrow's two formats; `save_to_disk` writes streams
            table = pyarrow.ipc.open_file(path)
            batches = map(table.get_batch, range(table.num_record_batches))
        else:
            batches = table = pyarrow.ipc.open_stream(path)
        return table.schema.names, lambda names: (batch.select(names) for batch in batches)
    except (pyarrow.lib.ArrowException, OSError) as error:
        kind = {".parquet": "a Parquet", ".arrow": "an Arrow"}[path.suffix]
        raise ValueError(f"{path} is not {kind} file, or a broken one: {error}") from error


def _table(path: pathlib.Path, columns: set[str] | None) -> Iterator[tuple[int, dict]]:
    there, batches_of = open_table(path)
    wanted = [name for name in there if columns is None or name in columns]
    if not wanted:
        yield 1, {}  # for the reader to say which fields it misses
        return
    number = 0
    for batch in batches_of(wanted):
        for row in batch.to_pylist():
            number += 1
            yield number, row


def _nested(name: str, value) -> list[str]:
    if isinstance(value, dict) and value:
        return [found for key, inner in value.items() for found in _nested(f"{name}.{key}", inner)]
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return _nested(f"{name}.0", value[0])
    return [name]
