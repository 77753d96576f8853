"""The server of pages: what it shows, what it refuses, and how it ends."""

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading

import pytest

from r2vpo_jax import config as config_lib
from r2vpo_jax.errors import UsageError
from r2vpo_jax.run.pages.server import Server
from r2vpo_jax.run.pages.site import Site
from tests.helpers import browser
from tests.helpers.pages import iteration, sample, validation
from tests.helpers.paths import ROOT


def write_run(folder, config, number):
    """The files of a run that goes on, after so many iterations."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config_lib.to_dict(config)))
    add(folder, "metrics", validation(0, 0.25), *(iteration(i) for i in range(1, number + 1)), validation(number, 0.5))
    add(folder, "samples", *(sample(i, told=i in (1, number)) for i in range(1, number + 1)))
    add(folder, "events", {"event": "start", "iteration": 0})
    return folder


def add(folder, name, *rows):
    with (folder / f"{name}.jsonl").open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


@contextlib.contextmanager
def serving(workdir):
    """ask(path, method, **headers) -> (status, headers, text) of a server in a thread of its own."""
    with Server(Site(workdir), 0) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()

        def ask(path, method="GET", **headers):
            connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=20)
            connection.request(method, path, headers=headers)
            answer = connection.getresponse()
            content = answer.read().decode()
            connection.close()
            return answer.status, answer.headers, content

        ask.port = server.server_port
        try:
            yield ask
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def run(tiny_config, tmp_path):
    return write_run(tmp_path / "runs" / "first", tiny_config(trainer={"num_iterations": 40}), 12)


def test_the_page_of_a_run_is_that_of_its_files_now(run):
    with serving(run) as ask:
        status, headers, page = ask("/")
        assert status == 200
        assert "iteration 12 of 40" in page
        assert headers["Content-Type"] == "text/html; charset=utf-8"
        assert "frame-ancestors 'none'" in headers["Content-Security-Policy"]
        assert (headers["X-Content-Type-Options"], headers["Cache-Control"]) == ("nosniff", "no-store")
        add(run, "metrics", iteration(13))
        assert "iteration 13 of 40" in ask("/")[2]
        assert "http-equiv='refresh'" in ask("/")[2]
        assert "http-equiv='refresh'" not in ask("/?refresh=off")[2]
        # A line that is no line: said, and the next request is answered again.
        (run / "metrics.jsonl").write_text("{broken\n")
        status, _, page = ask("/")
        assert status == 500
        assert "could not be made" in page
        (run / "metrics.jsonl").write_text(json.dumps(iteration(1)) + "\n")
        assert "iteration 1 of 40" in ask("/")[2]
    assert {path.name for path in run.iterdir()} == {"config.json", "metrics.jsonl", "samples.jsonl", "events.jsonl"}


def test_it_answers_to_its_own_name_and_changes_nothing(run):
    with serving(run) as ask:
        whole = ask("/")
        head = ask("/", "HEAD")
        assert (head[0], head[2]) == (200, "")
        assert abs(int(head[1]["Content-Length"]) - len(whole[2].encode())) < 20
        for host in ("localhost", "LOCALHOST", "127.0.0.1"):
            assert ask("/", Host=f"{host}:{ask.port}")[0] == 200
        for host in (
            "evil.example",
            f"evil.example:{ask.port}",
            "127.0.0.1:1",
            "",
            f"127.0.0.1:{ask.port}.evil.example",
        ):
            status, _, text = ask("/", Host=host)
            assert status == 421, host
            assert "r2vpo, seed" not in text
        for method in ("POST", "PUT", "PATCH", "DELETE", "OPTIONS"):
            status, headers, _ = ask("/", method)
            assert (status, headers["Allow"]) == (405, "GET, HEAD")
        assert ask("/", "TRACE")[0] == 501
        assert ask("/favicon.ico")[0] == 204


def test_addresses_never_become_paths(run, tmp_path):
    (tmp_path / "secret").write_text("secret")
    for workdir in (run, run.parent):
        with serving(workdir) as ask:
            for path in (
                "/../secret", "/..%2fsecret", "/%2e%2e/secret", "/first/../../secret", "/first/config.json", "//secret",
                f"/{tmp_path}/secret", "/first%00/", "/config.json", "/first", "/nobody/", "/..%5csecret", "/first//",
            ):  # fmt: skip
                status, _, text = ask(path)
                assert status == 404, path
                assert "secret" not in text


def test_a_folder_of_runs_has_a_list(run, tiny_config, tmp_path):
    """Of a sweep too, whose runs are in runs/; other folders with a config.json are none."""
    folder = run.parent
    write_run(folder / "a & b", tiny_config(objective={"name": "ppo_clip"}), 4)
    (folder / "a & b" / "failed.json").write_text('{"error": "it became non-finite"}')
    for name, content in (("model", '{"model_type": "qwen2"}'), ("torn", "{"), ("list", "[]")):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(content)
    for workdir in (folder, tmp_path):
        with serving(workdir) as ask:
            page = ask("/")[2]
            assert "<p>2 runs" in page
            assert re.findall(r"<td><a href='([^']*)'>([^<]*)</a></td><td>([^<]*)", page) == [
                ("a%20%26%20b/", "a &amp; b", "failed"), ("first/", "first", "3 min left"),
            ]  # fmt: skip
            assert "iteration 12 of 40" in ask("/first/")[2]
            status, _, page = ask("/a%20%26%20b/")
            assert status == 200
            assert "The run has failed" in page
            assert "non-finite" in page


def test_what_cannot_be_served_is_said(run, tmp_path):
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "empty", tmp_path / "nowhere"):
        with pytest.raises(
            UsageError, match=r"^--workdir=.* holds no run: neither it nor a folder in it has the config.json"
        ):
            Site(folder)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(
            UsageError, match=rf"^--port={port} is taken by another program; choose another, or --port=0"
        ):
            Server(Site(run), port)


@contextlib.contextmanager
def command(*flags):
    """(process, its address) of experiments.report --serve."""
    arguments = [sys.executable, "-m", "experiments.report", "--serve", "--port=0", *flags]
    environment = os.environ | {"JAX_PLATFORMS": "no such device"}  # none is needed, so none is looked for
    with subprocess.Popen(
        arguments, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            line = process.stdout.readline()
            (url,) = re.findall(r"http://127\.0\.0\.1:\d+/", line) or [line + process.stderr.read()]
            yield process, url
        finally:
            process.kill()


def test_ctrl_c_ends_the_command_well(run):
    with command(f"--workdir={run}") as (process, _):
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=60)
    assert (process.returncode, output, errors) == (0, "ended\n", "")


# What is asked of the page in the browser: a token by its place, with what one sees of it.
TOKEN = """[...document.querySelectorAll('details[open] .sample')].map(s => [...s.querySelectorAll('.text .t')].map(t =>
    [t.textContent, t.title, getComputedStyle(t).backgroundColor, getComputedStyle(t).textDecorationLine]))"""
HEADINGS = "[...document.querySelectorAll('h2')].map(h => h.textContent)"
OPEN = "document.querySelector('details[open] summary').textContent"
GROUND = "[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]"
WIDE = "document.documentElement.scrollWidth - document.documentElement.clientWidth"


@pytest.mark.slow
def test_in_a_browser(run, tmp_path):
    """Chromium finds nothing to complain of, shows colors and words, light and dark, narrow and wide, and later more."""
    if why := browser.missing():
        pytest.skip(why)
    evil = "<script>document.title = 'owned'</script><img src=x onerror=\"document.title='owned'\">"
    add(run, "samples", sample(12, told=True) | {"prompt": evil})
    look = [{"evaluate": code} for code in (HEADINGS, TOKEN, OPEN, GROUND, WIDE, "document.title")]
    with command(f"--workdir={run.parent}") as (_, url):
        light, said = browser.browse([
            {"open": url}, {"evaluate": "document.querySelector('td a').textContent"}, {"open": f"{url}first/"}, *look,
            {"size": [390, 800]}, {"evaluate": WIDE}, {"picture": str(tmp_path / "light.png")},
        ])  # fmt: skip
        assert said == [], "nothing on the console"
        link, headings, tokens, opened, ground, wide, title, narrow = light
        assert link == "first"
        assert headings == ["Curves", "Samples", "Where the time goes", "Events", "Configuration"]
        assert (opened, title, wide, narrow) == ("iteration 12", "30 % r2vpo, seed 0", 0, 0)
        assert len(tokens) == 2
        three, semicolon, four = tokens[0]
        assert three == ["3", "ratio 1.35 (log +0.3); keeps 0 of its gradient", "rgba(204, 92, 0, 0.45)", "underline"]
        assert semicolon[2:] == ["rgba(0, 104, 176, 0.3)", "underline"]
        assert four == ["4", "ratio 1 (log +0); keeps 1 of its gradient", "rgba(0, 104, 176, 0)", "none"]
        assert (tmp_path / "light.png").stat().st_size > 10_000

        add(run, "metrics", iteration(13))
        add(run, "samples", sample(13, told=True))
        dark, said = browser.browse([{"open": f"{url}first/"}, *look], "dark")
        assert said == []
        assert dark[2] == "iteration 13"
        assert dark[1][0][0][2] == "rgba(214, 104, 18, 0.45)"
        assert [max(map(int, re.findall(r"\d+", color))) > 128 for color in ground] == [True, False]
        assert [max(map(int, re.findall(r"\d+", color))) > 128 for color in dark[3]] == [False, True]
