#!/usr/bin/env bash
# Math-Verify 0.9.0: below about 1e-16 every two decimals are equal, sign included.
#
# Expected by most: Planck's constant is not the mass of the electron, and nothing is its own negative.
# Seen: each of the three passes for each of the others, because the difference is rounded to decimal places and not to
# significant digits. `float_rounding`, the option whose name promises a remedy, changes nothing; `numeric_precision`
# does. The same numbers times 1e30 are told apart.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/python -m pip install --quiet --disable-pip-version-check \
    math-verify==0.9.0 latex2sympy2_extended==1.11.0 sympy==1.14.0
venv/bin/python -I - <<'PYTHON'
from itertools import permutations

from math_verify import parse, verify


def equal(gold, answer, **options):
    return verify(parse(rf"\boxed{{{gold}}}"), parse(rf"\boxed{{{answer}}}"), **options)


planck, electron_mass, electron_charge = r"6.626 \times 10^{-34}", r"9.109 \times 10^{-31}", r"-1.602 \times 10^{-19}"
for gold, answer in permutations((planck, electron_mass, electron_charge), 2):
    verdict = equal(gold, answer)
    rounding = equal(gold, answer, float_rounding=40)
    precision = equal(gold, answer, numeric_precision=50)
    print(f"seen: gold {gold}, answer {answer}: {verdict}")
    print(f"seen:   with float_rounding=40: {rounding}; with numeric_precision=50: {precision}")
    assert verdict and rounding and not precision
larger = equal(r"6.626 \times 10^{-4}", r"9.109 \times 10^{-1}")
print(f"seen: the first two times 1e30: {larger}")
assert not larger
PYTHON
