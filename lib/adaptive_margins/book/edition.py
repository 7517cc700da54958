"""Committed results of a long profile, which the book of any machine shows.

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


def read(profile: str, folder: Path | None = None) -> dict[str, pd.DataFrame]:
    """The committed frames for a profile, by name; none if there are none."""
    files = sorted((folder or place(profile)).glob("*.csv"))
    texts = {"section": str, "run_id": str, "reference_run_id": str}
    return {file.stem: pd.read_csv(file, dtype=texts) for file in files}
