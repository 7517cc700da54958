from __future__ import annotations

import dataclasses
import random
import re

import numpy as np
import pytest

from adaptive_margins.data.collection import Texts
from adaptive_margins.data.mining import SAME_PASSAGE, FilterCounts, filter_negatives


def words(first: int, count: int) -> str:
    return " ".join(f"w{number}" for number in range(first, first + count))


PASSAGES = {
    "pos": words(0, 20),
    "other": words(100, 20),  # a second positive, of q2
    "judged": words(200, 20),
    "empty": " ",
    "same": "  " + words(0, 20).upper(),
    "near": words(0, 19) + " and",  # 19 of 21 words together: .905
    "far": words(0, 18) + " and more",  # 18 of 22: .82
    "close": words(300, 20),
    "clear": words(400, 20),
}
TEXTS = Texts(list(PASSAGES), list(PASSAGES.values()))
QRELS = {"q1": {"pos": 1, "judged": 0}, "q2": {"pos": 2, "other": 1}}
RUN = {qid: {docid: float(-n) for n, docid in enumerate(PASSAGES)} for qid in QRELS}
COSINES = {
    "q1": {"pos": 0.8, "other": 0.761, "far": 0.5, "close": 0.77, "clear": 0.75},
    "q2": {"pos": 0.8, "other": 0.4, "far": 0.39, "judged": 0.1, "close": 0.3, "clear": -0.2},
}


def cosine(qid: str, docids: list[str]) -> np.ndarray:
    return np.array([COSINES[qid][docid] for docid in docids])


def test_each_guard_drops_what_it_is_for_and_counts_it() -> None:
    kept, counts = filter_negatives(RUN, QRELS, TEXTS, similarity=cosine)
    # q1: the threshold is .95 × .8 = .76. q2: .95 × .4 = .38, of the positive with the lowest score.
    assert {qid: list(hits) for qid, hits in kept.items()} == {
        "q1": ["far", "clear"],
        "q2": ["judged", "close", "clear"],
    }
    assert kept["q1"] == {docid: RUN["q1"][docid] for docid in ("far", "clear")}
    assert dataclasses.asdict(counts) == {
        "queries": 2, "candidates": 18, "judged": 4, "without_text": 2, "same_text": 2, "near_duplicate": 2,
        "too_similar": 3, "random": 0, "without_negative": 0,
    }  # fmt: skip


def test_without_an_encoder_the_other_guards_remain() -> None:
    kept, counts = filter_negatives(RUN, QRELS, TEXTS, similarity=None)
    assert list(kept["q1"]) == ["other", "far", "close", "clear"]
    assert counts.too_similar == 0


@pytest.mark.parametrize(
    ("positive", "allowed"), [(0.5, [0.475, -1.0]), (-0.2, [-0.2101, -1.0]), (0.0, [0.0, -1.0])]
)
def test_the_threshold_is_below_the_positive_whatever_its_sign(
    positive: float, allowed: list[float]
) -> None:
    # The rule of sentence_transformers.util.mine_hard_negatives with relative_margin = 0.05.
    scores = {"p": positive, "a": 0.4751, "b": 0.475, "c": 0.0, "d": -0.2, "e": -0.2101, "f": -1.0}
    passages = Texts(list(scores), [f"text {docid} {docid}" for docid in scores])
    kept, _ = filter_negatives(
        {"q": dict.fromkeys(scores, 1.0)}, {"q": {"p": 1}}, passages,
        similarity=lambda qid, docids: np.array([scores[d] for d in docids]),
    )  # fmt: skip
    threshold = positive - 0.05 * abs(positive)
    expected = [d for d, score in scores.items() if d != "p" and score <= threshold]
    assert list(kept["q"]) == expected
    found = [scores[d] for d in kept["q"]]
    assert [max(found), min(found)] == allowed


