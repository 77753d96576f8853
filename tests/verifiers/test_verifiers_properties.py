r"""Properties of the judge on answers of public benchmarks (golds.json: the answer-bearing parts, by source).

A gold is equal to each of its spellings by a list of habits of LaTeX, both ways round; it is never equal to a near miss, another
value that is written much like it. All in this process, since every answer here is known to end.
"""

import itertools
import json
import pathlib
import random
import re
from fractions import Fraction

import pytest

from r2vpo_jax.verifiers import answers, canonical, extract, numbers

pytest.importorskip("math_verify")
SOURCES = json.loads((pathlib.Path(__file__).parent / "golds.json").read_text())
GOLDS = list(dict.fromkeys(itertools.chain.from_iterable(SOURCES.values())))
_INTEGER = re.compile(r"-?\d+")
_VALUE = re.compile(r"-?\d+(?:\.\d+)?|-?\d*\\pi|-?\d*\\sqrt\{\d+\}|-?\\frac\{\d+\}\{\d+\}")
_LONG = re.compile(r"(?<![\d._,!{^])\d{5,}(?![\d.])")
_FUNCTIONS = r"\\(sin|cos|tan|ln|log|arcsin|arctan)(?![a-z])"
_CLOSED = re.compile(r"[(\[]|\\[{}]|\\left|\\begin")  # where commas part the members of something ordered


def _sub(pattern, replacement):
    return lambda gold: re.sub(pattern, replacement, gold)


def _if(pattern, change):
    return lambda gold: change(gold) if re.fullmatch(pattern, gold) else gold


def _grouped(separator):
    return lambda gold: _LONG.sub(lambda m: f"{int(m[0]):,}".replace(",", separator), gold)


def _members(gold):
    """Of a list that is written with commas only."""
    parts = [part.strip() for part in gold.split(",")]
    plain = not _CLOSED.search(gold) and r"\text" not in gold and not re.search(r"\\!|\{,", gold) and all(parts)
    return parts if plain and len(parts) > 1 and not re.fullmatch(r"\\?\$?\d{1,3}(,(\\!)?\d{3})+.*", gold) else []


def _joined(connective):
    def change(gold):
        parts = _members(gold)
        return f"{', '.join(parts[:-1])}{connective}{parts[-1]}" if parts else gold

    return change


