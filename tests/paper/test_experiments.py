"""Which runs figures and tables need, in profiles that differ from smoke; nothing is trained."""

from __future__ import annotations

import dataclasses

import pytest

from adaptive_margins import paper
from adaptive_margins.data.collection import Texts
from adaptive_margins.data.text import DataError
from adaptive_margins.paper import inputs
from adaptive_margins.paper.experiments import find_run
from adaptive_margins.paper.plan import planned_runs
from adaptive_margins.paper.shared_runs import needed_runs
from adaptive_margins.profiles.load import load_profile
from adaptive_margins.retrieval.bm25 import BM25
from conftest import linked

TUNED = {"minilm-3": [0.25, 0.5], "minilm-4": [0.5, 0.5]}


def opened(tmp_path, **values):
    reproduction = paper.open("smoke", tmp_path, **values)
    reproduction.inputs.fingerprint = "0" * 16
    return reproduction.experiments


def test_figure_3_marks_the_maxima_of_the_seed_that_tunes(smoke):
    """The grid of the profile released has a seed that the profile's other runs lack."""
    other = paper.open("smoke", smoke.home, static__seed=2)
    frame = other.figure3("minilm-3")  # seeds 2 and 1, both stored
    marked = frame[frame["maximum"]]
    assert set(marked["seed"]) == {2}
    assert len(marked) == 2 * 2  # in-batch and measures
    assert load_profile("released").static_seeds("mpnet") == (166613,)


def test_figures_that_show_rows_of_table_3_show_one_seed(smoke):
    """And those rows may have a batch size that Figure 5 would not have."""
    other = paper.open("smoke", smoke.home, tables_only=True, distributed__batch_sizes=[4])
    assert len(smoke.profile.row_seeds("minilm-4")) == 2
    for frame, curves in ((other.figure4(), 4), (other.figure5(), 2), (other.figure6(), 2)):
        assert set(frame["run_id"]) <= {run.run_id for run in other.experiments.table3_runs()}
        assert frame["run_id"].nunique() == curves
        assert set(frame["batch_size"]) == {8}


def test_static_rows_have_their_budget_before_and_after_tuning(tmp_path):
    budgets = {"comparison__budgets": {"static": 16, "static in-batch": 24}}
    e = opened(tmp_path, **budgets)
    rows = [run for run in planned_runs(e) if run.encoder == "minilm-4" and run.kind == "training"]
    static = [run for run in rows if isinstance(run.target, float) and run.test_sets]
    assert {(run.in_batch, run.triples) for run in static} == {(False, 16), (True, 24), (False, 32)}
    e = opened(tmp_path, static__tuned=TUNED, **budgets)
    assert {run.run_id for run in e.table3_runs()} <= needed_runs(e)
    for run in e.table3_runs():  # an ε that is not in the grid, too
        assert find_run(e, run.run_id, list) == run


def test_the_collection_has_triples_for_the_largest_budget():
    profile = load_profile("smoke", comparison__budgets={"static": 64})
    assert inputs._longest_budget(profile) == 64


def test_the_values_of_a_run_are_those_given(tmp_path):
    e = opened(tmp_path, adaptive__batch_sizes=[8, 4])
    run = e.training_run("minilm-3", target=0.5, in_batch=False, triples=8, learning_rate=0.0)
    assert run.learning_rate == 0
    assert [run.batch_size for run in e.figure4_runs()] == [8] * 4
    assert e.curve_run("minilm-3", "adaptive").batch_size == 8
    assert e.curve_run("minilm-3", "distributed").batch_size == 8


def test_a_ranking_of_an_older_version_is_not_read(smoke, tmp_path, monkeypatch):
    home = linked(smoke.home, tmp_path, "cache", "collections")
    asked, search = [], BM25.search
    monkeypatch.setattr(BM25, "search", lambda *a: asked.append(a) or search(*a))
    before = paper.open("smoke", home).inputs.bm25_ranking("test1")
    assert not asked
    monkeypatch.setattr(inputs, "CODE_VERSION", inputs.CODE_VERSION + 1)
    assert paper.open("smoke", home).inputs.bm25_ranking("test1") == before
    assert len(asked) == 1


def test_a_query_may_be_in_two_sets(smoke):
    """Like those of TREC DL 2019 and DL-Hard."""
    other = paper.open("smoke", smoke.home).inputs
    found = smoke.inputs.collection
    first = found.queries["validation"].ids[0]
    for text in (found.queries["validation"][first], "another"):
        test1 = found.queries["test1"]
        more = Texts([*test1.ids, first], [*test1.texts, text])
        other.collection = dataclasses.replace(found, queries={**found.queries, "test1": more})
        if text != "another":
            assert other.queries.ids == smoke.inputs.queries.ids
            assert other.query_rows("test1")[-1] == other.query_rows("validation")[0]
        else:
            del other.queries
            with pytest.raises(DataError, match=f"query '{first}' of 'test1' has another text"):
                _ = other.queries
