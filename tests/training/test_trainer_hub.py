"""Runs whose model and data have names on the Hub; and that a run without such names goes to no network."""

import json
import os
import subprocess
import sys

import pytest

from r2vpo_jax.errors import UsageError
from r2vpo_jax.evaluation import benchmarks, exports
from tests.helpers import hub as hubs
from tests.helpers.evaluations import tiny
from tests.helpers.paths import ROOT, TINY_BASE
from tests.helpers.runs import stop

FEW = {"num_iterations": 3, "eval_every": 3, "eval_problems": 4, "test_problems": 4, "test_samples": 8}
TINY = {path.name: path.read_bytes() for path in TINY_BASE.iterdir()}


@pytest.mark.slow
def test_a_run_an_evaluation_and_an_export_stay_at_the_commit_that_the_run_began_with(
    tiny_config, tmp_path, monkeypatch
):
    said = []
    with hubs.serve() as hub, hubs.used(hub, tmp_path, monkeypatch):
        first = hub.repository("me/tiny").commit(TINY)
        config = tiny_config(model={"path": "hf://me/tiny"}, trainer=FEW)
        stop(config, tmp_path / "run", 1, say=said.append)
        line = next(line for line in said if line.startswith("hf://me/tiny: "))
        assert line.startswith(f"hf://me/tiny: commit {first}, {len(TINY)} files of digest ")
        assert json.loads((tmp_path / "run" / "config.json").read_text())["model"]["path"] == "hf://me/tiny"
        assert json.loads((tmp_path / "run" / "hub.json").read_text())["hf://me/tiny"]["commit"] == first
        # The branch moves to another model: the run, and what is made of it, do not.
        moved = hub.repository("me/tiny").commit(TINY | {"generation_config.json": b'{"eos_token_id": 3}'})
        hub.asked.clear()
        stop(config, tmp_path / "run", 2, say=said.append)
        benchmarks.run(tiny(tmp_path / "run", num_problems=2), tmp_path / "evaluation", say=said.append)
        exports.export(str(tmp_path / "run"), "last", tmp_path / "export", say=said.append)
        assert not hub.asked
        assert f"hf://me/tiny: commit {first} as before, {len(TINY)} files" in "".join(said)
        assert json.loads((tmp_path / "evaluation" / "hub.json").read_text())["hf://me/tiny"]["commit"] == first
        # What begins now begins with the new commit; an evaluation of the old one is not continued with it.
        (tmp_path / "evaluation" / "hub.json").unlink()
        with pytest.raises(UsageError, match="another configuration"):
            benchmarks.run(tiny("hf://me/tiny", num_problems=2), tmp_path / "evaluation", say=said.append)
        assert any(moved in path for _, path in hub.asked)


ALONE = """
import pathlib, pkgutil, sys

def refuse(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"):
        print("NETWORK", event, arguments[1:], flush=True)
        raise OSError("no network here")

sys.addaudithook(refuse)
import r2vpo_jax
for module in pkgutil.walk_packages(r2vpo_jax.__path__, "r2vpo_jax."):
    if not module.name.startswith("r2vpo_jax.verifiers.worker"):
        __import__(module.name)
from r2vpo_jax import config, data
from r2vpo_jax.evaluation import benchmarks, settings
from r2vpo_jax.training import trainer

here = pathlib.Path(sys.argv[1])
sections = {sections!r}
trainer.train(config.from_flags(config.make(**sections)), here / "run", say=lambda _: None)
evaluated = settings.resolve(model=str(here / "run"), num_problems=2, k=2)
benchmarks.run(evaluated, here / "evaluation", say=lambda _: None)
print(data.load("word_problems", "test").num_examples, "problems")
"""


@pytest.mark.slow
def test_without_a_name_on_the_hub_no_socket_is_opened(tiny_sections, tmp_path):
    sections = tiny_sections | {"trainer": tiny_sections["trainer"] | FEW | {"num_iterations": 1}}
    with hubs.serve() as hub:
        # What a library would fetch by itself, in whatever way, it would fetch here.
        environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "empty"), "JAX_PLATFORMS": "cpu"}
        environment = {
            name: value for name, value in environment.items() if name not in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
        }
        ended = subprocess.run(
            [sys.executable, "-c", ALONE.replace("{sections!r}", repr(sections)), str(tmp_path)],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=600,
        )
    assert ended.returncode == 0, ended.stderr
    assert "NETWORK" not in ended.stdout, ended.stdout
    assert "256 problems" in ended.stdout
    assert not hub.asked + hub.others
    assert not (tmp_path / "run" / "hub.json").exists()


def test_the_check_would_see_one():
    program = ALONE.partition("import r2vpo_jax")[0] + "import socket\nsocket.create_connection(('127.0.0.1', 9))"
    ended = subprocess.run([sys.executable, "-c", program, "x"], capture_output=True, text=True, timeout=60)
    assert "NETWORK socket.getaddrinfo" in ended.stdout
