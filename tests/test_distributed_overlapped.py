"""Two processes, each with a device that samples and one that learns, are one run."""

import numpy as np
import pytest

from r2vpo_jax.run import files
from tests import test_distributed
from tests.helpers.processes import free_port
from tests.helpers.runs import rows
from tests.test_distributed import finish, start

pytestmark = pytest.mark.slow
text_config_file = test_distributed.text_config_file  # a fixture

OWN = "--config.mesh.sampler_devices=2", "--config.replay.lag=1"
OVERLAP = "--config.replay.overlap=True"


def devices(number):
    return {"XLA_FLAGS": f"--xla_force_host_platform_device_count={number}"}


def distributed():
    return "--distributed", f"--coordinator_address=127.0.0.1:{free_port()}", "--num_processes=2"


@pytest.mark.parametrize("which", ["config_file", "text_config_file"])
def test_two_processes_sample_beside_learning(which, request, tmp_path):
    """The numbers of one process with four devices that take turns; of text, each judges its own rows meanwhile."""
    config_file = request.getfixturevalue(which)
    flags = *distributed(), *OWN, OVERLAP
    finish(*(start(config_file, tmp_path / "two", *flags, f"--process_id={i}", **devices(2)) for i in range(2)))
    finish(start(config_file, tmp_path / "one", *OWN, **devices(4)))
    two, one = rows(tmp_path / "two"), rows(tmp_path / "one")
    for a, b in zip(two, one, strict=True):
        assert a.keys() == b.keys()
        for name, value in b.items():
            if isinstance(value, str):
                assert a[name] == value
            else:
                np.testing.assert_allclose(a[name], value, rtol=1e-4, atol=1e-6, err_msg=name)
    trained = [row for row in files.read_jsonl(tmp_path / "two" / "metrics.jsonl") if row["kind"] == "train"]
    assert [row["replay/age_max"] for row in trained] == [0, 4 if which == "config_file" else 2]
    assert {"time/weights", "time/wait"} <= trained[0].keys()


def test_what_would_make_processes_wait_for_each_other_is_refused(config_file, tmp_path):
    for flags, number, message in (
        (
            (OWN[1], OVERLAP),
            1,
            "needs devices that sample only: set mesh.sampler_devices, a multiple of the 2 processes",
        ),
        (("--config.mesh.sampler_devices=4", OWN[1], OVERLAP), 4, "one device that learns, or one that samples"),
        (("--config.mesh.sampler_devices=3", OWN[1], OVERLAP), 4, "not a multiple of the 2 processes"),
    ):
        shared = *distributed(), *flags, "--config.mesh.data=-1"
        processes = [
            start(config_file, tmp_path / "run", *shared, f"--process_id={i}", **devices(number)) for i in range(2)
        ]
        for process in processes:
            output = process.communicate(timeout=300)[0]
            assert process.returncode == 2, output[-2000:]
            assert message in output
