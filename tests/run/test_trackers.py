"""Trackers: they have the rows of metrics.jsonl once each, whatever happens to the run or to them."""

import contextlib
import http.server
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import types

import pytest

from r2vpo_jax import config as config_lib
from r2vpo_jax import storage
from r2vpo_jax.errors import UsageError
from r2vpo_jax.run import files, trackers, wandb_tracker
from r2vpo_jax.run.tracker import scalars, split_of
from r2vpo_jax.training import trainer
from r2vpo_jax.training.trainer import train
from tests.helpers.runs import rows
from tests.run.test_tensorboard import points, tables

ALL = ("tensorboard", "wandb", "trackio")
_outside = None  # addresses that were asked for, where somebody wants to know


def _hear(event, arguments):
    if _outside is None or event not in ("socket.connect", "socket.getaddrinfo"):
        return
    address = arguments[1] if event == "socket.connect" else arguments
    if isinstance(address, tuple) and address[0] not in ("127.0.0.1", "::1", "localhost"):
        _outside.append(address)


@pytest.fixture(scope="session")
def packages(tmp_path_factory):
    """Both packages, with everything that they keep in a folder of the tests."""
    folder = tmp_path_factory.mktemp("trackers")
    kept = {"TRACKIO_DIR": folder / "trackio"}  # read when it is imported
    kept |= {f"WANDB_{name}_DIR": folder / f"wandb_{name}" for name in ("CACHE", "CONFIG", "DATA", "ARTIFACT")}
    with pytest.MonkeyPatch.context() as patch:
        for name, path in kept.items():
            patch.setenv(name, str(path))
        for name in ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL", "WANDB_API_KEY", "WANDB_DIR", "WANDB_PROJECT"):
            patch.delenv(name, raising=False)
        patch.setenv("NETRC", str(folder / "netrc"))
        patch.setenv("WANDB_ERROR_REPORTING", "false")
        patch.setenv("WANDB_SILENT", "true")
        patch.setenv("WANDB_CONSOLE", "off")
        pytest.importorskip("wandb", reason="pip install 'r2vpo_jax[trackers]'")
        pytest.importorskip("trackio", reason="pip install 'r2vpo_jax[trackers]'")
        yield


@pytest.fixture
def wandb(packages, monkeypatch):
    """Offline."""
    import wandb

    monkeypatch.setenv("WANDB_MODE", "offline")
    yield wandb
    with contextlib.suppress(ConnectionError):  # of a service that a test has killed
        wandb.teardown()


@pytest.fixture(scope="session")
def ears():
    sys.addaudithook(_hear)  # for good


@pytest.fixture
def no_network(ears, monkeypatch):
    """What this process and its children ask of the world: addresses, and requests to a proxy that all HTTP goes through."""
    global _outside
    asked = []

    class Proxy(http.server.BaseHTTPRequestHandler):
        def handle_one_request(self):
            asked.append(self.rfile.readline())
            self.close_connection = True

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Proxy) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        for name in ("http_proxy", "https_proxy", "all_proxy"):
            for spelled in (name, name.upper()):
                monkeypatch.setenv(spelled, f"http://127.0.0.1:{server.server_port}")
        monkeypatch.delenv("no_proxy", raising=False)
        monkeypatch.delenv("NO_PROXY", raising=False)
        _outside = asked
        yield asked
        _outside = None
        server.shutdown()


