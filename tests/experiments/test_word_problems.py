"""The word problems and what ships with them: answers, splits, teacher, tokenizer, files, base model."""

import functools
import importlib.resources
import json
import pathlib
import random
import re
import subprocess
import sys

import jax
import numpy as np
import pytest

from experiments.base_models import word_problems
from experiments.base_models.word_problems import END_OF_TEXT, END_OF_TURN, WordProblems, demonstrate, problem
from r2vpo_jax import models, sampler
from r2vpo_jax.config import ModelConfig
from r2vpo_jax.models import base as base_model

ROOT = pathlib.Path(__file__).parents[2]
SHIPPED = importlib.resources.files("r2vpo_jax")
CHECKPOINT = SHIPPED / "assets" / "models" / "word_problems_base"
FORM = re.compile(r"(?:[^\n]+ \d+[-+*/]\d+=\d+ ?[^\n]*\.\n){2,3}#### (\d+)")

# Solved by hand, one of each template.
BY_HAND = {
    "Tim has 42 stamps and uses 5 a day for a week. How many stamps does Tim have left?": 7,
    "Uma has 8 coins and gives half of them to Ana. Then Uma finds 3 more. How many coins does Uma have now?": 7,
    "Tim has 5 jars with 4 stamps in each jar. Ben takes 5 of them. How many stamps does Tim have left?": 15,
    "Tim has 29 shells. Tim finds 3 more and shares all among 8 friends. How many shells does each friend get?": 4,
    "Zoe has 9 jars with 8 apples in each jar. Zoe finds 4 more. How many apples does Zoe have now?": 76,
    "Max finds 3 apples a day for a week and then 3 more. How many apples does Max find?": 24,
    "Mia buys 2 beads for $7 each and a bag for $4. How many dollars does Mia pay?": 18,
    "Leo has 25 stones. Ida has 7 fewer than Leo. How many stones do they have together?": 43,
    "Sam walks 7 miles an hour for 2 hours and then 3 miles more. How many miles does Sam walk?": 17,
    "Uma has 5 bags with 6 beads each and 3 jars with 8 beads each. How many beads are there in all?": 54,
    "Eva has 9 stones. Mia has twice as many. How many stones do they have together?": 27,
    "Ben has 9 boxes. Mia has 7 fewer, with 6 shells in each box. How many shells does Mia have?": 12,
    "Ana needs 42 beads. Ana has 5 bags with 7 beads in each bag. How many more beads does Ana need?": 7,
    "Mia buys 7 dozen coins and gives 2 to Uma. How many coins does Mia have left?": 82,
    "Mia buys 9 beads for $8 each and pays with $100. How many dollars does Mia get back?": 28,
    "Max has 16 stones. Ana has twice as many and loses 3. How many stones does Ana have left?": 29,
}


@functools.cache
def first(split, count):
    return [problem(split, position) for position in range(count)]


@pytest.fixture(scope="module")
def tokenizer():
    return word_problems.make_tokenizer()


@pytest.fixture(scope="module")
def shipped():
    """The base model as a run opens it."""
    return base_model.open_base_model(ModelConfig(path="word_problems_base"))


def test_problems_of_every_template_have_the_answers_found_by_hand():
    problems = {p.question: p for p in first("test", 64)}
    assert {question: problems[question].answer for question in BY_HAND} == BY_HAND
    assert len({problems[question].template for question in BY_HAND}) == len(word_problems._TEMPLATES)


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_every_line_of_a_solution_is_true_and_made_of_what_is_known(split):
    calculate = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__, "/": int.__floordiv__}
    for p in first(split, 400):
        *lines, last = p.solution.split("\n")
        known = {int(n) for n in re.findall(r"\d+", p.question)} | {2, 7, 12}  # twice and half, a week, a dozen
        for line in lines:
            ((x, operation, y, value),) = re.findall(r"(\d+)([-+*/])(\d+)=(\d+)", line)
            x, y, value = int(x), int(y), int(value)
            assert {x, y} <= known, p
            assert calculate[operation](x, y) == value > 0, p
            assert operation != "/" or x % y == 0, p
            known.add(value)
        assert last == f"#### {value}"
        assert value == p.answer


