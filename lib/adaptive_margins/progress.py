"""Lines of text for whoever waits: what is under way, how far, and how long it will take."""

from __future__ import annotations

import sys
import time


def say(text: str) -> None:
    """A line on stderr."""
    print(text, file=sys.stderr, flush=True)


def clock(seconds: float) -> str:
    """Seconds as m:ss or h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class Countdown:
    """Says how much of ``total`` is done and how much time is left, at most once in ``every`` seconds."""

    def __init__(self, what: str, total: int | None, unit: str, *, every: float = 15.0) -> None:
        self.what, self.total, self.unit, self.every = what, total, unit, every
        self.since = self.said = time.monotonic()
        self.first: int | None = None

    def update(self, done: int) -> None:
        """``done`` of all are done, those of an earlier, interrupted call included."""
        now = time.monotonic()
        if self.first is None:
            self.first = done
        if now - self.said < self.every:
            return
        self.said = now
        text = f"{self.what}: {done:,}"
        if self.total is not None:
            text += f" of {self.total:,}"
        text += f" {self.unit} | {clock(now - self.since)} elapsed"
        if self.total is not None and done > self.first:
            left = (now - self.since) / (done - self.first) * (self.total - done)
            text += f", about {clock(left)} left"
        say(text)
