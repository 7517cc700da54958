"""The command ``status``: what a home folder holds."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from adaptive_margins import cli
from adaptive_margins.data.collection import Collection, Texts
from adaptive_margins.evaluation.measures import Evaluation
from adaptive_margins.paper.store import Store
from conftest import run_config


@pytest.fixture
def call(monkeypatch, capsys):
    """Exit status, stdout and stderr of the command in this process."""

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        monkeypatch.setattr("sys.argv", ["adaptive-margins", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        return end.value.code or 0, *capsys.readouterr()

    return run


def contents(folder: Path) -> dict[str, float]:
    return {str(path): path.stat().st_mtime for path in folder.rglob("*")}


def test_status_of_nothing(call, tmp_path, monkeypatch):
    monkeypatch.setenv("ADAPTIVE_MARGINS_HOME", str(tmp_path / "home"))
    code, out, err = call("status", "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert found["home"] == str(tmp_path / "home")
    assert found["runs"] == {"finished": 0, "bytes": 0, "newest": None, "collections": {}}
    assert found["unfinished"] == found["collections"] == found["notebooks"] == []
    assert found["book"] is None
    assert {"laptop", "paper", "smoke"} <= set(found["profiles"])
    assert not (tmp_path / "home").exists()
    assert "Book: not built" in call("status")[1]


def test_status(call, tmp_path, monkeypatch):
    home = tmp_path / "home"
    monkeypatch.setenv("ADAPTIVE_MARGINS_HOME", str(home))
    store = Store(home / "runs")
    evaluations = {"rerank": {"validation": Evaluation({"nDCG@10": 0.5}, {"nDCG@10": {"q": 0.5}})}}
    stored = [store.put(run_config(seed=seed), None, evaluations, {}) for seed in (1, 2, 3)]
    os.utime(stored[1].path / "result.json", (2e9, 2e9))
    (home / "runs" / ".x.partial").mkdir()
    (home / "cache" / "work" / "abcd").mkdir(parents=True)
    (home / "cache" / "work" / "abcd" / "checkpoint").write_bytes(b"x" * 2000)
    os.utime(home / "cache" / "work" / "abcd" / "checkpoint", (1e9, 1e9))
    collection = Collection("words", Texts(["d"], ["text"]), {}, {})
    kept = home / "collections" / collection.fingerprint
    kept.mkdir(parents=True)
    (kept / "sources.json").write_text(json.dumps({"name": "words"}))
    receipts = home / "book" / "_executed" / "receipts"
    receipts.mkdir(parents=True)
    receipt = {
        "key": {"profile": ["smoke", ""]},
        "finished": "2025-01-02T03:04:05Z",
        "seconds": 3.2,
    }
    (receipts / "01_collection.json").write_text(json.dumps(receipt))
    (receipts / "02_broken.json").write_text("{")
    page = home / "_build" / "html" / "index.html"
    page.parent.mkdir(parents=True)
    page.write_text("")

    before = contents(home)
    code, out, _ = call("status", "--json")
    assert code == 0
    found = json.loads(out)
    size = sum(p.stat().st_size for run in stored for p in run.path.rglob("*") if p.is_file())
    assert found["runs"] == {
        "finished": 3,
        "bytes": size,
        "newest": {
            "run_id": stored[1].run_id,
            "encoder": "tiny",
            "target": "distributed",
            "time": "2033-05-18T03:33:20Z",
        },
        "collections": {"f" * 16: 3},
    }
    (unfinished,) = found["unfinished"]
    assert (unfinished["run_id"], unfinished["bytes"]) == ("abcd", 2000)
    assert unfinished["time"] == "2001-09-09T01:46:40Z"
    assert found["collections"] == [{"fingerprint": kept.name, "name": "words", "bytes": 17}]
    assert found["notebooks"] == [
        {
            "name": "01_collection",
            "profile": "smoke",
            "time": "2025-01-02T03:04:05Z",
            "seconds": 3.2,
        }
    ]
    assert found["book"] == str(page)
    text = call("status")[1]
    for words in ("Runs finished: 3 ", "abcd", "words", "01_collection", str(page)):
        assert words in text
    assert contents(home) == before