def test_a_position_is_one_problem_and_splits_share_none():
    assert problem("train", 5) == problem("train", 5) != problem("train", 6)
    questions = [{p.question for p in first(split, 400)} for split in ("train", "validation", "test")]
    assert sum(map(len, questions)) == len(set().union(*questions))
    with pytest.raises(ValueError, match="no problem 0 in split 'dev'"):
        problem("dev", 0)
    with pytest.raises(ValueError, match="no problem -1"):
        problem("train", -1)


def test_the_demonstrator_makes_the_mistakes_it_is_said_to_make():
    problems = first("train", 400)
    for p in problems:
        assert demonstrate(p, random.Random(0), 0.0, 0.0) == p.solution
        misreads = any(step.misreading for step in p.steps)
        assert (demonstrate(p, random.Random(0), 1.0, 0.0) != p.solution) == misreads
    by_question = {p.question: p for p in first("test", 64)}

    def careless(question, misread, slip):
        return demonstrate(by_question[question], random.Random(0), misread, slip)

    (twice,) = (q for q in BY_HAND if "twice as many." in q)
    (bags_and_jars,) = (q for q in BY_HAND if "in all?" in q)
    # 9+2, not 9*2.
    assert careless(twice, 1.0, 0.0) == "Mia has 9+2=11 stones.\nThey have 9+11=20 stones together.\n#### 20"
    # 5*6 and 3*8 are hard facts.
    assert careless(bags_and_jars, 0.0, 1.0) == (
        "The bags hold 5*6=29 beads.\nThe jars hold 3*8=23 beads.\nThat is 29+23=52 beads.\n#### 52"
    )
    right = [demonstrate(p, random.Random(i), 0.75, 0.7) == p.solution for i, p in enumerate(problems)]
    assert 0.3 < np.mean(right) < 0.6


def test_shipped_files_are_what_the_command_writes(tmp_path):
    command = [sys.executable, "-m", "experiments.pretrain", "--task=word_problems", f"--data_output={tmp_path}"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=120)
    rows = {}
    for split, count in word_problems.ROWS_SHIPPED.items():
        text = (SHIPPED / "assets" / "data" / "word_problems" / f"{split}.jsonl").read_text()
        assert text == (tmp_path / f"{split}.jsonl").read_text()
        rows[split] = [json.loads(line) for line in text.splitlines()]
        assert all(list(row) == ["question", "answer"] for row in rows[split])
        assert len({row["question"] for row in rows[split]}) == len(rows[split]) == count
        assert all(FORM.fullmatch(row["answer"]) for row in rows[split])
    assert not {r["question"] for r in rows["train"]} & {r["question"] for r in rows["test"]}


