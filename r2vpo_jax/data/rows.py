"""Data sets of rows: from a spec and files to examples, with counts of what was left out."""

import dataclasses
import pathlib
from collections.abc import Iterable, Iterator

from r2vpo_jax.data.base import KINDS, Example, Rows
from r2vpo_jax.data.fields import ANSWER_STYLES, Mapping, MissingError
from r2vpo_jax.data.files import columns_of, read_rows
from r2vpo_jax.data.specs import Spec, near, parse_rows
from r2vpo_jax.data.table import Named

_FIELDS = ("question", "answer", "answer_style", "level", "context", "kind")
OPTIONS = ("split", "rows", "where", "missing", "conflicts", *_FIELDS)
_POLICIES = ("error", "drop")
_TOO_MANY = 0.05  # share of dropped rows from which on the mapping is at fault, not the data


@dataclasses.dataclass(frozen=True)
class Plan:
    """How rows become examples."""

    text: str  # the spec, for messages
    source: str
    fields: Mapping
    needed: frozenset[str]  # optional fields that the spec asks for
    where: tuple[tuple[str, str], ...]
    where_needed: bool
    missing: str
    conflicts: str
    rows: slice


def plan(spec: Spec, named: Named, source: str) -> tuple[Plan, str | None]:
    """(the plan, the split that the spec states).

    Raises:
      ValueError: options that there are not, or values that they do not take.
    """
    options = spec.take(OPTIONS, repeatable=("where",))

    def one_of(key, known, default):
        value = options.get(key, default)
        if value not in known:
            raise ValueError(f"{spec.text!r}: {key}={value!r} is unknown; {near(str(value), known)}")
        return value

    fields = named.fields
    for key in ("question", "level", "context"):
        if key in options:
            fields = dataclasses.replace(fields, **{key: (_stated(spec, key, options[key]),)})
    style = one_of("answer_style", ANSWER_STYLES, "verbatim")
    if "answer" in options:
        fields = dataclasses.replace(fields, answer=((_stated(spec, "answer", options["answer"]), style),))
    elif "answer_style" in options:
        fields = dataclasses.replace(fields, answer=tuple((path, style) for path, _ in fields.answer))
    fields = dataclasses.replace(fields, kind=one_of("kind", KINDS, fields.kind))
    where = tuple(_condition(spec, text) for text in options.get("where", ()))
    return Plan(
        text=spec.text,
        source=source,
        fields=fields,
        needed=frozenset(options) & {"level", "context"},
        where=where or named.where,
        where_needed=bool(where),
        missing=one_of("missing", _POLICIES, named.missing),
        conflicts=one_of("conflicts", _POLICIES, named.conflicts),
        rows=parse_rows(spec.text, options.get("rows", ":")),
    ), options.get("split")


def from_files(how: Plan, paths: list[pathlib.Path], split: str) -> Rows:
    """The examples in files.

    Raises:
      ValueError: rows that make no example; the message names file and row.
    """

    def read():
        for path in paths:
            columns = how.fields.columns() | {column for column, _ in how.where}
            yield str(path), read_rows(path, columns), path

    return _collect(how, read(), split)


def from_rows(how: Plan, name: str, rows: Iterable[tuple[int, dict]], split: str) -> Rows:
    """The examples in rows from elsewhere."""
    return _collect(how, [(name, iter(rows), None)], split)


