"""Rollouts on devices of their own: which ones, and how the weights get there.

Each process gives its last devices to the sampler and learns on the others, so both meshes span all processes and a
rollout never leaves its process. One program cannot run on two sets of devices. So the learner's devices first arrange
the weights as the sampler has them, in one jitted program, which also converts them to the dtype of the sampler; each
piece is then copied from a device to a device of the same process.
"""

import collections
import itertools
import math

import jax
from jax.sharding import Mesh

from r2vpo_jax import sharding
from r2vpo_jax.config.run import RunMeshConfig
from r2vpo_jax.models import lora
from r2vpo_jax.run.instruments import Timers
from r2vpo_jax.training.learner import Learner
from r2vpo_jax.training.update import LearnerState


def make_meshes(config: RunMeshConfig, devices=None) -> tuple[Mesh, Mesh]:
    """(mesh that learns, mesh that samples); the same one unless the sampler has devices of its own.

    Args:
      config: of the run.
      devices: default all devices of all processes.

    Raises:
      ValueError: the devices cannot be divided so.
    """
    devices = list(jax.devices() if devices is None else devices)
    shape = (config.data, config.fsdp, config.tensor)
    if not config.sampler_devices:
        mesh = sharding.make_mesh(shape, devices)
        return mesh, mesh
    number, tensor = config.sampler_devices, config.sampler_tensor
    local = collections.defaultdict(list)
    for device in devices:
        local[device.process_index].append(device)
    each, left_over = divmod(number, len(local))
    if left_over:
        raise ValueError(
            f"mesh.sampler_devices={number} is not a multiple of the {len(local)} processes: each gives as many"
        )
    fewest = min(map(len, local.values()))
    if each >= fewest:
        raise ValueError(
            f"mesh.sampler_devices={number} leaves no device to learn on: "
            + (f"there are {len(devices)}" if len(local) == 1 else f"a process has {fewest} and would give {each}")
        )
    if each % tensor or any((len(mine) - each) % tensor for mine in local.values()):
        raise ValueError(
            f"mesh.sampler_tensor={tensor} must divide the devices that sample and those that learn, of each process: it "
            f"has {each} and {fewest - each}"
        )
    learning = [device for mine in local.values() for device in mine[:-each]]
    sampling = [device for mine in local.values() for device in mine[-each:]]
    try:
        learner = sharding.make_mesh(shape, learning)
    except ValueError as error:
        raise ValueError(f"{error} (mesh.sampler_devices={number} of {len(devices)} sample)") from error
    return learner, sharding.make_mesh((number // tensor, 1, tensor), sampling)


class SamplerWeights:
    """The learner's weights as the sampler computes with them, on its devices.

    Attributes:
      num_bytes: that all devices of the sampler together receive each time, without frozen weights, which stay; None: they are the learner's.
    """

    def __init__(self, learner: Learner, mesh: Mesh, timers: Timers):
        """Compile nothing yet.

        Args:
          learner: whose weights they are.
          mesh: of the sampler; from `make_meshes`.
          timers: "weights" is timed, where there is a way to go.
        """
        self._learner, self._timers, self.num_bytes = learner, timers, None
        self._separate = mesh is not learner.mesh
        if not self._separate:
            return
        through = sharding.make_mesh((-1, 1, mesh.shape["tensor"]), learner.mesh.devices.flat)
        axes, abstract = learner.logical_axes, jax.eval_shape(learner.as_compute, learner.abstract_params)
        there, arranged = (sharding.tree_shardings(axes, abstract, where) for where in (mesh, through))
        self._for_rollouts, self._for_scores = (
            _Move(how, arranged, there) for how in (learner.as_sampled, learner.as_compute)
        )
        self.num_bytes = sum(
            where.num_devices * x.dtype.itemsize * math.prod(where.shard_shape(x.shape))
            for x, where in zip(*(jax.tree.leaves(lora.split(tree)[0]) for tree in (abstract, there)), strict=True)
        )

    def for_rollouts(self, state: LearnerState, iteration: int) -> dict:
        """What the responses of an iteration are sampled with: rounded as `sampler.weights` says."""
        return self._moved(self._for_rollouts, state) if self._separate else self._learner.rollout_params(state)

    def for_scores(self, state: LearnerState) -> dict:
        """What responses are sampled with that are only scored."""
        return self._moved(self._for_scores, state) if self._separate else self._learner.sampler_params(state)

    def statistics(self) -> dict[str, int]:
        """For a row of metrics.jsonl."""
        return {} if self.num_bytes is None else {"weights/bytes": self.num_bytes}

    def _moved(self, move: "_Move", state: LearnerState) -> dict:
        # The updates before are no part of the time; nor may the next one begin to overwrite what is copied.
        jax.block_until_ready(state.params)
        with self._timers("weights"):
            return jax.block_until_ready(move(state.params))


class _Move:
    """Parameters as the sampler has them, on its devices. What is frozen beside adapters goes there once."""

    def __init__(self, how, arranged, there):
        self._arrange = [jax.jit(how, out_shardings=part) for part in lora.split(arranged)]
        self._there, self._frozen = lora.split(there), {}

    def __call__(self, params) -> dict:
        trained, frozen = lora.split(params)
        if frozen and not self._frozen:
            self._frozen = self._part(1, frozen)
        return lora.join(self._frozen, self._part(0, trained))

    def _part(self, number: int, params) -> dict:
        return jax.tree.map(_copied, self._arrange[number](params), self._there[number])


def _copied(x: jax.Array, there: jax.sharding.NamedSharding) -> jax.Array:
    """The array on other devices of the same processes, each of which finds its part on one of this process's."""
    held = collections.defaultdict(list)
    for shard in x.addressable_shards:
        held[_key(shard.index)].append(shard.data)
    turns = {part: itertools.cycle(copies) for part, copies in held.items()}
    wanted = there.addressable_devices_indices_map(x.shape)
    parts = [next(turns[_key(index)]) for index in wanted.values()]
    return jax.make_array_from_single_device_arrays(x.shape, there, jax.device_put(parts, list(wanted)))


def _key(index) -> tuple:
    return tuple((part.start, part.stop) for part in index)  # slices have no hash before Python 3.12
