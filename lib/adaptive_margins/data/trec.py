"""TREC's files: runs (rankings) and qrels (judgements), ordered as in trec_eval."""

from __future__ import annotations

import gzip
import math
import re
import warnings
from array import array
from collections.abc import Collection as Ids
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from adaptive_margins.data.text import RECORDS, DataError, Problems, read_lines, read_records
from adaptive_margins.files import atomic_file

Qrels = dict[str, dict[str, int]]
"""Query id → docid → grade."""
Run = dict[str, dict[str, float]]
"""Query id → docid → score."""
Judgements = Iterator[tuple[int, str, str, int]]
"""Line number (from 1), query id, docid, grade."""

MAX_GRADE = 1_000
"""The largest absolute value of a grade, on which time and memory of trec_eval's gains depend."""
_RUN_COLUMNS = "query id, Q0, docid, rank, score, tag"
_QRELS_COLUMNS = "query id, 0, docid, grade"
_BEIR_HEADER = ["query-id", "corpus-id", "score"]
_INTEGER = re.compile(r"[+-]?[0-9]+")
_RUN = re.compile(r"(.+)\.(run|trec)(\.gz)?")
_HEX = re.compile(r"[+-]?0[xX]")


def top(scores: Mapping[str, float], depth: int | None = None) -> list[tuple[str, float]]:
    """Return the ``depth`` best (docid, score), or all: by score, then by docid, both descending.

    As in trec_eval, scores are compared as 32-bit floats (beyond their range they are infinite, and
    tie); they are returned unchanged.

    Raises:
        ValueError: ``depth`` is below 1, or a score is not a finite number.
    """
    check_depth(depth)
    ids = list(scores)
    values = np.array([scores[i] for i in ids], np.float64)
    if not np.isfinite(values).all():
        bad = ids[int(np.argmin(np.isfinite(values)))]
        raise ValueError(f"the score of passage {bad!r} must be finite, not {scores[bad]!r}")
    keys = _single(values)
    ranked = np.argsort(-keys)
    order, best_first = ranked.tolist(), keys[ranked]
    if (best_first[1:] == best_first[:-1]).any():
        order.sort(key=lambda i: (keys[i], ids[i]), reverse=True)
    return [(ids[i], scores[ids[i]]) for i in order[:depth]]


def truncated(run: Run, depth: int | None) -> Run:
    """Return a run with the ``depth`` best passages of each query in the order of `top`, or all."""
    return {qid: dict(top(hits, depth)) for qid, hits in run.items()}


def check_depth(depth: int | None) -> None:
    """Raise ValueError if a depth is below 1; None is allowed."""
    if depth is not None and depth < 1:
        raise ValueError(f"depth must be at least 1, not {depth}")


