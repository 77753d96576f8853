"""Generated problems: disjoint splits, random access, and the generators that cannot be used."""

import hashlib
import json
import pathlib
import subprocess
import sys

import pytest

from r2vpo_jax import data
from r2vpo_jax.data import generators, specs

reasoning_gym = pytest.importorskip("reasoning_gym")

FIXTURES = pathlib.Path(__file__).parent / "fixtures"
SMALL = "chain_sum?min_terms=2&max_terms=3&max_digits=1"  # some 3000 questions
WIDE = "chain_sum?min_terms=2&max_terms=3&min_digits=3"


def load(spec, split="train"):
    return data.load(spec, split)


def test_problem_i_is_the_first_of_its_candidates_that_falls_to_the_split():
    dataset = {split: load(WIDE, split) for split in ("train", "validation", "test")}
    source = reasoning_gym.create_dataset("chain_sum", seed=0, size=1000, min_terms=2, max_terms=3, min_digits=3)

    def falls_to(question):
        text = " ".join(question.split()).casefold()
        return ("train", "train", "validation", "test")[hashlib.sha256(text.encode()).digest()[0] % 4]

    for split, of_split in dataset.items():
        for i in range(12):
            entry = next(e for k in range(64) if falls_to((e := source[64 * i + k])["question"]) == split)
            found = of_split.example(i)
            assert (found.question, found.answer) == (entry["question"].strip(), entry["answer"])
            assert (
                found.level
                == f"num_terms={entry['metadata']['num_terms']} num_digits={entry['metadata']['num_digits']}"
            )
            assert (found.kind, found.source) == ("reasoning_gym", "chain_sum")


@pytest.mark.parametrize("position", [0, 3, 4, 5 << 20, (1023 << 20) + 999_999, 1 << 40, (7 << 40) + 12])
def test_gold_is_a_recipe_that_makes_the_problem_again(position):
    dataset = load(WIDE)
    example = dataset.example(position)
    recipe = json.loads(example.gold)
    assert sorted(recipe) == ["config", "dataset", "index", "seed"]
    assert 0 <= recipe["seed"] < 2**32
    made = reasoning_gym.create_dataset(recipe["dataset"], seed=recipe["seed"], **recipe["config"])
    entry = made[recipe["index"]]
    assert entry["question"].strip() == example.question
    assert made.score_answer(example.answer, entry) == 1


def test_candidates_are_those_of_no_other_position():
    def absolute(seed, position):
        return {sum(generators.candidate(seed, position, k)) for k in range(64)}

    positions = [0, 1, 2, 3, 4, 5, 1 << 20, (1 << 26) - 1, 1 << 26, 1 << 40, 2 << 40, 3 << 40]
    sets = [absolute(0, p) for p in positions] + [absolute(1, 0), absolute(2, 0)]
    assert len(set().union(*sets)) == 64 * len(sets)
    assert [generators.candidate(0, p, 5) for p in (0, 1, 4)] == [(0, 5), (0, 69), (256, 5)]
    # Some generators take seeds below 2 ** 32 only.
    assert max(max(found) for found in sets) < 2**32


def test_no_question_is_in_two_splits():
    found = {
        split: {load(SMALL + extra, split).example(i).question for i in range(300) for extra in ("", "&seed=3")}
        for split in ("train", "validation", "test")
    }
    assert all(len(questions) > 30 for questions in found.values())
    assert not found["train"] & found["validation"]
    assert not found["test"] & (found["train"] | found["validation"])


def test_another_seed_is_other_problems():
    questions = [{load(f"{WIDE}&seed={seed}").example(i).question for i in range(50)} for seed in (0, 1)]
    assert not questions[0] & questions[1]


def test_a_size_makes_it_finite_and_each_question_unique():
    dataset = load(f"{SMALL}&size=40", "validation")
    questions = [e.question for e in dataset.examples()]
    assert dataset.num_examples == len(set(questions)) == 40
    assert dataset.counts["generated"] == 40 + dataset.counts.get("duplicates", 0)
    assert dataset.example(39).question == questions[39]
    with pytest.raises(ValueError, match=r"only \d+ of size=400 problems are different"):
        load("chain_sum?min_terms=2&max_terms=2&max_digits=1&size=400", "test")
    train = load(f"{SMALL}&size=20")
    assert {train.example(i).question for i in range(20)} == {e.question for e in train.examples()}


