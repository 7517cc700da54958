"""A collection by one word."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from adaptive_margins.data import pydocs, sources
from adaptive_margins.data.sources import open_collection
from adaptive_margins.data.text import DataError


def test_a_folder_comes_before_everything_else(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "vaswani").mkdir()
    (tmp_path / "vaswani" / "corpus.jsonl").write_text('{"_id": "d", "title": "T", "text": "x"}\n')
    monkeypatch.chdir(tmp_path)
    collection = open_collection("vaswani")
    assert (collection.name, list(collection.passages.texts)) == ("vaswani", ["T x"])
    assert collection.titles == {"d": "T"}
    with pytest.raises(DataError, match=r"(?s)is a file; expected the folder it lies in:.*BEIR"):
        open_collection("vaswani/corpus.jsonl")


@pytest.mark.parametrize(
    "source", ["vaswany", "/no/such/folder", "", "pydoc:numpy", "~no-such-user/x"]
)
def test_anything_else_lists_the_ways(source: str) -> None:
    with pytest.raises(DataError) as error:
        open_collection(source)
    for way in ("corpus.jsonl", "collection.tsv", "save_to_disk", "pydocs:numpy,scipy", "beir/scifact"):  # fmt: skip
        assert way in str(error.value)
    assert ("did you mean vaswani" in str(error.value)) == (source == "vaswany")


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
    with pytest.raises(DataError, match="package 'no_such_package' is not"):
        open_collection("pydocs:no_such_package")
    with pytest.raises(DataError, match="names no package"):
        open_collection("pydocs:")
