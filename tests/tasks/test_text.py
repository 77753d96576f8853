"""Text tasks: from data sets to prompts, from responses to rewards, through real verifier processes."""

import json
import re
import textwrap

import numpy as np
import pytest
from tokenizers import AddedToken

from r2vpo_jax import tasks
from r2vpo_jax.config.fields import build
from r2vpo_jax.config.task import TaskConfig
from r2vpo_jax.tasks import Outcome
from r2vpo_jax.tasks import responses as responses_module
from r2vpo_jax.tasks.base import stop_of
from r2vpo_jax.tasks.responses import ResponseTexts
from tests.helpers.tokenizers import byte_tokenizer

EOS = 257
TOKENIZER = byte_tokenizer()
SIZE = 96  # response columns


def write(folder, name, rows):
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def row(i, **more):
    return {"question": f"What is {i} + {i}?", "answer": str(2 * i), "level": f"L{i % 2}", **more}


FILES = {split: f"{split}.jsonl" for split in tasks.SPLITS}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write(folder, "train.jsonl", [row(i) for i in range(20)])
    write(folder, "validation.jsonl", [row(i) for i in range(100, 104)])
    write(folder, "test.jsonl", [row(i) for i in range(200, 205)])
    return folder


@pytest.fixture
def make(folder):
    """Makes the task of those files; sections of the configuration as keywords. Closed at the end."""
    made = []

    def make(tokenizer=TOKENIZER, stop=(), **sections):
        defaults = {
            "text": {"data_dir": str(folder), "max_response_length": SIZE} | FILES,
            "prompt": {"template": "plain"},
            "verifier": {"num_workers": 1, "time_limit": 20.0},
        }
        config = {name: defaults.get(name, {}) | sections.get(name, {}) for name in {*defaults, *sections}}
        made.append(tasks.make(build(TaskConfig, {"name": "text"} | config), tokenizer, (EOS,), stop=stop))
        return made[-1]

    yield make
    for task in made:
        task.close()


def responses(*texts):
    """(tokens, lengths) of texts, each ended."""
    rows = [[*TOKENIZER(text)["input_ids"], EOS] for text in texts]
    tokens = np.zeros((len(rows), SIZE), np.int32)
    for target, ids in zip(tokens, rows, strict=True):
        target[: len(ids)] = ids
    return tokens, np.array([len(ids) for ids in rows])


def at(task, *answers):
    """Positions in the train split of the problems with these answers."""
    positions = {task.example("train", i)[0].answer: i for i in range(20)}
    return [positions[answer] for answer in answers]


def test_problems_are_prompts_padded_on_the_left(make):
    task = make()
    assert (task.max_prompt_length, task.max_response_length, task.eos_ids) == (512, SIZE, (EOS,))
    assert [task.num_problems(split) for split in tasks.SPLITS] == [20, 4, 5]
    found = task.problems("test", [4, 0])
    assert found.tokens.shape == (2, 512)
    assert found.tokens.dtype == found.length.dtype == np.int32
    for tokens, length, text in zip(
        found.tokens, found.length, ("What is 204 + 204?", "What is 200 + 200?"), strict=True
    ):
        assert task.decode(tokens[-length:]) == text
        assert not tokens[:-length].any()
    assert task.level("test", [4, 0, 1]).tolist() == ["test L0", "test L0", "test L1"]


def test_an_epoch_has_every_problem_once_and_seeds_differ(make):
    task = make()

    def walk(start, count):
        return [task.example("train", start + i)[0].question for i in range(count)]

    everything = {f"What is {i} + {i}?" for i in range(20)}
    first, second = walk(0, 20), walk(20, 20)
    assert set(first) == set(second) == everything
    assert first != second
    assert walk(1 << 20, 20) != first
    assert walk(3, 2) == first[3:5], "random access"


