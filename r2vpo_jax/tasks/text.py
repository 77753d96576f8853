"""Text tasks: questions of data sets and generators, put to the model in words, judged by verifier processes.

    data sets ──Example──▶ prompt template ──tokens──▶ (model) ──text──▶ verifier pool ──▶ reward terms

At load time, before any model is touched: problems whose prompt is too long are dropped and counted, the splits are
made disjoint, every gold answer is checked against itself, and reward functions are called on some of them. Of several
processes each judges its own rollouts; what all of them hold (evaluations), process 0 judges, and the others are told.
"""

import collections
import contextlib
import itertools

import jax
import numpy as np
from jax.experimental import multihost_utils

from r2vpo_jax import cluster, verifiers, waits
from r2vpo_jax.config.task import TaskConfig
from r2vpo_jax.data import Example, digest, disjoint, load
from r2vpo_jax.models.stops import stop_table
from r2vpo_jax.tasks.base import SPLITS, Problems, Verdicts
from r2vpo_jax.tasks.prompts import PromptTemplate, unknown_share
from r2vpo_jax.tasks.responses import CLOSE, OPEN, ResponseTexts
from r2vpo_jax.tasks.rewards import Responses, Rewards
from r2vpo_jax.verifiers.outcome import unjudged

_JUDGED_AT_ONCE = 1 << 16  # gold answers
_LOOKED_AT = 64  # examples of an endless source whose prompts are looked at before the run
_TRIED = 8  # right answers of a split, of several sources, that reward functions are called on before the run
_REDRAWS = 32  # other problems that are tried where a prompt of an endless source is too long
_REDRAW_STRIDE = 1 << 40  # beyond all positions of a run


