"""Collections in folders: BEIR, TREC/TSV, a Hugging Face dataset, or what `Collection.save` wrote.

All faults are reported at once, with file and line. Sets are called "train", "validation" and
"test"; any of them may be missing.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import re
import warnings
from collections import Counter
from collections.abc import Collection as Container
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from adaptive_margins.data.collection import (
    SETS,
    STANDARD,
    Collection,
    Lines,
    Rows,
    Texts,
    Triple,
    read_texts,
    read_triples,
)
from adaptive_margins.data.text import RECORDS, DataError, Problems, read_records
from adaptive_margins.data.trec import MAX_GRADE, Qrels, known_judgements, read_judgements, visible
from adaptive_margins.markup import active
from adaptive_margins.progress import bar

if TYPE_CHECKING:
    from datasets import Dataset

_DATASET = ("dataset_dict.json", "state.json")  # of save_to_disk
_QUERY_COLUMNS = ("query", "anchor", "question")
_TEXT_COLUMNS = re.compile(r"positive|negative(_\d+)?")
_UNREAD = re.compile(r".*_id|__index_level_\d+__")  # the latter from pandas
_LIST_COLUMNS = ("pos", "neg", "positive_passages", "negative_passages")
_COLUMNS = (
    "found the columns {}; expected query (anchor, question), positive and perhaps negative, or a"
    " layout with lists of passages. To convert: dataset.rename_columns({{old: new}}),"
    " dataset.select_columns([name, …]), jq -c '{{query: .old, positive: .other}}' FILE > NEW"
)
_HALF = re.compile("[\ud800-\udfff]")
_EXAMPLES = 5  # ids named in a warning
_KNOWN = "train, validation (or dev, valid, val) and test"

EXPECTED = """\
  BEIR: corpus.jsonl; queries.jsonl and qrels/train.tsv, qrels/dev.tsv, qrels/test.tsv (any of them)
        or qrels.tsv; triples.tsv; each file but the last also as .parquet, judgements as .jsonl
  TREC: collection.tsv; queries.tsv and qrels.txt; also queries_train.tsv, qrels_train.txt,
        queries_validation.tsv, qrels_validation.txt, triples.tsv, NAME.run
  rows of texts: a Hugging Face dataset (save_to_disk), or train.jsonl, dev.jsonl, test.jsonl or
        .parquet, with query, positive and perhaps negative (or negative_1, negative_2, …); query,
        a list of passages, labels; query, pos, neg (BGE); or Tevatron's columns
  a collection saved by this library: sources.json, collection.tsv, queries.SET.tsv, qrels.SET.txt,
        triples.tsv
Passages (corpus.jsonl or collection.tsv) are enough. A text file may be gzipped (NAME.gz)."""
"""The layouts, for an error."""


def read_folder(folder: Path) -> Collection:
    """Read a collection; its files determine its layout, one of `EXPECTED`.

    - BEIR: a passage is title, space, text. A set's queries are those that its qrels judge.
    - TREC: without ``queries_SET.tsv``, the set's queries are those of ``queries.tsv`` that its
      qrels (or triples) name, and are not in the test set.
    - Both: without qrels of "train", the positives of ``triples.tsv`` have grade 1.
    - Rows of texts: `read_dataset`.
    - What `Collection.save` wrote; sets that are neither "train" nor "validation" are joined as
      "test".

    A collection may lack queries. In texts, tabs and line breaks become spaces. A UserWarning names
    empty passages, and queries of two sets that have the same text.

    Raises:
        DataError: the folder has none of these layouts, or two; or names the first line of each
            kind of fault in a file (`Problems`).
    """
    folder = Path(folder)
    if not folder.is_dir():
        what = "is a file, not a folder" if folder.exists() else "does not exist"
        if folder.is_symlink() and not folder.exists():
            what = f"is a link to {os.readlink(folder)}, which does not exist"
        raise DataError(f"{folder} {what}. A collection is a folder:\n{EXPECTED}")
    beir = _variants(folder, "corpus.jsonl", "corpus.parquet")
    trec = _variants(folder, "collection.tsv")
    if (folder / "passages.arrow").exists():
        what = "is a converted collection, which `reproduce` uses; name its ir_datasets id instead"
        raise DataError(f"{folder} {what}")
    if (folder / "sources.json").exists() and trec:
        return standard_sets(Collection.load(folder), str(folder / "collection.tsv"))
    layouts = [found[0] for found in (beir, trec, _variants(folder, *_DATASET)) if found]
    if len(layouts) > 1:
        one, other = layouts[0].name, layouts[1].name
        raise DataError(f"{folder} has both {one} and {other}; remove one of them")
    if beir or trec:
        return _read_files(folder, bool(beir))
    rows = (split + end for split in STANDARD for end in RECORDS)
    if not layouts and not _variants(folder, *rows):
        names = [entry.name for entry in visible(folder)]
        found = ", ".join(names[:10]) + " …" * (len(names) > 10) or "nothing"
        raise DataError(f"{folder} has no collection (found: {found}). Expected:\n{EXPECTED}")
    return read_dataset(folder)


# ---- layouts -------------------------------------------------------------------------------------


def _names(beir: bool, part: str) -> tuple[list[str], list[str]]:
    """The names that the files of a set's queries and judgements may have."""
    if beir:
        places = [*(f"qrels/{called}" for called in SETS[part]), *["qrels"] * (part == "test")]
        judging = [f"{place}.{end}" for place in places for end in ("tsv", "jsonl", "parquet")]
        return ["queries.jsonl", "queries.parquet"], judging
    ends = [*[""] * (part == "test"), *(f"_{called}" for called in SETS[part])]
    return [f"queries{end}.tsv" for end in ends], [f"qrels{end}.txt" for end in ends]


