"""Data sets of rows: from a spec and files to examples, with counts of what was left out."""

import dataclasses
import json
import pathlib
from collections.abc import Iterable, Iterator

from r2vpo_jax.data.base import Example, InMemoryDataset
from r2vpo_jax.data.fields import ANSWER_STYLES, Columns, MissingError
from r2vpo_jax.data.files import columns_of, read_rows
from r2vpo_jax.data.known import KnownDataset
from r2vpo_jax.data.specs import SourceSpec, near, parse_rows
from r2vpo_jax.verifiers.kinds import KINDS

_FIELDS = ("question", "answer", "answer_style", "level", "context", "kind")
OPTIONS = ("split", "rows", "where", "missing", "conflicts", *_FIELDS)
_KINDS = tuple(name for name, kind in KINDS.items() if not kind.own_problems)
_POLICIES = ("error", "drop")
_TOO_MANY = 0.05  # share of dropped rows from which on the mapping is at fault, not the data


@dataclasses.dataclass(frozen=True)
class RowPlan:
    """How rows become examples."""

    text: str  # the spec, for messages
    source: str
    columns: Columns
    needed: frozenset[str]  # optional fields that the spec asks for
    where: tuple[tuple[str, str], ...]
    where_needed: bool
    missing: str
    conflicts: str
    selection: slice  # of the examples that are left
    kept: frozenset[str] | None = frozenset()  # columns that go into Example.columns; None: all


def make_plan(spec: SourceSpec, known: KnownDataset, source: str) -> tuple[RowPlan, str | None]:
    """(the plan, the split that the spec states).

    Raises:
      ValueError: options that there are not, or values that they do not take.
    """
    options = spec.take(OPTIONS, repeatable=("where",))

    def one_of(key, choices, default):
        value = options.get(key, default)
        if value not in choices:
            raise ValueError(f"{spec.text!r}: {key}={value!r} is unknown; {near(str(value), choices)}")
        return value

    columns = known.columns
    for key in ("question", "level", "context"):
        if key in options:
            columns = dataclasses.replace(columns, **{key: (_stated(spec, key, options[key]),)})
    style = one_of("answer_style", ANSWER_STYLES, "verbatim")
    if "answer" in options:
        columns = dataclasses.replace(columns, answer=((_stated(spec, "answer", options["answer"]), style),))
    elif "answer_style" in options:
        columns = dataclasses.replace(columns, answer=tuple((path, style) for path, _ in columns.answer))
    columns = dataclasses.replace(columns, kind=one_of("kind", _KINDS, columns.kind))
    where = tuple(_condition(spec, text) for text in options.get("where", ()))
    return RowPlan(
        text=spec.text,
        source=source,
        columns=columns,
        needed=frozenset(options) & {"level", "context"},
        where=where or known.where,
        where_needed=bool(where),
        missing=one_of("missing", _POLICIES, known.missing),
        conflicts=one_of("conflicts", _POLICIES, known.conflicts),
        selection=parse_rows(spec.text, options.get("rows", ":")),
    ), options.get("split")


def from_files(plan: RowPlan, paths: list[pathlib.Path], split: str) -> InMemoryDataset:
    """The examples in files.

    Raises:
      ValueError: rows that make no example; the message names file and row.
    """

    def read():
        for path in paths:
            wanted = plan.columns.top_level() | {column for column, _ in plan.where} | (plan.kept or set())
            yield str(path), read_rows(path, None if plan.kept is None else wanted), path

    return _collect(plan, read(), split)


def from_rows(plan: RowPlan, name: str, rows: Iterable[tuple[int, dict]], split: str) -> InMemoryDataset:
    """The examples in rows from elsewhere."""
    return _collect(plan, [(name, iter(rows), None)], split)


