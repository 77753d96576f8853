"""What a path to a model can mean: a Hugging Face directory, or one of our run directories at some checkpoint."""

import dataclasses
from typing import Any

import jax
import orbax.checkpoint as ocp

from r2vpo_jax import config as config_lib
from r2vpo_jax import hub, models, sharding, storage
from r2vpo_jax.config import Config
from r2vpo_jax.config.lora import LoraConfig
from r2vpo_jax.errors import UsageError
from r2vpo_jax.models import lora
from r2vpo_jax.models.base import BaseModel, find_directory
from r2vpo_jax.models.identity import differing
from r2vpo_jax.models.tensor_files import read_object
from r2vpo_jax.run import checkpoints, report


@dataclasses.dataclass(frozen=True)
class ModelSource:
    """Where architecture and tokenizer are, and where the weights."""

    name: str  # as the user said it: `find` finds the same again
    directory: Any  # path, or name on the Hub; architecture, tokenizer, and weights unless there is a checkpoint
    checkpoint: Any = None  # folder of one step of a run
    iteration: int | None = None  # that step
    run: Config | None = None  # what it was trained with

    def load_params(self, base: BaseModel, mesh) -> dict:
        """The parameters, placed on the mesh, in the dtype of `base.model`.

        Raises:
          UsageError: a tensor is missing or does not fit, or the run was started from another base model.
        """
        if self.checkpoint is None:
            return base.load_params(mesh)
        with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as reader:
            progress = reader.restore(self.checkpoint / "progress")
        if others := differing(progress.get("model", {}), base.identity()):
            raise UsageError(
                f"{self.directory} is not the base model that {self.name} was started from: it differs in "
                f"{', '.join(others)}; put back what model.path named then"
            )
        # Of a run with adapters it holds these alone.
        abstract, frozen = lora.split(models.abstract_params(base.model))
        where = sharding.tree_shardings(lora.split(models.logical_axes(base.model))[0], abstract, mesh)
        target = {
            "params": jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, where)
        }
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            restored = reader.restore(
                self.checkpoint / "state",
                args=ocp.args.PyTreeRestore(
                    item=target,
                    restore_args=ocp.checkpoint_utils.construct_restore_args(target),
                    partial_restore=True,  # not the optimizer
                ),
            )
        return lora.join(lora.without_adapters(base.load_params(mesh)) if frozen else {}, restored["params"])

    @property
    def lora(self) -> LoraConfig:
        """The adapters that the weights are beside; in a Hugging Face directory they have been merged."""
        return LoraConfig() if self.checkpoint is None else self.run.model.lora

    def identity(self, base: BaseModel) -> dict[str, str]:
        """Digests of weights, architecture, tokenizer, chat template and ends of text (models/identity.py)."""
        if self.checkpoint is None:
            return base.identity()
        return base.identity(weights=checkpoints.manifest(self.checkpoint.parent, self.iteration).read_bytes())


def find(path: str | None, checkpoint: str | None = None) -> ModelSource:
    """What `path` means.

    Args:
      path: a Hugging Face directory or its name on the Hub, a run directory, or the name of a shipped model; None: the
        arithmetic one.
      checkpoint: of a run directory, an iteration, "last" (also "latest") or "best" (on the validation split). Default: the exported
        model if the run has finished, else the latest.

    Raises:
      FileNotFoundError: there is no such directory.
      ValueError: it is neither; or the checkpoint does not exist, or is torn; or the run is of an older version.
    """
    directory, shipped = find_directory(path)
    if shipped:
        _refuse_checkpoint(checkpoint, "a shipped model")
        return ModelSource(directory.name, directory)
    if not (directory / "config.json").is_file():
        raise FileNotFoundError(f"{directory} is neither a Hugging Face directory nor a run: it has no config.json")
    config = read_object(directory / "config.json")
    if not {"model", "trainer"} <= config.keys():
        _refuse_checkpoint(checkpoint, str(directory))
        return ModelSource(path, path if hub.is_name(path) else directory)
    try:
        run = config_lib.from_dict(config)
    except ValueError as error:
        hf = directory / "hf"
        raise ValueError(
            f"{directory / 'config.json'} is not of this version ({error}); evaluate {hf} without it, and say by flags "
            "how the question was put"
        ) from error
    if checkpoint is None and report.is_finished(directory):
        return ModelSource(path, directory / "hf", run=run)
    folder = storage.absolute(directory / "checkpoints")
    iteration = _choose(folder, checkpoint or "latest", directory)
    try:
        base = find(run.model.path).directory
    except FileNotFoundError as error:
        raise FileNotFoundError(f"the base model of {directory} is not where it was (model.path): {error}") from error
    return ModelSource(path, base, folder / str(iteration), iteration, run)


def _refuse_checkpoint(checkpoint, what) -> None:
    if checkpoint is not None:
        raise ValueError(f"--checkpoint={checkpoint} needs a run directory, and {what} is none")


def _choose(folder, wanted: str, directory) -> int:
    if wanted in ("last", "latest", "best"):
        found = checkpoints.best(folder) if wanted == "best" else checkpoints.latest(folder)
        if found is None and checkpoints.latest(folder) is not None:
            raise ValueError(
                f"no checkpoint of {directory} has a validation score of its own yet; use --checkpoint=last"
            )
        if found is None:
            raise ValueError(f"{directory} is a run without an intact checkpoint")
        return found
    if not wanted.isdigit():
        raise ValueError(f"--checkpoint={wanted} is neither an iteration nor last nor best")
    if problem := checkpoints.problem(folder, int(wanted)):
        there = ", ".join(str(step) for step in reversed(checkpoints.steps(folder)))
        raise ValueError(
            f"checkpoint {wanted} of {directory} cannot be used: {problem}; those there are: {there or 'none'}"
        )
    return int(wanted)
