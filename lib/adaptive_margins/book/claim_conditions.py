"""When a claim cannot be seen or tested: each condition returns why, or "" where it can be."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from adaptive_margins.book.claim_statistics import (
    STUDENT,
    Evidence,
    maximum_at,
    to_students,
    variants,
)
from adaptive_margins.paper.convergence import rises
from adaptive_margins.paper.frames import TAS_B


def maximum_seen(of: Evidence, figure: str, **which: Any) -> str:
    """Curves that are highest at their last evaluation may have their maximum after it."""
    at = maximum_at(of, figure, **which)
    late = int((at[0] == 1).sum()) if len(at) else 0
    return _too_early(late, len(at)) if late else ""


def rows_have_maximum(of: Evidence, frame: str, rows: Sequence[str]) -> str:
    """Half of these rows' curves at least, means over seeds, have a maximum before their end."""
    assert of.reproduction is not None
    selection = of.reproduction.profile.measures.selection
    table = of.frames[frame].drop_duplicates("run_id")
    picked = table.get("run_ids", table["run_id"])[variants(table).isin(rows)]
    late = sum(rises([of.run(run_id) for run_id in i.split()], selection) for i in picked)
    return _too_early(late, len(picked)) if 2 * late > len(picked) else ""


def _too_early(late: int, curves: int) -> str:
    return (
        f"Training ends too early: {late} of {curves} curves are highest at their last evaluation."
    )


def sweep_included(of: Evidence) -> str:
    """Where the profile gives ε, no time is spent on the search for it."""
    rows = of.frames["table3"]
    if (rows.loc[rows["target"] == "static", "sweep_seconds"] > 0).all():
        return ""
    return "The profile gives ε, so the time of static targets has no sweep."


def training_stops_early(of: Evidence) -> str:
    """Where early stopping ends few rows, time and triples follow from the settings."""
    assert of.reproduction is not None
    if of.reproduction.profile.comparison.budgets:
        return "The profile gives the triples of each row, so the ratio follows from them."
    rows = of.frames["table3"].drop_duplicates("run_id")
    late = int((rows["triples"] == rows["triples"].max()).sum())
    if 2 * late < len(rows):
        return ""
    return (
        f"{late} of {len(rows)} rows were trained to the end, so the ratio follows from budgets and"
        " the grid of ε."
    )


def several_models(of: Evidence) -> str:
    """Truncations of one model cannot show what different models have in common."""
    assert of.reproduction is not None
    encoders = of.reproduction.profile.encoders.values()
    if len({encoder.base for encoder in encoders}) > 1:
        return ""
    return "All encoders are truncations of one pretrained model."


def teacher_supplied(of: Evidence) -> str:
    """The `STUDENT` has to be trained here, or to be supplied as an external run."""
    frame = of.frames["table4"]
    if TAS_B in set(frame["loss"]) or STUDENT in set(variants(frame)):
        return ""
    return "No run of a teacher-distilled encoder is available."


def student_has_maximum(of: Evidence) -> str:
    """A student of a teacher whose curve is highest at its end has not seen all its data."""
    students = to_students(of)
    if students.empty:
        return "No encoder is distilled from a teacher here."
    ends = students["reference_rises"].all()
    return "The teacher's student is highest at its last evaluation." if ends else ""


FORCED = ("sweep_included", "training_stops_early", "several_models")
"""Conditions about what the design forces; the others are about what the runs lack."""
