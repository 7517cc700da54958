"""Query sets split for training."""

from __future__ import annotations

import dataclasses

import pytest

from adaptive_margins.data import splits
from adaptive_margins.data.collection import Collection, Texts
from adaptive_margins.data.splits import fold_queries, split_queries
from adaptive_margins.data.text import DataError


def collection_of(**sizes: int) -> Collection:
    """Sets of so many queries; every tenth is judged with grade 0 only, every eleventh not at all."""
    queries, qrels = {}, {}
    for name, size in sizes.items():
        queries[name] = Texts(
            [f"{name}{i}" for i in range(size)], [f"{name} {i}" for i in range(size)]
        )
        qrels[name] = {f"{name}{i}": {"a": int(i % 10 > 0)} for i in range(size) if i % 11}
    first = next(iter(sizes), "train")
    triples = [(qid, "a", "b") for qid in queries.get("train", Texts([], [])).ids]
    assert first in queries or not sizes
    return Collection("some", Texts(["a", "b"], ["x", "y"]), queries, qrels, {}, triples)


def relevant(collection: Collection, name: str) -> set[str]:
    return {qid for qid, grades in collection.qrels[name].items() if max(grades.values()) > 0}


@pytest.mark.parametrize("name", ["train", "test", "validation"])
def test_one_set_is_split_into_three(name: str) -> None:
    whole = collection_of(**{name: 220})
    count = len(relevant(whole, name))
    split, sentence = split_queries(whole, seed=3)
    sizes = {part: len(texts) for part, texts in split.queries.items()}
    assert sizes == {
        "test": round(0.4 * count),
        "validation": round(0.2 * count),
        "train": count - round(0.4 * count) - round(0.2 * count),
    }
    parts = [set(texts.ids) for texts in split.queries.values()]
    assert set.union(*parts) == relevant(whole, name) and sum(map(len, parts)) == count
    for part, texts in split.queries.items():
        assert split.qrels[part] == {qid: whole.qrels[name][qid] for qid in texts.ids}
        assert [whole.queries[name][qid] for qid in texts.ids] == list(texts.texts)
    kept = split.queries["train"].ids if name == "train" else []
    assert [triple[0] for triple in split.triples] == list(kept)
    assert split_queries(whole, seed=3) == (split, sentence)
    assert split_queries(whole, seed=4)[0].queries != split.queries
    for number in (count, *sizes.values()):
        assert str(number) in sentence
    assert f"only set ({name})" in sentence and "seed 3" in sentence and "uncertain" not in sentence


def test_large_sets_give_no_more_than_is_useful() -> None:
    split, _ = split_queries(collection_of(train=8000), seed=1)
    assert len(split.queries["test"]) == splits.MOST_TEST
    assert len(split.queries["validation"]) == splits.MOST_VALIDATION


@pytest.mark.parametrize(
    ("sizes", "source", "test"),
    [
        ({"train": 220, "test": 30}, "train", "test"),
        ({"train": 220, "validation": 30}, "train", "validation"),
        ({"validation": 220, "test": 30}, "validation", "test"),
        ({"train": 5000, "test": 30}, "train", "test"),
    ],
)
def test_a_missing_set_is_taken_from_the_training_queries(
    sizes: dict, source: str, test: str
) -> None:
    whole = collection_of(**sizes)
    split, sentence = split_queries(whole, seed=1)
    count = len(relevant(whole, source))
    validation = set(split.queries["validation"].ids)
    assert len(validation) == min(count // 5, 300) and validation <= relevant(whole, source)
    assert set(split.queries["train"].ids) == set(whole.queries[source].ids) - validation
    assert split.queries["test"] == whole.queries[test] and split.qrels["test"] == whole.qrels[test]
    assert not validation & {triple[0] for triple in split.triples}
    if source == "train":
        assert len(split.triples) == sizes["train"] - len(validation)
    assert f"There is no set {({'train', 'validation', 'test'} - set(sizes)).pop()}" in sentence


def test_what_is_complete_stays_and_what_is_small_is_said() -> None:
    whole = collection_of(train=9, validation=5, test=5)
    same, sentence = split_queries(whole, seed=1)
    assert same is whole and sentence == ""
    _, sentence = split_queries(collection_of(train=50, test=5), seed=1)
    assert "With 8 validation queries, their measures are uncertain." in sentence


def test_queries_of_the_same_text_stay_together() -> None:
    whole = collection_of(test=100)
    texts = [f"Query   {i % 20}" if i % 2 else f"query {i % 20}" for i in range(100)]
    whole = dataclasses.replace(
        whole,
        queries={"test": Texts(whole.queries["test"].ids, texts)},
        qrels={"test": {qid: {"a": 1} for qid in whole.queries["test"].ids}},
    )
    for seed in range(5):
        split, _ = split_queries(whole, seed=seed)
        seen = [
            {" ".join(t.lower().split()) for t in texts.texts} for texts in split.queries.values()
        ]
        assert sum(map(len, seen)) == len(set.union(*seen)) == 20


def test_without_enough_judged_queries() -> None:
    empty = collection_of()
    with pytest.raises(DataError, match=r"no query has a relevant passage .*pseudo-queries"):
        split_queries(empty, seed=1)
    with pytest.raises(DataError, match="no query has a relevant passage"):
        split_queries(collection_of(train=1), seed=1)
    with pytest.raises(
        DataError, match=r"some: 2 judged queries of the set test, of 2 .* are too few"
    ):
        split_queries(collection_of(test=3), seed=1)
    split, _ = split_queries(collection_of(test=4), seed=1)
    assert [len(texts) for texts in split.queries.values()] == [1, 1, 1]


@pytest.mark.parametrize("folds", [3, 5])
def test_each_query_is_in_one_fold_and_trains_no_encoder_that_ranks_it(folds: int) -> None:
    whole = collection_of(test=43)
    (*parts, last), sentence = fold_queries(whole, folds, seed=2)
    judged = {q for q, grades in whole.qrels["test"].items() if max(grades.values()) > 0}
    sets = [{name: {*texts.ids} for name, texts in part.queries.items()} for part in parts]
    sizes = [len(part["test"]) for part in sets]
    assert len(sizes) == folds
    assert max(sizes) - min(sizes) <= 1
    for name in ("test", "validation"):
        assert sorted(qid for part in sets for qid in part[name]) == sorted(judged)
    for part in sets:
        assert set.union(*part.values()) == judged
        assert sum(map(len, part.values())) == len(judged)
    assert {*last.queries["test"].ids} == judged
    kept = {name: {*last.queries[name].ids} for name in ("train", "validation")}
    assert kept["train"] | kept["validation"] == judged
    assert not kept["train"] & kept["validation"]
    assert f"Each of the {len(judged)} judged queries" in sentence
    assert fold_queries(whole, folds, seed=2)[0] == [*parts, last]
    assert fold_queries(whole, folds, seed=3)[0] != [*parts, last]


def test_folds_need_one_set_and_a_query_each() -> None:
    with pytest.raises(DataError, match=r"only set .* there are 2 \(train, test\)"):
        fold_queries(collection_of(train=9, test=9), 3, seed=1)
    with pytest.raises(DataError, match="are too few to split"):
        fold_queries(collection_of(test=4), 5, seed=1)
    assert "--folds 5" in split_queries(collection_of(test=100), seed=1)[1]
    assert "--folds" not in split_queries(collection_of(test=400), seed=1)[1]
