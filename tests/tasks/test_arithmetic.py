"""The arithmetic task: its problems, its demonstrator and its verifier, against plain Python."""

import importlib.resources
import itertools
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from transformers import AutoTokenizer

from r2vpo_jax import tasks
from r2vpo_jax.config import ArithmeticConfig, TaskConfig
from r2vpo_jax.tasks import SPLITS, ArithmeticTask, Outcome, arithmetic
from r2vpo_jax.tasks.arithmetic import EOS, PAD, SYMBOLS
from r2vpo_jax.tasks.embedded import make_tokenizer

TASK = ArithmeticTask()  # two to four operands of two digits
N = 2048  # one shape, so that each function compiles once
INDEX = np.arange(N)
ID = {symbol: i for i, symbol in enumerate(SYMBOLS)}


@pytest.fixture(scope="module")
def problems():
    return {split: TASK.problems(split, INDEX) for split in SPLITS}


@pytest.fixture(scope="module")
def operands(problems):
    """split -> list of tuples of numbers, read from the prompts."""

    def read(split):
        p = problems[split]
        texts = [TASK.decode(row[-n:]) for row, n in zip(p.tokens, p.length, strict=True)]
        assert all(re.fullmatch(r"\d\d(\+\d\d){1,3}=", text) for text in texts)
        return [tuple(int(number) for number in text[:-1].split("+")) for text in texts]

    return {split: read(split) for split in SPLITS}


@pytest.fixture(scope="module")
def solutions():
    """Correct responses to the first train problems, (tokens [N, T], lengths [N])."""
    return tuple(map(np.asarray, TASK.demonstrations("train", INDEX, jax.random.key(0), 0.0, 0.0)))


# ---- problems ----


def test_splits_are_disjoint(operands):
    sets = {split: set(operands[split]) for split in SPLITS}
    for one, other in itertools.combinations(SPLITS, 2):
        assert not sets[one] & sets[other], (one, other)
    # Two operands have 10 000 pairs: without the rule the splits would share some.
    pairs = {split: {o for o in sets[split] if len(o) == 2} for split in SPLITS}
    assert all(len(p) > 300 for p in pairs.values())


def test_problems_cover_the_range(operands):
    for split in SPLITS:
        counts = np.bincount([len(o) for o in operands[split]], minlength=5) / N
        np.testing.assert_allclose(counts, [0, 0, 1 / 3, 1 / 3, 1 / 3], atol=0.05)
        numbers = [n for o in operands[split] for n in o]
        assert min(numbers) == 0
        assert max(numbers) == 99
        assert abs(np.mean(numbers) - 49.5) < 3


def test_prompts_are_left_padded(problems):
    for p in problems.values():
        assert p.tokens.shape == (N, TASK.max_prompt_length) == (N, 12)
        assert p.tokens.dtype == p.length.dtype == p.index.dtype == np.int32
        np.testing.assert_array_equal(p.index, INDEX)
        column = np.arange(12)
        np.testing.assert_array_equal(p.tokens == ID[PAD], column < 12 - p.length[:, None])
        assert set(p.length) == {6, 9, 12}


def test_a_problem_is_a_function_of_split_and_index(problems):
    order = np.random.default_rng(0).permutation(N)
    permuted = TASK.problems("train", order)
    np.testing.assert_array_equal(permuted.tokens, problems["train"].tokens[order])
    np.testing.assert_array_equal(permuted.length, problems["train"].length[order])
    again = ArithmeticTask().problems("train", INDEX)
    np.testing.assert_array_equal(again.tokens, problems["train"].tokens)
    far = TASK.problems("train", INDEX + 10**9)
    assert np.mean(np.any(far.tokens != problems["train"].tokens, axis=1)) > 0.99


def test_the_level_is_the_number_of_operands(operands):
    np.testing.assert_array_equal(TASK.level("test", INDEX), [len(o) for o in operands["test"]])


# ---- the demonstrator ----


def check_working(text, numbers):
    """Every step of a correct solution, in the free order of its digits."""
    expected_total, position = numbers[0], 0
    for number in numbers[1:]:
        carry = 0
        for column in range(2):
            x, y = expected_total // 10**column % 10, number // 10**column % 10
            first, second = int(text[position]), int(text[position + 2])
            assert sorted((first, second)) == sorted((x, y))
            value = x + y + carry
            carry = value >= 10
            mark = ";" if column == 1 else "c" if carry else "-"
            assert text[position + 1 : position + 6] == f"+{second}={value % 10}{mark}"
            position += 6
        expected_total = (expected_total + number) % 100
    assert text[position:] == f"{expected_total:02d}{EOS}"


def test_the_demonstrator_without_mistakes_is_right(solutions, operands):
    tokens, lengths = solutions
    assert tokens.shape == (N, TASK.max_response_length)
    assert lengths.max() == TASK.max_response_length == 39, "the longest solution just fits"
    for row, length, numbers in zip(tokens, lengths, operands["train"], strict=True):
        check_working(TASK.decode(row[:length]), numbers)
        assert set(row[length:]) <= {ID[PAD]}
    reward, outcome, *_ = TASK.verify("train", INDEX, tokens, lengths)
    assert reward.dtype == np.float32
    np.testing.assert_array_equal(reward, 1)
    np.testing.assert_array_equal(outcome, Outcome.RIGHT)


