"""The book in LaTeX: a Sphinx extension for what notebooks and pages show as HTML, and for SVG.

Sphinx prints no HTML. Tables, lists and notes in it become nodes like those of any page; what opens
(details of a run, long tables) is left out. Columns are as wide as they need, letters as small.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from typing import Any

from bs4 import BeautifulSoup, PageElement, Tag
from docutils import nodes
from sphinx import addnodes
from sphinx.transforms.post_transforms import SphinxPostTransform
from sphinx.transforms.post_transforms.images import ImageConverter

_KINDS = {"strong": nodes.strong, "i": nodes.emphasis, "em": nodes.emphasis, "code": nodes.literal}
_KINDS |= {"sup": nodes.superscript, "sub": nodes.subscript}
_LATEX = {"small": (r"\newline{\smaller ", "}"), "u": (r"\underline{", "}")}
_LEFT_OUT = "style, script, svg, details, button, .am-downloads, .am-shown"
_SIZES = {"small": (105, 16), "footnotesize": (118, 14), "scriptsize": (137, 8), "tiny": (190, 0)}
"""Letters in a table → how many a line has, and how many a column of text is left at least."""


def setup(app: Any) -> dict[str, bool]:
    """Entry point of the Sphinx extension."""
    app.connect("config-inited", configure, priority=900)
    app.add_post_transform(Printed)
    app.add_post_transform(Drawn)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def configure(app: Any, config: Any) -> None:
    """Sphinx's own class in place of Jupyter Book's, which loads packages that no page needs."""
    config.latex_theme, elements = "manual", config.latex_elements
    elements["preamble"] = elements["preamble"].partition("% Start of preamble")[0]


class Drawn(ImageConverter):
    """SVG as PDF."""

    conversion_rules = [("image/svg+xml", "application/pdf")]  # noqa: RUF012
    available = True

    def convert(self, _from: str, _to: str) -> bool:
        """Convert a file."""
        return not subprocess.run(["rsvg-convert", "-f", "pdf", "-o", _to, _from]).returncode


class Printed(SphinxPostTransform):
    """HTML as nodes, without what opens, in tables that fit."""

    default_priority = 200  # outputs of notebooks are chosen before
    formats = ("latex",)

    def run(self, **_: Any) -> None:
        """Adapt the document."""
        self.config.numfig_format["figure"] = "Figure %s"  # what LaTeX calls them
        for node in list(self.document.findall(nodes.container)):
            if node.get("design_component") == "dropdown":
                left_out = f"{node[0].astext()}: only in the online edition."
                node.parent.replace(node, nodes.paragraph("", left_out))
        for raw in [n for n in self.document.findall(nodes.raw) if n["format"] == "html"]:
            inline = isinstance(raw.parent, nodes.TextElement)
            raw.parent.replace(raw, [] if inline else list(from_html(raw.astext())))
        for table in list(self.document.findall(nodes.table)):
            fit(table)
        for section in list(self.document.findall(nodes.section)):
            inner = list(section.findall(nodes.section, include_self=False))
            if (cited := list(section.findall(nodes.citation))) and not inner:
                section.parent.replace(section, cited)  # LaTeX puts them last, with a heading


def from_html(text: str) -> Iterator[nodes.Node]:
    """Nodes of what a page shows as HTML."""
    soup = BeautifulSoup(text, "html.parser")
    rules = re.findall(r"([^{}>]+)\{[^{}]*font-weight: bold", "".join(map(str, soup("style"))))
    marks = [*((rule, "strong") for rule in rules), ("small.am-printed", "em")]
    for cell, mark in [(cell, mark) for rule, mark in marks for cell in soup.select(rule)]:
        (marked := soup.new_tag(mark)).extend(list(cell.children))
        cell.append(marked)
    for left_out in soup.select(_LEFT_OUT):
        left_out.decompose()
    yield from _blocks(soup)


def _blocks(parent: Tag) -> Iterator[nodes.Node]:
    for child in parent.children:
        name = child.name if isinstance(child, Tag) else ""
        if isinstance(child, Tag) and name == "table":
            yield _table(child)
        elif isinstance(child, Tag) and name in ("div", "ul"):
            yield from _blocks(child)
        elif child.get_text().strip():
            text = nodes.paragraph("", "", *_inline(child))
            item = nodes.bullet_list("", nodes.list_item("", text))
            yield item if name == "li" else text


def _inline(element: PageElement) -> Iterator[nodes.Node]:
    if not isinstance(element, Tag):
        yield nodes.Text(re.sub(r"\s+", " ", element.get_text()))
        return
    children = [node for child in element.children for node in _inline(child)]
    if kind := _KINDS.get(element.name):
        yield kind("", "", *children)
    else:
        before, after = _LATEX.get(element.name, ("", ""))
        yield nodes.raw("", before, format="latex")
        yield from (*children, nodes.raw("", after, format="latex"))


def _table(element: Tag) -> nodes.table:
    parts: dict[str, list[nodes.row]] = {"thead": [], "tbody": []}
    below: dict[int, int] = {}  # column → rows in which a cell above takes its place
    for tr in element("tr"):
        row, column = nodes.row(), 0
        for cell in tr(["th", "td"]):
            while below.get(column):
                below[column] -= 1
                column += 1
                row += nodes.entry()
            wide, high = (int(str(cell.get(name, "1"))) for name in ("colspan", "rowspan"))
            below[column] = high - 1
            column += wide
            text = [nodes.paragraph("", "", *_inline(cell))] if cell.get_text().strip() else []
            row += nodes.entry("", *text, **({"morecols": wide - 1} if wide > 1 else {}))
        parts["thead" if tr.find_parent("thead") else "tbody"].append(row)
    group = nodes.tgroup("", *(nodes.colspec(colwidth=1) for _ in range(column)), cols=column)
    group += [nodes.thead("", *parts["thead"])] if parts["thead"] else []
    group += nodes.tbody("", *parts["tbody"])
    titles = [nodes.title("", "", *_inline(caption)) for caption in element("caption")]
    return nodes.table("", *titles, group)


def fit(table: nodes.table) -> None:
    """Widths of columns by their longest lines and words; smaller letters if they are too wide."""
    for text in list(table.findall(nodes.Text)):  # an interval is not broken
        text.parent.replace(text, nodes.Text(re.sub(r"(?<=\d), (?=[−+.\d])", ",\xa0", text)))
    rows = [row.children for row in table.findall(nodes.row)]
    count = len(list(table.findall(nodes.colspec)))
    cells = [[_lines(cell) for cell in row] for row in rows if len(row) == count]
    columns = [[line for cell in column for line in cell] for column in zip(*cells, strict=True)]
    longest = [max(map(len, lines)) for lines in columns]
    words = [max(len(word) for line in lines for word in line.split(" ")) for lines in columns]
    size, line, widths = _choose(longest, words)
    numbers = [not re.search(r"[^\W\d_]", "".join(lines[1:])) for lines in columns]
    spec = "".join(
        rf">{{\ragged{'left' if number else 'right'}\arraybackslash}}"
        rf"p{{{(width + 0.5) / line:.3f}\linewidth}}"
        for width, number in zip(widths, numbers, strict=True)
    )
    begin, end = (nodes.raw("", t, format="latex") for t in (rf"\begingroup\{size}", r"\endgroup"))
    whole = table.deepcopy()
    whole["classes"].append("longtable")  # which a page can break, and its caption stays with it
    table.parent.replace(table, [begin, addnodes.tabular_col_spec(spec=spec), whole, end])


def _choose(longest: list[int], words: list[int]) -> tuple[str, int, list[int]]:
    for size, (line, least) in _SIZES.items():
        cap, widths, room = max(longest) + 1, longest, line - 2.3 * len(words)
        while cap and sum(widths) > room:
            cap -= 1
            widths = [max(w, min(n, cap)) for w, n in zip(words, longest, strict=True)]
        chosen = size, line, widths
        if cap >= min(least, max(longest)):
            break
    return chosen


def _lines(entry: nodes.Node) -> list[str]:
    """Lines of a cell, with two characters for a wide one, and four for five small ones."""
    lines = []
    for line in re.split(r"\\newline|\n", entry.astext()):
        text = re.sub(r"\\smaller |\\underline|[{}]", "", line).strip()
        text = re.sub("[DGM@]", "MM", text)
        lines.append(text[: len(text) * 4 // 5] if r"\smaller" in line else text)
    return lines
