"""Writes tests/data/fixtures: problems of our own in the formats of public data sets.

    python scripts/make_fixtures.py [FOLDER]

No text in them is taken from a data set; only columns, nesting and habits (repeated rows, wrapped questions, answers that
are numbers or lists) are those of the public copies that docs/data.md names. SPELLINGS are how their answers are written.
"""

import json
import pathlib
import sys

FOLDER = pathlib.Path(__file__).parent.parent / "tests" / "data" / "fixtures"
NAMES = ("Ada", "Ben", "Cleo", "Dan", "Eve", "Finn")
THINGS = ("shells", "stamps", "marbles", "kites", "ribbons")

# What the published DAPO-Math-17k puts around every problem.
DAPO_BEFORE = (
    "Solve the following math problem step by step. The last line of your response should be of the form Answer: $Answer "
    "(without quotes) where $Answer is the answer to the problem.\n\n"
)
DAPO_AFTER = '\n\nRemember to put your answer on its own line after "Answer:".'

# Answers as they are spelled in public sets.
SPELLINGS = {
    "math": (r"10,\!080", r"\text{May}", r"\dfrac{9}{256}", r"15\mbox{ cm}^2"),
    "math500": (
        r"10,\!080", r"\text{Evelyn}", r"\left( 3, \frac{\pi}{2} \right)", "6 - 5i", r"11\sqrt2", r"\$36", "4210_{5}",
        r"90^\circ", r"\text{(C)}", r"x \in [-2,7]", r"(0,9) \cup (9,36)", "y = 2x + 3", r"\pm 2", "1,-2", r"1\frac{4}{5}",
        r"5.4 \text{ cents}", r"864 \mbox{ inches}^2", r"\begin{pmatrix} -1/3 \\ 2/3 \\ 5/3 \end{pmatrix}",
        r"\frac{270}7\text{ degrees}", r"3 \pm 2 \sqrt{2}", "2220",
    ),
    "minerva": ("1.39e9", "3.83e35", r"\frac{1}{2} R_{p}", r"\arcsin{1.3 \sin{\theta_w}}", r"I(0) e^{-\frac{t}{R C}}"),
    "olympiadbench": (r"$-\frac{1}{2}, 0, \frac{1}{2}$", "$(9,3),(6,3),(9,-3)$", "$2^{1009}$", r"$\frac{1}{n^{2}}$"),
}  # fmt: skip


def spelled(name: str) -> list[tuple[str, str]]:
    """(question, answer) for each of them."""
    return [(f"How is answer {i} of ours spelled?", answer) for i, answer in enumerate(SPELLINGS[name])]


def gsm8k(start: int, size: int) -> list[dict]:
    rows = []
    for i in range(start, start + size):
        name, thing = NAMES[i % 6], THINGS[i % 5]
        boxes, each = 3 + i % 7, 250 + 11 * i
        rows.append(
            {
                "question": f"{name} keeps {boxes} boxes of {thing} with {each} {thing} each. How many {thing} is that?",
                "answer": f"There are {boxes} boxes.\nThat is {boxes}*{each}=<<{boxes}*{each}={boxes * each}>>"
                f"{boxes * each} {thing}.\n#### {boxes * each:,}",
            }
        )
    return rows


def math(start: int, size: int) -> list[dict]:
    rows = []
    for i in range(start, start + size):
        a, b = i + 2, 2 * i + 5
        boxed = (
            rf"\boxed{{\frac{{{a}}}{{{b}}}}}",
            rf"\boxed{{{a}}}",
            rf"\fbox{{{a * b}}}",
            rf"\boxed{{(-\infty, {a}]}}",
        )[i % 4]
        ask = (
            rf"Write ${a} \div {b}$ as a fraction.",
            rf"Solve $x - {b} = {a - b}$ for $x$.",
            rf"What is the area of a rectangle with sides ${a}$ and ${b}$?",
            rf"For which real $x$ is $x \le {a}$? Answer with an interval.",
        )[i % 4]
        solution = (
            rf"A first guess is $\boxed{{{b}}}$. Looking closer, it is ${boxed}$, for $\{{{a}, {b}\}}$ are given."
        )
        rows.append({"problem": ask, "level": f"Level {1 + i % 5}", "type": "Algebra", "solution": solution})
    return rows


def dapo(size: int, copies: int) -> list[dict]:
    rows = []
    for i in range(size):
        row = {
            "data_source": "math_dapo",
            "prompt": [
                {
                    "content": f"{DAPO_BEFORE}Let $f(n) = n^2 + {i}$. What is $f({i % 9})$?{DAPO_AFTER}",
                    "role": "user",
                }
            ],
            "ability": "MATH",
            "reward_model": {"ground_truth": str((i % 9) ** 2 + i), "style": "rule-lighteval/MATH_v2"},
            "extra_info": {"index": f"own-{i}"},
        }
        rows.append(row)
    return rows * copies


def deepscaler() -> list[dict]:
    rows = [
        {
            "problem": f"A train of {i + 4} wagons has {2 * i + 8} wheels a side. How many wheels a wagon and side?",
            "answer": "2",
            "solution": "Divide.",
        }
        for i in range(40)
    ]
    rows[7]["answer"] = ""  # the published file has a few of these
    return rows


