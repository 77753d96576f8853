#!/usr/bin/env bash
# Fine-tune the shipped base model by R2VPO: no network after installation, no accelerator, minutes on two cores.
# Further flags go to experiments/train.py, for example:
#   bash scripts/quickstart.sh --workdir=runs/clip --config.objective.name=ppo_clip
set -euo pipefail
source "$(dirname "$0")/_environment.sh"
install "[reasoning]"
workdir=(--workdir=runs/quickstart)
for flag in "$@"; do
  case "$flag" in --workdir | --workdir=*) workdir=() ;; esac
done
exec .venv/bin/python -m experiments.train --config=experiments/configs/arithmetic.py "${workdir[@]}" "$@"
