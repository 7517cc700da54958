import math

import ir_measures
import numpy as np
import pytest
import pytrec_eval
from scipy import stats
from statsmodels.stats.weightstats import DescrStatsW, ttost_paired

from adaptive_margins.evaluation.measures import MeasureError, evaluate, named, relevant
from adaptive_margins.evaluation.significance import (
    compare,
    paired_interval,
    paired_tost,
    superiority,
)

MEASURES = ["nDCG@10", "nDCG@3", "Success(rel=2)@5", "R(rel=2)@20", "R(rel=2)@50", "RR(rel=2)@10"]


def random_data(seed: int):
    """Graded qrels and a run of coarse scores (many ties), with queries missing on either side."""
    rng = np.random.default_rng(seed)
    docids = [f"d{i}" for i in range(60)]
    qrels = {
        f"q{i}": {str(d): int(rng.integers(0, 4)) for d in rng.choice(docids, 15, replace=False)}
        for i in range(12)
    }
    qrels["q0"] = {"d1": 1, "d2": 0}  # nothing of grade 2
    qrels["q1"] = {"d1": 0}  # nothing relevant
    run = {
        f"q{i}": {
            str(d): float(rng.integers(0, 5)) / 3
            for d in rng.choice(docids, rng.integers(1, 41), replace=False)
        }
        for i in range(15)
    }
    del run["q3"]
    run["q4"] = {}
    return qrels, run


def ranking(hits):
    return sorted(hits, key=lambda d: (hits[d], d), reverse=True)


def ndcg(judged, ranked, k):
    gain = sum(judged.get(d, 0) / math.log2(r + 1) for r, d in enumerate(ranked[:k], start=1))
    ideal = sorted(judged.values(), reverse=True)[:k]
    best = sum(g / math.log2(r + 1) for r, g in enumerate(ideal, start=1))
    return gain / best if best else 0.0


def success(judged, ranked, k):
    return float(any(judged.get(d, 0) >= 2 for d in ranked[:k]))


def recall(judged, ranked, k):
    relevant = {d for d, g in judged.items() if g >= 2}
    return len(relevant & set(ranked[:k])) / len(relevant) if relevant else 0.0


def reciprocal_rank(judged, ranked, k):
    return next((1 / r for r, d in enumerate(ranked[:k], start=1) if judged.get(d, 0) >= 2), 0.0)


@pytest.mark.parametrize("seed", range(4))
def test_measures_are_those_of_naive_loops(seed):
    qrels, run = random_data(seed)
    found = evaluate(qrels, run, MEASURES)
    naive = [(ndcg, 10), (ndcg, 3), (success, 5), (recall, 20), (recall, 50), (reciprocal_rank, 10)]
    assert list(found.mean) == list(found.per_query) == MEASURES
    for measure, (function, k) in zip(MEASURES, naive, strict=True):
        expected = {q: function(judged, ranking(run.get(q, {})), k) for q, judged in qrels.items()}
        assert found.per_query[measure] == pytest.approx(expected, abs=1e-12)
        assert found.mean[measure] == pytest.approx(sum(expected.values()) / 12)


@pytest.mark.parametrize("seed", range(4))
def test_measures_are_those_of_trec_eval(seed):
    qrels, run = random_data(seed)
    found = evaluate(qrels, run, MEASURES[:5])
    names = {"ndcg_cut.3,10", "success.5", "recall.20,50"}
    trec = pytrec_eval.RelevanceEvaluator(qrels, names, relevance_level=2).evaluate(run)
    for measure, name in zip(
        MEASURES, ["ndcg_cut_10", "ndcg_cut_3", "success_5", "recall_20", "recall_50"], strict=False
    ):
        expected = {q: trec[q][name] if q in trec else 0.0 for q in qrels}
        assert found.per_query[measure] == pytest.approx(expected, abs=1e-12)


def test_ties_count_as_in_trec_eval_for_every_tool():
    # d2 comes before d1; RR with a cut-off is computed by another tool than nDCG.
    found = evaluate(
        {"q": {"d1": 3}}, {"q": {"d1": 1.0, "d2": 1.0 + 1e-12}}, ["RR@10", "RR", "Success@1"]
    )
    assert found.mean == {"RR@10": 0.5, "RR": 0.5, "Success@1": 0.0}


