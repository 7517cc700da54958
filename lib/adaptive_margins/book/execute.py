"""One notebook → papermill → one page of the book.

A notebook that died with its kernel looks finished by its own metadata (papermill 2.7), so
nothing here trusts that: the page appears only after papermill has returned, every code cell has
an execution count and the page is written whole.
"""

from __future__ import annotations

import ast
import json
import multiprocessing
import os
import re
import sys
import threading
import time
from collections.abc import Mapping
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import nbformat
import papermill

from adaptive_margins.errors import AdaptiveMarginsError

START_TIMEOUT = 300
"""Seconds a kernel may take to start; on a busy machine importing torch alone takes ten."""

Scalar = str | int | float | bool | None
_WIDGET = "application/vnd.jupyter.widget-view+json"
_KERNEL = {"name": "python3", "display_name": "Python 3 (ipykernel)", "language": "python"}


class NotebookError(AdaptiveMarginsError, RuntimeError):
    """A notebook that cannot be executed, or failed; the message names it and the copy kept."""


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
    ``NAME.failed.ipynb``, which the NotebookError names. ``page`` appears whole or not at all.
    ``replacements`` are texts to replace throughout the page. The same by hand:
    ``papermill NOTEBOOK OUT.ipynb -k python3 --start-timeout 300 -p NAME VALUE``.
    """
    check_parameters(notebook, parameters)
    page.parent.mkdir(parents=True, exist_ok=True)
    running, failed = (
        page.with_name(f"{page.stem}.{state}.ipynb") for state in ("running", "failed")
    )
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
            # It warns of its own local sockets, and now and then calls the end of a kernel an error.
            extra_arguments=["--IPKernelApp.log_level=CRITICAL"],
        )
        idle = [
            number
            for number, cell in enumerate(executed.cells, 1)
            if cell.cell_type == "code" and cell.source.strip() and cell.execution_count is None
        ]
        if idle:
            raise RuntimeError(f"cells {idle} were not executed")
        text = json.dumps(tidied(executed), indent=1, ensure_ascii=False) + "\n"
        for old_text, new_text in (replacements or {}).items():
            text = text.replace(old_text, new_text)
        with running.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        running.replace(page)
    except Exception as error:
        kept = "no copy could be kept"
        if running.is_file():
            running.replace(failed)
            kept = f"its state is in {failed}"
        reason = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip() or type(error).__name__
        raise NotebookError(f"{notebook.name} failed; {kept}\n{reason}") from None
    return time.monotonic() - started


def tidied(executed: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """The executed notebook as a page, without what papermill, kernel and widgets add."""
    page = nbformat.from_dict(executed)
    page.metadata = nbformat.from_dict(
        {"kernelspec": _KERNEL, "language_info": {"name": "python", "pygments_lexer": "ipython3"}}
    )
    for cell in page.cells:
        tags: list[str] = [
            tag for tag in cell.metadata.get("tags", []) if not tag.startswith("papermill-")
        ]
        if "injected-parameters" in tags and "remove-cell" not in tags:
            tags.append("remove-cell")  # the values are on the provenance page
        if tags:
            cell.metadata["tags"] = tags
        for key in ("papermill", "execution"):
            cell.metadata.pop(key, None)
        for output in cell.get("outputs", []):
            if "text" in output:
                output["text"] = re.sub(r"\S*/ipykernel_\d+/\d+\.py", "notebook", output["text"])
        if "outputs" in cell:
            # The text that stands in for a widget, a progress bar mostly, is of no use on a page.
            cell["outputs"] = [o for o in cell["outputs"] if _WIDGET not in o.get("data", {})]
    nbformat.validate(page)
    return page


def worker_settings(environment: Mapping[str, str]) -> None:
    """Prepare a worker process: the environment of its kernels, and its end with the build's."""
    os.environ.update(environment)
    if (parent := multiprocessing.parent_process()) is None:
        return

    def end_with_parent() -> None:
        wait([parent.sentinel])
        os._exit(1)  # the kernel watches this process in the same way

    threading.Thread(target=end_with_parent, daemon=True).start()


def paths_to_hide(**places: Path) -> dict[str, str]:
    """Replacements that take paths out of a page, longest first: ``places``, Python, the home."""
    found: dict[str, Any] = {str(path): name for name, path in places.items()}
    found.setdefault(sys.prefix, ".venv")
    found.setdefault(sys.base_prefix, "python")
    found.setdefault(str(Path.home()), "~")
    return {path: found[path] for path in sorted(found, key=len, reverse=True) if len(path) > 4}
