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
    """Order each query's candidates by cosine similarity (paper, Section 4), or by inner product.

    ``passage_embeddings`` (len(docids), D) have each passage once; neither they nor
    ``query_embeddings`` (len(qids), D) need be normalised. Scores of candidates are not used. The
    cosine with a zero embedding is 0. Products are summed in 64 bits and rounded to 32, so that
    identical embeddings tie on every machine.

    Raises KeyError if a candidate or its query has no embedding, and ValueError if shapes disagree,
    or a query's or candidate's embedding is not finite.
    """
    queries = checked_queries(query_embeddings, qids, passage_embeddings, docids)
    unit = _unit if normalize else np.asarray
    query_row = {qid: row for row, qid in enumerate(qids)}
    passage_row = {docid: row for row, docid in enumerate(docids)}
    run: Run = {}
    for qid, hits in candidates.items():
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
    """Return the ``depth`` passages, or all, of highest inner product with each query (exact).

    ``query_embeddings`` are (len(qids), D), ``passage_embeddings`` (len(ids), D), which are read
    once, block by block. Raises ValueError for a ``depth`` below 1, shapes that disagree, or an
    embedding that is not finite.
    """
    queries = checked_queries(query_embeddings, qids, passage_embeddings, ids, depth)
    # How far two float32 sums of a query's product with a unit vector may lie apart.
    rounding = 2 * queries.shape[1] * np.finfo(np.float32).eps * np.linalg.norm(queries, axis=1)
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
    """
    shares = []
    for qid, hits in exact.items():
        if best := {docid for docid, _ in top(hits, depth)}:
            found = {docid for docid, _ in top(approx.get(qid, {}), depth)}
            shares.append(len(best & found) / len(best))
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
    return dict(top(dict(zip(docids, scores[best].tolist(), strict=True)), depth))


def rows_of_best(scores: np.ndarray, depth: int, slack: float = 0.0) -> np.ndarray:
    """Return positions of scores at most ``slack`` below that of rank ``depth``, with ties."""
    if len(scores) <= depth:
        return np.arange(len(scores))
    cut = len(scores) - depth
    return np.flatnonzero(scores >= np.partition(scores, cut)[cut] - slack)


def checked_queries(
    embeddings: np.ndarray,
    qids: Sequence[str],
    passages: np.ndarray,
    ids: Sequence[str],
    depth: int | None = None,
) -> np.ndarray:
    """Return queries' embeddings as a contiguous float32 matrix.

    Raises ValueError unless they are finite, and both have one row an id and the same dimensions.
    """
    check_depth(depth)
    queries, dim = np.ascontiguousarray(embeddings, dtype=np.float32), passages.shape[-1]
    if (queries.shape, passages.shape) != ((len(qids), dim), (len(ids), dim)):
        raise ValueError(
            f"{len(qids)} queries have embeddings of shape {queries.shape}, {len(ids)} passages of"
            f" {passages.shape}; expected one row an id, and the same dimensions"
        )
    check_finite(queries, "query", qids)
    return queries


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
