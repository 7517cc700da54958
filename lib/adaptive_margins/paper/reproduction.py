"""One object to reproduce the paper with: a profile, its runs, figures and tables."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import adaptive_margins.paper.frames as frames
from adaptive_margins.distributed import is_first, wait
from adaptive_margins.files import home as default_home
from adaptive_margins.paper.experiments import Experiments, find_run, fixed_runs
from adaptive_margins.paper.inputs import Inputs
from adaptive_margins.paper.plan import Plan, PlanError, make_plan
from adaptive_margins.paper.runner import Runner
from adaptive_margins.paper.shared_store import open_store
from adaptive_margins.paper.store import StoredRun
from adaptive_margins.profiles.config import Profile
from adaptive_margins.profiles.load import load_profile
from adaptive_margins.progress import clock, say
from adaptive_margins.runs import BM25Run, EncoderRun, TrainingRun, ZeroShotRun

STORE_VARIABLE, RAY_VARIABLE = "ADAPTIVE_MARGINS_STORE", "ADAPTIVE_MARGINS_RAY"
"""Where runs are shared and computed: see `shared_store.open_store`, `ray_options`."""


class Reproduction:
    """A profile with its collection, runs and results.

    Methods that return results compute the runs they need and that are missing; finished ones are
    read. Figures and tables are long data frames with the ids of their runs. Runs in another folder
    ``runs`` than HOME/runs are neither shared with other machines nor computed by Ray.

    Attributes:
        profile: see `profiles.config`.
        home: the folder of all results.
        inputs: collection, candidates, tokens and encoders.
        store: finished runs.
        runner: computes runs.
        experiments: which runs the figures and tables need.
    """

    def __init__(
        self, profile: Profile, home: Path | None = None, *, runs: Path | None = None
    ) -> None:
        self.profile = profile
        self.home = home or default_home()
        self.inputs = Inputs(profile, self.home)
        place = ("", "")
        if runs is None:
            place = (os.environ.get(STORE_VARIABLE, ""), os.environ.get(RAY_VARIABLE, ""))
        self.store = open_store(place[0], runs or self.home / "runs")
        self.runner = Runner(self.inputs, self.store, place)
        self.experiments = Experiments(self.inputs, self.store)

    def plan(self) -> Plan:
        """All runs: which are finished, how long the others take, and what would be fetched."""
        return make_plan(self.inputs, self.store)

    def run_all(self) -> None:
        """Compute all runs of the profile that are missing."""
        if is_first():
            _ = self.inputs.collection
            self.store.damaged(aside=True)
            try:
                plan = self.plan()
            except PlanError as error:  # it lacks a speed; nothing else does
                say(f"there is no estimate: {error}")
            else:
                self.runner.memory = plan.memory
                done, total = int(plan.runs["done"].sum()), len(plan.runs)
                time = "" if done == total else f"; the others take about {clock(plan.seconds)}"
                say(f"profile {self.profile.name}: {done} of {total} runs are done{time}")
        wait()
        with self.runner.workers():
            self.runner.ensure(fixed_runs(self.experiments))
            self.runner.ensure(self.experiments.table3_runs())

    def run_one(self, run_id: str) -> StoredRun[Any]:
        """The run of an id, or of its beginning, computed with what it needs first.

        Raises:
            StoreError: no run of the profile, or more than one, has an id that begins so.
        """
        config = find_run(self.experiments, run_id, self.runner.ensure)
        if isinstance(config, EncoderRun):
            self.zero_shot(config.encoder)
        if is_first():
            self.store.damaged(config.run_id, aside=True)
        return self.runner.ensure([config])[0]

    def train(
        self,
        encoder: str,
        *,
        target: float | str | None = "distributed",
        in_batch: bool = False,
        **values: Any,
    ) -> StoredRun[TrainingRun]:
        """Train one encoder of the profile, with the settings of the learning curves.

        Args:
            encoder: its name in the profile.
            target: ε, "adaptive" or "distributed"; None with ``loss="softmax"``.
            in_batch: whether the other negatives of a batch count too.
            values: other fields of `runs.TrainingRun`, e.g. ``triples``, ``batch_size``,
                ``learning_rate``, ``seed`` or ``evaluate_every``.

        Returns:
            The run, with ``.curve``, ``.scores()`` and ``.compare(other)``.
        """
        self.zero_shot(encoder)
        config = self.experiments.curve_run(encoder, target, in_batch, **values)
        return self.runner.ensure(self.experiments.shown_by([config]))[0]

    def zero_shot(self, encoder: str) -> StoredRun[ZeroShotRun]:
        """The pretrained encoder without fine-tuning: step 0 of its training runs."""
        return self.runner.ensure([self.experiments.zero_shot_run(encoder)])[0]

    def bm25(self) -> StoredRun[BM25Run]:
        """BM25's order of the candidates, and its ranking of all passages."""
        return self.runner.ensure([self.experiments.bm25_run()])[0]

    figure3, figure4, figure5 = frames.figure3, frames.figure4, frames.figure5
    figure6, gains = frames.figure6, frames.gains
    table1, table2, table3, table4 = frames.table1, frames.table2, frames.table3, frames.table4


def open_profile(
    profile: str | Path = "laptop", home: Path | None = None, **overrides: Any
) -> Reproduction:
    """Open a profile by its name or the path of a YAML file.

    Args:
        profile: e.g. "laptop", "smoke", "paper".
        home: the folder of all results; by default $ADAPTIVE_MARGINS_HOME, or the checkout.
        overrides: values instead of the profile's, as for `profiles.load.load_profile`.
    """
    return Reproduction(load_profile(profile, **overrides), home)
