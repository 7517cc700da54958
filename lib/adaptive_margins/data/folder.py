"""Collections in folders of the usual layouts: BEIR, TREC/TSV, a Hugging Face dataset, or what `Collection.save` wrote.

Nothing is guessed: a line that does not fit is reported with its file and number, and all of them at once. Sets are called
"train", "validation" and "test"; any of them may be missing.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import warnings
from collections.abc import Collection as Container
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import cast

from adaptive_margins.data.collection import Collection, Texts, Triple
from adaptive_margins.data.text import DataError, Problems, read_columns, read_lines
from adaptive_margins.data.trec import Judgements, Qrels, Run, read_judgements, read_run
from adaptive_margins.progress import Countdown

SETS = {"train": ("train",), "validation": ("validation", "dev"), "test": ("test",)}
"""Name of a set → what files and splits of that set may be called."""
_STANDARD = {called: name for name, names in SETS.items() for called in names}
_ENDS = {"test": ("",), "train": ("_train",), "validation": ("_validation", "_dev")}
QUERY_COLUMNS = ("query", "anchor", "question")
"""What the column of the queries may be called in a Hugging Face dataset, as Sentence Transformers calls them."""
_EXAMPLES = 5  # ids named in a warning
_RUN = re.compile(r"(.+)\.(run|trec)(\.gz)?")

EXPECTED = """\
  BEIR: corpus.jsonl; queries.jsonl and qrels/train.tsv, qrels/dev.tsv, qrels/test.tsv (any of them)
  TREC: collection.tsv; queries.tsv and qrels.txt; also queries_train.tsv, qrels_train.txt,
        queries_validation.tsv, qrels_validation.txt, triples.tsv, NAME.run
  a Hugging Face dataset saved with save_to_disk: query, positive and perhaps negative
  a collection saved by this library: sources.json, collection.tsv, queries.SET.tsv, qrels.SET.txt, triples.tsv
