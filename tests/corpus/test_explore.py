"""What the notebook on one's own collection shows, and the notebook itself, executed once on a small folder."""

from __future__ import annotations

import dataclasses
import shutil
import sys
from functools import partial
from itertools import pairwise, product
from pathlib import Path
from types import SimpleNamespace

import ipywidgets
import numpy as np
import papermill
import pytest
import torch
from bs4 import BeautifulSoup
from IPython.display import HTML
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from scipy.stats import ttest_rel
from test_finetune import SETTINGS, collection_of, encoder, saved  # noqa: F401

from adaptive_margins.book import figures
from adaptive_margins.book.pages import OWN
from adaptive_margins.corpus import explore
from adaptive_margins.corpus.finetune import Finetuned, FinetuneError, finetune
from adaptive_margins.data.collection import Texts

NOTEBOOK = Path(__file__).resolve().parents[2] / "notebooks" / f"{OWN}.ipynb"
WITHOUT_BATCH = [{"target": 0.3}, {"target": "adaptive"}]
WITH_BATCH = [
    {"target": 0.3, "in_batch": True},
    {"target": "adaptive", "in_batch": True},
    {"target": "distributed"},
]
LOSSES = [
    {**loss, "orientation": orientation}
    for loss, orientation in product([*WITHOUT_BATCH, *WITH_BATCH], ("paper", "released"))
]
each_loss = pytest.mark.parametrize("loss", LOSSES, ids=lambda x: "-".join(map(str, x.values())))


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
    collection, split = explore.open_collection(source, seed=1, triples=SETTINGS.triples)
    values = {"model": encoder, "target": "distributed", "seed": 1, "triples": SETTINGS.triples}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(explore, "finetune", partial(finetune, settings=SETTINGS, device="cpu"))
        patch.setattr(explore, "display", screen)
        done = explore.train(collection, source, folder / "output", **values)
    assert done.report["kept"] == "trained"
    return SimpleNamespace(
        source=source, collection=collection, split=split, values=values, done=done, screen=screen
    )


@pytest.fixture(scope="module")
def executed(tmp_path_factory, encoder):  # noqa: F811
    """The notebook, executed on a training that cannot help."""
    folder = tmp_path_factory.mktemp("notebook")
    saved(collection_of(train_on_chance=True), folder / "collection")
    parameters = {"source": "collection", "output": "output", "model": encoder, "triples": 64}
    notebook = papermill.execute_notebook(
        NOTEBOOK, folder / "out.ipynb", parameters, kernel_name="python3", start_timeout=300, cwd=folder,
        progress_bar=False,
    )  # fmt: skip
    cells = {cell.id: cell for cell in notebook.cells}
    return SimpleNamespace(folder=folder, notebook=notebook, cells=cells)


# ---- the notebook ----------------------------------------------------------------------------------------------------


def data(cell) -> list[dict]:
    return [o.data for o in cell.outputs if o.output_type in ("display_data", "execute_result")]


def test_the_notebook_does_all_of_it(executed):
    done = Finetuned.load(executed.folder / "output")
    assert done.report["triples"]["chosen"] == 64
    cells = executed.cells
    for name in ("lengths", "train", "comparison", "changes-figure", "targets", "batch"):
        assert [kind for d in data(cells[name]) for kind in d].count("image/png") == 1, name
    for name in ("changes", "browse", "lost"):
        assert [kind for d in data(cells[name]) for kind in d].count("text/html") == 1, name
    for name in ("browse", "batch"):  # the picture is an output of its own, not the widget's
        widget = "application/vnd.jupyter.widget-view+json"
        assert [widget in shown for shown in data(cells[name])] == [True, False]
    verdict = data(cells["verdict"])[0]["text/markdown"]
    assert done.report["verdict"] in verdict.replace("\\[", "[")
    assert "120 passages" in data(cells["collection"])[0]["text/markdown"]
    streams = [o for o in cells["train"].outputs if o.output_type == "stream"]
    assert {stream.name for stream in streams} == {"stdout"}  # stderr looks like a failure
    assert "step 2 of 2: validation nDCG@10" in "".join(stream.text for stream in streams)


