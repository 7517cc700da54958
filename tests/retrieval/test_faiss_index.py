"""FAISS indexes: their sizes, and what they find of exact search."""

import dataclasses

import faiss
import numpy as np
import pytest
from vectors import as_lists, brute_force, clustered, names, on_disk

from adaptive_margins.data.trec import top
from adaptive_margins.retrieval import exact as retrieval_exact
from adaptive_margins.retrieval.exact import approximation_recall, exact_search
from adaptive_margins.retrieval.faiss_index import (
    IndexSettings,
    build_index,
    choose_index,
    search_index,
)


def test_settings_follow_the_size_of_the_collection():
    for n in (1, 5, 38, 300, 623, 624, 700, 2_000, 7_000, 9_984, 13_000, 99_999, 100_000, 900_000):
        for dim in (384, 768, 100, 37):
            s = choose_index(n, dim, depth=20)
            assert s.flat == (n < 624)
            if s.flat:
                assert f"{n} passages are too few" in s.note
                continue
            assert s.factory.startswith(f"OPQ{s.m},IVF{s.nlist}_HNSW32,PQ{s.m}")
            assert dim % s.m == 0 and s.m <= 32
            assert 39 * s.nlist <= n < 39 * 2 * s.nlist
            assert 4 <= s.bits <= 8 and 39 * 2**s.bits <= n
            assert s.sample <= s.train <= n and (s.train == n or n >= 100_000)
            assert s.nprobe <= s.nlist
            assert s.nprobe * n / s.nlist >= 8 * 20 or s.nprobe == s.nlist


def test_settings_at_the_papers_size_are_the_papers():
    settings = choose_index(8_841_823, 768, depth=1000)
    assert settings.factory == "OPQ32,IVF262144_HNSW32,PQ32"
    assert settings.nprobe * 8_841_823 / settings.nlist > 8 * 1000
    assert settings.train == 2_097_152  # 8 a list
    assert settings.sample == 65_536


@pytest.mark.parametrize(("n", "dim"), [(1_000_000, 384), (8_841_823, 768), (138_364_198, 768)])
def test_large_collections_are_trained_on_a_bounded_sample(n, dim):
    settings = choose_index(n, dim)
    assert settings.nlist <= 2**18
    assert settings.nlist * 8 == settings.train <= 2**21
    assert settings.k_factor == 32


def test_settings_of_small_collections_stay():
    """The runs of the profiles smoke, laptop and laptop-long have been ranked with them."""
    settings = [choose_index(n, 384, depth=100) for n in (700, 7_000, 12_803, 20_000)]
    assert [(s.factory, s.nprobe, s.k_factor, s.train, s.sample) for s in settings] == [
        ("OPQ32,IVF16_HNSW32,PQ32x4", 16, 8, 700, 624),
        ("OPQ32,IVF128_HNSW32,PQ32x7", 91, 8, 7_000, 4_992),
        ("OPQ32,IVF256_HNSW32,PQ32", 128, 8, 12_803, 9_984),
        ("OPQ32,IVF512_HNSW32,PQ32", 182, 8, 20_000, 9_984),
    ]


@pytest.mark.parametrize("n", [1, 5, 50, 300, 700, 2000])
def test_index_finds_what_exact_search_finds(n, capfd):
    queries, passages = clustered(100, 64, 1), clustered(n, 64, 2)
    qids, ids = names("q", 100), names("d", n)
    settings = choose_index(n, 64, depth=20)
    index = build_index(passages, settings, seed=3)
    run = search_index(index, settings, queries, qids, ids, 20, passages)
    exact = exact_search(queries, passages, qids, ids, 20)
    assert approximation_recall(run, exact, 20) > (0.95 if n > 623 else 0.9999)
    if settings.flat:
        assert run == exact
    for qid in qids:
        assert len(run[qid]) == min(20, n)
        assert list(run[qid].items()) == top(run[qid])
        assert all(exact[qid].get(docid, score) == score for docid, score in run[qid].items())
    assert capfd.readouterr() == ("", "")


@pytest.fixture(scope="module")
def built():
    passages = clustered(2000, 64, 2)
    settings = choose_index(2000, 64)
    return passages, settings, build_index(passages, settings, seed=3)


def test_index_is_what_the_settings_say(built):
    _, settings, index = built
    ivf = faiss.downcast_index(faiss.extract_index_ivf(index))
    assert (ivf.nlist, ivf.pq.M, ivf.pq.nbits) == (settings.nlist, settings.m, settings.bits)
    assert isinstance(faiss.downcast_index(ivf.quantizer), faiss.IndexHNSWFlat)
    assert isinstance(index, faiss.IndexPreTransform)
    assert index.metric_type == faiss.METRIC_INNER_PRODUCT


