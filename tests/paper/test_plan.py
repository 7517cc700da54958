"""What a plan promises, compared with what happens; what it needs neither data, weights nor network for."""

from __future__ import annotations

import json
import shutil
import socket
import time
from collections import Counter

import pytest
import yaml

from adaptive_margins import paper
from adaptive_margins.paper.plan import PlanError, _Estimates, differences
from adaptive_margins.runs import CODE_VERSION, read_run_config
from conftest import linked, run_config


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a connection was tried")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def test_the_runs_of_the_laptop_take_what_was_expected(tmp_path):
    """The laptop profile's encoders, lengths and optimiser on a smaller PyDocs: within a factor of 2."""
    reproduction = paper.open(
        "laptop",
        tmp_path,
        collection={"packages": ["networkx"], "max_passages": 400, "validation": 40, "test": 40},
        static={"triples": 128},
        comparison={"triples": 128, "evaluate_every": 64},
        workers=1,
    )  # fmt: skip
    e, inputs = reproduction.experiments, reproduction.inputs
    configs = [
        e.zero_shot_run("minilm-3"),
        e.static_run("minilm-3", 0.4, True),
        e.comparison_run("minilm-3", target="distributed", in_batch=False, patience=9),
    ]
    inputs.encoder("minilm-3")  # shared by all runs, and not part of any
    for name in inputs.evaluated_sets:
        inputs.top_candidates(name)
    estimates = _Estimates(inputs)
    expected = sum(estimates.seconds(config) for config in configs)
    since = time.perf_counter()
    for config in configs:
        reproduction.runner.execute(config)
    assert 1 / 2 < (time.perf_counter() - since) / expected < 2


def test_the_plan_of_a_finished_home_and_of_an_unfinished_one(smoke, tmp_path):
    plan = smoke.plan()
    runs = plan.runs
    names = ["run_id", "encoder", "what", "triples", "done", "state", "why", "seconds"]
    assert list(runs.columns) == names
    assert set(runs["run_id"]) == {p.name for p in smoke.store.folder.iterdir()}
    assert runs["done"].all()
    assert (set(runs["state"]), set(runs["why"]), runs["seconds"].sum()) == ({"done"}, {""}, 0)
    assert (plan.seconds, plan.downloads, plan.stated) == (0.0, [], [])
    assert Counter(runs["encoder"]) == {"bm25": 1, "minilm": 1, "minilm-3": 19, "minilm-4": 32}

    home = linked(smoke.home, tmp_path / "home", "cache", "collections")
    done = smoke.experiments.static_run("minilm-3", 0.5, True, 2)
    for config in (smoke.experiments.bm25_run(), done):
        shutil.copytree(smoke.store.path(config), home / "runs" / config.run_id)

    # One run of an older version, and one with another rate, too; one that was interrupted, one computed with another torch.
    older, stopped = smoke.experiments.figure4_runs()[:2]
    values = json.loads(older.model_dump_json()) | {"code_version": CODE_VERSION - 1}
    for changes in ({}, {"learning_rate": 0.5}):
        old = read_run_config(json.dumps(values | changes))
        folder = shutil.copytree(smoke.store.path(older), home / "runs" / old.run_id)
        (folder / "config.json").write_text(old.model_dump_json())
    (home / "cache" / "work" / stopped.run_id).mkdir(parents=True)
    file = home / "runs" / done.run_id / "result.json"
    result = json.loads(file.read_text())
    file.write_text(json.dumps(result | {"versions": result["versions"] | {"torch": "1.0"}}))
    (file.parent / "SHA256SUMS").unlink(missing_ok=True)

    plan = paper.open("smoke", home, workers=2).plan()
    runs = plan.runs.set_index("run_id")
    assert len(runs) == 55  # ε of Table 3 is not known: two seeds count apart from those of ε = 1
    assert runs.index[runs["done"]].tolist() == [smoke.experiments.bm25_run().run_id, done.run_id]
    assert (runs.loc[~runs["done"], "seconds"] > 0).all()
    assert plan.seconds == pytest.approx(runs["seconds"].sum() / 2)
    why = runs.loc[runs["why"] != "", "why"].to_dict()
    assert why.keys() == {older.run_id, stopped.run_id, done.run_id}
    assert why[older.run_id] == f"code_version {CODE_VERSION - 1} → {CODE_VERSION}"
    assert Counter(runs["state"]) == {"done": 2, "stale": 1, "missing": 52}
    assert runs.loc[older.run_id, "state"] == "stale"
    assert "interrupted" in why[stopped.run_id]
    assert "torch 1.0 → " in why[done.run_id]
    text = plan.text(every=True)
    assert all(run_id in text for run_id in runs.index)
    assert len(plan.text().splitlines()) < len(text.splitlines())
    assert "55 runs, 2 are done. 1 are stale." in text and f"stale: {why[older.run_id]}" in text
    listed = json.loads(json.dumps(plan.values()))["runs"]
    assert {run["run_id"]: run["why"] for run in listed if run["why"]} == why


