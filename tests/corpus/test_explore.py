"""What the notebook on a custom collection shows, and the notebook itself, executed on a small folder."""

from __future__ import annotations

import dataclasses
import shutil
from functools import partial
from itertools import pairwise, product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import papermill
import pytest
import torch
from bs4 import BeautifulSoup
from matplotlib.figure import Figure
from scipy.stats import ttest_rel
from test_finetune import SETTINGS, collection_of, encoder, saved  # noqa: F401

from adaptive_margins.book.pages import OWN
from adaptive_margins.corpus import explore
from adaptive_margins.corpus.finetune import finetune
from adaptive_margins.corpus.finetuned import Finetuned
from adaptive_margins.corpus.prepare import open_split
from adaptive_margins.corpus.settings import FinetuneError
from adaptive_margins.data.collection import Texts
from adaptive_margins.losses import margin_loss, margins_and_targets

NOTEBOOK = Path(__file__).resolve().parents[2] / "notebooks" / f"{OWN}.ipynb"
LOSSES = [
    {"target": target, "in_batch": in_batch, "orientation": orientation}
    for target, in_batch in ((0.3, False), (0.3, True), ("adaptive", False), ("adaptive", True), ("distributed", False))
    for orientation in ("paper", "released")
]  # fmt: skip


class Screen:
    """In the place of IPython's display: what is shown in each place, the newest last."""

    def __init__(self) -> None:
        self.places: list[list[object]] = []

    def __call__(self, *shown: object, display_id: bool = False) -> SimpleNamespace:
        self.places += [[each] for each in shown]
        return SimpleNamespace(update=self.places[-1].append)


@pytest.fixture
def screen(monkeypatch):
    screen = Screen()
    monkeypatch.setattr(explore, "display", screen)
    return screen


@pytest.fixture(scope="module")
def helped(tmp_path_factory, encoder):  # noqa: F811
    """A training that helps, and what was shown of it."""
    folder, screen = tmp_path_factory.mktemp("own"), Screen()
    source = saved(collection_of(train_on_chance=False), folder / "collection")
    collection = open_split(source, SETTINGS.triples, seed=1).collection
    values = {"model": encoder, "target": "distributed", "seed": 1, "triples": SETTINGS.triples}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(explore, "finetune", partial(finetune, settings=SETTINGS, device="cpu"))
        patch.setattr(explore, "display", screen)
        done = explore.train_or_load(collection, source, folder / "output", **values)
    assert done.report["kept"] == "trained"
    return SimpleNamespace(source=source, collection=collection, values=values, done=done, screen=screen)  # fmt: skip


def rows_of(style) -> list[list[str]]:
    """The cells of a table's body."""
    body = BeautifulSoup(style.to_html(), "html.parser").tbody
    return [[cell.get_text() for cell in row.find_all("td")] for row in body.find_all("tr")]


def test_the_notebook_runs_where_training_does_not_help(tmp_path, encoder, warm_start):  # noqa: F811
    saved(collection_of(train_on_chance=True), tmp_path / "collection")
    parameters = {
        "source": "collection",
        "output": "output",
        "model": encoder,
        "triples": 64,
        "target": "all",
    }
    notebook = papermill.execute_notebook(
        NOTEBOOK, tmp_path / "out.ipynb", parameters, kernel_name="python3", start_timeout=300, cwd=tmp_path,
        progress_bar=False,
    )  # fmt: skip
    done = Finetuned.load(tmp_path / "output")
    assert (done.report["triples"]["chosen"], done.report["kept"]) == (64, "start")
    shown = {
        cell.id: [kind for o in cell.outputs if "data" in o for kind in o.data]
        for cell in notebook.cells
        if cell.cell_type == "code"
    }
    for name in (
        "lengths",
        "train",
        "losses",
        "comparison",
        "changes-figure",
        "targets",
        "controls",
    ):
        assert shown[name].count("image/png") == 1, name
    for name in ("collection", "losses", "means", "verdict", "changes", "browse", "lost", "batch"):
        assert shown[name].count("text/html") == 1, name
    cells = {cell.id: cell for cell in notebook.cells}
    streams = [o for o in cells["train"].outputs if o.output_type == "stream"]
    assert {stream.name for stream in streams} == {"stdout"}  # stderr looks like a failure
    assert "index collection --model output" in cells["next"].outputs[0].text
    table = explore.changes(done)  # with BM25, as the encoder did not change
    np.testing.assert_array_equal(table["difference"], table["trained"] - table["bm25"])
    assert table["difference"].is_monotonic_increasing


# ---- training ----------------------------------------------------------------------------------------


