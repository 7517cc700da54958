"""A collection by one word: a folder, installed packages (PyDocs), or an ir_datasets id; and its queries split for training."""

from __future__ import annotations

import dataclasses
import difflib
import random
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from adaptive_margins.data import pydocs
from adaptive_margins.data.collection import Collection, Texts, Triple
from adaptive_margins.data.folder import EXPECTED, one_line, read_folder, standard_sets, warn
from adaptive_margins.data.ir_datasets import (
    check_licence,
    files_behind,
    find_dataset,
    handler_of,
    read_records,
)
from adaptive_margins.data.text import DataError
from adaptive_margins.data.trec import Qrels
from adaptive_margins.profiles.config import IrDatasetsSettings, PyDocsSettings, load_profile
from adaptive_margins.progress import Countdown, say

PYDOCS = "pydocs"
PYDOCS_SIZES = (150, 300)
"""Queries of the set "validation", and of each half of "test", of PyDocs."""
PYDOCS_SHARES = (10, 5)
"""The same of a small collection: its queries divided by this."""
MOST_VALIDATION = 300
"""Most queries that `split_queries` takes for "validation"."""
MOST_TEST = 1000
"""Most queries that `split_queries` takes for "test"."""
FEW = 20
"""With fewer queries, what is measured on a set says little; `split_queries` says so."""
MAX_TRIPLES = 1_000_000
"""Most triples kept in memory of an ir_datasets id, at even distances; MS MARCO has 270 million."""

_MEMBERS = {"train": ("train",), "validation": ("dev", "validation", "valid", "val"), "test": ("test",)}  # fmt: skip
_WAYS = f"""\
a folder with one of these layouts
{EXPECTED}
"pydocs", or "pydocs:" and names of installed packages, e.g. pydocs:numpy,scipy
an id of ir_datasets (https://ir-datasets.com), e.g. beir/scifact"""
_T = TypeVar("_T")


def open_collection(source: str) -> Collection:
    """Read a collection; its sets are called "train", "validation" and "test", and any of them may be missing.

    ``source`` is, in this order:

    - a folder: see `folder.read_folder`;
    - ``pydocs``, or ``pydocs:numpy,scipy``: built from the docstrings of installed packages, those of the profile "laptop"
      unless some are named. "validation" gets 150 queries and "test" 600, or of a small collection a tenth and two fifths;
    - an ir_datasets id. If it ends in ``/train``, ``/dev`` or ``/test``, its siblings over the same passages are the other
      sets; if it has children of these names, they are the sets; otherwise it is the test set (the training set, if it
      has triples), or, without judgements, passages alone. Everything is held in memory; of more than `MAX_TRIPLES`
      triples, some at even distances. Judgements of unknown queries or passages, and queries without text, are left out
      with a warning.

    Raises:
        DataError: the source is none of these; or the data are malformed.
        LicenceError: something would have to be fetched, and its terms have not been accepted.
        DownloadError: something could not be fetched.
    """
    path = Path(source).expanduser()
    if source and (path.is_dir() or (path.is_symlink() and not path.exists())):
        return read_folder(path)
    if source.split(":")[0] == PYDOCS:
        return _pydocs(source)
    if path.is_file():
        raise DataError(f"{source} is a file; expected the folder it lies in:\n{EXPECTED}")
    try:
        import ir_datasets
    except OSError as error:  # it makes its folder when it is imported
        place = f"{error.filename}: {error.strerror}"
        raise DataError(
            f"there is no collection {source!r}: it is no folder, and whether ir_datasets has it is unknown, as its folder cannot"
            f" be made ({place}; IR_DATASETS_HOME names another)"
        ) from error
    if _known(source):
        return _from_ir_datasets(source)
    close = difflib.get_close_matches(source, list(ir_datasets.registry), 3)
    hint = f"\nDid you mean {' or '.join(close)}?" if close else ""
    raise DataError(f"there is no collection {source!r}: expected\n{_WAYS}{hint}")


# ---- splitting -----------------------------------------------------------------------------------------------------


