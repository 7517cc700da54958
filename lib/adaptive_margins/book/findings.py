"""What a run found, in sentences that follow its numbers: one function a figure and table, Markdown bullets.

Every word that compares is chosen from the data: as in the paper or not, higher or lower, and how sure. What is beyond an
interval, or beyond the spread between seeds, is decided; a difference that has neither is one "in this run". The paper's
own observations and numbers come from ``published.yaml``; rules of thumb ("about half") are named in the sentence.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations, pairwise
from typing import Any

import pandas as pd

from adaptive_margins.book.published import Published, count, load, minutes
from adaptive_margins.book.style import encoder_label, measure_label, require, score, signed

Labels = Mapping[str, str] | None
Noise = Mapping[str, float | None]  # measure -> spread between seeds, None where unknown
SIDES = {False: "without in-batch negatives", True: "with in-batch negatives"}
CURVE = ["encoder", "in_batch", "batch_size", "triples", "measure", "value", "maximum"]


# --- Figure 3 ---------------------------------------------------------------------------------------------------------


def figure3(data: pd.DataFrame, *, labels: Labels = None) -> str:
    """Section 5.1 on this run: best ε, spread over ε and over seeds, and the paper's four observations.

    ``data``: encoder, in_batch, target, seed, measure, value, start, maximum.
    """
    require(
        data,
        ["encoder", "in_batch", "target", "seed", "measure", "value", "start", "maximum"],
        "figure3",
    )
    main = str(data["measure"].iloc[0])
    bullets = [
        " ".join(
            sentence_best(data, encoder, side, labels=labels)
            for side in sorted(_unique(data["in_batch"]))
        )
        for encoder in _unique(data["encoder"])
    ]
    noise = seed_spread(data)
    known = ", ".join(f"{measure_label(m)} {score(s)}" for m, s in noise.items() if s is not None)
    if known:
        seeds = data.groupby("encoder", sort=False)["seed"].nunique()
        names = " and ".join(encoder_label(str(e), labels) for e in seeds[seeds > 1].index)
        bullets.append(
            f"The seed spread, the largest difference between seeds of one configuration, is known for {names}:"
            f" {known}. Below it is a rough yardstick for all encoders."
        )
    curves = _own_seed(data)
    return _bullets(
        [
            *bullets,
            _tuning(curves, noise, main),
            _best_by_encoder(curves, noise, main, labels),
            _best_by_measure(curves, noise),
            _static_in_batch(curves, noise),
        ]
    )


def sentence_best(
    data: pd.DataFrame,
    encoder: str,
    in_batch: bool = False,
    measure: str | None = None,
    *,
    labels: Labels = None,
) -> str:
    """The best static ε of an encoder, its score, and how far scores spread over ε and, if there are several, over seeds.

    ``data`` as for `figure3`; ``measure`` is by default the first.
    """
    measure = measure or str(data["measure"].iloc[0])
    rows = data[
        (data["encoder"] == encoder) & (data["in_batch"] == in_batch) & (data["measure"] == measure)
    ]
    own = _own_seed(rows)
    best = own[own["maximum"].astype(bool)].iloc[0]
    over_targets = own["value"].max() - own["value"].min()
    text = (
        f"For {encoder_label(encoder, labels)} {SIDES[bool(in_batch)]} the best ε is {best['target']:g}"
        f" ({measure_label(measure)} {score(best['value'])}, at step 0 {score(best['start'])});"
        f" the spread over ε is {score(over_targets)}"
    )
    over_seeds = seed_spread(rows)[measure]
    if over_seeds is None:
        return f"{text} (one seed)."
    verdict = "more" if over_targets > over_seeds else "no more"
    seeds = rows["seed"].nunique()
    return f"{text}, over {seeds} seeds at most {score(over_seeds)}: it differs {verdict} by ε than by seed."


def seed_spread(data: pd.DataFrame) -> dict[str, float | None]:
    """By measure, the largest difference between seeds of one configuration; None where each has one seed.

    ``data`` as for `figure3`. The result is what `figure4` and `figure5` take as ``noise``.
    """
    spreads: dict[str, float | None] = {}
    for measure in _unique(data["measure"]):
        groups = data[data["measure"] == measure].groupby(["encoder", "in_batch", "target"])
        several = groups["seed"].nunique() > 1
        ranges = (groups["value"].max() - groups["value"].min())[several]
        spreads[measure] = float(ranges.max()) if len(ranges) else None
    return spreads


def _own_seed(data: pd.DataFrame) -> pd.DataFrame:
    """The rows of the seed that holds the marked maximum of each curve."""
    keys = ["encoder", "in_batch", "measure"]
    marked = data.loc[data["maximum"].astype(bool), [*keys, "seed"]].drop_duplicates(keys)
    return data.merge(marked, on=[*keys, "seed"])


def _argbest(curve: pd.DataFrame) -> float:
    """The target of the highest score."""
    return float(curve["target"].to_numpy()[curve["value"].to_numpy().argmax()])


def _near(curve: pd.DataFrame, noise: float | None) -> set[float]:
    """Targets whose score is within ``noise`` of the best of the curve."""
    return set(curve.loc[curve["value"] >= curve["value"].max() - (noise or 0), "target"])


def _apart(near: Sequence[set[float]]) -> int:
    """Do the best targets of curves differ? 1: they do; -1: all have the same one; 0: cannot be told."""
    if len(near) < 2 or set.intersection(*near):
        return -1 if len(near) > 1 and len(set.union(*near)) == 1 else 0
    return 1


def _tuning(curves: pd.DataFrame, noise: Noise, main: str) -> str:
    gains: list[tuple[str, float]] = []
    for (_, _, measure), own in curves.groupby(["encoder", "in_batch", "measure"], sort=False):
        default = own.loc[own["target"] == 1, "value"]
        if default.empty:
            return _observation("tuning", [], "ε = 1 was not run.")
        gains.append((str(measure), float(own["value"].max() - default.iloc[0])))
    at_main = [gain for measure, gain in gains if measure == main]
    large = [gain > 0.1 for gain in at_main]
    text = (
        f"the best ε scores higher than ε = 1 in {_count(gain > 0 for _, gain in gains)} curves;"
        f" in {measure_label(main)} by {_range(at_main)}, by more than .100 in {_count(large)}"
    )
    if noise[main] is None:
        text += ". The best of a grid is never lower than one of its points, and there is one seed."
    else:
        text += (
            f". By more than the seed spread in {_count(g > (noise[m] or 0) for m, g in gains)}."
        )
    weights = [_weigh(gain, noise[m]) if gain else -1 for m, gain in gains]  # 0: ε = 1 is best
    if any(weights):  # or the size of the gains means nothing
        weights.append(_majority(large))
    return _observation("tuning", weights, text, noise[main])


def _best_by_encoder(curves: pd.DataFrame, noise: Noise, main: str, labels: Labels) -> str:
    parts, weights = [], []
    for in_batch, rows in curves[curves["measure"] == main].groupby("in_batch"):
        groups = {str(encoder): own for encoder, own in rows.groupby("encoder", sort=False)}
        best = {encoder: _argbest(own) for encoder, own in groups.items()}
        listed = ", ".join(
            f"{encoder_label(encoder, labels)} {target:g}" for encoder, target in best.items()
        )
        text = f"{SIDES[bool(in_batch)]} {listed}"
        near = [_near(own, noise[main]) for own in groups.values()]
        common = set.intersection(*near)
        weights += [_apart(pair) for pair in combinations(near, 2)]
        if common and len(set(best.values())) > 1:
            some = ", ".join(f"{target:g}" for target in sorted(common))
            text += f" (but ε = {some} is within the seed spread of the best for all of them)"
        parts.append(text)
    return _observation(
        "encoder", weights, f"best ε by {measure_label(main)}: {'; '.join(parts)}.", noise[main]
    )


def _best_by_measure(curves: pd.DataFrame, noise: Noise) -> str:
    measures = _unique(curves["measure"])
    if len(measures) < 2:
        return _observation("measure", [], "there is one measure.")
    weights, differs = [], []
    for _, rows in curves.groupby(["encoder", "in_batch"], sort=False):
        groups = {str(measure): own for measure, own in rows.groupby("measure", sort=False)}
        differs.append(len({_argbest(own) for own in groups.values()}) > 1)
        weights.append(_apart([_near(own, noise[measure]) for measure, own in groups.items()]))
    names = " and ".join(map(measure_label, measures))
    text = f"the best ε differs between {names} in {_count(differs)} pairs of encoder and setting"
    if noise[measures[0]] is not None:
        text += f", by more than the seed spread explains in {_count(w > 0 for w in weights)}"
    return _observation("measure", weights, f"{text}.", noise[measures[0]])


def _static_in_batch(curves: pd.DataFrame, noise: Noise) -> str:
    best = (
        curves.groupby(["encoder", "measure", "in_batch"], sort=False)["value"]
        .max()
        .unstack("in_batch")
    )
    if best.shape[1] < 2:
        return _observation(
            "static-in-batch",
            [],
            "there are no runs with and without in-batch negatives to compare.",
        )
    differences = {key: float(value) for key, value in (best[False] - best[True]).items()}
    values = list(differences.values())
    weights = [_weigh(value, noise[str(key[1])]) for key, value in differences.items()]  # type: ignore[index]
    text = (
        f"the best score without in-batch negatives is the same or higher in {_count(v >= 0 for v in values)} pairs of"
        f" encoder and measure ({_range(values)})"
    )
    if any(value is not None for value in noise.values()):
        text += f"; beyond the seed spread it is higher in {_count(w > 0 for w in weights)}"
        text += f" and lower in {_count(w < 0 for w in weights)}"
        # "The same or higher" needs no difference, only none the other way.
        weights = [
            1 if weight == 0 and value >= 0 else weight
            for weight, value in zip(weights, values, strict=True)
        ]
    return _observation("static-in-batch", weights, f"{text}.", next(iter(noise.values())))


# --- Figures 4 and 5 --------------------------------------------------------------------------------------------------


def figure4(
    data: pd.DataFrame,
    *,
    gains: pd.DataFrame | None = None,
    references: Mapping[str, float] | None = None,
    noise: Noise | None = None,
    labels: Labels = None,
) -> str:
    """Section 5.2 on this run: gains of adaptive targets, and the paper's two observations.

    ``data``: encoder, in_batch, batch_size, triples, measure, value, maximum, run_id. ``gains``: measure, start, best,
    low, high, run_id, for the intervals; ``references``: BM25's own order by measure; ``noise``: the `seed_spread` of
    Figure 3's frame, without which differences between runs are only "in this run".
    """
    require(data, [*CURVE, "run_id"], "figure4")
    main = str(data["measure"].iloc[0])
    noise = noise or {}
    best = _maxima(data)
    plain = best[(best["measure"] == main) & ~best["in_batch"].astype(bool)]
    listed = ", ".join(
        f"{encoder_label(r['encoder'], labels)} {r['share']:.0%}" for r in _records(plain)
    )
    half, falls = plain["share"].between(0.25, 0.75), plain["fall"] > 0
    efficient = _observation(
        "adaptive-efficient",
        [1 if flag else -1 for flag in [*half, *falls]],
        f"without in-batch negatives {measure_label(main)} is highest after this share of the triples: {listed} (a"
        f" quarter to three quarters counts as about half), and lower at the end in {_count(falls)}.",
    )
    pairs = _both_sides(best)
    weights, parts = [], []
    for measure, rows in pairs.groupby("measure", sort=False):
        differences = [float(d) for d in rows["value_with"] - rows["value_without"]]
        text = f"the highest {measure_label(str(measure))} is lower with than without in-batch negatives in"
        text += f" {_count(d < 0 for d in differences)} encoders ({_range(differences)}"
        limit = noise.get(str(measure))
        if limit is not None:
            text += f"; beyond the seed spread of {score(limit)} in {_count(d < -limit for d in differences)}"
        parts.append(f"{text})")
        if measure == main:
            later = rows["triples_with"] > rows["triples_without"]
            parts[-1] += f" and comes later in {_count(later)}"
            weights = [_weigh(-d, limit) for d in differences] + [
                1 if flag else -1 for flag in later
            ]
    text = (
        f"{', '.join(parts)}." if parts else "there are no runs with and without them to compare."
    )
    in_batch = _observation("adaptive-in-batch", weights, text)
    return _bullets([*_gains(data, gains, references, labels), efficient, in_batch])


def figure5(
    data: pd.DataFrame,
    *,
    adaptive: pd.DataFrame | None = None,
    gains: pd.DataFrame | None = None,
    references: Mapping[str, float] | None = None,
    noise: Noise | None = None,
    labels: Labels = None,
) -> str:
    """Section 5.3 on this run: gains of distributed targets, and the paper's three observations.

    ``data`` and the rest as for `figure4`; ``adaptive`` is the frame of Figure 4, to compare with.
    """
    require(data, [*CURVE, "run_id"], "figure5")
    main = str(data["measure"].iloc[0])
    limit = (noise or {}).get(main)
    best = _maxima(data)
    best = best[best["measure"] == main]
    sizes = sorted(_unique(best["batch_size"]))
    by_size = {size: best[best["batch_size"] == size].set_index("encoder") for size in sizes}
    small, large = by_size[sizes[0]], by_size[sizes[-1]]
    name = measure_label(main)
    bullets = _gains(data, gains, references, labels)

    sooner: list[bool] = []
    parts = []
    if adaptive is not None:
        other = _maxima(adaptive)
        other = other[other["measure"] == main]
        like = by_size.get(other["batch_size"].iloc[0], large)
        sides = {
            s: other[other["in_batch"] == s].set_index("encoder").reindex(like.index)
            for s in (True, False)
        }
        sooner += (like["triples"] < sides[False]["triples"]).tolist()
        parts.append(
            f"after fewer triples than that of adaptive targets in {_count(sooner)} encoders"
        )
        above, weights = [], []
        for side, rows in sides.items():
            differences = [float(d) for d in (like["value"] - rows["value"]).dropna()]
            text = f"that of adaptive targets {SIDES[side]} in {_count(d > 0 for d in differences)} encoders"
            text += f" ({_range(differences)}"
            if limit is not None:
                text += f"; beyond the seed spread of {score(limit)} in {_count(d > limit for d in differences)}"
            above.append(f"{text})")
            weights += [_weigh(d, limit) for d in differences]
        text = f"the highest {name} of distributed targets is above {' and '.join(above)}."
        highest = [_observation("highest", weights, text, limit)]
    else:
        highest = []
    if len(sizes) > 1:
        faster = (small["triples"] < large["triples"]).tolist()
        parts.append(
            f"with batches of {sizes[0]} after fewer than with {sizes[-1]} in {_count(faster)}"
        )
        sooner += faster
    if parts:
        text = f"the highest {name} of distributed targets comes {', and '.join(parts)}."
        bullets.append(_observation("faster", [1 if flag else -1 for flag in sooner], text))
    bullets += highest
    if len(sizes) > 1:
        differences = [float(d) for d in large["value"] - small["value"]]
        larger = [d > 0 for d in differences]
        text = (
            f"the highest {name} with batches of {sizes[-1]} differs from that with {sizes[0]} by"
            f" {_range(differences)} (up to .010 counts as hardly), and is higher in {_count(larger)} encoders."
        )
        weights = [1 if abs(d) <= 0.010 else -1 for d in differences] + [_majority(larger)]
        bullets.append(_observation("batch-size", weights, text))
    return _bullets(bullets)


def _maxima(data: pd.DataFrame) -> pd.DataFrame:
    """The marked maxima, with ``share`` of the curve's triples and ``fall`` from there to the end."""
    keys = ["encoder", "in_batch", "batch_size", "measure"]
    best = data[data["maximum"].astype(bool)].drop_duplicates(keys)
    last = (
        data.sort_values("triples").groupby(keys)[["triples", "value"]].last().add_prefix("last_")
    )
    best = best.join(last, on=keys)
    return best.assign(
        share=best["triples"] / best["last_triples"], fall=best["value"] - best["last_value"]
    )


