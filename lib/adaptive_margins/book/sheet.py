"""The data sheet of any collection: as one HTML page that needs nothing else, as facts, and as text for a terminal."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from html import escape
from typing import Any

import numpy as np

from adaptive_margins.book.context import evenly, markdown_table
from adaptive_margins.book.datasheet import datasheet, is_pydocs, plain
from adaptive_margins.data import pydocs
from adaptive_margins.data.collection import Collection, Texts
from adaptive_margins.data.mining import Checked, check_sample
from adaptive_margins.data.trec import Qrels, Run
from adaptive_margins.data.words import without_spaces
from adaptive_margins.evaluation.measures import evaluate
from adaptive_margins.retrieval.bm25 import BM25
from adaptive_margins.text_tables import aligned

DEPTH = 100
"""Candidates a query."""
MOST_QUERIES = 1000
"""Most judged queries of a set that BM25 searches for, at even distances."""

_CITED = {
    "gebru2021": ("Gebru et al.", "2021", "Datasheets for Datasets. Communications of the ACM 64 (12)"),
    "nguyen2016": (
        "Nguyen et al.", "2016",
        "MS MARCO: A Human Generated Machine Reading Comprehension Dataset. CEUR Workshop Proceedings 1773",
    ),
    "robertson2009": (
        "Robertson and Zaragoza", "2009",
        "The Probabilistic Relevance Framework: BM25 and Beyond. Foundations and Trends in Information Retrieval 3 (4)",
    ),
    "lu2024bm25s": (
        "Lù", "2024", "BM25S: Orders of magnitude faster lexical search via eager sparse scoring. arXiv:2407.03618",
    ),
}  # fmt: skip
"""What the data sheet cites: authors, year, title and where it appeared, as book/references.bib has them."""

_CSS = """\
:root { color-scheme: light dark; }
body { max-width: 60rem; margin: 2rem auto; padding: 0 1rem; font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: break-word; }
h1, h2, h3 { line-height: 1.2; margin: 1.6em 0 .5em; }
table { display: block; overflow-x: auto; border-collapse: collapse; margin: 1em 0; font-size: .875rem;
  font-variant-numeric: tabular-nums; }
