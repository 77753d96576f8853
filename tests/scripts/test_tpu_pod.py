"""scripts/tpu_pod.sh and scripts/pod_host.sh against a fake gcloud whose hosts are folders."""

import re
import time

from tests.scripts import cloud as fakes

ZONE = "--zone=us-east5-a"
CREATE = ("create", "pod", ZONE, "--accelerator-type=v5p-16")
FLAGS = ("--config=a.py", "--workdir=FAKE/run", '--config.task.x=it\'s "$HOME" *  ${B} `id`', "--config.y=")


def pod(cloud, *arguments, code=0, **environment):
    """What scripts/tpu_pod.sh prints; it must end with this exit code."""
    done = cloud.bash("scripts/tpu_pod.sh", *arguments, **environment)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def flags(cloud):
    return [flag.replace("FAKE", str(cloud.fake)) for flag in FLAGS]


def launch(cloud, *options, **more):
    return pod(cloud, "launch", "pod", ZONE, *options, "--", *flags(cloud), **more)


def ready(cloud):
    cloud.set(vm="READY")
    pod(cloud, "install", "pod", ZONE)
    cloud.calls()


def wait_for(path, text=""):
    for _ in range(400):
        if path.exists() and text in path.read_text():
            return
        time.sleep(0.05)
    raise AssertionError(f"no {text!r} in {path}")


def state(cloud, host, name):
    return cloud.fake / f"host{host}" / ".r2vpo_jax_run" / name


def test_from_nothing_to_a_run_to_nothing(cloud):
    assert "paid for from now on" in pod(cloud, *CREATE, "--spot")
    (create,) = (call for call in cloud.calls("gcloud") if "create" in call)
    assert " ".join(create) == (
        "gcloud compute tpus tpu-vm create pod --zone=us-east5-a --accelerator-type=v5p-16 --version=v2-alpha-tpuv5 --spot"
    )

    assert "host1: installed" in pod(cloud, "install", "pod", ZONE)
    calls = cloud.calls()
    ssh = [call for call in calls if call[3:5] == ["tpu-vm", "ssh"]]
    assert [call[7] for call in ssh] == ["--worker=0", "--worker=1", "--worker=all"], "keys reach the hosts one by one"
    assert [call[8] for call in ssh[:2]] == ["--command=true"] * 2
    pip = next(" ".join(call[2:]) for call in calls if call[:2] == ["uv", "pip"])
    assert pip == "install --quiet --python .venv/bin/python -c constraints.txt -e .[tpu,gcs,reasoning]"

    settings = ("--until-done=7", "--env=A=b c", "--env=B=$HOME", "--logs-to=gs://bucket/logs/", "--grace=60")
    assert launch(cloud, *settings).count("started") == 2
    calls = cloud.calls()
    assert ["sudo", "loginctl", "enable-linger"] in [call[:3] for call in calls]
    units = [call for call in calls if call[0] == "systemd-run"]
    assert len(units) == 2
    for wanted in ("--property=KillMode=mixed", "--property=TimeoutStopSec=60"):
        assert wanted in units[0]
    assert not [word for word in units[0] if "config" in word], "systemd would replace each $ in it"
    for host in (0, 1):
        wait_for(state(cloud, host, "log"), "iteration 1")
        arguments = (cloud.fake / f"host{host}" / "arguments").read_text().splitlines()
        assert arguments == ["-m", "experiments.train", *flags(cloud)]
        environment = (cloud.fake / f"host{host}" / "environment").read_text().splitlines()
        assert {"A=b c", "B=$HOME"} <= set(environment)

    assert launch(cloud, *settings).count("runs already") == 2
    said = pod(cloud, "launch", "pod", ZONE, "--", f"--workdir={cloud.fake}/other", code=1)
    assert "another run is going on" in said
    assert "a run is going on here" in pod(cloud, "install", "pod", ZONE, code=2)

    said = pod(cloud, "status", "pod", ZONE)
    assert "# slice: READY" in said
    assert said.count("; up; ") == 2
    assert said.count("running, start 1") == 2
    assert "iteration 1" in pod(cloud, "logs", "pod", ZONE, "--worker=1", "--lines=5")
    assert cloud.calls("gcloud")[-1][7:] == ["--worker=1", "--command=bash r2vpo_jax/scripts/pod_host.sh log 5"]

    said = pod(cloud, "stop", "pod", ZONE)
    assert said.count("ended with 143: stopped by SIGTERM") == 2
    assert state(cloud, 0, "log").read_text().count("saved") == 1, "SIGTERM must reach the trainer once"
    assert "saved" in (cloud.fake / "bucket" / "logs" / "host1.log").read_text()
    assert "ended with 143" in pod(cloud, "stop", "pod", ZONE)

    cloud.set(go_on="")
    launch(cloud, "--until-done")
    wait_for(state(cloud, 1, "status"), "ended with 0: the run is done")
    assert "ended with 0: the run is done" in pod(cloud, "status", "pod", ZONE)
    assert "saved" in state(cloud, 0, "log.previous").read_text()

    assert "give --yes" in pod(cloud, "delete", "pod", ZONE, code=2)
    pod(cloud, "delete", "pod", ZONE, "--yes")
    assert "there is no pod" in pod(cloud, "delete", "pod", ZONE, "--yes")
    assert "# slice: none" in pod(cloud, "status", "pod", ZONE, code=1)


