import math

import ir_measures
import numpy as np
import pytest

from adaptive_margins.evaluation.measures import MeasureError, evaluate, named, relevant

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


def compatibility(judged, ranked, p):
    """RBO of a ranking and the ideal one that is most like it, to the end of the longer one."""
    ideal = [d for d in ranked if judged.get(d, 0) > 0]
    ideal += [d for d, grade in judged.items() if grade > 0 and d not in ranked]
    ideal.sort(key=judged.__getitem__, reverse=True)

    def overlap(a, b):
        depths = range(1, max(len(ranked), len(ideal)) + 1)
        return sum(p**d * len({*a[:d]} & {*b[:d]}) / d for d in depths)

    return overlap(ranked, ideal) / overlap(ideal, ideal) if ideal else 0.0


@pytest.mark.parametrize("seed", range(4))
def test_compatibility_prefers_found_passages_among_equals(seed):
    qrels, run = random_data(seed)
    (found,) = evaluate(qrels, run, ["Compat(p=0.8)"]).per_query.values()
    expected = {q: compatibility(qrels[q], ranking(run.get(q, {})), 0.8) for q in qrels}
    assert found == pytest.approx(expected, abs=1e-12)


def test_gdeval_refuses_grades_above_four():
    qrels = {"q1": {"a": 4}, "q2": {"b": 1, "a": 16}}
    for measure in ("ERR@10", "nDCG(dcg='exp-log2')@10"):
        with pytest.raises(MeasureError, match="grades of at most 4") as error:
            evaluate(qrels, {"q1": {"a": 1.0}}, [measure])
        assert "\n" not in str(error.value)
    assert evaluate(qrels, {"q1": {"a": 1.0}}, ["nDCG@10"]).mean == {"nDCG@10": 0.5}


@pytest.mark.parametrize(
    ("value", "qid", "message"),
    [(math.nan, "2", "of query 'b' is nan"), (math.inf, "1", "of query 'a' is inf")],
)
def test_what_a_tool_answers_is_checked(monkeypatch, value, qid, message):
    monkeypatch.setattr(
        ir_measures, "iter_calc", lambda measures, *_: [ir_measures.Metric(qid, measures[0], value)]
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
     "ERR_IA@10", "STREC@10", "nERR@10", "SDCG@10", "SDCG(max_rel=3)@10", "INST(T=1)", "RBP(p=0.8)@10", "IPrec@2.0", "IPrec@0.101",
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
        ("ndcg_cut_10", "nDCG@10"), ("ndcg_cut.10", "nDCG@10"), ("map", "AP"),
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
