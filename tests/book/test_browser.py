"""The book in a browser: Debian's chromium, driven by Playwright."""

from __future__ import annotations

import functools
import gzip
import http.server
import os
import shutil
import threading
from pathlib import Path

import pytest
import yaml

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
from axe_playwright_python.sync_playwright import Axe  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
CONTENTS = yaml.safe_load((ROOT / "book" / "_toc.yml").read_text())
PAGES = [
    "index",
    *(c["file"] for part in CONTENTS["parts"] for c in part["chapters"]),
    "search",
    "404",
]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
each = pytest.mark.parametrize("page", PAGES)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not CHROMIUM, reason="there is no chromium (on Debian: apt-get install chromium)"
    ),
]
# Pages of each kind: axe takes 5 s a page. $ADAPTIVE_MARGINS_TEST_PAGES=all: every page.
KINDS = ["index", "02_static_targets", "404"]
AXE = PAGES if os.environ.get("ADAPTIVE_MARGINS_TEST_PAGES") == "all" else KINDS
RULES = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa"]
DARK = "document.documentElement.dataset.theme = document.documentElement.dataset.mode = 'dark'"
WIDE = """() => {
  const clips = e => e && (getComputedStyle(e).overflowX !== "visible" || clips(e.parentElement));
  return [...document.querySelectorAll("article *")].filter(
    e => e.getBoundingClientRect().right > innerWidth + 1 && !clips(e.parentElement)
  ).map(e => e.outerHTML.slice(0, 120)).slice(0, 5);
}"""
SMALL = """() => {
  document.querySelectorAll("article details").forEach(details => { details.open = true; });
  // The run of a mark, which is smaller, is in the list below its figure, too.
  const ours = "button, summary, input, .am-handle, :is(.am-figure, .am-tables) a:not(.am-point)";
  return [...document.querySelectorAll(`article :is(${ours})`)].filter(e => {
    const box = e.getBoundingClientRect();
    return box.width && (box.width < 24 || box.height < 24);
  }).map(e => e.outerHTML.slice(0, 120)).slice(0, 5);
}"""

