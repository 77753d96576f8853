"""The model that a run starts from."""

import importlib.resources

from r2vpo_jax import models
from r2vpo_jax.config import Config
from r2vpo_jax.run_directory import UsageError


def load_base_model(config: Config):
    """(model, host parameters, tokenizer) of `config.model`, checked against the task's needs.

    Raises:
      UsageError: the directory, a tensor or the tokenizer is missing or does not fit.
    """
    # Not AutoTokenizer: for Qwen2 it may add a token that tokenizer.json does not have, and num_tokens would be off.
    from transformers import PreTrainedTokenizerFast

    path = config.model.path or importlib.resources.files("r2vpo_jax") / "checkpoints" / "arithmetic_base"
    try:
        models.read_config(path)
        tokenizer = PreTrainedTokenizerFast.from_pretrained(path, local_files_only=True)
        model, params = models.from_pretrained(
            path,
            param_dtype=config.model.param_dtype,
            compute_dtype=config.model.compute_dtype,
            scan_layers=config.model.scan_layers,
            remat=config.model.remat,
            num_tokens=len(tokenizer),
        )
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot load the base model: {error}") from error
    return model, params, tokenizer
