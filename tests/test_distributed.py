"""Two processes that talk over the loopback are one run."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from r2vpo_jax import models
from r2vpo_jax.run import files
from tests.helpers.paths import ROOT
from tests.helpers.processes import free_port

pytestmark = pytest.mark.slow


def start(config_file, workdir, *args, **environment):
    command = [sys.executable, "-m", "experiments.train", f"--config={config_file}", f"--workdir={workdir}"]
    overrides = ["--config.mesh.data=2", "--config.trainer.num_iterations=3"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"} | environment
    return subprocess.Popen(
        [*command, *overrides, *args],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(*processes):
    """What they printed; all must have ended well."""
    try:
        outputs = [process.communicate(timeout=900)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output[-4000:]
    return outputs


@pytest.fixture(scope="module")
def text_config_file(tmp_path_factory):
    """A --config file of a run on text: process 0 judges, the other is told."""
    path = tmp_path_factory.mktemp("config") / "text.py"
    path.write_text(
        "from experiments.configs import word_problems\n\n\n"
        "def get_config():\n"
        "    config = word_problems.get_config()\n"
        "    config.sampler.group_size = 4\n"
        "    config.task.update(text={'max_response_length': 48}, reward={'format': 0.5, 'format_pattern': '.*####.*'})\n"
        "    config.trainer.update(prompts_per_rollout=4, num_minibatches=2, num_epochs=1, micro_batch_size=4,\n"
        "        eval_every=3, eval_problems=8, test_problems=8, test_samples=2, checkpoint_every=3)\n"
        "    return config\n"
    )
    return path


@pytest.mark.parametrize("which", ["config_file", "text_config_file"])
def test_two_processes_do_what_two_devices_do(which, request, tmp_path):
    config_file = request.getfixturevalue(which)
    address = f"--coordinator_address=127.0.0.1:{free_port()}"
    flags = "--distributed", address, "--num_processes=2"
    chief, other = finish(
        *(start(config_file, tmp_path / "two", *flags, f"--process_id={i}", XLA_FLAGS="") for i in range(2))
    )
    assert "pass@1" in chief
    assert "pass@1" not in other, "only process 0 speaks"
    finish(
        start(config_file, tmp_path / "one", XLA_FLAGS="--xla_force_host_platform_device_count=2"),
    )
    for split in ("train", "evaluation"):
        two, one = (
            [row for row in files.read_jsonl(tmp_path / which / "metrics.jsonl") if row["kind"] == split]
            for which in ("two", "one")
        )
        assert len(two) == len(one)
        for a, b in zip(two, one, strict=True):
            assert a.keys() == b.keys()
            for name in a.keys() - {n for n in a if n.startswith(files.TIME_PREFIXES)}:
                if isinstance(a[name], str):
                    assert a[name] == b[name]
                else:
                    np.testing.assert_allclose(a[name], b[name], rtol=1e-4, atol=1e-6, err_msg=name)
    (_, params), (_, expected) = (models.from_pretrained(tmp_path / which / "hf") for which in ("two", "one"))
    np.testing.assert_allclose(params["embed"], expected["embed"], rtol=1e-4, atol=1e-6)
    summaries = [json.loads((tmp_path / w / "report" / "summary.json").read_text()) for w in ("two", "one")]
    assert summaries[0]["final_pass_at_1"] == summaries[1]["final_pass_at_1"]
    # A second start finds the run finished, on both processes.
    address = f"--coordinator_address=127.0.0.1:{free_port()}"
    flags = "--distributed", address, "--num_processes=2"
    before = (tmp_path / "two" / "metrics.jsonl").read_bytes()
    finish(*(start(config_file, tmp_path / "two", *flags, f"--process_id={i}", XLA_FLAGS="") for i in range(2)))
    assert (tmp_path / "two" / "metrics.jsonl").read_bytes() == before


def test_processes_that_read_different_data_are_told(text_config_file, tmp_path):
    """Process 1 has a file with one row less."""
    rows = [json.dumps({"question": f"What is {i} + 1?", "answer": str(i + 1)}) for i in range(12)]
    for i in range(2):
        folder = tmp_path / f"data{i}"
        folder.mkdir()
        for number, split in enumerate(("train", "validation", "test")):
            kept = rows[4 * number : 4 * number + 4 - (i if split == "train" else 0)]
            (folder / f"{split}.jsonl").write_text("\n".join(kept) + "\n")
    flags = "--distributed", f"--coordinator_address=127.0.0.1:{free_port()}", "--num_processes=2"
    data = [f"--config.task.text.{split}={split}.jsonl" for split in ("train", "validation", "test")]
    processes = [
        start(
            text_config_file,
            tmp_path / "run",
            *flags,
            f"--process_id={i}",
            *data,
            f"--config.task.text.data_dir={tmp_path / f'data{i}'}",
            XLA_FLAGS="",
        )
        for i in range(2)
    ]
    outputs = [process.communicate(timeout=900)[0] for process in processes]
    for process, output in zip(processes, outputs, strict=True):
        assert "the processes of this run read different data" in output
        assert process.returncode == 2
