"""The statistics behind the claims: each a small function of the frames of figures and tables.

Confidence intervals are over queries: every statistic is computed again on 1000 random halves of
the queries (drawn without replacement, so that the spread over halves is the standard error over
all queries), and the interval spans the middle 95 %. A statistic that first chooses (the best ε,
the best step) chooses on the other half, so that no score is inflated by the choice. Where a
configuration has several seeds, each draw also draws among its seeds. What has no value for a query
(times, similarities) has a t interval over the encoders.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any
from zlib import crc32

import numpy as np
import pandas as pd
from scipy.stats import kendalltau, t

from adaptive_margins.book.published import count, load, minutes
from adaptive_margins.paper import Reproduction
from adaptive_margins.paper.frames import TAS_B
from adaptive_margins.paper.store import StoredRun

DRAWS = 1000
Interval = tuple[float, float, float]
"""Value, and the ends of its 95 % confidence interval."""
Curves = Mapping[str, Any]
"""A figure, and which of its curves: the arguments of `_curves`."""
STUDENT = "MarginMSE, TAS-B, hard"
"""The row trained as the reproduced TAS-B run that the paper's Table 4 tests against."""
_CURVE = ["encoder", "in_batch", "batch_size", "triples"]
_KEYS = {
    "figure3": ["encoder", "in_batch", "target"],
    "figure4": _CURVE,
    "figure5": _CURVE,
    "table3": ["encoder", "set", "variant"],
    "table4": ["set", "variant"],
}


def variants(frame: pd.DataFrame) -> pd.Series:
    """Names of the rows of Tables 3 and 4: "static", "static in-batch", "Adaptive in-batch", …"""
    names = frame["target"] if "target" in frame else frame["loss"]
    in_batch = frame["in_batch"].isin([True, "✓"]) & (names.str.lower() != "distributed")
    if "sampling" in frame:
        names = names.where(
            frame["sampling"].isin(["Rand.", "—"]), names + ", " + frame["sampling"]
        )
    return names.where(~in_batch, names + " in-batch")


def published_frames() -> dict[str, pd.DataFrame]:
    """Tables 2 to 4 as printed, with the columns that the statistics use."""
    published = load()
    instance = published.tables[2].set_index("role").loc[["d-max", "d-mid", "d-min"]]
    numbers = (
        instance[["rho", "target", "loss"]].astype(float).rename(columns={"loss": "loss_table"})
    )
    three, four = published.scores(3), published.scores(4)
    teacher = four["key"] == TAS_B
    four["loss"] = four["loss"].mask(teacher, TAS_B)
    return {
        "table2": numbers.reset_index(),
        "table3": three.assign(
            encoder=three["model"],
            in_batch=three["in_batch"] == "✓",
            seconds=60.0 * three["time"].map(minutes),
            triples=three["triples"].map(count),
        ),
        "table4": four.assign(source="", triples=four["triples"].map(count))[
            teacher | ~four["loss"].str.startswith("MarginMSE")
        ],
    }


