"""The parts of a text task's reward: judged in verifier processes, weighted, and put together."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from r2vpo_jax import verifiers
from r2vpo_jax.config.task import RewardConfig
from r2vpo_jax.data import Example
from r2vpo_jax.tasks.base import Outcome
from r2vpo_jax.verifiers.functions import KNOWN
from r2vpo_jax.verifiers.outcome import unjudged
from r2vpo_jax.verifiers.pool import RIGHT_ABOVE

_FORMAT_FUNCTION = "r2vpo_jax.verifiers.extraction:format_scores"  # a user's pattern may run for ever


class Responses(NamedTuple):
    """B responses, and what they respond to."""

    examples: Sequence[Example]
    prompts: Sequence[str]  # as the model sees them
    texts: Sequence[str]  # whole responses
    tokens: Sequence[list[int]]  # their token ids
    prompt_lengths: Sequence[int]


class Rewards:
    """What the parts of a reward are, and how they are judged.

    Args:
      config: weights, functions, pattern.
      pool: that judges; None on processes that do not.

    Attributes:
      columns: of the data, that functions ask for by name; None: all, for a function with **keywords.
      there: columns that the data have; set it once they are loaded.

    Raises:
      ValueError: a function that cannot be imported.
    """

    def __init__(self, config: RewardConfig, pool: verifiers.VerifierPool | None):
        self._config, self._pool = config, pool
        self._functions = {
            name: pair for name, pair in zip(_names(config.functions), config.functions, strict=True)
        }  # term -> (module:function, weight)
        wanted = [] if pool is None else [pool.check_function(function) for function, _ in config.functions]
        asked = {name for each in wanted for name in (*each.required, *each.optional)} - set(KNOWN)
        self.columns = None if any(each.every_column for each in wanted) else frozenset(asked)
        self.there: tuple[str, ...] = ()

    def terms(self, split: str) -> list[str]:
        """The parts of the reward. What is for learning only is not asked of validation and test."""
        reward = self._config
        if split != "train" and reward.correct:
            return ["correct"]
        return [
            *(["correct"] if reward.correct else []),
            *self._functions,
            *(["format"] if reward.format else []),
        ]

    def asks_functions(self, split: str) -> bool:
        """Whether functions of the user are called on responses of a split."""
        return bool(self._functions.keys() & set(self.terms(split)))

    def try_out(self, split: str, gold: Responses) -> list[str]:
        """Calls each function that `split` is judged by on right responses, before a run.

        Args:
          split: whose examples they are.
          gold: right responses, at least two.

        Returns:
          What a user should know.

        Raises:
          ValueError: a function that gives them no values.
        """
        notices = []
        for name in self._functions.keys() & set(self.terms(split)):
            function, _ = self._functions[name]
            _, judgements = self._score(function, gold)
            for example, judgement in zip(gold.examples, judgements, strict=True):
                if unjudged(judgement.outcome) and judgement.applies:
                    raise ValueError(
                        f"task.reward.function={function} cannot be used: for the gold answer {example.answer[:80]!r} of the "
                        f"question {example.question[:80]!r} of task.text.{split} it gave no value: {judgement.reason}"
                    )
            if not any(judgement.applies for judgement in judgements):
                notices.append(
                    f"warning: task.reward.function={function} applies to none of {len(judgements)} problems of "
                    f"task.text.{split} that it was tried on: it returned None or NaN for their gold answers"
                )
        return sorted(notices)

    def judge(self, split: str, responses: Responses):
        """The verdicts.

        Returns:
          (outcome int32 [B]; the weighted terms, float32 [B], NaN where a part does not apply; [B] reasons, "" where there
          is a verdict).
        """
        config, names, size = self._config, self.terms(split), len(responses.texts)
        outcome, reasons, terms, values = np.zeros(size, np.int32), [""] * size, {}, {}
        if "correct" in names:
            checks = [
                verifiers.Check(example.kind, example.gold, text)
                for example, text in zip(responses.examples, responses.texts, strict=True)
            ]
            judgements = self._pool.check(checks)
            outcome = np.array([j.outcome for j in judgements], np.int32)
            reasons = [j.reason for j in judgements]
            terms["correct"] = np.float32(config.correct) * (outcome == Outcome.RIGHT)
        broken = np.zeros(size, bool)
        for name in names:
            if name == "correct":
                continue
            if name == "format":
                patterns = [config.format_pattern] * size
                weight = config.format
                found, judgements = self._pool.score(
                    _FORMAT_FUNCTION, patterns, responses.texts, [""] * size, config.function_batch_size
                )
            else:
                function, weight = self._functions[name]
                found, judgements = values[name] = self._score(function, responses)
            fails = np.array([unjudged(j.outcome) and j.applies for j in judgements], bool)
            outcome = np.where(fails & ~broken, [j.outcome for j in judgements], outcome).astype(np.int32)
            reasons = [j.reason if f else r for f, j, r in zip(fails & ~broken, judgements, reasons, strict=True)]
            broken |= fails
            terms[name] = np.float32(weight) * found
        if "correct" not in names:
            decided, undecided = self._decided(values)
            outcome = np.where(broken, outcome, decided).astype(np.int32)
            reasons = [r if b else u for b, r, u in zip(broken, reasons, undecided, strict=True)]
        return outcome, terms, tuple(reasons)

    def _score(self, function: str, responses: Responses):
        """Values and judgements of a function of the user."""
        examples = responses.examples
        columns = {
            "prompts": responses.prompts,
            "completion_ids": responses.tokens,
            "levels": [example.level for example in examples],
            "sources": [example.source for example in examples],
            "prompt_lengths": responses.prompt_lengths,
            "response_lengths": [len(tokens) for tokens in responses.tokens],
        }
        for name in set(self.there) - set(KNOWN):
            columns[name] = [example.columns.get(name) for example in examples]
        return self._pool.score(
            function,
            [example.question for example in examples],
            responses.texts,
            [example.answer for example in examples],
            batch_size=self._config.function_batch_size,
            columns=columns,
        )

    def _decided(self, values):
        """(outcome [B], reasons) where the functions alone decide: by the mean of those that apply, by weight.

        A function with a weight below 0 is a penalty and decides only where there is no other.
        """
        weights = {name: self._functions[name][1] for name in values}
        names = [name for name in values if weights[name] > 0] or [name for name in values if weights[name]]
        found = np.stack([values[name][0] for name in names]).astype(np.float64)
        size = np.abs([weights[name] for name in names])[:, None] * ~np.isnan(found)
        total = size.sum(axis=0)
        mean = (size * np.nan_to_num(found)).sum(axis=0) / np.where(total, total, 1.0)
        outcome = np.where(mean > RIGHT_ABOVE, Outcome.RIGHT, Outcome.WRONG)
        none = total == 0
        reasons = [values[names[0]][1][i].reason if none[i] else "" for i in range(len(none))]
        return np.where(none, Outcome.ERROR, outcome), reasons


def _names(functions: Sequence[tuple[str, float]]) -> list[str]:
    """The names of their terms: `function` if there is one, else with the function's own, or the whole path."""
    if len(functions) < 2:
        return ["function"] * len(functions)
    own = [path.partition(":")[2] for path, _ in functions]
    return [
        f"function_{name if own.count(name) == 1 else path}" for name, (path, _) in zip(own, functions, strict=True)
    ]
