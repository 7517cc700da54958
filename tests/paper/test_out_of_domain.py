"""Collections that nothing was trained on: their texts, the checkpoints' scores on them, and the tests."""

from __future__ import annotations

import gc
import json
import shutil
import weakref

import numpy as np
import pandas as pd
import pytest
from safetensors.torch import load_file, save_file

from adaptive_margins import paper
from adaptive_margins.data.text import DataError
from adaptive_margins.data.words import words_of
from adaptive_margins.evaluation.measures import evaluate
from adaptive_margins.evaluation.significance import compare
from adaptive_margins.paper import runner
from adaptive_margins.paper.out_of_domain import ALL, FOLDER, TEST, OutOfDomain, word_overlap
from conftest import linked, plain_embeddings

MEASURE = "nDCG@10"


@pytest.fixture(scope="module")
def home(smoke, tmp_path_factory):
    """A home in which the first seed's distributed run had its best step before any training.

    What depends on that run is computed here, everything else was by the notebook.
    """
    names = ("runs", "collections", "cache", FOLDER)
    home = linked(smoke.home, tmp_path_factory.mktemp("home"), *names)
    run = smoke.store.get(smoke.experiments.variant_run("minilm-4", "distributed", False))
    for config in (home / FOLDER).glob("*/config.json"):
        if json.loads(config.read_text()).get("source") == run.run_id:
            shutil.rmtree(config.parent)
    state = dict(smoke.inputs.encoder("minilm-4").model.named_parameters())
    stored = home / "runs" / run.run_id
    start = {
        key: state[key].detach().contiguous() for key in load_file(stored / "last.safetensors")
    }
    shutil.rmtree(stored)
    checked = shutil.ignore_patterns("SHA256SUMS")  # its files are written to
    shutil.copytree(run.path, stored, ignore=checked)
    result = json.loads((stored / "result.json").read_text())
    save_file(start, stored / "selected.safetensors")
    (stored / "result.json").write_text(json.dumps({**result, "kept_step": 0}))
    return home


@pytest.fixture(scope="module")
def study(home):
    return OutOfDomain(paper.open("smoke", home, workers=1))


@pytest.fixture(scope="module")
def scores(study):
    frame = study.scores()
    return frame[frame["measure"] == MEASURE].drop(columns="measure")


def row(scores, **values):
    (found,) = scores[np.logical_and.reduce([scores[k] == v for k, v in values.items()])].to_dict(
        "records"
    )
    return found


def test_word_overlap_is_that_of_a_loop():
    one, other = ["The graph, the node", "an edge"], ["the edge of a graph graph"]
    p, q = ([w for text in texts for w in words_of(text)] for texts in (one, other))
    lower = upper = 0.0
    for word in {*p, *q}:
        shares = p.count(word) / len(p), q.count(word) / len(q)
        lower, upper = lower + min(shares), upper + max(shares)
    assert word_overlap(one, other) == pytest.approx(lower / upper, abs=1e-12)
    assert word_overlap(one, one) == pytest.approx(1)
    assert word_overlap(one, ["zygote"]) == 0


def test_texts_fit_the_lengths_and_are_not_those_of_the_training_collection(study):
    frame = study.domains().set_index("domain")
    assert list(frame.index) == ["jinja2", "pydantic"]
    assert (frame["queries"] == 20).all()
    assert frame["passages"].between(50, 60).all()
    assert frame["word_overlap"].between(0.05, 0.6).all()
    assert (frame["identical"] == 0).all()
    tokenizer = study.reproduction.inputs.encoder("minilm-4").whole.tokenizer
    for collection in study.collections.values():
        queries = collection.queries[TEST]
        for texts, length in ((queries.texts, 20), (collection.passages.texts, 12)):
            assert max(len(ids) for ids in tokenizer(list(texts))["input_ids"]) <= length
        assert set(collection.qrels[TEST]) == set(queries.ids)
        assert all(3 in judged.values() for judged in collection.qrels[TEST].values())
    trained = {*study.reproduction.inputs.collection.passages.texts}
    copied = next(iter(study.collections.values())).passages
    assert not trained & {*copied.texts}