class Evidence:
    """Frames, and the scores of single queries in the runs that they name.

    Args:
        frames: "figure3", "table3", … → frame.
        reproduction: where the frames come from; None for published frames, which have no queries.
        draws: halves of the queries.
    """

    def __init__(
        self,
        frames: Mapping[str, pd.DataFrame],
        reproduction: Reproduction | None = None,
        draws: int = DRAWS,
    ) -> None:
        self.frames = dict(frames)
        self.reproduction = reproduction
        self.draws = draws if reproduction else 0
        self.run = cache(self._run)
        self.scores = cache(self._scores)

    def _run(self, run_id: str) -> StoredRun:
        assert self.reproduction is not None
        return StoredRun(self.reproduction.store.folder / run_id)

    def _scores(self, name: str, measure: int = 0, other: bool = False) -> pd.DataFrame:
        """Mean scores of a frame's rows, a row a configuration, a column a draw.

        Column 0 has the scores over all queries; the others those of a random half, or with
        ``other`` of the other half. ``measure`` counts the frame's measures: 0 is the first, −1 the
        last. A frame with one measure has no last one.
        """
        frame = self.frames[name]
        names = list(dict.fromkeys(frame["measure"]))
        frame = frame[frame["measure"] == names[measure]]
        if "source" in frame:
            frame = frame[~frame["source"].str.startswith("supplied")]
        if name.startswith("table"):
            frame = frame.assign(variant=variants(frame))
        if measure and len(names) == 1:
            frame = frame.iloc[:0]
        rows = frame.to_dict("records")
        values = np.array([self._row(name, row, other) for row in rows])
        rng = np.random.default_rng(0)  # the same seeds in both halves
        keys, means = [], []
        for key, at in frame.groupby(_KEYS[name], sort=False).indices.items():
            picked = rng.integers(len(at), size=(len(at), values.shape[1]))
            picked[:, 0] = np.arange(len(at))
            keys.append(key)
            means.append(np.take_along_axis(values[at], picked, 0).mean(0))
        index = pd.MultiIndex.from_tuples(keys or [], names=_KEYS[name])
        return pd.DataFrame(np.array(means).reshape(len(keys), self.draws + 1), index=index)

    def _row(self, name: str, row: Mapping[str, Any], other: bool) -> np.ndarray:
        if self.reproduction is None:
            return np.array([row["value"]])
        measure = row["measure"]
        runs = [self.run(run_id) for run_id in row.get("run_ids", row["run_id"]).split()]
        run = runs[0]
        validation = self.reproduction.profile.sets.validation
        if name in ("figure4", "figure5"):
            checks = run.checks
            at = checks[(checks["measure"] == measure) & (checks["step"] == row["step"])]
            scores = at.set_index("qid")["value"].sort_index().to_numpy()
        else:
            mode, query_set = ("full", row["set"]) if "set" in row else ("rerank", validation)
            found = [r.evaluation(mode, query_set).per_query[measure] for r in runs]
            scores = np.array([[of[qid] for of in found] for qid in sorted(found[0])])
        half = halves(len(scores), row.get("set", validation), self.draws)
        half = ~half if other else half
        by_seed = half @ scores.reshape(len(scores), -1) / half.sum(axis=1)[:, None]
        # The same draw of seeds for every row: rows are compared seed by seed.
        drawn = np.random.default_rng(1).integers(by_seed.shape[1], size=by_seed.shape)
        means = np.take_along_axis(by_seed, drawn, axis=1).mean(axis=1)
        return np.concatenate([[row["value"]], means])


@cache
def halves(queries: int, name: str, draws: int) -> np.ndarray:
    """(draws, queries) random halves of a query set, the same for every frame."""
    order = np.argsort(np.random.default_rng(crc32(name.encode())).random((draws, queries)), axis=1)
    return order < queries // 2


def pick(table: pd.DataFrame, **levels: Any) -> pd.DataFrame:
    """The rows with these values of index levels, which are dropped."""
    for name, value in levels.items():
        table = table[table.index.get_level_values(name) == value]
    return table.reset_index(list(levels), drop=True)