def test_missing_queries_count_zero_and_unjudged_queries_do_not_count():
    qrels = {"a": {"d": 2}, "b": {"d": 2}, "c": {}}
    found = evaluate(qrels, {"a": {"d": 1.0}, "z": {"d": 1.0}}, ["Success(rel=2)@5"])
    assert found.per_query == {"Success(rel=2)@5": {"a": 1.0, "b": 0.0, "c": 0.0}}
    assert found.mean == {"Success(rel=2)@5": pytest.approx(1 / 3)}
    assert evaluate(qrels, {}, ["nDCG@10"]).mean == {"nDCG@10": 0.0}


def test_a_run_may_be_shallower_than_the_cutoff():
    assert evaluate({"q": {"a": 2, "b": 2}}, {"q": {"a": 1.0}}, ["R(rel=2)@1000"]).mean == {
        "R(rel=2)@1000": 0.5
    }


def err(judged, ranked, k):
    value, left = 0.0, 1.0
    for r, d in enumerate(ranked[:k], start=1):
        stops = (2 ** max(judged.get(d, 0), 0) - 1) / 2**4
        value, left = value + left * stops / r, left * (1 - stops)
    return value


def exponential_ndcg(judged, ranked, k):
    def dcg(grades):
        return sum(
            (2 ** max(g, 0) - 1) / math.log(r + 1) for r, g in enumerate(grades[:k], start=1)
        )

    best = dcg(sorted(judged.values(), reverse=True))
    return dcg([judged.get(d, 0) for d in ranked]) / best if best else 0.0


NAMINGS = {
    "numbers": "{}".format,
    "letters": "q{}".format,
    "hyphens": "PLAIN-{}".format,
    "turns of conversations": lambda i: f"{31 + i // 4}-{i % 4}",
    "leading zeros": lambda i: "1" if i == 0 else "01" if i == 1 else f"0{i}",
    "other scripts": "问-{}".format,
    "larger than doubles": lambda i: str(10**20 + i),
}


@pytest.mark.parametrize("naming", NAMINGS.values(), ids=NAMINGS)
def test_measures_of_gdeval_are_those_of_naive_loops_whatever_queries_and_passages_are_called(
    naming,
):
    rng = np.random.default_rng(5)
    docids = [("d{}", "1:{}", "é{}", "a-{}")[i % 4].format(i) for i in range(40)]
    qids = [naming(i) for i in range(12)]
    qrels = {
        qid: {str(d): int(rng.integers(-1, 5)) for d in rng.choice(docids, 15, replace=False)}
        for qid in qids
    }
    qrels[qids[3]] = {"d0": 0}
    run = {
        qid: {str(d): float(rng.integers(9)) for d in rng.choice(docids, 30, replace=False)}
        for qid in qids
    }
    del run[qids[5]]
    measures = {"ERR@10": err, "nDCG(dcg='exp-log2')@10": exponential_ndcg}
    found = evaluate(qrels, run, list(measures))
    for measure, function in measures.items():
        expected = {q: function(qrels[q], ranking(run.get(q, {})), 10) for q in qids}
        assert found.per_query[measure] == pytest.approx(expected, abs=6e-6)  # it prints 5 decimals
        assert found.mean[measure] == pytest.approx(np.mean(list(expected.values())), abs=6e-6)
        assert found.per_query[measure][qids[5]] == 0 < found.mean[measure]


def test_gdeval_refuses_grades_above_four():
    qrels = {"q1": {"a": 4}, "q2": {"b": 1, "a": 16}}
    for measure in ("ERR@10", "nDCG(dcg='exp-log2')@10"):
        with pytest.raises(MeasureError, match=r"'q2'.* grade 16") as error:
            evaluate(qrels, {"q1": {"a": 1.0}}, [measure])
        assert "\n" not in str(error.value)
    assert evaluate(qrels, {"q1": {"a": 1.0}}, ["nDCG@10"]).mean == {"nDCG@10": 0.5}