def _both_sides(best: pd.DataFrame) -> pd.DataFrame:
    """Maxima without and with in-batch negatives side by side: encoder, measure, value_without, value_with, triples_…."""
    columns = ["encoder", "measure", "value", "triples"]
    without, with_ = (best.loc[best["in_batch"] == side, columns] for side in (False, True))
    return without.merge(with_, on=["encoder", "measure"], suffixes=("_without", "_with"))


def _gains(
    data: pd.DataFrame,
    gains: pd.DataFrame | None,
    references: Mapping[str, float] | None,
    labels: Labels,
) -> list[str]:
    """A bullet an encoder: from step 0 to the best step in the first measure, with the interval where there is one."""
    main = str(data["measure"].iloc[0])
    rows = data[data["measure"] == main]
    intervals = (
        {} if gains is None else {r["run_id"]: r for r in _records(gains[gains["measure"] == main])}
    )
    starts = {r["run_id"]: r["value"] for r in _records(rows[rows["triples"] == 0])}
    bullets = []
    for encoder, own in rows[rows["maximum"].astype(bool)].groupby("encoder", sort=False):
        parts = []
        for row in _records(own):
            several = data["batch_size"].nunique() > 1
            where = f"batches of {row['batch_size']}" if several else SIDES[bool(row["in_batch"])]
            known = intervals.get(row["run_id"])
            if known:
                change = _change(known["start"], known["best"], known["low"], known["high"])
            else:
                change = _change(starts[row["run_id"]], row["value"])
            parts.append(f"{where} {change}")
        text = f"{encoder_label(str(encoder), labels)}, {measure_label(main)} at step 0 and at its best step: {'; '.join(parts)}."
        if references and main in references:
            over = own["value"] > references[main]
            text += f" It passes BM25's own order ({score(references[main])}) in {_count(over)} settings."
        bullets.append(text)
    bullets.append(
        "The best step is chosen on the queries that it is measured on, which makes gains look larger than they are."
    )
    return bullets


