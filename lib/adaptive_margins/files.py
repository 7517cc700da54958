"""Atomic writes: files and folders are written under a temporary name and renamed at the end."""

from __future__ import annotations

import errno
import glob
import hashlib
import json
import multiprocessing
import os
import platform
import shutil
import stat
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from adaptive_margins.errors import AdaptiveMarginsError
from adaptive_margins.progress import say

CHECKSUMS = "SHA256SUMS"
"""The file of a folder's checksums, in the format of ``sha256sum``; ``sha256sum -c`` checks it."""
HOME_VARIABLE = "ADAPTIVE_MARGINS_HOME"
_NAME = 40  # characters of a name that a temporary one keeps; a file system allows 255 bytes


class WriteError(AdaptiveMarginsError, OSError):
    """A file or folder that cannot be written; the message has the path and reason."""


class DamagedError(AdaptiveMarginsError):
    """A file that is missing or differs from its checksum; the message has both."""


def check_output(path: Path, *, folder: bool = False) -> None:
    """Raise WriteError unless ``path`` can be written as a file, or with ``folder`` as a folder.

    A file may exist, also as a pipe, a device or a symbolic link; a folder must be empty. Nothing
    is created.
    """
    try:
        reason = _why_not(_destination(path), folder)
    except OSError as error:
        reason = error.strerror or str(error)
    if reason:
        raise WriteError(f"{path} cannot be written: {reason}")


def is_stdout(path: Path) -> bool:
    """Whether ``path`` is the standard output, as /dev/stdout is."""
    return _destination(path) == 1


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary file, which replaces ``path`` at the end, and is removed after an error.

    Parent folders are created, and the mode of an existing file is preserved. Of a symbolic link
    the target is replaced. The content is copied into a pipe, a device or a descriptor
    (/dev/stdout, /dev/fd/N). Errors pass through.
    """
    place = _destination(path)
    if isinstance(place, int) or _is_special(place):
        with tempfile.TemporaryDirectory() as folder:
            partial = Path(folder, path.name)
            yield partial
            # A descriptor is not opened again: the position in its file would be another one.
            closes = isinstance(place, Path)
            with partial.open("rb") as file, open(place, "wb", closefd=closes) as sink:
                shutil.copyfileobj(file, sink)
        return
    partial = _partial(place)
    try:
        with _named(partial, path):
            yield partial
            with suppress(FileNotFoundError):
                partial.chmod(stat.S_IMODE(place.stat().st_mode))
            partial.replace(place)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path, *, same: Callable[[Path], bool] = Path.is_dir) -> Iterator[Path]:
    """Yield a temporary folder, renamed to ``path`` at the end, and removed after an error.

    If ``path`` exists by then (another process did the same work) and ``same(path)`` is true, it is
    left unchanged. Of a symbolic link the target is created. Errors pass through.
    """
    place = Path(os.path.realpath(path))
    partial = _partial(place)
    try:
        with _named(partial, path):
            partial.mkdir()
            yield partial
            with suppress(OSError):  # Windows renames to no folder that exists, even if it is empty
                place.rmdir()
            try:
                partial.rename(place)
            except OSError:
                if not same(place):
                    raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write a small UTF-8 file atomically; WriteError if it cannot be written."""
    try:
        with atomic_file(path) as partial:
            partial.write_text(text, encoding="utf-8", newline="\n")
    except OSError as error:
        raise WriteError(
            f"{path} could not be written: {error.strerror or error}; its old content is unchanged"
        ) from error


@contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[None]:
    """Hold the lock of ``path`` (a file next to it, removed at the end), and wait for it if needed.

    Raises WriteError if another process holds the lock, and ``wait`` is False.
    """
    from filelock import FileLock, Timeout

    if _why_not_in(path):  # a read-only cache: nobody can write here
        yield
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    name = path.name
    if len(name) > _NAME:  # two long names may begin alike
        name = f"{name[:_NAME]}.{digest(name)}"
    lock = FileLock(path.with_name(f".{name}.lock"))
    try:
        lock.acquire(blocking=False)
    except Timeout:
        if not wait:
            raise WriteError(
                f"another process is writing {path}; wait for its end, or name another path"
            ) from None
        say(f"another process is writing {path}: waiting for it")
        lock.acquire()
    try:
        yield
    finally:
        # Removed while it is held: a process that waits for the removed file creates a new one.
        with suppress(PermissionError):  # Windows removes no open file; there, release does
            Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


@contextmanager
def working_folder(path: Path) -> Iterator[Path]:
    """Yield PATH.work, the folder that a killed call is resumed from; ``path`` is locked.

    The folder is removed at the end, and after an error of this library unless it existed before or
    a file could not be written. Raises WriteError as `check_output` and `locked` do.
    """
    check_output(path, folder=True)
    work = path.with_name(f"{path.name}.work")
    resumed = work.exists()
    created = [folder for folder in path.parents if not folder.exists()]
    try:
        with locked(path, wait=False):
            check_output(path, folder=True)  # another process may have written it just now
            try:
                yield work
            except AdaptiveMarginsError as error:
                if not resumed and not isinstance(error.__cause__, OSError):
                    shutil.rmtree(work, ignore_errors=True)
                raise
            shutil.rmtree(work, ignore_errors=True)
    finally:
        for folder in created:
            with suppress(OSError):  # it is not empty
                folder.rmdir()


