"""Paper and released code: the statistics against naive loops, the comparisons recomputed from the
files of their runs.
"""

from __future__ import annotations

import dataclasses
import gzip
import json
import math
from collections import defaultdict
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import pytrec_eval
import yaml
from scipy import stats

from adaptive_margins import paper
from adaptive_margins.book import released_code as report
from adaptive_margins.book.edition import read
from adaptive_margins.evaluation import significance
from adaptive_margins.evaluation.measures import evaluate
from adaptive_margins.paper import released_code as differences
from adaptive_margins.paper.released_code import Differences
from adaptive_margins.paper.released_statistics import (
    COMPARED,
    SUMMARY,
    compare,
    optimism,
    pool_qrels,
    summarise,
)
from conftest import executed, linked

ROOT = Path(__file__).resolve().parents[2]
FULL = ["nDCG@10", "R(rel=2)@20"]
CHANGED = {  # what the two configurations of a comparison differ in: the paper's values and the code's
    "orientation": {"orientation": ("paper", "released")},
    "stop_gradient": {"stop_gradient": (True, False)},
    "checkpoint": {"keep": ("best", "last")},
    "pooling": {"pooling": ("cls+linear", "cls"), "encoder": ("minilm-4-cls+linear", "minilm-4-cls")},
    "choice": {"validation": ("test1", "validation")},
}  # fmt: skip


# --- statistics -----------------------------------------------------------------------------------


def scores(seed, runs, shift=0.0, n=60):
    """Queries of the same difficulty for all seeds, runs that differ."""
    base, rng = np.random.default_rng(0).random(n), np.random.default_rng(seed)
    return [
        {f"q{i}": float(base[i] + shift + 0.1 * rng.standard_normal()) for i in range(n)}
        for _ in range(runs)
    ]


@pytest.mark.parametrize(
    ("shift", "comparisons", "verdict"),
    [(0.0, 1, "equivalent"), (0.02, 12, "undecided"), (0.3, 4, "better"), (-0.2, 16, "worse")],
)
def test_compare_is_the_paired_test_of_the_means_over_runs(shift, comparisons, verdict):
    paper, code = scores(3, 3), scores(4, 3, shift)
    found = compare(paper, code, comparisons=comparisons)
    before, after = ({q: sum(run[q] for run in x) / 3 for q in x[0]} for x in (paper, code))
    test = significance.compare(after, before, comparisons=comparisons)
    assert found["verdict"] == test.verdict == verdict
    assert (found["low"], found["difference"], found["high"]) == pytest.approx(
        (test.ci[0], test.difference, test.ci[1])
    )
    assert found["p"] == pytest.approx(test.p_tost, rel=1e-6, abs=1e-12)
    assert found["p_adjusted"] == min(1, comparisons * found["p"])


def test_optimism_is_a_naive_loop():
    matrix = np.random.default_rng(1).random((4, 17))
    found = optimism(matrix, size=5, draws=50)
    rng = np.random.default_rng(1)
    for draw in range(50):
        order = list(rng.permutation(17))
        inside, outside = order[:5], order[5:]
        best, best_mean, gaps = None, -1.0, []
        for c in range(4):
            mean = sum(matrix[c, q] for q in inside) / 5
            rest = sum(matrix[c, q] for q in outside) / 12
            gaps.append(mean - rest)
            if mean > best_mean:
                best, best_mean, best_rest = c, mean, rest
        assert found["chosen"][draw] == best
        assert found["optimism"][draw] == pytest.approx(best_mean - best_rest)
        assert found["net"][draw] == pytest.approx(best_mean - best_rest - sum(gaps) / 4)


def naive_ndcg(grades, ideal, cutoff):
    gain = [sum(g / math.log2(i + 2) for i, g in enumerate(x[:cutoff])) for x in (grades, ideal)]
    return gain[0] / gain[1] if gain[1] else 0.0


