"""What Figures 3 to 6 show: lines, maxima, labels, axes."""

from itertools import combinations, pairwise

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb

import report_frames as frames
from adaptive_margins.book import figures
from adaptive_margins.book.style import encoder_label, measure_label, score, spread, style

PAPER = ("distilbert", "roberta", "mpnet")
LAPTOP = frames.ENCODERS
REFERENCES = {frames.NDCG: 0.487, frames.HITS: 0.69}


def panel(figure, label):
    (axis,) = (a for a in figure.axes if a.get_label() == label)
    return axis


def lines(axis, gid):
    return {
        str(line.get_gid()).removeprefix(gid).strip(): line
        for line in axis.get_lines()
        if str(line.get_gid()).split()[0] == gid
    }


def texts(axis, gid):
    return [text for text in axis.texts if text.get_gid() == gid]


# --- style ---


def test_known_encoders_differ_in_colour_and_in_marker():
    looks = [style(name) for name in (*LAPTOP, *PAPER)]
    assert len({look.color for look in looks}) == 6
    assert len({look.marker for look in looks}) == 6


def test_style_is_stable():
    """In every run and process, for any name; an unknown one has no marker of a known one."""
    assert (style("minilm-3").color, style("minilm-3").marker) == ("#0072b2", "o")
    assert style("distilBERT") == style("distilbert")
    assert (style("my encoder").color, style("my encoder").marker) == ("#0072b2", "X")
    known = {style(name).marker for name in (*LAPTOP, *PAPER)}
    assert known.isdisjoint(style(f"encoder {i}").marker for i in range(100))


@pytest.mark.parametrize("name", [*LAPTOP, *PAPER, "other"])
def test_text_colour_is_legible_on_white(name):
    rgb = np.array(to_rgb(style(name).text))
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    assert 1.05 / (linear @ [0.2126, 0.7152, 0.0722] + 0.05) >= 4.4


def test_names():
    assert encoder_label("distilbert") == "distilBERT"
    assert encoder_label("mine") == "mine"
    assert encoder_label("minilm-3", {"minilm-3": "last layer"}) == "last layer"
    assert measure_label("Success(rel=2)@5") == "Hits@5"
    assert measure_label("R(rel=2)@20") == "R@20"
    assert measure_label("nDCG@10") == "nDCG@10"
    assert [score(v) for v in (0.5123, 0, 1, 0.9996)] == [".512", ".000", "1.000", "1.000"]


def test_spread_keeps_what_is_apart_and_its_order():
    assert spread([], 5, 0, 10) == []
    assert spread([3, 40, 20], 5, 0, 100) == [3, 40, 20]
    assert spread([50, 50], 10, 0, 100) == [45, 55]
    assert spread([1, 2], 10, 0, 100) == [0, 10]  # moved up from the edge
    assert spread([99, 99, 99], 10, 0, 100) == [80, 90, 100]


def test_spread_is_never_closer_than_the_gap():
    rng = np.random.default_rng(0)
    for _ in range(50):
        wanted = rng.uniform(0, 100, rng.integers(1, 9))
        placed = np.array(spread(wanted.tolist(), 10, 0, 100))
        assert np.all(np.diff(np.sort(placed)) >= 10 - 1e-9)
        assert placed.min() >= -1e-9 and placed.max() <= 100 + 1e-9
        order = np.argsort(wanted)
        assert np.all(np.diff(placed[order]) > 0)


def test_spread_shrinks_the_gap_where_there_is_no_room():
    assert spread([5, 5, 5], 50, 0, 10) == [0, 5, 10]


# --- Figure 3 ---


@pytest.fixture(scope="module")
def third():
    data = frames.figure3()
    return data, figures.figure3(data, references={frames.NDCG: 0.487})


PANELS3 = [
    (f"{measure} | {title}", measure, in_batch)
    for measure in frames.MEASURES
    for in_batch, title in figures.IN_BATCH.items()
]


def test_figure3_panels(third):
    _, figure = third
    assert [axis.get_label() for axis in figure.axes] == [label for label, *_ in PANELS3]
    assert [a.get_title() for a in figure.axes] == [*figures.IN_BATCH.values(), "", ""]
    assert [a.get_ylabel() for a in figure.axes] == ["nDCG@10", "", "Hits@5", ""]
    assert figure.get_supxlabel() == "static target ε (band: lowest and highest of 3 seeds)"
    assert figure.get_suptitle() == ""


