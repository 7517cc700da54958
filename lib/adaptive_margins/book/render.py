"""Pages and tables from the templates in ``templates/``."""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping
from typing import Any

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape


class Shown(str):
    """HTML that a notebook displays. ``others`` has what other formats take in its place: MIME
    type → content.
    """

    others: dict[str, str]

    def __new__(cls, html: str, **others: str) -> Shown:
        """Take the HTML, and the others by MIME type."""
        made = super().__new__(cls, html)
        made.others = others
        return made

    def _repr_mimebundle_(self, **_: Any) -> dict[str, str]:
        return {"text/html": str(self), "text/plain": "(HTML)", **self.others}


def data_uri(content: bytes, kind: str) -> str:
    """A file as a link that needs no server."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def plain(text: str) -> str:
    """The text on one line, with no character that means something in Markdown or HTML."""
    return re.sub(r"([!-/:-@\[-`{-~])", r"\\\1", " ".join(text.split()))


def markdown(frame: pd.DataFrame) -> str:
    """A frame as a Markdown table: numbers on the right, with separators; texts are escaped."""
    number = re.compile(r"[-+−]?([\d,]+(\.\d+)?|\.\d+)|—?")

    def cell(value: Any) -> str:
        if isinstance(value, str):
            return value if number.fullmatch(value) else plain(value)
        return f"{value:,}"

    cells = frame.map(cell)
    align = [
        "right" if cells[column].map(lambda text: bool(number.fullmatch(text))).all() else "left"
        for column in cells
    ]
    return cells.to_markdown(index=False, disable_numparse=True, colalign=align)


def words(values: Mapping[str, Any]) -> str:
    """Names and values in a row; a mapping among them is taken apart."""
    return ", ".join(
        words(value) if isinstance(value, Mapping) else f"{name.replace('_', ' ')} {value}"
        for name, value in values.items()
    )


def html_page(title: str, text: str) -> str:
    """MyST Markdown as a page of HTML without scripts, fonts or files from elsewhere."""
    from docutils.core import publish_parts
    from myst_parser.parsers.docutils_ import Parser

    settings = {
        "_disable_config": True,
        "file_insertion_enabled": False,
        "embed_stylesheet": False,
        "stylesheet_path": "",
        "doctitle_xform": False,
        "initial_header_level": 1,
        "halt_level": 3,  # an error in the Markdown is ours
        "math_output": "LaTeX",
    }
    parts = publish_parts(text, parser=Parser(), writer_name="html5", settings_overrides=settings)
    return render("page.html", title=title, body=str(parts["body"]))


_TEMPLATES = Environment(
    loader=PackageLoader("adaptive_margins.book"),
    autoescape=select_autoescape(["html"]),
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)
_TEMPLATES.filters["table"] = markdown
_TEMPLATES.filters["plain"] = plain
_TEMPLATES.filters["words"] = words
_TEMPLATES.filters["thousands"] = "{:,}".format


def render(template: str, **values: Any) -> str:
    """The text of a template; values are escaped in ``.html``, but not in ``.md``."""
    return _TEMPLATES.get_template(template).render(**values)