def test_index_is_deterministic_and_leaves_the_number_of_threads_alone(built):
    passages, settings, index = built
    before = faiss.omp_get_max_threads()
    again = build_index(passages, settings, seed=3)
    assert faiss.omp_get_max_threads() == before
    assert np.array_equal(faiss.serialize_index(index), faiss.serialize_index(again))
    other = build_index(passages, settings, seed=4)
    assert not np.array_equal(faiss.serialize_index(index), faiss.serialize_index(other))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_index_from_disk_is_that_of_the_array(tmp_path, monkeypatch, dtype):
    queries, passages = clustered(40, 64, 1), clustered(2000, 64, 2)
    qids, ids = names("q", 40), names("d", 2000)
    stored = on_disk(tmp_path, passages, dtype)
    rounded = passages.astype(dtype).astype(np.float32)
    settings = choose_index(2000, 64, depth=20)
    index = build_index(rounded, settings, seed=3)
    run = search_index(index, settings, queries, qids, ids, 20, rounded)
    monkeypatch.setattr(retrieval_exact, "_BLOCK", 64 * 90)
    from_disk = build_index(stored, settings, seed=3)
    assert np.array_equal(faiss.serialize_index(index), faiss.serialize_index(from_disk))
    assert as_lists(search_index(from_disk, settings, queries, qids, ids, 20, stored)) == as_lists(run)  # fmt: skip
    exact = exact_search(queries, stored, qids, ids, 20)
    assert approximation_recall(run, exact, 20) > 0.95
    for qid in qids:
        assert all(exact[qid].get(docid, score) == score for docid, score in run[qid].items())


def test_an_index_is_trained_on_a_sample_drawn_by_seed(monkeypatch):
    passages = clustered(2000, 64, 2)
    settings = dataclasses.replace(choose_index(2000, 64, depth=20), train=800)
    row_of = {row.tobytes(): i for i, row in enumerate(passages)}
    taken, factory = [], faiss.index_factory

    def watched(*arguments):
        index = factory(*arguments)
        train = index.train

        def noting(rows):
            taken.append(np.array([row_of[row.tobytes()] for row in rows]))
            train(rows)

        index.train = noting
        return index

    monkeypatch.setattr(faiss, "index_factory", watched)
    indexes = [build_index(passages, settings, seed=seed) for seed in (1, 1, 2)]
    for rows in taken:
        assert len(rows) == len(set(rows.tolist())) == 800
        assert abs(np.mean(rows) - 1000) < 100  # from all of them
    assert np.array_equal(taken[0], taken[1]) and not np.array_equal(taken[0], taken[2])
    one, again, other = map(faiss.serialize_index, indexes)
    assert np.array_equal(one, again)
    assert len(one) == len(other) and not np.array_equal(one, other)
    queries, qids, ids = clustered(100, 64, 1), names("q", 100), names("d", 2000)
    run = search_index(indexes[0], settings, queries, qids, ids, 20, passages)
    exact = exact_search(queries, passages, qids, ids, 20)
    assert approximation_recall(run, exact, 20) > 0.95


def test_large_collections_are_assigned_to_lists_with_care(built):
    passages, settings, small = built

    def breadth(index):
        return faiss.downcast_index(faiss.extract_index_ivf(index).quantizer).hnsw.efSearch

    large = build_index(passages, dataclasses.replace(settings, quick=False), seed=3)
    assert (breadth(small), breadth(large)) == (16, 128)
    queries, qids, ids = clustered(100, 64, 1), names("q", 100), names("d", 2000)
    run = search_index(large, settings, queries, qids, ids, 20, passages)
    assert approximation_recall(run, exact_search(queries, passages, qids, ids, 20), 20) > 0.95


@pytest.mark.skipif(not faiss.get_num_gpus(), reason="not run here: needs faiss-gpu and a GPU")
def test_lists_clustered_on_a_gpu_find_what_exact_search_finds():
    queries, passages = clustered(100, 64, 1), clustered(2000, 64, 2)
    qids, ids = names("q", 100), names("d", 2000)
    settings = choose_index(2000, 64, depth=20)
    index = build_index(passages, settings, seed=3)
    run = search_index(index, settings, queries, qids, ids, 20, passages)
    assert approximation_recall(run, exact_search(queries, passages, qids, ids, 20), 20) > 0.95


