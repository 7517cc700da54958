"""Exact search and reranking by cosine similarity.

Embeddings of passages are matrices of float32 or float16, in memory or memory-mapped.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

from adaptive_margins import progress
from adaptive_margins.data.collection import Texts
from adaptive_margins.data.trec import Run, check_depth, top

_BLOCK = 1 << 25  # numbers held at a time, of embeddings and of scores (128 MB of float32)


def without_self(run: Run, depth: int | None = None) -> Run:
    """Return the ``depth`` best of each query without the passage of its id.

    As BEIR does if queries are passages (``ignore_identical_ids``).
    """
    return {
        qid: dict(top({docid: s for docid, s in hits.items() if docid != qid}, depth))
        for qid, hits in run.items()
    }


def count_self(queries: Texts, passages: Texts) -> int:
    """Return how many queries are passages: of the same id, with a text that contains the query."""

    def words(text: str) -> str:
        return " ".join(text.casefold().split())

    pairs = ((words(queries[q]), words(passages[q])) for q in queries.ids if q in passages)
    return sum(bool(query) and query in passage for query, passage in pairs)


def rerank(
    candidates: Run,
    query_embeddings: np.ndarray,
    qids: Sequence[str],
    passage_embeddings: np.ndarray,
    docids: Sequence[str],
    *,
    normalize: bool = True,
) -> Run:
    """Order each query's candidates by cosine similarity (paper, Section 4).

    Args:
        candidates: query id → docid → any score (only the docids are used).
        query_embeddings: (len(qids), D), need not be normalised.
        qids: the query of each row.
        passage_embeddings: (len(docids), D), each passage once.
        docids: the passage of each row; best only those of candidates, as all are read.
        normalize: if False, order by inner product instead of cosine.

    Returns:
        Query id → docid → cosine in [-1, 1]; 0 if an embedding is zero. Products are summed in 64
        bits and rounded to 32, so that identical embeddings tie on every machine.

    Raises:
        ValueError: a candidate or its query has no embedding, ids repeat, shapes disagree, or a
            query's or candidate's embedding is not finite.
    """
    queries = checked_queries(query_embeddings, qids)
    check_passages(passage_embeddings, docids, queries)
    unit = _unit if normalize else np.asarray
    query_row = {qid: row for row, qid in enumerate(qids)}
    passage_row = {docid: row for row, docid in enumerate(docids)}
    if len(passage_row) != len(docids):
        raise ValueError("passage ids must be unique")
    run: Run = {}
    for qid, hits in candidates.items():
        if qid not in query_row:
            raise ValueError(f"query {qid!r} of the candidates has no embedding")
        if missing := [docid for docid in hits if docid not in passage_row]:
            raise ValueError(f"candidate {missing[0]!r} of query {qid!r} has no embedding")
        rows = np.array([passage_row[docid] for docid in hits], np.int64)
        found = passage_embeddings[rows].astype(np.float32, copy=False)
        check_finite(found, "passage", list(hits))
        query = unit(queries[[query_row[qid]]])[0]
        run[qid] = dict(top(dict(zip(hits, _products(query, unit(found)).tolist(), strict=True))))
    return run


def exact_search(
    query_embeddings: np.ndarray,
    passage_embeddings: np.ndarray,
    qids: Sequence[str],
    ids: Sequence[str],
    depth: int,
) -> Run:
    """Return the ``depth`` passages of highest inner product with each query (exact).

    Passages are read once, block by block.

    Args:
        query_embeddings: (len(qids), D).
        passage_embeddings: (len(ids), D).
        qids: the query of each row.
        ids: the docid of each row.
        depth: hits wanted; may exceed the number of passages.

    Raises:
        ValueError: ``depth`` below 1, hits with the same docid, shapes that disagree, or an
            embedding that is not finite.
    """
    check_depth(depth)
    queries = checked_queries(query_embeddings, qids)
    check_passages(passage_embeddings, ids, queries)
    rounding = [_rounding(query) for query in queries]
    best_rows = [np.empty(0, np.int64) for _ in qids]
    best_scores = [np.empty(0, np.float32) for _ in qids]
    lowest = np.full(len(qids), -np.inf)  # score at rank ``depth`` of each query that has so many
    longest = 0.0
    with progress.bar("exact search", total=len(ids), unit="passages") as bar:
        for first, block in blocks(passage_embeddings):
            longest = max(longest, math.sqrt(check_finite(block, "passage", ids, first).max()))
            size = max(1, _BLOCK // len(block))
            for start in range(0, len(qids), size):
                for i, scores in enumerate(queries[start : start + size] @ block.T, start):
                    slack = rounding[i] * longest
                    new = np.flatnonzero(scores >= lowest[i] - slack)
                    rows = np.concatenate([best_rows[i], first + new])
                    scores = np.concatenate([best_scores[i], scores[new]])
                    kept = rows_of_best(scores, depth, slack)
                    best_rows[i], best_scores[i] = rows[kept], scores[kept]
                    if len(kept) >= depth:
                        lowest[i] = best_scores[i].min()
            bar.update(len(block))
    return {
        qid: exact_hits(query, passage_embeddings, rows, ids, depth)
        for qid, query, rows in zip(qids, queries, best_rows, strict=True)
    }


def approximation_recall(approx: Run, exact: Run, depth: int) -> float:
    """Return the mean share of the top ``depth`` of ``exact`` in that of ``approx``, in [0, 1].

    A query missing in ``approx`` counts 0; one without hits in ``exact`` is left out.

    Raises:
        ValueError: ``depth`` below 1, or ``exact`` has no hits.
    """
    check_depth(depth)
    shares = []
    for qid, hits in exact.items():
        if best := {docid for docid, _ in top(hits, depth)}:
            found = {docid for docid, _ in top(approx.get(qid, {}), depth)}
            shares.append(len(best & found) / len(best))
    if not shares:
        raise ValueError("the exact run has no hits to compare with")
    return float(np.mean(shares))


def blocks(embeddings: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (number of the first row, (rows, D) float32) of blocks of at most 128 MB."""
    size = max(1, _BLOCK // max(1, embeddings.shape[1]))
    for start in range(0, len(embeddings), size):
        yield start, embeddings[start : start + size].astype(np.float32, copy=False)


def exact_hits(
    query: np.ndarray, passages: np.ndarray, rows: np.ndarray, ids: Sequence[str], depth: int
) -> dict[str, float]:
    """Return the ``depth`` best passages of ``rows`` by their exact product with the query."""
    scores = _products(query, passages[rows].astype(np.float32, copy=False))
    best = rows_of_best(scores, depth)
    docids = [ids[row] for row in rows[best].tolist()]
    if len(set(docids)) != len(docids):
        raise ValueError("passage ids must be unique")
    return dict(top(dict(zip(docids, scores[best].tolist(), strict=True)), depth))


def rows_of_best(scores: np.ndarray, depth: int, slack: float = 0.0) -> np.ndarray:
    """Return positions of scores at most ``slack`` below that of rank ``depth``, with ties."""
    if len(scores) <= depth:
        return np.arange(len(scores))
    cut = len(scores) - depth
    return np.flatnonzero(scores >= np.partition(scores, cut)[cut] - slack)


def checked_queries(embeddings: np.ndarray, qids: Sequence[str]) -> np.ndarray:
    """Return embeddings as a contiguous float32 matrix; ValueError unless finite, one row an id."""
    queries = np.ascontiguousarray(embeddings, dtype=np.float32)
    if queries.ndim != 2 or len(queries) != len(qids):
        raise ValueError(
            f"query embeddings must have shape ({len(qids)}, D), one row an id, not {queries.shape}"
        )
    if len(set(qids)) != len(qids):
        raise ValueError("query ids must be unique")
    check_finite(queries, "query", qids)
    return queries


def check_passages(embeddings: np.ndarray, ids: Sequence[str], queries: np.ndarray) -> None:
    """Raise ValueError unless there is one row an id, as wide as the queries'."""
    if embeddings.ndim != 2 or len(embeddings) != len(ids):
        raise ValueError(
            f"passage embeddings must have shape ({len(ids)}, D), one row an id, not"
            f" {embeddings.shape}"
        )
    if queries.shape[1] != embeddings.shape[1]:
        raise ValueError(
            f"query embeddings have {queries.shape[1]} dimensions, passage embeddings"
            f" {embeddings.shape[1]}"
        )


def check_finite(
    matrix: np.ndarray, what: str, ids: Sequence[object], first: int = 0
) -> np.ndarray:
    """Return the rows' squared lengths; ValueError, with its id from ``first``, if not finite."""
    squared: np.ndarray = np.einsum("ij,ij->i", matrix, matrix)
    if len(wrong := np.flatnonzero(~np.isfinite(squared))):
        row = first + int(wrong[0])
        raise ValueError(f"{what} embedding in row {row} ({ids[row]!r}) is not finite")
    return squared


def _unit(rows: np.ndarray) -> np.ndarray:
    """Rows of length 1 in float64; zero rows stay zero."""
    rows = rows.astype(np.float64)
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.divide(rows, lengths, out=np.zeros_like(rows), where=lengths > 0)


def _products(query: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Inner products summed in 64 bits and rounded to 32, independent of a row's position."""
    products: np.ndarray = (rows.astype(np.float64) @ query.astype(np.float64)).astype(np.float32)
    return products


def _rounding(query: np.ndarray) -> float:
    """How far two float32 sums of one product with a unit vector may lie apart."""
    return float(2 * len(query) * np.finfo(np.float32).eps * np.linalg.norm(query))
