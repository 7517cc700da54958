"""What Figures 3 to 6 show: lines, maxima, labels, axes."""

import re
from itertools import combinations, pairwise, product

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from bs4 import BeautifulSoup
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb

import report_frames as frames
from adaptive_margins.book import figures
from adaptive_margins.book.shown import svg
from adaptive_margins.book.style import encoder_label, measure_label, score, spread, style

PAPER, LAPTOP = ("distilbert", "roberta", "mpnet"), frames.ENCODERS
REFERENCES = {frames.NDCG: 0.487, frames.HITS: 0.69}
PANELS3 = [
    (f"{measure} | {title}", measure, in_batch)
    for measure in frames.MEASURES
    for in_batch, title in figures.IN_BATCH.items()
]
DRAW = {
    "figure3": lambda: figures.figure3(frames.figure3(), references={frames.NDCG: 0.487}),
    "figure4": lambda: figures.figure4(frames.figure4(), references=REFERENCES),
    "figure5": lambda: figures.figure5(frames.figure5(), references=REFERENCES),
    "figure6": lambda: figures.figure6(frames.figure6(encoders=PAPER, sizes=(128,), steps=60_000)),
}  # fmt: skip


def panel(figure, label):
    (axis,) = (a for a in figure.axes if a.get_label() == label)
    return axis


def lines(axis, gid):
    return {
        str(line.get_gid()).removeprefix(gid).strip(): line
        for line in axis.get_lines()
        if str(line.get_gid()).split()[0] == gid
    }


def texts(axis, *gids):
    return [text for text in axis.texts if text.get_gid() in gids]


def check_curves(axis, rows, x):
    """Every line is the frame's, and its filled mark and value are the maximum."""
    curves = lines(axis, "curve")
    assert list(curves) == list(dict.fromkeys(rows["encoder"]))
    for encoder, own in rows.groupby("encoder"):
        assert curves[encoder].get_xdata().tolist() == own[x].tolist()
        assert curves[encoder].get_ydata().tolist() == own["value"].tolist()
        assert curves[encoder].get_color() == style(encoder).color
        best = own.loc[own["value"].idxmax()]
        dot = lines(axis, "maximum")[encoder]
        assert dot.get_xydata().tolist() == [[best[x], best["value"]]]
    values = sorted(text.get_text() for text in texts(axis, "value"))
    assert values == sorted(score(v) for v in rows.groupby("encoder")["value"].max())


def check_band(axis, rows, x):
    """The band of an encoder spans the confidence intervals."""
    (encoder,) = set(rows["encoder"])
    (band,) = (c for c in axis.collections if c.get_gid() == f"band {encoder}")
    heights = band.get_paths()[0].vertices
    for row in rows.to_dict("records"):
        at = heights[np.isclose(heights[:, 0], row[x])][:, 1]
        assert (at.min(), at.max()) == pytest.approx((row["low"], row["high"]))


def test_styles_are_distinct_stable_and_legible():
    looks = [style(name) for name in (*LAPTOP, *PAPER)]
    assert len({look.color for look in looks}) == len({look.marker for look in looks}) == 6
    assert (style("minilm-3").color, style("minilm-3").marker) == ("#0072b2", "o")
    assert style("distilBERT") == style("distilbert")
    assert (style("my encoder").color, style("my encoder").marker) == ("#0072b2", "X")
    known = {look.marker for look in looks}
    assert known.isdisjoint(style(f"encoder {i}").marker for i in range(100))
    for look in (*looks, style("other")):
        rgb = np.array(to_rgb(look.text))
        linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
        assert 1.05 / (linear @ [0.2126, 0.7152, 0.0722] + 0.05) >= 4.4


def test_names_and_scores():
    assert [encoder_label(name) for name in ("distilbert", "mine")] == ["distilBERT", "mine"]
    labels = {"Success(rel=2)@5": "Hits@5", "R(rel=2)@20": "R@20", "nDCG@10": "nDCG@10"}
    assert {name: measure_label(name) for name in labels} == labels
    assert [score(v) for v in (0.5123, 0, 1, 0.9996)] == [".512", ".000", "1.000", "1.000"]


