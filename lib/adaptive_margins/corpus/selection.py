"""What validation queries decide after training: a merge of parameters, a weight next to BM25."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from adaptive_margins.corpus.validation import DEPTH, SELECTION, Validation, gain, with_positive
from adaptive_margins.data.collection import Collection, Texts
from adaptive_margins.data.splits import MOST_VALIDATION
from adaptive_margins.data.stored import seeded_order
from adaptive_margins.data.trec import Qrels, Run
from adaptive_margins.evaluation.measures import evaluate
from adaptive_margins.files import read_object
from adaptive_margins.retrieval.dense import hybrid

ALPHAS = (0.0, 0.25, 0.5, 0.75, 1.0)  # between 0 and 1 an evaluation each
WEIGHTS = tuple(tenth / 10 for tenth in range(11))


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
