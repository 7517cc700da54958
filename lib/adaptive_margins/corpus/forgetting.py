"""Forgetting: a fine-tuned encoder against the zero-shot one on a second collection."""

from __future__ import annotations

import dataclasses
from typing import Any

from adaptive_margins.corpus.finetuned import about_collection, compared
from adaptive_margins.corpus.settings import Job
from adaptive_margins.corpus.validation import SELECTION, Validation, with_positive
from adaptive_margins.data.sources import open_collection
from adaptive_margins.data.text import DataError
from adaptive_margins.evaluation.measures import Evaluation
from adaptive_margins.evaluation.significance import paired_interval


def second_collection(job: Job) -> tuple[Validation, dict[str, Any]]:
    """Open the collection that shows what is forgotten; its evaluation, of all passages, and facts.

    Its queries are those of "test", or else of "validation" or "train".

    Raises:
        DataError: as `open_collection`; or no query has a relevant passage.
    """
    source = str(job.also)
    collection = open_collection(source)
    for name in ("test", "validation", "train"):
        if qrels := with_positive(collection.qrels.get(name, {})):
            queries, passages = {"validation": collection.queries[name]}, collection.passages
            one: Any = {"queries": queries, "qrels": {"validation": qrels}, "triples": []}
            part = dataclasses.replace(collection, **one)
            evaluate = Validation(part, [], len(passages), job.settings.precision, job.seed)
            return evaluate, {**about_collection(collection, source), "set": name}
    raise DataError(
        f"{source}: no query has a relevant passage, but what is forgotten is measured with queries"
    )


def not_worse(trained: Evaluation, start: Evaluation) -> dict[str, Any]:
    """Compare; the verdict is "not worse", "worse", "undecided" or "too few queries".

    "not worse" is one half of TOST: by a one-sided t test at .05 the mean difference is above
    −margin, as is the confidence interval of 90 %. A smaller loss than that may be significant.
    """
    a, b = (evaluation.per_query[SELECTION] for evaluation in (trained, start))
    found = compared(a, b, SELECTION)
    if found["ci"] is not None:
        within = paired_interval(a, b, confidence=0.9)[1] > -found["margin"] and any(b.values())
        other = "worse" if found["verdict"] == "worse" else "undecided"
        found["verdict"] = "not worse" if within else other
    return {"start": start.mean[SELECTION], "trained": trained.mean[SELECTION], **found}
