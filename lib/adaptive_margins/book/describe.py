"""The description of a collection: facts for JSON, text for a terminal, and a data sheet as a page.

The words of the data sheet, after Gebru et al. (2021), are in ``templates/datasheet.md``.
"""

from __future__ import annotations

import importlib.metadata
import re
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import pandas as pd

from adaptive_margins.book.render import html_page, plain, render
from adaptive_margins.book.style import measure_labels
from adaptive_margins.book.tables import shorten
from adaptive_margins.data import pydocs
from adaptive_margins.data.collection import Collection, Texts
from adaptive_margins.data.trec import Qrels, Run
from adaptive_margins.data.triples import Checked, check_sample
from adaptive_margins.data.words import without_spaces
from adaptive_margins.evaluation.measures import evaluate
from adaptive_margins.retrieval.bm25 import BM25
from adaptive_margins.text_tables import aligned

if TYPE_CHECKING:
    from adaptive_margins.paper import Reproduction

DEPTH = 100
"""Candidates a query of a collection without a profile."""
MOST_QUERIES = 1000
"""Most queries with judgements of a set that BM25 then searches for, at even distances."""
_EXAMPLES, _CLOSEST = 4, 3
_LONGEST = 1000  # characters of a passage that are shown
_SETS = ("train", "validation", "test", "test1", "test2")
T = TypeVar("T")