def _single(values: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore", under="ignore"):
        single: np.ndarray = values.astype(np.float32)
    return single


# ---- runs ----------------------------------------------------------------------------------------


def run_text(run: Run, tag: str) -> str:
    """Return a run in TREC's six columns: query id, Q0, docid, rank from 1, score, tag.

    Queries are sorted by id, hits in the order of `top`, scores in full precision. A query without
    hits has no line.

    Raises:
        DataError: an id or the tag is empty or has white space.
        ValueError: a score is not finite.
    """
    lines = []
    for qid in sorted(run):
        for rank, (docid, score) in enumerate(top(run[qid]), start=1):
            line = f"{qid} Q0 {docid} {rank} {float(score)!r} {tag}\n"
            if len(line.split()) != 6:
                raise DataError(
                    f"ids and tag must be non-empty and without white space: {line.rstrip()!r}"
                )
            lines.append(line)
    return "".join(lines)


def write_run(run: Run, path: Path, tag: str) -> None:
    """Write `run_text` atomically, gzipped (``.gz``) or not; equal runs give equal bytes.

    Raises:
        DataError, ValueError: as `run_text`.
    """
    path = Path(path)
    data = run_text(run, tag).encode("utf-8")
    if path.suffix == ".gz":
        data = gzip.compress(data, 6, mtime=0)  # 9 takes twice as long for 2 % less
    with atomic_file(path) as partial:
        partial.write_bytes(data)


def run_tag(name: str, run: Run, depth: int, passages: int) -> str:
    """Return the tag of a run that was ranked to ``depth``: ``name``, with a mark if complete.

    A run is complete if no query has ``depth`` hits, or one has all ``passages``. The mark has the
    most hits of a query, so that a part of the file does not count as complete.
    """
    most = max(map(len, run.values()), default=0)
    return f"{name}+complete{most}" if most < depth or most >= passages else name


def read_run(path: Path, *, trusted: bool = False) -> Run:
    """Read the run of `read_marked_run`."""
    return read_marked_run(path, trusted=trusted)[0]


def read_marked_run(path: Path, *, trusted: bool = False) -> tuple[Run, bool]:
    """Read a TREC run, gzipped or not, and whether it is marked as complete (`run_tag`).

    Ranks and the order of lines are ignored, as in trec_eval; a UserWarning is given if ranks
    contradict scores, or all scores of a query tie.

    Args:
        path: a file, or a pipe.
        trusted: whether this library wrote it; it may then be empty, and there are no warnings.

    Raises:
        DataError: the file is empty or of another kind; or names the first line of each kind of
            fault: not six columns, a score that is not a finite number in C's notation, a docid
            twice for a query.
    """
    path = Path(path)
    problems = Problems()
    run: Run = {}
    ranks: dict[str, array[float]] = {}
    tags: set[str] = set()
    for number, line in read_lines(path, problems, empty=trusted):
        cells = line.split()
        if len(cells) != 6 or cells[0] == "#":
            problems.add(path, number, _no_run(line, cells))
            if number == 1 and line.strip():  # another kind of file: all lines would be faults
                break
            continue
        qid, _, docid, rank, score, tag = cells
        tags.add(tag)
        hits = run.setdefault(qid, {})
        value = _number(score)
        if not math.isfinite(value):
            point = "; write a decimal point" if "," in score else ""
            what = f"score {score!r} is not a finite number{point}"
            problems.add(path, number, what + _header(number, score))
        elif docid in hits:
            problems.add(path, number, f"passage {docid!r} occurs twice for query {qid!r}")
        else:
            hits[docid] = value
            if not trusted:
                ranks.setdefault(qid, array("d")).append(_number(rank))
    problems.check()
    _check_order(path, run, ranks)
    most = max(map(len, run.values()), default=0)
    return run, bool(tags) and all(tag.endswith(f"+complete{most}") for tag in tags)


def read_runs(folder: Path) -> dict[str, Run]:
    """Read NAME.run and NAME.trec of a folder, gzipped (``.gz``) or not: name → run, sorted.

    Files that cannot be read as a run are left out, with a UserWarning.

    Raises:
        DataError: two files have the same name.
    """
    found: dict[str, Path] = {}
    for path in visible(Path(folder)):
        if (match := _RUN.fullmatch(path.name)) and not path.is_dir():
            if (name := match[1]) in found:
                raise DataError(f"{path}: {found[name].name} is a run named {name!r}, too")
            found[name] = path
    runs = {}
    for name, path in found.items():
        try:
            runs[name] = read_run(path)
        except DataError as error:
            first = str(error).removeprefix("malformed data\n").splitlines()[0].strip()
            warnings.warn(f"left out, as it is not a run: {first}", stacklevel=2)
    return runs


def visible(folder: Path) -> list[Path]:
    """Return the sorted content of a folder, without hidden files, as macOS and editors write."""
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def _number(text: str) -> float:
    """A number in the notation of C's strtod, in ASCII; NaN if it is not one."""
    if "_" in text or not text.isascii():
        return math.nan
    try:
        return float.fromhex(text) if _HEX.match(text) else float(text)
    except (ValueError, OverflowError):
        return math.nan


def _check_order(path: Path, run: Run, ranks: Mapping[str, array[float]]) -> None:
    """Warn if ranks contradict scores, or all scores of a query tie; once each."""
    contradicting = tied = 0
    for qid, listed in ranks.items():
        scores = _single(np.fromiter(run[qid].values(), np.float64))
        tied += len(scores) > 1 and scores.min() == scores.max()
        places = np.array(listed)
        order = np.lexsort((-scores, places))  # NaN, which is no rank, last
        higher = scores[order][1:] > scores[order][:-1]
        contradicting += bool((higher & (places[order][1:] > places[order][:-1])).any())
    equal = "all scores of a query are equal; the order is by docid, descending, as in trec_eval"
    contradict = "ranks contradict scores; scores count, as in trec_eval"
    for count, what in ((contradicting, contradict), (tied, equal)):
        if count:
            warnings.warn(f"{path}: {what} ({count:,} of {len(ranks):,} queries)", stacklevel=3)


def _no_run(line: str, cells: list[str]) -> str:
    """Expected and found columns of a line that is not of a run, and the way out."""
    expected = f"6 columns expected ({_RUN_COLUMNS})"
    if common := _no_columns(line):
        return f"{expected}, found {common}"
    if cells[:3] == _BEIR_HEADER or (len(cells) == 4 and _INTEGER.fullmatch(cells[3])):
        return f"{expected}, found judgements (qrels)"
    if len(tabs := line.split("\t")) == 4 and " " in tabs[3].strip():
        what = "MS MARCO's top1000 (query id, docid, query, passage), unordered; as candidates"
        return (
            f"""{expected}, found {what}: awk -F '\\t' '{{print $1, "Q0", $2, 1, 1, "top1000"}}'"""
        )
    if len(cells) == 3 and _INTEGER.fullmatch(cells[2]):
        what = "MS MARCO's three (query id, docid, rank); convert"
        return f"""{expected}, found {what}: awk '{{print $1, "Q0", $2, $3, -$3, "run"}}'"""
    return f"{expected}, {len(cells)} found"


def _header(number: int, text: str) -> str:
    """The way out if the first line has a word where a number is expected."""
    word = text.isalpha() and text.lower() not in ("nan", "inf", "infinity")
    return "; if this is a header, remove it: sed -i 1d FILE" if number == 1 and word else ""


def _no_columns(line: str) -> str:
    """What a line is that belongs to neither runs nor qrels; "" if it may belong to one."""
    text = line.strip()
    if not text:
        return r"a blank line; remove such lines: sed -i '/^\s*$/d' FILE"
    if text.startswith("#"):
        return "a comment; remove such lines: sed -i '/^#/d' FILE"
    if text[0] in "{[":
        return f"JSON: {text[:60]!r}"
    if text.count(",") > 1 and len(text.split()) < 3:
        return f"commas: {text[:60]!r}; convert: tr ',' ' ' < FILE > NEW"
    return ""


# ---- qrels ---------------------------------------------------------------------------------------


def qrels_text(qrels: Qrels) -> str:
    """Qrels in TREC's four columns (query id, 0, docid, grade), sorted."""
    return "".join(
        f"{qid} 0 {docid} {grade}\n"
        for qid, judged in sorted(qrels.items())
        for docid, grade in sorted(judged.items())
    )


def read_qrels(path: Path, *, trusted: bool = False) -> Qrels:
    """Read judgements: query id, any, docid, grade; or BEIR's three columns under their header.

    ``trusted``: whether this library wrote the file, which may then be empty.

    Raises:
        DataError: there are no judgements, or the file is of another kind; or names the first line
            of each kind of fault: a wrong number of columns, a grade that is not an integer or is
            beyond `MAX_GRADE`, a passage judged twice for a query.
    """
    problems = Problems()
    rows = read_judgements(Path(path), problems, empty=trusted)
    qrels = known_judgements(Path(path), rows, problems)
    problems.check()
    return qrels


def known_judgements(
    path: Path,
    rows: Judgements,
    problems: Problems,
    queries: Ids | None = None,
    passages: Ids | None = None,
    judged: dict[str, Path] | None = None,
) -> Qrels:
    """Return judgements of known queries and passages (None: of any); faults are noted.

    ``judged``: query id → file, of all sets, which must not share queries; this file's are added.
    """
    judged = {} if judged is None else judged
    qrels: Qrels = {}
    for number, qid, docid, grade in rows:
        other = judged.setdefault(qid, path)
        if queries is not None and qid not in queries:
            problems.unknown(path, number, "query", qid, queries)
        elif other != path:
            what = f"query {qid!r} is judged in {other.name}, too; sets must not share queries"
            problems.add(path, number, what)
        elif passages is not None and docid not in passages:
            problems.unknown(path, number, "passage", docid, passages)
        elif docid in qrels.get(qid, ()):
            problems.add(path, number, f"{qid!r} judges {docid!r} twice")
        elif type(grade) is not int or abs(grade) > MAX_GRADE:
            expected = f"an integer within ±{MAX_GRADE:,}, not {grade!r}"
            problems.add(path, number, f"grade of {docid!r} must be {expected}")
        else:
            qrels.setdefault(qid, {})[docid] = grade
    return qrels


def read_judgements(path: Path, problems: Problems, *, empty: bool = False) -> Judgements:
    """Yield line number (from 1), query id, docid and grade of each judgement, TREC's or BEIR's.

    BEIR's may also be JSON lines or Parquet, by the file's name (`RECORDS`).
    Wrong lines are noted in ``problems`` and left out. ``empty``: whether there may be none.
    """
    beir, count = path.name.endswith(RECORDS), 0
    lines = _record_lines(path, problems) if beir else read_lines(path, problems, empty=empty)
    for number, line in lines:
        cells = line.split()
        if number == 1 and cells == _BEIR_HEADER:
            beir = True
            continue
        count += 1
        if len(cells) != (3 if beir else 4) or cells[0] == "#":
            problems.add(path, number, _no_judgement(line, cells, beir))
            if number == 1 and line.strip()[:1] not in ("", "#"):
                return  # another kind of file: all lines would be faults
            continue
        qid, docid, text = cells[0], cells[-2], cells[-1]
        if _INTEGER.fullmatch(text):
            yield number, qid, docid, int(text[:99])  # Python refuses thousands of digits
        else:
            way = _header(number, text)
            if re.fullmatch(r"[+-]?[0-9]+\.0+", text):
                way = "; convert: sed -E 's/\\.0+\\s*$//' FILE > NEW"
            problems.add(path, number, f"grade {text!r} is not an integer{way}")
    if beir and not count and not empty:
        problems.add(path, 0, "no judgement found")


def _record_lines(path: Path, problems: Problems) -> Iterator[tuple[int, str]]:
    """Lines of BEIR's columns from records, in which a grade may be 1.0."""
    for number, record in read_records(path, problems):
        names = ((name, name.replace("-", "_")) for name in _BEIR_HEADER)
        qid, docid, grade = (record.get(one, record.get(other, "")) for one, other in names)
        yield number, f"{qid}\t{docid}\t{re.sub(r'[.]0+$', '', str(grade))}"


def _no_judgement(line: str, cells: list[str], beir: bool) -> str:
    """Expected and found columns of a line that is not a judgement, and the way out."""
    columns = ", ".join(_BEIR_HEADER) if beir else _QRELS_COLUMNS
    expected = f"{3 if beir else 4} columns expected ({columns})"
    if common := _no_columns(line):
        return f"{expected}, found {common}"
    if len(cells) == 6:
        return f"{expected}, found 6, as a run has"
    if not beir and len(cells) == 3:
        # A header of other names is changed ("c"), a missing one inserted ("i").
        how = "i" if _INTEGER.fullmatch(cells[2]) else "c"
        way = rf"sed -i '1{how} query-id\tcorpus-id\tscore' FILE"
        return f"{expected}, found 3; BEIR's judgements need their header: {way}"
    return f"{expected}, {len(cells)} found"
