"""Problems from files and generators, by a line of text: docs/data.md.

    gsm8k?split=train&rows=500:      dapo_math_17k?weight=3 + chain_sum?max_terms=4&weight=1      my.jsonl?answer=final

Nothing here imports JAX; pyarrow, tensorflow_datasets and reasoning_gym are imported by those who need them.
"""

import dataclasses
import fractions
import pathlib
from collections.abc import Collection

from r2vpo_jax import hub, storage
from r2vpo_jax.data import files, generators, prepared, rows, specs
from r2vpo_jax.data.base import Dataset, Example, InMemoryDataset, same_question
from r2vpo_jax.data.known import KNOWN, LOCAL_FILE, RENAMED, KnownDataset
from r2vpo_jax.data.mixtures import Mixture
from r2vpo_jax.data.specs import SourceSpec, parse
from r2vpo_jax.data.splits import digest, disjoint
from r2vpo_jax.verifiers.outcome import SPLITS

__all__ = [
    "KNOWN",
    "Dataset",
    "Example",
    "InMemoryDataset",
    "Mixture",
    "digest",
    "disjoint",
    "load",
    "parse",
    "same_question",
]

_SHIPPED = pathlib.Path(__file__).parents[1] / "assets" / "data"


def load(
    spec: str, split: str, data_dir: str | pathlib.Path | None = None, columns: Collection[str] | None = ()
) -> Dataset:
    """The data set that a text names (specs.py has its grammar).

    Args:
      spec: one source, or several with ' + ' between them.
      split: train, validation or test: how positions are used, and which files are read unless the text says split=.
      data_dir: folder of known data sets; relative paths are looked up there first, then in the working directory. What is
        at an address (gs://bucket/data) is fetched once (storage.local_copy), and what has a name on the Hub
        (hf://datasets/OWNER/NAME@REVISION/path) likewise (hub.py).
      columns: top-level columns of rows that are kept in `Example.columns`; None: all.

    Raises:
      ValueError: what is wrong with the text or the data, and what to do.
      FileNotFoundError: data that are not there, and where to put them.
    """
    if split not in SPLITS:
        raise ValueError(f"split={split!r} is unknown; one of {', '.join(SPLITS)}")
    sources = parse(spec)
    for source in sources:
        if source.weight is not None and split != "train":
            raise ValueError(f"{source.text!r}: weight= is for training; {split} has all problems of all its sources")
    columns = None if columns is None else frozenset(columns)
    with hub.resolving():
        parts = [_load_one(source, split, data_dir, columns) for source in sources]
    if len(parts) == 1:
        return parts[0]
    return Mixture(parts, [source.weight or fractions.Fraction(1) for source in sources], split)


def _load_one(spec: SourceSpec, split: str, data_dir, columns) -> Dataset:
    is_path = "/" in spec.name or "." in spec.name  # also what is not read, such as x.csv.gz: it is refused by name
    if spec.name in RENAMED:
        raise ValueError(f"{spec.text!r}: the data set {spec.name} is called {RENAMED[spec.name]} now")
    if spec.name in KNOWN:
        return _load_known(spec, KNOWN[spec.name], split, data_dir, columns)
    if is_path:
        return _load_path(spec, split, data_dir, columns)
    there = generators.names()
    if spec.name not in (*there, *generators.REFUSED):
        hint = "" if there else " Generators need reasoning-gym: pip install 'r2vpo_jax[reasoning]'."
        raise ValueError(
            f"there is no data set or generator {spec.name!r}; {specs.near(spec.name, [*KNOWN, *there])} A file is named by "
            f"its path, with a / or its suffix.{hint}"
        )
    return generators.load(spec, split)


def _load_path(spec: SourceSpec, split: str, data_dir, columns) -> Dataset:
    if hub.is_name(spec.name):
        return _load_from_hub(spec, split, columns)
    if storage.is_address(spec.name):
        path = storage.path(spec.name, spec.text)
        tried = [path]
    else:
        path = pathlib.Path(spec.name).expanduser()
        tried = [storage.path(root, "task.text.data_dir") / path for root in (data_dir, ".") if root is not None]
    base = next((p for p in tried if p.exists()), None)
    if base is None:
        raise FileNotFoundError(f"{spec.text!r}: there is no {' and no '.join(map(str, dict.fromkeys(tried)))}")
    base = storage.local_copy(base)
    plan, stated = rows.make_plan(spec, LOCAL_FILE, path.stem)
    plan = dataclasses.replace(plan, kept=columns)
    if (found := prepared.find(base)) is not None:
        return rows.from_records(plan, prepared.Records(found, stated or split), split)
    return rows.from_files(plan, files.find(base, stated or split, stated=stated is not None), split)


def _load_from_hub(spec: SourceSpec, split: str, columns) -> Dataset:
    name = hub.Name(spec.name)
    if name.kind != "dataset":
        raise ValueError(f"{spec.text!r} names a model; a data set is hf://datasets/OWNER/NAME@REVISION/path")
    plan, stated = rows.make_plan(spec, LOCAL_FILE, pathlib.PurePosixPath(name.path or name.id).stem)
    plan = dataclasses.replace(plan, kept=columns)

    def chosen(base: pathlib.Path) -> list[pathlib.Path]:
        try:
            return files.find(base, stated or split, stated=stated is not None)
        except FileNotFoundError:
            there = sorted(str(p.relative_to(base)) for p in base.rglob("*") if p.suffix in files.SUFFIXES)
            raise FileNotFoundError(
                f"{spec.text!r}: no {stated or split} data there, but {', '.join(there[:8]) or 'no files that are read'}; name a file or "
                "a folder of it, or say split="
            ) from None

    return rows.from_files(plan, hub.files(spec.name, chosen), split)


def _load_known(spec: SourceSpec, known: KnownDataset, split: str, data_dir, columns) -> Dataset:
    plan, stated = rows.make_plan(spec, known, known.name)
    plan = dataclasses.replace(plan, kept=columns)
    wanted = stated or split
    if known.shipped:
        base = _SHIPPED / known.name
    elif data_dir is None:
        raise ValueError(f"{spec.text!r} needs a data folder (task.text.data_dir) with a copy of {known.published}")
    else:
        base = storage.local_copy(storage.path(data_dir, "task.text.data_dir") / known.name)
    if known.tfds and (found := prepared.find(base)) is not None:
        return rows.from_records(plan, prepared.Records(found, wanted), split)
    found = files.find(base, wanted, stated=stated is not None, one_split=known.one_split)
    return rows.from_files(plan, found, split)