def _change(
    before: float, after: float, low: float | None = None, high: float | None = None
) -> str:
    """From … to …, with how sure the difference is."""
    text = f"from {score(before)} to {score(after)}, {signed(after - before)}"
    if low is None or high is None or pd.isna(low) or pd.isna(high):
        word = "higher" if after > before else "lower" if after < before else "the same"
        return f"{text} ({word} in this run, no interval)"
    if low == high == 0:
        return f"{text} (the same run or the same ranking)"
    sure = "a gain" if low > 0 else "a loss" if high < 0 else "not told apart from 0"
    return f"{text} [{signed(low)}, {signed(high)}] ({sure})"


# --- Figure 6 ---------------------------------------------------------------------------------------------------------


def figure6(data: pd.DataFrame, *, labels: Labels = None) -> str:
    """Section 5.3, Figure 6 on this run: the paper's three observations on the distribution of φ(d⁺, d⁻).

    ``data``: encoder, batch_size, step, mean, min, max; of several batch sizes the largest is described.
    """
    require(data, ["encoder", "batch_size", "step", "mean", "min", "max"], "figure6")
    ordered = (
        data[data["batch_size"] == data["batch_size"].max()]
        .sort_values("step")
        .groupby("encoder", sort=False)
    )
    first, last = _records(ordered.first().reset_index()), _records(ordered.last().reset_index())
    means = ", ".join(
        f"{encoder_label(a['encoder'], labels)} from {_plain(a['mean'])} to {_plain(b['mean'])}"
        for a, b in zip(first, last, strict=True)
    )
    zero = [abs(row["mean"]) <= 0.05 for row in last]
    above, below = (
        [row["max"] - row["mean"] for row in last],
        [row["mean"] - row["min"] for row in last],
    )
    skew = [a > b for a, b in zip(above, below, strict=True)]
    start, end = (
        max(r["mean"] for r in rows) - min(r["mean"] for r in rows) for rows in (first, last)
    )
    if len(first) < 2 or start < 0.02:
        weights, text = [], "the encoders hardly differ in their mean to begin with"
    else:
        weights = [1 if end < start / 2 else -1]
        text = f"the encoders' means end {'' if end < start / 2 else 'not '}closer than half of their first distance"
    counts = f"({', '.join(_plain(a) for a in above)} above, {', '.join(_plain(b) for b in below)} below)"
    return _bullets(
        [
            _observation(
                "zero-mean",
                [1 if flag else -1 for flag in zero],
                f"the mean of φ(d⁺, d⁻) goes for {means}; it ends within .05 of 0 in {_count(zero)} encoders.",
            ),
            _observation(
                "skew",
                [1 if flag else -1 for flag in skew],
                f"at the end the maximum is further from the mean than the minimum in {_count(skew)} encoders {counts}.",
            ),
            _observation(
                "converge",
                weights,
                f"{text} ({_plain(start)} apart at first, {_plain(end)} in the end).",
            ),
        ]
    )