def test_scores_are_those_of_the_checkpoints_own_embeddings(study, scores, home):
    """The last checkpoint's weights in the complete model, by Sentence Transformers, a text at a time."""
    inputs = study.reproduction.inputs
    config = study.reproduction.experiments.variant_run("minilm-4", "distributed", False)
    loaded = inputs.encoder("minilm-4")
    trained = loaded.fresh()
    trained.load_state_dict(study.reproduction.store.get(config).weights("last"), strict=False)
    model = loaded.whole_with(trained)
    for name, collection in study.collections.items():
        queries, passages = collection.queries[TEST], collection.passages
        product = plain_embeddings(model, queries.texts, 20) @ plain_embeddings(model, passages.texts, 12).T  # fmt: skip
        run = {q: dict(zip(passages.ids, map(float, s), strict=True)) for q, s in zip(queries.ids, product, strict=True)}  # fmt: skip
        expected = evaluate(collection.qrels[TEST], run, [MEASURE]).mean[MEASURE]
        found = row(scores, domain=name, target="distributed", checkpoint="last")
        assert found["value"] == pytest.approx(expected, abs=1e-4)
        stored = json.loads((home / FOLDER / found["run_ids"] / "config.json").read_text())
        assert (stored["source"], stored["checkpoint"]) == (config.run_id, "last")
        assert (home / "collections" / stored["collection"]).is_dir()


def test_the_selected_checkpoint_may_be_the_start(scores):
    assert "minilm-3" not in set(scores["encoder"])  # it is not the reference encoder
    for name in ("jinja2", "pydantic", ALL):
        start = row(scores, domain=name, encoder="minilm-4", target="zero-shot")
        selected = row(scores, domain=name, target="distributed", checkpoint="selected")
        assert selected["value"] == start["value"]
        assert (selected["difference"], selected["low"], selected["high"]) == (0, 0, 0)
        last = row(scores, domain=name, target="distributed", checkpoint="last")
        assert last["difference"] == pytest.approx(last["value"] - start["value"], abs=1e-12)
        assert last["low"] < last["difference"] < last["high"]
    # Where the last step is the selected one, both are one run.
    pair = [row(scores, domain="jinja2", target="static", in_batch=True, checkpoint=c) for c in ("selected", "last")]  # fmt: skip
    assert pair[0]["run_ids"] == pair[1]["run_ids"]
    everything = row(scores, domain=ALL, encoder="bm25")
    parts = [row(scores, domain=name, encoder="bm25")["value"] for name in ("jinja2", "pydantic")]
    assert everything["value"] == pytest.approx(np.mean(parts))  # as many queries each


def test_early_stopping_counts_the_runs_that_it_changes(study, scores):
    frame = study.early_stopping()
    frame = frame[frame["measure"] == MEASURE].set_index(["target", "in_batch"])
    assert frame["distinct"].tolist() == [0, 0, 0, 0, 1, 1]
    assert frame["runs"].tolist() == [1, 1, 1, 1, 1, 5]
    last = row(scores, domain=ALL, target="distributed", checkpoint="last")
    ours = frame.loc["distributed", False]
    assert ours["difference"] == pytest.approx(-last["difference"], abs=1e-12)
    assert (ours["low"], ours["high"]) == pytest.approx((-last["high"], -last["low"]), abs=1e-12)
    assert frame.loc[ALL, False]["difference"] == pytest.approx(ours["difference"] / 5, abs=1e-12)