@pytest.mark.parametrize(
    ("value", "qid", "message"),
    [
        (1.0, "3", "unknown query '3'"),
        (math.nan, "2", "of query 'b' is nan"),
        (math.inf, "1", "of query 'a' is inf"),
    ],
)
def test_what_a_tool_answers_is_checked(monkeypatch, value, qid, message):
    monkeypatch.setattr(
        ir_measures,
        "iter_calc",
        lambda measures, *_: [ir_measures.Metric(qid, measures[0], value)],
    )
    with pytest.raises(MeasureError, match=message):
        evaluate({"a": {"d": 1}, "b": {"d": 1}}, {"a": {"d": 1.0}}, ["nDCG@10"])


def test_an_error_of_a_tool_is_one_line():
    with pytest.raises(MeasureError, match=r"^Accuracy@1 cannot be .*ZeroDivisionError") as error:
        evaluate({"q": {"d": 1}}, {"q": {"d": 1.0}}, ["Accuracy@1"])
    assert "\n" not in str(error.value)


MORE = [
    "AP", "Bpref", "infAP", "Judged@10", "Judged", "SetF(beta=0.5)", "IPrec@0.1", "NumRet", "NumRelRet", "NumRel",
    "NumQ", "Compat(p=0.9)", "Rprec", "RR", "Success@5", "nDCG(gains={0:0,1:1,2:3,3:7})@10", "nDCG(judged_only=True)@10",
]  # fmt: skip


@pytest.mark.parametrize("measure", MORE)
def test_other_measures_have_a_finite_value_of_each_judged_query(measure, capfd):
    qrels, run = random_data(0)
    (values,) = evaluate(qrels, run, [measure]).per_query.values()
    assert values.keys() == qrels.keys()
    assert np.isfinite(list(values.values())).all() and any(values.values())
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    "bad",
    ["nDCG@10@5", "nDCG@-3", "nDCG@2.5", "Success(rel=2)", "R(rel=0)@5", "R(rel='x')@5", "R(foo=1)@5", "alpha_nDCG@10",
     "ERR_IA@10", "STREC@10", "nERR@10", "SDCG@10", "SDCG(max_rel=3)@10", "INST(T=1)", "RBP(p=0.8)@10", "IPrec@2.0",
     "nDCG(gains={1:100000000})@10", "nDCG@10\0", "", None],
)  # fmt: skip
def test_a_bad_measure_is_named_with_examples_of_good_ones(bad):
    with pytest.raises(MeasureError, match="cannot compute the measure") as error:
        evaluate({"q": {"d": 1}}, {"q": {"d": 1.0}}, ["nDCG@10", bad])
    assert repr(bad) in str(error.value)
    assert '"Success(rel=2)@5"' in str(error.value)
    assert "\n" not in str(error.value) and "object at" not in str(error.value)


@pytest.mark.parametrize(
    ("bad", "good"),
    [
        ("ndcg_cut_10", "nDCG@10"), ("ndcg_cut.10", "nDCG@10"), ("ndcg_cut_5,10", "nDCG@5 nDCG@10"), ("map", "AP"),
        ("recall_100", "R@100"), ("P_5", "P@5"), ("recip_rank", "RR"), ("success_1", "Success@1"), ("ndcg@10", "nDCG@10"),
        ("nDCG10", "nDCG@10"), ("mrr@10", "RR@10"), ("recall@100", "R@100"), ("hits@5", "Success@5"), ("Recall", "R@10"),
        ("ERR", "ERR@10"), ("P@0", "P@10"), ("nDCG@10,R@100", "nDCG@10 R@100 (separated by spaces)"),
    ],
)  # fmt: skip
def test_what_was_meant_by_a_measure_in_another_notation(bad, good):
    with pytest.raises(MeasureError, match="cannot compute the measure") as error:
        named(bad)
    assert str(error.value).endswith(f"; did you mean {good}?")
    for measure in good.partition(" (")[0].split():
        assert named(measure)


def test_what_is_relevant_depends_on_the_level_of_the_measure():
    qrels = {"a": {"x": 2, "y": 1, "z": 0}, "b": {"x": 1}, "c": {"x": -1}, "d": {}}
    assert relevant(qrels, "nDCG@10") == {"a": {"x": 2, "y": 1}, "b": {"x": 1}}
    assert relevant(qrels, "R(rel=2)@50") == {"a": {"x": 2}}


