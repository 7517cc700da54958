"""What the notebook on one's own collection shows: live learning curve, comparisons, queries, and how a batch's margins move.

Pictures are matplotlib figures, tables are Markdown or HTML with escaped texts. All of them stand without a live kernel;
controls need ipywidgets (the extra ``lab``).
"""

from __future__ import annotations

import math
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stderr
from dataclasses import asdict, dataclass
from functools import cache
from html import escape
from pathlib import Path
from typing import Any, Literal

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from IPython.display import HTML, Markdown, display
from matplotlib import color_sequences
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from adaptive_margins.book import describe, figures
from adaptive_margins.book.context import markdown_table
from adaptive_margins.book.findings import signed
from adaptive_margins.book.per_query import per_query_figure
from adaptive_margins.book.render import markdown
from adaptive_margins.book.style import measure_label, score
from adaptive_margins.book.tables import shorten
from adaptive_margins.corpus.finetune import (
    RUNS,
    SELECTION,
    Finetuned,
    FinetuneError,
    Settings,
    finetune,
    open_split,
)
from adaptive_margins.data.collection import Collection
from adaptive_margins.data.mining import guard, mine_triples
from adaptive_margins.data.pseudo_queries import about
from adaptive_margins.data.stored import seeded_order
from adaptive_margins.data.trec import Run, top
from adaptive_margins.encoder.load import default_device, encoder_identity, open_encoder
from adaptive_margins.evaluation.significance import compare
from adaptive_margins.losses import ORIENTATIONS, margin_loss, margins_and_targets
from adaptive_margins.progress import say
from adaptive_margins.retrieval.dense import DenseRetriever

NAMES = {
    "start": "encoder before",
    "trained": "encoder after",
    "bm25": "BM25",
    "hybrid": "after + BM25",
}
"""How the four rankings are called. After: what lies in the output, be it the encoder as it was before."""
_, _ORANGE, _SKY, _GREEN, _, _BLUE, _VERMILION, _ = color_sequences["okabe_ito"]
_COLORS = {"start": _SKY, "trained": _BLUE, "bm25": _VERMILION, "hybrid": _GREEN}
_FEWEST = 2  # queries that a test needs

# Greys with transparency and inherited colours are legible on light and dark pages alike.
_CSS = """\
.am-own { overflow-x: auto; line-height: 1.35; }
.am-own table { border-collapse: collapse; font-size: .8125rem; font-variant-numeric: tabular-nums; color: inherit; }
.am-own caption { caption-side: top; text-align: left; padding: 0 0 .5em; color: inherit; }
.am-own tr, .am-own tr:hover, .am-own tbody tr:nth-child(odd) { background: none; }
.am-own th, .am-own td { padding: .3em .6em; text-align: right; vertical-align: top; border-bottom: 1px solid #8c8c8c80; }
.am-own table > * > tr > .am-text { text-align: left; white-space: normal; overflow-wrap: anywhere; }
.am-own td.am-relevant { border-left: 4px solid #0072b2; }
.am-own small { opacity: .85; }
"""


# ---- collection and training -----------------------------------------------------------------------------------------


def open_collection(
    source: str, *, seed: int, triples: int | None = None
) -> tuple[Collection, str]:
    """The collection as `finetune` trains and tests on it, and what it says of split and pseudo-queries ("" if nothing).

    Raises:
        DataError: as `sources.open_collection` and `split_queries`.
    """
    count = triples or Settings.for_device(default_device()).triples
    found = open_split(source, count, seed)
    return found.collection, about(found.collection) if found.pseudo else found.split


def facts(collection: Collection, split: str) -> str:
    """What is in the collection, as Markdown."""
    found = describe.collection_facts(collection)
    words = found["words"]
    empty = (
        f", of which {found['empty_passages']:,} have no text" if found["empty_passages"] else ""
    )
    triples = f"{found['triples']:,} triples" if found["triples"] else "no triples of its own"
    return (
        f"**{found['name']}**: {found['passages']:,} passages{empty}; {words['mean']:.0f} words each on average, the longest"
        f" {words['max']:,}; {triples}. {split}\n\n" + markdown(describe.sets_frame(found))
    )


