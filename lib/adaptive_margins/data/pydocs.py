"""PyDocs: a test collection built from the docstrings of installed Python packages.

A query is the summary sentence of a docstring, its passage is the rest. The source files are read
with `ast`; no scanned package is imported. The data sheet of the book explains the rules.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import math
import platform
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import numpy as np
from scipy import sparse
from scipy.sparse.csgraph import connected_components

from adaptive_margins.data.collection import Collection, Texts
from adaptive_margins.data.docstrings import (
    MIN_PASSAGE_WORDS,
    Documented,
    normal_form,
    package_root,
    scan,
)
from adaptive_margins.data.docstrings import MIN_PROSE_WORDS as MIN_PROSE_WORDS  # for data sheets
from adaptive_margins.data.docstrings import QUERY_WORDS as QUERY_WORDS
from adaptive_margins.data.text import DataError
from adaptive_margins.data.trec import Qrels
from adaptive_margins.data.words import words_of

RULES = 1
"""Raised by hand if the same packages would have other texts, qrels, negatives or triples."""
MAX_ANSWERS = 8
"""A query that more passages answer (grade ≥ 2) is too general and dropped; its passages stay."""
SAME_PASSAGE = 0.9
"""Jaccard similarity of word trigrams from which on two passages are one."""
NEAR_QUERY = 0.8
"""Jaccard similarity of stemmed content words from which on two queries are near-identical."""
OWN, NEAR, NEIGHBOUR = 3, 2, 1
"""Grades: the rest of the query's docstring; of one with a near-identical summary; an object named
under "See Also"."""


def build_pydocs(
    packages: Sequence[str],
    *,
    seed: int,
    validation: int,
    test: int,
    max_passages: int | None,
    max_words: int,
    shorten: Callable[[Literal["query", "passage"], list[str]], list[str]] | None = None,
    shares: tuple[int, int] | None = None,
) -> Collection:
    """Build the collection from installed packages; the same versions give the same bytes.

    Args:
        packages: top-level import names; "stdlib" is the running Python's standard library.
        seed: of ids, subsample and split.
        validation: least number of queries of the set "validation".
        test: least number of queries of "test1", and of "test2". The rest is "train".
        max_passages: most passages (complete connected components are left out).
        max_words: passages are truncated after this many words.
        shorten: truncates texts to what an encoder reads. All systems get the truncated passages;
            a docstring whose query would be truncated is left out.
        shares: ``validation`` and ``test`` are at most the number of queries divided by these.

    Near-identical passages are merged, and so are queries of the same content words in the same
    order; all passages of a merged query answer it (grade 3). Near-identical queries may differ in
    a decisive word ("encode", "decode") or not ("by", "via"), so the passage of one has grade 2 for
    the other, and no correct answer counts as wrong. Passages named under "See Also" have grade 1:
    they are related, but document something else. Queries that share a passage of grade 2 or 3 are
    in the same set.

    Raises:
        DataError: a package that is not installed, or too few queries for the sets.
    """
    if max_words < MIN_PASSAGE_WORDS:
        raise DataError(f"max_words must be at least {MIN_PASSAGE_WORDS}, not {max_words}")
    names = sorted(set(packages))
    roots = {name: package_root(name) for name in names}
    docs = [doc for name in names for doc in scan(name, roots[name], max_words)]
    if shorten is not None:
        queries = shorten("query", [doc.query for doc in docs])
        docs = [doc for doc, query in zip(docs, queries, strict=True) if query == doc.query]
        passages = shorten("passage", [doc.passage for doc in docs])
        docs = [replace(d, passage=text) for d, text in zip(docs, passages, strict=True)]
    texts = _judge(docs)
    passages, queries = texts.passages, texts.queries
    position = functools.partial(_position, seed)
    parts = sorted(_parts(texts), key=lambda x: min(position(passages[p]) for p in x.passages))
    if max_passages is not None:
        total = np.cumsum([len(part.passages) for part in parts])
        parts = parts[: int(np.searchsorted(total, max_passages, side="right"))]
    kept = sorted((p for x in parts for p in x.passages), key=lambda p: position(passages[p]))
    asked = sorted((q for x in parts for q in x.queries), key=lambda q: position(queries[q]))
    docids = {p: f"d{number:05d}" for number, p in enumerate(kept, start=1)}
    qids = {q: f"q{number:05d}" for number, q in enumerate(asked, start=1)}

    if shares is not None:
        sizes = zip((validation, test), shares, strict=True)
        validation, test = (min(most, max(1, len(asked) // share)) for most, share in sizes)
    split = _split(parts, {"validation": validation, "test1": test, "test2": test})
    if not split["train"] or len(split["test2"]) < test:
        raise DataError(
            f"too few queries: {', '.join(names)} give {len(asked)}, but validation {validation},"
            f" test1 {test}, test2 {test} and at least one to train on are wanted; name more"
            " packages, or raise max_passages"
        )
    sets: dict[str, Texts] = {}
    qrels: dict[str, Qrels] = {}
    for name, members in split.items():
        members.sort(key=qids.__getitem__)
        sets[name] = Texts([qids[q] for q in members], [queries[q] for q in members])
        qrels[name] = {qids[q]: _with_ids(texts.judged[q], docids) for q in members}
    return Collection(
        name="PyDocs",
        passages=Texts(list(docids.values()), [passages[p] for p in kept]),
        queries=sets,
        qrels=qrels,
        sources=source_versions(names),
    )


def _position(seed: int, text: str) -> str:
    """An order that depends on neither package nor module."""
    return hashlib.sha256(f"{seed} {text}".encode()).hexdigest()


class _Judged(NamedTuple):
    """Merged passages, merged queries, and of each query: passage → grade."""

    passages: list[str]
    queries: list[str]
    judged: list[dict[int, int]]


def _judge(docs: Sequence[Documented]) -> _Judged:
    similar = similar_pairs([_trigrams(doc.passage) for doc in docs], SAME_PASSAGE)
    passage_of = _connected(len(docs), similar)
    forms = {form: n for n, form in enumerate(dict.fromkeys(normal_form(d.query) for d in docs))}
    query_of = [forms[normal_form(doc.query)] for doc in docs]

    judged: list[dict[int, int]] = [{} for _ in forms]
    for query, neighbours in zip(query_of, _see_also(docs), strict=True):
        judged[query].update((passage_of[i], NEIGHBOUR) for i in neighbours)
    answers: list[set[int]] = [set() for _ in forms]
    for query, passage in zip(query_of, passage_of, strict=True):
        answers[query].add(passage)
    for one, other in similar_pairs([frozenset(form) for form in forms], NEAR_QUERY):
        judged[one].update(dict.fromkeys(answers[other], NEAR))
        judged[other].update(dict.fromkeys(answers[one], NEAR))
    for query, found in enumerate(answers):
        judged[query].update(dict.fromkeys(found, OWN))
    passages = _representatives(passage_of, [doc.passage for doc in docs])
    return _Judged(passages, _representatives(query_of, [doc.query for doc in docs]), judged)


class _Part(NamedTuple):
    """Passages and queries that belong into one set."""

    passages: list[int]
    queries: list[int]


def _parts(texts: _Judged) -> list[_Part]:
    """Queries with the passages that answer them, and so with near-identical queries."""
    answers = [[p for p, grade in grades.items() if grade >= NEAR] for grades in texts.judged]
    asked = [query for query, found in enumerate(answers) if len(found) <= MAX_ANSWERS]
    offset = len(texts.passages)
    links = [(p, offset + q) for q in asked for p in answers[q]]
    part_of = _connected(offset + len(texts.queries), links)
    parts: dict[int, _Part] = defaultdict(lambda: _Part([], []))
    for p in range(offset):
        parts[part_of[p]].passages.append(p)
    for q in asked:
        parts[part_of[offset + q]].queries.append(q)
    return list(parts.values())


def _split(parts: Sequence[_Part], wanted: dict[str, int]) -> dict[str, list[int]]:
    """Queries of "train" and of the sets in ``wanted``, which are filled first to their size."""
    split: dict[str, list[int]] = {name: [] for name in ("train", *wanted)}
    for part in parts:
        name = next((name for name, n in wanted.items() if len(split[name]) < n), "train")
        split[name] += part.queries
    return split


def _with_ids(grades: dict[int, int], docids: dict[int, str]) -> dict[str, int]:
    return dict(sorted((docids[p], grade) for p, grade in grades.items() if p in docids))


@functools.cache
def _owners(path: tuple[str, ...]) -> Mapping[str, list[str]]:
    """Top-level package → distributions, which ``path`` (of modules) determines; in 0.2 s."""
    return importlib.metadata.packages_distributions()


def source_versions(packages: Iterable[str]) -> dict[str, str]:
    """Distribution → version (or "unknown") of each top-level package, and Python's."""
    versions = {"python": platform.python_version()}
    distributions = _owners(tuple(sys.path))
    for package in packages:
        if package != "stdlib":
            for name in sorted(distributions.get(package, [])) or [package]:
                try:
                    versions[name] = importlib.metadata.version(name)
                except importlib.metadata.PackageNotFoundError:
                    versions[name] = "unknown"
    return versions


