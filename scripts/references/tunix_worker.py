"""Evaluate tunix's losses and advantages on given arrays; compare_references.py runs it in tunix's environment.

    python tunix_worker.py ARRAYS.npz CASES.json RESULTS.npz

tunix's losses score tokens with a model before anything else; here that step returns the given log-probabilities.
"""

import importlib.metadata
import json
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tunix.rl import algo_core, function_registry


def loss(x, kind, inputs="advantages", weights=None, kl_loss_mode=None, **settings):
    """Value and gradient by `logp` of a registered loss. `weights` names the correction of the sampler's mismatch."""
    config = SimpleNamespace(
        **dict(beta=0.0, temperature=1.0, loss_algo="grpo", kl_clamp_value=None, entropy_coef=None) | settings,
        kl_loss_mode=kl_loss_mode,
    )
    example = SimpleNamespace(
        prompt_ids=None,
        completion_ids=None,
        completion_mask=x["mask"],
        advantages=x[inputs],
        old_per_token_logps=x["old_logp"],
        ref_per_token_logps=x["ref_logp"] if kl_loss_mode else None,
        sampler_is_weights=x[weights] if weights else None,
    )
    function = function_registry.get_policy_loss_fn(kind)

    def of_logp(logp):
        logits = jnp.zeros((*logp.shape, 2))  # for an entropy that is only reported
        algo_core.common.compute_per_token_logps = lambda *args, **kwargs: (logp, logits)
        return function(nnx.Module(), example, config, pad_id=0, eos_id=0)[0]

    value, gradient = jax.value_and_grad(of_logp)(x["logp"])
    return {"value": value, "gradient": gradient}


def value_loss(x, **settings):
    """Value and gradient by `values` of the registered loss of a critic."""
    example = SimpleNamespace(
        prompt_ids=None,
        completion_ids=x["mask"],
        completion_mask=x["mask"],
        old_values=x["old_values"],
        returns=x["returns"],
    )

    def of_values(values):
        # A score of each token and of the one before them; the last one is dropped.
        algo_core.common.compute_score = lambda *args, **kwargs: jnp.pad(values, ((0, 0), (0, 1)))
        return function_registry.get_value_loss_fn("ppo")(None, example, pad_id=0, eos_id=0, **settings)[0]

    value, gradient = jax.value_and_grad(of_values)(x["values"])
    return {"value": value, "gradient": gradient}


def advantage(x, kind, output=None, **settings):
    """A registered estimator of advantages; names of arrays among the settings stand for the arrays."""
    estimator = function_registry.get_advantage_estimator(kind)
    result = estimator(**{k: x[v] if isinstance(v, str) else v for k, v in settings.items()})
    return {"array": result if output is None else result[output]}


CALLS = {"loss": loss, "value_loss": value_loss, "advantage": advantage}


def main(arrays, cases, results):
    with np.load(arrays) as stored:
        x = {name: jnp.asarray(stored[name]) for name in stored.files}
    out = {"versions": ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("google-tunix", "jax"))}
    with open(cases, encoding="utf-8") as file:
        for i, settings in enumerate(json.load(file)):
            result = CALLS[settings.pop("call")](x, **settings)
            out |= {f"{i}_{name}": np.asarray(value) for name, value in result.items()}
    np.savez(results, **out)


if __name__ == "__main__":
    main(*sys.argv[1:])
