"""Progress bars and messages on stderr (tqdm); plain lines where stderr is not a terminal."""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tqdm import tqdm

LINE_EVERY = 30.0
"""Seconds between two lines of a bar that is not on a terminal; shorter work prints none."""

_quiet = False
# C0 without tab and line feed, DEL, C1, line separators, overrides of the direction of text, lone
# surrogates.
_CONTROL = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)


def bar(
    what: str,
    items: Iterable[Any] | None = None,
    *,
    unit: str,
    total: int | None = None,
    done: int = 0,
) -> tqdm:
    """Return a progress bar over ``items``, or one moved by ``update(n)`` in a ``with`` block.

    ``what`` is computed, e.g. "embedding passages"; ``unit`` is counted, in the plural. ``total``
    is by default ``len(items)``; ``done`` of them were finished by an earlier, interrupted call.
    """
    from tqdm import tqdm

    where: dict[str, Any] = {"file": sys.stderr, "delay": 1, "mininterval": 0.5}
    if not sys.stderr.isatty() or os.environ.get("TERM") == "dumb":
        where = {"file": _Lines(), "delay": LINE_EVERY, "mininterval": LINE_EVERY, "ncols": 0}
    return tqdm(
        items,
        desc=printable(what),
        total=total,
        unit=f" {unit}",
        unit_scale=(total or 0) >= 10_000,  # 8.84M in the place of 8841823
        initial=done,
        leave=False,
        disable=_quiet,
        **where,
    )


def say(text: str, *, always: bool = False) -> None:
    """Print a line on stderr above the progress bars; ``always`` prints it even if `quiet`."""
    from tqdm import tqdm

    if always or not _quiet:
        tqdm.write(printable(text), file=sys.stderr)


def quiet(on: bool = True) -> None:
    """Turn progress of this process off, or with ``quiet(False)`` on again."""
    global _quiet
    _quiet = on


def clear() -> None:
    """Close bars that an error left open."""
    if "tqdm" in sys.modules:
        from tqdm import tqdm

        for one in list(getattr(tqdm, "_instances", ())):
            one.close()


def printable(text: str) -> str:
    r"""Escape control characters, e.g. as ``\x1b``."""
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)


def now() -> str:
    """Return date and time in UTC, as 2026-11-29T05:01:56Z."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def clock(seconds: float) -> str:
    """Return seconds as m:ss or h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class _Lines:
    """stderr without carriage returns: each state of a bar is a line, an erased bar is none."""

    def write(self, text: str) -> None:
        if line := text.strip():
            print(line, file=sys.stderr, flush=True)

    def flush(self) -> None:
        """Nothing is buffered."""
