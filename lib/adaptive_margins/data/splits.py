"""Splitting queries into "train", "validation" and "test" where sets are missing."""

from __future__ import annotations

import dataclasses
import random
from collections import Counter

from adaptive_margins.data.collection import SETS, Collection, Texts
from adaptive_margins.data.text import DataError
from adaptive_margins.data.trec import Qrels

MOST_VALIDATION = 300
"""Most queries that `split_queries` takes for "validation"."""
MOST_TEST = 1000
"""Most queries that `split_queries` takes for "test"."""
FEW = 20
"""With fewer validation queries, `split_queries` warns that their measures are uncertain."""
FEW_JUDGED = 150
"""With fewer queries in the only set, `split_queries` names `fold_queries`."""


def split_queries(collection: Collection, *, seed: int) -> tuple[Collection, str]:
    """Return the collection with all three sets, and a sentence on the split ("" if unchanged).

    Only queries with a passage of grade 1 or more are used; those of the same text stay together.

    - All three sets exist: nothing changes.
    - "train" and "test": a fifth of "train", at most `MOST_VALIDATION` queries, becomes
      "validation".
    - "train" and "validation": the given "validation" becomes "test"; then as above.
    - "validation" and "test": "validation" becomes "train"; then as above.
    - One set: 40 % become "test" (at most `MOST_TEST`), 20 % "validation" (at most
      `MOST_VALIDATION`), the rest "train".

    Triples of queries that leave "train" are dropped.

    Raises:
        DataError: no query has a relevant passage; or there are too few for all sets.
    """
    judged = {name: _judged(collection.qrels.get(name, {})) for name in SETS}
    given = {name: qids for name, qids in judged.items() if qids}
    if not given:
        raise DataError(
            f"{collection.name}: no query has a relevant passage (grade 1 or more), so there is"
            " nothing to train or evaluate with; pseudo-queries can be derived from the passages"
            " (adaptive_margins.data.pseudo_queries)"
        )
    if len(given) == len(SETS):
        return collection, ""
    source, *others = given
    count = len(given[source])
    if others:
        sizes = {"validation": min(max(count // 5, 1), MOST_VALIDATION)}
    else:
        sizes = {
            "test": min(round(0.4 * count), MOST_TEST),
            "validation": min(round(0.2 * count), MOST_VALIDATION),
        }
    parts = _assigned(collection, source, given[source], sizes, seed)
    sentence = _sentence(parts, source, others, seed)
    members = {part: (source, qids) for part, qids in parts.items()}
    if others:
        held_out = set(parts["validation"])
        # Queries without judgements may still be in triples.
        train = [qid for qid in collection.queries[source].ids if qid not in held_out]
        members["train"] = source, train
        members["test"] = others[0], list(collection.queries[others[0]].ids)
    return _with_sets(collection, members), sentence


def fold_queries(collection: Collection, folds: int, *, seed: int) -> tuple[list[Collection], str]:
    """Return a collection for each fold and, last, one for all, and a sentence on them.

    For cross-validation of the only set: the queries of a fold are "test", those of the next one
    "validation", the others "train". In the last collection all of them are "test", the first fold
    is "validation" and the others are "train". Queries of the same text are in the same fold.

    Raises:
        DataError: not exactly one set has judged queries, or they are too few.
    """
    given = {name: qids for name, qrels in collection.qrels.items() if (qids := _judged(qrels))}
    if len(given) != 1:
        raise DataError(
            f"{collection.name}: folds are of the only set of queries with judgements, but there"
            f" are {len(given)} ({', '.join(given) or 'none'}); train without folds"
        )
    ((source, qids),) = given.items()
    sizes = {f"fold {k + 1}": (len(qids) + k) // folds for k in range(folds - 1)}
    parts = list(_assigned(collection, source, qids, sizes, seed).values())
    found = []
    for test, validation in [*zip(parts, parts[1:] + parts[:1], strict=True), ([], parts[0])]:
        train = [qid for qid in qids if qid not in {*test, *validation}]
        members = {"train": train, "validation": validation, "test": test or qids}
        found.append(_with_sets(collection, {name: (source, q) for name, q in members.items()}))
    return found, (
        f"Each of the {len(qids):,} judged queries of the only set ({source}) is tested once, by"
        f" that of {folds} encoders for which it was not used (folds drawn with seed {seed}). The"
        " encoder that is kept used them all, so that its own measures of them are too high."
    )


def _judged(qrels: Qrels) -> list[str]:
    return [qid for qid, grades in qrels.items() if any(grade >= 1 for grade in grades.values())]


def _assigned(
    collection: Collection, name: str, qids: list[str], sizes: dict[str, int], seed: int
) -> dict[str, list[str]]:
    """Assign queries in random order, equal ones together: to ``sizes``, then to "train"."""
    same: dict[str, list[str]] = {}
    texts = collection.queries[name]
    for qid in qids:
        same.setdefault(" ".join(texts[qid].casefold().split()), []).append(qid)
    order = sorted(same)
    random.Random(f"{seed} split").shuffle(order)
    part_of: dict[str, str] = {}
    counts = Counter[str]()
    for text in order:
        part = next((part for part, size in sizes.items() if counts[part] < size), "train")
        counts[part] += len(same[text])
        part_of |= dict.fromkeys(same[text], part)
    names = [*sizes, "train"]
    parts = {part: [qid for qid in texts.ids if part_of.get(qid) == part] for part in names}
    if not all(parts.values()):
        raise DataError(
            f"{collection.name}: {len(qids)} judged queries of the set {name}, of {len(same)}"
            f" different texts, are too few to split into {len(parts)} parts; equal texts are in"
            " one part, and each part needs some, better hundreds"
        )
    return parts


def _sentence(parts: dict[str, list[str]], source: str, others: list[str], seed: int) -> str:
    counts = {part: len(qids) for part, qids in parts.items()}
    total = f"{sum(counts.values()):,}"
    if others:
        (missing,) = {*SETS} - {source, *others}
        sentence = (
            f"There is no set {missing}: {counts['validation']:,} of the {total} judged queries of"
            f" {source} are for validation (drawn with seed {seed}), the others are trained on, and"
            f" {others[0]} is the test set."
        )
    else:
        sentence = (
            f"Of the {total} judged queries of the only set ({source}), {counts['train']:,} are"
            f" trained on, {counts['validation']:,} are for validation and {counts['test']:,} for"
            f" the test (drawn with seed {seed})."
        )
        if sum(counts.values()) < FEW_JUDGED:
            sentence += " With --folds 5 each of them would be tested, in about six times the time."
    if counts["validation"] < FEW:
        sentence += (
            f" With {counts['validation']} validation queries, their measures are uncertain."
        )
    return sentence


def _with_sets(collection: Collection, members: dict[str, tuple[str, list[str]]]) -> Collection:
    """The collection with other sets: name → (set of origin, query ids)."""
    queries, qrels = {}, {}
    for name, (source, qids) in members.items():
        texts, judged = collection.queries[source], collection.qrels[source]
        queries[name] = Texts(qids, [texts[qid] for qid in qids])
        qrels[name] = {qid: judged[qid] for qid in qids if qid in judged}
    triples = [triple for triple in collection.triples if triple[0] in queries["train"]]
    return dataclasses.replace(collection, queries=queries, qrels=qrels, triples=triples)
