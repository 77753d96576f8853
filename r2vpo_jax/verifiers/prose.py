r"""The last number or formula in a text that marks no answer, and the mathematics between dollars. Linear time.

A number counts where it stands alone: not in a formula, as a denominator, exponent, index or end point, not in a mixed number, a
time, a ratio or a list. Then the whole of that is found: "$\frac{3}{4}$" and "3 1/2", never 4 and 1/2.
"""

import collections
import re

from r2vpo_jax.verifiers import notation

_MARK = re.compile(r"\\\\|\\\$|\$\$|\$|\\\(|\\\)|\\\[|\\\]|\n[ \t]*\n")
_CLOSING = {"$": "$", "$$": "$$", r"\(": r"\)", r"\[": r"\]"}
_DIGITS = re.compile(r"\d[\d,.]*|\.\d+", re.ASCII)
_NUMBER = re.compile(r"([-+−]?)(?:\\?[$€£])?([-−]?)(\d[\d,]*(?:\.\d+)?|\.\d+)(/\d+)?(\\?%)?", re.ASCII)
_UNIT_POWER = re.compile(r"[A-Za-z]{1,4}(?:/[A-Za-z]{1,4})?\^\{?-?\d\}?")
_WORD_WITH_NUMBER = re.compile(r"[A-Za-z]+-?\d+[A-Za-z]*|\d+(?:st|nd|rd|th)|\d+-[A-Za-z-]+")
_OPERATOR = re.compile(r"[-+*/^×÷·−]|\\(?:times|cdot|div|pm)")
_OPERAND = re.compile(r"[A-Za-z]|.*[\d\\].*|.*[)\]}]")
_COMMAND = re.compile(r"\\[A-Za-z]+.*")
_CONNECTIVE = re.compile(r"and|or|&")
_LABELS = (
    "step",
    "case",
    "equation",
    "eq",
    "part",
    "problem",
    "question",
    "figure",
    "section",
    "example",
    "number",
    "option",
)
_BETWEEN = re.compile(r"\s*,?\s*(?:and|or)\s+")
_BETWEEN_OR_COMMA = re.compile(r"\s*,?\s*(?:and|or)\s+|\s*,\s*")
_MAX_LIST = 8  # formulas of a list
_PERIOD = re.compile(r"[ap]\.?m\.?", re.IGNORECASE)
_MAGNITUDE = re.compile(r"hundred|thousand|million|billion|trillion", re.IGNORECASE)
_PROSE = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}")
_LIST_MARK = re.compile(r"\d+[.)]")
_MULTILINE = re.compile(r"\\begin\s*\{(?:align|gather|split|eqnarray|multline)")
_LAYOUT = "*_\"'`“”‘’$"
_MAX_CHARS = 400  # of a line that is looked at, before and after a number
_MAX_NUMBERS = 30  # that are looked at


def spans(text: str) -> list[tuple[int, int, int, int]]:
    r"""(start, start inside, end inside, end) of mathematics in $...$, $$...$$, \(...\) and \[...\]; "$5 and $6" are two prices."""
    found, opened = [], None
    for match in _MARK.finditer(text):
        mark, start, end = match.group(), match.start(), match.end()
        if mark[0] == "\n":
            opened = None if opened and opened[0] == "$" else opened
        elif mark in (r"\\", r"\$"):
            continue
        elif opened is None or (
            mark == "$" == opened[0] and (text[start - 1].isspace() or text[end : end + 1].isdigit())
        ):
            if mark in _CLOSING and not (mark == "$" and text[end : end + 1].isspace()):
                opened = mark, start, end
        elif mark == _CLOSING[opened[0]]:
            found.append((opened[1], opened[2], start, end))
            opened = None
    return found


