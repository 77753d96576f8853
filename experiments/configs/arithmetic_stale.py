"""R2VPO-OFF on the arithmetic task: every batch is trained on 16 iterations, 128 updates, after it was sampled.

The settings are those of the shipped run; only the queue's lag and the number of iterations differ (the first 16 fill
the queue). Chosen on the validation split.
"""

from r2vpo_jax import config


def get_config():
    run = config.named("arithmetic")
    run.replay.lag = 16
    run.trainer.update(num_iterations=120, eval_every=10)
    return run