def test_spread():
    assert spread([], 5, 0, 10) == []
    assert spread([3, 40, 20], 5, 0, 100) == [3, 40, 20]
    assert spread([50, 50], 10, 0, 100) == [45, 55]
    assert spread([1, 2], 10, 0, 100) == [0, 10]  # moved up from the edge
    assert spread([99, 99, 99], 10, 0, 100) == [80, 90, 100]
    assert spread([5, 5, 5], 50, 0, 10) == [0, 5, 10]  # no room
    rng = np.random.default_rng(0)
    for _ in range(50):
        wanted = rng.uniform(0, 100, rng.integers(1, 9))
        placed = np.array(spread(wanted.tolist(), 10, 0, 100))
        assert np.all(np.diff(placed[np.argsort(wanted)]) >= 10 - 1e-9)
        assert placed.min() >= -1e-9 and placed.max() <= 100 + 1e-9


def test_figure3(tmp_path):
    frames.figure3().to_csv(tmp_path / "figure3.csv", index=False)
    data = pd.read_csv(tmp_path / "figure3.csv")  # as a reader has it
    figure = figures.figure3(data, references={frames.NDCG: 0.487})
    assert [axis.get_label() for axis in figure.axes] == [label for label, *_ in PANELS3]
    assert [a.get_title() for a in figure.axes] == [*figures.IN_BATCH.values(), "", ""]
    assert [a.get_ylabel() for a in figure.axes] == ["nDCG@10", "", "Hits@5", ""]
    assert figure.get_supxlabel() == "static target ε"
    for label, measure, in_batch in PANELS3:
        axis = panel(figure, label)
        rows = data[(data["measure"] == measure) & (data["in_batch"] == in_batch)]
        check_curves(axis, rows[rows["seed"] == 1], "target")
        starts = [line.get_ydata()[0] for line in axis.get_lines() if line.get_gid() == "start"]
        assert starts == pytest.approx(
            rows.groupby("encoder", sort=False)["start"].first().tolist()
        )
        ends = {"MiniLM-3", "MiniLM-4", "MiniLM-5", "zero-shot", *["BM25"] * (measure == frames.NDCG)}  # fmt: skip
        assert {text.get_text() for text in texts(axis, "end")} == ends
        own = rows[rows["encoder"] == "minilm-3"]
        check_band(axis, own[own["seed"] == 1], "target")
        assert len(lines(axis, "seeds")["minilm-3"].get_xdata()) == (own["seed"] != 1).sum()


def test_collapsed_runs_are_crosses():
    data = frames.figure3(seeds={"minilm-3": (1, 2, 3), "minilm-4": (1, 2)})
    down = (data["encoder"] == "minilm-3") & (data["target"] == 0) & (data["seed"] == 3)
    data.loc[down & data["in_batch"], ["value", "collapsed"]] = [0.1, True]
    figure = figures.figure3(data)
    axis = panel(figure, f"{frames.NDCG} | with in-batch negatives")
    assert lines(axis, "collapsed")["minilm-3"].get_xydata().tolist() == [[0.0, 0.1]]
    assert 0.1 not in lines(axis, "seeds")["minilm-3"].get_ydata()
    other = panel(figure, f"{frames.NDCG} | without in-batch negatives")
    assert len(lines(other, "collapsed")["minilm-3"].get_xdata()) == 0


def test_figure3_start_of_each_encoder_where_they_differ():
    data = frames.figure3(encoders=PAPER)
    data["start"] += data["encoder"].map({"distilbert": 0, "roberta": -0.02, "mpnet": 0.01})
    starts = [x for x in figures.figure3(data).axes[0].get_lines() if x.get_gid() == "start"]
    colors = {line.get_color(): line.get_ydata()[0] for line in starts}
    expected = {"distilbert": 0.442, "roberta": 0.422, "mpnet": 0.452}
    assert colors == pytest.approx({style(e).text: value for e, value in expected.items()})


