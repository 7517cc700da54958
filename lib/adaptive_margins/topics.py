"""Topic-aware sampling of batches (TAS-B; Hofstätter et al. 2021) and its hard-margin variant."""

from __future__ import annotations

import numpy as np

from adaptive_margins.data.stored import seeded_order
from adaptive_margins.teachers import TeacherError


def query_clusters(embeddings: np.ndarray, clusters: int) -> np.ndarray:
    """Cluster queries by FAISS's k-means: (n, D) float32 embeddings → (n,) numbers of clusters.

    Raises TeacherError if there are fewer queries than clusters.
    """
    import faiss

    if len(embeddings) < clusters:
        raise TeacherError(
            f"{len(embeddings)} training queries cannot be put into {clusters} clusters; set"
            f" teacher.clusters to {len(embeddings)} or fewer"
        )
    means = faiss.Kmeans(embeddings.shape[1], clusters, niter=20, seed=1, min_points_per_centroid=1)
    means.train(embeddings)
    numbers: np.ndarray = means.index.search(embeddings, 1)[1][:, 0]
    return numbers


def sampled_order(
    sampling: str,
    queries: np.ndarray,
    margins: np.ndarray,
    clusters: np.ndarray,
    *,
    count: int,
    batch_size: int,
    seed: int,
    bins: int = 10,
    hard_margin: float | None = None,
) -> np.ndarray:
    """Numbers of the triples of a run, batch by batch.

    - "random": `data.stored.seeded_order`, each triple once;
    - "topics": a batch has a cluster, drawn evenly; its queries are drawn from it, each once, and a
      random triple of each. A cluster with fewer queries than a batch is followed by another one.
    - "topics-balanced" (TAS-B): the triple of a query is drawn from one of the query's bins, each
      equally likely: ``bins`` of equal width from its smallest to its largest margin, empty ones
      left out. A query with one triple has one bin (the published code leaves it out);
    - "topics-hard" (Wang and Zuccon 2023): as "topics", without triples of which the teacher's
      margin is above ``hard_margin``, the easiest.

    Args:
        queries, clusters: (N,) the query of each triple, and the cluster of that.
        margins: (N,) the teacher's score of the positive minus that of the negative.
        count: triples wanted; a multiple of ``batch_size``. All but "random" draw them with
            replacement.
        hard_margin: None for the median of all margins. Margins have the scale of the teacher: Wang
            and Zuccon use 6 with the scores of Hofstätter et al.
        sampling, bins, batch_size, seed: see above; the same arguments have the same order.

    Raises TeacherError for fewer queries than a batch has.
    """
    if sampling == "random":
        return seeded_order(len(queries), seed)[:count]
    kept = np.arange(len(queries))
    if sampling == "topics-hard":
        limit = float(np.median(margins)) if hard_margin is None else hard_margin
        kept = np.flatnonzero(margins <= limit)
    if sampling != "topics-balanced":
        bins = 1
    ids, first, query = np.unique(queries[kept], return_index=True, return_inverse=True)
    if len(ids) < batch_size:
        more = " or raise teacher.hard_margin" if sampling == "topics-hard" else ""
        raise TeacherError(
            f"sampling {sampling!r} has triples of {len(ids)} queries, fewer than a batch of"
            f" {batch_size}; take smaller batches{more}"
        )
    place = query * bins + _bins(query, margins[kept], bins)
    by_place = kept[np.argsort(place, kind="stable")]
    # A cell is a bin of a query that is not empty: its triples are consecutive in ``by_place``.
    cell, start, size = np.unique(np.sort(place), return_index=True, return_counts=True)
    _, first_cell, cells = np.unique(cell // bins, return_index=True, return_counts=True)
    topic = clusters[kept][first]
    members = [np.flatnonzero(topic == number) for number in np.unique(topic)]
    rng = np.random.default_rng(seed)
    order = np.empty(count // batch_size * batch_size, np.int64)
    for batch in order.reshape(-1, batch_size):
        chosen = _queries_of_batch(members, batch_size, rng)
        one = first_cell[chosen] + (rng.random(batch_size) * cells[chosen]).astype(np.int64)
        batch[:] = by_place[start[one] + (rng.random(batch_size) * size[one]).astype(np.int64)]
    return order


def _bins(query: np.ndarray, margins: np.ndarray, bins: int) -> np.ndarray:
    """The bin of each triple, of equal width between its query's extreme margins."""
    low, high = np.full(query.max() + 1, np.inf), np.full(query.max() + 1, -np.inf)
    np.minimum.at(low, query, margins)
    np.maximum.at(high, query, margins)
    width = np.where(high > low, high - low, 1)[query]
    return np.minimum(((margins - low[query]) / width * bins).astype(np.int64), bins - 1)


def _queries_of_batch(
    members: list[np.ndarray], batch_size: int, rng: np.random.Generator
) -> np.ndarray:
    """Different queries of one cluster; of more only if it has too few."""
    found: list[np.ndarray] = []
    missing = batch_size
    for cluster in rng.permutation(len(members)):
        found.append(rng.permutation(members[cluster])[:missing])
        missing -= len(found[-1])
        if not missing:
            break
    return np.concatenate(found)
