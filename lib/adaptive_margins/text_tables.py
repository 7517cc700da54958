"""Tables and sizes as plain text, for a terminal. Imports nothing heavy."""

from __future__ import annotations

import re
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


def aligned(table: Sequence[Sequence[str]], *, left: int = 1, style: str = "plain") -> list[str]:
    """Return the lines of a table; the first ``left`` columns are text, the others numbers.

    ``style`` is "plain", or with column names in the first row "github" or "latex_booktabs".
    """
    if not table:
        return []
    cells = [[printable(cell) for cell in row] for row in table]
    align = ["left"] * left + ["right"] * (len(table[0]) - left)
    if style == "github":
        cells = [
            [*(re.sub(r"([\W_])", r"\\\1", c) for c in row[:left]), *row[left:]] for row in cells
        ]
    names = () if style == "plain" else "firstrow"
    text = tabulate(cells, names, style, disable_numparse=True, colalign=align)
    if style == "latex_booktabs":
        text = re.sub(r"(?<!\w)-(?=\d)|−", "$-$", text)
    return [line.rstrip() for line in text.splitlines()]