def test_evaluate_errors():
    with pytest.raises(ValueError, match="qrels are empty"):
        evaluate({}, {"q": {"d": 1.0}}, ["nDCG@10"])
    with pytest.raises(ValueError, match="no measure"):
        evaluate({"q": {"d": 1}}, {}, [])
    with pytest.raises(ValueError, match="score of passage 'd' must be finite"):
        evaluate({"q": {"d": 1}}, {"q": {"d": math.nan}}, ["nDCG@10"])


# ---- paired tests


def as_runs(differences, base=0.5):
    qids = [f"q{i}" for i in range(len(differences))]
    return (
        {q: base + d for q, d in zip(qids, differences, strict=True)},
        dict.fromkeys(reversed(qids), base),  # the order of queries must not matter
    )


def test_tost_worked_by_hand():
    # Differences d = .00 .02 .04 .02 .02:
    #   n = 5, mean = .10 / 5 = .02
    #   squared deviations: .0004 0 .0004 0 0, sum .0008; variance .0008 / 4 = .0002
    #   SE = sqrt(.0002 / 5) = sqrt(.00004) = .006324555
    #   lower test: t = (.02 + .05) / SE = 11.0680; upper test: t = (.02 - .05) / SE = -4.7434
    #   p is the larger of the two, that of t = -4.7434 with 4 degrees of freedom. With 4 degrees
    #   P(T < -t) = 1/2 - s (3 - s²) / 4 where s = t / sqrt(t² + 4):
    #     t² = .0009 / .00004 = 22.5; s² = 22.5 / 26.5 = .8490566; s = .9214427;
    #     s (3 - s²) / 4 = .9214427 · 2.1509434 / 4 = .4954928; p = .0045072
    #   t table, 4 degrees: t(.95) = 2.131847, so the interval at 1 - 2 · .05 is
    #     .02 ± 2.131847 · .006324555 = .02 ± .0134830
    result = paired_tost(*as_runs([0.00, 0.02, 0.04, 0.02, 0.02]))
    assert result.n == 5
    assert result.difference == pytest.approx(0.02)
    assert result.p == result.p_adjusted == pytest.approx(0.0045072, abs=1e-7)
    assert (result.low, result.high) == pytest.approx((0.0065170, 0.0334830), abs=1e-6)
    assert result.equivalent is True

    # Among 4 comparisons: 4 p = .0180290 < .05. t(.9875), 4 degrees, solves
    # 1/2 - s (3 - s²) / 4 = .0125 and is 3.495406: .02 ± 3.495406 · .006324555 = .02 ± .0221069.
    result = paired_tost(*as_runs([0.00, 0.02, 0.04, 0.02, 0.02]), comparisons=4)
    assert result.p_adjusted == pytest.approx(0.0180290, abs=1e-7)
    assert (result.low, result.high) == pytest.approx((-0.0021069, 0.0421069), abs=1e-6)
    assert result.equivalent is True

    # Among 12: 12 p = .0540869 > .05.
    assert paired_tost(*as_runs([0.00, 0.02, 0.04, 0.02, 0.02]), comparisons=12).equivalent is False


def test_tost_is_two_one_sided_t_tests_and_its_interval_says_the_same():
    rng = np.random.default_rng(0)
    outcomes = set()
    for _ in range(300):
        n, m = int(rng.integers(2, 80)), int(rng.integers(1, 6))
        margin, alpha = rng.uniform(0.02, 0.1), rng.uniform(0.01, 0.2)
        d = rng.normal(rng.uniform(-0.08, 0.08), rng.uniform(0.01, 0.2), n)
        a, b = as_runs(d)
        result = paired_tost(a, b, margin=margin, alpha=alpha, comparisons=m)
        x = np.array([a[q] - b[q] for q in a])
        lower = stats.ttest_1samp(x, -margin, alternative="greater").pvalue
        upper = stats.ttest_1samp(x, margin, alternative="less").pvalue
        assert result.p == pytest.approx(max(lower, upper))
        assert result.p_adjusted == pytest.approx(min(1, m * max(lower, upper)))
        t = stats.t.ppf(1 - alpha / m, n - 1)
        half = t * x.std(ddof=1) / math.sqrt(n)
        assert (result.low, result.high) == pytest.approx((x.mean() - half, x.mean() + half))
        assert result.equivalent == (-margin < result.low and result.high < margin)
        outcomes.add(result.equivalent)
    assert outcomes == {True, False}