# ── What counts as the same ───────────────────────────────────────────────────────────────────────


def _trigrams(passage: str) -> frozenset[tuple[str, ...]]:
    words = words_of(passage)
    return frozenset(zip(words, words[1:], words[2:], strict=False))


def similar_pairs(sets: Sequence[frozenset[Any]], threshold: float) -> list[tuple[int, int]]:
    """All pairs of positions whose sets have a Jaccard similarity of at least ``threshold``.

    Such sets share one of the ⌊(1 − threshold) n⌋ + 1 rarest members of either, n being its size
    (prefix filtering: Chaudhuri, Ganti and Kaushik, ICDE 2006), so only pairs that do are compared.
    """
    frequency = Counter(member for members in sets for member in members)
    by_rarity = sorted(frequency, key=lambda member: (frequency[member], member))
    number = {member: column for column, member in enumerate(by_rarity)}

    def matrix(rows: list[list[int]]) -> sparse.csr_matrix:
        columns = np.array([column for row in rows for column in row], dtype=np.int64)
        starts = np.cumsum([0, *(len(row) for row in rows)])
        shape = (len(rows), len(number))
        return sparse.csr_matrix((np.ones(len(columns), dtype=np.int32), columns, starts), shape)

    rows = [sorted(number[member] for member in members) for members in sets]
    complete = matrix(rows)
    # The small number is for products such as 0.9 × 70, which floats put above 63.
    prefix = matrix([row[: len(row) - math.ceil(threshold * len(row) - 1e-9) + 1] for row in rows])
    left, right = sparse.triu(prefix @ prefix.T, k=1).nonzero()
    shared = np.asarray(complete[left].multiply(complete[right]).sum(axis=1)).ravel()
    size = np.array([len(row) for row in rows])
    same = shared >= threshold * (size[left] + size[right] - shared) - 1e-9
    return sorted(zip(left[same].tolist(), right[same].tolist(), strict=True))


