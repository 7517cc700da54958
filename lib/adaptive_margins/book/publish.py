"""`make publish`: add a PDF and notebooks that install the library, check the book, archive it."""

from __future__ import annotations

import gzip
import os
import re
import subprocess
import tarfile
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from shutil import rmtree, which
from urllib.parse import unquote, urlparse

import nbformat
import yaml
from bs4 import BeautifulSoup

from adaptive_margins import __version__
from adaptive_margins.book.build import Site
from adaptive_margins.book.edition import BOOK
from adaptive_margins.book.site import CITE, PDF, configure
from adaptive_margins.errors import AdaptiveMarginsError
from adaptive_margins.files import (
    atomic_file,
    checksum_lines,
    file_sha256,
    home,
    locked,
    read_object,
    write_text,
)
from adaptive_margins.progress import bar, say

LEFTOVERS = re.compile(
    r"Traceback|<Figure size|IPython\.core|object at 0x|Loading weights|\b(?:nan|NaN|inf)\b"
    r"|\]\(\.\./|\{(?:doc|ref|numref|cite|term)[}:]|\(\s+\)|±\s*[,)]"
)
"""What a page shows if something went wrong: errors, empty values, unresolved references."""

_LINKS = "a[href], link[href], img[src], script[src], iframe[src]"

INSTALL = (
    "apt install --no-install-recommends latexmk texlive-latex-recommended texlive-latex-extra"
    " texlive-fonts-recommended texlive-xetex fonts-freefont-otf tex-gyre librsvg2-bin"
)


def problems(site: Path) -> list[str]:
    """Links that lead nowhere and `LEFTOVERS` on the pages of a built book, each with its page, and
    a weight above 10 MB without the PDF.
    """
    pages = {
        path.resolve(): BeautifulSoup(path.read_text("utf-8"), "html.parser")
        for path in sorted(site.glob("*.html"))
    }
    ids = {p: {t.get(k) for k in ("id", "name") for t in page(True)} for p, page in pages.items()}
    weight = sum(
        file.stat().st_size for file in site.rglob("*") if file.is_file() and file.suffix != ".pdf"
    )
    found = [f"{weight / 1e6:.1f} MB, expected at most 10; see: du -a"] * (weight > 10e6)
    for path, page in pages.items():
        links = [str(tag.get("href", tag.get("src"))) for tag in page.select(_LINKS)]
        for code in page(["script", "style", "pre", "code"]):
            code.extract()
        found += [f"{path.name}: {match[0]!r}" for match in LEFTOVERS.finditer(page.get_text())]
        for link in links:
            url = urlparse(link)
            if url.scheme or url.netloc or path.name == "404.html":  # whose links are absolute
                continue
            target = (site / unquote(url.path)).resolve() if url.path else path
            anchors = ids.get(target, {unquote(url.fragment)})
            if not target.is_file() or (url.fragment and unquote(url.fragment) not in anchors):
                found.append(f"{path.name}: link to {link}, which is not there")
    return found


def add_notebooks(source: Path, site: Path, repository: str) -> None:
    """Write ``notebooks/``, whose first cell installs the library, and Binder's environment."""
    done = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=source, capture_output=True, text=True, check=False
    )
    version = done.stdout.strip() or f"v{__version__}"
    requirement = f"adaptive-margins[cpu,lab] @ git+{repository}@{version}"
    install = (
        "# Where the library is not installed yet, as on Colab\nimport importlib.util\n\n"
        'if importlib.util.find_spec("adaptive_margins") is None:\n'
        f'    %pip install --quiet "{requirement}"'
    )
    (site / "notebooks").mkdir(exist_ok=True)
    for path in sorted((source / "notebooks").glob("*.ipynb")):
        notebook = nbformat.read(path, as_version=4)
        notebook.cells.insert(0, nbformat.v4.new_code_cell(install, id="install"))
        nbformat.write(notebook, site / "notebooks" / path.name)
    (site / "binder").mkdir(exist_ok=True)
    (site / "binder" / "requirements.txt").write_text(requirement + "\n")
    (site / "binder" / "runtime.txt").write_text("python-3.11\n")


def add_pdf(source: Path, site: Path) -> None:
    """Make the PDF of a built book that has none yet, and link it in the footer of each page."""
    if (made := site / f"{PDF}.pdf").is_file():
        return
    if absent := [name for name in ("latexmk", "xelatex", "rsvg-convert") if not which(name)]:
        say(f"[book] no PDF, for want of {', '.join(absent)}; on Debian and Ubuntu: {INSTALL}")
        return
    with locked(site.parent, wait=False):
        book = Site(home(), "")
        book.stage(source)
        if read_object(site.parent / "receipt.json").get("inputs") != book.book_inputs():
            rmtree(book.staged)
            raise SystemExit("the pages have changed since the book was built; type: make book")
        say("[book] making the PDF")
        book.build_pdf(made)
    for page in site.glob("*.html"):
        text = page.read_text("utf-8")
        page.write_text(text.replace(CITE, f'{CITE} · <a href="{made.name}">PDF</a>'), "utf-8")


def archive(members: Mapping[str, Path | bytes], target: Path) -> Path:
    """Pack files into ``target`` (.tar.gz), with a checksum next to it, and return it.

    The same files give the same archive.

    Args:
        members: path in the archive → file, or its content.
    """
    total = sum(m.stat().st_size if isinstance(m, Path) else len(m) for m in members.values())
    with (
        atomic_file(target) as partial,
        partial.open("wb") as file,
        gzip.GzipFile("", "wb", 6, file, mtime=0) as packed,
        tarfile.open(fileobj=packed, mode="w") as tar,
        bar(f"packing {target.name}", unit="bytes", total=total) as progress,
    ):
        for name, member in sorted(members.items()):
            info = tarfile.TarInfo(name)  # of nobody
            info.mtime = 315_532_800  # 1980, the earliest in a ZIP, as others may pack it
            with member.open("rb") if isinstance(member, Path) else BytesIO(member) as content:
                info.size = content.seek(0, os.SEEK_END)
                content.seek(0)
                tar.addfile(info, content)
            progress.update(info.size)
    sums = checksum_lines({target.name: file_sha256(target)})
    write_text(target.with_name(f"{target.name}.sha256"), sums)
    return target


def inside(folder: Path, place: str = "") -> dict[str, Path | bytes]:
    """The files in a folder and below it, by their paths in an archive, below ``place``."""
    return {
        f"{place}{file.relative_to(folder).as_posix()}": file
        for file in folder.rglob("*")
        if file.is_file()
    }


def main() -> None:
    """Check and archive the book that was built last; end with the problems, if there are any."""
    source, built = BOOK.parent, home() / "_build"
    site = built / "html"
    if not (site / "index.html").is_file():
        raise SystemExit(f"{site} has no book; build it with: make book")
    config = yaml.safe_load(configure((source / "_config.yml").read_text("utf-8"), ""))
    if repository := config.get("repository", {}).get("url"):
        add_notebooks(source, site, repository)
    try:
        add_pdf(source, site)
    except AdaptiveMarginsError as error:
        raise SystemExit(f"{error}\nThe PDF needs: {INSTALL}") from None
    if found := problems(site):
        raise SystemExit("\n".join([f"{len(found)} problems in {site}:", *found]))
    name = f"adaptive-margins-{__version__}"
    packed = archive(inside(site, f"{name}/"), built / f"{name}.tar.gz")
    say(f"[book] archived as {packed}")


if __name__ == "__main__":
    main()
