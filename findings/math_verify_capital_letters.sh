#!/usr/bin/env bash
# Math-Verify 0.9.0 with latex2sympy2_extended 1.11.0: capital and small letters are the same variable.
#
# Expected by most: with R the circumradius and r the inradius, R - r is not 0 and R / r is not 1.
# Seen: every symbol is made lower case before anything is compared, so the two radii cancel. There is a switch for it
# in latex2sympy2_extended, `lowercase_symbols`, whose default is True and which Math-Verify has no option for.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/python -m pip install --quiet --disable-pip-version-check \
    math-verify==0.9.0 latex2sympy2_extended==1.11.0 sympy==1.14.0
venv/bin/python -I - <<'PYTHON'
import inspect

from latex2sympy2_extended import latex2sympy
from latex2sympy2_extended.latex2sympy2 import ConversionConfig
from math_verify import LatexExtractionConfig, parse, verify

for gold, answer in (("R - r", "0"), (r"\frac{R}{r}", "1"), (r"n N", "n^2"), (r"A - a + B - b", "0")):
    parsed = parse(rf"\boxed{{{gold}}}")
    verdict = verify(parsed, parse(rf"\boxed{{{answer}}}"))
    print(f"seen: gold {gold} is read as {parsed[0]}; answer {answer}: {verdict}")
    assert verdict
kept = latex2sympy("R - r", conversion_config=ConversionConfig(lowercase_symbols=False))
print(f"seen: with lowercase_symbols=False the parser alone reads R - r as {kept}")
assert len(kept.free_symbols) == 2
options = {*inspect.signature(LatexExtractionConfig).parameters, *inspect.signature(parse).parameters}
print(f"seen: options of Math-Verify: {sorted(options)}")
assert not any("lower" in name or "conversion" in name for name in options)
PYTHON
