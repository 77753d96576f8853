"""Which processes there are: from flags, SLURM, Cloud TPU's metadata server and GKE, by JAX's own detection."""

import http.server
import threading

import jax
import pytest
from jax._src.clusters import cloud_tpu_cluster

from r2vpo_jax.cluster.place import PORT, Place, find
from r2vpo_jax.errors import UsageError

SLURM = {
    "SLURM_JOB_ID": "5", "SLURM_STEP_NODELIST": "gpu[07-08,12]", "SLURM_NTASKS": "3", "SLURM_PROCID": "2", "SLURM_LOCALID": "0",
    "SLURM_STEP_TASKS_PER_NODE": "1(x3)",
}  # fmt: skip


@pytest.fixture(autouse=True)
def bare(monkeypatch):
    """No cluster around this test."""
    for name in (
        *SLURM,
        "JAX_COORDINATOR_ADDRESS",
        "JAX_COORDINATOR_PORT",
        "JAX_LOCAL_DEVICE_IDS",
        "OMPI_MCA_orte_hnp_uri",
    ):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def on_tpu(monkeypatch):
    """As if this were a TPU VM, of which nothing is known yet."""
    monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
    monkeypatch.setattr(cloud_tpu_cluster.socket, "gethostbyname", lambda name: "10.0.0.1")
    monkeypatch.delenv("TPU_SKIP_MDS_QUERY", raising=False)
    return monkeypatch


@pytest.fixture
def metadata(on_tpu):
    """What the metadata server says, as a dictionary that a test fills."""
    said = {"tpu-env": "ACCELERATOR_TYPE: 'v5p-16'"}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            value = said.get(self.path.rpartition("/")[2])
            self.send_response(404 if value is None else 200)
            self.end_headers()
            self.wfile.write((value or "").encode())

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        on_tpu.setenv("GCE_METADATA_IP", f"127.0.0.1:{server.server_port}")
        on_tpu.setattr(cloud_tpu_cluster.time, "sleep", lambda _: None)
        yield said
        server.shutdown()


def test_a_process_that_is_alone_has_no_place(monkeypatch):
    assert find() is None
    assert find(False) is None
    assert find(True, num_processes=1) is None
    for name, value in (SLURM | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}).items():
        monkeypatch.setenv(name, value)
    assert find() is None
    assert find(True) is None
    monkeypatch.setenv("SLURM_NTASKS", "2")
    assert find(False) is None


def test_flags(monkeypatch):
    flags = {"num_processes": 2, "process_id": 1}
    assert find(coordinator_address="h:1", **flags) == Place("h:1", 2, 1)
    assert find(True, coordinator_address="h", **flags).coordinator == f"h:{PORT}"
    assert find(coordinator_address="[::1]", **flags).address == ("::1", PORT)
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "env:2")
    assert find(**flags).address == ("env", 2)
    monkeypatch.setenv("JAX_LOCAL_DEVICE_IDS", "0,1")
    assert find(**flags).local_devices == (0, 1)
    assert find() is None, "an address alone does not make a cluster"


@pytest.mark.parametrize(
    ("distributed", "flags", "said"),
    [
        (False, {"num_processes": 2}, "--num_processes contradicts --nodistributed"),
        (True, {}, "several processes need --coordinator_address, --num_processes, --process_id"),
        (None, {"process_id": 0, "num_processes": 2}, "several processes need --coordinator_address:"),
        (
            None,
            {"coordinator_address": "h:1", "num_processes": 2, "process_id": 2},
            "--process_id=2 must be from 0 to 1",
        ),
        (None, {"coordinator_address": "h:x", "num_processes": 2, "process_id": 1}, "must be host:port"),
    ],
)
def test_what_cannot_be_is_refused(distributed, flags, said):
    with pytest.raises(UsageError) as error:
        find(distributed, **flags)
    assert said in str(error.value)


def test_slurm(monkeypatch):
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    # JAX's own port, by the job's number: two jobs may share a node. One process a node takes all its GPUs.
    assert find() == find(True) == Place("gpu07:61445", 3, 2)
    monkeypatch.setenv("JAX_COORDINATOR_PORT", "9")
    assert find().coordinator == "gpu07:9"
    for tasks in ("2,1", "4(x2)"):
        monkeypatch.setenv("SLURM_STEP_TASKS_PER_NODE", tasks)
        assert find().local_devices == (0,), tasks
    assert find(process_id=0).process_id == 0, "a flag wins"


def test_gke(on_tpu, metadata):
    on_tpu.setenv("TPU_WORKER_HOSTNAMES", "run-slice-0-0.run,run-slice-0-1.run")
    on_tpu.setenv("TPU_WORKER_ID", "1")
    assert find(True) == Place(f"run-slice-0-0.run:{PORT}", 2, 1)


def test_tpu_vms(metadata, monkeypatch):
    metadata |= {
        "agent-worker-number": "3",
        "worker-network-endpoints": ",".join(f"w:{i}:10.0.0.{i}" for i in range(4)),
    }
    assert find(True) == Place(f"10.0.0.0:{PORT}", 4, 3)
    monkeypatch.setenv("JAX_COORDINATOR_PORT", "8471")
    assert find(True).coordinator == "10.0.0.0:8471"
    metadata |= {"agent-worker-number": "0", "worker-network-endpoints": "10.0.0.5"}
    assert find(True) is None, "a slice of one host"


def test_a_cluster_that_cannot_be_asked(metadata):
    metadata |= {"agent-worker-number": "0", "worker-network-endpoints": "a:b"}
    with pytest.raises(
        UsageError, match="unsupported worker-network-endpoints format: a:b.; give --coordinator_address"
    ):
        find(True)


def test_a_tpu_that_is_not_used_is_no_reason_to_wait_for_others(metadata):
    metadata |= {"agent-worker-number": "1", "worker-network-endpoints": "10.0.0.5,10.0.0.6"}
    platforms = jax.config.jax_platforms
    jax.config.update("jax_platforms", "cpu")
    try:
        assert find() is None
        assert find(True).num_processes == 2
    finally:
        jax.config.update("jax_platforms", platforms)
    if not platforms:
        assert find().num_processes == 2
