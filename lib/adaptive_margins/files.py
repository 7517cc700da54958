"""Whole or not at all: a file or folder is filled under a temporary name beside its place, and renamed when it is whole."""

from __future__ import annotations

import glob
import json
import os
import platform
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from adaptive_margins.errors import AdaptiveMarginsError

HOME_VARIABLE = "ADAPTIVE_MARGINS_HOME"


class WriteError(AdaptiveMarginsError, OSError):
    """A file that could not be written; the message names it and says why."""


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A name to write to; that file becomes ``path`` when the block ends without an error, and is removed otherwise.

    Folders above ``path`` are made; a file that stands there is replaced. Errors pass through.
    """
    partial = _partial(path)
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: Path, *, same: Callable[[Path], bool] = Path.is_dir) -> Iterator[Path]:
    """A new folder to fill; it becomes ``path`` when the block ends without an error, and is removed otherwise.

    If something appeared at ``path`` meanwhile (another process did the same work), and ``same`` of it is true, it is kept.
    Errors pass through.
    """
    partial = _partial(path)
    try:
        partial.mkdir()
        yield partial
        try:
            partial.rename(path)
        except OSError:
            if not same(path):
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write a small file, UTF-8, whole or not at all; WriteError if it cannot be written."""
    try:
        with whole_file(path) as partial:
            partial.write_text(text, encoding="utf-8")
    except OSError as error:
        message = f"{path} could not be written: {error}; what stood there is unchanged"
        raise WriteError(message) from error


def home() -> Path:
    """Where results lie: $ADAPTIVE_MARGINS_HOME, else the checkout this library is installed from, else the current folder."""
    if given := os.environ.get(HOME_VARIABLE):
        return Path(given).resolve()
    checkout = Path(__file__).resolve().parents[2]
    return checkout if (checkout / "pyproject.toml").is_file() else Path.cwd()


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object that a file holds; {} if there is none or it is damaged."""
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def folder_bytes(folder: Path) -> int:
    """Bytes of all files in a folder and those below it."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _partial(path: Path) -> Path:
    """A free temporary name for ``path``. What killed processes left of it on this machine is removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{path.name}.{platform.node()}."
    for left in path.parent.glob(f"{glob.escape(prefix)}*.partial"):
        pid = left.name.removeprefix(prefix).split(".")[0]
        if pid.isdecimal() and not psutil.pid_exists(int(pid)):
            if left.is_dir():
                shutil.rmtree(left, ignore_errors=True)  # another process may be at it, too
            else:
                left.unlink(missing_ok=True)
    return path.with_name(f"{prefix}{os.getpid()}.{uuid.uuid4().hex[:8]}.partial")
