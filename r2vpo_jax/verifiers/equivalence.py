r"""Whether two final answers are the same mathematics: structure and numbers by our own rules, expressions by Math-Verify.

Rules, from the outside in (gold on the left):
  lists     "1, 2", "1 or 2", "x=1, x=2" and \{1, 2\} are unordered and the same thing; a scalar is not a list of it and
            others, so a response that names several candidates is wrong. "\pm 2" is "2, -2".
  tuples    (1, 2) is ordered; a bare "1, 2" in the same order passes for it, \{1, 2\} and [1, 2] do not.
  intervals brackets must be the same; unions are compared piece by piece, then by SymPy; x > 3 is (3, \infty).
  equations "x = 3" is "3"; of an answer "a = b = c" the last side counts, and plain numbers on the way must agree. A gold
            equation is compared as a whole, or with the right-hand side if its left-hand side is a single name.
  units     5 cm is 5, but not 5 m; there is no conversion.
  percent   50% is 50 and 0.5, and 50 is 50%.
  numbers   exact; only a decimal of six or more significant digits may stand for a number without a finite decimal
            expansion, within 1e-6 relative.
  words     compared as text, without case: Math-Verify would take them for products of letters.
  clock     11:30 is not 23:60, though 1:2 is 2:4.
  the rest  Math-Verify (strict), without its own time limits and fallbacks: a gold that it cannot read raises ValueError, an
            answer that it cannot read is wrong.
"""

import functools
import re
from fractions import Fraction

from r2vpo_jax.verifiers import notation

_TOLERANCE = Fraction(1, 10**6)
_CONNECTIVES = re.compile(
    r"\s*(?:,\s*)?(?:\\text\s*\{\s*(?:or|and)\s*\}|(?<![a-zA-Z\\])(?:or|and)(?![a-zA-Z])|\\(?:lor|vee|land|wedge)(?![a-zA-Z]))\s*"
)
_MEMBER = re.compile(r"\s*\(?\\?[a-zA-Z]\)?\s*\\in(?![a-zA-Z])\s*")
_NAMES = re.compile(r"\(\s*[A-Za-z](?:\s*,\s*[A-Za-z])+\s*\)")
_SET_BUILDER = re.compile(
    r"\\\{\s*[a-z]\s*(?:\\in\s*(?:\\mathbb\s*\{\s*R\s*\}|\\mathbb\s+R|\\R)\s*)?(?:\\mid|\\vert|\||:)(.*)\\\}", re.DOTALL
)
_CLOCK = re.compile(r"\d{1,2}:\d{2}")
_WORD = re.compile(r"(?:\\text\s*\{[^{}]*\}|[A-Za-z'\-. ])+")
_LATEX_WORDS = re.compile(
    r"(?<![a-zA-Z\\])(pi|infinity|infty|theta|alpha|beta|sqrt|sin|cos|tan|log|ln|exp)(?![a-zA-Z])|(?<![a-zA-Z\\])(sqrt|pi)(?=[\d(])"
)
_ROOT = re.compile(r"\\sqrt\s*\(")
_TRIGONOMETRIC = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)")
_IN_DEGREES = re.compile(r"(\d+(?:\.\d+)?)\s*\^\{\\circ\}")
_COMMAND = re.compile(r"\\text\s*\{[^{}]*\}|\\[A-Za-z]+|[A-Za-z]{3,}")
_PRODUCT_LETTERS = 3


