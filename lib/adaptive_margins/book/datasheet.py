"""The data sheet of a collection, after Gebru et al. (2021): every number from the artefacts."""

from __future__ import annotations

import importlib.metadata
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING

import numpy as np

from adaptive_margins.book.context import evenly
from adaptive_margins.book.style import measure_label
from adaptive_margins.book.tables import shorten
from adaptive_margins.data import pydocs
from adaptive_margins.data.collection import Collection
from adaptive_margins.data.mining import check_sample
from adaptive_margins.data.trec import Qrels, Run
from adaptive_margins.data.words import without_spaces

if TYPE_CHECKING:
    from adaptive_margins.paper.experiments import Reproduction

_EXAMPLES = 4
_CLOSEST = 3
_LONGEST = 1000  # characters of a passage that are shown
_SETS = ("train", "validation", "test", "test1", "test2")


def page(reproduction: Reproduction) -> str:
    """The data sheet of an opened profile: its collection, its candidates, and BM25's stored scores."""
    result = reproduction.ensure([reproduction.bm25_run()])[0].result
    sets = reproduction.evaluated_sets
    bm25 = {
        name: {
            measure: value
            for mode in ("rerank", "full")
            for measure, value in result[mode].get(name, {}).get("mean", {}).items()
        }
        for name in sets
    }
    candidates = {name: reproduction.top_candidates(name) for name in sets}
    return datasheet(
        reproduction.collection,
        candidates,
        bm25,
        official=reproduction.profile.candidates.source == "official",
    )