class _Collector:
    """Examples so far, each question once."""

    def __init__(self, plan: RowPlan):
        self.plan = plan
        self.counts = {"rows": 0, "other kinds of rows": 0, "without question or answer": 0, "duplicates": 0}
        self.examples: list[Example] = []
        self._seen_raw: set[tuple] = set()
        self._places: dict[str, tuple[int, str]] = {}  # question -> (position in examples, where it was read)
        self._in_conflict: set[int] = set()

    def add(self, columns: Columns, row: dict, where: str) -> None:
        """Raises ValueError without the place, which the caller knows."""
        raw = columns.raw(row)
        if raw in self._seen_raw:  # published copies repeat rows a hundred times: no need to look at them again
            self.counts["duplicates"] += 1
            return
        example = columns.example(raw, self.plan.source)
        self._seen_raw.add(raw)
        key = " ".join(example.question.split())
        if key not in self._places:
            self._places[key] = len(self.examples), where
            self.examples.append(dataclasses.replace(example, columns=_kept(row, self.plan.kept)))
            return
        place, first = self._places[key]
        if self.examples[place].gold == example.gold:
            self.counts["duplicates"] += 1
        elif self.plan.conflicts == "drop":
            self._in_conflict.add(place)
        else:
            raise ValueError(
                f"has the answer {example.gold!r} to the question of {first}, whose answer is "
                f"{self.examples[place].gold!r}: mend them, or drop such questions by conflicts=drop"
            )

    def finish(self, split: str) -> InMemoryDataset:
        plan, counts, size = self.plan, self.counts, len(self.examples)
        if not counts["rows"]:
            raise ValueError(f"{plan.text!r}: there are no rows")
        for what, number, among in (
            ("have no question or answer", counts["without question or answer"], counts["rows"]),
            ("of the questions have several answers", len(self._in_conflict), size),
        ):
            if number > _TOO_MANY * among:
                raise ValueError(
                    f"{plan.text!r}: {number} of {among} {what}, too many to drop; are question= and answer= right?"
                )
        kept = [example for i, example in enumerate(self.examples) if i not in self._in_conflict]
        counts["questions with several answers"] = size - len(kept)
        chosen = kept[plan.selection]
        if not chosen:
            raise ValueError(f"{plan.text!r}: no rows are left of {len(kept)} ({counts})")
        if plan.selection != slice(None, None):
            counts["not in rows="] = len(kept) - len(chosen)
        return InMemoryDataset(chosen, split, {name: n for name, n in counts.items() if n or name == "rows"})


def _kept(row: dict, names: frozenset[str] | None) -> dict:
    """The values of these columns as JSON has them: what it does not know (dates, bytes) becomes text."""
    chosen = {name: value for name, value in row.items() if names is None or name in names}
    return json.loads(json.dumps(chosen, default=str)) if chosen else {}


def _collect(plan: RowPlan, tables: Iterable[tuple[str, Iterator, pathlib.Path | None]], split: str) -> InMemoryDataset:
    collector = _Collector(plan)
    for name, rows, path in tables:
        columns = where = None
        for number, row in rows:
            if columns is None:
                columns, where = _on_first_row(plan, name, row, path)
            collector.counts["rows"] += 1
            if any(str(row.get(column)) not in values for column, values in where):
                collector.counts["other kinds of rows"] += 1
                continue
            try:
                collector.add(columns, row, f"{name}, row {number}")
            except MissingError as error:
                if plan.missing == "error":
                    raise ValueError(
                        f"{name}, row {number} {error}; mend it, or drop such rows by missing=drop"
                    ) from error
                collector.counts["without question or answer"] += 1
            except ValueError as error:
                raise ValueError(f"{name}, row {number} {error}") from error
    return collector.finish(split)


def _on_first_row(plan: RowPlan, name: str, row: dict, path: pathlib.Path | None):
    """(columns, conditions) of this file: those of the plan that it has."""
    there = sorted(row) if path is None else columns_of(path)
    try:
        columns = plan.columns.on(row, plan.needed)
    except KeyError as error:
        what, paths = error.args
        raise ValueError(
            f"{name} has no field {' or '.join(map(repr, paths))}; its fields are {', '.join(there) or 'none'}: "
            f"write {what}=FIELD in {plan.text!r}"
        ) from None
    where = [(column, set(value.split("|"))) for column, value in plan.where if column in row]
    if plan.where_needed and len(where) < len(plan.where):
        absent = [column for column, _ in plan.where if column not in row]
        raise ValueError(
            f"{name} has no column {absent[0]!r}, which where= asks for; its fields are {', '.join(there)}"
        )
    return columns, where


def _stated(spec: SourceSpec, key: str, value: str) -> str:
    if not value.strip():
        raise ValueError(f"{spec.text!r}: {key}= needs the name of a field")
    return value.strip()


def _condition(spec: SourceSpec, text: str) -> tuple[str, str]:
    column, colon, value = text.partition(":")
    if not colon or not column.strip() or not value:
        raise ValueError(f"{spec.text!r}: where={text!r} is not of the form column:value")
    return column.strip(), value