def same(gold: str, answer: str) -> bool:
    """Whether a cleaned answer is the cleaned gold.

    Raises:
      ValueError: nothing can be made of the gold.
    """
    gold, answer = _plain(gold), _plain(answer)
    gold_parts, answer_parts = _elements(gold), _elements(answer)
    if gold_parts is None and answer_parts is None:
        return _same_single(gold, answer)
    if gold_parts is not None and answer_parts is not None:
        return _same_unordered(gold_parts, answer_parts)
    brackets, inner = notation.bracketed(gold)
    if gold_parts is None and brackets == "()" and inner and not notation.is_set(answer):
        return len(inner) == len(answer_parts) and all(map(_same_single, inner, answer_parts))
    brackets, inner = notation.bracketed(answer)
    if answer_parts is None and brackets == "()" and inner and not notation.is_set(gold):
        return len(inner) == len(gold_parts) and all(map(_same_single, gold_parts, inner))
    golds = [gold] if gold_parts is None else _distinct(gold_parts)
    answers = [answer] if answer_parts is None else _distinct(answer_parts)
    if len(golds) == len(answers) == 1:
        return _same_single(golds[0], answers[0])
    for part in golds:
        _check_gold(part)
    return False


def _plain(text) -> str:
    r"""Without what only introduces: x \in S is S, {x | c} is c, (x, y) = (1, 2) is x = 1, y = 2."""
    match = _SET_BUILDER.fullmatch(text)
    text = match[1].strip() if match else _MEMBER.sub("", text, count=1)
    sides = notation.sides(text)
    if len(sides) == 2 and _NAMES.fullmatch(sides[0]):
        brackets, values = notation.bracketed(sides[1])
        names = sides[0].strip("() ").split(",")
        if brackets == "()" and len(values) == len(names):
            return ", ".join(f"{name.strip()} = {value}" for name, value in zip(names, values, strict=True))
    return text


def _elements(text) -> list[str] | None:
    """Members of an unordered collection, or None if it is one thing."""
    if notation.number(notation.split_unit(text)[0]) is not None:
        return None
    if notation.is_set(text):
        inner = text[2:-2]
        if re.search(r"\\mid|\||:", inner):
            return None  # {x | ...}
        return [piece for part in notation.split(inner) for piece in _signs(part)]
    joined = _CONNECTIVES.sub(",", text) if not notation.has_relation(text) else text
    parts = [part for part in notation.split(joined) if part]
    if notation.has_relation(text) and len(parts) == 1:
        return None
    pieces = [piece for part in parts for piece in _signs(part)]
    return pieces if len(pieces) > 1 else None


def _signs(text) -> list[str]:
    if len(re.findall(r"\\pm(?![a-zA-Z])", text)) != 1 or text.startswith(("(", "[")):
        return [text]
    return [re.sub(r"\\pm(?![a-zA-Z])", sign, text).strip().removeprefix("+") for sign in "+-"]


def _same_unordered(golds, answers) -> bool:
    golds, answers = _distinct(golds), _distinct(answers)
    if len(golds) != len(answers):
        for gold in golds:
            _check_gold(gold)
        return False
    if len(golds) > 20:  # matching costs the square
        return sorted(golds) == sorted(answers)
    left = list(answers)
    for gold in golds:
        found = next((i for i, answer in enumerate(left) if _same_single(gold, answer)), None)
        if found is None:
            return False
        left.pop(found)
    return True


def _distinct(parts) -> list[str]:
    seen = {}
    for part in parts:
        value = notation.number(part)
        seen.setdefault((value.value, value.percent) if value else part.replace(" ", ""), part)
    return list(seen.values())


def _same_single(gold, answer) -> bool:
    if not answer.strip():
        return False
    gold_sides, answer_sides = notation.sides(gold), notation.sides(answer)
    if len(gold_sides) > 1 or len(answer_sides) > 1:
        return _same_equation(gold, answer, gold_sides, answer_sides)
    gold_brackets, gold_inner = notation.bracketed(gold)
    answer_brackets, answer_inner = notation.bracketed(answer)
    if gold_inner and answer_inner:
        if gold_brackets != answer_brackets or len(gold_inner) != len(answer_inner):
            return False
        return all(map(same, gold_inner, answer_inner))
    if r"\cup" in gold and r"\cup" in answer:
        golds, answers = _pieces(gold), _pieces(answer)
        if len(golds) == len(answers) and _same_unordered(golds, answers):
            return True
        return _same_expression(gold, answer)
    if gold_inner and not notation.has_relation(answer) and r"\cup" not in answer:
        _check_gold(gold)
        return False
    return _same_quantity(gold, answer)


