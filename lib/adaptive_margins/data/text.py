"""Reading the text files that a user names, and collecting the faults in them."""

from __future__ import annotations

import gzip
import io
import itertools
import json
import os
import re
import unicodedata
import warnings
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from adaptive_margins.errors import AdaptiveMarginsError
from adaptive_margins.files import file_sha256
from adaptive_margins.progress import bar

MAX_LINE = 1 << 20
"""Most bytes of a line. In a longer one, line feeds were probably lost."""
RECORDS = (".jsonl", ".jsonl.gz", ".parquet")
"""What the names of files of records end in."""
_SHOWN = 20  # kinds of faults listed in one error
_HEAD = 4096  # bytes that a file's kind is determined from
_COMPARED = 100_000  # known ids that an unknown one is compared with, for a hint in seconds
_BOM = b"\xef\xbb\xbf"
_GZIP = b"\x1f\x8b"
# The longer marks first: UTF-32's little-endian one begins as UTF-16's does.
_MARKS = [
    (b"\xff\xfe\0\0", "UTF-32"),
    (b"\0\0\xfe\xff", "UTF-32"),
    (b"\xff\xfe", "UTF-16"),
    (b"\xfe\xff", "UTF-16"),
]
_TEXT = "write its content as text"
_KINDS = [
    (rb"\x1f\x8b", "gzip within gzip, three times; unpack it: gunzip {path}"),
    (rb"PK[\x03\x05]", "a zip archive; unpack it: unzip {path}"),
    (rb"\xfd7zXZ", "a file compressed with xz; unpack it: xz -d {path}"),
    (rb"\x28\xb5\x2f\xfd", "a file compressed with zstd; unpack it: zstd -d {path}"),
    (rb"BZh[1-9]1AY&SY", "a file compressed with bzip2; unpack it: bunzip2 {path}"),
    (rb"PAR1[^\t -~]", f"a Parquet file; {_TEXT}, for example with pandas.read_parquet"),
    (rb"ARROW1\0|\xff\xff\xff\xff", f"an Arrow file; {_TEXT}, for example with datasets"),
    (rb"version https://git-lfs", "a Git LFS pointer, not the file itself; fetch it: git lfs pull"),
    (rb"(?i)\s*<(!doctype|html)", "a web page, not the file itself; download it again"),
]


class DataError(AdaptiveMarginsError, ValueError):
    """Malformed data. The message has ``file:line: what`` for each kind of fault in a file."""


class Problems:
    """Collects faults in files, so that one error can report all of them.

    Of faults in one file that differ only in quoted values and numbers, the first is named and the
    others are counted.
    """

    def __init__(self) -> None:
        self._first: dict[tuple[Path, str], str] = {}
        self._count: dict[tuple[Path, str], int] = {}
        self._unknown: dict[tuple[Path, str], tuple[dict[str, None], Iterable[str]]] = {}

    def add(self, path: Path, line: int, what: str) -> None:
        """Note a fault in line ``line`` (from 1; 0 for the complete file) of ``path``."""
        kind = path, re.sub(r"'[^']*'|\"[^\"]*\"|\d+|\([^()]*\)", "", what)
        self._first.setdefault(kind, f"{path}:{line}: {what}" if line else f"{path}: {what}")
        self._count[kind] = self._count.get(kind, 0) + 1

    def unknown(
        self, path: Path, line: int, what: str, identifier: str, known: Iterable[str]
    ) -> None:
        """Note that a line names an unknown query or passage (``what``), and give a hint."""
        self.add(path, line, f"unknown {what} {identifier!r}")
        self._unknown.setdefault((path, f"unknown {what} "), ({}, known))[0][identifier] = None

    def text(self) -> str:
        """Return a line for each kind of fault, at most 20; "" if nothing was noted."""
        lines = []
        for kind, first in self._first.items():
            more = self._count[kind] - 1
            like = f" (and {more:,} more line{'s' * (more > 1)} like it)" if more else ""
            hint = alike(*self._unknown[kind]) if kind in self._unknown else ""
            lines.append(first + like + (f"; {hint}" if hint else ""))
        left = len(lines) - _SHOWN
        if left > 0:
            lines[_SHOWN:] = [f"… and {left} more kinds of faults"]
        return "\n".join(f"  {line}" for line in lines) if len(lines) > 1 else "".join(lines)

    def check(self) -> None:
        """Raise `DataError` if anything was noted."""
        if text := self.text():
            raise DataError(f"malformed data\n{text}" if "\n" in text else text)


