import dataclasses
import logging

import pytest

from adaptive_margins.data.collection import Collection, Texts
from adaptive_margins.data.triples import (
    Checked,
    check_sample,
    check_triples,
    mine_triples,
    sample_triples,
)


def run_of(*docids: str) -> dict[str, float]:
    return {docid: float(-rank) for rank, docid in enumerate(docids)}


QRELS = {"q1": {"a": 3, "b": 2, "c": 1, "d": 0}, "q2": {"e": 3}}
RUN = {
    "q1": run_of("a", "n1", "c", "n2", "b", "n3", "d", "n4"),
    "q2": run_of("n1", "n2", "n3", "n4", "e", "n5", "n6", "n7"),
}


def test_positives_are_graded_and_negatives_are_unjudged_at_their_ranks() -> None:
    triples = sample_triples(QRELS, RUN, count=200, ranks=(2, 7), seed=1)
    pairs = {qid: {t[1] for t in triples if t[0] == qid} for qid in QRELS}
    negatives = {qid: {t[2] for t in triples if t[0] == qid} for qid in QRELS}
    assert pairs == {"q1": {"a", "b"}, "q2": {"e"}}
    # Ranks 2 to 6. c (grade 1) and d (grade 0) are judged, so they are never negatives.
    assert negatives == {"q1": {"n1", "n2", "n3"}, "q2": {"n2", "n3", "n4", "n5"}}


def test_min_grade() -> None:
    triples = sample_triples(QRELS, RUN, count=20, ranks=(2, 7), seed=1, min_grade=3)
    assert {t[1] for t in triples if t[0] == "q1"} == {"a"}


def test_one_triple_a_query_and_pass_with_new_negatives() -> None:
    qrels = {f"q{i}": {"p": 3} for i in range(10)}
    run = {qid: run_of("p", "n1", "n2", "n3") for qid in qrels}
    triples = sample_triples(qrels, run, count=30, ranks=(1, 5), seed=1)
    passes = [triples[i : i + 10] for i in (0, 10, 20)]
    for one in passes:
        assert sorted(t[0] for t in one) == sorted(qrels)
    assert len({tuple(t[0] for t in one) for one in passes}) == 3  # a fresh order each time
    assert len(set(triples)) == 30  # every query meets each of its three negatives once
    assert sample_triples(qrels, run, count=40, ranks=(1, 5), seed=1)[30:] != passes[0]


def test_deterministic_whatever_the_order_of_dicts_and_a_prefix_of_more() -> None:
    qrels = dict(reversed([(q, dict(reversed(j.items()))) for q, j in QRELS.items()]))
    run = {q: dict(reversed(scores.items())) for q, scores in RUN.items()}
    triples = sample_triples(QRELS, RUN, count=50, ranks=(1, 9), seed=7)
    assert sample_triples(qrels, run, count=50, ranks=(1, 9), seed=7) == triples
    assert sample_triples(QRELS, RUN, count=13, ranks=(1, 9), seed=7) == triples[:13]
    assert sample_triples(QRELS, RUN, count=50, ranks=(1, 9), seed=8) != triples
    assert triples[:4] == [
        ("q1", "b", "n3"), ("q2", "e", "n7"), ("q1", "a", "n1"), ("q2", "e", "n2"),
    ]  # fmt: skip


def test_ties_are_ranked_as_trec_eval_does() -> None:
    run = {"q": {"a": 1.0, "b": 1.0, "c": 1.0}}
    assert sample_triples({"q": {"x": 3}}, run, count=1, ranks=(1, 2), seed=1) == [("q", "x", "c")]


