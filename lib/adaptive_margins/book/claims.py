"""What the paper claims about its figures and tables, each claim tested on this run.

``claims.yaml`` has an entry for each claim: the statistic (a function of ``claim_statistics``), the
range of it that supports the claim, and the reason for that range. One rule decides all claims: a
claim is supported if the 95 % confidence interval lies inside the range, not supported if it lies
outside, and not decided if it contains an end of the range or if there is no interval. A claim
cannot be tested where the design forces its outcome, and cannot be seen where the runs are too
short, or lack a row.
"""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import yaml
from matplotlib.figure import Figure
from pandas.io.formats.style import Styler

from adaptive_margins.book import claim_conditions, claim_statistics
from adaptive_margins.book.claim_statistics import Evidence, interval, published_frames
from adaptive_margins.book.figures import GREY, WIDTH, drawing
from adaptive_margins.book.style import signed
from adaptive_margins.paper import Reproduction

UNTESTABLE, UNSEEN = "cannot be tested here", "cannot be seen here"
ANSWERS = {
    "supported": "Yes, within ±.05.",
    "not supported": "No.",
    "not decided": "Not decided: the confidence interval contains an end of ±.05.",
    UNTESTABLE: "It cannot be tested here.",
    UNSEEN: "It cannot be seen here.",
}
"""Outcome of a claim → the answer to what it asks."""
CHAPTERS = {
    "1": "11_at_convergence",
    "5.1": "02_static_targets",
    "5.2": "03_adaptive_targets",
    "5.3": "04_distributed_targets",
    "5.4": "05_comparison",
    "5.5": "06_baselines",
}
"""Section of the paper → the notebook with its claims."""
FORMATS: dict[str, Callable[[float], str]] = {
    "difference": signed,
    "share": lambda value: f"{value:z.0%}".replace("-", "−"),
    "times": lambda value: f"{value:.1f} ×".replace("-", "−"),
    "number": lambda value: f"{value:z.2f}".replace("-", "−"),
}


@dataclass(frozen=True)
class Claim:
    """An entry of ``claims.yaml``, whose comments explain the fields."""

    claim: str
    section: str
    shows: str
    statistic: str = ""
    of: str = ""
    arguments: dict[str, Any] = field(default_factory=dict)
    paper: str = ""
    format: str = "difference"
    supported: tuple[float, float] = (-math.inf, math.inf)
    reason: str = "the claim is about the sign."
    needs: dict[str, dict[str, Any]] = field(default_factory=dict)
    untestable: str = ""
    asks: dict[str, str] = field(default_factory=dict)


@cache
def rules() -> tuple[Claim, ...]:
    """The entries of ``claims.yaml``, in order."""
    entries = yaml.safe_load((files(__package__) / "claims.yaml").read_text("utf-8"))
    return tuple(Claim(**entry) for entry in entries)


def _rule(claim: str) -> Claim:
    return next(rule for rule in rules() if rule.claim == claim)


def table(
    section: str, frames: Mapping[str, pd.DataFrame], reproduction: Reproduction
) -> pd.DataFrame:
    """The claims of a section, a row each, with its outcome in this run.

    Columns: claim, section, shows, statistic, paper, here, low, high, outcome, why. ``here`` is NaN
    and the outcome "cannot be seen here" where the run lacks the rows; ``low`` and ``high`` are NaN
    where there is no interval.

    Args:
        section: number of the paper's section, a key of `CHAPTERS`.
        frames: "figure3", "table3", "equivalence", … → the frame of the method of that name.
        reproduction: where the frames come from; the scores of single queries are read from its
            runs.

    Raises:
        KeyError: a frame that a claim of the section needs is missing.
    """
    evidence, printed = Evidence(frames, reproduction), Evidence(published_frames())
    rows = [_row(claim, evidence, printed) for claim in rules() if claim.section == section]
    return pd.DataFrame(rows)


