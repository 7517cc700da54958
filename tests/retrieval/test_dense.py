"""Dense retrieval: against naive loops and Sentence Transformers' own embeddings; the index, its files, and what damages it."""

from __future__ import annotations

import json
import resource
import shutil
from pathlib import Path

import faiss
import numpy as np
import pytest
from sentence_transformers import SentenceTransformer

from adaptive_margins import progress
from adaptive_margins.data.collection import Texts
from adaptive_margins.data.text import DataError
from adaptive_margins.data.trec import top
from adaptive_margins.encoder import embed as encoder_embed
from adaptive_margins.encoder import tokens as encoder_tokens
from adaptive_margins.encoder.checks import EncoderError
from adaptive_margins.encoder.load import (
    MINILM_SHA256,
    encoder_identity,
    open_encoder,
    save_encoder,
)
from adaptive_margins.files import WriteError, locked
from adaptive_margins.retrieval import dense as retrieval_dense
from adaptive_margins.retrieval import dense_index as retrieval_dense_index
from adaptive_margins.retrieval.bm25 import BM25
from adaptive_margins.retrieval.dense import DenseRetriever, hybrid
from adaptive_margins.retrieval.dense_index import DenseIndex
from adaptive_margins.retrieval.exact import approximation_recall, exact_search
from conftest import WORDS, in_child, write_encoder

WORDS = WORDS[5:]


def sentences(count, seed=1, words=WORDS):
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(words, size=rng.integers(1, 12))) for _ in range(count)]


PASSAGES = Texts(
    [f"d{i}" for i in range(42)], [*sentences(20), "", *sentences(20, seed=2), " \u00a0 "]
)
EMPTY = {"d20", "d41"}
QUERIES = Texts(["q1", "q2", "q3"], sentences(3, seed=3))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A Sentence Transformers folder: a tiny random BERT and mean pooling."""
    home = tmp_path_factory.mktemp("encoder")
    save_encoder(open_encoder(str(write_encoder(home / "plain", "bert"))), home / "saved")
    return home / "saved"


@pytest.fixture(scope="module")
def model(folder):
    return open_encoder(str(folder))


@pytest.fixture(scope="module")
def retriever(model):
    return DenseRetriever(model, PASSAGES)


@pytest.fixture
def built(retriever, folder, tmp_path):
    return DenseIndex.build(retriever, "Sentences", str(folder), tmp_path / "index")


def refuse(*_, **__):
    raise AssertionError("texts were embedded")


def naive(queries, passages, query_vectors, vectors, candidates=None, depth=None):
    """Cosines in float64 of Sentence Transformers' own vectors, one pair at a time."""
    run = {}
    for qid, q in zip(queries.ids, query_vectors.astype(np.float64), strict=True):
        scores = {}
        for docid, text, d in zip(
            passages.ids, passages.texts, vectors.astype(np.float64), strict=True
        ):
            if text.strip() and (candidates is None or docid in candidates[qid]):
                scores[docid] = float(q @ d / np.linalg.norm(q) / np.linalg.norm(d))
        run[qid] = dict(sorted(scores.items(), key=lambda hit: -hit[1])[:depth])
    return run


def same_run(found, expected):
    """The same passages with the same scores; passages with the same words tie, whatever their ids."""
    assert list(found) == list(expected)
    for qid, hits in expected.items():
        assert len(found[qid]) == len(hits)
        assert list(found[qid].values()) == pytest.approx(list(hits.values()), abs=1e-5)
        last = min(hits.values(), default=0)
        inside = {docid for docid, score in hits.items() if score > last + 1e-5}
        assert inside <= set(found[qid])


# ---- the retriever ---------------------------------------------------------------------------------------------------


