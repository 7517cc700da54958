"""Hard negatives: candidates of a ranking without those that may be relevant (false negatives)."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from adaptive_margins.data.collection import Texts
from adaptive_margins.data.trec import Qrels, Run
from adaptive_margins.data.words import terms, without_spaces, words_of
from adaptive_margins.progress import bar

Similarity = Callable[[str, list[str]], np.ndarray]
"""Cosines of a query (by id) and passages (by docid), shape (number of docids,), in [-1, 1]."""
SAME_PASSAGE = 0.9
"""Least Jaccard similarity of the words of near duplicates: of 100 words each, 95 are shared. 400
abstracts of Cranfield and of Vaswani each reach .71 with the 20 most similar by BM25, unless they
are the same text."""
MARGIN = 0.95
"""Share of a positive's score above which a candidate may be relevant; the best in NV-Retriever."""
_RANDOM = 10  # most random passages of a query that has no other negative


@dataclass(frozen=True)
class FilterCounts:
    """Candidates examined and dropped by `filter_negatives`, each counted for the first filter."""

    queries: int = 0  # with a positive that has a text
    candidates: int = 0  # of these queries
    judged: int = 0  # candidates with any grade in the query's qrels, the positives included
    without_text: int = 0  # candidates that are empty
    same_text: int = 0  # candidates whose text is a positive's, case and white space aside
    near_duplicate: int = 0  # candidates that share `SAME_PASSAGE` of their words with a positive
    too_similar: int = 0  # candidates that the encoder scores above `MARGIN` of the positive's
    random: int = 0  # queries with no candidate left, whose negatives are random passages
    without_negative: int = 0  # queries for which no random passage passed the filters either

    def none_left(self) -> str:
        """Return why there is no negative for any query, for an error."""
        if not self.queries:
            return "no training query has a relevant passage with text"
        counts = {
            "judged": self.judged,
            "without text": self.without_text,
            "near duplicates of a positive": self.same_text + self.near_duplicate,
            "about as similar to the query as a positive, by the encoder": self.too_similar,
        }
        found = ", ".join(f"{count:,} {what}" for what, count in counts.items() if count)
        return (
            f"no negative is left for any of the {self.queries:,} training queries that have a"
            f" relevant passage with text: their {self.candidates:,} candidates are"
            f" {found or 'none'}, and random passages are no better. Add passages, another encoder"
            " (--model) or triples (triples.tsv)"
        )


def filter_negatives(
    candidates: Run, qrels: Qrels, passages: Texts, *, similarity: Similarity | None, seed: int = 1
) -> tuple[Run, FilterCounts]:
    """Drop candidates that are judged, or probably relevant although unjudged (false negatives).

    The filters, in this order: judged passages, passages without text, passages with a positive's
    text, near duplicates of a positive (`SAME_PASSAGE`), and passages that the encoder scores above
    `MARGIN` × the score of the query's positive: TopK-PercPos of NV-Retriever (Moreira et al.,
    arXiv 2407.15831, 2024). As in `mine_hard_negatives` of Sentence Transformers, the lowest score
    of several positives counts, and the threshold is p − (1 − `MARGIN`) · |p|, which is below a
    negative p, too. On Cranfield with MiniLM and half of each query's positives hidden, the filters
    drop .90 of the hidden positives and .44 of the others among BM25's best 100 (.38 and .11 by the
    highest score).

    A query with no candidate left gets up to 10 random passages that pass the filters, drawn by
    ``seed`` and the query id, so that small corpora do not lose the query.

    Args:
        candidates: query id → docid → score, of BM25 or of the encoder.
        qrels: query id → docid → grade; a positive has at least grade 1. Other queries are left
            out.
        passages: all passages.
        similarity: of the zero-shot encoder; None for no such filter.
        seed: of the random passages.

    Returns:
        Query id → docid → score of the remaining candidates, in their order (random passages: 0),
        without queries that have no positive with a text or no negative; and the counts.

    Raises:
        KeyError: ``passages`` lacks a candidate or a judged passage; the message names it.
    """
    positives: dict[str, list[str]] = {}
    for qid, judged in sorted(qrels.items()):
        found = [docid for docid, grade in sorted(judged.items()) if grade > 0]
        if found := [docid for docid in found if passages[docid].strip()]:
            positives[qid] = found

    wanted = {qid: candidates.get(qid, {}) for qid in positives}
    kept, dropped = _filtered(wanted, positives, qrels, passages, similarity)

    drawn: Run = {}
    for qid in positives:
        if not kept[qid]:
            rng = random.Random(f"{seed} {qid} negatives")
            rows = rng.sample(range(len(passages)), min(len(passages), 5 * _RANDOM))
            drawn[qid] = {passages.ids[row]: 0.0 for row in rows}
    instead, _ = _filtered(drawn, positives, qrels, passages, similarity)
    for qid, hits in instead.items():
        kept[qid] = dict(list(hits.items())[:_RANDOM])
    return {qid: hits for qid, hits in kept.items() if hits}, FilterCounts(
        queries=len(positives),
        candidates=sum(len(hits) for hits in wanted.values()),
        **dropped,
        random=sum(bool(hits) for hits in instead.values()),
        without_negative=sum(not hits for hits in instead.values()),
    )