def test_the_tests_are_those_of_statsmodels():
    rng = np.random.default_rng(11)
    for _ in range(300):
        n, m = int(rng.integers(2, 300)), int(rng.integers(1, 6))
        margin, alpha = rng.uniform(0.02, 0.1), rng.uniform(0.01, 0.2)
        a, b = as_runs(rng.normal(rng.uniform(-0.08, 0.08), rng.uniform(0.01, 0.3), n))
        x, y = np.array(list(a.values())), np.array([b[q] for q in a])
        found, tost = compare(a, b, margin=margin), paired_tost(a, b, alpha=alpha, comparisons=m)
        exact = {"rel": 1e-12, "abs": 1e-15}
        assert found.p_tost == pytest.approx(ttost_paired(x, y, -margin, margin)[0], **exact)
        assert found.p_t == pytest.approx(DescrStatsW(x - y).ttest_mean(0)[1], **exact)
        assert found.ci == pytest.approx(DescrStatsW(x - y).tconfint_mean(alpha=0.05), **exact)
        interval = DescrStatsW(x - y).tconfint_mean(alpha=2 * alpha / m)
        assert (tost.low, tost.high) == pytest.approx(interval, **exact)


def test_two_runs_that_find_nothing_are_not_equivalent():
    nothing = dict.fromkeys("abcdef", 0.0)
    assert (paired_tost(nothing, nothing).p, paired_tost(nothing, nothing).equivalent) == (1, False)
    for test in (compare, superiority):
        found = test(nothing, nothing)
        assert (found.p_t, found.p_tost, found.verdict) == (1, 1, "undecided")
    one = {**nothing, "a": 0.5}
    assert compare(one, one).verdict == superiority(one, one).verdict == "equivalent"


def test_tost_is_symmetric():
    a, b = as_runs(np.random.default_rng(1).normal(0.01, 0.1, 50))
    there, back = paired_tost(a, b), paired_tost(b, a)
    assert there.p == pytest.approx(back.p)
    assert (there.low, there.high) == pytest.approx((-back.high, -back.low))


@pytest.mark.parametrize(
    ("difference", "equivalent"),
    [(0.0, True), (0.02, True), (-0.049, True), (0.05, False), (-0.05, False), (0.3, False)],
)
def test_tost_without_variance(difference, equivalent, recwarn):
    base = np.random.default_rng(0).uniform(0, 0.7, 43)  # so that differences differ by rounding
    a = {f"q{i}": x + difference for i, x in enumerate(base)}
    b = {f"q{i}": x for i, x in enumerate(base)}
    result = paired_tost(a, b, comparisons=4)
    assert result.equivalent is equivalent
    assert result.p == result.p_adjusted == (0.0 if equivalent else 1.0)
    assert result.low == result.high == result.difference == pytest.approx(difference)
    assert len(recwarn) == 0


PAIR = {"a": 0.1, "b": 0.4, "c": 0.2}


@pytest.mark.parametrize("test", [paired_tost, paired_interval, compare, superiority])
@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (PAIR, {"a": 0.1, "b": 0.2}, r"1 queries are missing in the second run, e\.g\. \['c'\]"),
        ({"b": 0.1}, PAIR, r"2 queries are missing in the first run, e\.g\. \['a', 'c'\]"),
        ({"a": 0.1}, {"a": 0.1}, "at least 2 queries, got 1"),
        ({}, {}, "at least 2 queries, got 0"),
        (PAIR, {**PAIR, "b": math.nan}, "query 'b' has a value that is not finite: 0.4, nan"),
        ({**PAIR, "c": math.inf}, PAIR, "query 'c' has a value that is not finite: inf, 0.2"),
    ],
)
def test_paired_tests_reject_what_cannot_be_paired(test, a, b, message):
    with pytest.raises(ValueError, match=message):
        test(a, b)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"margin": 0.0}, "margin must be above 0, not 0.0"),
        ({"margin": math.nan}, "margin must be above 0, not nan"),
        ({"alpha": 0.5}, "alpha must lie between 0 and 0.5, not 0.5"),
        ({"alpha": 0.0}, "alpha must lie between 0 and 0.5, not 0.0"),
        ({"comparisons": 0}, "comparisons must be at least 1, not 0"),
    ],
)
def test_tost_rejects_senseless_settings(options, message):
    with pytest.raises(ValueError, match=message):
        paired_tost(PAIR, PAIR, **options)


