"""Tasks: problems and their verifiers."""

import dataclasses
import inspect

from r2vpo_jax.config.task import TASKS, is_task
from r2vpo_jax.losses.registry import import_own
from r2vpo_jax.tasks.arithmetic import ArithmeticTask
from r2vpo_jax.tasks.base import Problems, Task, Verdicts
from r2vpo_jax.verifiers.outcome import SPLITS, Outcome

__all__ = ["SPLITS", "TASKS", "ArithmeticTask", "Outcome", "Problems", "Task", "Verdicts", "make", "task_class"]


_METHODS = ("problems", "num_problems", "verify", "answers", "level", "decode", "close")
_ATTRIBUTES = ("name", "max_prompt_length", "max_response_length", "eos_ids", "digest", "notices")


def task_class(name: str) -> type:
    """The class behind `task.name`: a row of `TASKS`, or module:Class.

    Raises:
      ValueError: there is no such task, module or class.
    """
    if not is_task(name):
        raise ValueError(f"task.name={name!r} is unknown; one of {', '.join(TASKS)}, or module:Class")
    kind = import_own(TASKS.get(name, name), "task.name")
    missing = [method for method in _METHODS if not callable(getattr(kind, method, None))]
    if missing:
        raise ValueError(
            f"task.name={name}: {kind.__name__} has no {', '.join(missing)} (tasks/base.py has the protocol)"
        )
    return kind


def make(config, tokenizer=None, eos_ids=(), splits=SPLITS, stop=()) -> Task:
    """The task of a `config.TaskConfig`.

    A class of your own gets `task.options` as keyword arguments, and `tokenizer` and `eos_ids` if its constructor names
    them (docs/extending.md).

    Args:
      config: of the task.
      tokenizer: the model's; a text task needs it.
      eos_ids: ids that end a response; of a text task (the embedded one knows its own).
      splits: those of a text task that are loaded.
      stop: strings that end a response, of a text task.

    Raises:
      ValueError: parameters out of range, data or verifiers that cannot work, a tokenizer of another language.
      FileNotFoundError: a data set that is not there.
    """
    kind = task_class(config.name)
    if config.name == "text":
        return kind(config, tokenizer, eos_ids, splits, stop)
    options = dataclasses.asdict(config.arithmetic) if config.name == "arithmetic" else dict(config.options)
    parameters = inspect.signature(kind).parameters
    given = {"tokenizer": tokenizer, "eos_ids": eos_ids}
    options = {name: value for name, value in given.items() if name in parameters} | options
    try:
        inspect.signature(kind).bind(**options)
    except TypeError as error:
        raise ValueError(f"task.name={config.name}: {error}; it takes {', '.join(parameters)}") from error
    task = kind(**options)
    missing = [name for name in _ATTRIBUTES if not hasattr(task, name)]
    if missing:
        task.close()
        raise ValueError(f"task.name={config.name}: a {kind.__name__} has no {', '.join(missing)}")
    if tokenizer is not None and hasattr(task, "check_tokenizer"):
        task.check_tokenizer(tokenizer)
    return task