# --- Tables -----------------------------------------------------------------------------------------------------------


def table1(data: pd.DataFrame, *, labels: Labels = None, published: Published | None = None) -> str:
    """How much of which encoder is trained. ``data``: encoder, parameters, trained, dimensions."""
    require(data, ["encoder", "parameters", "trained", "dimensions"], "table1")
    parts = [
        f"{encoder_label(r['encoder'], labels)} trains {r['trained'] / r['parameters']:.0%} of its"
        f" {r['parameters'] / 1e6:.3g}M parameters"
        for r in _records(data)
    ]
    ours, theirs = (
        ", ".join(map(str, sorted(set(values))))
        for values in (
            data["dimensions"],
            (published or load()).tables[1]["dimensions"],
        )
    )
    return _bullets([f"{'; '.join(parts)}. Embeddings have {ours} dimensions (paper: {theirs})."])


def table2(data: pd.DataFrame, *, published: Published | None = None) -> str:
    """Table 2 on this run: do relevance and loss of the negatives fall with their target, as the paper's text says?

    ``data``: role, rho, target, loss_table, loss_equation.
    """
    require(data, ["role", "rho", "target", "loss_table", "loss_equation"], "table2")
    roles = ["d-max", "d-mid", "d-min"]
    rows = data.set_index("role").loc[roles]
    printed = (published or load()).tables[2].set_index("role")

    def falls(values: Iterable[Any]) -> str:
        numbers = [float(value) for value in values]
        return "falls" if all(a > b for a, b in pairwise(numbers)) else "does not fall"

    def listed(column: str) -> str:
        return ", ".join(f"{value:.3f}".replace("-", "−") for value in rows[column])

    rho, loss = falls(printed.loc[roles, "rho"]), falls(printed.loc[roles, "loss"])
    return _bullets(
        [
            f"From the highest to the lowest target ({listed('target')}) the relevance of the negatives"
            f" {falls(rows['rho'])} ({listed('rho')}). The paper's text says that it falls; in its printed numbers it {rho}.",
            f"The loss as the paper prints it {falls(rows['loss_table'])} with the target ({listed('loss_table')}); in the"
            f" paper it {loss}. By Equation 3 it {falls(rows['loss_equation'])} ({listed('loss_equation')}).",
        ]
    )