def test_what_the_notebook_tells_to_do_next_names_what_is_there(executed):
    text = data(executed.cells["next"])[0]["text/markdown"]
    for name in ("collection", "output"):
        assert f" {executed.folder / name} " in text
    assert "encoder stayed as it was" in data(executed.cells["changes"])[0]["text/html"]


# ---- training --------------------------------------------------------------------------------------------------------


def test_the_curve_is_drawn_in_one_place_at_each_check(helped):
    (drawn,) = helped.screen.places
    curve = helped.done.curve
    lines = [{str(line.get_gid()): line for line in f.axes[0].get_lines()} for f in drawn]
    assert [len(line["curve"].get_xdata()) for line in lines] == [*range(1, len(curve) + 1), len(curve)]  # fmt: skip
    np.testing.assert_array_equal(lines[-1]["curve"].get_ydata(), curve["nDCG@10"])
    title = drawn[-1].axes[0].get_title(loc="left")
    assert title == f"stopped at step 60; step {helped.done.report['best_step']} was best and is kept"  # fmt: skip


def test_the_bar_at_the_best_step_is_what_it_had_to_exceed(helped):
    report = helped.done.report
    (axis,) = explore.learning_curve(helped.done.curve, report).axes
    ((_, _, (bar,)),) = axis.containers
    low, high = bar.get_segments()[0][:, 1]
    validation = report["validation"]
    assert high == validation["best"]["nDCG@10"]
    assert high - low == pytest.approx(validation["standard_error"])
    assert (low > validation["start"]["nDCG@10"]) == (report["kept"] == "trained")

    kept = {**report, "kept": "start", "best_step": 0}
    (axis,) = explore.learning_curve(helped.done.curve, kept).axes
    assert not axis.containers
    assert "the encoder stays as it was" in axis.get_title(loc="left")


def test_a_finished_training_is_shown_and_not_repeated(helped, screen, monkeypatch):
    monkeypatch.delattr(explore, "finetune")
    folder = helped.done.folder
    found = explore.train(helped.collection, helped.source, str(folder), **helped.values)
    assert found.report == helped.done.report
    assert "shown, not repeated" in screen.places[0][0].data
    assert isinstance(screen.places[1][0], Figure)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"seed": 2, "target": 0.3}, "with another target and another seed; choose another output"),
        ({"triples": None}, "with another number of triples;"),
        ({"model": "minilm"}, "with another encoder;"),
    ],
)
def test_a_training_of_another_call_is_left_alone(helped, values, said):
    with pytest.raises(FinetuneError, match=said):
        explore.train(
            helped.collection, helped.source, helped.done.folder, **{**helped.values, **values}
        )


def test_a_collection_that_has_changed_is_another_one(helped):
    texts = [*helped.collection.passages.texts[:-1], "t1 t2"]
    changed = dataclasses.replace(
        helped.collection, passages=Texts(helped.collection.passages.ids, texts)
    )
    with pytest.raises(FinetuneError, match="with another collection;"):
        explore.train(changed, helped.source, helped.done.folder, **helped.values)


def test_an_output_with_something_else_is_left_alone(helped, tmp_path):
    (tmp_path / "training.json").write_text("not by this project")
    with pytest.raises(FinetuneError, match=r"training\.json cannot be read"):
        explore.train(helped.collection, helped.source, tmp_path, **helped.values)


# ---- collection and comparisons --------------------------------------------------------------------------------------