def test_by_force(cloud):
    ready(cloud)
    launch(cloud)
    wait_for(state(cloud, 1, "log"), "iteration 1")
    assert pod(cloud, "stop", "pod", ZONE, "--force").count("gone") == 2


def test_a_queued_resource(cloud):
    cloud.set(polls=4)
    said = pod(cloud, *CREATE, "--queued", "--reserved", "--create-with=--valid-until-duration=6h", "--wait")
    assert "WAITING_FOR_RESOURCES" in said
    (create,) = (call for call in cloud.calls() if "create" in call)
    assert " ".join(create[3:]) == (
        "queued-resources create pod --node-id=pod --zone=us-east5-a --accelerator-type=v5p-16 "
        "--runtime-version=v2-alpha-tpuv5 --valid-until-duration=6h --reserved"
    )
    assert "there already: READY, queued resource ACTIVE" in pod(cloud, *CREATE, "--queued", "--wait")
    assert not [call for call in cloud.calls() if "create" in call]

    cloud.set(vm="PREEMPTED", queued="SUSPENDED")
    for command in (("status",), ("install",)):
        said = pod(cloud, *command, "pod", ZONE, code=1 if command == ("status",) else 2)
        assert "SUSPENDED" in said
        assert "launch the same command, which goes on from the last checkpoint" in said
    assert "delete it first" in pod(cloud, *CREATE, "--queued", code=2)
    cloud.calls()
    pod(cloud, "delete", "pod", ZONE, "--yes")
    (delete,) = (call for call in cloud.calls() if "delete" in call)
    assert " ".join(delete[3:]) == "queued-resources delete pod --zone=us-east5-a --force --quiet"


def test_what_goes_wrong_is_said(cloud):
    cloud.set(create_fails=1)
    said = pod(cloud, *CREATE, code=1)
    assert "no more capacity" in said
    assert "try --queued --wait, another zone, or --spot" in said
    cloud.set(create_fails=None, queued="FAILED")
    assert "delete it first" in pod(cloud, *CREATE, code=2)
    cloud.set(queued=None)
    assert "is not there" in pod(cloud, "install", "pod", ZONE, code=2)

    cloud.set(vm="READY", keeps="")
    assert "still there, and paid for" in pod(cloud, "delete", "pod", ZONE, "--yes", code=1)
    cloud.set(asks_fail="")
    assert "gcloud could not be asked" in pod(cloud, "delete", "pod", ZONE, "--yes", code=2)
    cloud.set(asks_fail=None)

    # A host that does not answer, and then one on which there is nothing.
    cloud.set(unreachable=1)
    assert "Connection timed out" in pod(cloud, "install", "pod", ZONE, code=255)
    cloud.set(unreachable=None)
    assert "is the code installed" in launch(cloud, code=1)
    pod(cloud, "install", "pod", ZONE)
    launch(cloud)
    cloud.set(unreachable=1)
    said = pod(cloud, "status", "pod", ZONE, code=1)
    assert "host0: " in said
    assert "worker 1: cannot be asked" in said
    cloud.set(unreachable=None)
    wait_for(state(cloud, 1, "log"), "iteration 1")
    pod(cloud, "stop", "pod", ZONE)
    # A host that went down with its run.
    state(cloud, 0, "status").write_text("2026-01-01T00:00:00Z running, start 1, from iteration 40\n")
    assert "host0: " in pod(cloud, "status", "pod", ZONE)
    assert "gone (the host was restarted" in pod(cloud, "status", "pod", ZONE)


