"""One run, killed with SIGKILL at every moment of MOMENTS in turn, and then left to finish. Run by test_faults.py:

    python -m tests.run_and_kill SECTIONS.json WORKDIR

This process imports everything and computes nothing, so that it can fork: each child resumes the run in WORKDIR and
kills itself when it reaches its moment, on what it has done and not on a timer. Prints one line of JSON: for each
child the name of its moment, how it ended (-9: by SIGKILL), where it said it was, and the iteration it began from.
"""

import functools
import json
import os
import pathlib
import signal
import sys
import threading
import traceback
import warnings

import jax  # noqa: F401
import matplotlib.backends.backend_agg
import matplotlib.figure  # noqa: F401
import orbax.checkpoint as ocp
import transformers.tokenization_utils_tokenizers  # noqa: F401

from r2vpo_jax import config, models
from r2vpo_jax.evaluation import validation
from r2vpo_jax.run import files, report
from r2vpo_jax.run.checkpoints import Checkpointer
from r2vpo_jax.training import trainer
from r2vpo_jax.training.collector import Collector
from r2vpo_jax.training.learner import Learner
from r2vpo_jax.training.lifecycle import Lifecycle
from r2vpo_jax.training.replay import ReplayBuffer

_done = 0  # iterations that are behind the run of this process


def _die(name):
    """Say where, and be gone: no handler runs and no buffer is flushed."""
    os.write(_reached, name.encode())
    os.kill(os.getpid(), signal.SIGKILL)


def _wrap(owner, name, die, *, when, after=False):
    """Die before (or after) the first call of owner.name for which when(...) holds."""
    function = getattr(owner, name)

    @functools.wraps(function)
    def wrapped(*args, **kwargs):
        dies = when(*args, **kwargs)
        if dies and not after:
            die()
        result = function(*args, **kwargs)
        if dies:
            die()
        return result

    setattr(owner, name, wrapped)


def _in(iteration):
    """True while this iteration, counted from 1, is under way."""
    return lambda *_, **__: _done + 1 == iteration


def _before(owner, name, when):
    return lambda die: _wrap(owner, name, die, when=when)


def _once_done(owner, name, when):
    return lambda die: _wrap(owner, name, die, when=when, after=True)


def _evaluation(split, iteration):
    """In the middle of scoring a split: responses are sampled, nothing is written."""
    return _once_done(validation, "evaluate_run", lambda *_, **k: k["split"] == split and _done == iteration)


def _jitted(name, iteration, call):
    """Before the given call, in this iteration, of one of the learner's compiled functions."""

    def arm(die):
        make, calls = Learner.__init__, [0]

        def counted(function, *args, **kwargs):
            if _done + 1 == iteration:
                calls[0] += 1
                if calls[0] == call:
                    die()
            return function(*args, **kwargs)

        def made(learner, *args, **kwargs):
            make(learner, *args, **kwargs)
            setattr(learner, name, functools.partial(counted, getattr(learner, name)))

        Learner.__init__ = made

    return arm


