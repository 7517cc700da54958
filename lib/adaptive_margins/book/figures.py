"""Figures 3 to 6 of the paper, drawn from the long-form frames of the experiments.

Every encoder has one colour and one marker in all figures (`style.style`) and is labelled at the
end of its line. Columns share their axes. A large filled mark with its value is a maximum, as in
the paper.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.resources import files
from io import StringIO
from itertools import cycle, product
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.gridspec import SubplotSpec
from matplotlib.patheffects import withStroke
from matplotlib.ticker import EngFormatter, MaxNLocator, MultipleLocator, StrMethodFormatter

from adaptive_margins.book.style import (
    OKABE_ITO,
    SMALL,
    End,
    encoder_label,
    end_labels,
    measure_label,
    measure_labels,
    score,
    style,
    value_labels,
)

WIDTH = 7.5  # inches; text of 9 points is then about 12 px high in a page column 700 px wide
GREY, PALE = "#595959", "#8c8c8c"
IN_BATCH = {False: "without in-batch negatives", True: "with in-batch negatives"}
LOSSES = [OKABE_ITO[i] for i in (0, 5, 6, 3, 7, 1, 2)]
"""Colours of losses, in the order of their appearance."""
References = Mapping[str, float] | None
"""Measure → BM25's value, drawn as a dotted line."""


def figure3(data: pd.DataFrame, *, references: References = None) -> Figure:
    """Score by static target ε, without and with in-batch negatives (Section 5.1).

    ``data`` is the frame of ``Reproduction.figure3``, one row a run and measure: target is ε, start
    the zero-shot value, low and high the confidence interval, maximum true in one row a curve. The
    line with its band is that of the seed with the maximum; other seeds are small marks, collapsed
    runs crosses. Raises ValueError on a curve without exactly one maximum.
    """
    figure = _panels(data, "target", "in_batch", _sides(data), "static target ε", references)
    figure.axes[0].xaxis.set_major_locator(MultipleLocator(0.2))
    return figure


def figure4(data: pd.DataFrame, *, references: References = None) -> Figure:
    """Learning curves with adaptive targets, without and with in-batch negatives (Section 5.2).

    ``data`` is the frame of ``Reproduction.figure4``, one row an evaluation and measure, with one
    batch size. Raises ValueError as `figure3`.
    """
    return _learning_curves(data, "in_batch", _sides(data), references)


def figure5(data: pd.DataFrame, *, references: References = None) -> Figure:
    """Learning curves with distributed targets, a column a batch size (Section 5.3).

    ``data`` is the frame of ``Reproduction.figure5``; the rest as in `figure4`.
    """
    columns = {size: f"batch size {size}" for size in sorted(data["batch_size"].unique())}
    return _learning_curves(data, "batch_size", columns, references)


def figure6(data: pd.DataFrame, *, published: float | None = None) -> Figure:
    """Mean, maximum and minimum of raw φ(d⁺, d⁻) over a batch, during training (Section 5.3).

    ``data`` is the frame of ``Reproduction.figure6``, one row a step and part: part is "all", or
    "first" and "last"; mean, min and max in [-1, 1], smoothed. Columns are encoders; first and last
    span stand side by side on a broken axis. The axis on the right is the target T = (1 + φ) / 2.
    ``published`` is the mean to which the paper's batches settle, a hollow mark at the end.
    """
    encoders = data["encoder"].unique()
    with drawing():
        places, height = edges(1, left=0.75, right=0.75, panel=2.0, between=0.2)
        figure = plt.figure(figsize=(WIDTH, height))
        grid = figure.add_gridspec(1, len(encoders), wspace=0.12, **places)
        for column, encoder in enumerate(encoders):
            axes = _broken_panel(figure, grid[column], data[data["encoder"] == encoder], column)
            if published is not None:
                hollow = {"color": GREY, "markerfacecolor": "white", "markersize": 7, "zorder": 5}
                at = axes[-1].get_yaxis_transform()
                axes[-1].plot(0.94, published, "D", transform=at, gid="published", **hollow)
            box = grid[column].get_position(figure)
            look = {"ha": "center", "va": "top", "color": style(encoder).text}
            look["gid"] = f"column-{column}"
            middle, top = (box.x0 + box.x1) / 2, 1 - 0.06 / height
            figure.text(middle, top, encoder_label(encoder), **look)
        _room(figure.axes, 0.1)
        figure.axes[0].set_ylabel("φ(d⁺, d⁻)")
        figure.axes[0].tick_params(axis="y", left=True, labelleft=True)
        _target_axis(figure.axes[-1])
        below: dict[str, Any] = {"va": "bottom", "fontsize": 9, "gid": "xlabel"}
        figure.supxlabel("training step", x=0.5, y=0.06 / height, **below)
    return figure


