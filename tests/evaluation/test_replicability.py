"""Measures of replication against naive loops, and the examples of Breuer et al. (SIGIR 2020)."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from adaptive_margins.evaluation.replicability import (
    effects,
    kendall_union,
    rank_biased_overlap,
    rmse,
)


def rankings(seed, depth=8):
    rng = np.random.default_rng(seed)
    return [[f"d{i}" for i in rng.permutation(12)[:depth]] for _ in range(2)]


def test_the_papers_example_of_kendalls_tau_of_unions():
    assert kendall_union(["d1", "d2", "d3"], ["d1", "d2", "d4"]) == pytest.approx(1)
    assert kendall_union(["d1", "d2"], ["d2", "d1"]) == pytest.approx(-1)
    assert math.isnan(kendall_union(["d1"], ["d1"]))


@pytest.mark.parametrize("seed", range(5))
def test_rankings_against_naive_loops(seed):
    a, b = rankings(seed)
    union = list(dict.fromkeys(a + b))
    x, y = ([union.index(d) for d in side] for side in (a, b))
    pairs = list(itertools.combinations(range(len(a)), 2))
    concordant = sum(np.sign(x[i] - x[j]) * np.sign(y[i] - y[j]) for i, j in pairs)
    assert kendall_union(a, b) == pytest.approx(concordant / len(pairs), abs=1e-12)

    p, total = 0.8, 0.0
    for depth in range(1, len(a) + 1):
        total += p ** (depth - 1) * len(set(a[:depth]) & set(b[:depth])) / depth
    expected = (1 - p) * total + p ** len(a) * len(set(a) & set(b)) / len(a)
    assert rank_biased_overlap(a, b, p) == pytest.approx(expected, abs=1e-12)
    assert rank_biased_overlap(a, a) == pytest.approx(1)
    assert rank_biased_overlap(a, [f"x{d}" for d in a]) == 0


def test_the_shorter_ranking_decides_about_depth():
    a, b = rankings(3)
    assert kendall_union(a[:4], b[:6]) == kendall_union(a[:4], [*b[:6], "z"])
    assert rank_biased_overlap(a, b[:4]) == rank_biased_overlap(a[:4], b[:4])
    assert math.isnan(rank_biased_overlap(a, []))


def test_scores_by_hand():
    b, a = {"q1": 0.2, "q2": 0.4}, {"q1": 0.5, "q2": 0.4}
    b2, a2 = {"q1": 0.3, "q2": 0.3}, {"q1": 0.3, "q2": 0.6}
    assert rmse(a, a2) == pytest.approx(math.sqrt((0.2**2 + 0.2**2) / 2))
    assert effects(b, a, b2, a2) == pytest.approx((1, 0.5 - 0.5))
    assert effects(b, a, b2, b) == pytest.approx((0, 0.5), abs=1e-12)
    assert effects(b, a, b2, {"q1": 0.3, "q2": 0.36}) == pytest.approx((0.03 / 0.15, 0.5 - 0.1))
    assert math.isnan(effects(b, b, b2, a2)[0])
    zero = {"q1": 0.0, "q2": 0.0}
    assert math.isnan(effects(zero, a, b2, a2)[1])
