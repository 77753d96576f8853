r"""Whether two final answers are the same mathematics: structure and numbers by our own rules, the rest by `expressions`.

Rules, from the outside in (gold on the left):
  lists     "1, 2", "1 or 2", "x=1, x=2" and \{1, 2\} are unordered and the same thing; a scalar is not a list of it and
            others, so a response that names several candidates is wrong. "\pm 2" is "2, -2".
  tuples    (1, 2) is ordered; a bare "1, 2" in the same order passes for it, \{1, 2\} and [1, 2] do not; coordinates with
            names, "y = 2, x = 1", are taken in the order of these. 1:2:3 is 2:4:6.
  choices   "(B) 12" and "B. 12" are B, and 12 where the gold has both.
  intervals brackets must be the same; unions are compared piece by piece, then by SymPy; x > 3 is (3, \infty), S is x \in S; \mathbb{R} and "all real
            numbers" are (-\infty, \infty), "no solution" is \emptyset.
  equations "x = 3" is "3"; of an answer "a = b = c" the last side counts, and plain numbers on the way must agree. A gold
            equation is compared as a whole, or with the right-hand side if its left-hand side is a single name.
  units     5 cm is 5, but not 5 m; there is no conversion. 5 million is 5000000, not 5.
  percent   50% is 50 and 0.5, and 50 is 50%; 50 cm is not.
  numbers   exact; only a decimal of six or more significant digits may stand for a number without a finite decimal
            expansion, within 1e-6 relative.
  words     compared as text, without case: Math-Verify would take them for products of letters.
  clock     11:30 is not 23:60, though 1:2 is 2:4; 15:30 is 3:30 p.m.
  the rest  `expressions`: a gold that cannot be read raises ValueError, an answer that cannot be read is wrong.
"""

import re
from fractions import Fraction

from r2vpo_jax.verifiers import expressions, notation, numbers, units, words

_TOLERANCE = Fraction(1, 10**6)
_CONNECTIVES = re.compile(
    r"\s*(?:,\s*)?(?:\\text\s*\{\s*,?\s*(?:or|and)\s*\}|(?<![a-zA-Z\\])(?:or|and)(?![a-zA-Z])|\\(?:lor|vee|land|wedge)(?![a-zA-Z]))\s*"
)
_OR = re.compile(r"\s*(?:\\text\s*\{\s*or\s*\}|(?<![a-zA-Z\\])or(?![a-zA-Z])|\\(?:lor|vee)(?![a-zA-Z]))\s*")
_BOTH = re.compile(r"^(?:\\text\s*\{\s*(?:either|both)\s*\}|either|both)\s+(?=.*(?:and|or))", re.IGNORECASE)
_MEMBER = re.compile(rf"\s*\(?\s*(?:{notation.NAME}|[A-Za-z](?:\s*,\s*[A-Za-z])+)\s*\)?\s*\\in(?![a-zA-Z])\s*")
_ASSIGNMENT = re.compile(r"([A-Za-z])\s*=(?!=)")
_NO_SOLUTION = re.compile(r"(?:\\text\s*\{)?\s*no\s+solutions?\.?\s*\}?", re.IGNORECASE)
_ALL_REALS = re.compile(
    r"\\mathbb\s*\{\s*R\s*\}|(?:\\text\s*\{)?\s*(?:the set of )?all (?:real numbers|reals)\.?\s*\}?", re.IGNORECASE
)
_NAMES = re.compile(r"\(\s*[A-Za-z](?:\s*,\s*[A-Za-z])+\s*\)")
_SET_BUILDER = re.compile(
    rf"\\\{{\s*{notation.NAME}\s*(?:\\in\s*(?:\\mathbb\s*\{{\s*R\s*\}}|\\mathbb\s+R|\\R)\s*)?(?:\\mid|\||:|\\colon)(.*)\\\}}",
    re.DOTALL,
)
_INTERVAL_TWICE = re.compile(r"[^:]*(?:[<>]|\\(?:le|ge|lt|gt)(?![a-zA-Z]))[^:]*:\s*([\[(][^:]*[\])])")
_SIGN = re.compile(r"\\(?:pm|mp)(?![a-zA-Z])")
_REPEATING = re.compile(r"\\(?:overline|bar|dot)(?![a-zA-Z])")
_FEW = 8  # members of a list of which each is compared with each


def same(gold: str, answer: str) -> bool:
    """Whether a cleaned answer is the cleaned gold.

    Raises:
      ValueError: nothing can be made of the gold.
    """
    found = _same_choice(gold, answer)
    if found is not None:
        return found
    gold, answer = _plain(gold), _plain(answer)
    gold_parts, answer_parts = _elements(gold), _elements(answer)
    if gold_parts is None and answer_parts is None:
        return _same_single(gold, answer)
    if gold_parts is not None and answer_parts is not None:
        return _same_unordered(gold_parts, answer_parts)
    brackets, inner = notation.bracketed(gold)
    if gold_parts is None and brackets == "()" and inner and not notation.is_set(answer):
        answer_parts = _by_name(answer_parts)
        return len(inner) == len(answer_parts) and all(map(_same_single, inner, answer_parts))
    brackets, inner = notation.bracketed(answer)
    if answer_parts is None and brackets == "()" and inner and not notation.is_set(gold):
        return len(inner) == len(gold_parts) and all(map(_same_single, gold_parts, inner))
    return _same_unordered(
        [gold] if gold_parts is None else gold_parts, [answer] if answer_parts is None else answer_parts
    )