def test_verdicts(make):
    """Right, wrong, no answer, right in other words, unfinished thinking; each row has its own problem."""
    index = [0, 1, 2, 3, 4, 0]
    texts = [
        r"\boxed{400}",
        r"It is \boxed{400}.",
        "I do not know.",
        r"So $\boxed{\frac{812}{2}}$",
        "408",
        "<think>400",
    ]
    task = make()
    found = task.verify("test", index, *responses(*texts))
    R, W = Outcome.RIGHT, Outcome.WRONG
    assert found.outcome.tolist() == [R, W, W, R, R, W]
    np.testing.assert_array_equal(found.reward, [1, 0, 0, 1, 1, 0])
    assert (found.reward.dtype, found.outcome.dtype) == (np.float32, np.int32)
    assert found.terms == {}
    assert found.reasons == ()
    assert task.answers("test", index, *responses(*texts))[:3] == ["400", "400", None]


def test_rows_after_the_end_do_not_count(make):
    tokens, lengths = responses(r"\boxed{400}", r"\boxed{401}")
    tokens[0, lengths[0] :] = TOKENIZER(r"\boxed{1}" * SIZE)["input_ids"][: SIZE - lengths[0]]
    assert make().verify("test", [0, 0], tokens, lengths).outcome.tolist() == [Outcome.RIGHT, Outcome.WRONG]


