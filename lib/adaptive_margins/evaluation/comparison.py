"""Runs compared pair by pair, as data and as text."""

from __future__ import annotations

import itertools
import warnings
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from adaptive_margins.data.text import alike
from adaptive_margins.data.trec import Qrels, Run
from adaptive_margins.errors import AdaptiveMarginsError
from adaptive_margins.evaluation.external_runs import Scored, finds_relevant, score
from adaptive_margins.evaluation.measures import named, relevant
from adaptive_margins.evaluation.significance import Comparison, compare
from adaptive_margins.text_tables import aligned

ALPHA = 0.05


class ComparisonError(AdaptiveMarginsError, ValueError):
    """Runs that cannot be compared; the message says which, and why."""


def compare_runs(
    qrels: Qrels,
    runs: Mapping[str, Run],
    measure: str = "nDCG@10",
    margin: float = 0.05,
    complete: Collection[str] = (),
) -> dict[str, Any]:
    """Compare every two of the runs by a paired t test and TOST over all judged queries.

    Args:
        qrels: query id → docid → grade. A query that a run has no hits for counts 0.
        runs: name → run; at least two.
        measure: in ir_measures' notation; one that needs a relevance level and has none gets 1.
        margin: the largest mean difference that counts as equivalent.
        complete: names of runs that have all hits that could be found, so that any depth is enough.

    A UserWarning says if judged queries have no hits, if only one query has a relevant passage, or if a run has none of the
    relevant passages. In the latter two cases nothing is decided, nor if both runs have the value 0 for every query.

    Returns:
        ``measure``, ``margin``, ``alpha``, ``queries`` (judged ones), ``relevant_queries`` (of them, those with a relevant
        passage); ``runs``: name → ``mean`` and ``missing`` (queries without hits); ``pairs``: a dict each with ``a``, ``b``,
        the fields of `Comparison`, ``p_t_adjusted``, ``p_tost_adjusted`` (Bonferroni: times the number of pairs, at most 1),
        ``verdict`` ("equivalent", "different" or "undecided", by the adjusted values) and ``words``, a sentence;
        ``per_query``: name → query id → value.

    Raises:
        ComparisonError: fewer than two runs or judged queries, or a run is not deep enough for the measure.
        MeasureError: as `evaluate` and `relevant`.
        ValueError: as `evaluate` and `paired_tost`.
    """
    if len(runs) < 2:
        raise ComparisonError(f"at least two runs are needed, got {len(runs)}")
    if len(qrels) < 2:
        raise ComparisonError(f"at least two judged queries are needed, got {len(qrels)}")
    measure = named(measure)
    wanted = relevant(qrels, measure)
    scored = {
        name: score(run, qrels, [measure], complete=name in complete) for name, run in runs.items()
    }
    if refused := [f"{name}: {s.refused[measure]}" for name, s in scored.items() if s.refused]:
        hint = alike((qid for run in runs.values() for qid in run), qrels)
        raise ComparisonError("; ".join([*refused, hint] if hint else refused))
    values = {name: s.evaluation.per_query[measure] for name, s in scored.items()}
    pairs = list(itertools.combinations(runs, 2))
    failing = _warned(qrels, wanted, runs, scored)
    return {
        "measure": measure,
        "margin": margin,
        "alpha": ALPHA,
        "queries": len(qrels),
        "relevant_queries": len(wanted),
        "runs": {
            name: {"mean": s.evaluation.mean[measure], "missing": s.missing}
            for name, s in scored.items()
        },
        "pairs": [
            _pair(a, b, values, measure, margin, len(pairs), failing.get(a) or failing.get(b, ""))
            for a, b in pairs
        ],
        "per_query": values,
    }


def _pair(
    a: str,
    b: str,
    values: Mapping[str, Mapping[str, float]],
    measure: str,
    margin: float,
    pairs: int,
    undecided: str,
) -> dict[str, Any]:
    found = compare(values[a], values[b], margin=margin, alpha=ALPHA, comparisons=pairs)
    if not any(values[a].values()) and not any(values[b].values()):
        undecided = undecided or f"{measure} is 0 on each of the {found.n} queries"
    if undecided:
        found = replace(found, verdict="undecided")
    return {
        "a": a,
        "b": b,
        **asdict(found),
        "p_t_adjusted": min(1.0, found.p_t * pairs),
        "p_tost_adjusted": min(1.0, found.p_tost * pairs),
        "words": f"Nothing is decided between {a} and {b}: {undecided}."
        if undecided
        else _words(a, b, found, measure, pairs),
    }


