import dataclasses
import math
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence

import bm25s
import faiss
import numpy as np
import pytest
import Stemmer

from adaptive_margins.data.collection import Texts
from adaptive_margins.data.trec import top
from adaptive_margins.retrieval import bm25 as retrieval_bm25
from adaptive_margins.retrieval import exact as retrieval_exact
from adaptive_margins.retrieval.bm25 import BM25
from adaptive_margins.retrieval.exact import approximation_recall, exact_search, rerank
from adaptive_margins.retrieval.faiss_index import (
    IndexSettings,
    build_index,
    choose_index,
    index_bytes,
    search_index,
)

PASSAGES = Texts(
    ["p1", "p2", "p3", "p4", "p5"],
    [
        "Sorts an array in place and returns nothing.",
        "Returns the indices that would sort an array along an axis.",
        "Sorted arrays: sorting, sorts.",
        "Reads a table from a comma separated file.",
        "the of and",
    ],
)


def unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def clustered(n: int, dim: int, seed: int, centre_seed: int = 0) -> np.ndarray:
    """Unit vectors around 20 centres, as embeddings lie."""
    centres = np.random.default_rng(centre_seed).normal(size=(20, dim))
    rng = np.random.default_rng(seed)
    return unit(centres[rng.integers(20, size=n)] + 0.7 * rng.normal(size=(n, dim)))


def names(prefix: str, n: int) -> list[str]:
    return [f"{prefix}{i}" for i in range(n)]


def on_disk(folder, passages: np.ndarray, dtype: str = "float32") -> np.ndarray:
    """The passages as `embed_shards` leaves them."""
    np.save(folder / "embeddings.npy", passages.astype(dtype))
    return np.load(folder / "embeddings.npy", mmap_mode="r")


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


def as_lists(run):
    return {qid: list(hits.items()) for qid, hits in run.items()}


def brute_force(queries, passages, qids, ids, depth):
    """Inner products in float64, rounded to float32, then trec_eval's order; query by query."""
    run = {}
    for qid, q in zip(qids, queries.astype(float), strict=True):
        products = np.multiply(passages.astype(float), q).sum(axis=1).astype(np.float32).tolist()
        run[qid] = {i: s for s, i in sorted(zip(products, ids, strict=True), reverse=True)[:depth]}
    return run


# ---- BM25


def lucene_bm25(documents, query, k1=0.9, b=0.4):
    """The formula, on tokens: idf = ln(1 + (N - df + .5) / (df + .5)), tf / (tf + k1 (1 - b + b l / avg))."""
    average = sum(map(len, documents)) / len(documents)
    scores = []
    for document in documents:
        tf = Counter(document)
        score = 0.0
        for term in query:
            df = sum(term in d for d in documents)
            idf = math.log(1 + (len(documents) - df + 0.5) / (df + 0.5))
            score += idf * tf[term] / (tf[term] + k1 * (1 - b + b * len(document) / average))
        scores.append(score)
    return scores


def test_bm25_is_the_formula():
    # Stemmed and without stop words, by hand.
    tokens = [
        ["sort", "array", "place", "return", "noth"],
        ["return", "indic", "would", "sort", "array", "along", "axi"],
        ["sort", "array", "sort", "sort"],
        ["read", "tabl", "from", "comma", "separ", "file"],
        [],
    ]
    expected = lucene_bm25(tokens, ["sort", "array", "axi", "array"])
    run = BM25(PASSAGES).search(Texts(["q"], ["Sorting THE arrays; axis of an array"]), 10)
    assert run["q"] == pytest.approx(
        {i: s for i, s in zip(PASSAGES.ids, expected, strict=True) if s > 0}, rel=1e-5
    )


def test_bm25_leaves_out_what_shares_no_term():
    queries = Texts(
        ["none", "stop", "empty", "some"], ["zebra quagga", "the of", "", "table zebra"]
    )
    run = BM25(PASSAGES).search(queries, 100)
    assert run["none"] == run["stop"] == run["empty"] == {}
    assert list(run["some"]) == ["p4"]
    assert list(run) == queries.ids


