"""Arrays in files, and the settings that they were computed with: checked when they are read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from adaptive_margins.encoder.checks import EncoderError


def read_settings(path: Path) -> dict[str, Any]:
    """Read a JSON object; EncoderError if there is none."""
    try:
        found = json.loads(path.read_text("utf-8"))
        if isinstance(found, dict):
            return found
        why = "not an object"
    except (OSError, ValueError) as error:
        why = str(error)
    raise EncoderError(f"{path} cannot be read ({why}); delete {path.parent} to compute it again")


def check_same(path: Path, found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Raise EncoderError if settings read from ``path`` are not the expected ones."""
    for key, value in expected.items():
        if found.get(key) != value:
            raise EncoderError(
                f"{path} has {key} {found.get(key)!r}, expected {value!r}; delete {path.parent} to"
                " compute it again"
            )


def read_array(path: Path, shape: tuple[int, int | None], dtype: Any) -> np.ndarray:
    """A .npy file of a matrix, memory-mapped; ``shape`` (n, None) for any number of columns."""
    try:
        array = np.load(path, mmap_mode="r")
    except (ValueError, OSError, EOFError) as error:
        raise EncoderError(
            f"{path} cannot be read ({error}); delete it to compute it again"
        ) from None
    rows, columns = shape
    columns = array.shape[-1] if columns is None else columns
    if array.shape != (rows, columns) or array.dtype != dtype:
        raise EncoderError(
            f"{path} holds {array.dtype} of shape {array.shape}, expected {np.dtype(dtype)} of"
            f" shape {(rows, columns)}; delete it to compute it again"
        )
    return array
