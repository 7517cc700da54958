"""Runs are computed once, by one process or several, and resumed; what is shared by runs fits its texts."""

from __future__ import annotations

import os
import signal
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np
import pandas as pd
import pytest
from sentence_transformers import SentenceTransformer

from adaptive_margins import cli, files, paper
from adaptive_margins.encoder.embed import embed
from adaptive_margins.encoder.tokens import tokenize
from adaptive_margins.files import WriteError, write_checksums
from adaptive_margins.paper import backends, runner
from adaptive_margins.paper.experiments import fixed_runs, tuning_runs
from adaptive_margins.paper.reproduction import Reproduction
from adaptive_margins.paper.store import StoreError
from adaptive_margins.profiles.load import load_profile
from adaptive_margins.training import TrainingError
from conftest import flip, linked


def test_running_again_computes_nothing(smoke, monkeypatch, capsys):
    before = {p: p.stat().st_mtime_ns for p in smoke.home.rglob("*") if "_executed" not in p.parts}

    def refuse(*_, **__):
        raise AssertionError("a run was computed again")

    monkeypatch.setattr(runner.Runner, "execute", refuse)
    monkeypatch.setattr(ProcessPoolExecutor, "submit", refuse)
    again = paper.open("smoke", smoke.home)
    since = time.process_time()
    again.run_all()
    assert time.process_time() - since < 10
    assert len(again.runner.ensure(smoke.experiments.figure3_runs())) == 18
    after = {p: p.stat().st_mtime_ns for p in smoke.home.rglob("*") if "_executed" not in p.parts}
    assert after == before
    count = len(list(smoke.store.folder.iterdir()))
    assert f"{count} of {count} runs are done" in capsys.readouterr().err


def test_an_unknown_run_is_refused_before_any_is_computed(tmp_path, monkeypatch):
    reproduction = Reproduction(load_profile("smoke"), tmp_path)
    reproduction.inputs.fingerprint = "0" * 16
    wanted = []
    monkeypatch.setattr(reproduction.runner, "ensure", lambda configs: wanted.extend(configs))
    for unknown, message in (("nosuch", "no run 'nosuch'"), ("", "runs begin with ''")):
        with pytest.raises(StoreError, match=message):
            reproduction.run_one(unknown)
    assert wanted == []
    e = reproduction.experiments
    tuned = e.comparison_run("minilm-4", target=0.5, in_batch=True)
    with pytest.raises(StoreError, match="is not in"):  # whether it is the run is decided by these
        reproduction.run_one(tuned.run_id)
    assert wanted == tuning_runs(e, ["minilm-4"], [True])
    wanted.clear()
    curve = e.figure4_runs()[0]
    with pytest.raises(TypeError):  # what our ensure returns
        reproduction.run_one(curve.run_id[:10])
    assert wanted == [e.zero_shot_run(curve.encoder)]


def test_figure3_of_one_encoder_trains_no_other(smoke, monkeypatch):
    asked = []
    ensure = smoke.runner.ensure
    monkeypatch.setattr(smoke.runner, "ensure", lambda c: asked.extend(c) or ensure(c))
    one = smoke.figure3("minilm-4")
    assert {c.encoder for c in asked} == {"minilm-4"}
    monkeypatch.undo()
    all_of_them = smoke.figure3()
    expected = all_of_them[all_of_them["encoder"] == "minilm-4"].reset_index(drop=True)
    pd.testing.assert_frame_equal(one, expected)


def test_one_run_with_own_values(smoke, tmp_path):
    home = linked(smoke.home, tmp_path, "cache", "collections", "runs")
    other = paper.open("smoke", home, workers=1)
    stored = other.train("minilm-3", target="adaptive", in_batch=True)
    assert stored.run_id in {
        c.run_id for c in smoke.experiments.figure4_runs()
    }  # read, not trained
    run = other.train("minilm-3", target=0.25, triples=16, batch_size=8, learning_rate=5e-4)
    assert (run.config.target, run.config.learning_rate, run.config.triples) == (0.25, 5e-4, 16)
    assert run.curve["step"].tolist() == [0, 1, 2]
    start = other.zero_shot("minilm-3")
    measures = list(run.config.rerank_measures)
    np.testing.assert_array_equal(
        run.curve.iloc[0][measures].to_numpy(float),
        [start.evaluation("rerank", "validation").mean[m] for m in measures],
    )
    scores = run.scores().set_index(["mode", "set", "measure"])["value"]
    compared = run.compare(start).set_index(["mode", "set", "measure"])
    assert set(compared.index) == {("rerank", "validation", m) for m in measures}
    for m in measures:
        row = compared.loc["rerank", "validation", m]
        assert row["value"] == scores["rerank", "validation", m]
        assert row["difference"] == pytest.approx(row["value"] - row["other"], abs=1e-12)
        assert row["low"] <= row["difference"] <= row["high"]
        assert row["verdict"] in ("better", "worse", "equivalent", "undecided")
    softmax = other.train("minilm-3", loss="softmax", target=None, in_batch=True, triples=16)
    assert softmax.config.loss == "softmax"


