"""Several processes read one commit, and a host fetches a file once, wherever the branch goes meanwhile."""

import json
import os
import subprocess
import sys

import pytest

from tests.helpers import hub as hubs
from tests.helpers.paths import ROOT, TINY_BASE
from tests.helpers.processes import free_port

TINY = {path.name: path.read_bytes() for path in TINY_BASE.iterdir()}


@pytest.mark.slow
def test_the_commit_is_that_of_process_0(tmp_path):
    (tmp_path / "run").mkdir()
    with hubs.serve() as hub:
        repository = hub.repository("me/tiny")
        commits = [repository.commit(TINY), repository.commit(TINY | {"config.json": TINY["config.json"] + b" "})]
        repository.refs["main"], repository.then["main"] = commits
        environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "JAX_PLATFORMS": "cpu"}
        environment |= {"XDG_CACHE_HOME": str(tmp_path / "xdg")}
        port = free_port()
        processes = [
            subprocess.Popen(
                [sys.executable, "-m", "tests.open_on_processes", str(port), str(number), str(tmp_path / "run")],
                cwd=ROOT,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for number in range(2)
        ]
        try:
            outputs = [process.communicate(timeout=120) for process in processes]
        finally:
            for process in processes:
                process.kill()
    assert [process.returncode for process in processes] == [0, 0], outputs
    opened = [output.split()[-1] for output, _ in outputs]
    assert opened[0] == opened[1] in commits
    assert json.loads((tmp_path / "run" / "hub.json").read_text())["hf://me/tiny"]["commit"] == opened[0]
    assert [path for method, path in hub.asked].count("/api/models/me/tiny") == 2
    assert sorted(set(hub.fetched())) == sorted(TINY)
    assert hub.fetched().count("model.safetensors") == 1
