"""Most tests here read the gradient from the parameters that one SGD step leaves, and compare with `jax.grad` of the
formula over the whole batch at once.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from r2vpo_jax.training.learner import Learner
from tests.helpers.learner import RATE
from tests.helpers.params import random_params
from tests.helpers.terms import OBJECTIVES, VALUE_RATE, weights_of


@pytest.fixture(scope="package")
def learners(tiny_model, tiny_config, mesh):
    """Learners by name, made once: SGD whose rate is part of the state, one minibatch of 16 rows, two epochs."""
    made = {}

    def make(name, micro_batch_size=4, packing=False):
        if (name, micro_batch_size, packing) not in made:
            config = tiny_config(
                # The budget and the step of the preset, not those of the tiny run.
                objective=OBJECTIVES[name]
                | {"dual": {"budget": None, "step": None} | OBJECTIVES[name].get("dual", {})},
                trainer={"micro_batch_size": micro_batch_size, "num_minibatches": 1, "packing": packing},
                optimizer={"value_learning_rate": VALUE_RATE},
            )
            optimizer = optax.inject_hyperparams(optax.sgd)(learning_rate=RATE)
            made[name, micro_batch_size, packing] = Learner(tiny_model[0], config, mesh, optimizer=optimizer)
        return made[name, micro_batch_size, packing]

    return make


@pytest.fixture(scope="package")
def params(tiny_model):
    """Random ones, flat, as in test_learner."""
    params = random_params(tiny_model[0])
    params["embed"] *= 0.5
    return params


@pytest.fixture(scope="package")
def head(tiny_model):
    """A value head that says something: (kernel, bias)."""
    kernel = 3 * np.random.default_rng(3).standard_normal(tiny_model[0].config.hidden_size)
    return kernel.astype(np.float32), np.float32(0.3)


@pytest.fixture(scope="package")
def forward(tiny_model, rollout):
    """(params, head) -> (logp, entropy, value), each [B, T], from a full forward pass; differentiable."""
    model, prompt = tiny_model[0], rollout.prompt_size
    column = np.arange(rollout.tokens.shape[1])
    valid = (column >= prompt - rollout.prompt_length[:, None]) & (column < prompt + rollout.response_length[:, None])

    def scores(params, head):
        hidden = model.apply({"params": params}, rollout.tokens, mask=valid, method="hidden_states")
        logits = model.apply({"params": params}, rollout.tokens, mask=valid)[:, prompt - 1 : -1]
        logps = jax.nn.log_softmax(logits)
        logp = jnp.take_along_axis(logps, rollout.tokens[:, prompt:, None], axis=-1)[..., 0]
        value = hidden[:, prompt - 1 : -1] @ head[0] / hidden.shape[-1] + head[1]
        return logp, -jnp.sum(jnp.exp(logps) * logps, axis=-1), value

    return scores


@pytest.fixture(scope="package")
def scored(forward, params, head):
    """NumPy (logp, entropy, value) under the parameters that all tests start from."""
    return jax.tree.map(np.asarray, jax.jit(forward)(params, head))


@pytest.fixture(scope="package")
def batch(rollout, scored):
    """Off-policy rows, ratios around 1 +- 0.2, one advantage a response; junk wherever nothing counts."""
    generator = np.random.default_rng(0)
    logp, _, value = scored
    mask = np.asarray(rollout.response_mask)

    def near(x, spread):
        return np.where(mask, x + spread * generator.standard_normal(x.shape), np.nan).astype(np.float32)

    behavior = near(logp, 0.2)
    return rollout.replace(
        behavior_logp=behavior,
        reference_logp=near(behavior, 0.3),
        advantage=(100 * generator.standard_normal(len(mask))).astype(np.float32),
        value=near(value, 0.3),
        value_target=near(value, 0.5),
    )


TERMS = dict.fromkeys(("variance", "behavior_kl", "corrected_kl", "reference_kl", "entropy", "value"), 0.0)


@pytest.fixture(scope="package")
def formula(forward):
    """Makes (loss, gradients by parameters and head) of every term there is, each times its coefficient."""

    def loss(trained, coefs, weight, share, data):
        """`share` multiplies a token's surrogate: importance weights, or 0 where a threshold cuts it off."""
        logp, entropy, value = forward(*trained)
        anchor, behavior, reference, advantage, old_value, target = data
        ratio = jnp.exp(jnp.where(weight > 0, logp - anchor, 0.0))
        x = jnp.where(weight > 0, logp - reference, 0.0)
        k3 = jnp.exp(-x) - 1 + x
        moved = old_value + jnp.clip(value - old_value, -0.2, 0.2)
        terms = -share * ratio * advantage
        terms += coefs["variance"] * (ratio - 1) ** 2
        terms += coefs["behavior_kl"] * (ratio - 1 - jnp.log(ratio))
        terms += coefs["corrected_kl"] * jnp.exp(jnp.where(weight > 0, logp - behavior, 0.0)) * k3
        terms += coefs["reference_kl"] * x**2 / 2
        terms -= coefs["entropy"] * entropy
        terms += coefs["value"] * jnp.maximum((value - target) ** 2, (moved - target) ** 2) / 2
        return jnp.sum(weight * terms)

    value_and_grad = jax.jit(jax.value_and_grad(loss))

    def make(trained, batch, reduction="token_mean", share=1.0, **coefs):
        weight = weights_of(batch, reduction)
        advantage = batch.advantage if batch.advantage.ndim == 2 else batch.advantage[:, None]
        anchor = batch.behavior_logp if batch.proximal_logp is None else batch.proximal_logp
        arrays = (anchor, batch.behavior_logp, batch.reference_logp, advantage, batch.value, batch.value_target)
        data = [np.where(weight > 0, x, 0.0).astype(np.float32) for x in arrays]
        share = np.broadcast_to(np.float32(share), weight.shape)
        assert coefs.keys() <= TERMS.keys()
        return value_and_grad(trained, TERMS | coefs, weight, share, data)

    return make
