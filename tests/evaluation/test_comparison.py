"""Runs compared pair by pair, against pytrec_eval and scipy; their names, judgements, words and figure."""

from __future__ import annotations

import io
import json
import math
import re
from itertools import combinations

import matplotlib.pyplot as plt
import numpy as np
import pytest
import pytrec_eval
from scipy import stats

from adaptive_margins.book.per_query import per_query_figure
from adaptive_margins.evaluation.comparison import (
    ComparisonError,
    compare_runs,
    comparison_text,
    run_names,
)
from adaptive_margins.evaluation.measures import MeasureError
from adaptive_margins.evaluation.significance import compare, holm, more_queries, randomisation_test


def judged(queries: int, docs: int = 30, seed: int = 0):
    """Qrels with graded judgements."""
    rng = np.random.default_rng(seed)
    return {
        f"q{i}": {f"d{j}": int(rng.integers(0, 3)) for j in rng.choice(docs, 8, replace=False)}
        for i in range(queries)
    }


def ranked(qrels, noise: float, seed: int, docs: int = 30):
    """A run of all passages by grade and noise."""
    rng = np.random.default_rng(seed)
    return {
        qid: {f"d{j}": grades.get(f"d{j}", 0) + noise * rng.normal() for j in range(docs)}
        for qid, grades in qrels.items()
    }


QRELS = judged(60)
RUNS = {
    "good": ranked(QRELS, 0.3, 1),
    "good too": ranked(QRELS, 0.3, 2),
    "bad": ranked(QRELS, 9.0, 3),
    "fair": ranked(QRELS, 0.9, 4),
    "fair too": ranked(QRELS, 0.9, 5),
}


def test_a_comparison_is_that_of_trec_eval_and_scipy():
    found = compare_runs(QRELS, RUNS, margin=0.05)
    evaluator = pytrec_eval.RelevanceEvaluator(QRELS, {"ndcg_cut.10"})
    values = {
        name: np.array([evaluator.evaluate(run)[q]["ndcg_cut_10"] for q in QRELS])
        for name, run in RUNS.items()
    }
    assert (found["measure"], found["margin"], found["queries"]) == ("nDCG@10", 0.05, 60)
    assert found["runs"] == {
        name: {"mean": pytest.approx(x.mean()), "missing": 0} for name, x in values.items()
    }
    assert [(p["a"], p["b"]) for p in found["pairs"]] == list(combinations(RUNS, 2))
    for pair in found["pairs"]:
        x, y = values[pair["a"]], values[pair["b"]]
        t = stats.ttest_rel(x, y)
        interval = t.confidence_interval(0.95)
        lower = stats.ttest_rel(x + 0.05, y, alternative="greater").pvalue
        upper = stats.ttest_rel(x - 0.05, y, alternative="less").pvalue
        assert pair["difference"] == pytest.approx((x - y).mean())
        assert pair["ci"] == pytest.approx((interval.low, interval.high))
        assert pair["p_t"] == pytest.approx(t.pvalue)
        assert pair["p_tost"] == pytest.approx(max(lower, upper))
        assert pair["p_t_adjusted"] == pytest.approx(min(1, 10 * t.pvalue))
        assert pair["p_tost_adjusted"] == pytest.approx(min(1, 10 * max(lower, upper)))
        if pair["p_tost_adjusted"] < 0.05:
            assert pair["verdict"] == "equivalent"
        else:
            assert pair["verdict"] == ("different" if pair["p_t_adjusted"] < 0.05 else "undecided")
    assert {p["verdict"] for p in found["pairs"]} == {"equivalent", "different", "undecided"}
    assert json.loads(json.dumps(found))["pairs"][0]["ci"] == list(found["pairs"][0]["ci"])


def test_the_level_of_the_measure_is_named_and_missing_queries_count_zero():
    some = {qid: hits for qid, hits in RUNS["good"].items() if qid not in ("q0", "q1")}
    with pytest.warns(UserWarning, match="queries without hits count 0: some 2, of 60") as told:
        found = compare_runs(QRELS, {"all": RUNS["good"], "some": some}, "R@20")
    assert len(told) == 1
    assert found["measure"] == "R(rel=1)@20"
    assert {name: run["missing"] for name, run in found["runs"].items()} == {"all": 0, "some": 2}
    assert found["per_query"]["some"]["q0"] == 0
    lost = sum(found["per_query"]["all"][q] for q in ("q0", "q1"))
    assert found["pairs"][0]["difference"] == pytest.approx(lost / 60)