def in_wandb(folder: pathlib.Path):
    """[(step, numbers by name, tables)] of all files of W&B in a folder, in the order of their processes."""
    import wandb

    wandb.teardown()  # only then are the files whole
    found = []
    for file in sorted(folder.glob("wandb/*run-*/*.wandb")):
        for record in wandb_tracker.records(file):
            values = {tuple(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            tables = {path: json.loads((file.parent / "files" / path).read_text()) for path in _tables(values)}
            numbers = {name[0]: value for name, value in values.items() if len(name) == 1 and name[0][0] != "_"}
            found.append((record.history.step.num, numbers, list(tables.values())))
    return found


def _tables(values):
    return [value for name, value in values.items() if name == ("samples", "path")]


def in_trackio(workdir, name="trackio"):
    from trackio.sqlite_storage import SQLiteStorage

    kept = json.loads((workdir / "trackers.json").read_text())[name]
    logs = SQLiteStorage.get_logs(kept["project"], kept["name"])
    return [{name: value for name, value in log.items() if name != "timestamp"} for log in logs]


def by_name(table):
    return [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]


def whole(sample):
    """Without the lists of its tokens."""
    return {name: value for name, value in sample.items() if not isinstance(value, list)}


def timeless(numbers):
    """As `rows` reads them: of an iteration that was done twice, the times may be those of the first."""
    return {name: value for name, value in numbers.items() if not name.startswith(files.TIME_PREFIXES)}


def assert_complete(workdir):
    """All three have all rows, once, and the samples."""
    written, samples = rows(workdir), [whole(sample) for sample in rows(workdir, "samples")]
    of = {row["iteration"]: [s for s in samples if s["iteration"] == row["iteration"]] for row in written}
    assert any(of.values())
    # W&B: the step is the line.
    there = in_wandb(workdir)
    assert [step for step, *_ in there] == list(range(len(written)))
    for row, (_, numbers, shown) in zip(written, there, strict=True):
        assert timeless(numbers) == pytest.approx(scalars(row) | {"iteration": row["iteration"]})
        assert [by_name(table) for table in shown] == ([of[row["iteration"]]] if row["kind"] != "evaluation" else [])
    # Trackio: the step is the iteration.
    logs = in_trackio(workdir)
    assert [log.pop("step") for log in logs] == [row["iteration"] for row in written]
    for row, log in zip(written, logs, strict=True):
        table = log.pop("samples", None)
        assert timeless(log) == pytest.approx(scalars(row))
        assert table == (
            None if row["kind"] == "evaluation" else {"_type": "trackio.table", "_value": of[row["iteration"]]}
        )
    # TensorBoard, likewise.
    points_there, *_ = points(workdir / "tensorboard")
    found = {(step, name): value for (step, name), value in points_there.items() if timeless({name: value})}
    expected = {(row["iteration"], name): [value] for row in written for name, value in scalars(row).items()}
    assert found.keys() == expected.keys()
    for key, values in expected.items():
        assert found[key] == pytest.approx(values, rel=1e-6), key
    assert tables_of(workdir) == {iteration: len(found) for iteration, found in of.items() if found}


def tables_of(workdir):
    """Samples in the tables of TensorBoard by iteration."""
    return {step: text.count("\n") - 1 for step, text in tables(workdir / "tensorboard")}


class Killed(Exception):
    pass


def killed_after(number):
    def on_iteration(iteration):
        if iteration.number == number:
            raise Killed

    return on_iteration


@pytest.mark.slow
def test_a_run_killed_and_continued_is_one_run_in_all_of_them(wandb, no_network, tiny_config, tmp_path):
    """Killed after 3, with a checkpoint at 2. In the sweep that it is of; nothing is sent anywhere."""
    sweep = tmp_path / "grid"
    sweep.mkdir()
    (sweep / "sweep.json").write_text("{}")
    workdir = sweep / "runs" / "one"
    config = tiny_config(trainer={"trackers": ALL, "tracker_project": "test_killed"})
    with pytest.raises(Killed):
        train(config, workdir, on_iteration=killed_after(3))
    kept = json.loads((workdir / "trackers.json").read_text())
    assert [(kept[name]["project"], kept[name]["name"], kept[name]["group"]) for name in ("wandb", "trackio")] == [
        ("test_killed", "one", "grid")
    ] * 2
    assert len(in_wandb(workdir)) == len(rows(workdir)) == 2 + 3 + 1, "base scores, iterations, a validation"
    train(config, workdir)
    assert json.loads((workdir / "trackers.json").read_text()) == kept
    assert_complete(workdir)
    (file, _) = sorted(workdir.glob("wandb/offline-run-*"))
    assert file.name.endswith(kept["wandb"]["id"])
    assert no_network == []
    assert not [event for event in rows(workdir, "events") if event["event"] == "tracker_failed"]


def test_the_network_of_the_test_would_be_seen(no_network):
    """Of this process, and of one that it starts."""
    code = "import urllib.request; urllib.request.urlopen('https://api.wandb.ai', timeout=5)"
    subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60)
    assert [line.split()[:2] for line in no_network] == [[b"CONNECT", b"api.wandb.ai:443"]]
    with contextlib.suppress(OSError), socket.socket() as unconnected:
        unconnected.settimeout(0.01)
        unconnected.connect(("192.0.2.1", 9))  # reserved for documents
    assert no_network[1:] == [("192.0.2.1", 9)]


def kill_service():
    """The process that writes for W&B."""
    for folder in pathlib.Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == os.getpid() and b"wandb-core" in (folder / "cmdline").read_bytes():
                os.kill(int(folder.name), signal.SIGKILL)
                return
    raise AssertionError("no such process")


def test_trackers_that_fail_do_not_end_the_run(wandb, tiny_config, tmp_path, monkeypatch):
    """The service of one is killed after 1, the database of the other takes nothing from then on: said once each."""
    from trackio.sqlite_storage import SQLiteStorage

    def fail(iteration):
        if iteration.number == 1:
            kill_service()
            monkeypatch.setattr(SQLiteStorage, "bulk_log", full)

    def full(*_, **__):
        raise OSError("no space left")

    said = []
    config = tiny_config(trainer={"trackers": ALL, "tracker_project": "test_failing"})
    summary = train(config, tmp_path / "run", say=said.append, on_iteration=fail)
    assert summary == json.loads((tmp_path / "run" / "report" / "summary.json").read_text())
    lines = [line for line in said if line.startswith("TRACKER")]
    assert [line.split()[1] for line in lines] == ["wandb", "trackio", "wandb", "trackio"], lines
    assert "did not take a row (ConnectionResetError" in lines[0]
    assert "rows are not in its database" in lines[1]
    assert "failed" in lines[2]
    events = [event for event in rows(tmp_path / "run", "events") if event["event"] == "tracker_failed"]
    assert [event["tracker"] for event in events] == ["wandb", "trackio"]
    assert len({step for step, _ in points(tmp_path / "run" / "tensorboard")[0]}) == 1 + 4


# ---- opened and refused ----


def opened(workdir, *, names=("wandb",), positions=None, resumed=False, said=None, **settings):
    config = config_lib.from_dict({"trainer": {"trackers": names, **settings}})
    storage.path(workdir).mkdir(parents=True, exist_ok=True)
    made = trackers.Trackers(config, workdir, resumed=resumed, say=(said if said is not None else []).append)
    return files.RunFiles(workdir, positions or {}, write=True, trackers=made)


def row(iteration, split=None, **values):
    return {
        "kind": "evaluation" if split else "train",
        **({"split": split} if split else {}),
        "iteration": iteration,
        **values,
    }


def test_a_package_that_is_missing_is_said_before_anything_is_read(tiny_config, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "open_base_model", None)
    for name in ("wandb", "trackio"):
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(
            UsageError,
            match=rf"^trainer\.trackers={name} needs the package {name}: pip install 'r2vpo_jax\[trackers\]'",
        ):
            train(tiny_config(trainer={"trackers": (name,)}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_who_is_not_logged_in_is_told_so(wandb, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    with pytest.raises(
        UsageError, match=r"nobody is logged in; run `wandb login` or set WANDB_API_KEY, or set WANDB_MODE=offline"
    ):
        trackers.check(("wandb",))


@pytest.mark.slow
def test_a_server_that_does_not_answer_is_said(wandb, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    with pytest.raises(UsageError, match=r"^trainer\.trackers=wandb: Failed to authenticate .*set WANDB_MODE=offline"):
        trackers.check(("wandb",))


def test_trackio_elsewhere_is_refused(packages, monkeypatch):
    monkeypatch.setenv("TRACKIO_SPACE_ID", "somebody/somewhere")
    with pytest.raises(UsageError, match=r"TRACKIO_SPACE_ID is set; unset it, and use `trackio sync`"):
        trackers.check(("trackio",))


def test_one_that_cannot_be_opened_ends_a_run_that_begins_and_no_other(tmp_path, monkeypatch):
    def broken(*_):
        raise TimeoutError("no answer")

    monkeypatch.setattr(wandb_tracker, "WandbRun", broken)
    with pytest.raises(
        UsageError, match=r"trainer\.trackers=wandb cannot be opened \(TimeoutError: no answer\); leave it out"
    ):
        opened(tmp_path)
    said = []
    with opened(tmp_path, resumed=True, said=said) as run:
        run.record(row(1, **{"reward/mean": 0.5}))
    assert said[0].startswith("TRACKER wandb cannot be opened (TimeoutError: no answer): the run goes on without it")
    assert [event["event"] for event in files.read_jsonl(tmp_path / "events.jsonl")] == ["tracker_failed"]


def test_online_only_what_the_server_does_not_have_is_sent(packages, tmp_path, monkeypatch):
    """A server that has three rows of a run: of five, the last two are sent. A run that failed is shown as such."""
    import wandb

    sent, given = {}, {}

    def init(**arguments):
        given.update(arguments)
        return types.SimpleNamespace(
            step=3,
            define_metric=lambda *_, **__: None,
            log=lambda values, *, step, commit: sent.__setitem__(step, values),
            finish=lambda exit_code: given.update(exit_code=exit_code),
            settings=types.SimpleNamespace(wandb_dir=str(tmp_path)),
        )

    monkeypatch.setattr(wandb, "setup", lambda: types.SimpleNamespace(settings=types.SimpleNamespace(mode="online")))
    monkeypatch.setattr(wandb, "init", init)
    monkeypatch.setenv("WANDB_PROJECT", "of the environment")
    with contextlib.suppress(Killed), opened(tmp_path / "run") as run:
        for number, split in ((0, "test"), (0, "validation"), (1, None), (2, None), (2, "validation")):
            run.record(row(number, split, score=float(number)))
        raise Killed
    assert sent == {
        3: {"iteration": 2, "score": 2.0},
        4: {"iteration": 2, "validation/iteration": 2, "validation/score": 2.0},
    }
    kept = json.loads((tmp_path / "run" / "trackers.json").read_text())["wandb"]
    assert {name: given[name] for name in ("id", "name", "project", "resume", "exit_code")} == {
        "id": kept["id"], "name": "run", "project": "of the environment", "resume": "allow", "exit_code": 1,
    }  # fmt: skip
    assert given["settings"].reinit == "create_new"
    assert not {"key", "api_key"} & {name.lower() for name, _ in config_lib.leaves(given["config"])}
    # Another project is another run, which gets everything.
    with opened(tmp_path / "run", tracker_project="another", resumed=True):
        pass
    assert json.loads((tmp_path / "run" / "trackers.json").read_text())["wandb"]["id"] != kept["id"]


def test_a_name_that_another_run_has_in_trackio_is_made_longer(packages, tmp_path):
    """By its name a run is found again there."""
    for parent in ("a", "b", "a"):
        with opened(tmp_path / parent / "run", names=("trackio",), tracker_project="names") as run:
            run.record(row(1, score=1.0), [{"iteration": 1, "prompt": "1 + 1 =", "response": "|2|\n"}])
    names = [
        json.loads((tmp_path / parent / "run" / "trackers.json").read_text())["trackio"]["name"]
        for parent in ("a", "b")
    ]
    assert names[0] == "run"
    assert names[1].startswith("run-")
    for parent in ("a", "b"):
        (log,) = in_trackio(tmp_path / parent / "run")
        assert log["samples"]["_value"][0]["response"] == "|2|\n"


def test_in_a_store_its_files_are_on_this_machine(wandb, store, tmp_path, monkeypatch):
    """And its name is in the store; the run that goes on, in another process, has the same."""
    monkeypatch.chdir(tmp_path)
    workdir = store / "tracked"
    for positions in ({}, None):
        with opened(workdir, positions=positions) as run:
            run.record(row(1, score=1.0))
    found = in_wandb(tmp_path)
    assert [(step, values["score"]) for step, values, _ in found] == [(0, 1.0)]
    assert len(list(tmp_path.glob("wandb/offline-run-*"))) == 2
    assert json.loads((workdir / "trackers.json").read_text())["wandb"]["name"] == "tracked"


def test_files_of_several_blocks_are_read_and_torn_ones_to_where_they_are_whole(wandb, tmp_path):
    with opened(tmp_path) as run:
        for number in range(1, 5):
            run.record(row(number, **{f"reward/{name:04d}": number + name / 7 for name in range(1500)}))
    wandb.teardown()
    (file,) = tmp_path.glob("wandb/*run-*/*.wandb")
    assert file.stat().st_size > 4 * 32768
    found = [record.history.step.num for record in wandb_tracker.records(file)]
    assert found == [0, 1, 2, 3]
    (tmp_path / "torn.wandb").write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    torn = [record.history.step.num for record in wandb_tracker.records(tmp_path / "torn.wandb")]
    assert 0 < len(torn) < 4
    assert torn == found[: len(torn)]


def test_names_are_checked():
    for given in ("wandb,trackio", ("wandb", "trackio"), [" wandb ", "trackio,wandb"]):
        assert config_lib.from_dict({"trainer": {"trackers": given}}).trainer.trackers == ("wandb", "trackio")
    with pytest.raises(ValueError, match=r"trainer\.trackers='mlflow' is unknown; any of tensorboard, wandb, trackio"):
        config_lib.from_dict({"trainer": {"trackers": "mlflow"}})
    with pytest.raises(ValueError, match=r"trainer\.tensorboard is now trainer\.trackers"):
        config_lib.from_dict({"trainer": {"tensorboard": True}})
    assert split_of(row(1)) is None
