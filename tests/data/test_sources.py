"""A collection by one word, and its queries split for training."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import ir_datasets
import pytest
from ir_datasets.datasets.base import Dataset
from ir_datasets.formats import TrecQrels, TsvDocPairs, TsvDocs, TsvQueries
from ir_datasets.util import Download, RequestsDownload, StringFile

import irds_miniature
from adaptive_margins.data import pydocs, sources
from adaptive_margins.data.collection import Collection, Texts
from adaptive_margins.data.ir_datasets import ACCEPT_VARIABLE, DownloadError, LicenceError
from adaptive_margins.data.sources import open_collection, split_queries, thinned
from adaptive_margins.data.text import DataError

DOCS = TsvDocs(StringFile("a\tfirst passage\nb\t\nc\tthird\n"))


def register(name: str, *parts: object) -> str:
    ir_datasets.registry.register(name, Dataset(*parts))
    return name


def judged(prefix: str, number: int, docs: TsvDocs = DOCS) -> list[object]:
    queries = TsvQueries(StringFile(f"{prefix}1\tquery {number}\n{prefix}2\tanother {number}\n"))
    return [docs, queries, TrecQrels(StringFile(f"{prefix}1 0 a {number}\n"), {})]


# ---- open_collection -----------------------------------------------------------------------------------------------


def test_a_folder_comes_before_everything_else(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "vaswani").mkdir()
    (tmp_path / "vaswani" / "corpus.jsonl").write_text('{"_id": "d", "title": "T", "text": "x"}\n')
    monkeypatch.chdir(tmp_path)
    collection = open_collection("vaswani")
    assert (collection.name, list(collection.passages.texts)) == ("vaswani", ["T x"])
    assert collection.titles == {"d": "T"}
    with pytest.raises(DataError, match=r"(?s)is a file; expected the folder it lies in:.*BEIR"):
        open_collection("vaswani/corpus.jsonl")


@pytest.mark.parametrize("source", ["vaswany", "/no/such/folder", "", "pydoc:numpy"])
def test_anything_else_lists_the_ways(source: str) -> None:
    with pytest.raises(DataError) as error:
        open_collection(source)
    for way in ("corpus.jsonl", "collection.tsv", "save_to_disk", "pydocs:numpy,scipy", "beir/scifact"):  # fmt: skip
        assert way in str(error.value)
    assert ("Did you mean vaswani" in str(error.value)) == (source == "vaswany")


def test_a_home_that_cannot_be_written() -> None:
    code = "from adaptive_margins.data.sources import open_collection as o; o('typo')"
    variables = {**os.environ, "HOME": "/dev/null/x"}
    variables.pop("IR_DATASETS_HOME", None)
    call = subprocess.run(
        [sys.executable, "-c", code], env=variables, capture_output=True, text=True, check=False
    )
    last = call.stderr.splitlines()[-1]
    assert "DataError: there is no collection 'typo'" in last and "IR_DATASETS_HOME" in last


def test_pydocs(monkeypatch) -> None:
    small = open_collection("pydocs:typer")  # fewer queries than the usual sets
    count = {name: len(texts) for name, texts in small.queries.items()}
    total = sum(count.values())
    assert total // 10 <= count["validation"] < 2 * (total // 10) + 2
    assert 2 * (total // 5) <= count["test"] < count["train"] + 8
    assert small.name == "PyDocs" and "typer" in small.sources and not small.triples
    monkeypatch.setattr(sources, "PYDOCS_SIZES", (3, 5))
    built = pydocs.build_pydocs(
        ["typer"], seed=1, validation=3, test=5, max_passages=None, max_words=60
    )
    large = open_collection("pydocs: typer")
    assert large.passages == built.passages
    assert large.qrels == {
        "train": built.qrels["train"],
        "validation": built.qrels["validation"],
        "test": built.qrels["test1"] | built.qrels["test2"],
    }
    with pytest.raises(DataError, match="pydocs:no_such_package: package 'no_such_package' is not"):
        open_collection("pydocs:no_such_package")
    with pytest.raises(DataError, match="names no package"):
        open_collection("pydocs:")


def test_an_ir_datasets_id_with_triples(tmp_path: Path, monkeypatch) -> None:
    mini = irds_miniature.register(tmp_path, "am-sources", passages=50, train=20, test=4, triples=300)  # fmt: skip
    collection = open_collection(mini.triples)
    assert (len(collection.passages), list(collection.queries)) == (50, ["train"])
    assert open_collection(mini.passages).qrels == collection.qrels  # its only child
    assert (len(collection.queries["train"]), len(collection.qrels["train"])) == (20, 18)
    pairs = [tuple(pair) for pair in ir_datasets.load(mini.triples).docpairs_iter()]
    assert len(pairs) == 300 and collection.triples == pairs
    monkeypatch.setattr(sources, "MAX_TRIPLES", 100)
    assert open_collection(mini.triples).triples == pairs[::4]
    test = open_collection(mini.sets["dl19"])
    assert list(test.queries) == ["test"] and len(test.qrels["test"]) == 4
    assert test.sources == {
        "ir_datasets": ir_datasets.__version__, "passages": mini.sets["dl19"], "test": mini.sets["dl19"],
    }  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*passages without text")
def test_siblings_and_children_are_the_other_sets() -> None:
    register("am-family", DOCS)
    for number, name in enumerate(["train", "dev", "test", "other"], start=1):
        register(f"am-family/{name}", *judged(name, number))
    for source in ("am-family", "am-family/train", "am-family/dev", "am-family/test"):
        collection = open_collection(source)
        assert {name: list(texts.ids) for name, texts in collection.queries.items()} == {
            "train": ["train1", "train2"], "validation": ["dev1", "dev2"], "test": ["test1", "test2"],
        }  # fmt: skip
        assert collection.qrels["validation"] == {"dev1": {"a": 2}}
    assert list(open_collection("am-family/other").queries) == ["test"]
    # The same docids, other passages.
    register("am-family/other/test", *judged("x", 1, TsvDocs(StringFile("a\tanother\n"))))
    assert list(open_collection("am-family/other").queries["test"].ids) == ["other1", "other2"]
    assert open_collection("am-family/other/test").queries["test"].ids == ["x1", "x2"]
    assert not open_collection(register("am-passages", DOCS)).queries


def test_what_cannot_be_used_is_left_out_and_said() -> None:
    queries = TsvQueries(StringFile("q1\tone\nq2\t\n"))
    qrels = TrecQrels(StringFile("q1 0 a 1\nq1 0 a 2\nq1 0 zz 1\nq2 0 a 1\nq9 0 a 1\n"), {})
    pairs = TsvDocPairs(StringFile("q1\ta\tc\nq2\ta\tc\nq1\tzz\tc\n"))
    source = register("am-left-out", DOCS, queries, qrels, pairs)
    with pytest.warns(UserWarning) as caught:
        collection = open_collection(source)
    said, empty = (str(warning.message) for warning in caught)
    for part in (
        "1 queries of am-left-out without text", "1 judgements of unknown passages in am-left-out",
        "2 judgements of unknown queries in am-left-out", "1 repeated judgements in am-left-out",
        "2 triples with an unknown query or passage",
    ):  # fmt: skip
        assert part in said
    assert "'b' (number 2)" in empty
    assert collection.qrels == {"train": {"q1": {"a": 1}}}
    assert collection.triples == [("q1", "a", "c")]


def test_ids_that_no_file_can_hold() -> None:
    for name, text, said in (
        ("am-white", "a b\tx\n", "number 1: id 'a b' is empty or has white space"),
        ("am-twice", "a\tx\nb\ty\na\tz\n", "number 3: id 'a' occurs twice"),
    ):
        with pytest.raises(DataError, match=f"docs of '{name}', {said}"):
            open_collection(register(name, TsvDocs(StringFile(text))))


def test_titles_of_ir_datasets() -> None:
    from ir_datasets.datasets.beir import BeirTitleDoc

    class Docs(TsvDocs):
        def docs_iter(self):
            yield BeirTitleDoc("d1", "the\ttext", "A\ntitle")
            yield BeirTitleDoc("d2", "second", "")

    source = register("am-titles", Docs(StringFile("")))
    collection = open_collection(source)
    assert list(collection.passages.texts) == ["A title the text", " second"]
    assert collection.titles == {"d1": "A title"}


def test_nothing_is_fetched_without_consent(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("IR_DATASETS_DL_TRIES", "1")
    monkeypatch.delenv(ACCEPT_VARIABLE, raising=False)
    url = "http://127.0.0.1:9/nobody-listens"
    remote = Download([RequestsDownload(url)], cache_path=tmp_path / "d.tsv", size_hint=1234)
    source = register("am-remote", TsvDocs(remote))
    with pytest.raises(
        LicenceError, match=rf"(?s){url} \(1,234 bytes\).*{ACCEPT_VARIABLE}={source}"
    ):
        open_collection(source)
    monkeypatch.setenv(ACCEPT_VARIABLE, source)
    with pytest.raises(DownloadError, match="ConnectionError"):
        open_collection(source)
    (tmp_path / "d.tsv").write_text("a\there by now\n")
    monkeypatch.delenv(ACCEPT_VARIABLE)
    assert open_collection(source).passages["a"] == "here by now"


def test_thinning_keeps_even_distances() -> None:
    assert thinned(range(10), 10) == list(range(10))
    for count in (11, 37, 160, 1001):
        kept = thinned(iter(range(count)), 10)
        assert 5 <= len(kept) <= 10
        assert kept == list(range(0, count, kept[1]))


# ---- split_queries -------------------------------------------------------------------------------------------------


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
    assert f"only set ({name})" in sentence and "seed 3" in sentence and "little" not in sentence


def test_large_sets_give_no_more_than_is_useful() -> None:
    split, _ = split_queries(collection_of(train=8000), seed=1)
    assert len(split.queries["test"]) == sources.MOST_TEST
    assert len(split.queries["validation"]) == sources.MOST_VALIDATION


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
    assert "With 8 queries, validation says little." in sentence


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
