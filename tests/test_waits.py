"""Long waits are told: sparsely in a log, in one line on a terminal, and not at all where they are short."""

import re
import threading

import pytest

from r2vpo_jax import waits


class Screen:
    """What was written to stderr."""

    def __init__(self, terminal):
        self.text, self._terminal, self.written = "", terminal, threading.Event()

    def write(self, text):
        self.text += text
        self.written.set()

    def flush(self):
        pass

    def isatty(self):
        return self._terminal


@pytest.fixture
def screen(request, monkeypatch):
    screen = Screen(terminal=getattr(request, "param", False))
    monkeypatch.setattr(waits, "_screen", lambda: screen)
    monkeypatch.setattr(waits, "_silent", False)
    monkeypatch.setattr(waits, "FIRST", 0.01)
    monkeypatch.setattr(waits, "_REWRITTEN", 0.01)
    return screen


def again(screen, number=2):
    for _ in range(number):
        screen.written.clear()
        assert screen.written.wait(60)


def test_a_short_wait_says_nothing(screen, monkeypatch):
    monkeypatch.setattr(waits, "FIRST", 3600.0)
    with waits.told("reading"):
        pass
    assert list(waits.each(range(3), "reading", 3, "files")) == [0, 1, 2]
    assert not screen.text


def test_lines_of_a_log_come_further_and_further_apart(screen):
    with waits.told("reading weights", 4e9, "B") as wait:
        wait.add(1e9)
        again(screen, 3)
    lines = screen.text.splitlines()
    assert re.fullmatch(r"reading weights, 1\.0 of 4\.0 GB, \d+ s so far, about \d+ s left", lines[0])
    assert re.fullmatch(r"reading weights: done in \d+ s", lines[-1])
    assert "\r" not in screen.text


@pytest.mark.parametrize("screen", [True], indirect=True)
def test_a_terminal_has_one_line_which_is_taken_away(screen):
    with waits.told("tokenizing", 20, "prompts") as wait:
        again(screen)
        wait.add(5)
        again(screen)
    assert "\n" not in screen.text
    assert "\r\033[Ktokenizing, 0 of 20 prompts, 0 s so far" in screen.text
    assert "tokenizing, 5 of 20 prompts, 0 s so far, about 0 s left" in screen.text
    assert screen.text.endswith("\r\033[K")


def test_an_error_does_not_count_as_done(screen):
    def fail():
        with waits.told("downloading", unit="B") as wait:
            wait.reach(1500, 3000)
            wait.reach(1200)
            again(screen)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert "downloading, 1.5 of 3.0 kB" in screen.text
    assert "done" not in screen.text


def test_other_processes_say_nothing(screen, monkeypatch):
    waits.silence()
    before = threading.active_count()
    with waits.told("reading"):
        assert threading.active_count() == before
    assert not screen.text


def test_amounts():
    for (done, total, unit), text in {
        (5, None, "B"): "5 bytes",
        (5, 999, "B"): "5 of 999 bytes",
        (1.5e6, None, "B"): "1.5 MB",
        (3, 7, "files"): "3 of 7 files",
        (3, None, "files"): "3 files",
    }.items():
        assert waits._amount(done, total, unit) == text