def check_file(path: Path, size: int, sha256: str | None, problems: Problems) -> None:
    """Note in ``problems`` if a file is missing or has another size or SHA-256 (None: any)."""
    if not path.is_file():
        problems.add(path, 0, "file not found")
    elif (found := path.stat().st_size) != size:
        problems.add(path, 0, f"{found} bytes, expected {size}; the file was changed or truncated")
    elif sha256 and (found_sha256 := file_sha256(path)) != sha256:
        problems.add(path, 0, f"SHA-256 is {found_sha256}, expected {sha256}; the file was changed")


def read_lines(path: Path, problems: Problems, *, empty: bool = False) -> Iterator[tuple[int, str]]:
    """Yield number (from 1) and text of each line of a UTF-8 file, gzipped or not.

    A byte order mark is dropped and Windows line ends are read, with a UserWarning each. Lines end
    at line feeds only: other Unicode line separators may occur inside a text. Faults are noted in
    ``problems`` and left out: a path that is missing, a folder, of another encoding or not text; a
    line that is not UTF-8 or longer than `MAX_LINE`.

    Args:
        path: a file, or a pipe, which is read to its end.
        problems: where faults are noted; `Problems.check` raises them.
        empty: whether an empty file is allowed.
    """
    zipped = 0
    try:
        with path.open("rb") as opened:
            # A pipe cannot be rewound, so it is read into memory.
            file: Any = opened if opened.seekable() else io.BytesIO(opened.read())
            while (head := _head(file)).startswith(_GZIP) and zipped < 3:  # one may hold itself
                zipped += 1
                file = io.BufferedReader(cast(io.RawIOBase, gzip.GzipFile(fileobj=file, mode="rb")))
            if wrong := _not_text(head, path):
                problems.add(path, 0, wrong)
            elif not head and not empty:
                problems.add(path, 0, "the file is empty")
            else:
                yield from _decoded(file, path, problems, bool(zipped))
    except FileNotFoundError:
        link = (
            f"is a link to {os.readlink(path)}, which does not exist" if path.is_symlink() else ""
        )
        problems.add(path, 0, link or "file not found")
    except IsADirectoryError:
        problems.add(path, 0, "is a folder; expected a file")
    except (OSError, EOFError, zlib.error) as error:
        reason = f"cannot be read ({getattr(error, 'strerror', '') or error})"
        problems.add(path, 0, f"truncated or damaged gzip file ({error})" if zipped else reason)


