#!/usr/bin/env bash
# Optax 0.2.8: the norm of bfloat16 gradients depends on whether the layers are stacked.
#
# Expected by most: the global norm is a property of the numbers, up to rounding of a percent or so.
# Seen: a gradient in 960 arrays (80 layers of 12) has norm 16, the same numbers in 12 stacked arrays have norm 31. The
# sums of squares of the arrays are added one by one in bfloat16, and from 256 times a summand on nothing is added any
# more. So clip_by_global_norm(1) leaves a norm of 1.94.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/python -m pip install --quiet --disable-pip-version-check \
    optax==0.2.8 jax==0.10.2 jaxlib==0.10.2
JAX_PLATFORMS=cpu venv/bin/python -I - <<'PYTHON'
import jax
import jax.numpy as jnp
import optax


def exact_norm(tree):
    return float(sum(jnp.sum(jnp.square(x.astype(jnp.float32))) for x in jax.tree.leaves(tree)) ** 0.5)


LAYERS, ARRAYS = 80, 12
unit = jnp.full((64,), 0.125, jnp.bfloat16)  # of norm 1, exactly
by_layer = {f"layer_{i}": {f"w_{j}": unit for j in range(ARRAYS)} for i in range(LAYERS)}
stacked = {f"w_{j}": jnp.stack([unit] * LAYERS) for j in range(ARRAYS)}
trees = {"by layer": by_layer, "stacked": stacked}
norms = {name: float(optax.tree.norm(tree)) for name, tree in trees.items()}
clip = optax.clip_by_global_norm(1.0)
clipped = {name: exact_norm(clip.update(tree, clip.init(tree))[0]) for name, tree in trees.items()}
print(f"seen: exact {exact_norm(by_layer):.2f} and {exact_norm(stacked):.2f}; optax says {norms}")
print(f"seen: exact norm after clip_by_global_norm(1.0): {clipped}")
in_float32 = float(optax.tree.norm(jax.tree.map(lambda x: x.astype(jnp.float32), by_layer)))
print(f"seen: the same arrays in float32: {in_float32:.2f}")
assert norms["by layer"] == 16 and abs(norms["stacked"] / exact_norm(stacked) - 1) < 0.02
assert clipped["by layer"] > 1.8 and abs(clipped["stacked"] - 1) < 0.02
PYTHON
