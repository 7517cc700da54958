"""The evaluator for Sentence Transformers, against its encoder's cosines, pytrec_eval and `compare`."""

from __future__ import annotations

import math
from dataclasses import asdict

import numpy as np
import pandas as pd
import pytest
import pytrec_eval
from scipy import stats
from sentence_transformers import SentenceTransformer

from adaptive_margins.data.collection import Collection, Texts
from adaptive_margins.data.sources import open_collection
from adaptive_margins.encoder.checks import EncoderError
from adaptive_margins.encoder.load import open_encoder
from adaptive_margins.errors import ArgumentError
from adaptive_margins.evaluation.evaluator import CollectionEvaluator
from adaptive_margins.evaluation.measures import MeasureError, evaluate
from adaptive_margins.evaluation.significance import compare
from adaptive_margins.retrieval.bm25 import BM25
from adaptive_margins.retrieval.dense import DenseRetriever
from conftest import WORDS


@pytest.fixture(scope="module")
def collection():
    """130 passages, of which one is empty, and 20 queries with graded judgements."""
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS[5:], rng.integers(2, 12))) for _ in range(130)]
    texts[3] = ""
    passages = Texts([f"d{i}" for i in range(130)], texts)
    queries = Texts(
        [f"q{i}" for i in range(21)], [" ".join(rng.choice(WORDS[5:], 3)) for _ in range(21)]
    )
    qrels = {
        f"q{i}": {f"d{j}": int(rng.integers(0, 4)) for j in rng.choice(130, 9, replace=False)}
        for i in range(20)
    }  # fmt: skip
    return Collection("words", passages, {"validation": queries}, {"validation": qrels})


@pytest.fixture
def model(tiny_folder):
    return open_encoder(str(tiny_folder("bert")))


def test_the_ranking_is_that_of_the_cosine_and_the_measures_those_of_trec_eval(collection, model):
    measures = ["nDCG@10", "R(rel=2)@50", "MRR@10"]
    evaluator = CollectionEvaluator(collection, measures=measures)
    metrics = evaluator(model)
    qrels = collection.qrels["validation"]
    queries = Texts(list(qrels), [collection.queries["validation"][qid] for qid in qrels])
    expected = DenseRetriever(model, collection.passages, warn=False).search(queries, 100)
    assert evaluator.run.keys() == expected.keys()
    for qid, hits in expected.items():
        assert "d3" not in evaluator.run[qid]
        assert list(evaluator.run[qid].values()) == pytest.approx(list(hits.values()), abs=1e-5)
    trec = pytrec_eval.RelevanceEvaluator(qrels, {"ndcg_cut.10"}).evaluate(evaluator.run)
    values = {qid: found["ndcg_cut_10"] for qid, found in trec.items()}
    assert evaluator.per_query["nDCG@10"] == pytest.approx(values)
    assert list(evaluator.per_query) == ["nDCG@10", "R(rel=2)@50", "RR(rel=1)@10"]
    assert evaluator.primary_metric == "nDCG@10" and evaluator.greater_is_better
    for measure, found in evaluator.per_query.items():
        x = np.array(list(found.values()))
        low, high = stats.t.interval(0.95, len(x) - 1, x.mean(), stats.sem(x))
        assert metrics[measure] == pytest.approx(x.mean())
        assert (metrics[f"{measure}_low"], metrics[f"{measure}_high"]) == pytest.approx((low, high))
    assert len(metrics) == 9 and evaluator.comparisons == {}


def test_prompts_and_dot_product_are_the_models(collection, model):
    plain = SentenceTransformer(modules=list(model), device="cpu")
    before = CollectionEvaluator(collection)
    before(plain)
    plain.prompts = {"query": "sort ", "passage": "graph node "}
    plain.similarity_fn_name = "dot"
    evaluator = CollectionEvaluator(collection)
    evaluator(plain)
    assert evaluator.run != before.run
    for qid in ("q0", "q7"):
        query = plain.encode("sort " + collection.queries["validation"][qid])
        for docid, score in list(evaluator.run[qid].items())[:5]:
            passage = plain.encode("graph node " + collection.passages[docid])
            assert score == pytest.approx(float(query @ passage), rel=1e-4)


