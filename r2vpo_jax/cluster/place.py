"""Which processes a run has, and which of them this is: from flags, Cloud TPU, SLURM, Open MPI or Kubernetes."""

import dataclasses
import os
import warnings

import jax
from jax._src import clusters  # its own detection, which has no public name

from r2vpo_jax.errors import UsageError

# JAX's own choice for TPUs, 8482 since 0.8.1, is not among the ports that the firewall rule made by Google Cloud opens (8470,
# 8471, 8474, 8476, 11211): processes then wait for each other for ever (https://github.com/jax-ml/jax/issues/35905).
PORT = 8476


@dataclasses.dataclass(frozen=True)
class Place:
    """Of one process among the processes of a run."""

    coordinator: str  # host:port of process 0
    num_processes: int
    process_id: int
    local_devices: tuple[int, ...] | None = None  # GPUs that this process takes; None: all of its host

    @property
    def address(self) -> tuple[str, int]:
        """(host, port) of the coordinator."""
        host, _, port = self.coordinator.rpartition(":")
        return host.strip("[]"), int(port)


def find(
    distributed: bool | None = None,
    *,
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    timeout: float = 300,
) -> Place | None:
    """The place of this process; None where it is alone.

    Args:
      distributed: True: there must be a place; False: it is alone; None: what flags and environment say.
      coordinator_address, num_processes, process_id: from flags; what is None comes from the environment.
      timeout: seconds for a coordinator's name to become known.

    Raises:
      UsageError: contradictory, incomplete, or out of range.
    """
    flags = {
        "coordinator_address": coordinator_address,
        "num_processes": num_processes,
        "process_id": process_id,
    }
    given = [name for name, value in flags.items() if value is not None]
    if distributed is False:
        if given:
            raise UsageError(f"--{given[0]} contradicts --nodistributed; leave one of them out")
        return None
    address = coordinator_address or os.environ.get("JAX_COORDINATOR_ADDRESS")
    local = None
    if None in (address, num_processes, process_id):
        try:
            environment = _environment(given or distributed)
            if environment is not None:
                num_processes = environment.get_process_count() if num_processes is None else num_processes
                if num_processes > 1:
                    process_id = environment.get_process_id() if process_id is None else process_id
                    address = address or _coordinator(environment, timeout)
                    local = _local_devices(environment)
        except (OSError, RuntimeError, ValueError) as error:  # of the metadata server, or of a name that nobody knows
            raise UsageError(
                f"this host's cluster cannot be asked about its processes ({error}); give --coordinator_address, --num_processes and "
                "--process_id, or --nodistributed for a process that is alone"
            ) from error
    if num_processes == 1:
        return None  # nobody to wait for, and nothing that a coordinator would be good for
    if None in (address, num_processes, process_id):
        if not (given or distributed):
            return None
        values = {"coordinator_address": address, "num_processes": num_processes, "process_id": process_id}
        missing = ", ".join(f"--{name}" for name, value in values.items() if value is None)
        raise UsageError(
            f"several processes need {missing}: neither a flag nor the environment (Cloud TPU, SLURM, Open MPI) says it"
        )
    if not 0 <= process_id < num_processes:
        raise UsageError(f"--process_id={process_id} must be from 0 to {num_processes - 1}, --num_processes less one")
    if listed := os.environ.get("JAX_LOCAL_DEVICE_IDS"):
        local = tuple(int(number) for number in listed.split(","))
    return Place(_with_port(address), num_processes, process_id, local)


def _environment(asked):
    """JAX's description of the cluster that this process was started in, or None.

    Args:
      asked: whether somebody has said that there are several processes. If nobody has, a TPU that is not used, and a
        Kubernetes that cannot be asked, are no reason to look for others.
    """
    platforms = (jax.config.jax_platforms or "").split(",")
    with warnings.catch_warnings():
        if not asked:
            warnings.simplefilter("ignore")
        for kind in clusters.ClusterEnv._cluster_types:
            unused = _is_tpu(kind) and not asked and jax.config.jax_platforms and "tpu" not in platforms
            if not kind.opt_in_only_method and not unused and kind.is_env_present():
                return kind
    return None


def _is_tpu(kind) -> bool:
    return kind.name in ("gcetpu", "gketpu")


def _coordinator(environment, timeout: float) -> str:
    port = os.environ.get("JAX_COORDINATOR_PORT") or (str(PORT) if _is_tpu(environment) else None)
    return environment.get_coordinator_address(timeout_secs=int(timeout), override_coordinator_port=port)


def _local_devices(environment) -> tuple[int, ...] | None:
    """One GPU where a host has several processes, as JAX has it; all where it has one."""
    local = environment.get_local_process_id()
    tasks = os.environ.get("SLURM_STEP_TASKS_PER_NODE", "")  # 1(x2), or 4,2 where nodes differ
    if local is None or (environment.name == "slurm" and {t.partition("(")[0] for t in tasks.split(",")} == {"1"}):
        return None
    return (local,)


def _with_port(address: str) -> str:
    host, colon, port = address.rpartition(":")
    if not colon or address.endswith("]"):
        return f"{address}:{PORT}"
    if not port.isdigit() or not host:
        raise UsageError(f"--coordinator_address={address} must be host:port, such as host0:{PORT}")
    return address
