"""The idea of the paper's Figure 2: `targets` on a circle, with the shifts that the loss induces.

The arrows are computed: they are the negative gradient of `margin_loss` on the circle.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle

from adaptive_margins.losses import margin_loss

BLACK, _, _, GREEN, _, _, RED, _ = matplotlib.color_sequences["okabe_ito"]
GREY = "#595959"
_CENTRED: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": 11}
WIDTH = 7.0  # inches, the width of the book's text column at 100 dpi


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

    With a number or "adaptive", each negative forms a triple with the query and the positive. With
    "distributed" only the first one does; the others belong to other triples of the batch, whose
    queries and positives are zero vectors: φ = 0 and no gradient, so they do not contribute.
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
    dot: dict[str, Any] = {"marker": "o", "markersize": 6, "linestyle": "", "zorder": 4}
    dot["color"] = GREEN
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
        both = {"arrowstyle": "<->", "color": GREEN, "shrinkA": 0, "shrinkB": 0}
        axes.annotate("", (0.2, levels[0]), (0.2, top), arrowprops=both)
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
