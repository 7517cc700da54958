"""What notebooks show next to figures and tables: parameters, set-up, collection, provenance.

Every number comes from the profile, the collection, a run, or the published tables.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import product
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote

import pandas as pd
from IPython.display import Markdown
from pandas.io.formats.style import Styler
from pydantic import Field, TypeAdapter, ValidationError

from adaptive_margins.book.published import load
from adaptive_margins.book.style import encoder_label, measure_label
from adaptive_margins.book.tables import shorten
from adaptive_margins.data.collection import Collection
from adaptive_margins.data.trec import top
from adaptive_margins.errors import AdaptiveMarginsError
from adaptive_margins.paper import Reproduction
from adaptive_margins.paper.store import StoredRun
from adaptive_margins.profiles.config import CurveSettings, StaticSettings

_NUMBER = Annotated[float, Field(allow_inf_nan=False)]
_NATURAL = Annotated[int, Field(ge=0)]
_RATE = Annotated[float, Field(gt=0, allow_inf_nan=False)]
_LISTED = Annotated[str, Field(pattern=r"^\d+(,\d+)*$")]
_NAMED = Annotated[str, Field(pattern="^(adaptive|distributed|softmax|all)$")]
_TEXT = Annotated[str, Field(pattern=r"\S")], "text"
_COUNT = Annotated[int, Field(ge=1)] | None, "a whole number from 1 on, or None"
PARAMETERS: dict[str, tuple[Any, str]] = {
    "profile": _TEXT,
    "data_folder": (str, "text, empty for no folder"),
    "folder": (str, "text, empty for no folder"),
    "source": _TEXT,
    "output": _TEXT,
    "model": _TEXT,
    "target": (_NUMBER | _NAMED, 'a number, "adaptive", "distributed", "softmax" or "all"'),
    "epsilon": (_NUMBER, "a number"),
    "query_set": (_TEXT[0] | None, "text or None"),
    "encoder": (_TEXT[0] | None, "text or None"),
    "first": (_NATURAL, "a whole number from 0 on"),
    "seed": (_NATURAL | None, "a whole number from 0 on, or None"),
    "seeds": (_NATURAL | _LISTED | None, 'whole numbers from 0 on, such as "1,2,3", or None'),
    "triples": _COUNT,
    "window": _COUNT,
    "patience": _COUNT,
    "draws": _COUNT,
    "learning_rate": (_RATE | None, "a number above 0, or None"),
}
"""Parameter of a notebook → its type, and that type in words."""
OPTIMIZERS = {"adamw_torch_fused": "AdamW", "adamw_torch": "AdamW", "adamw_8bit": "8-bit AdamW"}


class ParameterError(AdaptiveMarginsError, ValueError):
    """A parameter of a notebook has a value of another type; the message names the expected one."""


def check_parameters(namespace: Mapping[str, Any]) -> None:
    """Check the parameters among the `globals` of a notebook.

    Raises:
        ParameterError: a parameter has a value of another type.
    """
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


# --- set-up ---------------------------------------------------------------------------------------


def setup(reproduction: Reproduction, *parts: str) -> Styler:
    """Parts of the set-up (keys of ``setup`` in ``published.yaml``; all if none is named).

    The paper's and this run's stand side by side.

    Raises:
        KeyError: an unknown part.
    """
    paper, here = load().setup, _setup(reproduction)
    rows = {part: (paper[part], here[part]) for part in parts or paper}
    frame = pd.DataFrame.from_dict(rows, orient="index", columns=["Paper", "Here"])
    styler = frame.rename(index=lambda part: part.replace("_", " ").capitalize()).style
    caption = f"Set-up, profile {reproduction.profile.name}"
    return styler.format(escape="html").set_caption(caption).set_uuid("setup")


def _setup(reproduction: Reproduction) -> dict[str, str]:
    p, c = reproduction.profile, reproduction.inputs.collection
    t, s, comparison = p.training, p.static, p.comparison
    stopping = comparison.validation or p.sets.validation
    listed = "passages of BM25" if p.candidates.source == "bm25" else "official BM25 candidates"
    seeds = _seeded({e: p.static_seeds(e) for e in s.seeds})
    kept = f"{comparison.keep} checkpoint"
    kept += "" if comparison.stop_early else "; training goes on, for the rest of the curve"
    static = [f"{encoder_label(e)}: ε = {a:g}, in-batch {b:g}" for e, (a, b) in s.tuned.items()]
    if len(s.tuned) < len(p.encoders):
        grid = f"ε in {', '.join(f'{x:g}' for x in s.targets)}; {s.triples:,} triples per run"
        static.append(f"{grid}, batches of {s.batch_size}")
    budgets = [f"{row}: {triples:,} triples" for row, triples in comparison.budgets.items()]

    def queries(names: Iterable[str]) -> str:
        return "; ".join(f"{name}, {len(c.qrels[name]):,} judged queries" for name in names)

    def measures(names: Iterable[str]) -> str:
        return ", ".join(map(measure_label, names))

    return {
        "collection": f"{c.name}, {len(c.passages):,} passages, {len(c.triples):,} triples",
        "encoders": "; ".join(
            f"{encoder_label(name)}: {e.label or e.base}" for name, e in p.encoders.items()
        ),
        "lengths": f"at most {p.lengths.query} tokens per query, {p.lengths.passage} per passage",
        "optimizer": f"{OPTIMIZERS[t.optimizer]}, {t.precision}, learning rate"
        f" {_rate(t.learning_rate)}, weight decay {t.weight_decay:g}, seed {p.seed}",
        "tuning": queries([p.sets.validation]),
        "tests": queries(p.sets.tests),
        "rerank": f"the first {p.candidates.depth} {listed} are reranked;"
        f" {measures(p.measures.rerank)}",
        "full": "every passage is ranked, by a FAISS index sized for the collection and exact"
        f" re-ranking, to depth {p.measures.full_depth}; {measures(p.measures.full)}",
        "static": "; ".join([*static, *seeds]) + _own(s),
        "adaptive": _curve(p.adaptive, p.adaptive.batch_sizes[:1]),
        "distributed": _curve(p.distributed, p.distributed.batch_sizes),
        "target_plot": f"rolling mean over {p.target_plot.window} batches, "
        + (f"the first and last {p.target_plot.span} batches" if p.target_plot.span else "all"),
        "comparison": f"{_curve(comparison, comparison.batch_sizes[:1])}, decay γ ="
        f" {comparison.decay:g} per step; early stopping after {comparison.patience} evaluations"
        f" without a gain in {measure_label(p.measures.selection)} on {stopping};"
        f" {'; '.join([kept, *budgets, *_seeded(comparison.seeds)])}",
        "reference": f"{encoder_label(p.reference_encoder)}; † against the underlined run",
    }


def _seeded(seeds: Mapping[str, Iterable[int]]) -> list[str]:
    return [f"{encoder_label(e)} with seeds {', '.join(map(str, s))}" for e, s in seeds.items()]


def _curve(experiment: CurveSettings, batch_sizes: Iterable[int]) -> str:
    every = (
        f"every {experiment.evaluate_every:,} triples"
        if experiment.evaluate_every
        else f"every {experiment.evaluate_every_steps:,} steps"
    )
    triples = "all" if experiment.triples is None else f"{experiment.triples:,}"
    sizes = " and ".join(map(str, batch_sizes))
    return f"{triples} triples per run, batches of {sizes}, evaluated {every}{_own(experiment)}"


def _own(experiment: StaticSettings | CurveSettings) -> str:
    """The learning rate and the seed of an experiment, where they are not the profile's."""
    rate, seed = experiment.learning_rate, experiment.seed
    text = "" if rate is None else f"; learning rate {_rate(rate)}"
    return text + ("" if seed is None else f"; seed {seed}")


