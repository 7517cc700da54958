"""The configuration of the site, and what `make publish` checks, adds and packs."""

from __future__ import annotations

import tarfile
from pathlib import Path

import nbformat
import pytest
import yaml
from bs4 import BeautifulSoup

from adaptive_margins import __version__
from adaptive_margins.book import publish, site
from adaptive_margins.book.execute import parameter_defaults
from adaptive_margins.files import file_sha256

ROOT = Path(__file__).resolve().parents[2]
CONFIG = (ROOT / "_config.yml").read_text()
URL, REPOSITORY = "https://example.org/books/margins", "https://example.org/me/margins"


def test_no_host_is_in_the_configuration_and_none_is_linked(monkeypatch):
    monkeypatch.delenv(site.SITE_VARIABLE, raising=False)
    monkeypatch.delenv(site.REPOSITORY_VARIABLE, raising=False)
    config = yaml.safe_load(site.configure(CONFIG, "2026-01-02"))
    assert "launch_buttons" not in config and "repository" not in config
    assert config["html"]["baseurl"] == ""
    options = config["sphinx"]["config"]
    assert options["notfound_urls_prefix"] == "/"
    assert "ogp_image" not in options and "ogp_site_url" not in options
    footer = BeautifulSoup(config["html"]["extra_footer"], "html.parser")
    text = footer.get_text()
    assert __version__ in text and "2026-01-02" in text and "MIT licence" in text
    assert not [a for a in footer.select("a") if "//" in a["href"]]


def test_addresses_from_the_environment(monkeypatch):
    monkeypatch.setenv(site.SITE_VARIABLE, f"{URL}/")
    monkeypatch.setenv(site.REPOSITORY_VARIABLE, REPOSITORY)
    config = yaml.safe_load(site.configure(CONFIG, ""))
    assert config["html"]["baseurl"] == config["sphinx"]["config"]["ogp_site_url"] == f"{URL}/"
    assert config["sphinx"]["config"]["notfound_urls_prefix"] == "/books/margins/"
    assert config["repository"]["url"] == REPOSITORY
    assert {"colab_url", "binderhub_url"} <= set(config["launch_buttons"])
    assert config["html"]["use_repository_button"]
    assert REPOSITORY in config["html"]["extra_footer"]
    (folder,) = {config["repository"]["path_to_book"]}
    assert folder == "notebooks"  # where `publish.add_notebooks` writes them


def test_software_as_bibtex():
    text = site.bibtex(ROOT / "CITATION.cff")
    assert f"version = {{{__version__}}}" in text and text.count("{") == text.count("}")


def test_downloaded_notebooks_hold_what_they_show_once(tmp_path):
    data = {"text/html": "<b>1</b>", "text/plain": "1", "image/png": "AAAA"}
    output = nbformat.v4.new_output("display_data", data=data)
    plain = nbformat.v4.new_output("display_data", data={"text/plain": "1"})
    notebook = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell("1", outputs=[output, plain])]
    )
    nbformat.write(notebook, tmp_path / "a.ipynb")
    site.keep_html(tmp_path / "a.ipynb")
    (cell,) = nbformat.read(tmp_path / "a.ipynb", as_version=4).cells
    assert [dict(o.data) for o in cell.outputs] == [{"text/html": "<b>1</b>"}, {"text/plain": "1"}]


def page(folder: Path, name: str, body: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"<!doctype html><html><body>{body}</body></html>")


def test_dead_links_and_leftovers_are_named(tmp_path):
    page(
        tmp_path,
        "a.html",
        '<p id="here">fine<br></p><a href="b.html#there">b</a><a href="#here">a</a>',
    )
    page(
        tmp_path,
        "b.html",
        '<h1 id="there">nano, info</h1><pre>nan Traceback</pre><a href="https://x.org/">x</a>',
    )
    assert publish.problems(tmp_path) == []
    for body, problem in (
        ('<a href="c.html">c</a>', "link to c.html"),
        ('<a href="b.html#nowhere">c</a>', "link to b.html#nowhere"),
        ('<img src="_images/1.png">', "link to _images/1.png"),
        ("<p>a mean of nan</p>", "'nan'"),
        ("<p>Traceback (most recent call last)</p>", "'Traceback'"),
        ("<p>see {doc}`other`</p>", "'{doc}'"),
        ("<p>[data](../data.csv)</p>", "'](../'"),
        ("<p>.5 ± , of 3</p>", "'± ,'"),
    ):
        page(tmp_path, "d.html", body)
        (found,) = publish.problems(tmp_path)
        assert found.startswith("d.html: ") and problem in found
    page(tmp_path, "d.html", " " * 10_000_000)
    assert publish.problems(tmp_path) == ["10.0 MB, expected at most 10; see: du -a"]


def test_published_notebooks_install_the_library_first(tmp_path):
    publish.add_notebooks(ROOT, tmp_path, REPOSITORY)
    sources = sorted((ROOT / "notebooks").glob("*.ipynb"))
    assert [p.name for p in sources] == sorted(p.name for p in (tmp_path / "notebooks").iterdir())
    for source in sources:
        copy = tmp_path / "notebooks" / source.name
        notebook = nbformat.read(copy, as_version=4)
        nbformat.validate(notebook)
        first, *others = notebook.cells
        assert f"git+{REPOSITORY}@" in first.source and "%pip install" in first.source
        assert others == nbformat.read(source, as_version=4).cells
        assert parameter_defaults(copy) == parameter_defaults(source)
    assert REPOSITORY in (tmp_path / "binder" / "requirements.txt").read_text()


def test_archive_is_the_same_for_the_same_book(tmp_path):
    page(tmp_path / "html", "index.html", "<p>A book</p>")
    (tmp_path / "html" / ".nojekyll").touch()
    first = publish.archive(tmp_path / "html", tmp_path / "book-1.tar.gz")
    digest = file_sha256(first)
    assert first.with_name("book-1.tar.gz.sha256").read_text() == f"{digest}  book-1.tar.gz\n"
    with tarfile.open(first) as tar:
        assert tar.getnames() == ["book-1/.nojekyll", "book-1/index.html"]
    (tmp_path / "html" / "index.html").touch()
    assert file_sha256(publish.archive(tmp_path / "html", first)) == digest


def test_without_a_book_the_command_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("ADAPTIVE_MARGINS_HOME", str(tmp_path))
    with pytest.raises(SystemExit, match="has no book; build it with: make book"):
        publish.main()