def show(claims: pd.DataFrame) -> Styler:
    """The frame of `table` for a page: numbers as text, the interval next to its statistic."""
    here = [_here(row) for row in claims.to_dict("records")]
    shown = claims.assign(here=here)[["claim", "statistic", "paper", "here", "outcome", "why"]]
    shown.columns = ["Claim", "Statistic", "Paper", "Here [95 % CI]", "Outcome", "Why"]
    section = "-".join(dict.fromkeys(claims["section"])).replace(".", "-")
    styler = shown.style.hide(axis="index").format(escape="html").set_uuid(f"claims-{section}")
    return styler.set_table_attributes('class="am-claims"')


def figure(claims: pd.DataFrame, *, narrow: bool = False) -> Figure | None:
    """The differences in nDCG@10 that the claims are about, each with its confidence interval.

    Pale bars are the ranges in which a claim is supported, hollow diamonds the paper's values.
    ``narrow`` has each claim above its row, for phones. None without such a claim and interval.
    """
    about = np.array([_is_about_ndcg(_rule(claim)) for claim in claims["claim"]])
    rows = claims[about & claims["low"].notna() & (claims["outcome"] != UNTESTABLE)]
    if rows.empty:
        return None
    colors = {"supported": "#00664d", "not supported": "#a34200"}
    with drawing():
        width, each, half = (3.8, 0.6, 0.2) if narrow else (WIDTH, 0.36, 0.4)
        size = width, 0.8 + each * len(rows)
        figure, axis = plt.subplots(figsize=size, layout="constrained")
        papers = [_printed(text) for text in rows["paper"]]
        span = np.nanmax(np.abs([*rows["low"], *rows["high"], *papers])) * 1.15
        for y, (row, paper) in enumerate(zip(rows.to_dict("records"), papers, strict=True)):
            least, most = np.clip(_rule(row["claim"]).supported, -span, span)
            axis.fill_betweenx([y - half, y + half], least, most, color="#e3efe9", linewidth=0)
            if narrow:
                above = {"fontsize": 8, "va": "bottom", "linespacing": 1}
                above["bbox"] = {"facecolor": "white", "linewidth": 0, "pad": 0}
                axis.text(-span, y - half, textwrap.fill(row["claim"], 52), **above)
            color = colors.get(row["outcome"], GREY)
            axis.plot([row["low"], row["high"]], [y, y], color=color, linewidth=2)
            seen = color if row["outcome"] != UNSEEN else "white"
            axis.plot(row["here"], y, "o", color=color, markerfacecolor=seen, markersize=6)
            axis.plot(paper, y, "D", color="black", mfc="none")
        axis.axvline(0, color=GREY, linewidth=0.8)
        labels = [] if narrow else [textwrap.fill(claim, 56) for claim in rows["claim"]]
        axis.set_yticks(range(len(labels)), labels, fontsize=8)
        ends = (len(rows) - 1 + 1.5 * half, -0.75 if narrow else -0.6)
        axis.set(xlim=(-span, span), ylim=ends, xlabel="difference in nDCG@10")
        axis.grid(visible=False)
    return figure


def _printed(text: str) -> float:
    """The paper's value of a statistic, as far as it is a number."""
    number = re.fullmatch(r"[+−]?[\d.]+", text)
    return float(text.replace("−", "-")) if number else math.nan


def _is_about_ndcg(rule: Claim) -> bool:
    """Whether the statistic is a difference in nDCG@10, and of no other measure ("@k")."""
    return rule.format == "difference" and "nDCG@10" in rule.of and "@k" not in rule.of


def _here(row: Mapping[Any, Any]) -> str:
    """The statistic of a row with its interval, as text."""
    f = FORMATS[_rule(row["claim"]).format]
    if np.isnan(row["here"]):
        return "—"
    low, high = row["low"], row["high"]
    return f(row["here"]) + ("" if np.isnan(low) else f" [{f(low)}, {f(high)}]")