def test_groups_and_the_comparison_with_a_baseline(collection, model, tmp_path):
    qrels = collection.qrels["validation"]
    run = BM25(collection.passages).search(collection.queries["validation"], 100)
    bm25 = evaluate(qrels, run, ["nDCG@10", "P@5"]).per_query
    groups = {f"q{i}": min(i % 3, 1) for i in range(1, 30)}
    evaluator = CollectionEvaluator(
        collection, measures=["nDCG@10", "P@5"], name="words", groups=groups, baseline=bm25
    )
    metrics = evaluator(model, str(tmp_path / "new"), 1.5, 30)
    values = evaluator.per_query["nDCG@10"]
    zero = [values[f"q{i}"] for i in range(1, 20) if i % 3 == 0]
    assert metrics["words_nDCG@10_0"] == pytest.approx(np.mean(zero))
    assert set(metrics) == {
        f"words_{measure}{part}"
        for measure in ("nDCG@10", "P(rel=1)@5")
        for part in ("", "_low", "_high", "_0", "_1", "_difference")
    }
    assert evaluator.primary_metric == "words_nDCG@10"
    expected = compare(values, bm25["nDCG@10"], however_small=True)
    assert list(evaluator.comparisons) == ["nDCG@10", "P(rel=1)@5"]
    assert evaluator.comparisons["nDCG@10"] == {"measure": "nDCG@10", **asdict(expected)}
    assert metrics["words_nDCG@10_difference"] == pytest.approx(expected.difference)

    evaluator.baseline = evaluator.per_query
    again = evaluator(model, str(tmp_path / "new"), 2.0, 40)
    assert again["words_P(rel=1)@5_difference"] == 0
    assert {pair["verdict"] for pair in evaluator.comparisons.values()} == {"equivalent"}
    results = pd.read_csv(tmp_path / "new" / "Collection_evaluation_words_results.csv")
    assert list(results.columns) == ["epoch", "steps", "metric", "value"]
    found = results[results["steps"] == 30].set_index("metric")["value"].to_dict()
    assert found == pytest.approx(metrics)
    assert len(results) == len(metrics) + len(again)
    saved = pd.read_csv(tmp_path / "new" / "Collection_evaluation_words_per_query.csv")
    assert list(saved.columns) == ["epoch", "steps", "qid", "nDCG@10", "P(rel=1)@5"]
    assert saved[saved["epoch"] == 2].set_index("qid")["nDCG@10"].to_dict() == pytest.approx(values)
    assert len(saved) == 40


def test_no_verdict_from_fewer_than_ten_queries(collection, model):
    judged = {
        qid: dict.fromkeys(found, int(i < 9))
        for i, (qid, found) in enumerate(collection.qrels["validation"].items())
    }
    few = Collection("few", collection.passages, collection.queries, {"validation": judged})
    evaluator = CollectionEvaluator(few, baseline={"nDCG@10": dict.fromkeys(judged, 0.0)})
    metrics = evaluator(model)
    (pair,) = evaluator.comparisons.values()
    assert (pair["verdict"], pair["p_t"]) == ("too few queries", None)
    assert metrics["nDCG@10_difference"] == metrics["nDCG@10"] > 0
    for baseline, message in (
        ({"nDCG@10": {"q0": 0.5}}, "its 1 queries are not the 20 judged ones"),
        ({"nDCG@10": {}}, "its 0 queries are not the 20 judged ones"),
        ({"P@5": dict.fromkeys(judged, 0.0)}, "is not one of the measures"),
    ):
        evaluator.baseline = baseline
        with pytest.raises(ArgumentError, match=message):
            evaluator(model)
    one = Collection(
        "one", collection.passages, collection.queries, {"validation": {"q0": judged["q0"]}}
    )
    assert set(CollectionEvaluator(one)(model)) == {"nDCG@10"}


def test_a_folder_is_opened_and_what_cannot_be_evaluated_is_refused(collection, model, tmp_path):
    folder = tmp_path / "corpus"
    folder.mkdir()
    ids = [docid for docid in collection.passages.ids if docid != "d3"]
    queries, qrels = collection.queries["validation"], collection.qrels["validation"]
    (folder / "collection.tsv").write_text("".join(f"{d}\t{collection.passages[d]}\n" for d in ids))
    (folder / "queries.tsv").write_text("".join(f"{q}\t{queries[q]}\n" for q in queries.ids))
    lines = [
        f"{q} 0 {d} {g}\n" for q, found in qrels.items() for d, g in found.items() if d != "d3"
    ]
    (folder / "qrels.txt").write_text("".join(lines))
    (name,) = open_collection(folder).qrels
    found = CollectionEvaluator(str(folder), name)(model)
    assert math.isfinite(found["nDCG@10"])
    with pytest.raises(ArgumentError, match=f"no judgements of 'validation'; corpus has {name}"):
        CollectionEvaluator(folder)
    for groups, message in (
        ({"q1": "low"}, "'low' is the name of a metric"),
        ({"x": 1}, "'x', … is"),
    ):
        with pytest.raises(ArgumentError, match=message):
            CollectionEvaluator(collection, groups=groups)
    with pytest.raises(MeasureError, match="no query has a relevant passage"):
        CollectionEvaluator(collection, measures=["R(rel=4)@5"])
    model.similarity_fn_name = "euclidean"
    with pytest.raises(EncoderError, match="is euclidean; expected cosine or dot"):
        CollectionEvaluator(collection)(model)
    with pytest.raises(MeasureError, match="cannot compute the measure 'Hits@5'"):
        CollectionEvaluator(collection, measures=["Hits@5"])