def test_pool_only_ideal_ranking():
    qrels = {"q1": {"a": 3, "b": 2, "far": 3}, "q2": {"far": 1}, "q3": {"a": 1}}
    run = {"q1": {"b": 3.0, "x": 2.0, "a": 1.0}, "q2": {"a": 1.0}}
    pooled = pool_qrels(qrels, run)
    assert pooled == {"q1": {"a": 3, "b": 2}, "q2": {}, "q3": {}}
    assert qrels["q2"] == {"far": 1}  # as it was
    per_query = evaluate(pooled, run, ["nDCG@10"]).per_query["nDCG@10"]
    assert per_query == pytest.approx({"q1": naive_ndcg([2, 0, 3], [3, 2], 10), "q2": 0, "q3": 0})
    judged = evaluate(qrels, run, ["nDCG@10"]).per_query["nDCG@10"]
    assert judged["q1"] == pytest.approx(naive_ndcg([2, 0, 3], [3, 3, 2], 10))
    assert judged["q1"] < per_query["q1"]


# --- the comparisons, on the profile smoke --------------------------------------------------------


@pytest.fixture(scope="module")
def study(smoke_home, tmp_path_factory):
    """One seed, two ε: 15 short runs, in this process."""
    folder = tmp_path_factory.mktemp("differences")
    home = linked(smoke_home, folder, "runs", "collections", "cache")
    settings = {"workers": 1, "static": {"targets": [0.5, 1.0]}}
    profile = {"name": "study", "extends": "smoke", "about": "Two values of ε.", **settings}
    (home / "study.yaml").write_text(yaml.safe_dump(profile))
    study = Differences(paper.open(home / "study.yaml", home), "1")
    before = set(study.reproduction.store.folder.iterdir())
    study.needed = study.ensure()
    study.made = set(study.reproduction.store.folder.iterdir()) - before
    return study


@pytest.fixture(scope="module")
def frames(study):
    found = {name: getattr(study, name)() for name in report.BLOCKS}
    found["optimism"] = study.optimism(draws=40, size=9)
    return found


def result(study, run_id):
    return json.loads((study.reproduction.store.folder / run_id / "result.json").read_text())


def test_configurations_differ_in_one_thing(study):
    blocks = study.comparisons()
    assert set(blocks) == set(CHANGED)
    for block, comparisons in blocks.items():
        for comparison in comparisons:
            pairs = list(zip(comparison.reference, comparison.other, strict=True))
            assert len(pairs) == 1
            for a, b in pairs:
                a, b = a.model_dump(), b.model_dump()
                beside = {"save_model", "stop_early"}  # where a run stops, its last checkpoint is
                different = {k: (a[k], b[k]) for k in a.keys() - beside if a[k] != b[k]}
                expected = CHANGED[block]
                if comparison.code == "mean":
                    expected = {
                        "pooling": ("cls+linear", "mean"),
                        "encoder": ("minilm-4-cls+linear", "minilm-4"),
                    }
                assert different == expected, (block, comparison.what)  # fmt: skip
    assert {c.what.split(",")[0] for c in blocks["orientation"]} == {
        "static",
        "adaptive",
        "distributed",
    }


def test_seeds_are_those_of_the_runs_and_table3s_own_runs_are_reused(smoke):
    study = Differences(smoke, "1,2,3")
    for comparisons in study.comparisons().values():
        for c in comparisons:
            for side in (c.reference, c.other):
                assert [x.seed for x in side if x.kind == "training"] in ([1, 2, 3], [])
    distributed = study.variant("distributed", False)
    assert distributed[0] == smoke.experiments.variant_run("minilm-4", "distributed", False)
    assert [c.save_model for c in distributed] == [True, False, False]
    configs = study.configs()
    assert len(set(configs)) == len({c.run_id for c in configs}) == len(configs)
    trained = [c for c in configs if c.kind == "training" and not smoke.store.has(c)]
    grid = 3 * len(smoke.profile.static.targets)
    # 5 rows × 1 more seed, 3 + 3 losses × 3, (last, other set) × 2 losses × 3, 2 poolings × 3
    assert len(trained) == 5 + 18 + 12 + 6 + grid


