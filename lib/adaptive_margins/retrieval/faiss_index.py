"""FAISS indexes: choice of sizes, building, and search with exact reranking."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import faiss
import numpy as np

from adaptive_margins import progress
from adaptive_margins.data.trec import Run
from adaptive_margins.retrieval.exact import blocks, checked_queries, exact_hits, exact_search

_BATCH = 256  # queries searched at a time, so that k_factor · depth hits of each fit in memory
_LISTS = 1 << 18  # of an index at most, the paper's
_A_LIST = 8  # passages that a list is clustered from, in large collections


@dataclass(frozen=True)
class IndexSettings:
    """Sizes of a FAISS index and of its search; `choose_index` explains them.

    Attributes:
        factory: FAISS's factory string, e.g. "OPQ32,IVF128_HNSW32,PQ32x7", or "Flat".
        nlist, nprobe: inverted lists, and how many of them are searched.
        ef_search: breadth of the HNSW search for the nearest lists.
        m, bits: sub-quantisers and bits of each: a passage is coded in m · bits / 8 bytes.
        k_factor: k_factor · depth hits by code are reranked by their exact product.
        train, sample: passages that the lists are clustered from (0: all), and OPQ and PQ trained.
        quick: lists are clustered by all distances (small collections), not by an HNSW graph, and
            passages are assigned to them with FAISS's efSearch of 16, not 128.
        note: the reason for the sizes, for reports.
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


