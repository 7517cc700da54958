"""Arrays in files, and the settings that they were computed with, checked when they are read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from adaptive_margins.encoder.checks import EncoderError, read_json


def read_settings(path: Path, expected: Mapping[str, Any]) -> dict[str, Any]:
    """Read a JSON object; EncoderError unless it has the ``expected`` values."""
    again = f"delete {path.parent} to compute it again"
    found = read_json(path, dict, again)
    for key, value in expected.items():
        if found.get(key) != value:
            raise EncoderError(f"{path} has {key} {found.get(key)!r}, expected {value!r}; {again}")
    return found


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
