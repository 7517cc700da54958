"""The book built on the profile smoke, read as HTML."""

from __future__ import annotations

import json
import re
import sys
import time
from functools import cache
from pathlib import Path
from urllib.parse import urlparse

import nbformat
import pandas as pd
import pytest
import yaml
from bs4 import BeautifulSoup

from adaptive_margins.book.build import build
from adaptive_margins.book.publish import problems
from adaptive_margins.book.style import encoder_label

ROOT = Path(__file__).resolve().parents[2]
CONTENTS = yaml.safe_load((ROOT / "book" / "_toc.yml").read_text())
PAGES = ["index", *(c["file"] for part in CONTENTS["parts"] for c in part["chapters"])]
each = pytest.mark.parametrize("page", PAGES)
pytestmark = pytest.mark.slow


@cache
def parsed(path: Path) -> BeautifulSoup:
    return BeautifulSoup(path.read_text(), "html.parser")


@pytest.fixture
def html(smoke_home):
    """Page name → its HTML."""
    return lambda page: parsed(smoke_home / "_build" / "html" / f"{page}.html")


@pytest.fixture
def csv(smoke_home):
    """Name → what the figure or table shows."""
    folder = smoke_home / "book" / "_executed" / "data"
    return lambda name: pd.read_csv(folder / f"{name}.csv")


def article(soup: BeautifulSoup) -> BeautifulSoup:
    return soup.select_one("article")


@each
def test_page_is_there_with_one_title(html, page):
    soup = html(page)
    (title,) = article(soup).select("h1")
    assert len(title.get_text()) > 3
    shown = [a["href"] for a in soup.select("nav.bd-links a.reference.internal")]
    assert len(shown) >= len(PAGES) - 1


def test_no_page_is_in_a_folder(smoke_home):
    """A page has an address to cite."""
    assert set(PAGES) <= {p.stem for p in (smoke_home / "_build" / "html").glob("*.html")}


def test_github_pages_keeps_every_folder(smoke_home):
    assert (smoke_home / "_build" / "html" / ".nojekyll").is_file()


def test_no_warning_in_notebooks_and_log(smoke_home):
    pages = sorted((smoke_home / "book" / "_executed").glob("*.ipynb"))
    assert len(pages) > 4
    for page in pages:
        outputs = [o for c in nbformat.read(page, as_version=4).cells for o in c.get("outputs", [])]
        said = "".join(o["text"] for o in outputs if "text" in o)
        assert "Warning" not in said, page.name
    for log in (smoke_home / "reproduce.log", smoke_home / "book" / "_executed" / "book.log"):
        assert not re.search(r"Warning\b|WARNING", log.read_text()), log.name


def test_the_book_can_be_published(smoke_home):
    assert not problems(smoke_home / "_build" / "html")


@each
def test_nothing_went_wrong_on_the_page(html, smoke_home, page):
    soup = article(html(page))
    assert not soup.select(".cell_output .stderr, .system-message")
    whole = str(html(page))
    for place in (smoke_home, sys.prefix, Path.home(), ROOT):
        assert str(place) not in whole


@each
def test_figures_have_alternative_text_and_caption(html, page):
    soup = article(html(page))
    for image in soup.select("img"):
        assert len(image.get("alt", "")) > 60, image
        figure = image.find_parent("figure")
        caption = figure.select_one("figcaption").get_text(" ", strip=True)
        assert len(caption) > 20
        assert not caption.startswith("Fig.")  # one number, the paper's
    for drawing in soup.select("figure svg"):
        assert len(drawing["aria-label"]) > 60 and drawing.select("a.am-point, text")


@pytest.mark.parametrize(
    ("page", "number"),
    [
        ("02_static_targets", 3),
        ("03_adaptive_targets", 4),
        ("04_distributed_targets", 5),
        ("04_distributed_targets", 6),
    ],
)
def test_each_figure_is_followed_by_a_paragraph_that_reads_it(html, page, number):
    soup = article(html(page))
    captions = [f.get_text(" ", strip=True) for f in soup.select("figcaption")]
    assert sum(c.startswith(f"Paper Figure {number}, ") for c in captions) == 1
    (figure,) = (f for f in soup.select("figure") if f"Paper Figure {number}," in f.get_text())
    cell = figure.find_parent("div", class_="cell")
    following = cell.find_next_sibling("div", class_="cell").select_one(".cell_output p")
    assert re.search(r"\d", following.get_text())


