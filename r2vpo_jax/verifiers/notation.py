r"""Notation of mathematical answers: one spelling for what is written in many ways. Linear time, no heavy imports.

What is taken away or made equal (`clean`):
  math delimiters ($, \(, \[), \left and \right, spacing commands, \displaystyle, bold and italics, **...**; \dfrac, \tfrac
  and \cfrac become \frac, also \frac12; Unicode minus, fractions (½), superscripts, full-width characters, Greek π, ∞, √,
  comparison and set signs become LaTeX; an introduction, as in \text{The value is } 7, and a trailing dot, comma or
  semicolon go, and so do braces around the whole.
"""

import re
import unicodedata
from fractions import Fraction

MAX_ANSWER_CHARS = 2000  # nothing longer is a final answer
_MAX_EXPONENT = 300

_SUPERSCRIPTS = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ", "0123456789+-n", strict=True))
_SUBSCRIPTS = dict(zip("₀₁₂₃₄₅₆₇₈₉", "0123456789", strict=True))
_SYMBOLS = {
    **dict.fromkeys("−–—‐‑‒﹣", "-"),
    **dict.fromkeys("×✕⨯", r"\times "),
    **dict.fromkeys("·⋅∙", r"\cdot "),
    **dict.fromkeys("÷∕⁄", "/"),
    **dict.fromkeys("°˚º", r"^{\circ}"),
    **dict.fromkeys("∅⌀", r"\emptyset "),
    **{"π": r"\pi ", "∞": r"\infty ", "√": r"\sqrt ", "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "∪": r"\cup "},
    **{"∩": r"\cap ", "∈": r"\in ", "±": r"\pm ", "θ": r"\theta ", "α": r"\alpha ", "β": r"\beta ", "≈": r"\approx "},
    **{"⟨": r"\langle ", "⟩": r"\rangle ", "，": ",", "、": ",", "％": "%", "‘": "'", "’": "'", "“": '"', "”": '"'},
}
_VULGAR = re.compile("[¼-¾⅐-⅞↉]")
_SCRIPTS = re.compile(f"([{''.join(_SUPERSCRIPTS)}]+)|([{''.join(_SUBSCRIPTS)}]+)")
_DELIMITERS = re.compile(r"(?<!\\)\$|\\[()\[\]]")
_NOTHING = re.compile(
    r"\\(?:left|right|displaystyle|textstyle|limits|bigl|bigr|Bigl|Bigr|big|Big|boxed|fbox|nolimits)(?![a-zA-Z])\.?|\\!"
)
_SPACES = re.compile(r"\\[,;:> ]|\\(?:quad|qquad|enspace|thinspace)(?![a-zA-Z])|(?<!\\)~|[\s\u200b\ufeff]+")
_FONTS = re.compile(
    r"\\(?:mathrm|mathbf|mathit|mathsf|boldsymbol|bf|rm|textbf|textit|textrm|textsf|textnormal|mbox|hbox|operatorname\*?)(?=\s*\{)"
)
_PREFACE = re.compile(r"^\\text\s*\{[^{}]*(?:\bis|:|=)\s*\}\s*(?=\S)")
_TEXT_OF_MATH = re.compile(r"^\\text\s*\{(?=[^{}]*(?:\d|,|\b(?:and|or)\b))([^{}]*)\}$")
_ENVIRONMENT = re.compile(r"\\begin|\\end|matrix|cases|array")
_ESCAPED_TWICE = re.compile(r"\\\\(?=[a-zA-Z])")
_SYNONYMS = [
    (re.compile(r"\\langle(?![a-zA-Z])|\\lparen(?![a-zA-Z])"), "("),
    (re.compile(r"\\rangle(?![a-zA-Z])|\\rparen(?![a-zA-Z])"), ")"),
    (re.compile(r"\\[dtc]frac(?![a-zA-Z])"), r"\\frac"),
    (re.compile(r"\\frac\s*(\d)\s*(\d)(?!\d)"), r"\\frac{\1}{\2}"),
    (re.compile(r"\\frac\s*(\d)\s*\{"), r"\\frac{\1}{"),
    (re.compile(r"\\leq(?:slant)?(?![a-zA-Z])"), r"\\le"),
    (re.compile(r"\\geq(?:slant)?(?![a-zA-Z])"), r"\\ge"),
    (re.compile(r"\\neq(?![a-zA-Z])"), r"\\ne"),
    (re.compile(r"\\l[v]ert(?![a-zA-Z])|\\r[v]ert(?![a-zA-Z])"), "|"),
    (re.compile(r"\\lbrace(?![a-zA-Z])"), r"\\{"),
    (re.compile(r"\\rbrace(?![a-zA-Z])"), r"\\}"),
    (re.compile(r"\\(?:varnothing|O)(?![a-zA-Z])|\\\{\s*\\\}"), r"\\emptyset"),
    (re.compile(r"\^\s*\\circ(?![a-zA-Z])|\^\s*\{\s*\\circ\s*\}|\\degree(?![a-zA-Z])"), r"^{\\circ}"),
    (re.compile(r"\{\s*,\s*\}(?=\d)"), ","),
    (re.compile(r"\\%|\\text\s*\{\s*percent\s*\}|(?<=\d)\s*\bpercent\b"), "%"),
]

# Units ------------------------------------------------------------------------------------------------------

_UNIT_NAMES = {
    "cm": "cm centimeter centimetre centimeters centimetres",
    "mm": "mm millimeter millimetre millimeters millimetres",
    "km": "km kilometer kilometre kilometers kilometres",
    "m": "m meter metre meters metres",
    "in": "in inch inches",
    "ft": "ft foot feet",
    "yd": "yd yard yards",
    "mi": "mi mile miles",
    "kg": "kg kilogram kilograms",
    "g": "g gram grams",
    "lb": "lb lbs pound pounds",
    "s": "s sec secs second seconds",
    "min": "min mins minute minutes",
    "h": "h hr hrs hour hours",
    "l": "l liter litre liters litres",
    "ml": "ml milliliter millilitre milliliters millilitres",
    "deg": "degree degrees deg",
    "rad": "rad radian radians",
    "$": "dollar dollars usd bucks",
    "cent": "cent cents ¢",
    "mi / h": "mph",
    "km / h": "kmh kph",
}
_UNITS = {name: unit for unit, names in _UNIT_NAMES.items() for name in names.split()}
_NO_UNITS = re.compile(
    "pi|sqrt|sin|cos|tan|cot|csc|log|ln|exp|inf|infinity|infty|i|e|and|or|mod|to|if|is|not|cdot|times|frac|pm",
    re.IGNORECASE,
)
_POWER = r"(?:\s*\^\s*\{?\s*([23])\s*\}?)?"
_TEXT_UNIT = re.compile(r"\\text\s*\{([^{}]*)\}" + _POWER + r"$")
_BARE_UNIT = re.compile(r"(?<=[\d}.)])(\s*)([A-Za-z][A-Za-z/. ]{0,60})" + _POWER + r"$")
_BASE = re.compile(r"(-?\d+)\s*_\s*\{?\s*(?:\\text\s*\{)?\s*(\d+)\s*\}*$")
_QUANTITY_TAIL = re.compile(r"(?:[\d})]|\\pi|(?<![a-zA-Z])[a-z])$")


def clean(text: str) -> str:
    """The answer without layout."""
    text = text.strip().strip("*").replace("**", "^")
    text = _SCRIPTS.sub(
        lambda m: (
            "^{" + "".join(_SUPERSCRIPTS[c] for c in m[1]) + "}"
            if m[1]
            else "_{" + "".join(_SUBSCRIPTS[c] for c in m[2]) + "}"
        ),
        text,
    )
    text = _VULGAR.sub(lambda m: _vulgar(m.group()), text)
    text = "".join(_SYMBOLS.get(c, c) for c in text)
    text = unicodedata.normalize("NFKC", text)
    text = "".join(_SYMBOLS.get(c, c) for c in text)
    text = _DELIMITERS.sub(" ", _protect_line_breaks(text))
    text = _NOTHING.sub(" ", text)
    text = _FONTS.sub(r"\\text", text)
    text = _SPACES.sub(" ", text)
    for pattern, replacement in _SYNONYMS:
        text = pattern.sub(replacement, text)
    text = _PREFACE.sub("", text.replace("\0", r"\\").strip(), count=1)
    return _strip_outside(_TEXT_OF_MATH.sub(r"\1", text))


def _protect_line_breaks(text) -> str:
    # "\\[" within a matrix is a line break and a bracket, not the start of displayed mathematics
    if not _ENVIRONMENT.search(text):  # a command escaped twice, as in JSON
        text = _ESCAPED_TWICE.sub(r"\\", text)
    return text.replace(r"\\", "\0")


def _vulgar(character) -> str:
    value = Fraction(unicodedata.numeric(character)).limit_denominator(10)
    return rf" \frac{{{value.numerator}}}{{{value.denominator}}}"


def _strip_outside(text) -> str:
    before = None
    while before != text:
        before = text
        text = re.sub(r"^(?:=|\\approx(?![a-zA-Z]))", "", text.strip().rstrip(".,;").strip())
        if text.startswith("{") and closing(text, 0) == len(text) - 1:
            text = text[1:-1]
    return text


def closing(text: str, start: int) -> int:
    r"""Position of the bracket that closes the one at `start`, of whatever shape ("[1, 2)" is an interval); -1: none."""
    depth, position = 0, start
    while position < len(text):
        c = text[position]
        if c == "\\":
            following = text[position + 1 : position + 2]
            depth += (following == "{") - (following == "}")
            position += 1
            if depth == 0 and following == "}":
                return position
        elif c in "([{":
            depth += 1
        elif c in ")]}":
            depth -= 1
            if depth == 0:
                return position
        position += 1
    return -1


def split(text: str, separators: str = ",;") -> list[str]:
    """Parts between separators that are not within brackets."""
    parts, depth, start, position = [], 0, 0, 0
    while position < len(text):
        c = text[position]
        if c == "\\":
            following = text[position + 1 : position + 2]
            depth += (following == "{") - (following == "}")
            position += 1
        elif c in "([{":
            depth += 1
        elif c in ")]}":
            depth -= 1
        elif c in separators and depth <= 0:
            parts.append(text[start:position])
            start = position + 1
        position += 1
    return [part.strip() for part in [*parts, text[start:]]]


# Structure --------------------------------------------------------------------------------------------------

_EQUALS = re.compile(r"(?<![<>!\\:])=(?!=)")
_RELATION = re.compile(r"[<>]|\\(?:le|ge|ne|lt|gt)(?![a-zA-Z])")
_NAME = re.compile(r"(?:\\?[A-Za-z]+|\\angle\s*[A-Z]{1,3}|[A-Za-z]?\s*\([A-Za-z,\s]+\))(?:_\{?\w+\}?)?'?")


def has_relation(text: str) -> bool:
    r"""Whether there is an inequality in a cleaned answer: <, \le, \ne and so on."""
    return _RELATION.search(text) is not None


def sides(text: str) -> list[str]:
    """The sides of an equation "a = b = c"; [text] where a cleaned answer is none."""
    if has_relation(text) or r"\begin" in text or not _EQUALS.search(text):
        return [text]
    parts = split(text, "=")
    return [text] if any(part.endswith(("<", ">", "!", "\\", ":")) for part in parts) else parts


def is_name(text: str) -> bool:
    r"""Whether a side of an equation is a single name: x, x_1, \angle ABC, f(x)."""
    return _NAME.fullmatch(text) is not None


def is_set(text: str) -> bool:
    r"""Whether a cleaned answer is \{...\} as a whole."""
    return text.startswith(r"\{") and closing(text, 0) == len(text) - 1


def bracketed(text: str) -> tuple[str, list[str]]:
    """("()", members) of a tuple or interval; ("", []) of anything else."""
    if not text.startswith(("(", "[")) or not text.endswith((")", "]")) or closing(text, 0) != len(text) - 1:
        return "", []
    inner = split(text[1:-1])
    return (text[0] + text[-1], inner) if len(inner) > 1 else ("", [])


def split_unit(text: str) -> tuple[str, str]:
    r"""(quantity, unit) of a cleaned answer such as "5\text{ cm}^2"; the unit is "" where there is none.

    A unit is \text after a quantity, words after a number (5 apples), a degree sign, or a currency sign in front, or
    the base of 101_2. A single letter is one only with a space before it ("5 m", not "5m"). Units are not
    converted.
    """
    if text.startswith((r"\$", "$", "€", "£")):
        return text.lstrip("\\$€£ "), text.lstrip("\\")[0]
    if text.endswith(r"^{\circ}") and not re.search(r"\\(?:sin|cos|tan|cot|sec|csc)", text):
        return text[: -len(r"^{\circ}")].strip(), "deg"
    if re.search(r"\^\{\\circ\}\s*(?:\\text\s*\{)?\s*[CFK]\}?$", text):
        body, _, scale = text.rpartition(r"^{\circ}")
        return body.strip(), "deg " + scale.replace(r"\text", "").strip(" {}")
    match = _BASE.fullmatch(text)
    if match:
        return match[1], f"base {match[2]}"
    match = _TEXT_UNIT.search(text)
    if match and _QUANTITY_TAIL.search(text[: match.start()].strip()):
        name = match[1].strip()
        if name.lower() in ("or", "and", "i"):
            return text, ""
        return text[: match.start()].strip(), _unit_name(name, match[2])
    match = _BARE_UNIT.search(text)
    if match is None or number(text[: match.start()]) is None:
        return text, ""
    words = match[2].split()
    known = all(w.strip(".").lower() in _UNITS for w in re.split(r"[\s/]+", match[2].strip()) if w != "per")
    if any(_NO_UNITS.fullmatch(word) for word in words) or len(words) > 4:
        return text, ""
    if (len(match[2].strip()) == 1 or not known) and not match[1]:
        return text, ""
    if not known and any(len(word) < 3 and word.strip(".").lower() not in _UNITS for word in words):
        return text, ""
    if len(match[2].strip()) == 1 and match[2].strip().lower() not in ("m", "s", "g", "h", "l"):
        return text, ""
    return text[: match.start()].strip(), _unit_name(match[2], match[3])


def _unit_name(name, power) -> str:
    words = re.findall(r"[A-Za-z¢$]+|/|\^\d", name.lower())
    squared = {"square": "2", "sq": "2", "squared": "2", "cubic": "3", "cu": "3", "cubed": "3"}
    power = power or next((squared[w] for w in words if w in squared), "")
    words = ["/" if w == "per" else w for w in words if w not in squared]
    names = [
        _UNITS.get(w) or _UNITS.get(w.rstrip("s")) or (w[:-1] if len(w) > 3 and w.endswith("s") else w) for w in words
    ]
    return " ".join(names) + (f"^{power}" if power else "")


# Numbers ----------------------------------------------------------------------------------------------------

_PLAIN = r"(?:\d{1,3}(?:(?:,|\\,|\s)\d{3})+(?!\d)|\d+)?(?:\.\d*)?"
_SCIENTIFIC = re.compile(
    rf"([-+]?)\s*({_PLAIN})\s*(?:[eE]([-+]?\d{{1,4}})|(?:(?:\\times|\\cdot|\*|x)\s*)?10\s*\^\s*(?:\{{\s*([-+]?\s*\d{{1,4}})\s*\}}|([-+]?\d{{1,4}})))?"
)
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
    digits = re.sub(r"\D", "", text.partition("e")[0]).lstrip("0")
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