def evenly(items: Sequence[T], most: int = 100_000) -> list[T]:
    """All of ``items``, or at most ``most`` of them at even distances."""
    return list(items[:: max(1, -(-len(items) // most))])


def is_pydocs(collection: Collection) -> bool:
    """Whether `pydocs.build_pydocs` built it; a folder may have the same name."""
    return collection.name == "PyDocs" and "python" in collection.sources


# --- facts ----------------------------------------------------------------------------------------


def collection_facts(
    collection: Collection, runs: Mapping[str, Run] | None = None
) -> dict[str, Any]:
    """The numbers of a collection, ready for JSON.

    ``name``, ``fingerprint``, ``sources``; ``passages``, ``empty_passages``, ``bigram_passages``
    (with text without spaces between words, which BM25 splits into character bigrams); ``words`` of
    a passage (separated by white space): ``mean``, ``median``, ``max``; ``sets``: name →
    ``queries``, ``judged`` (queries), ``relevant_queries`` (with a passage of grade 1 or more),
    ``judgements``, ``grades`` (grade as text, from high to low → number); ``triples``,
    ``triples_checked`` (`Checked`, of a sample if they are many; `train` leaves out what it
    counts); ``runs`` (those given, by name): ``set`` that most of its queries are of, ``queries``
    of that set, ``depth`` (most hits of a query), ``unknown`` (hits without a passage), ``nDCG@10``
    (over all judged queries of the set; None without any).

    Warns if no judged query of a set has a relevant passage.
    """
    words = np.array([len(text.split()) for text in collection.passages.texts] or [0])
    sets = {}
    for name, queries in collection.queries.items():
        judged = collection.qrels[name]
        grades = Counter(grade for row in judged.values() for grade in row.values())
        relevant = sum(max(row.values(), default=0) > 0 for row in judged.values())
        sets[name] = {
            "queries": len(queries),
            "judged": len(judged),
            "relevant_queries": relevant,
            "judgements": grades.total(),
            "grades": {str(grade): grades[grade] for grade in sorted(grades, reverse=True)},
        }
        if judged and not relevant:
            warnings.warn(
                f"{collection.name}: none of the {len(judged):,} judged queries of {name!r} has a"
                " relevant passage (grade 1 or more)",
                stacklevel=2,
            )
    return {
        "name": collection.name,
        "fingerprint": collection.fingerprint,
        "sources": dict(collection.sources),
        "passages": len(collection.passages),
        "empty_passages": int((words == 0).sum()) if len(collection.passages) else 0,
        "bigram_passages": sum(map(without_spaces, collection.passages.texts)),
        "words": {
            "mean": float(words.mean()),
            "median": float(np.median(words)),
            "max": int(words.max()),
        },
        "sets": sets,
        "triples": len(collection.triples),
        "triples_checked": asdict(check_sample(collection)),
        "runs": {name: _run_facts(collection, run) for name, run in (runs or {}).items()},
    }


def _run_facts(collection: Collection, run: Run) -> dict[str, Any]:
    known = set(collection.passages.ids)
    asked = {name: sum(q in run for q in texts.ids) for name, texts in collection.queries.items()}
    most = max(asked, key=asked.__getitem__, default="")
    of = most if asked.get(most) else None
    judged = collection.qrels[of] if of else {}
    return {
        "set": of,
        "queries": asked.get(most, 0),
        "depth": max(map(len, run.values()), default=0),
        "unknown": sum(docid not in known for hits in run.values() for docid in hits),
        "nDCG@10": evaluate(judged, run, ["nDCG@10"]).mean["nDCG@10"] if judged else None,
    }


def facts_text(facts: Mapping[str, Any]) -> str:
    """`collection_facts` for a terminal."""
    words, checked = facts["words"], Checked(**facts["triples_checked"])
    empty, bigrams = facts["empty_passages"], facts["bigram_passages"]
    left_out = f"; not trained on, of {checked.checked:,} checked: {checked.reasons}"
    length = f"mean {words['mean']:.1f}, median {words['median']:g}, most {words['max']:,}"
    bigram_text = f"{bigrams:,} passages; BM25 splits their text into character bigrams"
    lines = [
        ["Collection", facts["name"]],
        ["Fingerprint", facts["fingerprint"]],
        *sorted(facts["sources"].items()),
        ["Passages", f"{facts['passages']:,}" + f", of which {empty:,} have no text" * bool(empty)],
        ["Words of a passage", length],
        *[["Without spaces", bigram_text]] * bool(bigrams),
        ["Triples", f"{facts['triples']:,}" + left_out * bool(checked.reasons)],
    ]
    text = aligned([list(line) for line in lines], left=2)
    if facts["sets"]:
        text += ["", *_aligned(sets_frame(facts))]
    else:
        text.append("No queries.")
    if facts["runs"]:
        text += ["", *_aligned(runs_frame(facts["runs"]))]
    return "\n".join(text)


def _aligned(frame: pd.DataFrame) -> list[str]:
    return aligned([list(map(str, frame)), *frame.to_numpy().tolist()])


def sets_frame(facts: Mapping[str, Any]) -> pd.DataFrame:
    """The query sets of `collection_facts` as texts, one row each."""
    return pd.DataFrame(
        {
            "Set": name,
            "Queries": f"{counts['queries']:,}",
            "Judged": f"{counts['judged']:,}",
            "With relevant": f"{counts['relevant_queries']:,}",
            "Judgements": f"{counts['judgements']:,}",
            "Of grade": ", ".join(f"{grade}: {n:,}" for grade, n in counts["grades"].items()),
        }
        for name, counts in facts["sets"].items()
    )


def runs_frame(runs: Mapping[str, Mapping[str, Any]]) -> pd.DataFrame:
    """The runs of `collection_facts` as texts, one row each."""
    return pd.DataFrame(
        {
            "Run": name,
            "Set": found["set"] or "none",
            "Queries": f"{found['queries']:,}",
            "Depth": f"{found['depth']:,}",
            "Unknown hits": f"{found['unknown']:,}",
            "nDCG@10": "—" if found["nDCG@10"] is None else f"{found['nDCG@10']:.4f}",
        }
        for name, found in runs.items()
    )


# --- the data sheet -------------------------------------------------------------------------------


def profile_datasheet(reproduction: Reproduction) -> str:
    """The data sheet of a profile's collection, with its candidates and BM25's stored scores.

    A passage is relevant from the grade on that the profile's measures ask for.
    """
    result, inputs = reproduction.bm25().result, reproduction.inputs
    profile = reproduction.profile
    none: dict[str, Any] = {"mean": {}}
    scores = {
        name: result["rerank"].get(name, none)["mean"] | result["full"].get(name, none)["mean"]
        for name in inputs.evaluated_sets
    }
    candidates = {name: inputs.top_candidates(name) for name in inputs.evaluated_sets}
    levels = re.findall(r"rel=(\d+)", " ".join([*profile.measures.rerank, *profile.measures.full]))
    options: dict[str, Any] = {"relevant": max(map(int, levels), default=1)}
    options["official"] = profile.candidates.source == "official"
    facts = collection_facts(inputs.collection)
    return datasheet(inputs.collection, facts, candidates, scores, **options)


def collection_page(collection: Collection, facts: Mapping[str, Any]) -> str:
    """The data sheet of any collection as an HTML page that loads nothing from elsewhere.

    BM25 searches `DEPTH` candidates for the judged queries of each set, at most `MOST_QUERIES`; for
    those of "train" only if no other set is judged. A passage is relevant from grade 1 on, in
    PyDocs from grade 2.

    Args:
        collection: it may have no queries, no triples, and passages without text.
        facts: its `collection_facts`.
    """
    relevant = pydocs.NEAR if is_pydocs(collection) else 1
    measures = ["nDCG@10", f"Success(rel={relevant})@10", f"R(rel={relevant})@{DEPTH}"]
    candidates: dict[str, Run] = {}
    if scored := _scored(collection):
        bm25 = BM25(collection.passages)
    for name, qrels in scored.items():
        queries = Texts(list(qrels), [collection.queries[name][qid] for qid in qrels])
        candidates[name] = bm25.search(queries, DEPTH)
    scores = {n: evaluate(q, candidates[n], measures).mean for n, q in scored.items()}
    options: dict[str, Any] = {"scored": scored, "relevant": relevant, "book": False}
    text = datasheet(collection, facts, candidates, scores, **options)
    return html_page(f"Data sheet of {collection.name}", text)


def _scored(collection: Collection) -> dict[str, Qrels]:
    """Set → qrels of the queries that are searched for."""
    judged = {name: qrels for name, qrels in collection.qrels.items() if qrels}
    if len(judged) > 1:
        judged.pop("train", None)
    return {
        name: {qid: qrels[qid] for qid in evenly(list(qrels), MOST_QUERIES)}
        for name, qrels in judged.items()
    }


def datasheet(
    collection: Collection,
    facts: Mapping[str, Any],
    candidates: Mapping[str, Run],
    bm25: Mapping[str, Mapping[str, float]],
    *,
    official: bool = False,
    scored: Mapping[str, Qrels] | None = None,
    relevant: int = 2,
    book: bool = True,
) -> str:
    """The data sheet in MyST Markdown.

    Args:
        collection: what is described.
        facts: its `collection_facts`.
        candidates: set → the run that encoders rerank.
        bm25: set → measure in ir_measures' notation → BM25's value.
        official: whether the candidates come with the collection.
        scored: set → judgements of the queries that candidates and measures are of; by default all.
        relevant: the least grade of a relevant passage.
        book: whether it is a page of the book, which has a bibliography.
    """
    sets = sorted(collection.queries, key=lambda n: (_SETS.index(n) if n in _SETS else 9, n))
    scored = scored or collection.qrels
    return render(
        "datasheet.md",
        place="book" if book else "page",
        name=plain(collection.name),
        fingerprint=collection.fingerprint,
        pydocs=is_pydocs(collection),
        rules=pydocs,
        passages=len(collection.passages),
        queries=sum(len(texts) for texts in collection.queries.values()),
        empty=facts["empty_passages"],
        bigrams=facts["bigram_passages"],
        relevant=relevant,
        sets=_sets(collection, facts["sets"], sets, relevant),
        lengths=_lengths(collection, sets),
        examples=_examples(collection),
        closest=_closest(collection, sets) if is_pydocs(collection) else [],
        official=official,
        depth=max((len(hits) for run in candidates.values() for hits in run.values()), default=0),
        bm25=_bm25(candidates, bm25, sets, scored, relevant),
        nothing=[
            (plain(name), sum(not hits for hits in run.values()), len(run))
            for name, run in candidates.items()
            if not official and not all(run.values())
        ],
        partly=[
            (plain(name), len(scored[name]), len(collection.qrels[name]))
            for name in sets
            if name in bm25 and len(scored[name]) < len(collection.qrels[name])
        ],
        triples=_triples(collection, facts),
        sources=_sources(collection),
        runs=runs_frame(facts["runs"]),
    )


def _sets(
    collection: Collection, facts: Mapping[str, Any], sets: Sequence[str], relevant: int
) -> pd.DataFrame:
    grades = sorted({int(grade) for name in sets for grade in facts[name]["grades"]}, reverse=True)
    rows = []
    for name in sets:
        answers = [
            {docid for docid, grade in judged.items() if grade >= relevant}
            for judged in collection.qrels[name].values()
        ]
        rows.append(
            {
                "set": name,
                "queries": facts[name]["queries"],
                "judgements": facts[name]["judgements"],
                **{f"grade {grade}": facts[name]["grades"].get(str(grade), 0) for grade in grades},
                f"passages of grade ≥ {relevant}": len(set().union(*answers)),
                "queries with several": sum(len(found) > 1 for found in answers),
            }
        )
    return pd.DataFrame(rows)


def _lengths(collection: Collection, sets: Sequence[str]) -> pd.DataFrame:
    texts = {"passages": collection.passages.texts}
    texts |= {f"queries, {name}": collection.queries[name].texts for name in sets}
    rows = []
    for name, some in texts.items():
        words = np.array([len(text.split()) for text in evenly(some)] or [0])
        quantiles = [f"{q:.0f}" for q in np.quantile(words, [0, 0.25, 0.5, 0.75, 1])]
        rows.append([name, f"{words.mean():.1f}", *quantiles])
    columns = ["", "mean", "least", "first quartile", "median", "third quartile", "most"]
    return pd.DataFrame(rows, columns=columns)


def _examples(collection: Collection) -> dict[str, Any]:
    """The first training queries, in the order of their ids, that have a passage of a lower grade.

    Where no query has two grades, the first queries; without judgements, the first passages.
    """
    judged_sets = [name for name in sorted(collection.qrels) if collection.qrels[name]]
    if not judged_sets:
        passages = evenly(collection.passages.texts)[: 2 * _EXAMPLES]
        rows = [[shorten(text, _LONGEST)] for text in passages]
        return {"caption": "The first passages.", "header": ["passage"], "rows": rows}
    name = "train" if "train" in judged_sets else judged_sets[0]
    qrels = collection.qrels[name]
    several = [qid for qid, judged in qrels.items() if len(set(judged.values())) > 1]
    rows = []
    for qid in sorted(several or qrels)[:_EXAMPLES]:
        judged = sorted(qrels[qid].items(), key=lambda item: (-item[1], item[0]))
        by_grade = {grade: docid for docid, grade in reversed(judged)}
        query = shorten(collection.queries[name][qid], _LONGEST)
        for grade in dict.fromkeys((max(by_grade), min(by_grade))):
            passage = shorten(collection.passages[by_grade[grade]], _LONGEST)
            rows.append([query if grade == max(by_grade) else "", str(grade), passage])
    which = (
        "that have passages of two grades, with one of the highest and one of the lowest grade."
        if several
        else "with a passage that is judged for each."
    )
    caption = f"The first queries of the set {plain(name)}, in the order of their ids, {which}"
    return {"caption": caption, "header": ["query", "grade", "passage"], "rows": rows}


def _closest(collection: Collection, sets: Sequence[str]) -> list[list[str]]:
    """The most similar queries of different sets: similarity, and both with their sets."""
    texts = [(name, text) for name in sets for text in collection.queries[name].texts]
    content = [frozenset(pydocs.normal_form(text)) for _, text in texts]
    pairs = sorted(
        (-len(content[a] & content[b]) / len(content[a] | content[b]), texts[a], texts[b])
        for a, b in pydocs.similar_pairs(content, 0.6)
        if texts[a][0] != texts[b][0]
    )
    return [
        [f"{-negated:.2f}", *(f"{shorten(text, _LONGEST)} ({name})" for name, text in both)]
        for negated, *both in pairs[:_CLOSEST]
    ]


def _bm25(
    candidates: Mapping[str, Run],
    bm25: Mapping[str, Mapping[str, float]],
    sets: Sequence[str],
    scored: Mapping[str, Qrels],
    relevant: int,
) -> pd.DataFrame:
    labels = measure_labels(measure for values in bm25.values() for measure in values)
    rows = []
    for name in (name for name in sets if name in candidates or name in bm25):
        qrels, run = scored[name], candidates.get(name, {})
        reachable = sum(
            any(grade >= relevant and docid in run.get(qid, {}) for docid, grade in judged.items())
            for qid, judged in qrels.items()
        )
        share = f"{reachable / max(len(qrels), 1):.3f}" if run else ""
        values = {label: bm25.get(name, {}).get(m) for m, label in labels.items()}
        cells = {label: "" if v is None else f"{v:.3f}" for label, v in values.items()}
        rows.append({"set": name, "with a relevant candidate": share, **cells})
    return pd.DataFrame(rows)


def _triples(collection: Collection, facts: Mapping[str, Any]) -> dict[str, Any]:
    triples, train = collection.triples, collection.queries.get("train", ())
    found: dict[str, Any] = {"count": len(triples), "queries": len(train)}
    if not len(triples):
        return found
    if not is_pydocs(collection):
        checked = Checked(**facts["triples_checked"])
        return {**found, "checked": checked.checked, "left_out": checked.reasons}
    qrels = collection.qrels.get("train", {})
    grades = Counter(qrels.get(qid, {}).get(positive) for qid, positive, _ in triples)
    listed = sorted(grades.items(), key=str, reverse=True)
    queries, positives, negatives = (len(set(column)) for column in zip(*triples, strict=True))
    return {
        "count": len(triples),
        "queries": queries,
        "positives": positives,
        "negatives": negatives,
        "grades": ", ".join(f"{n:,} of grade {grade}" for grade, n in listed),
    }


def _sources(collection: Collection) -> pd.DataFrame:
    """What the collection was read from; of PyDocs with licences."""
    sources = sorted(collection.sources.items())
    if not is_pydocs(collection):
        return pd.DataFrame(sources, columns=["what", "source"])
    rows = [(name, version, _licence(name)) for name, version in sources if name != "python"]
    python = "Python (its standard library, where chosen)", collection.sources["python"], "PSF-2.0"
    return pd.DataFrame([python, *rows], columns=["distribution", "version", "licence"])


def _licence(distribution: str) -> str:
    """The licence in a distribution's metadata: expression, else classifiers, else text."""
    try:
        metadata = importlib.metadata.metadata(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not recorded"
    classifiers = metadata.get_all("Classifier", [])
    found = metadata.get_all("License-Expression", []) or [
        text.rpartition(" :: ")[2] for text in classifiers if text.startswith("License :: ")
    ]
    stated = "".join(metadata.get_all("License", [])).strip().splitlines()
    return ", ".join(found or stated[:1]).strip() or "not recorded"
