"""With other people's programs: the trainer of Sentence Transformers, plain loading, and readers of TREC runs."""

from __future__ import annotations

import runpy
import sys

import ir_measures
import numpy as np
import pandas as pd
import pytest
import pytrec_eval
from datasets import Dataset
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)

from adaptive_margins.data.collection import Collection, Texts
from adaptive_margins.data.trec import top, write_run
from adaptive_margins.encoder.load import open_encoder, save_encoder
from adaptive_margins.encoder.speed import packs
from adaptive_margins.evaluation.evaluator import CollectionEvaluator
from adaptive_margins.evaluation.measures import evaluate
from adaptive_margins.evaluation.significance import compare
from adaptive_margins.losses import MarginLoss
from conftest import ROOT, WORDS

EXAMPLE = ROOT / "examples" / "sentence_transformers_trainer.py"
TEXTS = ["sort the array", "a graph of node and edge", "path", "", "shape of the matrix " * 30]


@pytest.fixture(scope="module")
def encoder(tiny_folder, tmp_path_factory):
    """A Sentence Transformers folder."""
    folder = tmp_path_factory.mktemp("encoder") / "tiny"
    save_encoder(open_encoder(str(tiny_folder("bert"))), folder)
    return folder


# ---- the trainer of Sentence Transformers ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    """What the example's main returns for the shipped encoder, and what it wrote."""
    output = tmp_path_factory.mktemp("example") / "encoder"
    variables = runpy.run_path(str(EXAMPLE))
    model, measures = variables["main"](str(output))
    return output, model, measures


def test_the_example_trains_and_saves(example):
    output, model, measures = example
    assert measures["cosine_accuracy@10"] == 1.0
    assert measures["cosine_ndcg@10"] > 0.5
    plain = SentenceTransformer(str(output), local_files_only=True)
    np.testing.assert_allclose(plain.encode(TEXTS), model.encode(TEXTS), atol=1e-6)
    start = open_encoder("minilm")
    assert abs(plain.encode(TEXTS) - start.encode(TEXTS)).max() > 1e-4
    card = (output / "README.md").read_text(encoding="utf-8")
    for word in ("MarginLoss", "CachedMarginLoss", "gienapp2025", "gao2021", '"target": "adaptive"'):  # fmt: skip
        assert word in card


def test_the_example_as_a_program(tmp_path, encoder, monkeypatch, capsys):
    """As its first lines say, with an encoder of one's own."""
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), str(tmp_path / "out"), str(encoder)])
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("cosine_")]
    assert len(said) >= 10
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]
    assert SentenceTransformer(str(tmp_path / "out")).get_embedding_dimension() == 16


def triples(count, seed):
    """Random texts of a few words; each negative lacks what query and positive share."""
    rng = np.random.default_rng(seed)
    words = WORDS[7:]
    rows = []
    for _ in range(count):
        one, other = rng.choice(words, 2, replace=False)
        rows.append((f"the {one}", f"{one} of a {rng.choice(words)}", f"{other} of a {other}"))
    columns = zip(("anchor", "positive", "negative"), zip(*rows, strict=True), strict=True)
    return Dataset.from_dict(dict(columns))


def test_the_evaluator_selects_the_best_checkpoint(encoder, tmp_path):
    """With its primary metric, and step 0 as the baseline."""
    words = WORDS[7:]
    passages = {f"{a}-{b}": f"{a} of a {b}" for a in words for b in words}
    queries = Texts([f"q-{word}" for word in words], [f"the {word}" for word in words])
    qrels = {f"q-{a}": {f"{a}-{b}": 1 + (a == b) for b in words} for a in words}
    collection = Collection(
        "words", Texts(list(passages), list(passages.values())), {"validation": queries}, {"validation": qrels}
    )  # fmt: skip
    evaluator = CollectionEvaluator(collection, name="words")
    model = SentenceTransformer(str(encoder))
    start = evaluator(model)["words_nDCG@10"]
    evaluator.baseline = first = evaluator.per_query
    trainer = SentenceTransformerTrainer(
        model=model,
        args=SentenceTransformerTrainingArguments(
            output_dir=str(tmp_path), num_train_epochs=3, per_device_train_batch_size=8, learning_rate=1e-2,
            eval_strategy="epoch", save_strategy="epoch", report_to="none", use_cpu=True, disable_tqdm=True, seed=1,
            load_best_model_at_end=True, metric_for_best_model=f"eval_{evaluator.primary_metric}",
        ),
        train_dataset=triples(24, 1),
        loss=MarginLoss(model, target="distributed"),
        evaluator=evaluator,
    )  # fmt: skip
    trainer.train()
    logs = [row for row in trainer.state.log_history if "eval_words_nDCG@10" in row]
    values = [row["eval_words_nDCG@10"] for row in logs]
    assert len(values) == 3 and len(set(values)) > 1
    assert trainer.state.best_metric == max(values) != start
    assert evaluator(model)["words_nDCG@10"] == pytest.approx(max(values))  # it was loaded
    (pair,) = evaluator.comparisons.values()
    found = compare(evaluator.per_query["nDCG@10"], first["nDCG@10"], however_small=True)
    assert (pair["n"], pair["verdict"]) == (10, found.verdict)
    saved = pd.read_csv(tmp_path / "eval" / "Collection_evaluation_words_results.csv")
    means = saved[saved["metric"] == "words_nDCG@10"]
    assert means["value"].tolist() == pytest.approx(values)
    assert means["epoch"].tolist() == [1, 2, 3]
    card = (tmp_path / "checkpoint-9" / "README.md").read_text(encoding="utf-8")
    assert "CollectionEvaluator" in card and "**nDCG@10**" in card