def test_embeddings_are_sentence_transformers_own(retriever, folder):
    plain = SentenceTransformer(str(folder), device="cpu")
    expected = plain.encode_document(list(PASSAGES.texts), normalize_embeddings=True)
    texts = [docid not in EMPTY for docid in PASSAGES.ids]
    np.testing.assert_allclose(retriever.embeddings, expected[texts], atol=1e-6)
    expected[np.logical_not(texts)] = 0
    rows = np.array([41, 3, 20, 0, 3])
    np.testing.assert_allclose(retriever.embeddings_of(rows), expected[rows], atol=1e-6)
    assert retriever.embeddings.dtype == np.float32
    assert retriever.rows.tolist() == np.flatnonzero(texts).tolist()
    found = retriever.embed_queries(QUERIES.texts)
    np.testing.assert_allclose(
        found, plain.encode_query(list(QUERIES.texts), normalize_embeddings=True), atol=1e-6
    )


def test_texts_are_cut_at_their_lengths(model):
    texts = Texts(["a", "b"], ["graph node edge path", "graph node array matrix"])
    short = DenseRetriever(model, texts, passage_length=4, query_length=4)
    long = DenseRetriever(model, texts)
    for found in (short.embeddings, short.embed_queries(texts.texts)):
        np.testing.assert_allclose(found[0], found[1], atol=1e-6)
    assert np.abs(long.embeddings[0] - long.embeddings[1]).max() > 1e-3
    assert long.passage_length == long.query_length == model.max_seq_length
    assert DenseRetriever(model, texts, passage_length=9999).passage_length == model.max_seq_length
    for lengths in ({"passage_length": 0}, {"query_length": -1}):
        with pytest.raises(EncoderError, match="expected 1 to 1,048,576"):
            DenseRetriever(model, PASSAGES, **lengths)


def test_slices_change_nothing(retriever, model, monkeypatch, capsys):
    monkeypatch.setattr(retrieval_dense, "_SLICE", 5)
    monkeypatch.setattr(progress, "LINE_EVERY", 0)
    again = DenseRetriever(model, PASSAGES)
    np.testing.assert_allclose(again.embeddings, retriever.embeddings, atol=1e-6)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) >= 8
    assert lines[-1].startswith("embedding passages: 100%")


@pytest.mark.parametrize("depth", [1, 7, 40, 99])
def test_search_finds_what_a_loop_finds(retriever, depth):
    vectors, asked = retriever.embeddings_of(np.arange(42)), retriever.embed_queries(QUERIES.texts)
    found = retriever.search(QUERIES, depth)
    same_run(found, naive(QUERIES, PASSAGES, asked, vectors, depth=depth))
    assert all(not EMPTY & set(hits) and len(hits) == min(depth, 40) for hits in found.values())


def test_candidates_are_ordered_as_by_a_loop_and_nothing_else_is_embedded(
    retriever, model, monkeypatch
):
    candidates = {
        "q2": {f"d{i}": 1.0 for i in (3, 20, 8, 41, 30)},
        "q1": {"d8": 0.5, "d1": 0.1},
        "q3": {"d20": 3.0},
    }
    embedded = []

    def embed(model, tokens, rows=None, **settings):
        embedded.append(len(rows))
        return original(model, tokens, rows, **settings)

    original = encoder_embed.embed
    monkeypatch.setattr(retrieval_dense, "embed", embed)
    found = DenseRetriever(model, PASSAGES).rerank(QUERIES, candidates)
    assert embedded == [4, 3]  # passages, queries
    asked, vectors = retriever.embed_queries(QUERIES.texts), retriever.embeddings_of(np.arange(42))
    expected = naive(QUERIES, PASSAGES, asked, vectors, candidates)
    same_run({qid: found[qid] for qid in QUERIES.ids}, expected)
    assert found["q3"] == {}
    embedded.clear()
    same_run(retriever.rerank(QUERIES, candidates), found)
    assert embedded == [3]  # its passages are embedded already


@pytest.mark.parametrize(
    ("candidates", "message"),
    [
        ({"q9": {"d1": 1.0}}, "unknown query 'q9'"),
        ({"q1": {"d1": 1.0, "d99": 2.0}}, "query 'q1' is the unknown passage 'd99'"),
    ],
)
def test_unknown_candidates(retriever, candidates, message):
    with pytest.raises(DataError, match=message):
        retriever.rerank(QUERIES, candidates)


