"""Files and folders: whole or not at all, of two the first folder and the last file, and nothing left of dead processes."""

from __future__ import annotations

import errno
import os
import platform
import signal
import stat
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

from adaptive_margins.errors import AdaptiveMarginsError
from adaptive_margins.files import (
    DamagedError,
    WriteError,
    atomic_file,
    atomic_folder,
    check_folder,
    check_output,
    locked,
    remove_damaged,
    working_folder,
    write_checksums,
    write_text,
)
from conftest import flip, in_child


def test_a_file_appears_when_it_is_whole(tmp_path):
    path = tmp_path / "a" / "b" / "x.npy"
    for content in ("one", "two"):
        with atomic_file(path) as partial:
            partial.write_text(content)
            assert partial.parent == path.parent and partial.name.startswith(".x.npy.")
            assert not path.exists() or path.read_text() == "one"
        assert path.read_text() == content
    with pytest.raises(KeyboardInterrupt), atomic_file(path) as partial:
        partial.write_text("thr")
        raise KeyboardInterrupt
    with pytest.raises(ZeroDivisionError), atomic_file(path):
        _ = 1 / 0  # before anything was written
    assert path.read_text() == "two"
    assert list(path.parent.iterdir()) == [path]


def test_a_folder_appears_when_it_is_whole(tmp_path):
    path = tmp_path / "a" / "x"
    with pytest.raises(ZeroDivisionError), atomic_folder(path) as partial:
        (partial / "file").write_text("one")
        _ = 1 / 0
    assert list(path.parent.iterdir()) == []
    umask = os.umask(0o027)
    try:
        with atomic_folder(path) as partial:
            (partial / "file").write_text("one")
            assert not path.exists()
    finally:
        os.umask(umask)
    assert (path / "file").read_text() == "one"
    assert path.stat().st_mode & 0o777 == 0o750
    assert list(path.parent.iterdir()) == [path]


def fill_two(path: Path, **options) -> None:
    """The second begins and ends while the first is at work."""
    with atomic_folder(path, **options) as slower:
        (slower / "who").write_text("slower")
        with atomic_folder(path) as faster:
            (faster / "who").write_text("faster")


def test_the_first_of_two_folders_is_kept(tmp_path):
    fill_two(tmp_path / "x")
    assert (tmp_path / "x" / "who").read_text() == "faster"
    with pytest.raises(OSError, match="not empty"):
        fill_two(tmp_path / "y", same=lambda path: (path / "who").read_text() == "slower")
    assert (tmp_path / "y" / "who").read_text() == "faster"
    (tmp_path / "z").write_text("a file")
    with pytest.raises(NotADirectoryError), atomic_folder(tmp_path / "z"):
        pass
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x", "y", "z"]


def test_an_empty_folder_is_replaced(tmp_path, monkeypatch):
    """Also by Windows, which renames to no folder that exists."""
    rename = Path.rename

    def renamed(self, target):
        if target.exists():
            raise FileExistsError(
                errno.EEXIST, "Cannot create a file when that file already exists"
            )
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", renamed)
    (tmp_path / "x").mkdir()
    with atomic_folder(tmp_path / "x", same=lambda _: False) as partial:
        (partial / "file").touch()
    assert (tmp_path / "x" / "file").is_file()
    fill_two(tmp_path / "y")
    assert (tmp_path / "y" / "who").read_text() == "faster"


def test_the_last_of_two_files_is_kept(tmp_path):
    with atomic_file(tmp_path / "x") as slower:
        slower.write_text("slower")
        write_text(tmp_path / "x", "faster")
        assert (tmp_path / "x").read_text() == "faster"
    assert (tmp_path / "x").read_text() == "slower"
    assert list(tmp_path.iterdir()) == [tmp_path / "x"]


def test_a_text_that_cannot_be_written(tmp_path, monkeypatch):
    path = tmp_path / "a" / "note.json"
    write_text(path, "φ")
    assert path.read_bytes() == "φ".encode()

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(WriteError, match=rf"{path} could not be written: .*No space.*unchanged"):
        write_text(path, "two")
    assert path.read_text("utf-8") == "φ"
    assert list(path.parent.iterdir()) == [path]
    with pytest.raises(WriteError, match=r"note\.json/below could not be written"):
        write_text(path / "below", "three")


