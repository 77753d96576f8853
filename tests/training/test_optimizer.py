"""AdamW with warm-up and decay: its rate by update, what decays, what is clipped."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from r2vpo_jax.config import OptimizerConfig
from r2vpo_jax.training.optimizer import learning_rate_schedule, make_optimizer
from tests.helpers.params import random_params, with_config


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        # Peak 8. Warm-up over 4 updates is 2, 4, 6, 8; 20 updates in all.
        ({"schedule": "constant"}, {0: 2, 1: 4, 2: 6, 3: 8, 4: 8, 12: 8, 20: 8}),
        # Then from 8 to 2 over 16 updates: halfway at 12.
        ({"schedule": "linear"}, {0: 2, 3: 8, 4: 8, 8: 6.5, 12: 5, 20: 2, 30: 2}),
        # 2 + 6 (1 + cos(pi t)) / 2 with t = 1/4, 1/2, 1.
        ({"schedule": "cosine"}, {0: 2, 3: 8, 4: 8, 8: 2 + 3 * (1 + np.sqrt(0.5)), 12: 5, 20: 2, 30: 2}),
        ({"schedule": "linear", "warmup_updates": 0}, {0: 8, 10: 5, 20: 2}),
        ({"schedule": "constant", "warmup_updates": 1}, {0: 8, 1: 8}),
    ],
)
def test_learning_rate(settings, expected):
    config = OptimizerConfig(**{"learning_rate": 8.0, "warmup_updates": 4, "final_fraction": 0.25} | settings)
    schedule = learning_rate_schedule(config, num_updates=20)
    np.testing.assert_allclose([schedule(i) for i in expected], list(expected.values()), rtol=1e-6)


def test_weight_decay_is_for_matrices_only(tiny_model):
    """At gradient zero Adam does nothing, so what moves is decayed: by rate x decay = 0.05."""
    config = OptimizerConfig(learning_rate=0.5, weight_decay=0.1, warmup_updates=0)
    optimizer = make_optimizer(config, 10)
    untied = with_config(tiny_model[0], tie_word_embeddings=False)
    params = random_params(untied)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = jax.jit(lambda p, g: optimizer.update(g, optimizer.init(p), p))(params, zeros)
    moved = set()
    for path, leaf in jax.tree_util.tree_leaves_with_path(updates):
        name = path[-1].key
        if np.any(leaf != 0):
            moved.add(name)
            value = params
            for key in path:
                value = value[key.key]
            np.testing.assert_allclose(leaf, -0.05 * value, rtol=1e-5)
    assert moved == {"kernel", "embed", "lm_head"}


def test_the_gradient_is_clipped_by_its_global_norm():
    """(30, 40) has norm 50; clipped to 1 it is (0.6, 0.8). Seen in Adam's first moment, 0.1 of it."""
    config = OptimizerConfig(max_grad_norm=1.0, b1=0.9, warmup_updates=0)
    optimizer = make_optimizer(config, 10)
    params = {"a": {"kernel": jnp.zeros(1)}, "b": {"bias": jnp.zeros(1)}}
    grads = {"a": {"kernel": jnp.array([30.0])}, "b": {"bias": jnp.array([40.0])}}
    _, state = optimizer.update(grads, optimizer.init(params), params)
    mu = optax.tree_utils.tree_get(state, "mu")
    np.testing.assert_allclose([mu["a"]["kernel"][0], mu["b"]["bias"][0]], [0.06, 0.08], rtol=1e-5)
