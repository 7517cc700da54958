"""Training triples (query, positive, negative): drawn from candidates, or checked."""

from __future__ import annotations

import logging
import random
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from adaptive_margins.data.collection import Collection, Texts, Triple
from adaptive_margins.data.text import DataError
from adaptive_margins.data.trec import Qrels, Run, top

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

    A positive is a passage of grade ≥ ``min_grade``. A negative is an unjudged candidate at a rank
    in [``ranks[0]``, ``ranks[1]``), counted from 1 in the order of `top`. Each pass takes the next
    positive and negative of each query, in a new random order of queries; both are reused only
    after the last one. Queries without a positive or a negative are skipped, and their number is
    logged. Fewer triples of a seed are a prefix of more.

    Raises:
        DataError: no query has a positive and an eligible negative.
    """
    low, high = ranks
    choices: dict[str, tuple[list[str], list[str]]] = {}
    for qid, judged in sorted(qrels.items()):
        ranked = [docid for docid, _ in top(candidates.get(qid, {}), high - 1)[low - 1 :]]
        negatives = [docid for docid in ranked if docid not in judged]
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
            skipped,
            len(qrels),
            low,
            high - 1,
        )
    if not choices:
        raise DataError(
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


def mine_triples(
    qrels: Qrels, candidates: Run, passages: Texts, *, count: int, seed: int
) -> list[Triple]:
    """Draw ``count`` triples as `sample_triples`, from the best 100 of `filter_negatives`.

    A positive has at least grade 1, and a text.

    Raises:
        DataError: no query has a positive and a negative.
    """
    asked = {
        qid: {docid: g for docid, g in judged.items() if g < 1 or passages[docid].strip()}
        for qid, judged in qrels.items()
    }
    return sample_triples(asked, candidates, count=count, ranks=(1, 101), seed=seed, min_grade=1)


@dataclass(frozen=True)
class Checked:
    """Triples examined and left out by `check_triples`, each counted for the first reason."""

    checked: int = 0  # triples examined
    without_text: int = 0  # the query, the positive or the negative is empty
    same_passage: int = 0  # the positive is the negative
    negative_relevant: int = 0  # the negative is judged relevant to the query
    positive_not_relevant: int = 0  # the positive is judged not relevant to the query
    same_text: int = 0  # the negative has the positive's text, case and white space aside
    repeated: int = 0  # the triple occurred before

    @property
    def reasons(self) -> str:
        """The counts above 0, in words."""
        counts = ((getattr(self, name), what) for name, what in _REASONS.items())
        return ", ".join(f"{count:,} {what}" for count, what in counts if count)


_REASONS = {
    "without_text": "with an empty text",
    "same_passage": "whose positive is the negative",
    "negative_relevant": "whose negative is judged relevant",
    "positive_not_relevant": "whose positive is judged not relevant",
    "same_text": "whose negative has the positive's text",
    "repeated": "that occur more than once",
}


def check_triples(
    triples: Iterable[Triple],
    queries: Texts,
    qrels: Qrels,
    passages: Texts,
    *,
    wanted: int | None = None,
) -> tuple[list[Triple], Checked]:
    """Leave out triples that contradict the judgements or are useless (`Checked`).

    ``queries`` and ``qrels`` are those of the triples' set; a passage is relevant from grade 1 on.
    The check ends when ``wanted`` triples are found (None: at the end).
    """
    counts: Counter[str] = Counter()
    found: dict[Triple, None] = {}
    for triple in triples:
        if len(found) == wanted:
            break
        counts["checked"] += 1
        if reason := _wrong(triple, queries, qrels, passages):
            counts[reason] += 1
        elif triple in found:
            counts["repeated"] += 1
        else:
            found[triple] = None
    return list(found), Checked(**counts)


def check_sample(collection: Collection, most: int = 100_000) -> Checked:
    """Check a collection's triples, or about ``most`` of them at even distances."""
    triples = collection.triples
    if not len(triples):
        return Checked()
    some = (triples[row] for row in range(0, len(triples), max(1, -(-len(triples) // most))))
    queries, qrels = collection.queries["train"], collection.qrels["train"]
    return check_triples(some, queries, qrels, collection.passages)[1]


def _wrong(triple: Triple, queries: Texts, qrels: Qrels, passages: Texts) -> str:
    """The field of `Checked` for which a triple is left out; "" if it is not."""
    qid, positive, negative = triple
    judged = qrels.get(qid, {})
    one, other = passages[positive].lower().split(), passages[negative].lower().split()
    if not (queries[qid].strip() and one and other):
        return "without_text"
    if positive == negative:
        return "same_passage"
    if judged.get(negative, 0) > 0:
        return "negative_relevant"
    if judged.get(positive, 1) < 1:
        return "positive_not_relevant"
    return "same_text" if one == other else ""