def _half_a_line(name, iteration):
    """Half of a row of this iteration is on disk; `name` is that of the method that writes it."""

    def arm(die):
        write = getattr(files.RunFiles, name)

        def torn(run_files, row):
            if row["iteration"] == iteration and "split" not in row:
                text = json.dumps(row, default=float)
                with (_workdir / {"metrics": "metrics.jsonl", "sample": "samples.jsonl"}[name]).open("a") as file:
                    file.write(text[: len(text) // 2])
                die()
            write(run_files, row)

        setattr(files.RunFiles, name, torn)

    return arm


def _nameless(name):
    """The temporary file is written, and does not have its name yet."""
    return _before(os, "replace", lambda _, to: pathlib.Path(to).match(name))


def _is_manifest(iteration):
    return lambda path, _: path.match(f"manifests/{iteration}.json")


def _in_the_background(*_):
    """True in the thread that writes a checkpoint."""
    return threading.current_thread() is not threading.main_thread()


def _half_a_manifest(iteration):
    """Half of the checksums of a step are on disk, under a temporary name."""

    def arm(die):
        write = files.write_atomically

        def torn(path, content):
            if path.match(f"manifests/{iteration}.json"):
                path.parent.mkdir(exist_ok=True)
                path.with_name(f"{path.name}.tmp").write_text(content[: len(content) // 2])
                die()
            write(path, content)

        files.write_atomically = torn

    return arm


def _garbage(die):
    """The first file of a batch that nothing needs any more is gone: that of 1, once 2 is pruned."""
    _wrap(pathlib.Path, "unlink", die, when=lambda path, **_: path.suffix == ".npz", after=True)


def _half_an_export(die):
    save = models.save_pretrained

    def torn(path, *args, **options):
        save(path, *args, **options)
        file = path / "model.safetensors"
        os.truncate(file, file.stat().st_size // 2)
        die()

    models.save_pretrained = torn


def _of_step(iteration):
    return lambda _, step, *__, **___: step == iteration


# For a run of 6 iterations with lag 1 (iteration 1 trains nothing) and a checkpoint every 2. Until the checkpoint of
# an iteration is committed, the next child begins from the one before.
MOMENTS = {
    # From the start, each of them.
    "base test": _evaluation("test", 0),
    "first validation": _evaluation("validation", 0),
    "before sampling 1": _before(Collector, "collect", _in(1)),
    "replay file of 1": _nameless("rollout_00000000.npz"),
    "after the dual step of 2, before its metrics": _once_done(Learner, "train_on_rollout", _in(2)),
    "before saving 2": _before(Checkpointer, "save", _of_step(2)),
    "while 2 is written": _before(ocp.CheckpointManager, "wait_until_finished", _in_the_background),
    "half the manifest of 2": _half_a_manifest(2),
    "while torn 2 is discarded": _before(ocp.CheckpointManager, "delete", _of_step(2)),
    # From 2 on.
    "after the manifest of 2": _once_done(files, "write_atomically", _is_manifest(2)),
    "after sampling 3": _once_done(Collector, "collect", _in(3)),
    "between two updates of 3": _jitted("update", 3, 2),
    "before the dual step of 4": _jitted("step_multipliers", 4, 1),
    "half the metrics of 4": _half_a_line("metrics", 4),
    "between metrics and samples of 4": _before(files.RunFiles, "sample", _in(4)),
    "validation of 4": _evaluation("validation", 4),
    "before the manifest of 4": _before(files, "write_atomically", _is_manifest(4)),
    # From 4 on; that 4 is committed comes to light when the next one is saved.
    "after the manifest of 4": _once_done(files, "write_atomically", _is_manifest(4)),
    "between keeping and drawing in 5": _before(ReplayBuffer, "draw", _in(5)),
    "half the samples of 6": _half_a_line("sample", 6),
    "half the manifest of 6": _half_a_manifest(6),
    "while 2 is pruned": _before(ocp.CheckpointManager, "delete", _of_step(2)),
    # From 6 on.
    "while replay files are deleted": _garbage,
    "final test": _evaluation("test", 6),
    "half the export": _half_an_export,
    "before the report": _before(report, "write", lambda *_: True),
    "before the summary": _nameless("summary.json"),
}


def _go(the_config, workdir, name):
    """In a child: run to the moment, or to the end."""
    global _workdir
    _workdir, resume = workdir, Lifecycle.resume

    def begin(life, *args):
        global _done
        state, counters = resume(life, *args)
        _done = counters.iteration
        return state, counters

    def count(iteration):
        global _done
        _done = iteration.number

    Lifecycle.resume = begin
    if name is not None:
        MOMENTS[name](lambda: _die(name))
    trainer.train(the_config, workdir, on_iteration=count)


def _child(the_config, workdir, name) -> dict:
    """Fork, run, and how it ended."""
    global _reached
    read, _reached = os.pipe()
    output = workdir.parent / "output.txt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "os.fork() is incompatible with multithreaded code": none is running yet
        pid = os.fork()
    if pid == 0:
        code = 1
        try:
            file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(file, 1)
            os.dup2(file, 2)
            _go(the_config, workdir, name)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    os.close(_reached)
    _, status = os.waitpid(pid, 0)
    with os.fdopen(read) as file:
        reached = file.read()
    said = output.read_text(errors="replace")
    began = [line.rpartition(" ")[2] for line in said.splitlines() if line.startswith("continuing ")]
    result = {"moment": name, "code": os.waitstatus_to_exitcode(status), "reached": reached or None}
    result["began"] = int(began[0]) if began else 0
    return result if result["code"] in (0, -signal.SIGKILL) else result | {"output": said[-3000:]}


def main():
    sections, workdir = json.loads(pathlib.Path(sys.argv[1]).read_text()), pathlib.Path(sys.argv[2])
    the_config = config.from_flags(config.make(**sections))
    workdir.parent.mkdir(parents=True, exist_ok=True)
    print(json.dumps([_child(the_config, workdir, name) for name in (*MOMENTS, None)]))


if __name__ == "__main__":
    main()