def test_step_0_is_read_only_of_the_zero_shot_runs_own_set(smoke, monkeypatch):
    """Its candidates of other sets are ranked by stored embeddings, which may be of 16 bits."""
    given = []
    monkeypatch.setattr("adaptive_margins.training.train", lambda *_, **o: given.append(o))
    for name in ("validation", "test1"):
        config = smoke.experiments.comparison_run(
            "minilm-3", target=0.25, in_batch=False, validation=name
        )
        smoke.runner._train(config, smoke.inputs.encoder("minilm-3"), None, None, None)
    expected = smoke.zero_shot("minilm-3").evaluation("rerank", "validation")
    assert [o["initial"] for o in given] == [expected, None]


def test_workers_store_where_their_driver_does(smoke, tmp_path):
    place = tmp_path / "elsewhere"
    other = Reproduction(smoke.profile, smoke.home, runs=place)
    worker = runner._worker(smoke.profile, smoke.home, place, ("", ""), owner="", one_gpu=False)
    assert worker.store.folder == other.runner.store.folder == place


def test_runs_need_no_estimate(smoke, tmp_path, monkeypatch, capsys):
    """An encoder of the hub is fetched with its first run; until then, a plan needs its speeds."""
    other = paper.open("smoke", linked(smoke.home, tmp_path, "cache", "collections"))
    monkeypatch.setattr("adaptive_margins.paper.plan._has_weights", lambda _: False)
    ensured = []
    monkeypatch.setattr(other.runner, "ensure", ensured.append)
    monkeypatch.setattr(other.experiments, "table3_runs", list)
    other.run_all()
    assert len(ensured) == 2
    assert "no estimate: profile smoke: the weights of" in capsys.readouterr().err


def test_cached_states_are_those_of_the_texts(smoke, tmp_path):
    """The same texts in another order: no cached state is taken for another's."""
    home = linked(smoke.home, tmp_path, "cache", "collections")
    profile = load_profile("smoke", sets={"validation": "validation", "tests": ["test2", "test1"]})
    inputs = Reproduction(profile, home).inputs
    assert inputs.fingerprint == smoke.inputs.fingerprint
    loaded = inputs.encoder("minilm-3")
    tokens = tokenize(loaded.whole, inputs.queries.texts, profile.lengths.query)
    np.testing.assert_allclose(
        embed(loaded.model, loaded.queries), embed(loaded.whole, tokens), atol=1e-5
    )


def test_damaged_runs_are_computed_again_by_reproduce(smoke, tmp_path, monkeypatch, capsys):
    bm25, start = smoke.experiments.bm25_run(), smoke.experiments.zero_shot_run("minilm-3")
    runs = (f"runs/{config.run_id}" for config in (bm25, start))
    linked(smoke.home, tmp_path, "cache", "collections", *runs)
    config = smoke.experiments.training_run("minilm-3", target=0.25, in_batch=False, triples=16)
    other = Reproduction(smoke.profile, tmp_path)
    expected = other.runner.ensure([config])[0]
    before = expected.path.stat().st_mtime_ns, expected.curve
    monkeypatch.setattr("adaptive_margins.paper.reproduction.find_run", lambda *_: config)
    assert other.run_one(config.run_id).path.stat().st_mtime_ns == before[0]
    flip(expected.path / "curve.parquet")
    monkeypatch.setenv("ADAPTIVE_MARGINS_HOME", str(tmp_path))
    again = other.run_one(config.run_id)
    assert again.path.stat().st_mtime_ns > before[0]
    columns = [c for c in before[1] if c != "seconds"]
    assert again.curve[columns].equals(before[1][columns])
    assert f"run {config.run_id} is damaged: " in capsys.readouterr().err

    # A run of the plan: `plan --check` names it.
    folder = other.store.path(bm25)
    write_checksums(folder)
    for damaged in (False, True):
        if damaged:
            flip(folder / "result.json")
        monkeypatch.setattr("sys.argv", ["x", "plan", "--profile", "smoke", "--check"])
        with pytest.raises(SystemExit) as end:
            cli.main()
        told = capsys.readouterr().out
        assert (end.value.code, f"run {bm25.run_id} is damaged" in told) == (int(damaged), damaged)
    aside = []
    monkeypatch.setattr(other.runner, "ensure", aside.append)
    monkeypatch.setattr(other.experiments, "table3_runs", list)
    other.run_all()
    assert bm25 in aside[0] and not other.store.has(bm25)