@dataclasses.dataclass
class _Read:
    """What was read of a collection so far, and its faults."""

    problems: Problems = dataclasses.field(default_factory=Problems)
    queries: dict[str, Texts] = dataclasses.field(default_factory=dict)
    qrels: dict[str, Qrels] = dataclasses.field(default_factory=dict)
    triples: list[Triple] = dataclasses.field(default_factory=list)


def _read_files(folder: Path, beir: bool) -> Collection:
    """Read BEIR's layout or TREC's: passages, and the queries and judgements of each set."""
    read = _Read()
    problems, queries, qrels = read.problems, read.queries, read.qrels
    corpus = ("corpus.jsonl", "corpus.parquet") if beir else ("collection.tsv",)
    path = cast(Path, _only(folder, *corpus, problems=problems))
    titles: dict[str, str] = {}
    records = _beir_rows(path, problems, titles) if beir else None
    passages = read_texts(path, problems, records, blank=True)
    if not len(passages):  # what else is wrong follows from it
        problems.check()
    lines: Lines = {}  # of the query ids of all sets together
    judged: dict[str, Path] = {}
    listed: dict[str, Texts] = {}  # set → queries of its file; BEIR's file is that of "test"
    for name in ("test", "train", "validation"):
        asking, judging = _names(beir, name)
        one_file = beir and name != "test"
        if not one_file and (found := _only(folder, *asking, problems=problems)):
            records = _beir_rows(found, problems) if beir else None
            listed[name] = read_texts(found, problems, records, lines=lines)
        asked = listed.get(name, listed.get("test"))
        if found := _only(folder, *judging, problems=problems):
            if asked is None:
                problems.add(found, 0, f"there is no {asking[0]}, which it judges")
            rows = read_judgements(found, problems)
            qrels[name] = known_judgements(found, rows, problems, asked, passages, judged)
            own = name in listed and not beir
            queries[name] = listed[name] if own else _some(asked, qrels[name])
    if found := _only(folder, "triples.tsv", problems=problems):
        _train_on(found, listed, passages, judged, read)
    shared = {qid for name in queries.keys() - listed.keys() for qid in queries[name].ids}
    if "test" in queries and shared:
        queries["test"] = _some(queries["test"], set(queries["test"].ids) - shared)
    for name in sorted(listed.keys() - queries.keys()):
        if name != "test" or not shared:
            asking, judging = _names(beir, name)
            problems.add(folder / judging[0], 0, f"file not found; it should judge {asking[0]}")
    if not beir:
        _warn_of_others(folder, r"(?:queries|qrels)_([^.]*)\.(tsv|txt)")
    elif (folder / "qrels").is_dir():
        _warn_of_others(folder / "qrels", r"([^.]*)\.(tsv|jsonl|parquet)")
    layout = "BEIR" if beir else "TREC"
    return dataclasses.replace(_finish(folder, layout, path, passages, read), titles=titles)


