"""Topic-aware sampling: clusters, and batches against counted distributions."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from scipy.stats import chisquare

from adaptive_margins.data.stored import seeded_order
from adaptive_margins.teachers import TeacherError
from adaptive_margins.topics import query_clusters, sampled_order

CLUSTERS, PER_CLUSTER, PAIRS, B, BINS = 5, 12, 9, 4, 3


@pytest.fixture(scope="module")
def triples():
    """60 queries in 5 clusters, 9 triples each, in a random order of triples."""
    rng = np.random.default_rng(3)
    queries = rng.permutation(np.repeat(np.arange(100, 100 + CLUSTERS * PER_CLUSTER), PAIRS))
    # Skewed margins: equal bins of a query then have very different sizes.
    return queries, rng.exponential(2.0, len(queries)) - 1, (queries - 100) % CLUSTERS


def order(sampling, triples, batches=3000, **values):
    values = {"count": batches * B, "batch_size": B, "seed": 7, "bins": BINS, **values}
    return sampled_order(sampling, *triples, **values)


def naive_bins(queries, margins, bins):
    """Triple → bin, in a loop from the definition."""
    found = {}
    for query in set(queries.tolist()):
        numbers = np.flatnonzero(queries == query)
        low, high = margins[numbers].min(), margins[numbers].max()
        for number in numbers.tolist():
            edges = [low + (high - low) * k / bins for k in range(1, bins)]
            found[number] = sum(margins[number] >= edge for edge in edges)
    return found


def test_random_order_is_that_of_all_other_runs(triples):
    found = order("random", triples, batches=20, seed=5)
    assert found.tolist() == seeded_order(len(triples[0]), 5)[:80].tolist()


@pytest.mark.parametrize("sampling", ["topics", "topics-balanced", "topics-hard"])
def test_a_batch_has_different_queries_of_one_cluster(triples, sampling):
    queries, _, clusters = triples
    found = order(sampling, triples)
    assert len(found) == 3000 * B
    for batch in found.reshape(-1, B):
        assert len(set(clusters[batch])) == 1
        assert len(set(queries[batch])) == B
    assert found.tolist() == order(sampling, triples).tolist()
    assert found.tolist() != order(sampling, triples, seed=8).tolist()
    first = order(sampling, triples, batches=10)
    assert first.tolist() == found[: 10 * B].tolist()  # shorter runs are the beginning of longer


@pytest.mark.parametrize("sampling", ["topics", "topics-balanced"])
def test_clusters_and_queries_are_drawn_evenly(triples, sampling):
    queries, _, clusters = triples
    found = order(sampling, triples)
    _, counts = np.unique(clusters[found.reshape(-1, B)[:, 0]], return_counts=True)
    assert len(counts) == CLUSTERS and chisquare(counts).pvalue > 0.001
    _, counts = np.unique(queries[found], return_counts=True)
    assert len(counts) == CLUSTERS * PER_CLUSTER
    assert counts.min() > 140 and counts.max() < 260  # 200 expected


def test_triples_of_a_query_are_drawn_evenly_without_balance(triples):
    counts = np.bincount(order("topics", triples, batches=9000), minlength=len(triples[0]))
    expected = np.full(len(counts), counts.mean())
    assert chisquare(counts, expected).pvalue > 0.001


def test_balance_draws_bins_evenly_and_triples_evenly_in_each(triples):
    queries, margins, _ = triples
    bins = naive_bins(queries, margins, BINS)
    found = order("topics-balanced", triples, batches=9000)
    drawn, seen = Counter(found.tolist()), Counter(queries[found].tolist())
    observed, expected = [], []
    for query in set(queries.tolist()):
        numbers = np.flatnonzero(queries == query).tolist()
        filled = {bins[number] for number in numbers}
        for number in numbers:
            of_bin = sum(bins[other] == bins[number] for other in numbers)
            observed.append(drawn[number])
            expected.append(seen[query] / len(filled) / of_bin)
    # Counts of a query sum to what it was drawn: one degree of freedom less for each.
    assert chisquare(observed, expected, ddof=CLUSTERS * PER_CLUSTER - 1).pvalue > 0.001
    share = np.bincount([bins[number] for number in found.tolist()]) / len(found)
    plain = np.bincount(list(bins.values())) / len(bins)
    assert plain[0] > 0.5 and abs(share - 1 / BINS).max() < 0.08


@pytest.mark.parametrize("limit", [None, 0.5])
def test_hard_sampling_leaves_out_the_easiest(triples, limit):
    _, margins, _ = triples
    found = order("topics-hard", triples, batches=9000, hard_margin=limit)
    wanted = margins <= (np.median(margins) if limit is None else limit)
    counts = np.bincount(found, minlength=len(margins))
    assert (counts[~wanted] == 0).all() and (counts[wanted] > 0).all()


def test_small_clusters_are_filled_up_with_another():
    queries, clusters = np.arange(7), np.array([0, 0, 0, 1, 1, 1, 1])
    found = sampled_order(
        "topics", queries, np.zeros(7), clusters, count=400, batch_size=4, seed=1
    ).reshape(-1, 4)
    for batch in found:
        assert len(set(batch.tolist())) == 4
        assert sorted(Counter(clusters[batch].tolist()).values()) in ([4], [1, 3])


def test_queries_of_one_triple_or_equal_margins_have_one_bin():
    queries, margins = np.array([0, 1, 2, 2]), np.array([5.0, -1, 3, 3])
    found = sampled_order(
        "topics-balanced", queries, margins, np.zeros(4, int), count=3000, batch_size=3, seed=1
    )
    assert np.bincount(found)[:2].tolist() == [1000, 1000]
    assert 400 < np.bincount(found)[2] < 600


def test_what_sampling_refuses(triples):
    with pytest.raises(TeacherError, match=r"of 60 queries, fewer than a batch of 61; take smaller batches$"):  # fmt: skip
        order("topics", triples, batch_size=61, count=61)
    with pytest.raises(TeacherError, match=r"triples of 0 queries.* or raise teacher.hard_margin"):
        order("topics-hard", triples, hard_margin=-100.0)


def test_clusters_are_those_of_the_embeddings():
    rng = np.random.default_rng(1)
    truth = rng.integers(3, size=60)
    points = (10 * np.eye(3, 8)[truth] + rng.normal(size=(60, 8))).astype(np.float32)
    found = query_clusters(points, 3)
    assert len({(a, b) for a, b in zip(truth.tolist(), found.tolist(), strict=True)}) == 3
    assert found.tolist() == query_clusters(points, 3).tolist()


def test_more_clusters_than_queries():
    with pytest.raises(TeacherError, match=r"4 training queries cannot be put into 5 clusters"):
        query_clusters(np.eye(4, 8, dtype=np.float32), 5)
