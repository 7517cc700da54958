"""The one reader of text files: whatever can be read is, and everything else is told in one line."""

from __future__ import annotations

import bz2
import gzip
import io
import itertools
import lzma
import warnings
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet
import pytest

from adaptive_margins.data.text import (
    MAX_LINE,
    DataError,
    Problems,
    alike,
    read_columns,
    read_lines,
)

TEXT = "1\twhat is größer\n2\t𝄞\u2028 and\x85 more\n"
LINES = ["1\twhat is größer", "2\t𝄞\u2028 and\x85 more"]


def read(path: Path, data: bytes | None = None, **how) -> tuple[list[str], list[str]]:
    """Lines and warnings."""
    if data is not None:
        path.write_bytes(data)
    problems = Problems()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        lines = list(read_lines(path, problems, **how))
    problems.check()
    assert [number for number, _ in lines] == list(range(1, len(lines) + 1))
    return [line for _, line in lines], [str(warning.message) for warning in caught]


def told(path: Path, data: bytes | None = None) -> str:
    with pytest.raises(DataError) as error:
        read(path, data)
    (line,) = str(error.value).splitlines()
    assert line.startswith(f"{path}:")
    return line.removeprefix(f"{path}:")


@pytest.mark.parametrize("name", ["x.tsv", "x.tsv.gz"])
def test_gzip_is_known_by_content_whatever_the_name(tmp_path, name):
    data, half = TEXT.encode(), len(TEXT.encode()) // 2
    members = gzip.compress(data[:half]) + gzip.compress(data[half:])
    for content in (data, gzip.compress(data), members, gzip.compress(gzip.compress(data))):
        assert read(tmp_path / name, content) == (LINES, [])


def test_byte_order_marks_are_dropped_wherever_files_were_joined(tmp_path):
    path = tmp_path / "x"
    lines, warned = read(path, b"\xef\xbb\xbfa\nb\n\xef\xbb\xbfc\n")
    assert lines == ["a", "b", "c"] and len(warned) == 1
    assert "BOM" in warned[0] and str(path) in warned[0]
    assert read(path, gzip.compress(b"\xef\xbb\xbfa\n"))[0] == ["a"]


def test_windows_line_ends_are_read(tmp_path):
    lines, warned = read(tmp_path / "x", b"a\r\nb\r\nc\nd\r")
    assert lines == ["a", "b", "c", "d"] and len(warned) == 1 and "CRLF" in warned[0]


