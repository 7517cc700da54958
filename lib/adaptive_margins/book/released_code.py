"""The chapter "Paper and released code": each difference (``differences.yaml``), and what was
measured of it.

Numbers come from the frames of `adaptive_margins.paper.released_code`. The chapter is computed on
request only; the default book shows the page that `summary_page` renders from a
committed `summary`.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.resources import files
from itertools import combinations
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import yaml
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.stats import kendalltau

from adaptive_margins.book import figures, published
from adaptive_margins.book.render import render
from adaptive_margins.book.style import SMALL, measure_label, score, signed
from adaptive_margins.paper.released_statistics import SUMMARY, summarise

BLOCKS = ["orientation", "stop_gradient", "ideal", "checkpoint", "pooling", "probes", "choice"]
"""The blocks with comparisons, in the order of the chapter."""
STYLES = {
    "better": ("#009e73", "^"),
    "worse": ("#d55e00", "v"),
    "equivalent": ("#0072b2", "o"),
    "undecided": (figures.GREY, "s"),
}
"""Verdict on the code's side → colour and marker."""
UNTESTED = "ideal"
"""The block that compares two definitions of a measure: its difference is a bias, and no test is
about it.
"""


def load() -> list[Any]:
    """The entries of ``differences.yaml``; their fields are attributes, "" where one is missing."""
    text = (files(__package__) / "differences.yaml").read_text("utf-8")
    return list(pd.DataFrame(yaml.safe_load(text)["rows"]).fillna("").itertuples())


# --- a block --------------------------------------------------------------------------------------


def forest(data: pd.DataFrame) -> Figure:
    """Differences of a block in full ranking with their 95 % intervals, a column a test set.

    ``data`` is a frame of `Differences`. The band is ±.05, pale dots are single runs, shape and
    colour are the verdict. Without rows the figure has a note that there is nothing to compare.
    """
    if data.empty:
        with figures.drawing():
            figure = plt.figure(figsize=(figures.WIDTH, 0.4))
            figure.text(0, 0.4, "nothing to compare in this profile")
        return figure
    data = data[data["kind"] == "full"]
    data = data.assign(label=data["what"] + "\n" + data["measure"].map(measure_label))
    rows, sets = list(dict.fromkeys(data["label"])), list(dict.fromkeys(data["set"]))
    with figures.drawing():
        figure, axes = plt.subplots(
            1,
            len(sets),
            sharex=True,
            sharey=True,
            squeeze=False,
            layout="constrained",
            figsize=(figures.WIDTH, 0.9 + 0.36 * len(rows)),
        )
        for axis, name in zip(axes[0], sets, strict=True):
            _panel(axis, data[data["set"] == name], rows)
            axis.set_title(name)
        axes[0][0].set_yticks(range(len(rows)), rows, fontsize=SMALL)
        axes[0][0].invert_yaxis()
        shown = [v for v in STYLES if v in set(data["verdict"])]
        handles = [plt.Line2D([], [], label=v, linestyle="", **_mark(v)) for v in shown]
        figure.legend(handles=handles, loc="outside upper right", ncols=4, frameon=False)
    return figure


def _panel(axis: Axes, data: pd.DataFrame, rows: list[str]) -> None:
    axis.axvspan(-0.05, 0.05, color="#f0f0f0", zorder=0)
    axis.axvline(0, color=figures.PALE, linewidth=0.8)
    for label, group in data.groupby("label", sort=False):
        first, at = group.iloc[0], rows.index(str(label))
        each = group["value_code"] - group["value_paper"]
        axis.plot(each, [at] * len(group), "o", color=figures.PALE, alpha=0.6)
        mark = _mark(first["verdict"])
        axis.hlines(at, first["low"], first["high"], color=mark["color"], linewidth=1.6)
        axis.plot(first["difference"], at, **mark)
    axis.set_xlabel("difference, code − paper")


def _mark(verdict: str) -> dict[str, Any]:
    color, marker = STYLES[verdict]
    face = "white" if verdict == "undecided" else color
    return {"color": color, "marker": marker, "markersize": 6, "markerfacecolor": face}


def table(compared: pd.DataFrame) -> pd.DataFrame:
    """Comparisons (columns `SUMMARY`) as text, a row each."""
    rows = [
        {
            "What": r["what"],
            "Paper": r["paper"],
            "Code": r["code"],
            "Set": r["set"],
            "Measure": measure_label(r["measure"])
            + (", reranked" if r["kind"] == "rerank" else ""),
            "Paper's": score(r["value_paper"]),
            "Code's": score(r["value_code"]),
            "Difference [95 % CI]": "{} [{}, {}]".format(
                *(signed(r[c]) for c in ("difference", "low", "high"))
            ),
            "Single runs": f"{signed(r['lowest'])} to {signed(r['highest'])}",
            "Verdict": "—" if r["block"] == UNTESTED else r["verdict"],
        }
        for r in compared.to_dict("records")
    ]
    return pd.DataFrame(rows)


