"""A collection: passages, query sets, graded qrels, training triples; its files and fingerprint."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from adaptive_margins.data.text import DataError, Problems, read_columns
from adaptive_margins.data.trec import Qrels, known_judgements, qrels_text, read_judgements
from adaptive_margins.files import atomic_folder
from adaptive_margins.markup import active

Triple = tuple[str, str, str]
"""Query id, docid of the positive, docid of the negative."""

SETS = {"train": ("train",), "validation": ("validation", "dev", "valid", "val"), "test": ("test",)}
"""Name of a set → its names in files, Hugging Face datasets and ir_datasets."""
STANDARD = {called: name for name, names in SETS.items() for called in names}
"""Such a name → name of the set."""

_FINGERPRINT = re.compile(r"[0-9a-f]{16}")


@dataclass(frozen=True)
class Texts:
    """Ids and texts in one order; the position of an id is its row in any matrix of embeddings.

    Raises:
        DataError: ids and texts differ in number, or an id occurs twice.
    """

    ids: Sequence[str]
    texts: Sequence[str]

    def __post_init__(self) -> None:
        if len(self.ids) != len(self.texts):
            raise DataError(f"{len(self.ids)} ids but {len(self.texts)} texts")
        if len(self._rows) != len(self.ids):
            twice = [i for i, n in Counter(self.ids).items() if n > 1]
            raise DataError(f"ids must be unique, but {twice[0]!r} occurs more than once")

    @cached_property
    def _rows(self) -> Mapping[str, int]:
        return {identifier: row for row, identifier in enumerate(self.ids)}

    def __len__(self) -> int:
        return len(self.ids)

    def __iter__(self) -> Iterator[str]:
        return iter(self.ids)

    def __contains__(self, identifier: object) -> bool:
        return identifier in self._rows

    def row(self, identifier: str) -> int:
        """The position of an id; KeyError names the id."""
        try:
            return self._rows[identifier]
        except KeyError:
            raise KeyError(f"no text has the id {identifier!r} ({len(self)} ids)") from None

    def __getitem__(self, identifier: str) -> str:
        return self.texts[self.row(identifier)]


@dataclass(frozen=True)
class Collection:
    """Passages, query sets, qrels, and the triples to train on.

    Attributes:
        name: e.g. "PyDocs".
        passages: docids and passage texts.
        queries: set name ("train", "validation", "test1", "test2") → query ids and texts.
        qrels: the same set names → query id → docid → grade (an integer).
        sources: of the texts: distribution → version.
        triples: training triples in order; may be empty.
        titles: docid → title, of passages that have one, which is also in their text. Neither saved
            nor part of the fingerprint.

    Raises:
        DataError: queries and qrels have different sets, qrels or triples name an unknown query or
            passage, or a grade is not an integer within ±`trec.MAX_GRADE`.
    """

    name: str
    passages: Texts
    queries: dict[str, Texts]
    qrels: dict[str, Qrels]
    sources: dict[str, str] = field(default_factory=dict)
    triples: Sequence[Triple] = field(default_factory=list)
    titles: Mapping[str, str] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        if set(self.queries) != set(self.qrels):
            raise DataError(
                f"queries have the sets {sorted(self.queries)}, qrels {sorted(self.qrels)}"
            )
        problems = Problems()
        for name, qrels in self.qrels.items():
            if not re.fullmatch(r"[\w-]{1,100}", name):  # it is part of file names
                raise DataError(f"a set name must be letters, digits, _ and -, not {name!r}")
            where, queries = Path(f"qrels of {name!r}"), self.queries[name]
            for qid in qrels:
                if qid not in queries:
                    problems.unknown(where, 0, "query", qid, queries)
            rows = ((0, qid, docid, g) for qid, row in qrels.items() for docid, g in row.items())
            known_judgements(where, rows, problems, None, self.passages)
        train = self.queries.get("train", Texts([], []))
        for qid, *docids in self.triples:
            if qid not in train:
                problems.unknown(Path("triples"), 0, "training query", qid, train)
            for docid in docids:
                if docid not in self.passages:
                    problems.unknown(Path("triples"), 0, "passage", docid, self.passages)
        problems.check()

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits of a SHA-256 over name, ids, texts (in order), qrels, sources, triples."""
        content = [
            self.name,
            self.passages.ids,
            self.passages.texts,
            {name: [texts.ids, texts.texts] for name, texts in self.queries.items()},
            self.qrels,
            self.sources,
            self.triples,
        ]
        canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode("utf-8")).hexdigest()[:16]

    def save(self, folder: Path) -> None:
        """Write ``collection.tsv`` (docid, passage) and further text files to a folder, atomically.

        ``queries.SET.tsv`` (query id, query), ``qrels.SET.txt`` (TREC: query id, 0, docid, grade),
        ``triples.tsv`` and ``sources.json``. A folder with this collection is left unchanged.

        Raises:
            DataError: an id or text that a line of a file cannot hold.
            FileExistsError: ``folder`` holds something else.
        """
        folder = Path(folder)
        if self._is_in(folder):
            return
        files = {"collection.tsv": tsv(self.passages)}
        for name, texts in self.queries.items():
            files[f"queries.{name}.tsv"] = tsv(texts)
            files[f"qrels.{name}.txt"] = qrels_text(self.qrels[name])
        files["triples.tsv"] = "".join("\t".join(triple) + "\n" for triple in self.triples)
        about = {"name": self.name, "fingerprint": self.fingerprint, "sources": self.sources}
        files["sources.json"] = json.dumps(about, indent=2, sort_keys=True) + "\n"

        with atomic_folder(folder, same=self._is_in) as partial:
            for filename, text in files.items():
                (partial / filename).write_bytes(text.encode("utf-8"))

    def _is_in(self, folder: Path) -> bool:
        if not folder.is_dir() or all(path.name.startswith(".") for path in folder.iterdir()):
            return False
        if self.load(folder).fingerprint != self.fingerprint:
            raise FileExistsError(f"{folder} holds another collection; remove it or choose another")
        return True

    @classmethod
    def load(cls, folder: Path) -> Collection:
        """Read and validate what `save` wrote.

        Raises:
            FileNotFoundError: there is no such folder.
            DataError: names the first line of each kind of fault in a file (`Problems`): wrong
                number of columns, bad UTF-8, duplicate id, empty text, unknown id, a grade that is
                not an integer; or the fingerprint is not the recorded one, or the folder's name.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise FileNotFoundError(f"no collection at {folder}: the folder does not exist")
        problems = Problems()
        about = read_about(folder / "sources.json", problems)
        passages = read_texts(folder / "collection.tsv", problems)
        queries: dict[str, Texts] = {}
        qrels: dict[str, Qrels] = {}
        for path in sorted(folder.glob("queries.*.tsv")):
            name = path.name.removeprefix("queries.").removesuffix(".tsv")
            queries[name] = read_texts(path, problems, empty=True)
            rows = read_judgements(folder / f"qrels.{name}.txt", problems, empty=True)
            qrels[name] = known_judgements(
                folder / f"qrels.{name}.txt", rows, problems, queries[name], passages
            )
        if not queries:
            problems.add(folder, 0, "no file queries.SET.tsv")
        train = queries.get("train", Texts([], []))
        triples = read_triples(folder / "triples.tsv", train, passages, problems, empty=True)
        problems.check()
        collection = cls(about["name"], passages, queries, qrels, about["sources"], triples)
        recorded = {"sources.json": about["fingerprint"], "the folder's name": folder.name}
        for origin, expected in recorded.items():
            if _FINGERPRINT.fullmatch(expected) and expected != collection.fingerprint:
                raise DataError(
                    f"{folder}: fingerprint {collection.fingerprint}, but {origin} has {expected};"
                    " a file was changed after the collection was saved"
                )
        return collection


def tsv(texts: Texts) -> str:
    """Return lines of id, tab, text."""
    lines = []
    for identifier, text in zip(texts.ids, texts.texts, strict=True):
        if fault := id_fault(identifier):
            raise DataError(fault)
        if not text.strip() or re.search(r"[\t\n\r]", text):
            raise DataError(
                f"text of {identifier!r} must be non-empty and without tabs or line breaks,"
                f" not {text[:60]!r}"
            )
        lines.append(f"{identifier}\t{text}\n")
    return "".join(lines)


def id_fault(identifier: str) -> str:
    """Why a line of a file cannot begin with an id; "" if it can."""
    if identifier.split() == [identifier] and identifier[0] != "\ufeff":
        return ""
    return f"id {identifier!r} is empty or has white space or a byte order mark"


def read_about(path: Path, problems: Problems) -> dict:
    """Read ``sources.json``; faults are noted in ``problems``."""
    fault = 'expected {"name": text, "fingerprint": text, "sources": {text: text}}'
    try:
        about = json.loads(path.read_bytes())
        texts = [about["name"], about["fingerprint"], *about["sources"].values()]
        if unsafe := active([about["name"], about["sources"]]):
            fault = unsafe
        elif all(isinstance(value, str) for value in texts):
            return dict(about)
    except FileNotFoundError:
        fault = "file not found"
    except (ValueError, RecursionError) as error:
        fault = f"not valid JSON ({error})"
    except (LookupError, TypeError, AttributeError):
        pass
    problems.add(path, 0, fault)
    return {"name": "", "fingerprint": "", "sources": {}}


def read_queries(path: Path, *, trusted: bool = False) -> Texts:
    """Read lines of query id, tab, query; DataError names the first line of each kind of fault.

    ``trusted``: whether this library wrote the file, which may then be empty.
    """
    problems = Problems()
    queries = read_texts(Path(path), problems, empty=trusted)
    problems.check()
    return queries


# ---- rows of files; faults are noted in ``problems`` --------------------------------------------

Rows = Iterator[tuple[int, str, str]]
"""Line number (from 1), id, text."""
Lines = dict[Path, dict[str, int]]
"""File → id → line number."""


def read_texts(
    path: Path,
    problems: Problems,
    rows: Rows | None = None,
    *,
    empty: bool = False,
    blank: bool = False,
    lines: Lines | None = None,
) -> Texts:
    """Read ids and texts from ``rows``, by default lines of id, tab, text.

    ``empty``: whether there may be none; ``blank``: whether a text may be empty. ``lines``: ids of
    all files whose ids must differ, to which this file's are added.
    """
    if rows is None:
        columns = read_columns(path, 2, problems, empty=empty)
        rows = ((number, identifier, text) for number, (identifier, text) in columns)
    lines = {} if lines is None else lines
    numbers = lines.setdefault(path, {})
    texts: dict[str, str] = {}
    for number, identifier, text in rows:
        before = next((file for file, known in lines.items() if identifier in known), None)
        if fault := id_fault(identifier):
            problems.add(path, number, fault)
        elif before is not None:
            line = lines[before][identifier]
            at = f"line {line}" if before == path else f"{before.name}:{line}"
            problems.add(path, number, f"id {identifier!r} occurs already in {at}")
        else:
            numbers[identifier] = number
            texts[identifier] = text
            if not text.strip() and not blank:
                problems.add(path, number, f"the text of {identifier!r} is empty")
    return Texts(list(texts), list(texts.values()))


def read_triples(
    path: Path,
    queries: Texts | None,
    passages: Texts,
    problems: Problems,
    *,
    empty: bool = False,
    judged: Mapping[str, Path] | None = None,
) -> list[Triple]:
    """Read training triples: query id, docid of the positive, docid of the negative.

    ``queries``: the training queries; None are not checked. With ``judged`` (query id → file), they
    are all queries, and those of triples become training queries and must not be judged.
    """
    triples: list[Triple] = []
    for number, (qid, *docids) in read_columns(path, 3, problems, empty=empty):
        known = [qid in (queries or [qid]), *(docid in passages for docid in docids)]
        if not any(known) and " " in qid + "".join(docids):
            problems.add(path, number, _TEXT_TRIPLES)
            continue
        if not any(known) and number == 1:
            named = ", ".join(map(repr, (qid, *docids)))
            hint = "if this is a header, remove it: sed -i 1d FILE"
            problems.add(path, 1, f"unknown ids {named}; {hint}")
            continue
        if queries is not None and qid not in queries:
            what = "training query" if judged is None else "query"
            problems.unknown(path, number, what, qid, queries)
        elif judged is not None and qid in judged:
            what = f"query {qid!r} is judged in {judged[qid].name}; training must not use it"
            problems.add(path, number, what)
        for docid in docids:
            if docid not in passages:
                problems.unknown(path, number, "passage", docid, passages)
        triples.append((qid, docids[0], docids[1]))
    return triples


_TEXT_TRIPLES = (
    "expected the ids of a query and of two passages, found texts; a Hugging Face dataset on disk"
    " (columns query, positive, negative) may have texts"
)
