"""What the notebooks show beside figures and tables: the setting, the collection, gains, what the index costs.

Texts are Markdown. Every number in them comes from the profile, the collection, a run, or ``published.yaml``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from pydantic import Field, TypeAdapter, ValidationError

from adaptive_margins.book import figures, tables
from adaptive_margins.book.describe import evenly
from adaptive_margins.book.findings import signed
from adaptive_margins.book.published import Published, load
from adaptive_margins.book.style import encoder_label, measure_label, score
from adaptive_margins.book.tables import shorten
from adaptive_margins.data.collection import Collection
from adaptive_margins.data.trec import top
from adaptive_margins.errors import AdaptiveMarginsError
from adaptive_margins.paper.experiments import Reproduction
from adaptive_margins.paper.store import StoredRun
from adaptive_margins.profiles.config import CurveSettings, StaticSettings, available
from adaptive_margins.runs import BM25_NAME

NAMES = {
    "collection": "Collection",
    "encoders": "Encoders",
    "lengths": "Text lengths",
    "optimizer": "Optimiser",
    "tuning": "Tuning, learning curves",
    "tests": "Test queries",
    "rerank": "Reranking",
    "full": "Full ranking",
    "static": "Static targets",
    "adaptive": "Adaptive targets",
    "distributed": "Distributed targets",
    "target_plot": "Figure 6",
    "comparison": "Training",
    "reference": "Encoder, reference",
}
"""Parts of the setting, by their keys in ``published.yaml``."""
OPTIMIZERS = {"adamw_torch_fused": "AdamW", "adamw_torch": "AdamW", "adamw_8bit": "8-bit AdamW"}
_TEXT = (Annotated[str, Field(pattern=r"\S")], "text")
_COUNT = (Annotated[int, Field(ge=1)] | None, "a whole number from 1 on, or None")
PARAMETERS: dict[str, tuple[Any, str]] = {
    "profile": _TEXT,
    "data_folder": (str, "text, empty for no folder"),
    "source": _TEXT,
    "output": _TEXT,
    "model": _TEXT,
    "target": (
        Annotated[float, Field(allow_inf_nan=False)] | Annotated[str, Field(pattern="^(adaptive|distributed)$")],
        "a number, \"adaptive\" or \"distributed\"",
    ),
    "query_set": (_TEXT[0] | None, "text or None"),
    "encoder": (_TEXT[0] | None, "text or None"),
    "epsilon": (Annotated[float, Field(allow_inf_nan=False)], "a number"),
    "first": (Annotated[int, Field(ge=0)], "a whole number from 0 on"),
    "seed": (Annotated[int, Field(ge=0)] | None, "a whole number from 0 on, or None"),
    "seeds": (
        Annotated[int, Field(ge=0)] | Annotated[str, Field(pattern=r"^\d+(,\d+)*$")] | None,
        "whole numbers from 0 on, such as \"1,2,3\", or None",
    ),
    "triples": _COUNT,
    "window": _COUNT,
    "patience": _COUNT,
    "draws": _COUNT,
    "learning_rate": (
        Annotated[float, Field(gt=0, allow_inf_nan=False)] | None,
        "a number above 0, or None",
    ),
}  # fmt: skip
"""Parameter of a notebook → its type, and that in words."""


class ParameterError(AdaptiveMarginsError, ValueError):
    """A parameter of a notebook has a value of another kind; the message says which is expected."""


def check_parameters(namespace: Mapping[str, Any]) -> None:
    """Raise ParameterError for a parameter of the notebook whose `globals` are given, if its value is of another kind."""
    for name, (kind, words) in PARAMETERS.items():
        if name not in namespace:
            continue
        value = namespace[name]
        try:
            TypeAdapter(kind).validate_python(value, strict=True)
        except ValidationError:
            way_out = ""
            if words.startswith("text") and value is not None and not isinstance(value, str):
                way_out = f"; papermill passes {value} as text with -r in the place of -p"
            raise ParameterError(f"{name} is {value!r}; expected {words}{way_out}") from None


def markdown_table(header: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """A Markdown table; a cell's line breaks and bars do not break it."""
    lines = [
        [re.sub(r"[ \t\n]+", " ", str(cell)).strip().replace("|", "\\|") for cell in row]
        for row in (header, *rows)
    ]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def heading(reproduction: Reproduction) -> str:
    """Collection, its fingerprint and the profile: what a table of this run has in its caption."""
    collection = reproduction.collection
    return f"{collection.name} {collection.fingerprint}, profile {reproduction.profile.name}"


