"""Checkpoints of a training run: which one is complete, and what a resumed run has to know."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from adaptive_margins.files import DamagedError, check_folder
from adaptive_margins.progress import say

COMPLETE, RECORDS = "COMPLETE", "records.json"
"""The file that marks a checkpoint whose other files are on the disk, with their checksums; and
that of the run's `Progress`."""


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint; later ones that are incomplete or damaged are removed."""
    steps = {int(c.name.rsplit("-", 1)[1]): c for c in folder.glob("checkpoint-*")}
    for _, checkpoint in sorted(steps.items(), reverse=True):
        try:
            check_folder(checkpoint, COMPLETE)
            if all((checkpoint / name).is_file() for name in (COMPLETE, RECORDS)):
                return checkpoint
        except DamagedError as error:
            say(f"{error}; it is removed, and an earlier checkpoint is tried", always=True)
        shutil.rmtree(checkpoint)
    return None


@dataclass
class Progress:
    """What a resumed run needs and the trainer does not save."""

    evaluations: list[dict[str, Any]] = field(default_factory=list)
    similarities: list[list[float]] = field(default_factory=list)
    best_step: int = 0
    best_value: float = -math.inf
    without_gain: int = 0
    stopped_step: int = 0
    stopped_seconds: float = 0.0
    train_seconds: float = 0.0
    eval_seconds: float = 0.0
    peak_bytes: int = 0

    def save(self, checkpoint: Path) -> None:
        """Write it into a checkpoint: about 60 bytes for each step so far."""
        (checkpoint / RECORDS).write_text(json.dumps(vars(self)))

    def load(self, checkpoint: Path) -> None:
        """Read that of a checkpoint."""
        vars(self).update(json.loads((checkpoint / RECORDS).read_text()))

    def curve(self) -> pd.DataFrame:
        """The learning curve: one row per evaluation."""
        names = ("step", "triples", "seconds")
        return pd.DataFrame(
            [{name: e[name] for name in names} | e["mean"] for e in self.evaluations]
        )

    def checks(self) -> pd.DataFrame:
        """One row per evaluation, measure and query."""
        rows = [
            (evaluation["step"], qid, measure, value)
            for evaluation in self.evaluations
            for measure, values in evaluation["per_query"].items()
            for qid, value in values.items()
        ]
        return pd.DataFrame(rows, columns=["step", "qid", "measure", "value"])

    def targets(self) -> pd.DataFrame:
        """One row per step."""
        frame = pd.DataFrame(self.similarities, columns=["mean", "min", "max"])
        frame.insert(0, "step", np.arange(1, len(frame) + 1))
        return frame
