"""Targets and gradients of the loss for a few embeddings (`notebooks/00_the_loss.ipynb`).

The figure is the paper's Figure 2 for real passages. A passage d is a point: to the right is its
similarity to the positive, φ(d⁺, d), upwards its similarity to the query, φ(q, d). In these two
coordinates the passages that meet a target lie on a line.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from IPython.display import display
from matplotlib import color_sequences
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from adaptive_margins.book.figures import GREY, PALE, WIDTH, drawing
from adaptive_margins.losses import margin_loss

BLACK, _, _, GREEN, _, BLUE, RED, _ = color_sequences["okabe_ito"]
_STEP = 1e-4  # of gradient descent, short enough for the change of φ to be its derivative


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


def push(
    query: Tensor,
    positive: Tensor,
    negative: Tensor,
    row: int = 0,
    *,
    target: float | str,
    in_batch: bool = False,
) -> Push:
    """Gradient of one query's loss terms with respect to the passages of a batch.

    Args:
        query: (B, D) embeddings of queries.
        positive: (B, D) embeddings of their positives.
        negative: (B, D) embeddings of their negatives.
        row: the query that is shown.
        target: as in `margin_loss`.
        in_batch: as in `margin_loss`.

    The other queries and positives are replaced by zero vectors: φ = 0 and no gradient, so that
        their terms drop out.
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
    moved = passages - _STEP * torch.cat([gradients[0][[row]], gradients[1]])
    anchors = torch.stack([positive[row], query[row]]).double()
    places, after = (
        torch.cosine_similarity(x[:, None], anchors[None], dim=-1) for x in (passages, moved)
    )
    return Push(places.numpy(), ((after - places) / _STEP).numpy(), targets.numpy())


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
    levels = top - one.targets
    if target == "distributed":
        axis.axhspan(levels.min(), levels.max(), color=GREEN, alpha=0.15, linewidth=0)
    axis.axhline(levels.mean(), color=GREEN, linewidth=1.6, gid="met")


def _passages(axis: Axes, one: Push, row: int, everyone: bool) -> None:
    lengths = np.linalg.norm(one.shifts, axis=1, keepdims=True)
    arrows = 0.3 * one.shifts / np.sqrt(np.maximum(lengths, 1e-12) * max(lengths.max(), 1e-12))
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