def convergence(data: pd.DataFrame) -> Figure:
    """Learning curves of several losses: a column an encoder, a row without or with in-batch
    negatives.

    ``data`` is the frame of ``paper.convergence.convergence``, with one measure. Lines are means
    over the seeds, bands span the lowest and the highest. A filled mark is a maximum, a hollow one
    a maximum at the end.
    """
    encoders = data["encoder"].unique()
    sides = _sides(data)
    looks = dict(
        zip(data["loss"].unique(), cycle(zip("osD^vPX", LOSSES, strict=True)), strict=False)
    )
    size = {"figsize": (WIDTH, 0.9 + 2.1 * len(sides)), "layout": "constrained"}
    with drawing():
        shape = len(sides), len(encoders)
        figure, axes = plt.subplots(*shape, sharex=True, sharey=True, squeeze=False, **size)
        for (row, side), (column, encoder) in product(enumerate(sides), enumerate(encoders)):
            axis = axes[row, column]
            axis.set_label(f"{encoder} | {sides[side]}")
            panel = data[(data["encoder"] == encoder) & (data["in_batch"] == side)]
            for loss, rows in panel.groupby("loss", sort=False):
                _seeds(axis, rows.groupby("triples")["value"], str(loss), *looks[loss])
        for axis, encoder in zip(axes[0], encoders, strict=True):
            axis.set_title(encoder_label(encoder), color=style(encoder).text)
        for axis, title in zip(axes[:, 0], sides.values(), strict=True):
            axis.set_ylabel(f"{measure_label(data['measure'].iloc[0])}\n{title}")
        axes[0, 0].xaxis.set_major_locator(MaxNLocator(3, integer=True))
        axes[0, 0].xaxis.set_major_formatter(EngFormatter(sep=""))
        handles = [plt.Line2D([], [], color=c, marker=m, label=x) for x, (m, c) in looks.items()]
        figure.legend(handles=handles, loc="outside upper center", ncols=4, frameon=False)
        figure.supxlabel("triples seen", fontsize=9)
    return figure


def _seeds(axis: Axes, by_triples: Any, loss: str, marker: str, color: str) -> None:
    """A curve of `convergence`: the mean over seeds, its band, and the maximum of the mean."""
    band = by_triples.agg(["mean", "min", "max"])
    axis.fill_between(band.index, band["min"], band["max"], color=color, alpha=0.15, linewidth=0)
    axis.plot(band.index, band["mean"], color=color, gid=f"curve {loss}")
    best = band["mean"].idxmax()
    face = "white" if best == band.index[-1] else color
    look = {"marker": marker, "markerfacecolor": face, "markersize": 6, "gid": f"maximum {loss}"}
    axis.plot([best], [band["mean"][best]], color=color, linestyle="", **look)


def _sides(data: pd.DataFrame) -> dict[bool, str]:
    """Those of `IN_BATCH` that a frame has."""
    return {side: title for side, title in IN_BATCH.items() if side in set(data["in_batch"])}


@contextmanager
def drawing() -> Iterator[None]:
    """The style of all figures. Closes what is opened inside: a notebook would show it twice."""
    before = set(plt.get_fignums())
    try:
        with plt.style.context(str(files(__package__) / "figures.mplstyle")):
            yield
    finally:
        for number in set(plt.get_fignums()) - before:
            plt.close(number)


def svg(figure: Figure, name: str) -> str:
    """A figure as SVG whose text is text; the same figure and name give the same file."""
    with plt.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(file := StringIO(), format="svg", metadata={"Date": None})
    return file.getvalue()


def edges(
    rows: int, *, left: float, right: float, panel: float, between: float, top: float = 0.28
) -> tuple[dict[str, float], float]:
    """Places of panels ``panel`` inches high for a grid specification, and the figure's height."""
    bottom = 0.5
    height = top + bottom + panel * rows + between * (rows - 1)
    places = {
        "left": left / WIDTH,
        "right": 1 - right / WIDTH,
        "top": 1 - top / height,
        "bottom": bottom / height,
        "hspace": between / panel,
    }
    return places, height


def _room(axes: Sequence[Axes], share: float) -> None:
    """Limits of axes that share y: the data and a share of their range above and below."""
    low, high = min(axis.dataLim.y0 for axis in axes), max(axis.dataLim.y1 for axis in axes)
    room = share * (high - low) or 0.01
    axes[0].set_ylim(low - room, high + room)
    axes[0].yaxis.set_major_locator(MaxNLocator(5))


# --- Figures 3 to 5 -------------------------------------------------------------------------------


