"""Large collections of ir_datasets, such as MS MARCO: converted once into memory-mapped files."""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adaptive_margins.data.collection import Collection, Texts, read_about, read_queries, tsv
from adaptive_margins.data.ir_datasets import (
    check_licence,
    files_behind,
    find_dataset,
    missing,
    read_records,
    read_set,
)
from adaptive_margins.data.stored import (
    StoredTexts,
    StoredTriples,
    check_count,
    first_per_query,
    select_triples,
    write_texts,
    write_triples,
)
from adaptive_margins.data.text import DataError, Problems, check_file
from adaptive_margins.data.trec import Run, qrels_text, read_qrels, read_run, write_run
from adaptive_margins.files import atomic_folder, file_sha256, locked, write_text
from adaptive_margins.profiles.config import IrDatasetsSettings
from adaptive_margins.progress import bar

FORMAT = 1
"""Raised by hand if a conversion would write other files; then all are converted again."""
_HASHED = 10_000  # texts hashed at once


@dataclass(frozen=True)
class StoredCollection(Collection):
    """A `Collection` that `convert` wrote: `StoredTexts` as passages, and `StoredTriples`.

    Attributes:
        candidates: set name → official candidates, for sets that have some. Scores are those of
            ir_datasets, all 0 if the official lists have none (TREC DL).
        folder: of its files.
        fingerprint: 16 hex digits, see `fingerprint_of`.
    """

    candidates: dict[str, Run] = field(default_factory=dict)
    folder: Path = Path()
    fingerprint: str = ""

    def __post_init__(self) -> None:
        """Check nothing: `convert` did, which takes minutes for 40 million triples."""

    @classmethod
    def load(cls, folder: Path) -> StoredCollection:
        """Open what `convert` wrote; its files' sizes and SHA-256s are checked.

        Raises:
            FileNotFoundError: there is no such folder.
            DataError: files are missing or changed.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise FileNotFoundError(f"no collection at {folder}: the folder does not exist")
        problems = Problems()
        about = read_about(folder / "sources.json", problems)
        problems.check()
        for name, size in about.get("files", {}).items():
            check_file(folder / name, size, about.get("sha256", {}).get(name), problems)
        for name in about.get("sha256", {}).keys() - about.get("files", {}).keys():
            problems.add(folder / "sources.json", 0, f"{name!r} has a SHA-256, but is not listed")
        if re.fullmatch(r"[0-9a-f]{16}", folder.name) and folder.name != about["fingerprint"]:
            problems.add(folder / "sources.json", 0, f"is of the collection {about['fingerprint']}")
        problems.check()
        return _open(folder, about["name"], about["sources"], about["fingerprint"])


def _open(folder: Path, name: str, sources: dict[str, str], fingerprint: str) -> StoredCollection:
    passages = StoredTexts(folder / "passages.arrow")
    queries = {
        path.name.split(".")[1]: read_queries(path, trusted=True)
        for path in sorted(folder.glob("queries.*.tsv"))
    }
    qrels = {part: read_qrels(folder / f"qrels.{part}.txt", trusted=True) for part in queries}
    candidates = {
        path.name.split(".")[1]: read_run(path, trusted=True)
        for path in sorted(folder.glob("candidates.*.run.gz"))
    }
    train = queries.get("train", Texts([], []))
    triples = StoredTriples(folder / "triples.arrow", train, passages)
    return StoredCollection(
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
    """16 hex digits of a SHA-256 over all content, read once.

    UTF-8 lines, in this order: the name; the number of passages, then docid, length in characters
    and text of each; for every set, by name: its name and number of queries, its queries like the
    passages, its judgements (query id, docid, grade) and candidates (query id, docid, score) sorted
    by ids; the number of triples, then their rows as little-endian 32-bit integers.
    """
    digest = hashlib.sha256(f"{collection.name}\n".encode())

    def add_texts(name: str, texts: Texts) -> None:
        digest.update(f"{name} {len(texts)}\n".encode())
        with bar(f"fingerprint of {name}", total=len(texts), unit="texts") as progress:
            for start in range(0, len(texts), _HASHED):
                part = slice(start, start + _HASHED)
                pairs = list(zip(texts.ids[part], texts.texts[part], strict=True))
                digest.update("".join(f"{i}\t{len(text)}\t{text}\n" for i, text in pairs).encode())
                progress.update(len(pairs))

    add_texts("passages", collection.passages)
    for name, queries in sorted(collection.queries.items()):
        add_texts(name, queries)
        tables: list[tuple[str, Any]] = [("qrels", collection.qrels[name])]
        tables.append(("candidates", candidates.get(name, {})))
        for kind, table in tables:
            digest.update(f"{kind} {len(table)}\n".encode())
            for qid, row in sorted(table.items()):
                lines = (f"{qid}\t{docid}\t{value!r}\n" for docid, value in sorted(row.items()))
                digest.update("".join(lines).encode())
    digest.update(f"triples {len(collection.triples)}\n".encode())
    assert isinstance(collection.triples, StoredTriples)
    for rows in collection.triples.chunks():
        digest.update(rows.astype("<i4").tobytes())
    return digest.hexdigest()[:16]


# ---- conversion ----------------------------------------------------------------------------------


def convert(settings: IrDatasetsSettings, work: Path, collections: Path) -> StoredCollection:
    """Fetch a collection through ir_datasets and convert it to ``collections/FINGERPRINT/``.

    Passages and triples are written atomically to ``work``, a folder of these settings only: after
    an error or a kill, the next call writes the missing ones. Afterwards it holds the fingerprint,
    from which further calls open the collection. Other processes wait.

    Raises:
        LicenceError: ``settings.licence`` names terms that were not accepted.
        DownloadError: something could not be fetched.
        DataError: an ir_datasets id that is unknown or lacks some data; malformed, unknown or
            repeated ids; a number that differs from ``settings.counts``.
    """
    with locked(work):
        work.mkdir(exist_ok=True)
        receipt = work / "fingerprint"
        if receipt.is_file():
            finished = collections / receipt.read_text().strip()
            if finished.is_dir():
                return StoredCollection.load(finished)
            receipt.unlink()
        _check_ids(settings)
        if settings.licence:
            check_licence(settings.name, settings.passages, settings.licence)
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
    """Write the files to ``work``, the large ones if it lacks them; return the fingerprint."""
    counts = settings.counts
    path = work / "passages.arrow"
    if not path.is_file():
        docs = read_records("passages", settings.passages, "docs")
        pairs = ((doc.doc_id, doc.default_text()) for doc in docs)
        write_texts(path, pairs, what="passages", expected=counts.get("passages"))
    passages = StoredTexts(path)

    problems = Problems()
    queries: dict[str, Texts] = {}
    for name, identifier in _sets(settings).items():
        key = _key(name)
        queries[name], qrels = read_set(key, identifier, passages, problems)
        problems.check()
        check_count(f"queries of {name}", len(queries[name]), counts.get(name))
        write_text(work / f"queries.{name}.tsv", tsv(queries[name]))
        write_text(work / f"qrels.{name}.txt", qrels_text(qrels))
        if name != "train" and find_dataset(key, identifier).has("scoreddocs"):
            run = _candidates(key, identifier, queries[name], passages)
            write_run(run, work / f"candidates.{name}.run.gz", identifier)
    _write_triples(settings, work / "triples.arrow", queries.get("train", Texts([], [])), passages)
    return _write_about(settings, work)


def _write_about(settings: IrDatasetsSettings, work: Path) -> str:
    """Write ``sources.json``; return the fingerprint."""
    import ir_datasets

    sources = {
        "ir_datasets": ir_datasets.__version__,
        "passages": settings.passages,
        **_sets(settings),
    }
    collection = _open(work, settings.name, sources, "")
    fingerprint = fingerprint_of(collection, collection.candidates)
    files = [path for path in sorted(work.iterdir()) if path.name != "sources.json"]
    about = {
        "name": settings.name,
        "fingerprint": fingerprint,
        "sources": sources,
        "counts": {
            "passages": len(collection.passages),
            "triples": len(collection.triples),
            **{name: len(texts) for name, texts in collection.queries.items()},
        },
        "files": {path.name: path.stat().st_size for path in files},
        "sha256": {path.name: file_sha256(path) for path in files},
    }
    write_text(work / "sources.json", json.dumps(about, indent=2, sort_keys=True) + "\n")
    return fingerprint


def _sets(settings: IrDatasetsSettings) -> dict[str, str]:
    """Set → ir_datasets id, the training queries included."""
    return {**({"train": settings.triples} if settings.triples else {}), **settings.sets}


def _candidates(key: str, identifier: str, queries: Texts, passages: Texts) -> Run:
    run: Run = {}
    problems = Problems()
    where = Path(f"{identifier} scoreddocs")
    for number, record in enumerate(read_records(key, identifier, "scoreddocs"), start=1):
        hits = run.setdefault(record.query_id, {})
        if record.query_id not in queries:
            problems.unknown(where, number, "query", record.query_id, queries)
        if record.doc_id not in passages:
            problems.unknown(where, number, "passage", record.doc_id, passages)
        if record.doc_id in hits:
            problems.add(where, number, f"{record.query_id!r} has {record.doc_id!r} twice")
        if not math.isfinite(record.score):
            problems.add(where, number, f"score {record.score!r} is not finite")
        hits[record.doc_id] = record.score
    problems.check()
    return run


def _write_triples(
    settings: IrDatasetsSettings, path: Path, queries: Texts, passages: Texts
) -> None:
    expected, per_query = settings.counts.get("triples"), settings.triples_per_query
    every = path if per_query is None else path.with_name(".every-triple.arrow")
    if not every.is_file() and not path.is_file():
        records = read_records("triples", settings.triples, "docpairs") if settings.triples else ()
        what = f"{settings.triples} docpairs"
        write_triples(every, records, queries, passages, what=what, expected=expected)
    if per_query is not None and not path.is_file():
        stored = StoredTriples(every, queries, passages)
        chosen = first_per_query(stored.column("query"), per_query)
        if not len(chosen):
            raise DataError(
                f"{settings.triples}: no query has triples_per_query = {per_query} triples"
            )
        select_triples(path, stored, chosen)
    if every != path:
        every.unlink(missing_ok=True)


def _move(work: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        work.rename(target)
    except OSError:  # another file system, or another process has made it meanwhile
        with atomic_folder(target) as partial:
            shutil.copytree(work, partial, dirs_exist_ok=True)
        shutil.rmtree(work)


# ---- what is read --------------------------------------------------------------------------------


def downloads(settings: IrDatasetsSettings) -> list[tuple[str, int]]:
    """Missing files that ir_datasets would fetch: (URL, bytes), 0 bytes if unknown.

    Raises:
        DataError: an ir_datasets id is unknown or lacks some data.
    """
    _check_ids(settings)
    files = (
        file
        for place, kinds in _uses(settings)
        for kind in kinds
        for file in files_behind(find_dataset(*place), kind)
    )
    return [(file.url, file.size) for file in missing(files)]


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


def _check_ids(settings: IrDatasetsSettings) -> None:
    for (key, identifier), kinds in _uses(settings):
        dataset = find_dataset(key, identifier)
        if lacking := [kind for kind in kinds if not dataset.has(kind)]:
            raise DataError(
                f"collection.{key}: {identifier!r} of ir_datasets has no"
                f" {' and no '.join(lacking)}; expected an id with {', '.join(kinds)}"
            )