def test_any_text_goes_through_the_tokenizer_and_digits_stand_alone(tokenizer):
    for text in (first("test", 1)[0].solution, "Ünïcode: ½ \\frac{1}{2} 日本\t 1,024\n\n x", "\x00\x7f ~"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert [tokenizer.decode([i]) for i in tokenizer("a 2048=")["input_ids"]] == ["a", " ", "2", "0", "4", "8", "="]
    every_byte = "".join(chr(i) for i in range(256))
    assert tokenizer.unk_token_id not in tokenizer(every_byte)["input_ids"]
    assert 256 < len(tokenizer) <= word_problems.VOCAB_SIZE


def test_auto_tokenizer_opens_the_shipped_one_and_adds_nothing(tokenizer):
    from transformers import AutoTokenizer

    auto = AutoTokenizer.from_pretrained(CHECKPOINT, local_files_only=True)
    assert len(auto) == len(tokenizer)
    assert auto.get_vocab() == tokenizer.get_vocab()
    assert auto.chat_template == tokenizer.chat_template
    assert (auto.eos_token, auto.pad_token) == (END_OF_TURN, END_OF_TEXT)
    probes = [p.question + p.solution for p in first("test", 50)] + [
        "It's ½\n\n\n x=1,024 \\boxed{-7}\t!",
        "日本 don't",
    ]
    assert auto(probes)["input_ids"] == tokenizer(probes)["input_ids"]


def test_chat_template(tokenizer):
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1?"}]
    render = functools.partial(tokenizer.apply_chat_template, tokenize=False)
    turns = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n1+1?<|im_end|>\n"
    assert render(chat) == turns
    assert render(chat, add_generation_prompt=True) == turns + "<|im_start|>assistant\n"
    assert render(chat, add_generation_prompt=True, enable_thinking=True) == turns + "<|im_start|>assistant\n"
    without = render(chat, add_generation_prompt=True, enable_thinking=False)
    assert without == turns + "<|im_start|>assistant\n<think>\n\n</think>\n\n"
    assert render([*chat, {"role": "assistant", "content": "2"}]) == turns + "<|im_start|>assistant\n2<|im_end|>\n"
    for token in ("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<think>", "</think>"):
        assert len(tokenizer(token)["input_ids"]) == 1


def test_pretraining_sees_the_prompts_of_runs_and_whole_solutions(tokenizer):
    task, index = WordProblems(tokenizer), np.arange(300)
    problems = task.problems("train", index)
    responses, lengths = task.demonstrations("train", index, jax.random.key(1), misread=0.0, slip=0.0)
    assert problems.tokens.shape == (300, task.max_prompt_length)
    assert responses.shape == (300, task.max_response_length)
    for i, p in enumerate(first("train", 300)):
        prompt = tokenizer.decode(problems.tokens[i, -problems.length[i] :])
        assert prompt == f"<|im_start|>user\n{p.question}<|im_end|>\n<|im_start|>assistant\n"
        assert tokenizer.decode(responses[i, : lengths[i]]) == p.solution + END_OF_TURN
    again, _ = task.demonstrations("train", index, jax.random.key(1), misread=0.5, slip=0.5)
    other, _ = task.demonstrations("train", index, jax.random.key(2), misread=0.5, slip=0.5)
    assert np.any(again != other)
    np.testing.assert_array_equal(again[7], task.demonstrations("train", [7], jax.random.key(1), 0.5, 0.5)[0][0])


def test_the_shipped_base_model_answers_in_form_and_is_right_now_and_then(shipped, tokenizer, mesh):
    assert shipped.eos_ids == tuple(tokenizer.convert_tokens_to_ids([END_OF_TURN, END_OF_TEXT]))
    assert shipped.notices == ("responses end at any of <|im_end|> (2), <|endoftext|> (0)",)
    assert sum(f.stat().st_size for f in CHECKPOINT.iterdir()) < 1_800_000
    _, params = models.from_pretrained(CHECKPOINT, param_dtype="float32", num_tokens=len(tokenizer))
    problems = WordProblems(tokenizer).problems("test", np.arange(32))
    rollout = sampler.generate(
        shipped.model,
        params,
        problems.tokens,
        problems.length,
        jax.random.key(0),
        sampler.Sampling(group_size=4, max_response_length=56, eos_ids=shipped.eos_ids),
        mesh=mesh,
        problem_ids=problems.index,
    )
    texts = [
        tokenizer.decode(row[:length], skip_special_tokens=True)
        for row, length in zip(rollout.response_tokens, rollout.response_length, strict=True)
    ]
    answers = [FORM.fullmatch(text) for text in texts]
    assert sum(map(bool, answers)) >= 120
    gold = np.repeat([p.answer for p in first("test", 32)], 4)
    right = np.mean([bool(m) and int(m[1]) == g for m, g in zip(answers, gold, strict=True)])
    assert 0.2 < right < 0.6
