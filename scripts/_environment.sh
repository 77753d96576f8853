# shellcheck shell=bash
# Sourced by the other scripts: a virtual environment in .venv with the pinned packages. Idempotent.
# PYTHON names the interpreter to use (default: the newest of python3.13, 3.12, 3.11 that is found).

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit

find_python() {
  local candidate
  for candidate in ${PYTHON:-python3.11 python3.12 python3.13 python3}; do
    if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  echo "error: Python 3.11 or newer with the venv module is needed; set PYTHON=/path/to/python3" >&2
  exit 2
}

# install EXTRAS: make .venv if needed; install when setup.py, the constraints or the extras changed.
install() {
  local extras=$1 stamp want
  if [ ! -x .venv/bin/python ]; then
    local python
    python=$(find_python) || exit 2
    echo "making .venv with $("$python" --version)"
    "$python" -m venv .venv
  fi
  stamp=.venv/.installed
  want="$extras $(cat setup.py constraints.txt | cksum)"
  if [ "$(cat "$stamp" 2>/dev/null)" != "$want" ]; then
    echo "installing r2vpo_jax$extras with pinned versions"
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".$extras"
    echo "$want" > "$stamp"
  fi
}
