"""`make book`: runs → executed notebooks → book, leaving alone everything that is finished.

An executed notebook is finished if its receipt says so: written last, it holds the hashes of what
went in (notebook, parameters, library, package versions, results read) and of what came out. The
book is finished if ``_build/`` holds the hash of all pages. Whatever is interrupted has no receipt.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import re
import shutil
import subprocess
import sysconfig
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from adaptive_margins.book import pages
from adaptive_margins.book.execute import (
    NotebookError,
    Scalar,
    check_parameters,
    execute,
    parameter_defaults,
    paths_to_hide,
    worker_settings,
)
from adaptive_margins.errors import AdaptiveMarginsError
from adaptive_margins.files import alone, file_sha256, read_object, write_text
from adaptive_margins.paper import store
from adaptive_margins.profiles.config import Profile, load_profile
from adaptive_margins.progress import clock, say

WORKERS = 2
"""Notebooks executed at a time. They read results rather than compute, so memory sets the limit."""

_PACKAGE = Path(__file__).resolve().parents[1]
_UNFINISHED = ("*.running.ipynb", "*.failed.ipynb")


class BuildError(AdaptiveMarginsError, RuntimeError):
    """The book was not built; the message says at which notebook or page, and what to look at."""


def build(
    profile: str,
    *,
    home: Path | None = None,
    notebooks: Sequence[str] | None = None,
    every: bool = False,
    force: bool = False,
    run: Callable[[], object] | None = None,
    source: Path | None = None,
) -> Path:
    """Execute the notebooks of a checkout on ``profile`` and build the book; returns the page to open.

    ``home`` is where results, pages and book go (default: `files.home`). ``notebooks`` selects some
    by number or name (``["02"]``): then only they are executed, no book is built, and the folder of
    the pages is returned. ``every`` includes the long one (`pages.LONG`), which else is shown as far as it has been executed
    before, or as its committed summary. ``force`` executes notebooks that are finished, too. ``run`` is called
    once, after all cheap checks and before the first notebook, to make the runs that are missing.
    ``source`` is the checkout with ``notebooks/``, ``book/`` and ``_config.yml``.

    Raises BuildError, NotebookError or ProfileError.
    """
    home, source = (home or store.home()).resolve(), (source or _PACKAGE.parents[1]).resolve()
    if profile.endswith((".yaml", ".yml")):
        profile = str(Path(profile).resolve())  # notebooks run in another folder
    settings = load_profile(profile)
    if not (source / "_config.yml").is_file():
        raise BuildError(f"{source} is no checkout: it has no _config.yml; the book needs one")
    site = Site(home, profile)
    chosen = select(source / "notebooks", notebooks)
    if any(notebook.stem == pages.OWN for notebook in chosen):
        raise BuildError(
            f"{pages.OWN} takes a collection of yours, not a profile, and is no page of the book; open it in JupyterLab, or:"
            f" papermill notebooks/{pages.OWN}.ipynb out.ipynb -k python3 -p source FOLDER -p output ENCODER"
        )
    if notebooks is None and not every:
        chosen = [n for n in chosen if n.stem != pages.LONG or site.finished(n)]
    for notebook in chosen:
        check_parameters(notebook, site.parameters(notebook))
    site.pages.mkdir(parents=True, exist_ok=True)
    with alone(home / "_build", wait=False):
        if run is not None:
            run()
        site.execute(chosen, force=force)
        if notebooks is not None:
            return site.pages
        if home != source:
            shutil.copy(source / "_config.yml", home)
            for folder in ("book", "lib"):  # pages quote from the library
                shutil.copytree(
                    source / folder,
                    home / folder,
                    ignore=shutil.ignore_patterns("_executed", "__pycache__", "*.egg-info"),
                    dirs_exist_ok=True,
                )
        for page in set(site.pages.glob("[0-9][0-9]_*.ipynb")) - {
            site.pages / n.name for n in chosen
        }:
            page.unlink()  # outdated
        site.write_pages(chosen, settings)
        return site.build_book()


def select(folder: Path, names: Sequence[str] | None = None) -> list[Path]:
    """The numbered notebooks of ``folder`` in order: all but `pages.OWN`, or those whose number or name is given."""
    found = sorted(folder.glob("[0-9][0-9]_*.ipynb"))
    if not found:
        raise BuildError(f"{folder} has no notebooks named NN_*.ipynb")
    chosen: set[Path] = set()
    for name in names or ():
        matching = [p for p in found if Path(name).stem in (p.stem, p.stem[:2])]
        if not matching:
            raise BuildError(f"no notebook {name!r}; there are {', '.join(p.stem for p in found)}")
        chosen.update(matching)
    return [p for p in found if (p.stem != pages.OWN if names is None else p in chosen)]


@dataclass(frozen=True)
class Site:
    """What the build writes: ``HOME/book/_executed`` (pages, receipts, data, images), ``HOME/_build``."""

    home: Path
    profile: str

    @property
    def pages(self) -> Path:
        """The folder of generated pages."""
        return self.home / "book" / "_executed"

    def receipt(self, notebook: Path) -> Path:
        """Where the receipt of a notebook lies, or would."""
        return self.pages / "receipts" / f"{notebook.stem}.json"

    def _workplace(self, notebook: Path) -> Path:
        # A folder of its own: what a notebook writes counts only once it has finished.
        return self.pages / f".data-{notebook.stem}"

    def parameters(self, notebook: Path) -> dict[str, Scalar]:
        """What the build passes to a notebook: nothing to one that takes no profile."""
        if "profile" not in parameter_defaults(notebook):
            return {}
        return {"profile": self.profile, "data_folder": str(self._workplace(notebook))}

    def key(self, notebook: Path) -> dict[str, Any]:
        """What determines an executed notebook, results of runs aside."""
        own = Path(self.profile)  # the profiles that come with the library are part of its hash
        return {
            "notebook": file_sha256(notebook),
            "profile": [self.profile, file_sha256(own) if own.suffix and own.is_file() else ""],
            "library": library_hash(),
            "versions": pages.versions(),
        }

    def results(self, run_ids: Sequence[str]) -> dict[str, str]:
        """Run id → hash of its result.json ("" if the store does not have it)."""
        files = {run_id: self.home / "runs" / run_id / "result.json" for run_id in run_ids}
        return {run_id: file_sha256(p) if p.is_file() else "" for run_id, p in files.items()}

    def finished(self, notebook: Path) -> dict[str, Any] | None:
        """The notebook's receipt if it matches what lies there now, else None."""
        receipt = read_object(self.receipt(notebook))
        try:
            whole = (
                receipt["key"] == self.key(notebook)
                and receipt["results"] == self.results(list(receipt["results"]))
                and all(file_sha256(self.pages / p) == h for p, h in receipt["outputs"].items())
            )
        except (KeyError, OSError, AttributeError):
            return None
        return receipt if whole else None

    def execute(self, notebooks: Sequence[Path], *, force: bool = False) -> None:
        """Execute what is not finished, at most `WORKERS` at a time; stop at the first failure."""
        pending = [n for n in notebooks if force or self.finished(n) is None]
        if len(pending) < len(notebooks):
            say(f"[notebooks] {len(notebooks) - len(pending)} of {len(notebooks)} are finished")
        if not pending:
            return
        # Durations of last time, finished or outdated, are the best estimate there is.
        before = {n: read_object(self.receipt(n)).get("seconds") for n in pending}
        progress = Progress(before, min(WORKERS, len(pending)))
        failures: list[str] = []
        running: dict[Future[float], Path] = {}
        waiting = list(pending)
        with ProcessPoolExecutor(
            max_workers=progress.workers,
            mp_context=multiprocessing.get_context("spawn"),
            initializer=worker_settings,
            initargs=({store.HOME_VARIABLE: str(self.home)},),
        ) as pool:
            while running or (waiting and not failures):
                while waiting and not failures and len(running) < progress.workers:
                    notebook = waiting.pop(0)
                    running[self._submit(pool, notebook)] = notebook
                    progress.say(f"{notebook.stem}: started")
                finished, _ = wait(running, timeout=30, return_when=FIRST_COMPLETED)
                if not finished:
                    progress.say(f"running: {', '.join(n.stem for n in running.values())}")
                for future in finished:
                    notebook = running.pop(future)
                    try:
                        seconds = future.result()
                        self._sign(notebook, seconds)
                        progress.done(notebook, seconds)
                    except NotebookError as error:
                        failures.append(str(error))
                    except BrokenProcessPool:
                        failures.append(f"{notebook.name}: the process executing it was killed")
                    except (OSError, ValueError) as error:
                        failures.append(f"{notebook.name}: its results could not be kept: {error}")
        if failures:
            raise BuildError("\n\n".join(failures))

    def _submit(self, pool: ProcessPoolExecutor, notebook: Path) -> Future[float]:
        workplace = self._workplace(notebook)
        shutil.rmtree(workplace, ignore_errors=True)
        workplace.mkdir(parents=True)
        self.receipt(notebook).unlink(missing_ok=True)
        places = {
            "book/_executed/data": workplace,
            "HOME": self.home,
            "CHECKOUT": _PACKAGE.parents[1],
        }
        work = partial(
            execute,
            notebook,
            self.pages / notebook.name,
            self.parameters(notebook),
            cwd=notebook.parent,
            # Links that hold in notebooks/ must hold in book/_executed/, where the page lies.
            replacements={**paths_to_hide(**places), "(../book/": "(../"},
        )
        return pool.submit(work)

    def _sign(self, notebook: Path, seconds: float) -> None:
        workplace = self._workplace(notebook)
        data = self.pages / "data"
        data.mkdir(exist_ok=True)
        outputs = [self.pages / notebook.name]
        run_ids: set[str] = set()
        for file in sorted(workplace.iterdir()):
            if file.suffix == ".csv":
                run_ids |= _run_ids(file)
            outputs.append(file.replace(data / file.name))
        shutil.rmtree(workplace)
        receipt = {
            "key": self.key(notebook),
            "results": self.results(sorted(run_ids)),
            "outputs": {str(p.relative_to(self.pages)): file_sha256(p) for p in outputs},
            "seconds": round(seconds, 1),
            "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "machine": pages.machine(),
        }
        write_text(self.receipt(notebook), json.dumps(receipt, indent=1) + "\n")

    def write_pages(self, notebooks: Sequence[Path], profile: Profile) -> None:
        """Write what the book shows besides notebooks: cover, data sheet, provenance, drawings."""
        receipts = {n.stem: read_object(self.receipt(n)) for n in notebooks}
        named = {self.pages / path for r in receipts.values() for path in r.get("outputs", ())}
        for file in (self.pages / "data").glob("*"):
            if file not in named:
                file.unlink()  # left by a notebook that no longer writes it
        pages.write(self.home, profile, receipts)

    def book_inputs(self) -> str:
        """Hash of everything the book is built from."""
        skipped = {self.pages / "receipts", self.pages / "book.log"}
        digest = hashlib.sha256(json.dumps([library_hash(), pages.versions()]).encode())
        for file in [self.home / "_config.yml", *sorted((self.home / "book").rglob("*"))]:
            if (
                file.is_dir()
                or skipped & {file, file.parent}
                or any(file.match(pattern) for pattern in _UNFINISHED)
            ):
                continue
            digest.update(f"{file.relative_to(self.home)} {file_sha256(file)}\n".encode())
        return digest.hexdigest()

    def build_book(self) -> Path:
        """Build the book strictly, unless it is built; returns its first page.

        Sphinx repeats no warning of a page it does not read again, so a strict build starts afresh.
        """
        built, partial_folder = self.home / "_build", self.home / ".book.partial"
        index = built / "html" / "index.html"
        inputs = self.book_inputs()
        if read_object(built / "receipt.json").get("inputs") == inputs and index.is_file():
            say(f"[book] nothing has changed. Open {index}")
            return index
        say("[book] building")
        started = time.monotonic()
        shutil.rmtree(partial_folder, ignore_errors=True)
        command = [str(Path(sysconfig.get_path("scripts")) / "jupyter-book"), "build", "book"]
        command += ["-n", "-W", "--keep-going", "--config", "_config.yml"]
        command += ["--path-output", partial_folder.name]
        log = self.pages / "book.log"
        with log.open("w") as file:
            code = subprocess.run(
                command, cwd=self.home, stdout=file, stderr=subprocess.STDOUT, check=False
            ).returncode
        if code or not (partial_folder / "_build" / "html" / "index.html").is_file():
            lines = re.sub(r"\x1b\[[0-9;]*m", "", log.read_text()).splitlines()
            shutil.rmtree(partial_folder, ignore_errors=True)
            told = [line for line in lines if re.search("WARNING|ERROR|rror:", line)] or lines[-20:]
            raise BuildError(
                "\n".join(["the book did not build:", *told[:40], f"all of it: {log}"])
            )
        write_text(
            partial_folder / "_build" / "receipt.json", json.dumps({"inputs": inputs}) + "\n"
        )
        shutil.rmtree(built, ignore_errors=True)
        (partial_folder / "_build").replace(built)
        shutil.rmtree(partial_folder)
        say(f"[book] built in {clock(time.monotonic() - started)}. Open {index}")
        return index


