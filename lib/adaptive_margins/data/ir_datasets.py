"""Collections from ir_datasets, such as MS MARCO: fetched, checked, and converted once into memory-mapped files."""

from __future__ import annotations

import difflib
import errno
import gzip
import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from adaptive_margins.data.collection import Collection, Texts, read_about, read_queries, tsv
from adaptive_margins.data.stored import (
    StoredTexts,
    StoredTriples,
    check_count,
    first_per_query,
    select_triples,
    write_texts,
    write_triples,
)
from adaptive_margins.data.text import DataError, Problems
from adaptive_margins.data.trec import (
    MAX_GRADE,
    Qrels,
    Run,
    qrels_text,
    read_qrels,
    read_run,
    run_text,
)
from adaptive_margins.files import alone, file_sha256, whole_file, whole_folder, write_text
from adaptive_margins.profiles.config import IrDatasetsSettings
from adaptive_margins.progress import Countdown

ACCEPT_VARIABLE = "ADAPTIVE_MARGINS_ACCEPT_LICENCE"
FORMAT = 1
"""Raised by hand whenever a conversion would come out differently; what was converted before is then converted anew."""
_HASHED = 10_000  # texts hashed at once


class DownloadError(DataError):
    """Something could not be fetched. The message says what, why, and where to put it to go on without a network."""


class LicenceError(DataError):
    """The terms of a collection have not been accepted. The message says whose they are and how to accept them."""