def test_both_orders_of_the_digits_occur(solutions, operands):
    first = np.array([int(SYMBOLS[t]) for t in solutions[0][:, 0]])
    units = np.array([(o[0] % 10, o[1] % 10) for o in operands["train"]])
    differ = units[:, 0] != units[:, 1]
    assert 0.4 < np.mean((first == units[:, 0])[differ]) < 0.6


def test_mistakes_are_made_as_often_as_asked(operands):
    """Always forgetting: no carry is ever marked, and all sums with one are wrong."""
    key = jax.random.key(1)
    tokens, lengths = map(np.asarray, TASK.demonstrations("train", INDEX, key, 1.0, 0.0))
    assert not np.any(tokens == ID["c"])
    _, outcome, *_ = TASK.verify("train", INDEX, tokens, lengths)
    without_carry = np.array(
        [all(sum(n % 10 for n in o[: k + 1]) < 10 for k in range(len(o))) for o in operands["train"]]
    )
    assert 100 < without_carry.sum() < N - 100
    np.testing.assert_array_equal(outcome == Outcome.RIGHT, without_carry)
    # A hard fact comes out one too large.
    tokens, lengths = map(np.asarray, TASK.demonstrations("train", INDEX, key, 0.0, 1.0))
    first, second, written = (tokens[:, c] - ID["0"] for c in (0, 2, 4))
    slipped = (written - first - second) % 10
    assert set(slipped) == {0, 1}
    # The same facts every time, whichever digit comes first.
    facts = {}
    for x, y, s in zip(first, second, slipped, strict=True):
        facts.setdefault((min(x, y), max(x, y)), set()).add(int(s))
    assert all(len(kinds) == 1 for kinds in facts.values())
    assert (len(facts), sum(kinds == {1} for kinds in facts.values())) == (55, 20)  # the shipped base knows these
    tokens, _ = map(np.asarray, TASK.demonstrations("train", INDEX, key, 0.0, 0.5))
    half = (tokens[:, 4] - tokens[:, 0] - tokens[:, 2] + ID["0"]) % 10
    assert 0.4 < np.mean(half[slipped == 1]) < 0.6
    assert np.all(half[slipped == 0] == 0)


def test_demonstrations_are_a_function_of_key_and_index(solutions):
    order = np.random.default_rng(1).permutation(N)
    permuted, _ = TASK.demonstrations("train", order, jax.random.key(0), 0.0, 0.0)
    np.testing.assert_array_equal(permuted, solutions[0][order])
    other, _ = TASK.demonstrations("train", INDEX, jax.random.key(1), 0.0, 0.0)
    assert np.any(np.asarray(other) != solutions[0])


# ---- the verifier ----


def verdict(response, length, numbers):
    """Plain Python: right if the text ends with `;`, the digits of the sum modulo 100, and the end of text."""
    if any(not 0 <= token < len(SYMBOLS) for token in response[:length]):
        return Outcome.ERROR
    ending = [ID[";"], *(ID[digit] for digit in f"{sum(numbers) % 100:02d}"), ID[EOS]]
    return Outcome.RIGHT if list(response[:length])[-4:] == ending else Outcome.WRONG


def random_tokens(tokens, lengths, generator):
    return generator.integers(0, len(SYMBOLS), tokens.shape), generator.integers(0, tokens.shape[1] + 1, len(lengths))


def truncated(tokens, lengths, generator):
    """Cut before the end, or some of the padding counted in."""
    return tokens, np.clip(lengths + generator.integers(-5, 5, len(lengths)), 0, tokens.shape[1])


def one_token_changed(tokens, lengths, generator):
    tokens = tokens.copy()
    tokens[INDEX, np.maximum(lengths - generator.integers(1, 6, N), 0)] = generator.integers(0, len(SYMBOLS), N)
    return tokens, lengths


def unknown_ids(tokens, lengths, generator):
    """Below 0 or beyond the symbols, sometimes behind the end, where nobody looks."""
    tokens = tokens.copy()
    where = np.minimum(lengths + generator.integers(-4, 4, N), tokens.shape[1] - 1)
    tokens[INDEX, where] = generator.choice([-1, 17, 31, 10**6], N)
    return tokens, lengths


def only_the_ending(tokens, lengths, generator):
    """The answer without any working: four tokens at the start, or with one of them cut off."""
    ending = np.stack([row[n - 4 : n] for row, n in zip(tokens, lengths, strict=True)])
    short = np.full_like(tokens, ID[PAD])
    shift = generator.integers(0, 2, N)
    for i in range(N):
        short[i, : 4 - shift[i]] = ending[i, shift[i] :]
    return short, 4 - shift


def another_problems_answer(tokens, lengths, _):
    return np.roll(tokens, 1, axis=0), np.roll(lengths, 1)


