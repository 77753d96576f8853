"""The directory of one run: whose it is, and what is in it."""

import json
import pathlib

from r2vpo_jax import config as config_lib
from r2vpo_jax.config import Config
from r2vpo_jax.errors import UsageError
from r2vpo_jax.run import files


def claim(workdir, config: Config, *, write=True) -> pathlib.Path:
    """Make the directory this run's own, or find that it already is.

    Args:
      workdir: created if needed.
      config: the run's; written to config.json of a new directory.
      write: False on processes that only read.

    Raises:
      UsageError: the directory belongs to a run with another configuration, or cannot be written.
    """
    return claim_file(workdir, "config.json", config_lib.to_dict(config), write=write)


def claim_file(workdir, name: str, identity: dict, *, write=True, flag="--workdir") -> pathlib.Path:
    """`claim` for any JSON identity kept in `workdir/name`; `flag` is the one that names the directory."""
    path = pathlib.Path(workdir)
    mine = json.loads(json.dumps(identity))
    file = path / name
    if file.exists():
        try:
            theirs = dict(config_lib.leaves(json.loads(file.read_text())))
        except json.JSONDecodeError as error:
            raise UsageError(f"{file} is not valid JSON ({error}); choose another {flag}") from error
        flat = dict(config_lib.leaves(mine))
        differences = [
            f"{field}: {theirs.get(field, 'absent')} there, {flat.get(field, 'absent')} here"
            for field in sorted(theirs.keys() | flat.keys())
            if theirs.get(field) != flat.get(field)
        ]
        if differences:
            raise UsageError(
                f"{path} holds a run with another configuration ({'; '.join(differences[:4])}"
                f"{'; ...' if len(differences) > 4 else ''}); choose another {flag}"
            )
        return path
    if write:
        with files.disk_errors(f"{flag}={path}"):
            files.write_atomically(file, json.dumps(mine, indent=2) + "\n")
    return path
