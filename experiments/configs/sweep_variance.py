"""Variance coefficient, variance budget and clip on the arithmetic task, at paired seeds.

`sweep_variance.py` is the full grid: as many values of its own coefficient for each method, from far too small to far
too large. `sweep_variance.py:smoke` is 24 short runs, minutes on two CPU cores: it shows that everything works, not how
the methods compare.
"""

from ml_collections import config_dict

from r2vpo_jax import config
from r2vpo_jax.config import grid

CLIP = ("objective.loss.options.clip_low", "objective.loss.options.clip_high")


def cells(coefs, budgets, clips):
    """Each method with its own coefficient."""
    return grid.chain(
        grid.product(grid.values("objective.name", "r2vpo_fixed"), grid.values("objective.dual.coef", coefs)),
        grid.product(grid.values("objective.name", "r2vpo"), grid.values("objective.dual.budget", budgets)),
        grid.product(grid.values("objective.name", "ppo_clip"), grid.values(CLIP, clips)),
    )


def get_config(size: str = "full"):
    base = config.named("arithmetic")
    if size == "full":
        sweep = config.SweepConfig(
            cells=cells((0.1, 0.5, 2.5, 12.5), (0.0002, 0.0006, 0.002, 0.006), (0.05, 0.1, 0.2, 0.4)), seeds=range(3)
        )
    elif size == "smoke":
        sweep = config.SweepConfig(cells=cells((0.3, 3.0), (0.001, 0.01), (0.1, 0.3)), seeds=range(4))
        base.trainer.update(num_iterations=4, eval_every=2, eval_problems=64, test_problems=64, test_samples=8)
    else:
        raise ValueError(f"sweep_variance.py:{size}: the sizes are full and smoke")
    return config_dict.ConfigDict({"base": base, "sweep": config.to_config_dict(sweep)})
