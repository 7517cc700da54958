"""The ideas of the paper's Figures 1 and 2, drawn anew: `regimes` and `targets`.

The arrows of `targets` are computed: they are the negative gradient of `margin_loss` on the circle.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyBboxPatch, Patch

from adaptive_margins.losses import margin_loss

BLACK, _, _, GREEN, _, BLUE, RED, PURPLE = matplotlib.color_sequences["okabe_ito"]
GREY = "#595959"
_CENTRED: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": 11}
WIDTH = 7.0  # inches, the width of the book's text column at 100 dpi


def regimes() -> Figure:
    """Draw teacher distillation beside self-distillation: who scores what (paper, Figure 1).

    Data are blue, the bi-encoder green, the cross-encoder purple. 7 × 4.4 inches, white background.
    """
    figure = Figure(figsize=(WIDTH, 4.4), facecolor="white")
    left, right = figure.subplots(1, 2, gridspec_kw={"wspace": 0.04})
    figure.subplots_adjust(left=0.01, right=0.99, top=0.93, bottom=0.1)
    for axes, title in ((left, "Teacher distillation"), (right, "Self-distillation")):
        axes.set(xlim=(0, 10), ylim=(0, 10.4))
        axes.set_axis_off()
        axes.set_title(title, fontsize=11, fontweight="bold")

    triples = _box(left, 5, 9.5, 9.2, "Triples: query, positive, negative", BLUE)
    teacher = _box(left, 7.4, 7.3, 4.4, "Cross-encoder\n(teacher)", PURPLE)
    margins = _box(left, 7.4, 5.1, 4.4, "Teacher's margin\nof every triple", BLUE)
    batches = _box(left, 2.6, 5.1, 4.4, "Batches sampled\nby margin", BLUE)
    student = _box(left, 2.6, 2.9, 4.4, "Bi-encoder\n(student)", GREEN)
    loss = _box(left, 5, 0.7, 9.2, "Loss: relevance margin − target", GREY)
    _arrow(left, triples, teacher)
    _arrow(left, teacher, margins)
    _arrow(left, margins, batches)
    _arrow(left, triples, batches)
    _arrow(left, batches, student)
    _arrow(left, student, loss, "margin")
    _arrow(left, margins, loss, "target")

    triples = _box(right, 5, 9.5, 9.2, "Triples: query, positive, negative", BLUE)
    batches = _box(right, 5, 7.3, 9.2, "Batches in random order", BLUE)
    encoder = _box(right, 5, 5.1, 9.2, "Bi-encoder (student and teacher)", GREEN)
    margin = _box(right, 2.6, 2.9, 4.4, r"$\varphi(q, d^+) - \varphi(q, d^-)$", BLUE)
    target = _box(right, 7.4, 2.9, 4.4, r"$(1 + \varphi(d^+\!, d^-))\,/\,2$", BLUE)
    loss = _box(right, 5, 0.7, 9.2, "Loss: relevance margin − target", GREY)
    _arrow(right, triples, batches)
    _arrow(right, batches, encoder)
    _arrow(right, encoder, margin)
    _arrow(right, encoder, target)
    _arrow(right, margin, loss, "margin")
    _arrow(right, target, loss, "target")

    keys = {"data": BLUE, "bi-encoder": GREEN, "cross-encoder": PURPLE}
    handles = [Patch(facecolor=_tint(c), edgecolor=c, label=name) for name, c in keys.items()]
    figure.legend(handles=handles, loc="lower center", ncols=3, frameon=False, fontsize=9)
    return figure


def _tint(color: str | tuple[float, ...]) -> tuple[float, ...]:
    """The colour mixed with white, so that black text stays legible on it."""
    return tuple(0.18 * part + 0.82 for part in to_rgb(color))


def _box(
    axes: Axes, x: float, y: float, width: float, text: str, color: str | tuple[float, ...]
) -> FancyBboxPatch:
    """A labelled box around (x, y)."""
    height = 1.35
    box = FancyBboxPatch(
        (x - width / 2, y - height / 2),
        width,
        height,
        boxstyle="round,pad=0,rounding_size=0.2",
        facecolor=_tint(color),
        edgecolor=color,
        linewidth=1.5,
    )
    axes.add_patch(box)
    axes.text(x, y, text, ha="center", va="center", fontsize=9, color=BLACK, linespacing=1.15)
    return box


def _arrow(axes: Axes, start: FancyBboxPatch, end: FancyBboxPatch, label: str = "") -> None:
    """An arrow between the facing edges of two boxes: horizontal if side by side, else vertical."""
    (x0, y0), (x1, y1) = (
        (box.get_x() + box.get_width() / 2, box.get_y() + box.get_height() / 2)
        for box in (start, end)
    )
    if abs(y0 - y1) < 1:  # side by side
        x0, x1 = start.get_x(), end.get_x() + end.get_width()
    else:
        if start.get_width() < end.get_width():
            x1 = x0
        elif start.get_width() > end.get_width():
            x0 = x1
        y0, y1 = start.get_y(), end.get_y() + end.get_height()
    style = {"arrowstyle": "-|>", "color": GREY, "linewidth": 1.3, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", (x1, y1), (x0, y0), arrowprops=style)
    if label:
        axes.text(x0 + 0.2, (y0 + y1) / 2, label, va="center", fontsize=8.5, color=GREY)


@dataclass(frozen=True)
class Scene:
    """One query, its positive and N negatives on the unit circle, and what a loss does to them.

    `levels` (N,) are the similarities to the query at which a negative meets the target, that is
    φ(q, d⁺) − T. `shifts` (N, 2) is the negative gradient of the loss at the negatives.
    """

    query: np.ndarray
    positive: np.ndarray
    negatives: np.ndarray
    levels: np.ndarray
    shifts: np.ndarray


def scene(
    target: float | str, positive: float = 66, negatives: tuple[float, ...] = (140, 48, -18)
) -> Scene:
    """Put a query at 90°, its positive and negatives at these angles, and compute their shifts.

    With a number or "adaptive", each negative makes a triple with the query and the positive. With
    "distributed" the first one does; the others come from other triples of the batch, whose own
    queries and positives are zero vectors: φ = 0, no gradient, hence no part in the picture.
    """

    def points(*angles: float) -> torch.Tensor:
        radians = torch.deg2rad(torch.tensor(angles, dtype=torch.float64))
        return torch.stack([radians.cos(), radians.sin()], dim=1)

    count = len(negatives)
    q, d_pos = points(90).repeat(count, 1), points(positive).repeat(count, 1)
    if target == "distributed":
        q[1:] = d_pos[1:] = 0
    d_neg = points(*negatives).requires_grad_()
    loss, t = margin_loss(q, d_pos, d_neg, target=target, return_targets=True)
    (gradient,) = torch.autograd.grad(loss, d_neg)
    levels = q[0] @ d_pos[0] - (t[0] if target == "distributed" else t).expand(count)
    return Scene(*(x.detach().numpy() for x in (q[0], d_pos[0], d_neg, levels, -gradient)))


def targets() -> Figure:
    """Draw static, adaptive and distributed targets on the unit circle (paper, Figure 2).

    The query is on top, so that height is similarity to it. Green is where targets want negatives.
    Red is the shift of each negative that the loss induces: the direction of the negative gradient;
    lengths go with the square root of its norm, and the longest is the same in each panel.
    7 × 2.6 inches, white background.
    """
    figure = Figure(figsize=(WIDTH, 2.6), facecolor="white")
    panels = figure.subplots(1, 3)
    figure.subplots_adjust(left=0, right=1, top=0.83, bottom=0.02, wspace=0)
    texts: dict[float | str, tuple[str, str]] = {
        0.5: ("(a) static", "one margin for all"),
        "adaptive": ("(b) adaptive", "a target for each negative"),
        "distributed": ("(c) distributed", "all targets for one negative"),
    }
    for axes, (target, (title, explained)) in zip(panels, texts.items(), strict=True):
        axes.set(xlim=(-1.4, 1.4), ylim=(-1.1, 1.3), aspect="equal")
        axes.set_axis_off()
        axes.text(0, 1.62, title, ha="center", fontsize=11, fontweight="bold")
        axes.text(0, 1.39, explained, ha="center", fontsize=9, color=GREY)
        drawn = scene(target)
        _targets(axes, drawn, target)
        _points(axes, drawn)
    return figure


def _targets(axes: Axes, drawn: Scene, target: float | str) -> None:
    """The green part of a panel: the levels, where they meet the circle on each negative's side."""
    levels = drawn.levels
    x = np.sign(drawn.negatives[:, 0]) * np.sqrt(1 - levels**2)
    dot: dict[str, Any] = {
        "marker": "o",
        "markersize": 6,
        "color": GREEN,
        "linestyle": "",
        "zorder": 4,
    }
    if target == "adaptive":
        axes.plot(x, levels, **dot)
        for i, (a, b) in enumerate(zip(x, levels, strict=True), 1):
            axes.text(0.85 * a, 0.85 * b, f"$t_{i}$", color=GREEN, **_CENTRED)
    elif target == "distributed":
        y = np.linspace(levels.min(), levels.max())
        axes.fill_betweenx(y, -np.sqrt(1 - y**2), np.sqrt(1 - y**2), color=GREEN, alpha=0.2, lw=0)
        mean = levels.mean()
        axes.plot(-np.sqrt(1 - mean**2), mean, **dot)
        axes.text(-0.65, mean, "mean", color=GREEN, **{**_CENTRED, "fontsize": 9})
        axes.text(0.2, mean, "$t_1, t_2, t_3$", color=GREEN, **_CENTRED)
    else:
        axes.plot([-abs(x[0]), abs(x[0])], levels[:2], color=GREEN, linewidth=2)
        top = drawn.positive[1]
        axes.plot([0, drawn.positive[0]], [top, top], color=GREEN, linewidth=1, linestyle=":")
        axes.annotate(
            "",
            (0.2, levels[0]),
            (0.2, top),
            arrowprops={"arrowstyle": "<->", "color": GREEN, "shrinkA": 0, "shrinkB": 0},
        )
        axes.text(0.3, (top + levels[0]) / 2, r"$\varepsilon$", color=GREEN, **_CENTRED)


def _points(axes: Axes, drawn: Scene) -> None:
    """The circle, the labelled points and the arrows of a panel."""
    axes.add_patch(Circle((0, 0), 1, fill=False, edgecolor="#b3b3b3", zorder=0))
    lengths = np.linalg.norm(drawn.shifts, axis=1, keepdims=True)
    arrows = 0.47 * drawn.shifts / np.sqrt(lengths * lengths.max())
    style = {"arrowstyle": "-|>", "mutation_scale": 8, "color": RED, "linewidth": 1.8}
    for point, arrow in zip(drawn.negatives, arrows, strict=True):
        ends = {"xy": point + arrow, "xytext": point}
        axes.annotate("", **ends, arrowprops={**style, "shrinkA": 0, "shrinkB": 0})
    labels = ["$q$", "$d^+$", "$d^-_1$", "$d^-_2$", "$d^-_3$"]
    for point, label in zip([drawn.query, drawn.positive, *drawn.negatives], labels, strict=True):
        axes.plot(*point, "o", color=BLACK, markersize=5, zorder=4)
        axes.text(1.25 * point[0], 1.25 * point[1], label, **_CENTRED)