def _pieces(text) -> list[str]:
    return [part.strip() for part in re.split(r"\\cup(?![a-zA-Z])", text)]


def _same_equation(gold, answer, gold_sides, answer_sides) -> bool:
    if not all(gold_sides):
        raise ValueError(f"the gold answer {gold[:200]!r} is not mathematics that can be read")
    numbers = [value for value in map(notation.number, answer_sides) if value is not None]
    if any(not same_number(value, numbers[0]) for value in numbers):
        return False
    if len(gold_sides) == 1:
        return same(gold, answer_sides[-1])
    named = notation.is_name(gold_sides[0])
    if len(answer_sides) == 1:
        if not named:
            _parse_gold(gold)
            return False
        return same(gold_sides[-1], answer)
    if named and notation.is_name(answer_sides[0]):
        letters = [re.sub(r"[\s{}\\]", "", sides[0]) for sides in (gold_sides, answer_sides)]
        return letters[0] == letters[1] and same(gold_sides[-1], answer_sides[-1])
    return _same_expression(gold, answer)


def _same_quantity(gold, answer) -> bool:
    """Numbers with units, words, and expressions."""
    (gold_body, gold_unit), (answer_body, answer_unit) = notation.split_unit(gold), notation.split_unit(answer)
    if gold_unit and answer_unit and gold_unit != answer_unit:
        _check_gold(gold_body)
        return False
    if _CLOCK.fullmatch(gold_body) and _CLOCK.fullmatch(answer_body):
        return gold_body == answer_body
    a, b = notation.number(gold_body), notation.number(answer_body)
    if a is not None and b is not None:
        return same_number(a, b)
    gold_word, answer_word = word(gold_body), word(answer_body)
    if gold_word is not None or answer_word is not None:
        if gold_word is None:
            _check_gold(gold_body)
        return gold_word == answer_word
    return _same_expression(gold_body, answer_body)


def same_number(gold: notation.Number, answer: notation.Number) -> bool:
    if gold.percent == answer.percent:
        return _close(gold, answer, gold.value, answer.value)
    scaled = (gold.value / 100, answer.value) if gold.percent else (gold.value, answer.value / 100)
    return _close(gold, answer, *scaled) or _close(gold, answer, gold.value, answer.value)


def _close(gold, answer, a, b) -> bool:
    if a == b:
        return True
    if not (gold.approximate and not _finite(b)) and not (answer.approximate and not _finite(a)):
        return False
    return abs(a - b) <= _TOLERANCE * max(abs(a), abs(b))


def _finite(value) -> bool:
    """Whether the decimal expansion ends."""
    denominator = value.denominator
    for prime in (2, 5):
        while denominator % prime == 0:
            denominator //= prime
    return denominator == 1


def word(text: str) -> str | None:
    r"""The words of a cleaned answer in one spelling, None where it is mathematics: "(A)", "\text{Evelyn}", "no solution".

    Up to three bare letters are a product of variables, except for a single capital letter in brackets, yes, no, odd, none.
    """
    text = text.strip()
    choice = re.fullmatch(r"\(?(?:\\text\s*\{)?\s*\(?([A-J])\)?\s*\}?\)?", text)
    if choice and (text.startswith("(") or "text" in text or len(text) == 1):
        return choice[1].lower()
    if not _WORD.fullmatch(text):
        return None
    spelled = " ".join(re.sub(r"\\text\s*\{([^{}]*)\}", r" \1 ", text).replace(".", " ").lower().split())
    if not re.search("[a-z]", spelled) or re.search(r"\d", spelled):
        return None
    if _LATEX_WORDS.search(spelled):
        return None
    letters = re.sub("[^a-z]", "", spelled)
    if r"\text" not in text and spelled not in ("yes", "no", "odd", "none"):
        parts = re.split(r"[\s\-]+", spelled)
        if len(letters) <= _PRODUCT_LETTERS or all(len(part) <= 1 for part in parts):
            return None
    return spelled if len(letters) > 1 else None