def test_the_curve_is_drawn_in_one_place_at_each_evaluation(helped):
    ((_, *drawn),) = helped.screen.places
    curve = helped.done.curve
    lines = [{str(line.get_gid()): line for line in f.axes[0].get_lines()} for f in drawn]
    assert [len(line["curve"].get_xdata()) for line in lines] == [*range(1, len(curve) + 1), len(curve)]  # fmt: skip
    np.testing.assert_array_equal(lines[-1]["curve"].get_ydata(), curve["nDCG@10"])


def test_the_bar_at_the_best_step_is_what_it_had_to_exceed(helped):
    report = helped.done.report
    (axis,) = explore.learning_curve(helped.done.curve, report).axes
    ((_, _, (bar,)),) = axis.containers
    low, high = bar.get_segments()[0][:, 1]
    validation = report["validation"]
    assert high == validation["best"]["nDCG@10"]
    assert high - low == pytest.approx(validation["standard_error"])
    assert low > validation["start"]["nDCG@10"]


def test_a_finished_training_is_loaded(helped, screen, monkeypatch):
    monkeypatch.delattr(explore, "finetune")
    folder = str(helped.done.folder)
    found = explore.train_or_load(helped.collection, helped.source, folder, **helped.values)
    assert found.report == helped.done.report
    assert isinstance(screen.places[0][0], Figure)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"seed": 2, "target": 0.3}, "another target and another seed; choose another output"),
        ({"triples": None}, "another number of triples;"),
        ({"model": "minilm"}, "another encoder;"),
        ({"collection": None}, "another collection;"),
    ],
)
def test_another_training_is_left_alone(helped, values, named):
    collection = helped.collection
    if "collection" in values:
        texts = [*collection.passages.texts[:-1], "t1 t2"]
        collection = dataclasses.replace(collection, passages=Texts(collection.passages.ids, texts))
        values = {}
    with pytest.raises(FinetuneError, match=named):
        explore.train_or_load(collection, helped.source, helped.done.folder, **{**helped.values, **values})  # fmt: skip


# ---- comparisons -------------------------------------------------------------------------------------


def test_comparisons_are_the_reports_and_more(helped):
    table = explore.comparisons(helped.done)
    assert table["measure"].tolist() == ["nDCG@10"] * 4 + ["R(rel=1)@100"] * 4
    for row in table.to_dict("records"):
        reported = helped.done.report["comparisons"][f"{row['a']} vs {row['b']}"]
        if row["measure"] == reported["measure"]:
            assert [row["low"], row["high"]] == reported["ci"]
            for key in reported.keys() & row.keys():
                assert row[key] == reported[key]
        values = helped.done.per_query(row["measure"])
        found = ttest_rel(values[row["a"]], values[row["b"]])
        if (values[row["a"]] == values[row["b"]]).all():
            assert (row["p_t"], row["low"], row["high"], row["verdict"]) == (1, 0, 0, "equivalent")
            continue
        assert row["p_t"] == pytest.approx(found.pvalue)
        interval = found.confidence_interval(0.95)
        assert [row["low"], row["high"]] == pytest.approx([interval.low, interval.high])
    figure = explore.comparison_figure(table)
    for axis, (_, rows) in zip(figure.axes, table.groupby("measure", sort=False), strict=True):
        ((dots, _, (bars,)),) = axis.containers
        np.testing.assert_array_equal(dots.get_xdata(), rows["difference"])
        ends = np.array([segment[:, 0] for segment in bars.get_segments()])
        np.testing.assert_allclose(ends, rows[["low", "high"]])
        assert [text.get_text() for text in axis.texts] == rows["verdict"].tolist()


def test_one_test_query_is_too_few_and_withheld_stays_so(helped, tmp_path):
    folder = shutil.copytree(helped.done.folder, tmp_path / "output")
    qrels = folder / "qrels.test.txt"
    qrels.write_text(qrels.read_text().splitlines()[0] + "\n")
    done = Finetuned.load(folder)
    pairs, table = explore.comparisons(done), explore.changes(done)
    assert set(pairs["verdict"]) == {"too few queries"}
    assert pairs[["low", "high", "p_t", "p_tost"]].isna().all(axis=None)
    assert len(table) == 1
    for figure in (explore.comparison_figure(pairs), explore.changes_figure(table, pairs)):
        figure.canvas.draw()
    graded = (helped.done.folder / "qrels.test.txt").read_text().splitlines()
    lines = [f"{line[:-1]}2\n" for line in graded[:5]] + [f"{line}\n" for line in graded[5:]]
    qrels.write_text("".join(lines))  # five queries have a passage of grade 2
    measures = {"start": {"nDCG@10": 0.5, "R(rel=2)@10": 0.5}}
    pairs = explore.comparisons(Finetuned(folder, {**helped.done.report, "measures": measures}))
    few = pairs["verdict"] == "too few queries"
    assert (few == (pairs["measure"] == "R(rel=2)@10")).all()
    report = {**helped.done.report, "bm25": {"queries": 9, "without_hits": 5}}
    pairs = explore.comparisons(Finetuned(helped.done.folder, report))
    assert set(pairs[pairs["b"] != "start"]["verdict"]) == {"withheld"}


