r"""Judging a final answer against a gold answer: exactly, as a number, as mathematics. Imports nothing heavy.

response ──extract──▶ answer ──exact / numeric / math──▶ right or wrong (ValueError: the gold cannot be judged against)
"""

from fractions import Fraction

from r2vpo_jax.verifiers import equivalence, notation, numbers, units, words
from r2vpo_jax.verifiers.extraction import extract

TOLERANCE = 1e-6  # relative, of numeric answers


def canonical(answer: str) -> str:
    r"""A string in which equal answers are mostly equal, for majority votes and exact comparison.

    Layout goes (`notation.clean`), and then
      numbers    their value: 1,000 -> 1000, .50 and 1/2 -> 0.5, \frac{2}{6} -> 1/3, -0 -> 0, 1.2\times 10^3 -> 1200
      percent    stays: 50\% -> 50%
      units      go after a number, currency and degree signs too: 5 cm -> 5
      x = 3      becomes 3 where a single name stands on the left
      lists, tuples, intervals: member by member, members of \{...\} sorted
      words      lower case; a choice (A), \text{A} -> A; (B) -> B
      the rest   without spaces
    Expressions are not simplified: 2\sqrt{2} and \sqrt{8} stay apart. What is longer than MAX_ANSWER_CHARS stays as it is.
    """
    if len(answer) > notation.MAX_ANSWER_CHARS:
        return answer.strip()
    return _canonical(notation.clean(answer))


def _canonical(text, depth=0) -> str:
    sides = notation.sides(text)
    if len(sides) == 2 and notation.is_name(sides[0]):
        text = sides[1]
    body, _ = units.split_unit(text)
    value = numbers.number(body)
    if value is not None:
        return _spelled(value.value) + ("%" if value.percent else "")
    letters = words.bare_letters(text)
    spelled = words.word(text) if len(letters) < 2 or words.is_short_word(letters) else letters
    if spelled is not None:
        return spelled.upper() if len(spelled) == 1 else spelled
    if depth < 4:
        if notation.is_set(text):
            return r"\{" + ",".join(sorted(_canonical(part, depth + 1) for part in notation.split(text[2:-2]))) + r"\}"
        brackets, inner = notation.bracketed(text)
        if inner:
            return brackets[0] + ",".join(_canonical(part, depth + 1) for part in inner) + brackets[1]
        parts = notation.split(text)
        if len(parts) > 1:
            return ",".join(_canonical(part, depth + 1) for part in parts)
    return "".join(text.split())


def _spelled(value: Fraction) -> str:
    """An integer, a decimal of up to 12 places, or a fraction in lowest terms."""
    if value.denominator == 1:
        return str(value.numerator)
    scaled = value * 10**12
    if scaled.denominator == 1:
        digits = f"{abs(scaled.numerator):013d}"
        return ("-" if value < 0 else "") + f"{digits[:-12]}.{digits[-12:].rstrip('0')}"
    return f"{value.numerator}/{value.denominator}"


def exact(gold: str, answer: str) -> bool:
    """Whether both have the same canonical form, and no units that contradict each other.

    Raises:
      ValueError: the gold is empty.
    """
    if not canonical(gold):
        raise ValueError("the gold answer is empty")
    if max(len(gold), len(answer)) > notation.MAX_ANSWER_CHARS:
        return gold == answer
    found = {units.split_unit(notation.clean(text))[1] for text in (gold, answer)} - {""}
    return canonical(gold) == canonical(answer) and len(found) < 2


def numeric(gold: str, answer: str, tolerance: float = TOLERANCE, absolute: float = 0.0) -> bool:
    r"""Whether an answer is the gold number: |answer - gold| <= max(tolerance * |gold|, absolute).

    Integers, decimals, fractions, mixed numbers, percent (50% is 0.5, and 50), scientific notation, repeating decimals;
    units as in `canonical`, x = 3 as 3. Exact rational arithmetic; nothing is evaluated.

    Raises:
      ValueError: the gold is not such a number.
    """
    a, gold_unit = _quantity(gold)
    if a is None:
        raise ValueError(f"the gold answer {gold[:200]!r} is not a number")
    b, answer_unit = _quantity(answer)
    if b is None or (gold_unit and answer_unit and gold_unit != answer_unit):
        return False
    pairs = [(a.value, b.value)]
    if a.percent != b.percent:
        pairs.append((a.value / 100, b.value) if a.percent else (a.value, b.value / 100))
    relative, absolute = Fraction(str(tolerance)), Fraction(str(absolute))  # 0.01 is meant to be 1/100
    return any(abs(x - y) <= max(relative * abs(x), absolute) for x, y in pairs)


def _quantity(text):
    if len(text) > notation.MAX_ANSWER_CHARS:
        return None, ""
    text = notation.clean(text)
    sides = notation.sides(text)
    if len(sides) > 1 and notation.is_name(sides[0]):
        text = sides[-1]
    body, unit = units.split_unit(text)
    return numbers.number(body), unit


def math(gold: str, response: str) -> bool:
    """Whether the final answer of a response is the gold, by the rules of `equivalence` (needs math-verify).

    Has no time limit of its own and may run forever: call it in a process that can be killed, as `VerifierPool` does.

    Raises:
      ValueError: nothing can be made of the gold: it is never the responses that are blamed.
    """
    answer = extract(response, "final")
    return same(gold, answer or "")


def same(gold: str, answer: str) -> bool:
    """`math` on a final answer."""
    gold = notation.clean(gold)
    if not gold or len(gold) > notation.MAX_ANSWER_CHARS:
        raise ValueError("the gold answer is empty or too long")
    if len(answer) > notation.MAX_ANSWER_CHARS:
        return False
    answer = notation.clean(answer)
    return bool(answer) and equivalence.same(gold, answer)