def _panels(
    data: pd.DataFrame,
    x: str,
    split: str,
    columns: Mapping[Any, str],
    xlabel: str,
    references: References,
) -> Figure:
    """Measures in rows, the values of ``split`` in columns, one curve an encoder."""
    measures, references = data["measure"].unique(), references or {}
    with drawing():
        lane = 0.24 + 0.078 * max(len(encoder_label(e)) for e in data["encoder"].unique())
        left, number = 0.7, len(columns)
        places, height = edges(len(measures), left=left, right=lane, panel=1.75, between=0.16)
        width = (WIDTH - left - lane * number) / number
        grid = {"gridspec_kw": {**places, "wspace": lane / width}, "figsize": (WIDTH, height)}
        shared = {"sharex": True, "sharey": "row", "squeeze": False}
        figure, axes = plt.subplots(len(measures), number, **shared, **grid)
        pending = []
        for (row, measure), (column, value) in product(enumerate(measures), enumerate(columns)):
            axis = axes[row, column]
            axis.set_label(f"{measure} | {columns[value]}")
            _mark(axis, column)
            axis.tick_params(axis="x", bottom=row == len(measures) - 1)
            axis.tick_params(axis="y", left=column == 0)
            panel = data[(data["measure"] == measure) & (data[split] == value)]
            pending.append((axis, *_curves(axis, panel, x, references.get(measure))))
        for measure, axes_row in zip(measures, axes, strict=True):
            axes_row[0].set_ylabel(measure_labels(measures)[measure])
            _room(axes_row, 0.14)
        for axis, title in zip(axes[0], columns.values(), strict=True):
            axis.set_title(title)
        for axis, ends, maxima in pending:  # only now are the limits final
            end_labels(axis, ends)
            value_labels(axis, maxima)
        middle = (left + WIDTH - lane) / 2 / WIDTH
        figure.supxlabel(xlabel, x=middle, y=0.06 / height, va="bottom", fontsize=9, gid="xlabel")
    return figure


def _mark(axis: Axes, column: int) -> None:
    """Name the column of a panel, and its y axis: `shown.js` puts columns below each other."""
    axis.set_gid(f"column-{column}")
    axis.yaxis.set_gid("yaxis")


def _learning_curves(
    data: pd.DataFrame, split: str, columns: Mapping[Any, str], references: References
) -> Figure:
    figure = _panels(data, "triples", split, columns, "triples seen", references)
    axis, most = figure.axes[0].xaxis, data["triples"].max()
    axis.set_major_locator(MaxNLocator(4, integer=True, steps=[1, 2, 2.5, 5, 10]))
    short = EngFormatter(sep="") if most >= 1e5 else StrMethodFormatter("{x:,.0f}")
    axis.set_major_formatter(short)
    return figure


