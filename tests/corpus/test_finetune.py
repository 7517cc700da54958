"""Fine-tuning on one's own collection: where it helps, where it cannot, what is written, and what a second call finds."""

from __future__ import annotations

import dataclasses
import importlib.util
import random
import re
from collections import Counter
from functools import partial
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import pytrec_eval
import torch
from safetensors.torch import load_file
from scipy.stats import sem
from sentence_transformers import SentenceTransformer
from transformers import BertConfig, BertModel

from adaptive_margins import training
from adaptive_margins.corpus import finetune as finetuning
from adaptive_margins.corpus import finetuned, prepare
from adaptive_margins.corpus.finetune import finetune
from adaptive_margins.corpus.finetuned import RUNS, Finetuned, verdict
from adaptive_margins.corpus.settings import FinetuneError, Settings
from adaptive_margins.corpus.validation import Validation, gain
from adaptive_margins.data.collection import Collection, Texts
from adaptive_margins.errors import ArgumentError
from adaptive_margins.evaluation.measures import Evaluation
from adaptive_margins.files import WriteError, locked
from adaptive_margins.retrieval.embedding_cache import LIMIT_VARIABLE
from adaptive_margins.training import TrainingError, newest_checkpoint
from conftest import SPECIAL, flip, in_child, kill_in, write_tokenizer

PASSAGES = 120
TOPIC = [f"t{number}" for number in range(30)]  # what passages are about
FILLER = [f"f{number}" for number in range(8)]  # what says nothing
SETTINGS = Settings(
    batch_size=16, triples=960, passes=10, learning_rate=1e-2, checks=4, patience=2, check_passages=60
)  # fmt: skip


