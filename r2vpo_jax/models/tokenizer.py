"""Tokenizers of local directories, and the ids that end a text."""

import os
import pathlib

from r2vpo_jax.errors import refuse_pointer
from r2vpo_jax.models.tensor_files import read_object
from r2vpo_jax.models.tokenizer_files import tokenizer_files

_TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "tokenizer.model")
_GENERIC = ("TokenizersBackend", "PreTrainedTokenizerFast")  # whatever tokenizer.json says

# Texts on which a tokenizer must agree with its own tokenizer.json.
_PROBES = (
    "47+85=",
    "Let $x = \\frac{1}{2}$.\n\nThen 2x  = 1,000 km/h — naïve?",
    "<think>\nstep 1\n</think>\n\n\\boxed{7}",
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
    """Whether two tokenizers have the same vocabulary and cut the probes alike."""
    texts = list(_PROBES)
    cut = [t(texts, add_special_tokens=False)["input_ids"] for t in (tokenizer, other)]
    return tokenizer.get_vocab() == other.get_vocab() and cut[0] == cut[1]


def end_of_text_ids(path, tokenizer) -> tuple[int, ...]:
    """All ids that end a response: those of generation_config.json, and the tokenizer's EOS.

    Raises:
      ValueError: there is none, or generation_config.json does not hold integers.
    """
    file = pathlib.Path(path) / "generation_config.json"
    listed = []
    if file.is_file():
        listed = read_object(file).get("eos_token_id")
        listed = [] if listed is None else listed if isinstance(listed, list) else [listed]
        if not all(isinstance(i, int) and not isinstance(i, bool) for i in listed):
            raise ValueError(f"{file}: eos_token_id must be an integer or a list of integers, got {listed!r}")
    ids = [*listed, *([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])]
    if not ids:
        raise ValueError(f"{path} names no end-of-text token, neither in generation_config.json nor in the tokenizer")
    return tuple(dict.fromkeys(ids))