def _by_name(parts) -> list[str]:
    """Coordinates that have names in the order of these: y = 1, x = 2 is (2, 1)."""
    names = [match and match[1] for match in map(_ASSIGNMENT.match, parts)]
    return [part for _, part in sorted(zip(names, parts, strict=True))] if None not in names else parts


def _same_choice(gold, answer) -> bool | None:
    """Verdict on a choice and its text, "(B) 12", against the letter, the text or both; None where neither is one."""
    letter, text = words.choice(gold)
    chosen, said = words.choice(answer)
    if letter and chosen:
        return letter == chosen and same(text, said)
    if letter:
        spelled = words.word(answer)
        return spelled == letter.lower() if spelled is not None and len(spelled) == 1 else same(text, answer)
    if chosen:
        spelled = words.word(gold)
        return spelled == chosen.lower() if spelled is not None and len(spelled) == 1 else None
    return None


def _plain(text) -> str:
    r"""Without what only introduces: x \in S is S, {x | c} is c, (x, y) = (1, 2) is x = 1, y = 2."""
    match = _SET_BUILDER.fullmatch(text) or _INTERVAL_TWICE.fullmatch(text)
    text = match[1].strip() if match else _without_member(text)
    if _NO_SOLUTION.fullmatch(text):
        return r"\emptyset"
    if _ALL_REALS.fullmatch(text):
        return r"(-\infty,\infty)"
    if notation.has_relation(text):
        pieces = _OR.split(text)
        intervals = [notation.interval(piece) for piece in pieces] if len(pieces) > 1 else [None]
        if None not in intervals and len({name for name, _ in intervals}) == 1:
            return r"\cup".join(spelled for _, spelled in intervals)
    sides = notation.sides(text)
    if len(sides) == 2 and _NAMES.fullmatch(sides[0]):
        brackets, values = notation.bracketed(sides[1])
        names = sides[0].strip("() ").split(",")
        if brackets == "()" and len(values) == len(names):
            return ", ".join(f"{name.strip()} = {value}" for name, value in zip(names, values, strict=True))
    return text


def _without_member(text) -> str:
    match = _MEMBER.match(text) if r"\in" in text else None
    return text[match.end() :] if match else text


def _elements(text) -> list[str] | None:
    """Members of an unordered collection, or None if it is one thing."""
    if numbers.number(units.split_unit(text)[0]) is not None:
        return None
    if notation.is_set(text):
        inner = text[2:-2]
        if re.search(r"\\mid|\||:", inner):
            return None  # {x | ...}
        return [piece for part in notation.split(inner) for piece in _signs(part)]
    joined = _CONNECTIVES.sub(",", _BOTH.sub("", text)) if not notation.has_relation(text) else text
    parts = [part for part in notation.split(joined) if part]
    if notation.has_relation(text) and len(parts) == 1:
        return None
    pieces = [piece for part in parts for piece in _signs(part)]
    return pieces if len(pieces) > 1 else None


def _signs(text) -> list[str]:
    if ("\\pm" not in text and "\\mp" not in text) or len(_SIGN.findall(text)) != 1 or text.startswith(("(", "[")):
        return [text]
    return [_SIGN.sub(sign, text).strip().removeprefix("+") for sign in "+-"]


def _same_unordered(golds, answers) -> bool:
    golds, answers = _distinct(golds), _distinct(answers)
    if len(golds) > len(answers):  # x + 11 and 11 + x are one
        golds = _different(golds)
    elif len(golds) < len(answers) and all(map(_is_readable, answers)):
        answers = _different(answers)
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
        value = numbers.number(part)
        seen.setdefault((value.value, value.percent) if value else part.replace(" ", ""), part)
    return list(seen.values())


def _different(parts) -> list[str]:
    """Those that are no other spelling of an earlier one; all of many."""
    if len(parts) > _FEW:
        return parts
    kept: list[str] = []
    for part in parts:
        _check_gold(part)
        if not any(_same_single(other, part) for other in kept):
            kept.append(part)
    return kept


def _same_single(gold, answer) -> bool:
    if not answer.strip():
        return False
    gold, answer = _without_member(gold), _without_member(answer)
    gold_interval = notation.interval(gold) if notation.has_relation(gold) else None
    answer_interval = notation.interval(answer) if notation.has_relation(answer) else None
    if gold_interval and answer_interval and gold_interval[0] != answer_interval[0]:
        return False
    gold = gold_interval[1] if gold_interval and (answer_interval or not notation.has_relation(answer)) else gold
    answer = answer_interval[1] if answer_interval and not notation.has_relation(gold) else answer
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
        return expressions.same(gold, answer)
    if gold_inner and not notation.has_relation(answer) and r"\cup" not in answer:
        _check_gold(gold)
        return False
    return _same_quantity(gold, answer)


