"""scripts/gke_jobset.sh and scripts/slurm_train.sbatch against fakes, and all shell scripts against shellcheck."""

import pathlib
import re
import shutil
import subprocess
import sys

import pytest
import yaml

from tests.helpers.paths import ROOT
from tests.scripts import cloud as fakes

LAUNCH = (
    "launch", "pod", "--image=registry/me/r2vpo_jax:1", "--accelerator=tpu-v5p-slice", "--topology=2x2x2", "--hosts=2",
    "--claim=disk", "--namespace=team",
)  # fmt: skip
AWKWARD = ('--config.x=it\'s "$HOME" $(PROCESS_ID) \\ & #', "--config.y=", "--config.z=@NAME@ &")


def gke(cloud, *arguments, code=0):
    done = cloud.bash("scripts/gke_jobset.sh", *arguments)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def expanded(argument, **environment):
    """What Kubernetes makes of an argument: $(NAME) is replaced where NAME is known, $$ is $."""
    return re.sub(
        r"\$\$|\$\((\w+)\)", lambda m: "$" if m[0] == "$$" else environment.get(m[1], m[0]), argument
    )  # fmt: skip


def test_the_manifest(cloud):
    gke(cloud, *LAUNCH, "--spot", "--restarts=9", "--", "--workdir=/shared/run", *AWKWARD)
    apply, resume = cloud.calls()
    assert apply == ["kubectl", "apply", "--namespace=team", "--filename=.cache/pod/pod.yaml"]
    assert resume[1:4] == ["patch", "jobset", "pod"]
    made = yaml.safe_load((cloud.checkout / ".cache" / "pod" / "pod.yaml").read_text())
    assert (made["apiVersion"], made["kind"], made["metadata"]["name"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet", "pod")
    assert made["spec"]["failurePolicy"]["maxRestarts"] == 9
    (replicated,) = made["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    assert (job["completionMode"], job["completions"], job["parallelism"]) == ("Indexed", 2, 2)
    assert job["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"] == [2]
    pod = job["template"]["spec"]
    assert pod["restartPolicy"] == "Never"
    assert pod["securityContext"]["runAsNonRoot"]
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5p-slice",
        "cloud.google.com/gke-tpu-topology": "2x2x2",
        "cloud.google.com/gke-spot": "true",
    }
    assert pod["volumes"][0]["persistentVolumeClaim"]["claimName"] == "disk"
    (container,) = pod["containers"]
    assert container["image"] == "registry/me/r2vpo_jax:1"
    assert container["resources"]["limits"] == {"google.com/tpu": 4}
    # Which pod is which, and who is the first, is found by the program from what GKE sets.
    assert "env" not in container
    assert container["ports"] == [{"containerPort": 8476}]
    assert [expanded(argument) for argument in container["args"]] == [
        "--max-restarts=0", "--", "python", "-m", "experiments.train", "--workdir=/shared/run", *AWKWARD,
    ]  # fmt: skip


def test_one_host_on_demand(cloud):
    gke(cloud, *LAUNCH, "--hosts=1", "--", "--workdir=/shared/run")
    text = (cloud.checkout / ".cache" / "pod" / "pod.yaml").read_text()
    assert "spot" not in text
    yaml.safe_load(text)


def test_the_image_holds_what_is_committed(cloud):
    (cloud.checkout / "secret").write_text("token")
    gke(cloud, "image", "pod", "--image=registry/me/r2vpo_jax:1")
    assert cloud.calls() == [
        ["docker", "build", "--file=scripts/gke/Dockerfile", "--tag=registry/me/r2vpo_jax:1", "-"],
        ["docker", "push", "registry/me/r2vpo_jax:1"],
    ]
    context = (cloud.fake / "context").read_text().split()
    assert "scripts/gke/Dockerfile" in context
    assert "secret" not in context
    dockerfile = (ROOT / "scripts" / "gke" / "Dockerfile").read_text()
    assert re.search(r"^USER trainer$", dockerfile, re.MULTILINE)
    assert "-c constraints.txt" in dockerfile
    cloud.set(docker_fails=3)
    gke(cloud, "image", "pod", "--image=a:1", code=3)
    assert [call[1] for call in cloud.calls()] == ["build"]


def test_a_dry_run_of_gke_prints_what_is_run(cloud):
    for arguments in (
        ("image", "pod", "--image=registry/me/r2vpo_jax:1"),
        (*LAUNCH, "--", "--workdir=/shared/run", *AWKWARD),
        ("status", "pod", "--context=c"),
        ("logs", "pod", "--worker=1", "--follow"),
        ("stop", "pod"),
        ("delete", "pod", "--yes"),
    ):
        shown = gke(cloud, *arguments[:2], "--dry-run", *arguments[2:])
        assert not cloud.calls(), "nothing is run"
        gke(cloud, *arguments)
        ran = cloud.calls()
        manifest = cloud.checkout / ".cache" / "pod" / "pod.yaml"
        before = manifest.read_text() if manifest.exists() else ""
        # Pasted into a shell it does the same.
        assert cloud.bash("-c", shown).returncode == 0
        assert cloud.calls() == ran
        assert (manifest.read_text() if manifest.exists() else "") == before


def test_gke_refuses(cloud):
    run = "--workdir=/shared/run"
    for arguments, said in (
        ((), "gke_jobset.sh launch"),
        (("launch", "a_b"), "cannot be the name"),
        (("image", "pod"), "needs --image="),
        (("launch", "pod", "--", run), "needs --image="),
        ((*LAUNCH, "--hosts=two", "--", run), "needs --hosts=, a whole number"),
        ((*LAUNCH, "--claim=a: b", "--", run), "needs --claim="),
        ((*LAUNCH, "--", "--workdir=/tmp/run"), "needs --workdir=/shared/"),
        ((*LAUNCH, "--", run, "--config.x=a\nb"), "line break"),
        ((*LAUNCH, "--workers=3", "--", run), "no option --workers=3"),
        (("delete", "pod"), "give --yes"),
    ):
        assert said in gke(cloud, *arguments, code=2), arguments
        assert not cloud.calls(), arguments
    cloud.set(kubectl_fails=1)
    gke(cloud, *LAUNCH, "--", run, code=1)
    assert len(cloud.calls()) == 1, "after a failure nothing more is done"


# SLURM --------------------------------------------------------------------------------------------------------

# $1… are srun's arguments; what happens is in $FAKE/happens.
STEP = 'source "$FAKE/happens"\n'
SAVES = 'mkdir -p "$W/checkpoints/manifests"; echo {} > "$W/checkpoints/manifests/20.json"\n'


def slurm(cloud, happens, *arguments, **environment):
    """(exit code, what it said, whether it was requeued)."""
    cloud.set(trainer=STEP, happens=happens)
    shutil.rmtree(cloud.fake / "run", ignore_errors=True)
    (cloud.fake / "run").mkdir()
    spool = cloud.fake / "slurm_script"
    shutil.copy(cloud.checkout / "scripts" / "slurm_train.sbatch", spool)
    found = cloud.bash(
        spool, f"--workdir={cloud.fake}/run", *arguments, W=f"{cloud.fake}/run", SLURM_SUBMIT_DIR=str(cloud.checkout),
        SLURM_JOB_ID="77", SLURM_JOB_NUM_NODES="2", SLURM_GPUS_ON_NODE="4", **environment,
    )  # fmt: skip
    calls = cloud.calls()
    assert [call[0] for call in calls[:1]] == ["srun"]
    assert calls[1:] in ([], [["scontrol", "requeue", "77"]])
    return found.returncode, found.stdout + found.stderr, len(calls) == 2


def test_when_a_job_is_requeued(cloud):
    finishes = 'mkdir -p "$W/report"; echo {} > "$W/report/summary.json"; exit 0'
    for name, happens, environment, expected in (
        ("done", finishes, {}, (0, False)),
        ("stopped at the time limit, saved", "exit 0", {}, (0, True)),
        ("a node died after a checkpoint", SAVES + "exit 137", {}, (0, True)),
        ("bad input", "exit 2", {}, (2, False)),
        ("fails at once", "exit 1", {}, (1, False)),
        ("too often", "exit 0", {"SLURM_RESTART_COUNT": "50"}, (1, False)),
        ("this shell is told too", f'kill -TERM $PPID; {SAVES} exit 0', {}, (0, True)),
    ):  # fmt: skip
        code, said, requeued = slurm(cloud, happens, **environment)
        assert (code, requeued) == expected, (name, said)
    assert slurm(cloud, "exit 0", "--stop_after_iteration=3")[::2] == (0, False)


def test_what_slurm_runs(cloud):
    cloud.set(trainer="exit 2")
    arguments = ("scripts/slurm_train.sbatch", "--workdir=/shared/run", *AWKWARD)
    shape = {"SLURM_JOB_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "4"}
    cloud.bash(*arguments, **shape)
    (call,) = cloud.calls()
    assert call == [
        "srun", "--nodes=2", "--ntasks=2", "--ntasks-per-node=1", "--kill-on-bad-exit=1",
        ".venv/bin/python", "-m", "experiments.train", "--workdir=/shared/run", *AWKWARD,
    ]  # fmt: skip
    shown = cloud.bash(*arguments, DRY_RUN="1", **shape).stdout
    assert not cloud.calls()
    assert fakes.printed(shown, "srun", "scontrol") == [call, ["scontrol", "requeue", "JOB"]]
    cloud.bash(*arguments, **shape | {"SLURM_JOB_NUM_NODES": "1"})
    assert cloud.calls()[0][1:3] == ["--nodes=1", "--ntasks=1"]
    for bad in ((), ("--workdir=runs/a",)):
        done = cloud.bash(arguments[0], *bad)
        assert done.returncode == 2
        assert "/a/full/path" in done.stderr
    options = re.findall(r"^#SBATCH (\S+)", (ROOT / "scripts" / "slurm_train.sbatch").read_text(), re.MULTILINE)
    assert {"--requeue", "--signal=TERM@120", "--ntasks-per-node=1", "--open-mode=append"} <= set(options)


# Shellcheck ---------------------------------------------------------------------------------------------------


def test_shellcheck():
    here = pathlib.Path(sys.executable).parent / "shellcheck"
    program = str(here) if here.exists() else shutil.which("shellcheck")
    if program is None:
        pytest.skip("shellcheck is not installed; it comes with: pip install -e '.[dev]'")
    scripts = sorted(p for p in (ROOT / "scripts").iterdir() if p.suffix in (".sh", ".sbatch"))
    fakes_of = [p for p in sorted(fakes.FAKES.iterdir()) if p.name != "record" and not p.is_symlink()]
    done = subprocess.run([program, "--external-sources", *scripts], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout
    assert len(scripts) >= 8
    done = subprocess.run(
        [program, "--exclude=SC1091,SC2154", *fakes_of], capture_output=True, text=True, cwd=ROOT
    )  # `record` sets `program`
    assert done.returncode == 0, done.stdout
