"""Training triples: a query, a relevant passage, and a negative from the BM25 candidates."""

from __future__ import annotations

import logging
import random

from adaptive_margins.data.collection import Triple
from adaptive_margins.data.trec import Qrels, Run

log = logging.getLogger(__name__)


def sample_triples(
    qrels: Qrels,
    candidates: Run,
    *,
    count: int,
    ranks: tuple[int, int],
    seed: int,
    min_grade: int = 2,
) -> list[Triple]:
    """Draw ``count`` triples, one per query and pass.

    A positive is a passage of grade ≥ ``min_grade``. A negative is a candidate at a rank in
    [``ranks[0]``, ``ranks[1]``), counted from 1 (score descending, ties by docid descending, as
    trec_eval orders), that the query's qrels do not judge at all, whatever the grade. Each pass
    goes through the queries in a fresh order and takes each query's next positive and negative;
    both are reused only after the last one. Queries without a positive or an eligible negative
    are skipped and their number is logged.

    Deterministic for a seed; fewer triples are a prefix of more.

    Raises:
        ValueError: ``count`` or ``ranks`` out of range, or no query has an eligible negative.
    """
    low, high = ranks
    if count < 1:
        raise ValueError(f"count must be at least 1, not {count}")
    if not 1 <= low < high:
        raise ValueError(f"ranks must be (low, high) with 1 ≤ low < high, not {ranks}")
    choices: dict[str, tuple[list[str], list[str]]] = {}
    for qid, judged in sorted(qrels.items()):
        scores = candidates.get(qid, {})
        ranked = sorted(sorted(scores, reverse=True), key=lambda docid: -scores[docid])
        negatives = [docid for docid in ranked[low - 1 : high - 1] if docid not in judged]
        positives = sorted(docid for docid, grade in judged.items() if grade >= min_grade)
        if positives and negatives:
            # A generator per query: its draws do not depend on which other queries there are.
            rng = random.Random(f"{seed} {qid}")
            rng.shuffle(positives)
            rng.shuffle(negatives)
            choices[qid] = positives, negatives
    if skipped := len(qrels) - len(choices):
        log.warning(
            "%d of %d queries skipped: no positive, or no unjudged candidate at ranks %d to %d",
            skipped, len(qrels), low, high - 1,
        )  # fmt: skip
    if not choices:
        raise ValueError(
            f"no triples: none of {len(qrels)} queries has a passage of grade ≥ {min_grade} and an"
            f" unjudged candidate at ranks {low} to {high - 1}"
        )
    triples: list[Triple] = []
    for number in range(-(-count // len(choices))):
        order = list(choices)
        random.Random(f"{seed} pass {number}").shuffle(order)
        for qid in order:
            positives, negatives = choices[qid]
            triples.append(
                (qid, positives[number % len(positives)], negatives[number % len(negatives)])
            )
    return triples[:count]
