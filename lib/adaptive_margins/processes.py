"""How processes end: workers with their parent, and a command that is asked to."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from multiprocessing.connection import wait
from types import SimpleNamespace
from typing import Any

TRY_AGAIN = 75
"""Exit status of a command that was asked to end and resumes: EX_TEMPFAIL of sysexits.h."""
GRACE = 20.0
"""Seconds that a command waits for its workers' checkpoints; Kubernetes kills after 30."""
ending = SimpleNamespace(asked=False, training=False)
"""Whether this process was asked to end, and whether it trains and so ends after a checkpoint."""


def end_with_parent() -> None:
    """Let this worker process end when its parent ends, even if that was killed."""
    if (parent := multiprocessing.parent_process()) is None:
        return

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def end_when_asked() -> None:
    """Let SIGTERM and SIGUSR1 end this process and its workers: a training after its next step."""
    for name in ("SIGTERM", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), _end)


def _end(*_: Any) -> None:
    ending.asked = True
    if multiprocessing.parent_process() is None:
        os.write(2, b"adaptive-margins: asked to end; the same command resumes\n")
    for child in (children := multiprocessing.active_children()):
        child.terminate()
    if not ending.training:
        threading.Timer(GRACE, os._exit, [TRY_AGAIN]).start()
        for child in children:
            child.join()
        os._exit(TRY_AGAIN)  # what is finished is stored, and writes are atomic
