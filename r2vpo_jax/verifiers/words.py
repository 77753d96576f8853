"""Answers that are words: names, choices, times of day. Compared as text, in one spelling."""

import re

_WORD = re.compile(r"(?:\\text\s*\{[^{}]*\}|[A-Za-z'\-. ])+")
MATH_WORDS = re.compile(
    r"(?<![a-zA-Z\\])(infinity|infty|pi|theta|alpha|beta|sqrt|(?:arc)?(?:sin|cos|tan|cot|sec|csc)h?|log|ln|exp|lcm|gcd)(?![a-zA-Z])"
    r"|(?<![a-zA-Z\\])(sqrt|pi)(?=[\d(])"
)
_TEXT = re.compile(r"\\text\s*\{([^{}]*)\}")
_HYPHEN = re.compile("(?<=[a-z])-(?=[a-z])")
_SHORT_WORDS = ("yes", "no", "odd", "none", "even", "all", "up", "in", "on", "off", "one", "two", "six", "ten")
_PRODUCT_LETTERS = 3
_CHOICE = re.compile(
    r"\(?\s*(?:\\text\s*\{)?\s*(?:(?:[Oo]ption|[Cc]hoice)\s+(?:\\text\s*\{)?)?\(?\s*([A-J])\s*\)?\s*\}?\s*\)?"
)
_CHOICE_WITH_TEXT = re.compile(
    r"\s*(?:\\text\s*\{\s*(?:\(\s*([A-J])\s*\)|([A-J])\s*[.:)])\s*\}?|\(\s*([A-J])\s*\)(?=\s)|([A-J])\s*[.:)]|\(\s*\\text\s*\{\s*([A-J])\s*\}\s*\))"
    r"\s*[.:]?\s*(\S.*)",
    re.DOTALL,
)
_ANOTHER_CHOICE = re.compile(
    r"\([A-J]\)|(?<![A-Za-z\\])(?:or|and)\s+[A-J](?![A-Za-z])|(?<![A-Za-z\\])[A-J][.:)]\s|^[A-J](?![A-Za-z])"
)
_CLOCK = re.compile(
    r"(\d{1,2})(?::(\d{2})(?::(\d{2}))?)?\s*(?:\\text\s*\{)?\s*(?:([ap])\.?\s?m\.?)?\s*\}?", re.IGNORECASE
)


def word(text: str) -> str | None:
    r"""The words of a cleaned answer in one spelling, None where it is mathematics: "(A)", "\text{Evelyn}", "no solution".

    Bare letters are a product of variables up to three of them (xy, abc), unless they are spelled like a word: May, red, no.
    """
    text = text.strip()
    choice = _CHOICE.fullmatch(text)
    if choice and (text.lower().startswith(("(", "option", "choice")) or "text" in text or len(text) == 1):
        return choice[1].lower()
    if not _WORD.fullmatch(text):
        return None
    spelled = letters_of(text)
    if not re.search("[a-z]", spelled) or re.search(r"\d", spelled) or MATH_WORDS.search(spelled):
        return None
    if r"\text" not in text and not is_short_word(text.strip(". ")):
        letters = re.sub("[^a-z]", "", spelled)
        parts = re.split(r"[\s\-]+", spelled)
        if len(letters) <= _PRODUCT_LETTERS or all(len(part) <= 1 for part in parts):
            return None
    return spelled if len(spelled) > 1 else None


def letters_of(text: str) -> str:
    r"""The text of words: without \text, dots, capitals and double spaces."""
    return " ".join(_HYPHEN.sub(" ", _TEXT.sub(r" \1 ", text).replace(".", " ").lower()).split())


def bare_letters(text: str) -> str:
    r"""The letters of one short word or product, VW or \text{VW}; "" of anything else."""
    text = _TEXT.sub(r"\1", text).strip(". ")
    return text if text.isascii() and text.isalpha() and len(text) <= _PRODUCT_LETTERS else ""


def is_short_word(text: str) -> bool:
    """Whether up to three bare letters are spelled like a word rather than a product of variables."""
    if text.lower() in _SHORT_WORDS:
        return True
    if not text.isalpha() or len(text) > _PRODUCT_LETTERS or len(text) < 2:
        return False
    if text[0].isupper() and text[1:].islower():
        return bool(set("aeiouy") & set(text.lower()))  # May, Sam, Lee
    in_order = list(text) == sorted(text)  # abc is a product, red a color
    return len(text) == 3 and text.islower() and not in_order and bool(set("aeiou") & set(text))


def choice(text: str) -> tuple[str, str]:
    r"""("B", "12") of "\textbf{(B) }12", "B. 12" and the like; ("", "") where it is no single choice with its text."""
    match = _CHOICE_WITH_TEXT.fullmatch(text)
    if match is None:
        return "", ""
    rest = match[6].strip()
    if rest.endswith("}") and rest.count("}") > rest.count("{"):  # of \text{(B) 12}
        rest = rest[:-1]
    if not rest or rest[0] in "+*/^_=,;" or _ANOTHER_CHOICE.search(rest):
        return "", ""
    return next(letter for letter in match.groups()[:5] if letter), rest


def clock(text: str) -> tuple[int, int, int, str] | None:
    """(hour, minute, second, "a", "p" or "") of a time of day such as 4:30 p.m.; None of anything else."""
    match = _CLOCK.fullmatch(text.strip())
    if match is None or not (match[2] or match[4]):
        return None
    return int(match[1]), int(match[2] or 0), int(match[3] or 0), (match[4] or "").lower()


def same_clock(a: tuple, b: tuple) -> bool:
    """Whether two times of day are one; 15:30 is 3:30 p.m."""
    if bool(a[3]) == bool(b[3]):
        return a == b
    if not a[3]:
        a, b = b, a
    hour = a[0] % 12 + 12 * (a[3] == "p")
    return a[:3] == b[:3] or (hour, *a[1:3]) == b[:3]
