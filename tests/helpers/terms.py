"""What the learner adds to an objective, term by term: objectives, batches and updates for tests/training/terms."""

import jax
import jax.numpy as jnp
import numpy as np

from r2vpo_jax import sharding
from tests.helpers.learner import RATE

COEF = 2.5
_BONUS = {
    "name": "policy_gradient",
    "loss": {"entropy_coef": 2.0},
    "kl": {"coef": 1.0, "corrected": True},
}
OBJECTIVES = {
    "token_mean": {"name": "r2vpo", "dual": {"coef": COEF}},
    "constant_length": {
        "name": "r2vpo_fixed",
        "loss": {"reduction": "constant_length"},
        "dual": {"coef": COEF, "normalize": True},
    },
    "sequence_mean": {"name": "ppo_kl", "loss": {"reduction": "sequence_mean"}},
    "m2po": {"name": "m2po", "loss": {"options": {"budget": 0.01}}},
    "bonus": _BONUS,
    "idle_critic": _BONUS | {"advantage": {"estimator": "gae", "value_coef": 0.0}},
    "critic": {
        "name": "policy_gradient",
        "advantage": {"estimator": "gae", "value_coef": 0.7},
        "kl": {"coef": 1.0, "estimator": "k2", "target": 0.01},
        "correction": {"mode": "truncate", "max_weight": 2.0},
    },
}
OBJECTIVES |= {
    "corrected_behavior_kl": {"name": "ppo_kl", "correction": {"mode": "truncate"}},
    "imitation": {"name": "policy_gradient", "loss": {"imitation_coef": 0.7}},
    "left_out": {
        "name": "policy_gradient",
        "correction": {
            "mode": "truncate",
            "max_weight": float("inf"),
            "filter": "geometric",
            "filter_high": 1.002,
            "off_policy_threshold": 0.5,
        },
    },
    "vcpo": {"name": "vcpo", "loss": {"reduction": "token_mean"}},
}
VALUE_RATE = 0.1

# Four groups of four: two are dropped, and two rows more. Row i is in micro-batch i % 4: of the second none is left.
KEEP = np.ones(16, bool)
KEEP[[1, 4, 5, 6, 7, 8, 9, 10, 11, 13]] = False


def per_token(batch):
    """The same with an advantage for each token, of size 1."""
    advantage = np.random.default_rng(4).standard_normal(batch.behavior_logp.shape)
    return batch.replace(advantage=np.where(batch.response_mask, advantage, np.nan).astype(np.float32))


def garbage(batch):
    """What does not take part spoiled beyond use."""
    rows = ~batch.keep

    def spoil(x, value):
        if x is None:
            return None
        return np.where(rows[:, None] if x.ndim == 2 else rows, np.float32(value), x)

    spoiled = {"behavior_logp": np.nan, "reference_logp": -np.inf, "advantage": np.inf, "reward": np.nan}
    spoiled |= {"value": np.nan, "value_target": np.inf, "proximal_logp": np.nan, "weights": np.inf}
    return batch.replace(**{name: spoil(getattr(batch, name), value) for name, value in spoiled.items()})


def start(learner, params, *, rate=RATE, head=None, kl_coef=None):
    """A fresh state with this rate, value head and weight of the KL."""
    state = learner.init_state(params)
    hyperparams = {**state.opt_state.hyperparams, "learning_rate": jnp.float32(rate)}
    state = state.replace(opt_state=state.opt_state._replace(hyperparams=hyperparams))
    if head is not None:
        state = state.replace(critic=state.critic.replace(kernel=jnp.asarray(head[0]), bias=jnp.asarray(head[1])))
    return state if kl_coef is None else state.replace(kl_coef=jnp.float32(kl_coef))


def update(learner, params, batch, **changes):
    """(gradients, Stats, state) of one update from `start`."""
    after, stats = learner.update(start(learner, params, **changes), sharding.put_batch(batch, learner.mesh))
    after, stats = sharding.to_host((after, stats))
    assert stats.mean("nonfinite") == 0
    return jax.tree.map(lambda new, old: (old - new) / RATE, after.params, params), stats, after


def weights_of(batch, reduction):
    """What each token's term is multiplied by, from the definition of the reduction over the rows kept."""
    mask = np.asarray(batch.response_mask) & batch.keep[:, None]
    return {
        "token_mean": mask / mask.sum(),
        "sequence_mean": mask / np.maximum(mask.sum(axis=1, keepdims=True), 1) / batch.keep.sum(),
        "constant_length": mask / (batch.keep.sum() * mask.shape[1]),
    }[reduction].astype(np.float32)


def corrected(batch, scored):
    """As `_with_correction` leaves it, with weights of its own to tell them from others."""
    generator = np.random.default_rng(6)
    mask = np.asarray(batch.response_mask)
    near = scored[0] + 0.2 * generator.standard_normal(mask.shape)
    weights = generator.uniform(0.5, 2.0, mask.shape)
    return batch.replace(
        proximal_logp=np.where(mask, near, np.nan).astype(np.float32),
        weights=np.where(mask, weights, np.nan).astype(np.float32),
    )
