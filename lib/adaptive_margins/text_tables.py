"""Tables and sizes as plain text, for a terminal. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Sequence

from adaptive_margins.progress import printable

_UNITS = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


def size(count: float) -> str:
    """Bytes in the largest unit that leaves a number of at least 1."""
    for unit, name in _UNITS:
        if count >= unit:
            return f"{count / unit:.1f} {name}"
    return f"{count:.0f} B"


def aligned(table: Sequence[Sequence[str]], *, left: int = 1) -> list[str]:
    """The lines of a table whose rows have the same number of cells; the first ``left`` columns are text, the rest numbers."""
    table = [[printable(cell) for cell in row] for row in table]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in table
    ]
