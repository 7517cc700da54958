"""The configuration of the site, and what `make publish` checks, adds and packs."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tarfile
from pathlib import Path

import nbformat
import pytest
import yaml
from bs4 import BeautifulSoup

from adaptive_margins import __version__
from adaptive_margins.book import publish, site
from adaptive_margins.book.build import Site
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


def test_downloaded_notebooks_have_no_outputs(tmp_path):
    output = nbformat.v4.new_output("display_data", data={"text/plain": "1"})
    code = nbformat.v4.new_code_cell("1", outputs=[output], execution_count=1)
    cells = [code, nbformat.v4.new_markdown_cell("One.")]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "a.ipynb")
    site.without_outputs(tmp_path / "a.ipynb")
    code, text = nbformat.read(tmp_path / "a.ipynb", as_version=4).cells
    assert (code.source, code.outputs, code.execution_count) == ("1", [], None)
    assert text.source == "One."


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
    members = {"book-1/index.html": tmp_path / "html" / "index.html", "book-1/.nojekyll": b""}
    first = publish.archive(members, tmp_path / "book-1.tar.gz")
    digest = file_sha256(first)
    assert first.with_name("book-1.tar.gz.sha256").read_text() == f"{digest}  book-1.tar.gz\n"
    with tarfile.open(first) as tar:
        assert tar.getnames() == ["book-1/.nojekyll", "book-1/index.html"]
        assert tar.extractfile("book-1/index.html").read().endswith(b"</html>")
    (tmp_path / "html" / "index.html").touch()
    again = dict(reversed(members.items()))
    assert file_sha256(publish.archive(again, first)) == digest


WIDE = """<div class="am-tables"><style>#T_row0_col9 { font-weight: bold; }</style>
<table><caption>Paper Table 7</caption>
<thead><tr><th></th><th></th><th colspan="9">test1</th></tr></thead>
<tbody><tr><th rowspan="2">MiniLM-3</th><th>static, <i>ε</i> = 0.2<details>OPENS</details></th>%s</tr>
<tr><th>φ(d<sup>+</sup>), d⁺</th>%s</tr></tbody></table>
<p class="am-note">†: equivalent &lt;here&gt;</p><ul><li>A note.</li></ul></div>"""
CELL = "<td>0.%d<sup>†</sup><small>[−0.061, −0.025]</small></td>"
PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
DRAWN = """<svg xmlns="http://www.w3.org/2000/svg" width="200" height="50">
<text x="9" y="20" font-family="DejaVu Sans">A drawing of ε</text></svg>"""


@pytest.fixture
def small_book(tmp_path, monkeypatch, warm_start):
    """A checkout with three pages, and a home with its book, which has a page of HTML."""
    source, executed = tmp_path / "source", tmp_path / "book" / "_executed"
    for folder in (source / "book", source / "lib", executed / "receipts"):
        folder.mkdir(parents=True)
    (source / "_config.yml").write_text(CONFIG)
    for name in ("references.bib", "bibliography.md", "measured.yaml"):
        shutil.copy(ROOT / "book" / name, source / "book")
    shutil.copytree(ROOT / "book" / "_static", source / "book" / "_static")
    chapters = "".join(f"  - file: {name}\n" for name in ("tables", "bibliography"))
    (source / "book" / "_toc.yml").write_text(
        f"format: jb-book\nroot: index\nchapters:\n{chapters}"
    )
    (source / "book" / "drawn.svg").write_text(DRAWN)
    (source / "book" / "index.md").write_text(
        "# Small\n\n{cite:t}`gienapp2025`, {doc}`tables`.\n\n```{figure} drawn.svg\nRedrawn.\n```\n"
        "\n:::{dropdown} All runs\nOPENS\n:::\n\n| a | b |\n| --- | --- |\n| ✓ | x⁻ − 1 |\n"
    )
    rows = tuple(CELL.replace("%d", str(n)) * 9 for n in (123, 987))
    shown = [
        {"text/html": WIDE % rows, "text/latex": "WRONG"},
        {"text/html": "WRONG", "image/png": PIXEL},
    ]
    outputs = [nbformat.v4.new_output("display_data", data=data) for data in shown]
    cells = [nbformat.v4.new_markdown_cell("# Tables")]
    cells += [nbformat.v4.new_code_cell("shown()", outputs=[output]) for output in outputs]
    kernel = {"name": "python3", "display_name": "Python"}
    about = {"kernelspec": kernel, "language_info": {"name": "python", "pygments_lexer": "python"}}
    notebook = nbformat.v4.new_notebook(cells=cells, metadata=about)
    nbformat.write(notebook, executed / "tables.ipynb")
    (executed / "receipts" / "tables.json").write_text('{"finished": "2026-01-02T03:04:05Z"}')
    monkeypatch.setenv("ADAPTIVE_MARGINS_HOME", str(tmp_path))
    (tmp_path / "_build").mkdir()
    page(tmp_path / "_build" / "html", "index.html", site.footer("", ""))
    return source, tmp_path / "_build" / "html"


@pytest.mark.timeout(1200)
@pytest.mark.skipif(
    not all(map(shutil.which, ("latexmk", "xelatex", "rsvg-convert", "pdftotext"))),
    reason=f"needs pdftotext (poppler-utils) and what {publish.INSTALL} installs",
)
def test_pdf_has_figures_wide_tables_and_signs(small_book, tmp_path):
    source, built = small_book
    book = Site(tmp_path, "")
    book.stage(source)
    (built.parent / "receipt.json").write_text(json.dumps({"inputs": book.book_inputs()}))
    publish.add_pdf(source, built)
    assert not [problem for problem in publish.problems(built) if ".pdf" in problem]
    assert '<a href="adaptive-margins.pdf">PDF</a>' in (built / "index.html").read_text()
    assert not book.staged.exists()
    command = ["pdftotext", "-bbox", built / "adaptive-margins.pdf", "-"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    shown = BeautifulSoup(done.stdout, "html.parser")
    text = " ".join(word.get_text() for word in shown("word"))
    for expected in (
        "Version " + __version__,
        "Results of 2026-01-02",
        "A drawing of ε",
        "Paper Table 7",
        "[−0.061, −0.025]",
        "equivalent <here>",
        "A note.",
        "Gienapp",
        "[1]",
        *"ε†✓φ−⁺⁻",
    ):
        assert expected in text.replace("\xa0", " "), expected
    assert text.count("0.987") == 9 and text.count("MiniLM-3") == 1
    assert not re.search(r"OPENS|WRONG|\?\?|</|\\\w", text)
    for sheet in shown("page"):
        right = max(float(word["xmax"]) for word in sheet("word"))
        assert right < float(sheet["width"]) - 50, right  # within the margin of 2 cm


def test_without_latex_one_sentence_says_what_to_install(tmp_path, monkeypatch, capsys):
    page(tmp_path / "html", "index.html", site.footer("", ""))
    monkeypatch.setattr(publish, "which", lambda name: None)
    publish.add_pdf(ROOT, tmp_path / "html")
    assert capsys.readouterr().err.count("apt install --no-install-recommends latexmk") == 1
    assert "PDF" not in (tmp_path / "html" / "index.html").read_text()


def test_pdf_is_not_of_another_book(small_book, monkeypatch):
    source, built = small_book
    monkeypatch.setattr(publish, "which", str)
    with pytest.raises(SystemExit, match="have changed since the book was built; type: make book"):
        publish.add_pdf(source, built)
    assert not list(built.parents[1].glob(".book*"))


def test_without_a_book_the_command_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("ADAPTIVE_MARGINS_HOME", str(tmp_path))
    with pytest.raises(SystemExit, match="has no book; build it with: make book"):
        publish.main()