class TextTask:
    """A `tasks.base.Task` of any language.

    Args:
      config: of a text task.
      tokenizer: of the model, a Transformers tokenizer.
      eos_ids: all ids that end a response.
      splits: those that are loaded.
      stop: strings that end a response.

    Raises:
      ValueError: a data set, prompt template, verifier or reward function that cannot work; the message says which.
      FileNotFoundError: a data set that is not there.
    """

    name = "text"

    def __init__(
        self, config: TaskConfig, tokenizer, eos_ids: tuple[int, ...], splits=SPLITS, stop: tuple[str, ...] = ()
    ):
        self.eos_ids = tuple(eos_ids)
        self.stop = stop_table(stop, tokenizer)
        self.max_prompt_length = config.prompt.max_length
        self.max_response_length = config.text.max_response_length
        self.notices: list[str] = []  # what a user should know of the data
        self._config, self._tokenizer = config, tokenizer
        self._template = PromptTemplate(config.prompt, tokenizer)
        self._response_texts = ResponseTexts(tokenizer, config.verifier.thinking_marks, tuple(stop))
        self._opens_thinking = self._response_texts.with_known_marks(self._template.text("?")).rstrip().endswith(OPEN)
        self._chief = jax.process_index() == 0
        self._cleanup = contextlib.ExitStack()
        try:
            self._pool = self._start_pool()
            self._rewards = Rewards(config.reward, self._pool)
            self._data = self._load(splits)
        except BaseException:
            self.close()
            raise

    # Loading ---------------------------------------------------------------------------------------------

    def _start_pool(self):
        verifier = self._config.verifier
        pool = verifiers.VerifierPool(
            num_workers=verifier.num_workers,
            time_limit=verifier.time_limit,
            max_chars=verifier.max_chars,
            memory_limit_mb=verifier.memory_limit_mb,
            tolerance=verifier.tolerance,
            answer=verifier.answer,
        )
        self._cleanup.enter_context(pool)
        return pool

    def _load(self, splits) -> dict:
        config = self._config
        columns = self._rewards.columns
        loaded = {split: load(getattr(config.text, split), split, config.text.data_dir, columns) for split in splits}
        loaded = disjoint(loaded)
        for split in splits:
            loaded[split] = self._only_short(split, loaded[split])
        self._check_same_on_all_processes(loaded)
        for split in splits:
            loaded[split] = self._only_good_gold(split, loaded[split])
            if loaded[split].num_examples == 0:
                raise ValueError(
                    f"task.text.{split}={getattr(config.text, split)} has no problems left ({loaded[split].counts})"
                )
            size = loaded[split].num_examples
            counts = ", ".join(f"{name} {count}" for name, count in loaded[split].counts.items())
            kind = "endless" if size is None else size
            self.notices.append(f"{split}: {kind} problems" + (f" ({counts})" if counts else ""))
        self._rewards.there = tuple(
            sorted({name for data in loaded.values() for example in data.examples() for name in example.columns})
        )
        if self._chief:
            for split in splits:
                self.notices += self._rewards.try_out(split, self._gold_responses(loaded[split]))
        self.digest = digest(loaded)
        return loaded

    def _gold_responses(self, data) -> Responses:
        """Right responses to the first problems of each source of a split."""
        of_source = collections.defaultdict(list)
        for example in data.examples():
            if len(of_source[example.source]) < 2:
                of_source[example.source].append(example)
        if data.num_examples is None:
            of_source[None] = [data.example(position) for position in range(2)]
        examples = [pair[i] for i in range(2) for pair in of_source.values() if i < len(pair)][:_TRIED]
        examples = examples if len(examples) > 1 else examples * 2  # one value for one response may hide a wrong shape
        texts = [(CLOSE if self._opens_thinking else "") + rf"\boxed{{{e.answer}}}" for e in examples]
        return self._responses(examples, [self._tokenizer(text)["input_ids"] for text in texts], texts)

    def _responses(self, examples, tokens, texts, *, prompts=True) -> Responses:
        """What functions are given; without prompts where none is asked."""
        texts = [OPEN + text for text in texts] if self._opens_thinking else texts
        # Few: the responses to one question are a group.
        questions = {example.question for example in examples} if prompts else ()
        shown = {question: self._template.text(question) for question in questions}
        lengths = {question: len(self._template.tokens(question)) for question in questions}
        return Responses(
            examples,
            [shown.get(example.question, "") for example in examples],
            texts,
            tokens,
            [lengths.get(example.question, 0) for example in examples],
        )

    def _only_short(self, split, data):
        told = f"tokenizing the prompts of task.text.{split}", data.num_examples, "prompts"
        endless = range(_LOOKED_AT) if data.num_examples is None else ()
        examples = itertools.chain(waits.each(data.examples(), *told), map(data.example, endless))
        lengths = []  # of all; their tokens may be too many to hold

        def rows():
            for example in examples:
                tokens = self._template.tokens(example.question)
                lengths.append(len(tokens))
                yield tokens

        share = unknown_share(self._tokenizer, rows())
        short = np.array(lengths, int) <= self.max_prompt_length
        if share > 0.1:
            self.notices.append(
                f"warning: {100 * share:.0f} % of the prompt tokens of task.text.{split} are unknown to the tokenizer: the "
                "model cannot read these problems"
            )
        if lengths and not short.any():
            raise ValueError(
                f"all prompts of task.text.{split} are longer than task.prompt.max_length={self.max_prompt_length} (the "
                f"shortest has {min(lengths)} tokens); raise it"
            )
        short = short[: len(short) - len(endless)]
        return data if short.all() else data.select(short, "too long")

    def _only_good_gold(self, split, data):
        bad, size, rest = {}, 0, data.examples()
        while examples := list(itertools.islice(rest, _JUDGED_AT_ONCE)):
            if self._chief:
                found = self._pool.check_gold([(example.kind, example.gold) for example in examples])
                bad |= {size + row: reason for row, reason in found.items()}
            size += len(examples)
        if not size:
            return data
        good = self._from_chief(np.array([i not in bad for i in range(size)]))
        if not good.all() and self._config.verifier.bad_gold == "refuse":
            number = int(np.argmin(good))
            first = next(itertools.islice(data.examples(), number, None))
            raise ValueError(
                f"{(~good).sum()} of {len(good)} gold answers of task.text.{split} do not verify against themselves, first "
                f"{first.gold[:80]!r} of the question {first.question[:80]!r} "
                f"({bad.get(number, 'process 0 knows why')}); mend them, choose another kind= in the data set's spec, or "
                "drop them by task.verifier.bad_gold=drop"
            )
        return data.select(good, "gold answer not verifiable") if not good.all() else data

    def _check_same_on_all_processes(self, data) -> None:
        cluster.agree(
            "data",
            {f"task.text.{split}": data[split].digest[:16] for split in sorted(data)},
            how="read different data",
            advice="give all hosts the same files",
        )

    def _from_chief(self, tree):
        """Arrays of process 0, on all processes; of the same shapes everywhere."""
        if jax.process_count() == 1:
            return tree
        return jax.tree.map(np.asarray, multihost_utils.broadcast_one_to_all(tree))

    # The task --------------------------------------------------------------------------------------------

    def num_problems(self, split: str) -> int | None:
        return self._data[split].num_examples

    def example(self, split: str, index: int) -> tuple[Example, np.ndarray]:
        """The problem at a position and its prompt tokens."""
        data = self._data[split]
        for attempt in range(_REDRAWS):
            example = data.example(int(index) + attempt * _REDRAW_STRIDE)
            tokens = self._template.tokens(example.question)
            if len(tokens) <= self.max_prompt_length:
                return example, tokens
            if data.num_examples is not None:
                break
        raise ValueError(
            f"problem {index} of task.text.{split} has a prompt of {len(tokens)} tokens, more than "
            f"task.prompt.max_length={self.max_prompt_length}"
        )

    def problems(self, split: str, index) -> Problems:
        index = np.asarray(index)
        prompts = [self.example(split, i)[1] for i in index]
        tokens = np.zeros((len(index), self.max_prompt_length), np.int32)
        for row, prompt in zip(tokens, prompts, strict=True):
            row[len(row) - len(prompt) :] = prompt
        return Problems(
            index=index.astype(np.int32), tokens=tokens, length=np.array([len(p) for p in prompts], np.int32)
        )

    def level(self, split: str, index) -> np.ndarray:
        """The data set and the level that it states."""
        examples = [self.example(split, i)[0] for i in np.asarray(index)]
        return np.array([f"{e.source} {e.level}".strip() for e in examples])

    def sources(self, split: str) -> list[str]:
        """The name of the data set of each problem of a finite split."""
        return [example.source for example in self._data[split].examples()]

    def decode(self, tokens) -> str:
        return self._tokenizer.decode(np.asarray(tokens).tolist(), skip_special_tokens=False)

    def verify(self, split: str, index, responses, lengths) -> Verdicts:
        """As the protocol has it: process 0 judges. Parts of the reward besides correctness are for learning: of
        validation and test, correctness alone is judged, unless it has no weight."""
        reasons, size = ("",) * len(responses), len(responses)
        outcome, values = np.zeros(size, np.int32), np.zeros((len(self._rewards.terms(split)), size), np.float32)
        if self._chief:
            outcome, values, reasons = self._judged(split, index, responses, lengths)
        return self._verdicts(split, *self._from_chief((outcome, values)), reasons)

    def judge(self, split: str, index, responses, lengths) -> Verdicts:
        """As the protocol has it: the verifiers of this process judge."""
        return self._verdicts(split, *self._judged(split, index, responses, lengths))

    def _judged(self, split, index, responses, lengths):
        """(outcome int32 [B], the parts of the reward f32 [parts, B], [B] reasons)."""
        unique = {int(i): self.example(split, i)[0] for i in np.unique(index)}
        examples = [unique[int(i)] for i in index]
        rows, texts = _rows(responses, lengths), self._response_texts(responses, lengths)
        asked = self._rewards.asks_functions(split)
        outcome, terms, reasons = self._rewards.judge(split, self._responses(examples, rows, texts, prompts=asked))
        return outcome, np.stack([terms[name] for name in self._rewards.terms(split)]).astype(np.float32), reasons

    def _verdicts(self, split, outcome, values, reasons) -> Verdicts:
        names = self._rewards.terms(split)
        values = np.where(unjudged(outcome), np.float32(0), values)
        terms = dict(zip(names, values, strict=True)) if len(names) > 1 else {}
        return Verdicts(
            np.where(np.isnan(values), np.float32(0), values).sum(axis=0),
            outcome,
            terms,
            reasons if any(reasons) else (),
        )

    def answers(self, split: str, index, responses, lengths) -> list[str | None]:
        found = [verifiers.extract(text, self._config.verifier.answer) for text in self._texts(responses, lengths)]
        return [None if answer is None else verifiers.canonical(answer) for answer in found]

    def close(self) -> None:
        self._cleanup.close()

    def _texts(self, responses, lengths) -> list[str]:
        texts = self._response_texts(responses, lengths)
        # Where the prompt itself opens the thinking, a response that never closes it has no answer.
        return [OPEN + text for text in texts] if self._opens_thinking else texts


def _rows(responses, lengths) -> list[list[int]]:
    """Token ids of each response."""
    return [np.asarray(row[:length]).tolist() for row, length in zip(responses, lengths, strict=True)]