th, td { padding: .3em .8em; text-align: left; vertical-align: top; border-bottom: 1px solid #8c8c8c80; }
th p, td p { margin: 0; }
.text-right { text-align: right; }
.literal { font: .9em ui-monospace, monospace; }
"""


def collection_page(
    collection: Collection, *, note: str = "", runs: Mapping[str, Mapping[str, Any]] | None = None
) -> str:
    """The data sheet as an HTML page without scripts, fonts or files from elsewhere.

    It is the book's data sheet (`datasheet.datasheet`) for any collection. BM25 searches `DEPTH` candidates for the judged
    queries of each set, at most `MOST_QUERIES`; for those of "train" only if no other set is judged. A passage is
    relevant from grade 1 on, in PyDocs from grade 2.

    Args:
        collection: what is described; it may have no queries, no triples, and passages without text.
        note: plain text to stand below the first paragraph, e.g. how the queries were split.
        runs: "runs" of `collection_facts`, to be listed.
    """
    relevant = pydocs.NEAR if is_pydocs(collection) else 1
    scored = _scored(collection)
    candidates: dict[str, Run] = {}
    scores: dict[str, dict[str, float]] = {}
    if scored:
        bm25 = BM25(collection.passages)
        measures = ["nDCG@10", f"Success(rel={relevant})@10", f"R(rel={relevant})@{DEPTH}"]
        for name, qrels in scored.items():
            texts = collection.queries[name]
            asked = Texts(list(qrels), [texts[qid] for qid in qrels])
            candidates[name] = bm25.search(asked, DEPTH)
            scores[name] = evaluate(qrels, candidates[name], measures).mean
    text = datasheet(
        collection, candidates, scores, scored=scored, relevant=relevant, place="page", note=note
    )
    if runs:
        rows = run_rows({plain(name): found for name, found in runs.items()})
        text += f"\n## Runs that came with it\n\n{markdown_table(RUN_COLUMNS, rows)}\n"
    title = f"Data sheet of {collection.name}"
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{_CSS}</style>\n</head>\n<body>\n"
        f"{_html(_without_citations(text))}</body>\n</html>\n"
    )


def collection_facts(
    collection: Collection, runs: Mapping[str, Run] | None = None
) -> dict[str, Any]:
    """What the data sheet says in numbers, ready for JSON.

    ``name``, ``fingerprint``, ``sources``; ``passages``, ``empty_passages``, ``bigram_passages`` (with
    text without spaces between words, which BM25 splits into character bigrams); ``words`` of a passage (separated by white
    space): ``mean``, ``median``, ``max``; ``sets``: name → ``queries``, ``judged`` (queries), ``relevant_queries`` (with a
    passage of grade 1 or more; a UserWarning says if no judged query has one), ``judgements``, ``grades``
    (grade as text, from high to low → number); ``triples``, ``triples_checked`` (`Checked`, of a part if they are many; `train`
    leaves out what it counts); ``runs`` (those given, by name): ``set`` that most of its queries are of, ``queries`` of that
    set, ``depth`` (most hits of a query), ``unknown`` (hits that the collection has no
    passage for), ``nDCG@10`` (over all judged queries of the set; None without any).
    """
    words = np.array([len(text.split()) for text in collection.passages.texts] or [0])
    mean, median = float(words.mean()), float(np.median(words))
    sets = {}
    for name, queries in collection.queries.items():
        judged = collection.qrels[name]
        grades = Counter(grade for row in judged.values() for grade in row.values())
        sets[name] = {
            "queries": len(queries),
            "judged": len(judged),
            "relevant_queries": sum(max(row.values(), default=0) > 0 for row in judged.values()),
            "judgements": grades.total(),
            "grades": {str(grade): grades[grade] for grade in sorted(grades, reverse=True)},
        }
        if judged and not sets[name]["relevant_queries"]:
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
        "words": {"mean": mean, "median": median, "max": int(words.max())},
        "sets": sets,
        "triples": len(collection.triples),
        "triples_checked": asdict(check_sample(collection)),
        "runs": _run_facts(collection, runs or {}),
    }


def _run_facts(collection: Collection, runs: Mapping[str, Run]) -> dict[str, dict[str, Any]]:
    known = set(collection.passages.ids)
    facts = {}
    for name, run in runs.items():
        asked = {s: sum(q in run for q in texts.ids) for s, texts in collection.queries.items()}
        most = max(asked, key=asked.__getitem__, default="")
        of = most if asked.get(most) else None
        judged = collection.qrels[of] if of else {}
        facts[name] = {
            "set": of,
            "queries": asked.get(most, 0),
            "depth": max(map(len, run.values()), default=0),
            "unknown": sum(docid not in known for hits in run.values() for docid in hits),
            "nDCG@10": evaluate(judged, run, ["nDCG@10"]).mean["nDCG@10"] if judged else None,
        }
    return facts


def facts_text(facts: dict[str, Any]) -> str:
    """`collection_facts` for a terminal."""
    words = facts["words"]
    passages = f"{facts['passages']:,}"
    if facts["empty_passages"]:
        passages += f", of which {facts['empty_passages']:,} have no text"
    triples = f"{facts['triples']:,}"
    checked = Checked(**facts["triples_checked"])
    if checked.reasons:
        triples += f"; not trained on, of {checked.checked:,} checked: {checked.reasons}"
    lines = [
        ["Collection", facts["name"]],
        ["Fingerprint", facts["fingerprint"]],
        *([what, source] for what, source in sorted(facts["sources"].items())),
        ["Passages", passages],
        ["Words of a passage", f"mean {words['mean']:.1f}, median {words['median']:g}, most {words['max']:,}"],
        *(
            [["Without spaces", f"{bigrams:,} passages; BM25 splits their text into character bigrams"]]
            if (bigrams := facts["bigram_passages"])
            else []
        ),
        ["Triples", triples],
    ]  # fmt: skip
    text = aligned(lines, left=2)
    if facts["sets"]:
        text += ["", *aligned([SET_COLUMNS, *set_rows(facts)])]
    else:
        text.append("No queries.")
    if facts["runs"]:
        text += ["", *aligned([RUN_COLUMNS, *run_rows(facts["runs"])])]
    return "\n".join(text)


SET_COLUMNS = ["Set", "Queries", "Judged", "With relevant", "Judgements", "Of grade"]


def set_rows(facts: dict[str, Any]) -> list[list[str]]:
    """The sets of `collection_facts`, a row each under `SET_COLUMNS`."""
    rows = []
    for name, counts in facts["sets"].items():
        keys = ("queries", "judged", "relevant_queries", "judgements")
        numbers = [f"{counts[key]:,}" for key in keys]
        grades = ", ".join(f"{grade}: {number:,}" for grade, number in counts["grades"].items())
        rows.append([name, *numbers, grades])
    return rows


RUN_COLUMNS = ["Run", "Set", "Queries", "Depth", "Unknown hits", "nDCG@10"]


def run_rows(runs: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """The runs of `collection_facts`, a row each under `RUN_COLUMNS`."""
    return [
        [
            name,
            found["set"] or "none",
            *(f"{found[key]:,}" for key in ("queries", "depth", "unknown")),
            "—" if found["nDCG@10"] is None else f"{found['nDCG@10']:.4f}",
        ]
        for name, found in runs.items()
    ]


def _scored(collection: Collection) -> dict[str, Qrels]:
    """Set → qrels of the queries that are searched for."""
    judged = {name: qrels for name, qrels in collection.qrels.items() if qrels}
    if len(judged) > 1:
        judged.pop("train", None)
    return {
        name: {qid: qrels[qid] for qid in evenly(list(qrels), MOST_QUERIES)}
        for name, qrels in judged.items()
    }


def _without_citations(text: str) -> str:
    """Citations as authors and year, and a list of what they stand for at the end."""
    cited: dict[str, None] = {}

    def plain(match: re.Match[str]) -> str:
        keys = match[2].split(",")
        cited.update(dict.fromkeys(keys))
        if match[1] == "t":
            return ", ".join(f"{_CITED[key][0]} ({_CITED[key][1]})" for key in keys)
        return f"({'; '.join(f'{_CITED[key][0]}, {_CITED[key][1]}' for key in keys)})"

    text = re.sub(r"\{cite:([tp])\}`([^`]+)`", plain, text)
    listed = [
        f"- {names} ({year}). {rest}." for names, year, rest in sorted(_CITED[key] for key in cited)
    ]
    return "\n".join([text, "## References", "", *listed, ""])


def _html(markdown: str) -> str:
    """The body of an HTML page; nothing is read from files, nor is any configuration."""
    from docutils.core import publish_parts
    from myst_parser.parsers.docutils_ import Parser

    settings = {
        "_disable_config": True,
        "file_insertion_enabled": False,
        "embed_stylesheet": False,
        "stylesheet_path": "",
        "doctitle_xform": False,
        "initial_header_level": 1,
        "halt_level": 3,  # an error in the Markdown is ours
        "math_output": "LaTeX",
    }
    parts = publish_parts(
        markdown, parser=Parser(), writer_name="html5", settings_overrides=settings
    )
    return str(parts["body"])
