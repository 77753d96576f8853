"""Line files in a store: numbered parts, which read like one file."""

import pytest

from r2vpo_jax import storage
from r2vpo_jax.run import files, parts
from r2vpo_jax.run.files import JsonlWriter, read_jsonl


def part(store, number):
    return store / "m" / f"{number:05d}.jsonl"


def test_a_part_ends_with_each_checkpoint(store, tmp_path):
    """And positions are those of a file on a disk."""
    here, there = JsonlWriter(tmp_path / "m.jsonl"), JsonlWriter(store / "m.jsonl")
    for number in range(5):
        for writer in (here, there):
            writer.write({"n": number, "text": "ä"})
        if number % 2:
            assert here.position() == there.position() == there.position()
    for writer in (here, there):
        writer.close()
    assert sorted(storage.sizes(store / "m")) == ["00000.jsonl", "00001.jsonl", "00002.jsonl"]
    assert b"".join(storage.read_all(parts.files_of(store / "m.jsonl"))) == (tmp_path / "m.jsonl").read_bytes()
    assert read_jsonl(store / "m.jsonl") == read_jsonl(tmp_path / "m.jsonl")
    with pytest.raises(FileNotFoundError):
        read_jsonl(store / "none.jsonl")


def test_what_was_written_is_there_after_a_while(store, monkeypatch):
    writer = JsonlWriter(store / "m.jsonl")
    writer.write({"n": 1})
    assert read_jsonl(store / "m.jsonl") == [{"n": 1}], "the first at once"
    writer.write({"n": 2})
    assert len(read_jsonl(store / "m.jsonl")) == 1
    monkeypatch.setattr(parts, "_EVERY_SECONDS", 0.0)
    writer.write({"n": 3})
    assert read_jsonl(store / "m.jsonl") == [{"n": 1}, {"n": 2}, {"n": 3}]
    assert sorted(storage.sizes(store / "m")) == ["00000.jsonl"]


def test_a_writer_is_cut_back_to_a_position(store):
    """At the end of a part, within one, and within the file that a run from a disk begins with."""
    lines = [f'{{"n": {n}}}\n'.encode() for n in range(6)]  # of 9 bytes each
    for position, left in {54: 6, 36: 4, 27: 3, 9: 1, 0: 0, None: 6}.items():
        storage.put(store / "m.jsonl", b"".join(lines[:2]))
        storage.put(part(store, 0), b"".join(lines[2:4]))
        storage.put(part(store, 7), b"".join(lines[4:]))
        writer = JsonlWriter(store / "m.jsonl", position)
        assert writer.position() == 9 * left
        writer.write({"n": 9})
        writer.close()
        assert [row["n"] for row in read_jsonl(store / "m.jsonl")] == [*range(left), 9], position
        for file in parts.files_of(store / "m.jsonl"):
            file.unlink()
    storage.put(part(store, 0), lines[0])
    with pytest.raises(ValueError, match=r"m.jsonl and its parts have 9 bytes, but the checkpoint was written at 100"):
        JsonlWriter(store / "m.jsonl", 100)
    assert read_jsonl(store / "m.jsonl") == [{"n": 0}]


def test_lines_are_appended_as_a_part(store, tmp_path):
    for path in (store / "m.jsonl", tmp_path / "m.jsonl"):
        for text in ('{"n": 1}\n{"n": 2}\n', '{"n": 3}\n'):
            files.append_lines(path, text)
        assert read_jsonl(path) == [{"n": 1}, {"n": 2}, {"n": 3}]
    assert sorted(storage.sizes(store / "m")) == ["00000.jsonl", "00001.jsonl"]


def test_parts_that_were_copied_to_a_disk_become_one_file(tmp_path):
    (tmp_path / "m").mkdir()
    for number in range(2):
        part(tmp_path, number).write_text(f'{{"n": {number}}}\n')
    assert read_jsonl(tmp_path / "m.jsonl") == [{"n": 0}, {"n": 1}]
    writer = JsonlWriter(tmp_path / "m.jsonl", 9)
    writer.write({"n": 2})
    writer.close()
    assert (tmp_path / "m.jsonl").read_text() == '{"n": 0}\n{"n": 2}\n'
    assert list((tmp_path / "m").iterdir()) == []
