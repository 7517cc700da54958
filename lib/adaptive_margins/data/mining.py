"""Negatives for queries that have positives only: candidates, without those that may well be relevant."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from adaptive_margins.data.collection import Collection, Texts, Triple
from adaptive_margins.data.trec import Qrels, Run
from adaptive_margins.data.triples import sample_triples
from adaptive_margins.data.words import terms, without_spaces
from adaptive_margins.progress import Countdown

SAME_PASSAGE = 0.9
"""Jaccard similarity of two passages' sets of words from which on they count as near duplicates: of 100 different words
each, 95 are then the same. Passages that are only on one topic stay below: some 400 abstracts of Cranfield and of Vaswani
each, compared with the 20 that BM25 finds most similar, reach .71 unless they are the same text."""
_RANDOM = 10  # random passages that a query without any other negative may get
_PAIRS = 1 << 16  # pairs of passages compared at a time


@dataclass(frozen=True)
class Guarded:
    """What `guard` looked at and dropped. Each dropped candidate is counted once, by the first guard that it meets.

    Attributes:
        queries: queries with a positive that has a text.
        candidates: their candidates.
        judged: candidates that the query's qrels judge, whatever the grade; the positives are among them.
        without_text: candidates that are empty.
        same_text: candidates whose text is a positive's, case and white space aside.
        near_duplicate: candidates that share `SAME_PASSAGE` of their words with a positive.
        too_similar: candidates that the encoder scores too close to the positive, or above it.
        random: queries with no candidate left, whose negatives are random passages instead.
        without_negative: queries for which no random passage passed the guards either.
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
        told = ", ".join(f"{count:,} {what}" for what, count in counts.items() if count)
        return (
            f"no negative is left for any of the {self.queries:,} training queries that have a"
            f" relevant passage with text: their {self.candidates:,} candidates are {told or 'none'},"
            " and random passages are no better. Add passages, another encoder (--model) or triples"
            " (triples.tsv)"
        )


def guard(
    candidates: Run,
    qrels: Qrels,
    passages: Texts,
    *,
    similarity: Callable[[str, list[str]], np.ndarray] | None,
    margin: float = 0.95,
    min_grade: int = 1,
    seed: int = 1,
) -> tuple[Run, Guarded]:
    """Drop the candidates that are, or may be, relevant although nobody judged them so ("false negatives").

    In this order: judged passages, passages without text, passages with a positive's text, near duplicates of a positive
    (`SAME_PASSAGE`), and those that the encoder scores above ``margin`` × the score of the query's positive. The last is
    TopK-PercPos of NV-Retriever (Moreira et al., arXiv 2407.15831, 2024), which found .95 best. Two things that the
    paper leaves open are done as `mine_hard_negatives` of Sentence Transformers does them: of several positives the
    lowest score counts, which is the safe side; and the threshold is p − (1 − margin) · |p|, so that it lies below
    a negative score p, too. Measured on Cranfield with MiniLM, half of each query's positives hidden: among BM25's best
    100, the guard drops .90 of the hidden positives and .44 of the others (.38 and .11 by the highest score instead).

    A query with no candidate left gets up to 10 random passages that pass the same guards, drawn by ``seed`` and the query
    id. They are easy negatives, but without them a small corpus, where BM25 finds little beside the positives, would
    lose the query and its positives altogether.

    Args:
        candidates: query id → docid → score, of BM25 or of the encoder itself.
        qrels: query id → docid → grade. Queries that it does not have are left out.
        passages: all passages.
        similarity: the cosine of a query (by id) and passages (by docid), shape (number of docids,), in [-1, 1], by the
            encoder that training starts from. Called at least once a query. None switches this guard off.
        margin: in (0, 1].
        min_grade: a positive has at least this grade.
        seed: of the random passages.

    Returns:
        Query id → docid → score of the candidates left, in their order; random passages score 0. Queries without a
        positive that has a text, or without any negative, are not in it.

    Raises:
        ValueError: ``margin`` is out of range, or ``similarity`` gave another shape or a number that is not finite.
        KeyError: a candidate or a judged passage that ``passages`` does not have; the message names it.
    """
    if not 0 < margin <= 1:
        raise ValueError(f"margin must be above 0 and at most 1, not {margin}")
    positives: dict[str, list[str]] = {}
    for qid, judged in sorted(qrels.items()):
        found = [docid for docid, grade in sorted(judged.items()) if grade >= min_grade]
        if found := [docid for docid in found if passages[docid].strip()]:
            positives[qid] = found

    wanted = {qid: candidates.get(qid, {}) for qid in positives}
    kept, counts = _guarded(wanted, positives, qrels, passages, similarity, margin)

    drawn: Run = {}
    for qid in positives:
        if not kept[qid]:
            rng = random.Random(f"{seed} {qid} negatives")
            rows = rng.sample(range(len(passages)), min(len(passages), 5 * _RANDOM))
            drawn[qid] = {passages.ids[row]: 0.0 for row in rows}
    instead, _ = _guarded(drawn, positives, qrels, passages, similarity, margin)
    for qid, hits in instead.items():
        kept[qid] = dict(list(hits.items())[:_RANDOM])
    return {qid: hits for qid, hits in kept.items() if hits}, Guarded(
        queries=len(positives),
        candidates=sum(len(hits) for hits in wanted.values()),
        **counts,
        random=sum(bool(hits) for hits in instead.values()),
        without_negative=sum(not hits for hits in instead.values()),
    )