def test_only_what_is_missing_was_made(study, frames):
    assert study.needed == len(study.configs())
    runs = set(study.reproduction.store.folder.iterdir())
    known = {study.reproduction.store.path(c) for c in study.configs()}
    assert study.made <= known
    assert known <= runs
    assert study.ensure() == study.needed
    assert set(study.reproduction.store.folder.iterdir()) == runs


@pytest.mark.parametrize("block", [b for b in report.BLOCKS if b not in ("ideal", "probes")])
def test_a_block_recomputed_from_the_files_of_its_runs(study, frames, block):
    frame = frames[block]
    assert list(frame.columns) == COMPARED
    assert set(frame["block"]) == {block}
    cases = frame.groupby(["what", "kind", "set", "measure"], sort=False)
    assert set(frame["set"]) == {"test1", "test2"}
    assert set(frame.loc[frame["kind"] == "full", "measure"]) == set(FULL)
    assert set(frame["comparisons"]) == {len(cases)}
    for (_, kind, name, measure), rows in cases:
        (row,) = rows.to_dict("records")
        sides = [
            result(study, row[c])[kind][name]["per_query"][measure]
            for c in ("reference_run_id", "run_id")
        ]
        gaps = np.array([sides[1][q] - sides[0][q] for q in sides[0]])
        assert row["value_paper"] == pytest.approx(np.mean(list(sides[0].values())))
        assert row["value_code"] == pytest.approx(np.mean(list(sides[1].values())))
        assert row["difference"] == pytest.approx(gaps.mean())
        if np.ptp(gaps):
            interval = stats.ttest_1samp(gaps, 0).confidence_interval(0.95)
            assert (row["low"], row["high"]) == pytest.approx(tuple(interval))
        assert row["step_code"] == result(study, row["run_id"])["kept_step"]


def test_last_checkpoint_is_where_the_run_stopped(study, frames):
    for row in frames["checkpoint"].to_dict("records"):
        best, last = (result(study, row[c]) for c in ("reference_run_id", "run_id"))
        assert row["step_paper"] == best["best_step"] == last["best_step"]
        assert row["step_code"] == last["stop_step"] == best["stop_step"]


def test_the_target_chosen_on_a_set_is_the_best_there(study, frames):
    rows = frames["choice"]
    row = rows[rows["what"] == "ε of static targets"].iloc[0]
    options = study.choices()
    options = options[options["what"] == "ε"]
    for column, name in (("epsilon_paper", "test1"), ("epsilon_code", "validation")):
        own = options[options["set"] == name].sort_values("setting")
        assert row[column] == own.iloc[int(own["value"].to_numpy().argmax())]["setting"]
        for option in own.to_dict("records"):
            value = result(study, option["run_id"])["rerank"][name]["mean"]["nDCG@10"]
            assert option["value"] == value
    stopped = rows[rows["what"].str.startswith("checkpoint")]
    assert (stopped.groupby("what").size() == 6).all()  # two sets; nDCG@10 reranked and full, R@20
    assert set(stopped.loc[stopped["kind"] == "rerank", "measure"]) == {"nDCG@10"}


def test_nothing_to_compare_where_validation_is_a_test_set(study):
    settings = {"workers": 1, "sets__validation": "test1"}
    other = Differences(paper.open("smoke", study.reproduction.home, **settings), "1")
    frame = other.choice()
    assert list(frame.columns) == COMPARED
    assert frame.empty
    assert report.forest(frame).texts[0].get_text().startswith("nothing to compare")


