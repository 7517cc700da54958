"""Committed results: what is written of a finished profile, and what the front page shows of it."""

from __future__ import annotations

import gzip
import importlib
import json
from pathlib import Path

import pandas as pd
import pytest

from adaptive_margins import paper
from adaptive_margins.book import claims, edition, pages
from adaptive_margins.profiles.load import load_profile
from conftest import linked

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
with pytest.MonkeyPatch.context() as _patch:
    _patch.syspath_prepend(FOLDER)
    script = importlib.import_module("export_edition")


@pytest.fixture(scope="module")
def exported(smoke, tmp_path_factory):
    folder = tmp_path_factory.mktemp("edition") / "smoke"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "machine", lambda: {"processor": "another"})
        written = script.export(smoke, folder)
    assert written == sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
    return folder


def test_every_score_of_every_run_is_there(smoke, exported):
    frame = pd.read_parquet(exported / "per_query.parquet")
    facts = [json.loads(line) for line in (exported / "runs.jsonl").read_text().splitlines()]
    # The runs with batches of 4 are in Figure 5, all others in Figure 3 and the tables.
    assert {fact["run_id"] for fact in facts} == {p.name for p in smoke.store.folder.iterdir()}
    keys = ["run_id", "mode", "set", "measure"]
    means = frame[frame["step"] < 0].groupby(keys, observed=True)["value"].mean()
    for fact in facts:
        result = json.loads((smoke.store.folder / fact["run_id"] / "result.json").read_text())
        assert fact["config"]["collection"] == smoke.inputs.fingerprint
        assert fact["triples"] == result["triples"] and "full" not in fact
        for mode in {"rerank", "full", "exact"} & set(result):
            for name, found in result[mode].items():
                for measure, mean in found["mean"].items():
                    assert means[fact["run_id"], mode, name, measure] == pytest.approx(mean)
    during = frame[frame["step"] >= 0]
    one = smoke.experiments.figure4_runs()[0]
    curve = pd.read_parquet(smoke.store.path(one) / "curve.parquet").set_index("step")
    own = (
        during[during["run_id"] == one.run_id]
        .groupby(["measure", "step"], observed=True)["value"]
        .mean()
    )
    assert own["nDCG@10"].to_dict() == pytest.approx(curve["nDCG@10"].to_dict())


def test_frames_claims_and_rankings_are_those_of_the_profile(smoke, exported):
    found = edition.read(exported)
    assert set(found) == {*script.FRAMES, "convergence", "equivalence", "claims"}
    for name in script.FRAMES:
        assert len(found[name]) == len(getattr(smoke, name)())
    assert found["claims"]["claim"].tolist() == [rule.claim for rule in claims.rules()]
    assert set(found["claims"]["section"]) == set(claims.CHAPTERS)
    table = found["table3"]
    row = table[table["set"] == "test1"].iloc[0]
    with gzip.open(exported / "runs" / f"{row['run_id']}.test1.run.gz", "rt") as file:
        short = [line.split()[:3] for line in file]
    long = smoke.runner.ensure([smoke.experiments.table3_runs()[0]])[0].run("full", "test1")
    assert {qid for qid, *_ in short} == set(long)
    assert max(pd.Series([qid for qid, *_ in short]).value_counts()) == 20
    about = json.loads((exported / "about.json").read_text())
    assert about["profile"]["name"] == "smoke" and "--profile smoke" in about["command"]

    # Not the machine that exports.
    assert about["machine"] == smoke.bm25().result["machine"]


def test_committed_results_decide_for_the_quick_profile_alone(tmp_path):
    long = edition.committed("laptop")["claims"]
    assert edition.committed("laptop-long") == {} == edition.committed("smoke")
    long.assign(outcome="not decided").to_csv(tmp_path / "claims_1.csv", index=False)
    own = pages.tested(load_profile("laptop-long"), tmp_path)["claims.md"]
    assert own.count("**not decided**") == len(long)
    quick = pages.tested(load_profile("laptop"), tmp_path)["claims.md"]
    assert "quick run of this machine" in quick and quick.count("**supported**") > 1


def test_an_unfinished_profile_is_not_exported(smoke, tmp_path):
    linked(smoke.home, tmp_path, "collections", "cache")
    with pytest.raises(SystemExit, match=r"runs are missing.*--profile smoke --runs-only"):
        script.export(paper.open("smoke", tmp_path), tmp_path / "out")
    assert not (tmp_path / "out").exists()
