"""`make book`: runs → executed notebooks → book. Finished steps are not repeated.

An executed notebook is finished if its receipt matches. The receipt is written last and holds the
hashes of all inputs (notebook, parameters, library, package versions, results) and outputs. The
book is finished if ``_build/`` holds the hash of all pages. An interrupted step has no receipt.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sysconfig
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd

from adaptive_margins.book import edition, loss_figures, pages
from adaptive_margins.book import site as web
from adaptive_margins.book.execute import (
    NotebookError,
    Scalar,
    check_parameters,
    execute,
    parameter_defaults,
    paths_to_hide,
    worker_settings,
)
from adaptive_margins.device import machine
from adaptive_margins.errors import AdaptiveMarginsError
from adaptive_margins.files import HOME_VARIABLE, file_sha256, locked, read_object, write_text
from adaptive_margins.files import home as default_home
from adaptive_margins.profiles.config import Profile
from adaptive_margins.profiles.load import load_profile
from adaptive_margins.progress import bar, clock, now, say

WORKERS = 2
"""Notebooks executed at a time. They read results rather than compute, so memory sets the limit."""

_PACKAGE = Path(__file__).resolve().parents[1]
_BUILD = [str(Path(sysconfig.get_path("scripts")) / "jupyter-book"), "build", "book"]
_BUILD += ["-n", "-W", "--keep-going", "--config", "_config.yml", "--path-output", ".", "--builder"]
_UNFINISHED = ("*.running.ipynb", "*.failed.ipynb")


class BuildError(AdaptiveMarginsError, RuntimeError):
    """The book was not built; the message names the notebook or page, and what to look at."""


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
    """Execute the notebooks of a checkout on ``profile`` and build the book.

    Args:
        profile: name of a profile, or a YAML file.
        home: where results, pages and book go (default: `files.home`).
        notebooks: some by number or name (``["02"]``): then only they are executed, no book is
            built, and the folder of the pages is returned.
        every: includes the long one (`pages.LONG`); without, its page is what was executed before,
            or its committed summary.
        force: execute notebooks that are finished, too.
        run: computes the runs that are missing; called once, after all cheap checks and before the
            first notebook.
        source: the checkout with ``notebooks/``, ``book/`` and ``_config.yml``.

    Returns:
        The page to open.

    Raises:
        BuildError, NotebookError or ProfileError.
    """
    home, source = (home or default_home()).resolve(), (source or _PACKAGE.parents[1]).resolve()
    if profile.endswith((".yaml", ".yml")):
        profile = str(Path(profile).resolve())  # notebooks run in another folder
    settings = load_profile(profile)
    if not (source / "_config.yml").is_file():
        raise BuildError(f"{source} is no checkout: it has no _config.yml; the book needs one")
    site = Site(home, profile)
    chosen = select(source / "notebooks", notebooks)
    if any(notebook.stem == pages.OWN for notebook in chosen):
        raise BuildError(
            f"{pages.OWN} takes a collection of yours, not a profile, and is no page of the book;"
            f" open it in JupyterLab, or: papermill notebooks/{pages.OWN}.ipynb out.ipynb"
            " -k python3 -p source FOLDER -p output ENCODER"
        )
    if notebooks is None and not every:
        chosen = [n for n in chosen if n.stem != pages.LONG or site.finished(n)]
    for notebook in chosen:
        check_parameters(notebook, site.parameters(notebook))
    site.pages.mkdir(parents=True, exist_ok=True)
    with locked(home / "_build", wait=False):
        if run is not None:
            run()
        site.execute(chosen, force=force)
        if notebooks is not None:
            return site.pages
        site.write_pages(chosen, settings, source / "book" / pages.SUMMARY)
        site.stage(source)
        return site.build_book()


def select(folder: Path, names: Sequence[str] | None = None) -> list[Path]:
    """Numbered notebooks of ``folder``: all but `pages.OWN`, or those of these numbers or names."""
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
    """Output of the build: ``HOME/book/_executed`` and ``HOME/_build``."""

    home: Path
    profile: str

    @property
    def pages(self) -> Path:
        """The folder of generated pages."""
        return self.home / "book" / "_executed"

    @property
    def staged(self) -> Path:
        """The folder that Sphinx reads and writes, which is removed once the book is complete."""
        return self.home / ".book.partial"

    def receipt(self, notebook: Path) -> Path:
        """Path of a notebook's receipt."""
        return self.pages / "receipts" / f"{notebook.stem}.json"

    def _workplace(self, notebook: Path) -> Path:
        # A separate folder: what a notebook writes counts only once it has finished.
        return self.pages / f".data-{notebook.stem}"

    def parameters(self, notebook: Path) -> dict[str, Scalar]:
        """What the build passes to a notebook: nothing to one that takes no profile."""
        if "profile" not in parameter_defaults(notebook):
            return {}
        return {"profile": self.profile, "data_folder": str(self._workplace(notebook))}

    def key(self, notebook: Path) -> dict[str, Any]:
        """Inputs that determine an executed notebook, apart from results of runs."""
        about = edition.place(self.profile) / "about.json"
        settings = load_profile(self.profile).model_dump_json()
        supplied = [p for p in sorted((self.home / "supplied").rglob("*")) if p.is_file()]
        return {
            "notebook": file_sha256(notebook),
            "profile": [self.profile, hashlib.sha256(settings.encode()).hexdigest()],
            "library": library_hash(),
            "edition": file_sha256(about) if about.is_file() else "",
            "supplied": {str(p.relative_to(self.home)): file_sha256(p) for p in supplied},
            "versions": pages.versions(),
        }

    def results(self, run_ids: Sequence[str]) -> dict[str, str]:
        """Run id → hash of its result.json ("" if the store does not have it)."""
        found = dict.fromkeys(run_ids, "")
        for store in pages.STORES:
            files = {run_id: self.home / store / run_id / "result.json" for run_id in run_ids}
            found |= {run_id: file_sha256(p) for run_id, p in files.items() if p.is_file()}
        return found

    def finished(self, notebook: Path) -> bool:
        """Whether the notebook's receipt matches what is on disk."""
        receipt = read_object(self.receipt(notebook))
        try:
            return (
                receipt["key"] == self.key(notebook)
                and receipt["results"] == self.results(list(receipt["results"]))
                and all(file_sha256(self.pages / p) == h for p, h in receipt["outputs"].items())
            )
        except (KeyError, OSError, AttributeError):
            return False

    def execute(self, notebooks: Sequence[Path], *, force: bool = False) -> None:
        """Execute what is not finished, `WORKERS` at a time; a failure cancels those that wait."""
        pending = [n for n in notebooks if force or not self.finished(n)]
        if len(pending) < len(notebooks):
            say(f"[notebooks] {len(notebooks) - len(pending)} of {len(notebooks)} are finished")
        if not pending:
            return
        failures: list[str] = []
        with (
            ProcessPoolExecutor(
                min(WORKERS, len(pending)),
                mp_context=multiprocessing.get_context("spawn"),
                initializer=worker_settings,
                initargs=({HOME_VARIABLE: str(self.home), "OMP_NUM_THREADS": _threads()},),
            ) as pool,
            bar("executing notebooks", total=len(pending), unit="notebooks") as progress,
        ):
            # The last notebooks train and rank by themselves: the longest start first.
            futures = {self._submit(pool, notebook): notebook for notebook in reversed(pending)}
            for future in as_completed(futures):
                if future.cancelled():
                    continue
                notebook = futures[future]
                try:
                    self._sign(notebook, future.result())
                    progress.update()
                except NotebookError as error:
                    failures.append(str(error))
                except BrokenProcessPool:
                    failures.append(f"{notebook.name}: the process executing it was killed")
                except (OSError, ValueError) as error:
                    failures.append(f"{notebook.name}: its results could not be saved: {error}")
                if failures:
                    for other in futures:  # shutdown(cancel_futures=True) would never end the loop
                        other.cancel()
        if failures:
            raise BuildError("\n\n".join(failures))

    def _submit(self, pool: ProcessPoolExecutor, notebook: Path) -> Future[float]:
        workplace = self._workplace(notebook)
        shutil.rmtree(workplace, ignore_errors=True)
        workplace.mkdir(parents=True)
        self.receipt(notebook).unlink(missing_ok=True)
        hidden = {
            "book/_executed/data": workplace,
            "HOME": self.home,
            "CHECKOUT": _PACKAGE.parents[1],
        }
        return pool.submit(
            execute,
            notebook,
            self.pages / notebook.name,
            self.parameters(notebook),
            cwd=notebook.parent,
            replacements=paths_to_hide(**hidden),
        )

    def _sign(self, notebook: Path, seconds: float) -> None:
        """Move what a notebook wrote to its place, and write its receipt."""
        workplace = self._workplace(notebook)
        data = self.pages / "data"
        data.mkdir(exist_ok=True)
        outputs = [self.pages / notebook.name]
        run_ids: set[str] = set()
        for file in sorted(workplace.iterdir()):
            if file.suffix == ".csv":
                run_ids |= named_runs(pd.read_csv(file, dtype=str, keep_default_na=False))
            outputs.append(file.replace(data / file.name))
        shutil.rmtree(workplace)
        receipt = {
            "key": self.key(notebook),
            "results": self.results(sorted(run_ids)),
            "outputs": {str(p.relative_to(self.pages)): file_sha256(p) for p in outputs},
            "seconds": round(seconds, 1),
            "finished": now(),
            "machine": machine(),
        }
        write_text(self.receipt(notebook), json.dumps(receipt, indent=1) + "\n")

    def write_pages(self, notebooks: Sequence[Path], profile: Profile, summary: Path) -> None:
        """Write what the book shows besides notebooks; remove what no notebook writes any more."""
        receipts = {n.stem: read_object(self.receipt(n)) for n in notebooks}
        texts = pages.texts(self.home, profile, receipts, summary)
        for name, text in texts.items():
            write_text(self.pages / name, text)
        images = self.pages / "images"
        images.mkdir(exist_ok=True)
        loss_figures.targets().savefig(images / "targets.png", dpi=200)
        current = {self.pages / path for r in receipts.values() for path in r.get("outputs", ())}
        current |= {self.pages / name for name in [*texts, *(n.name for n in notebooks)]}
        found = [*(self.pages / "data").glob("*"), *self.pages.glob("[0-9][0-9]_*")]
        for file in set(found) - current:
            if not any(file.match(pattern) for pattern in _UNFINISHED):
                file.unlink()

    def stage(self, source: Path) -> None:
        """Copy pages written by hand, and next to them those of the build, to `staged`.

        All are in one folder, so that a page has an address to cite: ``/05_comparison.html``.
        """
        shutil.rmtree(self.staged, ignore_errors=True)
        ignored = shutil.ignore_patterns("_executed", "__pycache__", "*.egg-info")
        for folder in ("book", "lib"):  # pages quote the code
            shutil.copytree(source / folder, self.staged / folder, ignore=ignored)
        book, config = self.staged / "book", (source / "_config.yml").read_text("utf-8")
        receipts = map(read_object, (self.pages / "receipts").glob("*.json"))
        newest = max((receipt.get("finished", "") for receipt in receipts), default="")
        text = web.configure(config, newest[:10], pages.values(source))
        (self.staged / "_config.yml").write_text(text, "utf-8")
        for name in web.ABOUT:
            if (source / name).is_file():
                shutil.copy(source / name, book)
        if (book / "CITATION.cff").is_file():
            (book / "software.bib").write_text(web.bibtex(book / "CITATION.cff"), "utf-8")
        ignored = shutil.ignore_patterns("receipts", "book.log", ".*", *_UNFINISHED)
        shutil.copytree(self.pages, book, ignore=ignored, dirs_exist_ok=True)
        for page in [*book.glob("*.ipynb"), *book.glob("*.md")]:
            text = page.read_text("utf-8")  # with links that hold in notebooks/
            page.write_text(re.sub(r"\(\.\./book/(_executed/)?", "(", text), "utf-8")

    def book_inputs(self) -> str:
        """Hash of everything the book is built from."""
        digest = hashlib.sha256(json.dumps([library_hash(), pages.versions()]).encode())
        for file in [self.staged / "_config.yml", *sorted((self.staged / "book").rglob("*"))]:
            if file.is_file():
                digest.update(f"{file.relative_to(self.staged)} {file_sha256(file)}\n".encode())
        return digest.hexdigest()

    def build_book(self) -> Path:
        """Build the book of `staged` strictly, unless it is built; returns its first page.

        Sphinx repeats no warning of a page that it does not read again, so it starts from scratch,
        in a folder that replaces the last book once it is complete.
        """
        built, partial = self.home / "_build", self.staged
        index = built / "html" / "index.html"
        inputs = self.book_inputs()
        if read_object(built / "receipt.json").get("inputs") == inputs and index.is_file():
            shutil.rmtree(partial)
            say(f"[book] nothing has changed. Open {index}")
            return index
        say("[book] building")
        started = time.monotonic()
        self._run([*_BUILD, "html"], partial / "_build" / "html" / "index.html")
        receipt = json.dumps({"inputs": inputs}) + "\n"
        write_text(partial / "_build" / "receipt.json", receipt)
        shutil.rmtree(built, ignore_errors=True)
        (partial / "_build").replace(built)
        shutil.rmtree(partial)
        say(f"[book] built in {clock(time.monotonic() - started)}. Open {index}")
        return index

    def build_pdf(self, target: Path) -> None:
        """Build the PDF of `staged`, which is removed."""
        text = self.staged / "_build" / "latex" / f"{web.PDF}.tex"
        self._run([*_BUILD, "latex"], text)
        latexmk = ["env", "SOURCE_DATE_EPOCH=0", "latexmk", "-cd", "-xelatex", "-halt-on-error"]
        made = text.with_suffix(".pdf")
        self._run([*latexmk, "-interaction=nonstopmode", str(text)], made)
        made.replace(target)
        shutil.rmtree(self.staged)

    def _run(self, command: list[str], result: Path) -> None:
        log = self.pages / "book.log"
        with log.open("w") as file:
            done = subprocess.run(
                command, cwd=self.staged, stdout=file, stderr=subprocess.STDOUT, check=False
            )
        if done.returncode or not result.is_file():
            text = log.read_text(errors="replace").replace(f"{self.staged}/", "")
            shutil.rmtree(self.staged, ignore_errors=True)
            lines = re.sub(r"\x1b\[[0-9;]*m", "", text).splitlines()
            found = [x for x in lines if re.search("WARNING|ERROR|rror:|^!", x)] or lines[-20:]
            message = ["the book did not build:", *found[:40], f"all of it: {log}"]
            raise BuildError("\n".join(message))


def _threads() -> str:
    """Threads of a kernel, so that `WORKERS` of them share the cores: more only wait."""
    return os.environ.get("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // WORKERS)))


@cache
def library_hash() -> str:
    """Hash of the library's files, as far as they can change a page."""
    digest = hashlib.sha256()
    for file in sorted(_PACKAGE.rglob("*")):
        if file.suffix in (".py", ".yaml", ".csv", ".md", ".html", ".mplstyle"):
            digest.update(f"{file.relative_to(_PACKAGE)} {file_sha256(file)}\n".encode())
    return digest.hexdigest()


def named_runs(frame: pd.DataFrame) -> set[str]:
    """All ids of runs that a frame names, those of supplied runs ("supplied: NAME") included."""
    single = [name for name in frame.columns if name.endswith("run_id")]
    found = {run_id for name in single for run_id in frame[name]}
    found.update(run_id for ids in frame.get("run_ids", ()) for run_id in ids.split())
    return found - {""}