def train(
    collection: Collection,
    source: str,
    output: str | Path,
    *,
    model: str,
    target: float | Literal["adaptive", "distributed"],
    seed: int,
    triples: int | None,
) -> Finetuned:
    """`finetune` with its learning curve drawn while it trains; or what a finished call with these values left in ``output``.

    ``collection`` is what `open_collection` gave for ``source``, ``seed`` and ``triples``.

    Raises:
        FinetuneError: ``output`` holds another training, which it names, or something else.
        DataError, EncoderError, TrainingError: as `finetune`.
    """
    folder = Path(output).expanduser()
    if (folder / "training.json").is_file():
        done = _finished(folder, collection, model, target, seed, triples)
        display(
            Markdown(
                f"`{output}` holds the finished training of these parameters: it is **shown, not repeated**. Another"
                " `output` trains anew."
            ),
            learning_curve(done.curve, done.report),
        )
        return done
    live = LiveCurve()
    with redirect_stderr(sys.stdout):  # JupyterLab shows stderr in red, as if something had failed
        done = finetune(
            source, folder, model=model, target=target, seed=seed, triples=triples, on_check=live
        )
    live(done.curve, done.report)
    return done


def _finished(
    folder: Path,
    collection: Collection,
    model: str,
    target: float | str,
    seed: int,
    triples: int | None,
) -> Finetuned:
    """What ``folder`` holds, if the same call made it: same texts and judgements, weights and values, wherever they lie."""
    done = Finetuned.load(folder)
    report = done.report
    used = report["settings"]
    expected = {
        "target": (report["target"], target),
        "seed": (report["seed"], seed),
        "number of triples": (
            used["triples"],
            triples or Settings.for_device(used["device"]).triples,
        ),
        "encoder": (report["encoder"]["identity"], encoder_identity(model)),
        "collection": (report["collection"]["fingerprint"], collection.fingerprint),
        "source of negatives": (report["triples"]["negatives"] == "encoder", False),
    }
    if differing := [name for name, (there, asked) in expected.items() if there != asked]:
        others = " and ".join(f"another {name}" for name in differing)
        raise FinetuneError(
            f"{folder} holds a training with {others}; choose another output, or remove the folder"
        )
    return done


class LiveCurve:
    """Draws the learning curve in one place, anew at each call: what `finetune` takes as ``on_check``."""

    def __init__(self) -> None:
        self.handle: Any = None

    def __call__(self, curve: pd.DataFrame, report: Mapping[str, Any] | None = None) -> None:
        """``curve`` so far; ``report`` once training has finished."""
        figure = learning_curve(curve, report)
        if self.handle is None:
            self.handle = display(figure, display_id=True)
        else:
            self.handle.update(figure)


def learning_curve(curve: pd.DataFrame, report: Mapping[str, Any] | None = None) -> Figure:
    """`SELECTION` on the validation queries by step, against its value at step 0.

    With a report, the best step has a bar of the standard errors by which it had to exceed step 0 to be kept: it was kept
    if the bar ends above the line.
    """
    steps, values = curve["step"].to_numpy(), curve[SELECTION].to_numpy()
    with figures.drawing():
        figure, axis = plt.subplots(figsize=(figures.WIDTH, 2.6), layout="constrained")
        axis.axhline(values[0], color=figures.GREY, linestyle=":", gid="start")
        axis.plot(
            steps,
            values,
            color=_BLUE,
            marker="o",
            markerfacecolor="white",
            clip_on=False,
            gid="curve",
        )
        if report is None:
            title = f"step {steps[-1]:,}: {score(values[-1])}"
        else:
            title = _kept(report)
            best = report["best_step"]
            at = float(curve.loc[curve["step"] == best, SELECTION].iloc[0])
            needed = report["settings"]["standard_errors"] * (
                report["validation"]["standard_error"] or 0.0
            )
            if best:
                axis.errorbar(
                    [best], [at], yerr=[[needed], [0]], fmt="o", color=_BLUE, markersize=7, capsize=4, zorder=5, gid="best"
                )  # fmt: skip
        axis.annotate(
            "before training", (1, values[0]), xycoords=("axes fraction", "data"), xytext=(-4, 3),
            textcoords="offset points", ha="right", fontsize=8, color=figures.GREY,
        )  # fmt: skip
        axis.set_title(title, loc="left")
        axis.set_xlabel("training step")
        axis.set_ylabel(f"{SELECTION}, validation")
        axis.set_xlim(left=0, right=max(steps[-1], 1))
        axis.margins(y=0.2)
        axis.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    return figure


