"""A collection: passages, query sets, graded qrels and training triples; its files and fingerprint."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from adaptive_margins.errors import AdaptiveMarginsError
from adaptive_margins.files import whole_folder

Qrels = dict[str, dict[str, int]]
"""Query id → docid → grade."""
Run = dict[str, dict[str, float]]
"""Query id → docid → score."""
Triple = tuple[str, str, str]
"""Query id, docid of the positive, docid of the negative."""

_SHOWN = 20  # malformed lines listed in one error
_FINGERPRINT = re.compile(r"[0-9a-f]{16}")


class DataError(AdaptiveMarginsError, ValueError):
    """Malformed data. The message lists every problem as ``file:line: what`` (at most 20)."""


class Problems:
    """Collects what is wrong with some files, so that one error can report all of it."""

    def __init__(self) -> None:
        self._found: list[str] = []

    def add(self, path: Path, line: int, what: str) -> None:
        """Note that line ``line`` (from 1; 0 for the whole file) of ``path`` is wrong."""
        self._found.append(f"{path}:{line}: {what}" if line else f"{path}: {what}")

    def check(self) -> None:
        """Raise `DataError` if anything was noted."""
        if self._found:
            more = len(self._found) - _SHOWN
            lines = self._found[:_SHOWN] + ([f"… and {more} more"] if more > 0 else [])
            raise DataError("malformed data\n  " + "\n  ".join(lines))


def read_columns(
    path: Path, columns: int, problems: Problems, *, separator: str | None = "\t"
) -> Iterator[tuple[int, list[str]]]:
    """Yield (line number from 1, cells) of a UTF-8 text file whose lines have ``columns`` cells.

    ``separator`` None splits at white space, as TREC files are read. Lines that are not valid
    UTF-8, or have another number of cells, are noted in ``problems`` and left out.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        problems.add(path, 0, "file not found")
        return
    yield from split_columns(_decoded(path, data, problems), path, columns, problems, separator)


def _decoded(path: Path, data: bytes, problems: Problems) -> Iterator[tuple[int, str]]:
    # Split at line feeds only: other Unicode line separators may occur inside a text.
    for number, raw in enumerate(data.removesuffix(b"\n").split(b"\n") if data else [], start=1):
        try:
            yield number, raw.removesuffix(b"\r").decode("utf-8")
        except UnicodeDecodeError as error:
            problems.add(path, number, f"not valid UTF-8 (byte {error.start + 1} of the line)")


def split_columns(
    lines: Iterable[tuple[int, str]],
    path: Path,
    columns: int,
    problems: Problems,
    separator: str | None,
) -> Iterator[tuple[int, list[str]]]:
    """Line number and cells of lines of ``path``; those of another number of cells are noted and left out."""
    for number, line in lines:
        cells = line.split(separator)
        if len(cells) != columns:
            kind = "tab-separated" if separator == "\t" else "white-space separated"
            problems.add(path, number, f"{columns} {kind} columns expected, {len(cells)} found")
            continue
        yield number, cells


