"""Variance coefficient, variance budget and clip on the arithmetic task, at paired seeds.

`sweep_variance.py` is the full grid; `sweep_variance.py:smoke` is a few minutes on two CPU cores and shows
that everything works, not how the methods compare.
"""

from ml_collections import config_dict

from experiments.configs import arithmetic
from r2vpo_jax import config


def get_config(size: str = "full"):
    base = arithmetic.get_config()
    sweep = config.SweepConfig()
    if size == "smoke":
        sweep = config.SweepConfig(
            variance_coefs=(0.3, 3.0), variance_budgets=(0.001, 0.01), clips=(0.1, 0.3), seeds=(0, 1)
        )
        base.trainer.update(num_iterations=6, eval_every=2, eval_problems=64, test_problems=64, test_samples=8)
    elif size != "full":
        raise ValueError(f"sweep_variance.py:{size}: the sizes are full and smoke")
    return config_dict.ConfigDict({"base": base, "sweep": config.to_config_dict(sweep)})