def test_ideal_recomputed_by_pytrec_eval(study, frames):
    frame = frames["ideal"]
    collection = study.reproduction.inputs.collection
    qrels = collection.qrels["validation"]
    assert {"BM25", "minilm-3, adaptive, in-batch", "minilm-4, softmax"} <= set(frame["system"])
    assert frame["run_id"].is_unique
    for row in frame.to_dict("records"):
        run = defaultdict(dict)
        path = study.reproduction.store.folder / row["run_id"] / "rerank.validation.run.gz"
        with gzip.open(path, "rt") as file:
            for line in file:
                qid, _, docid, _, score, _ = line.split()
                run[qid][docid] = float(score)
        for column, judged in (
            ("value_paper", qrels),
            ("value_code", {q: {d: g for d, g in j.items() if d in run[q]} for q, j in qrels.items()}),
        ):  # fmt: skip
            judged = {q: j for q, j in judged.items() if j}
            found = pytrec_eval.RelevanceEvaluator(judged, {"ndcg_cut_10"}).evaluate(dict(run))
            total = sum(values["ndcg_cut_10"] for values in found.values())
            assert row[column] == pytest.approx(total / len(qrels))
        assert row["value_code"] >= row["value_paper"]
    each = frame["value_code"] - frame["value_paper"]
    assert frame["difference"].iloc[0] == pytest.approx(each.mean())


