"""Tasks: problems and their verifiers."""

from r2vpo_jax.tasks.arithmetic import ArithmeticTask
from r2vpo_jax.tasks.base import Problems, Task, Verdicts
from r2vpo_jax.verifiers.outcome import SPLITS, Outcome

__all__ = ["SPLITS", "ArithmeticTask", "Outcome", "Problems", "Task", "Verdicts", "make"]


def make(config, tokenizer=None, eos_ids=()) -> Task:
    """The task of a `config.TaskConfig`.

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
    task = ArithmeticTask(
        min_operands=config.min_operands, max_operands=config.max_operands, num_digits=config.num_digits
    )
    if tokenizer is not None:
        task.check_tokenizer(tokenizer)
    return task