def olympiadbench() -> list[dict]:
    shared = {
        "solution": ["Count."],
        "modality": "Text-only",
        "difficulty": "Competition",
        "is_multiple_answer": False,
        "unit": None,
        "answer_type": "Numerical",
        "question_type": "Open-ended",
        "subfield": "Number Theory",
        "subject": "Math",
        "language": "English",
    }
    return [
        shared
        | {"id": 1, "question": "Find the least $n > 4$ that is prime.", "final_answer": ["$5$"], "context": None},
        shared
        | {
            "id": 2,
            "question": "Find all integers $x$ with $x^2 = 9$.",
            "final_answer": ["$3$", "$-3$"],
            "context": None,
            "is_multiple_answer": True,
        },
        shared
        | {
            "id": 3,
            "question": "What is $T + 1$?",
            "final_answer": ["8"],
            "context": "Let $T = 7$.",
            "unit": "cm",
            "subfield": "Algebra",
        },
        shared
        | {"id": 4, "question": "Read the length off the picture.", "final_answer": ["2"], "modality": "Multimodal"},
        shared | {"id": 5, "question": "一加一等于几?", "final_answer": ["2"], "language": "Chinese"},
        shared | {"id": 6, "question": "Prove that 2 is even.", "final_answer": None, "question_type": "Theorem proof"},
        shared | {"id": 7, "question": "For which $x$ is $0 \\le x < 2$?", "final_answer": ["$[0, 2)$"], "context": ""},
        *(
            shared | {"id": 8 + i, "question": question, "final_answer": [answer], "context": None}
            for i, (question, answer) in enumerate(spelled("olympiadbench"))
        ),
    ]


def make(folder: pathlib.Path) -> None:
    """Writes all of them."""
    _jsonl(folder / "gsm8k" / "train.jsonl", gsm8k(0, 24))
    _jsonl(folder / "gsm8k" / "test.jsonl", gsm8k(24, 8))
    _jsonl(folder / "math" / "train.jsonl", math(0, 20))
    boxed = [
        {"problem": question, "level": "Level 5", "type": "Algebra", "solution": rf"It is $\boxed{{{answer}}}$."}
        for question, answer in spelled("math")
    ]
    _jsonl(folder / "math" / "test.jsonl", math(20, 8) + boxed)
    _jsonl(
        folder / "math500" / "test.jsonl",
        [
            {
                "problem": f"What is $7 \\cdot {i}$?",
                "solution": f"\\boxed{{{7 * i}}}",
                "answer": str(7 * i),
                "level": 1 + i % 5,
            }
            for i in range(6)
        ]
        + [
            {"problem": question, "solution": f"\\boxed{{{answer}}}", "answer": answer, "level": 5}
            for question, answer in spelled("math500")
        ],
    )
    _parquet(folder / "dapo_math_17k.parquet", dapo(12, 5))
    (folder / "deepscaler.json").write_text(json.dumps(deepscaler(), indent=0) + "\n")
    _parquet(
        folder / "aime24" / "data" / "train-00000-of-00001.parquet",
        [{"id": i, "problem": f"Find ${i} + 60$.", "solution": "…", "answer": f"{i + 60:03d}"} for i in range(6)],
    )
    _jsonl(
        folder / "aime25.jsonl",
        [{"problem": f"Find ${i} + 90$.", "answer": str(i + 90), "id": str(i)} for i in range(4)],
    )
    _parquet(
        folder / "amc23" / "test-00000-of-00001.parquet",
        [{"id": i, "problem": f"Half of {4 * i + 2}?", "answer": 2.0 * i + 1, "url": ""} for i in range(5)],
    )
    _jsonl(
        folder / "minerva" / "test.jsonl",
        [{"question": f"A rod is {i} m and gains {i} m. Its length in m?", "answer": str(2 * i)} for i in range(1, 5)]
        + [{"question": question, "answer": answer} for question, answer in spelled("minerva")],
    )
    _parquet(folder / "olympiadbench.parquet", olympiadbench())
    _jsonl(
        folder / "plain.jsonl",
        [
            {"task": {"text": f"Spell {name} backwards."}, "expected": name[::-1], "grade": len(name), "theme": "words"}
            for name in NAMES
        ],
    )
    _jsonl(
        folder / "chats.jsonl",
        [
            {
                "prompt": [
                    {"role": "system", "content": "Be brief."},
                    {"role": "user", "content": f"What is ${i}^2$?"},
                ],
                "reward_model": {"ground_truth": str(i * i)},
            }
            for i in range(6)
        ],
    )
    lines = [f'"What is {i} plus {i}, in words?",{name}' for i, name in enumerate(("none", "two", "four", "six"))]
    (folder / "table.csv").write_text("\n".join(["task,expected", *lines]) + "\n", encoding="utf-8")


def _jsonl(path: pathlib.Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def _parquet(path: pathlib.Path, rows: list[dict]) -> None:
    import pyarrow
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    keys = dict.fromkeys(key for row in rows for key in row)
    table = pyarrow.Table.from_pylist([{key: row.get(key) for key in keys} for row in rows])
    pyarrow.parquet.write_table(table, path, row_group_size=16)


if __name__ == "__main__":
    make(pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER)