HABITS = {
    r"\dfrac": _sub(r"\\[dt]?frac", r"\\dfrac"),
    r"\tfrac": _sub(r"\\[dt]?frac", r"\\tfrac"),
    "dollars": lambda gold: f"${gold}$",
    r"\( \)": lambda gold: rf"\({gold}\)",
    r"\[ \]": lambda gold: rf"\[ {gold} \]",
    "trailing dot": lambda gold: gold + ".",
    r"\displaystyle": lambda gold: r"\displaystyle " + gold,
    "braces": lambda gold: f"{{{gold}}}",
    "a box in the box": lambda gold: rf"\boxed{{{gold}}}",
    r"no \left, \right": lambda gold: gold.replace(r"\left", "").replace(r"\right", ""),
    "spaces around relations": _sub(r"([+=<>])", r" \1 "),
    "thin spaces": _sub(r"(?<=[+=])", r"\\,"),
    r"groups 10,\!080": _grouped(r",\!"),
    "groups 10{,}080": _grouped("{,}"),
    r"groups 10\,080": _grouped(r"\,"),
    r"groups of \! as commas": _sub(r",\\!(?! )", ","),
    r"no groups of \!": _sub(r",\\!", ""),
    r"\frac12": _sub(r"\\frac\{(\d)\}\{(\d)\}", r"\\frac\1\2"),
    r"\frac{1}2": _sub(r"\\frac\{(\d+)\}\{(\d)\}(?!\d)", r"\\frac{\1}\2"),
    r"\frac1{2}": _sub(r"\\frac\{(\d)\}\{", r"\\frac\1{"),
    r"\frac\pi2": _sub(r"\\frac\{\\pi\}\{(\d)\}(?!\d)", r"\\frac\\pi\1"),
    "1/2": _sub(r"^(-?)\\frac\{(\d+)\}\{(\d+)\}$", r"\1\2/\3"),
    r"\sqrt2": _sub(r"\\sqrt\{(\d|x)\}", r"\\sqrt\1"),
    "√2": _sub(r"\\sqrt\{(\d+)\}", r"√\1"),
    "π": _sub(r"\\pi(?![a-z])", "π"),
    "∞": _sub(r"\\infty(?![a-z])", "∞"),
    "−": lambda gold: gold if r"\text" in gold else gold.replace("-", "−"),
    "°": _sub(r"\^\{?\\circ\}?", "°"),
    r"\leqslant": _sub(r"\\(le|ge)q?(?![a-z])", r"\\\1qslant"),
    r"\cdot": _sub(r"(?<=\d)(?=\\sqrt|\\pi)", r"\\cdot "),
    r"\mathrm{e}": _sub(r"(?<![A-Za-z\\{])e(?=\^)", r"\\mathrm{e}"),
    r"\operatorname": _sub(_FUNCTIONS, r"\\operatorname{\1}"),
    r"\mathrm of functions": _sub(_FUNCTIONS, r"\\mathrm{\1}\\,"),
    r"\mathbf of numbers": _if(r"-?\d+(\.\d+)?", lambda gold: rf"\mathbf{{{gold}}}"),
    r"\text of numbers": _if(r"-?\d+(\.\d+)?", lambda gold: rf"\text{{{gold}}}"),
    "1.0": _if(_INTEGER, lambda gold: gold + ".0"),
    r"\text of words": _if(r"[A-Za-z]{2,}( [a-z]+)*", lambda gold: rf"\text{{{gold}}}"),
    r"no \text": _sub(r"^\\text\{([A-Za-z ]+)\}$", r"\1"),
    r"\mathrm of words": _sub(r"\\text\{([A-Za-z]+)\}", r"\\mathrm{\1}"),
    r"\text{ cm}": _if(_VALUE, lambda gold: gold + r"\text{ cm}"),
    "cm": _if(_VALUE, lambda gold: gold + " cm"),
    r"\mathrm{~m} / \mathrm{s}": _if(_VALUE, lambda gold: gold + r" \mathrm{~m} / \mathrm{s}"),
    r"\text{m}\,\text{s}^{-1}": _if(_VALUE, lambda gold: gold + r"\,\text{m}\,\text{s}^{-1}"),
    "x = ": lambda gold: gold if re.search(r"[=<>,:]|\\(le|ge|in|text|ne|pm)", gold) else "x = " + gold,
    "list backward": lambda gold: ", ".join(reversed(_members(gold))) or gold,
    "and": _joined(r" \text{ and } "),
    ", or": _joined(", or "),
    r"\text{, and }": _joined(r"\text{, and }"),
    r"\{ \}": lambda gold: rf"\{{{gold}\}}" if _members(gold) and "=" not in gold else gold,
    r"x \in": lambda gold: r"\theta \in " + gold if re.match(r"(\\left)?[(\[][^)\]]*,[^)\]]*\\infty", gold) else gold,
}


def _spellings():
    for gold in GOLDS:
        for habit, change in HABITS.items():
            if (spelled := change(gold)) != gold:
                yield gold, habit, spelled


def _judge(gold, answer):
    try:
        return answers.same(gold, answer)
    except ValueError as error:
        return str(error)


def test_a_gold_is_each_of_its_spellings():
    spellings = list(_spellings())
    assert len(spellings) >= 2000
    assert {habit for _, habit, _ in spellings} == set(HABITS), "a habit that no gold has"
    wrong = [
        (habit, a, b, found)
        for gold, habit, spelled in spellings
        for a, b in ((gold, spelled), (spelled, gold))
        if (found := _judge(a, b)) is not True
    ]
    assert not wrong, f"{len(wrong)} of {2 * len(spellings)}, as {wrong[:5]}"


# Near misses -------------------------------------------------------------------------------------------------

_TINY = (r"10^{-7}", r"10^{-20}", r"10^{-40}", r"\frac{1}{10^{60}}")


