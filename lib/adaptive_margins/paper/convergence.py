"""Effectiveness against triples seen, and after how many triples a loss equals another.

After n triples, a loss is as good as the checkpoint that would be selected if training ended there:
the best so far on the validation set. It is compared with a reference at its selected checkpoint,
by TOST over queries and seeds (`significance.compare`). The *equivalence budget* is the number of
triples from which on the loss is always equivalent or better. Evaluations are tested from the last
one backwards until one is not: a fixed sequence of tests needs no correction for their number
(Maurer, Hothorn and Lehmacher, Biometrie in der chemisch-pharmazeutischen Industrie 6, 1995).
Bonferroni's is for the losses that are compared with one reference.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean
from typing import Any

import pandas as pd

from adaptive_margins.evaluation.significance import compare
from adaptive_margins.paper.experiments import Experiments, fixed_runs, tuning_runs
from adaptive_margins.paper.runner import Runner
from adaptive_margins.paper.store import StoredRun
from adaptive_margins.runs import TrainingRun

TUNED = "static (tuned)"
UNSEEN = "cannot be seen here"


@dataclass(frozen=True)
class Line:
    """A row of Table 3 or 4: a loss with its runs, one for each seed."""

    encoder: str
    loss: str
    in_batch: bool
    runs: tuple[StoredRun[TrainingRun], ...]

    @property
    def about(self) -> dict[str, Any]:
        """The line's columns in frames."""
        return {"encoder": self.encoder, "loss": self.loss, "in_batch": self.in_batch}

    @cached_property
    def triples(self) -> list[int]:
        """Triples after which any seed was evaluated."""
        return sorted({int(n) for run in self.runs for n in run.curve["triples"]})

    def so_far(self, measure: str) -> list[pd.DataFrame]:
        """For each seed the scores of the best checkpoint so far, a row per number of `triples`, a
        column per query. The selection measure decides; of equals the first.
        """
        found = []
        for run in self.runs:
            curve, by = run.curve, run.curve[run.config.selection]
            best = curve["step"].iloc[[int(by[: i + 1].argmax()) for i in range(len(by))]]
            rows = run.validated(measure).loc[best].set_index(curve["triples"].to_numpy())
            found.append(rows.reindex(self.triples, method="ffill"))
        return found

    def selected(self, measure: str) -> list[dict[str, float]]:
        """For each seed query → score of the selected checkpoint."""
        return [_by_query(r.validated(measure), r.result["kept_step"]) for r in self.runs]


def rises(runs: Sequence[StoredRun[TrainingRun]], measure: str) -> bool:
    """Whether the curve of a row, mean over its seeds, is highest at its end.

    A seed that stopped early keeps its last value.
    """
    curves = [run.curve.set_index("triples")[measure] for run in runs]
    mean = pd.concat(curves, axis=1).sort_index().ffill().mean(axis=1)
    return bool(mean.idxmax() == mean.index[-1])


def _by_query(scores: pd.DataFrame, row: int) -> dict[str, float]:
    return dict(zip(scores.columns, scores.loc[row], strict=True))


def lines(experiments: Experiments, runner: Runner) -> list[Line]:
    """All trained rows of Tables 3 and 4; missing runs are computed."""
    runner.ensure(tuning_runs(experiments, experiments.profile.encoders))
    of_table3 = dict.fromkeys(experiments.table3_runs())
    others = (c for c in fixed_runs(experiments) if isinstance(c, TrainingRun) and c.test_sets)
    found: dict[tuple[str, str, bool], list[StoredRun[TrainingRun]]] = {}
    for run in runner.ensure(of_table3 | dict.fromkeys(others)):
        c = run.config
        loss = {"margin-mse": f"MarginMSE ({c.similarity})"}.get(c.loss, str(c.target or c.loss))
        if isinstance(c.target, float):
            loss = TUNED if c in of_table3 else f"static (ε = {c.target:g})"
        loss += f", {c.sampling}" * (c.sampling != "random")
        found.setdefault((c.encoder, loss, c.in_batch), []).append(run)
    return [Line(*key, tuple(runs)) for key, runs in found.items()]