def test_runs_that_cannot_be_compared():
    shallow = {qid: dict(list(hits.items())[:9]) for qid, hits in RUNS["bad"].items()}
    runs = {"deep": RUNS["good"], "shallow": shallow}
    with pytest.raises(ComparisonError, match=r"^shallow: nDCG@10 needs 10 hits a query; the run has at most 9$"):  # fmt: skip
        compare_runs(QRELS, runs)
    assert compare_runs(QRELS, runs, "nDCG@9")["queries"] == 60
    with pytest.raises(ComparisonError, match=r"^other: none of the 60 judged queries is in the"):
        compare_runs(QRELS, {"deep": RUNS["good"], "other": {"z": {"d1": 1.0}}})
    with pytest.raises(ComparisonError, match="at least two runs are needed, got 1"):
        compare_runs(QRELS, {"deep": RUNS["good"]})
    with pytest.raises(ComparisonError, match="at least two judged queries are needed, got 1"):
        compare_runs({"q0": QRELS["q0"]}, RUNS)
    with pytest.raises(ValueError, match="cannot compute the measure 'nDCG@0'"):
        compare_runs(QRELS, RUNS, "nDCG@0")


NOTHING = {qid: dict.fromkeys(judged, 0) for qid, judged in QRELS.items()}


def test_runs_that_have_no_relevant_passage_are_not_compared():
    with pytest.raises(
        MeasureError, match=r"60 judged queries, grades 0 .480.; nDCG@10 needs grade 1 "
    ):
        compare_runs(NOTHING, RUNS)
    with pytest.raises(MeasureError, match=r"R\(rel=3\)@10 needs grade 3 or more"):
        compare_runs(QRELS, RUNS, "R(rel=3)@10")
    other = {
        qid: {docid.upper(): score for docid, score in hits.items()}
        for qid, hits in RUNS["good"].items()
    }
    count = sum(grade > 0 for judged in QRELS.values() for grade in judged.values())
    with pytest.warns(
        UserWarning, match=f"none of the {count} .* any run; .* is similar to"
    ) as told:
        (pair,) = compare_runs(QRELS, {"a": other, "b": other})["pairs"]
    assert len(told) == 1
    assert (pair["verdict"], pair["p_t"], pair["p_tost"]) == ("undecided", 1, 1)
    with pytest.warns(UserWarning, match=f"none of the {count} relevant passages is in upper;"):
        pairs = compare_runs(QRELS, {"upper": other, **RUNS})["pairs"]
    verdicts = {(pair["a"], pair["b"]): pair["verdict"] for pair in pairs}
    assert {verdicts["upper", name] for name in RUNS} == {"undecided"}
    assert verdicts["good", "bad"] == "different"


def test_runs_that_find_nothing_among_their_first_hits_are_undecided(recwarn):
    last = {
        qid: {docid: -float(QRELS[qid].get(docid, 0) > 0) for docid in hits}
        for qid, hits in RUNS["bad"].items()
    }
    (pair,) = compare_runs(QRELS, {"a": last, "b": last}, "Success@1")["pairs"]
    assert (pair["difference"], pair["verdict"], pair["p_tost_adjusted"]) == (0, "undecided", 1)
    assert not recwarn


def test_queries_with_a_relevant_passage_are_counted():
    some = {**NOTHING, **{qid: QRELS[qid] for qid in list(QRELS)[:45]}}
    usable = sum(max(judged.values()) > 0 for judged in some.values())
    found = compare_runs(some, RUNS)
    assert (found["queries"], found["relevant_queries"]) == (60, usable)
    assert f"60 judged queries, {usable} of them with a relevant passage;" in comparison_text(found)
    judged = [qid for qid in QRELS if max(QRELS[qid].values()) > 0]
    found = compare_runs({qid: QRELS[qid] for qid in judged}, RUNS)
    assert "with a relevant passage" not in comparison_text(found)


def test_complete_runs_may_be_shallow():
    shallow = {
        name: {qid: dict(list(hits.items())[:9]) for qid, hits in RUNS[name].items()}
        for name in ("good", "bad")
    }
    with pytest.raises(ComparisonError, match=r"bad: R.*needs 100 hits"):
        compare_runs(QRELS, shallow, "R@100", complete=["good"])
    found = compare_runs(QRELS, shallow, "R@100", complete=["good", "bad"])
    trec = pytrec_eval.RelevanceEvaluator(QRELS, {"recall.100"})
    for name, run in shallow.items():
        expected = np.mean([values["recall_100"] for values in trec.evaluate(run).values()])
        assert found["runs"][name]["mean"] == pytest.approx(expected)
    with pytest.raises(
        ComparisonError,
        match=r"other: none of the 60 judged queries .*; 'Q0' is similar to the known 'q0'",
    ):
        other = {qid.upper(): hits for qid, hits in shallow["good"].items()}
        compare_runs(QRELS, {**shallow, "other": other}, complete=[*shallow, "other"])