def test_too_few_problems():
    # One problem only, of one split.
    dataset = [load("count_bits?min_n=5&max_n=5", split) for split in ("train", "validation", "test")]
    question = reasoning_gym.create_dataset("count_bits", seed=0, min_n=5, max_n=5)[0]["question"]
    theirs = (0, 0, 1, 2)[generators.quarter(question)]
    assert dataset.pop(theirs).example(0).question == question
    for others in dataset:
        with pytest.raises(ValueError, match=r"count_bits.* too few different problems: none of 64 falls to"):
            others.example(0)


def test_endless_data_in_mixtures():
    dataset = data.load(f"math?weight=1 + {SMALL}&weight=3", "train", FIXTURES)
    assert dataset.num_examples is None
    assert [e.source for e in dataset.examples()] == ["math"] * 20
    assert sorted(dataset.example(i).source for i in range(4)) == ["chain_sum"] * 3 + ["math"]
    kept = dataset.select([e.level == "Level 1" for e in dataset.examples()], "other")
    assert (len(list(kept.examples())), kept.counts["other"]) == (4, 16)
    assert data.disjoint({"train": dataset, "test": load(f"{SMALL}&size=9", "test")})["train"] is dataset
    with pytest.raises(ValueError, match="source 2 of the validation mixture is endless; say how many problems of it"):
        data.load(f"math?split=train + {SMALL}", "validation", FIXTURES)
    with pytest.raises(ValueError, match="chain_sum has no end"):
        load(SMALL).select([True], "other")


def test_the_digest_knows_the_recipe():
    specs_ = (SMALL, f"{SMALL}&seed=1", f"{SMALL}&size=9", WIDE)
    assert len({load(spec).digest for spec in specs_} | {load(SMALL, "test").digest}) == 5
    assert load(SMALL).digest == load("chain_sum?max_digits=1&max_terms=3&min_terms=2").digest


