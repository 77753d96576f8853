"""Safetensors files: one or several with an index, read and written tensor by tensor."""

import json
import math
import pathlib
from collections.abc import Iterator

import jax.numpy as jnp
import numpy as np

from r2vpo_jax.errors import refuse_pointer

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(jnp.bfloat16)}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def read_object(file) -> dict:
    """A JSON object.

    Raises:
      ValueError: the file holds something else.
    """
    refuse_pointer(file)
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:  # not JSON, or not even text
        raise ValueError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{file} does not hold a JSON object")
    return value


class Tensors:
    """Tensors of one directory by name; nothing but headers is read before `get`.

    Raises:
      FileNotFoundError: a file of weights is missing.
      ValueError: a file is not what it should be, or the index leads out of the directory.
    """

    def __init__(self, path):
        self._path = path = pathlib.Path(path)
        names, weight_map = _named(path)
        files = {n: _open(path / n) for n in names}
        held = [(key, n) for n, file in files.items() for key in file.keys()]  # noqa: SIM118 (not a dict)
        self._owner = {key: files[n] for key, n in held if weight_map is None or weight_map.get(key) == n}

    def names(self) -> set[str]:
        return set(self._owner)

    def _header(self, name):
        if name not in self._owner:
            raise ValueError(f"{self._path} lacks the tensor {name!r}")
        return self._owner[name].get_slice(name)

    def dtype(self, name) -> np.dtype:
        """Its dtype, from the file's header."""
        dtype = self._header(name).get_dtype()
        if dtype not in _DTYPES:
            raise ValueError(
                f"{self._path}: tensor {name!r} is stored as {dtype}; only {', '.join(_DTYPES)} are implemented"
            )
        return _DTYPES[dtype]

    def check(self, name, shape) -> None:
        """Raise ValueError, naming the tensor, unless it is there with this shape and a dtype that is read."""
        if name not in self._owner:
            raise ValueError(f"{self._path} lacks the tensor {name!r} of shape {tuple(shape)}")
        stored = self.shape(name)
        if stored != tuple(shape):
            raise ValueError(
                f"{self._path}: tensor {name!r} has shape {stored}, but config.json implies {tuple(shape)}"
            )
        self.dtype(name)

    def get(self, name) -> np.ndarray:
        """The tensor itself, in memory of its own."""
        return self._owner[name].get_tensor(name)

    def shape(self, name) -> tuple[int, ...]:
        """Its shape, from the file's header."""
        return tuple(self._header(name).get_shape())

    def rows(self, name, count: int) -> Iterator[np.ndarray]:
        """The tensor in pieces of `count` rows."""
        held, length = self._header(name), self.shape(name)[0]
        for start in range(0, length, count):
            yield held[start : min(start + count, length)]


def weight_files(path) -> list[pathlib.Path]:
    """The files that the weights of a directory are in, and no other that lies there.

    Raises:
      FileNotFoundError, ValueError: as `Tensors`.
    """
    path = pathlib.Path(path)
    return [path / name for name in _named(path)[0]]


def names_of_weights(path) -> list[str]:
    """The names of those files, which need not be there, of a directory that has the index if there is one.

    Raises:
      ValueError: the index is not what it should be.
    """
    return _listed(pathlib.Path(path))[0]


def _named(path: pathlib.Path) -> tuple[list[str], dict[str, str] | None]:
    """(names of the files of weights, tensor name -> file name if there is an index)."""
    names, weight_map = _listed(path)
    missing = [n for n in names if not (path / n).is_file()]
    if missing:
        raise FileNotFoundError(f"{path} lacks the weight files {missing} (only safetensors are read)")
    return names, weight_map


def _listed(path: pathlib.Path) -> tuple[list[str], dict[str, str] | None]:
    single, index = path / SINGLE, path / INDEX
    weight_map = None
    if index.is_file() and not single.is_file():  # with both present, Transformers too reads the single file
        weight_map = read_object(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(n, str) for n in weight_map.values()):
            raise ValueError(f"{index} lacks a weight_map from tensor names to file names")
        outside = sorted(n for n in set(weight_map.values()) if n == ".." or pathlib.PurePath(n).name != n)
        if outside:
            raise ValueError(f"{index} names files outside its directory: {outside}")
    names = [single.name] if weight_map is None else sorted(set(weight_map.values()))
    return names, weight_map


def _open(file: pathlib.Path):
    from safetensors import SafetensorError, safe_open

    refuse_pointer(file)
    try:
        return safe_open(file, framework="np")
    except SafetensorError as error:
        raise ValueError(f"{file} is not a safetensors file, or not all of one: {error}") from error


def write_tensors(file, headers: list[tuple[str, np.dtype, tuple[int, ...]]], arrays: Iterator[np.ndarray]) -> None:
    """Write a safetensors file without holding more than one tensor.

    Args:
      file: opened for binary writing.
      headers: (name, dtype, shape) of each tensor.
      arrays: the tensors themselves in the same order, taken one by one.
    """
    entries, end = {"__metadata__": {"format": "pt"}}, 0
    for name, dtype, shape in headers:
        start, end = end, end + np.dtype(dtype).itemsize * math.prod(shape)
        entries[name] = {
            "dtype": _DTYPE_NAMES[np.dtype(dtype)],
            "shape": list(shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for (name, dtype, shape), array in zip(headers, arrays, strict=True):
        if array.dtype != dtype or array.shape != tuple(shape):
            raise ValueError(f"{name}: got {array.dtype}{array.shape}, announced {dtype}{tuple(shape)}")
        file.write(np.ascontiguousarray(array).view(np.uint8))
