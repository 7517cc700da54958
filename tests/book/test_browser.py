"""The book in a browser: Debian's chromium, driven by Playwright."""

from __future__ import annotations

import functools
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
KINDS = ["index", "02_static_targets", "bibliography", "404"]
AXE = PAGES if os.environ.get("ADAPTIVE_MARGINS_TEST_PAGES") == "all" else KINDS
RULES = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa"]
DARK = "document.documentElement.dataset.theme = document.documentElement.dataset.mode = 'dark'"
WIDE = """() => {
  const clips = e => e && (getComputedStyle(e).overflowX !== "visible" || clips(e.parentElement));
  return [...document.querySelectorAll("article *")].filter(
    e => e.getBoundingClientRect().right > innerWidth + 1 && !clips(e.parentElement)
  ).map(e => e.outerHTML.slice(0, 120)).slice(0, 5);
}"""
SMALL = """() => [...document.querySelectorAll("article summary")].filter(e => {
  const box = e.getBoundingClientRect();
  return box.width && (box.width < 24 || box.height < 24);
}).map(e => e.outerHTML.slice(0, 120)).slice(0, 5)"""

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
    tab = browser.new_page(viewport={"width": 1280, "height": 900}, reduced_motion="reduce")
    session = tab.context.new_cdp_session(tab)  # so that what pages share counts on each
    session.send("Network.enable")
    session.send("Network.setCacheDisabled", {"cacheDisabled": True})
    return tab


@pytest.fixture
def visit(tab, address):
    """Opens a page; returns what it loaded, with sizes, and what the console reported."""
    listeners = []

    def listen(event, function):
        tab.on(event, function)
        listeners.append((event, function))

    def visit(page, width=1280):
        tab.set_viewport_size({"width": width, "height": 900})
        loaded, problems = {}, []
        listen(
            "response", lambda r: loaded.update({r.url: int(r.headers.get("content-length", 0))})
        )
        listen(
            "console", lambda m: problems.append(m.text) if m.type in ("error", "warning") else None
        )
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
    if formulas:
        tab.evaluate("MathJax.startup.promise")
    assert not problems
    assert not [url for url in loaded if not url.startswith((address, "data:"))]
    assert any("mathjax" in url for url in loaded) == bool(formulas)
    assert sum(loaded.values()) < (2.8e6 if formulas else 1.5e6)
    if page in AXE:
        assert not violations(tab)
        tab.evaluate(DARK)
        assert not violations(tab, runOnly=["color-contrast"])
        tab.set_viewport_size({"width": 390, "height": 900})
        assert not violations(tab, rules={"color-contrast": {"enabled": False}})
    tab.set_viewport_size({"width": 320, "height": 900})
    assert tab.evaluate("document.documentElement.scrollWidth") == 320, tab.evaluate(WIDE)
    assert not tab.evaluate(SMALL)


def test_home_page_and_site_are_light(visit, smoke_home):
    loaded, _ = visit("index")
    assert sum(loaded.values()) < 1e6
    site = smoke_home / "_build" / "html"
    assert sum(f.stat().st_size for f in site.rglob("*") if f.is_file()) < 10e6


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