def convergence(found: Sequence[Line]) -> pd.DataFrame:
    """Learning curves on validation: a row per line, seed, measure and evaluation.

    Columns: encoder, loss, in_batch, seed, triples, measure, value, selected (whether this
    checkpoint was selected), run_id.
    """
    frames = []
    for line in found:
        for run in line.runs:
            names = list(run.config.rerank_measures)
            long = run.curve.melt(["step", "triples"], names, "measure", "value")
            long["selected"] = long.pop("step") == run.result["kept_step"]
            frames.append(long.assign(**line.about, seed=run.config.seed, run_id=run.run_id))
    columns = "encoder loss in_batch seed triples measure value selected run_id"
    return pd.concat(frames, ignore_index=True)[columns.split()]


def equivalence(found: Sequence[Line]) -> pd.DataFrame:
    """Each loss after each number of triples, compared with the references of its encoder.

    References are the tuned static row without in-batch negatives and, if there are any (column
    ``taught``), the best student of a teacher. ``low`` and ``high`` are the 95 % confidence
    interval of the difference, ``p_adjusted`` is TOST's p-value times ``comparisons``;
    ``reference_triples`` are those that the reference saw until it stopped; curves that ``rise``
    are highest at their end.
    """
    rows: list[dict[str, Any]] = []
    for encoder in dict.fromkeys(line.encoder for line in found):
        group = [line for line in found if line.encoder == encoder]
        taught = [line for line in group if line.runs[0].config.teacher is not None]
        references = [line for line in group if (line.loss, line.in_batch) == (TUNED, False)]
        references += sorted(taught, key=_selected_score)[-1:]
        for reference in references:
            for measure in reference.runs[0].config.rerank_measures:
                for line in (other for other in group if other is not reference):
                    rows += _compared(line, reference, measure, len(group) - 1)
    return pd.DataFrame(rows)


def _selected_score(line: Line) -> float:
    return fmean(fmean(x.values()) for x in line.selected(line.runs[0].config.selection))


def _compared(line: Line, reference: Line, measure: str, count: int) -> list[dict[str, Any]]:
    named = reference.loss + ", in-batch" * reference.in_batch
    about = line.about | {"reference": named, "measure": measure}
    about |= {"taught": reference.runs[0].config.teacher is not None, "comparisons": count}
    about["reference_triples"] = fmean(run.result["triples"] for run in reference.runs)
    for name, one in (("", line), ("reference_", reference)):
        ids = [run.run_id for run in one.runs]
        about |= {f"{name}rises": rises(one.runs, measure), f"{name}run_id": ids[0]}
        about[f"{name}run_ids"] = " ".join(ids)
    against, so_far = reference.selected(measure), line.so_far(measure)
    rows = []
    for triples in line.triples:
        test = compare([_by_query(x, triples) for x in so_far], against, comparisons=count)
        numbers = {"triples": triples, "difference": test.difference, "verdict": test.verdict}
        numbers |= {"low": test.ci[0], "high": test.ci[1]}
        rows.append(about | numbers | {"p_adjusted": min(1.0, test.p_tost * count)})
    return rows


def budgets(compared: pd.DataFrame) -> pd.DataFrame:
    """The equivalence budget of each loss, from the frame of `equivalence`.

    ``budget`` is in triples, ``share`` of those that the reference saw. ``state`` is "reached",
    "not reached", or `UNSEEN` where longer training may change it: the reference's curve is highest
    at its end, or that of a loss that has not reached it. Other columns are as after ``triples``:
    the budget, or the end.
    """
    rows = []
    for _, group in compared.groupby(["run_ids", "reference_run_ids", "measure"], sort=False):
        ordered = group.sort_values("triples", ascending=False).to_dict("records")
        failed = (row["verdict"] not in ("equivalent", "better") for row in ordered)
        steps = next((i for i, fails in enumerate(failed) if fails), len(ordered))
        one = ordered[max(steps - 1, 0)]
        budget = one["triples"] if steps else float("nan")
        state = "reached" if steps else "not reached"
        if one["reference_rises"] or (not steps and one["rises"]):
            state = UNSEEN
        share = budget / one["reference_triples"]
        rows.append(one | {"budget": budget, "share": share, "state": state})
    return pd.DataFrame(rows)