def _check_gold(gold) -> None:
    """Raises ValueError where nothing can be made of a gold, although the answer is known to be another."""
    if notation.number(gold) is None and word(gold) is None and _elements(gold) is None:
        body, _ = notation.split_unit(gold)
        if notation.number(body) is None and not notation.bracketed(gold)[1]:
            _parse_gold(body)


# Math-Verify -------------------------------------------------------------------------------------------------


def _same_expression(gold, answer) -> bool:
    from math_verify import verify

    parsed_gold = _parse_gold(gold)
    if _variables(gold) != _variables(answer) and _variables(gold.lower()) == _variables(answer.lower()):
        return False  # Math-Verify takes a for A
    parsed = _parse(answer)
    if parsed is None or not _is_defined(parsed):
        return False
    return verify(
        parsed_gold, parsed, strict=True, allow_set_relation_comp=True, timeout_seconds=None, raise_on_error=False
    )


def _variables(text) -> set[str]:
    return set(re.findall("[A-Za-z]", _COMMAND.sub(" ", text)))


def _parse_gold(gold):
    parsed = _parse(gold)
    if parsed is None or not _is_defined(parsed):
        raise ValueError(f"the gold answer {gold[:200]!r} is not mathematics that can be read")
    return parsed


def _is_defined(expression) -> bool:
    import sympy

    return not expression.has(sympy.nan, sympy.zoo)


@functools.lru_cache(maxsize=512)  # a group of responses has one gold
def _parse(text: str):
    """A SymPy object, or None."""
    import sympy
    from math_verify import parse

    text = _for_latex(text)
    if not text:
        return None
    found = parse(
        rf"\boxed{{{text}}}",
        extraction_config=[_config()],
        fallback_mode="no_fallback",
        extraction_mode="first_match",  # any_match would go on to any fraction inside what it could not read
        parsing_timeout=None,
        raise_on_error=False,
    )
    if not found or isinstance(found[0], str):
        return None
    expression = found[0]
    imaginary = [s for s in getattr(expression, "free_symbols", ()) if s.name in ("i", "imath")]
    return expression.subs({s: sympy.I for s in imaginary}) if imaginary else expression


def _for_latex(text) -> str:
    text = _LATEX_WORDS.sub(lambda m: "\\" + (m[1] or m[2]).replace("infinity", "infty") + " ", text)
    text = _braced_roots(text)
    if _TRIGONOMETRIC.search(text):
        text = _IN_DEGREES.sub(r"{\\left(\\frac{\1 \\pi}{180}\\right)}", text)
    text = re.sub(r"\^\s*(-?\d{2,})", r"^{\1}", text)
    text = re.sub(r"_\s*(\d{2,})", r"_{\1}", text)
    text = text.replace("*", r" \cdot ")
    return re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text) if not text.startswith(("(", "[", r"\{")) else text


def _braced_roots(text) -> str:
    r"""\sqrt(a) as \sqrt{a}."""
    position = 0
    while (match := _ROOT.search(text, position)) is not None:
        position = match.end()
        end = notation.closing(text, position - 1)
        if end > 0 and text[end] == ")":
            text = rf"{text[: match.start()]}\sqrt{{{text[position:end]}}}{text[end + 1 :]}"
    return text


@functools.cache
def _config():
    import logging

    from latex2sympy2_extended import NormalizationConfig
    from math_verify import LatexExtractionConfig

    logging.getLogger("math_verify").setLevel(logging.CRITICAL)  # its time limits are off on purpose: it warns of that
    return LatexExtractionConfig(
        try_extract_without_anchor=False,
        boxed_match_priority=0,
        normalization_config=NormalizationConfig(
            basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="last"
        ),
    )