def commands(reproduction: Reproduction, data: pd.DataFrame) -> dict[str, list[str]]:
    """Run id → the commands that make the run and that score it without this project (`tables.commands`)."""
    p, fingerprint = reproduction.profile, reproduction.fingerprint
    profile = p.name if p.name in available() else f"{p.name}.yaml"
    return {
        run_id: tables.commands(profile, run_id, fingerprint, p.sets.tests, p.measures.full)
        for run_id in data["run_id"].unique()
        if run_id
    }


def table3(reproduction: Reproduction, data: pd.DataFrame) -> str:
    """Table 3 as HTML, then its scores beside the published ones, where there are any to compare with."""
    published, about = load(), heading(reproduction)
    models = {n: e.published for n, e in reproduction.profile.encoders.items() if e.published}
    supplied = reproduction.table4() if reproduction.supplied() else None
    lines = commands(reproduction, data)
    html = tables.table3(data, published, heading=about, commands=lines, supplied=supplied)
    return html + tables.compared(
        data, published, table=3, heading=about, models=models, supplied=supplied
    )


def table4(reproduction: Reproduction, data: pd.DataFrame) -> str:
    """Table 4 as HTML, then its scores beside the published ones, if the reference encoder is that of the paper."""
    p, published = reproduction.profile, load()
    about = f"{heading(reproduction)}, encoder {encoder_label(p.reference_encoder)}"
    html = tables.table4(data, published, heading=about, commands=commands(reproduction, data))
    if p.encoders[p.reference_encoder].published != "distilBERT":
        return html
    return html + tables.compared(data, published, table=4, heading=about)


def save(data: pd.DataFrame, data_folder: str | Path, name: str) -> None:
    """Write what a figure or table shows to ``data_folder/NAME.csv``; an empty folder name writes nothing."""
    if data_folder:
        Path(data_folder).mkdir(parents=True, exist_ok=True)
        data.to_csv(Path(data_folder) / f"{name}.csv", index=False)


# --- the setting ------------------------------------------------------------------------------------------------------


def setup(reproduction: Reproduction, *parts: str, published: Published | None = None) -> str:
    """The profile's ``about``, and a table of ``parts`` of the setting (keys of `NAMES`): the paper's and this run's.

    Raises KeyError on an unknown part.
    """
    paper, here = (published or load()).setup, _setting(reproduction)
    table = markdown_table(
        ["", "Paper", "Here"], ([NAMES[part], paper[part]["text"], here[part]] for part in parts)
    )
    about = " ".join(reproduction.profile.about.split())
    return f"Profile **{reproduction.profile.name}**: {about}\n\n{table}\n"


def note(reproduction: Reproduction, place: str) -> str:
    """What the profile says at a place of the book (a key of its ``notes``); Markdown that shows nothing if it says nothing."""
    text: str = getattr(reproduction.profile.notes, place)
    return text or "<!-- -->"


