"""Which problems of a split are scored where not all of them are."""

import collections

import numpy as np

from r2vpo_jax.tasks.base import Task


def positions(available: int | None, number: int) -> np.ndarray:
    """Positions of a fixed sample of a split, int64, in ascending order.

    The split is cut into `number` stretches of equal length, and one problem is taken from each, which these two numbers
    decide. So each source, and each part of a file that is sorted, has its share to within one problem, and all runs on
    the same problems are scored on the same ones, whatever their seeds.

    Args:
      available: problems of the split; None if there is no end to them: the first are taken, which are as good as any.
      number: at most so many.
    """
    if available is None:
        return np.arange(number)
    if number >= available:
        return np.arange(available)
    ends = np.arange(number + 1) * available // number
    # Raw output, which NumPy keeps stable for ever (NEP 19); not the same place of each stretch, for files may have a period.
    raw = np.random.PCG64(np.random.SeedSequence((available, number))).random_raw(number)
    return ends[:-1] + (raw % (ends[1:] - ends[:-1]).astype(np.uint64)).astype(np.int64)


def choose(task: Task, split: str, number: int) -> np.ndarray:
    """`positions` of a task's split: all of it if it has no more than `number` problems."""
    return positions(task.num_problems(split), number)


def notices(task: Task, split: str, number: int) -> list[str]:
    """What a user should know of the sample: nothing where all problems are scored, or there is no end to them."""
    available = task.num_problems(split)
    if available is None or number >= available:
        return []
    text = f"{split}: scored on a fixed sample of {number} of {available} problems, the same for all runs"
    if not hasattr(task, "sources"):
        return [text]
    sources = task.sources(split)
    counts = collections.Counter(dict.fromkeys(sources, 0))
    counts.update(sources[i] for i in positions(available, number))
    if len(counts) == 1:
        return [text]
    shares = ", ".join(f"{source} {count}" for source, count in counts.items())
    missing = [source for source, count in counts.items() if not count]
    said = [f"{text} ({shares})"]
    if missing:
        said.append(f"warning: no problem of {', '.join(missing)} is scored in {split}; score more problems")
    return said
