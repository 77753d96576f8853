"""Tokenizers of local directories, the ids that end a text, and the bytes of tokens."""

import json
import os
import pathlib
import re

from r2vpo_jax.errors import refuse_pointer
from r2vpo_jax.models.chat import end_of_turn
from r2vpo_jax.models.tensor_files import read_object
from r2vpo_jax.models.tokenizer_files import tokenizer_files

_TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "tokenizer.model")
_GENERIC = ("TokenizersBackend", "PreTrainedTokenizerFast")  # whatever tokenizer.json says

# Texts on which a tokenizer must agree with its own tokenizer.json.
_PROBES = (
    "47+85=",
    "Let $x = \\frac{1}{2}$.\n\nThen 2x  = 1,000 km/h — naïve?",
    "<think>\nstep 1\n</think>\n\n\\boxed{7}",
    "don't WON'T 12345678 3.14159\r\n\t  x",
    "中文，和 日本語 a\u0301 \ufb01 ①",
)


def load_tokenizer(path):
    """(tokenizer, notices) of a local directory; nothing is downloaded and no code of the directory is run.

    AutoTokenizer chooses a class by the model's type, and that class rebuilds parts of some tokenizers. Where its tokens
    differ from those of the directory's own tokenizer.json, where the directory asks for no class of its own, or for code
    to be run, tokenizer.json is used as it is.

    Raises:
      ValueError: there is no tokenizer that can be opened.
    """
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    path = pathlib.Path(path)
    file = path / "tokenizer.json"
    if not any((path / name).is_file() for name in _TOKENIZER_FILES):  # a class may make an empty one up
        raise ValueError(f"{path} has no tokenizer: none of {', '.join(_TOKENIZER_FILES)}")
    for each in tokenizer_files(path):  # the libraries would read a pointer as a template, or speak of JSON
        refuse_pointer(each)
    if file.is_file() and _asks_for(path) in _GENERIC:
        return _open(PreTrainedTokenizerFast, path), ()
    try:
        tokenizer = _open(AutoTokenizer, path, trust_remote_code=False)
    except ValueError:
        if not file.is_file():
            raise
        tokenizer = None
    if not file.is_file():
        return tokenizer, ()
    plain = _open(PreTrainedTokenizerFast, path)
    if tokenizer is not None and _agree(tokenizer, plain):
        return tokenizer, ()
    why = "AutoTokenizer cannot open it" if tokenizer is None else f"{type(tokenizer).__name__} changes it"
    return plain, (f"tokenizer: {file.name} as it is ({why})",)


def _open(cls, path, **options):
    try:
        return cls.from_pretrained(path, local_files_only=True, **options)
    except Exception as error:  # a hostile or torn file makes the libraries raise just about anything
        raise ValueError(
            f"the tokenizer of {path} cannot be opened ({type(error).__name__}: {str(error).strip().splitlines()[:1]}); "
            "put the model's own tokenizer.json there"
        ) from error


def _asks_for(path: pathlib.Path) -> str | None:
    """The class that tokenizer_config.json names."""
    file = path / "tokenizer_config.json"
    return read_object(file).get("tokenizer_class") if file.is_file() else None


def _agree(tokenizer, other) -> bool:
    """Whether two tokenizers have the same vocabulary, cut the probes alike, and read them alike."""
    texts = list(_PROBES)
    cut = [t(texts, add_special_tokens=False)["input_ids"] for t in (tokenizer, other)]
    read = [t.batch_decode(cut[1], skip_special_tokens=False) for t in (tokenizer, other)]
    return tokenizer.get_vocab() == other.get_vocab() and cut[0] == cut[1] and read[0] == read[1]


def end_of_text_ids(path, tokenizer) -> tuple[int, ...]:
    """All ids that end a response, wherever a directory names them: generation_config.json, config.json, the tokenizer's
    EOS, and the token by which the chat template ends an answer.

    Raises:
      ValueError: there is none, or a file does not hold integers.
    """
    path = pathlib.Path(path)
    ids = [i for name in ("generation_config.json", "config.json") for i in _listed_ends(path / name)]
    ids += [i for i in (tokenizer.eos_token_id, end_of_turn(tokenizer)) if i is not None]
    if not ids:
        raise ValueError(
            f"{path} names no end-of-text token, neither in generation_config.json nor in config.json nor in the tokenizer"
        )
    return tuple(dict.fromkeys(ids))


def _listed_ends(file: pathlib.Path) -> list[int]:
    listed = read_object(file).get("eos_token_id") if file.is_file() else None
    listed = [] if listed is None else listed if isinstance(listed, list) else [listed]
    if not all(isinstance(i, int) and not isinstance(i, bool) for i in listed):
        raise ValueError(f"{file}: eos_token_id must be an integer or a list of integers, got {listed!r}")
    return listed


def token_bytes(tokenizer) -> list[bytes]:
    """The bytes that each token adds to a text, by id; b"" where an id has no token.

    Raises:
      ValueError: the texts of this tokenizer are not its tokens, one after the other.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    decoder = {} if backend is None else json.loads(backend.to_str())["decoder"] or {}
    kinds = {part["type"] for part in decoder.get("decoders", [decoder]) if "type" in part}
    added = {i: token.content for i, token in tokenizer.added_tokens_decoder.items()}
    vocabulary = tokenizer.get_vocab()
    found = [b""] * (1 + max(vocabulary.values()))
    for token, i in vocabulary.items():
        found[i] = added[i].encode() if i in added else _bytes_of(token, kinds)
    for text in _PROBES:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        together = b"".join(found[i] for i in ids).decode(errors="replace")
        # A decoder may drop the blank that its tokenizer has put in front.
        if together.lstrip() != tokenizer.decode(ids, skip_special_tokens=False).lstrip():
            raise ValueError(
                f"the texts of this tokenizer (decoder {', '.join(sorted(kinds)) or 'none'}) are not its tokens one after "
                "the other, so that stop strings cannot be found in them; leave sampler.stop out"
            )
    return found


def _bytes_of(token: str, kinds: set[str]) -> bytes:
    if "ByteLevel" in kinds:
        return b"".join(_BYTE_OF.get(c, c.encode()) for c in token)
    if "ByteFallback" in kinds and re.fullmatch("<0x[0-9A-F]{2}>", token):
        return bytes.fromhex(token[3:5])
    return (token.replace("\u2581", " ") if kinds & {"Metaspace", "Replace"} else token).encode()


def _byte_alphabet() -> dict[str, bytes]:
    """Byte-level BPE writes each byte as one character: printable ones as they are, the others from U+0100 on."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(b): bytes([b]) for b in plain} | {chr(256 + n): bytes([b]) for n, b in enumerate(others)}


_BYTE_OF = _byte_alphabet()
