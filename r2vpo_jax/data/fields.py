"""From a row of a file to an example."""

import ast
import dataclasses
import json
import math
import re

from r2vpo_jax.data.base import Example
from r2vpo_jax.verifiers.extraction import extract

ANSWER_STYLES = ("verbatim", "hash", "boxed", "list")  # where in a stored answer the final one is


class MissingError(ValueError):
    """A field that is empty or not there."""


@dataclasses.dataclass(frozen=True)
class Columns:
    """Which columns of a row make an example: dotted paths, of several the first that the file's first row has."""

    question: tuple[str, ...]
    answer: tuple[tuple[str, str], ...]  # (path, answer style)
    level: tuple[str, ...] = ()
    context: tuple[str, ...] = ()  # said before the question, where it is not empty
    kind: str = "math"
    wrapper: str | None = None  # regular expression; group 1 is the question
    wrapper_mark: str = ""  # a question with this in it is in the wrapper, or broken

    def top_level(self) -> set[str]:
        """Names of the top-level columns that may be needed."""
        paths = (*self.question, *(path for path, _ in self.answer), *self.level, *self.context)
        return {path.partition(".")[0] for path in paths}

    def on(self, first_row: dict, needed: frozenset[str] = frozenset()) -> "Columns":
        """With the one path of each that this row has.

        Args:
          first_row: of a file.
          needed: of level and context, those that must be there.

        Raises:
          KeyError: a field that is nowhere.
        """

        def choose(name, paths):
            found = [path for path in paths if _has(first_row, path)]
            if not found and (name in ("question", "answer") or name in needed):
                raise KeyError(name, paths)
            return tuple(found[:1])

        styles = dict(self.answer)
        return dataclasses.replace(
            self,
            question=choose("question", self.question),
            answer=tuple((path, styles[path]) for path in choose("answer", styles)),
            level=choose("level", self.level),
            context=choose("context", self.context),
        )

    def raw(self, row: dict) -> tuple[str, ...]:
        """The texts that an example is made of; the same texts make the same example."""
        question, answer = self.question[0], self.answer[0][0]
        values = [_text(_get(row, question), question, "question"), _text(_get(row, answer), answer, "answer")]
        for paths in (self.level, self.context):
            value = _get(row, paths[0], None) if paths else None
            values.append("" if value is None else _text(value, paths[0], "value"))
        return tuple(values)

    def example(self, raw: tuple[str, ...], source: str) -> Example:
        """Raises MissingError where nothing is left, ValueError where the text is not what it should be."""
        question, answer, level, context = raw
        question, (path, style) = question.strip(), self.answer[0]
        if self.wrapper is not None and self.wrapper_mark in question:
            match = re.fullmatch(self.wrapper, question, flags=re.DOTALL)
            if not match:
                raise ValueError(f"has an unknown instruction around its question: {question[:160]!r}")
            question = match.group(1).strip()
        if not question:
            raise MissingError(f"has no question (field {self.question[0]!r})")
        gold = tidy(final_answer(answer, style), self.kind)
        if not gold:
            what = {"hash": " after its last ####", "boxed": r" in its last \boxed{}"}.get(style, "")
            raise MissingError(f"has no answer{what} (field {path!r})")
        question = f"{context.strip()}\n\n{question}".strip()
        for text in (question, gold):
            text.encode()  # a lone surrogate raises UnicodeEncodeError, a ValueError
        return Example(question, gold, gold, self.kind, level.strip(), source)


def final_answer(text: str, style: str) -> str:
    r"""The final answer in a stored one; "" if there is none.

    hash: after the last ####, as in GSM8K; boxed: inside the last \boxed{} or \fbox{}, as in MATH; list: the texts
    of a list that is written as text.
    """
    if style == "hash":
        return text.rpartition("####")[2].strip() if "####" in text else ""
    if style == "boxed":
        return extract(text, "boxed") or ""
    if style == "list" and text.lstrip().startswith("["):
        try:
            items = ast.literal_eval(text.strip())
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            return text.strip()
        if all(isinstance(item, str) for item in items):  # [1, 2] is an interval
            return ", ".join(tidy(item, "math") for item in items)
    return text.strip()


