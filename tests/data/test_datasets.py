"""Data sets of rows: the text grammar, the named tables on invented copies, and files that are not what they should be."""

import json
import pathlib
import shutil
import subprocess
import sys

import pytest

from r2vpo_jax import data
from r2vpo_jax.data import fields, files, specs
from scripts import make_fixtures

FIXTURES = pathlib.Path(__file__).parent / "fixtures"
ROOT = FIXTURES.parents[2]


def load(spec, split="test", data_dir=FIXTURES):
    return data.load(spec, split, data_dir)


def rows(*items, **fixed):
    return [{"question": q, "answer": a, **fixed} for q, a in items]


@pytest.fixture
def write(tmp_path):
    """Writes rows, or bytes, to a file and returns its path as text."""

    def to(content, name="data.jsonl"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not isinstance(content, bytes):
            content = "".join(json.dumps(row) + "\n" for row in content).encode()
        path.write_bytes(content)
        return str(path)

    return to


# The text ------------------------------------------------------------------------------------------------------------


def test_a_text_names_sources_with_options_and_weights():
    first, second = specs.parse(
        '  gsm8k?split=train&rows=500:&weight=0.5 + basic_arithmetic?operators=["+","-"]&a=b%26c '
    )
    assert (first.name, first.options, first.weight) == ("gsm8k", (("split", "train"), ("rows", "500:")), 0.5)
    assert (second.name, second.weight) == ("basic_arithmetic", None)
    assert second.options == (("operators", '["+","-"]'), ("a", "b&c"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "an empty data set; name one"),
        ("math + ", "has no name"),
        ("?rows=1:2", "has no name"),
        ("math?", "ends in '\\?'"),
        ("math?rows", "'rows' is not key=value"),
        ("math?level=%ff", "not percent-encoded UTF-8"),
        ("math?weight=1&weight=2", "'weight' is given twice"),
        ("math?weight=much", "weight='much' is not a number"),
        ("math?weight=0", "weight=0 must be > 0"),
        ("math?weight=1/0", "is not a number"),
    ],
)
def test_a_text_that_says_nothing(text, said):
    with pytest.raises(ValueError, match=said):
        specs.parse(text)


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("gsm8", "there is no data set or generator 'gsm8'; did you mean gsm8k"),
        ("chain_summ", "did you mean chain_sum"),
        ("gsm8k_fixture?rows=:9", "the data set gsm8k_fixture is called word_problems now"),
        ("math?levl=difficulty", "there is no 'levl' here; did you mean level"),
        ("math?level=a&level=b", "'level' is given twice"),
        ("math?kind=numerc", "kind='numerc' is unknown; did you mean numeric"),
        ("math?answer_style=box", "answer_style='box' is unknown; did you mean boxed"),
        ("math?rows=5", "rows='5' is not of the form a:b"),
        ("math?rows=100:", "no rows are left of 12"),
        ("math?where=level", "where='level' is not of the form column:value"),
        ("math?where=grade:1", "has no column 'grade', which where= asks for; its fields are problem, level"),
        (
            "math?question=task",
            "has no field 'task'; its fields are problem, level, type, solution: write question=FIELD",
        ),
        ("math?level=grade", "has no field 'grade'"),
        ("dapo_math_17k?question=data_source", "too many to drop; are question= and answer= right"),
        ("dapo_math_17k?question=prompt", "name a field inside of it: question=prompt.0.content"),
        ("dapo_math_17k?answer=reward_model", "name a field inside of it: answer=reward_model"),
        ("aime25?split=test", "has no splits: leave split=test out"),
        ("math?weight=2", "weight= is for training"),
        (
            "deepscaler?missing=error",
            "row 8 has no answer .field 'answer'.; mend it, or drop such rows by missing=drop",
        ),
    ],
)
def test_what_cannot_be_loaded_is_refused_with_what_to_do(spec, said):
    with pytest.raises(ValueError, match=said):
        load(spec)