def test_words_name_the_better_run_whatever_the_order():
    for names in (("good", "bad"), ("bad", "good")):
        (pair,) = compare_runs(QRELS, {name: RUNS[name] for name in names})["pairs"]
        assert (pair["difference"] > 0) == (names[0] == "good")
        size, (low, high) = abs(pair["difference"]), sorted(map(abs, pair["ci"]))
        assert pair["words"] == (
            f"good is better than bad (nDCG@10 {size:.4f} higher, 95 % CI +{low:.4f} to +{high:.4f})."
        )
        verdict = comparison_text(compare_runs(QRELS, {n: RUNS[n] for n in names})).splitlines()[5]
        assert verdict.split()[-1] == ("better" if names[0] == "good" else "worse")


def test_equal_runs_and_sure_differences_below_the_margin_are_equivalent():
    (same,) = compare_runs(QRELS, {"a": RUNS["fair"], "b": RUNS["fair"]})["pairs"]
    assert (same["verdict"], same["p_t"]) == ("equivalent", 1)
    (pair,) = compare_runs(QRELS, {n: RUNS[n] for n in ("good", "fair")}, margin=0.5)["pairs"]
    assert pair["verdict"] == "equivalent"
    assert "though good is better" in pair["words"]


def test_the_text_has_a_line_for_each_run_and_pair_and_a_sentence():
    found = compare_runs(QRELS, RUNS)
    lines = comparison_text(found).splitlines()
    assert [line.startswith(name) for line, name in zip(lines[1:6], RUNS, strict=True)] == [
        True
    ] * 5
    words = {"different": ("better", "worse")}
    for line, pair in zip(lines[8:18], found["pairs"], strict=True):
        assert line.split()[-1] in words.get(pair["verdict"], (pair["verdict"],))
        assert f"{pair['difference']:+.4f}" in line
    assert "multiplied by the 10 pairs (Bonferroni)" in lines[19]
    assert lines[21:] == [pair["words"] for pair in found["pairs"]]


def test_all_others_are_compared_with_a_baseline():
    every, found = compare_runs(QRELS, RUNS), compare_runs(QRELS, RUNS, baseline="fair")
    others = [name for name in RUNS if name != "fair"]
    assert [(pair["a"], pair["b"]) for pair in found["pairs"]] == [(a, "fair") for a in others]
    assert (found["baseline"], found["correction"]) == ("fair", "Holm")
    assert (every["baseline"], every["correction"]) == (None, "Bonferroni")
    values = found["per_query"]
    differences = np.array([[values[a][q] - values["fair"][q] for a in others] for q in QRELS])
    random = randomisation_test(differences)
    assert [pair["p_randomisation"] for pair in found["pairs"]] == random
    for test in ("p_t", "p_tost", "p_randomisation"):
        p = [pair[test] for pair in found["pairs"]]
        assert [pair[f"{test}_adjusted"] for pair in found["pairs"]] == holm(p)
        for pair in every["pairs"]:
            assert pair[f"{test}_adjusted"] == min(1, 10 * pair[test])
    with pytest.raises(ComparisonError, match="no run is named 'none'; there are good, good too"):
        compare_runs(QRELS, RUNS, baseline="none")


def test_undecided_pairs_have_the_number_of_queries_that_would_decide():
    found = compare_runs(QRELS, RUNS, margin=0.02)
    assert {pair["verdict"] for pair in found["pairs"]} >= {"different", "undecided"}
    for pair in found["pairs"]:
        if pair["verdict"] != "undecided":
            assert pair["more_queries"] is None
            continue
        x, y = ({q: found["per_query"][pair[k]][q] for q in QRELS} for k in "ab")
        assert pair["more_queries"] == more_queries(compare(x, y, margin=0.02), 0.05 / 10)
        assert f"About {pair['more_queries']['more']:,} more judged queries" in pair["words"]


def test_nothing_is_decided_by_fewer_than_ten_queries():
    some = [qid for qid in QRELS if max(QRELS[qid].values()) > 0]
    for count in (9, 10):
        qrels = {**NOTHING, **{qid: QRELS[qid] for qid in some[:count]}}
        runs = {name: RUNS[name] for name in ("good", "bad")}
        if count == 10:
            (pair,) = compare_runs(qrels, runs)["pairs"]
            assert pair["verdict"] != "undecided"
            continue
        with pytest.warns(UserWarning, match="only 9 of the 60 judged queries .* needs 10"):
            (pair,) = compare_runs(qrels, runs)["pairs"]
        assert (pair["verdict"], pair["more_queries"]) == ("undecided", None)