@pytest.mark.parametrize(("label", "measure", "in_batch"), PANELS3)
def test_figure3_lines_are_the_frame(third, label, measure, in_batch):
    data, figure = third
    axis = panel(figure, label)
    rows = data[(data["measure"] == measure) & (data["in_batch"] == in_batch) & (data["seed"] == 1)]
    curves = lines(axis, "curve")
    assert list(curves) == list(LAPTOP)
    for encoder, own in rows.groupby("encoder"):
        line = curves[encoder]
        assert line.get_xdata().tolist() == own["target"].tolist()
        assert line.get_ydata().tolist() == own["value"].tolist()
        assert line.get_color() == style(encoder).color
        best = own[own["value"] == own["value"].max()]
        dot = lines(axis, "maximum")[encoder]
        assert dot.get_xydata().tolist() == [[best["target"].item(), best["value"].item()]]
    values = [text.get_text() for text in texts(axis, "value")]
    assert sorted(values) == sorted(score(v) for v in rows.groupby("encoder")["value"].max())
    (start,) = lines(axis, "start").values()
    assert start.get_ydata() == pytest.approx(rows["start"].iloc[:2])
    ends = {text.get_text() for text in texts(axis, "end")}
    assert ends == {"MiniLM-3", "MiniLM-4", "MiniLM-5", "step 0"} | (
        {"BM25"} if measure == frames.NDCG else set()
    )


def test_figure3_band_spans_the_seeds(third):
    data, figure = third
    axis = panel(figure, PANELS3[0][0])
    (band,) = axis.collections
    assert band.get_gid() == "band minilm-3"
    rows = data[
        (data["encoder"] == "minilm-3") & ~data["in_batch"] & (data["measure"] == frames.NDCG)
    ]
    heights = band.get_paths()[0].vertices
    for target, own in rows.groupby("target"):
        at = heights[np.isclose(heights[:, 0], target)][:, 1]
        assert at.min() == own["value"].min() and at.max() == own["value"].max()
    seeds = lines(axis, "seeds")["minilm-3"]
    assert len(seeds.get_xdata()) == (rows["seed"] != 1).sum()


def test_figure3_without_seeds_has_no_band():
    data = frames.figure3(seeds={"none": (1,)})
    figure = figures.figure3(data)
    assert not any(axis.collections for axis in figure.axes)
    assert figure.get_supxlabel() == "static target ε"


def test_figure3_start_of_each_encoder_where_they_differ():
    data = frames.figure3(encoders=PAPER)
    data["start"] += data["encoder"].map({"distilbert": 0, "roberta": -0.02, "mpnet": 0.01})
    axis = figures.figure3(data).axes[0]
    colors = {
        line.get_color(): line.get_ydata()[0]
        for line in axis.get_lines()
        if line.get_gid() == "start"
    }
    assert colors == pytest.approx(
        {
            style("distilbert").text: 0.442,
            style("roberta").text: 0.422,
            style("mpnet").text: 0.452,
        }
    )


# --- labels ---


def boxes(figure, axis, *gids):
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    found = [text for gid in gids for text in texts(axis, gid)]
    return [text.get_window_extent(canvas.get_renderer()) for text in found]


@pytest.mark.parametrize(
    "figure",
    [
        figures.figure3(frames.figure3()),
        figures.figure4(frames.figure4(), references=REFERENCES),
        figures.figure5(frames.figure5(), references=REFERENCES),
        figures.figure6(frames.figure6(encoders=PAPER, sizes=(64, 128), steps=60_000)),
    ],
    ids=["figure3", "figure4", "figure5", "figure6"],
)
def test_labels_do_not_overlap_and_stay_on_the_page(figure):
    page = figure.bbox
    for axis in figure.axes:
        found = boxes(figure, axis, "end", "value")
        for box in found:
            assert page.x0 <= box.x0 and box.x1 <= page.x1
            assert page.y0 <= box.y0 and box.y1 <= page.y1
        for one, other in combinations(found, 2):
            assert not one.shrunk(0.9, 0.8).overlaps(other.shrunk(0.9, 0.8))
        ticks = [
            t.get_window_extent()
            for t in axis.get_xticklabels()
            if t.get_text() and t.get_visible()
        ]
        if figure.axes[-1] is axis:
            assert all(one.x1 < other.x0 for one, other in pairwise(ticks))


def test_labels_of_equal_lines_are_told_apart():
    data = frames.figure4()
    means = data.groupby(["in_batch", "measure", "step"])["value"].transform("mean")
    data = frames.mark_maxima(data.assign(value=means), ["encoder", "in_batch", "measure"])
    figure = figures.figure4(data, references={frames.NDCG: 0.46})
    for axis in figure.axes:
        for one, other in combinations(boxes(figure, axis, "end"), 2):
            assert not one.shrunk(0.9, 0.8).overlaps(other.shrunk(0.9, 0.8))


# --- Figures 4 and 5 ---


def test_figure4_lines_maxima_and_reference():
    data = frames.figure4()
    figure = figures.figure4(data, references=REFERENCES, labels={"minilm-3": "one layer"})
    assert figure.get_supxlabel() == "triples seen"
    for label, measure, in_batch in PANELS3:
        axis = panel(figure, label)
        rows = data[(data["measure"] == measure) & (data["in_batch"] == in_batch)]
        for encoder, own in rows.groupby("encoder"):
            line = lines(axis, "curve")[encoder]
            assert line.get_xdata().tolist() == own["triples"].tolist()
            assert line.get_ydata().tolist() == own["value"].tolist()
            ((x, y),) = lines(axis, "maximum")[encoder].get_xydata()
            best = own.loc[own["value"].idxmax()]
            assert (x, y) == (best["triples"], best["value"])
        (reference,) = lines(axis, "reference").values()
        assert set(reference.get_ydata()) == {REFERENCES[measure]}
        assert reference.get_linestyle() == ":"
        assert not lines(axis, "start")
        assert {t.get_text() for t in texts(axis, "end")} == {
            "one layer",
            "MiniLM-4",
            "MiniLM-5",
            "BM25",
        }


