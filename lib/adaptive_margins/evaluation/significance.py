"""Paired tests of two runs over the same queries: equivalence (TOST) and difference (t test)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.special import stdtr, stdtrit  # Student's t; scipy.stats takes a second to import

Verdict = Literal["better", "worse", "equivalent", "undecided"]

_CONSTANT = 1e-12  # differences of measures that spread less are equal but for rounding


@dataclass(frozen=True)
class Comparison:
    """Run a compared with run b over the same queries.

    Attributes:
        n: queries.
        difference: mean of a − b.
        ci: its 95 % confidence interval (paired t), not adjusted for others.
        p_t: two-sided p-value of the paired t test that the mean difference is 0.
        p_tost: p-value of TOST, the larger one of its two one-sided paired t tests.
        margin: the largest mean difference that counts as equivalent.
        verdict: "better" or "worse" (a than b), "equivalent", or "undecided".
    """

    n: int
    difference: float
    ci: tuple[float, float]
    p_t: float
    p_tost: float
    margin: float
    verdict: Verdict


def compare(
    a: Mapping[str, float],
    b: Mapping[str, float],
    *,
    margin: float = 0.05,
    alpha: float = 0.05,
    comparisons: int = 1,
    however_small: bool = False,
) -> Comparison:
    """Test whether run a is equivalent to run b (TOST; paper, Section 5.4), better or worse.

    The verdict is "equivalent" if p_tost · comparisons < alpha; else "better" or "worse" if
    p_t · comparisons < alpha; else "undecided".

    Args:
        a: query id → value of a measure.
        b: the same queries → value.
        margin: the largest mean difference that counts as equivalent (the paper's ε_L = .05).
        alpha: significance level of all comparisons of a group together.
        comparisons: number of comparisons in the group (Bonferroni).
        however_small: a significant difference below the margin is "better" or "worse" instead of
            "equivalent".

    If all differences are equal, p_tost is 0 if they are smaller than the margin, else 1; p_t is 1
    if they are zero, else 0. Two runs with the value 0 for every query are "undecided".

    Raises:
        ValueError: the queries differ, are fewer than 2, or a value is not finite; or ``margin``,
            ``alpha`` or ``comparisons`` is out of range.
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
        something = bool(x.any() or y.any())
        p_t = 1.0 if abs(difference) <= _CONSTANT else 0.0
        p_tost = 0.0 if abs(difference) < margin - _CONSTANT and something else 1.0
    else:
        p_t = 2 * min(_p_above(x - y, 0), _p_above(y - x, 0))
        p_tost = max(_p_above(x - y, -margin), _p_above(y - x, -margin))
    equivalent, different = p_tost * comparisons < alpha, p_t * comparisons < alpha
    verdict: Verdict = "undecided"
    if equivalent and not (different and however_small):
        verdict = "equivalent"
    elif different:
        verdict = "better" if difference > 0 else "worse"
    return Comparison(len(x), difference, _interval(x - y, 0.05), p_t, p_tost, margin, verdict)


def paired_interval(
    a: Mapping[str, float], b: Mapping[str, float], *, confidence: float = 0.95
) -> tuple[float, float, float]:
    """Return mean of a − b and its paired t confidence interval: (difference, low, high).

    At confidence 1 − 2 · alpha / comparisons it lies within ±margin if and only if `compare` finds
    the runs equivalent.

    Raises:
        ValueError: as `compare`, or confidence is not between 0 and 1.
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
    """p-value of the one-sided t test that the mean difference is above ``bound``."""
    t = (differences.mean() - bound) / _standard_error(differences)
    return float(stdtr(len(differences) - 1, -t))


def _standard_error(differences: np.ndarray) -> float:
    return float(differences.std(ddof=1)) / math.sqrt(len(differences))


def _paired(a: Mapping[str, float], b: Mapping[str, float]) -> tuple[np.ndarray, np.ndarray]:
    for name, missing in (("first", b.keys() - a.keys()), ("second", a.keys() - b.keys())):
        if missing:
            some = sorted(missing)[:3]
            raise ValueError(f"{len(missing)} queries are missing in the {name} run, e.g. {some}")
    qids = sorted(a)
    if len(qids) < 2:
        raise ValueError(f"a paired test needs at least 2 queries, got {len(qids)}")
    x, y = (np.array([values[q] for q in qids], np.float64) for values in (a, b))
    if len(wrong := np.flatnonzero(~np.isfinite(x) | ~np.isfinite(y))):
        first = wrong[0]
        raise ValueError(
            f"query {qids[first]!r} has a value that is not finite: {x[first]}, {y[first]}"
        )
    return x, y
