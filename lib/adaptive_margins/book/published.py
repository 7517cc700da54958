"""The paper's own numbers (``published.yaml``), loaded and validated.

They are the only numbers in the book that were typed. Everything else is read from artefacts.
"""

from __future__ import annotations

import re
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Generic, Literal, TypeVar

import pandas as pd
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

Printed = Annotated[str, Field(pattern=r"^[01]\.\d{2,3}$")]
InBatch = Literal["✗", "✓", "—"]
Triples = Annotated[str, Field(pattern=r"^(—|(≈ )?\d+\.\d+M)$")]
Key = Annotated[str, Field(pattern=r"^[a-z0-9]+(-[a-z0-9]+)*$")]


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Score(_Entry):
    """A score as printed, with its marks."""

    value: Printed
    bold: bool = False
    dagger: bool = False

    @property
    def number(self) -> float:
        """The printed value as a number in [0, 1]."""
        return float(self.value)


Scores = dict[str, dict[str, Score]]  # set -> measure -> score, in the order of the columns


class Time(_Entry):
    """A training time as printed, hh:mm; ``star``: includes the hyperparameter sweep."""

    value: Annotated[str, Field(pattern=r"^\d{1,2}:[0-5]\d$")]
    star: bool = False

    @property
    def minutes(self) -> int:
        """The time in minutes."""
        hours, minutes = self.value.split(":")
        return 60 * int(hours) + int(minutes)


class _Row(_Entry):
    row: int


class Row1(_Row):
    """A row of Table 1."""

    model: str
    parameters: str
    embedding: str
    dimensions: int


class Row2(_Row):
    """A row of Table 2; roles as in the data frames."""

    role: Literal["q", "d+", "d-max", "d-mid", "d-min"]
    text: str
    rho: Printed | None = None
    target: Printed | None = None
    loss: Printed | None = None


class Row3(_Row):
    """A row of Table 3. ``epsilon`` is from the released code, the paper does not print it."""

    key: Key
    model: str
    target: Literal["static", "adaptive", "distributed"]
    in_batch: InBatch
    epsilon: float | None = None
    scores: Scores
    time: Time
    triples: Triples


class Row4(_Row):
    """A row of Table 4."""

    key: Key
    block: str
    loss: str
    sampling: str
    in_batch: InBatch
    source: str
    underlined: bool = False
    scores: Scores
    triples: Triples


Row = TypeVar("Row", bound=_Row)


class Table(_Entry, Generic[Row]):
    """A printed table; ``queries`` holds the number of queries per test set."""

    number: int
    section: str
    caption: str
    heading: str
    footnote: str = ""
    queries: dict[str, int] = Field(default_factory=dict)
    rows: tuple[Row, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _rows_are_whole(self) -> Table[Row]:
        numbers = [row.row for row in self.rows]
        if numbers != list(range(1, len(numbers) + 1)):
            raise ValueError(f"rows of Table {self.number} are not numbered 1, 2, …: {numbers}")
        scores: list[Scores] = [getattr(row, "scores", {}) for row in self.rows]
        columns = {tuple((name, *measures) for name, measures in row.items()) for row in scores}
        if len(columns) > 1:
            raise ValueError(f"rows of Table {self.number} differ in their columns: {columns}")
        return self


class Observation(_Entry):
    """What the paper's text says about a figure."""

    id: str
    figure: Literal[3, 4, 5, 6]
    section: str
    number: int
    text: str


class Setting(_Entry):
    """A part of the experiments' setting, in words."""

    section: str
    text: str


class Note(_Entry):
    """A place where the paper's numbers disagree with each other or with its text."""

    id: str
    tables: tuple[Literal[1, 2, 3, 4], ...] = Field(min_length=1)
    text: str


class Paper(_Entry):
    """Which paper, and on what data."""

    title: str
    short: str
    collection: str
    released_code: str


class Published(_Entry):
    """All of ``published.yaml``."""

    paper: Paper
    table1: Table[Row1]
    table2: Table[Row2]
    table3: Table[Row3]
    table4: Table[Row4]
    observations: tuple[Observation, ...]
    setup: dict[str, Setting]
    notes: tuple[Note, ...]

    @model_validator(mode="after")
    def _ids_are_unique(self) -> Published:
        keys = [row.key for table in (self.table3, self.table4) for row in table.rows]
        for ids in (keys, *([entry.id for entry in e] for e in (self.observations, self.notes))):
            if twice := sorted({i for i in ids if ids.count(i) > 1}):
                raise ValueError(f"an id or key occurs twice: {', '.join(twice)}")
        return self

    def notes_on(self, table: int) -> list[str]:
        """The texts of the notes shown with a table (1 to 4)."""
        return [note.text for note in self.notes if table in note.tables]

    def observation(self, id: str) -> Observation:
        """What the paper says, by id. Raises KeyError with the known ids."""
        for entry in self.observations:
            if entry.id == id:
                return entry
        raise KeyError(f"no observation {id!r}; there are {[o.id for o in self.observations]}")

    def table4_frame(self) -> pd.DataFrame:
        """Table 4 in long form, one row a score, with the columns of this project's own Table 4.

        ``source`` starts with "published: ", ``run_id`` is empty, ``triples`` a count or NaN. No
        row has an interval or an equivalence: those need runs.
        """
        nan = float("nan")
        return pd.DataFrame(
            {
                "block": row.block,
                "loss": row.loss,
                "sampling": row.sampling,
                "in_batch": row.in_batch,
                "source": f"published: {row.source}",
                "set": name,
                "measure": measure,
                "value": score.number,
                "best": score.bold,
                "difference": nan,
                "low": nan,
                "high": nan,
                "p_adjusted": nan,
                "equivalent": False,
                "triples": count(row.triples),
                "run_id": "",
                "reference_run_id": "",
            }
            for row in self.table4.rows
            for name, measures in row.scores.items()
            for measure, score in measures.items()
        )


def count(printed: str) -> float:
    """A printed number of triples as a number: "≈ 14.6M" is 14.6 million; NaN for "—"."""
    found = re.search(r"[\d.]+", printed)
    return round(float(found.group()) * 1e6) if found else float("nan")


@cache
def load(path: Path | None = None) -> Published:
    """Read the published numbers, by default those that come with the library.

    Raises ValueError naming the file, each bad entry and what is allowed.
    """
    source = path or files(__package__) / "published.yaml"
    name = str(path or "book/published.yaml")
    try:
        return Published.model_validate(yaml.safe_load(source.read_text("utf-8")))
    except yaml.YAMLError as error:
        raise ValueError(f"{name} is not YAML: {error}") from None
    except ValidationError as error:
        lines = (
            f"  {'.'.join(map(str, e['loc']))}: {e['msg']}"
            + ("" if isinstance(e["input"], dict | list) else f" (got {e['input']!r})")
            for e in error.errors()
        )
        raise ValueError(f"{name}:\n" + "\n".join(lines)) from None