def test_carriage_returns_alone_are_never_one_long_line(tmp_path):
    assert "1: a carriage return" in told(tmp_path / "x", b"a\rb\rc\r")
    assert "1: a carriage return" in told(tmp_path / "x", b"text\r" * (MAX_LINE // 4))
    assert "2: a carriage return" in told(tmp_path / "x", b"a\nb\rc\n")


def test_a_line_is_at_most_a_mebibyte(tmp_path):
    assert read(tmp_path / "x", b"y" * MAX_LINE + b"\n")[0] == ["y" * MAX_LINE]
    assert f"2: the line is longer than {MAX_LINE:,}" in told(
        tmp_path / "x", b"a\n" + b"y" * 3 * MAX_LINE + b"\nb\n"
    )


@pytest.mark.parametrize(
    ("encoding", "found"),
    [("utf-16", "iconv -f UTF-16 -t UTF-8 x.txt"), ("utf-32", "iconv -f UTF-32 -t UTF-8 x.txt"),
     ("utf-16-le", "UTF-16 or UTF-32"), ("utf-32-be", "UTF-16 or UTF-32")],
)  # fmt: skip
def test_other_encodings_are_named(tmp_path, encoding, found):
    for data in (TEXT.encode(encoding), gzip.compress(("q1 0 d1 1\n" * 900).encode(encoding))):
        assert found in told(tmp_path / "x.txt", data)
    for mark, name in ((b"\xfe\xff", "UTF-16 "), (b"\0\0\xfe\xff", "UTF-32 ")):
        assert f"iconv -f {name}" in told(
            tmp_path / "x.txt", mark + TEXT.encode(f"{name.strip()}BE")
        )


def test_lines_that_are_not_utf8_are_counted(tmp_path):
    message = told(tmp_path / "x", b"a\ncaf\xe9\nb\n\xe9\n")
    assert message.startswith("2: not valid UTF-8 (byte 4") and "1 more line" in message
    assert "iconv -f LATIN1" in message


def zipped(data: bytes) -> bytes:
    with zipfile.ZipFile(buffer := io.BytesIO(), "w") as archive:
        archive.writestr("x", data)
    return buffer.getvalue()


def table(write) -> bytes:
    write(pa.table({"qid": ["1"] * 99, "text": ["a b"] * 99}), buffer := io.BytesIO())
    return buffer.getvalue()


def stream(rows: pa.Table, buffer: io.BytesIO) -> None:
    with pa.ipc.new_stream(buffer, rows.schema) as writer:
        writer.write_table(rows)


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (zipped(b"a"), "unzip x.run"),
        (lzma.compress(b"a"), "xz -d x.run"),
        (bz2.compress(b"a"), "bunzip2 x.run"),
        (b"\x28\xb5\x2f\xfd\x04\x00\x09\x00\x00a", "zstd -d x.run"),
        (table(pa.parquet.write_table), "Parquet"),
        (table(pa.feather.write_feather), "Arrow"),
        (table(stream), "Arrow"),
        (b"\x7fELF\x02\x01\x01\x00", "binary"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (b"<!doctype html>\n<html>\n", "web page"),
    ],
)  # fmt: skip
def test_what_is_no_text_is_named_in_one_line(tmp_path, data, found):
    assert found in told(tmp_path / "x.run", data)


def test_missing_files_folders_dangling_links_and_empty_files(tmp_path):
    path = tmp_path / "x"
    assert told(path) == " file not found"
    path.symlink_to("nowhere/y")
    assert told(path) == " is a link to nowhere/y, which does not exist"
    assert told(tmp_path) == " is a folder; expected a file"
    assert told(tmp_path / "z", b"") == " the file is empty"
    assert told(tmp_path / "z", gzip.compress(b"")) == " the file is empty"
    assert read(tmp_path / "z", empty=True) == ([], [])


def test_a_damaged_gzip_file_is_refused(tmp_path):
    data = gzip.compress(b"".join(b"%d\n" % (i * 7919) for i in range(9999)))
    damages = (data[:-9], data[:20], data[:4], data[:20] + b"\0\0\0" + data[23:], data + b"junk")
    for damaged in damages:
        assert "truncated or damaged gzip file" in told(tmp_path / "x", damaged)


def test_columns_say_how_many_were_expected_and_name_json(tmp_path):
    path = tmp_path / "queries.tsv"
    problems = Problems()
    path.write_text("1\ta b\n2 c\n3\td\te\n4\tf\n")
    assert list(read_columns(path, 2, problems)) == [(1, ["1", "a b"]), (4, ["4", "f"])]
    with pytest.raises(DataError, match=r":2: 2 tab-separated columns expected, 1 found .*1 more"):
        problems.check()
    path.write_text('{"_id": "1", "text": "a"}\n' * 20)
    problems = Problems()
    assert list(read_columns(path, 2, problems)) == []
    with pytest.raises(DataError, match=r"^[^\n]*:1: 2 tab-separated .* found JSON[^\n]*$"):
        problems.check()


def test_long_ids_take_milliseconds(tmp_path):
    problems = Problems()
    problems.unknown(tmp_path, 1, "passage", "'\"" + "(" * MAX_LINE, ["a"])
    assert "unknown passage" in problems.text()


@pytest.mark.parametrize(
    ("unknown", "known"),
    [
        ("cafe\u0301", "caf\xe9"),
        ("\uff24\uff11", "D1"),
        ("D1", "d1"),
        ("STRASSE", "straße"),
        ("<d1>", "d1"),
        ("d1\u200b", "d1"),
        ("10", "MED-10"),
        ("doc:10", "10"),
        ("12.0", "12"),
        ("doc007", "doc7"),
        ("0", "000"),
    ],
)
def test_ids_that_look_alike_are_shown_escaped(unknown, known):
    said = f"{unknown!a} is similar to the known {known!a}"
    assert said == alike(["zzz", unknown], ["y", known]) == alike([unknown], [known])


def test_ids_that_do_not_look_alike_are_not_told():
    assert alike(["d1", "-", "a-1"], ["d2", "_", "b-1"]) == ""
    assert alike(["145.0", "2-10"], ["0", "10", "45"]) == ""
    assert alike([], ["a"]) == alike(["a"], []) == ""
    assert alike(["0" * MAX_LINE + "x"], ["-" * MAX_LINE + "1"]) == ""  # in milliseconds
    many = (f"d{i}" for i in itertools.count())  # only the first are compared
    assert alike(["D7"], many) == "'D7' is similar to the known 'd7'"
