"""Countdown and eureka: problems, verdicts against plain Python, demonstrators, and the shipped base models."""

import itertools
import re

import jax
import numpy as np
import pytest

from r2vpo_jax import tasks
from r2vpo_jax.config import TaskConfig
from r2vpo_jax.config.run import ModelConfig
from r2vpo_jax.models.base import open_base_model
from r2vpo_jax.sampler import Sampling, generate
from r2vpo_jax.tasks.arithmetic import ArithmeticTask
from r2vpo_jax.tasks.base import SPLITS, Outcome, TraceableTask
from r2vpo_jax.tasks.countdown import CountdownTask
from r2vpo_jax.tasks.embedded import EOS
from r2vpo_jax.tasks.eureka import EurekaTask

TASKS = {
    "countdown": CountdownTask(),
    "countdown of 4": CountdownTask(4),
    "eureka": EurekaTask(),
    "eureka 1": EurekaTask(1),
}
INDEX = np.arange(400)


def value_of(text: str) -> int:
    """An expression from the left, by the book."""
    numbers, operations = [int(x) for x in re.split(r"[-+*]", text)], re.findall(r"[-+*]", text)
    value = numbers[0]
    for operation, number in zip(operations, numbers[1:], strict=True):
        value = {"+": value + number, "-": value - number, "*": value * number}[operation]
    return value


def is_right(task, prompt: str, response: str) -> bool:
    """What a slow reader says of a text."""
    if not response.endswith(EOS):
        return False
    text = response.removesuffix(EOS)
    if isinstance(task, EurekaTask):
        turned = [str(9 - int(digit)) for digit in prompt[:4]]
        return bool(re.fullmatch(r"\d{4}", text)) and list(text[: task.needed]) == turned[: task.needed]
    numbers, target = prompt.removesuffix("=").split(">")
    form = re.fullmatch(rf"\d([-+*]\d){{{task.num_numbers - 1}}}", text)
    return bool(form) and sorted(re.findall(r"\d", text)) == sorted(numbers) and value_of(text) == int(target)


def texts(task, split="train", index=INDEX):
    problems = task.problems(split, index)
    assert (problems.length == task.max_prompt_length).all()
    return [task.decode(row) for row in problems.tokens]


def random_edits(responses, generator, num_tokens):
    """Each row with up to two tokens changed."""
    edited = responses.copy()
    for row in edited[::2]:
        for column in generator.integers(0, len(row), 2):
            row[column] = generator.integers(0, num_tokens)
    return edited


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("mistakes", [0.0, 0.7])
def test_verdicts_are_those_of_a_slow_reader(name, mistakes):
    """On demonstrations, with and without mistakes, and on the same with tokens changed."""
    task = TASKS[name]
    knob = {"turn": 1 - mistakes} if isinstance(task, EurekaTask) else {"guess": mistakes}
    responses, lengths = task.demonstrations("train", INDEX, jax.random.key(1), **knob)
    responses = np.asarray(responses)
    seen = set()
    for rows in (responses, random_edits(responses, np.random.default_rng(2), len(task.symbols))):
        ends = np.argmax(rows == task.eos_ids[0], axis=1)
        stops = np.where((rows == task.eos_ids[0]).any(axis=1), ends + 1, rows.shape[1])
        verdicts = task.verify("train", INDEX, rows, stops)
        expected = [
            is_right(task, prompt, task.decode(row[:stop]))
            for prompt, row, stop in zip(texts(task), rows, stops, strict=True)
        ]
        assert (verdicts.reward == np.asarray(expected, np.float32)).all()
        assert ((verdicts.outcome == Outcome.RIGHT) == expected).all()
        seen |= {*expected}
        if rows is responses and mistakes == 0:
            assert all(expected)
    assert seen == {True, False}