def order_of_systems(data: pd.DataFrame) -> pd.DataFrame:
    """How the two ideal rankings order systems, a row a measure of the block "ideal".

    Columns: measure, systems, lowest and highest difference, pairs of systems, those whose order
    changes (swapped), and Kendall's τ-b (NaN where all scores of a side are equal).
    """
    rows = []
    for measure, group in data.groupby("measure", sort=False):
        paper, code = group["value_paper"], group["value_code"]
        pairs = list(combinations(zip(paper, code, strict=True), 2))
        rows.append(
            {
                "measure": measure,
                "systems": len(group),
                "lowest": (code - paper).min(),
                "highest": (code - paper).max(),
                "pairs": len(pairs),
                "swapped": sum((a[0] - b[0]) * (a[1] - b[1]) < 0 for a, b in pairs),
                "tau": float(kendalltau(paper, code).statistic),
            }
        )
    return pd.DataFrame(rows)


# --- the chapter ----------------------------------------------------------------------------------


def overview(compared: pd.DataFrame) -> pd.DataFrame:
    """Every difference as a row, with its effect: computed from ``compared`` (columns `SUMMARY`),
    or known otherwise.
    """
    rows = []
    for d in load():
        status = d.status + ("; executed on small inputs" if d.executed else "")
        found = compared[compared["block"] == d.block]
        found = found[found["what"].str.contains(d.what, regex=False)]
        effect = d.matters or (
            _effect(found) if len(found) else "Nothing to compare in this profile."
        )
        rows.append(
            (d.where, d.paper, f"{d.code} ({d.file})", status[0].upper() + status[1:], effect)
        )
    columns = ["Where", "The paper", "The released code", "How it is known", "Does it matter?"]
    return pd.DataFrame(rows, columns=columns)


def _effect(found: pd.DataFrame) -> str:
    """Verdicts of the comparisons, and the range of the differences of scores."""
    counts = found["verdict"].value_counts()
    verdicts = ", ".join(
        f"{verdict} in {counts[verdict]}" for verdict in STYLES if verdict in counts
    )
    scores = found.loc[~found["measure"].str.match("Filled@|Exact@"), "difference"]
    low, high = signed(scores.min()), signed(scores.max())
    spread = low if low == high else f"{low} to {high}"
    if (found["block"] == UNTESTED).all():
        return f"Another definition; difference {spread}."
    return f"Code: {verdicts} of {len(found)}; difference {spread}."


def summary(
    frames: Mapping[str, pd.DataFrame], machine: Mapping[str, Any], date: str, profile: str
) -> dict[str, Any]:
    """What the default book shows of the chapter, as JSON can hold it.

    Args:
        frames: by the names in `BLOCKS`, and "optimism".
        machine: what it ran on, as `device.machine` returns it.
        date: of the run, as text.
        profile: its name.

    Raises:
        KeyError: a frame is missing.
    """
    shown = {
        "compared": summarise(frames[name] for name in BLOCKS),
        "optimism": frames["optimism"],
        "order": order_of_systems(frames["ideal"]),
    }
    rows = {name: frame.map(_short).to_dict("records") for name, frame in shown.items()}
    return {"profile": profile, "date": date, "machine": dict(machine), **rows}


def _short(value: Any) -> Any:
    return float(f"{value:.6g}") if isinstance(value, float) else value


def summary_page(summary: Mapping[str, Any]) -> str:
    """A page of MyST Markdown from a `summary`."""
    compared = pd.DataFrame(summary["compared"], columns=SUMMARY)
    rows = overview(compared)
    same = rows["Does it matter?"].str.startswith("No difference")
    return render(
        "released_code.md",
        code=published.load().paper["released_code"],
        machine=", ".join(f"{key} {value}" for key, value in summary["machine"].items()),
        profile=summary["profile"],
        date=summary["date"],
        overview=rows[~same],
        same=rows[same],
        order=_rounded(summary["order"]),
        optimism=_rounded(summary["optimism"]),
    )


def _rounded(rows: list[dict[str, Any]]) -> pd.DataFrame:
    frame = pd.DataFrame(rows).astype(object)
    return frame.map(lambda v: signed(v).lstrip("+") if isinstance(v, float) else str(v))