def rejections(rng, trials, n, mean, sd, comparisons=1):
    return [
        paired_tost(*as_runs(rng.normal(mean, sd, n)), comparisons=comparisons).equivalent
        for _ in range(trials)
    ]


@pytest.mark.parametrize("mean", [0.05, -0.05])
def test_error_rate_at_the_margin_is_alpha(mean):
    # At a true difference of exactly the margin, equivalence is declared wrongly with probability
    # alpha = .05 (the other of the two tests is then passed all but always: 600 queries, SD .25,
    # SE .0102, nearly ten SE away).
    trials = 2000
    wrong = sum(rejections(np.random.default_rng(7), trials, 600, mean, 0.25))
    low, high = stats.binom.interval(0.999, trials, 0.05)
    assert low <= wrong <= high


def test_family_wise_error_rate_with_bonferroni_is_at_most_alpha():
    # Four comparisons with one reference, all at the margin: they share the reference's noise.
    rng, trials, n = np.random.default_rng(8), 1000, 60
    families = wrong = 0
    for _ in range(trials):
        reference = rng.normal(0.5, 0.1, n)
        others = [rng.normal(0.55, 0.1, n) for _ in range(4)]
        results = [
            paired_tost(dict(enumerate(o)), dict(enumerate(reference)), comparisons=4).equivalent
            for o in others
        ]
        families += any(results)
        wrong += sum(results)
    assert families <= stats.binom.ppf(0.999, trials, 0.05)
    # Each single comparison is made at alpha / 4 (they are correlated, so the bounds are wide).
    assert 0.4 * 0.0125 < wrong / (4 * trials) < 2 * 0.0125


def test_power_between_equal_means():
    # 600 queries, SD of the differences .25, alpha .05 / 4: |t| must stay within
    # .05 / (.25 / sqrt(600)) - t(.9875, 599) = 4.90 - 2.25 = 2.65, so the power is about .99;
    # with 43 queries (TREC DL 2019) 1.31 - 2.32 < 0: no chance at all.
    rng = np.random.default_rng(9)
    assert 0.97 < np.mean(rejections(rng, 500, 600, 0.0, 0.25, 4)) <= 1
    assert np.mean(rejections(rng, 500, 43, 0.0, 0.25, 4)) < 0.02


def test_paired_interval_is_the_t_interval():
    rng = np.random.default_rng(2)
    d = rng.normal(0.03, 0.1, 40)
    a, b = as_runs(d)
    difference, low, high = paired_interval(a, b, confidence=0.9)
    interval = stats.ttest_1samp([a[q] - b[q] for q in a], 0).confidence_interval(0.9)
    assert difference == pytest.approx(d.mean())
    assert (low, high) == pytest.approx((interval.low, interval.high))
    wide = paired_interval(a, b)
    assert wide[1] < low < high < wide[2]


def test_paired_interval_without_variance(recwarn):
    assert paired_interval(PAIR, PAIR) == (0, 0, 0)
    assert paired_interval(*as_runs([0.25, 0.25, 0.25])) == pytest.approx((0.25, 0.25, 0.25))
    assert len(recwarn) == 0


@pytest.mark.parametrize("confidence", [0, 1, 95, math.nan])
def test_paired_interval_rejects_a_senseless_confidence(confidence):
    with pytest.raises(ValueError, match="confidence must lie between 0 and 1"):
        paired_interval(PAIR, PAIR, confidence=confidence)


