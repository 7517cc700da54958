"""Paired t tests of equivalence (TOST) and of difference."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from scipy.special import stdtr, stdtrit  # Student's t; scipy.stats takes a second to import

_CONSTANT = 1e-12  # differences of measures that spread less are equal but for rounding


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
    (p = 0) if that difference is below the margin, else not (p = 1). Two runs with the value 0 for
    every query, which find nothing, are not equivalent (p = 1).

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
        p = 0.0 if abs(difference) < margin - _CONSTANT and (x.any() or y.any()) else 1.0
    else:
        p = max(_p_above(x - y, -margin), _p_above(y - x, -margin))
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
        p = 2 * min(_p_above(x - y, 0), _p_above(y - x, 0))
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
    mean, half = differences.mean(), stdtrit(len(differences) - 1, 1 - alpha / 2)
    half *= _standard_error(differences)
    return float(mean - half), float(mean + half)


def _p_above(differences: np.ndarray, bound: float) -> float:
    """p-value of the one-sided t test that the mean of the differences is above ``bound``."""
    t = (differences.mean() - bound) / _standard_error(differences)
    return float(stdtr(len(differences) - 1, -t))


def _standard_error(differences: np.ndarray) -> float:
    return float(differences.std(ddof=1)) / math.sqrt(len(differences))


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
