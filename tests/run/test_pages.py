"""What the page of a run says, from known lines; every text of a model is harmless on it."""

import html
import json
import math
import os
import re

import pytest

from r2vpo_jax import config as config_lib
from r2vpo_jax.run import files
from r2vpo_jax.run.pages import charts, live, markup, run_page, times, tokens
from r2vpo_jax.run.pages.charts import Line
from r2vpo_jax.run.pages.history import History
from r2vpo_jax.run.pages.live import LivePage
from r2vpo_jax.run.pages.reader import Reader
from r2vpo_jax.run.pages.run_page import Status
from tests.helpers.pages import iteration, sample

NOW = 1_800_000_000.0  # 2027-01-15 08:00:00 UTC


@pytest.fixture
def values(tiny_config):
    return config_lib.to_dict(tiny_config(trainer={"num_iterations": 40}))


def history(number=12, *more):
    made = History()
    for i in range(1, number + 1):
        made.add("metrics", iteration(i))
        made.add("samples", sample(i, told=i % 5 == 0 or i == 1))
    for file, row in more:
        made.add(file, row)
    return made


def words(page):
    """The text of a page, without its style and markup."""
    body = re.sub(r"<style>.*?</style>", "", page, flags=re.DOTALL)
    return html.unescape(" ".join(re.sub(r"<[^>]*>", " ", body).split()))


# ---- how far it is, and what is wrong ----


def test_how_far_a_run_is(values):
    """12 of 40 at 6 s an iteration (the first took 60) are 168 s; the signs that it is over end the reloading."""
    page = run_page.render(values, history(), Status(NOW))
    assert "iteration 12 of 40 , 3 min left, last written at 2027-01-15 08:00:00 UTC" in words(page)
    assert "<meta http-equiv='refresh' content='6'>" in page
    assert "<title>30 % r2vpo, seed 0</title>" in page
    assert "<progress max='40' value='12'" in page
    for status, said in (
        (Status(NOW, finished=True), "finished after iteration 12 of 40"),
        (Status(NOW, stopped=True), "stopped after iteration 12 of 40, last written at"),
        (Status(NOW, failed="it became <b>non-finite</b>"), "The run has failed : it became <b>non-finite</b>"),
    ):
        page = run_page.render(values, history(), status)
        assert said in words(page)
        assert "http-equiv='refresh'" not in page
    assert "http-equiv='refresh'" not in run_page.render(values, history(), Status(NOW), refresh=False)
    assert "iteration 0 of 40 : scores of the base model" in words(run_page.render(values, History(), Status(NOW)))


def test_silence_is_said_once_it_is_long(values):
    """Five times an iteration, and two minutes at least."""
    for quiet, said in ((100, False), (130, True)):
        page = words(run_page.render(values, history(), Status(NOW, wrote=NOW - quiet)))
        assert (
            "No line for 2 min ; an iteration takes 6.0 s: has the process ended?" in page.replace("6 s", "6.0 s")
        ) is said
    assert "No line" not in words(run_page.render(values, history(), Status(NOW, wrote=NOW - 9e9, finished=True)))


def test_alarms_are_above_everything_else(values):
    alarm = {"event": "alarm", "iteration": 9, "alarm": "entropy", "message": "policy/entropy = 1e-05 <limit 0.001>"}
    skipped = {"event": "nonfinite", "iteration": 3, "update": 1, "file": "nonfinite_3_1.npz"}
    made = history(12, ("events", alarm | {"iteration": 4}), ("events", alarm), ("events", skipped))
    page = run_page.render(values, made, Status(NOW))
    said = words(page)
    assert "ALARM entropy , iteration 9: policy/entropy = 1e-05 <limit 0.001>" in said
    assert said.count("ALARM") == 1, "the last of its kind"
    assert "1 updates were not finite" in said
    assert page.index("ALARM") < page.index("Curves") < page.index("Samples") < page.index("Where the time goes")
    assert "nonfinite_3_1.npz" in said, "events as they are"


# ---- text that a model has written ----


def test_no_text_becomes_markup_or_hides(values):
    """Tags, quotes, controls, bidi marks, surrogates: all are seen, none does anything."""
    evil = "</div><script>alert(1)</script>\"'&amp;\u202e\x00\x1b\r\ud800\u200b\n\t"
    row = sample(12, told=True) | {"prompt": evil, "response": evil, "token_texts": [evil, "", "b"]}
    made = history(12, ("samples", row), ("events", {"event": "unjudged", "iteration": 1, "first": evil}))
    page = run_page.render(values, made, Status(NOW, failed=evil), result=f"a\n{evil}")
    assert "<script" not in page
    assert "alert(1)" in page
    for sign in ("⟨U+202E⟩", "␀", "␛", "␍", "⟨U+D800⟩", "⟨U+200B⟩", "↵\n", "⇥\t"):
        assert sign in page, sign
    page.encode("utf-8")  # surrogates would not go
    assert not re.search("[\u202e\x00\x1b\u200b\ud800]", page)
    # Nothing is loaded from anywhere, and nothing may be.
    assert not re.search(r"(src|href|action)='(?!data:|\?)", page)
    assert "default-src 'none'" in page
    text = "plain ünï 中文 😀"
    assert markup.visible(text) == text


