"""Checkpoints of a training run: which one is complete, and what a resumed run has to know."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from adaptive_margins.files import DamagedError, check_folder, file_sha256
from adaptive_margins.progress import say

COMPLETE = "COMPLETE"
"""The file that marks a checkpoint whose other files are on the disk; it has their checksums."""


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint; later ones that are incomplete or damaged are removed."""
    steps = {int(c.name.rsplit("-", 1)[1]): c for c in folder.glob("checkpoint-*")}
    for _, checkpoint in sorted(steps.items(), reverse=True):
        try:
            check_folder(checkpoint, COMPLETE)
            if (checkpoint / COMPLETE).is_file():
                return checkpoint
        except DamagedError as error:
            say(f"{error}; it is removed, and an earlier checkpoint is tried", always=True)
        shutil.rmtree(checkpoint)
    return None


def to_disk(files: Iterable[Path]) -> None:
    """Wait until files are on the disk."""
    for file in files:
        with file.open("r+b") as written:
            os.fsync(written.fileno())


@dataclass
class Progress:
    """What a resumed run needs and the trainer does not save.

    The lists grow with the run. Each checkpoint writes what is new in them to a file of its own in
    ``folder``; the other values are saved with it. ``checksums`` are those of these files, by their
    paths from a checkpoint: about 90 bytes more at each.
    """

    folder: Path
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    similarities: list[list[float]] = field(default_factory=list)
    written: tuple[int, int] = (0, 0)
    checksums: dict[str, str] = field(default_factory=dict)
    best_step: int = 0
    best_value: float = -math.inf
    without_gain: int = 0
    stopped_step: int = 0
    stopped_seconds: float = 0.0
    train_seconds: float = 0.0
    eval_seconds: float = 0.0
    peak_bytes: int = 0

    def _values(self) -> dict[str, Any]:
        lists = ("folder", "evaluations", "similarities", "written")
        return {k: v for k, v in vars(self).items() if k not in lists}

    def save(self, checkpoint: Path, step: int) -> None:
        """Write the values into the checkpoint of ``step``, and what is new in the lists."""
        evaluations, similarities = self.written
        part = {
            "evaluations": self.evaluations[evaluations:],
            "similarities": self.similarities[similarities:],
        }
        self.folder.mkdir(exist_ok=True)
        file = self.folder / f"{step}.json"
        file.write_text(json.dumps(part))
        to_disk([file])
        self.checksums[f"../{self.folder.name}/{file.name}"] = file_sha256(file)
        self.written = len(self.evaluations), len(self.similarities)
        (checkpoint / "progress.json").write_text(json.dumps(self._values()))

    def load(self, checkpoint: Path | None) -> None:
        """Read a checkpoint's progress; whatever was written after it is removed."""
        last = int(checkpoint.name.rsplit("-", 1)[1]) if checkpoint else 0
        for file in sorted(self.folder.glob("*.json"), key=lambda file: int(file.stem)):
            if int(file.stem) > last:
                file.unlink(missing_ok=True)  # each process of a run does this
                continue
            part = json.loads(file.read_text())
            self.evaluations += part["evaluations"]
            self.similarities += part["similarities"]
        self.written = len(self.evaluations), len(self.similarities)
        if checkpoint:
            vars(self).update(json.loads((checkpoint / "progress.json").read_text()))

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
