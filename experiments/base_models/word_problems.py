"""Word problems of our own in the format of GSM8K, and the base model's teacher.

    Mia has 6 boxes with 7 pens in each box. Mia gives 5 pens to Leo. How many pens does Mia have left?

    Mia has 6*7=42 pens.
    Mia has 42-5=37 pens left.
    #### 37

A problem is a pure function of (split, position): one of the templates below, with names, objects and numbers.
Which problems belong to which split is decided by a hash of the question, so that the splits are disjoint.

The base model learns from an *imperfect* demonstrator whose mistakes are systematic, as in the arithmetic task.
It usually misreads certain words: a week has 5 days, a dozen is 10, "twice as many" is 2 more, "half" is 2 less,
"fewer" is more. It also gets 14 of the 36 products of the times table, the hard facts, wrong by one most of the time. So the
right solution is in the base model's distribution, but for most problems it is not the mode.

`experiments/pretrain.py` is the command that writes the data set and the base model from this.
"""

import collections
import dataclasses
import hashlib
import json
import pathlib
import random

import jax
import numpy as np

from r2vpo_jax.tasks.base import Problems
from r2vpo_jax.verifiers.outcome import SPLITS

ROWS_SHIPPED = {"train": 1000, "test": 256}

_SPLIT_BOUNDS = {"train": (0, 13), "validation": (13, 14), "test": (14, 16)}  # sixteenths of all questions
_NAMES = ("Ana", "Ben", "Eva", "Ida", "Leo", "Max", "Mia", "Noa", "Sam", "Tim", "Uma", "Zoe")
_THINGS = ("pens", "cards", "beads", "coins", "stamps", "shells", "apples", "plums", "stones", "books")
_CONTAINERS = (("boxes", "box"), ("bags", "bag"), ("jars", "jar"), ("packs", "pack"))
_OPERATIONS = {
    "+": lambda x, y: x + y,
    "-": lambda x, y: x - y,
    "*": lambda x, y: x * y,
    "/": lambda x, y: x // y,
}


# Of the 36 products of the times table, those that the demonstrator usually gets wrong, in either order.
_HARD_FACTS = {
    *((2, 8), (3, 4), (3, 8), (4, 6), (4, 9), (5, 6), (5, 8)),
    *((6, 6), (6, 9), (7, 7), (7, 8), (7, 9), (8, 8), (9, 9)),
}


class Result(int):
    """An operand that is the result of the step with this number."""


@dataclasses.dataclass(frozen=True)
class Step:
    """One sentence of a solution, `before` left operation right = value `after`."""

    before: str
    left: int
    operation: str
    right: int
    after: str
    misreading: tuple[str, int] | None = None  # operation and right operand of a careless reader


@dataclasses.dataclass(frozen=True)
class Problem:
    template: str
    question: str
    steps: tuple[Step, ...]

    @property
    def answer(self) -> int:
        return _work(self, lambda step, value: (step.operation, step.right, 0))[1]

    @property
    def solution(self) -> str:
        """The right solution, down to `#### answer`."""
        return _work(self, lambda step, value: (step.operation, step.right, 0))[0]


def _work(problem: Problem, read) -> tuple[str, int]:
    """(text, answer) of a reader: `read(step, left)` gives the operation, the right operand and an error."""
    results, lines = [], []

    def number(operand):
        return results[operand] if isinstance(operand, Result) else operand

    for step in problem.steps:
        left = number(step.left)
        operation, right, error = read(step, number)
        right = number(right)
        results.append(_OPERATIONS[operation](left, right) + error)
        lines.append(f"{step.before} {left}{operation}{right}={results[-1]} {step.after}".replace(" .", "."))
    return "\n".join([*lines, f"#### {results[-1]}"]), results[-1]


# Templates: (draw) -> (question, steps). What is asked for is the result of the last step. ----------------------


class _Draw:
    """The free choices of one problem."""

    def __init__(self, rng: random.Random):
        self._rng = rng
        self.n, self.m = rng.sample(_NAMES, 2)
        self.o = rng.choice(_THINGS)
        self.boxes, self.box = rng.choice(_CONTAINERS)

    def __call__(self, low: int, high: int) -> int:
        return self._rng.randint(low, high)

    def one_of(self, *texts: str) -> str:
        return self._rng.choice(texts)