def test_optimism_is_that_of_the_scores_during_training(study, frames):
    frame = frames["optimism"].set_index("what")
    (target,) = (c for c in frame.index if c.startswith("step, static"))
    assert set(frame.index) == {"ε", "step, distributed", target}
    assert set(frame["size"]) == {9}
    run = study.reproduction.store.get(study.variant("static", False, validation="test1")[0])
    checks = pd.read_parquet(run.path / "checks.parquet")
    checks = checks[checks["measure"] == "nDCG@10"]
    matrix = [list(step.sort_values("qid")["value"]) for _, step in checks.groupby("step")]
    found = optimism(np.array(matrix), size=9, draws=40)
    row = frame.loc[target]
    assert row["settings"] == len(matrix)
    assert row["net"] == pytest.approx(found["net"].mean())
    assert row["optimism"] == pytest.approx(row["drawn"] - row["others"])
    assert row["low"] == pytest.approx(np.percentile(found["optimism"], 2.5))
    n = len(study.reproduction.inputs.collection.qrels["test1"])
    assert set(study.optimism(draws=2)["size"]) == {n // 2}  # 43 are too many of so few


def test_probing_one_list_finds_less(study, monkeypatch):
    assert study.probes().empty  # 400 passages have no index with lists
    larger = differences.choose_index(1000, 384, depth=50)
    monkeypatch.setattr(
        differences,
        "choose_index",
        lambda n, dim, depth: dataclasses.replace(larger, nlist=16, nprobe=8, sample=n),
    )
    frame = study.probes()
    assert list(frame.columns) == COMPARED
    values = frame.set_index(["set", "measure"])[["value_paper", "value_code"]]
    for name in ("test1", "test2"):
        assert values.loc[name, "Exact@50"].is_monotonic_decreasing
        assert values.loc[(name, "Exact@50"), "value_code"] < 0.9
        assert values.loc[(name, "Filled@50"), "value_code"] < values.loc[(name, "Filled@50"), "value_paper"]  # fmt: skip
        assert set(values.loc[name].index) == {*FULL, "Filled@50", "Exact@50"}


# --- the report -----------------------------------------------------------------------------------


def made_up(block, verdicts, values):
    """A frame of one ``what`` a verdict, two runs each; ``values``: (paper's, code's) by run."""
    gap = float(np.mean([b - a for a, b in values]))
    rows = [
        {
            **dict.fromkeys(COMPARED, 0.0), "block": block, "what": f"loss {number}", "paper": "as printed",
            "code": "as published", "kind": "full", "set": "test1", "measure": "R(rel=2)@20", "seed": seed,
            "value_paper": paper_value, "value_code": code_value, "difference": gap, "low": gap - 0.01,
            "high": gap + 0.01, "verdict": verdict, "comparisons": len(verdicts), "run_id": f"{seed}c",
            "reference_run_id": f"{seed}p",
        }
        for number, verdict in enumerate(verdicts)
        for seed, (paper_value, code_value) in enumerate(values, start=1)
    ]  # fmt: skip
    return pd.DataFrame(rows, columns=COMPARED)


def test_summary_of_a_block():
    frame = made_up("orientation", report.STYLES, [(0.5, 0.52), (0.6, 0.58)])
    rows = summarise([frame, pd.DataFrame(columns=COMPARED)])
    assert list(rows.columns) == SUMMARY
    first = rows.iloc[0]
    assert (first["value_paper"], first["value_code"]) == pytest.approx((0.55, 0.55))
    assert (first["lowest"], first["highest"]) == pytest.approx((-0.02, 0.02))
    assert (first["seeds"], first["runs"]) == ("1 2", "1p 2p 1c 2c")
    table = report.table(rows)
    assert list(table["Verdict"]) == list(report.STYLES)
    assert set(table["Difference [95 % CI]"]) == {".000 [−.010, +.010]"}
    assert set(report.table(rows.assign(block="ideal"))["Verdict"]) == {"—"}  # no test is about it


def test_the_figure_has_each_row_with_its_verdict(frames):
    frame = made_up("orientation", report.STYLES, [(0.5, 0.52), (0.6, 0.56)])
    (axis,) = report.forest(frame).axes
    assert axis.get_title() == "test1"
    labels = [text.get_text() for text in axis.get_yticklabels()]
    assert labels == [f"loss {i}\nR@20" for i in range(4)]
    marks = [line for line in axis.get_lines() if len(line.get_xdata()) == 1]
    assert [float(line.get_xdata()[0]) for line in marks] == pytest.approx([-0.01] * 4)
    assert len({line.get_marker() for line in marks}) == 4
    singles = [line for line in axis.get_lines() if line.get_marker() == "o" and len(line.get_xdata()) == 2]  # fmt: skip
    assert sorted(singles[0].get_xdata()) == pytest.approx([-0.04, 0.02])
    assert len(report.forest(frames["pooling"]).axes) == 2


def test_order_of_systems():
    frame = made_up("ideal", ["equivalent"], [(0.5, 0.9), (0.6, 0.7), (0.4, 0.5)])
    (row,) = report.order_of_systems(frame).to_dict("records")
    assert (row["systems"], row["pairs"], row["swapped"]) == (3, 3, 1)
    assert (row["lowest"], row["highest"]) == pytest.approx((0.1, 0.4))
    assert row["tau"] == pytest.approx(1 / 3)  # two pairs of three keep their order


def test_summary_is_json_and_the_same_from_the_csv_files(frames, tmp_path):
    machine = {"processor": "an example", "cores": 2}
    summary = report.summary(frames, machine, "2026-01-31", "smoke")
    text = json.dumps(summary, allow_nan=False)
    assert json.loads(text) == summary
    for name, frame in frames.items():
        frame.to_csv(tmp_path / f"{name}.csv", index=False)
    assert report.summary(read(tmp_path), machine, "2026-01-31", "smoke") == summary
    incomplete = {name: frame for name, frame in frames.items() if name != "optimism"}
    with pytest.raises(KeyError, match="optimism"):
        report.summary(incomplete, machine, "2026-01-31", "smoke")


def test_the_notebook_reads_the_same_runs(study, frames, tmp_path, monkeypatch):
    home, data = study.reproduction.home, tmp_path / "data"
    before = set(study.reproduction.store.folder.iterdir())
    monkeypatch.setenv("ADAPTIVE_MARGINS_HOME", str(home))
    profile, values = str(home / "study.yaml"), {"seeds": 1, "draws": 40, "data_folder": str(data)}
    notebook = ROOT / "notebooks" / "07_paper_and_released_code.ipynb"
    executed(notebook, profile=profile, **values)
    assert set(study.reproduction.store.folder.iterdir()) == before
    for name, frame in frames.items():
        assert len(pd.read_csv(data / f"{name}.csv")) == len(frame) or name == "optimism", name