def test_nothing_to_search(model):
    empty = DenseRetriever(model, Texts(["a"], [""]))
    assert empty.search(QUERIES, 3) == {"q1": {}, "q2": {}, "q3": {}}
    assert empty.rerank(QUERIES, {"q1": {"a": 1.0}}) == {"q1": {}}
    assert empty.search(Texts([], []), 3) == {}


def test_the_shipped_encoder_finds_the_passage_that_is_meant():
    passages = Texts(
        ["bread", "bike", "cells"],
        [
            "Knead flour, water, salt and yeast, let the dough rise, and bake it for an hour.",
            "A loose chain slips off the cogs; tighten it by moving the rear wheel back.",
            "Mitochondria turn sugar into the molecules that cells burn as fuel.",
        ],
    )
    queries = Texts(["a", "b", "c"], ["how to make a loaf", "fix my bicycle", "energy in biology"])
    run = DenseRetriever(open_encoder("minilm"), passages).search(queries, 1)
    assert [next(iter(hits)) for hits in run.values()] == ["bread", "bike", "cells"]


# ---- the index -------------------------------------------------------------------------------------------------------


def test_the_index_gives_what_exact_search_gives(built, retriever, model):
    assert built.settings.flat
    for depth in (1, 7, 99):
        assert built.search(model, QUERIES, depth) == retriever.search(QUERIES, depth)
    again = DenseIndex.open(built.folder)
    assert again.search(model, QUERIES, 5) == retriever.search(QUERIES, 5)
    kept = [row for row, docid in enumerate(PASSAGES.ids) if docid not in EMPTY]
    assert list(again.passages.ids) == [PASSAGES.ids[row] for row in kept]
    assert again.passages["d30"] == PASSAGES["d30"]
    assert sorted(path.name for path in built.folder.parent.iterdir()) == ["index"]


def test_plain_faiss_reads_it(built, retriever):
    index = faiss.read_index(str(built.folder / "passages.faiss"))
    asked = retriever.embed_queries(QUERIES.texts)
    scores, rows = index.search(asked, 6)
    assert index.ntotal == len(built.passages) == 40
    for qid, its_scores, its_rows in zip(QUERIES.ids, scores, rows, strict=True):
        expected = retriever.search(QUERIES, 6)[qid]
        assert np.diff(its_scores).max() < -1e-5  # no ties: there is one order
        assert [built.passages.ids[row] for row in its_rows] == list(expected)
        np.testing.assert_allclose(its_scores, list(expected.values()), atol=1e-5)
    stored = np.load(built.folder / "embeddings.npy")
    np.testing.assert_allclose(
        stored, np.stack([index.reconstruct(i) for i in range(40)]), atol=1e-7
    )


def test_the_index_fuses_what_its_parts_find(built, retriever, model, monkeypatch):
    again = DenseIndex.open(built.folder)
    kept = [row for row, docid in enumerate(PASSAGES.ids) if docid not in EMPTY]
    texts = Texts([PASSAGES.ids[row] for row in kept], [PASSAGES.texts[row] for row in kept])
    unseen = Texts(
        ["u"], ["sorted graphs of SORTING nodes"]
    )  # words that are in no passage, their stems are
    bm25, dense = (BM25(texts).search(QUERIES, 99), retriever.search(QUERIES, 99))
    assert again.bm25.search(QUERIES, 99) == bm25
    assert again.bm25.search(unseen, 9) == BM25(texts).search(unseen, 9) != {"u": {}}
    assert again.weight is None
    for weight in (None, 0.3, 1.0):
        assert again.search(model, QUERIES, 5, weight=weight) == hybrid(dense, bm25, 5, weight)
    assert again.search(None, QUERIES, 5, weight=0.0) == hybrid(dense, bm25, 5, 0.0)
    arrays = list(built.folder.glob("bm25.*.npy"))
    assert len(arrays) == 3
    for path in arrays:
        np.load(path, allow_pickle=False)


