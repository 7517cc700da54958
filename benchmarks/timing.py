"""Ratios measured in one process and in turns, printed as a table and saved as JSON."""

from __future__ import annotations

import datetime
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from adaptive_margins import device
from adaptive_margins.files import write_text

LATEST = Path(__file__).parent / "latest.json"
GROWTH = Path(__file__).parent / "growth.json"


def clock() -> float:
    """Seconds: of the wall, or (`use_processor_time`) of this process's work."""
    return _clock()


_clock: Callable[[], float] = time.perf_counter


def use_processor_time() -> None:
    """Compute in one thread and count the seconds that it works: other processes matter less."""
    global _clock
    _clock = time.process_time
    torch.set_num_threads(1)


def stamp() -> dict[str, str]:
    """Where and when a figure was measured."""
    counted = "processor time" if _clock is time.process_time else "wall time"
    threads = f"{torch.get_num_threads()} thread{'s' if torch.get_num_threads() > 1 else ''}"
    parts = [device.machine()["processor"], f"{os.cpu_count()} cores", threads, counted]
    machine = ", ".join([*parts, f"torch {torch.__version__}"])
    return {"machine": machine, "date": datetime.date.today().isoformat()}


def rounds(
    contestants: Mapping[str, Callable[[int], float]], number: int
) -> dict[str, list[float]]:
    """What each contestant returns (seconds or a rate) in each of ``number`` rounds; their order turns round by round.

    A line on stderr warns if other processes used more than a twentieth of the processor meanwhile.
    """
    names = list(contestants)
    found: dict[str, list[float]] = {name: [] for name in names}
    started, busy, used = time.perf_counter(), _busy(), time.process_time()
    for r in range(number):
        for name in names if r % 2 == 0 else reversed(names):
            found[name].append(contestants[name](r))
            print(f"  round {r + 1} of {number}: {name} {found[name][-1]:.4g}", file=sys.stderr)
    seconds = (time.perf_counter() - started) * (os.cpu_count() or 1)
    others = (_busy() - busy - (time.process_time() - used)) / seconds
    if others > 0.05 and _clock is not time.process_time:
        print(
            f"  other processes had {others:.0%} of the processor: measure again", file=sys.stderr
        )
    return found


def _busy() -> float:
    """Seconds that the machine's cores have worked."""
    times = psutil.cpu_times()
    return times.user + times.nice + times.system


def row(
    name: str,
    ours: list[float],
    peer: list[float],
    unit: str,
    setting: str,
    *,
    less_is_better: bool = False,
) -> dict[str, Any]:
    """One figure: medians, and the median and quartiles of the rounds' ratios; a ratio above 1 is in our favour."""
    ratios = [b / a if less_is_better else a / b for a, b in zip(ours, peer, strict=True)]
    low, ratio, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return {
        "name": name,
        "ours": statistics.median(ours),
        "peer": statistics.median(peer),
        "ratio": ratio,
        "spread": [low, high],
        "unit": unit,
        "setting": setting,
        "rounds": len(ratios),
        **stamp(),
    }


def exponent(sizes: list[float], values: list[float]) -> float:
    """The slope of log(value) over log(size) by least squares: 1 is growth in proportion."""
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def growth(
    name: str, sizes: list[float], values: list[float], size_unit: str, unit: str, setting: str
) -> dict[str, Any]:
    """One growing quantity: values at sizes, and the exponent fitted to them."""
    return {
        "name": name,
        "sizes": sizes,
        "values": values,
        "exponent": exponent(sizes, values),
        "size_unit": size_unit,
        "unit": unit,
        "setting": setting,
        **stamp(),
    }


def keep(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write ``rows`` to ``path``; rows of other names or settings stay."""
    old = json.loads(path.read_text()) if path.is_file() else []
    new = {(r["name"], r["setting"]) for r in rows}
    kept = [r for r in old if (r["name"], r["setting"]) not in new]
    write_text(path, json.dumps(kept + rows, indent=1, ensure_ascii=False) + "\n")


def show(rows: list[dict[str, Any]]) -> None:
    """Print a line per figure: of `row`, or of `growth`."""
    for r in rows:
        if "sizes" in r:
            values = dict(zip(r["sizes"], (f"{v:.3g}" for v in r["values"]), strict=True))
            text = f"exponent {r['exponent']:.2f} {values}"
        else:
            low, high = r["spread"]
            text = f"{r['ratio']:6.2f} [{low:.2f}, {high:.2f}] {r['ours']:.4g} / {r['peer']:.4g}"
        print(f"{r['name']:<58} {text} {r['unit']}  ({r['setting']})", flush=True)
