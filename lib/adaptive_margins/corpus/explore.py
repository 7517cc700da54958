"""What notebook 10 shows of a fine-tuning: curve, comparisons, single queries, one batch."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import redirect_stderr
from html import escape
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from IPython.display import Markdown, display
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from pandas.io.formats.style import Styler
from torch import Tensor

from adaptive_margins.book.figures import GREY, LOSSES, PALE, WIDTH, drawing
from adaptive_margins.book.per_query import per_query_figure
from adaptive_margins.book.style import BLUE, ORANGE, measure_label, score
from adaptive_margins.book.tables import shorten
from adaptive_margins.corpus import finetuned
from adaptive_margins.corpus.finetune import finetune
from adaptive_margins.corpus.finetuned import RUNS, Finetuned
from adaptive_margins.corpus.settings import FinetuneError, Settings, Target, loss_name
from adaptive_margins.corpus.validation import SELECTION
from adaptive_margins.data.collection import Collection
from adaptive_margins.data.mining import filter_negatives
from adaptive_margins.data.stored import seeded_order
from adaptive_margins.data.trec import top
from adaptive_margins.data.triples import mine_triples
from adaptive_margins.encoder.load import default_device, encoder_identity, open_encoder
from adaptive_margins.evaluation.measures import evaluate, relevant
from adaptive_margins.losses import margin_loss, margins_and_targets
from adaptive_margins.retrieval.dense import DenseRetriever

NAMES = {
    "start": "encoder before",
    "trained": "encoder after",
    "bm25": "BM25",
    "hybrid": "after + BM25",
}
"""Labels of `RUNS`. "After" is the encoder in the output folder, even if it is the original one."""

Embeddings = tuple[Tensor, Tensor, Tensor]


def show(table: pd.DataFrame, caption: str = "") -> Styler:
    """Return a table with escaped texts and three decimals; no text of it is read as a formula."""
    style = table.style.format(precision=3, escape="html").format_index(escape="html", axis=1)
    style = style.format_index(escape="html")
    style = style.set_table_attributes('class="tex2jax_ignore mathjax_ignore"')
    cells = "text-align: left; vertical-align: top; white-space: normal"
    style = style.set_table_styles([{"selector": "td, th", "props": cells}])
    return style.set_caption(escape(caption))


# ---- training ---------------------------------------------------------------------------------


def train_or_load(
    collection: Collection,
    source: str,
    output: str | Path,
    *,
    model: str,
    target: Target,
    seed: int,
    triples: int | None,
) -> Finetuned:
    """Fine-tune with a live learning curve; or load the result of the same call from ``output``.

    ``collection`` is that of `open_split` for ``source``, ``seed`` and ``triples``.

    Raises:
        FinetuneError: ``output`` holds another training; the message names what differs.
        DataError, EncoderError, TrainingError: as `finetune`.
    """
    folder = Path(output).expanduser()
    call: dict[str, Any] = {"model": model, "target": target, "seed": seed, "triples": triples}
    if (folder / "training.json").is_file():
        done = Finetuned.load(folder)
        _check_same(done, collection, **call)
        print(f"{output} holds the finished training of these parameters: it is loaded.")
        display(learning_curve(done.curve, done.report))
        return done
    live = display(Markdown("Training …"), display_id=True)
    with redirect_stderr(sys.stdout):  # JupyterLab shows stderr in red, as if something had failed
        show_curve = lambda curve: live.update(learning_curve(curve))  # noqa: E731
        done = finetune(source, folder, **call, on_check=show_curve)
    live.update(learning_curve(done.curve, done.report))
    return done


def _check_same(done: Finetuned, collection: Collection, **call: Any) -> None:
    """Raise FinetuneError unless the same call trained ``done``, wherever its files are."""
    report, used = done.report, done.report["settings"]
    wanted = call["triples"] or Settings.for_device(used["device"]).triples
    pairs = {
        "target": ("all" if "choice" in report else report["target"], call["target"]),
        "seed": (report["seed"], call["seed"]),
        "number of triples": (used["triples"], wanted),
        "encoder": (report["encoder"]["identity"], encoder_identity(call["model"])),
        "collection": (report["collection"]["fingerprint"], collection.fingerprint),
        "source of negatives": (report["triples"]["negatives"] == "encoder", False),
    }
    if differing := [name for name, (found, asked) in pairs.items() if found != asked]:
        others = " and ".join(f"another {name}" for name in differing)
        raise FinetuneError(
            f"{done.folder} holds a training with {others}; choose another output, or remove the"
            " folder"
        )


def learning_curve(curve: pd.DataFrame, report: Mapping[str, Any] | None = None) -> Figure:
    """Draw `SELECTION` on the validation queries by step, and its value at step 0.

    With a report, the best step has an error bar, the standard errors by which it must exceed step
    0: the trained encoder, or a mix with the original, is selected if its bar ends above the line.
    """
    steps, values = curve["step"].to_numpy(), curve[SELECTION].to_numpy()
    title = f"step {steps[-1]:,}: {score(values[-1])}"
    with drawing():
        figure, axis = plt.subplots(figsize=(WIDTH, 2.6), layout="constrained")
        axis.axhline(values[0], color=GREY, linestyle=":", label="before training", gid="start")
        axis.plot(steps, values, "o-", color=BLUE, markerfacecolor="white", gid="curve")
        if report:
            kept = "trained" if report["kept"] == "trained" else "original"
            title = f"stopped at step {report['stop_step']:,}; the {kept} encoder is kept"
            error = report["validation"]["standard_error"] or 0.0
            needed = report["settings"]["standard_errors"] * error
            best = values[steps == report["best_step"]]
            axis.errorbar(
                [report["best_step"]], best, yerr=[[needed], [0]], fmt="o", color=BLUE, capsize=4
            )
        axis.set(title=title, xlabel="training step", ylabel=f"{SELECTION}, validation")
        axis.margins(y=0.2)
        axis.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        axis.legend(frameon=False)
    return figure


def losses_figure(done: Finetuned) -> Figure:
    """Draw the curves of all losses that one was chosen of; the chosen one is thick."""
    choice = done.report["choice"]
    with drawing():
        figure, axis = plt.subplots(figsize=(WIDTH, 3), layout="constrained")
        for row, color in zip(choice["trainings"], LOSSES, strict=False):
            name, width = loss_name(row["target"]), 1 + 1.5 * (row["target"] == choice["chosen"])
            values = row["steps"], row["values"]
            axis.plot(*values, "o-", color=color, linewidth=width, markersize=3, label=name)
        axis.axhline(row["values"][0], color=GREY, linestyle=":", label="before training")
        axis.set(xlabel="training step", ylabel=f"{SELECTION}, validation")
        axis.legend(frameon=False, fontsize=8)
    return figure


# ---- comparisons ------------------------------------------------------------------------------


def comparisons(done: Finetuned) -> pd.DataFrame:
    """Return the pairs that the report compares, in every measure.

    Columns: a, b, and those of `compared`, with the confidence interval as low and high, which are
    NaN without a test.
    """
    rows, report, qrels = [], done.report, done.qrels
    measures = list(report["measures"]["start"])
    scored = {name: evaluate(qrels, done.run(name), measures) for name in RUNS}
    for measure in measures:
        usable = len(relevant(qrels, measure))
        tested = finetuned.comparisons(scored, measure, usable, report["bm25"])
        for pair, found in tested.items():
            a, b = pair.split(" vs ")
            low, high = found.pop("ci") or (np.nan, np.nan)
            rows.append({"a": a, "b": b, **found, "low": low, "high": high})
    numbers = ["difference", "low", "high", "p_t", "p_tost", "margin"]
    table = pd.DataFrame(rows)[["measure", "a", "b", *numbers, "n", "verdict"]]
    return table.astype(dict.fromkeys(numbers, float))


def comparison_figure(table: pd.DataFrame) -> Figure:
    """Draw the differences of `comparisons` with 95 % confidence intervals, a panel a measure."""
    measures = table["measure"].unique()
    with drawing():
        figure, axes = plt.subplots(
            1, len(measures), sharey=True, squeeze=False, figsize=(WIDTH, 2.4), layout="constrained"
        )
        for axis, measure in zip(axes.flat, measures, strict=True):
            rows = table[table["measure"] == measure]
            at = rows["difference"]
            axis.axvline(0, color=PALE, linewidth=0.9)
            errors = [at - rows["low"], rows["high"] - at]
            axis.errorbar(at, range(len(rows)), xerr=errors, fmt="o", color=BLUE, capsize=3)
            for y, (x, verdict) in enumerate(zip(at, rows["verdict"], strict=True)):
                above = {"xytext": (0, 6), "textcoords": "offset points", "ha": "center"}
                axis.annotate(verdict, (x, y), fontsize=8, **above)
            axis.set_xlabel(f"difference in {measure_label(measure)}, 95 % CI")
            axis.margins(x=0.2)
        labels = [f"{NAMES[a]}\n− {NAMES[b]}" for a, b in zip(rows["a"], rows["b"], strict=True)]
        axes[0, 0].set_yticks(range(len(labels)), labels)
        axes[0, 0].set_ylim(len(labels) - 0.5, -0.8)
    return figure


# ---- single queries ---------------------------------------------------------------------------


def other(done: Finetuned) -> str:
    """Name of the system that the trained encoder is compared with, query by query.

    "start"; or "bm25" if the original encoder was selected.
    """
    return "start" if done.report["kept"] == "trained" else "bm25"


def changes(done: Finetuned) -> pd.DataFrame:
    """Return `Finetuned.per_query` of the first measure, with difference = trained − `other`."""
    return done.per_query(next(iter(done.report["measures"]["start"])), other(done))


def changes_figure(table: pd.DataFrame, pairs: pd.DataFrame) -> Figure:
    """Draw sorted differences per query to the encoder of before and to BM25, in the first measure.

    ``table`` is of `changes`, ``pairs`` of `comparisons`.
    """
    measure = pairs["measure"].iloc[0]
    rows = pairs[(pairs["measure"] == measure) & (pairs["a"] == "trained")]
    named = rows.replace({"a": NAMES, "b": NAMES})
    named["ci"] = list(zip(rows["low"], rows["high"], strict=True))
    values = table.set_index("qid")
    return per_query_figure(
        {
            "measure": measure_label(measure),
            "margin": rows["margin"].iloc[0],
            "pairs": named.to_dict("records"),
            "per_query": {NAMES[name]: values[name].to_dict() for name in RUNS},
        }
    )


def side_by_side(
    done: Finetuned, collection: Collection, qid: str, *, depth: int = 5, max_chars: int = 220
) -> Styler:
    """Return the first passages for a test query by `other` and by the trained encoder.

    Relevant ones are marked. Each cell has the rank of its passage on the other side.

    Raises:
        KeyError: no test query has this id.
    """
    query, judged = done.queries[qid], done.qrels.get(qid, {})
    names = (other(done), "trained")
    ranked = [[docid for docid, _ in top(done.run(name).get(qid, {}))] for name in names]
    columns: dict[str, list[str]] = {}
    for name, docids, others in zip(names, ranked, ranked[::-1], strict=True):
        cells = []
        for docid in docids[:depth]:
            grade = judged.get(docid)
            mark = "not judged" if grade is None else f"grade {grade}"
            mark = f"✓ relevant, {mark}" if grade and grade > 0 else mark
            rank = others.index(docid) + 1 if docid in others else f"below {len(others)}"
            text = shorten(collection.passages[docid], max_chars)
            cells.append(f"{mark} ({docid}; rank on the other side: {rank}): {text}")
        columns[NAMES[name]] = cells + [""] * (depth - len(cells))
    frame = pd.DataFrame(columns, index=range(1, depth + 1))
    style = show(frame, f"{query} ({qid})")
    return style.map(lambda cell: "font-weight: bold" if cell.startswith("✓") else "")


# ---- one batch under each loss ----------------------------------------------------------------


def batch(
    done: Finetuned, collection: Collection, encoder: str, *, size: int = 16, seed: int = 1
) -> tuple[pd.DataFrame, Embeddings]:
    """Return a triple for each of ``size`` test queries, and its embeddings by an encoder.

    A triple is a query, a relevant passage, and an unjudged one that BM25 finds
    (`filter_negatives`).

    Returns:
        Columns qid, positive, negative; and query, positive, negative, each (B, D) of length 1.
    """
    qrels, passages = done.qrels, collection.passages
    qids = sorted(qrels)
    judged = {qids[row]: qrels[qids[row]] for row in seeded_order(len(qids), seed)[: 4 * size]}
    found, _ = filter_negatives(done.run("bm25"), judged, passages, similarity=None, seed=seed)
    judged = {qid: judged[qid] for qid in found}
    count = max(1, min(size, len(judged)))
    triples = mine_triples(judged, found, passages, count=count, seed=seed)
    table = pd.DataFrame(triples, columns=["qid", "positive", "negative"])
    retriever = DenseRetriever(open_encoder(encoder, device=default_device()), passages)
    parts = [retriever.embed_queries([done.queries[qid] for qid in table["qid"]])]
    for column in ("positive", "negative"):
        rows = np.array([passages.row(docid) for docid in table[column]])
        parts.append(retriever.embed_passages(rows))
    query, positive, negative = (torch.from_numpy(part).double() for part in parts)
    return table, (query, positive, negative)


def descend(embeddings: Embeddings, steps: int, rate: float = 0.02, **loss: Any) -> Embeddings:
    """Return the embeddings after gradient descent on the loss of this batch, at length 1.

    Each embedding moves by itself; training an encoder moves all texts at once. ``rate`` is that
    of a triple: the loss is a mean, so a step is B times as long.
    """
    moved = list(embeddings)
    for _ in range(steps):
        moved = [part.detach().requires_grad_() for part in moved]
        gradients = torch.autograd.grad(margin_loss(*moved, **loss), moved)
        moved = [
            torch.nn.functional.normalize(part - rate * len(part) * gradient)
            for part, gradient in zip(moved, gradients, strict=True)
        ]
    query, positive, negative = (part.detach() for part in moved)
    return query, positive, negative


def batch_figure(embeddings: Embeddings, *, steps: int = 10, **loss: Any) -> Figure:
    """Draw margins and targets of a batch before and after ``steps`` of `descend`.

    The loss moves the points to the dotted line, where margin equals target. On the right is
    margin − target of triple i with the negative of triple j, grey where the loss has no such pair.
    ``loss`` are arguments of `margin_loss`.
    """
    states, losses = [], []
    for each in (embeddings, descend(embeddings, steps, **loss)):
        pairs = torch.broadcast_tensors(*margins_and_targets(*each, **loss))
        states.append([values.numpy() for values in pairs])
        losses.append(float(margin_loss(*each, **loss)))
    with drawing():
        figure, (points, errors) = plt.subplots(1, 2, figsize=(WIDTH, 3.2), layout="constrained")
        points.axline((0, 0), slope=1, color=GREY, linewidth=0.9, linestyle=":")
        for (margins, targets), color, name in zip(
            states, (ORANGE, BLUE), ("before", f"after {steps} steps"), strict=True
        ):
            points.plot(margins.ravel(), targets.ravel(), ".", color=color, label=name, gid=name)
        points.set(xlim=(-1, 1), ylim=(0, 1), xlabel="margin", ylabel="target")
        points.set_title(f"loss {losses[0]:.4f} → {losses[1]:.4f}")
        points.legend(frameon=False, fontsize=8)
        margins, targets = states[1]
        left = margins - targets
        if left.ndim == 1:
            left = np.where(np.eye(len(left), dtype=bool), left, np.nan)
        image = errors.imshow(left, vmin=-1, vmax=1, cmap="RdBu", gid="margin − target")
        errors.set_facecolor("#e6e6e6")
        errors.grid(visible=False)
        errors.set(title="margin − target", xlabel="j (whose negative)", ylabel="triple i")
        figure.colorbar(image, ax=errors, shrink=0.9)
    return figure