def test_checksums_are_those_of_sha256sum_and_find_every_change(tmp_path, capsys):
    folder = tmp_path / "folder"
    (folder / "model").mkdir(parents=True)
    check_folder(folder)  # of an older version: it has none
    for name in ("a.txt", "ä b.bin", "model/weights"):
        (folder / name).write_bytes(name.encode() * 9)
    (folder / ".hidden").touch()
    write_checksums(folder)
    listed = (folder / "SHA256SUMS").read_text().splitlines()
    assert [line[66:] for line in listed] == ["a.txt", "model/weights", "ä b.bin"]
    checked = subprocess.run(
        ["sha256sum", "--strict", "-c", "SHA256SUMS"], cwd=folder, capture_output=True, check=True
    )
    assert checked.stdout.count(b": OK\n") == 3
    check_folder(folder)
    flip(folder / "model" / "weights")
    for only in ("a.txt", "model", "ä b.bin"):
        check_folder(folder, only=only)
    for only in ("", "model/weights"):
        with pytest.raises(
            DamagedError, match=rf"model/weights .*SHA-256 \w{{64}}, .*{listed[1][:64]}"
        ):
            check_folder(folder, only=only)
    flip(folder / "model" / "weights")  # back
    for byte in range(0, 3 * 66, 6):
        flip(folder / "SHA256SUMS", byte)
        with pytest.raises(DamagedError):
            check_folder(folder)
        flip(folder / "SHA256SUMS", byte)
    remove_damaged(folder)  # nothing is wrong
    (folder / "a.txt").unlink()
    with pytest.raises(DamagedError, match=r"a\.txt .*no such file, expected"):
        check_folder(folder)
    assert in_child(lambda: remove_damaged(folder)) == ""  # a worker trusts its parent
    assert folder.is_dir()
    remove_damaged(folder)
    assert not folder.exists()
    assert "a.txt" in capsys.readouterr().err


def test_what_killed_processes_left_is_removed_and_nothing_else(tmp_path):
    def die(context, name):
        with context(tmp_path / name) as partial:
            (partial / "half" if partial.is_dir() else partial).write_text("ha")
            os.kill(os.getpid(), signal.SIGKILL)

    places = [(atomic_file, "x"), (atomic_folder, "x"), (atomic_folder, "y")]
    for context, name in places:
        assert in_child(lambda c=context, n=name: die(c, n)) == "died"
    names = sorted(p.name.split(".")[1] for p in tmp_path.iterdir())
    assert names in (["x", "y"], ["x", "x", "y"])  # the second removes what the first left
    # Of a living process, of another machine (whose processes are not known here), and of other files.
    names = ["x.elsewhere.99999999.abc", f"x.{platform.node()}.1.abc", "x", "xx"]
    others = [f".{name}.partial" for name in names]
    for name in others:
        (tmp_path / name).touch()
    write_text(tmp_path / "x", "whole")
    left = sorted(p.name for p in tmp_path.iterdir() if not p.name.startswith(".y."))
    assert left == sorted([*others, "x"])
    with atomic_folder(tmp_path / "y"):
        pass
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*others, "x", "y"])


# ---- what is not a regular file ------------------------------------------------------------------------------------


def through(path: Path, text: str = "through") -> None:
    check_output(path)
    with atomic_file(path) as partial:
        partial.write_text(text)


