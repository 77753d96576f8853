#!/usr/bin/env bash
# Math-Verify 0.9.0 with latex2sympy2_extended 1.11.0: 4.5E33 is a number, 4.5e33 is 4.5 times Euler's e times 33.
#
# Expected by most: both are 4.5 times 10 to the 33, as in Python, JSON and every programming language.
# Seen: with the small e the value is 403.66, the right answer 4.5 \times 10^{33} is wrong and 4.5 \cdot 33 e is right.
# In running text, without a box, either spelling is cut to 4.5.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/python -m pip install --quiet --disable-pip-version-check \
    math-verify==0.9.0 latex2sympy2_extended==1.11.0 sympy==1.14.0
venv/bin/python -I - <<'PYTHON'
from math_verify import parse, verify


def boxed(text):
    return parse(rf"\boxed{{{text}}}")


capital, small = boxed("4.5E33"), boxed("4.5e33")
value = float(small[0])
right, wrong = verify(small, boxed(r"4.5 \times 10^{33}")), verify(small, boxed(r"4.5 \cdot 33 e"))
print(f"seen: 4.5E33 is {float(capital[0])}, 4.5e33 is {small[0]} = {value:.2f}")
print(f"seen: gold 4.5e33, answer 4.5 x 10^33: {right}; answer 4.5 * 33 e: {wrong}")
assert float(capital[0]) == 4.5e33 and 403 < value < 404
assert wrong and not right
negative = boxed("1e-3")[0]
print(f"seen: 1e-3 is {negative} = {float(negative):.3f}")
assert float(negative) < 0
text = parse("The mass is 4.5e33 grams.")[0], parse("The mass is 4.5E33 grams.")[0]
print(f"seen: in running text: {text}")
assert text == (4.5, 4.5)
PYTHON