def _setting(reproduction: Reproduction) -> dict[str, str]:
    p, c = reproduction.profile, reproduction.collection

    def queries(name: str) -> str:
        return f"{name}, {len(c.queries[name]):,} queries"

    def measures(names: Iterable[str]) -> str:
        return ", ".join(map(measure_label, names))

    def sizes(values: Iterable[int]) -> str:
        return "batches of " + " and ".join(map(str, values))

    def curve(experiment: CurveSettings, batch_sizes: Iterable[int]) -> str:
        every = (
            f"every {experiment.evaluate_every:,} triples"
            if experiment.evaluate_every
            else f"every {experiment.evaluate_every_steps:,} steps"
        )
        triples = "all" if experiment.triples is None else f"{experiment.triples:,}"
        return f"{triples} triples a run, {sizes(batch_sizes)}, scores {every}"

    def own(experiment: StaticSettings | CurveSettings) -> str:
        """What an experiment has of its own."""
        rate = experiment.learning_rate
        return ("" if rate is None else f"; learning rate {_rate(rate)}") + (
            "" if experiment.seed is None else f"; seed {experiment.seed}"
        )

    t, s = p.training, p.static
    stopping = p.comparison.validation or p.sets.validation
    listed = "passages of BM25" if p.candidates.source == "bm25" else "official BM25 candidates"
    seeds = "; ".join(
        f"{encoder_label(e)} with seeds {', '.join(map(str, dict.fromkeys([p.seed, *more])))}"
        for e, more in s.seeds.items()
    )
    return {
        "collection": f"{c.name}, {len(c.passages):,} passages, {len(c.triples):,} training triples",
        "encoders": "; ".join(
            f"{encoder_label(name)}: {e.label or e.base}" for name, e in p.encoders.items()
        ),
        "lengths": f"at most {p.lengths.query} tokens a query, {p.lengths.passage} a passage",
        "optimizer": f"{OPTIMIZERS[t.optimizer]}, {t.precision}, learning rate {_rate(t.learning_rate)},"
        f" weight decay {t.weight_decay:g}, seed {p.seed}",
        "tuning": queries(p.sets.validation),
        "tests": "; ".join(map(queries, p.sets.tests)),
        "rerank": f"the first {p.candidates.depth} {listed} are reranked; {measures(p.measures.rerank)}",
        "full": f"every passage is ranked, by a FAISS index sized for the collection and exact re-ranking, to depth"
        f" {p.measures.full_depth}; {measures(p.measures.full)}",
        "static": f"ε in {', '.join(f'{x:g}' for x in s.targets)}; {s.triples:,} triples a run,"
        f" {sizes([s.batch_size])}" + (f"; {seeds}" if seeds else "") + own(s),
        "adaptive": curve(p.adaptive, p.adaptive.batch_sizes[:1]) + own(p.adaptive),
        "distributed": curve(p.distributed, p.distributed.batch_sizes) + own(p.distributed),
        "target_plot": f"rolling mean over {p.target_plot.window} batches, the first and last {p.target_plot.span}"
        " batches",
        "comparison": f"{curve(p.comparison, p.comparison.batch_sizes[:1])}, decay γ = {p.comparison.decay:g} a step; stops"
        f" after {p.comparison.patience} checks without a gain in {measure_label(p.measures.selection)} on {stopping};"
        f" rankings are those of the {p.comparison.keep} checkpoint{own(p.comparison)}",
        "reference": f"{encoder_label(p.reference_encoder)}; † against the underlined run",
    }


def _rate(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:g}"


# --- the collection ---------------------------------------------------------------------------------------------------


def counts(collection: Collection) -> str:
    """Queries and judgements of each set, by grade."""
    grades = sorted({g for q in collection.qrels.values() for j in q.values() for g in j.values()})
    rows = []
    for name, queries in collection.queries.items():
        judged = [g for judgements in collection.qrels[name].values() for g in judgements.values()]
        rows.append(
            [name, f"{len(queries):,}", *(f"{judged.count(g):,}" for g in reversed(grades))]
        )
    return markdown_table(["Set", "Queries", *(f"Grade {g}" for g in reversed(grades))], rows)


def lengths(collection: Collection) -> Figure:
    """Histograms of the lengths, in words, of queries and of passages (evenly spaced ones, if there are very many)."""
    queries = [text for texts in collection.queries.values() for text in texts.texts]
    columns = {"queries": queries, "passages": collection.passages.texts}
    with figures.drawing():
        figure, axes = plt.subplots(1, 2, figsize=(figures.WIDTH, 2.2), layout="constrained")
        for axis, (name, texts) in zip(axes, columns.items(), strict=True):
            words = np.array([len(text.split()) for text in evenly(texts)])
            width = max(1, round((words.max() - words.min()) / 30))
            bins = np.arange(words.min(), words.max() + width + 1, width) - 0.5
            axis.hist(words, bins=list(bins), color="#0072b2", edgecolor="white", linewidth=0.4)
            middle = float(np.median(words))
            axis.axvline(middle, color=figures.GREY, linestyle=":")
            axis.set_title(f"{len(texts):,} {name}, median {middle:g} words")
            axis.set_xlabel("words")
        axes[0].set_ylabel("texts")
    return figure


