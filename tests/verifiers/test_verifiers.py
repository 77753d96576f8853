r"""Final answers out of responses, canonical forms, numbers, forms of responses, and the pool's ordinary work."""

import contextlib
import json
import subprocess
import sys
import time

import pytest

from r2vpo_jax import verifiers
from r2vpo_jax.config.task import ANSWERS
from r2vpo_jax.verifiers import Check, VerifierPool, answers, canonical, extract, format_score, pool
from r2vpo_jax.verifiers.outcome import Outcome

RIGHT, WRONG, ERROR = Outcome.RIGHT, Outcome.WRONG, Outcome.ERROR


@pytest.mark.parametrize(
    ("style", "text", "answer"),
    [
        ("boxed", r"so \boxed{42}.", "42"),
        ("boxed", r"\boxed{1} and then \boxed{2}", "2"),
        ("boxed", r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        ("boxed", r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        ("boxed", r"\boxed{\left\{ x \right.}", r"\left\{ x \right."),
        ("boxed", r"\boxed {7}", "7"),
        ("boxed", r"$\boxed 7$", "7"),
        ("boxed", r"\boxed 42.", "42"),
        ("boxed", r"\fbox{7}", "7"),
        ("boxed", r"\boxed{x = \boxed{5}}", r"x = \boxed{5}"),
        ("boxed", r"\boxed{5} and \boxed{", None),
        ("boxed", r"\boxed{5} and \boxed{6", None),
        ("boxed", r"\boxed{6 and \boxed{5}", "5"),
        ("boxed", r"\boxed{5} and \boxed{}", None),
        ("boxed", r"\boxedx{5}", None),
        ("boxed", "5", None),
        ("boxed", "", None),
        ("boxed", r"<think>\boxed{1}</think> \boxed{2}", "2"),
        ("boxed", r"<think>\boxed{1}</think> so it is", None),
        ("boxed", r"\boxed{1}</think>", None),
        ("boxed", r"\boxed{1}</think>\boxed{3}", "3"),
        ("boxed", r"<think>\boxed{1}", None),
        ("boxed", r"<think>a</think>\boxed{1}<think>b", None),
        ("hash", "6*7 = 42\n#### 42", "42"),
        ("hash", "#### 1\n#### 1,234 \nend", "1,234"),
        ("hash", "42", None),
        ("hash", "####", None),
        ("answer_tag", "<answer> 42 </answer>", "42"),
        ("answer_tag", "<answer>1</answer><answer>2</answer>", "2"),
        ("answer_tag", "<answer>1</answer><answer>2", None),
        ("answer_tag", "42", None),
        ("last_number", "2 + 3 = 5", "5"),
        ("last_number", "it is -5.", "-5"),
        ("last_number", "it is −5.", "−5"),
        ("last_number", "8-3", "8-3"),
        ("last_number", "1,234.5 of them", "1,234.5"),
        ("last_number", "a 3/4 share", "3/4"),
        ("last_number", "about .5", ".5"),
        ("last_number", "some 25%", "25%"),
        ("last_number", "x2", None),
        ("last_number", "none", None),
        ("final", r"#### 1 <answer>2</answer> \boxed{3} 4", "3"),
        ("final", r"#### 1 <answer>2</answer> 4", "2"),
        ("final", "4 #### 1", "1"),
        ("final", r"the answer is 1, \boxed{", None),
        ("final", "the answer is 1 <answer>", None),
        ("final", "The answer is 42.", "42"),
        ("final", "The answer is: **42** because 6 times 7 is that", "42"),
        ("final", "The final answer is $\\frac{1}{2}$ of 100.", r"\frac{1}{2}"),
        ("final", "Answer: 3.5\nThis took 4 steps", "3.5"),
        ("final", "the answer is 1. No, the answer is 2.", "2"),
        ("final", "The answer is 1 or 2", "1 or 2"),
        ("final", "The answer is $1$ or $2$", "$1$ or $2$"),
        ("final", "The answer is \\(x=3\\)", "x=3"),
        ("final", "1, 2, 3", "1, 2, 3"),
        ("final", "no idea", None),
        ("final", "</think>", None),
    ],
)
def test_extract(style, text, answer):
    assert extract(text, style) == answer


def test_extract_refuses_unknown_styles():
    with pytest.raises(ValueError, match="one of final, boxed"):
        extract("1", "bold")


MILLION = 1_000_000
HOSTILE = [
    "\\boxed{" * (MILLION // 7),
    "\\boxed " * (MILLION // 7),
    "\\boxed" + " " * MILLION,
    "{" * MILLION,
    "}" * MILLION,
    "\\" * MILLION,
    "<answer>" * (MILLION // 8),
    "<think>" * (MILLION // 7),
    "</think>" * (MILLION // 8),
    "####" * (MILLION // 4),
    "answer" * (MILLION // 6),
    "answer is " * (MILLION // 10),
    "answer is $" + "$ or " * (MILLION // 5),
    "answer" + " " * MILLION,
    "1" * MILLION,
    "1," * (MILLION // 2),
    "1.1" * (MILLION // 3),
    "1/" * (MILLION // 2),
    "-" * MILLION,
    " " * MILLION,
    "\n" * MILLION,
    "½" * MILLION,
]


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: repr(text[:12]))
def test_a_million_characters_take_no_time(text):
    start = time.perf_counter()
    for style in verifiers.RESPONSE_STYLES:
        extract(text, style)
    format_score(text[:190_000], "think_boxed")
    canonical(text)
    answers.numeric("1", text)
    answers.exact("1", text)
    assert time.perf_counter() - start < 5  # measured up to 0.6; anything quadratic takes hours


@pytest.mark.parametrize("text", ["{" * 2000, "(" * 1999 + "1", "1,000," * 330, "1 " * 999 + "x", "\\frac{" * 330, "\\text{" * 330,
                                  "((1,2)," * 280, "e" * 1999, "1^" * 999, "\\text{a}" * 240, "5 " + "a " * 990, "=" * 1999])  # fmt: skip
def test_hostile_answers_are_normalized_in_no_time(text):
    start = time.perf_counter()
    canonical(text)
    with contextlib.suppress(ValueError):  # "===" is an empty gold answer
        answers.exact(text, text[:-1])
    assert time.perf_counter() - start < 1


@pytest.mark.parametrize(
    ("form", "texts"),
    [
        (
            "1000",
            [
                "1000",
                "1,000",
                "1{,}000",
                "1\\,000",
                " $1000$ ",
                "1000.",
                "1000.0",
                "+1000",
                "１０００",
                "10^3",
                "x = 1000",
            ],
        ),
        (
            "0.5",
            ["0.5", ".50", "1/2", "\\frac{1}{2}", "\\dfrac12", "½", "2/4", "5\\times 10^{-1}", "\\left(0.5\\right)"],
        ),
        ("1/3", ["1/3", "\\frac{2}{6}", "0.\\overline{3}"]),
        ("-1.5", ["-1.5", "−1.5", "-1\\frac{1}{2}", "-3/2"]),
        ("0", ["0", "-0", "0.0", "0%"[:1]]),
        ("50%", ["50%", "50\\%", "50.0 \\%", "50 percent"]),
        ("5", ["5", "5 cm", "5\\text{ cm}", "\\$5", "5^\\circ", "5 dollars", "5°"]),
        ("(1,0.5)", ["(1, 1/2)", "\\left( 1 , .5 \\right)"]),
        ("[0,1)", ["[0, 1)", "\\left[0,1.0\\right)"]),
        ("\\{1,2\\}", ["\\{2, 1\\}", "\\left\\{1,2\\right\\}"]),
        ("1,2", ["1, 2", "1,2.0"]),
        ("A", ["A", "(A)", "\\text{A}", "\\textbf{(A)}"]),
        ("no solution", ["No solution.", "\\text{no solution}"]),
        ("2\\sqrt{2}", ["2\\sqrt{2}", "2 \\sqrt{2}", "$2\\sqrt{2}$"]),
        ("\\emptyset", ["\\varnothing", "\\emptyset", "∅"]),
        ("2\\pi", ["2\\pi", "2 π"]),
        ("x^{2}+1", ["x^{2}+1", "x² + 1"]),
    ],
)
def test_canonical(form, texts):
    assert [canonical(text) for text in texts] == [form] * len(texts)
    assert canonical(form) == form


def test_canonical_keeps_apart_what_differs():
    texts = [
        "1",
        "-1",
        "0.1",
        "10",
        "1%",
        "x",
        "y",
        "(1,2)",
        "[1,2]",
        "(2,1)",
        "{1,2}",
        "\\sqrt{2}",
        "A",
        "B",
        "yes",
        "no",
        "",
    ]
    assert len({canonical(text) for text in texts}) == len(texts)


@pytest.mark.parametrize(
    ("gold", "answer", "right"),
    [
        ("42", "42.0", True),
        ("1/2", "0.5", True),
        ("5 cm", "5", True),
        ("5 cm", "5 m", False),
        ("Paris", "\\text{paris}", True),
        ("2\\sqrt{2}", "\\sqrt{8}", False),
        ("1/3", "0.333333", False),
        ("50%", "0.5", False),
        ("42", "", False),
    ],
)
def test_exact(gold, answer, right):
    assert answers.exact(gold, answer) is right


@pytest.mark.parametrize(
    ("gold", "answer", "tolerance", "right"),
    [
        ("42", "42", 0.0, True),
        ("42", "42.0000001", 0.0, False),
        ("100", "100.9", 0.01, True),
        ("100", "101", 0.01, True),  # |101 - 100| = 0.01 * 100, on the border
        ("100", "101.0001", 0.01, False),
        ("100", "99", 0.01, True),
        ("-100", "-100.5", 0.01, True),
        ("-100", "100", 0.01, False),
        ("0", "0.001", 0.01, False),  # relative to nothing
        ("0.000001", "0", 0.01, False),
        ("1/3", "0.3333", 0.001, True),
        ("1/3", "0.3333", 1e-6, False),
        ("1\\frac{1}{2}", "3/2", 0.0, True),
        ("25%", "0.25", 0.0, True),
        ("0.25", "25\\%", 0.0, True),
        ("25%", "25", 0.0, True),
        ("25", "0.25", 0.0, False),
        ("6.02e23", "6.02\\times 10^{23}", 0.0, True),
        ("1,234.5", "1234.5", 0.0, True),
        ("x = 3", "3", 0.0, True),
        ("3 km", "3", 0.0, True),
        ("3 km", "3 m", 0.0, False),
        ("3", "x", 0.5, False),
        ("3", "1 or 3", 0.0, False),
        ("3", "2+1", 0.0, False),  # nothing is evaluated
        ("3", "__import__('os').getpid()", 0.5, False),
        ("3", "nan", 0.5, False),
        ("3", "1e999999999999", 0.5, False),
        ("3", "", 0.5, False),
    ],
)
def test_numeric(gold, answer, tolerance, right):
    assert answers.numeric(gold, answer, tolerance) is right


def test_numeric_with_an_absolute_tolerance():
    assert answers.numeric("0", "0.001", 0.0, absolute=0.001)
    assert not answers.numeric("0", "0.0011", 0.0, absolute=0.001)


@pytest.mark.parametrize(
    ("judge", "gold"), [("numeric", "x"), ("numeric", "1, 2"), ("numeric", ""), ("exact", " "), ("exact", "$$")]
)
def test_gold_answers_that_cannot_be_judged_against(judge, gold):
    with pytest.raises(ValueError, match="gold answer"):
        getattr(answers, judge)(gold, gold)


def test_math_takes_a_response():
    assert verifiers.math(r"\sqrt{8}", r"<think>\boxed{3}</think> Thus \boxed{2\sqrt2}.")
    assert not verifiers.math("7", "")
    assert not verifiers.math("7", r"\boxed{8} rather than 7")
    assert not verifiers.math("3", "1 2 3 4 5")
    with pytest.raises(ValueError, match="not mathematics that can be read"):
        verifiers.math("?", r"\boxed{?}")


@pytest.mark.parametrize(
    ("pattern", "text", "score"),
    [
        ("boxed", r"so \boxed{1}", 1),
        ("boxed", "so 1", 0),
        ("boxed", r"<think>\boxed{1}</think> 1", 0),
        ("boxed", r"so \boxed{", 0),
        ("think_boxed", r"<think>well</think> \boxed{1}", 1),
        ("think_boxed", r"well</think> \boxed{1}", 1),
        ("think_boxed", r"  <think>well</think> \boxed{1}", 1),
        ("think_boxed", r"hm <think>well</think> \boxed{1}", 0),
        ("think_boxed", r"<think></think> \boxed{1}", 0),
        ("think_boxed", r"<think>\boxed{1}</think> 1", 0),
        ("think_boxed", r"<think>a</think> <think>b</think> \boxed{1}", 0),
        ("think_boxed", r"a</think> b</think> \boxed{1}", 0),
        ("think_boxed", r"<think>a \boxed{1}", 0),
        ("think_boxed", r"\boxed{1}", 0),
        (r"<a>.*</a>\d+", "<a>x\ny</a>12", 1),
        (r"<a>.*</a>\d+", "<a>x\ny</a>12 ", 0),
        (r".*", "x" * 300_000, 0),
    ],
)
def test_format_score(pattern, text, score):
    assert format_score(text, pattern) == score


# The pool ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two():
    with VerifierPool(num_workers=2, time_limit=20) as two:
        yield two


def test_kinds_and_order(two):
    checks = [
        Check("math", r"\sqrt{8}", r"\boxed{2\sqrt2}"),
        Check("exact", r"\sqrt{8}", r"\boxed{2\sqrt2}"),
        Check("numeric", "0.5", "The answer is 1/2."),
        Check("numeric", "1/3", r"\boxed{0.333}"),
        Check("numeric", "x", r"\boxed{0.333}"),
        Check("exact", "Paris", "#### paris"),
        Check("math", "5", "no idea"),
        Check("math", "5", "<think> 5"),
        Check("math", "", r"\boxed{5}"),
    ]
    judgements = two.check(checks)
    assert [j.outcome for j in judgements] == [RIGHT, WRONG, RIGHT, WRONG, ERROR, RIGHT, WRONG, WRONG, ERROR]
    assert judgements[4].reason == "ValueError: the gold answer 'x' is not a number"
    assert two.check([]) == []


def test_tolerance_is_the_pools():
    with VerifierPool(num_workers=1, tolerance=0.01) as rough:
        judgements = rough.check([Check("numeric", "1/3", r"\boxed{0.333}"), Check("numeric", "1/3", r"\boxed{0.32}")])
    assert [j.outcome for j in judgements] == [RIGHT, WRONG]


def test_where_the_answer_must_be():
    assert ANSWERS == verifiers.RESPONSE_STYLES
    checks = [Check("exact", "5", response) for response in (r"\boxed{5}", "The answer is 5.", "#### 5", "it is 5")]
    checks.append(Check("reasoning_gym", "{}", "the answer is 5"))
    for style, right in (("boxed", 1), ("hash", 1), ("last_number", 4)):
        with VerifierPool(num_workers=1, answer=style) as strict:
            assert sum(j.outcome == RIGHT for j in strict.check(checks[:4])) == right, style
            assert style == "last_number" or strict.check(checks[4:])[0].outcome == WRONG
    with pytest.raises(ValueError, match="answer='tag' is unknown; one of final, boxed"):
        VerifierPool(answer="tag")


def test_equal_items_are_judged_once(two, monkeypatch):
    sizes = []
    run = two._run
    monkeypatch.setattr(two, "_run", lambda jobs: (sizes.append(len(jobs)), run(jobs)))
    checks = [
        Check("exact", "5", r"\boxed{5}"),
        Check("exact", "5", r"another way to \boxed{5}"),
        Check("exact", "6", r"\boxed{5}"),
        Check("numeric", "5", r"\boxed{5}"),
        Check("exact", "5", r"\boxed{6}"),
        Check("exact", "5", r"\boxed{5}"),
    ]
    assert [j.outcome for j in two.check(checks)] == [RIGHT, RIGHT, WRONG, RIGHT, WRONG, RIGHT]
    assert sizes == [4]


def test_unknown_kinds_are_refused(two):
    with pytest.raises(
        ValueError, match="unknown kind 'maths' of a verifier; one of math, numeric, exact, reasoning_gym"
    ):
        two.check([Check("maths", "5", "5")])


@pytest.mark.parametrize(("kind", "package"), [("math", "math-verify"), ("reasoning_gym", "reasoning-gym")])
def test_missing_packages_are_named(two, monkeypatch, kind, package):
    monkeypatch.setattr(pool, "_is_installed", lambda module: False)
    with pytest.raises(ValueError, match=rf"{package}: pip install 'r2vpo_jax\[reasoning\]'"):
        two.check([Check(kind, "5", "5")])
    with pytest.raises(ValueError, match=package):
        two.check_gold([(kind, "5")])
    assert two.check([Check("exact", "5", "5")])[0].outcome == RIGHT  # the others need nothing


@pytest.mark.parametrize(
    "arguments",
    [{"num_workers": 0}, {"time_limit": 0.0}, {"max_chars": 0}, {"memory_limit_mb": 0}, {"tolerance": -1e-9}],
)
def test_parameters_out_of_range(arguments):
    with pytest.raises(ValueError, match="must be > 0"):
        VerifierPool(**arguments)


def test_check_gold(two):
    pairs = [
        ("math", "42"),
        ("math", "-7"),
        ("math", r"\frac{1}{2}"),
        ("math", "?"),
        ("numeric", "3.5"),
        ("numeric", "many"),
        ("exact", "Paris"),
        ("exact", ""),
        ("math", "{1"),
        ("math", "1}, \\boxed{2"),
        ("math", "x" * 5000),
    ]
    bad = two.check_gold(pairs)
    assert sorted(bad) == [3, 5, 7, 8, 9, 10]
    assert all(bad.values())


def test_check_gold_needs_no_process_for_plain_numbers():
    with VerifierPool() as lazy:
        assert lazy.check_gold([("math", "42"), ("numeric", "-7"), ("exact", "0")]) == {}
        assert all(slot.process is None for slot in lazy._slots)


def gym(dataset, index=0, **config):
    return json.dumps({"dataset": dataset, "config": config, "seed": 5, "index": index})


def test_reasoning_gym(two):
    reasoning_gym = pytest.importorskip("reasoning_gym")
    data = reasoning_gym.create_dataset("chain_sum", seed=5, min_terms=3, max_terms=3)
    golds = [gym("chain_sum", index, min_terms=3, max_terms=3) for index in range(3)]
    right = [data[index]["answer"] for index in range(3)]
    assert len(set(right)) == 3
    countdown = reasoning_gym.create_dataset("countdown", seed=5)[0]
    checks = [
        Check("reasoning_gym", golds[0], f"<think>hm</think><answer>{right[0]}</answer>"),
        Check("reasoning_gym", golds[1], rf"so \boxed{{{right[1]}}}"),
        Check("reasoning_gym", golds[2], right[2]),
        Check("reasoning_gym", golds[1], right[0]),
        Check("reasoning_gym", golds[0], f"{right[0]} or 0"),
        Check("reasoning_gym", golds[0], "<think>"),
        Check("reasoning_gym", gym("countdown"), f"<answer>{countdown['answer']}</answer>"),
        Check("reasoning_gym", gym("countdown"), "<answer>1 + 1</answer>"),  # scores 0.01
        Check("reasoning_gym", gym("prime_factorization"), "no idea"),  # makes the scorer raise
        Check("reasoning_gym", gym("no_such_dataset"), "1"),
        Check("reasoning_gym", "not JSON", "1"),
    ]
    judgements = two.check(checks)
    assert [j.outcome for j in judgements] == [RIGHT] * 3 + [WRONG] * 3 + [RIGHT, WRONG, WRONG, ERROR, ERROR]
    assert "no_such_dataset" in judgements[9].reason
    # the stored answer of graph_color does not score
    assert list(two.check_gold([("reasoning_gym", golds[0]), ("reasoning_gym", gym("graph_color"))])) == [1]


def test_imports_are_light():
    """Neither the package nor a fresh worker's modules bring JAX, NumPy or SymPy."""
    code = (
        "import sys, r2vpo_jax.verifiers, r2vpo_jax.verifiers.worker, r2vpo_jax.verifiers.procedural;"
        "print(sorted({'jax', 'flax', 'numpy', 'sympy', 'math_verify', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
