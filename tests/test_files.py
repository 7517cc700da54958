"""Files and folders: whole or not at all, of two the first folder and the last file, and nothing left of dead processes."""

from __future__ import annotations

import errno
import os
import platform
import signal
from pathlib import Path

import pytest

from adaptive_margins.files import WriteError, whole_file, whole_folder, write_text
from conftest import in_child


def test_a_file_appears_when_it_is_whole(tmp_path):
    path = tmp_path / "a" / "b" / "x.npy"
    for content in ("one", "two"):
        with whole_file(path) as partial:
            partial.write_text(content)
            assert partial.parent == path.parent and partial.name.startswith(".x.npy.")
            assert not path.exists() or path.read_text() == "one"
        assert path.read_text() == content
    with pytest.raises(KeyboardInterrupt), whole_file(path) as partial:
        partial.write_text("thr")
        raise KeyboardInterrupt
    with pytest.raises(ZeroDivisionError), whole_file(path):
        _ = 1 / 0  # before anything was written
    assert path.read_text() == "two"
    assert list(path.parent.iterdir()) == [path]


def test_a_folder_appears_when_it_is_whole(tmp_path):
    path = tmp_path / "a" / "x"
    with pytest.raises(ZeroDivisionError), whole_folder(path) as partial:
        (partial / "file").write_text("one")
        _ = 1 / 0
    assert list(path.parent.iterdir()) == []
    umask = os.umask(0o027)
    try:
        with whole_folder(path) as partial:
            (partial / "file").write_text("one")
            assert not path.exists()
    finally:
        os.umask(umask)
    assert (path / "file").read_text() == "one"
    assert path.stat().st_mode & 0o777 == 0o750
    assert list(path.parent.iterdir()) == [path]


def fill_two(path: Path, **options) -> None:
    """The second begins and ends while the first is at work."""
    with whole_folder(path, **options) as slower:
        (slower / "who").write_text("slower")
        with whole_folder(path) as faster:
            (faster / "who").write_text("faster")


def test_the_first_of_two_folders_is_kept(tmp_path):
    fill_two(tmp_path / "x")
    assert (tmp_path / "x" / "who").read_text() == "faster"
    with pytest.raises(OSError, match="not empty"):
        fill_two(tmp_path / "y", same=lambda path: (path / "who").read_text() == "slower")
    assert (tmp_path / "y" / "who").read_text() == "faster"
    (tmp_path / "z").write_text("a file")
    with pytest.raises(NotADirectoryError), whole_folder(tmp_path / "z"):
        pass
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x", "y", "z"]


def test_the_last_of_two_files_is_kept(tmp_path):
    with whole_file(tmp_path / "x") as slower:
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


def test_what_killed_processes_left_is_removed_and_nothing_else(tmp_path):
    def die(context, name):
        with context(tmp_path / name) as partial:
            (partial / "half" if partial.is_dir() else partial).write_text("ha")
            os.kill(os.getpid(), signal.SIGKILL)

    places = [(whole_file, "x"), (whole_folder, "x"), (whole_folder, "y")]
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
    with whole_folder(tmp_path / "y"):
        pass
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*others, "x", "y"])
