"""The small key-value store that JAX's coordinator keeps in process 0, as long as that lives."""

from jax._src import distributed  # as multihost_utils and Orbax do: the store has no public name

_ROOT = "r2vpo_jax/"


class Store:
    """Short texts by name, seen by all processes.

    Raises:
      RuntimeError (of all methods): the coordinator does not answer.
    """

    def __init__(self):
        self._client = distributed.global_state.client

    def set(self, key: str, value: str) -> None:
        """Write, over what was there."""
        self._client.key_value_set(_ROOT + key, value, allow_overwrite=True)

    def under(self, folder: str) -> dict[str, str]:
        """All values below a folder, by the rest of their names."""
        prefix = f"{_ROOT}{folder}/"
        return {key.removeprefix(prefix): value for key, value in self._client.key_value_dir_get(prefix)}


def processes() -> tuple[int, int]:
    """(number of this process, of how many); (0, 1) where JAX was not started for several. Touches no device."""
    state = distributed.global_state
    return (state.process_id, state.num_processes) if state.client is not None else (0, 1)
