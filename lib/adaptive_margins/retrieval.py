"""Rankings: BM25, reranking by cosine, FAISS indexes and exact search. A run lists its hits in trec_eval's order.

Passages may be millions: their texts and ids may be memory-mapped sequences, their embeddings `Shards` on disk. Docids are
looked up for hits only.
"""

from __future__ import annotations

import math
import warnings
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import bm25s
import faiss
import numpy as np
import Stemmer

from adaptive_margins.data.collection import Texts
from adaptive_margins.data.trec import Run, check_depth, top
from adaptive_margins.data.words import terms, without_spaces
from adaptive_margins.progress import Countdown

if TYPE_CHECKING:
    from adaptive_margins.encoders import Shards

_BATCH = 256  # queries searched at a time, so that k_factor · depth hits of each fit in memory
_BLOCK = 1 << 25  # scores held at a time by exact search (128 MB)
_TEXTS = 65_536  # passages tokenised at a time by BM25
_TRAINED = 1 << 21  # passages an index is trained on at most


def without_self(run: Run, depth: int | None = None) -> Run:
    """Return a run without each query's passage of the same id, then the ``depth`` best of each.

    BEIR scores rankings so where queries are passages (``ignore_identical_ids``).
    """
    return {
        qid: dict(top({docid: s for docid, s in hits.items() if docid != qid}, depth))
        for qid, hits in run.items()
    }


def count_self(queries: Texts, passages: Texts) -> int:
    """Return how many queries are themselves passages: same id, and a text that contains theirs."""

    def words(text: str) -> str:
        return " ".join(text.casefold().split())

    pairs = ((words(queries[q]), words(passages[q])) for q in queries.ids if q in passages)
    return sum(bool(query) and query in passage for query, passage in pairs)


class BM25:
    """BM25 in Lucene's variant (bm25s), with English stop words and the English Snowball stemmer.

    Terms are words of two characters or more, and character bigrams of text in scripts without
    spaces (`terms`), which ``bigram_passages`` of the passages have. ``k1`` and ``b`` default to
    Anserini's values for MS MARCO, which the official candidates of the paper's Section 4 were
    made with. While the index is built, a passage's terms are held as numbers of 4 bytes, texts
    only 65,536 at a time; a posting (a term of a passage) takes 27 bytes then, and 8 afterwards.

    Raises:
        ValueError: there are no passages.
    """

    def __init__(self, passages: Texts, *, k1: float = 0.9, b: float = 0.4) -> None:
        if not len(passages):
            raise ValueError("BM25 needs at least one passage, got none")
        self._passages = passages
        self._tokenizer = bm25s.tokenization.Tokenizer(
            splitter=terms, stopwords="en", stemmer=Stemmer.Stemmer("english")
        )
        self._index = bm25s.BM25(method="lucene", k1=k1, b=b, backend="numpy", csc_backend="scipy")
        found = _Terms()
        self.bigram_passages = 0
        countdown = Countdown("BM25: reading passages", len(passages), "passages")
        for start in range(0, len(passages), _TEXTS):
            countdown.update(start)
            some = passages.texts[start : start + _TEXTS]
            self.bigram_passages += sum(map(without_spaces, some))
            for ids in self._tokenizer.streaming_tokenize(some, allow_empty=False):
                found.append(ids)
        self._vocabulary = self._tokenizer.get_vocab_dict()
        if self._vocabulary:
            corpus = bm25s.tokenization.Tokenized(found, self._vocabulary)
            self._index.index(corpus, create_empty_token=False, show_progress=False)

    def _scores(self, query: str) -> np.ndarray:
        """Of all passages; none if the query shares no term with any."""
        (known,) = self._tokenizer.tokenize(
            [query], update_vocab=False, allow_empty=False, show_progress=False
        )
        scores: np.ndarray = self._index.get_scores_from_ids(known) if known else np.zeros(0)
        return scores

    def search(self, queries: Texts, depth: int) -> Run:
        """The ``depth`` best passages of each query, only those with a score above 0.

        Every query is a key of the run: one that shares no term with any passage has no hits.
        """
        check_depth(depth)
        run: Run = {}
        for qid, query in zip(queries.ids, queries.texts, strict=True):
            scores = self._scores(query)
            rows = np.flatnonzero(scores > 0)
            rows = rows[_best(scores[rows], depth)]
            hits = {self._passages.ids[int(row)]: float(scores[row]) for row in rows}
            run[qid] = dict(top(hits, depth))
        return run

    def rescore(self, queries: Texts, candidates: Run) -> Run:
        """The same candidates with BM25's scores; 0 for a passage that shares no term with the query.

        For official candidates that come without scores.

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
    """Return how many queries of BM25's run have no hit, and warn if there are any."""
    if count := sum(not hits for hits in run.values()):
        which = next(qid for qid, hits in run.items() if not hits)
        warnings.warn(
            f"BM25 finds nothing for {count:,} of {len(run):,} queries, {which!r} among them: no passage"
            " has any of their terms (words of two characters or more, without English stop words)",
            stacklevel=2,
        )
    return count


