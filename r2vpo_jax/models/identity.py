"""What a base model is, as short digests: of weights, architecture, tokenizer, chat template and ends of text."""

import hashlib
import json
import pathlib
from collections.abc import Mapping

from r2vpo_jax import waits
from r2vpo_jax.errors import UsageError
from r2vpo_jax.models import tensor_files
from r2vpo_jax.models.tensor_files import read_object
from r2vpo_jax.models.tokenizer_files import vocabulary_files

_WHOLE_BYTES = 64 << 20  # files up to this size are digested whole
_BLOCKS, _BLOCK_BYTES = 1024, 64 << 10  # of larger ones, so many blocks, evenly spaced


def identity(path, tokenizer, eos_ids, *, weights: bytes | None = None) -> dict[str, str]:
    """Digests of 16 hexadecimal digits by what they are of. Where files lie, and what else lies there, does not matter.

    Args:
      path: a Hugging Face directory, or a link to one.
      tokenizer: the one that was opened there.
      eos_ids: the ids that end a text.
      weights: what identifies the weights where they are not those of the directory. Of weight files above 64 MiB their
        size and 1024 blocks of 64 KiB, evenly spaced, are read.

    Raises:
      OSError: a file cannot be read.
      ValueError: a file is not what it should be.
    """
    path = pathlib.Path(path)
    if weights is None:
        named = waits.each(tensor_files.weight_files(path), "digests of the base model", None, "files")
        weights = b"".join(f.name.encode() + b"\0" + _content(f) for f in named)
    settings = path / "tokenizer_config.json"
    settings = read_object(settings) if settings.is_file() else {}
    settings.pop("chat_template", None)
    return {
        "weights": _short(weights),
        "architecture": _short((path / "config.json").read_bytes()),
        "tokenizer": _short(
            _json(settings), *(part for f in vocabulary_files(path) for part in (f.name.encode(), f.read_bytes()))
        ),
        "chat template": _short(_json(tokenizer.chat_template)),
        "ends of text": _short(_json(sorted(eos_ids))),
    }


def digest(parts: Mapping[str, str]) -> str:
    """16 hexadecimal digits of an `identity`."""
    return _short(_json(parts))


def refuse_others(before: Mapping[str, str], now: Mapping[str, str], directory) -> None:
    """Raises UsageError where what is in `directory` was started from another base model; the message names the parts."""
    if others := differing(before, now):
        raise UsageError(
            f"the base model is not the one that {directory} was started from: it differs in {', '.join(others)}; put back "
            "what model.path named then, or choose another --workdir"
        )


def differing(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """The parts of an identity that were known before and are others now."""
    return [name for name, value in before.items() if now.get(name) != value]


def _json(value) -> bytes:
    return json.dumps(value, sort_keys=True).encode()


def _short(*parts: bytes) -> str:
    hashed = hashlib.sha256()
    for part in parts:
        hashed.update(len(part).to_bytes(8, "big") + part)
    return hashed.hexdigest()[:16]


def _content(path: pathlib.Path) -> bytes:
    size = path.stat().st_size
    with open(path, "rb") as file:
        if size <= _WHOLE_BYTES:
            return hashlib.file_digest(file, "sha256").digest()
        hashed = hashlib.sha256(str(size).encode())
        for number in range(_BLOCKS):
            file.seek((size - _BLOCK_BYTES) * number // (_BLOCKS - 1))
            hashed.update(file.read(_BLOCK_BYTES))
        return hashed.digest()
