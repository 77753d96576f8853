#!/usr/bin/env bash
# ml_collections 1.1.0: a tuple of strings given on the command line becomes a tuple of one string, without an error.
#
# Expected by most: --config.losses=grpo,dapo is two values, as --config.seeds=1,2 is; and '(a, b, c)' is the form that
# the library's own error message recommends for tuples.
# Seen: both give one string with the comma inside. Only quotes around each member, or the flag repeated, give two.
# Members that look like numbers stop being strings, and a tuple of integers takes fractions.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/python -m pip install --quiet --disable-pip-version-check \
    ml_collections==1.1.0 absl-py==2.5.1
venv/bin/python -I - <<'PYTHON'
import ast
import subprocess
import sys

CHILD = """
import sys
from absl import flags
from ml_collections import config_dict, config_flags

start = config_dict.ConfigDict({"losses": ("ppo",), "seeds": (0,)})
config = config_flags.DEFINE_config_dict("config", start)
flags.FLAGS(sys.argv)
print(dict(config.value))
"""


def read(*arguments):
    done = subprocess.run([sys.executable, "-I", "-c", CHILD, *arguments], capture_output=True, text=True, check=True)
    print(f"seen: {' '.join(arguments)} gives {done.stdout.strip()}")
    return ast.literal_eval(done.stdout)


assert read("--config.seeds=1,2")["seeds"] == (1, 2)
assert read("--config.losses=grpo,dapo")["losses"] == ("grpo,dapo",)
assert read("--config.losses=(grpo, dapo)")["losses"] == ("(grpo, dapo)",)
assert read("--config.losses=('grpo', 'dapo')")["losses"] == ("grpo", "dapo")
assert read("--config.losses=grpo", "--config.losses=dapo")["losses"] == ("grpo", "dapo")
assert read("--config.losses=1e-6")["losses"] == (1e-6,)
assert read("--config.seeds=0.5,1")["seeds"] == (0.5, 1)
PYTHON