def example(
    reproduction: Reproduction, query_set: str | None, number: int, max_chars: int = 160
) -> str:
    """A query, the passages judged for it, and BM25's first candidates, each with rank and grade (a dash: none).

    ``query_set`` None is the validation set.
    """
    collection = reproduction.collection
    query_set = query_set or reproduction.profile.sets.validation
    qid = collection.queries[query_set].ids[number]
    candidates = [docid for docid, _ in top(reproduction.bm25_ranking(query_set)[qid])]
    judged = collection.qrels[query_set].get(qid, {})
    first = candidates[: max(3, min(5, len(candidates)))]
    docids = [*first, *(d for d in sorted(judged, key=lambda d: -judged[d]) if d not in first)]
    rows = [
        [
            str(candidates.index(d) + 1) if d in candidates else "—",
            judged.get(d, "—"),
            shorten(code_free(collection.passages[d]), max_chars),
            f"`{d}`",
        ]
        for d in docids
    ]
    text = code_free(collection.queries[query_set][qid])
    table = markdown_table(["BM25 rank", "Grade", "Passage", "Id"], rows)
    return f"**{text}** (`{qid}` of {query_set})\n\n{table}\n"


def triple(collection: Collection, number: int = 0, max_chars: int = 240) -> str:
    """A training triple, as texts."""
    if not len(collection.triples):
        return "This collection has no training triples."
    qid, positive, negative = collection.triples[number]
    parts = [("query", qid, collection.queries["train"][qid])]
    parts += [
        (n, d, collection.passages[d]) for n, d in (("positive", positive), ("negative", negative))
    ]
    rows = [[name, shorten(code_free(text), max_chars), f"`{id}`"] for name, id, text in parts]
    return markdown_table(["", "Text", "Id"], rows)


def code_free(text: str) -> str:
    """A text from the collection, with the characters escaped that mean something in Markdown."""
    return "".join(f"\\{c}" if c in "\\`*_{}[]()<>#$~^|!@" else c for c in text)


def starts(reproduction: Reproduction) -> pd.DataFrame:
    """BM25's own order and every encoder as it comes, on all sets: encoder, kind, set, measure, value, run_id.

    ``kind`` is "rerank" (validation) or "full" (test sets).
    """
    p = reproduction.profile
    wanted = [("rerank", p.sets.validation, p.measures.rerank)]
    wanted += [("full", name, p.measures.full) for name in p.sets.tests]
    rows = [
        {
            "encoder": run.config.encoder, "kind": kind, "set": name, "measure": measure,
            "value": run.evaluation(kind, name).mean[measure], "run_id": run.run_id,
        }
        for run in reproduction.ensure(reproduction.baseline_runs())
        for kind, name, measures in wanted
        for measure in measures
    ]  # fmt: skip
    return pd.DataFrame(rows)


def _ranker(encoder: str) -> str:
    return "BM25" if encoder == BM25_NAME else encoder_label(encoder)


def starts_table(data: pd.DataFrame) -> str:
    """The frame of `starts` as a table, a row a ranker."""
    columns = list(dict.fromkeys(zip(data["kind"], data["set"], data["measure"], strict=True)))
    words = {"rerank": "reranking", "full": "full ranking"}
    header = ["", *(f"{measure_label(m)}, {words[k]}, {s}" for k, s, m in columns), "Run"]
    rows = []
    for encoder, own in data.groupby("encoder", sort=False):
        values = own.set_index(["kind", "set", "measure"])["value"]
        run_id = own["run_id"].iloc[0]
        rows.append([_ranker(str(encoder)), *(score(values[c]) for c in columns), f"`{run_id}`"])
    return markdown_table(header, rows)


def starts_found(data: pd.DataFrame) -> str:
    """Where the encoders stand before training, against BM25's own order: bullets."""
    bullets = []
    for (kind, name, measure), rows in data.groupby(["kind", "set", "measure"], sort=False):
        values = rows.set_index("encoder")["value"]
        bm25, others = values[BM25_NAME], values.drop(BM25_NAME)
        above = [_ranker(str(e)) for e in others.index[others > bm25]]
        words = "Reranking" if kind == "rerank" else "Full ranking"
        bullets.append(
            f"- {words}, {name}: BM25's own order has {measure_label(str(measure))} {score(bm25)}; the encoders as they"
            f" come {score(others.min())} to {score(others.max())}, above it: {', '.join(above) or 'none'}."
        )
    return "\n".join(bullets)


# --- runs -------------------------------------------------------------------------------------------------------------


