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
    All are computed, which is cheap beside the model, and their slopes by logp are selected rather than their values
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
        picked = [jnp.asarray(which, jnp.float32) == place for place in range(1, len(self.names) + 1)]
        found = []
        for place, (name, fixed) in enumerate(zip(self.names, self.constants, strict=True), 1):
            prefix = f"{place}{SEPARATOR}"
            own = {key.removeprefix(prefix): value for key, value in options.items() if key.startswith(prefix)}
            own |= dict(fixed) | {key: options[key] for key in registry.computed(name)}
            function = registry.get(name)

            def of(x, function=function, own=own):
                return function(x, behavior_logp, advantages, mask, **shared, **own)

            found.append(jax.value_and_grad(of, has_aux=True)(here))

        def select(values):
            return jnp.select(picked, values)

        value, slope = select([value for (value, _), _ in found]), select([slope for _, slope in found])
        reported = dict.fromkeys(key for (_, stats), _ in found for key in stats)
        nothing = jnp.float32(0), jnp.float32(1)
        stats = {
            key: tuple(select([stats.get(key, nothing)[i] for (_, stats), _ in found]) for i in (0, 1))
            for key in reported
        }
        # `here` cancels: the loss has the value picked, and the slope picked.
        return value + jnp.sum(jnp.where(slope == 0, 0.0, slope * (logp - here))), stats
