#!/usr/bin/env bash
# Orbax 0.12.8: one metric that is NaN makes CheckpointManager delete the best checkpoint.
#
# Expected by most: with best_fn and max_to_keep=2 the two best checkpoints stay; NaN is never best.
# Seen: NaN is the best step of all, the checkpoint with 0.9 is deleted, and from then on the newest two stay, whatever
# they scored: the list is put in order by sorted(), which NaN breaks. Without the NaN the step with 0.9 stays.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/python -m pip install --quiet --disable-pip-version-check \
    orbax-checkpoint==0.12.8 jax==0.10.2 jaxlib==0.10.2
JAX_PLATFORMS=cpu venv/bin/python -I - <<'PYTHON'
import logging
import tempfile

import numpy as np
import orbax.checkpoint as ocp

logging.disable(logging.WARNING)


def kept(scores):
    """Steps kept and step called best, after each save."""
    options = ocp.CheckpointManagerOptions(max_to_keep=2, best_fn=lambda metrics: metrics["score"], best_mode="max")
    with tempfile.TemporaryDirectory() as folder, ocp.CheckpointManager(folder, options=options) as manager:
        states = []
        for step, score in enumerate(scores):
            manager.save(step, args=ocp.args.StandardSave({"w": np.ones(2)}), metrics={"score": score})
            manager.wait_until_finished()
            states.append((manager.all_steps(), manager.best_step()))
    return states


for scores in ([0.9, 0.1, 0.2, 0.3], [0.9, float("nan"), 0.2, 0.3]):
    states = kept(scores)
    for score, (steps, best) in zip(scores, states):
        print(f"seen: saved with {score}: kept {steps}, best {best}")
    steps, best = states[-1]
    if np.isnan(scores).any():
        assert states[1][1] == 1 and steps == [2, 3] and best == 3
    else:
        assert 0 in steps and best == 0
PYTHON