def test_colors_and_lines_of_tokens():
    """Strength of the color: |log r| / 0.5 of 0.75; thickness of the line: what is lost, of 4 pixels."""
    row = sample(1, told=True) | {
        "token_texts": ["a", "b", "c", "d", "e", " "],
        "log_ratios": [0.1, -0.25, 3.0, 0.0, "inf", 0.2],
        "kept": [1.02, 0.5, 0.0, -0.3, 2.0, None],
    }
    found = re.findall(r"<span class='([^']*)' style='([^']*)' title='([^']*)'>([^<]*)</span>", tokens.sample(row))
    assert found == [
        ("t u", "--a:0.15;", "ratio 1.11 (log +0.1); keeps 1.02 of its gradient", "a"),
        (
            "t less d",
            "--a:0.38;text-decoration-thickness:2.0px;",
            "ratio 0.779 (log -0.25); keeps 0.5 of its gradient",
            "b",
        ),
        ("t less u", "--a:0.75;text-decoration-thickness:4.0px;", "ratio 20.1 (log +3); keeps 0 of its gradient", "c"),
        ("t back d", "--a:0.00;", "ratio 1 (log +0); keeps -0.3 of its gradient", "d"),
        (
            "t more u",
            "--a:0.75;text-decoration-thickness:3.0px;",
            "ratio 5.18e+21 (log +inf); keeps 2 of its gradient",
            "e",
        ),
        ("t u", "--a:0.30;", "ratio 1.22 (log +0.2); no gradient at stake (A = 0)", " "),
    ]
    assert "6 tokens: 1 cut, 1 pulled back, 1 damped, 1 enlarged" in words(tokens.sample(row))
    assert "5 updates ago" in tokens.sample(row | {"age": 5, "learned": False})
    assert "took no part in learning" in tokens.sample(row | {"learned": False})


def test_long_texts_are_cut_in_their_middle():
    number = 5000
    row = sample(1, told=True) | {"token_texts": ["x"] * number, "log_ratios": [0.0] * number, "kept": [1.0] * number}
    page = tokens.sample(row | {"prompt": "y" * 20_000})
    assert "… 3500 tokens …" in page
    assert "… 14000 characters …" in page
    assert page.count(">x</span>") == 1500


def test_samples_that_tell_of_tokens_outlive_those_that_do_not():
    made = history(40)
    assert [i for i, _ in made.samples] == [40, 35, 30, 25, 20, 15, 10, 5]
    plain = History()
    for i in range(1, 20):
        plain.add("samples", sample(i, told=False))
    assert [i for i, _ in plain.samples][:2] == [19, 18]


# ---- curves ----


def points(page):
    return [tuple(map(float, pair.split())) for pair in re.findall(r"[ML]([\d.]+ [\d.]+)", page)]


def test_a_line_is_where_its_numbers_are():
    """Axes end at round numbers: 0 to 2, over 160 units downward from 8; x from 46 to 332."""
    page = charts.line_chart(
        "title <&>", [Line("name", [1, 2, 3], [0.0, 2.0, math.nan]), Line("other", [1, 3], [1.0, 1.0])]
    )
    assert points(page)[:4] == [(46.0, 168.0), (189.0, 8.0), (46.0, 88.0), (332.0, 88.0)]
    assert "title &lt;&amp;&gt;; last values: name 2, other 1" in page
    assert "<title>name, iteration 2: 2</title>" in page
    assert charts.line_chart("none", [Line("name", [1, 2], [math.nan, math.nan])]) == ""
    assert charts.line_chart("none", [Line("name", [], [])]) == ""
    log = charts.line_chart("log", [Line("v", [1, 2, 3], [1e-4, 0.0, 1e-2])], log=True)
    assert points(log)[:2] == [(46.0, 168.0), (332.0, 8.0)], "0 is left out"
    assert points(charts.line_chart("one", [Line("v", [7], [5.0])])), "a single value is drawn"


def test_thinning_loses_no_peak():
    y = [0.0] * 5000
    y[3210], y[17] = 9.0, -9.0
    found = charts._thinned(range(5000), y)
    assert len(found) <= 202
    assert {(3210, 9.0), (17, -9.0), (4999, 0.0)} <= set(found)
    assert [x for x, _ in found] == sorted(x for x, _ in found)


# ---- where the time goes ----


