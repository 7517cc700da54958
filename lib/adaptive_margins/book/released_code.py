"""The chapter "Paper and released code": each difference as a row (``differences.yaml``), and what was measured of it.

Numbers come from the frames of `adaptive_margins.paper.released_code`. The chapter is computed on request only; the
default book shows the page that `summary_page` makes of a committed `summary`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import yaml
from matplotlib.figure import Figure
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from scipy.stats import kendalltau

from adaptive_margins.book import figures, published
from adaptive_margins.book.context import markdown_table
from adaptive_margins.book.findings import signed
from adaptive_margins.book.style import SMALL, measure_label, require, score
from adaptive_margins.paper.released_code import COMPARED, SUMMARY, summarise

BLOCKS = {
    "orientation": "Which query's margin stands in which row",
    "stop_gradient": "A gradient through the target, or not",
    "ideal": "Where the ideal ranking of nDCG comes from",
    "checkpoint": "The best checkpoint or the last",
    "pooling": "[CLS] + Linear, [CLS], or the mean",
    "probes": "How many lists of the index are searched",
    "choice": "Choosing on a test set",
}
"""The measured blocks, in the order of the chapter, with their headings."""
TITLES = {**BLOCKS, "optimism": "Choosing by few queries"}
"""With the one that compares no runs."""
VERDICTS = ("equivalent", "differs", "undecided")
_COLOURS = {"equivalent": "#0072b2", "differs": "#d55e00", "undecided": figures.GREY}
_MARKERS = {"equivalent": "o", "differs": "D", "undecided": "s"}
TESTED = (
    "A query's values are averaged over the runs of each side; then the difference, code minus paper, is tested, paired over the"
    " queries. **Equivalent**: a paired TOST finds it within ±.05. **Differs**: it does not, and a t test finds that the"
    " difference is not 0. **Undecided**: neither. Both tests are at .05 with a Bonferroni correction for all comparisons of the"
    " block. In brackets stands the 95 % t interval of the single comparison, without that correction. Intervals and tests speak"
    " of other queries, not of other seeds; *single runs* has the smallest and the largest difference between two runs of one"
    " seed."
)
INTRODUCTION = (
    "The authors publish [their code]({code}); without it this comparison could not be made. In places it computes something"
    " else than the paper says, or decides what the paper leaves open. This page lists these places, and measures what they do to"
    " the scores where the collection and the encoder of this book can show it. They are not the paper's: an effect that is small"
    " here may be large there, and the other way round."
)


class Difference(BaseModel):
    """A row of ``differences.yaml``; its comments explain the fields."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    where: str = Field(min_length=1)
    paper: str = Field(min_length=1)
    code: str = Field(min_length=1)
    executed: bool = False
    status: Literal["measured", "toy case", "not measured here"]
    block: Literal[tuple(BLOCKS)] | None = None  # type: ignore[valid-type]
    what: str = ""
    matters: str | None = None

    @model_validator(mode="after")
    def _measured_or_said(self) -> Difference:
        measured = self.status == "measured"
        if measured != (self.block is not None) or measured == (self.matters is not None):
            raise ValueError(
                f"{self.where!r}: what is measured has a block, all else has `matters`, none has both"
            )
        if self.status == "toy case" and not self.executed:
            raise ValueError(f"{self.where!r}: a toy case has been executed")
        return self


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    rows: tuple[Difference, ...] = Field(min_length=1)


@cache
def load(path: Path | None = None) -> tuple[Difference, ...]:
    """Read the differences, by default those that come with the library. ValueError names the file and each bad entry."""
    source = path or files(__package__) / "differences.yaml"
    try:
        return _File.model_validate(yaml.safe_load(source.read_text("utf-8"))).rows
    except (yaml.YAMLError, ValidationError) as error:
        raise ValueError(f"{path or 'book/differences.yaml'}: {error}") from None


# --- a block ----------------------------------------------------------------------------------------------------------