def test_passages_without_a_term_are_found_by_the_encoder_alone(model, folder, tmp_path):
    retriever = DenseRetriever(model, Texts(["a", "b"], ["the", "of a"]))
    built = DenseIndex.build(retriever, "S", str(folder), tmp_path / "index")
    assert built.search(None, QUERIES, 2, weight=0) == {"q1": {}, "q2": {}, "q3": {}}
    found, dense = (built.search(model, QUERIES, 2, weight=weight) for weight in (None, 1))
    assert [list(hits) for hits in found.values()] == [list(hits) for hits in dense.values()]


def test_what_made_it_is_written_down(built, folder):
    about = json.loads((built.folder / "index.json").read_text())
    assert about["encoder"] == {"name": str(folder), "identity": encoder_identity(str(folder))}
    assert about["collection"] == {
        "name": "Sentences", "fingerprint": "", "passages": 42, "indexed": 40,
    }  # fmt: skip
    assert about["lengths"] == {"query": 64, "passage": 64}
    assert about["index"]["factory"] == "Flat"
    assert set(about["files"]) == {p.name for p in built.folder.iterdir()} - {"index.json"}


def test_a_larger_index_finds_nearly_all_and_scores_exactly(model, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(retrieval_dense_index, "EXACT_BELOW", 0)
    texts = list(dict.fromkeys(sentences(2000, seed=5)))[:700]
    passages = Texts([str(i) for i in range(len(texts))], texts)
    retriever = DenseRetriever(model, passages, precision="fp32")
    built = DenseIndex.build(retriever, "Sentences", str(folder), tmp_path / "index")
    assert built.settings.factory.startswith("OPQ16,IVF16_HNSW32")
    queries = Texts([f"q{i}" for i in range(30)], sentences(30, seed=6))
    found, asked = built.search(model, queries, 10), retriever.embed_queries(queries.texts)
    exact = exact_search(asked, built.embeddings, queries.ids, passages.ids, 10)
    assert approximation_recall(found, exact, 10) > 0.95
    for qid, hits in found.items():
        for docid in set(hits) & set(exact[qid]):
            assert hits[docid] == exact[qid][docid]
    again = DenseIndex.build(retriever, "Sentences", str(folder), tmp_path / "again")
    for path in built.folder.iterdir():
        assert path.read_bytes() == (again.folder / path.name).read_bytes(), path.name


def test_float16_halves_the_embeddings(retriever, folder, model, tmp_path):
    built = DenseIndex.build(retriever, "S", str(folder), tmp_path / "half", dtype="float16")
    assert np.load(built.folder / "embeddings.npy").dtype == np.float16
    expected = retriever.search(QUERIES, 40)
    for qid, hits in built.search(model, QUERIES, 40).items():
        assert hits == pytest.approx(expected[qid], abs=1e-3)


def interrupt_build(retriever, encoder, folder, monkeypatch):
    """Stop a build after the passages are embedded."""

    def fail(*_, **__):
        raise MemoryError("in the middle")

    with monkeypatch.context() as patch:
        patch.setattr(retrieval_dense_index, "build_index", fail)
        with pytest.raises(MemoryError):
            DenseIndex.build(retriever, "S", str(encoder), folder)


def test_an_interrupted_build_leaves_nothing_and_goes_on(model, folder, tmp_path, monkeypatch):
    interrupt_build(DenseRetriever(model, PASSAGES), folder, tmp_path / "index", monkeypatch)
    assert [path.name for path in tmp_path.iterdir()] == ["index.work"]
    with monkeypatch.context() as patch:  # tokenised and embedded already
        patch.setattr(encoder_embed, "embed", refuse)
        patch.setattr(encoder_tokens, "_write_tokens", refuse)
        DenseIndex.build(DenseRetriever(model, PASSAGES), "S", str(folder), tmp_path / "index")
    assert [path.name for path in tmp_path.iterdir()] == ["index"]
    expected = DenseRetriever(model, PASSAGES).search(QUERIES, 9)
    assert DenseIndex.open(tmp_path / "index").search(model, QUERIES, 9) == expected


def test_what_was_embedded_for_other_texts_is_not_used(model, folder, tmp_path, monkeypatch):
    interrupt_build(DenseRetriever(model, PASSAGES), folder, tmp_path / "index", monkeypatch)
    other = Texts(PASSAGES.ids, [*sentences(42, seed=9)])
    retriever = DenseRetriever(model, other)
    built = DenseIndex.build(retriever, "S", str(folder), tmp_path / "index")
    assert built.search(model, QUERIES, 9) == retriever.search(QUERIES, 9)


def test_what_cannot_be_indexed(built, retriever, model, folder, tmp_path):
    with pytest.raises(WriteError, match="it exists and is not an empty folder"):
        DenseIndex.build(retriever, "S", str(folder), built.folder)
    with locked(tmp_path / "locked"), pytest.raises(WriteError, match="another process is writing"):
        DenseIndex.build(retriever, "S", str(folder), tmp_path / "locked")
    with pytest.raises(DataError, match=r"S: none of the 2 passages has a text"):
        empty = DenseRetriever(model, Texts(["a", "b"], ["", " "]))
        DenseIndex.build(empty, "S", str(folder), tmp_path / "empty")
    with pytest.raises(DataError, match="id 'a b' is empty or has white space"):
        blank = DenseRetriever(model, Texts(["a b"], ["graph"]))
        DenseIndex.build(blank, "S", str(folder), tmp_path / "blank")
    with pytest.raises(EncoderError, match="unknown encoder"):
        DenseIndex.build(retriever, "S", "no/such/encoder", tmp_path / "unknown")
    with pytest.raises(WriteError, match=r"file/index cannot be written"):
        (tmp_path / "file").write_text("")
        DenseIndex.build(retriever, "S", str(folder), tmp_path / "file" / "index")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "index"]