def test_queries_without_a_negative_are_skipped_and_counted(
    caplog: pytest.LogCaptureFixture,
) -> None:
    qrels = {**QRELS, "q3": {"a": 3}, "q4": {"a": 1}, "q5": {"n1": 3}}
    run = {**RUN, "q4": run_of("n1", "n2"), "q5": run_of("n1")}
    with caplog.at_level(logging.WARNING):
        triples = sample_triples(qrels, run, count=10, ranks=(1, 9), seed=1)
    assert {t[0] for t in triples} == {"q1", "q2"}
    assert "3 of 5 queries skipped" in caplog.text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"ranks": (90, 95)},
            "no triples: none of 2 queries has a passage of grade ≥ 2 and an unjudged",
        ),
        ({"min_grade": 4}, "grade ≥ 4"),
    ],
)
def test_what_cannot_be_sampled_is_an_error(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sample_triples(QRELS, RUN, **{"count": 10, "ranks": (1, 9), "seed": 1, **change})


def test_mined_triples_have_a_positive_with_text_and_a_candidate() -> None:
    passages = Texts(["p", "empty", "n1", "n2", "n3"], ["one", " ", "two", "three", "four"])
    qrels = {"q1": {"p": 1, "empty": 1}, "q2": {"p": 1}}
    run = {"q1": run_of("n1", "n2", "n3"), "q2": run_of("n3")}
    triples = mine_triples(qrels, run, passages, count=40, seed=1)
    assert set(triples) == {
        ("q1", "p", "n1"),
        ("q1", "p", "n2"),
        ("q1", "p", "n3"),
        ("q2", "p", "n3"),
    }
    assert {t[0] for t in triples[:2]} == {"q1", "q2"}  # one a query and pass
    assert mine_triples(qrels, run, passages, count=7, seed=1) == triples[:7]


GIVEN = Texts(
    ["p", "n", "twin", "bad", "empty"], ["The  otter", "A badger", "the OTTER ", "A heron", " "]
)
TRIPLES = [
    ("q", "p", "n"), ("q", "p", "twin"), ("q", "p", "bad"), ("q", "bad", "p"), ("q", "p", "p"), ("q", "p", "empty"),
    ("q", "n", "p"), ("q", "p", "n"), ("r", "bad", "n"), ("q", "p", "zero"),
]  # fmt: skip


def test_given_triples_are_checked_and_counted() -> None:
    passages = Texts([*GIVEN.ids, "zero"], [*GIVEN.texts, "A quokka"])
    qrels = {"q": {"p": 2, "bad": 1, "n": -1, "zero": 0}}
    queries = Texts(["q", "r"], ["what", "who"])
    found, checked = check_triples(TRIPLES, queries, qrels, passages)
    # A negative judged not relevant stays, and so does a positive that nobody judged.
    assert found == [("q", "p", "n"), ("r", "bad", "n"), ("q", "p", "zero")]
    assert dataclasses.asdict(checked) == {
        "checked": 10, "without_text": 1, "same_passage": 1, "negative_relevant": 3, "positive_not_relevant": 0,
        "same_text": 1, "repeated": 1,
    }  # fmt: skip
    assert checked.reasons.startswith("1 with an empty text, ") and ", 3 whose" in checked.reasons
    contradicted = check_triples([("q", "n", "zero")], queries, qrels, passages)[1]
    assert contradicted.positive_not_relevant == 1
    assert Checked(checked=9).reasons == ""


def test_checking_stops_when_enough_triples_are_found() -> None:
    found, checked = check_triples(iter(TRIPLES[:5]), Texts(["q"], ["what"]), {}, GIVEN, wanted=1)
    assert found == TRIPLES[:1] and checked.checked == 1
    everything, checked = check_triples(TRIPLES[:5], Texts(["q"], ["what"]), {}, GIVEN, wanted=9)
    assert len(everything) == 3 and checked.checked == 5


def test_the_triples_of_a_collection_are_checked_at_even_distances() -> None:
    queries = {"train": Texts(["q"], ["what"])}
    made = Collection(
        "c", GIVEN, queries, {"train": {"q": {"p": 1}}}, triples=[("q", "p", "twin")] * 9
    )
    assert check_sample(made) == Checked(checked=9, same_text=9)
    assert check_sample(made, most=4) == Checked(checked=3, same_text=3)
    assert check_sample(dataclasses.replace(made, triples=[])) == Checked()