def split_queries(collection: Collection, *, seed: int) -> tuple[Collection, str]:
    """A collection with the sets "train", "validation" and "test", and a sentence on how it was split ("" if it was not).

    Only queries with a passage of grade 1 or more are taken, and queries of the same text stay together.

    - All three sets are there: nothing changes.
    - "train" and "test": a fifth of "train", at most `MOST_VALIDATION` queries, becomes "validation".
    - "train" and "validation": the given "validation" becomes "test"; then as above.
    - "validation" and "test": "validation" becomes "train"; then as above.
    - One set: 40 % become "test" (at most `MOST_TEST`), 20 % "validation" (at most `MOST_VALIDATION`), the rest "train".

    Triples of queries that leave "train" are dropped. A set that is not split stays as it is.

    Raises:
        DataError: no query has a relevant passage; or there are too few for all sets.
    """
    given = {name: _judged(collection.qrels[name]) for name in _MEMBERS if name in collection.qrels}
    given = {name: qids for name, qids in given.items() if qids}
    if not given:
        raise DataError(
            f"{collection.name}: no query has a relevant passage (grade 1 or more), so there is nothing to train or"
            " evaluate with; pseudo-queries can be made from the passages (adaptive_margins.data.pseudo_queries)"
        )
    if len(given) == len(_MEMBERS):
        return collection, ""
    if len(given) == 1:
        (name,) = given
        count = len(given[name])
        sizes = {"test": min(round(0.4 * count), MOST_TEST), "validation": min(round(0.2 * count), MOST_VALIDATION)}  # fmt: skip
        parts = _dealt(collection, name, given[name], sizes, seed)
        roles = {part: (name, qids) for part, qids in parts.items()}
        sentence = (
            f"Of the {count:,} judged queries of the only set ({name}), {len(parts['train']):,} are trained on,"
            f" {len(parts['validation']):,} are for validation and {len(parts['test']):,} for the test (drawn with seed {seed})."
        )
    else:
        source = "train" if "train" in given else "validation"
        test = "test" if "test" in given else "validation"
        count = len(given[source])
        wanted = {"validation": min(max(count // 5, 1), MOST_VALIDATION)}
        parts = _dealt(collection, source, given[source], wanted, seed)
        kept = set(parts["validation"])
        # What is not judged may still be in triples.
        rest = [qid for qid in collection.queries[source].ids if qid not in kept]
        roles = {
            "train": (source, rest),
            "validation": (source, parts["validation"]),
            "test": (test, list(collection.queries[test].ids)),
        }
        missing = ({*_MEMBERS} - {*given}).pop()
        sentence = (
            f"There is no set {missing}: {len(kept):,} of the {count:,} judged queries of {source} are for validation"
            f" (drawn with seed {seed}), the others are trained on, and {test} is the test set."
        )
    if len(parts["validation"]) < FEW:
        sentence += f" With {len(parts['validation'])} queries, validation says little."
    queries, qrels = {}, {}
    for role, (name, qids) in roles.items():
        queries[role] = Texts(list(qids), [collection.queries[name][qid] for qid in qids])
        judged = collection.qrels[name]
        qrels[role] = {qid: judged[qid] for qid in qids if qid in judged}
    train = queries["train"]
    triples = [triple for triple in collection.triples if triple[0] in train]
    return dataclasses.replace(collection, queries=queries, qrels=qrels, triples=triples), sentence


def _judged(qrels: Qrels) -> list[str]:
    return [qid for qid, grades in qrels.items() if any(grade >= 1 for grade in grades.values())]


def _dealt(
    collection: Collection, name: str, qids: list[str], sizes: dict[str, int], seed: int
) -> dict[str, list[str]]:
    """Queries in random order, those of one text together: first to the sets of these sizes, the rest to "train"."""
    same: dict[str, list[str]] = {}
    texts = collection.queries[name]
    for qid in qids:
        same.setdefault(" ".join(texts[qid].casefold().split()), []).append(qid)
    order = sorted(same)
    random.Random(f"{seed} split").shuffle(order)
    role: dict[str, str] = {}
    counts = Counter[str]()
    for text in order:
        part = next((part for part, size in sizes.items() if counts[part] < size), "train")
        counts[part] += len(same[text])
        role |= dict.fromkeys(same[text], part)
    parts = {
        part: [qid for qid in texts.ids if role.get(qid) == part] for part in (*sizes, "train")
    }
    if not all(parts.values()):
        raise DataError(
            f"{collection.name}: {len(qids)} judged queries of the set {name}, of {len(same)} different"
            f" texts, are too few to split into {', '.join(parts)}; at least {len(parts)} of different"
            " text are needed, and hundreds make sense"
        )
    return parts


# ---- PyDocs --------------------------------------------------------------------------------------------------------


def _pydocs(source: str) -> Collection:
    settings = load_profile("laptop").collection
    assert isinstance(settings, PyDocsSettings)
    _, named, names = source.partition(":")
    packages = [name.strip() for name in names.split(",") if name.strip()]
    if named and not packages:
        raise DataError(f'{source!r} names no package; expected e.g. "pydocs:numpy,scipy"')

    def build(validation: int, test: int) -> Collection:
        return pydocs.build_pydocs(
            packages or settings.packages,
            seed=settings.seed,
            validation=validation,
            test=test,
            max_passages=None if packages else settings.max_passages,
            max_words=settings.max_words,
        )

    say("building the collection from installed packages")
    try:
        try:
            collection = build(*PYDOCS_SIZES)
        except ValueError:  # too few queries, or something that is wrong for any sizes
            collection = build(1, 1)
        count = sum(len(texts) for texts in collection.queries.values())
        wanted = [min(most, max(1, count // share)) for most, share in zip(PYDOCS_SIZES, PYDOCS_SHARES, strict=True)]  # fmt: skip
        if tuple(wanted) != PYDOCS_SIZES:
            collection = build(*wanted)
    except ValueError as error:
        raise DataError(f"{source}: {error}") from error
    return standard_sets(collection, source)


# ---- ir_datasets ---------------------------------------------------------------------------------------------------


def _known(identifier: str) -> bool:
    import ir_datasets

    try:
        ir_datasets.registry[identifier]
    except KeyError:
        return False
    return True


def _is_judged(identifier: str) -> bool:
    return _known(identifier) and all(find_dataset("queries", identifier).has(kind) for kind in ("queries", "qrels"))  # fmt: skip


def _sets(source: str) -> dict[str, str]:
    """Set → ir_datasets id."""
    base, _, last = source.rpartition("/")
    if not any(last in members for members in _MEMBERS.values()):
        base = source

    def docs(identifier: str) -> Any:
        return handler_of(find_dataset("passages", identifier), "docs_handler")

    sets: dict[str, str] = {}
    for name, members in _MEMBERS.items():
        for identifier in (f"{base}/{member}" for member in members):
            # Siblings may have passages of their own with the same docids (those of LoTTE do).
            if name not in sets and _is_judged(identifier) and docs(identifier) is docs(source):
                sets[name] = identifier
    if not sets and _is_judged(source):
        sets["train" if find_dataset("triples", source).has("docpairs") else "test"] = source
    return sets


def _check_fetching(source: str, wanted: Iterable[tuple[str, str]]) -> None:
    """Nothing is fetched that the user did not accept. ``wanted``: ir_datasets ids, and what is read from them."""
    files = [
        file
        for identifier, kind in wanted
        for file in files_behind(find_dataset(kind, identifier), kind)
    ]
    missing = {file.url: file for file in files if file.url and not file.here}
    if missing:
        listed = "".join(
            f"\n    {file.url} ({f'{file.size:,} bytes' if file.size else 'size not known'})"
            for file in missing.values()
        )
        page = f"https://ir-datasets.com/{source.split('/')[0]}.html"
        terms = f"those of its publishers, see {page}. To be fetched:{listed}"
        settings = IrDatasetsSettings(
            kind="ir_datasets", name=source, passages=source, sets={"test": source}, licence=terms
        )
        check_licence(settings)


def _from_ir_datasets(source: str) -> Collection:
    import ir_datasets

    sets = _sets(source)
    if not find_dataset("passages", source).has("docs"):
        raise DataError(f"{source!r} of ir_datasets has no passages; expected an id that has")
    wanted = [
        (source, "docs"),
        *((i, kind) for i in sets.values() for kind in ("queries", "qrels")),
    ]
    has_triples = "train" in sets and find_dataset("triples", sets["train"]).has("docpairs")
    if has_triples:
        wanted.append((sets["train"], "docpairs"))
    _check_fetching(source, wanted)

    titles: dict[str, str] = {}
    passages = _ir_texts("passages", source, "docs", titles)
    queries: dict[str, Texts] = {}
    qrels: dict[str, Qrels] = {}
    left_out = Counter[str]()
    for name, identifier in sets.items():
        texts = _ir_texts(name, identifier, "queries", {})
        asked = [(q, t) for q, t in zip(texts.ids, texts.texts, strict=True) if t.strip()]
        left_out[f"queries of {identifier} without text"] += len(texts) - len(asked)
        queries[name] = Texts([qid for qid, _ in asked], [text for _, text in asked])
        judged: Qrels = {}
        for record in read_records(name, identifier, "qrels"):
            if record.query_id not in queries[name]:
                left_out[f"judgements of unknown queries in {identifier}"] += 1
            elif record.doc_id not in passages:
                left_out[f"judgements of unknown passages in {identifier}"] += 1
            elif record.doc_id in judged.setdefault(record.query_id, {}):
                left_out[f"repeated judgements in {identifier}"] += 1
            else:
                judged[record.query_id][record.doc_id] = int(record.relevance)
        qrels[name] = {qid: grades for qid, grades in judged.items() if grades}
    triples: list[Triple] = []
    if has_triples:
        pairs = read_records("triples", sets["train"], "docpairs")
        known = _known_triples(pairs, queries["train"], passages, left_out)
        triples = thinned(known, MAX_TRIPLES)
    if found := [f"{count:,} {what}" for what, count in left_out.items() if count]:
        warnings.warn(f"{source}: left out {', '.join(found)}", stacklevel=3)
    warn(passages, queries, source, "number")
    sources = {"ir_datasets": ir_datasets.__version__, "passages": source, **sets}
    return Collection(source, passages, queries, qrels, sources, triples, titles)


def _ir_texts(name: str, identifier: str, kind: str, titles: dict[str, str]) -> Texts:
    """Passages (``kind`` "docs") or queries of an ir_datasets id; the titles of those that have one are added."""
    found: dict[str, str] = {}
    countdown = Countdown(f"reading {kind} of {identifier}", None, "texts")
    for number, record in enumerate(read_records(name, identifier, kind), start=1):
        countdown.update(number)
        if not hasattr(record, "default_text"):
            raise DataError(
                f"the {kind} of {identifier!r} ({type(record).__name__}) have no plain text"
            )
        key = record.doc_id if kind == "docs" else record.query_id
        if key.split() != [key]:
            raise DataError(f"{kind} of {identifier!r}, number {number}: id {key!r} is empty or has white space")  # fmt: skip
        if key in found:
            raise DataError(f"{kind} of {identifier!r}, number {number}: id {key!r} occurs twice")
        found[key] = one_line(record.default_text() or "")
        if title := one_line(getattr(record, "title", None) or "").strip():
            titles[key] = title
    return Texts(list(found), list(found.values()))


def _known_triples(
    pairs: Iterable[Any], queries: Texts, passages: Texts, left_out: Counter[str]
) -> Iterator[Triple]:
    for pair in pairs:
        if pair.query_id in queries and pair.doc_id_a in passages and pair.doc_id_b in passages:
            yield pair.query_id, pair.doc_id_a, pair.doc_id_b
        else:
            left_out["triples with an unknown query or passage"] += 1


def thinned(items: Iterable[_T], most: int) -> list[_T]:
    """All items, or, if there are more than ``most``, every 2nd, 4th, 8th, …: at least ``most`` / 2 at even distances."""
    kept: list[_T] = []
    step = 1
    for number, item in enumerate(items):
        if number % step == 0:
            kept.append(item)
        if len(kept) > most:
            kept, step = kept[::2], 2 * step
    return kept