def test_figure4_axes_are_shared():
    figure = figures.figure4(frames.figure4())
    top, right, bottom, _ = figure.axes
    assert top.get_ylim() == right.get_ylim() != bottom.get_ylim()
    assert len({axis.get_xlim() for axis in figure.axes}) == 1
    assert not any(t.get_visible() for t in right.get_yticklabels())
    assert not any(t.get_visible() for t in top.get_xticklabels())


def test_figure5_has_a_column_a_batch_size():
    data = frames.figure5()
    figure = figures.figure5(data)
    assert [a.get_title() for a in figure.axes] == ["batch size 16", "batch size 32", "", ""]
    for size in (16, 32):
        rows = data[(data["batch_size"] == size) & (data["measure"] == frames.HITS)]
        curves = lines(panel(figure, f"{frames.HITS} | batch size {size}"), "curve")
        for encoder, own in rows.groupby("encoder"):
            assert curves[encoder].get_ydata().tolist() == own["value"].tolist()


def test_millions_of_triples_are_written_short():
    data = frames.figure4(encoders=PAPER)
    data["triples"] *= 20_000
    figure = figures.figure4(data)
    FigureCanvasAgg(figure).draw()
    assert "20M" in [t.get_text() for t in figure.axes[-1].get_xticklabels()]


# --- Figure 6 ---


def test_figure6_lines_and_axes():
    data = frames.figure6(window=4, span=20)
    figure = figures.figure6(data)
    assert figure.get_supxlabel() == (
        "training step (first and last 20 batches, rolling mean over 4 batches)"
    )
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


def test_figure6_second_axis_is_the_target():
    figure = figures.figure6(frames.figure6())
    axis = figure.axes[-1]
    (right,) = axis.child_axes
    assert right.get_ylabel() == "target T = (1 + φ) / 2"
    FigureCanvasAgg(figure).draw()
    low, high = axis.get_ylim()
    assert right.get_ylim() == pytest.approx(((1 + low) / 2, (1 + high) / 2))
    assert "0.5" in [t.get_text() for t in right.get_yticklabels()]


def test_figure6_of_a_short_training():
    data = frames.figure6(encoders=("minilm-3",), steps=6, span=6, window=1)
    figure = figures.figure6(data[data["part"] == "first"])
    assert len(figure.axes) == 1
    assert figure.get_supxlabel().endswith("not smoothed)")


# --- bad input ---


@pytest.mark.parametrize("draw", [figures.figure3, figures.figure4, figures.figure5])
def test_missing_columns_are_named(draw):
    data = frames.figure4() if draw is not figures.figure3 else frames.figure3()
    with pytest.raises(ValueError, match=r"columns \['measure', 'maximum'\] are missing"):
        draw(data.drop(columns=["measure", "maximum"]))
    with pytest.raises(ValueError, match="no rows"):
        draw(data.iloc[:0])


def test_a_curve_needs_one_maximum():
    data = frames.figure3()
    with pytest.raises(ValueError, match="minilm-3: expected one row with maximum, got 0"):
        figures.figure3(data.assign(maximum=False))


def test_bad_values_are_named():
    with pytest.raises(ValueError, match=r"one batch size, got \[16, 32\]"):
        figures.figure4(frames.figure5())
    with pytest.raises(ValueError, match=r"references has the measures \['MRR'\]"):
        figures.figure4(frames.figure4(), references={"MRR": 0.4})
    data = frames.figure6()
    with pytest.raises(ValueError, match="'first' or 'last', got"):
        figures.figure6(data.replace({"part": {"last": "end"}}))
    data.loc[0, "window"] = 9
    with pytest.raises(ValueError, match=r"one window and one span, got \[9, 4\]"):
        figures.figure6(data)


def test_figures_are_opaque_white_and_closed():
    figure = figures.figure3(frames.figure3())
    assert figure.get_facecolor() == (1, 1, 1, 1)
    assert all(axis.get_facecolor() == (1, 1, 1, 1) for axis in figure.axes)
    assert plt.get_fignums() == []  # a notebook shows the returned figure once


def test_a_frame_read_from_csv_gives_the_same_figure(tmp_path):
    import pandas as pd

    data = frames.figure3()
    data.to_csv(tmp_path / "figure3.csv", index=False)
    again = figures.figure3(pd.read_csv(tmp_path / "figure3.csv"))
    one = lines(figures.figure3(data).axes[0], "curve")["minilm-4"].get_ydata()
    assert lines(again.axes[0], "curve")["minilm-4"].get_ydata() == pytest.approx(one)