def mine_triples(
    qrels: Qrels,
    candidates: Run,
    passages: Texts,
    *,
    count: int,
    seed: int,
    ranks: tuple[int, int] = (1, 101),
    min_grade: int = 1,
) -> list[Triple]:
    """``count`` triples of guarded candidates, as `sample_triples` draws them.

    ``candidates`` come from `guard`, so ``ranks`` (from 1, the second exclusive) count what passed it. Positives without
    text are left out.

    Raises:
        ValueError: ``count`` or ``ranks`` out of range, or no query has a positive and a negative.
    """
    asked = {
        qid: {d: grade for d, grade in judged.items() if grade < min_grade or passages[d].strip()}
        for qid, judged in qrels.items()
    }
    return sample_triples(
        asked, candidates, count=count, ranks=ranks, seed=seed, min_grade=min_grade
    )


@dataclass(frozen=True)
class Checked:
    """What `check_triples` looked at and left out. Each triple left out is counted once, by the first reason that it meets.

    Attributes:
        checked: triples looked at.
        without_text: the query, the positive or the negative is empty.
        same_passage: the positive is the negative.
        negative_relevant: the negative is judged relevant to the query.
        positive_not_relevant: the positive is judged not relevant to the query.
        same_text: the negative has the positive's text, case and white space aside.
        repeated: the triple occurred before.
    """

    checked: int = 0
    without_text: int = 0
    same_passage: int = 0
    negative_relevant: int = 0
    positive_not_relevant: int = 0
    same_text: int = 0
    repeated: int = 0

    @property
    def reasons(self) -> str:
        """The counts in words, those above 0."""
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
    """Leave out the triples of a collection that contradict its judgements or teach nothing (`Checked`).

    Args:
        triples: what is checked, in this order.
        queries, qrels: those of the triples' set; a passage is relevant from grade 1 on.
        passages: all passages.
        wanted: stop when so many triples are found; None checks all.
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
    """`check_triples` of a collection's triples, of at most about ``most`` at even distances."""
    own = collection.triples
    if not len(own):
        return Checked()
    some = (own[row] for row in range(0, len(own), max(1, -(-len(own) // most))))
    queries, qrels = collection.queries["train"], collection.qrels["train"]
    return check_triples(some, queries, qrels, collection.passages)[1]


def _wrong(triple: Triple, queries: Texts, qrels: Qrels, passages: Texts) -> str:
    """Why a triple is left out, as `Checked` names it; empty if it is not."""
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


def _guarded(
    candidates: Run,
    positives: Mapping[str, Sequence[str]],
    qrels: Qrels,
    passages: Texts,
    similarity: Callable[[str, list[str]], np.ndarray] | None,
    margin: float,
) -> tuple[Run, dict[str, int]]:
    """The candidates that pass every guard, for each query of ``candidates``, and how many each guard dropped."""
    counts = dict.fromkeys(
        ("judged", "without_text", "same_text", "near_duplicate", "too_similar"), 0
    )
    empty: set[str] = set()
    forms: dict[str, int] = {}  # a text's hash, case and white space aside
    for docid in dict.fromkeys([d for qid, hits in candidates.items() for d in (*positives[qid], *hits)]):  # fmt: skip
        if words := passages[docid].lower().split():
            forms[docid] = hash(tuple(words))
        else:
            empty.add(docid)

    left: dict[str, list[str]] = {}
    for qid, hits in candidates.items():
        same = {forms[docid] for docid in positives[qid]}
        left[qid] = []
        for docid in hits:
            if docid in qrels[qid]:
                counts["judged"] += 1
            elif docid in empty:
                counts["without_text"] += 1
            elif forms[docid] in same:
                counts["same_text"] += 1
            else:
                left[qid].append(docid)

    near = _near_duplicates(left, positives, passages)
    countdown = Countdown("comparing candidates with positives", len(left), "queries")
    kept: Run = {}
    for number, (qid, docids) in enumerate(left.items()):
        countdown.update(number)
        clear = [docid for docid in docids if docid not in near[qid]]
        counts["near_duplicate"] += len(docids) - len(clear)
        if similarity is not None and clear:
            of_positives = _scores(similarity, qid, list(positives[qid]))
            scores = _scores(similarity, qid, clear)
            lowest = of_positives.min()
            passed = scores <= lowest - (1 - margin) * abs(lowest)
            counts["too_similar"] += int((~passed).sum())
            clear = [docid for docid, ok in zip(clear, passed, strict=True) if ok]
        kept[qid] = {docid: candidates[qid][docid] for docid in clear}
    return kept, counts


def _scores(
    similarity: Callable[[str, list[str]], np.ndarray], qid: str, docids: list[str]
) -> np.ndarray:
    scores = np.asarray(similarity(qid, docids), dtype=np.float64)
    if scores.shape != (len(docids),):
        raise ValueError(
            f"similarity of query {qid!r} and {len(docids)} passages has shape {scores.shape}"
        )
    if not np.isfinite(scores).all():
        docid = docids[int(np.argmin(np.isfinite(scores)))]
        raise ValueError(f"similarity of query {qid!r} and passage {docid!r} is not finite")
    return scores


def _near_duplicates(
    candidates: Mapping[str, Sequence[str]],
    positives: Mapping[str, Sequence[str]],
    passages: Texts,
) -> dict[str, set[str]]:
    """The candidates of each query that share `SAME_PASSAGE` of their words with one of its positives."""
    from sklearn.feature_extraction.text import HashingVectorizer

    near: dict[str, set[str]] = {qid: set() for qid in candidates}
    compared = {qid: docids for qid, docids in candidates.items() if docids}
    if not compared:
        return near
    docids = list(dict.fromkeys(d for q, found in compared.items() for d in (*positives[q], *found)))  # fmt: skip
    row = {docid: number for number, docid in enumerate(docids)}
    # A row a passage, a 1 a word: the words' numbers are hashes, so no vocabulary is held.
    words = HashingVectorizer(
        binary=True,
        norm=None,
        alternate_sign=False,
        tokenizer=_words,
        token_pattern=None,
        dtype=np.float32,
    ).transform(passages[docid] for docid in docids)
    sizes = np.diff(words.indptr)

    def compare(pairs: list[tuple[str, int, int]]) -> None:
        _, left, right = zip(*pairs, strict=True)
        one, other = np.array(left), np.array(right)
        shared = np.asarray(words[one].multiply(words[other]).sum(axis=1)).ravel()
        together = sizes[one] + sizes[other] - shared
        for i in np.flatnonzero((shared > 0) & (shared >= SAME_PASSAGE * together - 1e-6)):
            near[pairs[i][0]].add(docids[left[i]])

    pairs: list[tuple[str, int, int]] = []
    for qid, found in compared.items():
        pairs += _comparable(qid, [row[d] for d in found], [row[d] for d in positives[qid]], sizes)
        if len(pairs) >= _PAIRS:
            compare(pairs)
            pairs = []
    if pairs:
        compare(pairs)
    return near


def _words(text: str) -> list[str]:
    """What near duplicates share: words, or bigrams too where a text is written without spaces."""
    return terms(text, shortest=1) if without_spaces(text) else re.findall(r"[^\W_]+", text)


def _comparable(
    qid: str, found: Sequence[int], positives: Iterable[int], sizes: np.ndarray
) -> list[tuple[str, int, int]]:
    """(query, candidate, positive) where the numbers of words alone do not rule a near duplicate out."""
    rows = np.array(found)
    pairs = []
    for positive in positives:
        low, high = SAME_PASSAGE * sizes[positive], sizes[positive] / SAME_PASSAGE
        fitting = rows[(sizes[rows] >= low - 1e-6) & (sizes[rows] <= high + 1e-6)]
        pairs += [(qid, candidate, positive) for candidate in fitting.tolist()]
    return pairs