@pytest.mark.parametrize("name", TASKS)
def test_splits_are_disjoint_and_problems_pure(name):
    task = TASKS[name]
    of_split = {split: texts(task, split, np.arange(1500)) for split in SPLITS}
    normal = {
        split: {"".join(sorted(text.split(">")[0])) + text.partition(">")[2] if ">" in text else text for text in some}
        for split, some in of_split.items()
    }
    for one, other in itertools.combinations(SPLITS, 2):
        assert not normal[one] & normal[other]
    assert texts(task, "train", np.array([7, 3])) == [of_split["train"][7], of_split["train"][3]]


def test_countdown_problems_can_be_solved_in_several_ways():
    task, ways = CountdownTask(), []
    for text in texts(task, index=np.arange(60)):
        numbers, target = text.removesuffix("=").split(">")
        expressions = {
            f"{a}{x}{b}{y}{c}"
            for a, b, c in itertools.permutations(numbers)
            for x, y in itertools.product("+-*", repeat=2)
        }
        ways.append(sum(value_of(expression) == int(target) for expression in expressions))
    assert min(ways) >= 1
    assert np.median(ways) >= 2


@pytest.mark.parametrize(("name", "knob"), [("countdown", {"guess": 0.8}), ("eureka", {"turn": 0.2})])
def test_demonstrators_do_what_they_are_asked(name, knob):
    index = np.arange(3000)
    responses, lengths = TASKS[name].demonstrations("train", index, jax.random.key(0), **knob)
    share = TASKS[name].verify("train", index, responses, lengths).reward.mean()
    low, high = {"countdown": (0.2, 0.35), "eureka": (0.004, 0.013)}[name]  # a guess may be right too; 0.2^3 = 0.008
    assert low < share < high


@pytest.mark.parametrize(
    ("model", "task", "low", "high"),
    [
        ("eureka_base", EurekaTask(1), 0.1, 0.35),
        ("countdown_base", CountdownTask(), 0.04, 0.2),
        ("long_arithmetic_base", ArithmeticTask(min_operands=8, max_operands=8, num_digits=3), 0.1, 0.3),
    ],
)
def test_shipped_base_models_speak_their_task(model, task, low, high, mesh):
    """And are right as seldom as the table says."""
    base = open_base_model(ModelConfig(path=model))
    task.check_tokenizer(base.tokenizer)
    assert base.eos_ids == task.eos_ids
    problems = task.problems("validation", np.arange(128))
    settings = Sampling(group_size=4, max_response_length=task.max_response_length, eos_ids=task.eos_ids)
    drawn = generate(
        base.model, base.load_params(), problems.tokens, problems.length, jax.random.key(0), settings,
        mesh=mesh, problem_ids=problems.index,
    )  # fmt: skip
    right = task.verify("validation", np.repeat(problems.index, 4), drawn.response_tokens, drawn.response_length)
    assert low < right.reward.mean() < high


@pytest.mark.parametrize("options", [{"num_numbers": 1}, {"num_numbers": 7}])
def test_countdown_out_of_range(options):
    with pytest.raises(ValueError, match="num_numbers must be 2 to 6"):
        tasks.make(TaskConfig(name="countdown", options=options))


@pytest.mark.parametrize("needed", [0, 5])
def test_eureka_out_of_range(needed):
    with pytest.raises(ValueError, match="needed must be 1 to 4"):
        tasks.make(TaskConfig(name="eureka", options={"needed": needed}))


@pytest.mark.parametrize("name", TASKS)
def test_they_can_be_traced_and_answer(name):
    task = TASKS[name]
    assert isinstance(task, TraceableTask)
    responses, lengths = task.demonstrations(
        "test", INDEX[:4], jax.random.key(0), **({"turn": 1.0} if "eureka" in name else {"guess": 0.0})
    )
    rewards, _ = jax.jit(task.traced_verify, static_argnums=0)("test", INDEX[:4], responses, lengths)
    assert rewards.tolist() == [1, 1, 1, 1]
    assert all(task.answers("test", INDEX[:4], np.asarray(responses), np.asarray(lengths)))
    assert len(task.level("test", INDEX[:4])) == 4
