#!/usr/bin/env bash
# Start one run on every host of a Cloud TPU pod slice. Not tested on a pod by us; see BUILD.md.
#
#   bash scripts/launch_tpu_pod.sh NAME ZONE -- --config=experiments/configs/arithmetic.py --workdir=/shared/run --config.mesh.fsdp=-1 --config.mesh.data=1
#
# NAME is a TPU VM that exists. The checkout is copied to each host, into ~/r2vpo_jax, installed once, and experiments/train.py
# is started there on all of them with --distributed; MODULE=experiments.evaluate starts that. Weights and data must be on
# every host at the same path, the --workdir on a disk that all of them see.
set -euo pipefail
if [ $# -lt 4 ] || [ "$3" != -- ]; then
  sed -n 2,9p "$0" >&2
  exit 2
fi
name=$1 zone=$2
shift 3
cd "$(dirname "$0")/.."
archive=$(mktemp --suffix=.tar.gz)
trap 'rm -f "$archive"' EXIT
git archive --format=tar.gz -o "$archive" HEAD
gcloud compute tpus tpu-vm scp "$archive" "$name:r2vpo_jax.tar.gz" --zone="$zone" --worker=all
# No constraints here: the TPU extra chooses the libtpu that belongs to its JAX.
gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all --command "
  set -e
  mkdir -p r2vpo_jax && tar -xzf r2vpo_jax.tar.gz -C r2vpo_jax && cd r2vpo_jax
  [ -x .venv/bin/python ] || python3 -m venv .venv
  .venv/bin/python -m pip install --quiet -e '.[tpu,reasoning]'
  .venv/bin/python -m ${MODULE:-experiments.train} --distributed $(printf '%q ' "$@")
"
