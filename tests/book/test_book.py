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

ROOT = Path(__file__).resolve().parents[2]
CONTENTS = yaml.safe_load((ROOT / "book" / "_toc.yml").read_text())
PAGES = ["index", *(c["file"] for part in CONTENTS["parts"] for c in part["chapters"])]
each = pytest.mark.parametrize("page", PAGES)
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def html(smoke_home):
    """Page name → its HTML."""
    folder = smoke_home / "_build" / "html"
    return cache(lambda page: BeautifulSoup((folder / f"{page}.html").read_text(), "html.parser"))


@pytest.fixture
def csv(smoke_home):
    """Name → what the figure or table shows."""
    folder = smoke_home / "book" / "_executed" / "data"
    return lambda name: pd.read_csv(folder / f"{name}.csv")


def article(soup: BeautifulSoup) -> BeautifulSoup:
    return soup.select_one("article")


@each
def test_page(html, smoke_home, page):
    """One title and a menu; no error; figures have words; nothing is loaded from elsewhere."""
    soup, folder = html(page), smoke_home / "_build" / "html"
    (title,) = article(soup).select("h1")
    assert len(title.get_text()) > 3
    assert soup.title.get_text().strip().endswith("Adaptive Margins")
    shown = [a["href"] for a in soup.select("nav.bd-links a.reference.internal")]
    assert len(shown) >= len(PAGES) - 1
    assert not article(soup).select(".cell_output .stderr, .system-message")
    text = (folder / f"{page}.html").read_text()
    for place in (smoke_home, sys.prefix, Path.home(), ROOT):
        assert str(place) not in text
    for image in article(soup).select("img"):
        assert len(image.get("alt", "")) > 60, image
        caption = image.find_parent("figure").select_one("figcaption").get_text(" ", strip=True)
        assert len(caption) > 20
        assert not caption.startswith("Fig.")  # one number, the paper's
    for drawing in article(soup).select("figure svg"):
        assert len(drawing["aria-label"]) > 60 and drawing.select("a.am-point, text")
    loaded = [s["src"] for s in soup.select("script[src], img[src], iframe[src]")]
    loaded += [link["href"] for link in soup.select("link[rel=stylesheet], link[rel=preload]")]
    for source in loaded:
        assert not urlparse(source).netloc, source
        assert (folder / urlparse(source).path).resolve().is_file(), source


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
    site = smoke_home / "_build" / "html"
    assert not problems(site)
    assert (site / ".nojekyll").is_file()  # GitHub Pages keeps every folder


def test_formulas_are_typeset_by_the_book_itself(html, smoke_home):
    soup = html("method")
    assert [s for s in soup.select("script[src]") if "mathjax/tex-chtml" in s["src"]]
    fonts = smoke_home / "_build/html/_static/mathjax/output/chtml/fonts/woff-v2"
    assert list(fonts.glob("*.woff"))
    assert len(article(soup).select("div.math")) >= 5


TABLES = [("05_comparison", 3), ("06_baselines", 4)]


@pytest.mark.parametrize(("page", "number"), TABLES)
def test_tables_3_and_4_are_their_csv(html, csv, page, number):
    frame = csv(f"table{number}")
    own = frame[~frame.get("source", pd.Series("ours", frame.index)).str.startswith("published")]
    assert html(page).select_one(f"table#T_table{number}-published")  # the paper's
    shown = {}
    for row in html(page).select(f"table#T_table{number}-ours tbody tr"):
        cells = [cell.get_text(" ", strip=True) for cell in row.select("th, td")]
        ids = [(i, m[1]) for i, c in enumerate(cells) if (m := re.search(r"\b([0-9a-f]{8})\b", c))]
        if ids:
            i, run_id = ids[0]
            # After the head with the run id: in-batch (and before it sampling), then the scores.
            values = [m[0] for c in cells[i + 1 :] if (m := re.match(r"[01]\.\d{3}( ?†)?", c))]
            shown[run_id] = shown.get(run_id, []) + values
    for run_id, rows in own.groupby("run_id", sort=False):
        values = shown[run_id[:8]]
        assert len(values) >= len(rows)
        for text, one in zip(values, rows.to_dict("records"), strict=False):
            assert float(text.rstrip("† ")) == pytest.approx(one["value"], abs=5.1e-4)
            is_reference = one["run_id"] == one["reference_run_id"]
            assert ("†" in text) == (bool(one["equivalent"]) and not is_reference)
    assert set(shown) == {r[:8] for r in own["run_id"]}


def test_the_cover_has_the_scores_of_bm25_and_softmax(html, csv):
    text = " ".join(article(html("index")).get_text(" ").split())
    frame = csv("table4")
    for value in frame.loc[frame["loss"].str.contains("BM25|Softmax"), "value"]:
        assert f"{value:.3f}" in text


# --- data -------------------------------------------------------------------------------------------------------------


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