def test_near_duplicates_are_those_of_a_naive_comparison() -> None:
    rng = random.Random(5)
    vocabulary = [f"w{number}" for number in range(40)]
    base = [rng.sample(vocabulary, rng.randint(5, 30)) for _ in range(6)]
    texts = [
        " ".join(rng.sample(one, len(one))[: len(one) - rng.randint(0, 3)] + rng.choices(vocabulary, k=rng.randint(0, 2)))
        for one in base for _ in range(40)
    ]  # fmt: skip
    passages = Texts([f"d{number}" for number in range(len(texts))], texts)
    positives = {f"q{n}": {f"d{40 * n}": 1, f"d{40 * n + 1}": 1} for n in range(6)}
    run = {qid: dict.fromkeys(passages.ids, 1.0) for qid in positives}
    kept, counts = filter_negatives(run, positives, passages, similarity=None)

    def jaccard(one: str, other: str) -> float:
        a, b = (set(re.findall(r"\w+", passages[docid])) for docid in (one, other))
        return len(a & b) / len(a | b)

    dropped = 0
    for qid, judged in positives.items():
        same = {passages[docid] for docid in judged}
        near = {
            docid for docid in passages.ids
            if docid not in judged and passages[docid] not in same
            and any(jaccard(docid, positive) >= SAME_PASSAGE for positive in judged)
        }  # fmt: skip
        dropped += len(near)
        expected = {d for d in passages.ids if d not in judged and d not in near and passages[d] not in same}  # fmt: skip
        assert set(kept[qid]) == expected
    assert counts.near_duplicate == dropped > 20


def test_a_query_with_no_candidate_left_gets_random_passages_that_pass_the_guards() -> None:
    run = {"q1": {"pos": 1.0, "same": 0.5}, "q2": {"clear": 1.0}}
    kept, counts = filter_negatives(run, QRELS, TEXTS, similarity=None, seed=3)
    assert set(kept["q1"]) == {"other", "far", "close", "clear"}  # all that the filters let pass
    assert set(kept["q1"].values()) == {0.0}
    assert kept["q2"] == {"clear": 1.0}
    assert (counts.random, counts.without_negative, counts.candidates) == (1, 0, 3)
    many = Texts([f"d{n}" for n in range(500)], [words(20 * n, 20) for n in range(500)])
    drawn = [
        filter_negatives({}, {"q": {"d0": 1}}, many, similarity=None, seed=seed)[0]["q"]
        for seed in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    assert [len(hits) for hits in drawn] == [10, 10, 10]


def test_a_query_that_nothing_is_a_negative_of_is_left_out_and_counted() -> None:
    two = Texts(["a", "b", "c"], ["one text", "ONE text", ""])
    kept, counts = filter_negatives({"q": {"b": 1.0}}, {"q": {"a": 1}}, two, similarity=None)
    assert kept == {}
    assert counts == FilterCounts(queries=1, candidates=1, same_text=1, without_negative=1)
    assert "their 1 candidates are 1 near duplicates" in counts.none_left()
    assert "relevant passage with text" in FilterCounts().none_left()


def test_queries_without_a_positive_with_text_are_left_out() -> None:
    qrels = {"q1": {"pos": 0}, "q2": {"empty": 2}, "q3": {"pos": 1}}
    run = {qid: {"clear": 1.0} for qid in ("q1", "q2", "q3", "q4")}
    kept, counts = filter_negatives(run, qrels, TEXTS, similarity=None)
    assert list(kept) == ["q3"]
    assert counts.queries == counts.candidates == 1


def test_the_result_does_not_depend_on_the_order_of_qrels() -> None:
    turned = {qid: dict(reversed(judged.items())) for qid, judged in reversed(QRELS.items())}
    assert filter_negatives(RUN, turned, TEXTS, similarity=cosine) == filter_negatives(RUN, QRELS, TEXTS, similarity=cosine)  # fmt: skip


def test_unknown_passages_are_named() -> None:
    with pytest.raises(KeyError, match="nowhere"):
        filter_negatives({"q1": {"nowhere": 1.0}}, QRELS, TEXTS, similarity=None)


def test_near_duplicates_of_text_without_spaces_are_found() -> None:
    one = "春天的时候企鹅常常在河边喝水生活在南极的海边主要捕食磷虾和小鱼身上有厚厚的羽毛研究者观察了很久"
    texts = Texts(["pos", "near", "other"], [one, one + "吧", "大熊猫住在四川的竹林里"])
    run = {"q": {"near": 2.0, "other": 1.0}}
    kept, counts = filter_negatives(run, {"q": {"pos": 1}}, texts, similarity=None)
    assert kept == {"q": {"other": 1.0}} and counts.near_duplicate == 1