def test_tables_in_markdown_and_latex():
    runs = {"a_1|*": RUNS["good"], "b & c": RUNS["bad"]}
    found = compare_runs(QRELS, runs)
    (pair,) = found["pairs"]
    lines = comparison_text(found, "github").splitlines()
    rows = [re.split(r" *(?<!\\)\| *", line)[1:-1] for line in lines if line.startswith("|")]
    assert rows[2][0] == r"a\_1\|\*" and rows[6][1] == r"b\ \&\ c"
    assert rows[6][2] == f"{pair['difference']:+.4f}"
    assert {len(row) for row in rows[:4]} == {3} and {len(row) for row in rows[4:]} == {8}
    text = comparison_text(compare_runs(QRELS, dict(reversed(runs.items()))), "latex_booktabs")
    assert text.count(r"\toprule") == text.count(r"\bottomrule") == 2
    assert r"a\_1|*" in text and rf"$-${pair['difference']:.4f}" in text
    body = [line for line in text.splitlines() if line and not line.startswith("%")]
    assert not set("−-%&").intersection("".join(body).replace(r"\&", "").replace(r"\%", "").replace("$-$", "").replace(" & ", ""))  # fmt: skip
    assert pair["words"].split(" is better")[0] in text
    drawn = comparison_text({**found, "plot": "a_b.svg"}, "latex_booktabs")
    assert drawn.endswith("\n%\n% Plot: a_b.svg")


def test_run_names(tmp_path):
    def names(*paths):
        return run_names([tmp_path / path for path in paths])

    assert names("bm25.run", "tasb.run.gz", "x.y.txt") == ["bm25", "tasb", "x.y"]
    assert names("a/runs/m.run", "b/runs/m.run.gz", "c.run") == ["a/runs/m", "b/runs/m", "c"]
    assert names("a/m.run", "b/m.run", "a/x/m.run") == ["a/m", "b/m", "x/m"]
    assert names("m.run", "m.run", "n.run") == ["m-1", "m-2", "n"]
    assert names("m.run", "m.run.gz", "m-1.run") == ["m-2", "m-3", "m-1"]
    assert names("a/m.run", "a/m.run", "b/m.run") == ["a/m-1", "a/m-2", "b/m"]


def test_the_figure_shows_sorted_differences_with_mean_interval_and_margin():
    found = compare_runs(QRELS, {name: RUNS[name] for name in ("good", "bad", "fair")})
    figure = per_query_figure(found)
    panels = [axis for axis in figure.axes if axis.get_visible()]
    assert len(panels) == len(found["pairs"]) == 3
    for axis, pair in zip(panels, found["pairs"], strict=True):
        assert axis.get_title() == f"{pair['a']} − {pair['b']}\n{pair['verdict']}"
        (mean,) = (line for line in axis.get_lines() if line.get_gid() == "mean")
        assert list(mean.get_ydata()) == [pair["difference"]] * 2
        bands = {p.get_gid(): p.get_bbox().intervaly for p in axis.patches}
        assert bands["margin"] == pytest.approx([-0.05, 0.05])
        assert bands["interval"] == pytest.approx(pair["ci"])
        a, b = (found["per_query"][pair[side]] for side in "ab")
        expected = np.sort([a[qid] - b[qid] for qid in a])
        up, down = (c.get_paths()[0].vertices for c in axis.collections)
        middle = np.arange(1, 61)

        def height(vertices, x):
            near = np.abs(vertices[:, 0] - x) <= 0.5
            return vertices[near][:, 1]

        for x, value in zip(middle, expected, strict=True):
            shown = height(up, x) if value > 0 else height(down, x)
            assert np.isclose(shown, value).any()
        assert axis.get_xlim() == (0.5, 60.5)
        counts = [(expected > 0).sum(), (expected < 0).sum(), (expected == 0).sum()]
        assert axis.get_xlabel() == "{} queries above 0, {} below, {} equal".format(*counts)
        texts = [text.get_text() for text in axis.texts if text.get_text()]
        assert texts.count("margin") == 2
        assert sum(text.startswith("mean ") for text in texts) == 1
    assert not plt.get_fignums()


def test_nothing_of_the_figure_is_cut_off():
    long = "a very long name of a run, longer than a $panel^$"  # which is no formula
    figure = per_query_figure(compare_runs(QRELS, {long: RUNS["good"], "b": RUNS["bad"]}))
    figure.savefig(io.BytesIO(), format="png", dpi=50)
    for axis in figure.axes:
        if axis.get_visible():
            box = axis.get_tightbbox()
            assert box.x0 >= 0 and box.y0 >= 0
            assert box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1


def test_two_equal_runs_can_be_drawn():
    figure = per_query_figure(compare_runs(QRELS, {"a": RUNS["good"], "b": RUNS["good"]}))
    low, high = figure.axes[0].get_ylim()
    assert low < -0.05 < 0.05 < high
    assert math.isfinite(high)
