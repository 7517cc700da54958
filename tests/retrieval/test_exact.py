"""Reranking and exact search, against loops in float64."""

import math
from collections.abc import Sequence

import numpy as np
import pytest
from vectors import as_lists, brute_force, clustered, names, on_disk, unit

from adaptive_margins.data.trec import top
from adaptive_margins.retrieval import exact as retrieval_exact
from adaptive_margins.retrieval.exact import exact_search, rerank
from adaptive_margins.retrieval.faiss_index import build_index, choose_index, search_index


class HitsOnly(Sequence):
    """Ids that may be asked for one by one, and not too often: millions are not to be gone through."""

    def __init__(self, ids: list[str], limit: int):
        self.ids, self.left = ids, limit

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, row):
        assert type(row) is int  # as memory-mapped sequences want it
        self.left -= 1
        assert self.left >= 0, "too many ids were looked up"
        return self.ids[row]


def test_rerank_is_the_cosine_of_embeddings_of_any_length():
    rng = np.random.default_rng(1)
    queries, passages = (
        rng.normal(size=(3, 8)),
        rng.normal(size=(10, 8)) * rng.uniform(0.01, 99, (10, 1)),
    )
    qids, docids = names("q", 3), names("d", 10)
    candidates = {"q2": {"d1": 9.0, "d7": 8.0, "d3": 7.0}, "q0": {"d9": 1.0}, "q1": {}}
    run = rerank(candidates, queries, qids, passages, docids)
    assert {q: set(hits) for q, hits in run.items()} == {
        q: set(hits) for q, hits in candidates.items()
    }
    for qid, hits in run.items():
        assert list(hits.items()) == top(hits)
        for docid, score in hits.items():
            q, d = queries[int(qid[1:])], passages[int(docid[1:])]
            cosine = (
                sum(x * y for x, y in zip(q, d, strict=True))
                / math.dist(q, q * 0)
                / math.dist(d, d * 0)
            )
            assert score == pytest.approx(cosine, abs=1e-6)


def test_rerank_of_a_zero_embedding_is_zero_and_identical_embeddings_tie():
    passages = np.tile(np.random.default_rng(0).normal(size=16), (50, 1)).astype(np.float32)
    passages[7] = 0
    docids = names("d", 50)
    hits = rerank({"q": dict.fromkeys(docids, 1.0)}, passages[:1], ["q"], passages, docids)["q"]
    assert hits.pop("d7") == 0
    assert set(hits.values()) == {1.0}
    assert list(hits) == sorted(hits, reverse=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"docids": ["d0"]}, r"1 passages of \(2, 4\); expected one row an id"),
        (
            {"query_embeddings": np.ones((1, 3))},
            r"1 queries have embeddings of shape \(1, 3\), 2 passages of \(2, 4\)",
        ),
        (
            {"passage_embeddings": np.full((2, 4), np.nan)},
            r"passage embedding in row 0 \('d0'\) is not finite",
        ),
    ],
)
def test_rerank_errors(change, message):
    arguments = {
        "candidates": {"q": {"d0": 1.0}},
        "query_embeddings": np.ones((1, 4)),
        "qids": ["q"],
        "passage_embeddings": np.ones((2, 4)),
        "docids": ["d0", "d1"],
    }
    with pytest.raises(ValueError, match=message):
        rerank(**{**arguments, **change})


# ---- exact search


@pytest.mark.parametrize("n", [1, 5, 50, 300])
def test_exact_search_is_brute_force(n):
    queries, passages = clustered(7, 24, 1), clustered(n, 24, 2)
    qids, ids = names("q", 7), names("d", n)
    for depth in (1, 10, 1000):
        run = exact_search(queries, passages, qids, ids, depth)
        expected = brute_force(queries, passages, qids, ids, depth)
        assert {q: list(h.items()) for q, h in run.items()} == {
            q: list(h.items()) for q, h in expected.items()
        }


@pytest.fixture(params=[24 * 7, 24 * 100])
def small_blocks(request, monkeypatch):
    """Passages come in blocks of 7 or 100 rows of 24 numbers, scores in a few of each."""
    monkeypatch.setattr(retrieval_exact, "_BLOCK", request.param)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_exact_search_from_disk_is_brute_force(tmp_path, small_blocks, dtype):
    queries, passages = clustered(30, 24, 1), clustered(330, 24, 2)
    passages[200:260] = passages[:60]  # ties in other blocks
    qids, ids = names("q", 30), names("d", 330)
    stored = on_disk(tmp_path, passages, dtype)
    rounded = passages.astype(dtype).astype(np.float32)
    for depth in (1, 10, 1000):
        run = exact_search(queries, stored, qids, ids, depth)
        assert as_lists(run) == as_lists(brute_force(queries, rounded, qids, ids, depth))


def test_exact_search_in_blocks_keeps_what_rounding_hides(small_blocks):
    rng = np.random.default_rng(4)
    passages = unit(rng.normal(size=(1, 24)) + 1e-6 * rng.normal(size=(300, 24)))
    passages *= rng.choice([1, 1, 1, 50], size=(300, 1)).astype(np.float32)  # of any length
    queries, qids, ids = clustered(20, 24, 6), names("q", 20), names("d", 300)
    run = exact_search(queries, passages, qids, ids, 5)
    assert as_lists(run) == as_lists(brute_force(queries, passages, qids, ids, 5))


@pytest.mark.parametrize(("length", "block"), [(1, 24 * 7), (1e4, 1)])  # of 7 rows, or of one
def test_exact_search_in_blocks_finds_the_better_of_two_that_rounding_swaps(
    monkeypatch, length, block
):
    monkeypatch.setattr(retrieval_exact, "_BLOCK", block)
    rng = np.random.default_rng(2)
    first = clustered(150, 24, 2) * np.float32(length)
    second = np.nextafter(first, rng.choice([-np.inf, np.inf], size=first.shape), dtype=np.float32)
    passages = np.concatenate([first, second])  # each has a twin in another block
    ids, qids = names("d", 300), names("q", 150)
    run = exact_search(first, passages, qids, ids, 1)
    assert as_lists(run) == as_lists(brute_force(first, passages, qids, ids, 1))


def test_exact_search_names_a_passage_that_is_not_finite(tmp_path, small_blocks):
    passages = clustered(330, 24, 2)
    passages[270, 3] = np.nan
    stored = on_disk(tmp_path, passages)
    with pytest.raises(ValueError, match=r"passage embedding in row 270 \('d270'\) is not finite"):
        exact_search(passages[:1], stored, ["q"], names("d", 330), 5)


def test_docids_are_looked_up_for_hits_only():
    queries, passages = clustered(6, 32, 1), clustered(2000, 32, 2)
    qids, ids = names("q", 6), names("d", 2000)
    settings = choose_index(2000, 32, depth=10)
    index = build_index(passages, settings, seed=1)
    for search, arguments in (
        (lambda i: exact_search(queries, passages, qids, i, 10), HitsOnly(ids, 60)),
        (lambda i: search_index(index, settings, queries, qids, i, 10, passages), HitsOnly(ids, 60)),
    ):  # fmt: skip
        assert search(arguments) == search(ids)


def test_exact_search_errors():
    good = clustered(4, 8, 0)
    with pytest.raises(ValueError, match=r"shape \(4, 6\), 4 passages of \(4, 8\)"):
        exact_search(good[:, :6], good, names("q", 4), names("d", 4), 2)
    with pytest.raises(ValueError, match="depth must be at least 1, not 0"):
        exact_search(good, good, names("q", 4), names("d", 4), 0)