@dataclass(frozen=True)
class Texts:
    """Ids and texts in one order; the position of an id is its row in any matrix of embeddings.

    Raises:
        ValueError: ids and texts differ in number, or an id occurs twice.
    """

    ids: Sequence[str]
    texts: Sequence[str]

    def __post_init__(self) -> None:
        if len(self.ids) != len(self.texts):
            raise ValueError(f"{len(self.ids)} ids but {len(self.texts)} texts")
        if len(self._rows) != len(self.ids):
            twice = [i for i, n in Counter(self.ids).items() if n > 1]
            raise ValueError(f"ids must be unique, but {twice[0]!r} occurs more than once")

    @cached_property
    def _rows(self) -> dict[str, int]:
        return {identifier: row for row, identifier in enumerate(self.ids)}

    def __len__(self) -> int:
        return len(self.ids)

    def __contains__(self, identifier: str) -> bool:
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
        name: what the collection is called, e.g. "PyDocs".
        passages: docids and passage texts.
        queries: set name ("train", "validation", "test1", "test2") → query ids and texts.
        qrels: the same set names → query id → docid → grade (an integer).
        sources: where the texts come from: distribution → version.
        triples: what encoders are trained on, in order; may be empty.

    Raises:
        ValueError: queries and qrels have different sets, or qrels or triples name an unknown
            query or passage, or a grade is not an integer.
    """

    name: str
    passages: Texts
    queries: dict[str, Texts]
    qrels: dict[str, Qrels]
    sources: dict[str, str] = field(default_factory=dict)
    triples: Sequence[Triple] = field(default_factory=list)

    def __post_init__(self) -> None:
        if set(self.queries) != set(self.qrels):
            raise ValueError(
                f"queries have the sets {sorted(self.queries)}, qrels {sorted(self.qrels)}"
            )
        for name, qrels in self.qrels.items():
            for qid, judged in qrels.items():
                if qid not in self.queries[name]:
                    raise ValueError(f"qrels of {name!r} judge the unknown query {qid!r}")
                for docid, grade in judged.items():
                    if docid not in self.passages:
                        raise ValueError(f"qrels of {name!r} judge the unknown passage {docid!r}")
                    if type(grade) is not int:
                        raise ValueError(
                            f"grade of {qid!r}, {docid!r} must be an integer, not {grade!r}"
                        )
        train = self.queries.get("train", Texts([], []))
        for qid, *docids in self.triples:
            if qid not in train:
                raise ValueError(f"a triple has the query {qid!r}, which is not in the set 'train'")
            if unknown := [docid for docid in docids if docid not in self.passages]:
                raise ValueError(f"a triple has the unknown passage {unknown[0]!r}")

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
        """Write it as a folder of text files.

        ``collection.tsv`` (docid, passage), ``queries.SET.tsv`` (query id, query),
        ``qrels.SET.txt`` (TREC: query id, 0, docid, grade), ``triples.tsv`` and ``sources.json``.
        The files are written into a temporary folder beside ``folder``, which is renamed when it
        is whole. A folder that already holds this collection is left as it is.

        Raises:
            ValueError: an id or text that a line of a file cannot hold.
            FileExistsError: ``folder`` holds something else.
        """
        folder = Path(folder)
        if self._is_in(folder):
            return
        files = {"collection.tsv": tsv(self.passages)}
        for name, texts in self.queries.items():
            if not re.fullmatch(r"[\w-]+", name):
                raise ValueError(f"a set name must be letters, digits, _ and -, not {name!r}")
            files[f"queries.{name}.tsv"] = tsv(texts)
            files[f"qrels.{name}.txt"] = qrels_text(self.qrels[name])
        files["triples.tsv"] = "".join("\t".join(triple) + "\n" for triple in self.triples)
        about = {"name": self.name, "fingerprint": self.fingerprint, "sources": self.sources}
        files["sources.json"] = json.dumps(about, indent=2, sort_keys=True) + "\n"

        with whole_folder(folder, same=self._is_in) as partial:
            for filename, text in files.items():
                (partial / filename).write_bytes(text.encode("utf-8"))

    def _is_in(self, folder: Path) -> bool:
        if not folder.is_dir() or not any(folder.iterdir()):
            return False
        if self.load(folder).fingerprint != self.fingerprint:
            raise FileExistsError(f"{folder} holds another collection; remove it or choose another")
        return True

    @classmethod
    def load(cls, folder: Path) -> Collection:
        """Read and validate what `save` wrote.

        Raises:
            DataError: lists each malformed line as ``file:line`` (at most 20): wrong number of
                columns, bad UTF-8, duplicate id, empty text, unknown id in qrels, a grade that is
                not an integer; or the texts do not have the recorded fingerprint, or not the one
                that the folder is named by.
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
            queries[name] = read_texts(path, problems)
            qrels[name] = _read_qrels(
                folder / f"qrels.{name}.txt", queries[name], passages, problems
            )
        if not queries:
            problems.add(folder, 0, "no file queries.SET.tsv")
        train = queries.get("train", Texts([], []))
        triples: list[Triple] = []
        for number, (qid, positive, negative) in read_columns(folder / "triples.tsv", 3, problems):
            if qid not in train:
                problems.add(folder / "triples.tsv", number, f"{qid!r} is not a training query")
            for docid in (positive, negative):
                if docid not in passages:
                    problems.add(folder / "triples.tsv", number, f"unknown passage {docid!r}")
            triples.append((qid, positive, negative))
        problems.check()

        collection = cls(about["name"], passages, queries, qrels, about["sources"], triples)
        for expected, origin in (
            (about["fingerprint"], "sources.json"),
            (folder.name, "the folder's name"),
        ):
            if _FINGERPRINT.fullmatch(expected) and expected != collection.fingerprint:
                raise DataError(
                    f"{folder}: fingerprint {collection.fingerprint}, but {origin} says {expected};"
                    " a file was changed after the collection was saved"
                )
        return collection


