"""The page "What to expect" shows what the trainings' reports say."""

from __future__ import annotations

from pathlib import Path

import pytest

from adaptive_margins.book import expect

COMMITTED = Path(__file__).resolve().parents[2] / "book" / expect.FILE


def row(seed: int, kept: str, verdict: str, difference: float, start: float = 0.4) -> dict:
    trained = start + difference
    found = {
        "difference": difference, "ci": [difference - 0.01, difference + 0.01], "p_t": 0.0123, "p_tost": 0.25, "verdict": verdict,
    }  # fmt: skip
    measures = {
        system: {"nDCG@10": value}
        for system, value in (
            ("start", start),
            ("trained", trained),
            ("bm25", 0.3),
            ("hybrid", 0.5),
        )
    }
    return {
        "collection": {"name": "Zoo", "sets": {"test": 90}}, "encoder": "MiniLM", "target": "distributed", "seed": seed,
        "triples": {"used": 2048}, "kept": kept, "measures": measures, "seconds": {"a": 60.0, "b": 5.0},
        "comparisons": {"trained vs start": found, "trained vs bm25": {"verdict": "better"}},
        "verdict": f"Sentence {seed}.", "machine": "A machine", "date": "2026-01-02",
    }  # fmt: skip


ROWS = [
    row(1, "trained", "better", 0.05),
    row(2, "trained", "worse", -0.03),
    row(3, "start", "equivalent", 0.0),
    row(4, "trained", "undecided", 0.01, start=0.5),
]


def test_the_summary_counts():
    assert expect.summary(ROWS) == (
        "In 1 of 4 trainings the original encoder was kept; in 1 the trained one was better on the test queries, in 1 the trained"
        " one was **worse** on the test queries, in 1 the trained one was neither shown to be better, nor worse, nor"
        " equivalent."
    )
    assert expect.summary(ROWS[2:3]) == "In 1 of 1 trainings the original encoder was kept."


def test_means_over_seeds_and_each_training():
    page = expect.page(ROWS)
    lines = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| ")]
    means = next(line for line in lines if line[0] == "Zoo, MiniLM" and line[2] == "90")
    assert [float(x) for x in means[3:7]] == [0.425, pytest.approx(0.4325, abs=6e-4), 0.3, 0.5]
    assert means[7] == "3 of 4"
    each = [line for line in lines if line[0] == "Zoo, MiniLM" and line[2] == "2,048"]
    assert [line[1] for line in each] == ["1", "2", "3", "4"]
    assert each[0][3:] == ["+0.050 [+0.040, +0.060]", "0.012, 0.250", "better", "better", "1:05"]
    assert each[2][3:6] == ["original kept", "", ""]
    assert all(f"seed {r['seed']}: Sentence {r['seed']}." in page for r in ROWS)
    assert "A machine, 2026-01-02" in page


def test_the_committed_trainings_are_whole():
    rows = expect.read(COMMITTED)
    assert {"Cranfield", "Vaswani", "networkx"} <= {r["collection"]["name"] for r in rows}
    keys = [(r["collection"]["name"], r["encoder"], r["target"], r["seed"]) for r in rows]
    assert len(set(keys)) == len(keys)
    for r in rows:
        start, trained = (r["measures"][system] for system in ("start", "trained"))
        difference = trained["nDCG@10"] - start["nDCG@10"]
        assert r["comparisons"]["trained vs start"]["difference"] == pytest.approx(difference)
        assert (r["kept"] == "trained") or start == trained
        assert "/" not in r["collection"]["name"]
    assert "source" not in str([r["collection"].keys() for r in rows])
