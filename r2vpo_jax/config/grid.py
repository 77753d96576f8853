"""Grids of settings for a sweep: tuples of plain dicts {dotted path of a field: value}, put together by functions.

    cells = grid.chain(
        grid.product(grid.values("objective.name", "r2vpo_fixed"), grid.values("objective.dual.coef", 0.5, 2.5)),
        grid.product(grid.values("objective.name", "ppo_clip"), grid.values(CLIP, 0.1, 0.2, 0.4)),
    )
    cells = grid.product(cells, grid.values("replay.lag", 0, 8))      # 5 x 2 cells

A cell may set any field of a run but the seed: seeds are the sweep's own, so that they are paired over all cells.
"""

import itertools
import json
from collections.abc import Iterable, Mapping
from typing import Any

Grid = tuple[dict[str, Any], ...]


def values(path: str | tuple[str, ...], *values) -> Grid:
    """One cell for each value of a field.

    Args:
      path: of the field, as `objective.dual.coef`; or several paths, which then all take the value.
      *values: the values; or one iterable of them, which is no string. A single value that is itself a tuple is
        written in a list: `values("sampler.prompt_buckets", [(16, 32)])`.

    Returns:
      As many cells as values, in their order.

    Raises:
      ValueError: no values, the same value twice, no path, or a value that is a section rather than a field.

    >>> values("replay.lag", 0, 8)
    ({'replay.lag': 0}, {'replay.lag': 8})
    >>> values("trainer.num_epochs", range(1, 3))
    ({'trainer.num_epochs': 1}, {'trainer.num_epochs': 2})
    >>> values(("objective.loss.options.clip_low", "objective.loss.options.clip_high"), 0.2)
    ({'objective.loss.options.clip_low': 0.2, 'objective.loss.options.clip_high': 0.2},)
    """
    paths = path if isinstance(path, tuple) else (path,)
    if not paths or not all(isinstance(one, str) and one for one in paths):
        raise ValueError(f"a grid's path is the name of a field, as 'replay.lag', or several of them; got {path!r}")
    if len(set(paths)) < len(paths):
        raise ValueError(f"a grid names a path twice: {paths}")
    if len(values) == 1 and isinstance(values[0], Iterable) and not isinstance(values[0], (str, Mapping)):
        values = tuple(values[0])
    plain = [_plain(paths[0], value) for value in values]
    if not plain:
        raise ValueError(f"a grid over {paths[0]} needs at least one value")
    for value in plain:
        if sum(repr(value) == repr(other) for other in plain) > 1:
            raise ValueError(f"a grid over {paths[0]} has the value {value!r} twice")
    return tuple(dict.fromkeys(paths, value) for value in plain)


def product(*grids: Grid) -> Grid:
    """Every combination of a cell of each grid; those of the last grid change fastest.

    Raises:
      ValueError: two grids set the same field.

    >>> product(values("replay.lag", 0, 8), values("trainer.num_epochs", 1))
    ({'replay.lag': 0, 'trainer.num_epochs': 1}, {'replay.lag': 8, 'trainer.num_epochs': 1})
    >>> product(values("replay.lag", 0), values("replay.lag", 8))
    Traceback (most recent call last):
    ValueError: two factors of a product both set replay.lag
    """
    return tuple(_joined(cells, "two factors of a product") for cells in itertools.product(*grids))


def zip_(*grids: Grid) -> Grid:
    """The first cells of all grids together, the second cells together, and so on.

    Raises:
      ValueError: the grids differ in length, or two set the same field.

    >>> zip_(values("trainer.num_epochs", 1, 4), values("optimizer.learning_rate", 1e-3, 3e-4))
    ({'trainer.num_epochs': 1, 'optimizer.learning_rate': 0.001}, {'trainer.num_epochs': 4, 'optimizer.learning_rate': 0.0003})
    >>> zip_(values("trainer.num_epochs", 1, 4), values("replay.lag", 0, 2, 8))
    Traceback (most recent call last):
    ValueError: grids that are zipped must have the same length, got 2 and 3
    """
    if len({len(cells) for cells in grids}) > 1:
        raise ValueError(
            f"grids that are zipped must have the same length, got {' and '.join(str(len(cells)) for cells in grids)}"
        )
    return tuple(_joined(cells, "two zipped grids") for cells in zip(*grids, strict=True))


def chain(*grids: Grid) -> Grid:
    """The cells of all grids, one grid after the other.

    >>> chain(values("replay.lag", 0), values("trainer.num_epochs", 4))
    ({'replay.lag': 0}, {'trainer.num_epochs': 4})
    """
    return tuple(dict(cell) for cells in grids for cell in cells)


def to_text(cells: Grid) -> str:
    """A grid as one line of JSON. A ConfigDict holds it so, whose own keys may have no dots; so does a flag.

    >>> to_text(values("replay.lag", 0, 8))
    '[{"replay.lag": 0}, {"replay.lag": 8}]'
    """
    return json.dumps([dict(cell) for cell in cells])


def from_text(text: str) -> Grid:
    """The grid of `to_text`.

    Raises:
      ValueError: no JSON list of objects.

    >>> from_text('[{"replay.lag": 0}, {"sampler.prompt_buckets": [16, 32]}]')
    ({'replay.lag': 0}, {'sampler.prompt_buckets': (16, 32)})
    """
    try:
        cells = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"a grid's text must be JSON ({error}), as {to_text(({'replay.lag': 0},))}") from error
    if not isinstance(cells, list) or not all(isinstance(cell, dict) for cell in cells):
        raise ValueError(f"a grid's text must be a list of objects, as {to_text(({'replay.lag': 0},))}; got {text}")
    return tuple({path: _plain(path, value) for path, value in cell.items()} for cell in cells)


def _joined(cells: tuple[dict[str, Any], ...], who: str) -> dict[str, Any]:
    joined: dict[str, Any] = {}
    for cell in cells:
        for path, value in cell.items():
            if path in joined:
                raise ValueError(f"{who} both set {path}")
            joined[path] = value
    return joined


def _plain(path: str, value):
    """A value that JSON keeps: NumPy's scalars become numbers, lists tuples."""
    if isinstance(value, Mapping):
        raise ValueError(
            f"a grid sets fields, each by its own path, and no sections; {path} has {type(value).__name__}"
        )
    if isinstance(value, (list, tuple)):
        return tuple(_plain(path, item) for item in value)
    if hasattr(value, "item"):
        value = value.item()
    if value is not None and not isinstance(value, (bool, int, float, str)):
        raise ValueError(f"a grid's value must be a number, a text, True, False or None; {path} has {value!r}")
    return value
