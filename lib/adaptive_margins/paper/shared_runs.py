"""Finished runs of somebody else: read from a folder, an archive or a URL, checked, and taken."""

from __future__ import annotations

import json
import shutil
import tarfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Container
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import urlparse
from urllib.request import urlopen

from adaptive_margins import files
from adaptive_margins.distributed import is_first, wait
from adaptive_margins.errors import AdaptiveMarginsError
from adaptive_margins.paper.experiments import Experiments, static_rows
from adaptive_margins.paper.out_of_domain import FOLDER
from adaptive_margins.paper.plan import differences, planned_runs
from adaptive_margins.paper.reproduction import Reproduction
from adaptive_margins.paper.store import PROVENANCE, StoredRun, StoreError
from adaptive_margins.progress import bar, say
from adaptive_margins.runs import CODE_VERSION
from adaptive_margins.text_tables import size

ABOUT = "about.json"
"""In an archive of runs: whose they are."""
_RESERVE = 1 << 30  # bytes of the disk that stay free


class SharingError(AdaptiveMarginsError, RuntimeError):
    """Runs of somebody else that cannot be fetched or read."""


def take(reproduction: Reproduction, source: str) -> None:
    """Take finished runs of somebody else that a profile needs and that are missing here.

    A run is taken if its id is the hash of its configuration, its files have their checksums, and
    its results are complete. It is printed whose they are, and which are not taken and why; the
    former is also stored with each run (`StoredRun.provenance`).

    Args:
        source: a home folder or a folder of runs, an archive (.tar.gz, .zip), or its URL.

    Raises:
        SharingError: it cannot be fetched or read, has no runs, or does not fit on the disk.
    """
    if is_first():
        cache = reproduction.home / "cache"
        cache.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=cache) as work:
            path, url = Path(source), urlparse(source)
            name = path.resolve().name  # no path of this machine, and no password, is stored
            if url.hostname:
                name = f"{url.scheme}://{url.hostname}{url.path}"
            if "://" in source:
                _fetch(source, path := Path(work, "archive"))
            if not path.is_dir():
                _unpack(path, path := Path(work, "unpacked"))
            _take(reproduction, path, name)
    wait()


def needed_runs(experiments: Experiments) -> set[str]:
    """Ids of the runs of a profile, with each ε that Figure 3 may decide for."""
    static = static_rows(experiments).values()
    return {config.run_id for config in chain(planned_runs(experiments), *static)}


def _take(reproduction: Reproduction, source: Path, name: str) -> None:
    homes = [path for path in (source, *sorted(source.glob("*/"))) if (path / "runs").is_dir()]
    root, stores = (homes[0], ("runs", FOLDER)) if homes else (source, (".",))
    configs = [file for store in stores for file in sorted(root.glob(f"{store}/[!.]*/config.json"))]
    if not configs:
        raise SharingError(f"{name} has no runs; expected runs/ID/config.json, or ID/config.json")
    needed = needed_runs(reproduction.experiments)
    about, taken, here, refused = files.read_object(root / ABOUT), 0, 0, Counter[str]()
    theirs = about.pop("sources", {})
    for file in bar("reading runs", configs, unit="runs"):
        run: StoredRun[Any] = StoredRun(file.parent)
        store = FOLDER if run.path.parent.name == FOLDER else "runs"
        target = reproduction.home / store / run.run_id
        if target.is_dir():
            here += 1
        elif reason := _why_not(run, reproduction, needed) or _problem(run):
            refused[reason] += 1
        else:
            with files.atomic_folder(target) as partial:
                shutil.copytree(run.path, partial, dirs_exist_ok=True)
                if not run.provenance:  # else it came from a third person
                    values = json.dumps({**about, "source": name}, indent=1, ensure_ascii=False)
                    files.write_text(partial / PROVENANCE, values + "\n")
                files.write_checksums(partial)
            taken += 1
    lines = [f"{name}: {taken} runs are taken; {here} are here already"]
    lines += [f"  {key}: {value}" for key, value in about.items() if value]
    lines += [f"  not taken: {reason} ({count})" for reason, count in refused.items()]
    if any("collection" in reason for reason in refused):
        changed = differences(theirs, reproduction.inputs.collection.sources)
        lines.append(f"  sources of the collections: {', '.join(changed)}")
    say("\n".join(lines), always=True)


