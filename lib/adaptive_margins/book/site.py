"""The book as a web site: what its configuration takes from elsewhere, and a Sphinx extension.

The extension keeps the site small and accessible. Where site and sources are published is stated in
``_config.yml`` or, for one build, in `SITE_VARIABLE` and `REPOSITORY_VARIABLE`.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import yaml
from docutils import nodes

from adaptive_margins import __version__
from adaptive_margins.errors import AdaptiveMarginsError

SITE_VARIABLE = "ADAPTIVE_MARGINS_SITE"
REPOSITORY_VARIABLE = "ADAPTIVE_MARGINS_REPOSITORY"
ABOUT = ("CHANGELOG.md", "CITATION.cff", "LICENSE")
"""Files of a checkout that pages show."""
CITE = '<a href="cite.html">Cite</a>'
"""In the footer of each page."""
PDF = "adaptive-margins"
"""The name of the book as LaTeX and PDF."""

_UNUSED = ("*.map", "*.ttf", "*.LICENSE.txt", "fontawesome.js", "all-packages.js")
_MATHJAX = ("tex-chtml.js", "input/tex/extensions", "output/chtml/fonts/woff-v2")
"""What a page with formulas can load; the rest of MathJax are other inputs, outputs and voices."""


def configure(text: str, date: str, values: Mapping[str, Any] | None = None) -> str:
    """``_config.yml`` with addresses from the environment, buttons that lead to them, and a footer.

    Args:
        text: the file's text.
        date: of the newest result, for the footer; empty if there is none.
        values: what ``{{ key }}`` on a page stands for (MyST substitutions); another key is a
            warning, which ends a strict build.
    """
    config = yaml.safe_load(text)
    config.setdefault("parse", {})["myst_substitutions"] = dict(values or {})
    html, repository = config.setdefault("html", {}), config.setdefault("repository", {})
    for place, key, variable in (
        (html, "baseurl", SITE_VARIABLE),
        (repository, "url", REPOSITORY_VARIABLE),
    ):
        place[key] = (os.environ.get(variable) or place.get(key) or "").rstrip("/")
        if not re.fullmatch(r"(https?://[\w.:/~@%+-]+)?", place[key]):
            raise AdaptiveMarginsError(f"{variable}: expected https://…, not {place[key]!r}")
    options = config.setdefault("sphinx", {}).setdefault("config", {})
    if html["baseurl"]:
        html["baseurl"] += "/"
        options["ogp_site_url"] = html["baseurl"]
    else:
        options.pop("ogp_image", None)  # its address has to be complete
    options["notfound_urls_prefix"] = urlparse(html["baseurl"]).path or "/"
    if repository["url"]:
        html |= {"use_repository_button": True, "use_issues_button": True}
    else:
        config.pop("launch_buttons", None)
        config.pop("repository")
    html["extra_footer"] = footer(repository["url"], date)
    config["latex"] = {"latex_documents": {"targetname": f"{PDF}.tex"}}
    options |= {"project": config["title"], "release": __version__}
    options["today"] = date and f"Results of {date}"
    return yaml.safe_dump(config, sort_keys=False, allow_unicode=True)


def footer(repository: str, date: str) -> str:
    """Version, date, licence, citation and sources, as HTML."""
    parts = [
        f'<a href="updates.html">Version {__version__}</a>',
        f"results of {date}" if date else "",
        '<a href="cite.html#licence">MIT licence</a>',
        CITE,
        f'<a href="{escape(repository)}">Sources</a>' if repository else "",
    ]
    return f"<p>{' · '.join(filter(None, parts))}</p>"


def bibtex(file: Path) -> str:
    """Return the software of a ``CITATION.cff`` as BibTeX."""
    citation = yaml.safe_load(file.read_text("utf-8"))
    authors = " and ".join(f"{{{author['name']}}}" for author in citation["authors"])
    values = {
        "title": f"{{{citation['title']}}}",
        "author": authors,
        "version": citation["version"],
        "note": f"{citation['license']} licence",
    }
    lines = [f"  {name} = {{{value}}}," for name, value in values.items()]
    return "\n".join(["@software{adaptive_margins,", *lines, "}", ""])


def setup(app: Any) -> dict[str, bool]:
    """Entry point of the Sphinx extension."""
    for listeners in app.events.listeners.values():  # no page has cells that are run in place
        listeners[:] = [x for x in listeners if "sphinx_thebe" not in x.handler.__module__]
    app.registry.css_files[:] = [x for x in app.registry.css_files if "thebe" not in x[0]]
    app.connect("html-page-context", adapt_page, priority=900)
    app.connect("build-finished", finish, priority=900)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def adapt_page(
    app: Any, page: str, template: str, context: dict[str, Any], doctree: nodes.document | None
) -> None:
    """Load MathJax on pages with formulas only; give bibliographies roles that are allowed."""
    kinds = nodes.math, nodes.math_block
    if doctree is None or not any(isinstance(n, kinds) for n in doctree.findall()):
        context["script_files"] = [
            file
            for file in context["script_files"]
            if "mathjax" not in f"{file.filename} {file.attributes.get('body')}".lower()
        ]
    if "body" in context:
        context["body"] = context["body"].replace('role="doc-biblioentry"', 'role="listitem"')


def without_outputs(notebook: Path) -> None:
    """Remove a notebook's outputs: the page shows them, and a reader runs it."""
    content = json.loads(notebook.read_text("utf-8"))
    for cell in content["cells"]:
        if cell["cell_type"] == "code":
            cell |= {"outputs": [], "execution_count": None}
    notebook.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", "utf-8")


def finish(app: Any, exception: Exception | None) -> None:
    """Remove what no page loads, and list the pages if it is known where they are published."""
    if exception or app.builder.format != "html":
        return
    site = Path(app.outdir)
    static, mathjax = site / "_static", site / "_static" / "mathjax"
    needed = [mathjax / name for name in _MATHJAX]
    for file in [f for f in static.rglob("*") if f.is_file()]:
        unused = any(file.match(pattern) for pattern in _UNUSED)
        if mathjax in file.parents:
            unused |= not any(path == file or path in file.parents for path in needed)
        if unused or static / "locales" in file.parents:
            file.unlink()
    for notebook in (site / "_sources").glob("*.ipynb"):
        without_outputs(notebook)
    pages = "".join(f.read_text("utf-8") for f in [*site.glob("*.html"), *static.rglob("*.js")])
    names = set(re.findall(r"fa-[\w-]+", pages))
    style = static / "styles" / "pydata-sphinx-theme.css"
    icons = re.compile(r'(?:\.fa-[\w-]+:before,?)+\{content:"[^"]*"\}')
    text = icons.sub(
        lambda rule: rule[0] if names & set(re.findall(r"fa-[\w-]+", rule[0])) else "",
        style.read_text("utf-8"),
    )
    style.write_text(text, "utf-8")
    if app.config.html_baseurl:
        found = sorted(
            escape(app.config.html_baseurl + page) + ".html" for page in app.env.all_docs
        )
        urls = "".join(f"<url><loc>{address}</loc></url>\n" for address in found)
        (site / "sitemap.xml").write_text(
            '<?xml version="1.0" encoding="utf-8"?>\n'
            f'<urlset xmlns="http://www.sitemaps.org/schemas/sitemap/0.9">\n{urls}</urlset>\n'
        )
