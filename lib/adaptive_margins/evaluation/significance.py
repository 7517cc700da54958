"""Paired tests of two systems over the same queries: equivalence (TOST) and difference (t test).

A system may have been trained with several seeds. The tests are then about other queries *and*
other seeds. With differences D[q, s] = μ + query_q + seed_s + rest_qs, all three effects random,
the variance of their mean is (MS_query + MS_seed − MS_rest) / (Q S), from the mean squares of a
two-way layout without replication, and its degrees of freedom are Satterthwaite's (Biometrics
Bulletin 2, 1946), at least 1: as MS_rest is subtracted, they could be near 0, and the interval as
wide as 10¹⁷. Where seeds differ by no more than chance, the variance is MS_query / (Q S): that of
the paired t test of each query's mean over the seeds.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from scipy.special import stdtr, stdtrit  # Student's t; scipy.stats takes a second to import

Verdict = Literal["better", "worse", "equivalent", "undecided"]
Scores = Mapping[str, float] | Sequence[Mapping[str, float]]
"""Query id → value of a measure; or a list of these, one for each seed."""

FEWEST = 10
"""Queries with a relevant passage that a verdict needs."""
RESAMPLES = 10_000
POWER = 0.8
_CONSTANT = 1e-12  # differences whose mean has a smaller standard error vary by rounding alone


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
    a: Scores,
    b: Scores,
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
        a: query id → value of a measure; or a list of these, one for each seed.
        b: the same queries → value. If both have several seeds, they are paired in their order; one
            with a single seed, or none, is compared with each of the other's.
        margin: the largest mean difference that counts as equivalent (the paper's ε_L = .05).
        alpha: significance level of all comparisons of a group together.
        comparisons: number of comparisons in the group (Bonferroni).
        however_small: a significant difference below the margin is "better" or "worse" instead of
            "equivalent".

    If the differences do not vary, p_tost is 0 if they are smaller than the margin, else 1; p_t is
    1 if they are zero, else 0. Two runs with the value 0 for every query are "undecided".

    Raises:
        ValueError: the queries differ, are fewer than 2, or a value is not finite; both have
            several seeds, but not equally many; or ``margin``, ``alpha`` or ``comparisons`` is out
            of range.
    """
    if not margin > 0:
        raise ValueError(f"margin must be above 0, not {margin}")
    if not 0 < alpha < 0.5:
        raise ValueError(f"alpha must lie between 0 and 0.5, not {alpha}")
    if comparisons < 1:
        raise ValueError(f"comparisons must be at least 1, not {comparisons}")
    x, y = _paired(a, b)
    found = _estimate(x - y)
    difference = found.mean
    if found.error <= _CONSTANT:
        something = bool(x.any() or y.any())
        p_t = 1.0 if abs(difference) <= _CONSTANT else 0.0
        p_tost = 0.0 if abs(difference) < margin - _CONSTANT and something else 1.0
    else:
        p_t = 2 * min(found.p_above(0), found.p_below(0))
        p_tost = max(found.p_above(-margin), found.p_below(margin))
    equivalent, different = p_tost * comparisons < alpha, p_t * comparisons < alpha
    verdict: Verdict = "undecided"
    if equivalent and not (different and however_small):
        verdict = "equivalent"
    elif different:
        verdict = "better" if difference > 0 else "worse"
    return Comparison(len(x), difference, found.interval(0.05), p_t, p_tost, margin, verdict)