def qrels_text(qrels: Qrels) -> str:
    """Qrels in TREC's four columns (query id, 0, docid, grade), sorted."""
    return "".join(
        f"{qid} 0 {docid} {grade}\n"
        for qid, judged in sorted(qrels.items())
        for docid, grade in sorted(judged.items())
    )


def add_judgement(
    qrels: Qrels, qid: str, docid: str, grade: str, path: Path, line: int, problems: Problems
) -> None:
    """Add a judgement read from a line, or note that its grade is no integer or its pair is judged already."""
    judged = qrels.setdefault(qid, {})
    if not re.fullmatch(r"[+-]?[0-9]{1,9}", grade):
        problems.add(path, line, f"grade {grade!r} is not an integer (of at most 9 digits)")
    elif docid in judged:
        problems.add(path, line, f"{qid!r} judges {docid!r} twice")
    else:
        judged[docid] = int(grade)


def tsv(texts: Texts) -> str:
    """Ids and texts, a line each with a tab between them."""
    for identifier, text in zip(texts.ids, texts.texts, strict=True):
        if not re.fullmatch(r"\S+", identifier):
            raise ValueError(f"an id must be non-empty and without white space, not {identifier!r}")
        if not text.strip() or re.search(r"[\t\n\r]", text):
            raise ValueError(
                f"text of {identifier!r} must be non-empty and without tabs or line breaks,"
                f" not {text[:60]!r}"
            )
    return "".join(f"{i}\t{text}\n" for i, text in zip(texts.ids, texts.texts, strict=True))


def read_about(path: Path, problems: Problems) -> dict:
    """What ``sources.json`` says of a saved collection; what is wrong is noted in ``problems``."""
    empty = {"name": "", "fingerprint": "", "sources": {}}
    try:
        about = json.loads(path.read_bytes())
    except FileNotFoundError:
        problems.add(path, 0, "file not found")
        return empty
    except ValueError as error:
        problems.add(path, 0, f"not valid JSON ({error})")
        return empty
    if not isinstance(about, dict) or not isinstance(about.get("sources"), dict):
        about = {}
    texts = [about.get("name"), about.get("fingerprint"), *about.get("sources", {}).values()]
    if not all(isinstance(value, str) for value in texts):
        problems.add(
            path, 0, 'expected {"name": text, "fingerprint": text, "sources": {text: text}}'
        )
        return empty
    return about


def read_texts(path: Path, problems: Problems) -> Texts:
    """Ids and texts, a line each with a tab between them; what is wrong is noted in ``problems``."""
    found: dict[str, str] = {}
    first: dict[str, int] = {}
    for number, (identifier, text) in read_columns(path, 2, problems):
        if not re.fullmatch(r"\S+", identifier):
            problems.add(path, number, f"id {identifier!r} is empty or has white space")
        elif identifier in found:
            problems.add(
                path, number, f"id {identifier!r} occurs already in line {first[identifier]}"
            )
        elif not text.strip():
            problems.add(path, number, f"the text of {identifier!r} is empty")
        else:
            found[identifier], first[identifier] = text, number
    return Texts(list(found), list(found.values()))


def _read_qrels(path: Path, queries: Texts, passages: Texts, problems: Problems) -> Qrels:
    qrels: Qrels = {}
    for number, (qid, _, docid, grade) in read_columns(path, 4, problems, separator=None):
        if qid not in queries:
            problems.add(path, number, f"unknown query {qid!r}")
        elif docid not in passages:
            problems.add(path, number, f"unknown passage {docid!r}")
        elif not re.fullmatch(r"[+-]?[0-9]+", grade):
            problems.add(path, number, f"grade {grade!r} is not an integer")
        elif docid in qrels.get(qid, {}):
            problems.add(path, number, f"{qid} judges {docid} twice")
        else:
            qrels.setdefault(qid, {})[docid] = int(grade)
    return qrels
