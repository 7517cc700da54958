"""Measures (ir_measures), and paired tests of equivalence and of difference (statsmodels)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import ir_measures
import numpy as np
from statsmodels.stats.weightstats import DescrStatsW, ttost_paired

from adaptive_margins.data.trec import Qrels, Run, top

_CONSTANT = 1e-12  # differences of measures that spread less are equal but for rounding


@dataclass(frozen=True)
class Evaluation:
    """What a run scores.

    Attributes:
        mean: measure → mean over the queries of the qrels.
        per_query: measure → query id → value.
    """

    mean: dict[str, float]
    per_query: dict[str, dict[str, float]]


def evaluate(qrels: Qrels, run: Run, measures: Sequence[str]) -> Evaluation:
    """Score a run by measures in ir_measures' notation, e.g. "nDCG@10" or "Success(rel=2)@5".

    Each query of the qrels counts; one without hits, or without a relevant passage, counts 0.
    Queries of the run that the qrels do not judge are ignored. Hits are ranked as trec_eval does
    (`top`), whatever tool computes the measure.

    Raises:
        ValueError: there are no qrels or no measures, a measure is unknown or cannot be computed,
            or a score is not a finite number.
    """
    if not qrels:
        raise ValueError("the qrels are empty: there is no query to evaluate")
    if not measures:
        raise ValueError("no measure was given")
    parsed = {notation: _measure(notation) for notation in measures}
    # Ranks in place of scores: every tool then sees the order that trec_eval would.
    ranked = {
        qid: {docid: -float(rank) for rank, (docid, _) in enumerate(top(hits), start=1)}
        for qid, hits in run.items()
        if qid in qrels
    }
    per_query: dict[str, dict[str, float]] = {m: dict.fromkeys(qrels, 0.0) for m in parsed}
    for notation, measure in parsed.items():
        for metric in ir_measures.iter_calc([measure], qrels, ranked):
            per_query[notation][metric.query_id] = float(metric.value)
    mean = {m: float(np.mean(list(values.values()))) for m, values in per_query.items()}
    return Evaluation(mean, per_query)


@dataclass(frozen=True)
class Equivalence:
    """The outcome of a paired TOST of two runs a and b.

    Attributes:
        n: queries.
        difference: mean of a - b.
        low, high: the interval at confidence 1 - 2 · alpha / comparisons around the difference; it
            lies within ±margin if and only if the runs are equivalent.
        p: the larger p-value of the two one-sided t tests.
        p_adjusted: p times the number of comparisons (Bonferroni), at most 1.
        equivalent: whether p · comparisons < alpha.
    """

    n: int
    difference: float
    low: float
    high: float
    p: float
    p_adjusted: float
    equivalent: bool


def paired_tost(
    a: Mapping[str, float],
    b: Mapping[str, float],
    *,
    margin: float = 0.05,
    alpha: float = 0.05,
    comparisons: int = 1,
) -> Equivalence:
    """Two one-sided paired t tests: are two runs equivalent within ±margin (paper, Section 5.4)?

    Args:
        a: query id → value of a measure.
        b: the same queries → value.
        margin: the largest mean difference that still counts as equivalent (the paper's ε_L = .05).
        alpha: significance level of the whole group of comparisons.
        comparisons: tests in the group (Bonferroni).

    If all differences are equal there is no variance to test against: the runs are equivalent
    (p = 0) if that difference is below the margin, else not (p = 1).

    Raises:
        ValueError: the queries differ, are fewer than 2, or a value is not finite; or margin,
            alpha or comparisons make no sense.
    """
    if not margin > 0:
        raise ValueError(f"margin must be above 0, not {margin}")
    if not 0 < alpha < 0.5:
        raise ValueError(f"alpha must lie between 0 and 0.5, not {alpha}")
    if comparisons < 1:
        raise ValueError(f"comparisons must be at least 1, not {comparisons}")
    x, y = _paired(a, b)
    difference = float((x - y).mean())
    if np.ptp(x - y) <= _CONSTANT:
        low = high = difference
        p = 0.0 if abs(difference) < margin - _CONSTANT else 1.0
    else:
        p = float(ttost_paired(x, y, -margin, margin)[0])
        low, high = _interval(x - y, 2 * alpha / comparisons)
    adjusted = min(1.0, p * comparisons)
    return Equivalence(len(x), difference, low, high, p, adjusted, adjusted < alpha)


@dataclass(frozen=True)
class Comparison:
    """Two runs a and b, by a paired t test and a paired TOST over their queries.

    Attributes:
        n: queries.
        difference: mean of a - b.
        ci: the 95 % paired t interval of it, (low, high), whatever alpha and comparisons are.
        p_t: p-value of the two-sided paired t test.
        p_tost: the larger p-value of the two one-sided tests (`paired_tost`). Neither is corrected
            for the number of comparisons; the verdict is.
        margin: the largest mean difference that counts as equivalent.
        verdict: of `compare` "equivalent", "different" or "undecided"; of `superiority` "better",
            "worse" (a than b), "equivalent" or "undecided".
    """

    n: int
    difference: float
    ci: tuple[float, float]
    p_t: float
    p_tost: float
    margin: float
    verdict: str


def compare(
    a: Mapping[str, float],
    b: Mapping[str, float],
    *,
    margin: float = 0.05,
    alpha: float = 0.05,
    comparisons: int = 1,
) -> Comparison:
    """Are two runs equivalent within ±margin? If that is not shown, are they different?

    "equivalent" if p_tost · comparisons < alpha; else "different" if p_t · comparisons < alpha;
    else "undecided": there are too few queries to tell. Equivalent runs may differ significantly,
    by less than the margin.

    Arguments and errors are those of `paired_tost`. If all differences are equal, p_t is 1 if they
    are zero, else 0.
    """
    tost = paired_tost(a, b, margin=margin, alpha=alpha, comparisons=comparisons)
    difference, low, high = paired_interval(a, b)
    x, y = _paired(a, b)
    if np.ptp(x - y) <= _CONSTANT:
        p = 1.0 if abs(difference) <= _CONSTANT else 0.0
    else:
        p = float(DescrStatsW(x - y).ttest_mean(0)[1])
    different = p * comparisons < alpha
    verdict = "equivalent" if tost.equivalent else "different" if different else "undecided"
    return Comparison(tost.n, difference, (low, high), p, tost.p, margin, verdict)


def superiority(
    a: Mapping[str, float],
    b: Mapping[str, float],
    *,
    margin: float = 0.05,
    alpha: float = 0.05,
) -> Comparison:
    """Is run a better than run b, or worse? If neither is shown, are they equivalent?

    "better" or "worse" if p_t < alpha, by the sign of a - b, however small the difference; else
    "equivalent" if p_tost < alpha; else "undecided". Arguments and errors are those of `compare`.
    """
    found = compare(a, b, margin=margin, alpha=alpha)
    if found.p_t < alpha:
        return replace(found, verdict="better" if found.difference > 0 else "worse")
    return found


def paired_interval(
    a: Mapping[str, float], b: Mapping[str, float], *, confidence: float = 0.95
) -> tuple[float, float, float]:
    """Mean of a - b over the queries, and its paired t interval: (difference, low, high).

    Raises:
        ValueError: as `paired_tost`, or confidence is not between 0 and 1.
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, not {confidence}")
    x, y = _paired(a, b)
    return (float((x - y).mean()), *_interval(x - y, 1 - confidence))


def _interval(differences: np.ndarray, alpha: float) -> tuple[float, float]:
    low, high = DescrStatsW(differences).tconfint_mean(alpha=alpha)
    return float(low), float(high)


def _paired(a: Mapping[str, float], b: Mapping[str, float]) -> tuple[np.ndarray, np.ndarray]:
    for name, missing in (
        ("first", sorted(b.keys() - a.keys())),
        ("second", sorted(a.keys() - b.keys())),
    ):
        if missing:
            raise ValueError(
                f"{len(missing)} queries are missing in the {name} run, e.g. {missing[:3]}"
            )
    qids = sorted(a)
    if len(qids) < 2:
        raise ValueError(f"a paired test needs at least 2 queries, got {len(qids)}")
    x, y = (np.array([values[q] for q in qids], np.float64) for values in (a, b))
    if len(wrong := np.flatnonzero(~np.isfinite(x) | ~np.isfinite(y))):
        raise ValueError(
            f"query {qids[wrong[0]]!r} has a value that is not finite: {x[wrong[0]]}, {y[wrong[0]]}"
        )
    return x, y


def named(measure: str) -> str:
    """The measure with the relevance level 1 in its name if it needs one and none is given.

    "R@100" is "R(rel=1)@100"; "Success(rel=2)@5" and measures of grades, like "nDCG@10", stay as
    they are. ir_measures' own default is 1, too: the values are the same.

    Raises:
        ValueError: the measure is unknown or cannot be computed.
    """
    parsed = _measure(measure)
    level = parsed.SUPPORTED_PARAMS.get("rel")
    if level is None or level.default != 1 or "rel" in parsed.params:
        return measure
    values = {"rel": 1, **parsed.params}
    cutoff = values.pop(parsed.AT_PARAM, None)
    name = f"{parsed.NAME}({','.join(f'{key}={value!r}' for key, value in values.items())})"
    return name if cutoff is None else f"{name}@{cutoff}"


def _measure(notation: str) -> ir_measures.Measure:
    """Parse and check a measure; ir_measures itself accepts some that later crash, such as nDCG@-3."""
    try:
        measure = ir_measures.parse_measure(notation)
        measure.validate_params()
        for name in ("cutoff", "rel"):
            if (value := measure.params.get(name, 1)) < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        ir_measures.evaluator([measure], {})
    except (AssertionError, KeyError, NameError, SyntaxError, TypeError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else "invalid parameters"
        raise ValueError(
            f"cannot compute the measure {notation!r} ({reason});"
            ' examples of measures: "nDCG@10", "Success(rel=2)@5", "R(rel=2)@50", "RR(rel=2)@10"'
        ) from error
    return measure
