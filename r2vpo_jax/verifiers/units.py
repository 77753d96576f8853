r"""Units of cleaned answers: what follows a quantity, in one spelling. Units are compared, never converted."""

import re

from r2vpo_jax.verifiers.numbers import number

_UNIT_NAMES = {
    "cm": "cm cms centimeter centimetre centimeters centimetres",
    "mm": "mm mms millimeter millimetre millimeters millimetres",
    "km": "km kms kilometer kilometre kilometers kilometres",
    "m": "m meter metre meters metres",
    "in": "in inch inches",
    "ft": "ft foot feet",
    "yd": "yd yard yards",
    "mi": "mi mile miles",
    "kg": "kg kgs kilogram kilograms",
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
    "mi h^-1": "mph",
    "km h^-1": "kmh kph",
}
_MAGNITUDES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}  # powers of ten: no units
_UNITS = {name: unit for unit, names in _UNIT_NAMES.items() for name in names.split()}
_SINGLE_LETTERS = ("m", "s", "g", "h", "l", "L")  # that are units when bare
_NO_UNITS = re.compile(
    "pi|sqrt|sin|cos|tan|cot|csc|log|ln|exp|inf|infinity|infty|i|e|and|or|mod|to|if|is|not|cdot|times|frac|pm",
    re.IGNORECASE,
)
_POWERS_BEFORE = {"square": 2, "sq": 2, "cubic": 3, "cu": 3}
_POWERS_AFTER = {"squared": 2, "cubed": 3}
_RAISED = r"(?:\s*\^\s*(?:\{\s*[-+]?\s*\d\s*\}|\d))?"
_TEXT = rf"\\text\s*\{{[^{{}}]*\}}{_RAISED}"
_JOINT = r"\s*(?:\\cdot(?![a-zA-Z])|\\times(?![a-zA-Z])|/|\*)?\s*"
_PRODUCT = rf"{_TEXT}(?:{_JOINT}{_TEXT})*"
_FACTOR = rf"(?:{_TEXT}|\\frac\s*\{{\s*{_PRODUCT}\s*\}}\s*\{{\s*{_PRODUCT}\s*\}})"
_TEXT_UNIT = re.compile(rf"(?:\\cdot\s*)?({_FACTOR}(?:{_JOINT}{_FACTOR})*)$")
_WORD = rf"[A-Za-z]{{1,24}}\.?{_RAISED}"
_BARE_UNIT = re.compile(rf"(?<=[\d}}.)%])(\s*)({_WORD}(?:(?:\s*/\s*|\s*\\cdot\s+|\s+){_WORD}){{0,9}})$")
_BARE_FRACTION = re.compile(r"(?<=\d)\s*\\frac\s*\{\s*([a-z]+)\s*\}\s*\{\s*([a-z]+)\s*\}$")
_AFTER_EXPRESSION = re.compile(r"(?:(?<=[\d}.)])|(?<=\\pi))\s+([A-Za-z]{2,24})$")
_IN_BRACKETS = re.compile(r"(?<=\d)\s*\(\s*([A-Za-z][A-Za-z .]{0,40})\)$")
_ORDINAL = re.compile(r"(?<=\d)(?:\s*\^\s*\{?)?\s*\\text\s*\{\s*(?:st|nd|rd|th)\s*\}\s*\}?$")
_BASE = re.compile(
    r"\(?\s*(-?\d+)\s*\)?\s*(?:_\s*\{?\s*(?:\\text\s*\{)?|(?:\\text\s*\{)?\s*\(?(?:in )?base\s*\}?)\s*(\d+)\s*[)}]*$"
)
_CURRENCY_AFTER = re.compile(r"(?<=\d)\s*\\?([$€£¥¢])$")
_MAGNITUDE = re.compile(
    rf"(?<=[\d}})i])\s*(?:\\text\s*\{{\s*)?({'|'.join(_MAGNITUDES)})(?![A-Za-z])\s*(\}}?)", re.IGNORECASE
)
_QUANTITY_TAIL = re.compile(r"(?:[\d})%]|\\pi|(?<![a-zA-Z])[a-z])$")
_ATOM = re.compile(
    r"\}\s*(?P<below>\{)|(?P<over>/|(?<![A-Za-z])per(?![A-Za-z]))"
    r"|(?P<word>[A-Za-z¢$]+)\.?\s*\}?(?:\s*\^\s*\{?\s*(?P<power>[-+]?\s*\d))?"
)
_LETTER = re.compile("[A-Za-z¢]")
_TEXT_COMMAND = re.compile(r"\\text\s*(?=\{)|\\(?:cdot|times|frac)(?![a-zA-Z])")


