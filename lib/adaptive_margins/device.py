"""The device that is used where none is named, and the machine."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path

import psutil


def default_device() -> str:
    """Return "cuda" if there is a GPU of NVIDIA's, else "mps" on a Mac that has it, else "cpu"."""
    import torch

    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def machine() -> dict[str, str]:
    """Processor, cores and memory of this machine; nothing that names it."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file() and (line := re.search(r"model name\s*: (.+)", cpuinfo.read_text())):
        model = line[1]
    affinity = getattr(os, "sched_getaffinity", None)
    return {
        "processor": model,
        "cores": str(len(affinity(0)) if affinity else os.cpu_count() or 1),
        "memory": f"{psutil.virtual_memory().total / 2**30:.0f} GiB",
        "system": f"{platform.system()} {platform.machine()}",
    }
