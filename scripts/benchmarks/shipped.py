"""Speed of the shipped run's parts: rollout, update and verifiers, as ratios within one run."""

import dataclasses
import time

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import verifiers
from experiments.configs import arithmetic
from r2vpo_jax import config as config_lib
from r2vpo_jax import models, sampler, sharding, tasks
from r2vpo_jax.models.base import open_base_model
from r2vpo_jax.training.learner import Learner

ROUNDS = 5


def median_seconds(function) -> float:
    jax.block_until_ready(function())  # compile
    times = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        jax.block_until_ready(function())
        times.append(time.perf_counter() - start)
    return float(np.median(times))


def run() -> None:
    """Print everything."""
    config = config_lib.from_flags(arithmetic.get_config())
    task, mesh = tasks.make(config.task), sharding.make_mesh((-1, 1, 1))
    base = open_base_model(config.model)
    model, params = base.model, base.load_params()
    settings = sampler.Sampling(
        group_size=config.sampler.group_size, max_response_length=task.max_response_length, eos_ids=task.eos_ids
    )
    num_prompts = config.trainer.prompts_per_rollout // config.trainer.num_minibatches
    problems = task.problems("train", np.arange(num_prompts))

    def rollout_of(model, settings):
        return sampler.generate(
            model,
            jax.tree.map(jnp.asarray, params),
            problems.tokens,
            problems.length,
            jax.random.key(0),
            settings,
            mesh=mesh,
            problem_ids=problems.index,
        )

    rollout = rollout_of(model, settings)
    tokens = int(rollout.response_length.sum())
    batch = sharding.put_batch(rollout.replace(advantage=np.ones_like(rollout.advantage)), mesh)

    def with_decoder(**changes):
        return models.Decoder(dataclasses.replace(model.config, **changes))

    def update_seconds(model, micro_batch_size):
        sized = dataclasses.replace(config.trainer, micro_batch_size=micro_batch_size)
        learner = Learner(model, dataclasses.replace(config, trainer=sized), mesh)
        state = learner.init_state(params)

        def step():
            nonlocal state
            state, stats = learner.update(state, batch)
            return stats

        return median_seconds(step)

    def show(name, seconds, reference):
        print(f"{name:44s} {tokens / seconds:10.0f} tokens/s   x {reference / seconds:.2f}", flush=True)

    print(f"{jax.devices()[0].device_kind}, {tokens} response tokens a call; x is the speed over the first line\n")
    reference = median_seconds(lambda: rollout_of(model, settings))
    show("rollout, unrolled layers, shared prefill", reference, reference)
    show(
        "rollout, scanned layers",
        median_seconds(lambda: rollout_of(with_decoder(scan_layers=True), settings)),
        reference,
    )
    print()
    shipped = config.trainer.micro_batch_size
    reference = update_seconds(model, shipped)
    show(f"update, micro-batch {shipped} (shipped)", reference, reference)
    for size in (8, 16, 32, 64):
        if size != shipped and len(rollout.reward) % size == 0:
            show(f"update, micro-batch {size}", update_seconds(model, size), reference)
    show("update, scanned layers", update_seconds(with_decoder(scan_layers=True), shipped), reference)
    show(
        "update, scanned layers, remat", update_seconds(with_decoder(scan_layers=True, remat=True), shipped), reference
    )

    print()
    verifiers.run(seconds=2.0)
