"""Where things are, and the tiny task."""

import pathlib

ROOT = pathlib.Path(__file__).parent.parent.parent
# A base model of 3,000 parameters that is right now and then (tests/make_tiny_base.py).
TINY_BASE = ROOT / "tests" / "tiny_base"
# Two or three operands of one digit: prompts of 4 or 6 tokens, responses of up to 14.
TASK = {"min_operands": 2, "max_operands": 3, "num_digits": 1}
