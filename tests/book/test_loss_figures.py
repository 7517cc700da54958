"""The push of the loss on passages against finite differences of naive terms, and where targets are
met; the two drawings of Figure 2, and the script that computes the same.
"""

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
from adaptive_margins.losses import margins_and_targets

REGIMES = [
    (0.5, False),
    (0.5, True),
    ("adaptive", False),
    ("adaptive", True),
    ("distributed", False),
]


@pytest.fixture
def batch():
    rng = torch.Generator().manual_seed(5)
    return [torch.randn(4, 6, generator=rng, dtype=torch.float64) for _ in range(3)]


def cosine(a, b):
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def terms(q, d_pos, negatives, row, target, in_batch):
    """The sum of l² of one query, Equations 1 to 3 by hand, over the number of the batch's terms."""
    total = 0.0
    for j, d_neg in enumerate(negatives):
        if not in_batch and target != "distributed" and j != row:
            continue
        compared = negatives[row] if target == "distributed" else d_neg
        wanted = (1 + cosine(d_pos, d_neg)) / 2 if isinstance(target, str) else target
        total += (cosine(q, d_pos) - cosine(q, compared) - wanted) ** 2
    return total / len(negatives) ** (2 if in_batch or target == "distributed" else 1)


@pytest.mark.parametrize(("target", "in_batch"), REGIMES)
def test_push_is_the_negative_gradient_of_the_querys_terms(batch, target, in_batch):
    row, step = 2, 1e-6
    query, positive, negative = (x.numpy() for x in batch)
    q, texts = query[row], np.vstack([positive[row], negative])
    slope = np.zeros_like(texts)
    for index in np.ndindex(slope.shape):
        ends = []
        for sign in (1, -1):
            moved = texts.copy()
            moved[index] += sign * step
            ends.append(terms(q, moved[0], moved[1:], row, target, in_batch))
        slope[index] = (ends[0] - ends[1]) / (2 * step)
    settings = {"target": target, "in_batch": in_batch}
    found = loss_figures.push(*batch, row, **settings)
    other = loss_figures.push(*batch, row, **settings, anchors=batch[0][:2])
    for pushed, anchors in ((found, (positive[row], q)), (other, query[:2])):
        for number, text in enumerate(texts):
            after = text - step * slope[number]
            for axis, anchor in enumerate(anchors):
                assert pushed.places[number, axis] == pytest.approx(cosine(anchor, text))
                change = (cosine(anchor, after) - cosine(anchor, text)) / step
                assert pushed.shifts[number, axis] == pytest.approx(change, abs=1e-4)
    if not in_batch and target != "distributed":
        others = [i for i in range(1, 5) if i != row + 1]
        assert np.abs(found.shifts[others]).max() < 1e-9  # only the query's triple counts


def test_a_negative_that_meets_its_target_is_not_pushed(batch):
    query, positive, negative = batch
    phi = torch.cosine_similarity
    epsilon = float(phi(query[0], positive[0], dim=0) - phi(query[0], negative[0], dim=0))
    assert np.abs(loss_figures.push(*batch, 0, target=epsilon).shifts).max() < 1e-9


def test_figure_has_a_panel_for_each_regime(batch):
    figure = loss_figures.pushes(*batch, 1, epsilon=0.3)
    assert [axis.get_title() for axis in figure.axes] == [
        "static, ε = 0.3",
        "adaptive",
        "distributed",
    ]
    found = loss_figures.push(*batch, 1, target=0.3)
    top = found.places[0, 1]
    static, adaptive, distributed = (
        next(line for line in axis.get_lines() if line.get_gid() == "met") for axis in figure.axes
    )
    assert static.get_ydata()[0] == pytest.approx(top - 0.3)
    # Equation 2: a negative equal to the positive would have to be 1 below it, an opposite one 0.
    assert list(adaptive.get_ydata()) == pytest.approx([top, top - 1])
    targets = loss_figures.push(*batch, 1, target="distributed").targets
    assert distributed.get_ydata()[0] == pytest.approx(top - targets.mean())


def test_controls_draw_again(batch):
    pytest.importorskip("ipywidgets")
    drawn = []
    loss_figures.interact(
        lambda epsilon: drawn.append(epsilon), epsilon=("FloatSlider", {"value": 0.5, "max": 1.0})
    )
    assert drawn == [0.5]


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