def collection_of(train_on_chance: bool) -> Collection:
    """Passages of topic words and fillers; queries with topic words of theirs, among other fillers.

    An encoder that knows neither can learn to overlook fillers, unless what it is trained on is drawn by lot.
    """
    rng = random.Random(3)
    topics = [rng.sample(TOPIC, 5) for _ in range(PASSAGES)]
    ids = [f"d{row}" for row in range(PASSAGES)]
    texts = [" ".join(topic + rng.choices(FILLER, k=6)) for topic in topics]
    queries, qrels = {}, {}
    for name, size in (("train", 96), ("validation", 60), ("test", 80)):
        rows = [rng.randrange(PASSAGES) for _ in range(size)]
        qids = [f"{name}{number}" for number in range(size)]
        asked = [" ".join(rng.sample(topics[row], 3) + rng.choices(FILLER, k=6)) for row in rows]
        if train_on_chance and name == "train":
            rng.shuffle(rows)
        queries[name] = Texts(qids, asked)
        qrels[name] = {qid: {ids[row]: 1} for qid, row in zip(qids, rows, strict=True)}
    return Collection("invented", Texts(ids, texts), queries, qrels)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A random encoder of one layer that hardly does more than average its words, so that alike texts are near."""
    folder = tmp_path_factory.mktemp("encoder")
    words = [*SPECIAL, *TOPIC, *FILLER]
    config = BertConfig(
        vocab_size=len(words), hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(7)
    model = BertModel(config)
    torch.nn.init.normal_(model.embeddings.word_embeddings.weight)
    model.save_pretrained(folder)
    write_tokenizer(folder, words=words)
    return str(folder)


def saved(collection, folder):
    collection.save(folder)
    return str(folder)


@pytest.fixture(scope="module")
def helped(tmp_path_factory, encoder):
    """A finished fine-tuning that helps, and all curves it told of."""
    folder = tmp_path_factory.mktemp("helped")
    collection, curves = collection_of(train_on_chance=False), []
    source = saved(collection, folder / "collection")
    arguments = {"model": encoder, "device": "cpu", "settings": SETTINGS, "measures": ("nDCG@10", "R@100")}  # fmt: skip
    done = finetune(source, folder / "output", on_check=curves.append, **arguments)
    return SimpleNamespace(
        folder=folder, source=source, arguments=arguments, collection=collection, done=done, curves=curves,
    )  # fmt: skip


def test_a_learnable_collection_is_learnt_and_said_to_be(helped):
    report = helped.done.report
    assert report["kept"] == "trained"
    assert report["best_step"] > 0
    before, after = (report["measures"][name]["nDCG@10"] for name in ("start", "trained"))
    assert after > before + 0.05
    compared = report["comparisons"]["trained vs start"]
    assert compared["verdict"] == "better"
    assert compared["ci"][0] <= after - before <= compared["ci"][1]
    assert report["verdict"].startswith(
        "The trained encoder is better than the one it started from: nDCG@10 "
    )


def test_the_report_is_on_disk(helped):
    report = helped.done.report
    assert report["model_dir"] == str(helped.done.folder)
    assert report["collection"]["sets"] == {"train": 96, "validation": 60, "test": 80}
    assert report["triples"]["used"] <= 960
    assert (report["settings"]["steps"], report["settings"]["check_every"]) == (60, 15)
    assert report["bm25"] == {"queries": 80, "without_hits": 0, "bigram_passages": 0}
    assert Finetuned.load(helped.done.folder).report == report
    assert not (helped.folder / "output.work").exists()
    assert (helped.done.folder / "README.md").read_text().strip()


def test_measures_are_those_of_the_written_runs(helped):
    done = helped.done
    qrels, queries = done.qrels, done.queries
    assert qrels == helped.collection.qrels["test"]
    assert queries == helped.collection.queries["test"]
    judge = pytrec_eval.RelevanceEvaluator(qrels, {"ndcg_cut_10", "recall_100"})
    for name in RUNS:
        found = judge.evaluate(done.run(name))
        for measure, theirs in (("nDCG@10", "ndcg_cut_10"), ("R(rel=1)@100", "recall_100")):
            expected = sum(values[theirs] for values in found.values()) / len(qrels)
            assert done.report["measures"][name][measure] == pytest.approx(expected, abs=1e-9)

    table = done.per_query("nDCG@10")
    assert sorted(table["qid"]) == sorted(qrels)
    assert table["difference"].is_monotonic_increasing
    for name in RUNS:
        assert table[name].mean() == pytest.approx(done.report["measures"][name]["nDCG@10"])
    row = table.iloc[0]
    assert row["query"] == queries[row["qid"]]


def test_output_is_a_plain_sentence_transformers_folder(helped):
    model = SentenceTransformer(str(helped.done.folder), device="cpu")
    passages, queries = helped.collection.passages, helped.done.queries
    encoded = [
        model.encode(list(texts), normalize_embeddings=True)
        for texts in (queries.texts, passages.texts)
    ]
    scores = encoded[0] @ encoded[1].T
    run = helped.done.run("trained")
    for row, qid in enumerate(queries.ids):
        found = np.array([scores[row, passages.row(docid)] for docid in run[qid]])
        np.testing.assert_allclose(found, list(run[qid].values()), atol=1e-5)
        assert len(found) == 100
        assert found.min() >= np.sort(scores[row])[-100] - 1e-5


def test_curve_and_targets_are_kept(helped):
    report, curve, targets = helped.done.report, helped.done.curve, helped.done.targets
    assert curve["step"].tolist() == [*range(0, report["stop_step"] + 1, 15)]
    assert len(targets) == report["stop_step"]
    best = curve.loc[curve["nDCG@10"].idxmax()]
    assert best["step"] == report["best_step"]
    assert report["validation"]["best"]["nDCG@10"] == best["nDCG@10"]
    assert report["validation"]["start"]["nDCG@10"] == curve["nDCG@10"].iloc[0]
    pd.testing.assert_frame_equal(helped.curves[-1], curve)
    assert [len(c) for c in helped.curves] == list(range(1, len(curve) + 1))


def came_to_the_same(done, expected):
    assert not done.folder.with_name(f"{done.folder.name}.work").exists()
    differing = {"model_dir", "seconds"}
    assert {k: v for k, v in done.report.items() if k not in differing} == {
        k: v for k, v in expected.report.items() if k not in differing
    }
    for file in ("model.safetensors", "runs/trained.test.run.gz", "targets.parquet"):
        assert (done.folder / file).read_bytes() == (expected.folder / file).read_bytes()


@pytest.mark.filterwarnings("ignore:.*damaged shards")
def test_a_second_call_goes_on_and_comes_to_the_same(helped, tmp_path, monkeypatch, capsys):
    output, curves = tmp_path / "output", []
    monkeypatch.setenv(LIMIT_VARIABLE, "1")

    def stop(curve):
        curves.append(curve)
        if len(curve) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        finetune(helped.source, output, on_check=stop, cache=False, **helped.arguments)
    assert not output.exists()
    assert list((tmp_path / "output.work").glob("training-*/checkpoint-15/COMPLETE"))
    (embeddings,) = (tmp_path / "output.work" / "embeddings").glob("*/passages/embeddings.npy")
    flip(embeddings)  # a damaged file is computed again
    curves.clear()
    done = finetune(helped.source, output, on_check=curves.append, cache=False, **helped.arguments)
    assert curves[0]["step"].tolist() == [0, 15]
    came_to_the_same(done, helped.done)
    assert "step 60 of 60: validation nDCG@10" in capsys.readouterr().err


def test_killed_at_one_moment_after_the_other_it_comes_to_the_same(helped, tmp_path):
    output = tmp_path / "output"

    def killed(*moment):
        kill_in(*moment)
        finetune(helped.source, output, **helped.arguments)

    for owner, name, call, checkpoint in (
        (prepare, "_triples", 1, None),
        (training._Trainer, "training_step", 7, None),
        (training._Trainer, "training_step", 40, "checkpoint-30"),
        (torch, "lerp", 30, "checkpoint-45"),
        (finetuning, "hybrid", 1, "checkpoint-45"),
        (finetuning, "write_results", 1, "checkpoint-45"),
    ):
        assert in_child(partial(killed, owner, name, call)) == "died"
        assert not output.exists()
        work = next(iter((tmp_path / "output.work").glob("training-*")), tmp_path)
        found = newest_checkpoint(work)
        assert (found and found.name) == checkpoint, (name, call)
    came_to_the_same(finetune(helped.source, output, **helped.arguments), helped.done)


def test_where_it_cannot_help_the_original_is_kept_and_that_is_said(tmp_path, encoder):
    source = saved(collection_of(train_on_chance=True), tmp_path / "collection")
    (tmp_path / "output").mkdir()  # an empty folder is as good as none
    report_to = [name for name in ("tensorboard",) if importlib.util.find_spec(name)]
    done = finetune(
        source, tmp_path / "output", model=encoder, device="cpu", settings=SETTINGS, negatives="encoder",
        report_to=report_to,
    )  # fmt: skip
    assert all(any((done.folder / name).iterdir()) for name in report_to)
    report = done.report
    assert report["kept"] == "start"
    assert report["measures"]["trained"] == report["measures"]["start"]
    assert report["measures"]["start"]["nDCG@10"] > 0.1  # there was something to lose
    assert report["comparisons"]["trained vs start"]["difference"] == 0
    assert report["verdict"].startswith("Training did not help on the validation queries (")
    assert "the original encoder was kept" in report["verdict"]
    assert done.run("trained") == done.run("start")
    assert report["stop_step"] < report["settings"]["steps"]  # stopped early
    assert report["triples"]["negatives"] == "encoder"
    kept = load_file(done.folder / "model.safetensors")
    for name, weights in load_file(f"{encoder}/model.safetensors").items():
        assert weights.equal(kept[name])


def test_a_gain_that_chance_would_explain_does_not_count(helped, encoder, tmp_path):
    settings = dataclasses.replace(SETTINGS, standard_errors=100.0, checks=2)
    done = finetune(helped.source, tmp_path / "output", model=encoder, device="cpu", settings=settings)  # fmt: skip
    report = done.report
    validation = report["validation"]
    assert 0 < validation["difference"] < 100 * validation["standard_error"]
    assert report["best_step"] > 0
    assert report["kept"] == "start"
    assert "not more than 100 standard error" in report["verdict"]
    found = load_file(done.folder / "model.safetensors")
    expected = load_file(f"{encoder}/model.safetensors")
    assert all(weights.equal(found[name]) for name, weights in expected.items())


def test_a_training_that_ends_in_infinity_names_its_texts(helped, tmp_path):
    settings = dataclasses.replace(SETTINGS, triples=32, learning_rate=float("inf"))
    with pytest.raises(TrainingError, match=r"positive negative: train\d+ d\d+ d\d+; train"):
        finetune(helped.source, tmp_path / "output", **{**helped.arguments, "settings": settings})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"target": "dynamic"}, "target is 'dynamic'"),
        ({"target": float("nan")}, "target is nan"),
        ({"measures": ("nDCG@10", "Bang@5")}, "cannot compute the measure 'Bang@5'"),
        ({"measures": ()}, "no measure was given"),
        ({"negatives": "random"}, "negatives is 'random'; expected 'bm25' or 'encoder'"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**32}, "seed is 4294967296"),
        ({"folds": 2}, "folds is 2; expected at least 3"),
        (
            {"also": "./no such folder"},
            "also is ./no such folder, the collection to train on; expected another one",
        ),
        ({"triples": 1}, "triples is 1; expected at least 2"),
        ({"report_to": ("printer",)}, "cannot report to 'printer'; expected any of tensorboard, "),
    ],
)
def test_wrong_values_are_told_before_anything_is_read(tmp_path, values, said):
    with pytest.raises((ArgumentError, TrainingError), match=re.escape(said)):
        finetune("no such folder", tmp_path / "output", **{"device": "cpu", **values})
    assert not list(tmp_path.iterdir())


def test_an_output_that_holds_something_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(WriteError, match="is not an empty folder"):
        finetune("no such folder", tmp_path)
    with pytest.raises(WriteError, match="is not an empty folder"):
        finetune("no such folder", tmp_path / "thesis.txt")
    with locked(tmp_path / "new"), pytest.raises(WriteError, match="another process is writing"):
        finetune("no such folder", tmp_path / "new")
    assert (tmp_path / "thesis.txt").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_folder_that_is_no_finetuning_is_an_error(tmp_path):
    with pytest.raises(FinetuneError, match="cannot be read"):
        Finetuned.load(tmp_path)


def test_a_corpus_alone_gets_pseudo_queries(tmp_path, capsys):
    rng = random.Random(4)
    texts = []
    for _ in range(60):
        words = ["".join(rng.choices("abcdefgh", k=6)) for _ in range(40)]
        texts.append(" ".join(" ".join(words[i : i + 10]).capitalize() + "." for i in (0, 10, 20, 30)))  # fmt: skip
    lines = [f"d{row}\t{text}\n" for row, text in enumerate(texts)]
    (tmp_path / "collection.tsv").write_text("".join(lines))
    found = prepare.open_split(str(tmp_path), 30, seed=1)
    queries, qrels = found.collection.queries, found.collection.qrels
    assert found.split == ""
    assert found.pseudo["queries"] == sum(map(len, queries.values())) == 52
    assert sum(found.pseudo["kinds"].values()) == 52
    assert len(queries["train"]) == 30
    for qid, judged in qrels["test"].items():
        assert queries["test"][qid] not in found.collection.passages[next(iter(judged))]
    assert "There are no real queries" in capsys.readouterr().err
    found.collection.save(tmp_path / "saved")  # as `mine` does
    assert prepare.open_split(str(tmp_path / "saved"), 30, seed=1).pseudo == found.pseudo


# ---- triples -----------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*left out")
def test_given_triples_are_chosen_by_seed_or_repeated():
    passages = Texts(["a", "b", "c", "empty"], ["one", "two", "three", " "])
    train = {"train": Texts(["q", "r"], ["what", "who"])}
    own = [("q", "a", "b"), ("q", "a", "c"), ("r", "c", "a"), ("r", "empty", "a"), ("q", "a", "empty")]  # fmt: skip
    collection = Collection("own", passages, train, {"train": {}}, triples=own)
    few = Settings(triples=100, passes=4)
    with pytest.warns(UserWarning, match="2 with an empty text, of 5 checked"):
        triples, facts = prepare.given_triples(collection, few, None, seed=1)
    left_out = {name: count for name, count in facts["left_out"].items() if count}
    assert left_out == {"checked": 5, "without_text": 2}
    assert sorted(Counter(triples).values()) == [2, 3, 3]
    assert set(triples) == set(own[:3])  # none without text; 4 passes over 2 pairs
    assert len(prepare.given_triples(collection, few, 11, seed=1)[0]) == 11
    assert len(prepare.given_triples(collection, Settings(passes=1), None, seed=1)[0]) == 3
    many = dataclasses.replace(collection, triples=[("q", "a", "b"), *[("r", "c", "a")] * 50])
    chosen = [prepare.given_triples(many, Settings(triples=9), None, seed=s)[0] for s in (1, 1, 2)]
    assert [len(c) for c in chosen] == [9, 9, 9]
    assert chosen[0] == chosen[1]


def test_triples_that_contradict_the_judgements_are_left_out_and_none_is_an_error():
    passages = Texts(["a", "b", "c", "d"], ["one", "two", "ONE ", "four"])
    qrels = {"train": {"q": {"a": 1, "b": 1}}}
    train = {"train": Texts(["q"], ["what"])}
    bad = [("q", "a", "b"), ("q", "a", "c")]
    collection = Collection("own", passages, train, qrels, triples=[*bad, ("q", "a", "d")])
    with pytest.warns(UserWarning, match=r"own: .* 1 whose negative is judged.*, of 3 checked") as told:  # fmt: skip
        triples, facts = prepare.given_triples(collection, Settings(), 4, seed=1)
    assert len(told) == 1
    assert triples == [("q", "a", "d")] * 4
    assert (facts["available"], facts["distinct"], facts["negatives"]) == (3, 1, "given")
    left_out = {name: count for name, count in facts["left_out"].items() if count}
    assert left_out == {"checked": 3, "negative_relevant": 1, "same_text": 1}
    with pytest.raises(FinetuneError, match=r"no triple to train on.*of 2 checked"):
        prepare.given_triples(dataclasses.replace(collection, triples=bad), Settings(), None, 1)


def test_numbered_triples_name_each_text_once_and_with_its_prompt():
    passages = Texts(["a", "b", "c"], ["one", "two", "three"])
    collection = Collection("own", passages, {"train": Texts(["r", "q"], ["who", "what"])}, {"train": {}})  # fmt: skip
    triples = [("q", "c", "a"), ("r", "a", "b"), ("q", "c", "b")]
    rows, queries, texts = prepare.numbered(triples, collection, ("ask: ", "say: "))
    assert rows.shape == (3, 3)
    for (qid, positive, negative), (q, p, n) in zip(triples, rows.T, strict=True):
        assert (queries.ids[q], texts.ids[p], texts.ids[n]) == (qid, positive, negative)
        assert queries.texts[q] == "ask: " + collection.queries["train"][qid]
        assert [texts.texts[row] for row in (p, n)] == [f"say: {passages[d]}" for d in (positive, negative)]  # fmt: skip
    assert (len(queries), len(texts)) == (2, 3)


# ---- validation --------------------------------------------------------------------------------------


def ranked(offset, queries=30, depth=60, of=4000):
    return {
        f"q{q}": {f"d{(offset + 61 * q + rank) % of}": -float(rank) for rank in range(depth)}
        for q in range(queries)
    }


@pytest.mark.parametrize(
    ("budget", "queries", "depth"),
    [(5000, 30, None), (3700, 30, 60), (3100, 30, 50), (1300, 30, 20), (700, 30, 10), (450, 21, 10), (10, 20, 10)],
)  # fmt: skip
def test_validation_ranks_as_much_as_an_evaluation_may_cost(budget, queries, depth):
    ids = [f"d{row}" for row in range(4000)]
    texts = Texts([f"q{q}" for q in range(30)], ["what"] * 30)
    qrels = {f"q{q}": {f"d{3999 - q}": 1, f"d{q}": 0} for q in range(30)}
    collection = Collection("c", Texts(ids, ["text"] * 4000), {"validation": texts}, {"validation": qrels})  # fmt: skip
    runs = [ranked(0), ranked(2000)]
    found = Validation(collection, runs, budget, "fp32", 1)
    assert len(found.queries) == queries
    assert set(found.qrels) == set(found.queries.ids)
    expected = set(ids)
    if depth:
        expected = {d for q in found.qrels for run in runs for d in list(run[q])[:depth]}
        expected |= {f"d{3999 - int(q[1:])}" for q in found.qrels}
    assert set(found.passages.ids) == expected
    assert len(found.passages) <= budget or queries == 20
    assert found.passages.ids == sorted(found.passages.ids, key=ids.index)


@pytest.mark.parametrize(
    ("text", "passages", "asked", "triples", "every", "checked"),
    [
        (58, 11_429, None, 2048, 8, 1000),  # as before
        (190, 1400, None, 1702, 7, 448),
        (256, 5000, None, 305, 4, 256),
        (256, 50_000, None, 305, 4, 256),
        (256, 5000, 2048, 2048, 8, 512),
        (9000, 100, None, 32, 4, 256),
    ],
)  # fmt: skip
def test_long_passages_get_fewer_triples_evaluations_and_passages_for_each(text, passages, asked, triples, every, checked):  # fmt: skip
    settings = Settings()
    job = SimpleNamespace(settings=settings, triples=asked)
    tokens = np.full(asked or settings.triples, 2 * text + 12)
    found = prepare._affordable(job, tokens, float(text * passages))
    assert found == pytest.approx(triples, rel=0.03)
    assert prepare.batches(settings, found) == (32, every)
    assert prepare._budget(settings, found, text) == pytest.approx(checked, rel=0.03)
    if not asked and found < settings.triples:
        assert found == 32 or tokens[: found + 1].sum() > max(800_000 - text * passages / 2, 160_000) >= tokens[:found].sum()  # fmt: skip


def test_gain_has_the_standard_error_of_paired_differences():
    rng = np.random.default_rng(2)
    values = rng.random((3, 12))
    rows = [
        (step, f"q{q}", measure, values[i, q] if measure == "nDCG@10" else 9.0)
        for i, step in enumerate((0, 5, 10))
        for q in range(12)
        for measure in ("nDCG@10", "RR@10")
    ]
    checks = pd.DataFrame(rows, columns=["step", "qid", "measure", "value"])
    found, error = gain(checks, 10)
    assert found == pytest.approx((values[2] - values[0]).mean())
    assert error == pytest.approx(sem(values[2] - values[0]))
    assert np.isnan(gain(checks[checks["qid"] == "q3"], 10)[1])


# ---- comparisons and verdict -------------------------------------------------------------------------


def scored(*values):
    per_query = {f"q{i}": value for i, value in enumerate(values)}
    return Evaluation({"nDCG@10": float(np.mean(values))}, {"nDCG@10": per_query})


BETTER = ([0.5, 0.7, 0.6, 0.8] * 5, [0.3, 0.6, 0.5, 0.5] * 5)


@pytest.mark.parametrize(
    ("a", "b", "verdict", "said"),
    [
        (*BETTER, "better", "It is better than BM25: nDCG@10 .650 against .475, +.175 [+.135, "),
        (*BETTER[::-1], "worse", "It is worse than BM25: nDCG@10 .475 against .650, −.175 [−.215, "),
        ([0.5, 0.6] * 20, [0.51, 0.59] * 20, "equivalent", "It is equivalent to BM25 within ±.050: nDCG@10 .550 against .550"),
        ([0.0, 1.0, 0.5] * 4, [1.0, 0.0, 0.4] * 4, "undecided", "Whether it is better or worse than BM25 is undecided: "),
        ([0.5] * 9, [0.25] * 9, "too few queries", "There are too few queries to compare it with BM25: nDCG@10 .500 against .250"),
    ],
)  # fmt: skip
def test_words_follow_the_tests(a, b, verdict, said):
    pair = {"trained": scored(*a), "bm25": scored(*b)}
    x, y = (evaluation.per_query["nDCG@10"] for evaluation in pair.values())
    found = finetuned.compared(x, y, "nDCG@10")
    assert found["verdict"] == verdict
    assert found["difference"] == pytest.approx(np.mean(a) - np.mean(b))
    assert (found["ci"] is None) == (found["p_t"] is None) == (len(a) < 10)
    report = {
        "comparisons": {"trained vs bm25": found},
        "measures": {name: evaluation.mean for name, evaluation in pair.items()},
    }
    text = finetuned._compared(report, "trained", "bm25")
    assert text.startswith(said)
    more = re.search(r"About ([\d,]+) more judged queries would show (a difference|equivalence)$", text)  # fmt: skip
    assert bool(more) == (verdict == "undecided")


def test_a_comparison_is_withheld_where_bm25_finds_nothing_for_most_queries_or_few_are_usable():
    evaluations = {name: scored(*BETTER[0]) for name in RUNS}
    for usable, without, expected in (
        (10, 10, ["equivalent"] * 4),
        (20, 11, ["equivalent", "withheld", "withheld", "withheld"]),
        (9, 0, ["too few queries"] * 4),
    ):
        facts = {"queries": 20, "without_hits": without}
        found = finetuned.comparisons(evaluations, "nDCG@10", usable, facts)
        assert [each["verdict"] for each in found.values()] == expected
        assert all((each["p_tost"] is None) == (each["verdict"] != "equivalent") for each in found.values())  # fmt: skip


def test_a_verdict_names_what_limits_it(helped):
    report = helped.done.report
    plain = verdict(report)
    assert plain.endswith("over 80 test queries.")
    weights = {"weight": 0.4, "queries": 60}
    fused = verdict({**report, "hybrid": weights, "merge": {**report["merge"], "alpha": 0.25}})
    assert "are 0.25 · the trained + 0.75 · the original ones" in fused
    assert "Its weight next to BM25, chosen on validation, is 0.4 (" in fused
    assert fused.count("Its fusion with BM25") == 2
    alone = verdict({**report, "hybrid": {**weights, "weight": 1.0}})
    assert "is 1 (" in alone and "Its fusion with BM25" not in alone
    assert "pseudo" not in plain and "nothing for" not in plain
    pseudo = {**report["collection"], "pseudo": {"queries": 9, "kinds": {}}}
    bm25 = {"queries": 80, "without_hits": 40, "bigram_passages": 7}
    limited = verdict({**report, "collection": pseudo, "bm25": bm25, "relevant_queries": 31})
    for words in (
        "All queries are pseudo-queries",
        "nothing for 40 of 80",
        "7 of 120 passages",
        "of which 31 with a relevant passage",
    ):
        assert words in limited
    assert "not compared" not in limited


def test_numbers_have_three_digits():
    numbers = [finetuned.number(x) for x in (0.4123, -0.0036, 1.0, 0.0, -0.0001)]
    assert numbers == [".412", "−.004", "1.000", ".000", ".000"]
    assert finetuned.number(0.0271, sign=True) == "+.027"


def test_where_bm25_finds_nothing_for_most_queries_no_verdict_rests_on_it(tmp_path, encoder):
    collection = collection_of(train_on_chance=False)
    test = collection.queries["test"]
    asked = ["C++" if row < 41 else text for row, text in enumerate(test.texts)]
    queries = {**collection.queries, "test": Texts(test.ids, asked)}
    source = saved(dataclasses.replace(collection, queries=queries), tmp_path / "source")
    few = dataclasses.replace(SETTINGS, triples=32)
    with pytest.warns(UserWarning, match="41 of 80 queries, 'test0'"):
        done = finetune(source, tmp_path / "done", model=encoder, settings=few, device="cpu")
    assert done.report["bm25"] == {"queries": 80, "without_hits": 41, "bigram_passages": 0}
    verdicts = {pair: found["verdict"] for pair, found in done.report["comparisons"].items()}
    assert verdicts["trained vs bm25"] == verdicts["hybrid vs trained"] == "withheld"
    assert verdicts["trained vs start"] in ("equivalent", "better", "worse", "undecided")
    card = (tmp_path / "done" / "README.md").read_text("utf-8")
    for text in (done.report["verdict"], card):
        assert "nothing for 41 of 80 test queries" in text and "not compared with BM25" in text