Passages alone (corpus.jsonl or collection.tsv) are enough. A text file may be gzipped (NAME.gz)."""
"""The layouts, for an error."""

Rows = Iterator[tuple[int, str, str]]
"""Line number (from 1), id, text."""


def read_folder(folder: Path) -> Collection:
    """Read a collection; its layout is known by its files.

    - **BEIR**: ``corpus.jsonl`` (``_id``, ``text``, perhaps ``title``; a passage is title, space, text), ``queries.jsonl``
      (``_id``, ``text``) and ``qrels/train.tsv``, ``dev.tsv``, ``test.tsv`` under the header ``query-id corpus-id score``. A
      set's queries are those that its qrels judge; others in ``queries.jsonl`` are left out.
    - **TREC**: ``collection.tsv`` (docid, passage), ``queries.tsv`` (query id, query) and ``qrels.txt`` (query id, 0, docid,
      grade) are the passages and the test set. ``queries_SET.tsv`` and ``qrels_SET.txt`` are further sets, SET being
      ``train`` or ``validation`` (or ``dev``). ``triples.tsv`` has a training query's id, and the docids of a positive and a
      negative. Without ``queries_SET.tsv``, the set's queries are those of ``queries.tsv`` that its qrels (or triples) name,
      and are none of the test set. Without ``qrels_train.txt``, the positives of the triples are its judgements, of grade 1.
    - A Hugging Face dataset: see `read_dataset`.
    - What `Collection.save` wrote; sets that are neither "train" nor "validation" are joined as "test".

    Passages without queries are a collection, too. In texts, tabs and line breaks (which JSON may hold) become spaces.
    An empty passage is kept, with a UserWarning; so are queries of two sets that have the same text.

    Raises:
        DataError: the folder has none of these layouts, or two of them; or names the first line of each
            kind of fault in a file: columns or keys that are missing, ids that repeat or have white space,
            empty queries, judgements of unknown queries or passages, grades that are not integers, a pair
            judged twice, a query in two sets, bad UTF-8, a line longer than `text.MAX_LINE`.
    """
    folder = Path(folder)
    if not folder.is_dir():
        what = "is a file, not a folder" if folder.exists() else "does not exist"
        if folder.is_symlink() and not folder.exists():
            what = f"is a link to {os.readlink(folder)}, which does not exist"
        raise DataError(f"{folder} {what}. A collection is a folder:\n{EXPECTED}")
    beir, trec = (_variants(folder, name) for name in ("corpus.jsonl", "collection.tsv"))
    if (folder / "passages.arrow").exists():
        raise DataError(
            f"{folder} is a converted collection, which `reproduce` uses; name its ir_datasets id instead"
        )
    if (folder / "sources.json").exists() and trec:
        return standard_sets(Collection.load(folder), str(folder / "collection.tsv"))
    if beir and trec:
        raise DataError(f"{folder} has both {beir[0].name} and {trec[0].name}; remove one of them")
    if (folder / "dataset_dict.json").exists() or (folder / "state.json").exists():
        return read_dataset(folder)
    if not beir and not trec:
        raise DataError(
            f"{folder} holds no collection (found: {_holds(folder)}). Expected:\n{EXPECTED}"
        )
    problems = Problems()
    return (_read_beir if beir else _read_trec)(folder, problems)


def run_files(folder: Path) -> dict[str, Path]:
    """Name → TREC run file in a folder: NAME.run or NAME.trec, each with ``.gz`` or without, sorted by name.

    Raises:
        DataError: two files have one name.
    """
    found: dict[str, Path] = {}
    problems = Problems()
    for path in visible(Path(folder)):
        if (match := _RUN.fullmatch(path.name)) and not path.is_dir():
            if (name := match[1]) in found:
                problems.add(path, 0, f"{found[name].name} is a run named {name!r}, too")
            found[name] = path
    problems.check()
    return found


def read_runs(folder: Path) -> dict[str, Run]:
    """Name → run of the `run_files` of a folder. What is no run is left out, with a UserWarning.

    Raises:
        DataError: as `run_files`.
    """
    runs = {}
    for name, path in run_files(folder).items():
        try:
            runs[name] = read_run(path)
        except DataError as error:
            first = str(error).removeprefix("malformed data\n").splitlines()[0].strip()
            warnings.warn(f"left out, as it is no run: {first}", stacklevel=2)
    return runs


def visible(folder: Path) -> list[Path]:
    """What a folder holds, sorted, without hidden files, as macOS and editors leave them."""
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def _holds(folder: Path) -> str:
    """The names of the first things in a folder, for an error."""
    names = [path.name for path in visible(folder)] if folder.is_dir() else []
    return ", ".join(names[:10]) + (" …" if len(names) > 10 else "") if names else "nothing"


# ---- layouts -------------------------------------------------------------------------------------------------------


def _read_beir(folder: Path, problems: Problems) -> Collection:
    path = cast(Path, _only(folder, "corpus.jsonl", problems=problems))
    titles: dict[str, str] = {}
    passages = _texts(path, _beir_passages(path, problems, titles), problems, {}, empty=True)
    if not len(passages):  # what else is wrong follows from it
        problems.check()
    queries_path = _only(folder, "queries.jsonl", problems=problems)
    asked = Texts([], [])
    if queries_path:
        rows = ((n, i, text) for n, (i, _, text) in _json_rows(queries_path, problems))
        asked = _texts(queries_path, rows, problems, {})
    judged: dict[str, Path] = {}
    queries, qrels = {}, {}
    for name, called in SETS.items():
        if path_of_set := _only(folder, *(f"qrels/{c}.tsv" for c in called), problems=problems):
            rows_of_set = read_judgements(path_of_set, problems)
            # Without any queries, that they are missing is the only problem.
            known = asked if queries_path else None
            qrels[name] = _qrels(path_of_set, rows_of_set, known, passages, judged, problems)
            queries[name] = _some(asked, qrels[name])
    if qrels and not queries_path:
        problems.add(folder / "queries.jsonl", 0, "file not found")
    if queries_path and not qrels:
        problems.add(
            folder / "qrels",
            0,
            f"none of train.tsv, dev.tsv, test.tsv to judge queries.jsonl, found {_holds(folder / 'qrels')}"
            " (without queries.jsonl, the passages are read alone)",
        )
    for extra in visible(folder / "qrels") if qrels else ():
        if ".tsv" in extra.name and extra.name.split(".tsv")[0] not in _STANDARD:
            warnings.warn(f"{extra} is not read; known are train, dev and test", stacklevel=3)
    found = _finish(folder, "BEIR", path, passages, queries, qrels, [], problems)
    return dataclasses.replace(found, titles=titles)


def _read_trec(folder: Path, problems: Problems) -> Collection:
    path = cast(Path, _only(folder, "collection.tsv", problems=problems))
    passages = _texts(path, _tsv_rows(path, problems), problems, {}, empty=True)
    if not len(passages):  # what else is wrong follows from it
        problems.check()
    lines: dict[Path, dict[str, int]] = {}  # where each query id was read, for all sets together
    judged: dict[str, Path] = {}
    own: dict[str, Texts] = {}  # set → queries of a file of its own
    queries: dict[str, Texts] = {}
    qrels: dict[str, Qrels] = {}
    for name, ends in _ENDS.items():
        own_path = _only(folder, *(f"queries{end}.tsv" for end in ends), problems=problems)
        if own_path:
            own[name] = _texts(own_path, _tsv_rows(own_path, problems), problems, lines)
        asked = own.get(name, own.get("test"))
        if judging := _only(folder, *(f"qrels{end}.txt" for end in ends), problems=problems):
            if asked is None:
                problems.add(judging, 0, f"there is no queries{ends[0]}.tsv, which it judges")
            rows = read_judgements(judging, problems)
            qrels[name] = _qrels(judging, rows, asked, passages, judged, problems)
            queries[name] = own[name] if name in own else _some(asked, qrels[name])
    triples: list[Triple] = []
    if triples_path := _only(folder, "triples.tsv", problems=problems):
        known = queries.get("train", own.get("train"))
        asked = own.get("test") if known is None else known
        if asked is None:
            problems.add(triples_path, 0, "there is no queries_train.tsv, which it refers to")
        triples = _triples(triples_path, asked, passages, judged, known is not None, problems)
        positives: Qrels = {}
        for qid, positive, _ in triples:
            positives.setdefault(qid, {})[positive] = 1
        queries.setdefault("train", _some(asked, positives) if known is None else known)
        qrels.setdefault("train", positives)
    shared = {qid for name in queries.keys() - own.keys() for qid in queries[name].ids}
    if "test" in queries and shared:
        queries["test"] = _some(queries["test"], set(queries["test"].ids) - shared)
    for name in sorted(own.keys() - queries.keys()):
        if name != "test" or not shared:
            what = f"file not found; it judges queries{_ENDS[name][0]}.tsv"
            problems.add(folder / f"qrels{_ENDS[name][0]}.txt", 0, what)
    return _finish(folder, "TREC", path, passages, queries, qrels, triples, problems)


def read_dataset(folder: Path) -> Collection:
    """Read pairs or triples from a Hugging Face ``Dataset`` or ``DatasetDict`` that was saved with ``save_to_disk``.

    Columns: ``query`` (or ``anchor``, ``question``), ``positive``, and perhaps ``negative``. A Dataset is the training set;
    the splits of a DatasetDict are ``train``, ``validation`` (or ``dev``) and ``test``. Each different text is a passage (d1,
    d2, … in the order of their first occurrence) or a query of its set (q1, q2, …). A query's positives have grade 1.
    If there are negatives, the rows of the training set are its triples; those of other sets are passages like any other.
    Tabs and line breaks become spaces.

    Raises:
        DataError: other columns or splits, or lists each row (from 1) with a value that is not a text or is empty; or the
            files cannot be read.
    """
    import datasets

    folder = Path(folder)
    try:
        loaded = datasets.load_from_disk(str(folder))
    except Exception as error:  # whatever its readers raise about damaged files
        raise DataError(f"{folder} cannot be read as a Hugging Face dataset: {error}") from error
    splits = dict(loaded) if isinstance(loaded, datasets.DatasetDict) else {"train": loaded}
    problems = Problems()
    docids: dict[str, str] = {}
    qids: dict[str, dict[str, str]] = {name: {} for name in SETS}
    qrels: dict[str, Qrels] = {}
    triples: list[Triple] = []
    count = 0
    order = [*_STANDARD, *sorted(splits)]
    for split, rows in sorted(splits.items(), key=lambda item: order.index(item[0])):
        name = _STANDARD.get(split, "")
        if not name or name in qrels:
            problems.add(folder, 0, f"split {split!r}: expected train, validation or dev, and test, each once")  # fmt: skip
            continue
        qrels[name] = {}
        columns = _dataset_columns(rows.column_names)
        if columns is None:
            problems.add(folder, 0, f"split {split!r} {_other_columns(rows.column_names)}")
            continue
        where = folder if rows is loaded else folder / split
        countdown = Countdown(f"reading {split}", len(rows), "rows")
        values = zip(*(rows[column][:] for column in columns), strict=True)
        for number, row in enumerate(values, start=1):
            countdown.update(number)
            wrong = [
                f"{column!r} must be a text that is not empty, not {value!r:.60}"
                for column, value in zip(columns, row, strict=True)
                if not isinstance(value, str) or not value.strip()
            ]
            if wrong:
                problems.add(where, number, "; ".join(wrong))
                continue
            query, *texts = map(one_line, row)
            if query not in qids[name]:
                count += 1
                qids[name][query] = f"q{count}"
            qid = qids[name][query]
            named = [docids.setdefault(text, f"d{len(docids) + 1}") for text in texts]
            qrels[name].setdefault(qid, {})[named[0]] = 1
            if name == "train" and len(named) == 2:
                triples.append((qid, named[0], named[1]))
    passages = Texts(list(docids.values()), list(docids))
    queries = {name: Texts(list(qids[name].values()), list(qids[name])) for name in qrels}
    layout = "Hugging Face dataset"
    return _finish(folder, layout, folder, passages, queries, qrels, triples, problems)


def _dataset_columns(found: Iterable[str]) -> list[str] | None:
    """The columns in the order query, positive, negative; None if they are not as expected."""
    for query in QUERY_COLUMNS:
        for columns in ([query, "positive"], [query, "positive", "negative"]):
            if sorted(found) == sorted(columns):
                return columns
    return None


def _other_columns(found: list[str]) -> str:
    """What is wrong with the columns, and how to come to those expected."""
    accepted = f"{' or '.join(QUERY_COLUMNS)}, positive, and perhaps negative"
    query = next((name for name in QUERY_COLUMNS if name in found), "query")
    missing = [name for name in (query, "positive") if name not in found]
    other = [name for name in found if name not in (query, "positive", "negative")]
    names = dict(zip(other, missing, strict=False))
    kept = [query, "positive", *(["negative"] if "negative" in found else [])]
    how = f".rename_columns({names})" if names else ""
    how += f".select_columns({kept})" if len(names) < len(other) else ""
    hint = f"; for example: dataset{how}" if len(names) == len(missing) else ""
    return f"has the columns {', '.join(found)}; expected {accepted}{hint}"


def standard_sets(collection: Collection, where: str) -> Collection:
    """The same collection with the sets "train", "validation" and "test"; those of any other name are joined as "test".

    Raises:
        DataError: sets that are joined share a query id. ``where`` says what they were read from.
    """
    parts: dict[str, list[str]] = {}
    for name in sorted(collection.queries):
        parts.setdefault(_STANDARD.get(name, "test"), []).append(name)
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


def _finish(
    folder: Path,
    layout: str,
    corpus: Path,
    passages: Texts,
    queries: dict[str, Texts],
    qrels: dict[str, Qrels],
    triples: list[Triple],
    problems: Problems,
) -> Collection:
    problems.check()
    if not len(passages):
        raise DataError(f"{corpus} holds no passage")
    warn(passages, queries, str(corpus))
    name = folder.resolve().name
    queries = {set_name: queries[set_name] for set_name in SETS if set_name in queries}
    return Collection(name, passages, queries, qrels, {"layout": layout}, triples)


def warn(passages: Texts, queries: Mapping[str, Texts], where: str, unit: str = "line") -> None:
    """UserWarnings about what is kept but should be known: empty passages, and one query's text in two sets.

    ``where`` says in the warnings what the texts were read from, one passage a ``unit``.
    """
    empty = [row for row, text in enumerate(passages.texts) if not text.strip()]
    if empty:
        first = ", ".join(f"{passages.ids[row]!r} ({unit} {row + 1})" for row in empty[:_EXAMPLES])
        more = ", …" if len(empty) > _EXAMPLES else ""
        warnings.warn(
            f"{where}: passages without text are kept, and never returned by a search: {len(empty)}, {first}{more}",
            stacklevel=4,
        )
    names = [name for name in SETS if name in queries]
    for i, name in enumerate(names):
        texts = dict(zip(queries[name].texts, queries[name].ids, strict=True))
        for other in names[i + 1 :]:
            theirs = zip(queries[other].ids, queries[other].texts, strict=True)
            twice = [(texts[text], qid) for qid, text in theirs if text in texts]
            if twice:
                pairs = ", ".join(f"{a!r} and {b!r}" for a, b in twice[:_EXAMPLES])
                warnings.warn(
                    f"{where}: queries of {name} and {other} with the same text: {len(twice)}, {pairs}"
                    f"{', …' if len(twice) > _EXAMPLES else ''}; measures on {other} may be too high",
                    stacklevel=4,
                )


# ---- files ---------------------------------------------------------------------------------------------------------


def _variants(folder: Path, *names: str) -> list[Path]:
    """Those of the files that are there, gzipped or not, dangling links included."""
    paths = [folder / (name + end) for name in names for end in ("", ".gz")]
    return [
        path for path in paths if os.path.lexists(path)
    ]  # what cannot be read is told when it is


def _only(folder: Path, *names: str, problems: Problems) -> Path | None:
    """The file with one of these names, gzipped or not; None if there is none. Several are a problem."""
    found = _variants(folder, *names)
    for other in found[1:]:
        problems.add(other, 0, f"{found[0].name} is there, too; keep one of them")
    return found[0] if found else None


def _texts(
    path: Path,
    rows: Rows,
    problems: Problems,
    lines: dict[Path, dict[str, int]],
    *,
    empty: bool = False,
) -> Texts:
    """Ids and texts of a file. ``lines``: file → id → line, of all files whose ids must differ; this one is added.

    ``empty``: whether a text may be empty.
    """
    own = lines.setdefault(path, {})
    ids, texts = [], []
    for number, identifier, text in rows:
        before = [(file.name, known[identifier]) for file, known in lines.items() if identifier in known]  # fmt: skip
        if identifier.split() != [identifier]:
            problems.add(path, number, f"id {identifier!r} is empty or has white space")
        elif before:
            at = f"line {before[0][1]}" if before[0][0] == path.name else "{}:{}".format(*before[0])
            problems.add(path, number, f"id {identifier!r} occurs already in {at}")
        else:
            own[identifier] = number
            ids.append(identifier)
            texts.append(text)
            if not text.strip() and not empty:
                problems.add(path, number, f"the text of {identifier!r} is empty")
    return Texts(ids, texts)


def _some(texts: Texts | None, wanted: Container[str]) -> Texts:
    pairs = zip(texts.ids, texts.texts, strict=True) if texts else []
    kept = [(i, text) for i, text in pairs if i in wanted]
    return Texts([i for i, _ in kept], [text for _, text in kept])


def _qrels(
    path: Path,
    rows: Judgements,
    queries: Texts | None,
    passages: Texts,
    judged: dict[str, Path],
    problems: Problems,
) -> Qrels:
    """Judgements of a file. ``judged``: query id → file, of all sets; this one's are added. Queries None: not checked."""
    qrels: Qrels = {}
    for number, qid, docid, grade in rows:
        other = judged.setdefault(qid, path)
        if queries is not None and qid not in queries:
            problems.unknown(path, number, "query", qid, queries.ids)
        elif other != path:
            problems.add(path, number, f"query {qid!r} is judged in {other.name}, too; sets must not share queries")  # fmt: skip
        elif docid not in passages:
            problems.unknown(path, number, "passage", docid, passages.ids)
        else:
            qrels.setdefault(qid, {})[docid] = grade
    return qrels