class Progress:
    """Lines of text: which notebook, time elapsed, an estimate of the time left."""

    def __init__(self, expected: Mapping[Path, float | None], workers: int) -> None:
        """``expected``: seconds each pending notebook took last time, None if unknown."""
        self.expected, self.workers = dict(expected), workers
        self.total, self.seconds, self.started = len(expected), list[float](), time.monotonic()

    def left(self) -> float | None:
        """Seconds left, from last time's durations and the mean of this time's; None if neither."""
        known = self.seconds or [s for s in self.expected.values() if s is not None]
        if not known:
            return None
        mean = sum(known) / len(known)
        return sum(mean if s is None else s for s in self.expected.values()) / self.workers

    def say(self, what: str) -> None:
        """One line."""
        left = self.left()
        estimate = "" if left is None or not self.expected else f", about {clock(left)} left"
        elapsed = clock(time.monotonic() - self.started)
        done = f"{self.total - len(self.expected)}/{self.total}"
        say(f"[notebooks {done}] {what} | {elapsed} elapsed{estimate}")

    def done(self, notebook: Path, seconds: float) -> None:
        """Say that a notebook has finished."""
        del self.expected[notebook]
        self.seconds.append(seconds)
        self.say(f"{notebook.stem}: finished in {clock(seconds)}")


def library_hash() -> str:
    """Hash of the library's own files, as far as they can change a page."""
    digest = hashlib.sha256()
    for file in sorted(_PACKAGE.rglob("*")):
        if file.suffix in (".py", ".yaml"):
            digest.update(f"{file.relative_to(_PACKAGE)} {file_sha256(file)}\n".encode())
    return digest.hexdigest()


def _run_ids(table: Path) -> set[str]:
    frame = pd.read_csv(table, dtype=str, keep_default_na=False)
    columns = [name for name in frame.columns if name.endswith("run_id")]
    return {run_id for name in columns for run_id in frame[name]} - {""}
