#!/usr/bin/env bash
# JAX 0.10.2: on CPUs two programs on two meshes that share no device run one after the other.
#
# Expected by most: programs on devices 0 and 1 and on devices 2 and 3, given out by two threads, run at the same time,
# as on accelerators; fake CPU devices are what such designs are tested on.
# Seen: a program on several devices of a process begins when the one before has ended, whatever its devices are. Programs
# on one device each do run at the same time. Across processes, each with an order of its own, collectives of the two
# meshes then wait for each other (not shown here, since it has no end).
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/python -m pip install --quiet --disable-pip-version-check \
    jax==0.10.2 jaxlib==0.10.2
JAX_PLATFORMS=cpu XLA_FLAGS=--xla_force_host_platform_device_count=4 venv/bin/python -I - <<'PYTHON'
import threading
import time

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec


class Program:
    """Spends a second on the host, on each of its devices; remembers when."""

    def __init__(self, devices):
        mesh, rows = Mesh(np.array(devices), ("x",)), PartitionSpec("x")

        def host(x):
            begin = time.perf_counter()
            time.sleep(1.0)
            self.spans.append((begin, time.perf_counter()))
            return x

        def on_each(x):
            return jax.pure_callback(host, jax.ShapeDtypeStruct(x.shape, x.dtype), x)

        self.function = jax.jit(jax.shard_map(on_each, mesh=mesh, in_specs=rows, out_specs=rows))
        self.argument = jax.device_put(np.ones((len(devices), 2), np.float32), NamedSharding(mesh, rows))
        self.spans = []
        self.run()

    def run(self):
        self.spans.clear()
        self.function(self.argument).block_until_ready()


def seconds_together(first, second):
    """How long both were at work at the same time, each in a thread of its own."""
    threads = [threading.Thread(target=program.run) for program in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (a, b), (c, d) = ((min(s)[0], max(end for _, end in s)) for s in (first.spans, second.spans))
    return max(0.0, min(b, d) - max(a, c))


devices, found = jax.devices(), {}
for size in (1, 2):
    found[size] = seconds_together(Program(devices[:size]), Program(devices[2 : 2 + size]))
    print(f"seen: programs on {size} + {size} devices, none in both: {found[size]:.2f} s at the same time")
assert found[1] > 0.5
assert found[2] == 0.0
PYTHON
