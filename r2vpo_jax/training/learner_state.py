"""What training changes, as one tree, and what stays as it is beside it."""

from typing import NamedTuple

import jax
import optax
from flax import struct

from r2vpo_jax import dual
from r2vpo_jax.models import lora
from r2vpo_jax.training.critic import CriticState


class Optimizers(NamedTuple):
    """Of the policy, and of the value head if there is one."""

    policy: optax.GradientTransformation
    value: optax.GradientTransformation | None = None


@struct.dataclass
class LearnerState:
    """Everything that training changes, and the weights that are frozen beside adapters."""

    params: dict
    opt_state: optax.OptState  # of what is trained (`lora.split`)
    dual: dual.DualState
    kl_coef: jax.Array  # f32 [] beta, the weight of the KL divergence
    critic: CriticState | None  # the value head, if there is one
    version: jax.Array  # int32 [] optimizer updates done


def without_frozen(state: LearnerState) -> LearnerState:
    """What training changes, of a state or of a tree like it: what a checkpoint holds. Without adapters that is all."""
    return state.replace(params=lora.split(state.params)[0])


def frozen_of(state: LearnerState) -> dict:
    """The weights that `without_frozen` leaves out."""
    return lora.split(state.params)[1]


def with_frozen(state: LearnerState, frozen) -> LearnerState:
    """The whole state again, of the parts that `without_frozen` and `frozen_of` give."""
    return state.replace(params=lora.join(frozen, state.params))