def split_unit(text: str) -> tuple[str, str]:
    r"""(quantity, unit) of a cleaned answer such as "5\text{ cm}^2"; the unit is "" where there is none.

    A unit is \text after a quantity, in one command or several (\text{m}\,\text{s}^{-1}), words after a number (5 apples), a
    known unit after an expression (12\pi cm), a degree sign, a currency sign in front, or the base of 101_2. A single
    letter is one only after a number and a space ("5 m", not "5m"). "5 million" is a quantity without a unit.
    """
    if "illion" in text or "hundred" in text or "thousand" in text:
        text = _with_magnitude(text)
    if text.endswith(("$", "€", "£", "¥", "¢")):
        match = _CURRENCY_AFTER.search(text)
        if match:
            return text[: match.start()].strip(), _UNITS.get(match[1], match[1])
    if text.startswith((r"\$", "$", "€", "£", "¥")):
        return split_unit(text.lstrip("\\$€£¥ "))[0], text.lstrip("\\")[0]
    if "_" not in text and not _LETTER.search(text):
        return text, ""
    if text.endswith(r"^{\circ}") and not re.search(r"\\(?:sin|cos|tan|cot|sec|csc)", text):
        return text[: -len(r"^{\circ}")].strip(), "deg"
    if re.search(r"\^\{\\circ\}\s*(?:\\text\s*\{)?\s*[CFK]\}?$", text):
        body, _, scale = text.rpartition(r"^{\circ}")
        return body.strip(), "deg " + scale.replace(r"\text", "").strip(" {}")
    match = _BASE.fullmatch(text)
    if match:
        return match[1], f"base {match[2]}"
    text = _ORDINAL.sub("", text)
    match = _TEXT_UNIT.search(text) if r"\text" in text else None
    if match and _QUANTITY_TAIL.search(text[: match.start()].strip()):
        if re.sub(r"\\text|[\s{}]", "", match[1]).lower() in ("or", "and", "i", "e"):
            return text, ""
        return text[: match.start()].strip(), _spelled(match[1])
    match = _IN_BRACKETS.search(text)
    if match and number(text[: match.start()]) is not None:
        return text[: match.start()].strip(), _spelled(match[1])
    match = _BARE_FRACTION.search(text)
    if match and match[1] in _UNITS and match[2] in _UNITS and number(text[: match.start()]) is not None:
        return text[: match.start()].strip(), _spelled(f"{match[1]}/{match[2]}")
    match = _BARE_UNIT.search(text)
    if match is not None and number(text[: match.start()]) is not None:
        return (text[: match.start()].strip(), _spelled(match[2])) if _is_bare_unit(*match.groups()) else (text, "")
    match = _AFTER_EXPRESSION.search(text)
    if match is not None and match[1].lower() in _UNITS and not _NO_UNITS.fullmatch(match[1]):
        return text[: match.start()].strip(), _spelled(match[1])
    return text, ""


def _with_magnitude(text) -> str:
    """5000000 of "5 million", with the unit that follows."""
    match = _MAGNITUDE.search(text)
    if match is None:
        return text
    body, power, rest = text[: match.start()].strip(), _MAGNITUDES[match[1].lower()], text[match.end() :].strip()
    sign = re.match(r"\\?[$€£¥]\s*", body)
    body = body[sign.end() :] if sign else body
    value = number(body)
    body = str(value.value * 10**power) if value and not value.percent else rf"({body})\times 10^{{{power}}}"
    if r"\text" in match.group() and not match[2]:  # \text{ million people}
        rest = r"\text{ " + rest
    return f"{sign.group() if sign else ''}{body} {rest}".strip()


def _is_bare_unit(space, unit) -> bool:
    """Whether letters after a number are a unit rather than variables or a second answer."""
    words = re.findall("[A-Za-z]+", re.sub(r"\\cdot", " ", unit))
    known = all(word.lower() in _UNITS for word in words if word != "per")
    if any(_NO_UNITS.fullmatch(word) for word in words) or len(words) > (9 if known else 4):
        return False
    if not space and (not known or len(words[0]) == 1):
        return False
    if not known and any(len(word) < 3 and word.lower() not in _UNITS for word in words):
        return False
    return len(words) > 1 or len(words[0]) > 1 or words[0] in _SINGLE_LETTERS


def _spelled(unit) -> str:
    r"""Names with their powers in alphabetical order: "m s^-1" of m/s, \frac{m}{s}, m\,s^{-1} and meters per second."""
    powers: dict[str, int] = {}
    sign, below, before, last = 1, 1, 1, ""
    for match in _ATOM.finditer(_TEXT_COMMAND.sub(" ", unit)):
        if match["below"]:
            below = -1
        elif match["over"]:
            sign = -1
        else:
            word = match["word"]
            if word.lower() in _POWERS_BEFORE:
                before = _POWERS_BEFORE[word.lower()]
                continue
            if word.lower() in _POWERS_AFTER and last:
                powers[last] *= _POWERS_AFTER[word.lower()]
                continue
            power = int((match["power"] or "1").replace(" ", "")) * before * sign * below
            for part in _name(word).split():
                last, _, own = part.partition("^")
                powers[last] = powers.get(last, 0) + power * int(own or 1)
            sign = before = 1
    return " ".join(name if power == 1 else f"{name}^{power}" for name, power in sorted(powers.items()))


def _name(word) -> str:
    lower = word.lower()
    if word == "M":  # molar
        return word
    if lower in _UNITS:
        return _UNITS[lower]
    if lower.rstrip("s") in _UNITS:
        return _UNITS[lower.rstrip("s")]
    if len(word) <= 3:
        return word  # mW is not MW
    return lower[:-1] if lower.endswith("s") else lower