def home() -> Path:
    """Return $ADAPTIVE_MARGINS_HOME, else this checkout, else the current folder: for results."""
    if given := os.environ.get(HOME_VARIABLE):
        place = Path(os.path.expanduser(given)).resolve()
        if place.exists() and not place.is_dir():
            raise WriteError(f"${HOME_VARIABLE} names {place}, which is a file; expected a folder")
        return place
    checkout = Path(__file__).resolve().parents[2]
    return checkout if (checkout / "pyproject.toml").is_file() else Path.cwd()


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; {} if the file is missing or damaged."""
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def digest(value: Any) -> str:
    """16 hex digits of the SHA-256 of a value as JSON with sorted keys; names cached results."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def file_sha256(path: Path) -> str:
    """Hex SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_checksums(folder: Path, name: str = CHECKSUMS, **known: str) -> None:
    """Write the SHA-256 of each file in a folder and below it, but for hidden ones.

    ``known`` adds checksums, by their files' paths from the folder.
    """
    paths = (file.relative_to(folder).as_posix() for file in folder.rglob("[!.]*"))
    found = {path: file_sha256(folder / path) for path in paths if (folder / path).is_file()}
    found.pop(name, None)  # an older one
    write_text(folder / name, checksum_lines(found | known))


def checksum_lines(found: Mapping[str, str]) -> str:
    """Path → SHA-256 as sorted lines of ``sha256sum``."""
    return "".join(f"{sha256}  {path}\n" for path, sha256 in sorted(found.items()))


def check_folder(folder: Path, name: str = CHECKSUMS, *, only: str = "") -> None:
    """Raise DamagedError if a file of a folder, or ``only`` that one, is missing or has changed.

    Folders of older versions have no checksums.
    """
    sums = folder / name
    lines = sums.read_text("utf-8", errors="replace").splitlines() if sums.is_file() else ()
    for expected, _, path in (line.partition("  ") for line in lines):
        if only in ("", path):
            file = folder / (path or name)  # a damaged line has none
            found = f"SHA-256 {file_sha256(file)}" if file.is_file() else "no such file"
            if found != f"SHA-256 {expected}":
                raise DamagedError(
                    f"{file} was changed or damaged: {found}, expected SHA-256 {expected};"
                    f" restore it from a copy, or delete {folder}"
                )


def remove_damaged(cache: Path) -> None:
    """Remove a folder that differs from its checksums, with a message, to be computed again."""
    try:
        if multiprocessing.parent_process() is None:  # it has checked what its workers read
            check_folder(cache)
    except DamagedError as error:
        say(f"{error}; it is removed and computed again", always=True)
        shutil.rmtree(cache)


def folder_bytes(folder: Path) -> int:
    """Bytes of all files in a folder and those below it."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _destination(path: Path) -> Path | int:
    """The target of ``path``: a path, or the number of an open descriptor of this process."""
    for _ in range(40):
        folder = Path(os.path.realpath(path.parent))
        descriptors = (Path(f"/proc/{os.getpid()}/fd"), Path("/dev/fd"))
        if folder in descriptors and path.name.isdecimal():
            return int(path.name)
        path = folder / path.name
        if not path.is_symlink():
            return path
        path = folder / os.readlink(path)
    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))


def _is_special(path: Path) -> bool:
    """Whether ``path`` is a pipe or a device."""
    return path.exists() and not path.is_file() and not path.is_dir()


def _why_not(place: Path | int, folder: bool) -> str:
    """Why a file or a folder cannot be written there; "" if it can."""
    if isinstance(place, int):
        os.fstat(place)
        return "it is not a folder" if folder else ""
    if folder:
        if place.exists() and not (place.is_dir() and not any(place.iterdir())):
            return "it exists and is not an empty folder; remove it or name another"
        if place.is_mount():
            return "it is where a file system is mounted; name a new folder below it"
    elif place.is_dir():
        return "it is a folder; expected the name of a file"
    elif place.exists() and not os.access(place, os.W_OK):
        return os.strerror(errno.EACCES)
    elif _is_special(place):
        return ""
    return _why_not_in(place)


def _why_not_in(place: Path) -> str:
    """Why nothing can be created in the (future) parent folder of ``place``; "" if it can."""
    place.exists()  # a name that is too long raises an error
    above = next(folder for folder in place.parents if folder.exists())
    if not above.is_dir():
        return f"{above} is a file, not a folder"
    return "" if os.access(above, os.W_OK | os.X_OK) else f"{above}: {os.strerror(errno.EACCES)}"


@contextmanager
def _named(partial: Path, path: Path) -> Iterator[None]:
    """Let errors name ``path`` instead of ``partial``, also if the disk is full."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            error.filename = str(path)
        if isinstance(error.filename, str):
            error.filename = error.filename.replace(str(partial), str(path))
            error.filename2 = None
        raise


def _partial(path: Path) -> Path:
    """An unused temporary name for ``path``; leftovers of this machine's killed processes go."""
    path.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{path.name[:_NAME]}.{platform.node()}."
    for left in path.parent.glob(f"{glob.escape(prefix)}*.partial"):
        pid = left.name.removeprefix(prefix).split(".")[0]
        if pid.isdecimal() and not psutil.pid_exists(int(pid)):
            if left.is_dir():
                shutil.rmtree(left, ignore_errors=True)  # another process may be at it, too
            else:
                left.unlink(missing_ok=True)
    return path.with_name(f"{prefix}{os.getpid()}.{uuid.uuid4().hex[:8]}.partial")