def choose_index(n: int, dim: int, *, depth: int = 100) -> IndexSettings:
    """Return index settings for ``n`` passages of ``dim`` dimensions and ``depth`` hits.

    The kind is the paper's (Section 4), ``OPQ32,IVF262144_HNSW32,PQ32,RFlat`` in its released code,
    but without ``RFlat``, a float32 copy of all embeddings (27 GB): `search_index` reranks by the
    embeddings. The sizes depend on the collection:

    - ``m``: the largest divisor of ``dim`` up to 32, the paper's bytes a passage.
    - ``bits``: as many, up to 8, as leave 39 passages a centroid (FAISS's recommendation). With
      fewer than 4 bits (n < 624) the index is "Flat", which is exact.
    - ``nlist``: the largest power of two up to n / 39; from a million passages on up to n / 32,
      because the paper's 262,144 lists have 33.7 of 8.84 million passages each. There are no more.
    - ``nprobe``: lists with 8 · ``depth`` passages on average, at least 8 · √nlist. (With 1 as in
      the released code, 1,000 hits cannot be filled.)
    - ``k_factor``: 16 for up to 50 hits, else 8. From 100,000 passages on 32, because more passages
      lie between the best hits and what a code can tell apart.
    - ``train``: all passages; from 100,000 on 8 a list: 13 GB instead of 54 at the paper's size.
    - ``sample``: below 100,000 passages 39 · 2^bits passages, else 256 · 2^bits.

    """
    bits = min(8, (n // 39).bit_length() - 1)
    if bits < 4:
        note = f"{n} passages are too few to train a quantiser on (of 624): the search is exact"
        return IndexSettings("Flat", dim, note=note)
    m = max(size for size in range(1, min(32, dim) + 1) if dim % size == 0)
    a_list = 39 if n < 1_000_000 else 32
    nlist = min(_LISTS, 1 << ((n // a_list).bit_length() - 1))
    nprobe = min(nlist, math.ceil(max(8 * depth * nlist / n, 8 * math.sqrt(nlist))))
    quick = n < 100_000
    train = n if quick else min(n, max(_A_LIST * nlist, 256 << bits))
    codes = f"PQ{m}" if bits == 8 else f"PQ{m}x{bits}"
    return IndexSettings(
        factory=f"OPQ{m},IVF{nlist}_HNSW32,{codes}",
        dim=dim,
        nlist=nlist,
        nprobe=nprobe,
        ef_search=max(64, nprobe),
        m=m,
        bits=bits,
        k_factor=(16 if depth <= 50 else 8) if quick else 32,
        train=train,
        sample=min(train, (39 if quick else 256) << bits),
        quick=quick,
        note=f"{nprobe} of {nlist} lists of {n / nlist:.0f} passages on average are searched",
    )


def build_index(
    embeddings: np.ndarray, settings: IndexSettings, seed: int, *, threads: int = 1
) -> faiss.Index:
    """Train an index on a sample of the embeddings and add all, in their order and block by block.

    ``embeddings`` (n, D) have length 1 (or 0), so that the inner product is the cosine; ``seed`` is
    of the sample and of the k-means clusterings. With one thread, the index is reproducible.
    """
    n, dim = embeddings.shape
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(threads)
    try:
        index = faiss.index_factory(dim, settings.factory, faiss.METRIC_INNER_PRODUCT)
        if settings.flat:
            _add(index, embeddings)
            return index
        ivf = faiss.downcast_index(faiss.extract_index_ivf(index))
        opq = faiss.downcast_VectorTransform(index.chain.at(0))
        # By default OPQ trains a quantiser of 8 bits, whatever the index has.
        opq.pq = quantiser = faiss.ProductQuantizer(dim, settings.m, settings.bits)
        opq.max_train_points = settings.sample
        # FAISS's defaults (50, 4, 40, 25) take many times as long.
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
        elif not settings.quick:  # all distances take days at the paper's size
            assigner = faiss.IndexHNSWFlat(ivf.d, 32)
            assigner.hnsw.efSearch = 64
            ivf.clustering_index = assigner
        sample = np.arange(n)
        if 0 < settings.train < n:
            rng = np.random.default_rng(seed)
            sample = np.sort(rng.choice(n, settings.train, replace=False, shuffle=False))
        index.train(embeddings[sample].astype(np.float32, copy=False))
        opq.pq = ivf.clustering_index = None  # Python frees them
        if not settings.quick:  # by FAISS's 16, the graph leads some passages to lists far away
            faiss.downcast_index(ivf.quantizer).hnsw.efSearch = 128
        _add(index, embeddings)
        return index
    finally:
        faiss.omp_set_num_threads(before)


def _add(index: faiss.Index, embeddings: np.ndarray) -> None:
    with progress.bar("adding to the index", total=len(embeddings), unit="passages") as bar:
        for _, block in blocks(embeddings):
            index.add(block)
            bar.update(len(block))


def search_index(
    index: faiss.Index,
    settings: IndexSettings,
    query_embeddings: np.ndarray,
    qids: Sequence[str],
    ids: Sequence[str],
    depth: int,
    embeddings: np.ndarray,
    *,
    fill: bool = True,
) -> Run:
    """Return the ``depth`` best passages of each query by an index from `build_index`.

    Of a flat index, they are ranked by `exact_search`, which is faster. Of others, ``k_factor`` ·
    ``depth`` passages found by code are reranked by their exact inner product with the query; the
    scores equal those of `exact_search`. With ``fill``, a query whose lists hold fewer passages
    than wanted is searched again in twice as many lists, until it is filled; there is a UserWarning
    if that takes more than all.

    ``embeddings`` and ``ids`` are of the index's vectors, in their order; the other arguments and
    errors are those of `exact_search`.
    """
    if settings.flat:
        return exact_search(query_embeddings, embeddings, qids, ids, depth)
    queries = checked_queries(query_embeddings, qids, embeddings, ids, depth)
    wanted = min(depth, index.ntotal)
    asked = min(index.ntotal, settings.k_factor * wanted)
    found: Run = {}
    todo, nprobe = list(range(len(qids))), settings.nprobe
    while todo:
        parameters = _search_parameters(nprobe, settings.ef_search)
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
                found[qids[i]] = exact_hits(queries[i], embeddings, its_rows, ids, depth)
        todo, nprobe = short, min(settings.nlist, 2 * nprobe)
    return {qid: found[qid] for qid in qids}


def _search_parameters(nprobe: int, ef_search: int) -> faiss.SearchParameters:
    hnsw = faiss.SearchParametersHNSW(efSearch=max(ef_search, nprobe))
    ivf = faiss.SearchParametersIVF(nprobe=nprobe, quantizer_params=hnsw)
    return faiss.SearchParametersPreTransform(index_params=ivf)