def test_data_that_are_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no test data at .*math: put it into .*math\.jsonl"):
        load("math", data_dir=tmp_path)
    with pytest.raises(FileNotFoundError, match=r"there is no .*absent\.jsonl"):
        load("absent.jsonl", data_dir=tmp_path)
    with pytest.raises(FileNotFoundError, match=r"there is no .*rows\.csv\.gz"):
        load("rows.csv.gz", data_dir=tmp_path)
    (tmp_path / "rows.csv.gz").write_bytes(b"\x1f\x8b")
    with pytest.raises(ValueError, match=r"rows\.csv\.gz is none of .*; unpack it"):
        load("rows.csv.gz", data_dir=tmp_path)
    (tmp_path / "math" / "test" / "algebra").mkdir(parents=True)
    (tmp_path / "math" / "test" / "algebra" / "1.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"that folder has test; files of one problem each are not read"):
        load("math", data_dir=tmp_path)
    with pytest.raises(FileNotFoundError, match=r"that folder has test\.jsonl, train\.jsonl; a part of another split"):
        load("math", "validation")
    with pytest.raises(ValueError, match="needs a data folder .task.text.data_dir. with a copy of EleutherAI"):
        load("math", data_dir=None)
    with pytest.raises(ValueError, match="split='dev' is unknown"):
        load("math", "dev")


# Named data sets -----------------------------------------------------------------------------------------------------

NAMED = {
    # spec: (problems, question of the first, gold answers of the first ones, level of the first, kind)
    "math": (
        12,
        r"Write $22 \div 45$ as a fraction.",
        [r"\frac{22}{45}", "23", "1176", r"(-\infty, 25]"],
        "Level 1",
        "math",
    ),
    "math500": (27, r"What is $7 \cdot 0$?", ["0", "7", "14"], "1", "math"),
    "dapo_math_17k": (12, "Let $f(n) = n^2 + 0$. What is $f(0)$?", ["0", "2", "6", "12"], "", "math"),
    "deepscaler": (39, "A train of 4 wagons has 8 wheels a side. How many wheels a wagon and side?", ["2"], "", "math"),
    "aime24": (6, "Find $0 + 60$.", ["60", "61"], "", "math"),  # stored as 060, 061
    "aime25": (4, "Find $0 + 90$.", ["90", "91"], "", "math"),
    "amc23": (5, "Half of 2?", ["1", "3", "5"], "", "math"),  # stored as 1.0, 3.0, 5.0
    "minerva": (9, "A rod is 1 m and gains 1 m. Its length in m?", ["2", "4"], "", "math"),
    "olympiadbench": (
        8,
        "Find the least $n > 4$ that is prime.",
        ["5", "3, -3", "8", "[0, 2)"],
        "Number Theory",
        "math",
    ),
    "math?answer=level&answer_style=verbatim&kind=exact": (12, None, ["Level 1", "Level 2"], "Level 1", "exact"),
}


@pytest.mark.parametrize("spec", NAMED)
def test_named_data_sets(spec):
    size, question, golds, level, kind = NAMED[spec]
    dataset = load(spec)
    examples = list(dataset.examples())
    assert dataset.num_examples == len(examples) == size
    assert question in (None, examples[0].question)
    assert [e.gold for e in examples[: len(golds)]] == [e.answer for e in examples[: len(golds)]] == golds
    assert (examples[0].level, examples[0].kind, examples[0].source) == (level, kind, spec.partition("?")[0])
    assert [dataset.example(i) for i in range(size)] == examples
    for outside in (-1, size):
        with pytest.raises(IndexError):
            dataset.example(outside)


def test_every_named_data_set_is_tried():
    tried = {spec.partition("?")[0] for spec in NAMED}
    assert set(data.KNOWN) - tried == {"gsm8k", "word_problems"}


def test_counts_of_what_was_left_out():
    assert load("dapo_math_17k").counts == {"rows": 60, "duplicates": 48}
    assert load("deepscaler").counts == {"rows": 40, "without question or answer": 1}
    assert load("olympiadbench").counts == {"rows": 11, "other kinds of rows": 3}
    assert load("math?rows=2:5").counts == {"rows": 12, "not in rows=": 9}


def test_context_stands_before_the_question():
    assert [e.question for e in load("olympiadbench").examples()][2] == "Let $T = 7$.\n\nWhat is $T + 1$?"


def test_rows_are_counted_after_duplicates_are_gone():
    first, last = load("dapo_math_17k?rows=:5"), load("dapo_math_17k?rows=5:")
    assert (first.num_examples, last.num_examples) == (5, 7)
    assert [*first.examples(), *last.examples()] == list(load("dapo_math_17k").examples())
    assert [*load("dapo_math_17k?rows=-2:").examples()] == [*load("dapo_math_17k").examples()][-2:]


def test_other_rows_by_column_values():
    assert load("olympiadbench?where=language:Chinese|English&where=modality:Multimodal").num_examples == 1
    assert {e.level for e in load("math?where=level:Level 1|Level 3").examples()} == {"Level 1", "Level 3"}


def test_a_file_with_columns_of_its_own():
    dataset = load("plain.jsonl?question=task.text&answer=expected&level=grade&kind=exact&context=theme")
    first = dataset.example(0)
    assert first == data.Example("words\n\nSpell Ada backwards.", "adA", "adA", "exact", "3", "plain")


def test_the_shipped_word_problems():
    train, test = (load("word_problems", split, None) for split in ("train", "test"))
    assert train.num_examples > test.num_examples > 0
    assert all(e.gold.lstrip("-").isdigit() and e.kind == "numeric" for e in test.examples())
    data.disjoint({"train": train, "test": test})


def test_fixtures_are_what_the_script_makes(tmp_path):
    make_fixtures.make(tmp_path)
    made = sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*") if p.is_file())
    assert made == sorted(p.relative_to(FIXTURES) for p in FIXTURES.rglob("*") if p.is_file())
    for path in made:
        if path.suffix != ".parquet":
            assert (FIXTURES / path).read_bytes() == (tmp_path / path).read_bytes(), path
        else:
            columns = set(files.open_table(FIXTURES / path)[0])
            assert list(files.read_rows(FIXTURES / path, columns)) == list(files.read_rows(tmp_path / path, columns)), (
                path
            )
    assert sum((FIXTURES / p).stat().st_size for p in made) < 100_000


# Answers -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "style", "kind", "gold"),
    [
        ("so\n#### 1,234", "hash", "numeric", "1234"),
        ("#### 1 #### $5", "hash", "numeric", "5"),
        ("no marks", "hash", "numeric", ""),
        (r"\boxed{1} and \boxed{\frac{1}{2}}", "boxed", "math", r"1, \frac{1}{2}"),
        (r"\boxed 7", "boxed", "math", "7"),
        (r"\boxed{\left\{1, 2\right\}}", "boxed", "math", r"\left\{1, 2\right\}"),
        (r"\boxed{1", "boxed", "math", ""),
        ("none", "boxed", "math", ""),
        ("025", "verbatim", "math", "25"),
        ("000", "verbatim", "math", "0"),
        ("0.50", "verbatim", "math", "0.50"),
        ("007", "verbatim", "exact", "007"),
        ("$x^2$", "verbatim", "math", "x^2"),
        ("$1$ or $2$", "verbatim", "math", "$1$ or $2$"),
        (r"5\$", "verbatim", "math", r"5\$"),
        ("1,234", "verbatim", "math", "1,234"),  # may be a pair
        ("['$1$', '2']", "list", "math", "1, 2"),
        ("[1, 2]", "list", "math", "[1, 2]"),  # an interval
        ("[0, 2)", "list", "math", "[0, 2)"),
    ],
)
def test_final_answers(text, style, kind, gold):
    assert fields.tidy(fields.final_answer(text, style), kind) == gold


