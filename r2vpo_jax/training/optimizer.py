"""AdamW with warm-up and decay, as the section `optimizer` says."""

import jax
import optax

from r2vpo_jax.config.run import OptimizerConfig
from r2vpo_jax.models import lora


def learning_rate_schedule(config: OptimizerConfig, num_updates: int = 0) -> optax.Schedule:
    """Warm-up, then constant, linear or cosine.

    Args:
      config: of the optimizer.
      num_updates: of the whole run, over which linear and cosine decay.
    """
    peak, end = config.learning_rate, config.learning_rate * config.final_fraction
    rest = max(num_updates - config.warmup_updates, 1)
    after = {
        "constant": optax.constant_schedule(peak),
        "linear": optax.linear_schedule(peak, end, rest),
        "cosine": optax.cosine_decay_schedule(peak, rest, config.final_fraction),
    }[config.schedule]
    if config.warmup_updates == 0:
        return after
    warmup = optax.linear_schedule(peak / config.warmup_updates, peak, max(config.warmup_updates - 1, 1))
    return optax.join_schedules([warmup, after], [config.warmup_updates])


def make_optimizer(config: OptimizerConfig, num_updates: int = 0) -> optax.GradientTransformation:
    """AdamW with a global-norm clip; weight decay on matrices only. Arguments as for `learning_rate_schedule`."""

    def is_matrix(params):
        names = ("kernel", "embed", "lm_head", *lora.FACTORS)
        return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key in names, params)

    return optax.chain(
        optax.clip_by_global_norm(config.max_grad_norm),
        optax.adamw(
            learning_rate_schedule(config, num_updates),
            b1=config.b1,
            b2=config.b2,
            eps=config.epsilon,
            weight_decay=config.weight_decay,
            mask=is_matrix,
        ),
    )
