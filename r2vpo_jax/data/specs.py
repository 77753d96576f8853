"""Data sets by text: `NAME_OR_PATH?key=value&key=value + ANOTHER?weight=2`.

Values are percent-decoded as in a URL query, with one difference: a plus sign stands for itself. Sources of a mixture
are separated by a plus sign with white space on both sides.
"""

import dataclasses
import difflib
import fractions
import re
import urllib.parse
from collections.abc import Iterable


@dataclasses.dataclass(frozen=True)
class SourceSpec:
    """One source of a data set."""

    text: str
    name: str  # a known data set, a generator, or a path
    options: tuple[tuple[str, str], ...]  # in the order given, without `weight`
    weight: fractions.Fraction | None  # None: not stated

    def take(self, allowed: Iterable[str], repeatable: Iterable[str] = ()) -> dict[str, str | list[str]]:
        """The options as a dict; of `repeatable` ones, lists.

        Raises:
          ValueError: an option that is not allowed, or given twice.
        """
        allowed, taken = list(allowed), {}
        for key, value in self.options:
            if key not in allowed:
                raise ValueError(f"{self.text!r}: there is no {key!r} here; {near(key, [*allowed, 'weight'])}")
            if key in repeatable:
                taken.setdefault(key, []).append(value)
            elif key in taken:
                raise ValueError(f"{self.text!r}: {key!r} is given twice")
            else:
                taken[key] = value
        return taken


def parse(text: str) -> list[SourceSpec]:
    """The sources that a text names.

    Raises:
      ValueError: what is wrong with the text, and what to write.
    """
    if not isinstance(text, str) or not text.strip():
        raise ValueError("an empty data set; name one, for example gsm8k, my.jsonl?question=problem or chain_sum")
    return [_parse_one(part.strip()) for part in re.split(r"\s\+\s", f" {text} ")]


def near(name: str, known: Iterable[str]) -> str:
    """What to say after an unknown name."""
    known = sorted(set(known))
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    return f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(known)}"


def _parse_one(text: str) -> SourceSpec:
    name, asks, query = text.partition("?")
    name = name.strip()
    if not name:
        raise ValueError(f"{text!r} has no name before '?'; a mixture is written A?weight=2 + B?weight=1")
    if asks and not query.strip():
        raise ValueError(f"{text!r} ends in '?'; write key=value after it, or leave it out")
    options, weight = [], None
    for pair in query.split("&") if asks else ():
        key, equals, value = pair.partition("=")
        key = key.strip()
        if not key or not equals:
            raise ValueError(f"{text!r}: {pair!r} is not key=value (write %26 for an & within a value)")
        try:
            value = urllib.parse.unquote(value, errors="strict")
        except UnicodeDecodeError as error:
            raise ValueError(f"{text!r}: the value of {key!r} is not percent-encoded UTF-8: {error}") from error
        if key != "weight":
            options.append((key, value))
        elif weight is not None:
            raise ValueError(f"{text!r}: 'weight' is given twice")
        else:
            weight = _weight(text, value)
    return SourceSpec(text, name, tuple(options), weight)


def _weight(text: str, value: str) -> fractions.Fraction:
    try:
        weight = fractions.Fraction(value)
    except (ValueError, ZeroDivisionError):
        raise ValueError(f"{text!r}: weight={value!r} is not a number; write for example weight=2") from None
    if weight <= 0:
        raise ValueError(f"{text!r}: weight={value} must be > 0; leave the source out instead")
    return weight


def parse_rows(text: str, value: str) -> slice:
    """`a:b` as a slice of rows.

    Raises:
      ValueError: anything else.
    """
    match = re.fullmatch(r"(-?\d+)?:(-?\d+)?", value.strip())
    if not match:
        raise ValueError(f"{text!r}: rows={value!r} is not of the form a:b, such as rows=:500 or rows=500:")
    return slice(*(None if bound is None else int(bound) for bound in match.groups()))


def parse_size(text: str, key: str, value: str, least: int) -> int:
    """A whole number of at least `least`.

    Raises:
      ValueError: anything else.
    """
    if not re.fullmatch(r"\d+", value.strip()) or int(value) < least:
        raise ValueError(f"{text!r}: {key}={value!r} must be a whole number of at least {least}")
    return int(value)