def forest(data: pd.DataFrame) -> Figure:
    """Differences of a block in full ranking with their 95 % intervals, a column a test set; the band is ±.05.

    ``data`` has the columns `COMPARED`. Pale dots are single runs; shape and colour say the verdict. Without rows the figure
    says that there is nothing to compare.
    """
    if data.empty:
        with figures.drawing():
            figure = plt.figure(figsize=(figures.WIDTH, 0.4))
            figure.text(0, 0.4, "nothing to compare in this profile")
        return figure
    require(data, COMPARED, "forest")
    data = data[data["kind"] == "full"]
    data = data.assign(
        label=data["what"] + "\n" + data["measure"].map(measure_label),
        each=data["value_code"] - data["value_paper"],
    )
    rows, sets = list(dict.fromkeys(data["label"])), list(dict.fromkeys(data["set"]))
    with figures.drawing():
        figure, axes = plt.subplots(
            1, len(sets), sharex=True, sharey=True, squeeze=False, layout="constrained",
            figsize=(figures.WIDTH, 0.9 + 0.36 * len(rows)),
        )  # fmt: skip
        for axis, name in zip(axes[0], sets, strict=True):
            axis.axvspan(-0.05, 0.05, color="#f0f0f0", zorder=0)
            axis.axvline(0, color=figures.PALE, linewidth=0.8)
            for label, group in data[data["set"] == name].groupby("label", sort=False):
                first, at = group.iloc[0], rows.index(str(label))
                colour = _COLOURS[first["verdict"]]
                axis.plot(group["each"], [at] * len(group), "o", color=figures.PALE, alpha=0.6)
                axis.hlines(at, first["low"], first["high"], color=colour, linewidth=1.6)
                axis.plot(
                    first["difference"], at, _MARKERS[first["verdict"]], color=colour, markersize=6,
                    markerfacecolor="white" if first["verdict"] == "undecided" else colour,
                )  # fmt: skip
            axis.set_title(name)
            axis.set_xlabel("difference, code − paper")
        axes[0][0].set_yticks(range(len(rows)), rows, fontsize=SMALL)
        axes[0][0].invert_yaxis()
        shown = [v for v in VERDICTS if v in set(data["verdict"])]
        handles = [
            plt.Line2D(
                [], [], color=_COLOURS[v], marker=_MARKERS[v], markersize=5, label=v,
                markerfacecolor="white" if v == "undecided" else _COLOURS[v],
            )
            for v in shown
        ]  # fmt: skip
        figure.legend(handles=handles, loc="outside upper right", ncols=3, frameon=False)
    return figure


def table(compared: pd.DataFrame) -> str:
    """Comparisons (columns `SUMMARY`) as a Markdown table; empty without any."""
    if compared.empty:
        return ""
    require(compared, SUMMARY, "table")
    header = [
        "", "Paper", "Code", "Set, measure", "Paper’s", "Code’s", "Difference, 95\u00a0% interval", "Single runs", "Verdict",
    ]  # fmt: skip
    rows = [
        [
            r["what"], r["paper"], r["code"],
            f"{r['set']}, {_measured(r)}",
            score(r["value_paper"]), score(r["value_code"]), _interval(r), f"{signed(r['lowest'])} to {signed(r['highest'])}",
            r["verdict"],
        ]
        for r in compared.to_dict("records")
    ]  # fmt: skip
    return markdown_table(header, rows)


def _measured(row: Mapping[Any, Any]) -> str:
    reranked = " after reranking" if row["kind"] == "rerank" else ""
    return measure_label(row["measure"]) + reranked


def _interval(row: Mapping[Any, Any]) -> str:
    return f"{signed(row['difference'])}\u00a0[{signed(row['low'])},\u00a0{signed(row['high'])}]"


def read(data: pd.DataFrame) -> str:
    """A block in a sentence or two: how often which verdict, and the largest difference. Other blocks add what is theirs.

    ``data`` has the columns `COMPARED` (with ``system`` for the block "ideal"); without rows the text says why.
    """
    if data.empty:
        return (
            "This profile has nothing to compare here: its collection is so small that the index is exact and has no lists, or it"
            " has no queries to choose by but those of a test set."
        )
    block = str(data["block"].iloc[0])
    compared = summarise([data])
    text = f"{_counted(compared)} {_largest(compared)}"
    more = {
        "ideal": _read_ideal,
        "checkpoint": _read_steps,
        "pooling": _read_pooling,
        "probes": _read_probes,
        "choice": _read_choice,
    }
    return f"{text} {more[block](data)}" if block in more else text


def _counted(compared: pd.DataFrame) -> str:
    counts = compared["verdict"].value_counts()
    words = {"equivalent": "equivalent in", "differs": "different in", "undecided": "undecided in"}
    told = ", ".join(f"{words[v]} {counts[v]}" for v in VERDICTS if v in counts)
    n = len(compared)
    return f"Of {n} comparison{'s' if n > 1 else ''}: {told}."


def _largest(compared: pd.DataFrame) -> str:
    row = max(compared.to_dict("records"), key=lambda r: abs(r["difference"]))
    if not row["difference"]:
        return "No score differs."
    return (
        f"The largest difference is {_interval(row)} ({row['what']}, {row['code']} instead of {row['paper']}, "
        f"{_measured(row)} on {row['set']})."
    )


def _read_ideal(data: pd.DataFrame) -> str:
    texts = []
    for measure, rows in data.groupby("measure", sort=False):
        each = rows["value_code"] - rows["value_paper"]
        tau = kendall(rows["value_paper"], rows["value_code"])
        pairs = list(combinations(zip(rows["value_paper"], rows["value_code"], strict=True), 2))
        swapped = sum((a[0] - b[0]) * (a[1] - b[1]) < 0 for a, b in pairs)
        texts.append(
            f"Over {len(rows)} systems {measure_label(str(measure))} is higher by {_spread(each)};"
            f" {swapped} of {len(pairs)} pairs of systems change their order (Kendall’s τ {tau:.3f})."
        )
    return " ".join(texts)