def tidy(answer: str, kind: str) -> str:
    """Without what only gets in the way of judging: outer dollar signs, leading zeros, thousands separators (numeric)."""
    answer = answer.strip()
    if kind == "exact":
        return answer
    match = re.fullmatch(r"\$+([^$]*[^$\\])\$+", answer)
    if match:
        answer = match.group(1).strip()
    if re.fullmatch(r"0+\d+", answer):
        answer = answer.lstrip("0") or "0"
    if kind == "numeric" and re.fullmatch(r"[-+]?\$?\d{1,3}(,\d{3})+(\.\d+)?", answer):
        answer = answer.replace(",", "")
    return answer.replace("$", "") if kind == "numeric" else answer


_NOTHING = object()  # no default
_NOWHERE = object()
_ROLES = ("role", "from")  # keys of a message that say whose it is


def _get(row, path: str, default=_NOTHING):
    """The value at a dotted path; numbers index lists, `user` the one message of the user in a list of messages."""
    value = row
    for part in path.split("."):
        if isinstance(value, dict) and part in value:
            value = value[part]
        elif isinstance(value, list) and re.fullmatch(r"\d+", part) and int(part) < len(value):
            value = value[int(part)]
        elif isinstance(value, list) and part == "user" and (of_user := _of_user(value)):
            if len(of_user) > 1 and default is _NOTHING:
                raise ValueError(
                    f"has {len(of_user)} messages of the user in {path.partition('.user')[0]!r}, and a question is one; name "
                    f"it, for example question={path.replace('.user', f'.{of_user[-1]}')}"
                )
            value = value[of_user[0]]
        elif default is not _NOTHING:
            return default
        else:
            raise MissingError(f"has no field {path!r}")
    return value


def _of_user(messages: list) -> list[int]:
    """The numbers of the user's messages; the first of all where none says whose it is."""
    if not all(isinstance(message, dict) for message in messages):
        return []
    roles = [next((message[key] for key in _ROLES if key in message), None) for message in messages]
    return [i for i, role in enumerate(roles) if role in ("user", "human")] if any(roles) else [0][: len(messages)]


def _is_json(text: str) -> bool:
    """Whether a text is a JSON object, or an array of them: no question and no answer is."""
    if not re.match(r'\s*(?:\[\s*)?\{\s*"', text):
        return False
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _has(row: dict, path: str) -> bool:
    return _get(row, path, default=_NOWHERE) is not _NOWHERE


def _paths_of_texts(path: str, value) -> list[str]:
    """Where in a value there are texts or numbers that could be meant; in messages, those of the user come first."""
    if isinstance(value, dict):
        inner = [(key, item) for key, item in value.items() if key not in _ROLES]
    elif isinstance(value, list) and all(isinstance(item, dict) for item in value):
        first = _of_user(value)
        inner = [(i, value[i]) for i in [*first, *(i for i in range(len(value)) if i not in first)]]
    else:
        return [] if value is None or isinstance(value, list) else [path]
    return [found for key, item in inner for found in _paths_of_texts(f"{path}.{key}", item)]


def _text(value, path: str, what: str) -> str:
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return ""
    if isinstance(value, bytes):
        value = value.decode()
    if isinstance(value, str):
        if _is_json(value):
            raise ValueError(
                f"has JSON written as text in {path!r}, {value[:80]!r}, which is not looked into; write what it holds as "
                "fields of the row"
            )
        return value
    if what == "question" or isinstance(value, dict):
        there = _paths_of_texts(path, value)[:3]
        advice = f"name a field inside of it: {what}={' or '.join(there)}" if there else "each row is one problem"
        raise ValueError(f"has no text in {path!r} but {json.dumps(value, default=str)[:80]}; {advice}")
    if isinstance(value, list):
        parts = [tidy(_text(item, path, what), "math") for item in value]
        return ", ".join(parts) if all(parts) else ""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value)
