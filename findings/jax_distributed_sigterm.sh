#!/usr/bin/env bash
# JAX 0.10.2: after jax.distributed.initialize a process no longer ends at SIGTERM.
#
# Expected by most: SIGTERM ends a Python process that has no handler; schedulers rely on it.
# Seen: the process goes on to its last line and exits with 0. Initialization installs a handler in C++ that only takes
# a note for `reached_preemption_sync_point`; Python's signal.getsignal still says SIG_DFL, so nothing in Python shows
# it. With jax_enable_preemption_service off before initialization the process ends as usual.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/python -m pip install --quiet --disable-pip-version-check \
    jax==0.10.2 jaxlib==0.10.2
JAX_PLATFORMS=cpu venv/bin/python -I - <<'PYTHON'
import subprocess
import sys

CHILD = """
import os, signal, socket, sys, time
import jax

mode = sys.argv[1]
if mode == "service off":
    jax.config.update("jax_enable_preemption_service", False)
if mode != "not initialized":
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=1, process_id=0)
print("handler as Python sees it:", signal.getsignal(signal.SIGTERM).name, flush=True)
os.kill(os.getpid(), signal.SIGTERM)
time.sleep(2)
print("still here after two seconds", flush=True)
"""
code, said = {}, {}
for mode in ("not initialized", "initialized", "service off"):
    done = subprocess.run([sys.executable, "-I", "-c", CHILD, mode], capture_output=True, text=True, timeout=120)
    code[mode], said[mode] = done.returncode, done.stdout.strip().replace("\n", "; ")
    print(f"seen: {mode}: exit code {code[mode]}; {said[mode]}")
assert code == {"not initialized": -15, "initialized": 0, "service off": -15}
assert "still here" in said["initialized"] and "SIG_DFL" in said["initialized"]
PYTHON