def kendall(a: Sequence[float] | pd.Series, b: Sequence[float] | pd.Series) -> float:
    """Kendall's τ-b of two lists of scores of the same systems; NaN where one of them is constant."""
    return float(kendalltau(a, b).statistic)


def _read_steps(data: pd.DataFrame) -> str:
    one = data.drop_duplicates(["what", "seed"])
    told = [
        f"{what}: best at steps {_listed(rows['step_paper'])}, last {_listed(rows['step_code'])}"
        for what, rows in one.groupby("what", sort=False)
    ]
    return f"Steps by seed: {'; '.join(told)}."


def _read_pooling(data: pd.DataFrame) -> str:
    """Where each pooling starts and ends, in the first measure on the first set."""
    measure, name = data["measure"].iloc[0], data["set"].iloc[0]
    rows = data[(data["measure"] == measure) & (data["set"] == name)]
    told: dict[str, list[str]] = {}
    for when in ("before training", "after training"):
        own = rows[rows["what"].str.endswith(when)]
        for side in ("paper", "code"):
            for pooling, values in own.groupby(side, sort=False)[f"value_{side}"]:
                told.setdefault(str(pooling), []).append(score(values.mean()))
    each = ", ".join(f"{pooling} from {' to '.join(ends)}" for pooling, ends in told.items())
    return f"Training takes {measure_label(measure)} on {name} with {each}."


def _read_probes(data: pd.DataFrame) -> str:
    text = []
    for kind, words in (("Filled@", "get all {depth} hits"), ("Exact@", "")):
        rows = data[data["measure"].str.startswith(kind)]
        depth = rows["measure"].iloc[0].removeprefix(kind)
        many, one = (_percent(rows[c]) for c in ("value_paper", "value_code"))
        lists = rows["paper"].iloc[0]
        if words:
            text.append(
                f"With {lists} {many} of the queries {words.format(depth=depth)}, with 1 list {one}."
            )
        else:
            text.append(f"Of the exact search’s first {depth} hits {many} and {one} are found.")
    return " ".join(text)


def _percent(values: pd.Series) -> str:
    low, high = f"{values.min():.1%}", f"{values.max():.1%}"
    return low if low == high else f"{low} to {high}"


def _read_choice(data: pd.DataFrame) -> str:
    test = data["set"].iloc[0]
    one = data.drop_duplicates(["what", "seed"])
    told = []
    for what, rows in one.groupby("what", sort=False):
        column = "epsilon" if str(what).startswith("ε") else "step"
        told.append(
            f"{what}, by seed: {_listed(rows[f'{column}_paper'])} on {test}, {_listed(rows[f'{column}_code'])} on the separate"
            " queries"
        )
    rows = data[data["kind"] == "rerank"]
    gains = (rows["value_paper"] - rows["value_code"]).groupby(rows["set"], sort=False).mean()
    parts = [
        f"{signed(gain)} on {name}, {'by which was chosen' if name == test else 'by which was not'}"
        for name, gain in gains.items()
    ]
    measure = measure_label(rows["measure"].iloc[0])
    return (
        f"Chosen: {'; '.join(told)}. To choose on {test} changes {measure} after reranking, on average over these choices and"
        f" seeds, by {', and by '.join(parts)}."
    )


def _listed(values: pd.Series) -> str:
    return ", ".join(f"{value:g}" for value in values)


def optimism_table(data: pd.DataFrame) -> str:
    """The frame of `Differences.optimism` as a Markdown table."""
    header = [
        "Chosen", "Seed", "Settings", "Ever chosen", "On the drawn", "On the others", "Optimism", "95\u00a0% of the draws",
        "Due to the choice", "95\u00a0% of the draws",
    ]  # fmt: skip
    rows = [
        [
            r["what"], r["seed"], r["settings"], r["chosen"], score(r["drawn"]), score(r["others"]), signed(r["optimism"]),
            f"{signed(r['low'])} to {signed(r['high'])}", signed(r["net"]),
            f"{signed(r['net_low'])} to {signed(r['net_high'])}",
        ]
        for r in data.to_dict("records")
    ]  # fmt: skip
    return markdown_table(header, rows)