def test_bm25_cuts_in_trec_evals_order():
    passages = Texts(names("d", 12), ["one word here"] * 12)
    run = BM25(passages).search(Texts(["q"], ["word"]), 3)
    assert list(run["q"]) == ["d9", "d8", "d7"]


def test_bm25_of_passages_without_terms():
    assert BM25(Texts(["a", "b"], ["the", ""])).search(Texts(["q"], ["word"]), 5) == {"q": {}}


@pytest.fixture
def large():
    """Passages of words that share stems, with stop words and empty passages, and queries some of whose words are unknown."""
    rng = np.random.default_rng(8)
    stems = [f"{a}{b}t" for a in "bcdfgklmnp" for b in ("ar", "or", "ust", "imp", "ell")]
    words = [s + e for s in stems for e in ("", "s", "ing")] + ["the", "of", "Not"]
    ranks = rng.zipf(1.2, size=(400, 30)) % len(words)
    texts = [" ".join(words[w] for w in row[: rng.integers(0, 30)]) for row in ranks]
    asked = [*words[::3], *(s + "ed" for s in stems), "unknown", "zygotes"]
    queries = [" ".join(rng.choice(asked, size=5)) for _ in range(60)]
    return Texts(names("d", 400), texts), Texts(names("q", 60), queries)


@pytest.mark.parametrize("size", [1, 7, 400, 65_536])
def test_bm25_read_in_pieces_is_bm25s_on_words(large, monkeypatch, capfd, size):
    passages, queries = large
    stemmer = Stemmer.Stemmer("english")

    def words(texts):
        return bm25s.tokenize(
            texts, stopwords="en", stemmer=stemmer, return_ids=False, show_progress=False
        )

    plain = bm25s.BM25(method="lucene", k1=0.9, b=0.4, backend="numpy")
    plain.index(words(passages.texts), show_progress=False)
    monkeypatch.setattr(retrieval_bm25, "_TEXTS", size)
    bm25 = BM25(passages)
    if size >= 400:
        assert capfd.readouterr() == ("", "")
    run = bm25.search(queries, 50)
    for qid, asked in zip(queries.ids, words(queries.texts), strict=True):
        known = [word for word in asked if word in plain.vocab_dict]
        scores = plain.get_scores(known).tolist() if known else []
        hits = {i: s for i, s in zip(passages.ids, scores, strict=False) if s > 0}
        assert list(run[qid].items()) == top(hits, 50)
    assert bm25.search(queries, 50) == run  # a query leaves nothing behind


def test_bm25_scores_given_candidates(large):
    passages, queries = large
    bm25 = BM25(passages)
    full = bm25.search(queries, 400)
    rng = np.random.default_rng(1)
    candidates = {
        qid: dict.fromkeys(rng.choice(passages.ids, size=40, replace=False).tolist(), 0.0)
        for qid in queries.ids[::-2]
    }
    candidates["q1"] = {}
    run = bm25.rescore(queries, candidates)
    assert list(run) == list(candidates)
    zeros = 0
    for qid, hits in candidates.items():
        expected = {docid: full[qid].get(docid, 0.0) for docid in hits}
        assert list(run[qid].items()) == top(expected)
        zeros += list(expected.values()).count(0.0)
    assert zeros > 20
    unknown = bm25.rescore(Texts(["q"], ["zygotes"]), {"q": {"d1": 7.0, "d2": 8.0}})
    assert unknown == {"q": {"d2": 0.0, "d1": 0.0}}
    with pytest.raises(KeyError, match="'d400'"):
        bm25.rescore(queries, {"q1": {"d400": 0.0}})
    with pytest.raises(KeyError, match="'q60'"):
        bm25.rescore(queries, {"q60": {"d1": 0.0}})


def test_bm25_errors():
    with pytest.raises(ValueError, match="at least one passage"):
        BM25(Texts([], []))
    with pytest.raises(ValueError, match="depth must be at least 1, not -2"):
        BM25(PASSAGES).search(Texts(["q"], ["array"]), -2)