def test_a_workdir_that_not_all_hosts_see(cloud):
    ready(cloud)
    assert "not on a disk that all hosts see" in launch(cloud, code=2, SEE_SECONDS="0")
    assert "could not write to" in pod(cloud, "launch", "pod", ZONE, "--", "--workdir=/proc/no/such/disk", code=1)
    assert not cloud.calls("systemd-run")


def test_what_is_installed_is_head(cloud):
    cloud.set(vm="READY")
    assert "installed" in pod(cloud, "install", "pod", ZONE)
    code = cloud.fake / "host1" / "r2vpo_jax"
    (code / "weights").write_text("mine")
    (cloud.checkout / "scripts" / "plot_objectives.py").unlink()
    (cloud.checkout / "constraints.txt").write_text("changed")
    assert "not committed" in pod(cloud, "install", "pod", ZONE, code=2)
    assert "changes that are not committed are not sent" in pod(cloud, "install", "pod", ZONE, "--allow-dirty")
    assert (code / "constraints.txt").read_text() != "changed"
    fakes.commit(cloud.checkout)
    pod(cloud, "install", "pod", ZONE)
    assert (code / "constraints.txt").read_text() == "changed"
    assert not (code / "scripts" / "plot_objectives.py").exists(), "what was deleted would still be imported"
    assert (code / "weights").read_text() == "mine"


def test_one_host_needs_no_peers(cloud):
    cloud.set(workers=1)
    ready(cloud)
    launch(cloud)
    wait_for(state(cloud, 0, "log"), "iteration 1")
    assert not [call for call in cloud.calls() if "see" in " ".join(call)], "no shared disk is looked for"


def test_a_dry_run_prints_what_is_run(cloud):
    """Word for word, with two hosts that are ready, but for the random name of a file."""

    def plain(calls):
        return [[re.sub(r"\.seen_by_all_hosts[.\d]*", ".seen", word) for word in call] for call in calls]

    workdir = f"--workdir={cloud.fake}/run of mine"
    launched = ("launch", "pod", "--until-done", "--env=A=b c", "--", workdir, "--config.x=it's $HOME", "--config.y=")
    for arguments in (
        CREATE,
        ("install", "pod", ZONE, "--project=p", "--ssh-with=--internal-ip"),
        launched,
        ("status", "pod"),
        ("logs", "pod", "--worker=1"),
        ("stop", "pod"),
        ("stop", "pod", "--force"),
        ("delete", "pod", "--yes"),
    ):
        assumed = pod(cloud, *arguments[:2], "--dry-run", *arguments[2:])
        assert not cloud.calls(), "nothing is run"
        pod(cloud, *arguments)
        assert plain(fakes.printed(assumed, "gcloud")) == plain(
            [call for call in cloud.calls("gcloud") if call[1] != "storage"]
        ), arguments


def test_bad_arguments_are_refused_before_anything_is_asked(cloud):
    good = "--workdir=/shared/run"
    for arguments, said in (
        ((), "tpu_pod.sh create"),
        (("restart", "pod"), "tpu_pod.sh create"),
        (("create",), "tpu_pod.sh create"),
        (("create", "Pod;rm"), "cannot be the name"),
        (("create", "--zone=a"), "cannot be the name"),
        (("create", "pod"), "needs --accelerator-type="),
        (("create", "pod", "--accelerator-type=v9-8"), "give --runtime-version= for v9-8"),
        (("create", "pod", "--workdir=a"), "create has no option --workdir=a"),
        (("stop", "pod", "--yes"), "stop has no option --yes"),
        (("logs", "pod", "--lines=all"), "'all' is not a whole number"),
        (("launch", "pod", good), "launch has no option --workdir"),
        (("launch", "pod"), "come after --"),
        (("launch", "pod", "--", "--config=a.py"), "needs --workdir="),
        (("launch", "pod", "--", "--workdir=runs/a"), "give a full path"),
        (("launch", "pod", "--", "--workdir=s3://bucket/run"), "of addresses, only gs://BUCKET/NAME will do"),
        (("launch", "pod", "--logs-to=bucket", "--", good), "does not begin with gs://"),
        (("launch", "pod", "--env=A", "--", good), "has no option --env=A"),
    ):
        assert said in pod(cloud, *arguments, code=2), arguments
        assert not cloud.calls(), arguments
