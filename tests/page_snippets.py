"""Snippets of the page "Other libraries", as they are printed there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

PAGE = Path(__file__).resolve().parents[1] / "book" / "your_tools.md"
SECTIONS = {part.partition("\n")[0]: part for part in PAGE.read_text("utf-8").split("\n## ")[1:]}
"""Heading → its section."""


def blocks(heading: str, language: str = "python") -> list[str]:
    """The code below a heading."""
    return re.findall(rf"^```{language}\n(.*?)^```", SECTIONS[heading], re.DOTALL | re.MULTILINE)


def run_section(heading: str) -> dict[str, object]:
    """Execute the Python of a section, one block after the other; return its variables."""
    variables: dict[str, object] = {}
    for code in blocks(heading):
        exec(compile(code, f"{PAGE.name}, {heading}", "exec"), variables)
    return variables


def packages(heading: str) -> set[str]:
    """The packages that the Python of a section imports."""
    nodes = [node for code in blocks(heading) for node in ast.walk(ast.parse(code))]
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
    return {name.split(".")[0] for name in names}