def test_times_add_up_with_and_without_a_thread_beside():
    row = {"time/rollout": 2.0, "time/verify": 1.0, "time/update": 4.0, "time/compile": 0.5, "time/iteration": 9.0}
    spent = times.of_loop(row)
    assert (spent["rollout"], spent["update"], spent[times.OTHER]) == (2.0, 4.0, 1.5)
    # A thread sampled and verified for 3 s and compiled 0.25 s of it; learning waited for one second.
    beside = row | {"time/wait": 1.0, "time/beside": 3.25, "time/iteration": 6.0}
    spent = times.of_loop(beside)
    assert (spent["rollout"], spent["verify"], spent["compile"], spent["wait"]) == (0.0, 0.0, 0.25, 1.0)
    assert sum(spent.values()) == pytest.approx(6.0)


def test_the_table_of_times_ends_at_the_clock():
    rows = [iteration(i) for i in range(1, 4)]  # 60 s, and twice 6 s; 20 s before the first
    said = words(times.section(rows))
    assert "all iterations 3 of them 72 s 100.0 %" in said
    assert "around them start-up, weights read, base scores, noise floor 20 s" in said
    assert "the run so far by the clock 92 s" in said
    assert "compile programs compiled, inside of any of these 54 s 75.0 %" in said
    assert "← 60 s" in said, "the bar of the first is cut off"
    assert times.section([{"iteration": 1}]) == "", "a run of a fused sweep has no times"
    many = times.section([iteration(i) for i in range(1, 401)])
    assert "iteration 394 to 400: sample 3 s of 6" in html.unescape(many)
    assert many.count("<rect x=") <= 60 * 8


def test_durations():
    for seconds, said in (
        (0, "0 s"), (0.04, "0 s"), (2.5, "2.5 s"), (6.0, "6 s"), (61.2, "61 s"), (180, "3 min"), (7500, "2 h 5 min"), (300_000, "3 d 11 h"),
    ):  # fmt: skip
        assert markup.duration(seconds) == said


# ---- lines as they come ----


def write(path, rows, mode="a"):
    with path.open(mode) as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def test_a_reader_sees_what_is_new_and_what_was_cut_back(tmp_path):
    reader, metrics = Reader(tmp_path), tmp_path / "metrics.jsonl"
    assert reader.read().iteration == 0
    assert reader.wrote() is None
    write(metrics, [iteration(1), iteration(2)])
    with metrics.open("a") as file:
        file.write('{"kind": "train", "iter')  # being written
    assert reader.read().iteration == 2
    with metrics.open("a") as file:
        file.write('ation": 3}\n')
    assert [row["iteration"] for row in reader.read().iterations] == [1, 2, 3]
    assert reader.wrote() == os.stat(metrics).st_mtime
    # A resumed run cuts back to its checkpoint, and is further again when somebody looks.
    write(metrics, [iteration(1), iteration(2, reward=0.75), iteration(3), iteration(4)], "w")
    found = reader.read()
    assert [row["iteration"] for row in found.iterations] == [1, 2, 3, 4]
    assert found.iterations[1]["reward/mean"] == 0.75
    assert reader.read() is found, "nothing is new"


def test_a_reader_of_parts(tmp_path):
    """As a store has them, also on a disk after a download."""
    (tmp_path / "metrics").mkdir()
    write(tmp_path / "metrics" / "00000.jsonl", [iteration(1)])
    reader = Reader(tmp_path)
    assert reader.read().iteration == 1
    write(tmp_path / "metrics" / "00001.jsonl", [iteration(2)])
    assert [row["iteration"] for row in reader.read().iterations] == [1, 2]


def test_a_page_in_a_store(store, values):
    page = LivePage(store, values, history(), every=5, write=True)
    page.refresh(3)
    assert "iteration 12 of 40" in (store / "report" / "report.html").read_text()
    files.write_atomically(store / "metrics" / "00000.jsonl", json.dumps(iteration(1)) + "\n")
    reader = Reader(store)
    assert reader.read().iteration == 1
    files.write_atomically(store / "metrics" / "00001.jsonl", json.dumps(iteration(2)) + "\n")
    assert reader.read().iteration == 2
    assert reader.wrote() is None


def test_when_a_page_is_written(tmp_path, values, monkeypatch):
    """By the number, when an alarm sounds, by a process that has written none, and two minutes after the last one."""
    written, now = [], 1000.0
    monkeypatch.setattr(live.time, "monotonic", lambda: now)
    monkeypatch.setattr(live.files, "write_atomically", lambda file, _: written.append((i, file.name)))
    page = LivePage(tmp_path, values, History(), every=4, write=True)
    for i in range(6, 18):  # of a process that goes on after 5
        now += 59.0 if i > 12 else 1.0
        page.refresh(i, now=i == 9)
    assert written == [(i, "report.html") for i in (6, 8, 9, 12, 15, 16)]
    assert [i for i in range(1, 10) if page.is_due(i)] == [1, 4, 8]
    for off in (
        LivePage(tmp_path, values, History(), every=0, write=True),
        LivePage(tmp_path, values, History(), every=1, write=False),
    ):
        off.refresh(1, now=True)
        off.write(stopped=True)
    assert list(tmp_path.iterdir()) == []
