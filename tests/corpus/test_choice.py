"""Several losses on the same triples: which one is kept, what that promises, and what is forgotten elsewhere."""

from __future__ import annotations

import copy
import dataclasses
import json
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
from scipy.stats import ttest_1samp
from test_finetune import SETTINGS, collection_of, encoder, saved  # noqa: F401

from adaptive_margins import training
from adaptive_margins.cli_corpus import _train_text
from adaptive_margins.corpus import explore
from adaptive_margins.corpus import finetune as finetuning
from adaptive_margins.corpus.choice import about_choice, choice_table
from adaptive_margins.corpus.evaluate import evaluate_encoder
from adaptive_margins.corpus.finetune import finetune
from adaptive_margins.corpus.finetuned import not_worse, number, second_collection, verdict
from adaptive_margins.corpus.settings import ALL
from adaptive_margins.data.text import DataError
from adaptive_margins.evaluation.measures import Evaluation
from conftest import in_child, kill_in

STEPS = 8
FEW = dataclasses.replace(SETTINGS, triples=STEPS * SETTINGS.batch_size, checks=2)


@pytest.fixture(scope="module")
def chosen(tmp_path_factory, encoder):  # noqa: F811
    """A finished training with all losses, after one that was killed in its third; and a second collection."""
    folder = tmp_path_factory.mktemp("all")
    source = saved(collection_of(train_on_chance=False), folder / "collection")
    other = saved(collection_of(train_on_chance=True), folder / "other")
    arguments = {"model": encoder, "device": "cpu", "settings": FEW}
    call = partial(finetune, source, folder / "output", target="all", also=other, **arguments)

    def killed():
        kill_in(training._Trainer, "training_step", 2 * STEPS + 5)
        call()

    assert in_child(killed) == "died"
    work = folder / "output.work"
    rows = [json.loads(path.read_text()) for path in work.glob("loss-*.json")]
    assert {row["target"] for row in rows} == {*ALL[:2]}
    # Of the losses that are finished, the best one has its checkpoints; the third has begun.
    assert len(list(work.glob("training-*"))) == 2
    curves, said = [], []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finetuning, "say", said.append)
        done = call(on_check=curves.append)
    begun = sum(len(curve) == 1 for curve in curves)  # at step 0
    return SimpleNamespace(source=source, other=other, arguments=arguments, done=done, begun=begun, folder=folder, said=said)  # fmt: skip


def test_the_best_loss_on_validation_is_kept(chosen):
    report = chosen.done.report
    rows = report["choice"]["trainings"]
    assert [row["target"] for row in rows] == [*ALL]
    assert len({row["values"][0] for row in rows}) == 1  # of the zero-shot encoder
    assert len({tuple(row["values"]) for row in rows}) == len(ALL)
    best = max(rows, key=lambda row: max(row["values"][1:]))
    assert best["value"] == max(best["values"][1:])
    assert best["steps"][best["values"].index(best["value"])] == best["best_step"]
    assert report["choice"]["chosen"] == report["target"] == best["target"]
    assert chosen.done.curve["nDCG@10"].tolist() == best["values"]
    for row in rows:
        assert row["against_start"]["difference"] == pytest.approx(row["value"] - row["values"][0])
        assert row["against_chosen"]["difference"] == pytest.approx(row["value"] - best["value"])
        assert "per_query" not in row
    assert chosen.begun == 3  # two were finished, and the third is resumed
    assert not (chosen.folder / "output.work").exists()


def test_the_time_of_all_trainings_is_said_before_the_first(chosen):
    assert chosen.said[0].startswith("6 × training, with validation and ranking: about 0:")
    assert [line.split(":")[0] for line in chosen.said if line.startswith("training, ")] == [
        "training, softmax", "training, static 0.1", "training, static 0.3", "training, static 0.5",
    ]  # fmt: skip


def test_alone_the_chosen_loss_comes_to_the_same(chosen):
    """So all of them saw the same triples in the same order, and the evaluations were the same."""
    target = chosen.done.report["target"]
    alone = finetune(chosen.source, chosen.folder / "alone", target=target, **chosen.arguments)
    for file in ("model.safetensors", "curve.parquet", "runs/trained.test.run.gz"):
        if file != "curve.parquet":  # it has times
            assert (alone.folder / file).read_bytes() == (chosen.done.folder / file).read_bytes()
    keys = ("target", "merge", "hybrid", "triples", "comparisons", "measures")
    assert all(alone.report[key] == chosen.done.report[key] for key in keys)
    assert "choice" not in alone.report and choice_table(alone.report) == []