def _kept(report: Mapping[str, Any]) -> str:
    best, stop = report["best_step"], report["stop_step"]
    if report["kept"] == "trained":
        return f"stopped at step {stop:,}; step {best:,} was best and is kept"
    if best:
        return f"stopped at step {stop:,}; step {best:,} was best, but too little to be kept: the encoder stays as it was"
    return f"stopped at step {stop:,}; no step was better: the encoder stays as it was"


# ---- is it better? ---------------------------------------------------------------------------------------------------


def comparisons(done: Finetuned) -> list[dict[str, Any]]:
    """The pairs that the report compares, in every measure: measure, a, b, and the fields of `Comparison`.

    With fewer than two queries there is no test: its numbers are NaN, and the verdict is "too few queries"; likewise where
    the report withholds the comparison with BM25.
    """
    rows = []
    for measure in done.report["measures"]["start"]:
        values = done.per_query(measure).set_index("qid")
        for pair in done.report["comparisons"]:
            a, b = pair.split(" vs ")
            told = done.report["comparisons"][pair]["verdict"]
            if len(values) < _FEWEST or told in ("withheld", "too few queries"):
                mean = float((values[a] - values[b]).mean())
                none = math.nan
                why = "withheld" if told == "withheld" else "too few queries"
                found = {
                    "n": len(values), "difference": mean, "ci": (none, none), "p_t": none,
                    "p_tost": none, "margin": none, "verdict": why,
                }  # fmt: skip
            else:
                x, y = values[a].to_dict(), values[b].to_dict()
                found = asdict(compare(x, y, however_small=True))
            rows.append({"measure": measure, "a": a, "b": b, **found})
    return rows


def comparison_figure(done: Finetuned, data: Sequence[Mapping[str, Any]]) -> Figure:
    """A row a measure: the means of the four rankings, and the differences of ``data`` (`comparisons`) with 95 % intervals."""
    measures = list(done.report["measures"]["start"])
    with figures.drawing():
        figure, axes = plt.subplots(
            len(measures), 2, squeeze=False, figsize=(figures.WIDTH, 0.35 + 1.55 * len(measures)), layout="constrained",
        )  # fmt: skip
        for (means, differences), measure in zip(axes, measures, strict=True):
            for y, name in enumerate(RUNS):
                value = done.report["measures"][name][measure]
                means.plot([value], [y], "o", color=_COLORS[name], markersize=7, gid=name)
                means.annotate(
                    score(value), (value, y), xytext=(0, 6), textcoords="offset points", ha="center", fontsize=8
                )  # fmt: skip
            _categories(means, [NAMES[name] for name in RUNS])
            means.margins(x=0.15)
            means.set_xlabel(measure_label(measure))

            rows = [row for row in data if row["measure"] == measure]
            differences.axvline(0, color=figures.PALE, linewidth=0.9)
            for y, row in enumerate(rows):
                at, (low, high) = row["difference"], row["ci"]
                differences.errorbar(
                    [at], [y], xerr=[[at - low], [high - at]], fmt="o", color=_COLORS[row["a"]], capsize=3,
                    gid=f"{row['a']} {row['b']}",
                )  # fmt: skip
                differences.annotate(
                    row["verdict"], (at, y), xytext=(0, 6), textcoords="offset points", ha="center", fontsize=8
                )  # fmt: skip
            _categories(differences, [f"{NAMES[r['a']]}\n− {NAMES[r['b']]}" for r in rows])
            differences.margins(x=0.15)
            differences.set_xlabel(f"difference in {measure_label(measure)}, 95 % interval")
    return figure