def table3(data: pd.DataFrame, *, published: Published | None = None) -> str:
    """Section 5.4 on this run: which target is best where, equivalence, time and data, with the paper's counts.

    ``data`` as for `tables.table3`.
    """
    columns = [
        "encoder",
        "target",
        "in_batch",
        "set",
        "measure",
        "best",
        "high",
        "equivalent",
        "seconds",
        "triples",
    ]
    require(data, [*columns, "run_id", "reference_run_id"], "table3")
    paper = _published3(published or load())
    measures, printed = _unique(data["measure"]), _unique(paper["measure"])
    ranking, recall = (measures[0], printed[0]), (measures[-1], printed[-1])
    bullets = []
    for (ours, theirs), target, in_batch, flags, words in (
        (ranking, "static", False, ["best"], "static targets without in-batch negatives have the highest"),
        (ranking, "distributed", False, ["best", "equivalent"], "distributed targets are best or equivalent to the best in"),
        (recall, "adaptive", True, ["best"], "adaptive targets with in-batch negatives have the highest"),
        (recall, "distributed", False, ["best", "equivalent"], "distributed targets are best or equivalent to the best in"),
    ):  # fmt: skip
        here, there = (
            _flags(f, m, target, in_batch, flags) for f, m in ((data, ours), (paper, theirs))
        )
        bullets.append(
            f"**{_shares(here, there)}**: {words} {measure_label(ours)} in {_count(here)} pairs of encoder and test set"
            f" (paper, {theirs}: {_count(there)})."
        )
    tested = _records(data[data["run_id"] != data["reference_run_id"]])
    same = [bool(r["equivalent"]) for r in tested]
    below = [r["high"] < 0 for r in tested]
    both = sum(a and b for a, b in zip(same, below, strict=True))
    neither = sum(not a and not b for a, b in zip(same, below, strict=True))
    bullets.append(
        f"Comparisons with the best: {len(tested)}. Equivalent: {sum(same)}; lower, with an interval that excludes 0:"
        f" {sum(below)}, of which {both} are equivalent all the same (lower, but within the margin); undecided: {neither}."
    )
    distributed, adaptive = [("distributed", False)], [("adaptive", False), ("adaptive", True)]
    times = [
        _ratios(frame, "seconds", v) for v in (distributed, adaptive) for frame in (data, paper)
    ]
    slower = [ratio > 1 for ratio in [*times[0], *times[2]]]
    bullets.append(
        f"**{_shares(slower, [r > 1 for r in [*times[1], *times[3]]])}**: with its sweep a static target took"
        f" {_times(times[0])} the training time of distributed targets (paper: {_times(times[1])}) and {_times(times[2])}"
        f" that of adaptive ones (paper: {_times(times[3])})."
    )
    here, there = (
        [r > 1 for r in _ratios(f, "triples", [*distributed, *adaptive])] for f in (data, paper)
    )
    bullets.append(
        f"**{_shares(here, there)}**: adaptive and distributed targets saw fewer triples than static ones in"
        f" {_count(here)} comparisons (paper: {_count(there)})."
    )
    return _bullets(bullets)


