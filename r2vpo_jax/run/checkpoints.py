"""Save and restore everything a run needs to continue, by Orbax, and know whether it is intact.

The learner's state (parameters, optimizer, multipliers, version) is stored as arrays; random keys and data positions
are functions of numbers in `progress`. Writing is asynchronous. A step counts once a manifest with the sha256 of each
of its files lies beside it: Orbax makes a step appear whole or not at all, but does not notice bits that flip later,
nor a file that is cut. A step without a manifest, or one that fails it, is torn, and the one before is used.

In a store (gs://) Orbax writes and reads by itself too, every process its own shards. The manifest has the checksums that
the store keeps, so that nothing is read back.
"""

import copy
import json
import math
import threading

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from r2vpo_jax import cluster, storage, waits
from r2vpo_jax.errors import UsageError
from r2vpo_jax.run import files

# By this file Orbax knows that a step in a store, or an item of it, is complete.
_COMMITTED = "commit_success.txt"

# What is on disk: looked at only, so that a run which is going on is not disturbed --------------------------


def steps(directory) -> list[int]:
    """All iterations with a checkpoint in a directory of checkpoints, intact or not, the last one first."""
    return sorted((int(p.name) for p in storage.path(directory).glob("*") if p.name.isdigit()), reverse=True)


def problem(directory, iteration: int) -> str | None:
    """What is wrong with a step on disk, or None if it is intact.

    Raises:
      OSError: the store cannot be reached, which says nothing of the step.
    """
    folder = storage.path(directory) / str(iteration)
    try:
        listed = _read_manifest(directory, iteration)["files"]
    except OSError as error:
        if storage.out_of_reach(folder, error):
            raise
        return "it was not committed (no checksums)"
    except ValueError as error:
        return f"its checksums cannot be read ({error})"
    found = storage.listing(folder)
    if missing := sorted(listed.keys() - found.keys()):
        return f"{missing[0]} is missing"
    told = waits.each(listed.items(), f"comparing checkpoint {iteration} with its checksums", len(listed), "files")
    wrong = sorted(n for n, kept in told if storage.checksum(folder / n, found[n], like=kept) != kept)
    return f"{wrong[0]} is damaged" if wrong else None


def latest(directory) -> int | None:
    """The last iteration with an intact checkpoint, or None."""
    return next((step for step in steps(directory) if problem(directory, step) is None), None)


def best(directory) -> int | None:
    """The iteration with the best score among the intact checkpoints that have one, the last of several; or None."""
    intact = [step for step in steps(directory) if problem(directory, step) is None]
    return _best({step: _read_manifest(directory, step)["score"] for step in intact})


def _best(scores: dict[int, float | None]) -> int | None:
    """Of iteration -> score; what has no score of its own is not the best."""
    judged = [(score, step) for step, score in scores.items() if score is not None]
    return max(judged, default=(None, None))[1]


def manifest(directory, iteration: int):
    """The file with the checksum of each file of a step."""
    return storage.path(directory) / "manifests" / f"{iteration}.json"


def _read_manifest(directory, iteration: int) -> dict:
    """The manifest of a step; OSError if there is none, ValueError if it is damaged."""
    file = manifest(directory, iteration)
    with storage.spoken(file):
        found = json.loads(file.read_bytes())
    if not (isinstance(found, dict) and {"files", "score", "replay"} <= found.keys()):
        raise ValueError("a field is missing")
    if not (isinstance(found["files"], dict) and isinstance(found["score"], (int, float, type(None)))):
        raise ValueError("a field has the wrong type")
    return found


def _checksums(directory, iteration: int) -> dict[str, str]:
    folder = storage.path(directory) / str(iteration)
    return {name: storage.checksum(folder / name, kept) for name, kept in storage.listing(folder).items()}


