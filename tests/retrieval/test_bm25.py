"""BM25, against the formula and bm25s on words."""

import math
import os
import subprocess
import sys
from collections import Counter

import bm25s
import numpy as np
import pytest
import Stemmer
from vectors import names

from adaptive_margins.data.collection import Texts
from adaptive_margins.data.trec import top
from adaptive_margins.retrieval import bm25 as retrieval_bm25
from adaptive_margins.retrieval.bm25 import BM25

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


def test_bm25_does_not_depend_on_the_hash_seed_and_prints_nothing(capsys):
    code = (
        "from adaptive_margins.retrieval.bm25 import BM25\n"
        "from adaptive_margins.data.collection import Texts\n"
        "words = 'alpha beta gamma delta epsilon zeta eta theta iota kappa lambda'.split()\n"
        "texts = [' '.join(words[i % 11:] + words[: i % 5]) for i in range(60)]\n"
        "bm25 = BM25(Texts([str(i) for i in range(60)], texts))\n"
        "print(bm25.search(Texts(['q'], ['kappa alpha theta zeta beta']), 20))\n"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stderr == ""
    exec(code, {})  # with this process's hash seed
    assert done.stdout == capsys.readouterr().out