def test_a_full_disk_is_an_error_that_says_so(retriever, folder, tmp_path):
    def fill():
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
        DenseIndex.build(retriever, "S", str(folder), tmp_path / "index")

    assert retriever.embeddings.nbytes > 2000
    assert in_child(fill).startswith(f"WriteError: {tmp_path / 'index'} could not be written")
    assert not list(tmp_path.iterdir())


# ---- what is opened is what was written ------------------------------------------------------------------------------

FILES = [
    "embeddings.npy",
    "passages.arrow",
    "passages.faiss",
    "bm25.indices.npy",
    "bm25.vocab.json",
]


@pytest.mark.parametrize("name", FILES)
def test_damaged_files_are_named(built, name):
    path = built.folder / name
    data = path.read_bytes()
    path.write_bytes(data[:-3])
    with pytest.raises(DataError, match=rf"{name}: {len(data) - 3} bytes, expected {len(data)}"):
        DenseIndex.open(built.folder)
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(DataError, match=rf"{name}: SHA-256 is \w+, expected \w+"):
        DenseIndex.open(built.folder)
    path.unlink()
    with pytest.raises(DataError, match=rf"{name}: file not found"):
        DenseIndex.open(built.folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "does not describe an index"),
        ("[]", "does not describe an index"),
        ('{"format": 1, "files": {}}', "does not describe an index"),
        (lambda text: text.replace('"weight": null', '"weight": 7'), "does not describe an index"),
        ('{"format": 7}', "format 7 is not 1, which this version reads; build the index again"),
    ],
)
def test_an_index_json_of_something_else(built, text, message):
    path = built.folder / "index.json"
    path.write_text(text(path.read_text()) if callable(text) else text)
    with pytest.raises(DataError, match=message):
        DenseIndex.open(built.folder)
    with pytest.raises(DataError, match=r"no index of passages at .*nowhere"):
        DenseIndex.open(built.folder / "nowhere")