def table4(data: pd.DataFrame, *, published: Published | None = None) -> str:
    """Section 5.5 on this run: self-distillation against the reference, BM25, the untrained encoder, and ε = 1.

    ``data`` as for `tables.table4`; rows with a published source are left out.
    """
    columns = [
        "block",
        "loss",
        "in_batch",
        "source",
        "set",
        "measure",
        "value",
        "difference",
        "low",
        "high",
        "equivalent",
    ]
    require(data, [*columns, "triples", "run_id", "reference_run_id"], "table4")
    data = data[~data["source"].astype(str).str.startswith(("published", "supplied"))]
    main = str(data["measure"].iloc[0])
    name = measure_label(main)
    tops = [
        max(_records(rows), key=lambda r: r["value"])
        for _, rows in data.groupby(["set", "measure"], sort=False)
    ]
    listed = ", ".join(
        f"{r['set']} {measure_label(r['measure'])} {_loss(r)} ({score(r['value'])})" for r in tops
    )
    bullets = [f"Highest in this run: {listed}."]

    runs = {
        key: _records(own)
        for key, own in data[data["measure"] == main].groupby(["loss", "in_batch"], sort=False)
    }
    reference = next(
        (r for rows in runs.values() for r in rows if r["run_id"] == r["reference_run_id"]), None
    )
    distributed: dict[str, float] = {}
    for rows in runs.values():
        if rows[0]["block"].lower() != "self-distillation" or reference is None:
            continue
        results = "; ".join(f"{_against(r)} on {r['set']}" for r in rows)
        bullets.append(f"{_loss(rows[0])} against {_loss(reference)}, {name}: {results}.")
        if rows[0]["loss"] == "Distributed":
            distributed = {r["set"]: r["value"] for r in rows}
    for rows in runs.values():
        if (
            rows[0]["triples"] > 0 or not distributed
        ):  # what was not trained: BM25, the encoder as it comes
            continue
        differences = [distributed[r["set"]] - r["value"] for r in rows]
        bullets.append(
            f"Distributed targets score higher than {_loss(rows[0])} in {name} on {_count(d > 0 for d in differences)} test"
            f" sets in this run ({_range(differences)})."
        )
    bullets += _tuned(data, published or load())
    bullets.append(
        "Teacher distillation was not run: how self-distillation compares with it is known from the published numbers only."
    )
    return _bullets(bullets)