@pytest.mark.parametrize(
    ("change", "kinds"),
    [
        (random_tokens, {Outcome.WRONG}),
        (truncated, {Outcome.WRONG, Outcome.RIGHT}),
        (one_token_changed, {Outcome.WRONG, Outcome.RIGHT}),
        (unknown_ids, {Outcome.ERROR, Outcome.RIGHT}),
        (only_the_ending, {Outcome.WRONG, Outcome.RIGHT}),
        (another_problems_answer, {Outcome.WRONG, Outcome.RIGHT}),
    ],
)
def test_verdicts_are_those_of_plain_python(change, kinds, solutions, operands):
    tokens, lengths = change(*solutions, np.random.default_rng(2))
    tokens, lengths = tokens.astype(np.int32), lengths.astype(np.int32)
    reward, outcome, *_ = TASK.verify("train", INDEX, tokens, lengths)
    expected = [verdict(t, n, o) for t, n, o in zip(tokens.tolist(), lengths, operands["train"], strict=True)]
    np.testing.assert_array_equal(outcome, expected)
    assert set(expected) == kinds
    np.testing.assert_array_equal(reward, np.array(expected) == Outcome.RIGHT)


def test_generation_and_verification_can_be_traced():
    """Indices and responses may be tracers: a whole run can become one program."""
    size = TASK.max_response_length

    def program(index, responses, lengths, key):
        operands, count = arithmetic._operands(TASK, "train", index)
        prompts, _ = arithmetic._prompts(TASK, operands, count)
        demonstrations, _ = arithmetic._demonstrate(TASK, "train", index, key, 0.1, 0.1)
        return prompts, demonstrations, arithmetic._verify(TASK, "train", index, responses, lengths)

    shapes = jax.eval_shape(
        program, jnp.zeros(3, jnp.uint32), jnp.zeros((3, size), jnp.int32), jnp.zeros(3, jnp.int32), jax.random.key(0)
    )
    assert shapes[0].shape == (3, TASK.max_prompt_length)
    assert shapes[1].shape == (3, size)
    assert [x.shape for x in shapes[2]] == [(3,), (3,)]


# ---- sizes and ranges ----


def test_other_sizes():
    """Two operands of one digit: `7+5=`, then `7+5=2;2` and the end of text."""
    small = ArithmeticTask(min_operands=2, max_operands=2, num_digits=1)
    assert (small.max_prompt_length, small.max_response_length) == (4, 8)
    assert small.eos_ids == (ID[EOS],)
    assert tasks.make(TaskConfig(arithmetic=ArithmeticConfig(min_operands=2, max_operands=2, num_digits=1))) == small


@pytest.mark.parametrize(
    "sizes",
    [
        {"min_operands": 1},
        {"min_operands": 5, "max_operands": 4},
        {"max_operands": 10},
        {"num_digits": 0},
        {"num_digits": 7},
    ],
)
def test_sizes_out_of_range_raise(sizes):
    with pytest.raises(ValueError, match="task: "):
        ArithmeticTask(**sizes)


@pytest.mark.parametrize("index", [[0.5], [-1], [[1]], 3])
def test_bad_indices_raise(index):
    with pytest.raises(ValueError, match="problem indices"):
        TASK.problems("train", index)


def test_an_unknown_split_raises():
    with pytest.raises(ValueError, match="unknown split 'holdout'"):
        TASK.problems("holdout", np.arange(2))


# ---- text ----


def test_decode():
    assert TASK.decode(np.array([ID[c] for c in "47+85=c-;"])) == "47+85=c-;"
    assert TASK.decode([ID["1"], ID[EOS], ID[PAD], 17, -1]) == f"1{EOS}{PAD}??"


def test_the_tokenizer_speaks_the_task(tmp_path):
    tokenizer = make_tokenizer(SYMBOLS)
    TASK.check_tokenizer(tokenizer)
    text = "47+85+36=7+5=2c8+4=3;-68"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ids == [ID[c] for c in text]
    assert tokenizer.decode(ids) == text
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (ID[EOS], ID[PAD])


def test_reading_a_checkpoint_adds_no_token(tiny_checkpoint):
    """Next to the config.json of a Qwen2, Transformers is inclined to add that family's special tokens."""
    shipped = importlib.resources.files("r2vpo_jax") / "assets" / "models" / "arithmetic_base"
    for path in (tiny_checkpoint, shipped):
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
        TASK.check_tokenizer(tokenizer)
        assert len(tokenizer) == len(SYMBOLS), path


@pytest.mark.parametrize("change", [{"+": 13, "=": 12}, {";": None}])
def test_another_tokenizer_is_refused(change):
    vocabulary = {**ID, **change}
    vocabulary = {symbol: i for symbol, i in vocabulary.items() if i is not None}
    other = types.SimpleNamespace(get_vocab=lambda: vocabulary)
    with pytest.raises(ValueError, match="does not belong to the arithmetic task") as error:
        TASK.check_tokenizer(other)
    assert all(symbol in str(error.value) for symbol in change)
