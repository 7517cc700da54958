"""What is printed on stderr, to a file and to a terminal."""

from __future__ import annotations

import io
from types import SimpleNamespace

import pytest

from adaptive_margins import progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch):
    screen = Terminal()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(progress, "sys", SimpleNamespace(stderr=screen))
    return screen


@pytest.fixture
def now(monkeypatch):
    """A clock that the test sets: ``now[0]`` seconds."""
    seconds = [1000.0]
    monkeypatch.setattr("tqdm.std.time", lambda: seconds[0])
    monkeypatch.setattr("tqdm.std.tqdm.monitor_interval", 0)
    return seconds


@pytest.fixture(autouse=True)
def aloud():
    yield
    progress.quiet(False)


def test_a_file_gets_a_plain_line_now_and_then_with_the_time_left(now, capsys):
    with progress.bar("reading", total=1000, unit="passages", done=100) as bar:
        for _ in range(80):
            now[0] += 1
            bar.update(10)
    err = capsys.readouterr().err
    assert "\r" not in err
    first, second = err.splitlines()
    assert first.startswith("reading:  40%")
    assert "400/1000 [00:30<01:00, 10.00 passages/s]" in first
    assert "700/1000 [01:00<00:30" in second


def test_short_work_prints_nothing_to_a_file(capsys):
    assert list(progress.bar("reading", range(5), unit="passages")) == [0, 1, 2, 3, 4]
    assert capsys.readouterr().err == ""


def test_a_terminal_gets_a_bar_that_is_gone_at_the_end_and_messages_above_it(now, terminal):
    with progress.bar("reading", total=100, unit="passages") as bar:
        now[0] += 2
        bar.update(50)
        progress.say("and now something else\x1b[2J")
    text = terminal.getvalue()
    assert "reading:  50%" in text
    before, after = text.split("and now something else\\x1b[2J\n")
    assert before.endswith("\r")
    assert after.split("\r")[-1].strip() == ""


def test_a_dumb_terminal_gets_lines(now, terminal, monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    with progress.bar("reading", total=100, unit="passages") as bar:
        now[0] += 31
        bar.update(50)
    assert terminal.getvalue().count("\n") == 1
    assert "\r" not in terminal.getvalue()


def test_quiet(now, capsys):
    progress.quiet()
    with progress.bar("reading", total=100, unit="passages") as bar:
        now[0] += 60
        bar.update(50)
        progress.say("something")
    assert capsys.readouterr().err == ""
    progress.quiet(False)
    progress.say("something")
    assert capsys.readouterr().err == "something\n"


def test_clock():
    assert [progress.clock(s) for s in (0, 59.6, 3599, 3600)] == [
        "0:00",
        "1:00",
        "59:59",
        "1:00:00",
    ]