def _train_on(
    path: Path,
    listed: Mapping[str, Texts],
    passages: Texts,
    judged: Mapping[str, Path],
    read: _Read,
) -> None:
    """Read ``triples.tsv``; derive training queries and judgements from it if there are none."""
    known = read.queries.get("train", listed.get("train"))
    asked = listed.get("test") if known is None else known
    if asked is None:
        read.problems.add(path, 0, "there is no queries_train.tsv, which it refers to")
    others = judged if known is None else None
    read.triples = read_triples(path, asked, passages, read.problems, judged=others)
    positives: Qrels = {}
    for qid, positive, _ in read.triples:
        positives.setdefault(qid, {})[positive] = 1
    read.queries.setdefault("train", _some(asked, positives) if known is None else known)
    read.qrels.setdefault("train", positives)


def read_dataset(path: Path) -> Collection:
    """Read rows of texts (`_row`): queries with positives and perhaps negatives.

    ``path`` is a Hugging Face ``Dataset`` or ``DatasetDict`` on disk, a folder of ``train.jsonl``,
    ``validation.jsonl`` and ``test.jsonl`` (or other names of `SETS`), or a file, which is as a
    Dataset the training set; files may be ``.parquet``. Distinct texts are passages (d1, d2, … by
    first occurrence) or queries of their set (q1, q2, …). In the training set each positive makes a
    triple with each negative of its row; other negatives are passages. Of several grades of a
    passage for a query the highest counts. Tabs and line breaks become spaces.

    Raises:
        DataError: other columns or splits, a row (from 1) with a value that is not a text or is
            empty; or the files cannot be read.
    """
    path = Path(path)
    read = _Read()
    problems, queries, qrels = read.problems, read.queries, read.qrels
    docids: dict[str, str] = {}
    layout, splits = _splits(path, problems)
    order = [*STANDARD, *sorted(splits)]
    for split in sorted(splits, key=order.index):
        name = STANDARD.get(split, "")
        if not name or name in qrels:
            what = f"split {split!r}: expected {_KNOWN}, each once"
            problems.add(path, 0, what)
            continue
        where, rows = splits[split]
        first = 1 + sum(map(len, queries.values()))
        qids: dict[str, str] = {}  # query → id
        judged: Qrels = {}
        for number, record in bar(f"reading {where.name}", rows, unit="rows"):
            if isinstance(texts := _row(record), str):
                problems.add(where, number, texts)
                continue
            (query, _), *others = texts
            qid = qids.setdefault(query, f"q{first + len(qids)}")
            found = [(docids.setdefault(text, f"d{len(docids) + 1}"), g) for text, g in others]
            best = dict(reversed(found))
            if positives := {docid: best[docid] for docid, grade in found if grade > 0}:
                judged[qid] = dict(Counter(judged.get(qid)) | Counter(positives))
            if name == "train":
                negatives = [docid for docid, grade in found if grade <= 0]
                read.triples += itertools.product([qid], positives, negatives)
        queries[name], qrels[name] = Texts(list(qids.values()), list(qids)), judged
    passages = Texts(list(docids.values()), list(docids))
    return _finish(path, layout, path, passages, read)


def _splits(path: Path, problems: Problems) -> tuple[str, dict[str, tuple[Path, Any]]]:
    """The layout; and split → where its rows are, and their numbers and columns."""
    if not _variants(path, *_DATASET):
        files = {"train": path}
        if path.is_dir():
            names = {split: (f"{split}.jsonl", f"{split}.parquet") for split in STANDARD}
            found = {split: _only(path, *names[split], problems=problems) for split in names}
            files = {split: file for split, file in found.items() if file}
            _warn_of_others(path, r"([^.]*)\.(jsonl|parquet)")
        read = {split: (file, read_records(file, problems)) for split, file in files.items()}
        return "rows of texts", read
    import datasets

    with _readable(path):
        loaded = datasets.load_from_disk(str(path))
    one = not isinstance(loaded, datasets.DatasetDict)
    splits = {"train": loaded} if one else dict(loaded)
    places = ((split, path if one else path / split) for split in splits)
    return "Hugging Face dataset", {s: (place, _numbered(splits[s], place)) for s, place in places}


def _numbered(rows: Dataset, place: Path) -> Iterator[tuple[int, Any]]:
    with _readable(place):
        yield from enumerate(rows, start=1)


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # whatever the readers of datasets raise about damaged files
        raise DataError(f"{path} cannot be read as a Hugging Face dataset: {error}") from error


