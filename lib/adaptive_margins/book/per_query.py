"""Differences of runs per query, in a figure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from adaptive_margins.book.figures import GREY, PALE, WIDTH, drawing, edges
from adaptive_margins.book.style import BLUE, VERMILION, End, end_labels


def per_query_figure(found: Mapping[str, Any]) -> Figure:
    """Differences per query, sorted, a panel a pair: with mean, its 95 % interval, and ±margin.

    ``found`` is what `compare_runs` returned.
    """
    pairs = found["pairs"]
    columns = min(len(pairs), 2)
    rows, left, lane = math.ceil(len(pairs) / columns), 0.75, 1.05
    places, height = edges(rows, left=left, right=lane, panel=2.0, between=0.95, top=0.42)
    width = (WIDTH - left - lane * columns) / columns
    with drawing():
        figure, axes = plt.subplots(
            rows,
            columns,
            sharey=True,
            squeeze=False,
            figsize=(WIDTH, height),
            gridspec_kw={**places, "wspace": lane / width},
        )
        for axis in axes.flat[len(pairs) :]:
            axis.set_visible(False)
        for axis, pair in zip(axes.flat, pairs, strict=False):
            _panel(axis, pair, found)
        for axis in axes[:, 0]:
            axis.set_ylabel(f"difference in {found['measure']}")
        for axis, pair in zip(axes.flat, pairs, strict=False):  # only now are the limits final
            _ends(axis, pair, found["margin"])
    return figure


def _panel(axis: Axes, pair: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    a, b = (found["per_query"][pair[side]] for side in "ab")
    differences = np.sort([a[qid] - b[qid] for qid in a])
    count = len(differences)
    axis.set_label(f"{pair['a']} − {pair['b']}")
    axis.axhspan(-found["margin"], found["margin"], color="#e6e6e6", linewidth=0, gid="margin")
    # Steps of width 1 around 1, 2, …: bars that touch, in one shape, however many queries.
    sides = np.repeat(np.arange(count + 1) + 0.5, 2)[1:-1]
    heights = np.repeat(differences, 2)
    for part, color in ((heights.clip(min=0), BLUE), (heights.clip(max=0), VERMILION)):
        axis.fill_between(sides, part, color=color, linewidth=0, gid="differences")
    axis.axhspan(*pair["ci"], color="black", alpha=0.2, linewidth=0, gid="interval")
    axis.axhline(0, color=PALE, linewidth=0.8, gid="zero")
    axis.axhline(pair["difference"], color="black", linewidth=1.2, gid="mean")
    axis.set_xlim(0.5, count + 0.5)
    axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    title = f"{_short(pair['a'])} − {_short(pair['b'])}\n{pair['verdict']}"
    axis.set_title(title, parse_math=False)  # $ in a name is no formula
    up, down = int((differences > 0).sum()), int((differences < 0).sum())
    axis.set_xlabel(f"{up:,} queries above 0, {down:,} below, {count - up - down:,} equal")


def _ends(axis: Axes, pair: Mapping[str, Any], margin: float) -> None:
    mean = f"mean {pair['difference']:+.3f}".replace("-", "−")
    ends = {
        margin: ("margin", GREY),
        pair["difference"]: (mean, "black"),
        -margin: ("margin", GREY),
    }
    low, high = axis.get_ylim()
    end_labels(axis, [End(y, *label) for y, label in ends.items() if low <= y <= high])


def _short(name: str, most: int = 22) -> str:
    return name if len(name) <= most else f"…{name[1 - most :]}"
