"""Trials of `faults.py`: work that is interrupted, has no room on the disk, or finds a damaged file."""

from __future__ import annotations

import io
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stderr, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from adaptive_margins.errors import AdaptiveMarginsError
from adaptive_margins.processes import TRY_AGAIN, end_when_asked

FORK = multiprocessing.get_context("fork")
SAID = ("No space left", "could not be written", "GB are free")
COUNTS = {"trials": 0, "noticed": 0, "equal": 0, "seconds": 0.0}
Rows = list[dict[str, Any]]


@dataclass
class Work:
    """Something to do, the folders that it writes, and what it gives."""

    name: str
    do: Callable[[], Any]
    places: list[Path]
    result: Callable[[], Any]

    def clean(self) -> None:
        """As if it had never begun."""
        for place in self.places:
            shutil.rmtree(place, ignore_errors=True)

    def begin(self) -> tuple[Any, Any]:
        """Begin it in a fork; returns the process, and a pipe that gets an error or ""."""
        receiving, sending = FORK.Pipe(duplex=False)

        def work() -> None:
            sys.stderr = io.StringIO()
            end_when_asked()
            try:
                self.do()
                sending.send("")
            except Exception as error:
                sending.send(f"{type(error).__name__}: {error}")

        process = FORK.Process(target=work)
        process.start()
        sending.close()
        return process, receiving

    def finish(self) -> str:
        """Do it in a fork; returns the error, or ""."""
        process, receiving = self.begin()
        said = str(receiving.recv())
        process.join()
        return said

    def undisturbed(self) -> tuple[Any, float]:
        """What it gives, and the seconds that it takes."""
        self.clean()
        since = time.perf_counter()
        assert not (said := self.finish()), said
        return self.result(), time.perf_counter() - since


def some(folder: Path) -> list[Path]:
    """Its files below, but for those of checksums and locks."""
    return [file for file in sorted(folder.rglob("*")) if "." in file.name[1:]]


def interrupted(
    work: Work,
    number: signal.Signals,
    trials: int,
    workers: Callable[[Any], list[int]] | None = None,
    said: str = "",
) -> Rows:
    """Signals at random moments, to the process or to one of its ``workers``; then the same call again.

    ``said`` is how the process ends whose worker was killed: an error, or "" if another does the work.
    """
    (expected, seconds), draw = work.undisturbed(), random.Random(1)
    found = {"work": work.name, "fault": number.name, **COUNTS}
    for trial in range(trials):
        part, alive = (trial + draw.random()) / trials, False
        while not alive:
            work.clean()
            process, receiving = work.begin()
            process.join(part * seconds)
            victims = [process.pid]
            while workers and process.is_alive() and not (victims := workers(process)):
                time.sleep(0.01)
            alive = process.is_alive()
            seconds *= 1.0 if alive else 0.8  # it was faster than the first time
        children = psutil.Process(process.pid).children(recursive=True)
        os.kill(draw.choice(victims), number)
        since = time.perf_counter()
        process.join()
        found["seconds"] = max(found["seconds"], time.perf_counter() - since)
        orphans = psutil.wait_procs(children, 30)[1]
        found["trials"] += 1
        status = -number if number == signal.SIGKILL else TRY_AGAIN
        noticed = process.exitcode == status
        if workers:
            message = receiving.recv()
            noticed = said in message if said else not message
        found["noticed"] += noticed and not orphans
        found["equal"] += not work.finish() and work.result() == expected
    return [found]


def spawned(process: Any) -> list[int]:
    """Ids of its own worker processes."""
    children = psutil.Process(process.pid).children()
    with suppress(psutil.Error):
        return [child.pid for child in children if "--multiprocessing-fork" in child.cmdline()]
    return []


def rays(_: Any) -> list[int]:
    """Ids of the processes that execute tasks of Ray on this machine."""
    processes = psutil.process_iter(["cmdline"])
    titles = ((found.pid, (found.info["cmdline"] or [""])[0]) for found in processes)
    return [pid for pid, title in titles if title.startswith("ray::_on_ray")]


def full(work: Work, disk: Path, sizes: list[int]) -> Rows:
    """``disk`` is a mounted one of each size (in KiB), then has no limit."""
    found = {"work": work.name, "fault": "disk full", **COUNTS}
    expected, _ = work.undisturbed()
    for size in sizes:
        work.clean()
        disk.mkdir(parents=True, exist_ok=True)
        mount = ["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", str(disk)]
        if subprocess.run(mount, check=False).returncode:
            return []  # it is not permitted here
        try:
            said = work.finish()
            left = [path for path in disk.rglob("*") if path.name.endswith(".partial")]
        finally:
            subprocess.run(["umount", str(disk)], check=True)
        if said:  # else it was large enough
            found["trials"] += 1
            found["noticed"] += not left and any(words in said for words in SAID)
            found["equal"] += not work.finish() and work.result() == expected
    return [found]


def rotten(
    name: str, files: list[Path], again: Callable[[], Any], before: Callable[[], Any] = lambda: None
) -> Rows:
    """Damage each file, after ``before``: is it named, and does ``again`` give what it gave?

    Where it ends with an error, the file's folder is deleted, as the error advises.
    """
    before()
    expected = again()
    rows = [{"work": name, "fault": fault, **COUNTS} for fault in ("truncated", "bit flipped")]
    for found, file in ((row, file) for row in rows for file in files):
        before()
        content = bytearray(kept := file.read_bytes())
        middle = len(content) // 2
        content[middle] ^= 4
        file.unlink()
        file.write_bytes(content[:middle] if found["fault"] == "truncated" else content)
        with redirect_stderr(io.StringIO()) as said:
            try:
                result = again()
            except AdaptiveMarginsError as error:
                print(error, file=sys.stderr)
                shutil.rmtree(file.parent)
                result = again()
        found["trials"] += 1
        if file.name in said.getvalue():
            found["noticed"] += 1
        else:
            file.write_bytes(kept)  # it would be a second fault of the next trial
        found["equal"] += result == expected
    return rows