def _row(record: Mapping[str, Any]) -> list[tuple[str, int]] | str:
    """Texts and grades of a row: the query (0), positives, negatives (0); or what is wrong.

    The columns are the query (`_QUERY_COLUMNS`) and ``positive``, perhaps with ``negative`` or
    ``negative_1``, …; a list of passages and ``labels``, their grades, positives from 1; or the
    lists of `_LIST_COLUMNS` (BGE, Tevatron), where others are not read. Nor are ids and an index.
    """
    query = next((column for column in _QUERY_COLUMNS if column in record), "")
    rest = {c: x for c, x in record.items() if c != query and not _UNREAD.fullmatch(c)}
    found: list[tuple[str, Any, int]] = [(query, record.get(query), 0)]
    if query and len(rest) == 2 and "labels" in rest:
        labels = rest.pop("labels")
        ((column, docs),) = rest.items()
        if not (isinstance(docs, list) and isinstance(labels, list) and len(docs) == len(labels)):
            return f"{column!r} and 'labels' must be lists of the same length"
        if odd := [x for x in labels if x not in range(-MAX_GRADE, MAX_GRADE + 1)]:
            return f"'labels' must be integers within ±{MAX_GRADE:,}, not {odd[0]!r:.60}"
        found += [(column, doc, int(label)) for doc, label in zip(docs, labels, strict=True)]
    elif query and "positive" in rest and all(map(_TEXT_COLUMNS.fullmatch, rest)):
        found += [(column, text, int(column == "positive")) for column, text in rest.items()]
    elif query and (lists := [c for c in _LIST_COLUMNS if rest.get(c) is not None]):
        if wrong := [c for c in lists if not isinstance(rest[c], list)]:
            return f"{wrong[0]!r} must be a list, not {rest[wrong[0]]!r:.60}"
        found += [(c, _titled(doc), int(c.startswith("pos"))) for c in lists for doc in rest[c]]
    else:
        return _COLUMNS.format(", ".join(map(repr, record)) or "none")
    found[1:] = sorted(found[1:], key=lambda part: -part[2])
    wrong = [
        f"{column!r} must be a text that is not empty, not {text!r:.60}"
        for column, text, _ in found
        if not isinstance(text, str) or not text.strip() or _HALF.search(text)
    ]
    return "; ".join(wrong) or [(one_line(text), grade) for _, text, grade in found]


def _titled(doc: Any) -> Any:
    """A passage of Tevatron as title, space, text; anything else as it is."""
    if not isinstance(doc, dict):
        return doc
    parts = [doc.get("title") or "", doc.get("text") or ""]
    return " ".join(filter(str.strip, parts)) if {*map(type, parts)} == {str} else doc


def standard_sets(collection: Collection, where: str) -> Collection:
    """Join all sets but "train" and "validation" as "test"; ``where`` they were read from.

    Raises:
        DataError: joined sets share a query id.
    """
    parts: dict[str, list[str]] = {}
    for name in sorted(collection.queries):
        parts.setdefault(STANDARD.get(name, "test"), []).append(name)
    queries, qrels = {}, {}
    for name, old in parts.items():
        try:
            queries[name] = Texts(
                [qid for n in old for qid in collection.queries[n].ids],
                [text for n in old for text in collection.queries[n].texts],
            )
        except ValueError as error:
            raise DataError(f"{where}: {' and '.join(old)} share a query: {error}") from error
        qrels[name] = {qid: judged for n in old for qid, judged in collection.qrels[n].items()}
    warn(collection.passages, queries, where)
    return dataclasses.replace(collection, queries=queries, qrels=qrels)


def _finish(folder: Path, layout: str, corpus: Path, passages: Texts, read: _Read) -> Collection:
    read.problems.check()
    if not len(passages):
        raise DataError(f"{corpus} has no passage")
    warn(passages, read.queries, str(corpus))
    if fault := active(name := folder.resolve().name):
        raise DataError(f"{folder}: {fault}; rename the folder")
    queries = {part: read.queries[part] for part in SETS if part in read.queries}
    qrels = {part: read.qrels[part] for part in queries}
    return Collection(name, passages, queries, qrels, {"layout": layout}, read.triples)


