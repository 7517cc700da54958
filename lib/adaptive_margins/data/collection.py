"""A collection: passages, query sets, graded qrels and training triples; its files and fingerprint."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from adaptive_margins.data.text import DataError, Problems, alike, read_columns
from adaptive_margins.data.trec import MAX_GRADE, Qrels, qrels_text, read_judgements
from adaptive_margins.files import whole_folder

Triple = tuple[str, str, str]
"""Query id, docid of the positive, docid of the negative."""

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
        titles: docid → title, of passages that have one. The passages hold them, too; they are neither saved nor part of
            the fingerprint.

    Raises:
        DataError: queries and qrels have different sets, or qrels or triples name an unknown
            query or passage, or a grade is not an integer.
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
        for name, qrels in self.qrels.items():
            for qid, judged in qrels.items():
                if qid not in self.queries[name]:
                    hint = alike([qid], self.queries[name].ids)
                    raise DataError(
                        f"qrels of {name!r} judge the unknown query {qid!r}; {hint}".rstrip("; ")
                    )
                for docid, grade in judged.items():
                    if docid not in self.passages:
                        hint = alike([docid], self.passages.ids)
                        raise DataError(
                            f"qrels of {name!r} judge the unknown passage {docid!r}; {hint}".rstrip(
                                "; "
                            )
                        )
                    if type(grade) is not int:
                        raise DataError(
                            f"grade of {qid!r}, {docid!r} must be an integer, not {grade!r}"
                        )
                    if abs(grade) > MAX_GRADE:
                        raise DataError(
                            f"grade of {qid!r}, {docid!r} must lie within ±{MAX_GRADE:,}, not {grade}"
                        )
        train = self.queries.get("train", Texts([], []))
        for qid, *docids in self.triples:
            if qid not in train:
                raise DataError(f"a triple has the query {qid!r}, which is not in the set 'train'")
            if unknown := [docid for docid in docids if docid not in self.passages]:
                raise DataError(f"a triple has the unknown passage {unknown[0]!r}")

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
            DataError: an id or text that a line of a file cannot hold.
            FileExistsError: ``folder`` holds something else.
        """
        folder = Path(folder)
        if self._is_in(folder):
            return
        files = {"collection.tsv": tsv(self.passages)}
        for name, texts in self.queries.items():
            if not re.fullmatch(r"[\w-]+", name):
                raise DataError(f"a set name must be letters, digits, _ and -, not {name!r}")
            files[f"queries.{name}.tsv"] = tsv(texts)
            files[f"qrels.{name}.txt"] = qrels_text(self.qrels[name])
        files["triples.tsv"] = "".join("\t".join(triple) + "\n" for triple in self.triples)
        about = {"name": self.name, "fingerprint": self.fingerprint, "sources": self.sources}
        files["sources.json"] = json.dumps(about, indent=2, sort_keys=True) + "\n"

        with whole_folder(folder, same=self._is_in) as partial:
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
            queries[name] = read_texts(path, problems, empty=True)
            qrels[name] = _read_qrels(
                folder / f"qrels.{name}.txt", queries[name], passages, problems
            )
        if not queries:
            problems.add(folder, 0, "no file queries.SET.tsv")
        train = queries.get("train", Texts([], []))
        triples: list[Triple] = []
        for number, (qid, positive, negative) in read_columns(
            folder / "triples.tsv", 3, problems, empty=True
        ):
            if qid not in train:
                problems.unknown(folder / "triples.tsv", number, "training query", qid, train.ids)
            for docid in (positive, negative):
                if docid not in passages:
                    problems.unknown(folder / "triples.tsv", number, "passage", docid, passages.ids)
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


def tsv(texts: Texts) -> str:
    """Ids and texts, a line each with a tab between them."""
    for identifier, text in zip(texts.ids, texts.texts, strict=True):
        if not re.fullmatch(r"\S+", identifier):
            raise DataError(f"an id must be non-empty and without white space, not {identifier!r}")
        if not text.strip() or re.search(r"[\t\n\r]", text):
            raise DataError(
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


def read_queries(path: Path, *, own: bool = False) -> Texts:
    """Read query ids and queries, a line each with a tab between them.

    ``own``: whether this library wrote the file: then it may be empty.

    Raises:
        DataError: names the first line of each kind of fault.
    """
    problems = Problems()
    queries = read_texts(Path(path), problems, empty=own)
    problems.check()
    return queries


def read_texts(path: Path, problems: Problems, *, empty: bool = False) -> Texts:
    """Ids and texts, a line each with a tab between them; what is wrong is noted in ``problems``.

    ``empty``: whether there may be none.
    """
    found: dict[str, str] = {}
    first: dict[str, int] = {}
    for number, (identifier, text) in read_columns(path, 2, problems, empty=empty):
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
    for number, qid, docid, grade in read_judgements(path, problems, empty=True):
        if qid not in queries:
            problems.unknown(path, number, "query", qid, queries.ids)
        elif docid not in passages:
            problems.unknown(path, number, "passage", docid, passages.ids)
        else:
            qrels.setdefault(qid, {})[docid] = grade
    return qrels