_TEXT_TRIPLES = (
    "expected the ids of a query and of two passages, found texts; a Hugging Face dataset on disk"
    " (columns query, positive, negative) may have texts"
)


def _triples(
    path: Path,
    queries: Texts | None,
    passages: Texts,
    judged: Mapping[str, Path],
    train: bool,
    problems: Problems,
) -> list[Triple]:
    """Triples of a file. ``train``: whether ``queries`` are training queries; else those that the file names become them."""
    triples: list[Triple] = []
    for number, (qid, *docids) in read_columns(path, 3, problems):
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
            what = "training query" if train else "query"
            problems.unknown(path, number, what, qid, queries.ids)
        elif not train and qid in judged:
            problems.add(path, number, f"query {qid!r} is judged in {judged[qid].name}; training must not use it")  # fmt: skip
        for docid in docids:
            if docid not in passages:
                problems.unknown(path, number, "passage", docid, passages.ids)
        triples.append((qid, docids[0], docids[1]))
    return triples


def _tsv_rows(path: Path, problems: Problems) -> Rows:
    for number, (identifier, text) in read_columns(path, 2, problems):
        yield number, identifier, text


def _beir_passages(path: Path, problems: Problems, titles: dict[str, str]) -> Rows:
    for number, (docid, title, text) in _json_rows(path, problems):
        if title.strip():
            titles[docid] = title
        yield number, docid, " ".join(part for part in (title, text) if part.strip())


