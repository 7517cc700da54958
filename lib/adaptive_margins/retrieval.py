"""Rankings: BM25, reranking by cosine, FAISS indexes, exact search, and TREC run files.

Wherever scores tie, the order is trec_eval's: docids descending. A run lists its hits in that order.
"""

from __future__ import annotations

import gzip
import math
import os
import warnings
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import bm25s
import faiss
import numpy as np
import Stemmer

from adaptive_margins.data.collection import DataError, Problems, Run, Texts

_BATCH = 256  # queries searched at a time, so that k_factor · depth hits of each fit in memory
_BLOCK = 1 << 25  # scores held at a time by exact search (128 MB)


def top(scores: Mapping[str, float], depth: int | None = None) -> list[tuple[str, float]]:
    """The ``depth`` best (docid, score) in trec_eval's order: score descending, ties by docid descending.

    Scores are compared as 32-bit floats, as trec_eval does, and returned as they were. ``depth``
    None returns all.

    Raises:
        ValueError: ``depth`` is below 1, or a score is not a finite number.
    """
    _check_depth(depth)
    ids = list(scores)
    with np.errstate(over="ignore"):
        values = np.array([scores[i] for i in ids], np.float64).astype(np.float32)
    if not np.isfinite(values).all():
        bad = ids[int(np.argmin(np.isfinite(values)))]
        raise ValueError(
            f"the score of passage {bad!r} must be a finite 32-bit number, not {scores[bad]!r}"
        )
    keys = values.tolist()
    order = sorted(range(len(ids)), key=lambda i: (keys[i], ids[i]), reverse=True)
    return [(ids[i], scores[ids[i]]) for i in order[:depth]]


class BM25:
    """BM25 in Lucene's variant (bm25s), with English stop words and the English Snowball stemmer.

    ``k1`` and ``b`` default to Anserini's values for MS MARCO, which the official candidates of
    the paper's Section 4 were made with.

    Raises:
        ValueError: there are no passages.
    """

    def __init__(self, passages: Texts, *, k1: float = 0.9, b: float = 0.4) -> None:
        if not len(passages):
            raise ValueError("BM25 needs at least one passage, got none")
        self.ids = passages.ids
        self._stemmer = Stemmer.Stemmer("english")
        self._index = bm25s.BM25(method="lucene", k1=k1, b=b, backend="numpy")
        tokens = self._tokens(passages)
        self._vocabulary = {token for passage in tokens for token in passage}
        if self._vocabulary:
            self._index.index(tokens, show_progress=False)

    def _tokens(self, texts: Texts) -> list[list[str]]:
        found: list[list[str]] = bm25s.tokenize(
            texts.texts,
            stopwords="en",
            stemmer=self._stemmer,
            return_ids=False,
            show_progress=False,
        )
        return found

    def search(self, queries: Texts, depth: int) -> Run:
        """The ``depth`` best passages of each query, only those with a score above 0.

        Every query is a key of the run: one that shares no term with any passage has no hits.
        """
        _check_depth(depth)
        run: Run = {}
        for qid, words in zip(queries.ids, self._tokens(queries), strict=True):
            known = [word for word in words if word in self._vocabulary]
            scores = self._index.get_scores(known) if known else np.zeros(0, np.float32)
            rows = np.flatnonzero(scores > 0)
            rows = rows[_best(scores[rows], depth)]
            hits = {self.ids[row]: float(scores[row]) for row in rows}
            run[qid] = dict(top(hits, depth))
        return run


def rerank(
    candidates: Run,
    query_embeddings: np.ndarray,
    qids: Sequence[str],
    passage_embeddings: np.ndarray,
    docids: Sequence[str],
) -> Run:
    """Order each query's candidates by cosine similarity (paper, Section 4).

    Args:
        candidates: query id → docid → any score (only the docids are used).
        query_embeddings: (len(qids), D), need not be normalised.
        qids: the query of each row.
        passage_embeddings: (len(docids), D), each passage once.
        docids: the passage of each row.

    Returns:
        Query id → docid → cosine in [-1, 1]; 0 where an embedding is zero. Products are summed in
        64 bits and rounded to 32, so identical embeddings tie on every machine.

    Raises:
        ValueError: a candidate or its query has no embedding, ids repeat, shapes disagree, or an
            embedding is not finite.
    """
    queries = _matrix(query_embeddings, qids, "query")
    passages = _matrix(passage_embeddings, docids, "passage")
    _check_same_width(queries, passages)
    query_row = {qid: row for row, qid in enumerate(qids)}
    passage_row = {docid: row for row, docid in enumerate(docids)}
    run: Run = {}
    for qid, hits in candidates.items():
        if qid not in query_row:
            raise ValueError(f"query {qid!r} of the candidates has no embedding")
        if missing := [docid for docid in hits if docid not in passage_row]:
            raise ValueError(f"candidate {missing[0]!r} of query {qid!r} has no embedding")
        if not hits:
            run[qid] = {}
            continue
        rows = _unit(passages[[passage_row[docid] for docid in hits]])
        query = _unit(queries[[query_row[qid]]])[0]
        run[qid] = dict(top(dict(zip(hits, _products(query, rows), strict=True))))
    return run