def overview(editions: Mapping[str, pd.DataFrame]) -> list[dict[str, str]]:
    """The rows of the table on the first page: a claim each, as text.

    ``editions`` are the claims (`table`) of one profile or several, by its name; the first one
    decides. Keys: claim, paper, outcome, why, section, chapter, and the statistic of each profile.
    """
    first, *_ = editions.values()
    rows = []
    for row in first.to_dict("records"):
        names = ("claim", "paper", "outcome", "why", "section")
        texts = {name: str(row[name]) for name in names} | {"chapter": CHAPTERS[row["section"]]}
        if row["outcome"] not in (UNTESTABLE, UNSEEN):  # the reason for the range: in the chapter
            rule = _rule(row["claim"])
            texts["why"] = f"(supported {_in_words(rule.supported, FORMATS[rule.format])})"
        for profile, claims in editions.items():
            found = claims[claims["claim"] == row["claim"]].to_dict("records")
            texts[profile] = _here(found[0]) if found else "—"
            if found and claims is not first:
                texts[profile] += f" ({found[0]['outcome']})"
        rows.append(texts)
    return rows


def answers(editions: Mapping[str, pd.DataFrame]) -> list[dict[str, str]]:
    """What the first page asks, answered from the first edition: question, verdict, text.

    Claims that were not tested are left out.
    """
    profile, claims = next(iter(editions.items()))
    asked = {rule.claim: rule.asks for rule in rules() if rule.asks}
    found = []
    for row in claims[claims["claim"].isin(asked)].to_dict("records"):
        asks, outcome, verdict = asked[row["claim"]], row["outcome"], ANSWERS[row["outcome"]]
        over = asks["over"] if np.isnan(row["low"]) else f"{asks['over']}, 95 % CI"
        text = f"{asks['answer']} {_here(row)} (profile `{profile}`, {over}; the paper has"
        text += f" {row['paper']})."
        if outcome == "not supported" and row["low"] > 0:
            verdict = "Yes, and it is better by more than .05."
        elif outcome == "not decided" and np.isnan(row["low"]):
            verdict = "Not decided: there is no confidence interval."
        elif outcome == "not decided" and not row["low"] <= 0 <= row["high"]:
            side = "lower" if row["high"] < 0 else "higher"
            verdict = f"It scores {side}; whether by less than .05 is not decided."
        elif outcome == UNTESTABLE:
            text = f"The paper has {row['paper']}."
        if outcome in (UNSEEN, UNTESTABLE):
            text = f"{row['why']} {text}"
        found.append({"question": asks["question"], "verdict": verdict, "text": text})
    return found


def _row(claim: Claim, here: Evidence, printed: Evidence) -> dict[str, Any]:
    value = low = high = float("nan")
    forced, why = bool(claim.untestable), claim.untestable
    for name, arguments in claim.needs.items():
        if not why and (why := getattr(claim_conditions, name)(here, **arguments)):
            forced = name in claim_conditions.FORCED
    format_ = FORMATS[claim.format]
    if claim.statistic:
        value, low, high = estimate(claim, here)
    paper = claim.paper or format_(estimate(claim, printed)[0])
    if not why and np.isnan(value):
        why = "This run has nothing to compare."
    untested = UNTESTABLE if forced else UNSEEN
    outcome = untested if why else decide(low, high, claim.supported)
    if not why:
        why = f"Supported {_in_words(claim.supported, format_)}: {claim.reason}"
        why += "" if np.isfinite(low) else " There is no interval."
    return {
        "claim": claim.claim,
        "section": claim.section,
        "shows": claim.shows,
        "statistic": claim.of,
        "paper": paper,
        "here": value,
        "low": low,
        "high": high,
        "outcome": outcome,
        "why": why,
    }


def decide(low: float, high: float, supported: tuple[float, float]) -> str:
    """The outcome for the interval [low, high], NaN where there is none."""
    least, most = supported
    if low > least and high < most:
        return "supported"
    return "not supported" if high < least or low > most else "not decided"


def _in_words(supported: tuple[float, float], format_: Callable[[float], str]) -> str:
    least, most = ("" if math.isinf(x) else format_(x) if x else "0" for x in supported)
    if least and most:
        return f"between {least} and {most}"
    return f"above {least}" if least else f"below {most}"


def estimate(claim: Claim, evidence: Evidence) -> tuple[float, float, float]:
    """The statistic of a claim and its 95 % confidence interval (NaN where there is none)."""
    return interval(getattr(claim_statistics, claim.statistic)(evidence, **claim.arguments))
