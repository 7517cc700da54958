"""Collections of ir_datasets in memory; files, downloads and licences of ir_datasets."""

from __future__ import annotations

import difflib
import os
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from adaptive_margins.data.collection import (
    SETS,
    STANDARD,
    Collection,
    Rows,
    Texts,
    Triple,
    read_texts,
)
from adaptive_margins.data.folder import one_line, warn
from adaptive_margins.data.text import DataError, Problems
from adaptive_margins.data.trec import Qrels, known_judgements
from adaptive_margins.progress import bar

ACCEPT_VARIABLE = "ADAPTIVE_MARGINS_ACCEPT_LICENCE"
MAX_TRIPLES = 1_000_000
"""Most triples that `read_collection` takes; MS MARCO has 270 million."""
_T = TypeVar("_T")


class DownloadError(DataError):
    """A file could not be fetched; the message names it, the reason and the way out."""


class LicenceError(DataError):
    """The terms of a collection were not accepted; the message has them and the way out."""


# ---- into memory ---------------------------------------------------------------------------------


def read_collection(source: str) -> Collection:
    """Read an ir_datasets id into memory, with its sets "train", "validation" and "test".

    If the id ends in ``/train``, ``/dev`` or ``/test``, its siblings over the same passages are the
    other sets; if it has children of these names, they are the sets; otherwise it is the test set
    (the training set, if it has triples), or, without judgements, only passages. Of more than
    `MAX_TRIPLES` triples, some are taken at even distances. Faulty judgements and queries
    (`read_set`) are left out with a warning.

    Raises:
        DataError: there are no passages; the id of a text is not one word, or repeats; files are
            damaged.
        LicenceError: files would have to be fetched, and their terms have not been accepted.
        DownloadError: a file could not be fetched.
    """
    import ir_datasets

    sets = _sets_around(source)
    if not find_dataset("passages", source).has("docs"):
        raise DataError(f"{source!r} of ir_datasets has no passages; expected an id that has")
    uses = [(source, "docs"), *((i, kind) for i in sets.values() for kind in ("queries", "qrels"))]
    has_triples = "train" in sets and find_dataset("triples", sets["train"]).has("docpairs")
    if has_triples:
        uses.append((sets["train"], "docpairs"))
    _check_fetching(source, uses)

    titles: dict[str, str] = {}
    left_out = Problems()
    passages = _texts("passages", source, "docs", titles)
    read = {name: read_set(name, i, passages, left_out) for name, i in sets.items()}
    queries = {name: texts for name, (texts, _) in read.items()}
    qrels = {name: judged for name, (_, judged) in read.items()}
    triples: list[Triple] = []
    if has_triples:
        known = _known_triples(sets["train"], queries["train"], passages, left_out)
        triples = thinned(known, MAX_TRIPLES)
    if found := left_out.text():
        warnings.warn(f"{source}: left out\n{found}", stacklevel=3)
    warn(passages, queries, source, "number")
    sources = {"ir_datasets": ir_datasets.__version__, "passages": source, **sets}
    return Collection(source, passages, queries, qrels, sources, triples, titles)


def _sets_around(source: str) -> dict[str, str]:
    """Set → ir_datasets id."""
    base, _, last = source.rpartition("/")
    if last not in STANDARD:
        base = source
    passages = handler_of(find_dataset("passages", source), "docs_handler")
    sets: dict[str, str] = {}
    for name, members in SETS.items():
        for identifier in (f"{base}/{member}" for member in members):
            if name not in sets and _is_judged(identifier):
                # Siblings may have other passages with the same docids (those of LoTTE do).
                theirs = handler_of(find_dataset("passages", identifier), "docs_handler")
                if theirs is passages:
                    sets[name] = identifier
    if not sets and _is_judged(source):
        sets["train" if find_dataset("triples", source).has("docpairs") else "test"] = source
    return sets


def _is_judged(identifier: str) -> bool:
    if not is_known(identifier):
        return False
    dataset = find_dataset("queries", identifier)
    return dataset.has("queries") and dataset.has("qrels")


def _check_fetching(source: str, uses: Iterable[tuple[str, str]]) -> None:
    """Raise LicenceError if files would be fetched whose terms the user did not accept."""
    files = (f for i, kind in uses for f in files_behind(find_dataset(kind, i), kind))
    if to_fetch := missing(files):
        listed = "".join(f"\n    {file.url} ({file.size_text})" for file in to_fetch)
        page = f"https://ir-datasets.com/{source.split('/')[0]}.html"
        terms = f"those of its publishers, see {page}. To be fetched:{listed}"
        check_licence(source, source, terms)


def _texts(key: str, identifier: str, kind: str, titles: dict[str, str]) -> Texts:
    """Passages (``kind`` "docs") or queries of an id; titles are added to ``titles``."""

    def rows() -> Rows:
        records = read_records(key, identifier, kind)
        listed = bar(f"reading {kind} of {identifier}", records, unit="texts")
        for number, record in enumerate(listed, start=1):
            if not hasattr(record, "default_text"):
                kind_of = type(record).__name__
                raise DataError(f"the {kind} of {identifier!r} ({kind_of}) have no plain text")
            name = record.doc_id if kind == "docs" else record.query_id
            if title := one_line(getattr(record, "title", None) or "").strip():
                titles[name] = title
            yield number, name, one_line(record.default_text() or "")

    problems = Problems()
    texts = read_texts(Path(f"{identifier} {kind}"), problems, rows(), blank=True)
    problems.check()
    return texts


