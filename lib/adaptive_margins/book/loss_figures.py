"""Targets and gradients of the loss for a few embeddings: the paper's Figure 2.

`pushes` draws it for real passages. A passage d is a point: to the right is its similarity to the
positive, φ(d⁺, d), upwards its similarity to the query, φ(q, d). In these two coordinates the
passages that meet a target lie on a line. `targets` draws the idea, on a circle.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from IPython.display import display
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle
from torch import Tensor
from torch.nn.functional import normalize

from adaptive_margins.book.figures import GREY, PALE, WIDTH, drawing
from adaptive_margins.book.style import BLACK, BLUE, GREEN
from adaptive_margins.book.style import VERMILION as RED
from adaptive_margins.losses import margin_loss


@dataclass(frozen=True)
class Push:
    """One query's part of the loss, and its effect on the passages of the batch.

    Attributes:
        places: (B + 1, 2) coordinates φ(d⁺, d) and φ(q, d) of the positive and of the B negatives.
        shifts: (B + 1, 2) their change along the negative gradient, per unit of step.
        targets: what the query's margin is compared with, (B,) values or one.
    """

    places: np.ndarray
    shifts: np.ndarray
    targets: np.ndarray

    @property
    def levels(self) -> np.ndarray:
        """φ(q, d⁺) − T: the similarities to the query at which a negative meets its target."""
        return np.asarray(self.places[0, 1] - self.targets)


def push(
    query: Tensor,
    positive: Tensor,
    negative: Tensor,
    row: int = 0,
    *,
    target: float | str,
    in_batch: bool = False,
    anchors: Tensor | None = None,
) -> Push:
    """Gradient of one query's loss terms with respect to the passages of a batch.

    The batch, ``target`` and ``in_batch`` are those of `margin_loss`, ``row`` is the query that is
    shown. The other queries and positives are replaced by zero vectors: φ = 0 and no gradient, so
    that their terms drop out. ``anchors`` (2, D): other coordinates than φ(d⁺, d) and φ(q, d).
    """
    alone = torch.zeros(len(query), 1, dtype=torch.float64)
    alone[row] = 1
    q, d_pos = alone * query.double(), (alone * positive.double()).requires_grad_()
    d_neg = negative.double().requires_grad_()
    settings: dict[str, Any] = {"target": target, "in_batch": in_batch}
    loss, t = margin_loss(q, d_pos, d_neg, **settings, return_targets=True)
    gradients = torch.autograd.grad(loss, (d_pos, d_neg))
    targets = t[row].flatten() if t.ndim else t[None]
    passages = torch.cat([d_pos[[row]], d_neg]).detach()
    if anchors is None:
        anchors = torch.stack([positive[row], query[row]])
    axes = normalize(anchors.double()).T
    # A gradient of cosines is orthogonal to its passage, whose length therefore stays.
    moved = -torch.cat([gradients[0][[row]], gradients[1]]) @ axes
    shifts = moved / passages.norm(dim=1, keepdim=True)
    return Push((normalize(passages) @ axes).numpy(), shifts.numpy(), targets.numpy())


def pushes(
    query: Tensor,
    positive: Tensor,
    negative: Tensor,
    row: int = 0,
    *,
    epsilon: float = 0.5,
    in_batch: bool = False,
) -> Figure:
    """Draw `push` for static, adaptive and distributed targets, a panel each.

    Green is where a negative meets its target, orange the direction of the push; its length goes
    with the square root of the norm, and the longest is the same in every panel. Filled negatives
    are the ones whose similarity to the query is compared.
    """
    panels: list[tuple[str, float | str, bool]] = [
        (f"static, ε = {epsilon:g}", epsilon, in_batch),
        ("adaptive", "adaptive", in_batch),
        ("distributed", "distributed", False),
    ]
    parts = query, positive, negative
    drawn = [push(*parts, row, target=t, in_batch=b) for _, t, b in panels]
    low = min(-0.25, *(p.places[:, 1].min() - 0.15 for p in drawn))
    with drawing():
        figure, axes = plt.subplots(
            1, 3, figsize=(WIDTH, 3.2), sharex=True, sharey=True, layout="constrained"
        )
        for axis, one, (title, target, everyone) in zip(axes, drawn, panels, strict=True):
            axis.set(title=title, xlim=(low, 1.12), ylim=(low, 1.05), aspect="equal")
            axis.grid(visible=False)
            _where_targets_are_met(axis, one, target)
            _passages(axis, one, row, everyone)
        axes[0].set_ylabel("similarity to the query, φ(q, d)")
        axes[1].set_xlabel("similarity to the positive, φ(d⁺, d)")
        handles = [
            plt.Line2D([], [], **look, label=label)
            for label, look in (
                ("positive d⁺", {"marker": "s", "color": BLACK, "linestyle": ""}),
                ("its negative d⁻", {"marker": "o", "color": BLUE, "linestyle": ""}),
                (
                    "other negatives",
                    {"marker": "o", "color": GREY, "mfc": "white", "linestyle": ""},
                ),
                ("target is met", {"color": GREEN}),
                ("push of the loss", {"color": RED}),
            )
        ]
        figure.legend(
            handles=handles, loc="outside lower center", ncols=5, frameon=False, fontsize=8
        )
    return figure


def _where_targets_are_met(axis: Axes, one: Push, target: float | str) -> None:
    """The line where φ(q, d) = φ(q, d⁺) − T, and with several targets their band."""
    top = one.places[0, 1]
    ends = np.array([-1.0, 1.0])
    axis.axhline(top, color=PALE, linewidth=0.7, linestyle=":")
    if target == "adaptive":
        axis.plot(ends, top - (1 + ends) / 2, color=GREEN, linewidth=1.6, gid="met")  # Eq. 2
        return
    levels = one.levels
    if target == "distributed":
        axis.axhspan(levels.min(), levels.max(), color=GREEN, alpha=0.15, linewidth=0)
    axis.axhline(levels.mean(), color=GREEN, linewidth=1.6, gid="met")


def _arrows(shifts: np.ndarray, longest: float) -> np.ndarray:
    lengths = np.linalg.norm(shifts, axis=1, keepdims=True).clip(min=1e-12)
    return np.asarray(longest * shifts / np.sqrt(lengths * lengths.max()))


def _passages(axis: Axes, one: Push, row: int, everyone: bool) -> None:
    arrows = _arrows(one.shifts, 0.3)
    style = {"arrowstyle": "-|>", "color": RED, "linewidth": 1.5, "shrinkA": 0, "shrinkB": 0}
    for number, (place, arrow) in enumerate(zip(one.places, arrows, strict=True)):
        if np.linalg.norm(arrow) > 0.02:
            axis.annotate(
                "", place + arrow, place, arrowprops={**style, "mutation_scale": 8}, gid="push"
            )
        paired = number == row + 1
        color = BLUE if paired else GREY if number else BLACK
        face = color if paired or everyone or not number else "white"
        marker = "o" if number else "s"
        axis.plot(*place, marker, color=color, markerfacecolor=face, markersize=5)


# --- on a circle ----------------------------------------------------------------------------------

ANGLES = (90, 66, 140, 48, -18)
"""Degrees of the query, its positive and three negatives on the unit circle."""
_CENTRED: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": 11}


def scene(target: float | str) -> Push:
    """Places of positive and negatives on the circle, and the shifts that the loss induces there.

    With a number or "adaptive", each negative forms a triple with the query and the positive. With
    "distributed" only the first one does; the others belong to other triples of the batch.
    """
    radians = torch.deg2rad(torch.tensor(ANGLES, dtype=torch.float64))
    points = torch.stack([radians.cos(), radians.sin()], dim=1)
    query, positive = (point.expand(3, 2) for point in points[:2])
    options: dict[str, Any] = {"target": target, "in_batch": target != "distributed"}
    return push(query, positive, points[2:], **options, anchors=torch.eye(2))


def targets() -> Figure:
    """Draw static, adaptive and distributed targets on the unit circle (paper, Figure 2).

    The query is on top, so that height is similarity to it. Green is where targets want negatives.
    Red is the shift of each negative that the loss induces: the direction of the negative gradient;
    lengths go with the square root of its norm, and the longest is the same in each panel.
    7 × 2.6 inches, white background.
    """
    figure = Figure(figsize=(7.0, 2.6), facecolor="white")
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


def _targets(axes: Axes, drawn: Push, target: float | str) -> None:
    """The green part of a panel: the levels, where they meet the circle on each negative's side."""
    levels, (right, top) = drawn.levels, drawn.places[0]
    x = np.sign(drawn.places[1:, 0]) * np.sqrt(1 - levels**2)
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
        axes.plot([-abs(x[0]), abs(x[0])], [*levels, *levels], color=GREEN, linewidth=2)
        axes.plot([0, right], [top, top], color=GREEN, linewidth=1, linestyle=":")
        both = {"arrowstyle": "<->", "color": GREEN, "shrinkA": 0, "shrinkB": 0}
        axes.annotate("", (0.2, levels[0]), (0.2, top), arrowprops=both)
        axes.text(0.3, (top + levels[0]) / 2, r"$\varepsilon$", color=GREEN, **_CENTRED)


