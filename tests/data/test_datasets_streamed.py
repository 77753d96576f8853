"""Streamed data are those that memory would hold, and memory holds next to nothing of them."""

import json
import tracemalloc

import numpy as np
import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq
import pytest

from r2vpo_jax import data
from r2vpo_jax.data import streams

# Duplicates, a question with two answers, one without an answer, a row of another kind.
ROWS = [
    {"question": f"What is {i} + {i}? é\u2028", "answer": str(2 * i), "level": f"grade {i % 3}", "kind": "sum"}
    for i in range(60)
]
ROWS[7:7] = [ROWS[3], ROWS[3] | {"question": "What  is 3 + 3? é\u2028"}]
ROWS[20] |= {"answer": ""}
ROWS[30] |= {"kind": "product"}
ROWS += [ROWS[50] | {"answer": "0"}]
MENDED = "missing=drop&conflicts=drop&where=kind:sum"


def write(path, rows):
    if path.suffix == ".jsonl":
        path.write_text(
            "\ufeff" + "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
        )
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=7)
    else:
        table = pa.Table.from_pylist(rows)
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
            for batch in table.to_batches(max_chunksize=9):
                stream.write_batch(batch)


@pytest.fixture(scope="module", params=streams.SUFFIXES)
def folder(request, tmp_path_factory):
    """A data set in two files, of which the first has a column that the second lacks."""
    folder = tmp_path_factory.mktemp("streamed")
    write(folder / f"train-00000-of-00002{request.param}", [row | {"more": 1} for row in ROWS[:40]])
    write(folder / f"train-00001-of-00002{request.param}", ROWS[40:])
    return folder


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("more", ["", "&rows=5:40", "&level=level"])
def test_they_are_those_in_memory(folder, more, split, monkeypatch):
    monkeypatch.setattr(streams, "KEPT_BYTES", 300)
    columns = ("level",)
    spec = f"{folder}?split=train&{MENDED}{more}"
    here, streamed = (data.load(f"{spec}{how}", split, columns=columns) for how in ("", "&stream=true"))
    assert isinstance(streamed, streams.StreamedDataset)
    assert streamed.counts == here.counts
    assert list(streamed.examples()) == list(here.examples())
    assert streamed.digest == here.digest
    positions = range(2 * here.num_examples) if split == "train" else range(here.num_examples)
    for position in positions:
        one, other = streamed.example(position), here.example(position)
        assert (one, one.columns) == (other, other.columns)
    keep = np.arange(here.num_examples) % 3 > 0
    less, also = streamed.select(keep, "not wanted"), here.select(keep, "not wanted")
    assert (less.digest, less.counts, less.num_examples) == (also.digest, also.counts, also.num_examples)
    with pytest.raises(IndexError):
        streamed.example(-1)


def test_what_is_refused_in_memory_is_refused_alike(folder, tmp_path):
    for spec in (f"{folder}?split=train", f"{folder}?split=train&missing=drop", f"{folder}?split=train&question=none"):
        said = []
        for how in ("", "&stream=true"):
            with pytest.raises(ValueError, match="row|field") as refused:
                data.load(spec + how, "train")
            said.append(str(refused.value).replace("&stream=true", ""))
        assert said[0] == said[1]
    (tmp_path / "table.csv").write_text("question,answer\na,b\n")
    with pytest.raises(ValueError, match=r"table.csv cannot be streamed, only .parquet, .arrow, .jsonl"):
        data.load(f"{tmp_path}/table.csv?stream=true", "train")
    with pytest.raises(ValueError, match="stream='yes' is unknown"):
        data.load(f"{folder}?split=train&stream=yes", "train")


def test_in_a_mixture_each_source_is_as_it_is(folder):
    specs = [f"{folder}?split=train&{MENDED}{how}&weight=2 + word_problems?rows=:20" for how in ("", "&stream=true")]
    here, mixed = (data.load(spec, "train") for spec in specs)
    assert mixed.digest == here.digest
    assert [mixed.example(i) for i in range(30)] == [here.example(i) for i in range(30)]


@pytest.mark.parametrize("suffix", streams.SUFFIXES)
def test_memory_holds_places_and_some_row_groups(suffix, tmp_path, monkeypatch):
    number, length = 3000, 4000
    rows = [{"question": f"{i} " + "x" * length, "answer": str(i)} for i in range(number)]
    path = tmp_path / f"large{suffix}"
    if suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=50, use_dictionary=False)
    else:
        write(path, rows)
    del rows
    monkeypatch.setattr(streams, "KEPT_BYTES", 10 * 50 * length)
    arrow = pa.total_allocated_bytes()
    tracemalloc.start()
    try:
        streamed = data.load(f"{path}?stream=true", "train")
        loaded, most = tracemalloc.get_traced_memory()
        for position in range(0, 2 * number, 7):
            assert len(streamed.example(position).question) > length
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    in_memory = number * length
    assert loaded < 60 * number
    assert held < 100 * number
    # Of Parquet and Arrow, 4,096 rows at a time are Python objects while the file is read through; a line alone of JSONL.
    assert most < (3 if suffix != ".jsonl" else 0.1) * in_memory
    assert pa.total_allocated_bytes() - arrow < 15 * 50 * length
