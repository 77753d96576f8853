"""R2VPO on one page: load, sample, verify, learn.

    python -m experiments.minimal

No files, no resume, no report: experiments/train.py has those, and comes to the same numbers.
"""

import functools

import jax
import numpy as np

from r2vpo_jax import advantages, config, sampler, sharding, tasks
from r2vpo_jax.models.base import open_base_model
from r2vpo_jax.training import update
from r2vpo_jax.training.optimizer import make_optimizer

NUM_ITERATIONS, PROMPTS, GROUP = 20, 32, 16


def main(num_iterations: int = NUM_ITERATIONS) -> list[dict]:
    """Fine-tune the shipped model on sums; returns a row of numbers for each iteration."""
    base = open_base_model(config.ModelConfig())
    model, task = base.model, tasks.ArithmeticTask()
    optimizers = update.Optimizers(make_optimizer(config.OptimizerConfig(learning_rate=1e-4, max_grad_norm=0.2)))
    objective = config.make_objective("r2vpo", dual={"budget": 0.0006, "coef": 2.0, "step": 0.15, "max_step": 0.5})
    settings = update.UpdateSettings(objective, group_size=GROUP, num_minibatches=4, num_epochs=2, micro_batch_size=8)
    sampling = sampler.Sampling(group_size=GROUP, max_response_length=task.max_response_length, eos_ids=task.eos_ids)
    mesh = sharding.make_mesh((1, 1, 1), jax.devices()[:1])
    state = update.init_state(base.load_params(), model, optimizers, settings)
    functions = update.UpdateFunctions(model, optimizers, settings)
    learn = jax.jit(functools.partial(update.train_on_rollout, functions=functions), donate_argnums=0)

    rows = []
    for iteration in range(num_iterations):
        problems = task.problems("train", np.arange(iteration * PROMPTS, (iteration + 1) * PROMPTS))
        key = jax.random.fold_in(jax.random.key(0), iteration)
        rollout = sampler.generate(
            model, state.params, problems.tokens, problems.length, key, sampling,
            mesh=mesh, problem_ids=problems.index, version=np.int32(state.version),
        )  # fmt: skip
        index = np.repeat(problems.index, GROUP)
        reward = task.verify("train", index, rollout.response_tokens, rollout.response_length).reward
        rollout = rollout.replace(reward=reward, advantage=advantages.group_relative(reward, GROUP))
        state, report = learn(state, rollout, jax.random.fold_in(key, 1))
        row = {
            "reward/mean": reward.mean(),
            "ratio/variance": report.variance_last,
            "dual/variance_coef": state.dual.variance_coef,
        }
        rows.append({name: float(value) for name, value in row.items()})
        print(iteration, rows[-1])
    return rows


if __name__ == "__main__":
    main()