def _boxes_then_gives(d):
    a, b = d(2, 9), d(2, 9)
    c = d(1, min(9, a * b - 2))
    gives = d.one_of(f"{d.n} gives {c} {d.o} to {d.m}.", f"{d.m} takes {c} of them.")
    return (
        f"{d.n} has {a} {d.boxes} with {b} {d.o} in each {d.box}. {gives} How many {d.o} does {d.n} have left?",
        [Step(f"{d.n} has", a, "*", b, f"{d.o}."), Step(f"{d.n} has", Result(0), "-", c, f"{d.o} left.")],
    )


def _boxes_and_more(d):
    a, b, c = d(2, 9), d(2, 9), d(2, 9)
    finds = d.one_of(f"{d.n} finds {c} more.", f"{d.m} gives {d.n} {c} more.")
    return (
        f"{d.n} has {a} {d.boxes} with {b} {d.o} in each {d.box}. {finds} How many {d.o} does {d.n} have now?",
        [Step(f"{d.n} has", a, "*", b, f"{d.o}."), Step(f"{d.n} has", Result(0), "+", c, f"{d.o} now.")],
    )


def _two_kinds_of_boxes(d):
    a, b, c, e = d(2, 5), d(2, 9), d(2, 5), d(2, 9)
    return (
        f"{d.n} has {a} bags with {b} {d.o} each and {c} jars with {e} {d.o} each. How many {d.o} are there in all?",
        [
            Step("The bags hold", a, "*", b, f"{d.o}."),
            Step("The jars hold", c, "*", e, f"{d.o}."),
            Step("That is", Result(0), "+", Result(1), f"{d.o}."),
        ],
    )


def _cost(d):
    a, b, c = d(2, 9), d(2, 9), d(2, 9)
    return (
        f"{d.n} buys {a} {d.o} for ${b} each and a bag for ${c}. How many dollars does {d.n} pay?",
        [Step("That is", a, "*", b, "dollars."), Step(f"{d.n} pays", Result(0), "+", c, "dollars.")],
    )


