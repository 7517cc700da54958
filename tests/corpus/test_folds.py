"""Cross-validation: each query is tested once, by an encoder for which it was not used."""

from __future__ import annotations

import dataclasses
import json
from types import SimpleNamespace

import pytest
from test_finetune import SETTINGS, collection_of, encoder, saved  # noqa: F401

from adaptive_margins.corpus import finetune as finetuning
from adaptive_margins.corpus.evaluate import held_out
from adaptive_margins.corpus.finetune import finetune
from adaptive_margins.corpus.finetuned import verdict
from adaptive_margins.corpus.prepare import open_parts
from adaptive_margins.data.collection import Texts
from adaptive_margins.data.sources import open_collection
from adaptive_margins.data.splits import fold_queries
from adaptive_margins.encoder.options import EncoderOptions
from conftest import in_child, kill_in

FOLDS = 3
FEW = dataclasses.replace(SETTINGS, triples=32, checks=1)


@pytest.fixture(scope="module")
def folded(tmp_path_factory, encoder):  # noqa: F811
    """A finished cross-validation, which was killed when the result of the second fold was written."""
    folder = tmp_path_factory.mktemp("folds")
    whole = collection_of(train_on_chance=False)
    only = dataclasses.replace(whole, queries={"test": whole.queries["test"]}, qrels={"test": whole.qrels["test"]})  # fmt: skip
    source = saved(only, folder / "collection")
    options = EncoderOptions(max_length=8)  # of queries of 11 tokens
    arguments = {"model": encoder, "device": "cpu", "settings": FEW, "folds": FOLDS, "options": options}  # fmt: skip

    def killed():
        kill_in(finetuning, "write_results", 2)
        finetune(source, folder / "output", **arguments)

    assert in_child(killed) == "died"
    folds, trained = [], []
    with pytest.MonkeyPatch.context() as patch:
        fold, train = finetuning._fold, finetuning._train

        def recorded(*given):
            done = fold(*given)
            folds.append((done.report, done.qrels, {n: done.run(n) for n in ("trained", "hybrid")}))
            return done

        patch.setattr(finetuning, "_fold", recorded)
        patch.setattr(finetuning, "_train", lambda *task: trained.append(1) or train(*task))
        done = finetune(source, folder / "output", **arguments)
    return SimpleNamespace(source=source, done=done, folds=folds, trained=trained)


def test_rankings_are_those_of_the_folds(folded):
    done = folded.done
    for name in ("trained", "hybrid"):
        expected = {}
        for _, qrels, runs in folded.folds:
            assert runs[name].keys() == qrels.keys()
            assert not expected.keys() & qrels.keys()
            expected |= runs[name]
        assert done.run(name) == expected
        assert expected.keys() == done.qrels.keys()
    assert len(done.qrels) == done.report["comparisons"]["trained vs start"]["n"] == 80
    means = [(len(qrels), r["measures"]["trained"]["nDCG@10"]) for r, qrels, _ in folded.folds]
    mean = sum(n * value for n, value in means) / 80
    assert done.report["measures"]["trained"]["nDCG@10"] == pytest.approx(mean)


def test_a_finished_fold_is_not_trained_again(folded):
    assert len(folded.trained) == FOLDS - 1 + 1  # all but the first, and the encoder that is kept
    assert not folded.done.folder.with_name("output.work").exists()


def test_report_verdict_and_card_name_the_folds(folded):
    report = folded.done.report
    for found, (fold, _, _) in zip(report["folds"], folded.folds, strict=True):
        assert found == {key: fold[key] for key in found}
        assert {"target", "merge", "hybrid", "measures"} <= found.keys()
    assert report["collection"]["sets"] == {"train": 54, "validation": 26, "test": 80}
    assert report["truncated"]["queries"] == 80  # each counts once
    also = {
        **report["comparisons"]["trained vs start"],
        "name": "other",
        "start": 0.5,
        "trained": 0.5,
    }
    said = verdict({**report, "also": also, "merge": {**report["merge"], "alpha": 1.0}})
    assert "On other (80 queries)" in said and "the encoder in the folder" in said
    assert f"ranked by the one of {FOLDS} encoders" in report["verdict"]
    assert "over 80 test queries" in report["verdict"]
    card = (folded.done.folder / "README.md").read_text("utf-8")
    assert "models trained like this one" in card and "| this model |" not in card


def test_evaluate_states_that_the_encoder_used_the_queries(folded):
    collection = open_collection(folded.source)
    parts, sentence = held_out(collection, str(folded.done.folder))
    assert parts.qrels["test"] == collection.qrels["test"]
    assert parts.fingerprint == folded.done.report["collection"]["fingerprint"]
    assert sentence.endswith(fold_queries(collection, FOLDS, seed=1)[1])


def test_who_trained_with_the_test_queries_is_said(folded, encoder, tmp_path):  # noqa: F811
    whole = open_collection(folded.source)
    qids = whole.queries["test"].ids[:5]  # of which one is for validation
    texts = Texts(qids, [whole.queries["test"][qid] for qid in qids])
    qrels = {qid: whole.qrels["test"][qid] for qid in qids}
    few = dataclasses.replace(whole, queries={"test": texts}, qrels={"test": qrels})
    source = saved(few, tmp_path / "few")
    once = finetune(source, tmp_path / "once", model=encoder, device="cpu", settings=FEW)
    assert once.report["merge"]["standard_error"] is None
    assert "one query is too few to show a gain" in once.report["verdict"]

    def split(source, model, seed=1, folds=None) -> str:
        job = SimpleNamespace(
            source=source, model=str(model), seed=seed, folds=folds, triples=9, settings=FEW
        )
        return open_parts(job)[-1].split

    def said(*given, **options) -> bool:
        return "encoder to start from was trained" in split(*given, **options)

    assert not said(source, once.folder)
    assert said(source, once.folder, seed=3)
    assert said(source, once.folder, folds=3)
    # That of an encoder's own start is said by `evaluate`, and where a training begins with it.
    once.report["collection"]["split"] = split(source, once.folder, seed=3)
    (once.folder / "training.json").write_text(json.dumps(once.report))
    assert "encoder to start from was trained" in held_out(few, str(once.folder))[1]
    assert said(source, once.folder)
    assert said(folded.source, folded.done.folder)
    assert not said(folded.source, encoder)
