"""Committed results of a long profile, which the book of a quick one shows.

``benchmarks/export_edition.py`` writes them: a frame per CSV file, ``claims.csv`` among them.
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd

LONG = {"laptop": "laptop-long"}
"""Profile → the profile whose committed results decide its claims."""
BOOK = Path(__file__).resolve().parents[3] / "book"


def place(profile: str) -> Path:
    """Where the committed results for a profile are, or would be."""
    return BOOK / LONG.get(profile, profile).replace("-", "_")


def committed(profile: str) -> dict[str, pd.DataFrame]:
    """The committed frames that decide a profile's claims, by name; none if there are none, or if
    the profile is the long one itself.
    """
    return read(place(profile)) if profile in LONG else {}


def read(folder: Path) -> dict[str, pd.DataFrame]:
    """The frames in a folder, by name."""
    texts = dict.fromkeys(("section", "paper", "run_id", "reference_run_id"), str)
    return {file.stem: pd.read_csv(file, dtype=texts) for file in sorted(folder.glob("*.csv"))}
