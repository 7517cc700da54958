"""Tables and sizes as plain text, for a terminal. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Sequence

from tabulate import tabulate

from adaptive_margins.progress import printable

_UNITS = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


def size(count: float) -> str:
    """Bytes in the largest unit that leaves a number of at least 1."""
    for unit, name in _UNITS:
        if count >= unit:
            return f"{count / unit:.1f} {name}"
    return f"{count:.0f} B"


def aligned(table: Sequence[Sequence[str]], *, left: int = 1) -> list[str]:
    """Return the lines of a table; the first ``left`` columns are text, the others numbers."""
    if not table:
        return []
    cells = [[printable(cell) for cell in row] for row in table]
    align = ["left"] * left + ["right"] * (len(table[0]) - left)
    text = tabulate(cells, tablefmt="plain", disable_numparse=True, colalign=align)
    return [line.rstrip() for line in text.splitlines()]