def test_search_may_leave_queries_unfilled(built, recwarn):
    passages, settings, index = built
    one = dataclasses.replace(settings, nprobe=1)
    queries, qids, ids = clustered(30, 64, 9), names("q", 30), names("d", 2000)
    filled = search_index(index, one, queries, qids, ids, 500, passages)
    run = search_index(index, one, queries, qids, ids, 500, passages, fill=False)
    assert list(run) == qids
    lengths = [len(hits) for hits in run.values()]
    assert min(lengths) > 0 and max(lengths) < 500 and not recwarn
    every = exact_search(queries, passages, qids, ids, 2000)
    for qid, hits in run.items():
        assert list(hits.items()) == top({docid: every[qid][docid] for docid in hits})
        assert len(filled[qid]) == 500


def test_search_fills_the_depth_even_from_one_list(built):
    passages, settings, index = built
    one = dataclasses.replace(settings, nprobe=1, k_factor=1)
    queries, qids, ids = clustered(30, 64, 9), names("q", 30), names("d", 2000)
    run = search_index(index, one, queries, qids, ids, 500, passages)
    assert list(run) == qids
    assert {len(hits) for hits in run.values()} == {500}
    every = search_index(index, one, queries, qids, ids, 5000, passages)
    assert {len(hits) for hits in every.values()} == {2000}
    few = search_index(index, one, queries, qids, ids, 5, passages)
    exact = exact_search(queries, passages, qids, ids, 5)
    assert approximation_recall(few, exact, 5) < 0.9  # nprobe acts


def test_search_orders_identical_passages_as_trec_eval_does():
    passages = np.repeat(clustered(60, 32, 1), 20, axis=0)
    settings = choose_index(1200, 32, depth=30)
    index = build_index(passages, settings, seed=1)
    queries, qids, ids = clustered(25, 32, 2), names("q", 25), names("d", 1200)
    run = search_index(index, settings, queries, qids, ids, 30, passages)
    expected = brute_force(queries, passages, qids, ids, 30)
    assert {q: list(h.items()) for q, h in run.items()} == {
        q: list(h.items()) for q, h in expected.items()
    }


def test_index_of_few_different_passages_and_of_a_zero_embedding(capfd):
    passages = np.repeat(clustered(3, 32, 1), 300, axis=0)
    passages[0] = 0
    settings = choose_index(900, 32)
    index = build_index(passages, settings, seed=1)
    run = search_index(index, settings, passages[:2], ["zero", "q"], names("d", 900), 400, passages)
    assert {len(hits) for hits in run.values()} == {400}
    assert set(run["zero"].values()) == {0.0}
    assert capfd.readouterr() == ("", "")


def test_search_index_errors(built):
    passages, settings, index = built
    queries, qids, ids = clustered(2, 64, 0), names("q", 2), names("d", 2000)
    with pytest.raises(ValueError, match=r"shape \(2, 32\), 2000 passages of \(2000, 64\)"):
        search_index(index, settings, queries[:, :32], qids, ids, 5, passages)
    with pytest.raises(ValueError, match="depth must be at least 1"):
        search_index(index, settings, queries, qids, ids, 0, passages)
    with pytest.raises(ValueError, match=r"2000 passages of \(7, 64\)"):
        search_index(index, settings, queries, qids, ids, 5, passages[:7])


def test_settings_of_ones_own(capfd):
    passages = clustered(500, 16, 4)
    settings = IndexSettings(
        "OPQ4,IVF8_HNSW32,PQ4x4", 16, nlist=8, nprobe=8, m=4, bits=4, k_factor=50, sample=500
    )
    index = build_index(passages, settings, seed=0)
    ids = names("d", 500)
    assert search_index(index, settings, passages[:9], ids[:9], ids, 10, passages) == exact_search(
        passages[:9], passages, ids[:9], ids, 10
    )
    assert capfd.readouterr() == ("", "")  # though FAISS wants 624 passages for 4 bits


def test_approximation_recall():
    exact = {"q1": {"a": 3.0, "b": 2.0, "c": 1.0}, "q2": {"a": 1.0}, "q3": {}}
    approx = {"q1": {"a": 3.0, "c": 1.0, "d": 0.5}, "q3": {"z": 1.0}}
    assert approximation_recall(exact, exact, 2) == 1
    # q1: a of {a, b}; q2: nothing; q3: nothing to find, left out.
    assert approximation_recall(approx, exact, 2) == (1 / 2 + 0) / 2