MENU = """(() => {
  const menu = document.querySelector(".bd-links"), box = menu.getBoundingClientRect(), style = getComputedStyle(menu);
  return box.width > 0 && box.right > 0 && style.visibility === "visible" && style.opacity !== "0";
})()"""


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def address(smoke_home):
    handler = functools.partial(Quiet, directory=str(smoke_home / "_build" / "html"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def tab(browser):
    return browser.new_page(viewport={"width": 1280, "height": 900}, reduced_motion="reduce")


@pytest.fixture
def visit(tab, address):
    """Opens a page; returns the URLs that it loaded, and what the console reported."""
    listeners = []

    def listen(event, function):
        tab.on(event, function)
        listeners.append((event, function))

    def visit(page, width=1280):
        tab.set_viewport_size({"width": width, "height": 900})
        loaded, problems = [], []
        listen("response", lambda response: loaded.append(response.url))
        listen("console", lambda m: m.type in ("error", "warning") and problems.append(m.text))
        listen("pageerror", lambda error: problems.append(str(error)))
        listen("requestfailed", lambda request: problems.append(request.url))
        tab.goto(f"{address}{page}.html")
        return loaded, problems

    yield visit
    for listener in listeners:
        tab.remove_listener(*listener)


def violations(tab, **rules) -> list[tuple[str, str]]:
    found = (
        Axe().run(tab, options={"runOnly": RULES, "resultTypes": ["violations"], **rules}).response
    )
    return [(v["id"], n["html"][:200]) for v in found["violations"] for n in v["nodes"]]


@each
def test_page(tab, visit, address, page):
    """Accessible in light and dark, on a desktop and a phone; nothing fails, nothing comes from elsewhere, nothing is
    cut off."""
    loaded, problems = visit(page)
    formulas = tab.locator("article .math").count()
    assert bool(tab.locator("script[src*=mathjax]").count()) == bool(formulas)
    if formulas:
        tab.evaluate("MathJax.startup.promise")
    assert not problems
    assert not [url for url in loaded if not url.startswith((address, "data:"))]
    if page in AXE:
        assert not violations(tab)
        tab.evaluate(DARK)
        assert not violations(tab, runOnly=["color-contrast"])
        tab.set_viewport_size({"width": 390, "height": 900})
        assert not violations(tab, rules={"color-contrast": {"enabled": False}})
    tab.set_viewport_size({"width": 320, "height": 900})
    assert tab.evaluate("document.documentElement.scrollWidth") == 320, tab.evaluate(WIDE)
    assert not tab.evaluate(SMALL)


def test_pages_and_site_are_light(browser, address, smoke_home):
    for page, most in (("index", 1e6), ("method", 2.8e6)):
        sizes, tab = {}, browser.new_page()  # nothing is in its cache
        tab.on("response", lambda r: sizes.update({r.url: int(r.headers.get("content-length", 0))}))  # noqa: B023
        tab.goto(f"{address}{page}.html")
        tab.evaluate("window.MathJax && MathJax.startup.promise")
        tab.close()
        assert 1e5 < sum(sizes.values()) < most
    site = smoke_home / "_build" / "html"
    # A book of laptop has 1.3 MB more; `make publish` refuses one of more than 10.
    assert sum(f.stat().st_size for f in site.rglob("*") if f.is_file()) < 8.5e6


@pytest.mark.parametrize(("width", "opens"), [(390, True), (800, True), (1280, False)])
def test_menu_button_opens_and_closes_the_menu(tab, visit, width, opens):
    """On a phone and a tablet the menu opens, on a desktop it closes."""
    visit("index", width)
    assert tab.evaluate(MENU) != opens
    tab.locator(".primary-toggle").locator("visible=true").click()
    tab.wait_for_function(MENU if opens else f"!{MENU}", timeout=5000)


def test_keyboard(tab, visit):
    """Skip link, search, and the copy button of a block of code."""
    visit("reproduce")
    tab.keyboard.press("Tab")
    assert tab.evaluate("document.activeElement.textContent").strip() == "Skip to main content"
    tab.keyboard.press("Control+k")
    sync_api.expect(tab.locator("#pst-search-dialog")).to_be_visible()
    tab.keyboard.type("margin")
    tab.keyboard.press("Enter")
    tab.wait_for_url("**/search.html?q=margin**")
    sync_api.expect(tab.locator("#search-results li").first).to_be_visible()


def tab_to(tab, selector, most=12):
    """Press Tab until what has the focus matches."""
    for _ in range(most):
        tab.keyboard.press("Tab")
        if tab.evaluate("selector => document.activeElement.matches(selector)", selector):
            return
    raise AssertionError(f"no {selector} after {most} times Tab")


def downloaded(tab) -> bytes:
    """The file of the link that has the focus."""
    with tab.expect_download() as download:
        tab.keyboard.press("Enter")
    return Path(download.value.path()).read_bytes()


def test_a_table_by_keyboard(tab, visit, address):
    """A heading sorts; a row opens to a command that can be copied and scores to download; so can the table."""
    tab.context.grant_permissions(["clipboard-read", "clipboard-write"], origin=address)
    visit("05_comparison")
    table = tab.locator("#T_table3-ours")
    column = (
        "t => [...t.querySelectorAll('tbody td.col1')].map(cell => parseFloat(cell.textContent))"
    )
    before = table.evaluate(column)
    tab.locator(".am-ours").focus()
    tab_to(tab, "th.col1.level1 > button")
    sizes = "t => [...t.tBodies[0].rows].map(row => row.querySelectorAll(':scope > th').length)"
    for order, found in (("descending", sorted(before)[::-1]), ("ascending", sorted(before))):
        tab.keyboard.press("Enter")
        assert table.locator("th[aria-sort]").get_attribute("aria-sort") == order
        assert table.evaluate(column) == found
        assert set(table.evaluate(sizes)) == {2}  # every row has its encoder
    tab.keyboard.press("Enter")
    assert table.evaluate(column) == before and not table.locator("th[aria-sort]").count()
    tab_to(tab, "tbody summary")
    tab.keyboard.press("Enter")
    opened = table.locator("details[open] .am-opened")
    command = opened.locator("pre.am-command")
    sync_api.expect(command).to_be_visible()
    tab_to(tab, ".am-opened > button", 1)
    tab.keyboard.press("Enter")
    copied = tab.evaluate("navigator.clipboard.readText()")
    assert copied.strip() == command.inner_text().strip() and " --run " in copied
    tab_to(tab, ".am-opened a[download]")
    assert gzip.decompress(downloaded(tab)).startswith(b"set,qid,")
    table.locator("th > details > summary").last.focus()
    tab_to(tab, "a[download='table3.csv']")
    assert b"encoder,target," in downloaded(tab)


def test_figures_by_keyboard(tab, visit):
    """Arrow keys move from mark to mark, Enter opens the run; in Figure 2 they turn a point."""
    visit("02_static_targets")
    tab.locator(".am-drawing").focus()
    tab_to(tab, "a.am-point", 1)
    for key in ("ArrowRight", "ArrowRight", "ArrowLeft"):
        tab.keyboard.press(key)
    words = tab.locator(".am-shown").inner_text()
    assert words == tab.evaluate("document.activeElement.getAttribute('aria-label')")
    place = "[...document.querySelectorAll('a.am-point')].indexOf(document.activeElement)"
    assert (tab.evaluate(place), tab.locator("a.am-point[tabindex='0']").count()) == (1, 1)
    tab.keyboard.press("Enter")
    sync_api.expect(tab.locator(f"li[id='figure3-{words.split()[-1]}']")).to_be_visible()
    visit("method")
    points = tab.locator(".am-figure2-panels [role=slider]")
    numbers = tab.locator(".am-figure2-panels p")
    points.first.focus()
    tab_to(tab, "[aria-label='d⁻₁']", 2)
    before = numbers.all_inner_texts()
    assert before[0].startswith("margin 0.27, 0.17, 1.22; target 0.50;")
    assert points.nth(2).get_attribute("aria-valuenow") == "140"
    for _ in range(10):
        tab.keyboard.press("ArrowRight")
    assert [points.nth(i).get_attribute("aria-valuenow") for i in (2, 7)] == ["120", "120"]
    assert all(a != b for a, b in zip(before, numbers.all_inner_texts(), strict=True))
    slide = "input => { input.value = 0.2; input.dispatchEvent(new Event('input')); }"
    tab.locator(".am-figure2-panels input").evaluate(slide)
    assert numbers.first.inner_text().startswith("margin 0.05, 0.17, 1.22; target 0.20;")


PANELS = """() => {
  const drawing = document.querySelector(".am-drawing"), svg = drawing.querySelector("svg");
  const frames = [...svg.querySelectorAll("g[class^=am-column]")].map(g => g.querySelector("path").getBoundingClientRect());
  const different = values => new Set(values.map(Math.round)).size;
  return {
    lefts: different(frames.map(frame => frame.left)), tops: different(frames.map(frame => frame.top)),
    text: 8 * svg.getBoundingClientRect().width / svg.viewBox.baseVal.width,
    more: drawing.scrollWidth > drawing.clientWidth + 1, sign: drawing.classList.contains("am-more"),
  };
}"""


def test_figures_on_a_phone(tab, visit):
    """Panels stand below each other, in text that can be read; what is out of sight has a sign."""
    visit("02_static_targets")
    assert tab.evaluate(PANELS)["lefts"] == 2
    for width in (390, 320):
        tab.set_viewport_size({"width": width, "height": 900})
        tab.wait_for_function(f"(p => p.lefts === 1 && p.more === p.sign)(({PANELS})())")
        found = tab.evaluate(PANELS)
        assert (
            found["tops"] == 4
            and found["text"] > 9.9
            and found["more"] == found["sign"] == (width == 320)
        )
    tab.locator(".am-drawing").evaluate("drawing => { drawing.scrollLeft = 999; }")
    tab.wait_for_function(f"!({PANELS})().sign")
    tab.set_viewport_size({"width": 1280, "height": 900})
    tab.wait_for_function(f"({PANELS})().lefts === 2")
    visit("index", 390)
    sync_api.expect(tab.locator("figure.am-narrow")).to_be_visible()
    sync_api.expect(tab.locator("figure.am-wide")).to_be_hidden()