def test_a_stale_run_is_explained_by_the_most_similar_finished_one():
    new = run_config(collection="a" * 16, weights="b" * 64, learning_rate=1e-5).model_dump(
        mode="json"
    )
    assert differences(new, new) == []
    old = new | {"learning_rate": 2e-5, "weights": "c" * 64, "collection": "d" * 16}
    del old["sampling"]
    assert differences(old, new) == [
        f"collection fingerprint {'d' * 16} → {'a' * 16}",
        f"weights {'c' * 12}… → {'b' * 12}…",
        "sampling — → random",
        "learning_rate 2e-05 → 1e-05",
    ]
    assert differences(old, new | {"collection": "0" * 16})[0].endswith("→ not known yet")


def test_the_papers_plan_needs_neither_data_nor_network(tmp_path, no_network):
    reproduction = paper.open("paper", tmp_path)
    plan = reproduction.plan()
    runs = plan.runs
    # 11 ε × 2 × 3 encoders, 2 × 3 adaptive, 2 × 3 distributed, 5 × 3 + 2 + 6 for the tables, BM25 and
    # 6 zero-shot runs; for the static rows of Table 3, ε = 0 stands for the tuned one.
    assert len(runs) == 66 + 6 + 6 + 17 + 6 + 7
    assert not runs["done"].any()
    assert runs["run_id"].is_unique
    assert not list(tmp_path.iterdir())
    # What is run afterwards is of the real collection.
    assert "fingerprint" not in vars(reproduction.inputs)
    assert plan.stated == ["distilbert", "roberta", "mpnet", "dpr", "ance", "tas-b"]

    static = runs[(runs["encoder"] == "distilbert") & (runs["triples"] == 2_560_000)].iloc[0]
    reranked = 43 * 1000 / 3090 + 43 / 2 / 3090
    assert static["seconds"] == pytest.approx(2_560_000 / 515 + reranked, rel=1e-6)
    curve = runs[runs["what"] == "adaptive, B 128, 39780811 triples"].iloc[0]
    assert curve["seconds"] == pytest.approx(39_780_811 / 515 + 310 * reranked, rel=1e-6)
    ranked = runs[runs["what"] == "zero-shot, full ranking"].iloc[0]
    passages = 8_841_823 + (43 + 54) / 2
    assert ranked["seconds"] == pytest.approx(passages / 3090 + reranked, rel=1e-6)
    assert plan.embeddings == 8_841_823 * 768 * 2

    fetched = dict(plan.downloads)
    assert sum("msmarco" in what for what in fetched) >= 6
    pinned = "distilbert/distilbert-base-uncased@12040accade4e8a0f71eabdb258fecc2e7e948be"
    assert fetched[pinned] == 4 * 66_363_648
    assert sum(fetched.values()) == pytest.approx(11.9e9, rel=0.05)
    unknown = [what.partition("@")[0] for what, count in plan.downloads if not count]
    assert unknown == ["colbert-ir/colbertv2.0", "cross-encoder/ms-marco-MiniLM-L6-v2"]
    text = plan.text()
    for part in ("108 runs, 0 are done", "39,780,811", "13.6 GB", "11.9 GB", "non-commercial"):
        assert part in text
    assert "11.9 GB, and 2 of unknown size" in text


def test_the_released_plan_has_its_own_grid(tmp_path, no_network):
    assert len(paper.open("released", tmp_path).plan().runs) == 60 + 6 + 6 + 17 + 7


def test_a_plan_that_lacks_a_number_names_it(tmp_path):
    with pytest.raises(PlanError, match=r"collection\.counts lacks TREC-DL20"):
        paper.open("paper", tmp_path, collection__counts={"TREC-DL20": None}).plan()
    path = tmp_path / "my.yaml"
    path.write_text(yaml.safe_dump({"extends": "paper", "encoders": {"mpnet": {"stated": None}}}))
    with pytest.raises(PlanError, match=r"encoders\.mpnet\.stated gives no speeds"):
        paper.open(path, tmp_path).plan()


def test_a_night_has_the_rows_of_table_3_alone(tmp_path, no_network):
    reproduction = paper.open("paper-night", tmp_path)
    reproduction.inputs.fingerprint = "0" * 16
    e = reproduction.experiments
    assert e.figure3_runs() == []
    assert e.figure4_runs() == e.table3_runs()[2:4] and e.figure5_runs() == e.table3_runs()[4:]
    rows = [(r.target, r.in_batch, round(r.triples / 1e6, 2)) for r in e.table3_runs()]
    assert rows == [
        (0.2, False, 5.18), (0.2, True, 2.24), ("adaptive", False, 4.93), ("adaptive", True, 1.98),
        ("distributed", False, 7.30),
    ]  # fmt: skip
    runs = reproduction.plan().runs.set_index("run_id")
    assert set(runs["encoder"]) == {"bm25", "distilbert"}
    hours = runs.loc[[r.run_id for r in e.table3_runs()], "seconds"].sum() / 3600
    assert hours == pytest.approx(17, abs=0.5)
    assert not list(tmp_path.iterdir())