def test_tests_are_over_queries_and_seeds(home):
    """Two collections of unequal size and three seeds, against a loop."""
    study = OutOfDomain(paper.open("smoke", home))
    draw = np.random.default_rng(1)
    rows = []
    for domain, count in (("a", 5), ("b", 9)):
        for q in range(count):
            for seed in (1, 2, 3):
                for checkpoint in ("selected", "last"):
                    rows.append(("minilm-4", "static", True, checkpoint, seed, f"s{seed}", domain, f"q{q}",
                                 MEASURE, draw.random(), f"{domain}{checkpoint}{seed}"))  # fmt: skip
            start = ("minilm-4", "zero-shot", False, "", 0, "", domain, f"q{q}")
            rows.append((*start, MEASURE, draw.random(), domain))
    columns = ["encoder", "target", "in_batch", "checkpoint", "seed", "source", "domain", "qid", "measure", "value", "run_id"]  # fmt: skip
    study.results = pd.DataFrame(rows, columns=columns)
    study.collections = {"a": None, "b": None}

    def by_seed(target, checkpoint, domains):
        found: dict[int, dict[str, float]] = {}
        for r in rows:
            if (r[1], r[3]) == (target, checkpoint) and r[6] in domains:
                found.setdefault(r[4], {})[r[6] + r[7]] = r[9]
        return list(found.values())

    scores = study.scores()
    for name, domains in (("a", "a"), ("b", "b"), (ALL, "ab")):
        ours, start = by_seed("static", "last", domains), by_seed("zero-shot", "", domains)
        expected, found = compare(ours, start), row(scores, domain=name, checkpoint="last")
        assert found["difference"] == pytest.approx(expected.difference)
        assert (found["low"], found["high"]) == pytest.approx(expected.ci)
        assert found["value"] == pytest.approx(np.mean([v for s in ours for v in s.values()]))
    expected = compare(by_seed("static", "selected", "ab"), by_seed("static", "last", "ab"))
    for found in study.early_stopping().to_dict("records"):  # the one target, and all targets
        assert (found["distinct"], found["runs"]) == (3, 3)
        assert (found["low"], found["high"]) == pytest.approx(expected.ci)