def _categories(axis: Any, names: Sequence[str]) -> None:
    """Names down the left, the first on top."""
    axis.set_yticks(range(len(names)), names)
    axis.set_ylim(len(names) - 0.5, -0.8)
    axis.grid(visible=False, axis="y")
    axis.grid(visible=True, axis="x")
    axis.tick_params(axis="y", length=0)
    axis.xaxis.set_major_locator(MaxNLocator(5))


def comparison_table(done: Finetuned, data: Sequence[Mapping[str, Any]]) -> str:
    """The report's verdict, and `comparisons` as a table; Markdown."""

    def p(value: float) -> str:
        return "—" if math.isnan(value) else f"{value:.3f}" if value >= 0.001 else "< 0.001"

    rows = [
        [
            measure_label(r["measure"]),
            f"{NAMES[r['a']]} − {NAMES[r['b']]}",
            signed(r["difference"]),
            "—" if math.isnan(r["ci"][0]) else "[{}, {}]".format(*map(signed, r["ci"])),
            p(r["p_t"]),
            p(r["p_tost"]),
            f"**{r['verdict']}**",
        ]
        for r in data
    ]
    header = ["Measure", "", "Difference", "95 % interval", "p, t test", "p, TOST", "Verdict"]
    return f"{_plain(done.report['verdict'])}\n\n{markdown_table(header, rows)}"


def _plain(sentences: str) -> str:
    return "> " + sentences.replace("[", "\\[")  # no link


# ---- where is it better, where worse? --------------------------------------------------------------------------------


def other(done: Finetuned) -> str:
    """What the trained encoder's queries are compared with: "start"; "bm25" if the start was kept, being the same."""
    return "start" if done.report["kept"] == "trained" else "bm25"


def changes(done: Finetuned) -> pd.DataFrame:
    """`Finetuned.per_query` of the report's first measure, with difference = trained − `other`, worst losses first."""
    table = done.per_query(_measure(done))
    table["difference"] = table["trained"] - table[other(done)]
    return table.sort_values("difference", kind="stable", ignore_index=True)


def _measure(done: Finetuned) -> str:
    return str(next(iter(done.report["measures"]["start"])))


def changes_figure(
    done: Finetuned, table: pd.DataFrame, data: Sequence[Mapping[str, Any]]
) -> Figure:
    """Differences per query, sorted, of the trained encoder to the start and to BM25 in the first measure.

    ``table`` is of `changes`, ``data`` of `comparisons`.
    """
    measure, values = _measure(done), table.set_index("qid")
    rows = [row for row in data if row["measure"] == measure and row["a"] == "trained"]
    return per_query_figure(
        {
            "measure": measure_label(measure),
            "margin": rows[0]["margin"],
            "pairs": [{**row, "a": NAMES[row["a"]], "b": NAMES[row["b"]]} for row in rows],
            "per_query": {NAMES[name]: values[name].to_dict() for name in RUNS},
        }
    )


def changes_table(done: Finetuned, table: pd.DataFrame, count: int = 6) -> str:
    """The ``count`` queries that gained most and the ``count`` that lost most, as HTML; none that did neither."""
    gains, losses = (table[table["difference"] > 0][::-1], table[table["difference"] < 0])
    caption = (
        f"{measure_label(_measure(done))} by query: of {len(table):,} queries, {len(gains):,} are better and {len(losses):,}"
        f" worse than with {NAMES[other(done)]}."
    )
    if done.report["kept"] == "start":
        caption += " (The encoder stayed as it was, so it is compared with BM25 here.)"
    head = _row(["Query", "", *(NAMES[name] for name in RUNS), "Difference"], "th")
    body = [
        _row(
            [row["query"], f"({row['qid']})", *(score(row[name]) for name in RUNS), signed(row["difference"])], "td"
        )
        for part in (gains, losses)
        for row in part.head(count).to_dict("records")
    ]  # fmt: skip
    return _html(caption, head, body)


