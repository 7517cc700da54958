"""Formatting, lint, types, and the notebooks as they are committed."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

import nbformat
import pytest
import yaml

from adaptive_margins.book.execute import parameter_defaults
from adaptive_margins.book.pages import OWN

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def run(*arguments: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{' '.join(arguments)}\n{done.stdout}\n{done.stderr}"


def test_format():
    run("ruff", "format", "--check", "--no-cache", ".")


def test_lint():
    run("ruff", "check", "--no-cache", ".")


def test_types():
    # The cache is outside the checkout: 20 s without it, 2 s with it.
    run("mypy", "--cache-dir", str(Path(tempfile.gettempdir()) / ".mypy_cache"))


def test_notebooks_are_those_of_the_contents():
    contents = yaml.safe_load((ROOT / "book" / "_toc.yml").read_text())
    pages = [chapter["file"] for part in contents["parts"] for chapter in part["chapters"]]
    numbered = [p for p in pages if re.match(r"\d\d_", p)]
    assert [n.stem for n in NOTEBOOKS] == sorted([*numbered, OWN])


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_is_clean(path):
    defaults = parameter_defaults(path)
    if path.stem not in (OWN, "00_the_loss"):
        assert defaults["profile"] == "laptop"
        assert defaults["data_folder"] == ""
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not [c.id for c in code if c.outputs or c.execution_count is not None]
    assert notebook.metadata.kernelspec.name == "python3"
    assert "papermill" not in notebook.metadata
    assert "widgets" not in notebook.metadata