def last_value(text: str) -> str | None:
    """The last number that stands alone, or the last formula, whichever comes later; None where there is neither."""
    formula, after = None, 0
    found_spans = spans(text)
    for last in reversed(range(len(found_spans))):
        start, inner, inner_end, end = found_spans[last]
        formula = _value_of(text[inner:inner_end])
        if formula is not None:
            if last and _BETWEEN.fullmatch(text[found_spans[last - 1][3] : start]):
                formula = _with_others(text, found_spans[max(last - _MAX_LIST, 0) : last + 1]) or formula
            percent = re.match(r"\s?\\?%", text[end : end + 3])
            formula, after = formula + ("%" if percent else ""), end
            break
    rest = text[after:]
    for match in reversed(collections.deque(_DIGITS.finditer(rest), maxlen=_MAX_NUMBERS)):
        found = _around(rest, match.start())
        if found is not None:
            return found or None
    return formula


def _with_others(text, listed) -> str | None:
    """The list that ends with the last of some spans, "$x = 1$ or $x = 2$"; None where it is no list."""
    formulas: list[str] = []
    following = 0  # where the span after this one begins
    for here in reversed(range(len(listed))):
        start, inner, inner_end, end = listed[here]
        if formulas:
            between = text[end:following]
            if not (_BETWEEN if len(formulas) == 1 else _BETWEEN_OR_COMMA).fullmatch(between):
                break
        following = start
        formulas.append(text[inner:inner_end].strip().rstrip(".,;"))
        if _name_of(formulas[-1]) != _name_of(formulas[0]):
            formulas.pop()
            break
    return ", ".join(reversed(formulas)) if len(formulas) > 1 else None


def _name_of(formula) -> str:
    return formula.partition("=")[0].strip() if "=" in formula else ""


def _value_of(formula) -> str | None:
    """What a formula says: its last side; None of a name such as x or ABC."""
    if _MULTILINE.search(formula):
        lines = re.split(r"\\\\", re.sub(r"\\(?:begin|end)\s*\{[^{}]*\}", "", formula).replace("&", ""))
        formula = next((line for line in reversed(lines) if line.strip()), "")
    formula = formula.strip().rstrip(".,;").strip()
    if not formula or notation.is_variable(formula):
        return None
    sides = notation.sides(formula)
    if len(sides) == 1 or (len(sides) == 2 and notation.is_name(sides[0])):
        return formula
    return sides[-1] or None


def _around(text, position) -> str | None:
    """The number at a position with all that belongs to it; "" if that is no answer, None if another number should be taken."""
    line_start = max(text.rfind("\n", 0, position) + 1, position - _MAX_CHARS)
    line_end = text.find("\n", position)
    line = text[line_start : min(line_end if line_end >= 0 else len(text), position + _MAX_CHARS)]
    tokens = [(m.group(), m.start()) for m in re.finditer(r"\S+", line)]
    here = max(i for i, (_, start) in enumerate(tokens) if start <= position - line_start)
    bracket = _bracket(line, position - line_start)
    if bracket is not None:
        return bracket or None
    words = [token for token, _ in tokens]
    if here == 0 and _LIST_MARK.fullmatch(words[0]) and len(words) > 1:
        return None
    core = _core(words[here])
    before = _core(words[here - 1]) if here else ""
    after = words[here + 1] if here + 1 < len(words) else ""
    if _WORD_WITH_NUMBER.fullmatch(core) or before.lower() in _LABELS:
        return None
    if _UNIT_POWER.fullmatch(core):
        return f"{before} {core}" if _NUMBER.fullmatch(before) else core
    number = _NUMBER.fullmatch(core)
    if number is None:
        return core
    first = _same_name_start(words, here) if words[here - 1 : here] == ["="] or "=" in words[here] else None
    if first is not None:
        return " ".join([*words[first:here], words[here].rstrip(".,;:!?*_$")])
    if "=" in words[here]:
        return _number_text(number)
    if number[4] and before.isdecimal() and not words[here - 1].endswith(","):
        return f"{before} {core}"
    left, right = _formula(words, here)
    if right - left > 1:
        return " ".join([*words[left : right - 1], _core(words[right - 1])])
    if _MAGNITUDE.fullmatch(after.rstrip(".,;:!?*")):
        return f"{_number_text(number)} {after.rstrip('.,;:!?*')}"
    if _PERIOD.fullmatch(after.rstrip(",;")):
        return f"{core} {after}"
    first = _list_start(words, here)
    return _number_text(number) if first == here else " ".join([*words[first:here], core]).lstrip("*_$")