def _row(cells: Sequence[str], tag: str) -> str:
    """A row of escaped cells, the first of them a longer text."""
    first, *rest = (escape(shorten(cell, 160)) for cell in cells)
    return f'<tr><{tag} class="am-text">{first}</{tag}>{"".join(f"<{tag}>{c}</{tag}>" for c in rest)}</tr>'


def _html(caption: str, head: str, body: Sequence[str]) -> str:
    # The two classes keep MathJax from reading dollar signs in texts as formulas.
    return (
        f'<style>{_CSS}</style><div class="am-own tex2jax_ignore mathjax_ignore"><table>'
        f"<caption>{escape(caption)}</caption><thead>{head}</thead><tbody>{''.join(body)}</tbody></table></div>"
    )


def side_by_side(
    done: Finetuned,
    collection: Collection,
    qid: str,
    *,
    depth: int = 5,
    max_chars: int = 220,
    run: Callable[[str], Run] | None = None,
) -> str:
    """The first ``depth`` passages for a test query by `other` and by the trained encoder, as HTML.

    Relevant ones are marked in words and by a bar on their left; the rank that a passage has on the other side stands below
    it. ``run`` reads a ranking by its name, in the place of ``done.run``.

    Raises:
        KeyError: no test query has this id.
    """
    query, judged = done.queries[qid], done.qrels.get(qid, {})
    names = (other(done), "trained")
    ranked = [[docid for docid, _ in top((run or done.run)(name).get(qid, {}))] for name in names]
    ranks = [{docid: rank for rank, docid in enumerate(ids, start=1)} for ids in ranked]

    def cell(side: int, at: int) -> str:
        if at >= len(ranked[side]):
            return '<td class="am-text"></td>'
        docid = ranked[side][at]
        grade = judged.get(docid)
        mark = "not judged" if grade is None else f"grade {grade}"
        if relevant := grade is not None and grade > 0:
            mark = f"<b>✓ relevant, {mark}</b>"
        there = ranks[1 - side].get(docid)
        where = f"rank {there}" if there else f"not in the first {len(ranked[1 - side])}"
        text = escape(shorten(collection.passages[docid], max_chars))
        return (
            f'<td class="am-text{" am-relevant" if relevant else ""}">{mark} <small>({escape(docid)};'
            f" {escape(NAMES[names[1 - side]])}: {where})</small><br>{text}</td>"
        )

    width = f' style="width: {100 // len(names)}%"'
    head = "<tr><th></th>" + "".join(
        f'<th class="am-text"{width}>{escape(NAMES[name])}</th>' for name in names
    )
    body = [
        f"<tr><th>{at + 1}</th>{cell(0, at)}{cell(1, at)}</tr>"
        for at in range(min(depth, max(map(len, ranked))))
    ]
    found = sum(grade > 0 for grade in judged.values())
    caption = f"{query} ({qid}): {found:,} relevant passage{'s' if found != 1 else ''}"
    return _html(caption, f"{head}</tr>", body)


def browse(done: Finetuned, collection: Collection, table: pd.DataFrame) -> None:
    """Show `side_by_side` of the query that gained most, and a menu of all test queries, by their difference."""
    queries = {
        f"{signed(row['difference'])}  {shorten(row['query'], 90)} ({row['qid']})": row["qid"]
        for row in table[::-1].to_dict("records")
    }
    run = cache(done.run)
    _interactive(
        lambda qid: HTML(side_by_side(done, collection, qid, run=run)),
        qid=(
            "Dropdown",
            {
                "options": queries,
                "value": table["qid"].iloc[-1],
                "description": "query",
                "layout": {"width": "95%"},
            },
        ),
    )


