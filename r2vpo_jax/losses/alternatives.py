"""Several objectives in one program, of which a traced number picks one: runs of different objectives can be mapped over."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from r2vpo_jax.losses import registry
from r2vpo_jax.losses.arrays import unmasked
from r2vpo_jax.losses.core import Loss

SEPARATOR = "__"  # between an objective's place in the list and its hyper-parameter


@dataclasses.dataclass(frozen=True)
class Alternatives:
    """An objective that is any of these; `losses.get(Alternatives(...))` takes it like a name.

    It takes `which`, the place of the objective from 1, and the hyper-parameters of all of them as `{place}__{name}`.
    In a vmap over `which` all are computed, otherwise one is. Their slopes by logp are selected rather than their values
    differentiated: no infinity of one reaches another. Loss and gradient are those of the picked objective. Statistics
    are those that any of them reports; one that the picked objective does not report is 0.

    Attributes:
      names: of the objectives; one can be there twice, with other constants.
      constants: for each, pairs (hyper-parameter, value) that are fixed and so not taken: choices between texts.
    """

    names: tuple[str, ...]
    constants: tuple[tuple[tuple[str, Any], ...], ...]

    def hyperparameters(self) -> dict[str, Any]:
        """Every argument that a user could set, with its default."""
        taken = {"which": 1.0}
        for place, (name, fixed) in enumerate(zip(self.names, self.constants, strict=True), 1):
            own = registry.hyperparameters(name)
            taken |= {f"{place}{SEPARATOR}{key}": own[key] for key in own if key not in dict(fixed)}
        return taken

    def computed(self) -> tuple[str, ...]:
        """The arguments that training computes, of any of them."""
        return tuple(dict.fromkeys(key for name in self.names for key in registry.computed(name)))

    def __call__(
        self,
        logp,
        behavior_logp,
        advantages,
        mask,
        *,
        which,
        weights=None,
        reduction="token_mean",
        normalizer=None,
        **options,
    ) -> Loss:
        """As every objective."""
        shared = {"weights": weights, "reduction": reduction, "normalizer": normalizer}
        logp = unmasked(logp, jnp.asarray(mask).astype(bool))
        here = jax.lax.stop_gradient(logp)
        branches = []
        for place, (name, fixed) in enumerate(zip(self.names, self.constants, strict=True), 1):
            prefix = f"{place}{SEPARATOR}"
            own = {key.removeprefix(prefix): value for key, value in options.items() if key.startswith(prefix)}
            own |= dict(fixed) | {key: options[key] for key in registry.computed(name)}

            def of(x, name=name, own=own):
                return registry.get(name)(x, behavior_logp, advantages, mask, **shared, **own)

            branches.append(jax.value_and_grad(of, has_aux=True))

        reported = dict.fromkeys(key for branch in branches for key in jax.eval_shape(branch, here)[0][1])

        def with_all(branch):
            def complete(x):
                (value, stats), slope = branch(x)
                stats = {key: stats.get(key, (0.0, 1.0)) for key in reported}
                return value, jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), stats), slope

            return complete

        place = jnp.asarray(which, jnp.int32) - 1
        value, stats, slope = jax.lax.switch(place, [with_all(branch) for branch in branches], here)
        value, slope = jax.lax.stop_gradient((value, slope))
        # `here` cancels: the loss has the value picked, and the slope picked.
        return value + jnp.sum(jnp.where(slope == 0, 0.0, slope * (logp - here))), stats
