"""Validation of an encoder in training, and what it decides afterwards: a merge, a fusion.

In training a part of the collection is ranked that is quick to embed. After it, validation queries
choose a merge of parameters, and the encoder's weight next to BM25.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from adaptive_margins.data.collection import Collection, Texts
from adaptive_margins.data.splits import MOST_VALIDATION
from adaptive_margins.data.stored import seeded_order
from adaptive_margins.data.trec import Qrels, Run, top
from adaptive_margins.encoder.embed import Precision
from adaptive_margins.evaluation.measures import Evaluation, evaluate
from adaptive_margins.files import read_object
from adaptive_margins.retrieval.dense import DenseRetriever, hybrid

SELECTION = "nDCG@10"
"""The measure that selects the checkpoint, on the validation queries (Section 5.4)."""
DEPTH = 10
"""Depth of the rankings: as far as the measure looks."""
ALPHAS = (0.0, 0.25, 0.5, 0.75, 1.0)  # between 0 and 1 an evaluation each
WEIGHTS = tuple(tenth / 10 for tenth in range(11))
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


# ---- after training ---------------------------------------------------------------------------


def merged(start: dict[str, Tensor], trained: dict[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """Return start + α (trained − start) of each parameter (Wortsman et al., CVPR 2022)."""
    if alpha in (0, 1):  # to the bit
        return trained if alpha else start
    return {name: torch.lerp(start[name], trained[name], alpha) for name in trained}


def best_merge(encoder: Any, result: Any, validation: Validation, errors: float) -> dict[str, Any]:
    """Leave the zero-shot ``encoder`` in its best state on the way to the trained one.

    The trained one is that of the `TrainingResult`'s best evaluation or, if that is step 0, its
    last. Of `ALPHAS` whose gain in `SELECTION` exceeds ``errors`` standard errors of the paired
    difference (NaN for one query) the best is chosen, else 0. Returns them, with their values,
    and the gain of the chosen one.
    """
    step = result.best_step or result.stop_step
    trained = result.states["selected" if result.best_step else "last"]
    parameters = encoder.named_parameters()
    start = {name: p.detach().cpu().clone() for name, p in parameters if name in trained}
    checks = result.checks[result.checks["step"].isin([0, step])]
    checks = checks.assign(step=checks["step"] / step)
    for alpha in ALPHAS[1:-1]:
        encoder.load_state_dict(merged(start, trained, alpha), strict=False)
        values = pd.Series(validation(encoder).per_query[SELECTION], name="value")
        new = values.rename_axis("qid").reset_index().assign(step=alpha, measure=SELECTION)
        checks = pd.concat([checks, new])
    means = checks.groupby("step")["value"].mean()
    gains = {alpha: gain(checks, alpha) for alpha in ALPHAS}
    passing = [alpha for alpha, (mean, error) in gains.items() if mean > errors * error]
    chosen = max(passing, key=means.__getitem__, default=0.0)
    encoder.load_state_dict(merged(start, trained, chosen), strict=False)
    found = {"alphas": list(ALPHAS), "values": means.tolist(), "alpha": chosen, "step": step}
    mean, error = gains[chosen]
    return {**found, "difference": mean, "standard_error": None if math.isnan(error) else error}


def learned(runs: Mapping[str, Run], qrels: Qrels) -> dict[str, Any]:
    """Choose the weight of `hybrid` that is best in `SELECTION` for queries that are not tested.

    ``runs`` are "dense" and "bm25". Neither alone is better there than their fusion: weights 1 and
    0 are among `WEIGHTS`, and win draws. Returned with the curve and that of reciprocal ranks.
    """
    qrels = with_positive(qrels)
    dense, bm25 = ({qid: runs[name][qid] for qid in qrels} for name in ("dense", "bm25"))

    def value(weight: float | None) -> float:
        return evaluate(qrels, hybrid(dense, bm25, DEPTH, weight), [SELECTION]).mean[SELECTION]

    curve = [value(weight) for weight in WEIGHTS]
    *_, weight = max((v, w in (0, 1), w) for v, w in zip(curve, WEIGHTS, strict=True))
    found = {"weights": list(WEIGHTS), "curve": curve, "reciprocal_rank": value(None)}
    return {"weight": weight, **found, "queries": len(qrels)}


def stored_weight(model: str) -> float | None:
    """Return the weight that `finetune` learned for an encoder; None if there is none."""
    match read_object(Path(model) / "training.json"):
        case {"hybrid": {"weight": float(weight)}} if 0 <= weight <= 1:
            return weight
    return None


def choose_weight(
    model: str, collection: Collection, tested: str, rank: Callable[[Texts], dict[str, Run]]
) -> dict[str, Any]:
    """Choose the weight of an encoder in `hybrid` for the set ``tested``; ``how`` is in words.

    It is the encoder's `stored_weight`; else `learned` with ``rank`` on the set validation, or
    train; else None, for reciprocal ranks.
    """
    if (weight := stored_weight(model)) is not None:
        return {"weight": weight, "how": "learned when the encoder was trained"}
    for name in ("validation", "train"):
        known = sorted(with_positive(collection.qrels.get(name, {})))
        if known and name != tested:
            qids = [known[row] for row in seeded_order(len(known), 1)[:MOST_VALIDATION]]
            texts = Texts(qids, [collection.queries[name][qid] for qid in qids])
            found = learned(rank(texts), {qid: collection.qrels[name][qid] for qid in qids})
            return {**found, "how": f"the best for {len(qids):,} queries of {name}"}
    return {"weight": None, "how": "reciprocal ranks: there is no other set to learn a weight on"}
