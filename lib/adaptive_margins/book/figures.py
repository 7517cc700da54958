"""Figures 3 to 6 of the paper, drawn from the long-form frames of ``experiments``.

Every encoder has one colour and one marker in all figures (marks.py) and is labelled at the end of its line. Columns
share their axes. A large filled mark with its value is a maximum, as in the paper.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import product
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import EngFormatter, MaxNLocator, MultipleLocator, StrMethodFormatter

from adaptive_margins.book.style import (
    SMALL,
    End,
    encoder_label,
    end_labels,
    measure_label,
    require,
    style,
    value_labels,
)

WIDTH = 7.5  # inches; text of 9 points is then about 12 px high in a page column 700 px wide
GREY, PALE = "#595959", "#8c8c8c"
IN_BATCH = {False: "without in-batch negatives", True: "with in-batch negatives"}

_RC = {
    "figure.dpi": 160,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "axes.facecolor": "white",
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.labelsize": 9,
    "xtick.labelsize": SMALL,
    "ytick.labelsize": SMALL,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": PALE,
    "axes.linewidth": 0.8,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.4,
    "lines.markersize": 3.6,
}

STATIC = ["encoder", "in_batch", "target", "seed", "measure", "value", "start", "maximum"]
CURVE = ["encoder", "in_batch", "batch_size", "seed", "triples", "measure", "value", "maximum"]
TARGETS = ["encoder", "batch_size", "part", "step", "mean", "min", "max", "window", "span"]


def figure3(
    data: pd.DataFrame,
    *,
    labels: Mapping[str, str] | None = None,
    references: Mapping[str, float] | None = None,
    reference_label: str = "BM25",
) -> Figure:
    """Score by static target ε, without and with in-batch negatives (Section 5.1).

    ``data`` has one row a run and measure, with the columns ``STATIC``: target is ε, start the value at step 0, maximum
    true in one row a curve. The line is that of the seed with the maximum; where an encoder has several seeds, a band
    spans the lowest and the highest. ``labels`` renames encoders. ``references``: value by measure, drawn dotted.
    Raises ValueError on missing columns, and on a curve without exactly one maximum.
    """
    require(data, STATIC, "figure3")
    seeds = data.groupby("encoder")["seed"].nunique().max()
    band = f" (band: lowest and highest of {seeds} seeds)" if seeds > 1 else ""
    figure = _small_multiples(
        data, "target", "in_batch", IN_BATCH.__getitem__, f"static target ε{band}", labels, references, reference_label
    )  # fmt: skip
    figure.axes[0].xaxis.set_major_locator(MultipleLocator(0.2))
    return figure


def figure4(
    data: pd.DataFrame,
    *,
    labels: Mapping[str, str] | None = None,
    references: Mapping[str, float] | None = None,
    reference_label: str = "BM25",
) -> Figure:
    """Learning curves with adaptive targets, without and with in-batch negatives (Section 5.2).

    ``data`` has one row an evaluation and measure, with the columns ``CURVE`` and one batch size. ``references``: value
    by measure (BM25's own order), drawn as a dotted line. Raises ValueError as figure3, and on several batch sizes.
    """
    require(data, CURVE, "figure4")
    sizes = _unique(data["batch_size"])
    if len(sizes) > 1:
        raise ValueError(f"figure4 shows one batch size, got {sizes}")
    figure = _small_multiples(
        data, "triples", "in_batch", IN_BATCH.__getitem__, "triples seen", labels, references, reference_label
    )  # fmt: skip
    return _triples_axis(figure, data)


def figure5(
    data: pd.DataFrame,
    *,
    labels: Mapping[str, str] | None = None,
    references: Mapping[str, float] | None = None,
    reference_label: str = "BM25",
) -> Figure:
    """Learning curves with distributed targets, a column a batch size (Section 5.3).

    ``data`` has the columns ``CURVE``; the rest as in figure4.
    """
    require(data, CURVE, "figure5")
    figure = _small_multiples(
        data, "triples", "batch_size", "batch size {}".format, "triples seen", labels, references, reference_label
    )  # fmt: skip
    return _triples_axis(figure, data)


def figure6(data: pd.DataFrame, *, labels: Mapping[str, str] | None = None) -> Figure:
    """Mean, maximum and minimum of raw φ(d⁺, d⁻) over a batch, during training (Section 5.3).

    ``data`` has one row a step and part, with the columns ``TARGETS``: part "first" or "last"; mean, min and max in
    [-1, 1], smoothed; window (batches of the rolling mean) and span (batches a part). Columns are encoders, rows batch
    sizes; first and last span stand side by side on a broken axis. The axis on the right is the target
    T = (1 + φ) / 2. Raises ValueError on missing columns, an unknown part, several windows or spans.
    """
    require(data, TARGETS, "figure6")
    encoders, sizes = _unique(data["encoder"]), sorted(_unique(data["batch_size"]))
    parts = [part for part in ("first", "last") if part in set(data["part"])]
    if len(parts) < data["part"].nunique():
        raise ValueError(f"figure6: a part is 'first' or 'last', got {_unique(data['part'])}")
    windows, spans = _unique(data["window"]), _unique(data["span"])
    if len(windows) > 1 or len(spans) > 1:
        raise ValueError(f"figure6 shows one window and one span, got {windows} and {spans}")

    left, right, top, bottom, panel, between = 0.75, 0.75, 0.28, 0.5, 2.0, 0.2
    height = top + bottom + panel * len(sizes) + between * (len(sizes) - 1)
    with drawing():
        figure = plt.figure(figsize=(WIDTH, height))
        outer = figure.add_gridspec(
            len(sizes),
            len(encoders),
            left=left / WIDTH,
            right=1 - right / WIDTH,
            top=1 - top / height,
            bottom=bottom / height,
            wspace=0.12,
            hspace=between / panel,
        )
        shared: Axes | None = None
        for (row, size), (column, encoder) in product(enumerate(sizes), enumerate(encoders)):
            cell = outer[row, column]
            inner = cell.subgridspec(1, len(parts), wspace=0.08)
            for position, part in enumerate(parts):
                axis = figure.add_subplot(inner[position], sharey=shared)
                shared = shared or axis
                axis.set_label(f"{encoder} | {size} | {part}")
                rows = data[
                    (data["encoder"] == encoder)
                    & (data["batch_size"] == size)
                    & (data["part"] == part)
                ]
                _distribution(axis, rows.sort_values("step"), encoder)
                _broken(axis, rows["step"], position, len(parts))
                edge = column == position == 0
                axis.tick_params(axis="y", left=edge, labelleft=edge)
                axis.tick_params(axis="x", length=0, labelbottom=row == len(sizes) - 1)
                if edge:
                    axis.set_ylabel(
                        "φ(d⁺, d⁻)" + (f", batch size {size}" if len(sizes) > 1 else "")
                    )
            if row == 0:
                where = cell.get_position(figure)
                name, color = encoder_label(encoder, labels), style(encoder).text
                figure.text(
                    (where.x0 + where.x1) / 2,
                    1 - 0.06 / height,
                    name,
                    ha="center",
                    va="top",
                    color=color,
                )
        _room(figure.axes, 0.1)
        for axis in figure.axes[len(parts) * len(encoders) - 1 :: len(parts) * len(encoders)]:
            _target_axis(axis)
        smooth = f"rolling mean over {windows[0]} batches" if windows[0] > 1 else "not smoothed"
        figure.supxlabel(
            f"training step (first and last {spans[0]} batches, {smooth})",
            x=(left + WIDTH - right) / 2 / WIDTH,
            y=0.06 / height,
            va="bottom",
            fontsize=9,
        )
    return figure


# --- pieces of Figures 3 to 5 -----------------------------------------------------------------------------------------


@contextmanager
def drawing() -> Iterator[None]:
    """The style of all figures; what is opened inside is closed at the end, or a notebook would show it twice."""
    before = set(plt.get_fignums())
    try:
        with plt.rc_context(_RC):
            yield
    finally:
        for number in set(plt.get_fignums()) - before:
            plt.close(number)


def _unique(values: pd.Series) -> list[Any]:
    return list(dict.fromkeys(values))


def _small_multiples(
    data: pd.DataFrame,
    x: str,
    split: str,
    title: Callable[[Any], str],
    xlabel: str,
    labels: Mapping[str, str] | None,
    references: Mapping[str, float] | None,
    reference_label: str,
) -> Figure:
    """Measures in rows, the values of ``split`` in columns, one curve an encoder."""
    measures, encoders = _unique(data["measure"]), _unique(data["encoder"])
    values = sorted(_unique(data[split]))
    references = references or {}
    if set(references) - set(measures):
        raise ValueError(
            f"references has the measures {list(references)}, the frame has {measures}"
        )
    names = {encoder: encoder_label(encoder, labels) for encoder in encoders}
    with drawing():
        lane = 0.24 + 0.078 * max(map(len, [*names.values(), reference_label]))
        figure, axes = _grid(len(measures), [title(value) for value in values], lane, xlabel)
        pending: list[tuple[Axes, list[End], list[tuple[float, float, str]]]] = []
        for (row, measure), (column, value) in product(enumerate(measures), enumerate(values)):
            axis = axes[row, column]
            axis.set_label(f"{measure} | {title(value)}")
            panel = data[(data["measure"] == measure) & (data[split] == value)]
            ends = _starts(axis, panel) if "start" in data else []
            dots = []
            if measure in references:
                axis.axhline(references[measure], color=GREY, linestyle=":", gid="reference")
                ends.append(End(references[measure], reference_label, GREY))
            for encoder, rows in panel.groupby("encoder", sort=False):
                color = style(str(encoder)).text
                last, best = _curve(axis, rows, x, str(encoder))
                ends.append(End(last, names[encoder], color))
                dots.append((*best, color))
            pending.append((axis, ends, dots))
        for measure, axes_row in zip(measures, axes, strict=True):
            axes_row[0].set_ylabel(measure_label(measure))
            _room(axes_row, 0.14)
        for axis, ends, dots in pending:  # only now are the limits final
            end_labels(axis, ends)
            value_labels(axis, dots)
    return figure


def _grid(rows: int, titles: Sequence[str], lane: float, xlabel: str) -> tuple[Figure, np.ndarray]:
    """Panels with a ``lane`` (inches) for labels right of each; ticks on the outer edges only."""
    left, top, bottom, panel, between = 0.7, 0.28, 0.48, 1.75, 0.16
    width = (WIDTH - left - lane * len(titles)) / len(titles)
    height = top + bottom + panel * rows + between * (rows - 1)
    edges = {
        "left": left / WIDTH,
        "right": 1 - lane / WIDTH,
        "top": 1 - top / height,
        "bottom": bottom / height,
    }
    figure, axes = plt.subplots(
        rows,
        len(titles),
        sharex=True,
        sharey="row",
        squeeze=False,
        figsize=(WIDTH, height),
        gridspec_kw={**edges, "wspace": lane / width, "hspace": between / panel},
    )
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title)
    for axis in axes[:-1].flat:
        axis.tick_params(axis="x", bottom=False)
    for axis in axes[:, 1:].flat:
        axis.tick_params(axis="y", left=False)
    figure.supxlabel(
        xlabel, x=(left + WIDTH - lane) / 2 / WIDTH, y=0.06 / height, va="bottom", fontsize=9
    )
    return figure, axes


def _curve(
    axis: Axes, rows: pd.DataFrame, x: str, encoder: str
) -> tuple[float, tuple[float, float]]:
    """Draw one encoder. Returns the last value of its line, and its maximum as (x, y)."""
    look = style(encoder)
    maxima = rows[rows["maximum"].astype(bool)]
    if len(maxima) != 1:
        where = f"{axis.get_label()}, {encoder}"
        raise ValueError(f"{where}: expected one row with maximum, got {len(maxima)}")
    best = maxima.iloc[0]
    own = rows[rows["seed"] == best["seed"]].sort_values(x)
    others = rows[rows["seed"] != best["seed"]]
    if len(others):
        band = rows.groupby(x)["value"].agg(["min", "max"])
        axis.fill_between(
            band.index, band["min"], band["max"], color=look.color, alpha=0.2, linewidth=0, gid=f"band {encoder}"
        )  # fmt: skip
        axis.plot(
            others[x], others["value"], look.marker, color=look.color, markersize=2, alpha=0.7, gid=f"seeds {encoder}"
        )  # fmt: skip
    axis.plot(
        own[x],
        own["value"],
        color=look.color,
        marker=look.marker,
        markerfacecolor="white",
        markeredgewidth=0.9,
        markevery=max(1, len(own) // 24),
        gid=f"curve {encoder}",
    )
    axis.plot(
        [best[x]],
        [best["value"]],
        look.marker,
        color=look.color,
        markersize=7,
        markeredgecolor="white",
        zorder=5,
        gid=f"maximum {encoder}",
    )
    return float(own["value"].iloc[-1]), (float(best[x]), float(best["value"]))


def _starts(axis: Axes, panel: pd.DataFrame) -> list[End]:
    """Dashed lines at the score before training; one grey line where it is the same for all."""
    starts = panel.groupby("encoder", sort=False)["start"].mean()
    if starts.max() - starts.min() < 5e-4:
        lines = {GREY: float(starts.mean())}
    else:
        lines = {style(str(encoder)).text: float(value) for encoder, value in starts.items()}
    for color, value in lines.items():
        axis.axhline(value, color=color, linestyle=(0, (4, 3)), linewidth=0.9, gid="start")
    return [End(value, "step 0", color) for color, value in lines.items()]


def _room(axes: Sequence[Axes], share: float) -> None:
    """Limits of axes that share y: the data and a share of their range above and below."""
    low, high = min(axis.dataLim.y0 for axis in axes), max(axis.dataLim.y1 for axis in axes)
    room = share * (high - low) or 0.01
    axes[0].set_ylim(low - room, high + room)
    axes[0].yaxis.set_major_locator(MaxNLocator(5))


def _triples_axis(figure: Figure, data: pd.DataFrame) -> Figure:
    axis = figure.axes[0].xaxis
    axis.set_major_locator(MaxNLocator(4, integer=True, steps=[1, 2, 2.5, 5, 10]))
    axis.set_major_formatter(
        EngFormatter(sep="") if data["triples"].max() >= 1e5 else StrMethodFormatter("{x:,.0f}")
    )
    return figure


# --- pieces of Figure 6 -----------------------------------------------------------------------------------------------


def _distribution(axis: Axes, rows: pd.DataFrame, encoder: str) -> None:
    look = style(encoder)
    axis.axhline(0, color=PALE, linewidth=0.8, gid="zero")
    axis.fill_between(
        rows["step"], rows["min"], rows["max"], color=look.color, alpha=0.12, linewidth=0
    )
    for name, width in (("max", 0.9), ("mean", 1.8), ("min", 0.9)):
        axis.plot(
            rows["step"],
            rows[name],
            color=look.color,
            linewidth=width,
            marker=look.marker,
            markersize=1.5 + width,
            markerfacecolor="white",
            markevery=max(1, len(rows) // 5),
            gid=name,
        )


def _broken(axis: Axes, steps: pd.Series, position: int, parts: int) -> None:
    """Tick labels at both ends of a part, and the diagonal marks of a broken axis between parts."""
    ends = int(steps.min()), int(steps.max())
    axis.set_xticks(ends, [f"{end:,}" if end < 10_000 else f"{end / 1000:.4g}k" for end in ends])
    first, last = axis.get_xticklabels()
    first.set_horizontalalignment("left")
    last.set_horizontalalignment("right")
    axis.margins(x=0)
    axis.spines["left"].set_visible(position == 0)
    cuts = [0] * (position > 0) + [1] * (position < parts - 1)
    slash = [(-1, -1.6), (1, 1.6)]
    axis.plot(
        cuts, [0] * len(cuts), " ", marker=slash, markersize=7, color=PALE, clip_on=False, transform=axis.transAxes, gid="cut"
    )  # fmt: skip


def _target(phi: Any) -> Any:
    return (1 + phi) / 2


def _phi(target: Any) -> Any:
    return 2 * target - 1


def _target_axis(axis: Axes) -> None:
    """The names of the three lines of a panel, and T = (1 + φ) / 2 at the ticks of φ on its right."""
    for line in axis.get_lines():
        name = str(line.get_gid())
        if name in ("max", "mean", "min"):
            above = name != "min"
            axis.annotate(
                name,
                tuple(np.asarray(line.get_xydata())[-1]),
                (-2, 4 if above else -4),
                textcoords="offset points",
                ha="right",
                va="bottom" if above else "top",
                fontsize=SMALL,
                color=GREY,
                path_effects=[withStroke(linewidth=2, foreground="white")],
                gid="end",
            )
    low, high = axis.get_ylim()
    ticks = [_target(phi) for phi in axis.get_yticks() if low <= phi <= high]
    right = axis.secondary_yaxis("right", functions=(_target, _phi))
    right.set_yticks(ticks, [f"{tick:.3g}" for tick in ticks])
    right.set_ylabel("target T = (1 + φ) / 2")
    right.set_label("target")