def _mark_copied(directory) -> None:
    """Let Orbax take the intact steps of a store for complete that were copied there from a disk without its marks."""
    for step in steps(directory):
        folder = directory / str(step)
        there = storage.listing(folder)
        marks = sorted({f"{name.partition('/')[0]}/{_COMMITTED}" for name in there if "/" in name})
        lacking = [mark for mark in (*marks, _COMMITTED) if mark not in there]
        if lacking and problem(directory, step) is None:
            for mark in lacking:
                storage.put(folder / mark, b"It was copied here whole: its checksums are right.\n")


def _arrays(tree) -> dict[str, str]:
    """Name -> dtype and shape of each array."""
    return {
        jax.tree_util.keystr(path): f"{leaf.dtype}{list(leaf.shape)}"
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


# Writing ---------------------------------------------------------------------------------------------------


class Checkpointer:
    """Checkpoints of one run directory: the last few, and the one with the best score of its own."""

    def __init__(self, directory, *, max_to_keep: int, write=True):
        """Open, or make, the directory.

        Args:
          directory: holds one folder a step, and manifests/.
          max_to_keep: steps kept besides the one with the best score.
          write: whether this process writes manifests and deletes (process 0).
        """
        self._directory = storage.absolute(storage.path(directory))
        self._max_to_keep, self._write = max_to_keep, write
        if storage.is_store(self._directory):
            if write:
                _mark_copied(self._directory)
            if jax.process_count() > 1:  # nobody's Orbax looks before that
                multihost_utils.sync_global_devices("r2vpo_jax: checkpoints marked")
        self._manager = ocp.CheckpointManager(
            self._directory,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=None,  # deleting is done here, once the newer step is known to be intact
                enable_async_checkpointing=True,
                # In a store it would take all folders that lack its mark for unfinished steps, manifests/ too.
                cleanup_tmp_directories=not storage.is_store(self._directory),
                step_name_format=ocp.path.step.standard_name_format(),
            ),
        )
        self._thread, self._error, self._said = None, None, False
        self._scores = {}
        for step in self._manager.all_steps():
            if self.problem(step) is None:
                self._scores[step] = _read_manifest(self._directory, step)["score"]

    def save(self, iteration: int, state, progress: dict, *, score: float | None = None) -> None:
        """Start writing a checkpoint; returns as soon as the arrays may be overwritten.

        Args:
          iteration: iterations done; a step that exists is left alone.
          state: a LearnerState of device arrays.
          progress: JSON-compatible positions and counters.
          score: of this very policy on the validation split, to keep the best; None: it was not scored.

        Raises:
          OSError: this or the last checkpoint could not be written; what was on disk before is intact.
        """
        self.wait()
        if iteration in self._manager.all_steps():
            return
        if jax.default_backend() == "cpu":
            # There Orbax may write from the very buffers that the next update is given to overwrite.
            state = jax.tree.map(jnp.copy, state)
        if score is not None and not math.isfinite(score):
            score = None  # nothing could be judged
        self._scores[iteration] = score
        progress = copy.deepcopy(progress)  # it is written while the run goes on counting
        self._manager.save(
            iteration,
            args=ocp.args.Composite(state=ocp.args.StandardSave(state), progress=ocp.args.JsonSave(progress)),
            force=True,
        )
        details = {"score": score, "replay": progress.get("replay"), "arrays": _arrays(state)}
        self._thread = threading.Thread(target=self._commit, args=(iteration, details), name="checkpoint")
        self._thread.start()

    def _commit(self, iteration: int, details: dict) -> None:
        try:
            self._manager.wait_until_finished()
            if self._write:
                self._write_manifest(iteration, details)
            cluster.where.saved = iteration
        except Exception as error:  # handed to the thread that trains, by wait()
            self._error = error

    def wait(self) -> None:
        """Until the checkpoint under way is committed, and those that it makes superfluous are gone.

        On all processes together: Orbax deletes in step.

        Raises:
          OSError: it could not be written, whatever the reason.
        """
        if self._thread is None:
            return
        self._thread.join()
        self._thread = None
        if self._error is not None:
            error, self._error, self._said = self._error, None, True
            if isinstance(error, OSError):
                raise error
            # Orbax has errors of several types for a disk that is full; the first line says enough.
            raise OSError(f"the checkpoint could not be written: {str(error).splitlines()[0]}") from error
        self._prune()

    def _write_manifest(self, iteration: int, details: dict) -> None:
        listed = {"files": _checksums(self._directory, iteration), **details}
        files.write_atomically(manifest(self._directory, iteration), json.dumps(listed, indent=1))

    def _prune(self) -> None:
        steps = sorted(self._manager.all_steps())
        best = _best({step: self._scores.get(step) for step in steps})
        for step in steps[: -self._max_to_keep]:
            if step != best:
                self._delete(step)

    def _delete(self, step: int) -> None:
        if self._write:
            manifest(self._directory, step).unlink(missing_ok=True)  # first: half deleted is torn, not intact
        self._manager.delete(step)
        self._scores.pop(step, None)

    def problem(self, iteration: int) -> str | None:
        """What is wrong with a step on disk, or None if it is intact."""
        return problem(self._directory, iteration)

    def replay_listings(self) -> list[dict]:
        """What the intact checkpoints on disk say of the replay buffer."""
        self.wait()
        listings = []
        for step in sorted(self._scores):
            try:
                listings.append(_read_manifest(self._directory, step)["replay"])
            except (OSError, ValueError) as error:
                if isinstance(error, OSError) and storage.out_of_reach(self._directory, error):
                    raise
                continue  # not written yet by process 0, or torn: then nothing is restored from it
        return [x for x in listings if x is not None]

    # Restoring -----------------------------------------------------------------------------------------

    def steps(self) -> list[int]:
        """All iterations with a checkpoint, intact or not, the last one first."""
        return steps(self._directory)

    def latest(self) -> int | None:
        """The last iteration with an intact checkpoint, or None."""
        return latest(self._directory)

    def discard_after(self, iteration: int | None) -> None:
        """Delete the steps after an iteration (all, if None), so that they can be written again.

        And what is superfluous: a process that was killed may not have come to it.
        """
        for step in list(self._manager.all_steps()):
            if iteration is None or step > iteration:
                self._delete(step)
        if self._write and storage.is_store(self._directory):
            for step in set(self.steps()) - set(self._manager.all_steps()):  # a kill has left them unfinished
                manifest(self._directory, step).unlink(missing_ok=True)
                storage.remove_folder(self._directory / str(step))
        if iteration is not None:
            self._prune()

    def restore(self, iteration: int, abstract_state, shardings) -> tuple:
        """(state placed by `shardings`, progress) of that iteration.

        Raises:
          UsageError: an array has another shape or dtype there: Orbax would cut it or cast it without a word.
        """
        here = _arrays(abstract_state)
        there = _read_manifest(self._directory, iteration).get("arrays", here)  # older checkpoints do not say
        for name in sorted(there.keys() | here.keys()):
            if there.get(name) != here.get(name):
                raise UsageError(
                    f"checkpoint {iteration} was written by other code: {name} is {there.get(name, 'absent')} there and "
                    f"{here.get(name, 'absent')} here"
                )
        target = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract_state, shardings
        )
        with waits.told(f"reading checkpoint {iteration}"):
            restored = self._manager.restore(
                iteration,
                args=ocp.args.Composite(state=ocp.args.StandardRestore(target), progress=ocp.args.JsonRestore()),
            )
        return restored.state, restored.progress

    def close(self) -> None:
        """Wait for what is under way, and close.

        Raises:
          OSError: as `wait`, once: Orbax says it again when it is closed.
        """
        try:
            self.wait()
        finally:
            try:
                self._manager.close()
            except Exception as error:
                if not self._said:
                    raise OSError(f"the checkpoint could not be written: {str(error).splitlines()[0]}") from error
