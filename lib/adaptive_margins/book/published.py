"""Numbers and words of the paper: ``printed/table1.csv`` to ``table4.csv``, ``published.yaml``.

They are the only numbers in the book that were typed. Everything else is read from artefacts.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import pandas as pd
import yaml


@dataclass(frozen=True)
class Published:
    """The paper's tables as frames of text (marks included), and what it states in words.

    ``paper``: short, released_code. ``headings``: what the caption of each table names.
    ``figure6_mean``: to which the targets of Figure 6 settle. ``setup``: part of the setting →
    text.
    """

    paper: Mapping[str, str]
    headings: Mapping[int, str]
    figure6_mean: float
    setup: Mapping[str, str]
    notes: tuple[Mapping[str, Any], ...]
    tables: Mapping[int, pd.DataFrame]

    def notes_on(self, table: int) -> list[str]:
        """The texts of the notes shown with a table (1 to 4)."""
        return [note["text"] for note in self.notes if table in note["tables"]]

    def scores(self, table: int) -> pd.DataFrame:
        """Table 3 or 4, one row per score: the row's other columns, then those of the score:
        set, measure, printed (text without marks), value (the number), bold and dagger.
        """
        frame = self.tables[table].reset_index(names="row")
        columns = [column for column in frame if "@" in str(column)]
        others = [column for column in frame if column not in columns]
        long = frame.melt(others, columns, var_name="column", value_name="cell")
        long = long.sort_values("row", kind="stable", ignore_index=True)
        names = long["column"].str.split(" ", n=1, expand=True)
        printed = long["cell"].str.strip("*†")
        return long[others].assign(
            set=names[0],
            measure=names[1],
            printed=printed,
            value=printed.astype(float),
            bold=long["cell"].str.startswith("**"),
            dagger=long["cell"].str.endswith("†"),
        )


def count(printed: str) -> float:
    """A printed number of triples as a number: "≈ 14.6M" is 14.6 million; NaN for "—"."""
    found = re.search(r"[\d.]+", printed)
    return round(float(found.group()) * 1e6) if found else float("nan")


def minutes(printed: str) -> int:
    """A printed training time, hh:mm, in minutes."""
    hours, rest = printed.rstrip("*").split(":")
    return 60 * int(hours) + int(rest)


@cache
def load() -> Published:
    """The published numbers and words that come with the library."""
    folder = files(__package__)
    words = yaml.safe_load((folder / "published.yaml").read_text("utf-8"))
    tables = {}
    for number in (1, 2, 3, 4):
        with (folder / "printed" / f"table{number}.csv").open(encoding="utf-8") as file:
            tables[number] = pd.read_csv(file, dtype=str, keep_default_na=False)
    return Published(**{**words, "notes": tuple(words["notes"])}, tables=tables)
