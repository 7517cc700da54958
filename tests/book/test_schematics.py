"""Figure 2 redrawn: its arrows point where the loss falls."""

import io
import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.image import imread

from adaptive_margins.book import loss_figures
from adaptive_margins.losses import margin_loss, margins_and_targets


def test_the_figure_draws_on_white_and_texts_do_not_overlap():
    file = io.BytesIO()
    figure = loss_figures.targets()
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
    q, d_pos = np.array([0, 1]), drawn.places[0]
    unit = negatives / np.linalg.norm(negatives, axis=1, keepdims=True)
    scaled = (1 + unit @ d_pos) / 2
    margins = q @ d_pos - unit @ q
    if target == "distributed":
        return np.sum((margins[0] - scaled) ** 2)
    return np.sum((margins - (scaled if target == "adaptive" else target)) ** 2)


@pytest.mark.parametrize("target", [0.5, "adaptive", "distributed"])
def test_arrows_follow_finite_differences_of_the_loss(target):
    drawn = loss_figures.scene(target)
    step = 1e-6
    slope = np.zeros_like(drawn.places[1:])
    for index in np.ndindex(slope.shape):
        ends = []
        for sign in (1, -1):
            moved = drawn.places[1:].copy()
            moved[index] += sign * step
            ends.append(loss_of_one_query(drawn, moved, target))
        slope[index] = (ends[0] - ends[1]) / (2 * step)
    # The mean over B² divides all arrows of a panel alike.
    np.testing.assert_allclose(drawn.shifts[1:] * len(slope) ** 2, -slope, atol=1e-7)
    assert (np.abs(slope).max(axis=1) > 1e-3).all()  # every arrow has a direction


def test_levels_are_where_the_loss_is_zero():
    # On its level a negative meets a static target, which does not move with it.
    drawn = loss_figures.scene(0.5)
    height = drawn.levels[:1]
    there = np.stack([np.sqrt(1 - height**2), height], axis=1)
    query = np.array([[0.0, 1.0]])
    parts = (torch.tensor(part) for part in (query, drawn.places[:1], there))
    assert margin_loss(*parts, target=0.5).item() == pytest.approx(0, abs=1e-12)


# --- the same with points to drag ---

SCRIPT = Path(__file__).resolve().parents[2] / "book" / "_static" / "figure2.js"
with_node = pytest.mark.skipif(not shutil.which("node"), reason="there is no node")


def in_node(code: str, **values) -> list:
    """The value of an expression over ``f``, the script's functions, and ``x``, the values."""
    text = f"const f = require({json.dumps(str(SCRIPT))}), x = {json.dumps(values)};"
    text += f"console.log(JSON.stringify({code}))"
    done = subprocess.run(["node", "-e", text], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@with_node
def test_the_script_computes_margins_and_targets():
    parts = torch.randn(3, 5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    cases = [(0.3, False), (0.3, True), ("adaptive", False), ("adaptive", True), ("distributed", False)]  # fmt: skip
    code = "x.cases.map(([target, inBatch]) => f.marginsAndTargets(...x.parts, target, inBatch))"
    for found, (target, in_batch) in zip(in_node(code, parts=parts.tolist(), cases=cases), cases, strict=True):  # fmt: skip
        expected = margins_and_targets(*parts, target=target, in_batch=in_batch)
        for name, tensor in zip(("margins", "targets"), expected, strict=True):
            values = np.array(found[name], dtype=float)
            assert values.shape == tuple(tensor.shape)
            np.testing.assert_allclose(values, tensor.numpy(), rtol=0, atol=1e-12)


@with_node
def test_the_script_draws_what_the_figure_draws():
    angles, targets = [90, 66, 140, 48, -18], [0.5, "adaptive", "distributed"]
    code = "x.targets.map(t => [f.terms(x.angles, t), [2, 3, 4].map(i => f.slope(x.angles, t, i))])"
    radians = np.deg2rad(angles[2:])
    tangents = np.stack([-np.sin(radians), np.cos(radians)], axis=1)
    for (terms, slopes), target in zip(in_node(code, angles=angles, targets=targets), targets, strict=True):  # fmt: skip
        drawn = loss_figures.scene(target)
        levels = terms["similarity"] - np.array(terms["wanted"])
        np.testing.assert_allclose(levels, drawn.levels.repeat(3 // len(drawn.levels)), atol=1e-12)
        along = (drawn.shifts[1:] * tangents).sum(axis=1)
        np.testing.assert_allclose(-np.array(slopes), along * len(slopes), atol=1e-6)
