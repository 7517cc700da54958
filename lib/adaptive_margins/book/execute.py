"""One notebook → papermill → one page of the book.

A notebook whose kernel was killed looks finished in its metadata (papermill 2.7), so they are not
read: a page appears only after papermill has returned, every code cell has an execution count, and
the file is complete.
"""

from __future__ import annotations

import ast
import json
import os
import re
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import nbformat
import papermill

from adaptive_margins.errors import AdaptiveMarginsError
from adaptive_margins.files import write_text
from adaptive_margins.processes import end_with_parent

START_TIMEOUT = 300
"""Seconds a kernel may take to start; on a busy machine importing torch alone takes ten."""

SKIPPED = "skip-execution"
"""The tag of cells that are for readers to run, e.g. because they train."""

Scalar = str | int | float | bool | None
_WIDGET = "application/vnd.jupyter.widget-view+json"
_KERNEL = {"name": "python3", "display_name": "Python 3 (ipykernel)", "language": "python"}


class NotebookError(AdaptiveMarginsError, RuntimeError):
    """A notebook cannot be executed, or failed; the message names it and the copy of its state."""


def parameter_defaults(notebook: Path) -> dict[str, Scalar]:
    """Names and defaults in a notebook's one cell tagged ``parameters``: plain scalars only.

    Raises NotebookError if there is no such cell, more than one, or anything else in it;
    papermill would only warn.
    """
    try:
        cells = nbformat.read(notebook, as_version=4).cells
    except Exception as error:
        raise NotebookError(f"{notebook} is not a notebook: {error}") from error
    tagged = [
        c for c in cells if c.cell_type == "code" and "parameters" in c.metadata.get("tags", [])
    ]
    if len(tagged) != 1:
        raise NotebookError(
            f"{notebook} has {len(tagged)} code cells tagged `parameters`, expected exactly one"
        )
    defaults: dict[str, Scalar] = {}
    try:
        for statement in ast.parse(tagged[0].source).body:
            match statement:
                case ast.Assign(targets=[ast.Name(id=name)], value=value):
                    pass
                case ast.AnnAssign(target=ast.Name(id=name), value=ast.expr() as value):
                    pass
                case _:
                    raise ValueError(ast.unparse(statement))
            default = ast.literal_eval(value)
            if not isinstance(default, str | int | float | bool | None):
                raise ValueError(ast.unparse(statement))
            defaults[name] = default
    except (SyntaxError, ValueError) as error:
        raise NotebookError(
            f"{notebook}: the `parameters` cell may hold only assignments of plain scalars, "
            f"found: {error}"
        ) from None
    return defaults


def check_parameters(notebook: Path, parameters: Mapping[str, Scalar]) -> None:
    """Raise NotebookError unless the notebook declares every one of ``parameters``."""
    if unknown := sorted(set(parameters) - set(defaults := parameter_defaults(notebook))):
        raise NotebookError(
            f"{notebook} has no parameter {', '.join(unknown)}; "
            f"it has {', '.join(sorted(defaults))}"
        )


def execute(
    notebook: Path,
    page: Path,
    parameters: Mapping[str, Scalar],
    *,
    cwd: Path,
    replacements: Mapping[str, str] | None = None,
) -> float:
    """Run ``notebook`` and write it, executed and tidied, to ``page``; returns the seconds it took.

    While it runs the copy is ``NAME.running.ipynb``; if it fails that becomes
    ``NAME.failed.ipynb``, which the NotebookError names. ``page`` is written atomically.
    ``replacements`` are texts to replace throughout the page. The same by hand: ``papermill
    NOTEBOOK OUT.ipynb -k python3 --start-timeout 300 -p NAME VALUE``.
    """
    page.parent.mkdir(parents=True, exist_ok=True)
    running, failed = (page.with_name(f"{page.stem}.{s}.ipynb") for s in ("running", "failed"))
    for old in (running, failed):
        old.unlink(missing_ok=True)
    started = time.monotonic()
    try:
        executed = papermill.execute_notebook(
            str(notebook),
            str(running),
            parameters=dict(parameters),
            kernel_name="python3",
            start_timeout=START_TIMEOUT,
            progress_bar=False,
            cwd=str(cwd),
            # It warns of its sockets, and now and then calls the end of a kernel an error.
            extra_arguments=["--IPKernelApp.log_level=CRITICAL"],
        )
        if idle := _not_executed(executed):
            raise RuntimeError(f"cells {idle} were not executed")
        text = json.dumps(tidied(executed), indent=1, ensure_ascii=False) + "\n"
        for old_text, new_text in (replacements or {}).items():
            text = text.replace(old_text, new_text)
        write_text(page, text)
        running.unlink()
    except Exception as error:
        state = "no copy could be kept"
        if running.is_file():
            running.replace(failed)
            state = f"its state is in {failed}"
        reason = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip() or type(error).__name__
        raise NotebookError(f"{notebook.name} failed; {state}\n{reason}") from None
    return time.monotonic() - started


def _not_executed(executed: nbformat.NotebookNode) -> list[int]:
    """Numbers of code cells without an execution count, from 1."""
    return [
        number
        for number, cell in enumerate(executed.cells, 1)
        if cell.cell_type == "code"
        and cell.source.strip()
        and cell.execution_count is None
        and SKIPPED not in cell.metadata.get("tags", [])
    ]


def tidied(executed: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """The executed notebook as a page, without what papermill, kernel and widgets add."""
    page = nbformat.from_dict(executed)
    language = {"name": "python", "pygments_lexer": "ipython3"}
    page.metadata = nbformat.from_dict({"kernelspec": _KERNEL, "language_info": language})
    for cell in page.cells:
        tags = [t for t in cell.metadata.get("tags", []) if not t.startswith("papermill-")]
        if "injected-parameters" in tags and "remove-cell" not in tags:
            tags.append("remove-cell")  # the values are on the provenance page
            cell["id"] = "injected-parameters"  # papermill's is random: pages would never be equal
        if tags:
            cell.metadata["tags"] = tags
        for key in ("papermill", "execution"):
            cell.metadata.pop(key, None)
        for output in cell.get("outputs", []):
            if "text" in output:
                output["text"] = re.sub(r"\S*/ipykernel_\d+/\d+\.py", "notebook", output["text"])
        if "outputs" in cell:
            # The text in place of a widget, mostly a progress bar, is of no use on a page.
            cell["outputs"] = [o for o in cell["outputs"] if _WIDGET not in o.get("data", {})]
    nbformat.validate(page)
    return page


def worker_settings(environment: Mapping[str, str]) -> None:
    """Prepare a worker process: the environment of its kernels, and its end with the build's."""
    os.environ.update(environment)
    end_with_parent()  # the kernel watches this process in the same way


def paths_to_hide(**places: Path) -> dict[str, str]:
    """Replacements that take paths out of a page, longest first: ``places``, Python, the home."""
    found = {str(path): name for name, path in places.items()}
    for path, name in ((sys.prefix, ".venv"), (sys.base_prefix, "python"), (str(Path.home()), "~")):
        found.setdefault(path, name)
    return {path: found[path] for path in sorted(found, key=len, reverse=True) if len(path) > 4}
