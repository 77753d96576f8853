"""The model that a run starts from: its directory, tokenizer, end-of-text ids, and its weights when they are wanted."""

import contextlib
import dataclasses
import importlib.resources
import os
import pathlib
from typing import Any

from r2vpo_jax import hub, models, storage
from r2vpo_jax.config import ModelConfig
from r2vpo_jax.config.run import FLOAT32_SWITCHES
from r2vpo_jax.errors import UsageError
from r2vpo_jax.models import lora, peft, tensor_files, tokenizer_files
from r2vpo_jax.models.identity import identity
from r2vpo_jax.models.tokenizer import end_of_text_ids, load_tokenizer

# Of a model in a store; repositories hold the same weights in other formats too.
_WANTED = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")
# Of one on the Hub, besides the weights: what is read of any model, and nothing else.
_SETTINGS = ("config.json", "generation_config.json", tensor_files.INDEX, *tokenizer_files.NAMES)


@dataclasses.dataclass(frozen=True)
class BaseModel:
    """A checkpoint directory that has been looked at; its weights have not been read."""

    path: pathlib.Path
    model: models.Decoder
    tokenizer: Any
    eos_ids: tuple[int, ...]
    notices: tuple[str, ...]
    name: str | None = None  # as the user said it

    def check_length(self, tokens: int) -> None:
        """Raises ValueError when prompt and response together are longer than the model's positions."""
        if tokens > self.model.config.max_position_embeddings:
            raise ValueError(
                f"prompt and response have up to {tokens} tokens, but the model has positions for "
                f"{self.model.config.max_position_embeddings}; lower task.prompt.max_length or task.text.max_response_length"
            )

    def identity(self, *, weights: bytes | None = None) -> dict[str, str]:
        """Digests of weights, tokenizer and so on (models/identity.py).

        Raises:
          UsageError: a file is missing or torn.
        """
        try:
            return identity(self.path, self.tokenizer, self.eos_ids, weights=weights)
        except (OSError, ValueError) as error:
            raise UsageError(f"cannot read the base model: {error}") from error

    def load_params(self, mesh=None, *, seed: int = 0):
        """The parameters, placed on the mesh as they are read; adapters are as before training.

        Args:
          mesh: None: NumPy arrays.
          seed: of the run, for the adapters.

        Raises:
          UsageError: a tensor is missing or does not fit.
        """
        try:
            weights = models.load_params(self.path, self.model, mesh=mesh)
            return weights if self.model.config.lora is None else lora.join(weights, lora.init(self.model, seed, mesh))
        except (OSError, ValueError) as error:
            raise UsageError(f"cannot load the base model: {error}") from error

    def export(self, path, params, *, dtype: str = "stored", write: bool = True, compare: bool = True) -> float | None:
        """Write what this model has become as a Hugging Face directory, with tokenizer and generation settings of its own.

        Args:
          path: directory, made if needed.
          params: the parameters now.
          dtype: of the written weights, or "stored": that of the weights on disk here.
          write: False on all processes of a pod but one.
          compare: whether the weights are compared with this model's.

        Returns:
          The share of the written weights that are still those of this model, bit for bit; None where `write` or `compare`
          is False.

        Raises:
          ValueError, FileNotFoundError: as `models.save_pretrained`.
        """
        path = storage.path(path)
        with storage.staged(path, last="config.json") if write else contextlib.nullcontext(path) as folder:
            return models.save_pretrained(
                folder,
                self.model,
                params,
                self.tokenizer,
                base=self.path,
                dtype=models.stored_dtype(self.path) if dtype == "stored" else dtype,
                eos_ids=self.eos_ids,
                write=write,
                compare=compare,
            )

    def export_adapters(self, path, params, *, write: bool = True) -> None:
        """Write the adapters alone, as a PEFT directory (`peft.save_adapters`). Arguments and errors are its."""
        path, base, revision = storage.path(path), str(self.path), None
        if self.name is not None and hub.is_name(self.name) and not hub.Name(self.name).path:
            base, revision = hub.Name(self.name).id, self.path.name  # of the cache, which nobody else has, the commit
        with storage.staged(path, last=peft.CONFIG) if write else contextlib.nullcontext(path) as folder:
            peft.save_adapters(folder, self.model, params, base=base, revision=revision, write=write)


def open_base_model(config: ModelConfig, *, weights: bool = True) -> BaseModel:
    """Look at `config.path` (default: the shipped arithmetic base model): architecture, tokenizer, end of text.

    Args:
      config: of the model.
      weights: False: they will not be wanted, and are not fetched where the path is a name on the Hub.

    Raises:
      UsageError: the directory or one of its files is missing, or asks for what is not implemented.
    """
    with hub.resolving():
        path, _ = find_directory(config.path)
        if weights and config.path is not None and hub.is_name(config.path):
            _fetch_weights(config.path, path)
    try:
        path = storage.local_copy(path, _WANTED)
        models.read_config(path)
        tokenizer, notices = load_tokenizer(path)
        model = models.read_model(
            path,
            param_dtype=config.param_dtype,
            compute_dtype=config.compute_dtype,
            scan_layers=config.scan_layers,
            **{name: getattr(config, name) for name in FLOAT32_SWITCHES},
            remat=config.remat,
            attention=config.attention,
            attention_block_size=config.attention_block_size,
            matmul_precision=config.matmul_precision,
            lora=config.lora,
            num_tokens=1 + max(tokenizer.get_vocab().values()),
        )
        eos_ids = end_of_text_ids(path, tokenizer)
        if not all(0 <= i < model.config.vocab_size for i in eos_ids):
            raise ValueError(f"end-of-text ids {eos_ids}: the model has {model.config.vocab_size} tokens")
        if len(eos_ids) > 1:
            ends = ", ".join(f"{tokenizer.convert_ids_to_tokens(i)} ({i})" for i in eos_ids)
            notices = (*notices, f"responses end at any of {ends}")
        if model.config.lora is not None:
            notices = (*notices, lora.notice(model))
        return BaseModel(path, model, tokenizer, eos_ids, notices, config.path)
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot load the base model: {error}") from error


def _fetch_weights(name: str, path: pathlib.Path) -> None:
    """Those that are read of a name on the Hub, into the folder that has its other files."""
    hub.folder(name, [tensor_files.SINGLE, tensor_files.INDEX])
    if not (path / tensor_files.SINGLE).is_file() and (path / tensor_files.INDEX).is_file():
        hub.folder(name, tensor_files.names_of_weights(path))


def find_directory(name: str | None) -> tuple[Any, bool]:
    """(directory, whether it ships with the package): a path, a shipped model's name, or None: the arithmetic one.

    Of a name on the Hub (hf://OWNER/NAME@REVISION) it is the folder that its files were fetched into, without the weights.

    Raises:
      UsageError: an address of a kind that cannot be read, or a name that cannot be fetched.
    """
    if name is not None and hub.is_name(name):
        return hub.folder(name, _SETTINGS), False
    if name is not None and storage.is_address(name):
        return storage.path(name, "model.path"), False
    shipped = (
        pathlib.Path(str(importlib.resources.files("r2vpo_jax"))) / "assets" / "models" / (name or "arithmetic_base")
    )
    if name is None or (not os.path.exists(name) and shipped.is_dir()):
        return shipped, True
    return pathlib.Path(name), False
