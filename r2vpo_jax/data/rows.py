"""Data sets of rows: from a spec and files to examples, with counts of what was left out."""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from r2vpo_jax import waits
from r2vpo_jax.data import prepared, streams
from r2vpo_jax.data.base import Dataset, Example, InMemoryDataset
from r2vpo_jax.data.fields import ANSWER_STYLES, Columns, MissingError
from r2vpo_jax.data.files import columns_of, read_rows
from r2vpo_jax.data.known import KnownDataset
from r2vpo_jax.data.specs import SourceSpec, near, parse_rows
from r2vpo_jax.verifiers.kinds import KINDS

_FIELDS = ("question", "answer", "answer_style", "level", "context", "kind")
OPTIONS = ("split", "rows", "where", "missing", "conflicts", "stream", *_FIELDS)
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
    stream: bool = False  # whether examples stay in their files
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
        stream=one_of("stream", ("true", "false"), "false") == "true",
    ), options.get("split")


def from_files(plan: RowPlan, paths: list[pathlib.Path], split: str) -> Dataset:
    """The examples in files.

    Raises:
      ValueError: rows that make no example; the message names file and row. Or files that cannot be streamed.
    """
    wanted = plan.columns.top_level() | {column for column, _ in plan.where} | (plan.kept or set())
    wanted = None if plan.kept is None else wanted
    if plan.stream:
        groups = streams.Groups()
        files = [streams.File(path, wanted, groups) for path in paths]
        tables = [_Table(str(file.path), file.rows(), file.path) for file in files]
        return _collect(plan, tables, _Streaming(plan, files), split)
    tables = [_Table(str(path), _numbered(read_rows(path, wanted)), path) for path in paths]
    return _collect(plan, tables, _InMemory(plan), split)


def from_records(plan: RowPlan, records: prepared.Records, split: str) -> Dataset:
    """The examples of a prepared data set.

    Raises:
      ValueError: as `from_files`.
    """
    store = _Streaming(plan, [records]) if plan.stream else _InMemory(plan)
    return _collect(plan, [_Table(str(records.path), records.rows(), None)], store, split)


@dataclasses.dataclass(frozen=True)
class _Table:
    name: str
    rows: Iterator[tuple[int, int, dict]]  # place, number, row
    path: pathlib.Path | None


def _numbered(rows: Iterable[tuple[int, dict]]) -> Iterator[tuple[int, int, dict]]:
    return ((number, number, row) for number, row in rows)


class _InMemory:
    """Keeps examples themselves."""

    def __init__(self, plan: RowPlan):
        self._plan, self._examples, self._seen = plan, [], set()

    def seen(self, raw: tuple[str, ...]) -> bool:
        """Whether such a row was kept: published copies repeat rows a hundred times, which need not be looked at again."""
        return raw in self._seen

    def keep(self, example: Example, raw: tuple[str, ...], row: dict) -> None:
        self._seen.add(raw)
        self._examples.append(dataclasses.replace(example, columns=_kept(row, self._plan.kept)))

    def key(self, text: str):
        """What stands for a text, equal for equal ones."""
        return text

    def gold(self, number: int, places: streams.Places, columns: dict[int, Columns]) -> str:
        """Of an example that was kept."""
        return self._examples[number].gold

    def dataset(
        self, chosen: list[int], places: streams.Places, columns: dict[int, Columns], split: str, counts
    ) -> Dataset:
        return InMemoryDataset([self._examples[i] for i in chosen], split, counts)


class _Streaming:
    """Keeps nothing but what `_Collector` notes of each."""

    def __init__(self, plan: RowPlan, files: list):
        self._plan, self._files = plan, files

    def seen(self, raw: tuple[str, ...]) -> bool:
        return False

    def keep(self, example: Example, raw: tuple[str, ...], row: dict) -> None:
        pass

    def key(self, text: str):
        return hashlib.blake2b(text.encode(), digest_size=16).digest()

    def gold(self, number: int, places: streams.Places, columns: dict[int, Columns]) -> str:
        return self.dataset([number], places, columns, "test", {}).example(0).gold

    def dataset(
        self, chosen: list[int], places: streams.Places, columns: dict[int, Columns], split: str, counts
    ) -> Dataset:
        plan = self._plan

        def make(file: int, row: dict) -> Example:
            example = columns[file].example(columns[file].raw(row), plan.source)
            return dataclasses.replace(example, columns=_kept(row, plan.kept))

        return streams.StreamedDataset(self._files, places.chosen(np.asarray(chosen)), make, split, counts)