def paired_interval(
    a: Scores, b: Scores, *, confidence: float = 0.95
) -> tuple[float, float, float]:
    """Mean of a − b over the queries (and seeds), and its t interval: (difference, low, high).

    At confidence 1 − 2 · alpha / comparisons it lies within ±margin if and only if `compare` finds
    the runs equivalent. Raises ValueError as `compare` does.
    """
    x, y = _paired(a, b)
    found = _estimate(x - y)
    return (found.mean, *found.interval(1 - confidence))


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust p-values for their number (Holm, Scandinavian Journal of Statistics 6, 1979).

    If those below α are called significant, the probability of any error is at most α.
    """
    p = np.asarray(p_values, np.float64)
    order, adjusted = p.argsort(), np.empty_like(p)
    adjusted[order] = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)).clip(max=1)
    return adjusted.tolist()


def randomisation_test(differences: np.ndarray) -> list[float]:
    """Two-sided p-values of mean differences by random flips of signs (Smucker et al., CIKM 2007).

    ``differences`` are (Q, P), a row per query and a column per pair of runs, which share the
    `RESAMPLES` flips: (1 + resamples whose mean is at least as far from 0) / (1 + resamples).
    """
    rng, queries = np.random.default_rng(1), len(differences)
    reached = abs(differences.sum(axis=0)) - 1e-9  # but for rounding
    count = np.ones(differences.shape[1])
    block = max(1, (1 << 22) // max(differences.shape))
    for start in range(0, RESAMPLES, block):
        flips = rng.integers(0, 2, (min(block, RESAMPLES - start), queries), np.int8)
        count += (abs((1.0 - 2.0 * flips) @ differences) >= reached).sum(axis=0)
    return (count / (1 + RESAMPLES)).tolist()


def more_queries(found: Comparison, alpha: float) -> dict[str, int | str]:
    """Estimate how many ``more`` queries would decide an undecided comparison of one seed each.

    With them, the *t* test or TOST, whichever needs fewer (``would_show``), has the power `POWER`
    at level ``alpha`` if the true mean and standard deviation are the observed ones. The number is
    rounded to two digits.
    """
    (low, high), size = found.ci, abs(found.difference)
    spread = (high - low) / 2 / stdtrit(found.n - 1, 0.975) * math.sqrt(found.n)

    def powers(n: int) -> tuple[float, float]:
        bounds = np.array([size, found.margin - size, found.margin + size]) * math.sqrt(n) / spread
        t = stdtrit(n - 1, 1 - np.array([alpha / 2, alpha, alpha]))
        different, above, below = stdtr(n - 1, bounds - t).tolist()
        return different, above + below - 1

    n = bisect_left(range(1 << 50), POWER, lo=found.n + 1, key=lambda n: max(powers(n)))
    shown = "a difference" if powers(n)[0] >= POWER else "equivalence"
    return {"more": round(float(f"{n - found.n:.2g}")), "would_show": shown}


class _Estimate(NamedTuple):
    """A mean, its standard error, and the degrees of freedom of that."""

    mean: float
    error: float
    freedom: float

    def interval(self, alpha: float) -> tuple[float, float]:
        half = float(stdtrit(self.freedom, 1 - alpha / 2)) * self.error
        return self.mean - half, self.mean + half

    def p_above(self, bound: float) -> float:
        """p-value of the one-sided t test that the mean is above ``bound``."""
        return float(stdtr(self.freedom, (bound - self.mean) / self.error))

    def p_below(self, bound: float) -> float:
        return float(stdtr(self.freedom, (self.mean - bound) / self.error))


def _estimate(differences: np.ndarray) -> _Estimate:
    """The mean of differences, (Q, S): over queries and seeds, both random."""
    q, s = differences.shape
    mean = float(differences.mean())
    of_queries, of_seeds = differences.mean(1), differences.mean(0)
    ms_query = s * float(of_queries.var(ddof=1))
    if s > 1:
        ms_seed = q * float(of_seeds.var(ddof=1))
        rest = differences - of_queries[:, None] - of_seeds + mean
        ms_rest = float((rest**2).sum()) / ((q - 1) * (s - 1))
        if ms_seed > ms_rest:
            square = ms_query + ms_seed - ms_rest
            parts = ms_query**2 / (q - 1) + ms_seed**2 / (s - 1)
            parts += ms_rest**2 / ((q - 1) * (s - 1))
            return _Estimate(mean, math.sqrt(square / (q * s)), max(1.0, square**2 / parts))
    return _Estimate(mean, math.sqrt(ms_query / (q * s)), q - 1)


def _paired(a: Scores, b: Scores) -> tuple[np.ndarray, np.ndarray]:
    """The values of both, (Q, S), in the same order of queries and seeds."""
    first, second = ([x] if isinstance(x, Mapping) else list(x) for x in (a, b))
    seeds = max(len(first), len(second))
    if not {len(first), len(second)} <= {1, seeds}:
        raise ValueError(f"{len(first)} seeds cannot be paired with {len(second)}")
    if seeds > 1:
        first, second = (x * seeds if len(x) == 1 else x for x in (first, second))
    columns = [_paired_queries(x, y) for x, y in zip(first, second, strict=True)]
    if any(x.keys() != first[0].keys() for x in first):
        raise ValueError("the seeds of a run have scores of different queries")
    x, y = (np.stack(values, axis=1) for values in zip(*columns, strict=True))
    return x, y


def _paired_queries(
    a: Mapping[str, float], b: Mapping[str, float]
) -> tuple[np.ndarray, np.ndarray]:
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
