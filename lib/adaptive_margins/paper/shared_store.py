"""Runs of several machines, in a folder that all mount or a bucket; a run is computed by one.

Who computes a run holds its lease: a small file, created exclusively and rewritten every `RENEWED`
seconds. Clocks of machines are not compared: whoever finds another's lease takes the run over once
the file has not changed for `EXPIRY` seconds of its own monotonic clock, by creating the lease's
next generation, exclusively, so that one of several succeeds. An owner that was only stopped or cut
off finds that generation when it renews its own, and gives the run up.
"""

from __future__ import annotations

import os
import platform
import tarfile
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import obstore
from obstore.exceptions import AlreadyExistsError

from adaptive_margins.files import atomic_folder
from adaptive_margins.paper.store import R, Store, StoredRun, StoreError
from adaptive_margins.progress import say
from adaptive_margins.runs import RunConfig

RENEWED, EXPIRY = 20.0, 120.0
PATIENT: Any = {"max_retries": 60, "retry_timeout": timedelta(minutes=10)}
"""How long calls wait for a bucket that does not answer; but not the first one, of `open_store`."""


def open_store(url: str, folder: Path) -> Store:
    """The store in ``folder``, shared through ``url`` if that is not empty.

    If ``url`` is a folder, ``folder`` becomes a link to it.

    Raises:
        StoreError: the scheme is unknown, or it cannot be written.
    """
    if not url:
        return Store(folder)
    try:
        if "://" in url:
            bucket = obstore.store.from_url(url, retry_config={"max_retries": 3})
            store: Store = SharedStore(folder, obstore.store.from_url(url, retry_config=PATIENT))
        else:
            bucket = obstore.store.LocalStore(url, mkdir=True)
            store = Store(folder)
            store.leases = Leases(bucket)
            folder.parent.mkdir(parents=True, exist_ok=True)
            with suppress(FileExistsError):
                folder.symlink_to(os.path.abspath(url), target_is_directory=True)
            if not folder.samefile(url):
                raise FileExistsError(f"{folder} exists; move its runs to {url}, and remove it")
        with Leases(bucket).held(f"probe-{uuid4().hex}", ""):
            return store
    except Exception as error:  # of any of its kinds
        reason = str(error).partition("\n")[0]
        raise StoreError(f"the store {url} cannot be written: {reason}") from error


class LeasedError(StoreError):
    """A run that another process computes; ``args`` are its id and the content of the lease."""

    def __str__(self) -> str:
        return f"run {self.args[0]} is computed by another process ({self.args[1]})"


class Leases:
    """Leases in a folder or bucket."""

    def __init__(self, bucket: Any) -> None:
        self.bucket = bucket

    @contextmanager
    def held(self, run: str, owner: str, stale: str | None = None) -> Iterator[Callable[[], None]]:
        """Hold the lease of a run's id; yields a function that raises LeasedError once it is lost.

        It is taken over if its content is ``stale``, and from the same ``owner``, a driver, which
        starts a run again only after the end of a worker. Raises LeasedError if another holds it.
        """
        earlier = self._generations(run)
        content = self._read(f"{run}.{earlier[-1]}") if earlier else stale
        if content != stale and (content or "").split()[:1] != [owner]:
            raise LeasedError(run, content)
        mine = 1 + (earlier[-1] if earlier else 0)
        name, written = f"{run}.{mine}", f"{owner} {platform.node()} {os.getpid()}"
        ended, lost = threading.Event(), threading.Event()

        def renew() -> None:
            last = written
            while not ended.wait(RENEWED) and not lost.is_set():
                try:
                    if self._generations(run)[-1:] != [mine] or self._read(name) != last:
                        lost.set()
                        say(f"run {run}: another process took it over; it is given up here")
                    else:
                        self._write(name, following := f"{written} {uuid4().hex}")
                        last = following
                except Exception as error:  # the store may be back soon
                    say(f"run {run}: its lease is not renewed, trying again: {error}")

        def check() -> None:
            if lost.is_set():
                raise LeasedError(run, "")

        thread = threading.Thread(target=renew, daemon=True)
        try:
            self._write(name, written, "create")
        except AlreadyExistsError:
            raise LeasedError(run, "") from None
        thread.start()
        try:
            yield check
        finally:
            ended.set()
            thread.join()
            for generation in [] if lost.is_set() else [*earlier, mine]:
                with suppress(Exception):  # what is not removed expires
                    self.bucket.delete(f".leases/{run}.{generation}")

    def _generations(self, run: str) -> list[int]:
        names = [found["path"].rpartition("/")[2] for found in _list(self.bucket, ".leases")]
        return sorted(int(n.partition(".")[2]) for n in names if n.startswith(f"{run}."))

    def _read(self, name: str) -> str:
        with suppress(FileNotFoundError):  # released just now
            return bytes(self.bucket.get(f".leases/{name}").bytes()).decode()
        return ""

    def _write(self, name: str, content: str, mode: str = "overwrite") -> None:
        self.bucket.put(f".leases/{name}", content.encode(), mode=mode)


def _list(bucket: Any, prefix: str | None = None) -> Any:
    return bucket.list_with_delimiter(prefix)["objects"]


class SharedStore(Store):
    """A folder of runs, and a bucket to share them in: one archive for each, written atomically."""

    def __init__(self, folder: Path, bucket: Any) -> None:
        super().__init__(folder)
        self.bucket = bucket
        self.leases = Leases(bucket)
        self._known: set[str] = set()

    def _has_archive(self, config: RunConfig) -> bool:
        with suppress(FileNotFoundError):
            self.bucket.head(f"{config.run_id}.tar")
            self._known.add(config.run_id)
        return config.run_id in self._known

    def has(self, config: RunConfig) -> bool:
        """Whether the run is finished, here or there."""
        return super().has(config) or self._has_archive(config)

    def missing(self, configs: Iterable[R]) -> list[R]:
        """Those that are not finished there, by one listing; runs of this folder alone go there."""
        configs = list(dict.fromkeys(configs))
        absent = super().missing(configs)
        if absent or not self._known.issuperset(config.run_id for config in configs):
            self._known = {found["path"].removesuffix(".tar") for found in _list(self.bucket)}
        for config in set(configs).difference(absent):
            if config.run_id not in self._known:
                with suppress(LeasedError), self.leases.held(config.run_id, uuid4().hex):
                    self.publish(config)
        return [config for config in configs if config.run_id not in self._known]

    def get(self, config: R) -> StoredRun[R]:
        """The finished run, copied here if it is only there; StoreError if there is none."""
        if not super().has(config) and self._has_archive(config):
            with tempfile.TemporaryFile() as file, atomic_folder(self.path(config)) as folder:
                file.writelines(self.bucket.get(f"{config.run_id}.tar").stream())
                file.seek(0)
                with tarfile.open(fileobj=file) as archive:
                    archive.extractall(folder, filter="data")
        return super().get(config)

    def publish(self, config: RunConfig) -> None:
        """Copy a finished run there, unless it has been."""
        if not self._has_archive(config):
            with tempfile.TemporaryDirectory() as folder:
                with tarfile.open(file := Path(folder, "run.tar"), "w") as archive:
                    archive.add(self.path(config), arcname=".")
                self.bucket.put(f"{config.run_id}.tar", file)
            self._known.add(config.run_id)
