"""Collections of ir_datasets read into memory."""

from __future__ import annotations

from pathlib import Path

import ir_datasets
import pytest
from ir_datasets.datasets.base import Dataset
from ir_datasets.formats import TrecQrels, TsvDocPairs, TsvDocs, TsvQueries
from ir_datasets.util import Download, RequestsDownload, StringFile

import irds_miniature
from adaptive_margins.data import ir_datasets as module
from adaptive_margins.data.ir_datasets import (
    ACCEPT_VARIABLE,
    DownloadError,
    LicenceError,
    read_collection,
    thinned,
)
from adaptive_margins.data.text import DataError

DOCS = TsvDocs(StringFile("a\tfirst passage\nb\t\nc\tthird\n"))


def register(name: str, *parts: object) -> str:
    ir_datasets.registry.register(name, Dataset(*parts))
    return name


def judged(prefix: str, number: int, docs: TsvDocs = DOCS) -> list[object]:
    queries = TsvQueries(StringFile(f"{prefix}1\tquery {number}\n{prefix}2\tanother {number}\n"))
    return [docs, queries, TrecQrels(StringFile(f"{prefix}1 0 a {number}\n"), {})]


def test_an_ir_datasets_id_with_triples(tmp_path: Path, monkeypatch) -> None:
    mini = irds_miniature.register(tmp_path, "am-sources", passages=50, train=20, test=4, triples=300)  # fmt: skip
    collection = read_collection(mini.triples)
    assert (len(collection.passages), list(collection.queries)) == (50, ["train"])
    assert read_collection(mini.passages).qrels == collection.qrels  # its only child
    assert (len(collection.queries["train"]), len(collection.qrels["train"])) == (20, 18)
    pairs = [tuple(pair) for pair in ir_datasets.load(mini.triples).docpairs_iter()]
    assert len(pairs) == 300 and collection.triples == pairs
    monkeypatch.setattr(module, "MAX_TRIPLES", 100)
    assert read_collection(mini.triples).triples == pairs[::4]
    test = read_collection(mini.sets["dl19"])
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
        collection = read_collection(source)
        assert {name: list(texts.ids) for name, texts in collection.queries.items()} == {
            "train": ["train1", "train2"], "validation": ["dev1", "dev2"], "test": ["test1", "test2"],
        }  # fmt: skip
        assert collection.qrels["validation"] == {"dev1": {"a": 2}}
    assert list(read_collection("am-family/other").queries) == ["test"]
    # The same docids, other passages.
    register("am-family/other/test", *judged("x", 1, TsvDocs(StringFile("a\tanother\n"))))
    assert list(read_collection("am-family/other").queries["test"].ids) == ["other1", "other2"]
    assert read_collection("am-family/other/test").queries["test"].ids == ["x1", "x2"]
    assert not read_collection(register("am-passages", DOCS)).queries


def test_what_cannot_be_used_is_left_out_and_said() -> None:
    queries = TsvQueries(StringFile("q1\tone\nq2\t\n"))
    qrels = TrecQrels(StringFile("q1 0 a 1\nq1 0 a 2\nq1 0 zz 1\nq2 0 a 1\nq9 0 a 1\n"), {})
    pairs = TsvDocPairs(StringFile("q1\ta\tc\nq2\ta\tc\nq1\tzz\tc\n"))
    source = register("am-left-out", DOCS, queries, qrels, pairs)
    with pytest.warns(UserWarning) as caught:
        collection = read_collection(source)
    said, empty = (str(warning.message) for warning in caught)
    for part in (
        "am-left-out: left out", "am-left-out queries:2: the text of 'q2' is empty",
        "am-left-out qrels:2: 'q1' judges 'a' twice", "am-left-out qrels:3: unknown passage 'zz'",
        "am-left-out qrels:4: unknown query 'q2' (and 1 more line like it)",
        "am-left-out docpairs:2: the triple has an unknown query or passage (and 1 more line like it)",
    ):  # fmt: skip
        assert part in said
    assert "'b' (number 2)" in empty
    assert collection.qrels == {"train": {"q1": {"a": 1}}}
    assert collection.triples == [("q1", "a", "c")]


def test_ids_that_no_file_can_hold() -> None:
    for name, text, said in (
        ("am-white", "a b\tx\n", "docs:1: id 'a b' is empty or has white space"),
        ("am-twice", "a\tx\nb\ty\na\tz\n", "docs:3: id 'a' occurs already in line 1"),
    ):
        with pytest.raises(DataError, match=f"{name} {said}"):
            read_collection(register(name, TsvDocs(StringFile(text))))


def test_titles_of_ir_datasets() -> None:
    from ir_datasets.datasets.beir import BeirTitleDoc

    class Docs(TsvDocs):
        def docs_iter(self):
            yield BeirTitleDoc("d1", "the\ttext", "A\ntitle")
            yield BeirTitleDoc("d2", "second", "")

    source = register("am-titles", Docs(StringFile("")))
    collection = read_collection(source)
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
        read_collection(source)
    monkeypatch.setenv(ACCEPT_VARIABLE, source)
    with pytest.raises(DownloadError, match="ConnectionError"):
        read_collection(source)
    (tmp_path / "d.tsv").write_text("a\there by now\n")
    monkeypatch.delenv(ACCEPT_VARIABLE)
    assert read_collection(source).passages["a"] == "here by now"


def test_thinning_keeps_even_distances() -> None:
    assert thinned(range(10), 10) == list(range(10))
    for count in (11, 37, 160, 1001):
        kept = thinned(iter(range(count)), 10)
        assert 5 <= len(kept) <= 10
        assert kept == list(range(0, count, kept[1]))