# ---- queries -----------------------------------------------------------------------------------------


def test_side_by_side_has_the_rankings_and_marks_what_is_relevant(helped):
    done, qrels = helped.done, helped.done.qrels
    ranked = {name: done.run(name) for name in ("start", "trained")}
    for qid in list(qrels)[:10]:
        cells = rows_of(explore.side_by_side(done, helped.collection, qid, depth=4))
        assert len(cells) == 4
        for side, name in enumerate(("start", "trained")):
            best = sorted(ranked[name][qid].items(), key=lambda hit: -hit[1])[:4]
            for row, (docid, _) in zip(cells, best, strict=True):
                assert f"({docid};" in row[side]
                assert helped.collection.passages[docid] in row[side]
                assert ("✓ relevant, grade 1" in row[side]) == (qrels[qid].get(docid, 0) > 0)
    with pytest.raises(KeyError, match="q99"):
        explore.side_by_side(done, helped.collection, "q99")


def test_texts_are_escaped(helped):
    texts = [f"<script>alert(1)</script> & {t}" for t in helped.collection.passages.texts]
    passages = Texts(helped.collection.passages.ids, texts)
    hostile = dataclasses.replace(helped.collection, passages=passages)
    table = explore.changes(helped.done).assign(query="<img src=x onerror=alert(1)>")
    styles = explore.side_by_side(helped.done, hostile, table["qid"].iloc[0]), explore.show(table, "<img>")  # fmt: skip
    for style in styles:
        html = BeautifulSoup(style.to_html(), "html.parser")
        assert not html.find_all(["script", "img"])
        assert {"tex2jax_ignore", "mathjax_ignore"} <= set(html.table["class"])
        assert "alert(1)" in html.get_text()


# ---- a batch -----------------------------------------------------------------------------------------


def test_a_batch_is_of_test_queries_with_what_is_and_what_is_not_relevant(helped):
    qrels, bm25 = helped.done.qrels, helped.done.run("bm25")
    for name, model in (("start", helped.values["model"]), ("trained", str(helped.done.folder))):
        triples, (query, positive, _) = explore.batch(helped.done, helped.collection, model, size=6)
        assert triples["qid"].nunique() == len(triples) == 6
        run = helped.done.run(name)
        cosines = (query * positive).sum(1).tolist()
        for row, cosine in zip(triples.to_dict("records"), cosines, strict=True):
            judged = qrels[row["qid"]]
            assert judged[row["positive"]] > 0 and row["negative"] not in judged
            assert row["negative"] in bm25[row["qid"]]
            if row["positive"] in run[row["qid"]]:
                assert cosine == pytest.approx(run[row["qid"]][row["positive"]], abs=1e-5)


def random_batch(size: int = 5, dim: int = 7) -> explore.Embeddings:
    generator = torch.Generator().manual_seed(2)
    query, positive, negative = (
        torch.nn.functional.normalize(torch.randn(size, dim, generator=generator, dtype=torch.float64))
        for _ in range(3)
    )  # fmt: skip
    return query, positive, negative


@pytest.mark.parametrize("loss", LOSSES, ids=lambda x: "-".join(map(str, x.values())))
def test_each_step_lowers_the_loss_and_the_figure_shows_it(loss):
    start = random_batch()
    moved = [explore.descend(start, steps, **loss) for steps in range(6)]
    assert all(still.equal(given) for still, given in zip(moved[0], start, strict=True))
    losses = [float(margin_loss(*each, **loss)) for each in moved]
    assert all(after < before for before, after in pairwise(losses))
    for each in moved[-1]:
        torch.testing.assert_close(each.norm(dim=1), torch.ones(5, dtype=torch.float64))

    points, errors, _ = explore.batch_figure(start, steps=5, **loss).axes
    assert points.get_title() == f"loss {losses[0]:.4f} → {losses[5]:.4f}"
    margins, targets = (x.numpy() for x in torch.broadcast_tensors(*margins_and_targets(*moved[5], **loss)))  # fmt: skip
    drawn = {line.get_gid(): line.get_xydata() for line in points.get_lines()}
    np.testing.assert_allclose(drawn["after 5 steps"], np.stack([margins.ravel(), targets.ravel()], axis=1))  # fmt: skip
    found = errors.images[0].get_array().filled(np.nan)
    for i, j in product(range(5), range(5)):
        left = margins - targets
        expected = left[i, j] if left.ndim == 2 else left[i] if i == j else np.nan
        np.testing.assert_allclose(found[i, j], expected)
