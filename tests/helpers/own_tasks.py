"""Tasks as a user would write them, for `task.name="tests.helpers.own_tasks:Echo"`."""

import numpy as np

from r2vpo_jax.tasks import ArithmeticTask, Outcome, Problems, Verdicts
from r2vpo_jax.tasks.arithmetic import SYMBOLS


class FirstDigit:
    """Prompts `i+d=` in the symbols of arithmetic; right is what begins with the digit d. All of a `tasks.base.Task`."""

    name = "first_digit"
    max_prompt_length, max_response_length = 4, 3
    notices = ()

    def __init__(self, digit: int):
        self._digit = SYMBOLS.index(str(digit))
        self.digest, self.eos_ids = str(digit), ArithmeticTask().eos_ids

    def problems(self, split, index):
        index = np.asarray(index, np.int32)
        rows = [[SYMBOLS.index(s) for s in str(i % 10)] for i in index]
        plus, equals = SYMBOLS.index("+"), SYMBOLS.index("=")
        tokens = np.array([[*row, plus, self._digit, equals] for row in rows], np.int32)
        return Problems(index=index, tokens=tokens, length=np.full(len(index), 4, np.int32))

    def num_problems(self, split):
        return 10

    def verify(self, split, index, responses, lengths):
        right = np.asarray(responses)[:, 0] == self._digit
        return Verdicts(right.astype(np.float32), np.where(right, Outcome.RIGHT, Outcome.WRONG).astype(np.int32))

    def answers(self, split, index, responses, lengths):
        return [SYMBOLS[row[0]] for row in responses]

    def level(self, split, index):
        return np.zeros(len(index), int)

    def decode(self, tokens):
        return ArithmeticTask().decode(tokens)

    def close(self):
        pass


class Echo(FirstDigit):
    """The same with options of several types."""

    def __init__(self, eos_ids=(), length=2, words="abc"):
        if length < 1:
            raise ValueError(f"length must be at least 1, got {length}")
        super().__init__(digit=7)
        self.eos_ids, self.length, self.words = eos_ids, length, words


class Unfinished:
    """No task yet."""

    def __init__(self):
        self.problems = None