def read_set(key: str, identifier: str, passages: Texts, problems: Problems) -> tuple[Texts, Qrels]:
    """Read the queries and judgements of an ir_datasets id.

    Queries without text, judgements of unknown queries or passages or beyond `MAX_GRADE`, and
    repeated ones are left out and noted in ``problems``.
    """
    texts = _texts(key, identifier, "queries", {})
    asked: dict[str, str] = {}
    where = Path(f"{identifier} queries")
    for number, (qid, text) in enumerate(zip(texts.ids, texts.texts, strict=True), start=1):
        if text.strip():
            asked[qid] = text
        else:
            problems.add(where, number, f"the text of {qid!r} is empty")
    queries = Texts(list(asked), list(asked.values()))
    records = enumerate(read_records(key, identifier, "qrels"), start=1)
    rows = ((number, r.query_id, r.doc_id, int(r.relevance)) for number, r in records)
    where = Path(f"{identifier} qrels")
    return queries, known_judgements(where, rows, problems, queries, passages)


def _known_triples(
    identifier: str, queries: Texts, passages: Texts, problems: Problems
) -> Iterator[Triple]:
    where = Path(f"{identifier} docpairs")
    for number, pair in enumerate(read_records("triples", identifier, "docpairs"), start=1):
        triple = pair.query_id, pair.doc_id_a, pair.doc_id_b
        if triple[0] in queries and triple[1] in passages and triple[2] in passages:
            yield triple
        else:
            problems.add(where, number, "the triple has an unknown query or passage")


def thinned(items: Iterable[_T], most: int) -> list[_T]:
    """Return all items, or of more than ``most`` every 2nd, 4th, 8th, …: at least ``most`` / 2."""
    kept: list[_T] = []
    step = 1
    for number, item in enumerate(items):
        if number % step == 0:
            kept.append(item)
        if len(kept) > most:
            kept, step = kept[::2], 2 * step
    return kept


# ---- ir_datasets ---------------------------------------------------------------------------------


def similar(identifier: str) -> str:
    """Return a hint with the registered ids that are similar to an unknown one; "" if none is."""
    import ir_datasets

    close = difflib.get_close_matches(identifier, list(ir_datasets.registry), 3)
    return f" (did you mean {' or '.join(close)}?)" if close else ""


def is_known(identifier: str) -> bool:
    """Whether ir_datasets has an id, including those that follow a pattern."""
    import ir_datasets

    try:
        ir_datasets.registry[identifier]
    except KeyError:
        return False
    return True


def find_dataset(key: str, identifier: str) -> Any:
    """Return the data set of an ir_datasets id; DataError, with its setting ``key``, if unknown."""
    import ir_datasets

    try:
        return ir_datasets.load(identifier)
    except KeyError:
        version = ir_datasets.__version__
        raise DataError(
            f"collection.{key}: ir_datasets {version} has no {identifier!r}{similar(identifier)}"
        ) from None


def check_licence(name: str, identifier: str, terms: str) -> None:
    """Raise LicenceError unless the terms of an ir_datasets id (or "all") were accepted."""
    accepted = os.environ.get(ACCEPT_VARIABLE, "")
    if accepted not in (identifier, "all"):
        given = f" (it is {accepted!r})" if accepted else ""
        raise LicenceError(
            f"{name} has terms of use; nothing is fetched or converted before you accept them:\n"
            f"  {terms.strip()}\n"
            f"To accept, set {ACCEPT_VARIABLE}={identifier}{given} and run the same command again."
        )


def read_records(key: str, identifier: str, kind: str) -> Iterator[Any]:
    """Yield the records of an id; an error names the setting ``key``, the files and the way out."""
    dataset = find_dataset(key, identifier)
    try:
        yield from getattr(dataset, f"{kind}_iter")()
    except Exception as error:  # whatever the readers, the archives and the network raise
        files = files_behind(dataset, kind)
        to_fetch = missing(files)
        message = (
            f"collection.{key}: the {kind} of {identifier!r} could not be read:"
            f" {type(error).__name__}: {error}"
        )
        if to_fetch:
            message += "\nMissing:"
            for file in to_fetch:
                message += f"\n  {file.url} ({file.size_text}, MD5 {file.md5 or 'not known'})"
                message += f"\n    without a network, put it at {file.path}{file.note}"
        if here := sorted({str(file.path) for file in files if file.here}):
            message += "\nRead from (remove a damaged file, and it is fetched or built again):"
            message += "".join(f"\n  {path}" for path in here)
        message += "\nFinished files are reused: run the same command again."
        raise (DownloadError if to_fetch else DataError)(message) from error


class _File(NamedTuple):
    """A file that ir_datasets reads; ``url`` is empty if it is derived or the user provides it."""

    url: str
    size: int
    md5: str
    path: Path
    here: bool
    note: str = ""

    @property
    def size_text(self) -> str:
        return f"{self.size:,} bytes" if self.size else "size not known"


def files_behind(dataset: Any, kind: str) -> list[_File]:
    """The files of a data set, found in the objects that ir_datasets built it from."""
    found: list[_File] = []
    handler = handler_of(dataset, f"{kind}_handler")
    _collect(handler, found, set())
    if hasattr(handler, "_lazy_qids"):  # only what is judged: the qrels are read first
        _collect(handler_of(dataset, "qrels_handler"), found, set())
    return found


def missing(files: Iterable[_File]) -> list[_File]:
    """Those of the files that have to be fetched, each URL once."""
    return list({file.url: file for file in files if file.url and not file.here}.values())


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
    else:  # by default, ir_datasets ignores local copies of small files
        path = home_path() / "downloads" / str(download.expected_md5)
        note = " and set IR_DATASETS_SMALL_FILE_SIZE=0"
    here = path.exists() or any(p.exists() for p in local)
    url = urls[0] if urls else str(path)
    return _File(url, download._size_hint or 0, download.expected_md5 or "", path, here, note)
