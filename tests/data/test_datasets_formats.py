"""Rows of chats, advice on fields, and the formats of files."""

import json
import shutil

import pytest

from r2vpo_jax import data


def load(spec, split="test", data_dir=None):
    return data.load(spec, split, data_dir)


@pytest.fixture
def write(tmp_path):
    """Writes rows, or bytes, to a file and returns its path as text."""

    def to(content, name="data.jsonl"):
        if not isinstance(content, bytes):
            content = "".join(json.dumps(row) + "\n" for row in content).encode()
        (tmp_path / name).write_bytes(content)
        return str(tmp_path / name)

    return to


def chat(*messages, answer="0"):
    return {"prompt": [{"role": role, "content": content} for role, content in messages], "answer": answer}


def test_the_question_is_what_the_user_says(write):
    """Whatever stands before it, and though a system message is the same in all rows."""
    system = ("system", "Be brief.")
    path = write([chat(system, ("user", "1 - 1?")), chat(system, ("user", "2 - 2?"))])
    assert [e.question for e in load(path).examples()] == ["1 - 1?", "2 - 2?"]
    assert load(write([chat(("user", "1 - 1?"))])).example(0).question == "1 - 1?"
    assert load(write([{"prompt": [{"content": "1 - 1?"}], "answer": "0"}])).example(0).question == "1 - 1?"
    path = write([chat(system, ("user", "1?")), chat(("user", "2?"), answer="1")])
    assert [e.question for e in load(path).examples()] == ["1?", "2?"]
    path = write([chat(("user", "1 - 1?"), ("assistant", "0"), ("user", "2 - 2?"))])
    with pytest.raises(ValueError, match=r"row 1 has 2 messages of the user in 'prompt'.*question=prompt\.2\.content"):
        load(path)
    assert load(f"{path}?question=prompt.2.content").example(0).question == "2 - 2?"
    with pytest.raises(ValueError, match="row 2 has no field 'prompt.user.content'"):
        load(write([chat(system, ("user", "1?")), chat(system)]))


@pytest.mark.parametrize(
    ("row", "advice"),
    [
        ({"prompt": [{"from": "user", "value": "1+1?"}], "final_answer": "2"}, "question=prompt.0.value$"),
        (
            {"prompt": [{"from": "system", "value": "Brief."}, {"from": "human", "value": "1+1?"}], "answer": "2"},
            "question=prompt.1.value or prompt.0.value$",
        ),
        ({"question": {"en": {"text": "1+1?"}}, "answer": "2"}, "question=question.en.text$"),
        ({"question": ["1+1?", "1+2?"], "answer": ["2", "3"]}, "each row is one problem$"),
        ({"question": [], "answer": "2"}, "each row is one problem$"),
        ({"question": "1+1?", "answer": {"value": 2, "unit": None}}, "answer=answer.value$"),
        ({"question": "1+1?", "answer": '{"ground_truth": "2"}'}, "JSON written as text in 'answer'"),
        ({"question": '[{"role": "user", "content": "1+1?"}]', "answer": "2"}, "JSON written as text in 'question'"),
    ],
)
def test_advice_names_keys_that_are_there(row, advice, write):
    """Following it, the row can be read."""
    path = write([row])
    with pytest.raises(ValueError, match=advice) as error:
        load(path)
    named = str(error.value).partition("name a field inside of it: ")[2].partition(" or ")[0]
    if named:
        found = load(f"{path}?{named}").example(0)
        assert (found.question, found.answer) == ("1+1?", "2")


def test_sets_are_no_json(write):
    pairs = [('{"a", "b"} has how many members?', r"\{1, 2\}"), ("q", "{1,2}")]
    assert load(write([{"question": q, "answer": a} for q, a in pairs])).num_examples == 2


