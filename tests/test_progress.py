"""What is said on stderr, to a file and to a terminal."""

from __future__ import annotations

import io
import re
from types import SimpleNamespace

import pytest

from adaptive_margins import progress
from adaptive_margins.progress import Countdown, say


class Terminal(io.StringIO):
    """A terminal of one's own: keeps what was written, and can show what stands on its screen."""

    def isatty(self) -> bool:
        return True

    def screen(self) -> list[str]:
        lines = []
        for line in self.getvalue().split("\n"):
            # A carriage return goes back to the start, ESC [ K erases from there to the end.
            lines.append(re.split(r"\r\x1b\[K", line)[-1])
        return lines


@pytest.fixture
def now(monkeypatch):
    """A clock that the test sets: ``now[0]`` seconds."""
    seconds = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: seconds[0])
    return seconds


@pytest.fixture
def terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "60")
    screen = Terminal()
    monkeypatch.setattr(progress, "sys", SimpleNamespace(stderr=screen))
    return screen


@pytest.fixture(autouse=True)
def aloud():
    yield
    progress.quiet(False)


def test_a_countdown_says_a_line_in_fifteen_seconds(now, capsys):
    countdown = Countdown("reading", 1000, "passages")
    for second in range(46):
        now[0] = 100.0 + second
        countdown.update(20 * second)
    assert capsys.readouterr().err.splitlines() == [
        "reading: 300 of 1,000 passages | 0:15 elapsed, about 0:35 left",
        "reading: 600 of 1,000 passages | 0:30 elapsed, about 0:20 left",
        "reading: 900 of 1,000 passages | 0:45 elapsed, about 0:05 left",
    ]


def test_time_left_does_not_count_what_was_done_before(now, capsys):
    countdown = Countdown("reading", 1000, "passages")
    countdown.update(900)
    now[0] += 20
    countdown.update(920)
    assert capsys.readouterr().err.endswith("0:20 elapsed, about 1:20 left\n")


def test_on_a_terminal_one_line_is_rewritten(now, terminal):
    countdown = Countdown("reading", 1000, "passages")
    for second in range(30):
        now[0] = 100.0 + second
        countdown.update(20 * second)
    assert terminal.getvalue().count("elapsed") == 29
    assert terminal.screen() == ["reading: 580 of 1,000 passages | 0:29 elapsed, about 0:21 l"]
    say("and now something else")
    assert terminal.screen() == ["and now something else", ""]
    now[0] += 1
    countdown.update(600)
    assert len(terminal.screen()[-1]) == 59
    countdown.update(1000)
    assert terminal.screen() == ["and now something else", ""]


def test_a_countdown_that_said_nothing_leaves_the_terminal_alone(now, terminal):
    countdown = Countdown("reading", 10, "passages")
    for done in range(11):
        countdown.update(done)
    assert terminal.getvalue() == ""


def test_a_dumb_terminal_gets_lines(now, terminal, monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    countdown = Countdown("reading", 1000, "passages")
    for second in range(31):
        now[0] = 100.0 + second
        countdown.update(20 * second)
    assert [line.count("elapsed") for line in terminal.getvalue().split("\n")] == [1, 1, 0]
    assert "\x1b" not in terminal.getvalue()


@pytest.mark.parametrize("where", ["file", "terminal"])
def test_quiet(now, capsys, where, request):
    screen = request.getfixturevalue("terminal") if where == "terminal" else None
    progress.quiet()
    countdown = Countdown("reading", 1000, "passages")
    now[0] += 20
    countdown.update(20)
    say("something")
    told = screen.getvalue() if screen else capsys.readouterr().err
    assert not re.sub(r"\r\x1b\[K", "", told)
    progress.quiet(False)
    now[0] += 20
    countdown.update(40)
    told = screen.getvalue() if screen else capsys.readouterr().err
    assert "reading: 40 of 1,000" in told