def test_compare_and_superiority_are_the_tests_of_scipy():
    rng = np.random.default_rng(3)
    verdicts: dict = {compare: set(), superiority: set()}
    for _ in range(400):
        n, m = int(rng.integers(2, 80)), int(rng.integers(1, 6))
        margin, alpha = rng.uniform(0.02, 0.1), rng.uniform(0.01, 0.2)
        a, b = as_runs(rng.normal(rng.uniform(-0.08, 0.08), rng.uniform(0.01, 0.2), n))
        x, y = np.array(list(a.values())), np.array([b[q] for q in a])
        t = stats.ttest_rel(x, y)
        tost = max(
            stats.ttest_rel(x + margin, y, alternative="greater").pvalue,
            stats.ttest_rel(x - margin, y, alternative="less").pvalue,
        )

        found = compare(a, b, margin=margin, alpha=alpha, comparisons=m)
        interval = t.confidence_interval(0.95)
        assert (found.n, found.margin) == (n, margin)
        assert found.difference == pytest.approx((x - y).mean())
        assert found.ci == pytest.approx((interval.low, interval.high))
        assert found.p_t == pytest.approx(t.pvalue)
        assert found.p_tost == pytest.approx(tost)
        different = "different" if t.pvalue * m < alpha else "undecided"
        assert found.verdict == ("equivalent" if tost * m < alpha else different)

        better = superiority(a, b, margin=margin, alpha=alpha)
        assert better.p_t == found.p_t
        sign = "better" if x.mean() > y.mean() else "worse"
        equivalent = "equivalent" if tost < alpha else "undecided"
        assert better.verdict == (sign if t.pvalue < alpha else equivalent)
        verdicts[compare].add(found.verdict)
        verdicts[superiority].add(better.verdict)
    assert verdicts[compare] == {"equivalent", "different", "undecided"}
    assert verdicts[superiority] == {"better", "worse", "equivalent", "undecided"}


def test_a_small_sure_difference_is_equivalent_and_better():
    a, b = as_runs([0.010, 0.012, 0.008, 0.011, 0.009])
    assert compare(a, b).verdict == "equivalent"
    assert superiority(a, b).verdict == "better"
    assert superiority(b, a).verdict == "worse"


@pytest.mark.parametrize(
    ("difference", "verdicts", "p"),
    [
        (0.0, ("equivalent", "equivalent"), (1, 0)),
        (0.02, ("equivalent", "better"), (0, 0)),
        (-0.3, ("different", "worse"), (0, 1)),
    ],
)
def test_compare_without_variance(difference, verdicts, p, recwarn):
    base = np.random.default_rng(0).uniform(0.3, 0.6, 43)
    a = {f"q{i}": x + difference for i, x in enumerate(base)}
    b = {f"q{i}": x for i, x in enumerate(base)}
    for test, verdict in zip((compare, superiority), verdicts, strict=True):
        found = test(a, b)
        assert (found.verdict, found.p_t, found.p_tost) == (verdict, *p)
        assert found.ci == pytest.approx((difference, difference))
    assert len(recwarn) == 0


@pytest.mark.parametrize("test", [compare, superiority])
@pytest.mark.parametrize("options", [{"margin": 0.0}, {"margin": math.nan}, {"alpha": 0.5}])
def test_compare_rejects_senseless_settings(test, options):
    with pytest.raises(ValueError, match="must"):
        test(PAIR, PAIR, **options)


@pytest.mark.parametrize(
    ("measure", "expected"),
    [
        ("R@100", "R(rel=1)@100"),
        ("Recall@100", "R(rel=1)@100"),
        ("Success@5", "Success(rel=1)@5"),
        ("RR@10", "RR(rel=1)@10"),
        ("AP", "AP(rel=1)"),
        ("P@10", "P(rel=1)@10"),
        ("P(judged_only=True)@10", "P(rel=1,judged_only=True)@10"),
        ("IPrec@0.1", "IPrec(rel=1)@0.1"),
        ("nDCG@10", "nDCG@10"),
        ("NumRet", "NumRet"),
        ("R(rel=2)@100", "R(rel=2)@100"),
        ("R(rel=1)@100", "R(rel=1)@100"),
    ],
)
def test_the_level_of_a_binary_measure_stands_in_its_name(measure, expected):
    assert named(measure) == expected
    qrels, run = random_data(5)
    assert [*evaluate(qrels, run, [measure]).per_query.values()] == [
        *evaluate(qrels, run, [expected]).per_query.values()
    ]


@pytest.mark.parametrize("measure", ["nDCG@-3", "Hits@5", "R", "nDCG 10", ""])
def test_a_measure_that_cannot_be_computed_has_no_name(measure):
    with pytest.raises(ValueError, match="cannot compute the measure"):
        named(measure)
