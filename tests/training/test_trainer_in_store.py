"""A run whose directory is in an object store: the same run, bit for bit, whatever happens to it there."""

import json
import os
import signal
import subprocess
import sys

import pytest

from r2vpo_jax import storage
from r2vpo_jax.errors import UsageError
from r2vpo_jax.evaluation import benchmarks, exports, settings
from r2vpo_jax.run import checkpoints, directory, files, report
from r2vpo_jax.run import summary as run_summary
from r2vpo_jax.training.trainer import train
from tests.helpers.paths import ROOT
from tests.helpers.processes import free_port
from tests.helpers.runs import assert_same_run, rows
from tests.test_distributed import finish, start

KILLED = """
import json, os, pathlib, signal, sys
from r2vpo_jax import config
from r2vpo_jax.training import trainer
def after(iteration):
    if iteration.number == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
sections = json.loads(pathlib.Path(sys.argv[1]).read_text())
trainer.train(config.from_flags(config.make(**sections)), sys.argv[2], on_iteration=after)
"""
STALE = {"lag": 1, "capacity": 2, "draw": "mixed"}


def train_and_kill(sections, workdir, after, tmp_path):
    """In a process that kills itself when an iteration has been done; what it said."""
    (tmp_path / "sections.json").write_text(json.dumps(sections))
    command = [sys.executable, "-c", KILLED, str(tmp_path / "sections.json"), str(workdir), str(after)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=600)
    assert done.returncode == -signal.SIGKILL, done.stderr
    return done.stdout


@pytest.mark.slow
def test_killed_and_continued_it_is_the_run_that_a_disk_has(
    store, tmp_path, tiny_config, tiny_sections, tiny_model, mesh
):
    """And it is evaluated, exported and reported from there."""
    changes = {"replay": STALE, "trainer": {"checkpoint_every": 1, "num_iterations": 5}}
    config, here, there = tiny_config(**changes), tmp_path / "here", store / "there"
    train(config, here)
    sections = tiny_sections | {"replay": STALE, "trainer": tiny_sections["trainer"] | changes["trainer"]}
    train_and_kill(sections, there, 3, tmp_path)
    said = train_and_kill(sections, there, 4, tmp_path)
    assert f"continuing {there} from iteration " in said
    # The last checkpoint is torn: half of a file of it is there.
    last = checkpoints.latest(there / "checkpoints")
    file = max(storage.listing(there / "checkpoints" / str(last) / "state"), key=len)
    torn = there / "checkpoints" / str(last) / "state" / file
    storage.put(torn, torn.read_bytes()[: storage.size(torn) // 2])
    said = []
    summary = train(config, there, say=said.append)
    assert f"checkpoint {last} is torn (state/{file} is damaged); falling back to the one before" in said
    assert_same_run(there, here, config, tiny_model, mesh)
    assert not storage.sizes(there / "lease"), "the lease was given back"
    assert report.rewrite(str(there)) == run_summary.table(summary)
    for model in (here, there):
        exports.export(str(model), "last", (tmp_path if model is here else store) / "exported", say=lambda _: None)
        chosen = settings.resolve(model=str(model), num_problems=8, k=2)
        benchmarks.run(chosen, (tmp_path if model is here else store) / "scores", say=lambda _: None)
    for name in ("exported/model.safetensors", "exported/config.json"):
        assert (store / name).read_bytes() == (tmp_path / name).read_bytes(), name
    outcomes = [files.read_jsonl(folder / "scores" / "outcomes.jsonl") for folder in (store, tmp_path)]
    assert outcomes[0] == outcomes[1] != []
    assert (store / "scores" / "evaluation.md").is_file()


@pytest.mark.slow
def test_two_processes_write_and_read_one_checkpoint(store, tmp_path, config_file):
    """Each its own shards of it, and process 0 all else: as on a disk that both see."""

    def run(workdir, *args):
        flags = "--distributed", f"--coordinator_address=127.0.0.1:{free_port()}", "--num_processes=2", *args
        flags += ("--config.mesh.data=1", "--config.mesh.fsdp=2")
        return finish(*(start(config_file, workdir, *flags, f"--process_id={i}", XLA_FLAGS="") for i in range(2)))

    run(tmp_path / "here")
    run(store / "there", "--stop_after_iteration=2")
    chief, _ = run(store / "there")
    assert f"continuing {store / 'there'} from iteration 2" in chief
    for file in ("metrics", "samples"):
        assert rows(store / "there", file) == rows(tmp_path / "here", file)
    last = storage.listing(store / "there" / "checkpoints" / "3" / "state")
    assert {name.partition("/")[0] for name in last} >= {"ocdbt.process_0", "ocdbt.process_1"}
    model = "hf/model.safetensors"
    assert (store / "there" / model).read_bytes() == (tmp_path / "here" / model).read_bytes()


def test_what_needs_a_disk_is_refused(store, tiny_config, tmp_path):
    config = tiny_config()
    with pytest.raises(UsageError, match=r"^--profile_steps needs a disk, and --workdir=gs://"):
        train(config, store, profile_steps=(1, 2))
    with pytest.raises(UsageError, match=r"^trainer\.trackers=tensorboard needs a disk, and --workdir=gs://.*metrics/"):
        train(tiny_config(trainer={"trackers": ("tensorboard",)}), store)
    with pytest.raises(UsageError, match=r"^--workdir=gs://.* is an address, and only folders of this machine will do"):
        directory.folder(store, store=False)
    assert storage.listing(store) == {}