def test_bm25_does_not_depend_on_the_hash_seed_and_prints_nothing():
    code = (
        "from adaptive_margins.retrieval.bm25 import BM25\n"
        "from adaptive_margins.data.collection import Texts\n"
        "words = 'alpha beta gamma delta epsilon zeta eta theta iota kappa lambda'.split()\n"
        "texts = [' '.join(words[i % 11:] + words[: i % 5]) for i in range(60)]\n"
        "bm25 = BM25(Texts([str(i) for i in range(60)], texts))\n"
        "print(bm25.search(Texts(['q'], ['kappa alpha theta zeta beta']), 20))\n"
    )
    outputs = set()
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stderr == ""
        outputs.add(done.stdout)
    assert len(outputs) == 1


# ---- reranking


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


def test_rerank_from_disk(tmp_path):
    passages, queries = clustered(700, 24, 2), clustered(5, 24, 1)
    docids, qids = names("d", 700), names("q", 5)
    candidates = {q: dict.fromkeys(docids[i::7], 1.0) for i, q in enumerate(qids)}
    run = rerank(candidates, queries, qids, passages, docids)
    stored = on_disk(tmp_path, passages)
    assert as_lists(rerank(candidates, queries, qids, stored, docids)) == as_lists(run)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"candidates": {"q": {"d0": 1.0, "d5": 1.0}}},
            "candidate 'd5' of query 'q' has no embedding",
        ),
        ({"candidates": {"r": {"d0": 1.0}}}, "query 'r' of the candidates has no embedding"),
        ({"docids": ["d0"]}, r"passage embeddings must have shape \(1, D\).*not \(2, 4\)"),
        ({"docids": ["d0", "d0"]}, "passage ids must be unique"),
        (
            {"query_embeddings": np.ones((1, 3))},
            "query embeddings have 3 dimensions, passage embeddings 4",
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


def test_exact_search_cuts_ties_as_trec_eval_does():
    passages = np.repeat(clustered(40, 48, 5), 25, axis=0)  # each passage 25 times
    order = np.random.default_rng(0).permutation(1000)
    queries, qids, ids = clustered(60, 48, 6), names("q", 60), names("d", 1000)
    run = exact_search(queries, passages[order], qids, ids, 30)
    expected = brute_force(queries, passages[order], qids, ids, 30)
    assert {q: list(h) for q, h in run.items()} == {q: list(h) for q, h in expected.items()}


def test_exact_search_is_exact_where_single_precision_is_not():
    rng = np.random.default_rng(4)
    base = rng.normal(size=(1, 200))
    passages = unit(base + 1e-6 * rng.normal(size=(400, 200)))
    queries, qids, ids = clustered(50, 200, 6), names("q", 50), names("d", 400)
    run = exact_search(queries, passages, qids, ids, 5)
    assert run == brute_force(queries, passages, qids, ids, 5)


@pytest.fixture(params=[1, 24 * 7, 24 * 100])
def small_blocks(request, monkeypatch):
    """Passages come in blocks of 1, 7 or 100 rows of 24 numbers, scores in a few of each."""
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


@pytest.mark.parametrize("length", [1, 1e4])
def test_exact_search_in_blocks_finds_the_better_of_two_that_rounding_swaps(monkeypatch, length):
    monkeypatch.setattr(retrieval_exact, "_BLOCK", 24 * 7)
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
    with pytest.raises(
        ValueError, match="query embeddings have 6 dimensions, passage embeddings 8"
    ):
        exact_search(good[:, :6], good, names("q", 4), names("d", 4), 2)
    with pytest.raises(ValueError, match="depth must be at least 1, not 0"):
        exact_search(good, good, names("q", 4), names("d", 4), 0)
    with pytest.raises(ValueError, match="passage ids must be unique"):
        exact_search(good, good, names("q", 4), ["a"] * 4, 2)


# ---- FAISS index


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
            assert s.sample <= s.train == n
            assert s.nprobe <= s.nlist
            assert s.nprobe * n / s.nlist >= 8 * 20 or s.nprobe == s.nlist


def test_settings_at_the_papers_size_are_the_papers():
    settings = choose_index(8_841_823, 768, depth=1000)
    assert settings.factory == "OPQ32,IVF262144_HNSW32,PQ32"
    assert settings.nprobe * 8_841_823 / settings.nlist > 8 * 1000
    assert settings.train == 2_097_152  # 8 a list
    assert settings.training_bytes == 2 * 2_097_152 * 768 * 4  # 12.9 GB
    assert settings.sample == 65_536
    assert 1.1e9 < index_bytes(settings, 8_841_823) < 1.3e9


def test_more_hits_need_more_lists():
    assert (
        choose_index(900_000, 64, depth=20_000).nprobe > choose_index(900_000, 64, depth=10).nprobe
    )


@pytest.mark.parametrize(("n", "dim", "depth"), [(0, 8, 1), (8, 0, 1), (8, 8, 0)])
def test_settings_errors(n, dim, depth):
    with pytest.raises(ValueError, match="must be at least 1, not 0"):
        choose_index(n, dim, depth=depth)


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


@pytest.mark.parametrize(("n", "dim"), [(500, 48), (700, 37), (2000, 64), (5000, 16), (3000, 128)])
def test_index_bytes_are_those_of_the_built_index(n, dim):
    settings = choose_index(n, dim)
    index = build_index(clustered(n, dim, 1), settings, seed=1)
    assert index_bytes(settings, n) == pytest.approx(len(faiss.serialize_index(index)), rel=0.1)


def test_an_index_of_many_lists_has_the_bytes_it_is_said_to_have():
    settings = IndexSettings("OPQ4,IVF2000_HNSW32,PQ4x4", 16, nlist=2000, m=4, bits=4, sample=2000)
    index = build_index(clustered(4000, 16, 1), settings, seed=1)
    assert index_bytes(settings, 4000) == pytest.approx(len(faiss.serialize_index(index)), rel=0.1)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("n", [300, 2000])
def test_index_from_disk_is_that_of_the_array(tmp_path, monkeypatch, dtype, n):
    queries, passages = clustered(40, 64, 1), clustered(n, 64, 2)
    qids, ids = names("q", 40), names("d", n)
    stored = on_disk(tmp_path, passages, dtype)
    rounded = passages.astype(dtype).astype(np.float32)
    settings = choose_index(n, 64, depth=20)
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


def test_build_index_errors():
    passages = clustered(700, 32, 0)
    settings = choose_index(700, 32)
    with pytest.raises(ValueError, match=r"row 5 has length 2, expected 1"):
        scaled = passages.copy()
        scaled[5] *= 2
        build_index(scaled, settings, seed=1)
    with pytest.raises(ValueError, match="32 dimensions, the index settings 64"):
        build_index(passages, choose_index(700, 64), seed=1)
    with pytest.raises(
        ValueError, match=r"12 passages are too few for OPQ32.*choose_index\(12, 32\)"
    ):
        build_index(passages[:12], settings, seed=1)
    with pytest.raises(ValueError, match=r"row 3 \(3\) is not finite"):
        holed = passages.copy()
        holed[3, 3] = np.inf
        build_index(holed, settings, seed=1)


def test_search_index_errors(built):
    passages, settings, index = built
    queries, qids, ids = clustered(2, 64, 0), names("q", 2), names("d", 2000)
    with pytest.raises(ValueError, match="the index has 2000 vectors, but 3 docids"):
        search_index(index, settings, queries, qids, ids[:3], 5, passages)
    with pytest.raises(ValueError, match="query embeddings have 32 dimensions, the index 64"):
        search_index(index, settings, queries[:, :32], qids, ids, 5, passages)
    with pytest.raises(ValueError, match="depth must be at least 1"):
        search_index(index, settings, queries, qids, ids, 0, passages)
    with pytest.raises(ValueError, match=r"passage embeddings must have shape \(2000, D\)"):
        search_index(index, settings, queries, qids, ids, 5, passages[:7])
    with pytest.raises(ValueError, match="passage ids must be unique"):
        search_index(index, settings, queries, qids, ["a"] * 2000, 5, passages)


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
    with pytest.raises(ValueError, match="no hits"):
        approximation_recall(approx, {"q": {}}, 2)
