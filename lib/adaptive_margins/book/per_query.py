"""Differences of runs per query, in a figure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def per_query_figure(found: Mapping[str, Any]) -> Figure:
    """Differences per query, sorted, a panel a pair: with their mean, its 95 % interval, and the band of ±margin.

    ``found`` is what `compare_runs` returned.
    """
    from matplotlib import pyplot as plt

    from adaptive_margins.book.figures import WIDTH, drawing

    pairs = found["pairs"]
    columns = min(len(pairs), 2)
    rows = math.ceil(len(pairs) / columns)
    left, lane, top, bottom, panel, between = 0.75, 1.05, 0.42, 0.5, 2.0, 0.95
    width = (WIDTH - left - lane * columns) / columns
    height = top + bottom + panel * rows + between * (rows - 1)
    with drawing():
        figure, axes = plt.subplots(
            rows,
            columns,
            sharey=True,
            squeeze=False,
            figsize=(WIDTH, height),
            gridspec_kw={
                "left": left / WIDTH,
                "right": 1 - lane / WIDTH,
                "top": 1 - top / height,
                "bottom": bottom / height,
                "wspace": lane / width,
                "hspace": between / panel,
            },
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
    import numpy as np
    from matplotlib import color_sequences
    from matplotlib.ticker import MaxNLocator

    from adaptive_margins.book.figures import PALE

    a, b = (found["per_query"][pair[side]] for side in "ab")
    differences = np.sort([a[qid] - b[qid] for qid in a])
    n = len(differences)
    _, _, _, _, _, blue, vermilion, _ = color_sequences["okabe_ito"]
    axis.set_label(f"{pair['a']} − {pair['b']}")
    axis.axhspan(-found["margin"], found["margin"], color="#e6e6e6", linewidth=0, gid="margin")
    # Steps of width 1 around 1, 2, …, n: bars that touch, in one shape, however many queries.
    edges = np.repeat(np.arange(n + 1) + 0.5, 2)[1:-1]
    heights = np.repeat(differences, 2)
    for part, color in ((heights.clip(min=0), blue), (heights.clip(max=0), vermilion)):
        axis.fill_between(edges, part, color=color, linewidth=0, gid="differences")
    axis.axhspan(*pair["ci"], color="black", alpha=0.2, linewidth=0, gid="interval")
    axis.axhline(0, color=PALE, linewidth=0.8, gid="zero")
    axis.axhline(pair["difference"], color="black", linewidth=1.2, gid="mean")
    axis.set_xlim(0.5, n + 0.5)
    axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    names = {side: _short(pair[side]) for side in "ab"}
    axis.set_title(f"{names['a']} − {names['b']}\n{pair['verdict']}")
    up, down = int((differences > 0).sum()), int((differences < 0).sum())
    axis.set_xlabel(f"{up:,} queries above 0, {down:,} below, {n - up - down:,} equal")


def _ends(axis: Axes, pair: Mapping[str, Any], margin: float) -> None:
    from adaptive_margins.book.figures import GREY
    from adaptive_margins.book.style import End, end_labels

    mean = f"mean {pair['difference']:+.3f}".replace("-", "−")
    ends = [
        End(margin, "margin", GREY),
        End(pair["difference"], mean, "black"),
        End(-margin, "margin", GREY),
    ]
    low, high = axis.get_ylim()
    end_labels(axis, [end for end in ends if low <= end.y <= high])


def _short(name: str, most: int = 22) -> str:
    return name if len(name) <= most else f"…{name[1 - most :]}"
