"""Figure 2 redrawn: its arrows point where the loss falls."""

import io

import numpy as np
import pytest
import torch
from matplotlib.image import imread

from adaptive_margins.book import schematics
from adaptive_margins.losses import margin_loss


def test_the_figure_draws_on_white_and_texts_do_not_overlap():
    file = io.BytesIO()
    figure = schematics.targets()
    figure.savefig(file, format="png", dpi=100)
    file.seek(0)
    pixels = imread(file)
    assert pixels.shape[1] == 700
    assert (pixels[..., 3] == 1).all()
    assert (pixels < 0.5).any()
    # White to the border: nothing reaches it, where it would be cut off.
    assert (np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]]) == 1).all()
    figure.canvas.draw()
    for axes in figure.axes:
        boxes = [(t.get_text(), t.get_window_extent()) for t in axes.texts if t.get_text()]
        for i, (text, box) in enumerate(boxes):
            for other, another in boxes[:i]:
                assert not box.overlaps(another), f"{text!r} overlaps {other!r}"


def loss_of_one_query(drawn, negatives, target):
    """The terms of Eqs. 1 to 3 of one query, by hand, so that no zero vector is needed."""
    q, d_pos = drawn.query, drawn.positive
    unit = negatives / np.linalg.norm(negatives, axis=1, keepdims=True)
    scaled = (1 + unit @ d_pos) / 2
    margins = q @ d_pos - unit @ q
    if target == "distributed":
        return np.sum((margins[0] - scaled) ** 2)
    return np.sum((margins - (scaled if target == "adaptive" else target)) ** 2)


@pytest.mark.parametrize("target", [0.5, "adaptive", "distributed"])
def test_arrows_follow_finite_differences_of_the_loss(target):
    drawn = schematics.scene(target)
    step = 1e-6
    slope = np.zeros_like(drawn.negatives)
    for index in np.ndindex(slope.shape):
        ends = []
        for sign in (1, -1):
            moved = drawn.negatives.copy()
            moved[index] += sign * step
            ends.append(loss_of_one_query(drawn, moved, target))
        slope[index] = (ends[0] - ends[1]) / (2 * step)
    # The mean over B or B² divides all arrows of a panel alike.
    terms = len(slope) ** (2 if target == "distributed" else 1)
    np.testing.assert_allclose(drawn.shifts * terms, -slope, atol=1e-7)
    assert (np.abs(slope).max(axis=1) > 1e-3).all()  # every arrow has a direction


def test_levels_are_where_the_loss_is_zero():
    # On its level a negative meets a static target, which does not move with it.
    drawn = schematics.scene(0.5)
    height = drawn.levels[:1]
    there = np.stack([np.sqrt(1 - height**2), height], axis=1)
    parts = (torch.tensor(part) for part in (drawn.query[None], drawn.positive[None], there))
    assert margin_loss(*parts, target=0.5).item() == pytest.approx(0, abs=1e-12)