class _Terms:
    """Each passage's terms, by number: lists, held in two arrays."""

    def __init__(self) -> None:
        self._terms, self._ends = array("I"), array("Q", [0])

    def append(self, terms: list[int]) -> None:
        self._terms.extend(terms)
        self._ends.append(len(self._terms))

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __iter__(self) -> Iterator[list[int]]:
        countdown = Countdown("BM25: one of three passes", len(self), "passages")
        for row in range(len(self)):
            if row % _TEXTS == 0:
                countdown.update(row)
            yield self._terms[self._ends[row] : self._ends[row + 1]].tolist()


def rerank(
    candidates: Run,
    query_embeddings: np.ndarray,
    qids: Sequence[str],
    passage_embeddings: np.ndarray | Shards,
    docids: Sequence[str],
) -> Run:
    """Order each query's candidates by cosine similarity (paper, Section 4).

    Args:
        candidates: query id → docid → any score (only the docids are used).
        query_embeddings: (len(qids), D), need not be normalised.
        qids: the query of each row.
        passage_embeddings: (len(docids), D), each passage once.
        docids: the passage of each row. All are read; of a large collection give the candidates'
            embeddings and docids only.

    Returns:
        Query id → docid → cosine in [-1, 1]; 0 where an embedding is zero. Products are summed in
        64 bits and rounded to 32, so identical embeddings tie on every machine.

    Raises:
        ValueError: a candidate or its query has no embedding, ids repeat, shapes disagree, or a
            query's or candidate's embedding is not finite.
    """
    queries = _queries(query_embeddings, qids)
    passages = _passages(passage_embeddings, docids, queries)
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
        if not hits:
            run[qid] = {}
            continue
        found = passages.take([passage_row[docid] for docid in hits])
        _check_finite(found, "passage", list(hits))
        query = _unit(queries[[query_row[qid]]])[0]
        run[qid] = dict(top(dict(zip(hits, _products(query, _unit(found)).tolist(), strict=True))))
    return run


