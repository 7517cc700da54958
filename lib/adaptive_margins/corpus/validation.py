"""Validation of an encoder in training, on a part of the collection that is quick to embed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pandas as pd

from adaptive_margins.data.collection import Collection, Texts
from adaptive_margins.data.stored import seeded_order
from adaptive_margins.data.trec import Qrels, Run, top
from adaptive_margins.encoder.embed import Precision
from adaptive_margins.evaluation.measures import Evaluation, evaluate
from adaptive_margins.retrieval.dense import DenseRetriever

SELECTION = "nDCG@10"
"""The measure that selects the checkpoint, on the validation queries (Section 5.4)."""
DEPTH = 10
"""Depth of the rankings: as far as the measure looks."""
_DEPTHS = (100, 50, 20, 10)
_FEWEST = 20  # queries, whatever they cost: a standard error of fewer is of little use


def with_positive(qrels: Qrels) -> Qrels:
    """Return the judgements of the queries that have a relevant passage."""
    return {qid: judged for qid, judged in qrels.items() if any(g > 0 for g in judged.values())}


class Validation:
    """`SELECTION` of a full ranking of a part of the collection, embedded at every evaluation.

    The part is all passages if that is cheap; else what BM25 and the zero-shot encoder rank highest
    for any validation query, and all relevant passages: as deep as ``budget`` passages allow, and
    if not even the top 10 fit, for fewer queries. Every query ranks all of the part, so that a
    trained encoder can find more than either system's candidates.

    Attributes:
        queries: validation queries with a relevant passage.
        qrels: their judgements.
        passages: the part.
    """

    def __init__(
        self,
        collection: Collection,
        rankings: Sequence[Run],
        budget: int,
        precision: Precision,
        seed: int,
    ) -> None:
        passages, queries = collection.passages, collection.queries["validation"]
        qrels = with_positive(collection.qrels["validation"])
        known = sorted(qrels)
        qids = [known[row] for row in seeded_order(len(known), seed)]
        docids = set(passages.ids)
        if len(docids) > budget:
            qids, docids = _part(qids, qrels, rankings, budget)
        self.precision = precision
        self.qrels = {qid: qrels[qid] for qid in sorted(qids)}
        self.queries = Texts(list(self.qrels), [queries[qid] for qid in self.qrels])
        ids = [docid for docid in passages.ids if docid in docids]
        self.passages = Texts(ids, [passages[docid] for docid in ids])

    def __call__(self, encoder: Any) -> Evaluation:
        """Return the encoder's measure over all queries."""
        retriever = DenseRetriever(encoder, self.passages, precision=self.precision, warn=False)
        return evaluate(self.qrels, retriever.search(self.queries, DEPTH), [SELECTION])


def _part(
    qids: list[str], qrels: dict[str, dict[str, int]], rankings: Sequence[Run], budget: int
) -> tuple[list[str], set[str]]:
    """The queries and passages that are within the budget."""

    def needed(qid: str, depth: int) -> set[str]:
        best = {docid for run in rankings for docid, _ in top(run.get(qid, {}), depth)}
        return best | {docid for docid, grade in qrels[qid].items() if grade > 0}

    for depth in _DEPTHS:
        docids = set().union(*(needed(qid, depth) for qid in qids))
        if len(docids) <= budget:
            return qids, docids
    chosen: list[str] = []
    docids = set()
    for qid in qids:
        more = docids | needed(qid, _DEPTHS[-1])
        if len(more) > budget and len(chosen) >= _FEWEST:
            break
        docids, chosen = more, [*chosen, qid]
    return chosen, docids


def gain(checks: pd.DataFrame, best_step: float) -> tuple[float, float]:
    """Return mean and standard error of the best step's paired differences from step 0.

    ``checks`` is that of a `TrainingResult`. The error of fewer than two queries is NaN.
    """
    selected = checks[checks["measure"] == SELECTION]
    values = selected.pivot(index="qid", columns="step", values="value").astype(float)
    differences = (values[best_step] - values[0]).to_numpy()
    if len(differences) < 2:
        return float(differences.mean()), math.nan
    error = differences.std(ddof=1) / math.sqrt(len(differences))
    return float(differences.mean()), float(error)
