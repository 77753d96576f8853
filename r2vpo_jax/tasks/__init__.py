"""Tasks: problems and their verifiers."""

from r2vpo_jax.tasks.arithmetic import ArithmeticTask
from r2vpo_jax.tasks.base import SPLITS, Outcome, Problems, Task


def make(config) -> Task:
    """The task of a `config.TaskConfig`.

    Raises:
      ValueError: parameters out of range.
    """
    return ArithmeticTask(
        min_operands=config.min_operands, max_operands=config.max_operands, num_digits=config.num_digits
    )


__all__ = ["SPLITS", "ArithmeticTask", "Outcome", "Problems", "Task", "make"]