def _core(token) -> str:
    """Without punctuation and layout around; of "x=5" what follows the sign."""
    token = token.strip(_LAYOUT).rstrip(".,;:!?").strip(_LAYOUT)
    if token.startswith("(") and token.endswith(")"):
        token = token[1:-1]
    if "=" in token and not re.search(r"[<>≤≥]", token):
        token = token.rpartition("=")[2].strip(_LAYOUT)
    return token


def _number_text(number) -> str:
    signs, digits, below, percent = number[1] + number[2], number[3].rstrip(","), number[4] or "", number[5]
    return signs.replace("+", "") + digits + below + ("%" if percent else "")


def _bracket(line, position) -> str | None:
    """The tuple, interval or set around a position, "" where it is a remark in brackets, None where there is no bracket."""
    depth = 0
    for start in range(position - 1, -1, -1):
        c = line[start]
        if c in ")]}":
            depth += 1
        elif c in "([{":
            depth -= 1
            if depth < 0:
                break
    else:
        return None
    end = notation.closing(line, start)
    if end < 0:
        return None
    inner = line[start + 1 : end]
    if c == "(" and _PROSE.search(inner):
        return ""
    if "," in inner and not _PROSE.search(inner):
        return line[start - (line[start - 1 : start] == "\\") : end + 1]
    return None


def _formula(words, here) -> tuple[int, int]:
    """The range of words that are one formula with the number at `here`: 2 + 3, \\log_2 3, 5 \\text{cm}."""
    left, right = here, here + 1
    while left > 0:
        previous = words[left - 1]
        if left > 1 and _OPERATOR.fullmatch(previous) and _OPERAND.fullmatch(_core(words[left - 2])):
            left -= 2
        elif _COMMAND.fullmatch(previous) and not previous.endswith("="):
            left -= 1
        else:
            break
    while right < len(words):
        if right + 1 < len(words) and _OPERATOR.fullmatch(words[right]) and _OPERAND.fullmatch(_core(words[right + 1])):
            right += 2
        elif _COMMAND.fullmatch(words[right]) and not words[right - 1].endswith((",", ".")):
            right += 1
        else:
            break
    return left, right


def _assigned(words, here) -> tuple[int, str]:
    """(where it begins, name) of "x = 5" or "x=5" that ends at `here`; (here, "") where there is no name."""
    if "=" in words[here]:
        return here, words[here].partition("=")[0].strip(_LAYOUT)
    return (here - 2, words[here - 2].strip(_LAYOUT)) if here > 1 and words[here - 1] == "=" else (here, "")


def _same_name_start(words, here) -> int | None:
    """Where "x = 1 or x = 2" that ends at `here` begins; None where it is no list of values of one name."""
    last, name = _assigned(words, here)
    first = last
    while name and first > 1:
        before = first - 2 if _CONNECTIVE.fullmatch(words[first - 1]) else first - 1
        if before == first - 1 and not words[before].endswith((",", ";")):
            break
        start, other = _assigned(words, before)
        if other != name or not _NUMBER.fullmatch(_core(words[before])):
            break
        first = start
    return first if first < last else None


def _list_start(words, here) -> int:
    """Where a list that ends with the number at `here` begins: "1, 2 and 3", but not "in 2020, 5 people"."""
    first, connected = here, False
    while first > 0:
        if _CONNECTIVE.fullmatch(words[first - 1]) and first > 1 and _NUMBER.fullmatch(_core(words[first - 2])):
            first, connected = first - 2, True
        elif words[first - 1].endswith((",", ";")) and _NUMBER.fullmatch(_core(words[first - 1])):
            first -= 1
        else:
            break
    whole = first == 0 or words[first - 1].endswith((":", "=")) or words[first - 1] in ("is", "are")
    return first if connected or here - first >= 2 or whole else here