def _fetch(url: str, target: Path) -> None:
    try:
        if url.startswith(("https://", "http://")):
            opened = urlopen(url, timeout=60)
        else:
            import fsspec

            opened = fsspec.open(url, "rb").open()
        with opened, target.open("wb") as file, bar(f"fetching {url}", unit="MiB") as progress:
            while block := opened.read(1 << 20):
                _check_space(target, len(block))
                file.write(block)
                progress.update()
    except SharingError:
        raise
    except Exception as error:  # every kind of storage has other exceptions
        raise SharingError(
            f"{url} cannot be fetched ({error}); download it by hand, and name the file instead"
        ) from error


def _unpack(archive: Path, folder: Path) -> None:
    """Unpack regular files and folders, none of them outside ``folder``."""
    if not hasattr(tarfile, "data_filter"):
        raise SharingError(f"Python 3.11.4 is needed to unpack {archive}; name a folder instead")
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as packed:
                _check_space(folder, sum(info.file_size for info in packed.infolist()))
                packed.extractall(folder)  # a link becomes a file, ".." and drives are dropped
        else:
            with tarfile.open(archive) as tar:
                total = 0
                for member in tar:
                    _check_space(folder, total := total + member.size)
                tar.extractall(folder, filter="data")
    except (OSError, EOFError, tarfile.TarError, zipfile.BadZipFile, zlib.error) as error:
        raise SharingError(
            f"{archive} cannot be read ({error}); expected a folder with runs, or an archive of"
            " them (.tar.gz, .zip)"
        ) from error


def _check_space(place: Path, count: int) -> None:
    if count > (free := shutil.disk_usage(place.parent).free - _RESERVE):
        raise SharingError(
            f"more than {size(count)} do not fit on the disk, which has {size(free)}"
        )


def _why_not(run: StoredRun[Any], reproduction: Reproduction, needed: Container[str]) -> str:
    """Why the profile does not need a run; "" if it does."""
    if run.run_id in needed:
        return ""
    other = f"not of profile {reproduction.profile.name}"
    try:
        config = run.config
    except StoreError:  # perhaps of another version
        return other
    source, of_other_domains = getattr(config, "source", ""), run.path.parent.name == FOLDER
    if (
        of_other_domains
        and config.code_version == CODE_VERSION
        and (source in needed or not source)
    ):
        return ""  # if another collection is used here, it is never read
    here = {"collection": reproduction.inputs.fingerprint, "code_version": CODE_VERSION}
    same = config.model_copy(update=here)
    changed = differences(config.model_dump(mode="json"), same.model_dump(mode="json"))
    return ", ".join(changed) if same.run_id in needed else other


def _problem(run: StoredRun[Any]) -> str:
    """What is wrong with the files of a run; "" if nothing is."""
    try:
        config = run.config
        files.check_folder(run.path)
        names = ["curve.parquet", "checks.parquet", "targets.parquet"]
        names *= config.kind == "training"
        for mode, sets in (("rerank", [config.validation]), ("full", config.test_sets)):
            for name in sets:
                run.evaluation(mode, name)
                names.append(f"{mode}.{name}.run.gz")
        problems = [f"{name} is missing" for name in names if not (run.path / name).is_file()]
        problems += [f"{file.name} is a link" for file in run.path.rglob("*") if file.is_symlink()]
    except (StoreError, files.DamagedError) as error:
        problems = [str(error).split(";")[0].replace(f"{run.path}/", "")]
    return f"run {run.run_id}: {problems[0]}" if problems else ""
