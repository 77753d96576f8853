"""What an export takes over from the directory of its base model: tokenizer files, and how the model wants to be sampled.

Transformers 5 writes tokenizers that Transformers 4 cannot open, so files are copied, not written anew; what only
version 5 can read in them is spelled as both can.
"""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

from r2vpo_jax.models.tensor_files import read_object

_CONFIG = "tokenizer_config.json"
_GENERATION = "generation_config.json"
_FILES = (
    "tokenizer.json",
    _CONFIG,
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "tekken.json",
    "chat_template.json",
    "chat_template.jinja",
)
_MORE_TEMPLATES = "additional_chat_templates"  # a folder: one file a template
_ANY_TOKENIZER = "PreTrainedTokenizerFast"  # tokenizer.json as it is, in both versions
_OF_VERSION_5 = ("TokenizersBackend", "PythonBackend", "SentencePieceBackend", "MistralCommonBackend")
_NOTES_OF_VERSION_5 = ("backend", "is_local", "local_files_only")

# Where a directory has no generation_config.json, readers take these from its config.json.
_SAMPLING = ("do_sample", "temperature", "top_p", "top_k", "min_p", "typical_p", "repetition_penalty")


NAMES = (*_FILES, f"{_MORE_TEMPLATES}/*.jinja")  # patterns of all that a tokenizer is read from


def tokenizer_files(path) -> list[pathlib.Path]:
    """The files of a directory that a tokenizer is read from, its chat templates among them."""
    path = pathlib.Path(path)
    named = [path / name for name in _FILES]
    return [file for file in (*named, *sorted((path / _MORE_TEMPLATES).glob("*.jinja"))) if file.is_file()]


def vocabulary_files(path) -> list[pathlib.Path]:
    """Those of them that say which text is which token: neither settings nor chat templates."""
    others = (_CONFIG, "chat_template.json")
    return [file for file in tokenizer_files(path) if file.suffix != ".jinja" and file.name not in others]


def copy_tokenizer(source, destination) -> None:
    """Put the tokenizer files of `source` in the place of those in `destination`, which may be the same.

    A file stays as it is, byte for byte, unless Transformers 4 could not open it, or it asks for Python code.

    Raises:
      ValueError: tokenizer_config.json is not a JSON object.
    """
    source, destination = pathlib.Path(source), pathlib.Path(destination)
    contents = {file.relative_to(source): file.read_bytes() for file in tokenizer_files(source)}
    for stale in tokenizer_files(destination):
        stale.unlink()
    for name, content in contents.items():
        file = destination / name
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(content)
    respell(destination)


def respell(path) -> None:
    """Make the tokenizer_config.json of a directory, where there is one, readable for Transformers 4 and 5 alike."""
    file = pathlib.Path(path) / _CONFIG
    if not file.is_file():
        return
    settings = read_object(file)
    spelled = _spelled_for_both(settings, has_json=(file.parent / "tokenizer.json").is_file())
    if spelled != settings:
        file.write_text(json.dumps(spelled, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def _spelled_for_both(settings: Mapping[str, Any], *, has_json: bool) -> dict[str, Any]:
    spelled = {name: value for name, value in settings.items() if name not in _NOTES_OF_VERSION_5}
    name = spelled.get("tokenizer_class")
    if has_json and (name in _OF_VERSION_5 or "auto_map" in spelled):
        # Code that comes with a checkpoint was not run here, and is not exported.
        spelled.pop("auto_map", None)
        spelled["tokenizer_class"] = _ANY_TOKENIZER
    if isinstance(spelled.get("extra_special_tokens"), list):  # in version 4 a dict, by name
        tokens = spelled.pop("extra_special_tokens")
        listed = spelled.get("additional_special_tokens") or []
        spelled["additional_special_tokens"] = listed + [token for token in tokens if token not in listed]
    if isinstance(spelled.get("model_specific_special_tokens"), dict):
        named = spelled.pop("model_specific_special_tokens")
        spelled["extra_special_tokens"] = (spelled.get("extra_special_tokens") or {}) | named
    return spelled


def generation_settings(path) -> dict[str, Any]:
    """How the model of a directory wants to be sampled: its generation_config.json, or what config.json says of it.

    Raises:
      ValueError: the file does not hold a JSON object.
    """
    path = pathlib.Path(path)
    if (path / _GENERATION).is_file():
        return read_object(path / _GENERATION)
    raw = read_object(path / "config.json")
    return {name: raw[name] for name in _SAMPLING if raw.get(name) is not None}
