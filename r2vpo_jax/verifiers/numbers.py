r"""Rational numbers out of cleaned answers: integers, decimals, fractions, mixed, scientific and repeating ones, percent."""

import re
from fractions import Fraction

from r2vpo_jax.verifiers.notation import closing

_MAX_EXPONENT = 300
_PLAIN = r"(?:[1-9]\d{0,2}(?:(?:,|\s)\d{3})+(?!\d)|\d+)?(?:\.\d*)?"
_SCIENTIFIC = re.compile(
    rf"([-+]?)\s*({_PLAIN})\s*(?:[eE]([-+]?\d{{1,4}})|(?:(?:\\times|\\cdot|\*|x)\s*)?10\s*\^\s*(?:\{{\s*([-+]?\s*\d{{1,4}})\s*\}}|([-+]?\d{{1,4}})))?"
)
_POWER_OF_TEN = re.compile(r"[eE*x]|\\(?:times|cdot)")
_LATEX_FRACTION = re.compile(r"([-+]?)\s*(\d*)\s*\\frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}")
_SLASH_FRACTION = re.compile(r"([-+]?)\s*(?:(\d+)\s+)?\(?\s*([-+]?[\d,.]+)\s*\)?\s*/\s*\(?\s*([-+]?[\d,.]+)\s*\)?")
_REPEATING = re.compile(r"([-+]?)\s*(\d*)\.(\d*)\\(?:overline|bar|dot)\s*\{?\s*(\d+)\s*\}?")


class Number:
    """A rational number as it was written."""

    __slots__ = ("approximate", "percent", "value")

    def __init__(self, value: Fraction, approximate: bool, percent: bool):
        self.value = value
        self.approximate = approximate  # a decimal with six or more significant digits: may be rounded
        self.percent = percent


def number(text: str) -> Number | None:
    r"""A rational number out of a cleaned answer, or None: integer, decimal, 1,000, a/b, \frac, mixed, scientific, percent.

    Nothing is evaluated; exponents beyond +-300 are refused.
    """
    text = text.strip()
    if not text or len(text) > 400:
        return None
    percent = text.endswith("%")
    value = _rational(text[:-1].strip() if percent else text)
    if value is None:
        return None
    digits = re.sub(r"\D", "", _POWER_OF_TEN.split(text, maxsplit=1)[0]).lstrip("0")
    return Number(value, "." in text and "frac" not in text and len(digits) >= 6, percent)


def _rational(text) -> Fraction | None:
    while text.startswith(("(", "{")) and closing(text, 0) == len(text) - 1 and "," not in text:
        text = text[1:-1].strip()
    negative = text.startswith("-")
    match = _LATEX_FRACTION.fullmatch(text) or _SLASH_FRACTION.fullmatch(text)
    if match:
        whole, top, bottom = match[2], _decimal(match[3]), _decimal(match[4])
        if top is None or not bottom:
            return None
        if whole and (top < 0 or bottom < 0):
            return None
        value = Fraction(whole or 0) + top / bottom
        return -value if negative else value
    match = _REPEATING.fullmatch(text)
    if match:
        _, whole, fixed, repeated = match.groups()
        value = Fraction(whole or 0) + Fraction(int(fixed or 0), 10 ** len(fixed))
        value += Fraction(int(repeated), (10 ** len(repeated) - 1) * 10 ** len(fixed))
        return -value if negative else value
    return _decimal(text)


def _decimal(text) -> Fraction | None:
    match = _SCIENTIFIC.fullmatch(text.strip())
    if match is None:
        return None
    sign, digits, *exponents = match.groups()
    exponent = next((e for e in exponents if e), None)
    digits = re.sub(r"[,\s\\]", "", digits)
    if digits in ("", "."):
        if exponent is None or "^" not in text or not text.lstrip("-+ ").startswith("10"):
            return None
        digits = "1"
    value = Fraction(digits.rstrip("."))
    if exponent is not None:
        power = int(exponent.replace(" ", ""))
        if abs(power) > _MAX_EXPONENT:
            return None
        value *= Fraction(10) ** power
    return -value if sign == "-" else value


def is_finite(value) -> bool:
    """Whether the decimal expansion of a rational number, Python's or SymPy's, ends."""
    denominator = int(value.denominator)
    for prime in (2, 5):
        while denominator % prime == 0:
            denominator //= prime
    return denominator == 1