def datasheet(
    collection: Collection,
    candidates: Mapping[str, Run],
    bm25: Mapping[str, Mapping[str, float]],
    *,
    official: bool = False,
    scored: Mapping[str, Qrels] | None = None,
    relevant: int = 2,
    place: str = "book",
    note: str = "",
) -> str:
    """A page of MyST Markdown that begins with a heading.

    Args:
        collection: what is described; it may have no queries, and passages without text.
        candidates: set → the run that encoders rerank.
        bm25: set → measure in ir_measures' notation → BM25's value.
        official: whether the candidates come with the collection.
        scored: set → judgements of the queries that candidates and measures are of; those of the collection if None.
        relevant: the least grade of a relevant passage.
        place: what the page is part of, as the text calls it.
        note: a paragraph of plain text below the first one.
    """
    sets = sorted(collection.queries, key=lambda n: (_SETS.index(n) if n in _SETS else 9, n))
    made_of_docstrings = is_pydocs(collection)
    sections = [
        f"# The collection: {plain(collection.name)}",
        "A data sheet in the sense of {cite:t}`gebru2021`. Its numbers are computed from the files of"
        f" the collection when this {place} is built. Fingerprint: `{collection.fingerprint}` (SHA-256"
        " over ids, texts, judgements, sources and triples, first 16 digits).",
        plain(note),
        _MOTIVATION if made_of_docstrings else "",
        "## Composition",
        _counts(collection, sets, relevant),
        "### Lengths",
        _lengths(collection, sets),
        "### Judgements",
        _GRADES if made_of_docstrings else "",
        _grades(collection, sets, relevant),
        "### Examples",
        _examples(collection),
        _collection_process() if made_of_docstrings else "",
        "## Splits, and what keeps them apart" if made_of_docstrings else "",
        _SPLITS if made_of_docstrings else "",
        _closest(collection, sets) if made_of_docstrings else "",
        "## Candidates and BM25",
        _bm25(collection, candidates, bm25, sets, official, scored or collection.qrels, relevant),
        "## Training triples",
        _triples(collection, made_of_docstrings),
        "## Sources and their licences" if made_of_docstrings else "## Sources",
        _licences(collection) if made_of_docstrings else _sources(collection, place),
        _LIMITS if made_of_docstrings else "",
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def is_pydocs(collection: Collection) -> bool:
    """Whether `pydocs.build_pydocs` made it, and not a folder of that name."""
    return collection.name == "PyDocs" and "python" in collection.sources


_MOTIVATION = """\
## Motivation

PyDocs lets everybody train and evaluate a retriever on real text within minutes, on a machine without a GPU and without
a network: its texts are docstrings of Python packages that this project installs anyway. A query is the summary
sentence of a docstring, and the passage to find is the rest of it. People wrote both, one to say briefly what the other
explains, which is close to a question and its answer, and nobody had to label anything. PyDocs stands in for MS MARCO
{cite:p}`nguyen2016` where that is too large. It was made for this project's book and for comparisons within it,
not as a benchmark: numbers on PyDocs can be compared only where the fingerprint is the same."""

_GRADES = f"""\
Judgements are graded, and none was made by hand:

- **{pydocs.OWN}**, the passage is the rest of the docstring that the query is the summary of. Where several docstrings
  have the same summary (the same content words in the same order), they are one query, which each of their passages
  answers.
- **{pydocs.NEAR}**, the passage belongs to a docstring whose summary is nearly the same: content words with a Jaccard
  similarity of {pydocs.NEAR_QUERY} or more. The word that differs may decide ("encode", "decode") or not ("by", "via"),
  so such a passage may be the answer. Binary measures count grades of 2 and more as relevant, as the paper does for TREC
  DL: no correct answer counts as wrong, and some wrong ones count as right.
- **{pydocs.NEIGHBOUR}**, the query's docstring names the passage's object under "See Also". Its authors call it related;
  it documents something else, so it does not answer the query.

Every other passage is unjudged and counts as not relevant. A judged passage, of whatever grade, is never used as a
negative."""

_SPLITS = """\
Queries that share a passage of grade 2 or 3 form a connected component, and queries that are nearly the same do share
such passages. Components are put in the order of a seeded hash of their texts and dealt out whole: to validation until
it has enough, then to the test queries, one half after the other, the rest to training. So no query of one set has a
near-identical twin in another, and no passage that is relevant to a query of one set is relevant to one of another. All
sets search the same passages, as in MS MARCO: a passage that is relevant to a test query may be a negative in training."""

_LIMITS = """\
## Limits

- **Not questions.** Summary sentences are what authors write, not what people type. They are complete, well spelled and
  written with the answer at hand.
- **Sparse judgements.** Most queries have one correct passage. Another one may answer as well without being judged; then
  it counts as wrong, for every system alike.
- **Judgements by rule.** Grades follow from the structure of docstrings. A passage may fail to answer its own query,
  for instance where the summary holds the only word that tells two functions apart.
- **Narrow.** English technical prose about scientific Python. Nothing here says how an encoder does elsewhere, in
  particular on MS MARCO.
- **Known text.** Docstrings are public. Encoders pre-trained on the web, and those trained on code search or on
  questions about programming, may have seen them, summary and body side by side.
- **Tied to versions.** Other versions of the packages give another collection with another fingerprint. So does an
  operating system that leaves out parts of the standard library."""


def _collection_process() -> str:
    low, high = pydocs.QUERY_WORDS
    return f"""\
## Collection process

The source files of each package are parsed with Python's `ast`; no package is imported. Tests, copies of other
packages' code, and everything private (a name that begins with an underscore, or a function within a function) are left
out. Each docstring of a function, method or class then goes through the same steps:

1. **Query.** The first sentence of the first paragraph, if it has {low} to {high} words.
2. **Passage.** The rest, on one line, without doctests and other code, displayed formulas, references, "See Also", links
   and markup. Its parts are put in this order: what the authors wrote about the object (the rest of the summary
   paragraph and the extended summary), what it returns, notes, parameters and exceptions (their descriptions without
   their types), the prose of examples. An encoder may read only the beginning of a passage, and in the order of the file
   many would begin with "Parameters", "X : array-like of shape (n_samples, n_features)", a list that hundreds of
   passages share. With the prose first, a passage begins as an answer would.
3. **Length.** Passages are cut at a fixed number of words, near the mean length of MS MARCO's passages. A docstring with
   fewer than {pydocs.MIN_PASSAGE_WORDS} words in the passage, or fewer than {pydocs.MIN_PROSE_WORDS} beside its lists
   of parameters and results, is left out: "X: training data. y: ignored." answers nothing.
4. **Names.** An object's own name is replaced by "function", "method" or "class" in query and passage wherever it is
   code: in backticks, qualified, called, or not a word of English (`max_clique`, `KMeans`, `log1p`). Otherwise matching
   a rare name would be enough. A natural word such as "sort" stays in prose.
5. **Duplicates.** Passages whose word trigrams have a Jaccard similarity of {pydocs.SAME_PASSAGE} or more become one
   passage. A summary that more than {pydocs.MAX_ANSWERS} passages answer ("Predict class probabilities for X.") asks
   for nothing in particular; it is dropped as a query, its passages stay.

Ids follow a seeded hash of the texts and tell nothing of package, module or name. The same versions of Python and the
packages give the same bytes."""


def plain(text: str) -> str:
    """The text on one line, with no character that means something in Markdown or HTML."""
    return re.sub(r"([!-/:-@\[-`{-~])", r"\\\1", " ".join(text.split()))


def _table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table: the first column is text, the others are numbers."""

    def line(cells: Sequence[object]) -> str:
        return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"

    rule = "| --- |" + " ---: |" * (len(header) - 1)
    return "\n".join([line(header), rule, *(line(row) for row in rows)])


def _html(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table of texts that other people wrote: escaped HTML on single lines, so that no character means anything."""
    lines = ['<div style="overflow-x: auto;">', '<table class="table">', "<thead><tr>"]
    lines += [f'<th scope="col">{escape(cell)}</th>' for cell in header]
    lines.append("</tr></thead><tbody>")
    for row in rows:
        lines.append(
            "<tr>"
            + "".join(f"<td>{escape(shorten(str(cell), _LONGEST))}</td>" for cell in row)
            + "</tr>"
        )
    return "\n".join([*lines, "</tbody></table>", "</div>"])


def _counts(collection: Collection, sets: Sequence[str], relevant: int) -> str:
    rows = []
    for name in sets:
        judged = collection.qrels[name].values()
        rows.append(
            [
                name,
                f"{len(collection.queries[name]):,}",
                f"{sum(map(len, judged)):,}",
                f"{len({d for j in judged for d, grade in j.items() if grade >= relevant}):,}",
            ]
        )
    total = sum(len(texts) for texts in collection.queries.values())
    text = f"{len(collection.passages):,} passages and {total:,} queries."
    if empty := sum(not passage.strip() for passage in collection.passages.texts):
        text += f" {empty:,} of the passages have no text; a search never returns them."
    header = ["set", "queries", "judgements", f"passages of grade ≥ {relevant}"]
    return f"{text}\n\n{_table(header, rows)}" if rows else text


def _lengths(collection: Collection, sets: Sequence[str]) -> str:
    texts = {"passages": collection.passages.texts}
    texts |= {f"queries, {name}": collection.queries[name].texts for name in sets}
    rows = []
    for name, some in texts.items():
        words = np.array([len(text.split()) for text in evenly(some)] or [0])
        quantiles = np.quantile(words, [0, 0.25, 0.5, 0.75, 1])
        rows.append([name, f"{words.mean():.1f}", *(f"{q:.0f}" for q in quantiles)])
    return (
        "Words (separated by white space) of a text, counted in at most 100,000 texts of a row, at even distances:\n\n"
        + _table(["", "mean", "least", "first quartile", "median", "third quartile", "most"], rows)
    )


def _grades(collection: Collection, sets: Sequence[str], relevant: int) -> str:
    if not sets:
        return "There are none."
    counted = {
        name: Counter(g for judged in collection.qrels[name].values() for g in judged.values())
        for name in sets
    }
    grades = sorted({grade for counts in counted.values() for grade in counts}, reverse=True)
    rows = []
    for name in sets:
        several = sum(
            sum(grade >= relevant for grade in judged.values()) > 1
            for judged in collection.qrels[name].values()
        )
        rows.append([name, *(f"{counted[name][g]:,}" for g in grades), f"{several:,}"])
    several_header = f"queries with several of grade ≥ {relevant}"
    header = ["set", *(f"grade {grade}" for grade in grades), several_header]
    return _table(header, rows)


def _examples(collection: Collection) -> str:
    """The first training queries, in the order of their ids, that have a passage of a lower grade.

    Where no query has two grades, the first queries; without judgements, the first passages.
    """
    judged_sets = [name for name in sorted(collection.qrels) if collection.qrels[name]]
    if not judged_sets:
        passages = evenly(collection.passages.texts)[: 2 * _EXAMPLES]
        return "The first passages.\n\n" + _html(["passage"], [[text] for text in passages])
    name = "train" if "train" in judged_sets else judged_sets[0]
    several = [
        qid for qid, judged in collection.qrels[name].items() if len(set(judged.values())) > 1
    ]
    rows: list[list[object]] = []
    for qid in sorted(several or collection.qrels[name])[:_EXAMPLES]:
        judged = sorted(collection.qrels[name][qid].items(), key=lambda item: (-item[1], item[0]))
        by_grade = {grade: docid for docid, grade in reversed(judged)}
        for grade in dict.fromkeys((max(by_grade), min(by_grade))):
            query = "" if rows and grade != max(by_grade) else collection.queries[name][qid]
            rows.append([query, grade, collection.passages[by_grade[grade]]])
    which = (
        "that have passages of two grades, with a passage of the highest and one of the lowest grade."
        if several
        else "with a passage that is judged for each."
    )
    return f"The first queries of the set {name}, in the order of their ids, {which}\n\n" + _html(
        ["query", "grade", "passage"], rows
    )


def _closest(collection: Collection, sets: Sequence[str]) -> str:
    texts = [(name, text) for name in sets for text in collection.queries[name].texts]
    content = [frozenset(pydocs.normal_form(text)) for _, text in texts]
    pairs = sorted(
        (-len(content[a] & content[b]) / len(content[a] | content[b]), texts[a], texts[b])
        for a, b in pydocs.similar_pairs(content, 0.6)
        if texts[a][0] != texts[b][0]
    )
    if not pairs:
        return (
            "No two queries of different sets have content words with a Jaccard similarity of 0.6."
        )
    rows = [
        [f"{-negated:.2f}", f"{one[1]} ({one[0]})", f"{other[1]} ({other[0]})"]
        for negated, one, other in pairs[:_CLOSEST]
    ]
    return (
        f"The most similar queries of different sets have content words (stemmed, without stop words)"
        f" with a Jaccard similarity of {-pairs[0][0]:.2f}:\n\n"
        + _html(["similarity", "query", "query of another set"], rows)
    )


def _bm25(
    collection: Collection,
    candidates: Mapping[str, Run],
    bm25: Mapping[str, Mapping[str, float]],
    sets: Sequence[str],
    official: bool,
    scored: Mapping[str, Qrels],
    relevant: int,
) -> str:
    depth = max((len(scores) for run in candidates.values() for scores in run.values()), default=0)
    measures = list(dict.fromkeys(measure for values in bm25.values() for measure in values))
    rows = []
    partly = []
    for name in (name for name in sets if name in candidates or name in bm25):
        qrels, run = scored[name], candidates.get(name, {})
        answers = {q: {d for d, grade in j.items() if grade >= relevant} for q, j in qrels.items()}
        reachable = sum(bool(answers[q] & run.get(q, {}).keys()) for q in answers)
        values = [bm25.get(name, {}).get(measure) for measure in measures]
        rows.append(
            [
                name,
                f"{reachable / max(len(qrels), 1):.3f}" if run else "",
                *("" if value is None else f"{value:.3f}" for value in values),
            ]
        )
        if len(qrels) < (judged := len(collection.qrels[name])):
            partly.append(f"{len(qrels):,} of the {judged:,} judged queries of {name}")
    if not rows:
        return "No query is judged, so there is nothing to score."
    header = ["set", "with a relevant candidate", *map(measure_label, measures)]
    origin = (
        "The candidates are the official ones of the collection. Where they come without scores, their order here is that"
        " of BM25 {cite:p}`robertson2009,lu2024bm25s` in Lucene's variant, with English stop words and stemming."
        if official
        else "Candidates come from BM25 {cite:p}`robertson2009,lu2024bm25s` in Lucene's variant, with"
        " English stop words and stemming."
    )
    if bigrams := sum(map(without_spaces, collection.passages.texts)):
        origin += (
            f" {bigrams:,} of {len(collection.passages):,} passages have text in scripts without spaces"
            " between words, which BM25 splits into character bigrams."
        )
    nothing = {name: sum(not hits for hits in run.values()) for name, run in candidates.items()}
    origin += "".join(
        f" BM25 finds nothing for {count:,} of {len(candidates[name]):,} queries of {plain(name)}."
        for name, count in nothing.items()
        if count and not official
    )
    some = f" They are of {' and '.join(partly)}, at even distances." if partly else ""
    return (
        f"{origin} What an encoder reranks is the first"
        f" {depth} of a query, so no reranking can help a query without a relevant passage (grade ≥ {relevant})"
        ' among them; the column "with a relevant candidate" is the share of queries that have one.'
        " The other columns are what BM25's own order scores: Hits@k is the share of queries with a"
        f" relevant passage among the first k, R@k the share of a query's relevant passages.{some}\n\n"
        + _table(header, rows)
    )


def _triples(collection: Collection, made_of_docstrings: bool) -> str:
    triples = collection.triples
    if not len(triples):
        return "There are none."
    if not made_of_docstrings:
        checked = check_sample(collection)
        left_out = f" Not trained on, of {checked.checked:,} checked: {checked.reasons}."
        return (
            f"{len(triples):,} triples of the collection's own, as rows of {len(collection.queries['train']):,} training"
            " queries and of the passages."
        ) + (left_out if checked.reasons else "")
    qrels = collection.qrels.get("train", {})
    grades = Counter(qrels.get(qid, {}).get(positive) for qid, positive, _ in triples)
    shares = ", ".join(
        f"{n:,} of grade {g}" for g, n in sorted(grades.items(), key=str, reverse=True)
    )
    queries, positives, negatives = (len(set(column)) for column in zip(*triples, strict=True))
    return (
        f"{len(triples):,} triples of {queries:,} queries, {positives:,} different positives ({shares})"
        f" and {negatives:,} different negatives. A negative is drawn from the BM25 candidates of the"
        " query, below the first ranks, where unjudged answers would be; passages with a judgement are"
        " never drawn. Each pass over the queries takes one triple of each, in a new order."
    )


def _sources(collection: Collection, place: str) -> str:
    """What the collection was read from."""
    rows = [[plain(cell) for cell in item] for item in sorted(collection.sources.items())]
    return (
        "The texts stay under the terms of those who publish them. Apart from the examples above, they are not distributed"
        f" with this {place}.\n\n" + _table(["what", "source"], rows).replace("---: |", "--- |")
    )


def _licences(collection: Collection) -> str:
    rows = []
    for name, version in sorted(collection.sources.items()):
        if name == "python":
            rows.append(["Python (its standard library, where chosen)", version, "PSF-2.0"])
        else:
            rows.append([name, version, _licence(name)])
    table = _table(["distribution", "version", "licence"], rows).replace("---: |", "--- |")
    return (
        "The texts stay under the licences of the packages they come from, as the installed packages"
        " declare them. The collection is built where it is used and is not distributed.\n\n"
        + table
    )


def _licence(distribution: str) -> str:
    """What an installed distribution's metadata say: expression, else classifiers, else free text."""
    try:
        metadata = importlib.metadata.metadata(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not recorded"
    if "License-Expression" in metadata:
        return metadata["License-Expression"]
    classified = [
        text.rpartition(" :: ")[2]
        for text in metadata.get_all("Classifier") or []
        if text.startswith("License :: ")
    ]
    stated = metadata["License"].strip().splitlines() if "License" in metadata else []
    return ", ".join(classified) or (stated[0].strip() if stated else "not recorded")