# ---- targets ---------------------------------------------------------------------------------------------------------


def targets(done: Finetuned, *, window: int = 5, most: int = 500) -> pd.DataFrame:
    """The frame of `figures.figure6`: φ(d⁺, d⁻) in the first and in the last batches of training, at most ``most`` each.

    ``window`` is the number of batches of the rolling mean, at most that of a part.
    """
    recorded = done.targets
    span = max(1, min(most, len(recorded) // 2))
    window = min(window, span)
    smooth = recorded[["mean", "min", "max"]].rolling(window, min_periods=1).mean()
    smooth.insert(0, "step", recorded["step"])
    parts = [smooth.head(span).assign(part="first")]
    if len(recorded) > 1:
        parts.append(smooth.tail(span).assign(part="last"))
    report = done.report
    return pd.concat(parts, ignore_index=True).assign(
        encoder=Path(report["encoder"]["name"]).name,
        batch_size=report["settings"]["batch_size"],
        window=window,
        span=span,
    )


# ---- one batch under each loss ---------------------------------------------------------------------------------------

STATIC = "static ε"
"""What stands for a number among the targets."""


@dataclass(frozen=True)
class Batch:
    """Triples of test queries, embedded.

    Attributes:
        triples: qid, docid of a relevant passage, docid of a negative.
        embeddings: "start" and, if it is another encoder, "trained" → query, positive, negative, each (B, D) of length 1.
    """

    triples: list[tuple[str, str, str]]
    embeddings: dict[str, tuple[Tensor, Tensor, Tensor]]


def batch(
    done: Finetuned, collection: Collection, *, model: str, size: int = 16, seed: int = 1
) -> Batch:
    """A triple each of ``size`` test queries: a relevant passage, and one that BM25 finds and nobody judged (`guard`).

    ``model`` is the encoder that training started from. Its embeddings, and those of the trained one, are computed here once.

    Raises:
        ValueError: no query has both.
    """
    qrels, passages = done.qrels, collection.passages
    qids = sorted(qrels)
    some = [qids[row] for row in seeded_order(len(qids), seed)[: 4 * size]]
    judged = {qid: qrels[qid] for qid in some}
    candidates, _ = guard(done.run("bm25"), judged, passages, similarity=None, seed=seed)
    judged = {qid: judged[qid] for qid in candidates}
    count = min(size, len(judged))
    triples = mine_triples(judged, candidates, passages, count=max(count, 1), seed=seed)
    names = {"start": model}
    if done.report["kept"] == "trained":
        names["trained"] = str(done.folder)
    embeddings = {}
    for name, encoder in names.items():
        retriever = DenseRetriever(open_encoder(encoder, device=default_device()), passages)
        texts = [done.queries[qid] for qid, _, _ in triples]
        rows = [np.array([passages.row(t[part]) for t in triples]) for part in (1, 2)]
        found = [retriever.embed_queries(texts), *map(retriever.embed_passages, rows)]
        query, positive, negative = (torch.from_numpy(each).double() for each in found)
        embeddings[name] = query, positive, negative
    return Batch(triples, embeddings)


@dataclass(frozen=True)
class State:
    """Margins and targets of a batch under one loss, (B, B); NaN where the loss does not look at the pair (i, j).

    The loss is the mean of (margin − target)² over the other pairs.
    """

    margin: np.ndarray
    target: np.ndarray
    loss: float


def state(
    embeddings: tuple[Tensor, Tensor, Tensor],
    *,
    target: float | str,
    in_batch: bool = False,
    orientation: str = "paper",
) -> State:
    """What `margin_loss` makes of a batch, with the margins and targets that it compares."""
    settings: dict[str, Any] = {"target": target, "in_batch": in_batch, "orientation": orientation}
    with torch.no_grad():
        loss = margin_loss(*embeddings, **settings)
        margins, targets = margins_and_targets(*embeddings, **settings)
        size = len(embeddings[0])
        whole = in_batch or target == "distributed"
        hidden = torch.zeros(size, size).bool() if whole else ~torch.eye(size).bool()

        def matrix(values: Tensor) -> np.ndarray:
            by_row = values[:, None] if values.ndim == 1 else values
            return by_row.expand(size, size).masked_fill(hidden, torch.nan).numpy()

    return State(matrix(margins), matrix(targets), float(loss))


def pulled(
    embeddings: tuple[Tensor, Tensor, Tensor], steps: int, *, rate: float = 0.02, **settings: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """The embeddings after ``steps`` of gradient descent on the loss of this batch alone, kept at length 1.

    The embeddings themselves move, each on its own; an encoder would move all texts at once. ``rate`` is that of a triple:
    the loss is a mean, so the step is B times as long.
    """
    moved = list(embeddings)
    for _ in range(steps):
        moved = [each.detach().requires_grad_() for each in moved]
        gradients = torch.autograd.grad(margin_loss(*moved, **settings), moved)
        moved = [
            torch.nn.functional.normalize(each - rate * len(each) * gradient)
            for each, gradient in zip(moved, gradients, strict=True)
        ]
    query, positive, negative = (each.detach() for each in moved)
    return query, positive, negative


def batch_figure(
    batch: Batch,
    *,
    target: str = "distributed",
    epsilon: float = 0.3,
    in_batch: bool = False,
    orientation: str = "paper",
    encoder: str = "start",
    steps: int = 10,
) -> Figure:
    """Margins against targets of a batch, before and after ``steps`` of `pulled`; targets and l by pair of triples.

    ``target`` is `STATIC` (then ``epsilon`` counts), "adaptive" or "distributed", which is never ``in_batch``.
    """
    settings: dict[str, Any] = {
        "target": epsilon if target == STATIC else target,
        "in_batch": in_batch and target != "distributed",
        "orientation": orientation,
    }
    before = batch.embeddings[encoder]
    first, last = (
        state(before, **settings),
        state(pulled(before, steps, **settings), **settings),
    )
    own = np.eye(len(batch.triples), dtype=bool)
    with figures.drawing():
        figure, (pairs, wanted, errors) = plt.subplots(
            1, 3, figsize=(figures.WIDTH, 3.1), width_ratios=(1.35, 1, 1), layout="constrained"
        )
        pairs.axline((0, 0), slope=1, color=figures.GREY, linewidth=0.9, linestyle=":")
        pairs.plot(
            last.margin[~own], last.target[~own], ".", color=_ORANGE, markersize=3, alpha=0.5, label="pair i ≠ j", gid="others"
        )  # fmt: skip
        paths = [np.stack([s.margin[own], s.target[own]]) for s in (first, last)]
        pairs.plot(*np.stack(paths).transpose(1, 0, 2), color=figures.PALE, linewidth=0.7)
        pairs.plot(
            *paths[0],
            "o",
            color=_BLUE,
            markerfacecolor="white",
            label="triple, before",
            gid="before",
        )
        pairs.plot(*paths[1], "o", color=_BLUE, label=f"triple, after {steps} steps", gid="after")
        pairs.set_xlim(_lowest(batch), 1)
        pairs.set_ylim(0, 1)
        pairs.set_xlabel("margin")
        pairs.set_ylabel("target")
        pairs.set_title(f"loss {first.loss:.4f} → {last.loss:.4f}")
        handles, labels = pairs.get_legend_handles_labels()
        shown = slice(None) if np.isfinite(last.margin[~own]).any() else slice(1, None)
        figure.legend(handles[shown], labels[shown], loc="outside lower left", ncols=3, fontsize=8, frameon=False)  # fmt: skip
        for axis, values, name, limits, colors in (
            (wanted, last.target, "target T[i, j]", (0, 1), "viridis"),
            (errors, last.margin - last.target, "l[i, j] = margin − target", (-1, 1), "RdBu"),
        ):
            image = axis.imshow(values, vmin=limits[0], vmax=limits[1], cmap=colors, gid=name)
            axis.set_facecolor("#e6e6e6")  # pairs that the loss does not look at
            axis.grid(visible=False)
            axis.set_title(name)
            axis.set_xlabel("j (whose negative)")
            axis.xaxis.set_major_locator(MaxNLocator(4, integer=True))
            axis.yaxis.set_major_locator(MaxNLocator(4, integer=True))
            figure.colorbar(image, ax=axis, location="bottom", shrink=0.9)
        wanted.set_ylabel("triple i")
    return figure


def _lowest(batch: Batch) -> float:
    """Left end of the axis of margins: the same for every loss and encoder, so that nothing jumps."""
    lowest = [
        np.nanmin(state(each, target=0.0, in_batch=True).margin)
        for each in batch.embeddings.values()
    ]
    return float(min(-0.1, *lowest) - 0.05)


def play(batch: Batch) -> None:
    """Show `batch_figure`, with controls for the loss, the encoder and the steps."""
    choice = "ToggleButtons"
    _interactive(
        lambda **values: batch_figure(batch, **values),
        target=(choice, {"options": ["distributed", "adaptive", STATIC], "value": "distributed", "description": "target"}),
        epsilon=(
            "FloatSlider",
            {"value": 0.3, "min": 0.0, "max": 1.0, "step": 0.05, "description": "static ε", "continuous_update": False},
        ),
        in_batch=(
            "Checkbox",
            {"value": False, "description": "in-batch negatives (static ε, adaptive)", "layout": {"width": "max-content"}},
        ),
        orientation=(choice, {"options": ORIENTATIONS, "value": "paper", "description": "orientation"}),
        encoder=(choice, {"options": list(batch.embeddings), "value": "start", "description": "encoder"}),
        steps=(
            "IntSlider",
            {"value": 10, "min": 0, "max": 40, "description": "steps", "continuous_update": False},
        ),
    )  # fmt: skip


def _interactive(draw: Callable[..., Any], **controls: tuple[str, dict[str, Any]]) -> None:
    """Display ``draw`` of the first values, and controls that draw it anew in its place.

    What is displayed is an ordinary output: it is there in an executed notebook that nobody runs. `controls` are, by the
    names of ``draw``'s arguments, the class of ipywidgets and its arguments, a value among them.
    """
    try:
        import ipywidgets  # type: ignore[import-untyped,unused-ignore]
    except ImportError:
        say("controls need ipywidgets: pip install 'adaptive-margins[lab]'")
        display(draw(**{name: options["value"] for name, (_, options) in controls.items()}))
        return
    widgets = {name: getattr(ipywidgets, kind)(**options) for name, (kind, options) in controls.items()}  # fmt: skip

    def values() -> dict[str, Any]:
        return {name: widget.value for name, widget in widgets.items()}

    display(ipywidgets.VBox(list(widgets.values())))
    handle = display(draw(**values()), display_id=True)
    for widget in widgets.values():
        widget.observe(lambda _: handle.update(draw(**values())), names="value")


# ---- what to do next -------------------------------------------------------------------------------------------------


def next_steps(source: str, done: Finetuned) -> str:
    """Commands and code that use the encoder, as Markdown."""
    place = str(Path(source).resolve()) if Path(source).exists() else source
    collection, model, index, query = map(
        shlex.quote,
        (place, str(done.folder), f"{done.folder}_index", shorten(done.queries.texts[0], 80)),
    )
    return (
        "Search the collection, in a terminal:\n\n"
        f"```sh\nadaptive-margins index {collection} --model {model} --output {index}\n"
        f"adaptive-margins search {index} {query}\n```\n\n"
        "Use the encoder wherever Sentence Transformers is used:\n\n"
        "```python\nfrom sentence_transformers import SentenceTransformer\n\n"
        f"model = SentenceTransformer({str(done.folder)!r})\n"
        "queries = model.encode_query([...])\npassages = model.encode_document([...])\n"
        "similarities = model.similarity(queries, passages)\n```"
    )