@each
def test_page_loads_nothing_from_elsewhere(html, smoke_home, page):
    folder = (smoke_home / "_build" / "html" / f"{page}.html").parent
    soup = html(page)
    loaded = [s["src"] for s in soup.select("script[src], img[src], iframe[src]")]
    loaded += [link["href"] for link in soup.select("link[rel=stylesheet], link[rel=preload]")]
    for source in loaded:
        assert not urlparse(source).netloc, source
        assert (folder / urlparse(source).path).resolve().is_file(), source


def test_formulas_are_typeset_by_the_book_itself(html, smoke_home):
    soup = html("method")
    assert [s for s in soup.select("script[src]") if "mathjax/tex-chtml" in s["src"]]
    fonts = smoke_home / "_build/html/_static/mathjax/output/chtml/fonts/woff-v2"
    assert list(fonts.glob("*.woff"))
    assert len(article(soup).select("div.math")) >= 5


# --- tables -----------------------------------------------------------------------------------------------------------


def table(soup: BeautifulSoup, number: int) -> list[list[str]]:
    """Rows of this run's table, a cell as its text without intervals; the first text of a row is its head."""
    found = soup.select_one(f"table#T_table{number}-ours")
    rows = []
    for row in found.select("tbody tr"):
        for small in row.select("td small"):
            small.extract()
        rows.append([c.get_text(" ", strip=True) for c in row.select("th, td")])
    return rows


@pytest.fixture
def table_rows(smoke_home):
    def rows(page, number):
        text = (smoke_home / "_build" / "html" / f"{page}.html").read_text()
        soup = BeautifulSoup(text, "html.parser")  # not the cached one: it is changed
        assert soup.select_one(f"table#T_table{number}-published")  # the printed numbers beside it
        return table(soup, number)

    return rows


def number(text: str) -> float:
    return float(text.replace("−", "-").rstrip("†* "))


def test_table1_is_its_csv(table_rows, csv):
    rows = table_rows("01_collection", 1)
    for cells, one in zip(rows, csv("table1").to_dict("records"), strict=True):
        assert cells[0].startswith(f"{encoder_label(one['encoder'])} {one['run_id'][:8]} ")
        assert number(cells[2].rstrip("M")) == pytest.approx(one["parameters"] / 1e6, rel=5e-3)
        assert number(cells[3].rstrip("M")) == pytest.approx(one["trained"] / 1e6, rel=5e-3)
        assert cells[5] == str(one["dimensions"])


def test_table2_is_its_csv(table_rows, csv):
    rows = table_rows("04_distributed_targets", 2)
    frame = csv("table2")
    assert list(frame["role"]) == ["q", "d+", "d-max", "d-mid", "d-min"]
    columns = [("rho", 2), ("target", 2), ("loss_table", 3), ("loss_equation", 3)]
    for cells, one in zip(rows, frame.to_dict("records"), strict=True):
        for text, (column, decimals) in zip(cells[2:], columns, strict=True):
            if pd.isna(one[column]):
                assert text == "—"
            else:
                assert number(text) == pytest.approx(one[column], abs=0.51 * 10**-decimals)


@pytest.mark.parametrize(("page", "number_"), [("05_comparison", 3), ("06_baselines", 4)])
def test_tables_3_and_4_are_their_csv(table_rows, csv, page, number_):
    frame = csv(f"table{number_}")
    own = frame[~frame.get("source", pd.Series("ours", frame.index)).str.startswith("published")]
    shown = {}
    for cells in table_rows(page, number_):
        ids = [(i, m[1]) for i, c in enumerate(cells) if (m := re.search(r"\b([0-9a-f]{8})\b", c))]
        if ids:
            i, run_id = ids[0]
            # After the head with the run id: in-batch (and before it sampling), then the scores.
            values = [c for c in cells[i + 1 :] if re.fullmatch(r"[01]\.\d{3} ?†?", c)]
            shown[run_id] = shown.get(run_id, []) + values
    for run_id, rows in own.groupby("run_id", sort=False):
        values = shown[run_id[:8]]
        assert len(values) >= len(rows)
        for text, one in zip(values, rows.to_dict("records"), strict=False):
            assert number(text) == pytest.approx(one["value"], abs=5.1e-4)
            is_reference = one["run_id"] == one["reference_run_id"]
            assert ("†" in text) == (bool(one["equivalent"]) and not is_reference)
    assert set(shown) == {r[:8] for r in own["run_id"]}


def test_cover_names_the_profile_and_where_bm25_and_softmax_stand(html, csv):
    text = " ".join(article(html("index")).get_text(" ").split())
    assert "computed with the profile smoke" in text
    assert "Not a raw language model" in text
    assert "say nothing about MS MARCO" in text
    frame = csv("table4")
    for word in ("BM25", "Softmax"):
        for value in frame.loc[frame["loss"].str.contains(word), "value"]:
            assert f"{value:.3f}" in text


