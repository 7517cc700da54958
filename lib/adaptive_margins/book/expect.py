"""The book's page "What to expect": trainings on collections of others, all numbers from ``book/what_to_expect.json``."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from statistics import mean
from typing import Any

from adaptive_margins.book.context import markdown_table
from adaptive_margins.book.style import measure_label
from adaptive_margins.progress import clock

FILE = "what_to_expect.json"
Row = Mapping[str, Any]

_INTRO = """\
# What to expect

`adaptive-margins train` was run on collections that this project does not ship, with the seeds listed below. A seed decides which
queries are trained on, validated on and tested on (where a collection comes without such sets), which negatives are drawn, and
in which order. The target is the distributed one. Nothing was tuned for a collection: each training is the command with a
path, an encoder and a seed. The test queries are never looked at before the end.

**Read this before you hope for much.** The shipped encoder, all-MiniLM-L6-v2, was trained by its makers on more than a billion
pairs of texts. Hundreds of queries made from a package's docstrings improved it for such queries; the few dozen judged queries of
the classic collections did not. Then the command says so and keeps the original: a
trained encoder replaces it only if its best check is better on the validation queries by more than one standard error."""

_HOW = """\
"all-MiniLM-L6-v2" is the encoder as it is shipped. "First 3 layers" is the same one without its upper half, which its makers did
not train in this form, so there is something to learn; it stays far below BM25 here. Cranfield and Vaswani are the classic
test collections of abstracts with judged questions; their queries are split by the seed. networkx is a folder that
`examples/package_docs.py` makes of that package's docstrings. It has no queries, so pseudo-queries stand in for them, and what
its numbers say of real queries is not known."""


def page(rows: Sequence[Row]) -> str:
    """A page of MyST Markdown.

    Args:
        rows: reports of `finetune.finetune`, as ``benchmarks/expect.py`` keeps them: a training each.
    """
    machines = dict.fromkeys(f"{row['machine']}, {row['date']}" for row in rows)
    parts = [
        _INTRO,
        f"## {len(rows)} trainings",
        summary(rows),
        _HOW,
        "Means over the seeds, full ranking of all passages:",
        _means(rows),
        "## Each training",
        "Differences of trained and start on the test queries with 95 % intervals; *p* of a paired t test, and of a TOST for"
        " equivalence within ±.05. Times are those of one thread, with another training on the other core.",
        _each(rows),
        ":::{dropdown} What the command said",
        "\n".join(f"- {_name(row)}, seed {row['seed']}: {row['verdict']}" for row in rows),
        ":::",
        f"Computed on: {'; '.join(machines)}.",
    ]
    return "\n\n".join(parts) + "\n"


def summary(rows: Sequence[Row]) -> str:
    """How often training helped."""
    kept = sum(row["kept"] == "start" for row in rows)
    found = Counter(
        row["comparisons"]["trained vs start"]["verdict"]
        for row in rows
        if row["kept"] == "trained"
    )
    told = [
        f"in {found[word]} the trained one was {words}"
        for word, words in (
            ("better", "better on the test queries"),
            ("worse", "**worse** on the test queries"),
            ("equivalent", "equivalent to it"),
            ("undecided", "neither shown to be better, nor worse, nor equivalent"),
        )
        if found[word]
    ]
    return f"In {kept} of {len(rows)} trainings the original encoder was kept" + (
        f"; {', '.join(told)}." if told else "."
    )


def _means(rows: Sequence[Row]) -> str:
    lines = []
    for name, some in groupby(sorted(rows, key=_name), _name):
        same = list(some)
        measures = same[0]["measures"]["start"]
        for measure in measures:
            values = [
                f"{mean(row['measures'][system][measure] for row in same):.3f}"
                for system in ("start", "trained", "bm25", "hybrid")
            ]
            tested = same[0]["collection"]["sets"]["test"]
            kept = sum(row["kept"] == "trained" for row in same)
            lines.append([name, measure_label(measure), tested, *values, f"{kept} of {len(same)}"])
    header = ["Collection, encoder", "Measure", "Queries", "Start", "Trained", "BM25"]
    return markdown_table([*header, "Hybrid", "Trained one kept"], lines)


def _each(rows: Sequence[Row]) -> str:
    lines = []
    for row in rows:
        found = row["comparisons"]["trained vs start"]
        low, high = found["ci"]
        kept = row["kept"] == "trained"
        lines.append(
            [
                _name(row),
                row["seed"],
                f"{row['triples']['used']:,}",
                f"{found['difference']:+.3f} [{low:+.3f}, {high:+.3f}]"
                if kept
                else "original kept",
                f"{found['p_t']:.3f}, {found['p_tost']:.3f}" if kept else "",
                found["verdict"] if kept else "",
                row["comparisons"]["trained vs bm25"]["verdict"],
                clock(sum(row["seconds"].values())),
            ]
        )
    header = ["Collection, encoder", "Seed", "Triples", "nDCG@10", "p (t), p (TOST)"]  # fmt: skip
    return markdown_table([*header, "Against start", "Against BM25", "Time"], lines)


def _name(row: Row) -> str:
    target = "" if row["target"] == "distributed" else f", target {row['target']}"
    return f"{row['collection']['name']}, {row['encoder']}{target}"


def read(path: Path) -> list[dict[str, Any]]:
    """The committed trainings."""
    return json.loads(path.read_text("utf-8"))