def test_what_the_choice_promises_is_measured_on_the_test_queries(chosen):
    report, choice = chosen.done.report, chosen.done.report["choice"]
    merge = report["merge"]
    gain = merge["values"][merge["alphas"].index(merge["alpha"])] - merge["values"][0]
    values = chosen.done.per_query("nDCG@10")["difference"]
    assert choice["validation_gain"] == pytest.approx(gain)
    assert choice["test_gain"] == pytest.approx(values.mean())
    assert choice["optimism"] == pytest.approx(gain - values.mean())
    expected = np.hypot(merge["standard_error"], values.sem())
    assert choice["standard_error"] == pytest.approx(expected)
    said = f"an optimism of {number(choice['optimism'], sign=True)} (standard error {number(expected)})"
    assert said in report["verdict"]
    assert said in (chosen.done.folder / "README.md").read_text("utf-8")
    undecided = copy.deepcopy(report)
    undecided["choice"]["standard_error"] = None
    assert (
        "standard error"
        not in verdict(undecided).split(" was the best on")[1].split(". The trained")[0]
    )


def test_of_folds_the_promise_is_that_of_their_encoders():
    qrels = {f"q{i}": {"d": 1} for i in range(12)}
    runs = {
        name: {qid: {docid: 1.0} for qid in qrels}
        for name, docid in (("start", "x"), ("trained", "d"))
    }
    rows = [{"target": "softmax", "value": 0.5, "per_query": {"q0": 0.5}}]
    folds = [{"merge": {"difference": gain, "standard_error": 0.1}} for gain in (0.2, 0.4)]
    found = about_choice(rows, {"merge": {"difference": 0.0}, "folds": folds}, qrels, runs)
    assert found["validation_gain"] == pytest.approx(0.3)
    assert (found["test_gain"], found["standard_error"]) == (1, None)


def test_table_and_figure_have_all_losses(chosen):
    report = chosen.done.report
    head, *rows = choice_table(report)
    assert len({*head}) == len(head) == 5
    assert [row[0] for row in rows] == ["distributed", "adaptive", "softmax", "static 0.1", "static 0.3", "static 0.5"]  # fmt: skip
    assert [row[0] for row in rows if row[-1] == "chosen"] == [rows[ALL.index(report["target"])][0]]
    for row, found in zip(rows, report["choice"]["trainings"], strict=True):
        assert row[1] == number(found["value"])
        assert row[3].endswith(found["against_start"]["verdict"])
        assert _train_text(report, "corpus").count(row[3]) >= 1
    (axis,) = explore.losses_figure(chosen.done).axes
    drawn = {line.get_label(): line.get_ydata() for line in axis.get_lines()}
    for row, found in zip(rows, report["choice"]["trainings"], strict=True):
        np.testing.assert_array_equal(drawn[row[0]], found["values"])


# ---- what is forgotten -------------------------------------------------------------------------------


def test_the_second_collection_is_ranked_before_and_after(chosen):
    found = chosen.done.report["also"]
    assert (found["name"], found["source"], found["set"], found["n"]) == ("invented", chosen.other, "test", 80)  # fmt: skip
    for name, model in (("start", chosen.arguments["model"]), ("trained", str(chosen.done.folder))):
        there = evaluate_encoder(chosen.other, model, measures=["nDCG@10"], device="cpu")
        assert there.evaluation.mean["nDCG@10"] == pytest.approx(found[name])
    assert f"On invented (80 queries) " in chosen.done.report["verdict"]  # noqa: F541


def evaluation(values) -> Evaluation:
    per_query = {f"q{i}": float(value) for i, value in enumerate(values)}
    return Evaluation({"nDCG@10": float(np.mean(values))}, {"nDCG@10": per_query})


@pytest.mark.parametrize("shift", [-0.2, -0.06, -0.03, -0.01, 0.1])
def test_not_worse_is_a_one_sided_test(shift):
    rng = np.random.default_rng(4)
    start = rng.random(60)
    trained = start + shift + rng.normal(0, 0.08, 60)
    test = ttest_1samp(trained - start, -0.05, alternative="greater")
    found = not_worse(evaluation(trained), evaluation(start))
    assert (found["verdict"] == "not worse") == (test.pvalue < 0.05)
    assert (found["verdict"] == "worse") == (shift < -0.05)
    assert found["trained"] - found["start"] == pytest.approx(found["difference"])


def test_nothing_is_concluded_from_few_queries_or_from_nothing_found():
    few, none = evaluation([0.5] * 9), evaluation([0.0] * 40)
    assert not_worse(few, few)["verdict"] == "too few queries"
    assert not_worse(none, none)["verdict"] == "undecided"
    same = evaluation([0.5, 0.25] * 20)
    assert not_worse(same, same)["verdict"] == "not worse"


def test_a_second_collection_without_judgements_is_refused_before_training(tmp_path, chosen):
    also = str(tmp_path)
    (tmp_path / "collection.tsv").write_text("d1\tt1 t2\n")
    with pytest.raises(DataError, match="no query has a relevant passage"):
        second_collection(SimpleNamespace(also=also, settings=FEW, seed=1))
    with pytest.MonkeyPatch.context() as patch:
        patch.delattr(finetuning, "prepare")
        with pytest.raises(DataError, match="no query has a relevant passage"):
            finetune(chosen.source, tmp_path / "output", also=also, **chosen.arguments)
