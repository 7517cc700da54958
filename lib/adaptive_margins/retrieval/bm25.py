"""BM25 (bm25s)."""

from __future__ import annotations

import warnings
from array import array
from collections.abc import Iterator

import bm25s
import numpy as np
import Stemmer

from adaptive_margins import progress
from adaptive_margins.data.collection import Texts
from adaptive_margins.data.trec import Run, check_depth, top
from adaptive_margins.data.words import terms, without_spaces
from adaptive_margins.retrieval.exact import rows_of_best

_TEXTS = 65_536  # passages tokenised at a time by BM25
_FILES = {f"{part}_name": f"bm25.{part}.npy" for part in ("data", "indices", "indptr")}
_FILES |= {f"{part}_name": f"bm25.{part}.json" for part in ("vocab", "params")}


class BM25:
    """BM25 in Lucene's variant (bm25s), with English stop words and the English Snowball stemmer.

    Terms are words of two characters or more, and bigrams in scripts without spaces (`terms`),
    which ``bigram_passages`` of the passages have. ``k1`` and ``b`` default to Anserini's values
    for MS MARCO, those of the official candidates (paper, Section 4). A posting (a term of a
    passage) takes 27 bytes while the index is built, and 8 afterwards; none if ``folder`` is what
    `save` wrote for the same passages, which is memory-mapped. No pickle is read.

    Raises:
        ValueError: there are no passages.
    """

    def __init__(
        self, passages: Texts, *, k1: float = 0.9, b: float = 0.4, folder: str = ""
    ) -> None:
        if not len(passages):
            raise ValueError("BM25 needs at least one passage, got none")
        self._passages = passages
        self._tokenizer = bm25s.tokenization.Tokenizer(
            splitter=terms, stopwords="en", stemmer=Stemmer.Stemmer("english")
        )
        self.bigram_passages = 0
        if folder:
            self._index = bm25s.BM25.load(folder, **_FILES, mmap=True, allow_pickle=False)
            self._tokenizer.stem_to_sid = self._vocabulary = self._index.vocab_dict
            return
        self._index = bm25s.BM25(method="lucene", k1=k1, b=b, backend="numpy", csc_backend="scipy")
        found = _Terms()
        with progress.bar("BM25: reading", total=len(passages), unit="passages") as bar:
            for start in range(0, len(passages), _TEXTS):
                some = passages.texts[start : start + _TEXTS]
                self.bigram_passages += sum(map(without_spaces, some))
                for ids in self._tokenizer.streaming_tokenize(some, allow_empty=False):
                    found.append(ids)
                bar.update(len(some))
        self._vocabulary = self._tokenizer.get_vocab_dict()
        if self._vocabulary:
            corpus = bm25s.tokenization.Tokenized(found, self._vocabulary)
            self._index.index(corpus, create_empty_token=False, show_progress=False)

    def save(self, folder: str) -> None:
        """Write arrays and JSON to a folder; nothing if the passages have no term."""
        if self._vocabulary:
            self._index.save(folder, **_FILES, allow_pickle=False, show_progress=False)

    def _scores(self, query: str) -> np.ndarray:
        """Scores of all passages; empty if the query shares no term with any."""
        (known,) = self._tokenizer.tokenize(
            [query], update_vocab=False, allow_empty=False, show_progress=False
        )
        scores: np.ndarray = self._index.get_scores_from_ids(known) if known else np.zeros(0)
        return scores

    def search(self, queries: Texts, depth: int) -> Run:
        """Return the ``depth`` best passages of each query with scores above 0, perhaps none."""
        check_depth(depth)
        run: Run = {}
        for qid, query in zip(queries.ids, queries.texts, strict=True):
            scores = self._scores(query)
            rows = np.flatnonzero(scores > 0)
            rows = rows[rows_of_best(scores[rows], depth)]
            hits = {self._passages.ids[int(row)]: float(scores[row]) for row in rows}
            run[qid] = dict(top(hits, depth))
        return run

    def rescore(self, queries: Texts, candidates: Run) -> Run:
        """Return candidates with BM25's scores (0 without a common term), for lists without scores.

        Raises:
            KeyError: a candidate or its query is unknown; the message names it.
        """
        run: Run = {}
        for qid, hits in candidates.items():
            rows = [self._passages.row(docid) for docid in hits]
            scores = self._scores(queries[qid])
            found = scores[rows].tolist() if len(scores) else [0.0] * len(rows)
            run[qid] = dict(top(dict(zip(hits, found, strict=True))))
        return run


def without_hits(run: Run) -> int:
    """Return the number of queries of BM25's run without hits, and warn if there are any."""
    if count := sum(not hits for hits in run.values()):
        which = next(qid for qid, hits in run.items() if not hits)
        warnings.warn(
            f"BM25 finds nothing for {count:,} of {len(run):,} queries, {which!r} among them: no"
            " passage has any of their terms (words of two characters or more, without English stop"
            " words)",
            stacklevel=2,
        )
    return count


class _Terms:
    """Lists of each passage's term numbers, stored in two arrays."""

    def __init__(self) -> None:
        self._terms, self._ends = array("I"), array("Q", [0])

    def append(self, terms: list[int]) -> None:
        self._terms.extend(terms)
        self._ends.append(len(self._terms))

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __iter__(self) -> Iterator[list[int]]:
        for row in progress.bar("BM25: one of three passes", range(len(self)), unit="passages"):
            yield self._terms[self._ends[row] : self._ends[row + 1]].tolist()