def _points(axes: Axes, drawn: Push) -> None:
    """The circle, the labelled points and the arrows of a panel."""
    axes.add_patch(Circle((0, 0), 1, fill=False, edgecolor="#b3b3b3", zorder=0))
    arrows = _arrows(drawn.shifts[1:], 0.47)
    style = {"arrowstyle": "-|>", "mutation_scale": 8, "color": RED, "linewidth": 1.8}
    for point, arrow in zip(drawn.places[1:], arrows, strict=True):
        ends = {"xy": point + arrow, "xytext": point}
        axes.annotate("", **ends, arrowprops={**style, "shrinkA": 0, "shrinkB": 0})
    labels = ["$q$", "$d^+$", "$d^-_1$", "$d^-_2$", "$d^-_3$"]
    for point, label in zip([(0, 1), *drawn.places], labels, strict=True):
        axes.plot(*point, "o", color=BLACK, markersize=5, zorder=4)
        axes.text(1.25 * point[0], 1.25 * point[1], label, **_CENTRED)


# --- controls -------------------------------------------------------------------------------------


def interact(draw: Callable[..., Any], **controls: tuple[str, dict[str, Any]]) -> None:
    """Display ``draw`` of the first values, and controls that draw again in its place.

    What is displayed is an ordinary output, so that an executed notebook shows it without a kernel.

    Args:
        draw: returns what is displayed.
        controls: argument of ``draw`` → class of ipywidgets and its arguments, a value among them.
    """
    try:
        import ipywidgets  # type: ignore[import-untyped,unused-ignore]
    except ImportError:
        display(draw(**{name: options["value"] for name, (_, options) in controls.items()}))
        return
    widgets = {name: getattr(ipywidgets, kind)(**kw) for name, (kind, kw) in controls.items()}

    def values() -> dict[str, Any]:
        return {name: widget.value for name, widget in widgets.items()}

    display(ipywidgets.VBox(list(widgets.values())))
    handle = display(draw(**values()), display_id=True)
    for widget in widgets.values():
        widget.observe(lambda _: handle.update(draw(**values())), names="value")
