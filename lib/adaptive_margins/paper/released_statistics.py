"""Statistics of the chapter on paper and released code: comparisons of settings, and optimism."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from adaptive_margins.data.trec import Qrels, Run
from adaptive_margins.evaluation import significance
from adaptive_margins.paper.store import StoredRun
from adaptive_margins.runs import RunConfig

_CASE = ["block", "what", "paper", "code", "kind", "set", "measure"]
COMPARED = [
    *_CASE,
    *("seed", "epsilon_paper", "epsilon_code", "step_paper", "step_code"),
    *("value_paper", "value_code", "difference", "low", "high"),
    *("p", "p_adjusted", "comparisons", "verdict", "run_id", "reference_run_id"),
]
SUMMARY = [
    *_CASE,
    *("value_paper", "value_code", "difference", "low", "high", "lowest", "highest"),
    *("p_adjusted", "comparisons", "verdict", "seeds", "runs"),
]

PerQuery = Mapping[str, float]


@dataclass(frozen=True)
class Comparison:
    """Two settings, as the configurations of their runs, seed by seed."""

    what: str
    paper: str
    code: str
    reference: Sequence[RunConfig]
    other: Sequence[RunConfig]


def compare(
    paper: Sequence[PerQuery], code: Sequence[PerQuery], *, comparisons: int = 1
) -> dict[str, Any]:
    """Compare two settings, each with several runs, over the mean of the runs for each query.

    The test is about other queries, not other seeds.

    Args:
        paper: query id → value, for each run of one side.
        code: the same for the other side.
        comparisons: tests in the block (Bonferroni).

    Returns:
        ``difference`` (mean of code − paper), ``low`` and ``high`` (its 95 % confidence interval,
        for this comparison alone), ``p`` and ``p_adjusted`` (TOST, ±.05), ``comparisons`` and
        ``verdict`` (of the code's side, as in `significance.compare`).

    Raises:
        ValueError: there are no runs, the queries differ, or as `significance.compare`.
    """
    found = significance.compare(mean_over(code), mean_over(paper), comparisons=comparisons)
    adjusted = min(1.0, found.p_tost * comparisons)
    return {
        "difference": found.difference,
        "low": found.ci[0],
        "high": found.ci[1],
        "p": found.p_tost,
        "p_adjusted": adjusted,
        "comparisons": comparisons,
        "verdict": found.verdict,
    }


def mean_over(runs: Sequence[PerQuery]) -> dict[str, float]:
    """Each query's mean over ``runs``. Raises ValueError if there are none, or their queries
    differ.
    """
    if not runs:
        raise ValueError("there are no runs to average over")
    for number, run in enumerate(runs[1:], start=2):
        if different := sorted(run.keys() ^ runs[0].keys()):
            raise ValueError(
                f"run {number} and run 1 differ in {len(different)} queries, e.g. {different[:3]}"
            )
    return {qid: float(np.mean([run[qid] for run in runs])) for qid in runs[0]}


def summarise(frames: Iterable[pd.DataFrame]) -> pd.DataFrame:
    """Frames with the columns `COMPARED`, a row per comparison: the columns `SUMMARY`.

    Values are means over the runs; ``lowest`` and ``highest`` the extreme mean differences of
    single runs; ``seeds`` and ``runs`` (ids, the paper's side first) are joined by blanks.
    """
    tests = ["difference", "low", "high", "p_adjusted", "comparisons", "verdict"]
    rows = []
    for frame in frames:
        for key, group in frame.groupby(_CASE, sort=False):
            each = group["value_code"] - group["value_paper"]
            runs = dict.fromkeys([*group["reference_run_id"], *group["run_id"]])
            rows.append(
                {
                    **dict(zip(_CASE, key, strict=True)),
                    **group[["value_paper", "value_code"]].mean(),
                    **group.iloc[0][tests],
                    "lowest": each.min(),
                    "highest": each.max(),
                    "runs": " ".join(runs),
                    "seeds": " ".join(map(str, dict.fromkeys(group["seed"]))),
                }
            )
    return pd.DataFrame(rows, columns=SUMMARY)


def rows_of(
    block: str,
    pair: Comparison,
    case: tuple[str, str, str],
    sides: Sequence[tuple[StoredRun[Any], StoredRun[Any], PerQuery, PerQuery]],
    comparisons: int,
) -> list[dict[str, Any]]:
    """A row for each (paper's run, code's run, and their values by query); ``case``: kind, set,
    measure.
    """
    test = compare([s[2] for s in sides], [s[3] for s in sides], comparisons=comparisons)
    return [
        {
            "block": block,
            "what": pair.what,
            "paper": pair.paper,
            "code": pair.code,
            **dict(zip(("kind", "set", "measure"), case, strict=True)),
            "seed": getattr(other.config, "seed", 0),
            "epsilon_paper": _epsilon(reference),
            "epsilon_code": _epsilon(other),
            "step_paper": reference.result["kept_step"],
            "step_code": other.result["kept_step"],
            "value_paper": float(np.mean(list(before.values()))),
            "value_code": float(np.mean(list(after.values()))),
            **test,
            "run_id": other.run_id,
            "reference_run_id": reference.run_id,
        }
        for reference, other, before, after in sides
    ]


def _epsilon(run: StoredRun[Any]) -> float:
    """ε of a static run, else NaN."""
    target = getattr(run.config, "target", None)
    return float("nan") if target is None or isinstance(target, str) else float(target)


def pool_qrels(qrels: Qrels, pool: Run) -> Qrels:
    """The judgements of the passages in ``pool``: nDCG with them has its ideal ranking from the
    pool.

    Every query of ``qrels`` stays; one without a judgement has an nDCG of 0.
    """
    return {
        qid: {docid: grade for docid, grade in judged.items() if docid in pool.get(qid, {})}
        for qid, judged in qrels.items()
    }


@dataclass(frozen=True)
class Optimism:
    """What choosing the best of several settings by some of the queries does to its score.

    Attributes:
        chosen: (draws,) row of the setting with the best mean on the drawn queries (first of
            equals).
        drawn: (draws,) its mean on the drawn queries, by which it was chosen.
        others: (draws,) its mean on all other queries.
        unchosen: (draws,) drawn minus others, averaged over all settings: the effect of the split
            without a choice.
    """

    chosen: np.ndarray
    drawn: np.ndarray
    others: np.ndarray
    unchosen: np.ndarray

    @property
    def values(self) -> np.ndarray:
        """Optimism of each draw: drawn minus others."""
        return self.drawn - self.others

    @property
    def net(self) -> np.ndarray:
        """The part that is due to the choice: equal on average (the mean of ``unchosen`` is 0),
        less scattered.
        """
        return self.values - self.unchosen


def optimism(scores: np.ndarray, *, size: int, draws: int, seed: int = 1) -> Optimism:
    """The optimism of choosing the best of C settings by ``size`` of N queries.

    For a draw S of queries, without replacement, let ĉ(S) = argmax_c mean_{q∈S} x_c(q). The draw's
    optimism is

        mean_{q∈S} x_ĉ(S)(q) − mean_{q∉S} x_ĉ(S)(q).

    For a setting fixed in advance its expectation over S is 0; what remains is due to the choice.

    Args:
        scores: (C, N) value of each setting for each query.
        size: queries to choose by, 1 to N − 1.
        draws: how often; at least 1.
        seed: of the draws; the same seed, N and ``size`` draw the same queries.

    Raises:
        ValueError: a shape, size or number of draws that is not one of the above, or a score that
            is not finite.
    """
    scores = np.asarray(scores, np.float64)
    if scores.ndim != 2 or not len(scores) or not np.isfinite(scores).all():
        raise ValueError(
            f"scores must be finite, of shape (settings, queries), not {scores.shape} with "
            f"{int((~np.isfinite(scores)).sum())} that are not finite"
        )
    n = scores.shape[1]
    if not 1 <= size < n:
        raise ValueError(f"size must be from 1 to {n - 1} for {n} queries, not {size}")
    if draws < 1:
        raise ValueError(f"draws must be at least 1, not {draws}")
    rng = np.random.default_rng(seed)
    inside, outside = np.empty((draws, len(scores))), np.empty((draws, len(scores)))
    for draw in range(draws):
        order = rng.permutation(n)
        inside[draw] = scores[:, order[:size]].mean(axis=1)
        outside[draw] = scores[:, order[size:]].mean(axis=1)
    chosen = inside.argmax(axis=1)
    rows = np.arange(draws)
    return Optimism(
        chosen, inside[rows, chosen], outside[rows, chosen], (inside - outside).mean(axis=1)
    )