def test_facts_are_counted(helped):
    text = explore.facts(helped.collection, "Split so.")
    assert "**invented**: 120 passages; 11 words each on average, the longest 11;" in text
    assert "Split so." in text
    row = next(line for line in text.splitlines() if line.startswith("| test"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells == ["test", "80", "80", "80", "80", "1\\: 80"]


def test_pseudo_queries_are_said_to_be_that(tmp_path):
    lines = [
        f"d{n}\tNumber {n} tells of graphs, nodes and paths. Another sentence on matrices of shape {n} stands here, too.\n"
        for n in range(40)
    ]
    (tmp_path / "collection.tsv").write_text("".join(lines))
    collection, split = explore.open_collection(str(tmp_path), seed=1, triples=50)
    assert len(collection.queries["test"])
    assert "weaker than real queries" in explore.facts(collection, split)


def test_comparisons_are_the_reports_and_more(helped):
    rows = explore.comparisons(helped.done)
    assert [row["measure"] for row in rows] == ["nDCG@10"] * 3 + ["R(rel=1)@100"] * 3
    for row in rows[:3]:
        reported = helped.done.report["comparisons"][f"{row['a']} vs {row['b']}"]
        assert {**row, "ci": list(row["ci"])} == {**reported, "a": row["a"], "b": row["b"]}
    for row in rows:
        values = helped.done.per_query(row["measure"])
        found = ttest_rel(values[row["a"]], values[row["b"]])
        if (values[row["a"]] == values[row["b"]]).all():
            assert (row["p_t"], row["ci"], row["verdict"]) == (1, (0, 0), "equivalent")
            continue
        assert row["p_t"] == pytest.approx(found.pvalue)
        assert row["ci"] == pytest.approx(tuple(found.confidence_interval(0.95)))
    text = explore.comparison_table(helped.done, rows)
    assert text.count("\n| ") == 2 + len(rows)
    assert "| R@100 | after + BM25 − encoder after |" in text


def test_the_comparison_is_drawn_with_its_intervals(helped):
    rows = explore.comparisons(helped.done)
    figure = explore.comparison_figure(helped.done, rows)
    means, differences = figure.axes[:2]
    shown = {line.get_gid(): line.get_xdata()[0] for line in means.get_lines()}
    assert shown == {n: m["nDCG@10"] for n, m in helped.done.report["measures"].items()}
    for row, (dot, _, (bar,)) in zip(rows[:3], differences.containers, strict=True):
        assert dot.get_xdata() == [row["difference"]]
        assert bar.get_segments()[0][:, 0] == pytest.approx(row["ci"])
    assert [text.get_text() for text in differences.texts] == [r["verdict"] for r in rows[:3]]


def test_one_test_query_is_too_few_and_nothing_breaks(helped, tmp_path):
    folder = shutil.copytree(helped.done.folder, tmp_path / "output")
    qrels = folder / "qrels.test.txt"
    qrels.write_text(qrels.read_text().splitlines()[0] + "\n")
    done = Finetuned.load(folder)
    rows = explore.comparisons(done)
    assert {row["verdict"] for row in rows} == {"too few queries"}
    assert "| — | — | — | **too few queries** |" in explore.comparison_table(done, rows)
    table = explore.changes(done)
    assert len(table) == 1
    for figure in (
        explore.comparison_figure(done, rows),
        explore.changes_figure(done, table, rows),
    ):
        figure.canvas.draw()


# ---- queries ---------------------------------------------------------------------------------------------------------


def test_gains_come_first_then_losses(helped):
    table = explore.changes(helped.done)
    gained, lost = (table["difference"] > 0).sum(), (table["difference"] < 0).sum()
    html = BeautifulSoup(explore.changes_table(helped.done, table, count=3), "html.parser")
    caption = html.caption.get_text()
    assert f"of 80 queries, {gained} are better and {lost} worse than with encoder before" in caption  # fmt: skip
    rows = [[cell.get_text() for cell in row.find_all("td")] for row in html.tbody.find_all("tr")]
    expected = [*table["qid"][::-1][:3], *table["qid"][: min(3, lost)]]
    assert [row[1] for row in rows] == [f"({qid})" for qid in expected]
    assert rows[0][0] == helped.done.queries[table["qid"].iloc[-1]]
    figure = explore.changes_figure(helped.done, table, explore.comparisons(helped.done))
    assert figure.axes[0].get_xlabel().startswith(f"{gained} queries above 0, {lost} below")


def test_queries_are_compared_with_bm25_where_nothing_changed(executed):
    done = Finetuned.load(executed.folder / "output")
    assert done.report["kept"] == "start"
    table = explore.changes(done)
    np.testing.assert_array_equal(table["difference"], table["trained"] - table["bm25"])
    assert table["difference"].is_monotonic_increasing


def test_side_by_side_has_the_rankings_and_marks_what_is_relevant(helped):
    done, qrels = helped.done, helped.done.qrels
    ranked = {name: done.run(name) for name in ("start", "trained")}
    for qid in list(qrels)[:10]:
        page = explore.side_by_side(done, helped.collection, qid, depth=4)
        html = BeautifulSoup(page, "html.parser")
        cells = [row.find_all("td") for row in html.tbody.find_all("tr")]
        assert len(cells) == 4
        for side, name in enumerate(("start", "trained")):
            best = sorted(ranked[name][qid].items(), key=lambda hit: -hit[1])[:4]
            for row, (docid, _) in zip(cells, best, strict=True):
                text = row[side].get_text()
                assert f"({docid};" in text
                assert helped.collection.passages[docid] in text
                relevant = qrels[qid].get(docid, 0) > 0
                assert ("✓ relevant, grade 1" in text) == relevant
                assert ("am-relevant" in row[side]["class"]) == relevant


def test_texts_are_escaped(helped):
    texts = [f"<script>alert(1)</script> & {t}" for t in helped.collection.passages.texts]
    hostile = dataclasses.replace(
        helped.collection, passages=Texts(helped.collection.passages.ids, texts)
    )
    table = explore.changes(helped.done).assign(query="<img src=x onerror=alert(1)>")
    qid = table["qid"].iloc[0]
    for page in (explore.side_by_side(helped.done, hostile, qid), explore.changes_table(helped.done, table)):  # fmt: skip
        html = BeautifulSoup(page, "html.parser")
        assert not html.find_all(["script", "img"])
        assert html.find("div")["class"] == ["am-own", "tex2jax_ignore", "mathjax_ignore"]
        assert "alert(1)" in html.get_text()


def test_an_unknown_query_is_named(helped):
    with pytest.raises(KeyError, match="q99"):
        explore.side_by_side(helped.done, helped.collection, "q99")


def test_the_menu_shows_another_query_in_its_place(helped, screen):
    table = explore.changes(helped.done)
    explore.browse(helped.done, helped.collection, table)
    (controls,), shown = screen.places
    (menu,) = controls.children
    assert list(menu.options.values()) == list(table["qid"][::-1])
    menu.value = table["qid"].iloc[0]
    for page, row in zip(shown, (-1, 0), strict=True):
        qid = table["qid"].iloc[row]
        assert isinstance(page, HTML)
        assert page.data == explore.side_by_side(helped.done, helped.collection, qid)


# ---- targets and a batch ---------------------------------------------------------------------------------------------


def test_targets_are_the_first_and_last_batches_smoothed(helped):
    recorded, frame = helped.done.targets, explore.targets(helped.done, window=4, most=20)
    assert frame["step"].tolist() == [*range(1, 21), *range(41, 61)]
    values = recorded["max"].to_numpy()
    naive = [np.mean(values[max(0, i - 3) : i + 1]) for i in range(len(values))]
    np.testing.assert_allclose(frame["max"], [*naive[:20], *naive[40:]])
    assert figures.figure6(frame).axes
    halves = explore.targets(helped.done)
    assert halves["step"].tolist() == list(range(1, 61))
    assert halves.groupby("part")["step"].agg(["min", "max"]).to_numpy().tolist() == [[1, 30], [31, 60]]  # fmt: skip


@pytest.fixture(scope="module")
def batch(helped):
    return explore.batch(helped.done, helped.collection, model=helped.values["model"], size=6)


def test_a_batch_is_of_test_queries_with_what_is_and_what_is_not_relevant(helped, batch):
    qrels, bm25 = helped.done.qrels, helped.done.run("bm25")
    assert len({qid for qid, _, _ in batch.triples}) == 6
    for qid, positive, negative in batch.triples:
        assert qrels[qid][positive] > 0
        assert negative not in qrels[qid]
        assert negative in bm25[qid]
    start, trained = (helped.done.run(name) for name in ("start", "trained"))
    assert batch.embeddings.keys() == {"start", "trained"}
    for name, run in (("start", start), ("trained", trained)):
        query, positive, _ = batch.embeddings[name]
        for (qid, docid, _), cosine in zip(batch.triples, (query * positive).sum(1), strict=True):
            if docid in run[qid]:
                assert float(cosine) == pytest.approx(run[qid][docid], abs=1e-5)


def random_batch(size: int = 5, dim: int = 7) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    query, positive, negative = (
        torch.nn.functional.normalize(torch.randn(size, dim, generator=generator, dtype=torch.float64))
        for _ in range(3)
    )  # fmt: skip
    return query, positive, negative


@each_loss
def test_margins_and_targets_are_those_of_the_equations(loss):
    q, p, n = (each.numpy() for each in random_batch())
    found = explore.state(random_batch(), **loss)
    whole, paper = (
        loss.get("in_batch") or loss["target"] == "distributed",
        loss["orientation"] == "paper",
    )
    errors = []
    for i, j in product(range(5), range(5)):
        if i != j and not whole:
            assert np.isnan(found.margin[i, j])
            assert np.isnan(found.target[i, j])
            continue
        k = i if paper else j  # whose query, and own passages, the pair (i, j) has
        margin = q[k] @ p[k] - (q[i] @ n[j] if loss.get("in_batch") else q[k] @ n[k])
        target = (1 + p[i] @ n[j]) / 2 if isinstance(loss["target"], str) else loss["target"]
        assert found.margin[i, j] == pytest.approx(margin)
        assert found.target[i, j] == pytest.approx(target)
        errors.append((margin - target) ** 2)
    assert found.loss == pytest.approx(np.mean(errors))


@each_loss
def test_each_step_lowers_the_loss(loss):
    start = random_batch()
    for still, given in zip(explore.pulled(start, 0, **loss), start, strict=True):
        assert still.equal(given)
    moved = [explore.pulled(start, steps, **loss) for steps in range(8)]
    losses = [explore.state(each, **loss).loss for each in moved]
    assert all(after < before for before, after in pairwise(losses))
    for each in moved[-1]:
        torch.testing.assert_close(each.norm(dim=1), torch.ones(5, dtype=torch.float64))


def test_the_picture_shows_margins_and_targets(batch):
    for target, in_batch in (("distributed", False), ("adaptive", False), (explore.STATIC, True)):
        figure = explore.batch_figure(batch, target=target, epsilon=0.2, in_batch=in_batch, steps=3)
        loss = {"target": 0.2 if target == explore.STATIC else target, "in_batch": in_batch}
        before = batch.embeddings["start"]
        first, last = (
            explore.state(before, **loss),
            explore.state(explore.pulled(before, 3, **loss), **loss),
        )
        pairs, wanted, errors = figure.axes[:3]
        points = {line.get_gid(): line.get_xydata() for line in pairs.get_lines()}
        for gid, state in (("before", first), ("after", last)):
            expected = np.stack([np.diag(state.margin), np.diag(state.target)], axis=1)
            np.testing.assert_allclose(points[gid], expected)
        np.testing.assert_allclose(wanted.images[0].get_array().filled(np.nan), last.target)
        np.testing.assert_allclose(
            errors.images[0].get_array().filled(np.nan), last.margin - last.target
        )
        assert pairs.get_title() == f"loss {first.loss:.4f} → {last.loss:.4f}"
        assert all(pairs.get_xlim()[0] <= x <= 1 for x in points["before"][:, 0])
        assert wanted.get_facecolor() == to_rgba("#e6e6e6")


def test_controls_draw_anew_in_the_place_of_the_first_picture(batch, screen):
    explore.play(batch)
    (box,), pictures = screen.places
    controls = {widget.description: widget for widget in box.children}
    assert isinstance(pictures[0], Figure)
    titles = [pictures[0].axes[0].get_title()]
    for name, value in (
        ("target", explore.STATIC),
        ("static ε", 0.8),
        ("encoder", "trained"),
        ("steps", 0),
    ):
        controls[name].value = value
        titles.append(pictures[-1].axes[0].get_title())
    assert len(pictures) == 5
    assert len(set(titles)) == 5
    expected = explore.state(batch.embeddings["trained"], target=0.8).loss
    assert titles[-1] == f"loss {expected:.4f} → {expected:.4f}"
    controls["target"].value = "distributed"
    controls["in-batch negatives (static ε, adaptive)"].value = True  # which it always has
    assert pictures[-1].axes[0].get_title() == pictures[-2].axes[0].get_title()
    assert isinstance(controls["orientation"], ipywidgets.ToggleButtons)


def test_without_ipywidgets_the_first_picture_is_there(batch, screen, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    explore.play(batch)
    ((picture,),) = screen.places
    expected = explore.batch_figure(batch).axes[0].get_title()
    assert picture.axes[0].get_title() == expected
    assert "adaptive-margins[lab]" in capsys.readouterr().err
