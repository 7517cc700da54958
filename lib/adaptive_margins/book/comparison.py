"""Scores of this run's Tables 3 and 4 next to those that the paper prints."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Literal

import pandas as pd

from adaptive_margins.book.published import load
from adaptive_margins.book.style import encoder_label

TOLERANCE = 0.02
"""The largest difference, rounded to three decimals, that is called "within"."""
SUPPLIED = "supplied: "
"""How the source of a supplied run begins; its name follows."""


def comparison(
    data: pd.DataFrame,
    *,
    table: Literal[3, 4],
    models: Mapping[str, str] | None = None,
    supplied: pd.DataFrame | None = None,
) -> pd.DataFrame:
    """Scores of Table 3 or 4 that the paper prints for the same row, set and measure.

    Args:
        data: the frame of Table 3 or 4.
        table: which of the two tables.
        models: this profile's encoder name → model as printed; others are written by
            `encoder_label`.
        supplied: for Table 3, the frame of Table 4 with supplied runs; Table 4's frame has them.

    Returns:
        One row a score: key, name and in_batch of the published row; set; measure (this run's);
        ours, published and their difference (ours - published); verdict ("within ±.02" once
        rounded to three decimals, "higher", "lower"); printed (the number in the paper, as text);
        supplied (the name of the run that ``published`` was computed from, or ""); run_id. No rows
        where nothing matches.
    """
    printed = printed_scores(table, data if supplied is None else supplied)
    ours = data[data["value"].notna()]
    if table == 3:
        same = ["model", "target", "in_batch"]
        model = [(models or {}).get(e) or encoder_label(e) for e in ours["encoder"]]
        ours = ours.assign(model=model, in_batch=in_batch(ours))
        printed["name"] = printed["model"] + ", " + printed["target"]
    else:
        same = ["loss", "sampling", "in_batch", "of"]
        ours = ours[~ours["source"].astype(str).str.startswith(SUPPLIED)]
        # Rows of MarginMSE name the sources whose configuration they have.
        of = ours["source"].where(ours["source"].str.startswith("as "), "").str.removeprefix("as ")
        sampling = ours["sampling"].str.split(",").str[0]
        ours = ours.assign(of=of.str.split(", "), sampling=sampling).explode("of")
        taught = printed["loss"] == "MarginMSE"
        printed["of"] = printed["source"].where(taught, "")
        printed["sampling"] = printed["sampling"].str.strip("_")
        printed["name"] = printed["loss"] + (", " + printed["source"]).where(taught, "")
    ours = ours.assign(plain=ours["measure"].map(level_free), ours=ours["value"])
    ours = ours[[*same, "set", "plain", "measure", "ours", "run_id"]]
    found = printed.drop(columns="measure").merge(ours, on=[*same, "set", "plain"])
    theirs = found["computed"].fillna(found["value"])
    difference = found["ours"] - theirs
    verdict = [_verdict(value) for value in difference]
    replaced = found["key"].where(found["computed"].notna(), "")
    return found.assign(published=theirs, difference=difference, verdict=verdict, supplied=replaced)


def _verdict(difference: float) -> str:
    # Of the difference as it is shown: 0.62 - 0.60 is above 0.02 in binary.
    if abs(round(difference, 3)) <= TOLERANCE:
        return "within ±.02"
    return "higher" if difference > 0 else "lower"


def printed_scores(table: int, supplied: pd.DataFrame | None) -> pd.DataFrame:
    """`Published.scores` with the scores of supplied runs of the same key (NaN without).

    They are ``plain`` (`level_free`), ``computed`` (the score) and ``tested`` (whether it has a †).
    """
    scores = load().scores(table)
    scores["plain"] = scores["measure"].map(level_free)
    if supplied is None or "source" not in supplied:
        return scores.assign(computed=float("nan"), tested=False)
    runs = supplied[supplied["source"].astype(str).str.startswith(SUPPLIED)].dropna(subset="value")
    runs = pd.DataFrame(
        {
            "key": runs["source"].str.removeprefix(SUPPLIED),
            "set": runs["set"],
            "plain": runs["measure"].map(level_free),
            "computed": runs["value"].astype(float),
            "tested": runs["equivalent"].astype(bool) & (table == 4),
        }
    )
    return scores.merge(runs, how="left", on=["key", "set", "plain"])


def printed_beside(data: pd.DataFrame, table: Literal[3, 4]) -> list[str]:
    """What the paper prints for the row of each score, or the range over its encoders; "" for none.

    Query sets correspond by their order, nDCG and recall by their names whatever the cut-off.
    """
    scores = load().scores(table)
    sets = dict(zip(data["set"].unique(), scores["set"].unique(), strict=False))
    ticked = in_batch(data) if table == 3 else data["in_batch"]
    found = []
    for row, tick in zip(data.to_dict("records"), ticked, strict=True):
        same = scores["measure"].str.startswith(row["measure"][0]) & (scores["in_batch"] == tick)
        same &= scores["set"] == sets.get(row["set"])
        if table == 3:
            same &= scores["target"] == row["target"]
            model = scores["model"] == encoder_label(row["encoder"])
            same &= model | (not model.any())
        else:
            sampling = str(row["sampling"]).split(",")[0]
            same &= (scores["loss"] == row["loss"]) & (
                scores["sampling"].str.strip("_") == sampling
            )
        ends = scores[same].sort_values("value")["printed"].iloc[[0, -1] if same.any() else []]
        found.append("–".join(dict.fromkeys(ends)))
    return found


def level_free(measure: str) -> str:
    """A measure without relevance level: R@1000 for R(rel=2)@1000 and Recall@1000."""
    return re.sub(r"\(rel=\d+\)", "", measure).replace("Recall@", "R@")


def in_batch(runs: pd.DataFrame) -> pd.Series:
    """In-batch negatives as ✓ or ✗; distributed targets always have them."""
    return (runs["in_batch"].astype(bool) | (runs["target"] == "distributed")).map(
        {True: "✓", False: "✗"}
    )