def _published3(published: Published) -> pd.DataFrame:
    """Table 3 as printed, with the columns and conventions of this project's own frame."""
    scores = published.scores(3)
    distributed = scores["target"] == "distributed"
    return scores.assign(
        encoder=scores["model"],
        in_batch=(scores["in_batch"] == "✓") & ~distributed,
        best=scores["bold"],
        equivalent=scores["dagger"],
        seconds=60 * scores["time"].map(minutes),
        triples=scores["triples"].map(count),
    )


def _flags(
    data: pd.DataFrame, measure: str, target: str, in_batch: bool, columns: Sequence[str]
) -> list[bool]:
    """Per encoder and set: is one of the flags set for this variant?"""
    rows = data[(data["measure"] == measure) & (data["target"] == target)]
    return [
        any(bool(r[c]) for c in columns) for r in _records(rows) if bool(r["in_batch"]) == in_batch
    ]


def _ratios(data: pd.DataFrame, column: str, variants: Iterable[tuple[str, bool]]) -> list[float]:
    """Per encoder, static over each variant with the same in-batch setting (distributed: static without)."""
    runs = {
        (r["encoder"], r["target"], bool(r["in_batch"])): float(r[column]) for r in _records(data)
    }
    return [
        value / runs[encoder, variant, side]
        for (encoder, target, in_batch), value in runs.items()
        for variant, side in variants
        if target == "static" and side == in_batch and runs.get((encoder, variant, side))
    ]


