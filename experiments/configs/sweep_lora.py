"""Does the budget of V have to be another where adapters are trained, at ten times the learning rate? (docs/lora.md)

Short runs of the arithmetic task at paired seeds: all weights, and adapters; each with the budget that was chosen for all
weights, and free (lambda stays at 0), which shows how large V becomes by itself.
"""

from ml_collections import config_dict

from r2vpo_jax import config

RATE = "optimizer.learning_rate"
FREE = {"objective.dual.coef": 0.0, "objective.dual.budget": 10.0}


def get_config():
    base = config.named("arithmetic")
    base.trainer.update(
        num_iterations=16,
        prompts_per_rollout=16,
        eval_every=16,
        eval_problems=64,
        test_problems=256,
        test_samples=8,
        checkpoint_every=16,
    )
    trained = ({RATE: 1e-4}, {RATE: 1e-3, "model.lora.rank": 8})
    cells = [{**what, **held} for what in trained for held in ({}, FREE)]
    sweep = config.SweepConfig(cells=cells, seeds=range(3))
    return config_dict.ConfigDict({"base": base, "sweep": config.to_config_dict(sweep)})
