#!/usr/bin/env bash
# wandb 0.31.0: when finish() returns, the file of an offline run may lack its end.
#
# Expected by most: what was logged is on disk when finish() has returned.
# Seen: of several runs of four steps with 1,500 numbers each, most files grow by up to 32 KiB, the block in hand, in the
# milliseconds after finish(). wandb.teardown() waits for it, as the end of the process does.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/python -m pip install --quiet --disable-pip-version-check wandb==0.31.0
WANDB_MODE=offline WANDB_SILENT=true WANDB_CONSOLE=off WANDB_ERROR_REPORTING=false venv/bin/python -I - <<'PYTHON'
import pathlib

import wandb

RUNS = 10
files, early = [], []
for number in range(RUNS):
    pathlib.Path(f"{number}").mkdir()
    run = wandb.init(project="p", dir=f"{number}", settings=wandb.Settings(reinit="create_new"))
    for step in range(4):
        run.log({f"value_{i}": i / 7 for i in range(1500)}, step=step, commit=True)
    run.finish()
    (file,) = pathlib.Path(f"{number}").glob("wandb/offline-run-*/*.wandb")
    files.append(file)
    early.append(file.stat().st_size)
wandb.teardown()
late = [file.stat().st_size for file in files]
shorter = sum(before < after for before, after in zip(early, late))
print(f"seen: {shorter} of {RUNS} files were shorter when finish() had returned than they are in the end")
print(f"seen: the first was {early[0]} bytes, and is {late[0]}")
assert shorter > 0
PYTHON
