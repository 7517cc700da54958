"""Hard negatives: candidates of a ranking without those that may be relevant (false negatives)."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from adaptive_margins.data.collection import Texts
from adaptive_margins.data.trec import Qrels, Run
from adaptive_margins.data.words import terms, without_spaces
from adaptive_margins.progress import bar

Similarity = Callable[[str, list[str]], np.ndarray]
"""Cosines of a query (by id) and passages (by docid), shape (number of docids,), in [-1, 1]."""
SAME_PASSAGE = 0.9
"""Jaccard similarity of two passages' sets of words from which on they count as near duplicates: of
100 different words each, 95 are then the same. Passages on one topic stay below: some 400 abstracts
of Cranfield and of Vaswani each, compared with the 20 that BM25 finds most similar, reach .71
unless they are the same text."""
MARGIN = 0.95
"""Share of a positive's score above which a candidate may be relevant; the best in NV-Retriever."""
_RANDOM = 10  # random passages that a query without any other negative may get


@dataclass(frozen=True)
class FilterCounts:
    """What `filter_negatives` examined and dropped; a candidate counts once, for the first filter.

    Attributes:
        queries: queries with a positive that has a text.
        candidates: their candidates.
        judged: candidates that the query's qrels judge, whatever the grade; the positives are among
            them.
        without_text: candidates that are empty.
        same_text: candidates whose text is a positive's, case and white space aside.
        near_duplicate: candidates that share `SAME_PASSAGE` of their words with a positive.
        too_similar: candidates that the encoder scores too close to the positive, or above it.
        random: queries with no candidate left, whose negatives are random passages instead.
        without_negative: queries for which no random passage passed the filters either.
    """

    queries: int = 0
    candidates: int = 0
    judged: int = 0
    without_text: int = 0
    same_text: int = 0
    near_duplicate: int = 0
    too_similar: int = 0
    random: int = 0
    without_negative: int = 0

    def none_left(self) -> str:
        """Return why there is no negative for any query, in words."""
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
    """Drop candidates that are relevant, or may be although they are not judged (false negatives).

    In this order: judged passages, passages without text, passages with a positive's text, near
    duplicates of a positive (`SAME_PASSAGE`), and those that the encoder scores above `MARGIN` ×
    the score of the query's positive. The last is TopK-PercPos of NV-Retriever (Moreira et al.,
    arXiv 2407.15831, 2024). Two things that the paper leaves open are done as in
    `mine_hard_negatives` of Sentence Transformers: of several positives the lowest score counts,
    which is the safe side; and the threshold is p − (1 − `MARGIN`) · |p|, so that it lies below a
    negative score p, too. Measured on Cranfield with MiniLM, half of each query's positives hidden:
    among BM25's best 100, the filters drop .90 of the hidden positives and .44 of the others (.38
    and .11 by the highest score instead).

    A query with no candidate left gets up to 10 random passages that pass the same filters, drawn
    by ``seed`` and the query id: easy negatives, without which a small corpus would lose the query.

    Args:
        candidates: query id → docid → score, of BM25 or of the encoder itself.
        qrels: query id → docid → grade; a positive has at least grade 1. Queries that it does not
            have are left out.
        passages: all passages.
        similarity: by the encoder that training starts from, called at least once a query. None: no
            such filter.
        seed: of the random passages.

    Returns:
        Query id → docid → score of the candidates left, in their order; random passages score 0.
        Queries without a positive that has a text, or without any negative, are not in it. And the
        counts.

    Raises:
        ValueError: ``similarity`` gave another shape or is not finite.
        KeyError: a candidate or a judged passage that ``passages`` does not have; the message names
            it.
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
    """The candidates that pass every filter, for each query, and how many each filter dropped."""
    forms: dict[str, _Form] = {}

    def form(docid: str) -> _Form:
        if docid not in forms:
            forms[docid] = _form(passages[docid])
        return forms[docid]

    dropped = Counter[str]()
    kept: Run = {}
    for qid, hits in bar("comparing candidates with positives", candidates.items(), unit="queries"):
        own = [form(docid) for docid in positives[qid]]
        clear = []
        for docid in hits:
            reason = "judged" if docid in qrels[qid] else _resembles(form(docid), own)
            if reason:
                dropped[reason] += 1
            else:
                clear.append(docid)
        if similarity is not None and clear:
            lowest = _scores(similarity, qid, positives[qid]).min()
            passed = _scores(similarity, qid, clear) <= lowest - (1 - MARGIN) * abs(lowest)
            dropped["too_similar"] += int((~passed).sum())
            clear = [docid for docid, ok in zip(clear, passed, strict=True) if ok]
        kept[qid] = {docid: hits[docid] for docid in clear}
    return kept, dropped


class _Form(NamedTuple):
    """A text's hash, case and white space aside (None if empty), and its words' sorted hashes."""

    text: int | None
    words: np.ndarray


def _form(text: str) -> _Form:
    parts = text.lower().split()
    words = set(map(hash, _words(text.lower())))
    return _Form(hash(tuple(parts)) if parts else None, np.array(sorted(words), dtype=np.int64))


def _words(text: str) -> list[str]:
    """What near duplicates share: words, or bigrams too where a text is written without spaces."""
    return terms(text, shortest=1) if without_spaces(text) else re.findall(r"[^\W_]+", text)


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


def _scores(similarity: Similarity, qid: str, docids: Sequence[str]) -> np.ndarray:
    scores = np.asarray(similarity(qid, list(docids)), dtype=np.float64)
    if scores.shape != (len(docids),):
        raise ValueError(
            f"similarity of query {qid!r} and {len(docids)} passages has shape {scores.shape}"
        )
    if not np.isfinite(scores).all():
        docid = docids[int(np.argmin(np.isfinite(scores)))]
        raise ValueError(f"similarity of query {qid!r} and passage {docid!r} is not finite")
    return scores
