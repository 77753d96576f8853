"""The shipped run: R2VPO on the embedded arithmetic task, minutes on two CPU cores."""

from r2vpo_jax import config


def get_config():
    return config.make(
        objective={"variance_budget": 0.002},
        optimizer={"learning_rate": 1e-4},
        sampler={"group_size": 16},
        trainer={"prompts_per_rollout": 32, "num_minibatches": 4, "num_epochs": 2, "num_iterations": 80},
    )