class _Collector:
    """Which rows make examples, each question once."""

    def __init__(self, plan: RowPlan, tables: list[_Table], store):
        self.plan, self._tables, self._store = plan, tables, store
        self.counts = {"rows": 0, "other kinds of rows": 0, "without question or answer": 0, "duplicates": 0}
        self.columns: dict[int, Columns] = {}  # of each table that has rows
        self._golds, self._places = (
            [],
            streams.Places(),
        )  # of each example: what stands for its gold, and where it was read
        self._positions: dict[Any, int] = {}  # what stands for a question -> its example
        self._in_conflict: set[int] = set()

    def add(self, row: dict, table: int, place: int, number: int) -> None:
        """Raises ValueError without the place, which the caller knows."""
        raw = self.columns[table].raw(row)
        if self._store.seen(raw):
            self.counts["duplicates"] += 1
            return
        example = self.columns[table].example(raw, self.plan.source)
        key, gold = self._store.key(" ".join(example.question.split())), self._store.key(example.gold)
        if key not in self._positions:
            self._positions[key] = len(self._golds)
            self._golds.append(gold)
            self._places.add(table, place, number)
            self._store.keep(example, raw, row)
            return
        first = self._positions[key]
        if self._golds[first] == gold:
            self.counts["duplicates"] += 1
        elif self.plan.conflicts == "drop":
            self._in_conflict.add(first)
        else:
            where = f"{self._tables[self._places.file[first]].name}, row {self._places.number[first]}"
            before = self._store.gold(first, self._places, self.columns)
            raise ValueError(
                f"has the answer {example.gold!r} to the question of {where}, whose answer is {before!r}: mend them, or drop "
                "such questions by conflicts=drop"
            )

    def finish(self, split: str) -> Dataset:
        plan, counts, size = self.plan, self.counts, len(self._golds)
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
        kept = [i for i in range(size) if i not in self._in_conflict]
        counts["questions with several answers"] = size - len(kept)
        chosen = kept[plan.selection]
        if not chosen:
            raise ValueError(f"{plan.text!r}: no rows are left of {len(kept)} ({counts})")
        if plan.selection != slice(None, None):
            counts["not in rows="] = len(kept) - len(chosen)
        counts = {name: n for name, n in counts.items() if n or name == "rows"}
        return self._store.dataset(chosen, self._places, self.columns, split, counts)


def _kept(row: dict, names: frozenset[str] | None) -> dict:
    """The values of these columns as JSON has them: what it does not know (dates, bytes) becomes text."""
    chosen = {name: value for name, value in row.items() if names is None or name in names}
    return json.loads(json.dumps(chosen, default=str)) if chosen else {}


def _collect(plan: RowPlan, tables: list[_Table], store, split: str) -> Dataset:
    collector = _Collector(plan, tables, store)
    for index, table in enumerate(tables):
        columns = where = None
        for place, number, row in waits.each(table.rows, f"reading {table.name}", None, "rows"):
            if columns is None:
                columns, where = _on_first_row(plan, table.name, row, table.path)
                collector.columns[index] = columns
            collector.counts["rows"] += 1
            if any(str(row.get(column)) not in values for column, values in where):
                collector.counts["other kinds of rows"] += 1
                continue
            try:
                collector.add(row, index, place, number)
            except MissingError as error:
                if plan.missing == "error":
                    raise ValueError(
                        f"{table.name}, row {number} {error}; mend it, or drop such rows by missing=drop"
                    ) from error
                collector.counts["without question or answer"] += 1
            except ValueError as error:
                raise ValueError(f"{table.name}, row {number} {error}") from error
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
