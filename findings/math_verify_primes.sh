#!/usr/bin/env bash
# Math-Verify 0.9.0 with latex2sympy2_extended 1.11.0: x' is x, A^T is A, and \gamma is the number 0.5772.
#
# Expected by most: a derivative is not the function, a transposed matrix not the matrix, and the Lorentz factor a variable.
# Seen: quotes are removed before anything is read, so the prime is lost; ^T after a letter transposes a symbol, which is
# nothing; \gamma is Euler's constant, whatever the formula, and \gamma_1 cannot be read.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/python -m pip install --quiet --disable-pip-version-check \
    math-verify==0.9.0 latex2sympy2_extended==1.11.0 sympy==1.14.0
venv/bin/python -I - <<'PYTHON'
from math_verify import parse, verify


def read(text):
    return parse(rf"\boxed{{{text}}}", fallback_mode="no_fallback")


for gold, answer in (("x' - x", "0"), ("A^T", "A"), (r"\gamma m c^2", "0.5772156649015329 m c^2")):
    parsed = read(gold)
    verdict = verify(parsed, read(answer))
    print(f"seen: gold {gold} is read as {parsed[0]}; answer {answer}: {verdict}")
    assert verdict
gamma, beta = read(r"\gamma_1"), read(r"\beta_1")
print("seen: gamma with an index is read as", gamma or "nothing", "and beta with one as", beta[0])
assert not gamma
assert beta
PYTHON