def _tuned(data: pd.DataFrame, published: Published) -> list[str]:
    """Tuned ε against ε = 1, per measure, beside the paper's differences."""

    def differences(frame: pd.DataFrame) -> dict[str, list[float]]:
        values = {
            (r["loss"], r["in_batch"], r["set"], r["measure"]): r["value"] for r in _records(frame)
        }
        found: dict[str, list[float]] = {}
        for (loss, in_batch, name, measure), value in values.items():
            default = values.get(("Static (ε = 1)", "✗", name, measure))
            if (loss, in_batch) == ("Static (tuned)", "✗") and default is not None:
                found.setdefault(measure, []).append(value - default)
        return found

    ours, theirs = differences(data), differences(published.scores(4))
    if not ours:
        return []
    here, there = ([d > 0 for own in each.values() for d in own] for each in (ours, theirs))
    parts = [
        f"{measure_label(m)} {_range(own)} (paper: {p} {_range(printed, 2)})"
        for (m, own), (p, printed) in zip(ours.items(), theirs.items(), strict=False)
    ]
    return [
        f"**{_shares(here, there)}**: a tuned static target scores higher than ε = 1 in {_count(here)} pairs of test set"
        f" and measure of this run; {', '.join(parts)}."
    ]


def _loss(row: Mapping[str, Any]) -> str:
    side = {"✓": " with in-batch negatives", "✗": " without in-batch negatives"}.get(
        row["in_batch"], ""
    )
    return row["loss"] + ("" if row["loss"] in ("Distributed", "Static (ε = 1)") else side)


def _against(row: Mapping[str, Any]) -> str:
    if row["run_id"] == row["reference_run_id"]:
        return f"the reference itself ({score(row['value'])})"
    side = "higher" if row["low"] > 0 else "lower" if row["high"] < 0 else ""
    words = [side, "equivalent" if bool(row["equivalent"]) else ""]
    verdict = " but ".join(filter(None, words)) or "undecided"
    return f"{signed(row['difference'])} [{signed(row['low'])}, {signed(row['high'])}], {verdict}"


# --- words ------------------------------------------------------------------------------------------------------------


def _weigh(difference: float, noise: float | None) -> int:
    """1 or -1 by the sign of a difference, 0 where it is within the noise."""
    return int(difference > (noise or 0)) - int(difference < -(noise or 0))


def _observation(id: str, weights: Sequence[int], text: str, noise: float | None = None) -> str:
    """A sentence on one of the paper's observations, headed by how the cases agree with it (1, -1, 0: undecided).

    Without ``noise`` nothing says how far runs differ by chance, so the agreement is one "in this run".
    """
    entry = load().observation(id)
    if not any(weights):
        head = "Not decided by this run"
    else:
        agree = "As in" if min(weights) > 0 else "Partly as in" if max(weights) > 0 else "Unlike"
        head = f"{agree} the paper" + (", in this run" if noise is None else "")
    said = entry["text"][0].lower() + entry["text"][1:]
    return f"**{head}** (Section {entry['section']}, {entry['number']}): {text} *The paper: {said}*"


def _majority(flags: Sequence[bool]) -> int:
    """1 if more than half of the flags are set, -1 if fewer, 0 for exactly half, which decides nothing."""
    return _weigh(2 * sum(flags) - len(flags), None)


def _shares(ours: Sequence[bool], theirs: Sequence[bool]) -> str:
    """How two shares of cases compare: within a sixth of each other, on the same side of one half, or neither."""
    if not ours or not theirs:
        return "Not decided by this run"
    apart = abs(sum(ours) * len(theirs) - sum(theirs) * len(ours))  # the difference, times both
    if 6 * apart <= len(ours) * len(theirs):
        return "As in the paper"
    same_side = _majority(ours) * _majority(theirs) > 0
    return "Partly as in the paper" if same_side else "Unlike the paper"


def _count(flags: Iterable[Any]) -> str:
    values = [bool(flag) for flag in flags]
    return f"{sum(values)} of {len(values)}"


def _plain(value: float) -> str:
    """A cosine or a difference of two: .18, −.05, 1.20."""
    text = f"{value:.2f}".replace("-", "−")
    return text.replace("0.", ".", 1) if text.lstrip("−").startswith("0.") else text


def _range(values: Sequence[float], decimals: int = 3) -> str:
    low, high = signed(min(values), decimals), signed(max(values), decimals)
    return low if low == high else f"{low} to {high}"


def _times(ratios: Sequence[float]) -> str:
    low, high = f"{min(ratios):.1f}", f"{max(ratios):.1f}"
    return f"{low} times" if low == high else f"{low} to {high} times"


def _bullets(texts: Iterable[str]) -> str:
    return "\n".join(f"- {text}" for text in texts)


def _records(data: pd.DataFrame) -> list[dict[str, Any]]:
    return [{str(key): value for key, value in row.items()} for row in data.to_dict("records")]


def _unique(values: pd.Series) -> list[Any]:
    return list(dict.fromkeys(values))
