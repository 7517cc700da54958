"""Statistics of the chapter on paper and released code: comparisons of settings, and optimism."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

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


class Comparison(NamedTuple):
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

    The test is about other queries, not other seeds. ``difference`` is the mean of code − paper,
    ``low`` and ``high`` its 95 % confidence interval for this comparison alone, ``p`` that of TOST
    (±.05), adjusted for the ``comparisons`` in the block (Bonferroni); ``verdict`` is of the code's
    side.
    """
    found = significance.compare(_mean_over(code), _mean_over(paper), comparisons=comparisons)
    return {
        "difference": found.difference,
        "low": found.ci[0],
        "high": found.ci[1],
        "p": found.p_tost,
        "p_adjusted": min(1.0, found.p_tost * comparisons),
        "comparisons": comparisons,
        "verdict": found.verdict,
    }


def _mean_over(runs: Sequence[PerQuery]) -> dict[str, float]:
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
    about = (block, pair.what, pair.paper, pair.code, *case)
    return [
        {
            **dict(zip(_CASE, about, strict=True)),
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


def optimism(scores: np.ndarray, *, size: int, draws: int) -> dict[str, np.ndarray]:
    """The optimism of choosing the best of C settings by ``size`` of N queries.

    For a draw S of queries, without replacement, let ĉ(S) = argmax_c mean_{q∈S} x_c(q). The draw's
    optimism is

        mean_{q∈S} x_ĉ(S)(q) − mean_{q∉S} x_ĉ(S)(q).

    For a setting fixed in advance its expectation over S is 0; what remains is due to the choice.

    Args:
        scores: (C, N) value of each setting for each query.
        size: queries to choose by, 1 to N − 1.
        draws: how often; the same N and ``size`` draw the same queries.

    Returns:
        Arrays (draws,): "chosen", the row of ĉ(S), the first of equals; "drawn" and "others", its
        mean on S and on all other queries; "optimism", their difference; and "net", the part of it
        that is due to the choice: without the mean difference of all settings, which is 0 on
        average, it is less scattered.
    """
    rng = np.random.default_rng(1)
    inside, outside = np.empty((draws, len(scores))), np.empty((draws, len(scores)))
    for draw in range(draws):
        order = rng.permutation(scores.shape[1])
        inside[draw] = scores[:, order[:size]].mean(axis=1)
        outside[draw] = scores[:, order[size:]].mean(axis=1)
    chosen = inside.argmax(axis=1)
    drawn, others = (means[np.arange(draws), chosen] for means in (inside, outside))
    net = drawn - others - (inside - outside).mean(axis=1)
    return {
        "chosen": chosen,
        "drawn": drawn,
        "others": others,
        "optimism": drawn - others,
        "net": net,
    }
