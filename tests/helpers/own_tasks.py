"""A task as a user would write one, for `task.name="tests.helpers.own_tasks:Echo"`."""


class Echo:
    """As much of a task as its construction: docs/extending.md has a whole one."""

    def __init__(self, eos_ids=(), length=2, words="abc"):
        if length < 1:
            raise ValueError(f"length must be at least 1, got {length}")
        self.eos_ids, self.length, self.words = eos_ids, length, words