def _filtered(
    candidates: Run,
    positives: Mapping[str, Sequence[str]],
    qrels: Qrels,
    passages: Texts,
    similarity: Similarity | None,
) -> tuple[Run, Counter[str]]:
    """Candidates of each query that pass all filters, and how many each filter dropped."""
    forms: dict[str, _Form] = {}

    def form(docid: str) -> _Form:
        if docid not in forms:
            forms[docid] = _form(passages[docid])
        return forms[docid]

    dropped = Counter[str]()
    kept: Run = {}
    for qid, hits in bar("comparing candidates with positives", candidates.items(), unit="queries"):
        relevant = [form(docid) for docid in positives[qid]]
        clear = []
        for docid in hits:
            reason = "judged" if docid in qrels[qid] else _resembles(form(docid), relevant)
            if reason:
                dropped[reason] += 1
            else:
                clear.append(docid)
        if similarity is not None and clear:
            lowest = similarity(qid, list(positives[qid])).astype(np.float64).min()
            scores = similarity(qid, clear).astype(np.float64)
            passed = scores <= lowest - (1 - MARGIN) * abs(lowest)
            dropped["too_similar"] += int((~passed).sum())
            clear = [docid for docid, ok in zip(clear, passed, strict=True) if ok]
        kept[qid] = {docid: hits[docid] for docid in clear}
    return kept, dropped


class _Form(NamedTuple):
    """A text's hash, case and white space aside (None if empty), and its words' sorted hashes."""

    text: int | None
    words: np.ndarray


def _form(text: str) -> _Form:
    text = text.lower()
    parts = text.split()
    words = terms(text, shortest=1) if without_spaces(text) else words_of(text)
    hashes = sorted(set(map(hash, words)))
    return _Form(hash(tuple(parts)) if parts else None, np.array(hashes, dtype=np.int64))


def _resembles(form: _Form, positives: Sequence[_Form]) -> str:
    """The field of `FilterCounts` that a candidate is dropped for by its text; "" if for none."""
    if form.text is None:
        return "without_text"
    if any(form.text == other.text for other in positives):
        return "same_text"
    return "near_duplicate" if any(_near(form.words, o.words) for o in positives) else ""


def _near(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether the Jaccard similarity of two sets is at least `SAME_PASSAGE`."""
    # The small number is for products such as 0.9 × 70, which floats put above 63.
    low, high = sorted((len(one), len(other)))
    if not low or low < SAME_PASSAGE * high - 1e-6:
        return False
    shared = len(np.intersect1d(one, other, assume_unique=True))
    return shared >= SAME_PASSAGE * (low + high - shared) - 1e-6
