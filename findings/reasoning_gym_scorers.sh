#!/usr/bin/env bash
# reasoning-gym 0.1.25: four generators give full marks to answers that have nothing to do with the question.
#
# Expected by most: score_answer is 1 for the answer and less for everything else.
# Seen on 50 problems each, with one fixed text for all of them: "I do not know" is a right answer of
# game_of_life_halting (any text is: bool of a string), "nan" of complex_arithmetic (min(1, NaN) is 1), "10 + 3 + 4 +
# 7" of puzzle24 (the numbers given in the question are not compared), and "0" earns 1 of nearly every coin_flip (every
# decimal below 1 begins with 0).
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/python -m pip install --quiet --disable-pip-version-check \
    reasoning-gym==0.1.25 sympy==1.14.0
venv/bin/python -I - <<'PYTHON'
import reasoning_gym

FIXED = {
    "game_of_life_halting": "I do not know",
    "complex_arithmetic": "nan",
    "puzzle24": "10 + 3 + 4 + 7",
    "coin_flip": "0",
}
PROBLEMS = 50
for name, answer in FIXED.items():
    problems = reasoning_gym.create_dataset(name, size=PROBLEMS, seed=0)
    full = sum(problems.score_answer(answer, problem) == 1 for problem in problems)
    distinct = len({problem["answer"] for problem in problems})
    print(f"seen: {name}: {answer!r} gets full marks on {full} of {PROBLEMS}; {distinct} different stored answers")
    assert full >= (0.8 if name == "coin_flip" else 1) * PROBLEMS
control = reasoning_gym.create_dataset("chain_sum", size=PROBLEMS, seed=0)
full = sum(control.score_answer("0", problem) == 1 for problem in control)
print(f"seen: chain_sum, for comparison: '0' gets full marks on {full} of {PROBLEMS}")
assert full < PROBLEMS / 10
PYTHON