def _rate(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:g}"


# --- tables and files -----------------------------------------------------------------------------


def save(data_folder: str | Path, **frames: pd.DataFrame) -> Markdown:
    """Write frames to ``data_folder/NAME.csv``, unless the folder's name is empty; return links to
    them. What the build writes to a folder in ``_executed`` is moved to ``_executed/data``.
    """
    if not data_folder:
        return Markdown("*With a `data_folder`, the data are written there as CSV.*")
    folder = Path(data_folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in frames.items():
        data.to_csv(folder / f"{name}.csv", index=False)
    built = folder.parent.name == "_executed"
    place = "../book/_executed/data" if built else quote(folder.as_posix())
    links = ", ".join(f"[{name}.csv]({place}/{name}.csv)" for name in frames)
    return Markdown(
        f"Data: {links}. Rows of stored runs have the ids of these, which are listed in"
        " [Provenance](../book/_executed/provenance.md) and can be"
        " [checked](../book/reproduce.md#check-a-number) without this project."
    )


def note(reproduction: Reproduction, place: str) -> Markdown:
    """What the profile has to add at a place of the book (a key of its ``notes``), if anything."""
    text: str = getattr(reproduction.profile.notes, place)
    return Markdown(text or "<!-- -->")


# --- collection and runs --------------------------------------------------------------------------


def counts(collection: Collection) -> pd.DataFrame:
    """Queries and judgements by grade, a row a query set."""
    rows = {}
    for name, queries in collection.queries.items():
        grades = [g for judged in collection.qrels[name].values() for g in judged.values()]
        by_grade = pd.Series(grades, dtype=int).value_counts().sort_index(ascending=False)
        rows[name] = {"queries": len(queries)} | {f"grade {g}": n for g, n in by_grade.items()}
    return pd.DataFrame.from_dict(rows, orient="index").fillna(0).astype(int)


def examples(
    reproduction: Reproduction, query_set: str | None, numbers: Iterable[int], max_chars: int = 160
) -> pd.DataFrame:
    """Queries with BM25's first candidates and all judged passages; the index is (query, docid).

    ``query_set`` None is the validation set; ``numbers`` beyond its end are left out. A passage
    without a grade was not judged; one without a rank is not among BM25's candidates.
    """
    collection = reproduction.inputs.collection
    query_set = query_set or reproduction.profile.sets.validation
    texts, ranking = collection.queries[query_set], reproduction.inputs.bm25_ranking(query_set)
    rows = []
    for qid in (texts.ids[number] for number in numbers if number < len(texts)):
        found = [docid for docid, _ in top(ranking[qid])]
        judged = collection.qrels[query_set].get(qid, {})
        for docid in dict.fromkeys([*found[:3], *sorted(judged, key=lambda d: -judged[d])]):
            rank = found.index(docid) + 1 if docid in found else "—"
            text = shorten(collection.passages[docid], max_chars)
            rows.append((texts[qid], docid, rank, judged.get(docid, "—"), text))
    columns = ["query", "docid", "BM25 rank", "grade", "passage"]
    return pd.DataFrame(rows, columns=columns).set_index(["query", "docid"])


def triple(collection: Collection, number: int = 0) -> pd.DataFrame:
    """A training triple: id and text of query, positive and negative; empty without triples."""
    if not len(collection.triples):
        return pd.DataFrame(columns=["id", "text"])
    ids = list(collection.triples[number])
    texts = [collection.queries["train"][ids[0]], *(collection.passages[d] for d in ids[1:])]
    return pd.DataFrame({"id": ids, "text": texts}, index=["query", "positive", "negative"])


def zero_shot(reproduction: Reproduction) -> pd.DataFrame:
    """BM25 and every encoder before training: encoder, kind, set, measure, value, run_id.

    ``kind`` is "rerank" (validation) or "full" (test sets).
    """
    p = reproduction.profile
    runs = [reproduction.bm25(), *map(reproduction.zero_shot, [*p.encoders, *p.untrained])]
    scores = [r.scores().assign(encoder=r.config.encoder, run_id=r.run_id) for r in runs]
    data = pd.concat(scores, ignore_index=True).rename(columns={"mode": "kind"})
    shown = (data["kind"] == "rerank") & (data["set"] == p.sets.validation)
    shown |= (data["kind"] == "full") & data["set"].isin(p.sets.tests)
    return data.loc[shown, ["encoder", "kind", "set", "measure", "value", "run_id"]]


def index_cost(reproduction: Reproduction, data: pd.DataFrame) -> pd.DataFrame:
    """What approximate search costs the runs of Table 3: a row a run, set and measure.

    Columns: encoder, run_id, set, measure, full (by the FAISS index), exact (every passage
    compared), difference, recall (share of the exact search's passages that the index finds) and
    index (its kind).
    """
    p, frames = reproduction.profile, []
    for run_id, encoder in dict(zip(data["run_id"], data["encoder"], strict=True)).items():
        run: StoredRun = StoredRun(reproduction.store.folder / str(run_id))
        index = run.result["index"]
        scores = run.scores().pivot(index=["set", "measure"], columns="mode", values="value")
        rows = scores.loc[list(product(p.sets.tests, p.measures.full))].reset_index()
        recall = rows["set"].map(index["recall_of_exact"])
        about = {"encoder": encoder, "run_id": run_id, "index": index["factory"]}
        frames.append(rows.assign(difference=rows["full"] - rows["exact"], recall=recall, **about))
    columns = "encoder run_id set measure full exact difference recall index"
    return pd.concat(frames, ignore_index=True)[columns.split()]
