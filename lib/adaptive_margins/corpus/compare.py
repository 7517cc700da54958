"""Compare TREC run files pair by pair. Imports nothing heavy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from adaptive_margins.data.trec import read_marked_run, read_qrels
from adaptive_margins.errors import ArgumentError
from adaptive_margins.evaluation.comparison import compare_runs, run_names
from adaptive_margins.files import atomic_file

PLOTS = (".png", ".svg", ".pdf")
"""What the name of a plot may end in."""


def compare_files(
    qrels: Path,
    runs: Sequence[Path],
    measure: str = "nDCG@10",
    margin: float = 0.05,
    *,
    complete: bool = False,
    plot: Path | None = None,
    baseline: Path | None = None,
) -> dict[str, Any]:
    """Compare every two run files, or all others with one, by paired tests (`compare_runs`).

    Args:
        qrels: judgements, as TREC or BEIR write them.
        runs: TREC runs, two or more; named by their files (`run_names`).
        measure: in ir_measures' notation.
        margin: the largest mean difference that counts as equivalent, above 0.
        complete: whether all runs have every hit that could be found. Otherwise those do whose tag
            states it.
        plot: a file for a figure of the differences per query.
        baseline: the run that others are compared with; it may be one of ``runs``.

    Returns:
        As `compare_runs`, and ``plot``.

    Raises:
        ArgumentError: fewer than two runs, or a margin or a plot that cannot be.
        DataError: a file is malformed; the message names file and line.
        ComparisonError: a run is not deep enough for the measure.
    """
    if baseline:
        runs = [baseline, *(run for run in runs if run.resolve() != baseline.resolve())]
    if len(runs) < 2:
        raise ArgumentError("runs", f"two or more are needed, got {len(runs)}")
    if not 0 < margin < math.inf:
        raise ArgumentError("margin", f"expected a number above 0, got {margin}")
    if plot and plot.suffix not in PLOTS:
        expected = ", ".join(PLOTS)
        raise ArgumentError("plot", f"expected a name that ends in {expected}, got {plot}")
    judged = read_qrels(qrels)
    names = run_names(runs)
    read = {name: read_marked_run(path) for name, path in zip(names, runs, strict=True)}
    rankings = {name: run for name, (run, _) in read.items()}
    marked = [name for name, (_, marked) in read.items() if marked or complete]
    first = names[0] if baseline else ""
    found = compare_runs(judged, rankings, measure, margin, complete=marked, baseline=first)
    if plot:
        import matplotlib

        from adaptive_margins.book.per_query import per_query_figure

        matplotlib.use("agg")
        with atomic_file(plot) as partial:
            per_query_figure(found).savefig(partial, format=plot.suffix[1:])
    return {**found, "plot": str(plot) if plot else None}