@pytest.mark.parametrize(
    ("value", "gold"), [(7, "7"), (7.0, "7"), (0.25, "0.25"), (True, "True"), (["1", 2], "1, 2"), (10**30, str(10**30))]
)
def test_answers_that_are_no_text(write, value, gold):
    assert load(write(rows(("q", value)))).example(0).gold == gold


# Files ---------------------------------------------------------------------------------------------------------------


def test_marks_and_ends_of_text_files(write):
    lines = (
        b'\xef\xbb\xbf{"question": "a\\u2028b\xe2\x80\xa8c", "answer": "1"}\r\n{"question": "d", "answer": "2"}\n\n \n'
    )
    assert [e.question for e in load(write(lines)).examples()] == ["a\u2028b\u2028c", "d"]
    array = b'\xef\xbb\xbf \n[{"question": "a", "answer": 1}]'
    assert load(write(array, "x.json")).num_examples == 1
    assert load(write(b'{"question": "a", "answer": 1}\n{"question": "b", "answer": 1}', "y.json")).num_examples == 2


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"question": "a", "answer": 1}\n\n{"question": "b", "answer": 1}\n', "row 2 is empty"),
        (b'{"question": "a", "answer": 1}\n{"question": "\xff", "answer": 1}\n', "row 2 is not UTF-8"),
        (b'{"question": "a", "answer": 1}\n{"question": \n', "row 2 is not JSON"),
        (b"[" * 100_000, "row 1 is not JSON"),
        (b"[1]\n", "row 1 is not an object with fields"),
        (b"", "there are no rows"),
        (b'{"question": "\\ud800", "answer": 1}\n', "row 1 .*surrogates not allowed"),
        (b'{"question": "a", "answer": NaN}\n', "row 1 has no answer"),
        (b'{"question": " ", "answer": 1}\n', "row 1 has no question"),
        (b'{"question": "a", "answer": [1, null]}\n', "row 1 has no answer"),
        (b'{"question": "a", "answer": 1}\n{"question": "b"}\n', "row 2 has no field 'answer'"),
        (b'{"question": ["a"], "answer": 1}\n', "row 1 has no text in 'question'"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "is a Git LFS pointer"),
    ],
)
def test_broken_rows_are_named(write, content, said):
    with pytest.raises(ValueError, match=said):
        load(write(content))


def test_broken_parquet(write):
    with pytest.raises(ValueError, match="is not a Parquet file, or a broken one"):
        load(write(b"PAR1 and nothing more", "x.parquet"))
    with pytest.raises(ValueError, match=r"has no field 'nope'; its fields are id, problem, solution, answer"):
        load("aime24?question=nope")