def test_figures_4_and_5():
    data = frames.figure4()
    figure = figures.figure4(data, references=REFERENCES)
    assert figure.get_supxlabel() == "triples seen"
    for label, measure, in_batch in PANELS3:
        axis = panel(figure, label)
        rows = data[(data["measure"] == measure) & (data["in_batch"] == in_batch)]
        check_curves(axis, rows, "triples")
        check_band(axis, rows[rows["encoder"] == "minilm-5"], "triples")
        (reference,) = lines(axis, "reference").values()
        assert set(reference.get_ydata()) == {REFERENCES[measure]}
        assert not lines(axis, "start")
    top, right, bottom, _ = figure.axes
    assert top.get_ylim() == right.get_ylim() != bottom.get_ylim()
    assert len({axis.get_xlim() for axis in figure.axes}) == 1
    assert not any(t.get_visible() for t in right.get_yticklabels())
    data = frames.figure5()
    figure = figures.figure5(data)
    assert [a.get_title() for a in figure.axes] == ["batch size 16", "batch size 32", "", ""]
    for size in (16, 32):
        rows = data[(data["batch_size"] == size) & (data["measure"] == frames.HITS)]
        check_curves(panel(figure, f"{frames.HITS} | batch size {size}"), rows, "triples")
    data = frames.figure4(encoders=PAPER)
    figure = figures.figure4(data.assign(triples=data["triples"] * 5_000))
    FigureCanvasAgg(figure).draw()
    assert "20M" in [t.get_text() for t in figure.axes[-1].get_xticklabels()]


def test_figure6():
    data = frames.figure6(window=4, span=20)
    figure = figures.figure6(data, published=0.0)
    assert figure.get_supxlabel() == "training step"
    marks = [lines(axis, "published") for axis in figure.axes]
    assert [bool(found) for found in marks] == [False, True] * 3  # at the end of each encoder
    assert {line.get_ydata()[0] for found in marks for line in found.values()} == {0.0}
    assert all(x.get_markerfacecolor() == "white" for found in marks for x in found.values())
    for (encoder, part), rows in data.groupby(["encoder", "part"]):
        axis = panel(figure, f"{encoder} | 32 | {part}")
        for name in ("mean", "min", "max"):
            line = lines(axis, name)[""]
            assert line.get_ydata().tolist() == rows[name].tolist()
            assert line.get_xdata().tolist() == rows["step"].tolist()
        ticks = [text.get_text() for text in axis.get_xticklabels()]
        assert ticks == [str(rows["step"].min()), str(rows["step"].max())]
    assert [a.get_ylabel() for a in figure.axes] == ["φ(d⁺, d⁻)"] + [""] * 5
    assert [t.get_text() for t in figure.texts[:3]] == ["MiniLM-3", "MiniLM-4", "MiniLM-5"]
    (right,) = figure.axes[-1].child_axes  # the target
    FigureCanvasAgg(figure).draw()
    low, high = figure.axes[-1].get_ylim()
    assert right.get_ylim() == pytest.approx(((1 + low) / 2, (1 + high) / 2))
    assert "0.5" in [t.get_text() for t in right.get_yticklabels()]
    data = frames.figure6(encoders=("minilm-3",), steps=48, span=48, window=1)
    whole = figures.figure6(data[data["part"] == "first"].assign(part="all"))
    assert len(whole.axes) == 1 and not len(lines(whole.axes[0], "cut")[""].get_xdata())
    assert [t.get_text() for t in whole.axes[0].get_xticklabels()] == ["1", "24", "48"]


def test_points_lead_to_their_runs():
    data = frames.figure3()
    text = svg(figures.figure3(data), "figure3")
    soup = BeautifulSoup(text, "html.parser")
    points = soup.select("a.am-point")
    assert len(points) == len(data)
    for row in data.to_dict("records"):
        found = [a for a in points if a["href"] == f"#figure3-{row['run_id']}"]
        words = f"{measure_label(row['measure'])} {score(row['value'])} ["
        assert any(
            words in a["aria-label"] and a.title.get_text() == a["aria-label"] for a in found
        )
    best = data[data["maximum"]].iloc[0]
    assert f"MiniLM-3 {score(best['value'])} at {best['target']:g}" in soup.svg["aria-label"]
    assert {"nDCG@10", "Hits@5"} <= {t.get_text(strip=True) for t in soup.select("text")}
    ids = [tag["id"] for tag in soup.select("[id]")]
    assert len(ids) == len(set(ids)) and svg(figures.figure3(data), "figure3") == text
    assert not re.search("\n\\s*\n", text) and "<metadata" not in text