def test_other_processes_see_the_same():
    code = f"""
from r2vpo_jax import data
print(data.load({SMALL!r}, "train").digest, data.load({SMALL!r}, "train").example(99).question)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=FIXTURES.parents[2], capture_output=True, text=True, check=True
    )
    dataset = load(SMALL)
    assert done.stdout.strip() == f"{dataset.digest} {dataset.example(99).question}"


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("chain_sum?min_term=2", "there is no 'min_term' here; did you mean min_terms"),
        ("chain_sum?min_terms=two", "min_terms='two' is not a whole number"),
        ("chain_sum?min_terms=2.5", "min_terms='2.5' is not a whole number"),
        ("chain_sum?allow_negation=1", "allow_negation='1' is not true or false"),
        (
            "chain_sum?min_terms=5&max_terms=2",
            "max_terms must be >= min_terms; the parameters are min_terms=5, max_terms=2",
        ),
        ("countdown?max_target=50", "max_target must be >= min_target; .*min_target=100, max_target=50"),
        ("basic_arithmetic?operators=plus", "operators='plus' is not a JSON list"),
        ("aiw?task_types=x", "is not a JSON list"),
        ("time_intervals?min_time=3", "min_time is a time and cannot be set here"),
        ("chain_sum?size=0", "size='0' must be a whole number of at least 1"),
        ("chain_sum?size=1000000", "size=1000000 is above 100000"),
        ("chain_sum?seed=-1", "seed='-1' must be a whole number"),
        ("chain_sum?rows=:5", "there is no 'rows' here"),
        ("word_ladder", "cannot be used: its problems depend on the order of sets"),
        ("rush_hour", "cannot be used: its scorer does not accept the answer"),
        ("composite", "mixtures are written"),
        ("coin_flip", "gives full marks for wrong answers: '0'"),
        ("puzzle24", "any four numbers that make 24"),
    ],
)
def test_what_cannot_be_generated_is_refused(spec, said):
    with pytest.raises(ValueError, match=said):
        load(spec)


@pytest.mark.parametrize(
    ("text", "hint", "value"),
    [
        ("3", int, 3),
        ("3", float, 3.0),
        ("true", bool, True),
        ("5", str, "5"),
        ('["+","-"]', tuple, ["+", "-"]),
        ("[0.5, 1]", list[float], [0.5, 1]),
        ("banner", str | None, "banner"),
    ],
)
def test_values_of_parameters(text, hint, value):
    found = generators._value(specs.parse(f"x?y={text}")[0], "y", text, hint)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("isomorphic_strings", generators._UNORDERED),
        ("boxnet", generators._NO_ANSWER),
        ("coin_flip", f"{generators._PAYS}: '0' (6 of 8 problems)"),
        ("complex_arithmetic", f"{generators._PAYS}: 'nan' (8 of 8 problems)"),
        ("game_of_life_halting", f"{generators._PAYS}: 'I do not know' (8 of 8 problems)"),
        ("puzzle24", f"{generators._PAYS}: the answer of another problem (16 of 16 problems)"),
    ],
)
def test_the_probe_finds_unusable_generators(name, said):
    assert said in generators._probe(name, "{}")


def test_an_answer_that_is_right_by_chance_is_no_fault():
    def problem(others=(), **wrong):
        return {"wrong": wrong, "others": list(others)}

    assert generators._paid([problem(a=0.0, b=0.1)] * 8) == ""
    assert generators._paid([problem(a=1.0), *[problem(a=0.0)] * 7]) == ""
    assert generators._paid([problem(a=1.0), problem()]) == "", "a single try"
    assert generators._paid([problem(a=1.0, b=1.0)] * 2) == "'a' (2 of 2 problems), 'b' (2 of 2 problems)"
    assert (
        generators._paid([problem("a", a=1.0), problem("b", b=1.0)])
        == "the answer of another problem (2 of 2 problems)"
    )
    assert generators._paid([problem(nan=1.0), *[problem(nan=0.0)] * 7]) == "'nan' (1 of 8 problems)"


def test_scorers_that_evaluate_answers_are_refused_unless_allowed_or_behind_a_gate(monkeypatch):
    """As if nobody had looked at countdown: the probe sees that a number of its own is run as code."""
    assert load("countdown").example(0).kind == "reasoning_gym", "only sums are shown to its scorer"
    monkeypatch.delitem(generators.procedural.EVALUATED, "countdown")
    generators._probe.cache_clear()
    try:
        with pytest.raises(ValueError, match="evaluates what a response says as Python.*evaluated_answers=allow"):
            load("countdown")
        recipe = json.loads(load("countdown?evaluated_answers=allow").example(0).gold)
        assert recipe["evaluated_answers"] is True
        assert "evaluated_answers" not in json.loads(load("chain_sum").example(0).gold)
        with pytest.raises(ValueError, match="evaluated_answers='yes' is unknown; leave it out, or write allow"):
            load("countdown?evaluated_answers=yes")
    finally:
        generators._probe.cache_clear()


def test_the_probe_reports_what_fails_and_what_is_slow(monkeypatch):
    assert "it fails: " in generators._probe("chain_sum", '{"nope": 1}')
    monkeypatch.setattr(generators, "_PROBE_SECONDS", 0.05)
    assert "problems take more than 0 s" in generators._probe("gcd", "{}")


def test_sources_bound_to_a_size_are_random_access_too():
    # Entries of gsm_symbolic beyond its `size` raise IndexError.
    dataset = load("gsm_symbolic")
    for position in (3, 10_000, 1 << 40):
        recipe = json.loads(dataset.example(position).gold)
        assert recipe["index"] < 256
        made = reasoning_gym.create_dataset("gsm_symbolic", seed=recipe["seed"])[recipe["index"]]
        assert made["question"].strip() == dataset.example(position).question