def test_missing_rows_are_dropped_only_when_few(write):
    good = rows(*((f"q{i}", "1") for i in range(19)))
    path = write([*good, {"question": "", "answer": "1"}])
    assert load(f"{path}?missing=drop").counts == {"rows": 20, "without question or answer": 1}
    with pytest.raises(ValueError, match="2 of 21 have no question or answer, too many to drop"):
        load(f"{write([*good, *rows(('', '1'), ('q', ''))])}?missing=drop")


def test_one_question_twice(write):
    many = rows(*((f"q{i}", str(i)) for i in range(40)))
    path = write([*many, *rows(("q 1", "0"), ("q1\n", "1"), (" q1", "1"))])
    assert load(path).counts == {"rows": 43, "duplicates": 2}
    path = write([*many, *rows(("q3", "5"))])
    with pytest.raises(ValueError, match=r"row 41 has the answer '5' to the question of .*row 4, whose answer is '3'"):
        load(path)
    dataset = load(f"{path}?conflicts=drop")
    assert dataset.counts == {"rows": 41, "questions with several answers": 1}
    assert "q3" not in [e.question for e in dataset.examples()]


def test_an_unknown_instruction_around_a_question_is_refused(write):
    text = "Solve the following math problem step by step. Say it aloud.\n\nWhat is 1 + 1?"
    content = [{"prompt": [{"role": "user", "content": text}], "reward_model": {"ground_truth": "2"}}]
    folder = pathlib.Path(write(content, "dapo_math_17k.jsonl")).parent
    with pytest.raises(ValueError, match="row 1 has an unknown instruction around its question"):
        load("dapo_math_17k", data_dir=folder)
    write([{"prompt": "What is 1 + 1?", "solution": "2"}], "dapo_math_17k.jsonl")  # a processed copy
    assert load("dapo_math_17k", data_dir=folder).example(0).question == "What is 1 + 1?"


def test_columns_of_other_public_copies(write, tmp_path):
    write([{"id": 1, "problem": "Find $60$.", "solution": r"\boxed{060}", "url": ""}], "aime24.jsonl")
    assert load("aime24", data_dir=tmp_path).example(0).gold == "60"
    shutil.copy(FIXTURES / "dapo_math_17k.parquet", tmp_path / "aime25.parquet")  # as AIME sets for DAPO are published
    for spec in ("aime25", "aime25.parquet"):
        dataset = load(spec, data_dir=tmp_path)
        assert (dataset.num_examples, dataset.example(1).question) == (12, "Let $f(n) = n^2 + 1$. What is $f(1)$?")
        assert dataset.example(1).gold == "2"
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"question": [b"a \xc3\xa9"], "answer": pyarrow.array(["x"]).dictionary_encode()})
    pyarrow.parquet.write_table(table, tmp_path / "bytes.parquet")
    assert load("bytes.parquet", data_dir=tmp_path).example(0).question == "a é"


def test_where_files_may_be(write, tmp_path):
    write(rows(("b", 1)), "math500/data/test-00001-of-00002.jsonl")
    write(rows(("a", 1)), "math500/data/test-00000-of-00002.jsonl")
    write(b"{}", "math500/infos.json")
    write(b"{}", "math500/.cache/test.jsonl")
    spec = "math500?question=question"
    assert [e.question for e in load(spec, data_dir=tmp_path).examples()] == ["a", "b"]
    assert load(spec, "train", tmp_path).num_examples == 2  # published as one split: whatever it is called
    write(rows(("c", 1)), "math500/train.jsonl")
    assert load(spec, "train", tmp_path).num_examples == 1
    with pytest.raises(ValueError, match="several candidates for math500"):
        load(spec, "validation", tmp_path)
    write(rows(("c", 1)), "math500.jsonl")
    with pytest.raises(ValueError, match="several candidates for math500"):
        load(spec, data_dir=tmp_path)
    assert load("math500/data/", "test", tmp_path).num_examples == 2  # a path


def test_nothing_heavy_is_imported():
    heavy = ("jax", "flax", "transformers", "pyarrow", "tensorflow_datasets", "tensorflow", "reasoning_gym", "sympy")
    code = f"""
import sys
from r2vpo_jax import data
data.load("plain.jsonl?question=task.text&answer=expected", "train", {str(FIXTURES)!r}).example(3)
print([name for name in {heavy} if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("absent", "spec", "said"),
    [
        ("reasoning_gym", "chain_sum", r"Generators need reasoning-gym: pip install 'r2vpo_jax\[reasoning\]'"),
    ],
)
def test_a_package_that_is_not_installed(monkeypatch, absent, spec, said):
    for name in [name for name in sys.modules if name.partition(".")[0] == absent]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, absent, None)
    with pytest.raises(ValueError, match=said):
        load(spec)