def best(tables: Sequence[pd.DataFrame], level: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    """For each group the ``level`` with the highest score, the first of equals.

    ``tables`` are two: scores, and the scores to choose by. Returns the chosen level's score, and
    the level itself.
    """
    score, choose = tables
    if score.empty:
        return score, score
    wide = score.unstack(level), choose.unstack(level)
    places = wide[0].columns.get_level_values(level).unique()
    value, by = (w.to_numpy().reshape(len(w), -1, len(places)) for w in wide)
    at = np.where(np.isnan(by), -np.inf, by).argmax(axis=2)
    found = np.take_along_axis(value, at[..., None], axis=2)[..., 0]
    return pd.DataFrame(found, wide[0].index), pd.DataFrame(places.to_numpy()[at], wide[0].index)


def interval(found: np.ndarray | pd.Series | Interval) -> Interval:
    """Value and 95 % interval: of draws (the first entry is over all queries), or over encoders.

    NaN where there is none. An interval is returned as it is.
    """
    nan = float("nan")
    if isinstance(found, tuple):
        return found
    if isinstance(found, pd.Series):
        found = found.dropna()
        n, mean = len(found), float(found.mean())
        half = t.ppf(0.975, n - 1) * found.std(ddof=1) / np.sqrt(n) if n > 1 else nan
        return mean, float(mean - half), float(mean + half)
    if len(found) == 1:
        return float(found[0]), nan, nan
    low, high = np.percentile(found[1:], [2.5, 97.5])
    return float(found[0]), float(low), float(high)


def _mean(table: pd.DataFrame) -> np.ndarray:
    return table.mean(axis=0).to_numpy() if len(table) else np.array([np.nan])


def _chosen(table: pd.DataFrame) -> np.ndarray:
    """The mean of what was chosen on the other half: its value is the mean over the halves."""
    draws = _mean(table)
    return np.concatenate([[draws[1:].mean()], draws[1:]]) if len(draws) > 1 else draws


# --- Figures 3 to 5 -------------------------------------------------------------------------------


def _both(of: Evidence, frame: str, measure: int = 0) -> tuple[pd.DataFrame, ...]:
    """Scores of a frame, and those to choose by."""
    return tuple(of.scores(frame, measure, other=other) for other in (False, True))


def tuning_gain(of: Evidence) -> np.ndarray:
    """Score with the best ε minus score with ε = 1, mean over encoders and settings."""
    tables = _both(of, "figure3")
    return _chosen(best(tables, "target")[0] - pick(tables[0], target=1.0))


def gain_of_own_target(of: Evidence) -> np.ndarray:
    """Score with each encoder's best ε minus score with the ε that is best for all encoders."""
    tables = _both(of, "figure3")
    single = best(tables, "target")[0].groupby(level="in_batch").mean()
    means = [x.groupby(level=["in_batch", "target"]).mean() for x in tables]
    if tables[0].index.get_level_values("encoder").nunique() < 2:
        return np.array([np.nan])
    return _chosen(single - best(means, "target")[0])


def gain_of_own_measure(of: Evidence) -> np.ndarray:
    """Recall-oriented score with the ε chosen by it minus that with the ε chosen by the first
    measure.
    """
    tables = _both(of, "figure3", -1)
    if tables[0].empty:
        return np.array([np.nan])
    ranking = of.scores("figure3", 0, other=True)
    return _chosen(best(tables, "target")[0] - best((tables[0], ranking), "target")[0])


def static_in_batch(of: Evidence, measure: int) -> np.ndarray:
    """Score of the best ε with in-batch negatives minus that without, mean over encoders."""
    found = best(_both(of, "figure3", measure), "target")[0]
    return _chosen(pick(found, in_batch=True) - pick(found, in_batch=False))


def _curves(of: Evidence, figure: str, measure: int = 0, **which: Any) -> tuple[pd.DataFrame, ...]:
    """Curves by encoder and triples, and those to choose by.

    ``which`` has ``in_batch`` or ``batch_size``: "small", "large", or "figure4" for Figure 4's.
    """
    tables = _both(of, figure, measure)
    if "batch_size" in which:
        sizes = sorted(set(tables[0].index.get_level_values("batch_size")))
        named = {"small": sizes[0], "large": sizes[-1]} if len(sizes) > 1 else {}
        if "figure4" in of.frames:
            named["figure4"] = of.frames["figure4"]["batch_size"].iloc[0]
        which["batch_size"] = named.get(which["batch_size"])
    others: list[Any] = [level for level in ("in_batch", "batch_size") if level not in which]
    return tuple(pick(table, **which).droplevel(others) for table in tables)


def maximum_at(of: Evidence, figure: str, **which: Any) -> pd.DataFrame:
    """Share of the triples after which each curve is highest."""
    score, _ = _curves(of, figure, **which)
    if score.empty:
        return score
    last = max(score.index.get_level_values("triples"))
    return best((score, score), "triples")[1] / last


def share_at_maximum(of: Evidence, a: Curves, b: Curves | None = None) -> np.ndarray:
    """Share of the triples after which the curves ``a`` are highest, minus that of ``b``; mean over
    encoders.
    """
    share = maximum_at(of, **a)
    return _mean(share if b is None else _minus(share, maximum_at(of, **b)))


def highest(of: Evidence, a: Curves, b: Curves, measure: int = 0) -> np.ndarray:
    """Highest score of the curves ``a`` minus that of ``b``, mean over encoders."""
    tables = (best(_curves(of, measure=measure, **which), "triples")[0] for which in (a, b))
    return _chosen(_minus(*tables))


def _minus(a: pd.DataFrame, b: pd.DataFrame) -> pd.DataFrame:
    return a - b if len(a) and len(b) else a.iloc[:0]


def fall_after_maximum(of: Evidence, figure: str, **which: Any) -> np.ndarray:
    """Highest score minus last score of a curve, mean over encoders."""
    tables = _curves(of, figure, **which)
    last = pick(tables[0], triples=max(tables[0].index.get_level_values("triples"), default=0))
    return _chosen(best(tables, "triples")[0] - last)


# --- Figure 6 and Table 2 -------------------------------------------------------------------------


def _ends(of: Evidence) -> tuple[pd.DataFrame, pd.DataFrame]:
    """First and last row of Figure 6 for each encoder."""
    groups = of.frames["figure6"].sort_values("step").groupby("encoder")
    return groups.first(), groups.last()


def final_mean(of: Evidence) -> pd.Series:
    """Mean of φ(d⁺, d⁻) at the end of training, by encoder."""
    return _ends(of)[1]["mean"]


def final_skew(of: Evidence) -> pd.Series:
    """Distance of the maximum from the mean minus that of the minimum, by encoder."""
    last = _ends(of)[1]
    return last["max"] + last["min"] - 2 * last["mean"]


def spread_of_means(of: Evidence) -> np.ndarray:
    """Range of the encoders' means at the end, as a share of their range at the beginning."""
    first, last = (np.ptp(part["mean"]) for part in _ends(of))
    return np.array([last / first if first else np.nan])


def order_by_target(of: Evidence, column: str) -> np.ndarray:
    """Kendall's τ of the targets of Table 2's negatives and another column."""
    rows = of.frames["table2"].dropna(subset="target")
    return np.array([kendalltau(rows["target"], rows[column]).statistic])


# --- Tables 3 and 4 -------------------------------------------------------------------------------


def lead(of: Evidence, variant: str, measure: int) -> np.ndarray:
    """Score of a variant minus that of the best other one of the same encoder, mean over all."""
    tables = _both(of, "table3", measure)
    others = [x[x.index.get_level_values("variant") != variant] for x in tables]
    return _chosen(pick(tables[0], variant=variant) - best(others, "variant")[0])


def difference(of: Evidence, frame: str, a: str, b: str, measure: int) -> np.ndarray:
    """Score of variant ``a`` minus that of ``b``, mean over encoders and test sets."""
    scores = of.scores(frame, measure)
    return _mean(pick(scores, variant=a) - pick(scores, variant=b))


def difference_of_gains(of: Evidence, a: str, b: str) -> np.ndarray:
    """Gain of ``a`` over ``b`` in the last measure of Table 4 minus that in the first."""
    last, first = (difference(of, "table4", a, b, measure) for measure in (-1, 0))
    return last - first


def static_over(of: Evidence, column: str, target: str) -> pd.Series:
    """Time or triples of static targets over those of another, by encoder.

    In-batch settings are compared alike and averaged; distributed targets have one setting.
    """
    frame = of.frames["table3"]
    rows = frame.assign(variant=variants(frame)).groupby(["encoder", "variant"])[column].first()
    table = rows.unstack("variant")
    pairs = [("static", target), ("static in-batch", target)]
    if target == "adaptive":
        pairs[1] = ("static in-batch", "adaptive in-batch")
    table = table.reindex(columns=list(dict.fromkeys(name for pair in pairs for name in pair)))
    return pd.DataFrame([table[a] / table[b] for a, b in pairs]).mean()


def to_teacher(of: Evidence, measure: int) -> np.ndarray:
    """Distributed targets minus the `STUDENT`, or an external run of it, mean over the test sets
    for which both have a score.
    """
    frame = of.frames["table4"]
    if TAS_B not in set(frame["loss"]):
        return difference(of, "table4", "Distributed", STUDENT, measure)
    frame = frame[frame["measure"] == list(dict.fromkeys(frame["measure"]))[measure]]
    by_set = frame.groupby(["set", "loss"])["value"].mean().unstack()
    both = by_set.reindex(columns=["Distributed", TAS_B])
    return np.array([(both["Distributed"] - both[TAS_B]).mean()])


def after_share(of: Evidence, loss: str, in_batch: bool, share: float) -> Interval:
    """First measure of a loss minus that of the best student of a teacher, after this share of the
    triples that the student saw: the first evaluation from there on. Over queries and seeds.
    """
    frame = to_students(of)
    rows = frame[(frame["loss"] == loss) & (frame["in_batch"] == in_batch)]
    rows = rows[rows["triples"] >= share * rows["reference_triples"]].sort_values("triples")
    if rows.empty:
        return math.nan, math.nan, math.nan
    value, low, high = rows.iloc[0][["difference", "low", "high"]].astype(float)
    return value, low, high


def to_students(of: Evidence) -> pd.DataFrame:
    """Comparisons with students of a teacher in the first measure."""
    frame = of.frames["equivalence"]
    return frame[frame["taught"] & (frame["measure"] == frame["measure"].iloc[0])]