def read_records(path: Path, problems: Problems) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield number (from 1) and content of each line of JSON, or row of a ``.parquet`` file.

    Faults are noted in ``problems`` and left out, as by `read_lines`.
    """
    if path.suffix == ".parquet":
        from pyarrow import ArrowException, parquet

        number = 0
        try:
            batches = parquet.ParquetFile(path).iter_batches()
            for number, row in enumerate((row for b in batches for row in b.to_pylist()), start=1):
                yield number, row
            if not number:
                problems.add(path, 0, "the file is empty")
        except (ArrowException, OSError, OverflowError, ValueError) as error:
            problems.add(path, 0, f"cannot be read as Parquet ({' '.join(str(error).split())})")
        return
    for number, line in read_lines(path, problems):
        if number == 1 and ((array := line.lstrip()[:1] == "[") or line.strip() == "{"):
            found = "an array; convert it: jq -c '.[]'" if array else "an object; convert: jq -c ."
            problems.add(path, 1, f"JSON lines expected, found {found} {path.name} > NEW")
            return
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = getattr(error, "msg", str(error))
            if isinstance(error, RecursionError):
                reason = "nested too deep"
            elif not line.strip():
                reason = r"a blank line; remove such lines: sed -i '/^\s*$/d' FILE"
            problems.add(path, number, f"not valid JSON ({reason})")
            continue
        if isinstance(record, dict):
            yield number, record
        else:
            problems.add(path, number, 'expected {"_id": text, "text": text} or another object')


def read_columns(
    path: Path, columns: int, problems: Problems, *, empty: bool = False
) -> Iterator[tuple[int, list[str]]]:
    """Yield line number (from 1) and cells of lines with ``columns`` tab-separated cells.

    Other lines are noted in ``problems``. The rest is as in `read_lines`.
    """
    for number, line in read_lines(path, problems, empty=empty):
        cells = line.split("\t")
        if len(cells) == columns:
            yield number, cells
            continue
        expected = f"{columns} tab-separated columns expected"
        if number == 1 and line.lstrip()[:1] in ("{", "["):
            found = f"JSON: {line[:60]!r}"
            if '"_id"' in line:
                found += f"; convert: jq -r '[._id, .text] | @tsv' {path.name} > NEW"
            problems.add(path, 1, f"{expected}, found {found}")
            return
        problems.add(path, number, f"{expected}, {len(cells)} found")


def alike(unknown: Iterable[str], known: Iterable[str]) -> str:
    """Name an unknown id that is probably a known one, written in another way; "" if none is."""
    there = dict.fromkeys(itertools.islice(known, _COMPARED))
    forms = {form: identifier for identifier in there if (form := _form(identifier))}
    ends = {_end(identifier): identifier for identifier in there}
    for identifier in (i for i in dict.fromkeys(unknown) if i not in there):
        other = forms.get(_form(identifier), "")
        if not other:
            other = ends.get(identifier, _end(identifier))
            end, longer = sorted([identifier, other], key=len)
            prefix = longer.removesuffix(end)  # of 1.0 and 0, "1." is none
            other = other if re.search(r"[^\W\d_]", prefix) and other in there else ""
        if other:
            return f"{identifier!a} is similar to the known {other!a}"
    return ""


def _form(identifier: str) -> str:
    """An id without what conversions change.

    That is case, Unicode normalisation, invisible and surrounding characters, and leading zeros and
    a final .0 of a number.
    """
    text = unicodedata.normalize("NFKC", identifier).casefold()
    text = "".join(c for c in text if unicodedata.category(c) not in ("Cf", "Cc"))
    places = [place for place, character in enumerate(text) if character.isalnum()]
    text = text[places[0] : places[-1] + 1] if places else ""
    text = re.sub(r"(?<=[0-9])\.0+$", "", text)
    start = text.rstrip("0123456789")
    number = text[len(start) :]
    return start + (number.lstrip("0") or number[-1:])


def _end(identifier: str) -> str:
    """The letters and digits at the end."""
    return re.split(r"[\W_]", identifier)[-1]


def _head(file: BinaryIO) -> bytes:
    head = file.read(_HEAD)
    file.seek(0)
    return head


def _not_text(head: bytes, path: Path) -> str:
    """The kind of a file that is not UTF-8 text, by its first bytes, and the way out; else ""."""
    for mark, encoding in _MARKS:
        if head.startswith(mark):
            how = f"iconv -f {encoding} -t UTF-8 {path.name} > NEW"
            return f"UTF-8 expected, found {encoding}; convert the file: {how}"
    for pattern, what in _KINDS:
        if re.match(pattern, head):
            return f"UTF-8 text expected, found {what.format(path=path.name)}"
    if head.count(0) > len(head) * 0.02:
        return "UTF-8 text expected, found a binary file, or UTF-16 or UTF-32 without their mark"
    return ""


def _decoded(
    file: BinaryIO, path: Path, problems: Problems, zipped: bool
) -> Iterator[tuple[int, str]]:
    warned: set[str] = set()
    total = path.stat().st_size if path.is_file() and not zipped else None
    with bar(f"reading {path.name}", total=total, unit="bytes") as progress:
        for number in itertools.count(1):
            if not (raw := file.readline(MAX_LINE + 2)):
                return
            if number % 10_000 == 0:
                progress.update(file.tell() - progress.n)
            if len(raw) > MAX_LINE and not raw.endswith(b"\n"):
                found = f"the line is longer than {MAX_LINE:,} bytes"
                problems.add(path, number, _MAC if b"\r" in raw[:-1] else found)
                while (rest := file.readline(MAX_LINE)) and not rest.endswith(b"\n"):
                    pass
                continue
            raw = raw.removesuffix(b"\n")
            if raw.startswith(_BOM):
                _once(warned, path, f"a byte order mark (BOM) in line {number} is left out")
                raw = raw.removeprefix(_BOM)
            if raw.endswith(b"\r"):
                _once(warned, path, f"Windows line ends (CRLF), first in line {number}, are read")
                raw = raw.removesuffix(b"\r")
            if b"\r" in raw:
                problems.add(path, number, _MAC)
                continue
            try:
                yield number, raw.decode("utf-8")
            except UnicodeDecodeError as error:
                what = f"not valid UTF-8 (byte {error.start + 1} of the line)"
                problems.add(path, number, f"{what}; if it is Latin-1: iconv -f LATIN1 -t UTF-8")


_MAC = r"a carriage return (CR) within the line; if lines end with it: tr '\r' '\n'"


def _once(warned: set[str], path: Path, what: str) -> None:
    """Warn once of each kind (the first word)."""
    if (kind := what.split()[0]) not in warned:
        warned.add(kind)
        warnings.warn(f"{path}: {what}", stacklevel=4)
