"""Tasks: problems and their verifiers.

Names are imported when they are asked for: verifier processes import parts of this package and are not to wait for JAX.
"""

import importlib

_HOMES = {
    "SPLITS": "outcome",
    "Outcome": "outcome",
    "Problems": "base",
    "Task": "base",
    "Verdicts": "base",
    "ArithmeticTask": "arithmetic",
}


def make(config, tokenizer=None, eos_ids=()) -> "Task":
    """The task of a `tasks.config.TaskConfig`.

    Args:
      config: of the task.
      tokenizer: the model's; a text task needs it.
      eos_ids: ids that end a response; of a text task (the embedded one knows its own).

    Raises:
      ValueError: parameters out of range, data or verifiers that cannot work, a tokenizer of another language.
      FileNotFoundError: a data set that is not there.
    """
    if config.name == "text":
        from r2vpo_jax.tasks.text import TextTask

        return TextTask(config, tokenizer, eos_ids)
    from r2vpo_jax.tasks.arithmetic import ArithmeticTask

    task = ArithmeticTask(
        min_operands=config.min_operands, max_operands=config.max_operands, num_digits=config.num_digits
    )
    if tokenizer is not None:
        task.check_tokenizer(tokenizer)
    return task


def __getattr__(name):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


__all__ = [*_HOMES, "make"]