def test_a_pipe_is_written_into(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = subprocess.Popen(["cat", pipe], stdout=subprocess.PIPE)
    through(pipe)
    assert reader.communicate(timeout=20)[0] == b"through"
    assert pipe.is_fifo()
    assert list(tmp_path.iterdir()) == [pipe]


def test_a_device_and_a_descriptor_are_written_into(tmp_path):
    through(Path("/dev/null"))
    assert Path("/dev/null").is_char_device()
    # The file behind a descriptor keeps what is in it, and what is written next comes after.
    with (tmp_path / "log").open("wb") as log:
        for text in (b"first", b"last"):
            log.write(text)
            log.flush()
            through(Path(f"/dev/fd/{log.fileno()}"), " then ")
    assert (tmp_path / "log").read_text() == "first then last then "
    with (tmp_path / "log").open("rb") as log, pytest.raises(OSError):
        through(Path(f"/proc/self/fd/{log.fileno()}"))
    assert [path.name for path in tmp_path.iterdir()] == ["log"]


def test_the_target_of_a_link_is_replaced(tmp_path):
    (tmp_path / "below").mkdir()
    real = tmp_path / "below" / "real"
    real.write_text("old")
    for link, target in (("a", "below/real"), ("b", "a"), ("c", "below/new")):
        (tmp_path / link).symlink_to(target)
    through(tmp_path / "b")
    through(tmp_path / "c", "new")
    assert real.read_text() == "through"
    assert (tmp_path / "below" / "new").read_text() == "new"
    assert all((tmp_path / name).is_symlink() for name in "abc")
    assert {path.name for path in (tmp_path / "below").iterdir()} == {"real", "new"}
    (tmp_path / "d").symlink_to("below/folder")
    check_output(tmp_path / "d", folder=True)
    with atomic_folder(tmp_path / "d") as partial:
        (partial / "file").touch()
    assert (tmp_path / "below" / "folder" / "file").is_file()
    (tmp_path / "e").symlink_to("e")
    with pytest.raises(WriteError, match="symbolic links"):
        check_output(tmp_path / "e")


def test_a_replaced_file_keeps_its_mode_and_a_new_one_gets_the_usual(tmp_path):
    path = tmp_path / "x"
    umask = os.umask(0o027)
    try:
        through(path)
        assert stat.S_IMODE(path.stat().st_mode) == 0o640
        path.chmod(0o604)
        through(path)
        assert stat.S_IMODE(path.stat().st_mode) == 0o604
    finally:
        os.umask(umask)


@pytest.mark.parametrize(
    ("name", "folder", "reason"),
    [
        ("folder", False, "it is a folder"),
        ("file/x", False, "file is a file, not a folder"),
        ("file/x/y", True, "file is a file, not a folder"),
        ("x" * 300, False, "name too long"),
        ("folder", True, "not an empty folder"),
        ("file", True, "not an empty folder"),
        ("pipe", True, "not an empty folder"),
    ],
)
def test_what_cannot_be_written_is_refused_beforehand(tmp_path, name, folder, reason):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mine").touch()
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(WriteError, match=f"(?i){name} cannot be written: .*{reason}"):
        check_output(tmp_path / name, folder=folder)
    assert len(list(tmp_path.rglob("*"))) == 4


def test_an_unwritable_place_is_refused(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    for name in ("file", "new", "a/b/new"):
        check_output(tmp_path / name)
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # for root everything is writable
    for name in ("file", "new", "a/b/new"):
        with pytest.raises(WriteError, match="Permission denied"):
            check_output(tmp_path / name)


def test_a_long_name_is_written(tmp_path):
    path = tmp_path / ("ä" * 120)
    through(path)
    with locked(path):
        assert len(list(tmp_path.iterdir())) == 2
    assert list(tmp_path.iterdir()) == [path]


# ---- locks ---------------------------------------------------------------------------------------------------------

HOLD = """
import sys, time
from pathlib import Path
from adaptive_margins.files import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(float(sys.argv[2]))
"""


@contextmanager
def held(path: Path, seconds: float):
    """The lock of ``path`` in another process, for so many seconds."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, path, str(seconds)], stdout=subprocess.PIPE
    ) as process:
        assert process.stdout and process.stdout.readline() == b"held\n"
        yield process
        process.kill()


def test_a_lock_is_waited_for_or_refused(tmp_path, capsys):
    path = tmp_path / "out"
    with held(path, 0.5) as process:
        with (
            pytest.raises(WriteError, match=f"another process is writing {path}"),
            locked(path, wait=False),
        ):
            pass
        with locked(path):
            process.wait(20)
            assert process.returncode == 0
    assert capsys.readouterr().err == f"another process is writing {path}: waiting for it\n"
    assert list(tmp_path.iterdir()) == []


def test_long_names_that_begin_alike_have_locks_of_their_own(tmp_path):
    with locked(tmp_path / f"{'long' * 30}-1"), locked(tmp_path / f"{'long' * 30}-2", wait=False):
        pass
    assert all(len(path.name.encode()) < 255 for path in tmp_path.iterdir())


def test_a_killed_holder_does_not_block(tmp_path):
    path = tmp_path / "out"
    with held(path, 60) as process:
        process.kill()
        process.wait()
    with locked(path, wait=False):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_lock_file_that_cannot_be_removed_while_it_is_open(tmp_path, monkeypatch):
    """As on Windows."""

    def refuse(*_, **__):
        raise PermissionError(errno.EACCES, "The process cannot access the file")

    monkeypatch.setattr(Path, "unlink", refuse)
    for _ in range(2):
        with locked(tmp_path / "out", wait=False):
            pass


def test_one_at_a_time(tmp_path):
    """Four processes add to a number many times; the lock file is removed and made anew all the while."""
    program = """
import sys
from pathlib import Path
from adaptive_margins.files import locked
path = Path(sys.argv[1])
for _ in range(25):
    with locked(path):
        path.write_text(str(int(path.read_text()) + 1))
"""
    path = tmp_path / "number"
    path.write_text("0")
    workers = [subprocess.Popen([sys.executable, "-c", program, path]) for _ in range(3)]
    assert [worker.wait(60) for worker in workers] == [0, 0, 0]
    assert path.read_text() == "75"
    assert list(tmp_path.iterdir()) == [path]


def test_work_is_kept_for_the_next_call_but_not_of_a_refusal(tmp_path):
    output = tmp_path / "a" / "out"
    work = output.with_name("out.work")

    def call(error: BaseException | None) -> None:
        with working_folder(output) as given:
            assert given == work
            work.mkdir(exist_ok=True)
            if error:
                raise error

    with pytest.raises(AdaptiveMarginsError):
        call(AdaptiveMarginsError("no triples"))
    assert list(tmp_path.iterdir()) == []
    full = AdaptiveMarginsError("could not be written")
    full.__cause__ = OSError(errno.ENOSPC, "No space left on device")
    for error in (KeyboardInterrupt(), MemoryError(), full, AdaptiveMarginsError("refused later")):
        with pytest.raises(type(error)):
            call(error)
        assert list(output.parent.iterdir()) == [work]
    call(None)
    assert list(output.parent.iterdir()) == []
    output.mkdir()
    (output / "mine").touch()
    with pytest.raises(WriteError, match="not an empty folder"):
        call(None)
    assert list(output.parent.iterdir()) == [output]


def test_a_full_disk_is_told_with_the_name_of_the_file(tmp_path):
    path = tmp_path / "plot.png"
    with pytest.raises(OSError) as error, atomic_file(path):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert error.value.filename == str(path)