def _json_rows(path: Path, problems: Problems) -> Iterator[tuple[int, tuple[str, str, str]]]:
    """Line number, and ``_id``, ``title`` ("" if there is none) and ``text`` of a line."""
    for number, line in read_lines(path, problems):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            if number == 1 and line.strip() in ("[", "{"):
                way = "jq -c '.[]'" if line.strip() == "[" else "jq -c ."
                found = f"JSON over several lines; convert it: {way} {path.name} > NEW"
                problems.add(path, 1, f"JSON lines expected, found {found}")
                return
            reason = getattr(error, "msg", "nested too deep")
            if not line.strip():
                reason = r"a blank line; remove such lines: sed -i '/^\s*$/d' FILE"
            problems.add(path, number, f"not valid JSON ({reason})")
            continue
        if number == 1 and isinstance(record, list):
            found = f"an array; convert it: jq -c '.[]' {path.name} > NEW"
            problems.add(path, 1, f"JSON lines expected, found {found}")
            return
        if not isinstance(record, dict):
            problems.add(path, number, 'expected {"_id": text, "text": text}')
            continue
        title = record.get("title")
        values = (record.get("_id"), "" if title is None else title, record.get("text"))
        wrong = [
            f"{key!r} is missing" if key not in record else f"{key!r} must be a text, not {value!r:.60}"
            for key, value in zip(("_id", "title", "text"), values, strict=True)
            if not isinstance(value, str)
        ]  # fmt: skip
        if wrong:
            if "_id" not in record or "text" not in record:
                wrong.append(f"found {', '.join(map(repr, record)) or 'no keys'}")
            elif isinstance(record["_id"], int):
                wrong.append(f"""convert: jq -c '._id |= tostring' {path.name} > NEW""")
            problems.add(path, number, "; ".join(wrong))
            continue
        identifier, title, text = cast(tuple[str, str, str], values)
        try:
            (identifier + title + text).encode("utf-8")
        except UnicodeEncodeError:
            problems.add(path, number, "an escape in the JSON is half of a character (\\ud800 to \\udfff)")  # fmt: skip
            continue
        yield number, (identifier, one_line(title), one_line(text))


def one_line(text: str) -> str:
    """The text with spaces in the place of tabs and line breaks, as the files of a collection hold it."""
    return re.sub(r"[\t\r\n]", " ", text)