@dataclass(frozen=True)
class IndexSettings:
    """Sizes of a FAISS index and of its search; `choose_index` explains them.

    Attributes:
        factory: FAISS's factory string, e.g. "OPQ32,IVF128_HNSW32,PQ32x7", or "Flat".
        dim: dimensions of the embeddings.
        nlist, nprobe: inverted lists, and how many of them are searched.
        ef_search: breadth of the HNSW search for the nearest lists.
        m, bits: sub-quantisers and bits of each: a passage is coded in m · bits / 8 bytes.
        k_factor: k_factor · depth hits by code are ordered again by their exact product.
        train: passages, drawn by seed, that the lists are clustered from; 0 for all.
        sample: how many of them OPQ and PQ are trained on.
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
    train: int = 0
    sample: int = 0
    quick: bool = True
    note: str = ""

    @property
    def flat(self) -> bool:
        """Whether the search is exact."""
        return self.factory == "Flat"

    @property
    def training_bytes(self) -> int:
        """Memory of the ``train`` passages in training: as they are, and rotated (float32)."""
        return 2 * 4 * self.train * self.dim


def choose_index(n: int, dim: int, *, depth: int = 100) -> IndexSettings:
    """Index settings for ``n`` passages of ``dim`` dimensions, searched for ``depth`` hits.

    The kind is the paper's (Section 4: HNSW, optimised 32-byte product quantisation, exact
    re-ranking of the top k), which its released code writes as
    ``OPQ32,IVF262144_HNSW32,PQ32,RFlat``. ``RFlat``, a float32 copy of all embeddings (27 GB at
    the paper's size), is left out: `search_index` ranks again from the embeddings themselves. The
    sizes follow the collection:

    - ``m``: the largest divisor of ``dim`` up to 32, the paper's bytes a passage.
    - ``bits``: as many, up to 8, as leave 39 passages a centroid (FAISS's recommendation):
      39 · 2^bits ≤ n. With fewer than 4 bits (n < 624) the index is "Flat", which is exact.
    - ``nlist``: the largest power of two up to n / 39; from a million passages on up to n / 32,
      because the paper's own 262,144 lists hold 33.7 of 8.84 million passages each.
    - ``nprobe``: enough lists to hold 8 · ``depth`` passages on average, and at least 8 · √nlist,
      at most all. (The released code leaves it at 1, so 1,000 hits cannot be filled.)
    - ``k_factor``: 16 for up to 50 hits, else 8: exact products cost little beside a lost hit.
    - ``train``: all passages, but at most 2,097,152. At the paper's size that is 8 a list, where
      FAISS recommends 30 to 256; all passages would take ``training_bytes`` of 54 GB for 34.
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
    train = min(n, _TRAINED)
    codes = f"PQ{m}" if bits == 8 else f"PQ{m}x{bits}"
    return IndexSettings(
        factory=f"OPQ{m},IVF{nlist}_HNSW32,{codes}",
        dim=dim,
        nlist=nlist,
        nprobe=nprobe,
        ef_search=max(64, nprobe),
        m=m,
        bits=bits,
        k_factor=16 if depth <= 50 else 8,
        train=train,
        sample=min(train, (39 if quick else 256) << bits),
        quick=quick,
        note=f"{nprobe} of {nlist} lists of {n / nlist:.0f} passages on average are searched",
    )


def index_bytes(settings: IndexSettings, n: int) -> int:
    """Bytes of the built index of ``n`` passages: codes, docid numbers, centroids, their HNSW graph, OPQ.

    FAISS may reserve up to as much again for codes and numbers while it adds. The embeddings that
    `search_index` ranks again from are not part of it.
    """
    if settings.flat:
        return 4 * n * settings.dim
    code = math.ceil(settings.m * settings.bits / 8)
    # HNSW32: 64 links on the ground floor, 32 on each of the others, which hold 1/32 of the one below; two numbers for each.
    a_list = 4 * settings.dim + 4 * (64 + 32 / 31) + 12
    quantisers = 4 * (settings.dim << settings.bits) + 4 * settings.dim**2
    return round(n * (code + 8) + settings.nlist * a_list + quantisers)


def build_index(
    embeddings: np.ndarray | Shards, settings: IndexSettings, seed: int, *, threads: int = 1
) -> faiss.Index:
    """Train an index on a sample of the embeddings and add all, in their order and block by block.

    Args:
        embeddings: (n, D) of length 1 (or 0), so that the inner product is the cosine. Read
            twice (checked, then added), and the sample once.
        settings: from `choose_index`, or with sizes of one's own.
        seed: of the sample and of the k-means clusterings.
        threads: of FAISS. With one, the same input gives the same index; millions of passages need
            all there are.

    Raises:
        ValueError: other dimensions than the settings', fewer passages than lists or than
            centroids of a code, or an embedding that is not finite or not of length 1 or 0.
    """
    passages = _shards(embeddings)
    n, dim = len(passages), passages.dim
    if dim != settings.dim:
        raise ValueError(f"embeddings have {dim} dimensions, the index settings {settings.dim}")
    if n < max(1, settings.nlist, 1 << settings.bits):
        raise ValueError(
            f"{n} passages are too few for {settings.factory}; use choose_index({n}, {dim})"
        )
    for first, block in passages.blocks():
        squared = _check_finite(block, "passage", range(n), first)
        # Rounding a unit vector to float16 changes its squared length by about 2⁻¹⁰ at most.
        wrong = np.flatnonzero((np.abs(squared - 1) > 1e-3) & (squared > 0))
        if len(wrong):
            length = math.sqrt(squared[wrong[0]])
            raise ValueError(
                f"embedding in row {first + wrong[0]} has length {length:.4g}, expected 1 (normalise them)"
            )

    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(threads)
    try:
        index = faiss.index_factory(dim, settings.factory, faiss.METRIC_INNER_PRODUCT)
        if settings.flat:
            _add(index, passages)
            return index
        ivf = faiss.downcast_index(faiss.extract_index_ivf(index))
        opq = faiss.downcast_VectorTransform(index.chain.at(0))
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
        sample = np.arange(n)
        if 0 < settings.train < n:
            rng = np.random.default_rng(seed)
            sample = np.sort(rng.choice(n, settings.train, replace=False, shuffle=False))
        index.train(passages.take(sample))
        opq.pq = ivf.clustering_index = None  # FAISS does not own them
        _add(index, passages)
        return index
    finally:
        faiss.omp_set_num_threads(before)


def _add(index: faiss.Index, passages: Shards) -> None:
    countdown = Countdown("adding to the index", len(passages), "passages")
    for first, block in passages.blocks():
        countdown.update(first)
        index.add(block)


def search_index(
    index: faiss.Index,
    settings: IndexSettings,
    query_embeddings: np.ndarray,
    qids: Sequence[str],
    ids: Sequence[str],
    depth: int,
    embeddings: np.ndarray | Shards,
    *,
    fill: bool = True,
) -> Run:
    """The ``depth`` best passages of each query (all, if there are fewer) by an index.

    ``k_factor`` · ``depth`` passages found by code are ranked again by their exact inner product with
    the query; the scores are the same numbers that `exact_search` gives. A query whose lists hold
    fewer passages than wanted is searched again with twice the lists, until it is filled.

    Args:
        index: from `build_index`.
        settings: the index's; ``nprobe``, ``ef_search`` and ``k_factor`` act here.
        query_embeddings: (len(qids), D).
        qids: the query of each row.
        ids: the docid of each vector in the index.
        depth: hits wanted.
        embeddings: what the index was built from.
        fill: False leaves a query that finds fewer hits in ``nprobe`` lists as it is.

    Warns:
        UserWarning: a query could not be filled even from all lists.

    Raises:
        ValueError: ``depth`` below 1, docids or embeddings that are not as many as the vectors,
            hits with the same docid, other dimensions than the index's, or a query embedding that
            is not finite.
    """
    check_depth(depth)
    queries = _queries(query_embeddings, qids)
    if len(ids) != index.ntotal:
        raise ValueError(f"the index has {index.ntotal} vectors, but {len(ids)} docids were given")
    if queries.shape[1] != index.d:
        raise ValueError(
            f"query embeddings have {queries.shape[1]} dimensions, the index {index.d}"
        )
    passages = _passages(embeddings, ids, queries)
    wanted = min(depth, index.ntotal)
    asked = index.ntotal if settings.flat else min(index.ntotal, settings.k_factor * wanted)
    found: Run = {}
    todo, nprobe = list(range(len(qids))), settings.nprobe
    while todo:
        parameters = None if settings.flat else _search_parameters(nprobe, settings.ef_search)
        short: list[int] = []
        for start in range(0, len(todo), _BATCH):
            part = todo[start : start + _BATCH]
            _, rows = index.search(queries[part], asked, params=parameters)
            for i, its_rows in zip(part, rows, strict=True):
                its_rows = its_rows[its_rows >= 0]
                if fill and len(its_rows) < wanted:
                    if nprobe < settings.nlist:
                        short.append(i)
                        continue
                    warnings.warn(
                        f"query {qids[i]!r}: {len(its_rows)} of {wanted} hits filled", stacklevel=2
                    )
                found[qids[i]] = _exact_hits(queries[i], passages, its_rows, ids, depth)
        todo, nprobe = short, min(settings.nlist, 2 * nprobe)
    return {qid: found[qid] for qid in qids}


def exact_search(
    query_embeddings: np.ndarray,
    passage_embeddings: np.ndarray | Shards,
    qids: Sequence[str],
    ids: Sequence[str],
    depth: int,
) -> Run:
    """The ``depth`` passages of highest inner product with each query, none missed.

    Passages are read once, block by block; in memory are a block, its scores, and the best rows
    so far of each query.

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
    queries = _queries(query_embeddings, qids)
    passages = _passages(passage_embeddings, ids, queries)
    rounding = [_rounding(query) for query in queries]
    best_rows = [np.empty(0, np.int64) for _ in qids]
    best_scores = [np.empty(0, np.float32) for _ in qids]
    lowest = np.full(len(qids), -np.inf)  # score kept of each query that has enough
    longest = 0.0
    countdown = Countdown("exact search", len(passages), "passages")
    for first, block in passages.blocks():
        squared = _check_finite(block, "passage", ids, first)
        longest = max(longest, math.sqrt(squared.max()))
        size = max(1, _BLOCK // len(block))
        for start in range(0, len(qids), size):
            for i, scores in enumerate(queries[start : start + size] @ block.T, start):
                slack = rounding[i] * longest
                new = np.flatnonzero(scores >= lowest[i] - slack)
                rows = np.concatenate([best_rows[i], first + new])
                scores = np.concatenate([best_scores[i], scores[new]])
                kept = _best(scores, depth, slack)
                best_rows[i], best_scores[i] = rows[kept], scores[kept]
                if len(kept) >= depth:
                    lowest[i] = best_scores[i].min()
        countdown.update(first + len(block))
    return {
        qid: _exact_hits(query, passages, rows, ids, depth)
        for qid, query, rows in zip(qids, queries, best_rows, strict=True)
    }


def approximation_recall(approx: Run, exact: Run, depth: int) -> float:
    """Mean over the queries of ``exact`` of the share of its top ``depth`` in that of ``approx``, in [0, 1].

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


def _queries(embeddings: np.ndarray, qids: Sequence[str]) -> np.ndarray:
    """The embeddings as a contiguous, finite float32 matrix with one row an id."""
    queries = np.ascontiguousarray(embeddings, dtype=np.float32)
    if queries.ndim != 2 or len(queries) != len(qids):
        raise ValueError(
            f"query embeddings must have shape ({len(qids)}, D), one row an id, not {queries.shape}"
        )
    if len(set(qids)) != len(qids):
        raise ValueError("query ids must be unique")
    _check_finite(queries, "query", qids)
    return queries


def _shards(embeddings: np.ndarray | Shards) -> Shards:
    from adaptive_margins.encoders import Shards  # brings torch, which runs and BM25 do without

    return embeddings if isinstance(embeddings, Shards) else Shards.of(embeddings)


def _passages(embeddings: np.ndarray | Shards, ids: Sequence[str], queries: np.ndarray) -> Shards:
    """The embeddings, one row an id and as wide as the queries'. (Whether they are finite is seen when they are read.)"""
    passages = _shards(embeddings)
    if len(passages) != len(ids):
        raise ValueError(
            f"passage embeddings must have shape ({len(ids)}, D), one row an id, not {(len(passages), passages.dim)}"
        )
    if queries.shape[1] != passages.dim:
        raise ValueError(
            f"query embeddings have {queries.shape[1]} dimensions, passage embeddings {passages.dim}"
        )
    return passages


def _check_finite(
    matrix: np.ndarray, what: str, ids: Sequence[object], first: int = 0
) -> np.ndarray:
    """The rows' squared lengths; ValueError if one is not finite. ``first``: position of the first row in ``ids``."""
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
    """Inner products summed in 64 bits and rounded to 32: the same wherever a row stands."""
    products: np.ndarray = (rows.astype(np.float64) @ query.astype(np.float64)).astype(np.float32)
    return products


def _exact_hits(
    query: np.ndarray, passages: Shards, rows: np.ndarray, ids: Sequence[str], depth: int
) -> dict[str, float]:
    """The ``depth`` best of the passages in ``rows`` by their exact product with the query."""
    scores = _products(query, passages.take(rows))
    best = _best(scores, depth)
    docids = [ids[row] for row in rows[best].tolist()]
    if len(set(docids)) != len(docids):
        raise ValueError("passage ids must be unique")
    return dict(top(dict(zip(docids, scores[best].tolist(), strict=True)), depth))


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
    return faiss.SearchParametersPreTransform(index_params=ivf)
