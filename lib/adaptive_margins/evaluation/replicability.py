"""How well runs replicate others: measures of Breuer et al. (SIGIR 2020).

Rankings are docids of one query, best first; scores are query id → value of a measure.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean

Scores = Mapping[str, float]


def kendall_union(original: Sequence[str], replicated: Sequence[str]) -> float:
    """Kendall's τ-b of the positions of both rankings' documents in their union.

    The union has the original's documents first, in their order (the authors' repro_eval orders it
    by docid, which changes τ), so disjoint rankings have τ = 1. The longer ranking is truncated
    to the length of the other. NaN with fewer than 2 documents.
    """
    from scipy.stats import kendalltau

    union = {docid: i for i, docid in enumerate(dict.fromkeys([*original, *replicated]))}
    pairs = [(union[a], union[b]) for a, b in zip(original, replicated, strict=False)]
    return float(kendalltau(*zip(*pairs, strict=True)).statistic) if len(pairs) > 1 else math.nan


def rank_biased_overlap(
    original: Sequence[str], replicated: Sequence[str], p: float = 0.9
) -> float:
    """RBO, extrapolated from the depth of the shorter ranking (Webber et al., TOIS 2010, Eq. 32).

    1 for equal rankings, 0 for disjoint ones; NaN if one is empty. ``p`` weights the top.
    """
    depth = min(len(original), len(replicated))
    shares = [len({*original[:d]} & {*replicated[:d]}) / d for d in range(1, depth + 1)]
    if not shares:
        return math.nan
    return shares[-1] * p**depth + (1 - p) * sum(p**d * share for d, share in enumerate(shares))


def rmse(original: Scores, replicated: Scores) -> float:
    """Root mean square of the differences of the queries' scores."""
    return math.sqrt(fmean((original[qid] - replicated[qid]) ** 2 for qid in original))


def effects(
    baseline: Scores, advanced: Scores, baseline2: Scores, advanced2: Scores
) -> tuple[float, float]:
    """Effect ratio and ΔRI of a replicated gain over a baseline (…2).

    The effect ratio is the replicated over the original difference of means (1: perfect; below 0:
    reversed), ΔRI the original minus the replicated relative improvement. NaN by division by 0.
    """
    b, a, b2, a2 = (fmean(x.values()) for x in (baseline, advanced, baseline2, advanced2))
    ratio = (a2 - b2) / (a - b) if a != b else math.nan
    return ratio, (a - b) / b - (a2 - b2) / b2 if b and b2 else math.nan