def test_terms_are_weighted_and_kept_apart(make, tmp_path, monkeypatch):
    (tmp_path / "own_rewards.py").write_text(
        "def score(questions, responses, answers):\n"
        "    assert all(q.startswith('What is') for q in questions)\n"
        "    return [len(r) / 100 if a == '14' else -1.0 for r, a in zip(responses, answers)]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    reward = {"correct": 2.0, "format": 0.5, "function": "own_rewards:score", "function_weight": 10.0}
    task = make(reward=reward)
    found = task.verify("train", at(task, "14", "14", "16"), *responses(r"\boxed{14} ", "14", "0"))
    np.testing.assert_allclose(found.terms["correct"], [2, 2, 0])
    np.testing.assert_allclose(found.terms["format"], [0.5, 0, 0])
    np.testing.assert_allclose(found.terms["function"], [1.1, 0.2, -10], rtol=1e-6)
    np.testing.assert_allclose(found.reward, [3.6, 2.2, -10], rtol=1e-6)
    assert found.outcome.tolist() == [Outcome.RIGHT, Outcome.RIGHT, Outcome.WRONG]
    # What is for learning only is not asked of tests.
    tested = task.verify("test", [0, 1], *responses(r"\boxed{400}", "0"))
    assert tested.terms == {}
    np.testing.assert_array_equal(tested.reward, [2, 0])


def test_a_pattern_that_runs_for_ever_is_a_timeout(make):
    task = make(
        reward={"format": 0.5, "format_pattern": "(a+)+b", "function_batch_size": 1}, verifier={"time_limit": 2.0}
    )
    found = task.verify("train", [0, 0], *responses("a" * 60, "aab"))
    assert found.outcome.tolist() == [Outcome.TIMEOUT, Outcome.WRONG]
    np.testing.assert_allclose(found.reward, [0, 0.5])
    assert task.verify("test", [0], *responses("a" * 60)).outcome.tolist() == [Outcome.WRONG]


def test_thinking_that_the_prompt_opens_must_be_closed(make):
    """Templates as DeepSeek-R1's write `<think>` themselves: without `</think>` nothing is an answer yet."""
    texts = responses(r"so \boxed{400}", r"so</think>\boxed{400}")
    plain = make().verify("test", [0, 0], *texts)
    assert plain.outcome.tolist() == [Outcome.RIGHT, Outcome.RIGHT]
    task = make(prompt={"template": "plain", "text": "{question}<think>\n"})
    assert task.verify("test", [0, 0], *texts).outcome.tolist() == [Outcome.WRONG, Outcome.RIGHT]
    assert task.answers("test", [0, 0], *texts) == [None, "400"]


MARKS = [("<think>", "</think>"), *responses_module.KNOWN_MARKS, ("<|begin|>", "<|end|>")]


def marked_tokenizer(special, marks=MARKS):
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([AddedToken(m, special=special, normalized=False) for pair in marks for m in pair])
    return tokenizer


@pytest.mark.parametrize("special", [True, False])
def test_thoughts_are_in_the_marks_of_the_model(special):
    """Whether its tokenizer says that they are special tokens, which are no part of a text, or not."""
    tokenizer = marked_tokenizer(special)
    for begin, end in MARKS:
        setting = (begin, end) if (begin, end) == MARKS[-1] else ()
        texts = ResponseTexts(tokenizer, setting)
        ids = tokenizer(f"{begin}It is{end} 4</s>", add_special_tokens=False)["input_ids"]
        assert len(ids) == 10
        assert texts([ids, ids], [10, 4]) == ["<think>It is</think> 4", "<think>It "], begin
    # Marks that only text has, and text that only looks like marks of another tokenizer's.
    plain = byte_tokenizer()
    ids = plain("[unused16]a<|end|>")["input_ids"]
    assert ResponseTexts(plain)([ids], [len(ids)]) == ["[unused16]a<|end|>"]
    assert ResponseTexts(plain, MARKS[-1])([ids], [len(ids)]) == ["[unused16]a</think>"]


def test_unfinished_thoughts_have_no_answer_whatever_their_marks(make, tmp_path, monkeypatch):
    (tmp_path / "seen.py").write_text(
        "def score(questions, responses, answers):\n    return [float(r.count('<think>')) for r in responses]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    tokenizer = marked_tokenizer(True)
    begin, end = MARKS[1]
    texts = [
        rf"{begin}\boxed{{14}} but",
        rf"{begin}It is{end} \boxed{{14}}</s>",
        f"{begin}7 + 7 is 14, or",
        r"\boxed{14}",
    ]
    rows = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    padded, lengths = np.array([ids + [0] * (SIZE - len(ids)) for ids in rows]), [len(ids) for ids in rows]
    R, W = Outcome.RIGHT, Outcome.WRONG
    reward = {"format": 0.5, "format_pattern": "think_boxed", "function": "seen:score"}
    task = make(tokenizer=tokenizer, reward=reward)
    found = task.verify("train", at(task, *["14"] * 4), padded, lengths)
    assert found.outcome.tolist() == [W, R, W, R]
    np.testing.assert_allclose(found.terms["format"], [0, 0.5, 0, 0])
    np.testing.assert_allclose(found.terms["function"], [1, 1, 1, 0])
    assert task.answers("train", [0] * 4, padded, lengths) == [None, "14", None, "14"]
    opened = make(tokenizer=tokenizer, prompt={"template": "plain", "text": "{question}" + begin + "\n"})
    assert opened.verify("train", at(opened, *["14"] * 4), padded, lengths).outcome.tolist() == [W, R, W, W]


def test_what_follows_a_stop_string_is_not_judged(make):
    texts = responses(
        "It is 400\nQuestion 2: what?\n7", "so\nQuestion is 400", "<answer>400</answer> or <answer>7", "400"
    )
    R, W = Outcome.RIGHT, Outcome.WRONG
    assert make().verify("test", [0] * 4, *texts).outcome.tolist() == [W, R, W, R]
    task = make(stop=("\nQuestion 2", "\nQuestion", "</answer>"))
    found = task.verify("test", [0] * 4, *texts)
    assert found.outcome.tolist() == [R, W, R, R]
    assert task.answers("test", [0] * 4, *texts) == ["400", None, "400", "400"]
    assert stop_of(task).shape[1] == len(TOKENIZER)
    assert stop_of(make()) is None


def test_a_function_alone_decides(make, tmp_path, monkeypatch):
    (tmp_path / "lone_reward.py").write_text(
        "def score(questions, responses, answers):\n"
        "    if 'boom' in responses[0]:\n"
        "        raise RuntimeError('as told')\n"
        "    return [0.4 if r == 'meh' else float('nan') if r == 'nan' else 0.9 for r in responses]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    reward = {"correct": 0.0, "function": "lone_reward:score", "function_batch_size": 1}
    found = make(reward=reward).verify("test", [0] * 4, *responses("good", "meh", "boom", "nan"))
    assert found.outcome.tolist() == [Outcome.RIGHT, Outcome.WRONG, Outcome.ERROR, Outcome.ERROR]
    np.testing.assert_allclose(found.reward, [0.9, 0.4, 0, 0], rtol=1e-6)
    assert "as told" in found.reasons[2]
    assert found.reasons[3]
    assert not found.reasons[0]


def test_a_function_that_hangs_is_a_timeout(make, tmp_path, monkeypatch):
    (tmp_path / "slow_reward.py").write_text(
        "def score(questions, responses, answers):\n    while 'loop' in responses[0]:\n        pass\n    return [1.0]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    task = make(
        reward={"function": "slow_reward:score", "function_batch_size": 1, "function_weight": 1.0},
        verifier={"time_limit": 2.0},
    )
    found = task.verify("train", at(task, "14", "14"), *responses(r"loop \boxed{14}", r"\boxed{14}"))
    assert found.outcome.tolist() == [Outcome.TIMEOUT, Outcome.RIGHT]
    np.testing.assert_allclose(found.reward, [0, 2])
    np.testing.assert_allclose(found.terms["correct"], [0, 1], err_msg="no verdict, no part of a reward")


# Functions ----------------------------------------------------------------------------------------------------


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Writes a module of reward functions that verifier processes can import."""
    monkeypatch.syspath_prepend(tmp_path)

    def write_module(name, text):
        (tmp_path / f"{name}.py").write_text(textwrap.dedent(text))
        return name

    return write_module


def test_a_function_that_cannot_work_is_found_before_the_run(make, module):
    """It is called on gold answers: whatever it returns there that is no value for each is a refusal with the reason."""
    name = module(
        "useless",
        """
        import time

        def keywords(prompts=None, completions=None, **more): return [1.0] * (len(completions) - 1)
        def column(questions, responses, answers):
            import numpy as np
            return np.ones((len(responses), 1))
        def number(questions, responses, answers): return 0.5
        async def coroutine(completions, **columns): return [1.0] * len(completions)
        def dicts(questions, responses, answers): return [{"score": 1.0} for _ in responses]
        def raises(questions, responses, answers): return [float(answers[0].index("no"))]
        def hangs(questions, responses, answers): time.sleep(60)
        def infinite(questions, responses, answers): return [float("inf") for _ in responses]
        def wants(completions, solution, **columns): return [1.0] * len(completions)
        """,
    )
    said = {
        "keywords": "the function returned 1 values for 2 responses",
        "column": "array of shape (2, 1)",
        "number": "a value of type float",
        "coroutine": "an async function is not awaited",
        "dicts": "no number but a dict",
        "raises": "substring not found (useless.py",
        "hangs": "no verdict in 1 seconds",
        "infinite": "not a finite float32",
        "wants": "wants solution, and there is no such column; there are answer, answers, ",
    }
    for function, reason in said.items():
        for weight in (1.0, 0.0):
            if weight == 0.0 and function != "number":
                continue
            config = {"reward": {"function": f"{name}:{function}", "correct": weight}, "verifier": {"time_limit": 1.0}}
            with pytest.raises(ValueError, match=re.escape(reason)) as error:
                make(**config)
            assert f"{name}:{function}" in str(error.value)


def test_a_function_gets_columns_of_the_data_by_name(make, module, folder):
    rows = [row(i, unit="cm" if i % 2 else None, hints=["a", i]) for i in range(1, 9)]
    write(folder, "units.jsonl", rows)
    write(folder, "bare.jsonl", [{"question": f"And {i}?", "answer": str(i)} for i in range(50, 60)])
    name = module(
        "columns",
        """
        def ours(questions, responses, answers, unit, *, hints, levels, sources, response_lengths, prompt_lengths):
            assert {type(n) for n in (*response_lengths, *prompt_lengths)} == {int}
            return [
                float(h is None) if source == "bare" else float(h[1]) + 100 * (level == "L1") + 1000 * (u == "cm")
                for u, h, level, source in zip(unit, hints, levels, sources)
            ]

        def trl(prompts, completions, completion_ids, answer, **columns):
            assert all(p.startswith("Q: ") for p in prompts) and {"question", "level"} <= set(columns)
            return [float(len(ids) == len(c.encode()) + 1) for ids, c in zip(completion_ids, completions)]
        """,
    )
    prompt = {"template": "plain", "text": "Q: {question}"}
    task = make(text={"train": "units.jsonl + bare.jsonl"}, reward={"function": f"{name}:ours"}, prompt=prompt)
    index = {task.example("train", i)[0].answer: i for i in range(60)}
    wanted = {"2": 1101, "4": 2, "6": 1103, "55": 1}
    found = task.verify("train", [index[answer] for answer in wanted], *responses(*"abcd"))
    assert found.reasons == ()
    assert found.reward.tolist() == list(wanted.values())
    task = make(text={"train": "units.jsonl"}, reward={"function": f"{name}:trl"}, prompt=prompt)
    tried = make(text={"train": "units.jsonl"}, reward={"function": f"{name}:ours"}, prompt=prompt)
    assert task.digest == tried.digest == make(text={"train": "units.jsonl"}).digest, (
        "columns are no part of the problems"
    )
    assert task.verify("train", [0, 1], *responses("ab", "c")).reward.tolist() == [1, 1]


def test_several_functions_have_weights_and_none_does_not_apply(make, module):
    """A None or NaN leaves its own part out; a response has no verdict only where nothing applies, or something failed."""
    name = module(
        "several",
        """
        def short(questions, responses, answers):
            return [None if "skip" in r else float("nan") if "nan" in r else float(len(r) < 20) for r in responses]

        def loud(completions, **columns):
            if any("boom" in c for c in completions):
                raise RuntimeError("as told")
            return [None if "none" in c else float(c.isupper()) for c in completions]
        """,
    )
    both = f"{name}:short, {name}:loud"
    texts = [r"\boxed{14}", r"skip \boxed{14}", "nan", "NO", "skip none", "boom"]
    reward = {"function": both, "function_weights": (0.5, 0.25), "function_batch_size": 1}
    task = make(reward=reward)
    found = task.verify("train", at(task, *["14"] * 6), *responses(*texts))
    R, W, E = Outcome.RIGHT, Outcome.WRONG, Outcome.ERROR
    assert found.outcome.tolist() == [R, R, W, W, W, E]
    assert list(found.terms) == ["correct", "function_short", "function_loud"]
    np.testing.assert_array_equal(found.terms["function_short"], np.float32([0.5, np.nan, np.nan, 0.5, np.nan, 0]))
    np.testing.assert_array_equal(found.terms["function_loud"], np.float32([0, 0, 0, 0.25, np.nan, 0]))
    np.testing.assert_allclose(found.reward, [1.5, 1, 0, 0.75, 0, 0])
    assert [bool(reason) for reason in found.reasons] == [False] * 5 + [True]
    # Without correctness the mean of those that apply decides, by weight: 1 of 3 for "loud".
    task = make(reward=reward | {"correct": 0.0, "function_weights": (1.0, 2.0)})
    found = task.verify("test", [0] * 6, *responses(*texts))
    assert found.outcome.tolist() == [W, W, W, R, E, E]
    np.testing.assert_allclose(found.reward, [1, 0, 0, 3, 0, 0])
    assert "does not apply" in found.reasons[4]
    assert "as told" in found.reasons[5]


def test_a_function_that_applies_to_nothing_is_said(make, module):
    name = module("nowhere_applicable", "def f(completions, **columns): return [None] * len(completions)\n")
    task = make(reward={"function": f"{name}:f"})
    assert any("applies to none of 2 problems" in notice for notice in task.notices)
    assert not any("train" in notice and "applies" in notice for notice in make().notices)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"text": {"train": "nowhere.jsonl"}}, "nowhere.jsonl"),
        ({"prompt": {"template": "plain", "max_length": 5}}, "raise it"),
        ({"text": {"test": "validation.jsonl"}}, "validation"),
        ({"reward": {"function": "no_such_module:f"}}, "no_such_module"),
        ({"text": {"train": "broken.jsonl"}}, "do not verify against themselves"),
        ({"text": {"train": "train.jsonl?kind=magic"}}, "magic"),
    ],
)
def test_what_cannot_work_is_refused_before_the_run(config, message, make, folder):
    write(folder, "broken.jsonl", [row(1), {"question": "Why?", "answer": ""} | {"answer": "\\frac{"}])
    with pytest.raises((ValueError, OSError), match=message):
        make(**config)


def test_bad_gold_can_be_dropped_and_is_counted(make, folder):
    write(folder, "some_bad.jsonl", [row(1), {"question": "Why?", "answer": "\\frac{"}, row(2)])
    task = make(text={"train": "some_bad.jsonl"}, verifier={"bad_gold": "drop"})
    assert task.num_problems("train") == 2
    assert any("gold answer not verifiable 1" in notice for notice in task.notices)


def test_long_prompts_are_dropped_and_counted(make, folder):
    write(folder, "long.jsonl", [row(1), row(2, question="x" * 600), row(3)])
    task = make(text={"train": "long.jsonl"})
    assert task.num_problems("train") == 2
    assert any("too long 1" in notice for notice in task.notices)


def test_the_finite_part_of_an_endless_mixture_is_looked_at_too(make, folder):
    pytest.importorskip("reasoning_gym")
    write(folder, "mixed.jsonl", [row(1), row(2, question="x" * 600), {"question": "Why?", "answer": "\\frac{"}])
    task = make(text={"train": "mixed.jsonl?weight=1 + chain_sum?weight=1"}, verifier={"bad_gold": "drop"})
    assert task.num_problems("train") is None
    assert any("too long 1" in notice and "not verifiable 1" in notice for notice in task.notices)
    questions = {task.example("train", i)[0].question for i in range(20)}
    assert "What is 1 + 1?" in questions
    assert "Why?" not in questions


def test_training_problems_that_are_also_tested_are_dropped(make, folder):
    write(folder, "leaky.jsonl", [row(1), row(200), row(101), row(2)])
    assert make(text={"train": "leaky.jsonl"}).num_problems("train") == 2


def test_the_digest_follows_the_data(make, folder):
    write(folder, "a.jsonl", [row(1), row(2)])
    first = make(text={"train": "a.jsonl"}).digest
    assert make(text={"train": "a.jsonl"}).digest == first
    write(folder, "a.jsonl", [row(1), row(2, answer="5")])
    assert make(text={"train": "a.jsonl"}).digest != first


def test_a_generator_without_end(make):
    pytest.importorskip("reasoning_gym")
    task = make(text={"train": "chain_sum?max_terms=2", "validation": "chain_sum?max_terms=2&size=3"})
    assert task.num_problems("train") is None
    example, _ = task.example("train", (5 << 20) + 7)
    answer = eval(example.question.partition(":")[2].strip(" ="))
    found = task.verify("train", [(5 << 20) + 7] * 2, *responses(f"\\boxed{{{answer}}}", f"\\boxed{{{answer + 1}}}"))
    assert found.outcome.tolist() == [Outcome.RIGHT, Outcome.WRONG]


def test_a_tokenizer_of_another_language_is_noticed(folder):
    from r2vpo_jax.tasks.arithmetic import SYMBOLS
    from r2vpo_jax.tasks.embedded import make_tokenizer

    text = {"data_dir": str(folder)} | FILES
    config = build(TaskConfig, {"name": "text", "text": text, "prompt": {"template": "plain"}})
    task = tasks.make(config, make_tokenizer(SYMBOLS), (1,))
    assert any("unknown to the tokenizer" in notice for notice in task.notices)
    task.close()