@pytest.mark.parametrize("name", DRAW)
def test_texts_overlap_nothing_and_values_stand_in_their_order(name):
    """Labels stay on the page and apart; values lie on no line, a higher one not below a lower one."""
    figure = DRAW[name]()
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    page = figure.bbox
    assert figure.get_facecolor() == (1, 1, 1, 1) and plt.get_fignums() == []
    for axis in figure.axes:
        values, ends = texts(axis, "value"), texts(axis, "end")
        found = [t.get_window_extent(canvas.get_renderer()) for t in (*values, *ends)]
        for box in found:
            assert page.x0 <= box.x0 and box.x1 <= page.x1
            assert page.y0 <= box.y0 and box.y1 <= page.y1
        for one, other in combinations(found, 2):
            assert not one.shrunk(0.9, 0.8).overlaps(other.shrunk(0.9, 0.8))
        boxes = found[: len(values)]
        for line in axis.get_lines() if boxes else ():
            points = line.get_transform().transform(line.get_xydata())
            for (a, b), box in product(pairwise(points), boxes):
                at = np.linspace(a, b, 300)
                hidden = box.shrunk(0.8, 0.6).count_contains(at)
                assert not hidden, (axis.get_label(), line.get_gid())
        for (one, a), (two, b) in combinations(zip(values, boxes, strict=True), 2):
            close = abs(a.x0 - b.x0) < a.width
            assert not close or (a.y0 - b.y0) * (one.xy[1] - two.xy[1]) >= 0
    ticks = [t for t in figure.axes[-1].get_xticklabels() if t.get_text() and t.get_visible()]
    boxes = [t.get_window_extent() for t in ticks]
    assert all(one.x1 < other.x0 for one, other in pairwise(boxes))


def test_a_curve_without_a_maximum_is_named():
    with pytest.raises(ValueError, match="minilm-3: expected one row with maximum, got 0"):
        figures.figure3(frames.figure3().assign(maximum=False))


def lines_of_losses():
    rows = [
        (encoder, loss, in_batch, seed, triples, frames.NDCG, 0.4 + value + 0.01 * seed)
        for encoder in LAPTOP
        for loss, in_batch, values in (
            ("static (tuned)", False, (0, 0.1, 0.05)),
            ("adaptive", False, (0, 0.02, 0.08)),
            ("adaptive", True, (0, 0.03, 0.02)),
        )
        for seed in (1, 2, 3)
        for triples, value in zip((0, 1024, 2048), values, strict=True)
    ]
    columns = ["encoder", "loss", "in_batch", "seed", "triples", "measure", "value"]
    return pd.DataFrame(rows, columns=columns)


def test_convergence_shows_means_of_seeds_and_maxima_that_are_passed_or_not():
    figure = figures.convergence(lines_of_losses())
    assert len(figure.axes) == 2 * len(LAPTOP)
    axis = panel(figure, "minilm-4 | without in-batch negatives")
    curves, maxima = lines(axis, "curve"), lines(axis, "maximum")
    assert curves["adaptive"].get_ydata() == pytest.approx([0.42, 0.44, 0.50])
    assert maxima["static (tuned)"].get_xydata().ravel() == pytest.approx([1024, 0.52])
    assert maxima["adaptive"].get_markerfacecolor() == "white"  # highest at its end
    assert maxima["static (tuned)"].get_markerfacecolor() != "white"
    colors = {curve.get_color() for curve in curves.values()}
    assert len(colors) == 2
    other = lines(panel(figure, "minilm-5 | with in-batch negatives"), "curve")
    assert list(other) == ["adaptive"] and other["adaptive"].get_color() in colors
