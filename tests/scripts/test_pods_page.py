"""The commands of docs/pods.md, one section after the other as they stand, against the fakes of gcloud and the others."""

import re
import subprocess
import textwrap

from tests.helpers.paths import ROOT

PAGE = (ROOT / "docs" / "pods.md").read_text()
COMMANDS = {
    title: [textwrap.dedent(block) for block in re.findall(r"^ *```bash\n(.*?)^ *```$", text, re.MULTILINE | re.DOTALL)]
    for title, text in re.findall(r"^#+ (.*?)\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL)
}


def run(cloud, blocks, shared="/shared"):
    """What blocks of commands print, in turn; /shared may be another folder."""
    outputs = []
    for block in blocks:
        done = cloud.bash("-euo", "pipefail", "-c", re.sub(r"(?<=[ =:])/shared\b", str(shared), block))
        assert done.returncode == 0, block + done.stdout + done.stderr
        outputs.append(done.stdout + done.stderr)
    return outputs


def test_the_page_has_these_commands():
    """So that a section that is added is added below too."""
    counts = {title: len(blocks) for title, blocks in COMMANDS.items() if blocks}
    assert counts == {
        "Several hosts: TPU pods, GKE, SLURM": 1,
        "A TPU VM": 9,
        "A queued resource": 2,
        "GKE": 6,
        "SLURM": 1,
        "Several GPU hosts by hand": 1,
        "What it costs": 1,
    }


def test_the_dry_runs_run_nothing(cloud):
    (output,) = run(cloud, COMMANDS["Several hosts: TPU pods, GKE, SLURM"])
    assert not cloud.calls()
    for said in (
        "tpu-vm create pod",
        "pod_host.sh start",
        "kubectl apply",
        "kind: JobSet",
        "srun --nodes=2",
        "scontrol requeue",
    ):
        assert said in output


def test_a_tpu_vm(cloud):
    outputs = run(cloud, COMMANDS["A TPU VM"], shared=cloud.fake / "shared")
    assert "host1: started" in outputs[5]
    assert "# slice: READY" in outputs[5]
    assert "host1: started" in outputs[6]
    assert outputs[7].count("ended with 143") == 2
    calls = cloud.calls()
    (mounts,) = {call[2:] for call in map(tuple, calls) if call[0] == "sudo" and "mount" in call}
    assert mounts == ("10.0.1.9:" + str(cloud.fake / "shared"), str(cloud.fake / "shared"))
    assert ["filestore", "instances", "delete"] in [call[1:4] for call in calls]
    assert not (cloud.fake / "vm").exists()
    arguments = (cloud.fake / "host1" / "arguments").read_text().split()
    assert arguments[:2] == ["-m", "experiments.train"]
    assert "--distributed" not in arguments, "the program finds its peers"


def test_a_queued_resource(cloud):
    cloud.set(polls=3)
    run(cloud, COMMANDS["A queued resource"][:1])
    cloud.set(polls=3, vm="PREEMPTED", queued="SUSPENDED")
    run(cloud, COMMANDS["A queued resource"][1:])
    assert (cloud.fake / "queued").read_text() == "ACTIVE\n"


def test_gke_slurm_and_by_hand(cloud):
    run(cloud, COMMANDS["GKE"])
    verbs = [call[1] for call in cloud.calls("kubectl")]
    assert verbs == ["apply", "apply", "apply", "patch", "get", "get", "logs", "patch", "delete", "delete"]
    run(cloud, COMMANDS["SLURM"])
    (call,) = cloud.calls()
    assert call[0] == "sbatch"
    assert call[call.index("scripts/slurm_train.sbatch") + 1].startswith("--config=")
    run(cloud, COMMANDS["Several GPU hosts by hand"])
    first, second = cloud.calls()
    assert [call[1] for call in (first, second)] == ["host0", "host1"]
    assert "--process_id=1 >" in second[2]
    assert subprocess.run(["bash", "-n", "-c", second[2]]).returncode == 0
    run(cloud, COMMANDS["What it costs"])


def test_what_the_commands_name_is_there():
    text = "\n".join(block for blocks in COMMANDS.values() for block in blocks)
    for path in set(re.findall(r"(?<![\w/.])(?:scripts|experiments)/[\w/.]+\.(?:py|sh|sbatch)", text)):
        assert (ROOT / path).exists(), path
    for module in set(re.findall(r"-m (experiments\.\w+)", text)):
        assert (ROOT / f"{module.replace('.', '/')}.py").exists()
