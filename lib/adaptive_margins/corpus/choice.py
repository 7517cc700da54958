"""Which loss helps here: a training by each on the same triples, and what choosing one costs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

from adaptive_margins.corpus.finetuned import change, compared, number
from adaptive_margins.corpus.settings import Target, loss_name
from adaptive_margins.corpus.validation import SELECTION
from adaptive_margins.data.trec import Qrels, Run
from adaptive_margins.evaluation.measures import evaluate
from adaptive_margins.training import TrainingResult


def about_training(target: Target, result: TrainingResult) -> dict[str, Any]:
    """Return the row of a loss: its curve on validation, and its best evaluation after step 0."""
    steps, values = (result.curve[name].tolist() for name in ("step", SELECTION))
    row = max(range(1, len(steps)), key=values.__getitem__)
    checks = result.checks[result.checks["measure"] == SELECTION].set_index("step")
    start, best = (
        dict(checks.loc[[step], ["qid", "value"]].to_numpy()) for step in (0, steps[row])
    )
    return {
        "target": target,
        "steps": steps,
        "values": values,
        "best_step": steps[row],
        "value": values[row],
        "seconds": {"training": result.train_seconds, "validation": result.eval_seconds},
        "against_start": compared(best, start, SELECTION),
        "per_query": best,
    }


def about_choice(
    rows: Sequence[dict[str, Any]], report: Mapping[str, Any], qrels: Qrels, runs: Mapping[str, Run]
) -> dict[str, Any]:
    """Compare all losses with the best one, and its gain on validation with that on the test.

    The ``rows`` are of `about_training`. ``report`` has the gain on validation (`best_merge`) of
    the encoder, or of those of folds, that ranked the test queries: ``runs`` have that ranking and
    the one of before. "optimism" is the gain on validation − that on the test, with the standard
    error for independent queries; those of folds are not, as each query is in both.
    """
    chosen = max(rows, key=lambda row: row["value"])
    for row in rows:
        row["against_chosen"] = compared(row["per_query"], chosen["per_query"], SELECTION)
    after, before = (evaluate(qrels, runs[name], [SELECTION]) for name in ("trained", "start"))
    values = before.per_query[SELECTION]
    gains = [value - values[qid] for qid, value in after.per_query[SELECTION].items()]
    merges = [fold["merge"] for fold in report.get("folds", [report])]
    gain, there = fmean(gains), fmean(merge["difference"] for merge in merges)
    error = merges[0]["standard_error"] if len(merges) == 1 else None
    if error is not None:
        error = math.hypot(error, stdev(gains) / math.sqrt(len(gains))) if len(gains) > 1 else None
    return {
        "trainings": [{k: v for k, v in row.items() if k != "per_query"} for row in rows],
        "chosen": chosen["target"],
        "validation_gain": there,
        "test_gain": gain,
        "optimism": there - gain,
        "standard_error": error,
    }


def choice_table(report: Mapping[str, Any]) -> list[list[str]]:
    """Return the losses of a report with their comparisons on validation, below a head.

    Of a report without `about_choice` the table is empty.
    """
    if "choice" not in report:
        return []
    head = ["loss", f"{SELECTION} on validation", "at step", "− zero-shot", "− the chosen"]
    rows = []
    for row in report["choice"]["trainings"]:
        pairs = [row[name] for name in ("against_start", "against_chosen")]
        cells = [f"{change(found)}, {found['verdict']}" for found in pairs]
        if row["target"] == report["choice"]["chosen"]:
            cells[1] = "chosen"
        rows.append([loss_name(row["target"]), number(row["value"]), str(row["best_step"]), *cells])
    return [head, *rows]