def read_optimism(data: pd.DataFrame) -> str:
    """The same in three sentences."""
    first = data.iloc[0]
    told = "; ".join(
        f"{what} by {_spread(rows['net'])}" for what, rows in data.groupby("what", sort=False)
    )
    low, high = signed(data["low"].min()), signed(data["high"].max())
    return (
        f"{first['draws']:,} times {first['size']} of the {first['size'] + first['rest']} queries of {first['set']} were drawn to"
        f" choose by, in {measure_label(first['measure'])} after reranking. On average over the draws, the score that a choice"
        f" was made by is too high for what was chosen, by seed: {told}. In 95 % of single draws the drawn and the other queries"
        f" are {low} to {high} apart; most of that is because they are other queries."
    )


# --- the chapter ------------------------------------------------------------------------------------------------------


def overview(compared: pd.DataFrame) -> str:
    """Every difference as a row, with its effect: computed from ``compared`` (columns `SUMMARY`), or said."""
    rows = []
    for d in load():
        status = d.status + ("; executed on small inputs" if d.executed else "")
        effect = d.matters or ""
        if d.block is not None:
            own = compared[
                (compared["block"] == d.block) & compared["what"].str.contains(d.what, regex=False)
            ]
            effect = _effect(own) if len(own) else "There was nothing to compare in this profile."
        rows.append([d.where, d.paper, d.code, status[0].upper() + status[1:], effect])
    return markdown_table(["Where", "The paper", "The released code", "How it is known", "Does it matter?"], rows)  # fmt: skip


def _spread(values: pd.Series) -> str:
    low, high = signed(values.min()), signed(values.max())
    return low if low == high else f"{low} to {high}"


def _effect(own: pd.DataFrame) -> str:
    counts = own["verdict"].value_counts()
    told = ", ".join(f"{v} in {counts[v]}" for v in VERDICTS if v in counts)
    return f"Here: {told} of {len(own)}; differences {_spread(own['difference'])}."


def found(frames: Mapping[str, pd.DataFrame]) -> str:
    """A bullet a block; ``frames`` by the names in `BLOCKS`, and "optimism"."""
    return "\n".join(f"- **{TITLES[name]}.** {text}" for name, text in _notes(frames).items())


def _notes(frames: Mapping[str, pd.DataFrame]) -> dict[str, str]:
    if missing := [name for name in TITLES if name not in frames]:
        raise ValueError(f"frames of {', '.join(missing)} are missing, got {', '.join(frames)}")
    notes = {name: read(frames[name]) for name in BLOCKS}
    return {**notes, "optimism": read_optimism(frames["optimism"])}


def read_frames(folder: Path) -> dict[str, pd.DataFrame]:
    """The frames that the notebook wrote to ``folder`` as CSV. FileNotFoundError names one that is not there."""
    texts = {"run_id": str, "reference_run_id": str}
    return {name: pd.read_csv(folder / f"{name}.csv", dtype=texts) for name in TITLES}


def summary(
    frames: Mapping[str, pd.DataFrame], machine: Mapping[str, Any], date: str, profile: str
) -> dict[str, Any]:
    """What the default book shows of the chapter, as JSON can hold it.

    Args:
        frames: by the names in `BLOCKS`, and "optimism"; see `read_frames`.
        machine: what it ran on, as `pages.machine` tells.
        date: of the run, as text.
        profile: its name.

    Raises:
        ValueError: a frame is missing.
    """
    notes = _notes(frames)
    compared = summarise(frames[name] for name in BLOCKS)
    return {
        "profile": profile,
        "date": date,
        "machine": dict(machine),
        "compared": [_plain(row) for row in compared.to_dict("records")],
        "optimism": [_plain(row) for row in frames["optimism"].to_dict("records")],
        "notes": notes,
    }


def _plain(row: Mapping[Any, Any]) -> dict[str, Any]:
    """NumPy's numbers as Python's, rounded to what anybody could read off them."""
    values = {str(k): v.item() if isinstance(v, np.generic) else v for k, v in row.items()}
    return {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in values.items()}


def summary_page(summary: Mapping[str, Any]) -> str:
    """A page of MyST Markdown from a `summary`."""
    compared = pd.DataFrame(summary["compared"], columns=SUMMARY)
    machine = ", ".join(f"{key} {value}" for key, value in summary["machine"].items())
    parts = [
        "# Paper and released code",
        INTRODUCTION.format(code=published.load().paper["released_code"]),
        f"Computed on {summary['date']} with the profile **{summary['profile']}** ({machine}). This is the committed summary of"
        " that run; the book does not compute it again unless it is asked to:",
        "```\nmake book ALL=1\n```",
        "## Every difference",
        overview(compared),
        "## What was measured",
        TESTED,
    ]
    for name, title in TITLES.items():
        parts += [f"### {title}", summary["notes"][name]]
        rows = compared[compared["block"] == name]
        shown = optimism_table(pd.DataFrame(summary["optimism"])) if name == "optimism" else ""
        if shown or len(rows):
            parts += [":::{dropdown} All rows", shown or table(rows), ":::"]
    return "\n\n".join(parts) + "\n"