def _warned(
    qrels: Qrels, wanted: Qrels, runs: Mapping[str, Run], scored: Mapping[str, Scored]
) -> dict[str, str]:
    """Warn of what makes a comparison doubtful; name of a run → why nothing is decided about it."""
    if missing := [f"{name} {s.missing:,}" for name, s in scored.items() if s.missing]:
        warnings.warn(
            f"judged queries without hits count 0: {', '.join(missing)}, of {len(qrels):,}",
            stacklevel=3,
        )
    if len(wanted) == 1:
        why = f"only 1 of the {len(qrels):,} judged queries has a relevant passage, {next(iter(wanted))!r}"
        warnings.warn(why, stacklevel=3)
        return dict.fromkeys(runs, why)
    without = [name for name, run in runs.items() if not finds_relevant(run, wanted)]
    if not without:
        return {}
    count = sum(map(len, wanted.values()))
    where = "any run" if len(without) == len(runs) else " or ".join(without)
    why = f"none of the {count:,} relevant passages is in {where}"
    hits = (docid for name in without for qid in wanted for docid in runs[name].get(qid, ()))
    hint = alike((docid for judged in wanted.values() for docid in judged), hits)
    warnings.warn(
        f"{why}; {hint or 'are the judgements and the runs of one collection?'}", stacklevel=3
    )
    return dict.fromkeys(without, why)


def _words(a: str, b: str, found: Comparison, measure: str, pairs: int) -> str:
    if found.difference < 0:  # from here on, a is the higher one
        a, b, low, high = b, a, -found.ci[1], -found.ci[0]
    else:
        low, high = found.ci
    if low == high == 0:
        return f"{a} and {b} have the same {measure} on each of the {found.n} queries."
    interval = f"{abs(found.difference):.4f} higher, 95 % interval {low:+.4f} to {high:+.4f}"
    p_t, p_tost = (f"p {_p(min(1.0, p * pairs), ' = ')}" for p in (found.p_t, found.p_tost))
    if pairs > 1:
        p_tost += f" (both corrected for {pairs} pairs)"
    tests = f"paired t test {p_t}, TOST {p_tost}"
    if found.verdict == "different":
        return f"{a} is better than {b}: its mean {measure} is {interval}; {tests}."
    margin = f"±{found.margin:g}"
    if found.verdict == "equivalent":
        small = found.p_t * pairs < ALPHA
        but = f", though {a} is better by a small, significant difference" if small else ""
        return (
            f"{a} and {b} are equivalent within {margin}{but}: the mean {measure} of {a} is {interval}; {tests}."
        )  # fmt: skip
    return (
        f"{a} and {b} are neither shown to differ nor to be equivalent within {margin}: the mean {measure} of {a} is {interval};"
        f" {tests}. {found.n} queries do not decide it."
    )


def _p(value: float, equals: str = "") -> str:
    return f"{equals}{value:.4f}".strip() if value >= 0.0001 else "< 0.0001"


def comparison_text(found: Mapping[str, Any]) -> str:
    """What `compare_runs` returned as two tables, of runs and of pairs, and a sentence a pair."""
    runs = [["run", f"mean {found['measure']}", "queries without hits"]]
    runs += [
        [name, f"{run['mean']:.4f}", f"{run['missing']:,}"] for name, run in found["runs"].items()
    ]
    pairs = [["a", "b", "a − b", "95 % interval", "p (t)", "p (TOST)", "verdict"]]
    for pair in found["pairs"]:
        low, high = pair["ci"]
        pairs.append(
            [
                pair["a"],
                pair["b"],
                f"{pair['difference']:+.4f}",
                f"[{low:+.4f}, {high:+.4f}]",
                _p(pair["p_t_adjusted"]),
                _p(pair["p_tost_adjusted"]),
                pair["verdict"],
            ]
        )
    count = len(found["pairs"])
    note = f"{found['queries']:,} judged queries"
    if found["relevant_queries"] < found["queries"]:
        note += f", {found['relevant_queries']:,} of them with a relevant passage"
    note += f"; margin of equivalence ±{found['margin']:g}"
    if count > 1:
        note += f"; p values are multiplied by the {count} pairs (Bonferroni)"
    sentences = [pair["words"] for pair in found["pairs"]]
    return "\n".join([*aligned(runs), "", *aligned(pairs, left=2), "", f"{note}.", "", *sentences])


def run_names(paths: Sequence[Path]) -> list[str]:
    """A name for each run file: its stem, without .gz; with folders in front where stems are the same.

    Those of one folder and stem, as the same file given twice, are numbered.
    """
    parts = [
        (*path.resolve().parent.parts[1:], Path(path.name.removesuffix(".gz")).stem)
        for path in paths
    ]
    names = {place: place[-1] for place in parts}
    for depth in range(2, max(map(len, parts), default=0) + 1):
        count = Counter(names.values())
        names = {
            place: "/".join(place[-depth:]) if count[name] > 1 else name
            for place, name in names.items()
        }
    taken = set(names.values())
    result = []
    for place in parts:
        name = names[place]
        if parts.count(place) > 1:
            name = next(n for i in itertools.count(1) if (n := f"{name}-{i}") not in taken)
            taken.add(name)
        result.append(name)
    return result
