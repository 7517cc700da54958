"""What the scripts of the book do with figures and tables, in a browser."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

import report_frames as frames
from adaptive_margins.book import figures, published, tables
from adaptive_margins.book.shown import svg

STATIC = Path(__file__).resolve().parents[2] / "book" / "_static"
pytestmark = pytest.mark.skipif(not shutil.which("chromium"), reason="there is no chromium")
PAGE = """<!doctype html><html><meta charset="utf-8"><body>%s<script src="%s"></script><script src="%s"></script><script>
addEventListener("load", () => {
  const found = {};
  %s
  document.body.textContent = "found " + JSON.stringify(found);
});
</script></body></html>"""


def in_browser(folder: Path, body: str, code: str) -> dict:
    """``found``, which the code has filled on a page with this body and the book's scripts."""
    page = folder / "page.html"
    scripts = [(STATIC / name).as_uri() for name in ("shown.js", "figure2.js")]
    page.write_text(PAGE % (body, *scripts, code))
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--dump-dom"]
    command = ["chromium", *flags, f"--user-data-dir={folder / 'user'}", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    found = re.search(r"found ({.*})", done.stdout)
    assert found, done.stdout[-2000:]
    return dict(json.loads(found[1]))


def test_a_column_sorts_a_table_and_gives_its_order_back(tmp_path):
    data = frames.table3()
    html = tables.table3(data, published.load(), heading="")
    found = in_browser(
        tmp_path,
        html,
        """
  const table = document.querySelector("table.am-table");
  const head = [...table.querySelectorAll("th.col_heading.level1")].find(th => th.classList.contains("col1"));
  const rows = () => [...table.tBodies[0].rows].map(row => [
    row.querySelector("th").textContent, row.querySelectorAll("th").length, row.querySelector("td.col1").firstChild.textContent,
  ]);
  for (const name of ["before", "descending", "ascending", "again"]) {
    found[name] = rows();
    found[name + "Sort"] = head.ariaSort;
    head.querySelector("button").click();
  }""",
    )
    best = data[(data["set"] == "test1") & (data["measure"] == frames.NDCG)]
    for name, ascending in (("descending", False), ("ascending", True)):
        expected = best.sort_values("value", ascending=ascending)
        assert [float(row[2]) for row in found[name]] == [round(x, 3) for x in expected["value"]]
        assert {row[1] for row in found[name]} == {2}  # every row has its encoder
        assert found[f"{name}Sort"] == name
    assert [float(row[2]) for row in found["again"]] == [float(row[2]) for row in found["before"]]
    assert found["againSort"] is None


def test_arrow_keys_move_from_point_to_point_and_enter_opens_the_runs(tmp_path):
    data = frames.figure4()
    drawing = svg(figures.figure4(data), "figure4")
    body = f'<div class="am-figure">{drawing}<p class="am-shown"></p><details class="am-runs"></details></div>'
    found = in_browser(
        tmp_path,
        body,
        """
  const points = [...document.querySelectorAll("a.am-point")];
  points[0].focus();
  const key = name => document.activeElement.dispatchEvent(new KeyboardEvent("keydown", {key: name, bubbles: true}));
  key("ArrowRight"); key("ArrowRight"); key("ArrowLeft"); key("ArrowRight");
  found.place = points.indexOf(document.activeElement);
  found.words = document.querySelector(".am-shown").textContent;
  found.stops = points.filter(point => point.getAttribute("tabindex") === "0").length;
  document.activeElement.dispatchEvent(new MouseEvent("click", {bubbles: true}));
  found.open = document.querySelector("details").open;
  found.hash = decodeURIComponent(location.hash);""",
    )
    row = data[(data["encoder"] == "minilm-3") & (data["measure"] == frames.NDCG)].iloc[2]
    assert found["place"] == 2 and found["stops"] == 1 and found["open"]
    assert found["words"].startswith("MiniLM-3, triples 256, seed 1: nDCG@10 .")
    assert found["words"].endswith(f"run {row['run_id']}")


def test_points_of_figure_2_turn_and_all_targets_follow(tmp_path):
    found = in_browser(
        tmp_path,
        '<figure><img class="am-figure2"></figure>',
        """
  const numbers = () => [...document.querySelectorAll(".am-figure2-panels p")].map(p => p.textContent);
  const negative = document.querySelectorAll("[role=slider]")[2];
  found.before = numbers();
  found.angle = negative.getAttribute("aria-valuenow");
  for (let i = 0; i < 10; i++) negative.dispatchEvent(new KeyboardEvent("keydown", {key: "ArrowRight"}));
  found.turned = document.querySelectorAll("[role=slider]")[7].getAttribute("aria-valuenow");
  found.after = numbers();
  const slider = document.querySelector("input");
  slider.value = 0.2;
  slider.dispatchEvent(new Event("input"));
  found.static = numbers()[0];
  found.images = document.querySelectorAll("img").length;""",
    )
    assert (found["angle"], found["turned"], found["images"]) == ("140", "120", 0)
    assert found["before"][0].startswith("margin 0.27, 0.17, 1.22; target 0.50;")
    assert all(a != b for a, b in zip(found["before"], found["after"], strict=True))
    assert found["static"].startswith("margin 0.05, 0.17, 1.22; target 0.20;")
