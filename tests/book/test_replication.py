"""Rows of Table 3 against external runs of the same name."""

from __future__ import annotations

import ast
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest

from adaptive_margins import paper
from adaptive_margins.data.trec import write_run
from adaptive_margins.paper.store import StoredRun

NOTEBOOK = Path(__file__).resolve().parents[2] / "notebooks" / "05_comparison.ipynb"
CELLS = {cell.id: cell.source for cell in nbformat.read(NOTEBOOK, as_version=4).cells}


def replicated(reproduction, data) -> tuple[pd.DataFrame, str]:
    """What the notebook's cell finds, and its text."""
    tree = ast.parse(CELLS["setup"])
    tree.body = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    variables = {"reproduction": reproduction, "data": data}
    exec(compile(tree, "setup", "exec"), variables)
    exec(CELLS["replication"], variables)
    return variables["replicated"], variables["text"]


def test_external_runs_are_compared_with_the_rows_of_their_name(smoke, tmp_path):
    data = smoke.table3()
    assert replicated(smoke, data)[0].empty  # nothing is supplied
    for name in ("runs", "collections", "cache"):
        (tmp_path / name).symlink_to(smoke.home / name)
    rows = data[(data["encoder"] == "minilm-4") & ~data["in_batch"]].drop_duplicates("run_id")
    ours = {r.target: StoredRun(smoke.store.folder / r.run_id) for r in rows.itertuples()}
    for name, target in (
        ("static", "static"),
        ("distributed", "distributed"),
        ("adaptive", "distributed"),
    ):
        run = ours[target].run("full", "test1")
        write_run(run, tmp_path / "supplied" / "test1" / f"minilm-4-{name}.run.gz", "x")
    write_run(run, tmp_path / "supplied" / "test1" / "another.run", "x")
    # Of two queries only; and too shallow for one measure of two.
    part = {qid: run[qid] for qid in list(run)[:2]}
    write_run(part, tmp_path / "supplied" / "test1" / "minilm-3-static.run", "x")
    shallow = {qid: dict(list(hits.items())[:10]) for qid, hits in run.items()}
    write_run(shallow, tmp_path / "supplied" / "test1" / "minilm-3-distributed.run", "x")
    found, text = replicated(paper.open("smoke", tmp_path), data)
    assert text.startswith("Not compared: minilm-3-distributed, test1: R(rel=2)@20 needs 20 hits")
    others = found[found["row"].str.startswith("minilm-3")].set_index(["row", "measure"])["queries"]
    assert others["minilm-3-static"].tolist() == [2, 2]
    assert dict(others["minilm-3-distributed"]) == {"nDCG@10": len(run)}
    found = found[found["row"].str.startswith("minilm-4")]
    assert (found["queries"] == len(run)).all()
    assert set(found["row"]) == {"minilm-4-static", "minilm-4-distributed", "minilm-4-adaptive"}
    assert set(found["set"]) == {"test1"}
    for row in found.to_dict("records"):
        theirs = ours["static" if row["row"].endswith("static") else "distributed"]
        mine = ours[row["row"].rpartition("-")[2]]
        scores, own = (
            x.evaluation("full", "test1").per_query[row["measure"]] for x in (theirs, mine)
        )
        error = np.sqrt(np.mean([(scores[q] - own[q]) ** 2 for q in own]))
        assert row["RMSE"] == pytest.approx(error, abs=1e-12)
        if row["row"] != "minilm-4-adaptive":  # the same run
            assert (row["Kendall's τ"], row["RBO"]) == pytest.approx((1, 1))
        if row["row"] == "minilm-4-distributed":
            assert row["ΔRI"] == pytest.approx(0, abs=1e-12)
            assert row["effect ratio"] == pytest.approx(1) or np.isnan(row["effect ratio"])
        if row["row"] == "minilm-4-static":
            assert np.isnan(row["effect ratio"])  # it is the baseline