# ---- encoders in plain Sentence Transformers ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tiny", "minilm"])
def test_saved_encoders_are_ordinary_ones(encoder, tmp_path, name):
    """Same embeddings, safetensors only, and no trace of the attention for packed texts, which others do not have."""
    model = open_encoder(str(encoder) if name == "tiny" else name)
    assert packs(model)
    save_encoder(model, tmp_path)
    plain = SentenceTransformer(str(tmp_path), device="cpu")
    np.testing.assert_allclose(plain.encode(TEXTS), model.encode(TEXTS), atol=1e-6)
    assert plain[0].model.config._attn_implementation == "sdpa"
    files = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert "packed" not in "".join(p.read_text() for p in files if p.name == "config.json")
    assert "model.safetensors" in {p.name for p in files}
    assert not {p.suffix for p in files} & {".bin", ".pt", ".pkl"}


# ---- runs in other people's tools --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ranked(tmp_path_factory):
    """Qrels and a run: with ties (q0), without judgements (q5), without hits (q9); and the run's file."""
    rng = np.random.default_rng(3)
    docids = [f"d{i}" for i in range(40)]
    run = {
        f"q{q}": {d: float(np.float32(rng.random())) for d in rng.permutation(docids)[:20].tolist()}
        for q in range(6)
    }
    run["q0"] = dict.fromkeys(run["q0"], 0.5)
    qrels = {
        qid: {d: int(rng.integers(0, 3)) for d in rng.permutation(docids)[:12].tolist()}
        for qid in ("q0", "q1", "q2", "q3", "q4", "q9")
    }
    path = tmp_path_factory.mktemp("runs") / "dense.run"
    write_run(run, path, "dense")
    return qrels, run, path


def per_query(qrels, run):
    """nDCG@10 by this project, of the queries that are in the run."""
    values = evaluate(qrels, run, ["nDCG@10"]).per_query["nDCG@10"]
    return {qid: value for qid, value in values.items() if qid in run}


def test_runs_load_in_pytrec_eval(ranked):
    qrels, run, path = ranked
    with path.open() as file:
        read = pytrec_eval.parse_run(file)
    assert read == run
    found = pytrec_eval.RelevanceEvaluator(qrels, {"ndcg_cut.10"}).evaluate(read)
    assert {qid: m["ndcg_cut_10"] for qid, m in found.items()} == pytest.approx(per_query(qrels, run))  # fmt: skip


def test_runs_load_in_ir_measures(ranked):
    qrels, run, path = ranked
    read = list(ir_measures.read_trec_run(str(path)))
    assert [(r.query_id, r.doc_id) for r in read] == [
        (qid, docid) for qid in sorted(run) for docid, _ in top(run[qid])
    ]
    found = ir_measures.iter_calc([ir_measures.nDCG @ 10], qrels, read)
    expected = evaluate(qrels, run, ["nDCG@10"]).per_query["nDCG@10"]
    assert {m.query_id: m.value for m in found} == pytest.approx(expected)


def test_runs_load_in_ranx(ranked):
    ranx = pytest.importorskip("ranx")
    qrels, run, path = ranked
    read = ranx.Run.from_file(str(path), kind="trec")
    assert {qid: dict(hits) for qid, hits in read.to_dict().items()} == run
    # ranx has an order of its own where scores tie, as in q0, and knows no grade 0.
    expected = {qid: value for qid, value in per_query(qrels, run).items() if qid != "q0"}
    judged = {q: {d: grade for d, grade in qrels[q].items() if grade} for q in expected}
    ranx.evaluate(ranx.Qrels(judged), read, "ndcg@10", make_comparable=True)
    assert read.scores["ndcg@10"] == pytest.approx(expected)
