#!/usr/bin/env bash
# JAX 0.10.2: half of the rows of an array that is split over devices, split again, is first made whole on every device.
#
# Expected by most: with arguments and result split over 8 devices, each needs room for its eighth, and for what it sends.
# Seen: `jnp.take` along the split axis becomes an all-reduce of the whole result, on every device, before each keeps its
# part: temporaries of 16 times that part here. Sharding annotations do not help. A loop over another axis (`jax.lax.map`,
# here over layers) has one slice whole at a time. With a cache of keys and values of long responses on 16 TPUs, the move
# of half of its rows asks the TPU compiler for 115 GiB a chip at once, and for 3 GiB layer by layer.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/python -m pip install --quiet --disable-pip-version-check \
    jax==0.10.2 jaxlib==0.10.2
JAX_PLATFORMS=cpu XLA_FLAGS=--xla_force_host_platform_device_count=8 venv/bin/python -I - <<'PYTHON'
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

LAYERS, ROWS, SIZE, DEVICES = 16, 64, 1024, 8
mesh = jax.make_mesh((DEVICES,), ("devices",), axis_types=(AxisType.Auto,))
split = NamedSharding(mesh, PartitionSpec(None, "devices"))
of_layer = NamedSharding(mesh, PartitionSpec("devices"))
cache = jax.ShapeDtypeStruct((LAYERS, ROWS, SIZE), jnp.float32, sharding=split)
index = jax.ShapeDtypeStruct((ROWS // 2,), jnp.int32, sharding=of_layer)


def at_once(cache, index):
    return jax.lax.with_sharding_constraint(jnp.take(cache, index, axis=1), split)


def by_layer(cache, index):
    def rows(layer):
        return jax.lax.with_sharding_constraint(jnp.take(layer, index, axis=0), of_layer)

    return jax.lax.map(rows, cache)


whole = LAYERS * ROWS // 2 * SIZE * 4
for function in (at_once, by_layer):
    compiled = jax.jit(function, out_shardings=split).lower(cache, index).compile()
    memory = compiled.memory_analysis()
    name, part, temporaries = function.__name__, memory.output_size_in_bytes, memory.temp_size_in_bytes
    print(f"seen: {name}: a device's part of the result {part:,} bytes, temporaries {temporaries:,}")
    assert part == whole // DEVICES
    assert temporaries >= whole if function is at_once else temporaries < whole / 4
PYTHON
