"""Lines of text for whoever waits: what is under way, how far, and how long it will take."""

from __future__ import annotations

import os
import re
import shutil
import sys
import time

_quiet = False
# C0 without tab and line feed, DEL, C1, line separators, overrides of the direction of text, lone surrogates.
_CONTROL = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)


def printable(text: str) -> str:
    r"""Return ``text`` with each character that a terminal would obey as its escape sequence, such as ``\x1b``."""
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)


def quiet(on: bool = True) -> None:
    """Say nothing from now on in this process, or (``quiet(False)``) speak again."""
    global _quiet
    _quiet = on


def say(text: str) -> None:
    """A line on stderr."""
    if not _quiet:
        clear()
        print(printable(text), file=sys.stderr, flush=True)


def clear() -> None:
    """Take the line that a `Countdown` rewrites off the terminal, if there is one."""
    if _terminal():
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def clock(seconds: float) -> str:
    """Seconds as m:ss or h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class Countdown:
    """Says how much of ``total`` is done and how much time is left, at most once in ``every`` seconds.

    On a terminal it is one line, rewritten every second, and gone at the end.
    """

    def __init__(self, what: str, total: int | None, unit: str, *, every: float = 15.0) -> None:
        self.what, self.total, self.unit, self.every = what, total, unit, every
        self.since = self.said = time.monotonic()
        self.first: int | None = None

    def update(self, done: int) -> None:
        """``done`` of all are done, those of an earlier, interrupted call included."""
        now = time.monotonic()
        if self.first is None:
            self.first = done
        if _terminal() and done == self.total and self.said > self.since:
            clear()
            return
        if now - self.said < (min(self.every, 1.0) if _terminal() else self.every):
            return
        self.said = now
        text = printable(f"{self.what}: {done:,}")
        if self.total is not None:
            text += f" of {self.total:,}"
        text += f" {self.unit} | {clock(now - self.since)} elapsed"
        if self.total is not None and done > self.first:
            left = (now - self.since) / (done - self.first) * (self.total - done)
            text += f", about {clock(left)} left"
        if _terminal() and not _quiet:
            width = shutil.get_terminal_size().columns - 1  # a line that wraps cannot be rewritten
            print(f"\r\x1b[K{text[:width]}", end="", file=sys.stderr, flush=True)
        else:
            say(text)


def _terminal() -> bool:
    """Whether stderr is a terminal whose current line can be erased."""
    return sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
