"""Every preset for 20 iterations of the arithmetic task, one seed: a smoke run, not evidence.

It shows that each objective trains through the same trainer by one name. The presets keep their own constants, of
which several are meant for other models and more data; nothing was tuned for any of them.
"""

from ml_collections import config_dict

from r2vpo_jax import config
from r2vpo_jax.config import grid


def get_config():
    base = config.named("arithmetic")
    base.trainer.update(num_iterations=20, eval_every=10, test_problems=256, test_samples=8, checkpoint_every=20)
    sweep = config.SweepConfig(cells=grid.values("objective.name", tuple(config.PRESETS)), seeds=(0,))
    return config_dict.ConfigDict({"base": base, "sweep": config.to_config_dict(sweep)})