def test_a_second_call_reads(study, scores, home, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("computed again")

    monkeypatch.setattr(runner.Runner, "execute", refuse)
    monkeypatch.setattr(OutOfDomain, "_package", refuse)
    again = OutOfDomain(paper.open("smoke", home, workers=1)).scores()
    pd.testing.assert_frame_equal(again, study.scores())


def test_shorter_passages_are_another_collection(study, home, monkeypatch):
    built, package = [], OutOfDomain._package
    monkeypatch.setattr(OutOfDomain, "_package", lambda *a: built.append(a) or package(*a))
    for words in (30, 20):  # the profile has 30
        values = {"collection__max_words": words, "out_of_domain__packages": ["jinja2"]}
        _ = OutOfDomain(paper.open("smoke", home, **values)).collections
    assert len(built) == 1


def test_no_collection_stays_in_memory_with_its_encoders(study):
    inputs = []

    def runs(collection):
        on = study._on(collection)
        on.inputs.encoder("minilm-3")
        inputs.append(weakref.ref(on.inputs))

    for collection in study.collections.values():
        runs(collection)
    gc.collect()
    assert [reference() for reference in inputs] == [None, None]


def test_a_folder_of_the_readers(home, tmp_path, study):
    folder = tmp_path / "mine"
    folder.mkdir()
    long = " ".join(f"word{n}" for n in range(40))
    (folder / "collection.tsv").write_text(f"a\tthe graph\nb\ta node {long}\nc\tan edge\n")
    (folder / "queries.tsv").write_text("q1\tgraph\nq2\tnode\nq3\tunjudged\n")
    (folder / "qrels.txt").write_text("q1 0 a 1\nq2 0 b 2\n")
    opened = OutOfDomain(paper.open("smoke", home, workers=1), str(folder)).collections["mine"]
    assert opened.queries[TEST].ids == ["q1", "q2"]
    assert opened.passages["b"] == "a node word0 word1 word2 word3"  # twelve tokens
    (folder / "queries.tsv").write_text("a\tgraph\nb\tnode\n")
    (folder / "qrels.txt").write_text("a 0 a 1\nb 0 b 2\n")
    with pytest.raises(DataError, match="2 queries are passages"):
        _ = OutOfDomain(paper.open("smoke", home), str(folder)).collections
    for name in ("queries.tsv", "qrels.txt"):
        (folder / name).unlink()
    with pytest.raises(DataError, match="no judged test queries"):
        _ = OutOfDomain(paper.open("smoke", home), str(folder)).collections


def write_folder(folder, passages, queries, qrels):
    folder.mkdir()
    files = {"collection.tsv": passages, "queries.tsv": queries, "qrels.txt": qrels}
    for name, lines in files.items():
        (folder / name).write_text("".join(f"{line}\n" for line in lines))
    return str(folder)


PASSAGES = ["a\tthe graph", "b\ta node", "e\t", "z\t\u200b\u200b"]
QUERIES = ["q1\tgraph", "q2\tnode", "q3\tmatrix", "q4\t\u200b"]


def test_what_has_no_text_is_left_out_with_its_judgements(home, study, tmp_path):
    """A zero-width space is no token of any encoder."""
    qrels = ["q1 0 a 1", "q1 0 e 1", "q2 0 b 1", "q2 0 z 0", "q3 0 e 1", "q4 0 a 1"]
    folder = write_folder(tmp_path / "mine", PASSAGES, QUERIES, qrels)
    with pytest.warns(UserWarning, match="2 passages, 2 queries and 4 judgements"):
        opened = OutOfDomain(paper.open("smoke", home), folder).collections["mine"]
    assert (opened.passages.ids, opened.queries[TEST].ids) == (["a", "b"], ["q1", "q2"])
    assert opened.qrels == {TEST: {"q1": {"a": 1}, "q2": {"b": 1}}}


def test_binary_judgements_do_not_reach_a_level_of_2(home, study, tmp_path, monkeypatch):
    folder = write_folder(
        tmp_path / "mine", PASSAGES[:2], QUERIES[:2], ["q1 0 a 1", "q2 0 b 1", "q2 0 a 0"]
    )
    monkeypatch.chdir(folder)
    opened = OutOfDomain(paper.open("smoke", home, workers=1), ".")
    monkeypatch.setattr(
        OutOfDomain, "_runs", lambda self, c: [("minilm", "zero-shot", False, "", 0, "", self._on(c).bm25())]
    )  # fmt: skip
    found = opened.results.groupby("domain")["measure"].unique().map(list)
    both = [MEASURE, "R(rel=2)@20"]
    assert dict(found) == {"jinja2": both, "pydantic": both, "mine": [MEASURE]}


@pytest.mark.parametrize(
    ("name", "queries", "qrels", "message"),
    [
        ("jinja2", 2, ["q1 0 a 1", "q2 0 b 1"], "'jinja2' is taken here; rename the folder"),
        ("all", 2, ["q1 0 a 1", "q2 0 b 1"], "'all' is taken here"),
        ("one", 1, ["q1 0 a 1"], "1 judged test queries; a test needs 2 or more"),
        ("zero", 2, ["q1 0 a 0", "q2 0 b 0"], "no query has a passage that is relevant for nDCG@10"),
    ],
)  # fmt: skip
def test_folders_that_cannot_be_used(home, study, tmp_path, name, queries, qrels, message):
    folder = write_folder(tmp_path / name, PASSAGES[:2], QUERIES[:queries], qrels)
    with pytest.raises(DataError, match=message):
        _ = OutOfDomain(paper.open("smoke", home), folder).collections


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"packages": ["jinja2", "networkx"]}, DataError, "networkx is in the training collection"),
        ({"packages": []}, DataError, "'smoke' has no out_of_domain.packages or collections"),
        ({"packages": ["nosuchpackage"]}, ValueError, "pip install nosuchpackage"),
        (
            {"packages": [], "collections": ["beir/nosuch"]},
            DataError,
            "no collection 'beir/nosuch'",
        ),
    ],
)
def test_bad_collections_are_refused_before_anything_is_trained(tmp_path, settings, error, message):
    study = OutOfDomain(paper.open("smoke", tmp_path, out_of_domain=settings))
    with pytest.raises(error, match=message):
        _ = study.results
    assert not (tmp_path / "runs").exists()


def test_parameters_of_another_encoder_are_refused(home, study):
    on = study._on(next(iter(study.collections.values())))
    source = study.reproduction.experiments.variant_run("minilm-4", "distributed", False)
    stored = home / "runs" / source.run_id / "last.safetensors"
    kept = load_file(stored)
    save_file({f"other.{k}": v for k, v in kept.items()}, stored)
    values = on.experiments.zero_shot_run("minilm-4").model_dump(exclude={"kind"})
    config = runner.TransferRun(**values | {"depth": 5}, source=source.run_id, checkpoint="last")
    try:
        with pytest.raises(
            runner.StoreError, match=r"parameters that encoder 'minilm-4' lacks, other\."
        ):
            on.runner.ensure([config])
    finally:
        save_file(kept, stored)