class _Collector:
    """Examples so far, each question once."""

    def __init__(self, how: Plan):
        self.how = how
        self.counts = {"rows": 0, "other kinds of rows": 0, "without question or answer": 0, "duplicates": 0}
        self.examples: list[Example] = []
        self._seen_raw: set[tuple] = set()
        self._places: dict[str, tuple[int, str]] = {}  # question -> (position in examples, where it was read)
        self._in_conflict: set[int] = set()

    def add(self, fields: Mapping, row: dict, where: str) -> None:
        """Raises ValueError without the place, which the caller knows."""
        raw = fields.raw(row)
        if raw in self._seen_raw:  # published copies repeat rows a hundred times: no need to look at them again
            self.counts["duplicates"] += 1
            return
        example = fields.example(raw, self.how.source)
        self._seen_raw.add(raw)
        key = " ".join(example.question.split())
        if key not in self._places:
            self._places[key] = len(self.examples), where
            self.examples.append(example)
            return
        place, first = self._places[key]
        if self.examples[place].gold == example.gold:
            self.counts["duplicates"] += 1
        elif self.how.conflicts == "drop":
            self._in_conflict.add(place)
        else:
            raise ValueError(
                f"has the answer {example.gold!r} to the question of {first}, whose answer is "
                f"{self.examples[place].gold!r}: mend them, or drop such questions by conflicts=drop"
            )

    def finish(self, split: str) -> Rows:
        how, counts, size = self.how, self.counts, len(self.examples)
        if not counts["rows"]:
            raise ValueError(f"{how.text!r}: there are no rows")
        for what, number, among in (
            ("have no question or answer", counts["without question or answer"], counts["rows"]),
            ("of the questions have several answers", len(self._in_conflict), size),
        ):
            if number > _TOO_MANY * among:
                raise ValueError(
                    f"{how.text!r}: {number} of {among} {what}, too many to drop; are question= and answer= right?"
                )
        kept = [example for i, example in enumerate(self.examples) if i not in self._in_conflict]
        counts["questions with several answers"] = size - len(kept)
        chosen = kept[how.rows]
        if not chosen:
            raise ValueError(f"{how.text!r}: no rows are left of {len(kept)} ({counts})")
        if how.rows != slice(None, None):
            counts["not in rows="] = len(kept) - len(chosen)
        return Rows(chosen, split, {name: n for name, n in counts.items() if n or name == "rows"})


def _collect(how: Plan, tables: Iterable[tuple[str, Iterator, pathlib.Path | None]], split: str) -> Rows:
    collector = _Collector(how)
    for name, rows, path in tables:
        fields = where = None
        for number, row in rows:
            if fields is None:
                fields, where = _on_first_row(how, name, row, path)
            collector.counts["rows"] += 1
            if any(str(row.get(column)) not in values for column, values in where):
                collector.counts["other kinds of rows"] += 1
                continue
            try:
                collector.add(fields, row, f"{name}, row {number}")
            except MissingError as error:
                if how.missing == "error":
                    raise ValueError(
                        f"{name}, row {number} {error}; mend it, or drop such rows by missing=drop"
                    ) from error
                collector.counts["without question or answer"] += 1
            except ValueError as error:
                raise ValueError(f"{name}, row {number} {error}") from error
    return collector.finish(split)


def _on_first_row(how: Plan, name: str, row: dict, path: pathlib.Path | None):
    """(fields, conditions) with the columns that this file has."""
    columns = sorted(row) if path is None else columns_of(path)
    try:
        fields = how.fields.on(row, how.needed)
    except KeyError as error:
        what, paths = error.args
        raise ValueError(
            f"{name} has no field {' or '.join(map(repr, paths))}; its fields are {', '.join(columns) or 'none'}: "
            f"write {what}=FIELD in {how.text!r}"
        ) from None
    where = [(column, set(value.split("|"))) for column, value in how.where if column in row]
    if how.where_needed and len(where) < len(how.where):
        absent = [column for column, _ in how.where if column not in row]
        raise ValueError(
            f"{name} has no column {absent[0]!r}, which where= asks for; its fields are {', '.join(columns)}"
        )
    return fields, where


def _stated(spec: Spec, key: str, value: str) -> str:
    if not value.strip():
        raise ValueError(f"{spec.text!r}: {key}= needs the name of a field")
    return value.strip()


def _condition(spec: Spec, text: str) -> tuple[str, str]:
    column, colon, value = text.partition(":")
    if not colon or not column.strip() or not value:
        raise ValueError(f"{spec.text!r}: where={text!r} is not of the form column:value")
    return column.strip(), value
