"""Host memory of the rollout path on 1, 2 and 4 processes of this machine, with rows of random tokens.

    python scripts/measure_host_memory.py [--prompts=64] [--samples=8] [--length=4096] [--processes 1 2 4]

Each process takes the path that a run takes from sampled tokens to what the learner is given: tokens fetched, rewards, the
numbers of rows that all must know, advantages, the replay buffer with its files, two batches drawn of the fresh and the
older one, and placed on the devices. Only model and verifiers are left out. Printed is the most that Python and NumPy have held at
one time on any of the processes (tracemalloc: buffers of devices do not count, though here they are memory of the host
too), and the files that each has written. "all" is with all rows on every process.
"""

import argparse
import functools
import gc
import json
import os
import pathlib
import socket
import subprocess
import sys
import tempfile
import tracemalloc

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # runs from a checkout, installed or not

import jax
import jax.numpy as jnp
import numpy as np

from r2vpo_jax import rows, sharding
from r2vpo_jax.config import ReplayConfig, make_objective
from r2vpo_jax.sampler.decoding import assemble
from r2vpo_jax.sampler.distribution import Sampling
from r2vpo_jax.sampler.home import make_home
from r2vpo_jax.training import credit
from r2vpo_jax.training.replay import ReplayBuffer

DEVICES, PROMPT = 4, 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=64, help="groups of a batch (default 64)")
    parser.add_argument("--samples", type=int, default=8, help="responses to a prompt (default 8)")
    parser.add_argument("--length", type=int, default=4096, help="tokens of a response (default 4096)")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4], help="numbers of them (default 1 2 4)")
    parser.add_argument("--process", nargs=4, help=argparse.SUPPRESS)  # number, id, port, all rows or own
    arguments = parser.parse_args()
    if arguments.process:
        _process(arguments)
        return
    batch = arguments.prompts * arguments.samples * (2 * arguments.length + PROMPT) * 4
    print(f"tokens and log-probabilities of a batch: {batch / 2**20:.0f} MiB")
    print("processes  rows      MiB at most  MiB written by each")
    last = arguments.processes[-1]
    for number, which in [(n, "own") for n in arguments.processes] + ([(last, "all")] if last > 1 else []):
        found = _measure(arguments, number, which)
        memory, written = (max(each[name] for each in found) / 2**20 for name in ("memory", "written"))
        print(f"{number:9}  {which:4}  {memory:15.1f}  {written:19.1f}")


def _measure(arguments, number, which) -> list[dict]:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    flags = f"--xla_force_host_platform_device_count={DEVICES // number}"
    sizes = [f"--{name}={getattr(arguments, name)}" for name in ("prompts", "samples", "length")]
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, *sizes, "--process", str(number), str(i), str(port), which],
            env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags},
            stdout=subprocess.PIPE,
            text=True,
        )
        for i in range(number)
    ]
    outputs = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        raise SystemExit("a process failed: what it said is above")
    return [json.loads(output.splitlines()[-1]) for output in outputs]


def _process(arguments) -> None:
    number, process, port, which = arguments.process
    if number != "1":
        jax.distributed.initialize(f"127.0.0.1:{port}", int(number), int(process))
    mesh = sharding.make_mesh((DEVICES, 1, 1))
    spread = (rows.rows_of if which == "own" else rows.all_rows)(mesh, arguments.prompts, arguments.samples)
    with tempfile.TemporaryDirectory() as folder:
        _take_the_path(spread, arguments.length, pathlib.Path(folder))  # what is imported and compiled does not count
        gc.collect()
        tracemalloc.start()
        _take_the_path(spread, arguments.length, pathlib.Path(folder))
        memory = tracemalloc.get_traced_memory()[1]
        written = sum(path.stat().st_size for path in pathlib.Path(folder).iterdir())
    print(json.dumps({"memory": memory, "written": written}))


def _take_the_path(spread: rows.Rows, length: int, folder: pathlib.Path) -> None:
    objective = make_objective(name="r2vpo_fixed")
    sampling = Sampling(group_size=spread.group_size, max_response_length=length)
    config = ReplayConfig(capacity=2, draw="mixed", stale_fraction=0.5, batches_per_iteration=2)
    replay = ReplayBuffer(folder, config, spread.group_size, write=jax.process_index() == 0, rows=spread)
    total = spread.num_groups * spread.group_size
    for iteration in range(2):
        home = make_home(spread, sampling)
        drawn = _random(jax.random.key(iteration), total, length, spread.mesh)
        home.keep(np.arange(total), *drawn, start=0, end=length)
        prompts = np.ones((len(spread.groups), PROMPT), np.int32), np.full(len(spread.groups), PROMPT), spread.groups
        rollout = assemble(np, *prompts, *home.fetch(), sampling=sampling, version=iteration)
        del home, drawn
        reward = (rollout.response_tokens[:, 0] % 2).astype(np.float32)
        ids = (iteration * total + spread.index).astype(np.int32)
        rollout = rollout.replace(reward=reward, outcome=reward.astype(np.int32), rollout_id=ids)
        spread.outline(rollout)
        placed = {} if spread.is_all else {"placed": spread.put(rollout), "fetch": spread.fetch}
        rollout = credit.fill_advantages(rollout, objective, spread.group_size, **placed)
        del placed
        replay.add(iteration, rollout, version=iteration)
        for number in range(2):
            batch = replay.draw(iteration, spread.num_groups, version=iteration, key=jax.random.key(0), number=number)
            jax.block_until_ready(spread.put(batch))
            del batch


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _random(key, number, length, mesh):
    tokens = jax.random.randint(key, (number, length), 0, 32000)
    made = tokens, -jax.random.exponential(key, tokens.shape), jnp.full(number, length), jnp.ones(number, bool)
    return tuple(jax.lax.with_sharding_constraint(x, sharding.batch_sharding(x.shape, mesh)) for x in made)


if __name__ == "__main__":
    main()
