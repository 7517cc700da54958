"""The device that is used where none is named."""

from __future__ import annotations


def default_device() -> str:
    """Return "cuda" if there is a GPU of NVIDIA's, else "mps" on a Mac that has it, else "cpu"."""
    import torch

    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"