def test_read_only_results_are_read_and_nothing_is_computed_for_them(smoke, monkeypatch):
    other = Reproduction(smoke.profile, smoke.home)
    monkeypatch.setattr(runner.Runner, "prepare", lambda *_: pytest.fail("computed"))
    monkeypatch.setattr(files.os, "access", lambda path, mode: not mode & os.W_OK)
    finished = smoke.experiments.figure3_runs()
    assert other.runner.ensure(finished)[0].curve is not None
    missing = smoke.experiments.training_run("minilm-3", target=0.25, in_batch=False, triples=8)
    with pytest.raises(WriteError, match=rf"{missing.run_id}.* cannot be written: .*Permission"):
        other.runner.ensure([*finished, missing])


def die(_):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_worker_is_an_error(smoke):
    config = smoke.experiments.training_run("minilm-3", target=0.25, in_batch=False, triples=8)
    with (
        ProcessPoolExecutor(1, get_context("fork")) as pool,
        pytest.raises(TrainingError, match="a worker process was killed"),
    ):
        list(backends.compute(lambda *_: pool.submit(die, None), 1, [config]))


def test_workers_are_shared_in_a_block_and_end_with_it(smoke, monkeypatch):
    started = []

    class Pool:
        def __init__(self, *arguments):
            started.append(self)
            self.ended = False

        def shutdown(self, **_):
            self.ended = True

        def submit(self, *_):
            raise AssertionError

    monkeypatch.setattr(backends, "ProcessPoolExecutor", Pool)
    mine = paper.open("smoke", smoke.home, workers=2).runner
    with mine.workers(), mine.workers():
        assert not started[0].ended
    assert len(started) == 1
    assert started[0].ended
    with pytest.raises(ZeroDivisionError), mine.workers():
        _ = 1 / 0
    assert [pool.ended for pool in started] == [True, True]


def test_an_encoder_that_is_not_in_the_profile(smoke):
    with pytest.raises(KeyError, match=r"'bert' is not in profile 'smoke': \[.*'minilm'"):
        smoke.inputs.encoder("bert")


def test_another_encoder_from_the_collection_to_a_saved_model(smoke, tiny_folder, tmp_path):
    """All of it is trained, as the paper's encoders are."""
    home = linked(smoke.home, tmp_path, "cache", "collections")
    values = smoke.profile.model_dump()
    values |= {
        "encoders": {"tiny": {"base": str(tiny_folder("roberta")), "pooling": "cls+linear"}},
        "untrained": {}, "reference_encoder": "tiny", "workers": 1,
    }  # fmt: skip
    values["static"] |= {"seeds": {}, "targets": [0.5]}
    values["comparison"]["seeds"] = {}
    other = Reproduction(type(smoke.profile).model_validate(values), home)
    table = other.table2()
    run = other.store.get(other.experiments.variant_run("tiny", "distributed", False))
    assert (table["run_id"] == run.run_id).all()
    assert run.result["triples"] > 0
    model = SentenceTransformer(str(run.path / "model"))
    assert len(list(model)) == 3

    # The stored ranking is that of the saved model, read by Sentence Transformers.
    collection = other.inputs.collection
    hits = run.run("rerank", "test1")
    for qid in collection.queries["test1"].ids[:5]:
        model.max_seq_length = 20
        q = model.encode(collection.queries["test1"][qid], normalize_embeddings=True)
        model.max_seq_length = 12
        for docid, score in hits[qid].items():
            d = model.encode(collection.passages[docid], normalize_embeddings=True)
            assert score == pytest.approx(float(q @ d), abs=1e-5)


def test_the_fixed_runs_are_those_of_the_store(smoke):
    fixed = {c.run_id for c in fixed_runs(smoke.experiments)}
    tuned = {c.run_id for c in smoke.experiments.table3_runs()}
    assert fixed | tuned == {p.name for p in smoke.store.folder.iterdir()}