@dataclass(frozen=True)
class IndexSettings:
    """Sizes of a FAISS index and of its search; `choose_index` explains them.

    Attributes:
        factory: FAISS's factory string, e.g. "OPQ32,IVF128_HNSW32,PQ32x7,RFlat", or "Flat".
        dim: dimensions of the embeddings.
        nlist, nprobe: inverted lists, and how many of them are searched.
        ef_search: breadth of the HNSW search for the nearest lists.
        m, bits: sub-quantisers and bits of each: a passage is coded in m · bits / 8 bytes.
        k_factor: k_factor · depth hits by code are ordered again by their exact product.
        sample: passages that OPQ and PQ are trained on.
        quick: few training iterations (small collections) instead of FAISS's defaults.
        note: why the index is as it is, for whoever reports it.
    """

    factory: str
    dim: int
    nlist: int = 1
    nprobe: int = 1
    ef_search: int = 16
    m: int = 0
    bits: int = 0
    k_factor: int = 1
    sample: int = 0
    quick: bool = True
    note: str = ""

    @property
    def flat(self) -> bool:
        """Whether the search is exact."""
        return self.factory == "Flat"


def choose_index(n: int, dim: int, *, depth: int = 100) -> IndexSettings:
    """Index settings for ``n`` passages of ``dim`` dimensions, searched for ``depth`` hits.

    The kind is the paper's (Section 4: HNSW, optimised 32-byte product quantisation, exact
    re-ranking of the top k), which its released code writes as
    ``OPQ32,IVF262144_HNSW32,PQ32,RFlat``. The sizes follow the collection:

    - ``m``: the largest divisor of ``dim`` up to 32, the paper's bytes a passage.
    - ``bits``: as many, up to 8, as leave 39 passages a centroid (FAISS's recommendation):
      39 · 2^bits ≤ n. With fewer than 4 bits (n < 624) the index is "Flat", which is exact.
    - ``nlist``: the largest power of two up to n / 39; from a million passages on up to n / 32,
      because the paper's own 262,144 lists hold 33.7 of 8.84 million passages each.
    - ``nprobe``: enough lists to hold 8 · ``depth`` passages on average, and at least 8 · √nlist,
      at most all. (The released code leaves it at 1, so 1,000 hits cannot be filled.)
    - ``k_factor``: 16 for up to 50 hits, else 8: exact products cost little beside a lost hit.
    - ``sample``, ``quick``: below 100,000 passages 39 · 2^bits passages and few iterations, else
      256 · 2^bits and FAISS's own numbers.

    Measured with 7,000 × 384 embeddings of docstrings by MiniLM and 1,200 queries, one thread of
    a 2.8 GHz Xeon: building takes 2.4 s of CPU, where FAISS's own settings take 64 s; searching
    for 20 hits takes 0.6 s, for 100 hits 0.9 s. Of the exact top 10, 20, 50 and 100 the index
    finds .990, .994, .995 and .991. (Exact search takes 0.3 s: at this size an index is there to
    be studied, not to save time.)

    Raises:
        ValueError: ``n``, ``dim`` or ``depth`` is below 1.
    """
    for name, value in (("n", n), ("dim", dim), ("depth", depth)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, not {value}")
    bits = min(8, (n // 39).bit_length() - 1)
    if bits < 4:
        note = f"{n} passages are too few to train a quantiser on (624 are needed): the search is exact"
        return IndexSettings("Flat", dim, note=note)
    m = max(size for size in range(1, min(32, dim) + 1) if dim % size == 0)
    a_list = 39 if n < 1_000_000 else 32
    nlist = 1 << ((n // a_list).bit_length() - 1)
    nprobe = min(nlist, math.ceil(max(8 * depth * nlist / n, 8 * math.sqrt(nlist))))
    quick = n < 100_000
    codes = f"PQ{m}" if bits == 8 else f"PQ{m}x{bits}"
    return IndexSettings(
        factory=f"OPQ{m},IVF{nlist}_HNSW32,{codes},RFlat",
        dim=dim,
        nlist=nlist,
        nprobe=nprobe,
        ef_search=max(64, nprobe),
        m=m,
        bits=bits,
        k_factor=16 if depth <= 50 else 8,
        sample=min(n, (39 if quick else 256) << bits),
        quick=quick,
        note=f"{nprobe} of {nlist} lists of {n / nlist:.0f} passages on average are searched",
    )


def build_index(
    embeddings: np.ndarray, settings: IndexSettings, seed: int, *, threads: int = 1
) -> faiss.Index:
    """Train an index on the embeddings and add them, in their order.

    Args:
        embeddings: (n, D) float32 of length 1 (or 0), so that the inner product is the cosine.
        settings: from `choose_index`, or with sizes of one's own.
        seed: of the k-means clusterings.
        threads: of FAISS. With one, the same input gives the same index.

    Raises:
        ValueError: other dimensions than the settings', fewer passages than lists or than
            centroids of a code, or an embedding that is not finite or not of length 1 or 0.
    """
    passages = _matrix(embeddings, range(len(embeddings)), "passage")
    n, dim = passages.shape
    if dim != settings.dim:
        raise ValueError(f"embeddings have {dim} dimensions, the index settings {settings.dim}")
    if n < max(1, settings.nlist, 1 << settings.bits):
        raise ValueError(
            f"{n} passages are too few for {settings.factory}; use choose_index({n}, {dim})"
        )
    squared = _squared_lengths(passages)
    wrong = np.flatnonzero((np.abs(squared - 1) > 1e-3) & (squared > 0))
    if len(wrong):
        length = math.sqrt(squared[wrong[0]])
        raise ValueError(
            f"embedding in row {wrong[0]} has length {length:.4g}, expected 1 (normalise them)"
        )

    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(threads)
    try:
        index = faiss.index_factory(dim, settings.factory, faiss.METRIC_INNER_PRODUCT)
        if settings.flat:
            index.add(passages)
            return index
        ivf = faiss.downcast_index(faiss.extract_index_ivf(index))
        transform = faiss.downcast_index(index.base_index).chain.at(0)
        opq = faiss.downcast_VectorTransform(transform)
        # Without a quantiser of its own, OPQ trains one of 8 bits, whatever the index has.
        opq.pq = quantiser = faiss.ProductQuantizer(dim, settings.m, settings.bits)
        opq.max_train_points = settings.sample
        if settings.quick:
            opq.niter, opq.niter_pq, opq.niter_pq_0, ivf.pq.cp.niter = 4, 1, 4, 10
        for clustering in (ivf.cp, ivf.pq.cp, quantiser.cp):
            clustering.seed = seed
            clustering.min_points_per_centroid = 1  # no warnings: choose_index sees to the sizes
        for clustering in (ivf.pq.cp, quantiser.cp):
            clustering.max_points_per_centroid = max(1, settings.sample >> settings.bits)
        ivf.do_polysemous_training = False  # half a minute for a filter that is not used
        if faiss.get_num_gpus():  # pragma: no cover
            assigner = faiss.index_cpu_to_all_gpus(faiss.IndexFlatL2(ivf.d))
            ivf.clustering_index = assigner
        index.train(passages)
        opq.pq = ivf.clustering_index = None  # FAISS does not own them
        index.add(passages)
        return index
    finally:
        faiss.omp_set_num_threads(before)


def search_index(
    index: faiss.Index,
    settings: IndexSettings,
    query_embeddings: np.ndarray,
    qids: Sequence[str],
    ids: Sequence[str],
    depth: int,
) -> Run:
    """The ``depth`` best passages of each query (all, if there are fewer) by an index.

    The scores are exact inner products, the same numbers that `exact_search` gives. A query whose
    lists hold fewer passages than wanted is searched again with twice the lists, until it is filled.

    Args:
        index: from `build_index`.
        settings: the index's; ``nprobe``, ``ef_search`` and ``k_factor`` act here.
        query_embeddings: (len(qids), D).
        qids: the query of each row.
        ids: the docid of each vector in the index.
        depth: hits wanted.

    Warns:
        UserWarning: a query could not be filled even from all lists.

    Raises:
        ValueError: ``depth`` below 1, ids that repeat or are not as many as the vectors, other
            dimensions than the index's, or an embedding that is not finite.
    """
    _check_depth(depth)
    queries = _matrix(query_embeddings, qids, "query")
    if len(ids) != index.ntotal or len(set(ids)) != len(ids):
        raise ValueError(
            f"the index has {index.ntotal} vectors, but {len(set(ids))} different docids were given"
        )
    if queries.shape[1] != index.d:
        raise ValueError(
            f"query embeddings have {queries.shape[1]} dimensions, the index {index.d}"
        )
    wanted = min(depth, index.ntotal)
    # FAISS would order k_factor · depth hits again and return depth of them; asked for them all,
    # it leaves the cut to us, who know about ties.
    asked = index.ntotal if settings.flat else min(index.ntotal, settings.k_factor * wanted)
    found: Run = {}
    todo, nprobe = list(range(len(qids))), settings.nprobe
    while todo:
        parameters = None if settings.flat else _search_parameters(nprobe, settings.ef_search)
        short: list[int] = []
        for start in range(0, len(todo), _BATCH):
            part = todo[start : start + _BATCH]
            scores, rows = index.search(queries[part], asked, params=parameters)
            for i, its_scores, its_rows in zip(part, scores, rows, strict=True):
                filled = int((its_rows >= 0).sum())
                if filled < wanted and nprobe < settings.nlist:
                    short.append(i)
                    continue
                if filled < wanted:
                    warnings.warn(
                        f"query {qids[i]!r}: {filled} of {wanted} hits filled", stacklevel=2
                    )
                best = its_rows[:filled][_best(its_scores[:filled], depth, _rounding(queries[i]))]
                exact = _products(queries[i], index.reconstruct_batch(best)) if len(best) else []
                hits = dict(zip([ids[row] for row in best], exact, strict=True))
                found[qids[i]] = dict(top(hits, depth))
        todo, nprobe = short, min(settings.nlist, 2 * nprobe)
    return {qid: found[qid] for qid in qids}


def exact_search(
    query_embeddings: np.ndarray,
    passage_embeddings: np.ndarray,
    qids: Sequence[str],
    ids: Sequence[str],
    depth: int,
) -> Run:
    """The ``depth`` passages of highest inner product with each query, none missed.

    Args:
        query_embeddings: (len(qids), D).
        passage_embeddings: (len(ids), D).
        qids: the query of each row.
        ids: the docid of each row.
        depth: hits wanted; may exceed the number of passages.

    Raises:
        ValueError: ``depth`` below 1, ids that repeat, shapes that disagree, or an embedding that
            is not finite.
    """
    _check_depth(depth)
    queries = _matrix(query_embeddings, qids, "query")
    passages = _matrix(passage_embeddings, ids, "passage")
    _check_same_width(queries, passages)
    longest = math.sqrt(_squared_lengths(passages).max(initial=0))
    run: Run = {}
    size = max(1, _BLOCK // max(1, len(ids)))
    for start in range(0, len(qids), size):
        block = queries[start : start + size]
        for qid, query, scores in zip(
            qids[start : start + size], block, block @ passages.T, strict=True
        ):
            rows = _best(scores, depth, _rounding(query) * longest)
            exact = _products(query, passages[rows])
            run[qid] = dict(
                top({ids[row]: score for row, score in zip(rows, exact, strict=True)}, depth)
            )
    return run


def approximation_recall(approx: Run, exact: Run, depth: int) -> float:
    """Mean over the queries of ``exact`` of the share of its top ``depth`` in that of ``approx``, in [0, 1].

    A query missing in ``approx`` counts 0; one without hits in ``exact`` is left out.

    Raises:
        ValueError: ``depth`` below 1, or ``exact`` has no hits.
    """
    _check_depth(depth)
    shares = []
    for qid, hits in exact.items():
        if best := {docid for docid, _ in top(hits, depth)}:
            found = {docid for docid, _ in top(approx.get(qid, {}), depth)}
            shares.append(len(best & found) / len(best))
    if not shares:
        raise ValueError("the exact run has no hits to compare with")
    return float(np.mean(shares))


def write_run(run: Run, path: Path, tag: str) -> None:
    """Write a run in TREC's six columns: query id, Q0, docid, rank from 1, score, tag.

    Queries are sorted by id, hits in the order of `top`, scores in full precision; the same run
    gives the same bytes. Gzipped if the name ends in ``.gz``. The file appears whole or not at all.
    A query without hits leaves no line (the format has none for it).

    Raises:
        ValueError: an id or the tag is empty or has white space, or a score is not finite.
    """
    path = Path(path)
    lines = []
    for qid in sorted(run):
        for rank, (docid, score) in enumerate(top(run[qid]), start=1):
            line = f"{qid} Q0 {docid} {rank} {float(score)!r} {tag}\n"
            if len(line.split()) != 6:
                raise ValueError(
                    f"ids and tag must be non-empty and without white space: {line.rstrip()!r}"
                )
            lines.append(line)
    data = "".join(lines).encode("utf-8")
    if path.suffix == ".gz":
        data = gzip.compress(data, mtime=0)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(data)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def read_run(path: Path) -> Run:
    """Read a TREC run, gzipped if its name ends in ``.gz``. Ranks are ignored, as trec_eval does.

    Raises:
        DataError: lists each malformed line as ``file:line`` (at most 20): not six columns, bad
            UTF-8, a score that is not a finite number, a docid twice for a query; or the gzip
            stream is damaged.
    """
    path = Path(path)
    data = path.read_bytes()
    if path.suffix == ".gz":
        try:
            data = gzip.decompress(data)
        except (EOFError, OSError, zlib.error) as error:
            raise DataError(f"{path}: truncated or damaged gzip file ({error})") from error
    problems = Problems()
    run: Run = {}
    for number, raw in enumerate(data.removesuffix(b"\n").split(b"\n") if data else [], start=1):
        try:
            cells = raw.decode("utf-8").split()
        except UnicodeDecodeError as error:
            problems.add(path, number, f"not valid UTF-8 (byte {error.start + 1} of the line)")
            continue
        if len(cells) != 6:
            problems.add(
                path,
                number,
                f"6 columns expected (qid Q0 docid rank score tag), {len(cells)} found",
            )
            continue
        qid, _, docid, _, score, _ = cells
        hits = run.setdefault(qid, {})
        try:
            value = float(score)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            problems.add(path, number, f"score {score!r} is not a finite number")
        elif docid in hits:
            problems.add(path, number, f"passage {docid!r} occurs twice for query {qid!r}")
        else:
            hits[docid] = value
    problems.check()
    return run


def _check_depth(depth: int | None) -> None:
    if depth is not None and depth < 1:
        raise ValueError(f"depth must be at least 1, not {depth}")


def _check_same_width(queries: np.ndarray, passages: np.ndarray) -> None:
    if queries.shape[1] != passages.shape[1]:
        raise ValueError(
            f"query embeddings have {queries.shape[1]} dimensions, passage embeddings {passages.shape[1]}"
        )


def _matrix(embeddings: np.ndarray, ids: Sequence[object], what: str) -> np.ndarray:
    """The embeddings as a contiguous, finite float32 matrix with one row an id."""
    matrix = np.ascontiguousarray(embeddings, dtype=np.float32)
    if matrix.ndim != 2 or len(matrix) != len(ids):
        raise ValueError(
            f"{what} embeddings must have shape ({len(ids)}, D), one row an id, not {matrix.shape}"
        )
    if len(set(ids)) != len(ids):
        raise ValueError(f"{what} ids must be unique")
    if len(wrong := np.flatnonzero(~np.isfinite(_squared_lengths(matrix)))):
        raise ValueError(f"{what} embedding in row {wrong[0]} ({ids[wrong[0]]!r}) is not finite")
    return matrix


def _squared_lengths(matrix: np.ndarray) -> np.ndarray:
    squared: np.ndarray = np.einsum("ij,ij->i", matrix, matrix)  # no copy of a matrix of many GB
    return squared


def _unit(rows: np.ndarray) -> np.ndarray:
    """Rows of length 1 in float64; zero rows stay zero."""
    rows = rows.astype(np.float64)
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.divide(rows, lengths, out=np.zeros_like(rows), where=lengths > 0)


def _products(query: np.ndarray, rows: np.ndarray) -> list[float]:
    """Inner products summed in 64 bits and rounded to 32: the same wherever a row stands."""
    products: list[float] = (
        (rows.astype(np.float64) @ query.astype(np.float64)).astype(np.float32).tolist()
    )
    return products


def _rounding(query: np.ndarray) -> float:
    """How far two float32 sums of one product with a unit vector may lie apart."""
    return float(2 * len(query) * np.finfo(np.float32).eps * np.linalg.norm(query))


def _best(scores: np.ndarray, depth: int, slack: float = 0.0) -> np.ndarray:
    """Positions of all scores not more than ``slack`` below the one at rank ``depth`` (ties kept)."""
    if len(scores) <= depth:
        return np.arange(len(scores))
    cut = len(scores) - depth
    return np.flatnonzero(scores >= np.partition(scores, cut)[cut] - slack)


def _search_parameters(nprobe: int, ef_search: int) -> faiss.SearchParameters:
    hnsw = faiss.SearchParametersHNSW(efSearch=max(ef_search, nprobe))
    ivf = faiss.SearchParametersIVF(nprobe=nprobe, quantizer_params=hnsw)
    rotated = faiss.SearchParametersPreTransform(index_params=ivf)
    return faiss.IndexRefineSearchParameters(k_factor=1.0, base_index_params=rotated)
