"""Which meshes there are, which of them arithmetic rules out, and the order to try the others in."""

import dataclasses

from jax.sharding import AbstractMesh

from planner.arithmetic import Arithmetic, Workload
from planner.topologies import Chip
from r2vpo_jax import models
from r2vpo_jax.sharding import MESH_AXES


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A mesh, and what is known of it before anything is compiled."""

    mesh: tuple[int, int, int]
    workload: Workload
    reason: str | None  # why not
    seconds: float  # of an iteration, at least; infinite with a reason
    memory: float | None = None  # GiB that it needs at least, where that is the reason


def meshes(devices: int) -> list[tuple[int, int, int]]:
    """All (data, fsdp, tensor) with this product."""
    divisors = [n for n in range(1, devices + 1) if devices % n == 0]
    return [(devices // n // t, n, t) for t in divisors for n in divisors if devices % (n * t) == 0]


def judge(
    config: models.DecoderConfig, chip: Chip, mesh: tuple[int, int, int], workload: Workload, attention: str
) -> Candidate:
    """One mesh; `workload.micro_batch_size` 0 means a row a device of data * fsdp."""
    data, fsdp, tensor = mesh
    parallel = data * fsdp
    workload = dataclasses.replace(workload, micro_batch_size=workload.micro_batch_size or parallel)
    count = Arithmetic(config, AbstractMesh(mesh, MESH_AXES), workload, attention)
    reason = memory = None
    if config.num_heads % tensor:
        reason = f"{config.num_heads} heads do not divide over {tensor}"
    elif workload.micro_batch_size % parallel or workload.minibatch % workload.micro_batch_size:
        reason = f"updates of {workload.minibatch} rows do not divide over {parallel} devices"
    elif workload.prompts_at_a_time % parallel:
        reason = f"{workload.prompts_at_a_time} prompts do not divide over {parallel} devices"
    else:
        memory, name = max((size / 2**30, name) for name, size in count.least_memory().items())
        if memory > chip.memory:
            reason = f"{name}: at least {memory:.1f} GiB"
    if reason:
        return Candidate(mesh, workload, reason, float("inf"), memory)
    traffic = count.estimated_traffic()
    step = count.decode_step(chip, traffic["step"]).serial
    update = count.update(chip, traffic["update"]).overlapped
    return Candidate(mesh, workload, None, count.iteration(chip, step, count.scoring(chip, 0).overlapped, update))


def candidates(
    config: models.DecoderConfig, chip: Chip, devices: int, workload: Workload, attention: str, *, fewer: bool
) -> list[Candidate]:
    """Every mesh of so many devices, the most promising first, those ruled out last.

    Args:
      fewer: where not all prompts of the workload can be sampled at one time, take half as many, and so on.
    """
    found = []
    for mesh in meshes(devices):
        sizes = [workload.prompts_at_a_time]
        while fewer and sizes[-1] % 2 == 0:
            sizes.append(sizes[-1] // 2)
        judged = [
            judge(config, chip, mesh, dataclasses.replace(workload, prompts_at_a_time=size), attention)
            for size in sizes
        ]
        found.append(next((candidate for candidate in judged if candidate.reason is None), judged[0]))
    return sorted(found, key=lambda candidate: candidate.seconds)
