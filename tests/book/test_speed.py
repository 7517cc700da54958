"""The page on speed shows what stands in benchmarks/*.json, and nothing else."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from adaptive_margins.book import speed

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
with pytest.MonkeyPatch.context() as _patch:
    _patch.syspath_prepend(BENCHMARKS)
    curves, timing = map(importlib.import_module, ("curves", "timing"))


def read(name: str):
    return json.loads((BENCHMARKS / f"{name}.json").read_text("utf-8"))


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("| ").split(" | ")]


def test_committed_ratios_are_whole_and_consistent():
    rows = read("latest")
    assert len({(r["name"], r["setting"]) for r in rows}) == len(rows)
    for r in rows:
        low, high = r["spread"]
        assert low <= r["ratio"] <= high, r["name"]
        assert r["machine"] and re.fullmatch(r"20\d\d-\d\d-\d\d", r["date"])
        assert r["rounds"] >= 5 or "one measurement" in r["setting"], r["name"]
    settings = " ".join(r["setting"] for r in rows)
    for part in ("B 32, dropout 0.1", "B 32, dropout 0", "B 128", "12 × 768"):
        assert part in settings


def test_committed_exponents_are_those_of_the_values():
    grown = read("growth")
    assert {g["name"]: max(g["sizes"]) for g in grown} == {
        "training": 256, "peak memory of a step": 256, "encoding": 10_000,
        "building an index": 1_000_000, "searching it": 1_000_000, "searching exactly": 1_000_000,
    }  # fmt: skip
    for g in grown:
        slope = np.polyfit(np.log(g["sizes"]), np.log(g["values"]), 1)[0]
        assert g["exponent"] == pytest.approx(slope)


def test_the_page_has_every_figure():
    page = speed.page(BENCHMARKS)
    lines = [cells(line) for line in page.splitlines() if line.startswith("| ")]
    for r in read("latest"):
        ratio = f"**{r['ratio']:.2f}** [{r['spread'][0]:.2f}, {r['spread'][1]:.2f}]"
        assert any(line[:2] == [r["name"], ratio] for line in lines), r["name"]
    for i, r in enumerate(read("profile"), start=1):
        whole = sum(r["seconds"].values())
        for group, seconds in r["seconds"].items():
            assert [line[i] for line in lines if line[0] == group] == [
                f"{100 * seconds / whole:.0f}"
            ]
    for g in read("growth"):
        assert any(
            line[0].startswith(g["name"]) and float(line[2]) == round(g["exponent"], 2)
            for line in lines
        )
    for r in read("curves")["rows"]:
        found = [line for line in lines if f"{r['before']:.4f}" in line]
        assert any(f"{r['after']:.4f}" in line for line in found)


def test_a_panel_a_quantity():
    grown = [
        timing.growth("a", [1, 10, 100], [2, 20, 200], "texts", "s", "x"),
        timing.growth("b", [1, 10], [5, 5], "texts", "s", "x"),
    ]
    drawn = speed.figure(grown)
    titles = [ax.get_title(loc="left") for ax in drawn.axes if ax.axison]
    assert titles == ["a: exponent 1.00", "b: exponent 0.00"]
    fitted, values = drawn.axes[0].get_lines()
    np.testing.assert_allclose(fitted.get_ydata(), values.get_ydata())


def test_curves_are_paired_by_what_a_run_is(monkeypatch):
    class Run:
        def __init__(self, encoder, target, seed, version, values):
            self.key, self.values = f"{encoder} {target} {seed}", values
            self.config = curves.TrainingRun.model_construct(
                encoder=encoder, loss="margin", target=target, in_batch=False, batch_size=32, seed=seed,
                selection="nDCG@10", code_version=version,
            )  # fmt: skip

        @property
        def curve(self):
            return pd.DataFrame({"nDCG@10": self.values})

    homes = {
        Path("none"): [],
        Path("old"): [Run("a", 0.2, 1, 2, [0.1, 0.3, 0.2]), Run("a", 0.4, 1, 2, [0.1, 0.25])],
        Path("new"): [Run("a", 0.2, 1, 3, [0.1, 0.2]), Run("a", 0.4, 1, 3, [0.1, 0.35]), Run("b", "adaptive", 1, 3, [1.0])],
    }  # fmt: skip
    monkeypatch.setattr(curves, "trained", lambda home: {r.key: r for r in homes[home]})
    (row,) = curves.compare(Path("old"), Path("new"))
    assert row == {
        "encoder": "a", "target": "static", "in_batch": False, "batch_size": 32, "measure": "nDCG@10",
        "before": 0.3, "after": 0.35, "runs": 2,
    }  # fmt: skip
    with pytest.raises(SystemExit, match="no run in common"):
        curves.compare(Path("old"), Path("none"))