def test_another_encoder_is_refused(built, folder, model, tmp_path):
    other = write_encoder(tmp_path / "other", "bert")
    changed = open_encoder(str(other))
    parameter = next(changed.parameters())
    parameter.data += 0.5 * parameter.data.roll(1, 0)
    save_encoder(changed, tmp_path / "changed")
    assert encoder_identity(str(tmp_path / "changed")) != built.identity
    with pytest.raises(EncoderError, match=rf"built with encoder '{folder}' \({built.identity}\)"):
        built.search(changed, QUERIES, 3)
    with pytest.raises(EncoderError, match=r"changed' is now \w+; build the index again"):
        built.open_encoder(str(tmp_path / "changed"))
    minilm = open_encoder("minilm")
    with pytest.raises(EncoderError, match="embeds its passages differently"):
        built.search(minilm, QUERIES, 3)

    shutil.copytree(folder, tmp_path / "moved")
    for name in (None, str(tmp_path / "moved")):
        opened = built.open_encoder(name)
        assert built.search(opened, QUERIES, 3) == built.search(model, QUERIES, 3)


def test_the_encoder_is_found_from_any_folder(retriever, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(folder.parent)
    built = DenseIndex.build(retriever, "S", folder.name, tmp_path / "index")
    monkeypatch.chdir(tmp_path)
    assert built.search(built.open_encoder(), QUERIES, 3) == retriever.search(QUERIES, 3)
    (tmp_path / "minilm").mkdir()  # "minilm" is the shipped encoder all the same
    shipped = DenseIndex.build(retriever, "S", "minilm", tmp_path / "shipped")
    assert (shipped.encoder, shipped.identity) == ("minilm", MINILM_SHA256)


# ---- fusion ----------------------------------------------------------------------------------------------------------


def two_runs():
    rng = np.random.default_rng(4)
    return [
        {
            qid: {f"d{i}": float(rng.normal()) for i in rng.choice(30, 12, replace=False)}
            for qid in qids
        }
        for qids in (["q1", "q2"], ["q2", "q3"])
    ]


@pytest.mark.parametrize("weight", [None, 0.1, 0.5, 0.75])
def test_fusion_is_that_of_a_loop(weight):
    a, b = two_runs()
    fused = hybrid(a, b, 8, weight)
    assert list(fused) == ["q1", "q2", "q3"]
    for qid, hits in fused.items():
        scores = {}
        for run, share in ((a, weight), (b, weight and 1 - weight)):
            ranked = sorted(run.get(qid, {}), key=lambda docid: run[qid][docid], reverse=True)
            for docid in ranked:
                added = 1 / (60 + ranked.index(docid) + 1)
                if weight is not None:
                    best, last = run[qid][ranked[0]], run[qid][ranked[-1]]
                    added = share * (run[qid][docid] - last) / (best - last)
                scores[docid] = scores.get(docid, 0) + added
        best = sorted(scores.items(), key=lambda hit: (hit[1], hit[0]), reverse=True)[:8]
        assert list(hits) == [docid for docid, _ in best]
        assert list(hits.values()) == pytest.approx([score for _, score in best], abs=1e-12)


def test_a_weight_of_1_or_0_gives_one_ranking_as_it_is():
    a, b = two_runs()
    close = {"q1": {"x": 1.0, "y": 1.0 + 1e-6, "far": -1e9}}  # scaled, x and y would be equal
    for weight, alone, other in ((1, a, b), (0, b, a), (1, close, b), (0, close, b)):
        runs = (alone, other) if weight else (other, alone)
        found = hybrid(*runs, 8, weight)
        assert found.keys() == {*alone, *other}
        assert all(list(hits.items()) == top(alone.get(q, {}), 8) for q, hits in found.items())


def test_fusion_scales_a_single_hit_and_refuses_other_weights():
    found = hybrid({"q": {"a": 0.5, "b": 0.1}}, {"q": {"b": 1e30}}, 5, 0.6)
    assert found["q"] == pytest.approx({"a": 0.6, "b": 0.4})
    for weight in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="weight must lie between 0 and 1, not"):
            hybrid({}, {}, 5, weight)


def test_fusion_with_an_empty_ranking_keeps_the_order():
    assert list(hybrid({"q": {"a": 3.0, "b": 2.0, "c": 1.0}}, {"q": {}}, 2)["q"]) == ["a", "b"]
    assert hybrid({"q": {}}, {}, 2) == {"q": {}}
    with pytest.raises(ValueError, match="depth must be at least 1, not 0"):
        hybrid({"q": {"a": 1.0}}, {}, 0)