def _curves(
    axis: Axes, panel: pd.DataFrame, x: str, reference: float | None
) -> tuple[list[End], list[tuple[float, float, str]]]:
    """Draw a panel; returns the labels at line ends, and the maxima as (x, y, colour)."""
    ends = _starts(axis, panel) if "start" in panel else []
    maxima = []
    if reference is not None:
        axis.axhline(reference, color=GREY, linestyle=":", gid="reference")
        ends.append(End(reference, "BM25", GREY))
    for encoder, rows in panel.groupby("encoder", sort=False):
        name = str(encoder)
        last, best = _curve(axis, rows, x, name)
        ends.append(End(last, encoder_label(name), style(name).text))
        maxima.append((*best, style(name).text))
    return ends, maxima


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
    line = rows[rows["seed"] == best["seed"]].sort_values(x)
    color, marker = look.color, look.marker
    _points(axis, rows, x, encoder)
    if "collapsed" in rows:
        down = rows[rows["collapsed"]]
        axis.plot(down[x], down["value"], "x", color=color, zorder=4, gid=f"collapsed {encoder}")
        rows = rows[~rows["collapsed"]]
    band = {"color": color, "alpha": 0.1, "linewidth": 0, "gid": f"band {encoder}"}
    axis.fill_between(line[x], line["low"], line["high"], **band)
    others = rows[rows["seed"] != best["seed"]]
    seeds = {"color": color, "markersize": 2.4, "alpha": 0.7, "gid": f"seeds {encoder}"}
    axis.plot(others[x], others["value"], marker, **seeds)
    hollow = {"marker": marker, "markerfacecolor": "white", "markeredgewidth": 0.9}
    every = max(1, len(line) // 24)
    axis.plot(
        line[x], line["value"], color=color, markevery=every, gid=f"curve {encoder}", **hollow
    )
    filled = {"markersize": 7, "markeredgecolor": "white", "zorder": 5, "gid": f"maximum {encoder}"}
    axis.plot([best[x]], [best["value"]], marker, color=color, **filled)
    return float(line["value"].iloc[-1]), (float(best[x]), float(best["value"]))


def _points(axis: Axes, rows: pd.DataFrame, x: str, encoder: str) -> None:
    """Invisible marks with the run behind each point and its words, for `shown.svg`."""
    at = f"{'ε =' if x == 'target' else x} "
    links = [
        f"#{row['run_id']}|{encoder_label(encoder)}, {at}{row[x]:,g}, seed {row['seed']}:"
        f" {measure_label(row['measure'])} {score(row['value'])}"
        f" [{score(row['low'])}, {score(row['high'])}], run {row['run_id']}"
        for row in rows.to_dict("records")
    ]
    axis.scatter(rows[x], rows["value"], s=90, alpha=0, zorder=9, urls=links, gid="points")


def _starts(axis: Axes, panel: pd.DataFrame) -> list[End]:
    """Dashed lines at the zero-shot scores, of which one label is enough."""
    starts = panel.groupby("encoder", sort=False)["start"].mean()
    for encoder, value in starts.items():
        color, dashes = style(str(encoder)).text, (0, (4, 3))
        axis.axhline(value, color=color, linestyle=dashes, linewidth=0.9, gid="start")
    return [End(float(starts.mean()), "zero-shot", GREY)]


# --- Figure 6 -------------------------------------------------------------------------------------


def _broken_panel(figure: Figure, cell: SubplotSpec, data: pd.DataFrame, column: int) -> list[Axes]:
    """One encoder: an axis for each part."""
    parts = list(data.groupby("part", sort=False))
    inner = cell.subgridspec(1, len(parts), wspace=0.08)
    for position, (part, rows) in enumerate(parts):
        shared = figure.axes[0] if figure.axes else None
        axis = figure.add_subplot(inner[position], sharey=shared)
        _mark(axis, column)
        encoder, size = rows[["encoder", "batch_size"]].iloc[0]
        axis.set_label(f"{encoder} | {size} | {part}")
        axis.tick_params(axis="y", left=False, labelleft=False)
        axis.tick_params(axis="x", length=0)
        _distribution(axis, rows, encoder)
        _broken(axis, rows["step"], position, len(parts))
    return figure.axes[-len(parts) :]


def _distribution(axis: Axes, rows: pd.DataFrame, encoder: str) -> None:
    look, steps = style(encoder), rows["step"]
    axis.axhline(0, color=PALE, linewidth=0.8, gid="zero")
    axis.fill_between(steps, rows["min"], rows["max"], color=look.color, alpha=0.12, linewidth=0)
    marks = {"marker": look.marker, "markerfacecolor": "white", "markevery": max(1, len(rows) // 5)}
    for name, width in (("max", 0.9), ("mean", 1.8), ("min", 0.9)):
        size = {"linewidth": width, "markersize": 1.5 + width}
        axis.plot(steps, rows[name], color=look.color, gid=name, **size, **marks)


def _broken(axis: Axes, steps: pd.Series, position: int, parts: int) -> None:
    """Tick labels at both ends of a part, and the diagonal marks of a broken axis between parts."""
    ends = [int(step) for step in np.linspace(steps.min(), steps.max(), 3 if parts == 1 else 2)]
    axis.set_xticks(ends, [f"{end:,}" if end < 10_000 else f"{end / 1000:.4g}k" for end in ends])
    first, *_, last = axis.get_xticklabels()
    first.set_horizontalalignment("left")
    last.set_horizontalalignment("right")
    axis.margins(x=0)
    axis.spines["left"].set_visible(position == 0)
    breaks = [0] * (position > 0) + [1] * (position < parts - 1)
    slash = {"marker": [(-1, -1.6), (1, 1.6)], "markersize": 7, "color": PALE, "clip_on": False}
    axis.plot(breaks, [0] * len(breaks), " ", transform=axis.transAxes, gid="cut", **slash)


def _target_axis(axis: Axes) -> None:
    """Names of the three lines of a panel, and T = (1 + φ) / 2 on its right."""
    white = [withStroke(linewidth=2, foreground="white")]
    look: dict[str, Any] = {"textcoords": "offset points", "ha": "right", "fontsize": SMALL}
    look |= {"color": GREY, "path_effects": white, "gid": "end"}
    for line in axis.get_lines():
        name = str(line.get_gid())
        if name in ("max", "mean", "min"):
            end = tuple(np.asarray(line.get_xydata())[-1])
            up, va = (-7, "top") if name == "min" else (7, "bottom")
            axis.annotate(name, end, (-2, up), va=va, **look)
    low, high = axis.get_ylim()
    ticks = [(1 + phi) / 2 for phi in axis.get_yticks() if low <= phi <= high]
    functions = (lambda phi: (1 + phi) / 2), (lambda target: 2 * target - 1)
    right = axis.secondary_yaxis("right", functions=functions)
    right.set_yticks(ticks, [f"{tick:.3g}" for tick in ticks])
    right.set_ylabel("target T = (1 + φ) / 2")
    right.set_label("target")