def gains(data: pd.DataFrame, labels: Mapping[str, str] | None = None) -> str:
    """``Reproduction.gains`` as a table: step 0, best step, and the paired interval of their difference."""
    several = data["in_batch"].nunique() > 1
    rows = [
        [
            encoder_label(r["encoder"], labels),
            ("✓" if r["in_batch"] else "✗") if several else r["batch_size"],
            measure_label(r["measure"]),
            score(r["start"]),
            score(r["best"]),
            r["step"],
            f"{signed(r['difference'])}\u00a0[{signed(r['low'])},\u00a0{signed(r['high'])}]",
            f"`{r['run_id'][:8]}`",
        ]
        for r in data.to_dict("records")
    ]
    header = ["Encoder", "In-batch" if several else "Batch", "Measure", "Step 0", "Best", "At step"]
    return markdown_table([*header, "Difference, 95\u00a0% interval", "Run"], rows)


def read_curves(data: pd.DataFrame, references: Mapping[str, float]) -> str:
    """Figure 4 or 5 in a paragraph: each curve's start, maximum and end in the first measure, beside BM25's own order."""
    measure = str(data["measure"].iloc[0])
    rows = data[data["measure"] == measure]
    by = "in_batch" if rows["in_batch"].nunique() > 1 else "batch_size"
    sentences = [f"BM25's own order has {measure_label(measure)} {score(references[measure])}."]
    for value, column in rows.groupby(by, sort=True):
        parts = []
        for encoder, curve in column.groupby("encoder", sort=False):
            own = curve.sort_values("triples")
            best = own[own["maximum"].astype(bool)].iloc[0]
            parts.append(
                f"{encoder_label(str(encoder))} starts at {score(own['value'].iloc[0])}, has its maximum,"
                f" {score(best['value'])}, after {best['triples']:,} triples, and ends at {score(own['value'].iloc[-1])}"
            )
        where = f"Batches of {value}" if by == "batch_size" else figures.IN_BATCH[bool(value)]
        sentences.append(f"{where[0].upper()}{where[1:]}: {'; '.join(parts)}.")
    return " ".join(sentences)


def read_targets(data: pd.DataFrame) -> str:
    """Figure 6 in a paragraph: where φ and the target lie in the first and in the last step shown, smoothed."""

    def spans(row: pd.Series) -> str:
        phi = f"φ from {row['min']:.2f} to {row['max']:.2f}, mean {row['mean']:.2f}"
        return f"{phi} (a target of {(1 + row['mean']) / 2:.2f})".replace("-", "−")

    sentences = []
    for encoder, rows in data.sort_values("step").groupby("encoder", sort=False):
        first, last = rows.iloc[0], rows.iloc[-1]
        sentences.append(
            f"{encoder_label(str(encoder))}: in step {first['step']} {spans(first)}; in step {last['step']} {spans(last)}."
        )
    return " ".join(sentences)


def index_cost(reproduction: Reproduction, data: pd.DataFrame) -> pd.DataFrame:
    """What approximate search costs the runs of Table 3: a row a run, set and measure.

    Columns: encoder, run_id, set, measure, full (by the FAISS index), exact (every passage compared), difference,
    recall (share of the exact search's passages that the index finds, to the depth of full ranking), index.
    """
    p = reproduction.profile
    rows = []
    for run_id, encoder in dict(zip(data["run_id"], data["encoder"], strict=True)).items():
        run: StoredRun[Any] = StoredRun(reproduction.store.folder / str(run_id))
        index = run.result["index"]
        for name, measure in product(p.sets.tests, p.measures.full):
            full, exact = (run.evaluation(kind, name).mean[measure] for kind in ("full", "exact"))
            rows.append(
                {
                    "encoder": encoder, "run_id": run_id, "set": name, "measure": measure, "full": full, "exact": exact,
                    "difference": full - exact, "recall": index["recall_of_exact"][name], "index": index["factory"],
                }
            )  # fmt: skip
    return pd.DataFrame(rows)


def index_found(data: pd.DataFrame) -> str:
    """The frame of `index_cost` in a sentence."""
    kinds = " and ".join(f"`{kind}`" for kind in dict.fromkeys(data["index"]))
    text = f"The FAISS index of these runs is {kinds}. "
    recall = data["recall"]
    if (data["difference"] == 0).all() and (recall == 1).all():
        return text + "It finds what exact search finds, so no score differs."
    low, high = data["difference"].min(), data["difference"].max()
    text += (
        f"Its scores differ from those of an exact search by {low:+.3f} to {high:+.3f}; it finds"
    )
    text += f" {recall.min():.1%} to {recall.max():.1%} of the passages that exact search does."
    return text.replace("-0", "−0")