def test_tables_of_separated_values(write):
    text = '\ufeffquestion,answer,level\r\n"What, in\nall?",025,"1"\r\n"He said ""1""?","1,234",2\r\n'
    first, second = load(write(text.encode(), "t.csv") + "?kind=exact").examples()
    assert (first.question, first.gold, first.level) == ("What, in\nall?", "025", "1")
    assert (second.question, second.gold) == ('He said "1"?', "1,234")
    assert load(write(b"question\tanswer\na, b\t1\n", "t.tsv")).example(0).question == "a, b"
    for content, said in (
        (b"question,answer\na,1\nb\n", "row 2 has not as many values"),
        (b"question,answer\na,1,2\n", "row 1 has not as many values"),
        (b"question,question\na,1\n", "names a field twice"),
        (b'question,answer\na,"1\n', "row 1 cannot be read"),
        (b"question,answer\na,\xff\n", "is not UTF-8"),
        (b"question,answer\na,\n", "row 1 has no answer"),
        (b"", "there are no rows"),
        (b"q,a\n1,2\n", "has no field 'question' or .*; its fields are q, a"),
    ):
        with pytest.raises(ValueError, match=said):
            load(write(content, "bad.csv"))


def test_a_table_beside_a_file_with_types_is_a_copy(write, tmp_path):
    (tmp_path / "set").mkdir()
    write(b"question,answer\na,1\n", "set/test.csv")
    assert load("set/", data_dir=tmp_path).num_examples == 1
    write(b'{"question": "b", "answer": "1"}\n', "set/test.jsonl")
    assert load("set/", data_dir=tmp_path).example(0).question == "b"


def test_arrow_files_as_the_package_datasets_saves_them(tmp_path):
    import pyarrow

    def save(path, *questions, kind=pyarrow.ipc.new_stream):
        path.parent.mkdir(parents=True, exist_ok=True)
        table = pyarrow.table(
            {"question": list(questions), "answer": ["1"] * len(questions), "more": [0] * len(questions)}
        )
        with pyarrow.OSFile(str(path), "wb") as file, kind(file, table.schema) as writer:
            writer.write_table(table)

    save(tmp_path / "splits" / "test" / "data-00000-of-00002.arrow", "a")
    save(tmp_path / "splits" / "test" / "data-00001-of-00002.arrow", "b", "c")
    save(tmp_path / "splits" / "train" / "data-00000-of-00001.arrow", "d")
    save(tmp_path / "one" / "data-00000-of-00002.arrow", "e")
    save(tmp_path / "one" / "data-00001-of-00002.arrow", "f")
    save(tmp_path / "file.arrow", "g", kind=pyarrow.ipc.new_file)
    for name in ("dataset_info.json", "state.json"):
        (tmp_path / "one" / name).write_text("{}")
    for spec, split, questions in (
        ("splits/", "test", "abc"),
        ("splits/", "train", "d"),
        ("splits/?split=test", "train", "abc"),
        ("one/", "test", "ef"),
        ("file.arrow", "train", "g"),
    ):
        found = load(spec, split, tmp_path)
        assert "".join(e.question for e in found.examples()) == questions, spec
    with pytest.raises(ValueError, match="has no splits"):
        load("one/?split=train", data_dir=tmp_path)
    with pytest.raises(ValueError, match=r"has no field 'x'; its fields are question, answer, more"):
        load("file.arrow?question=x", data_dir=tmp_path)
    (tmp_path / "file.arrow").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="is not an Arrow file"):
        load("file.arrow", data_dir=tmp_path)
    shutil.copytree(tmp_path / "splits", tmp_path / "math500")
    assert load("math500?question=question", "test", tmp_path).num_examples == 3
    with pytest.raises(ValueError, match="several candidates"):
        load("math500?question=question", "validation", tmp_path)


def test_one_object_is_no_table(write):
    for content in (b'{"data": [{"question": "a", "answer": 1}]}', b'{\n "version": 1,\n "data": []\n}'):
        with pytest.raises(ValueError, match=r"is one object with the fields .*data; put an array of rows into it"):
            load(write(content, "x.json"))
    assert load(write(b'{\n "question": "a",\n "answer": 1\n}', "x.json")).num_examples == 1