def warn(passages: Texts, queries: Mapping[str, Texts], where: str, unit: str = "line") -> None:
    """Warn of empty passages (one a ``unit`` of ``where``), and of equal queries in two sets."""
    empty = [
        f"{docid!r} ({unit} {number})"
        for number, (docid, text) in enumerate(_pairs(passages), start=1)
        if not text.strip()
    ]
    if empty:
        what = "passages without text are never returned by a search"
        warnings.warn(f"{where}: {what}: {_first(empty)}", stacklevel=4)
    for one, other in itertools.combinations([name for name in SETS if name in queries], 2):
        qids = {text: qid for qid, text in _pairs(queries[one])}
        twice = [
            f"{qids[text]!r} and {qid!r}" for qid, text in _pairs(queries[other]) if text in qids
        ]
        if twice:
            what = f"queries of {one} and {other} with the same text: {_first(twice)}"
            warnings.warn(f"{where}: {what}; measures on {other} may be too high", stacklevel=4)


def _pairs(texts: Texts) -> Iterator[tuple[str, str]]:
    return zip(texts.ids, texts.texts, strict=True)


def _first(items: list[str]) -> str:
    """The number of items, and the first of them."""
    more = ", …" if len(items) > _EXAMPLES else ""
    return f"{len(items)}, {', '.join(items[:_EXAMPLES])}{more}"


# ---- files ---------------------------------------------------------------------------------------


def _variants(folder: Path, *names: str) -> list[Path]:
    """Those of the files that exist, gzipped or not, dangling links included."""
    paths = [folder / (name + end) for name in names for end in ("", ".gz")]
    return [path for path in paths if os.path.lexists(path)]


def _only(folder: Path, *names: str, problems: Problems) -> Path | None:
    """The file with one of these names, gzipped or not, if any. Several are a problem."""
    found = _variants(folder, *names)
    for other in found[1:]:
        problems.add(other, 0, f"{found[0].name} exists, too; keep one of them")
    return found[0] if found else None


def _warn_of_others(folder: Path, pattern: str) -> None:
    """Warn of files of sets (``pattern`` has the set's name as its group) with unknown names."""
    for path in visible(folder):
        if (found := re.match(pattern, path.name)) and found[1] not in STANDARD:
            warnings.warn(f"{path} is not read; known sets are {_KNOWN}", stacklevel=4)


def _some(texts: Texts | None, wanted: Container[str]) -> Texts:
    kept = {i: text for i, text in _pairs(texts) if i in wanted} if texts else {}
    return Texts(list(kept), list(kept.values()))


def _beir_rows(path: Path, problems: Problems, titles: dict[str, str] | None = None) -> Rows:
    """Read records; with ``titles``, to which they are added, a text is title, space, text."""
    for number, record in read_records(path, problems):
        fields = _fields(record)
        if isinstance(fields, str):
            problems.add(path, number, fields)
            continue
        identifier, title, text = fields
        if titles is not None:
            if title.strip():
                titles[identifier] = title
            text = " ".join(part for part in (title, text) if part.strip())
        yield number, identifier, text


def _fields(record: Mapping[str, Any]) -> tuple[str, str, str] | str:
    """``_id``, ``title`` and ``text`` of a record, or what is wrong with it."""
    fields: dict[str, Any] = {key: record.get(key) for key in ("_id", "title", "text")}
    if fields["title"] is None:
        fields["title"] = ""
    if type(fields["_id"]) is int:
        fields["_id"] = str(fields["_id"])
    wrong = [
        f"{key!r} must be a text, not {value!r:.60}" if key in record else f"{key!r} is missing"
        for key, value in fields.items()
        if not isinstance(value, str)
    ]
    if wrong and not {"_id", "text"} <= record.keys():
        wrong.append(f"found {', '.join(map(repr, record)) or 'no keys'}")
        if "docid" in record:
            wrong.append("convert: jq -c '{_id: .docid, title, text}' FILE > NEW")
    if wrong:
        return "; ".join(wrong)
    if _HALF.search("".join(fields.values())):
        return "an escape in the JSON is half of a character (\\ud800 to \\udfff)"
    return fields["_id"], one_line(fields["title"]), one_line(fields["text"])


def one_line(text: str) -> str:
    """The text with spaces instead of tabs and line breaks, as in the files of a collection."""
    return re.sub(r"[\t\r\n]", " ", text)