def _change(d):
    a, b, tens = d(2, 9), d(2, 9), d(1, 3)
    paid = 10 * ((a * b - 1) // 10 + tens)
    paid += 10 * (paid == a * b)
    return (
        f"{d.n} buys {a} {d.o} for ${b} each and pays with ${paid}. How many dollars does {d.n} get back?",
        [Step("That is", a, "*", b, "dollars."), Step(f"{d.n} gets back", paid, "-", Result(0), "dollars.")],
    )


def _needs(d):
    a, b = d(2, 9), d(2, 9)
    needed = a * b + d(2, 9)
    return (
        f"{d.n} needs {needed} {d.o}. {d.n} has {a} {d.boxes} with {b} {d.o} in each {d.box}. "
        f"How many more {d.o} does {d.n} need?",
        [Step(f"{d.n} has", a, "*", b, f"{d.o}."), Step(f"{d.n} needs", needed, "-", Result(0), f"more {d.o}.")],
    )


def _shares(d):
    friends, each = d(2, 9), d(2, 9)
    found = d(1, min(9, friends * each - 2))
    finds = d.one_of(f"{d.n} finds {found} more", f"{d.n} gets {found} more from {d.m}")
    return (
        f"{d.n} has {friends * each - found} {d.o}. {finds} and shares all among {friends} friends. "
        f"How many {d.o} does each friend get?",
        [
            Step(f"{d.n} has", friends * each - found, "+", found, f"{d.o}."),
            Step("Each friend gets", Result(0), "/", friends, f"{d.o}."),
        ],
    )


def _walks(d):
    a, b, c = d(2, 9), d(2, 9), d(2, 9)
    return (
        f"{d.n} walks {a} miles an hour for {b} hours and then {c} miles more. How many miles does {d.n} walk?",
        [Step("That is", a, "*", b, "miles."), Step(f"{d.n} walks", Result(0), "+", c, "miles.")],
    )


def _twice(d):
    a = d(3, 19)
    return (
        f"{d.n} has {a} {d.o}. {d.m} has twice as many. How many {d.o} do they have together?",
        [
            Step(f"{d.m} has", a, "*", 2, f"{d.o}.", ("+", 2)),
            Step("They have", a, "+", Result(0), f"{d.o} together."),
        ],
    )


def _twice_then_loses(d):
    a = d(4, 19)
    c = d(1, min(9, a - 1))
    return (
        f"{d.n} has {a} {d.o}. {d.m} has twice as many and loses {c}. How many {d.o} does {d.m} have left?",
        [
            Step(f"{d.m} has", a, "*", 2, f"{d.o}.", ("+", 2)),
            Step(f"{d.m} has", Result(0), "-", c, f"{d.o} left."),
        ],
    )


def _half(d):
    a, c = 2 * d(3, 19), d(2, 9)
    return (
        f"{d.n} has {a} {d.o} and gives half of them to {d.m}. Then {d.n} finds {c} more. "
        f"How many {d.o} does {d.n} have now?",
        [
            Step(f"{d.n} keeps", a, "/", 2, f"{d.o}.", ("-", 2)),
            Step(f"{d.n} has", Result(0), "+", c, f"{d.o} now."),
        ],
    )


def _fewer(d):
    a = d(11, 30)
    b = d(2, 9)
    return (
        f"{d.n} has {a} {d.o}. {d.m} has {b} fewer than {d.n}. How many {d.o} do they have together?",
        [
            Step(f"{d.m} has", a, "-", b, f"{d.o}.", ("+", b)),
            Step("They have", a, "+", Result(0), f"{d.o} together."),
        ],
    )


def _fewer_boxes(d):
    a, b = d(4, 9), d(2, 9)
    c = d(1, a - 2)
    return (
        f"{d.n} has {a} {d.boxes}. {d.m} has {c} fewer, with {b} {d.o} in each {d.box}. "
        f"How many {d.o} does {d.m} have?",
        [
            Step(f"{d.m} has", a, "-", c, f"{d.boxes}.", ("+", c)),
            Step(f"{d.m} has", Result(0), "*", b, f"{d.o}."),
        ],
    )


def _week(d):
    a, c = d(2, 9), d(2, 9)
    return (
        f"{d.n} finds {a} {d.o} a day for a week and then {c} more. How many {d.o} does {d.n} find?",
        [
            Step("In a week that is", a, "*", 7, f"{d.o}.", ("*", 5)),
            Step(f"{d.n} finds", Result(0), "+", c, f"{d.o}."),
        ],
    )


def _uses_for_a_week(d):
    a = d(2, 9)
    had = 7 * a + d(2, 9)
    return (
        f"{d.n} has {had} {d.o} and uses {a} a day for a week. How many {d.o} does {d.n} have left?",
        [
            Step("In a week that is", a, "*", 7, f"{d.o}.", ("*", 5)),
            Step(f"{d.n} has", had, "-", Result(0), f"{d.o} left."),
        ],
    )


def _dozen(d):
    a, c = d(2, 8), d(2, 9)
    return (
        f"{d.n} buys {a} dozen {d.o} and gives {c} to {d.m}. How many {d.o} does {d.n} have left?",
        [
            Step(f"{d.n} buys", a, "*", 12, f"{d.o}.", ("*", 10)),
            Step(f"{d.n} has", Result(0), "-", c, f"{d.o} left."),
        ],
    )


_TEMPLATES = (
    _boxes_then_gives,
    _boxes_and_more,
    _two_kinds_of_boxes,
    _cost,
    _change,
    _needs,
    _shares,
    _walks,
    _twice,
    _twice_then_loses,
    _half,
    _fewer,
    _fewer_boxes,
    _week,
    _uses_for_a_week,
    _dozen,
)


def problem(split: str, position: int) -> Problem:
    """The problem at this position of a split: always the same one. There is no end to them, and some recur.

    Raises:
      ValueError: an unknown split or a negative position.
    """
    if split not in SPLITS or position < 0:
        raise ValueError(f"no problem {position} in split {split!r}; the splits are {SPLITS}, counted from 0")
    rng = random.Random(f"{split} {position}")
    low, high = _SPLIT_BOUNDS[split]
    while True:
        template = rng.choice(_TEMPLATES)
        question, steps = template(_Draw(rng))
        if low <= hashlib.sha256(question.encode()).digest()[0] % 16 < high:
            return Problem(template.__name__.strip("_"), question, tuple(steps))


def demonstrate(problem: Problem, rng: random.Random, misread: float, slip: float) -> str:
    """A solution by the imperfect demonstrator.

    Args:
      problem: what to solve.
      rng: decides where mistakes are made.
      misread: probability of falling for a word that can be misread.
      slip: probability that a hard fact comes out one too small.
    """

    def read(step, number):
        operation, right = step.operation, step.right
        if step.misreading and rng.random() < misread:
            operation, right = step.misreading
        left, other = number(step.left), number(right)
        factors = {"*": (left, other), "/": (other, left // other)}.get(operation, ())
        slips = tuple(sorted(factors)) in _HARD_FACTS and rng.random() < slip
        return operation, right, -int(slips)

    return _work(problem, read)[0]


# The tokenizer --------------------------------------------------------------------------------------------------

END_OF_TEXT, TURN, END_OF_TURN = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
VOCAB_SIZE = 512  # rows of the embedding; training may end with a few tokens less

# ChatML. Without thinking, the assistant's turn starts with an empty block of thoughts.
CHAT_TEMPLATE = """\
{%- for message in messages %}
{{- "<|im_start|>" + message.role + "\\n" + message.content + "<|im_end|>\\n" }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- "<|im_start|>assistant\\n" }}
{%- if enable_thinking is defined and not enable_thinking %}
{{- "<think>\\n\\n</think>\\n\\n" }}
{%- endif %}
{%- endif %}
"""


def make_tokenizer():
    """A byte-level BPE tokenizer as a Transformers object, learned from the first training problems.

    It is Qwen2's but for the vocabulary: any text is spelled in bytes, numbers are written digit by digit.
    """
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast, Qwen2Tokenizer

    # The same steps around the vocabulary, so that all ways of loading the files give the same tokens:
    # AutoTokenizer makes a Qwen2Tokenizer of whatever it finds beside the configuration of a Qwen2 model.
    steps = Qwen2Tokenizer().backend_tokenizer
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer, tokenizer.pre_tokenizer = steps.normalizer, steps.pre_tokenizer
    tokenizer.decoder = steps.decoder
    thoughts = [AddedToken(text, special=False, normalized=False) for text in ("<think>", "</think>")]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(thoughts),
        special_tokens=[END_OF_TEXT, TURN, END_OF_TURN],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    problems = [problem("train", position) for position in range(2000)]
    texts = (text for p in problems for text in (f"user\n{p.question}", f"assistant\n{p.solution}"))
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens(thoughts)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=END_OF_TEXT,
        eos_token=END_OF_TURN,
        unk_token=END_OF_TEXT,
        chat_template=CHAT_TEMPLATE,
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


# What pretraining and the shipped files are made of -------------------------------------------------------------


class WordProblems:
    """The problems as the base model's teacher writes them: tokens of prompts and of solutions.

    `tasks.base.Task` as far as pretraining needs it; the task of runs reads the shipped files.
    """

    name = "word_problems"
    max_prompt_length = 40  # tokens
    max_response_length = 44

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer

    def problems(self, split: str, index) -> Problems:
        questions = [problem(split, int(i)).question for i in index]
        chats = [[{"role": "user", "content": question}] for question in questions]
        rows = self._tokenizer.apply_chat_template(chats, add_generation_prompt=True, return_dict=False)
        tokens, lengths = self._pad(rows, self.max_prompt_length, left=True)
        return Problems(index=np.asarray(index, np.int32), tokens=tokens, length=lengths)

    def demonstrations(self, split: str, index, key, misread: float, slip: float):
        """What the imperfect demonstrator writes.

        Args:
          split, index: the problems.
          key: PRNG key of the demonstrator's mistakes.
          misread, slip: see `demonstrate`.

        Returns:
          (responses int32 [N, T], lengths int32 [N]).
        """
        seed = np.asarray(jax.random.key_data(key)).tolist()
        texts = [
            demonstrate(problem(split, int(i)), random.Random(f"{seed} {i}"), misread, slip) + END_OF_TURN
            for i in index
        ]
        return self._pad(self._tokenizer(texts)["input_ids"], self.max_response_length, left=False)

    def _pad(self, rows, size: int, left: bool):
        tokens = np.full((len(rows), size), self._tokenizer.pad_token_id, np.int32)
        for to, row in zip(tokens, rows, strict=True):
            to[slice(size - len(row), None) if left else slice(len(row))] = row
        return tokens, np.asarray([len(row) for row in rows], np.int32)


def write_word_problems(path) -> None:
    """Write train.jsonl and test.jsonl, which ship in r2vpo_jax/assets/data/word_problems.

    Rows have the columns "question" and "answer"; no question comes twice, and every template has its turn.
    """
    path = pathlib.Path(path)
    path.mkdir(parents=True, exist_ok=True)
    for split, num_rows in ROWS_SHIPPED.items():
        rows, uses, position = {}, collections.Counter(), 0
        while len(rows) < num_rows:
            new = problem(split, position)
            position += 1
            if new.question not in rows and uses[new.template] <= len(rows) // len(_TEMPLATES):
                uses[new.template] += 1
                rows[new.question] = json.dumps({"question": new.question, "answer": new.solution})
        (path / f"{split}.jsonl").write_text("\n".join(rows.values()) + "\n")