# --- data -------------------------------------------------------------------------------------------------------------


def result(home: Path, run_id: str) -> dict:
    return json.loads((home / "runs" / run_id / "result.json").read_text())


def test_every_row_names_runs_that_exist(smoke_home):
    files = sorted((smoke_home / "book" / "_executed" / "data").glob("*.csv"))
    wanted = {"figure3", "figure4", "figure5", "figure6", "table1", "table2", "table3", "table4"}
    assert wanted <= {f.stem for f in files}
    for file in files:
        frame = pd.read_csv(file, dtype=str)
        for column in (c for c in frame if c.endswith("run_id")):
            for run_id in frame[column].dropna().unique():
                config = json.loads((smoke_home / "runs" / run_id / "config.json").read_text())
                assert (smoke_home / "collections" / config["collection"]).is_dir()


def test_values_are_the_runs_own(smoke_home, csv):
    profile = "validation"
    for one in csv("figure3").to_dict("records"):
        mean = result(smoke_home, one["run_id"])["rerank"][profile]["mean"]
        assert one["value"] == pytest.approx(mean[one["measure"]], abs=1e-12)
        start = result(smoke_home, one["start_run_id"])["rerank"][profile]["mean"]
        assert one["start"] == pytest.approx(start[one["measure"]], abs=1e-12)
    for name in ("figure4", "figure5"):
        keys = ["run_id", "measure", "step"]
        both = csv(f"{name}_gains").merge(csv(name), on=keys, suffixes=("", " of the band"))
        assert len(both) == len(csv(f"{name}_gains")) > 0
        for end in ("low", "high"):
            assert (both[f"{end} of the band"] - both["start"]).tolist() == pytest.approx(both[end])
        for run_id, rows in csv(name).groupby("run_id"):
            curve = pd.read_parquet(smoke_home / "runs" / run_id / "curve.parquet")
            for measure, own in rows.groupby("measure"):
                assert own["value"].tolist() == pytest.approx(curve[measure].tolist())
                assert own["triples"].tolist() == curve["triples"].tolist()
                assert own.loc[own["maximum"], "value"].tolist() == [own["value"].max()]
    for name in ("table3", "table4"):
        for one in csv(name).dropna(subset="run_id").to_dict("records"):
            seeds = [result(smoke_home, run_id) for run_id in one["run_ids"].split()]
            means = [seed["full"][one["set"]]["mean"][one["measure"]] for seed in seeds]
            assert one["value"] == pytest.approx(sum(means) / len(means), abs=1e-12)


def test_downloads_are_the_data(html, smoke_home):
    data = smoke_home / "book" / "_executed" / "data"
    linked = set()
    for page in (p for p in PAGES if re.match(r"\d\d_", p)):
        folder = (smoke_home / "_build" / "html" / f"{page}.html").parent
        for a in article(html(page)).select("a.download[href$='.csv']"):
            file = (folder / a["href"]).resolve()
            assert file.read_bytes() == (data / file.name).read_bytes()
            linked.add(file.name)
    assert linked == {f.name for f in data.glob("*.csv")}


def test_text_under_figure4_counts_the_curves_that_still_rise(html, smoke, csv):
    frame = csv("figure4")
    best = frame[frame["maximum"] & (frame["measure"] == smoke.profile.measures.selection)]
    text = " ".join(article(html("03_adaptive_targets")).get_text(" ").split())
    rising = (best["triples"] == frame["triples"].max()).sum()
    assert f"{rising} of {len(best)} curves are highest there" in text


def test_provenance_lists_every_run_that_is_shown(html, smoke_home):
    text = html("provenance").get_text(" ")
    for file in (smoke_home / "book" / "_executed" / "data").glob("*.csv"):
        frame = pd.read_csv(file, dtype=str)
        if "run_id" not in frame:
            # Runs of notebook 08 are stored apart; what notebook 09 trains is not stored.
            names = ["claims_", "paper_and_released_code", "beyond_the_paper"]
            names += ["domains", "early_stopping", "out_of_domain"]
            assert file.name.startswith(tuple(names))
            continue
        assert all(run_id in text for run_id in frame["run_id"].dropna().unique())


def test_a_second_build_does_nothing(smoke_home, capsys):
    index = smoke_home / "_build" / "html" / "index.html"
    before = index.stat().st_mtime_ns
    started = time.monotonic()
    assert build("smoke", home=smoke_home) == index
    assert time.monotonic() - started < 20
    told = capsys.readouterr().err
    assert re.search(r"(\d+) of \1 are finished", told) and "nothing has changed" in told
    assert index.stat().st_mtime_ns == before