def _connected(n: int, links: Sequence[tuple[int, int]]) -> list[int]:
    """For each of ``n`` nodes the number of its connected component."""
    rows, columns = np.array(links, dtype=np.int64).reshape(-1, 2).T
    graph = sparse.coo_matrix((np.ones(len(links)), (rows, columns)), (n, n))
    return connected_components(graph, directed=False)[1].tolist()


def _representatives(labels: Sequence[int], texts: Sequence[str]) -> list[str]:
    """For each label its most frequent text; of several, the first in the alphabet."""
    groups: dict[int, Counter[str]] = defaultdict(Counter)
    for label, text in zip(labels, texts, strict=True):
        groups[label][text] += 1
    return [min(groups[g], key=lambda t: (-groups[g][t], t)) for g in range(len(groups))]


def _see_also(docs: Sequence[Documented]) -> list[list[int]]:
    """For each object, the objects of its package that its "See Also" names."""
    # A name fits an object with the same last part whose full name has the other parts in order
    # (packages re-export: "numpy.sort" is numpy._core.fromnumeric.sort). Of several, the one of
    # exactly this name wins, then those of the same class, then of the same module.
    by_name: dict[tuple[str, str], list[int]] = defaultdict(list)
    for i, doc in enumerate(docs):
        by_name[doc.package, doc.qualname.rpartition(".")[2]].append(i)
    result: list[list[int]] = []
    for i, doc in enumerate(docs):
        found: list[int] = []
        for name in doc.see_also:
            parts = name.removeprefix("np.").split(".")
            same = [j for j in by_name[doc.package, parts[-1]] if j != i]
            fitting = [j for j in same if _in_order(parts, docs[j].full_name.split("."))]
            exact = [j for j in fitting if docs[j].full_name == name]
            here = [j for j in fitting if docs[j].module == doc.module]
            siblings = [j for j in here if docs[j].owner == doc.owner]
            scopes = (fitting, exact, siblings, here)
            found += next((scope for scope in scopes if len(scope) == 1), [])
        result.append(found)
    return result


def _in_order(parts: Sequence[str], path: Iterable[str]) -> bool:
    remaining = iter(path)
    return all(part in remaining for part in parts)
