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
SAME = {3: ["model", "target", "in_batch"], 4: ["loss", "sampling", "in_batch", "of"]}
"""Table → the columns that are equal in a row of this run and the same row of the paper."""


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
    printed["name"] = printed["model"] if table == 3 else printed["loss"]
    more = printed["target"] if table == 3 else printed["of"]
    printed["name"] += (", " + more).where(more != "", "")
    ours = _with_keys(data[data["value"].notna()], table, models or {})
    ours = ours.assign(plain=ours["measure"].map(level_free), ours=ours["value"])
    ours = ours[[*SAME[table], "set", "plain", "measure", "ours", "run_id"]]
    found = printed.drop(columns="measure").merge(ours, on=[*SAME[table], "set", "plain"])
    theirs = found["computed"].fillna(found["value"])
    difference = found["ours"] - theirs
    verdict = [_verdict(value) for value in difference]
    replaced = found["key"].where(found["computed"].notna(), "")
    return found.assign(published=theirs, difference=difference, verdict=verdict, supplied=replaced)


def _with_keys(data: pd.DataFrame, table: int, models: Mapping[str, str]) -> pd.DataFrame:
    """The rows of this run's Table 3 or 4 with the columns `SAME`; those of MarginMSE once for each
    source whose configuration they have.
    """
    if table == 3:
        model = [models.get(encoder) or encoder_label(encoder) for encoder in data["encoder"]]
        return data.assign(model=model, in_batch=in_batch(data))
    source = data["source"].astype(str)
    data = data[~source.str.startswith(SUPPLIED)]
    of = source.where(source.str.startswith("as "), "").str.removeprefix("as ").str.split(", ")
    return data.assign(of=of, sampling=data["sampling"].str.split(",").str[0]).explode("of")


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
    if table == 4:
        scores["of"] = scores["source"].where(scores["loss"] == "MarginMSE", "")
        scores["sampling"] = scores["sampling"].str.strip("_")
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
    """What the paper prints for the row of each score, or the range over its encoders (Table 3) and
    sources (Table 4); "" for none.

    Query sets correspond by their order, nDCG and recall by their names whatever the cut-off.
    """
    printed = printed_scores(table, None)
    sets = dict(zip(data["set"].unique(), printed["set"].unique(), strict=False))
    ours = _with_keys(data.reset_index(drop=True), table, {})
    if table == 3:
        models = list(printed["model"].unique())
        ours["model"] = [[model] if model in models else models for model in ours["model"]]
        ours = ours.explode("model")
    ours = ours.assign(set=ours["set"].map(sets), kind=_kind(ours), at=ours.index)
    keys = [*SAME[table], "set", "kind"]
    found = ours[[*keys, "at"]].merge(printed.assign(kind=_kind(printed)), on=keys)
    texts = found.sort_values("value").groupby("at")["printed"]
    ranges = texts.agg(lambda texts: "–".join(dict.fromkeys(texts.iloc[[0, -1]])))
    return ranges.reindex(range(len(data)), fill_value="").tolist()


def _kind(scores: pd.DataFrame) -> pd.Series:
    return scores["measure"].map(level_free).str.partition("@")[0]


def level_free(measure: str) -> str:
    """A measure without relevance level: R@1000 for R(rel=2)@1000 and Recall@1000."""
    return re.sub(r"\(rel=\d+\)", "", measure).replace("Recall@", "R@")


def in_batch(runs: pd.DataFrame) -> pd.Series:
    """In-batch negatives as ✓ or ✗; distributed targets always have them."""
    return (runs["in_batch"].astype(bool) | (runs["target"] == "distributed")).map(
        {True: "✓", False: "✗"}
    )
