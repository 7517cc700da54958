"""What the paper claims about its figures and tables, each claim tested on this run.

``claims.yaml`` has an entry for each claim: the statistic (a function of ``claim_statistics``), the
range of it that supports the claim, and the reason for that range. One rule decides all claims: a
claim is supported if the 95 % confidence interval lies inside the range, not supported if it lies
outside, and not decided if it contains an end of the range or if there is no interval.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from typing import Any

import numpy as np
import pandas as pd
import yaml
from pandas.io.formats.style import Styler

from adaptive_margins.book.claim_statistics import (
    CONDITIONS,
    STATISTICS,
    Evidence,
    interval,
    published_frames,
)
from adaptive_margins.book.published import load
from adaptive_margins.book.style import signed
from adaptive_margins.paper import Reproduction

OUTCOMES = ("supported", "not supported", "not decided", "cannot be tested here")
COLUMNS = [
    "claim",
    "section",
    "shows",
    "statistic",
    "paper",
    "here",
    "low",
    "high",
    "outcome",
    "why",
]
FORMATS: dict[str, Callable[[float], str]] = {
    "difference": signed,
    "share": lambda value: f"{value:.0%}".replace("-", "−"),
    "times": lambda value: f"{value:.1f} ×",
    "number": lambda value: f"{value:.2f}".replace("-", "−"),
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
    supported: tuple[float | None, float | None] = (None, None)
    reason: str = ""
    needs: dict[str, dict[str, Any]] = field(default_factory=dict)
    untestable: str = ""


@cache
def rules() -> tuple[Claim, ...]:
    """The entries of ``claims.yaml``, in order."""
    entries = yaml.safe_load((files(__package__) / "claims.yaml").read_text("utf-8"))
    return tuple(Claim(**entry) for entry in entries)


def table(
    section: str, frames: Mapping[str, pd.DataFrame], reproduction: Reproduction
) -> pd.DataFrame:
    """The claims of a section, each with its outcome in this run: the columns `COLUMNS`.

    ``here`` is NaN and the outcome "cannot be tested here" where the run lacks the rows, or where
    its design forces the result; ``low`` and ``high`` are NaN where there is no interval.

    Args:
        section: number of the paper's section, "5.1" to "5.5".
        frames: "figure3", "table3", … → the frame of the method of that name.
        reproduction: where the frames come from; the scores of single queries are read from its
            runs.

    Raises:
        KeyError: a frame that a claim of the section needs is missing.
    """
    evidence, printed = Evidence(frames, reproduction), Evidence(published_frames(load()))
    rows = [_row(claim, evidence, printed) for claim in rules() if claim.section == section]
    return pd.DataFrame(rows, columns=COLUMNS)


def show(claims: pd.DataFrame) -> Styler:
    """The frame of `table` for a page: numbers as text, the interval next to its statistic."""
    formats = [
        next(FORMATS[c.format] for c in rules() if c.claim == claim) for claim in claims["claim"]
    ]
    here = [
        "—" if np.isnan(value) else f(value) + ("" if np.isnan(low) else f" [{f(low)}, {f(high)}]")
        for f, value, low, high in zip(
            formats, claims["here"], claims["low"], claims["high"], strict=True
        )
    ]
    shown = claims.assign(here=here)[["claim", "statistic", "paper", "here", "outcome", "why"]]
    shown.columns = ["Claim", "Statistic", "Paper", "Here [95 % CI]", "Outcome", "Why"]
    section = "-".join(dict.fromkeys(claims["section"])).replace(".", "-")
    styler = shown.style.hide(axis="index").format(escape="html").set_uuid(f"claims-{section}")
    return styler.set_table_attributes('class="am-claims"')


def _row(claim: Claim, here: Evidence, printed: Evidence) -> dict[str, Any]:
    value = low = high = float("nan")
    why = claim.untestable or next(
        (w for name, kw in claim.needs.items() if (w := CONDITIONS[name](here, **kw))), ""
    )
    format_ = FORMATS[claim.format]
    if claim.statistic:
        value, low, high = estimate(claim, here)
    paper = claim.paper or format_(estimate(claim, printed)[0])
    if not why and np.isnan(value):
        why = "This run has nothing to compare."
    outcome = OUTCOMES[3] if why else decide(low, high, claim.supported)
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


def decide(low: float, high: float, supported: tuple[float | None, float | None]) -> str:
    """The outcome for the interval [low, high], NaN where there is none."""
    least, most = (
        bound if bound is not None else end
        for bound, end in zip(supported, (-np.inf, np.inf), strict=True)
    )
    if low > least and high < most:
        return OUTCOMES[0]
    return OUTCOMES[1] if high < least or low > most else OUTCOMES[2]


def _in_words(supported: tuple[float | None, float | None], format_: Callable[[float], str]) -> str:
    least, most = (
        None if bound is None else format_(bound) if bound else "0" for bound in supported
    )
    if least and most:
        return f"between {least} and {most}"
    return f"above {least}" if least else f"below {most}"


def estimate(claim: Claim, evidence: Evidence) -> tuple[float, float, float]:
    """The statistic of a claim and its 95 % confidence interval (NaN where there is none)."""
    return interval(STATISTICS[claim.statistic](evidence, **claim.arguments))
