#!/usr/bin/env bash
# Install everything into .venv, then lint and test. `--all` adds the slow tests. Other arguments go to pytest.
set -euo pipefail
source "$(dirname "$0")/_environment.sh"
marker=(-m "not slow")
extras="[dev,reasoning]"
if [ "${1:-}" = --all ]; then
  shift
  marker=(-m "slow or not slow")
  extras="[browser,control,dev,docs,examples,reasoning,libtpu,trackers]"
fi
install "$extras"
echo "ruff"
.venv/bin/ruff check .
.venv/bin/ruff format --check .
echo "pytest"
# By file: what the tests of a file share is made once.
exec .venv/bin/python -m pytest "${marker[@]}" -n 2 --dist loadfile "$@"