def _pieces(text) -> list[str]:
    return [part.strip() for part in re.split(r"\\cup(?![a-zA-Z])", text)]


def _same_equation(gold, answer, gold_sides, answer_sides) -> bool:
    if not all(gold_sides):
        raise ValueError(f"the gold answer {gold[:200]!r} is not mathematics that can be read")
    values = [value for value in map(numbers.number, answer_sides) if value is not None]
    if any(not same_number(value, values[0]) for value in values):
        return False
    if len(gold_sides) == 1:
        return same(gold, answer_sides[-1])
    named = notation.is_name(gold_sides[0])
    if len(answer_sides) == 1:
        if not named:
            expressions.read_gold(gold)
            return False
        return same(gold_sides[-1], answer)
    if named and notation.is_name(answer_sides[0]):
        letters = [re.sub(r"\\text|[\s{}\\]", "", sides[0]) for sides in (gold_sides, answer_sides)]
        return letters[0] == letters[1] and same(gold_sides[-1], answer_sides[-1])
    return expressions.same(gold, answer)


def _same_quantity(gold, answer) -> bool:
    """Numbers with units, words, and expressions."""
    times = words.clock(gold), words.clock(answer)
    if None not in times:
        return words.same_clock(*times)
    if times[0] is not None and ":" in gold and (times[0][3] or not times[0][1]):
        return False  # 7:00 is no ratio
    ratios = notation.split(gold, ":"), notation.split(answer, ":")
    if max(map(len, ratios)) > 2:
        return _same_ratio(*ratios)
    (gold_body, gold_unit), (answer_body, answer_unit) = units.split_unit(gold), units.split_unit(answer)
    if gold_unit and answer_unit and gold_unit != answer_unit:
        _check_gold(gold_body)
        return False
    a, b = numbers.number(gold_body), numbers.number(answer_body)
    if a is not None and b is not None:
        if (a.percent and answer_unit and not b.percent) or (b.percent and gold_unit and not a.percent):
            return False  # 5 cm is not 5%
        return same_number(a, b)
    gold_body, answer_body = _as_fraction(gold_body, a), _as_fraction(answer_body, b)
    letters = words.bare_letters(gold_body), words.bare_letters(answer_body)
    if all(letters):
        if letters[0] == letters[1]:
            return True
        if len(letters[0]) > 1 and r"\text" in gold_body + answer_body:
            return letters[0].lower() == letters[1].lower()
        if words.word(gold_body) is None:
            return expressions.same(gold_body, answer_body)  # a product: cba is abc
    gold_word, answer_word = words.word(gold_body), words.word(answer_body)
    if gold_word is not None or answer_word is not None:
        if gold_word is None:
            _check_gold(gold_body)
        return gold_word == answer_word
    return expressions.same(gold_body, answer_body)


def _as_fraction(text, value) -> str:
    """A number that is no decimal as SymPy's parser reads it: mixed and repeating ones it does not."""
    if value is None or value.percent or ("." in text and not _REPEATING.search(text)):
        return text
    top, bottom = value.value.as_integer_ratio()
    return str(top) if bottom == 1 else rf"\frac{{{top}}}{{{bottom}}}"


def _same_ratio(golds, answers) -> bool:
    """Whether a : b : c are in proportion; every part over the first that is not 0."""
    values = map(numbers.number, golds)
    pivot = next((i for i, value in enumerate(values) if value is None or value.value != 0), 0)
    shares = [[rf"\frac{{{part}}}{{{parts[pivot % len(parts)]}}}" for part in parts] for parts in (golds, answers)]
    if len(golds) == len(answers):
        return all(map(expressions.same, *shares))
    return False


def same_number(gold: numbers.Number, answer: numbers.Number) -> bool:
    if gold.percent == answer.percent:
        return _close(gold, answer, gold.value, answer.value)
    scaled = (gold.value / 100, answer.value) if gold.percent else (gold.value, answer.value / 100)
    return _close(gold, answer, *scaled) or _close(gold, answer, gold.value, answer.value)


def _close(gold, answer, a, b) -> bool:
    if a == b:
        return True
    if not (gold.approximate and not numbers.is_finite(b)) and not (answer.approximate and not numbers.is_finite(a)):
        return False
    return abs(a - b) <= _TOLERANCE * max(abs(a), abs(b))


def _is_readable(answer) -> bool:
    try:
        _check_gold(answer)
    except ValueError:
        return False
    return True


def _check_gold(gold) -> None:
    """Raises ValueError where nothing can be made of a gold, although the answer is known to be another."""
    if (
        numbers.number(gold) is None
        and words.word(gold) is None
        and words.clock(gold) is None
        and _elements(gold) is None
    ):
        body, _ = units.split_unit(gold)
        if numbers.number(body) is None and not notation.bracketed(gold)[1]:
            expressions.read_gold(body)