# ---- the collection as stored --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StoredCollection(Collection):
    """A `Collection` whose passages and triples stay on disk, as `convert` leaves it.

    ``passages`` are `StoredTexts`, ``triples`` are `StoredTriples` (none: an empty sequence); queries and qrels are in
    memory.

    Attributes:
        candidates: set name → the lists that come with the collection, for those sets that have some. Scores are those of
            ir_datasets, which are all 0 where the official lists have none (TREC DL): then they are a pool, not a ranking.
        folder: where it lies.
        fingerprint: 16 hex digits, see `fingerprint_of`.
    """

    candidates: dict[str, Run] = field(default_factory=dict)
    folder: Path = Path()
    fingerprint: str = ""

    def __post_init__(self) -> None:
        """Nothing: `convert` checked every id, and doing it again for 40 million triples would take minutes."""

    def save(self, folder: Path) -> None:
        """Copy the files to ``folder``, whole or not at all; a folder that holds this collection is left as it is."""
        folder = Path(folder)
        if not self._is_in(folder):
            with whole_folder(folder, same=self._is_in) as partial:
                shutil.copytree(self.folder, partial, dirs_exist_ok=True)

    @classmethod
    def load(cls, folder: Path) -> StoredCollection:
        """Open what `convert` made.

        The sizes of all files are checked, and the SHA-256 of those that are not memory-mapped.

        Raises:
            FileNotFoundError: there is no such folder.
            DataError: files that are missing or are not as they were written.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise FileNotFoundError(f"no collection at {folder}: the folder does not exist")
        problems = Problems()
        about = read_about(folder / "sources.json", problems)
        problems.check()
        for name, size in about.get("files", {}).items():
            path = folder / name
            if not path.is_file():
                problems.add(path, 0, "file not found")
            elif path.stat().st_size != size:
                problems.add(path, 0, f"{size} bytes expected, {path.stat().st_size} found")
            elif _sha256(path) != about.get("sha256", {}).get(name):
                problems.add(path, 0, "was changed after the collection was converted")
        if re.fullmatch(r"[0-9a-f]{16}", folder.name) and folder.name != about["fingerprint"]:
            problems.add(folder / "sources.json", 0, f"is of the collection {about['fingerprint']}")
        problems.check()
        return cls._open(folder, about["name"], about["sources"], about["fingerprint"])

    @classmethod
    def _open(
        cls, folder: Path, name: str, sources: dict[str, str], fingerprint: str
    ) -> StoredCollection:
        passages = StoredTexts(folder / "passages.arrow")
        queries = {
            path.name.split(".")[1]: read_queries(path, own=True)
            for path in sorted(folder.glob("queries.*.tsv"))
        }
        qrels = {
            set_name: read_qrels(folder / f"qrels.{set_name}.txt", own=True) for set_name in queries
        }
        train = queries.get("train", Texts([], []))
        triples: Any = StoredTriples(folder / "triples.arrow", train, passages)
        candidates = {
            path.name.split(".")[1]: read_run(path, own=True)
            for path in sorted(folder.glob("candidates.*.run.gz"))
        }
        return cls(
            name,
            passages,
            queries,
            qrels,
            sources,
            triples,
            candidates=candidates,
            folder=folder,
            fingerprint=fingerprint,
        )


def fingerprint_of(collection: Collection, candidates: dict[str, Run]) -> str:
    """16 hex digits of a SHA-256 over all content, read once from start to end.

    In this order, everything as UTF-8 lines: the name; the number of passages, then docid, length in characters and text of
    each; for every set, by name: its name and number of queries, its queries like the passages, its judgements (query id, docid,
    grade) sorted by ids, its candidates (query id, docid, score) sorted by ids; the number of triples, then their rows as
    little-endian 32-bit integers. It depends neither on the sizes of any batches nor on the order of qrels or candidates.
    """
    digest = hashlib.sha256(f"{collection.name}\n".encode())

    def add_texts(name: str, texts: Texts) -> None:
        digest.update(f"{name} {len(texts)}\n".encode())
        countdown = Countdown(f"fingerprint of {name}", len(texts), "texts")
        for start in range(0, len(texts), _HASHED):
            part = slice(start, start + _HASHED)
            pairs = zip(texts.ids[part], texts.texts[part], strict=True)
            digest.update("".join(f"{i}\t{len(text)}\t{text}\n" for i, text in pairs).encode())
            countdown.update(start)

    add_texts("passages", collection.passages)
    for name, queries in sorted(collection.queries.items()):
        add_texts(name, queries)
        tables: dict[str, Any] = {"qrels": collection.qrels[name], "candidates": candidates.get(name, {})}  # fmt: skip
        for kind, table in tables.items():
            digest.update(f"{kind} {len(table)}\n".encode())
            for qid, row in sorted(table.items()):
                lines = (f"{qid}\t{docid}\t{value!r}\n" for docid, value in sorted(row.items()))
                digest.update("".join(lines).encode())
    digest.update(f"triples {len(collection.triples)}\n".encode())
    assert isinstance(collection.triples, StoredTriples)
    for rows in collection.triples.chunks():
        digest.update(rows.astype("<i4").tobytes())
    return digest.hexdigest()[:16]


# ---- conversion ----------------------------------------------------------------------------------------------------


def convert(settings: IrDatasetsSettings, work: Path, collections: Path) -> StoredCollection:
    """Fetch a collection through ir_datasets, convert it in ``work``, and move it to ``collections/FINGERPRINT/``.

    What it consists of (passages, training queries, triples, queries, qrels and candidates of each set) is written file by
    file, each whole or not at all: after an error or a kill the next call goes on with the first one missing. ``work`` must
    belong to these settings alone; afterwards it holds only the fingerprint, and a further call opens the finished collection.
    A second process that converts the same waits for the first.

    Raises:
        LicenceError: ``settings.licence`` names terms that were not accepted.
        DownloadError: something could not be fetched.
        DataError: an unknown ir_datasets id, or one without what is needed from it; malformed, unknown or repeated ids; a
            number that differs from ``settings.counts``.
    """
    with alone(work):
        work.mkdir(exist_ok=True)
        receipt = work / "fingerprint"
        if receipt.is_file():
            finished = collections / receipt.read_text().strip()
            if finished.is_dir():
                return StoredCollection.load(finished)
            receipt.unlink()
        _check_ids(settings)
        check_licence(settings)
        for partial in work.glob(".*.partial"):  # of a killed process
            partial.unlink()
        target = collections / _write(settings, work)
        if target.is_dir():  # other settings, same content
            shutil.rmtree(work)
        else:
            _move(work, target)
        write_text(receipt, target.name + "\n")
        return StoredCollection.load(target)


def _write(settings: IrDatasetsSettings, work: Path) -> str:
    """Write the files of the collection that ``work`` does not have yet; the fingerprint of all."""
    counts = settings.counts

    path = work / "passages.arrow"
    if not path.is_file():
        docs = read_records("passages", settings.passages, "docs")
        pairs = ((doc.doc_id, doc.default_text()) for doc in docs)
        write_texts(path, pairs, what="passages", expected=counts.get("passages"))
    passages = StoredTexts(path)
    check_count("passages", len(passages), counts.get("passages"))

    queries: dict[str, Texts] = {}
    for name, identifier in _sets(settings).items():
        place = (_key(name), identifier)
        path = work / f"queries.{name}.tsv"
        _make(path, _queries, *place)
        queries[name] = read_queries(path, own=True)
        check_count(f"queries of {name}", len(queries[name]), counts.get(name))
        ids = (queries[name], passages)
        _make(work / f"qrels.{name}.txt", _qrels, *place, *ids)
        if name != "train" and find_dataset(*place).has("scoreddocs"):
            _make(work / f"candidates.{name}.run.gz", _candidates, *place, *ids)
    _write_triples(settings, work / "triples.arrow", queries.get("train", Texts([], [])), passages)

    import ir_datasets

    sources = {
        "ir_datasets": ir_datasets.__version__,
        "passages": settings.passages,
        **_sets(settings),
    }
    collection = StoredCollection._open(work, settings.name, sources, "")
    fingerprint = fingerprint_of(collection, collection.candidates)
    files = [path for path in sorted(work.iterdir()) if path.name != "sources.json"]
    about = {
        "name": settings.name,
        "fingerprint": fingerprint,
        "sources": sources,
        "counts": {
            "passages": len(passages),
            "triples": len(collection.triples),
            **{name: len(texts) for name, texts in queries.items()},
        },
        "files": {path.name: path.stat().st_size for path in files},
        "sha256": {path.name: digest for path in files if (digest := _sha256(path))},
    }
    write_text(work / "sources.json", json.dumps(about, indent=2, sort_keys=True) + "\n")
    return fingerprint


def _sets(settings: IrDatasetsSettings) -> dict[str, str]:
    """Set name → ir_datasets id, the training queries included."""
    return {**({"train": settings.triples} if settings.triples else {}), **settings.sets}


def _make(path: Path, content: Callable[..., bytes], *arguments: Any) -> None:
    if not path.is_file():
        with whole_file(path) as partial:
            partial.write_bytes(content(*arguments))


def _queries(key: str, identifier: str) -> bytes:
    records = list(read_records(key, identifier, "queries"))
    # Lines of a tab-separated file hold them, so tabs and line breaks become spaces.
    texts = [re.sub(r"[\t\n\r]", " ", record.default_text()) for record in records]
    try:
        return tsv(Texts([record.query_id for record in records], texts)).encode("utf-8")
    except ValueError as error:
        raise DataError(f"collection.{key}: queries of {identifier!r}: {error}") from error


def _qrels(key: str, identifier: str, queries: Texts, passages: Texts) -> bytes:
    qrels: Qrels = {}
    problems = Problems()
    where = Path(f"{identifier} qrels")
    for number, record in enumerate(read_records(key, identifier, "qrels"), start=1):
        if _known(record, queries, passages, where, number, problems):
            judged = qrels.setdefault(record.query_id, {})
            if record.doc_id in judged:
                problems.add(where, number, f"{record.query_id!r} judges {record.doc_id!r} twice")
            if abs(record.relevance) > MAX_GRADE:
                problems.add(where, number, f"grade '{record.relevance}' is beyond ±{MAX_GRADE:,}")
            judged[record.doc_id] = record.relevance
    problems.check()
    return qrels_text(qrels).encode("utf-8")


def _candidates(key: str, identifier: str, queries: Texts, passages: Texts) -> bytes:
    """A TREC run: queries by id, passages by score and then docid, both descending, as trec_eval orders them."""
    run: Run = {}
    problems = Problems()
    where = Path(f"{identifier} scoreddocs")
    for number, record in enumerate(read_records(key, identifier, "scoreddocs"), start=1):
        if _known(record, queries, passages, where, number, problems):
            hits = run.setdefault(record.query_id, {})
            if record.doc_id in hits:
                problems.add(where, number, f"{record.query_id} has {record.doc_id} twice")
            if not math.isfinite(record.score):
                problems.add(where, number, f"score {record.score!r} is not finite")
            hits[record.doc_id] = record.score
    problems.check()
    tag = identifier.replace(" ", "-")
    return gzip.compress(run_text(run, tag).encode("utf-8"), mtime=0)


def _sha256(path: Path) -> str | None:
    """Of a file that is read whole; None for one that is memory-mapped, which may have gigabytes."""
    if path.suffix in (".arrow", ".npy"):
        return None
    return file_sha256(path)


def _known(
    record: Any, queries: Texts, passages: Texts, where: Path, number: int, problems: Problems
) -> bool:
    known = record.query_id in queries
    if not known:
        problems.unknown(where, number, "query", record.query_id, queries.ids)
    if record.doc_id not in passages:
        problems.unknown(where, number, "passage", record.doc_id, passages.ids)
        known = False
    return known


def _write_triples(
    settings: IrDatasetsSettings, path: Path, queries: Texts, passages: Texts
) -> None:
    expected, per_query = settings.counts.get("triples"), settings.triples_per_query
    every = path if per_query is None else path.with_name(".every-triple.arrow")
    if not path.is_file() and not every.is_file():
        triples = read_records("triples", settings.triples, "docpairs") if settings.triples else []
        what = f"{settings.triples} docpairs"
        write_triples(every, triples, queries, passages, what=what, expected=expected)
    if per_query is None:
        check_count("triples", len(StoredTriples(path, queries, passages)), expected)
        return
    if not path.is_file():
        stored = StoredTriples(every, queries, passages)
        chosen = first_per_query(stored.column("query"), per_query)
        if not len(chosen):
            raise DataError(
                f"{settings.triples}: no query has triples_per_query = {per_query} triples"
            )
        select_triples(path, stored, chosen)
    every.unlink(missing_ok=True)


def _move(work: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        work.rename(target)
    except OSError as error:
        if error.errno != errno.EXDEV:  # another file system
            raise
        with whole_folder(target) as partial:
            shutil.copytree(work, partial, dirs_exist_ok=True)
        shutil.rmtree(work)


# ---- ir_datasets ---------------------------------------------------------------------------------------------------


def downloads(settings: IrDatasetsSettings) -> list[tuple[str, int]]:
    """What ir_datasets would still fetch for a collection: (URL, bytes); 0 bytes where it does not know.

    Reads ir_datasets' own list and looks which files are there; opens neither a connection nor data.

    Raises:
        DataError: an unknown ir_datasets id, or one without what is needed from it.
    """
    _check_ids(settings)
    wanted = [
        files_behind(find_dataset(*place), kind)
        for place, kinds in _uses(settings)
        for kind in kinds
    ]
    missing = {file.url: file.size for files in wanted for file in files if not file.here}
    return list(missing.items())


class _File(NamedTuple):
    """A file that ir_datasets reads: fetched from ``url``, or ("" for it) made from another or given by the user."""

    url: str
    size: int
    md5: str
    path: Path
    here: bool
    note: str = ""


def _uses(settings: IrDatasetsSettings) -> Iterator[tuple[tuple[str, str], list[str]]]:
    """((key of the settings, ir_datasets id), what is read from it)."""
    yield ("passages", settings.passages), ["docs"]
    for name, identifier in _sets(settings).items():
        kinds = ["queries", "qrels"]
        if name == "train":
            kinds.append("docpairs")
        elif find_dataset(_key(name), identifier).has("scoreddocs"):
            kinds.append("scoreddocs")
        yield (_key(name), identifier), kinds


def _key(name: str) -> str:
    return "triples" if name == "train" else f"sets.{name}"


def find_dataset(key: str, identifier: str) -> Any:
    """The data set of an id of ir_datasets; DataError names ``key``, the setting it came from, and ids like it."""
    import ir_datasets

    try:
        return ir_datasets.load(identifier)
    except KeyError:
        close = difflib.get_close_matches(identifier, list(ir_datasets.registry), 3)
        hint = f"; did you mean {' or '.join(close)}?" if close else ""
        raise DataError(
            f"collection.{key}: ir_datasets {ir_datasets.__version__} has no {identifier!r}{hint}"
        ) from None


def _check_ids(settings: IrDatasetsSettings) -> None:
    for (key, identifier), kinds in _uses(settings):
        dataset = find_dataset(key, identifier)
        if lacking := [kind for kind in kinds if not dataset.has(kind)]:
            raise DataError(
                f"collection.{key}: {identifier!r} of ir_datasets has no {' and no '.join(lacking)};"
                f" expected an id with {', '.join(kinds)}"
            )


def check_licence(settings: IrDatasetsSettings) -> None:
    """Raise LicenceError unless the terms of use of the data were accepted."""
    accepted = os.environ.get(ACCEPT_VARIABLE, "")
    if settings.licence and accepted not in (settings.passages, "all"):
        given = f" (it is {accepted!r})" if accepted else ""
        raise LicenceError(
            f"{settings.name} has terms of use, and nothing is fetched or converted before you accept them:\n"
            f"  {settings.licence.strip()}\n"
            f"To accept, set {ACCEPT_VARIABLE}={settings.passages}{given} and run the same command again."
        )


def read_records(key: str, identifier: str, kind: str) -> Iterator[Any]:
    """What ir_datasets reads, with errors that say what to do."""
    dataset = find_dataset(key, identifier)
    try:
        yield from getattr(dataset, f"{kind}_iter")()
    except Exception as error:  # whatever the readers, the archives and the network raise
        files = files_behind(dataset, kind)
        missing = list({file.url: file for file in files if file.url and not file.here}.values())
        message = f"collection.{key}: the {kind} of {identifier!r} could not be read: {type(error).__name__}: {error}"
        if missing:
            message += "\nNot here yet:"
            for file in missing:
                size = f"{file.size:,} bytes" if file.size else "size not known"
                message += f"\n  {file.url} ({size}, MD5 {file.md5 or 'not known'})"
                message += f"\n    without a network, put it at {file.path}{file.note}"
        if here := sorted({str(file.path) for file in files if file.here}):
            message += "\nRead from (remove a damaged file, and it is fetched or made again):"
            message += "".join(f"\n  {path}" for path in here)
        message += "\nWhat was finished before is kept: the same command goes on from here."
        raise (DownloadError if missing else DataError)(message) from error


def files_behind(dataset: Any, kind: str) -> list[_File]:
    """The files behind what a dataset offers, found by going through the parts that ir_datasets built it from."""
    found: list[_File] = []
    handler = handler_of(dataset, f"{kind}_handler")
    _collect(handler, found, set())
    if hasattr(handler, "_lazy_qids"):  # only what is judged: the qrels are read first
        _collect(handler_of(dataset, "qrels_handler"), found, set())
    return found


def handler_of(part: Any, name: str) -> Any:
    """The innermost part of a data set that offers ``name``."""
    # Not by calling it: that may already change files (ir_datasets' Migrator).
    inner: Iterable[Any] = vars(part).get("_constituents", [])
    for constituent in inner:
        if hasattr(constituent, name):
            return handler_of(constituent, name)
    return part


def _collect(part: Any, found: list[_File], seen: set[int]) -> None:
    from ir_datasets.util import Cache, Download, LocalDownload

    if id(part) in seen:
        return
    seen.add(id(part))
    if isinstance(part, list | tuple):
        for item in part:
            _collect(item, found, seen)
    elif isinstance(part, Download):
        found.append(_fetched(part))
    elif isinstance(part, LocalDownload):
        found.append(_File("", 0, "", part._path, part._path.exists()))
    elif type(part).__module__.startswith("ir_datasets") and hasattr(part, "__dict__"):
        if isinstance(part, Cache) and Path(part._path).exists():
            found.append(_File("", 0, "", Path(part._path), True))
        else:
            for value in vars(part).values():
                _collect(value, found, seen)


def _fetched(download: Any) -> _File:
    from ir_datasets.util import LocalDownload, home_path

    local = [m._path for m in download.mirrors if isinstance(m, LocalDownload)]
    urls = [m.url for m in download.mirrors if hasattr(m, "url")]
    note = ""
    if download._cache_path is not None:
        path = Path(download._cache_path)
    elif local:
        path = Path(local[0])
    else:  # ir_datasets looks for local copies of small files only if told so
        path = home_path() / "downloads" / str(download.expected_md5)
        note = " and set IR_DATASETS_SMALL_FILE_SIZE=0"
    here = path.exists() or any(p.exists() for p in local)
    url = urls[0] if urls else str(path)
    return _File(url, download._size_hint or 0, download.expected_md5 or "", path, here, note)
