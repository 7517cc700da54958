"""Arrays and settings in a folder: memory-mapped, and checked when read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from adaptive_margins.encoder.checks import EncoderError
from adaptive_margins.files import write_text


def settle(path: Path, settings: Mapping[str, Any]) -> None:
    """Write what a folder is to hold, before anything else; or check that it was begun for the same."""
    if path.exists():
        check_same(path, read_settings(path), settings)
        return
    write_text(path, json.dumps(settings) + "\n")


def check_same(path: Path, found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Raise EncoderError if settings read from ``path`` are not the expected ones."""
    if other := [key for key in expected if found.get(key) != expected[key]]:
        key = other[0]
        raise EncoderError(
            f"{path} says {key} {found.get(key)!r}, expected {expected[key]!r}; delete {path.parent} to compute it anew"
        )


def read_settings(path: Path) -> dict[str, Any]:
    """Read a JSON object; EncoderError if there is none."""
    try:
        found = json.loads(path.read_text())
        if isinstance(found, dict):
            return found
        error: Exception | str = "not an object"
    except (OSError, ValueError) as problem:
        error = problem
    raise EncoderError(
        f"{path} cannot be read ({error}); delete {path.parent} to compute it anew"
    ) from None


def read_array(path: Path, rows: int, dtype: np.dtype, dim: int | None = None) -> np.ndarray:
    """A .npy file of (rows, dim), memory-mapped; ``dim`` None if it is not known."""
    try:
        array = np.load(path, mmap_mode="r")
    except (ValueError, OSError, EOFError) as error:
        raise EncoderError(
            f"{path} cannot be read ({error}); delete it to compute it anew"
        ) from None
    if array.ndim != 2 or array.shape != (rows, dim or array.shape[1]) or array.dtype != dtype:
        raise EncoderError(
            f"{path} holds {array.dtype} of shape {array.shape}, expected {dtype} of shape ({rows}, {dim or 'D'}); "
            "delete it to compute it anew"
        )
    return array