def _misses(gold):
    """Other values, as spellings."""
    value = numbers.number(gold)
    if value is not None and not value.percent:
        yield from _misses_of_number(value.value)
    elif re.fullmatch(r"-?(\d+|\\frac\{\d+\}\{\d+\})?\s?(\\pi|\\sqrt\{\d+\}|e)", gold):
        yield from (f"{gold}+{tiny}" for tiny in _TINY)
        yield from (rf"\frac{{{gold}}}{{{10**20}}}", "0", f"2{gold}" if gold[0] == "\\" else "-" + gold, gold + "^2")
    elif re.search(r"[a-z]", re.sub(r"\\[a-z]+", "", gold)) and not re.search(
        r"[=<>,:]|\\(text|le|ge|in|pm|begin|mathbb)", gold
    ):
        yield from (f"{gold}+{tiny}" for tiny in _TINY[1:])
    for number in re.finditer(r"(?<![\d.])\d+(?![\d.%])", gold):  # one digit more or less somewhere in it
        yield f"{gold[: number.start()]}{int(number[0]) + 1}{gold[number.end() :]}"
    pair = re.fullmatch(r"\((-?\d+),\s*(-?\d+)\)", gold)
    if pair:
        a, b = pair.groups()
        yield from (f"[{a},{b}]", f"({a},{b}]", rf"\{{{a},{b}\}}", f"({a},{b},{b})", a, f"({a},{int(b) + 1})")
        if a != b:
            yield f"({b},{a})"
    members = _members(gold)
    if len(set(members)) == len(members) > 1:  # a member twice counts once
        yield from (members[0], ", ".join(members[:-1]), ", ".join([*members, "271828"]))
    if re.fullmatch(r"\\text\{[A-Za-z ]{2,}\}", gold):
        word = gold[6:-1]
        yield from (word + "s", word[1:] + word[0] if len(set(word)) > 1 else "x", "not " + word, word + " or 0", "1")


def _misses_of_number(value: Fraction):
    for delta in (Fraction(1), Fraction(1, 10**7), Fraction(-1, 10**20), Fraction(1, 10**40), Fraction(1, 7)):
        other = value + delta
        yield rf"\frac{{{other.numerator}}}{{{other.denominator}}}"
    yield from (f"{_spelled(value)}+{tiny}" for tiny in _TINY)
    yield from (
        f"{_spelled(value)} or {_spelled(value + 1)}",
        f"{_spelled(value)}x",
        rf"{_spelled(value)}\pi" if value else "x",
    )
    if value:
        yield from (_spelled(-value), _spelled(value * 10), _spelled(value / 10), "0", rf"\pm {_spelled(value)}")


def _spelled(value: Fraction) -> str:
    return str(value) if value.denominator == 1 else rf"\frac{{{value.numerator}}}{{{value.denominator}}}"


def test_a_near_miss_is_never_a_gold():
    misses = [(gold, miss) for gold in GOLDS for miss in dict.fromkeys(_misses(gold))][::2]
    assert len(misses) >= 2000
    taken = [(gold, miss) for gold, miss in misses if _judge(gold, miss) is not False]
    assert not taken, f"{len(taken)} of {len(misses)}, as {taken[:5]}"


def _spellings_of(value: Fraction, draw):
    n, d = value.numerator, value.denominator
    yield from (f"{n}/{d}", rf"\frac{{{n}}}{{{d}}}", rf"\dfrac{{{3 * n}}}{{{3 * d}}}")
    if d == 1:
        yield from (f"{n:,}", f"{n:,}".replace(",", r",\!"), f"{n}.0", rf"{n}\text{{ apples}}")
    power = draw.randrange(3, 9)
    if (scaled := value * 10**power).denominator == 1:
        yield rf"{scaled} \times 10^{{-{power}}}"


def test_rational_numbers_are_compared_exactly():
    """Against Python's fractions: two spellings are equal where the values are, and only there."""
    draw = random.Random(0)
    values = [number.value for gold in GOLDS if (number := numbers.number(gold)) is not None and number.value < 10**9][
        ::4
    ]
    for value in values:
        others = [
            value,
            value + Fraction(1, 10 ** draw.randrange(1, 30)),
            value * (1 + Fraction(1, 10 ** draw.randrange(6, 30))),
        ]
        for other in others:
            for a, b in itertools.product(_spellings_of(value, draw), _spellings_of(other, draw)):
                assert answers.same(a, b) is (value == other), (a, b)
                assert answers.numeric(a, b, 0.0) is (value == other), (a, b)
                assert answers.exact(a, b) is (value == other), (a, b)
                assert (canonical(a) == canonical(b)) is (value == other), (a, b)


@pytest.mark.parametrize(
    "cut", [r"so it is \boxed{", "The answer is", "Answer:", "<answer>", "####", "<think> so it is ", ""]
)
def test_a_response_without_an_answer_has_none(cut):
    for gold in GOLDS:
        shown = f"<think> {gold} </think> " if not cut.startswith("<think>") else f"<think> {gold}"
        assert extract(shown + cut) is None, gold
        if cut and not cut.startswith("<think>"):
            assert extract(f"First ${gold}$. " + cut) is None, gold
