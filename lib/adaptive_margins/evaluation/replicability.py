"""How well a run replicates another: the measures of Breuer et al. (SIGIR 2020), as in repro_eval.

Rankings are of one query: docids, best first. Scores are query id → value of a measure.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean

Scores = Mapping[str, float]


def kendall_union(original: Sequence[str], replicated: Sequence[str]) -> float:
    """Kendall's τ-b of the positions that both rankings' documents have in their union.

    The longer ranking is cut to the length of the other. NaN with fewer than 2 documents.
    """
    from scipy.stats import kendalltau

    pairs = list(zip(original, replicated, strict=False))
    union = {docid: i for i, docid in enumerate(dict.fromkeys([*original, *replicated]))}
    if len(pairs) < 2:
        return math.nan
    return float(
        kendalltau(*([union[d] for d in side] for side in zip(*pairs, strict=True))).statistic
    )


def rank_biased_overlap(
    original: Sequence[str], replicated: Sequence[str], p: float = 0.9
) -> float:
    """RBO, extrapolated from the depth of the shorter ranking (Webber et al., TOIS 2010, Eq. 32).

    1 for equal rankings, 0 for disjoint ones; NaN if one is empty. ``p`` weights the top.
    """
    seen: tuple[set[str], set[str]] = set(), set()
    weighted, agreement, depth = 0.0, math.nan, 0
    for depth, pair in enumerate(zip(original, replicated, strict=False), start=1):
        for side, docid in zip(seen, pair, strict=True):
            side.add(docid)
        agreement = len(seen[0] & seen[1]) / depth
        weighted += p ** (depth - 1) * agreement
    return agreement * p**depth + (1 - p) * weighted


def rmse(original: Scores, replicated: Scores) -> float:
    """Root mean square of the differences of the queries' scores."""
    return math.sqrt(fmean((original[qid] - replicated[qid]) ** 2 for qid in original))


def effect_ratio(baseline: Scores, advanced: Scores, baseline2: Scores, advanced2: Scores) -> float:
    """Mean gain of the replicated advanced run over its baseline (…2), over the original gain.

    1 is a perfect replication; below 0 the effect is reversed. NaN without an original gain.
    """
    gain = fmean(advanced.values()) - fmean(baseline.values())
    return (fmean(advanced2.values()) - fmean(baseline2.values())) / gain if gain else math.nan


def delta_improvement(
    baseline: Scores, advanced: Scores, baseline2: Scores, advanced2: Scores
) -> float:
    """ΔRI: the original relative improvement over the baseline minus the replicated one (…2)."""
    means = [fmean(x.values()) for x in (baseline, advanced, baseline2, advanced2)]
    if not (means[0] and means[2]):
        return math.nan
    return (means[1] - means[0]) / means[0] - (means[3] - means[2]) / means[2]
