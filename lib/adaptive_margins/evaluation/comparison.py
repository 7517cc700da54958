"""Pairwise comparison of runs, as data and as text."""

from __future__ import annotations

import itertools
import warnings
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from adaptive_margins.data.text import alike
from adaptive_margins.data.trec import Qrels, Run
from adaptive_margins.errors import AdaptiveMarginsError
from adaptive_margins.evaluation import significance
from adaptive_margins.evaluation.external_runs import Scored, finds_relevant, score
from adaptive_margins.evaluation.measures import named, relevant
from adaptive_margins.evaluation.significance import FEWEST, Comparison, compare
from adaptive_margins.text_tables import aligned

ALPHA = 0.05


class ComparisonError(AdaptiveMarginsError, ValueError):
    """Runs that cannot be compared; the message names the run and the reason."""


def compare_runs(
    qrels: Qrels,
    runs: Mapping[str, Run],
    measure: str = "nDCG@10",
    margin: float = 0.05,
    complete: Collection[str] = (),
    baseline: str = "",
) -> dict[str, Any]:
    """Compare every two of the runs, or all others with one, over all judged queries.

    Verdicts are those of `significance.compare`. There is a UserWarning if judged queries have no
    hits, if fewer than `FEWEST` have a relevant passage, or if a run has none of the relevant
    passages. In the latter two cases, and if both runs have the value 0 for every query, the
    verdict is "undecided".

    Args:
        complete: names of runs with all hits that could be found, so that any depth is enough.
        baseline: the run that is b of every pair; "" compares all pairs.
        qrels, runs, measure, margin: as `evaluate` and `significance.compare` have them.

    Returns:
        ``measure``, ``margin``, ``alpha``, ``queries`` (judged ones), ``relevant_queries`` (with a
        relevant passage), ``baseline``, ``correction`` ("Holm" with a baseline, else "Bonferroni"),
        ``resamples``; ``runs``: name → ``mean`` and ``missing`` (queries without hits);
        ``per_query``: name → query id → value; ``pairs``: dicts of ``a``, ``b``, the fields of
        `Comparison` with the ``verdict`` "different" for "better" and "worse",
        ``p_randomisation``, which no verdict depends on, the corrected ``p_t_adjusted``,
        ``p_tost_adjusted`` and ``p_randomisation_adjusted``, ``more_queries`` (of undecided pairs)
        and ``words``, a sentence.

    Raises:
        ComparisonError: fewer than two runs or judged queries, an unknown baseline, or a run is not
            deep enough for the measure.
        MeasureError, ValueError: as `evaluate`, `relevant` and `significance.compare`.
    """
    if len(runs) < 2:
        raise ComparisonError(f"at least two runs are needed, got {len(runs)}")
    if baseline and baseline not in runs:
        raise ComparisonError(f"no run is named {baseline!r}; there are {', '.join(runs)}")
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
    doubts = _warn(qrels, wanted, runs, scored)
    names = list(itertools.combinations(runs, 2))
    if baseline:
        names = [(name, baseline) for name in runs if name != baseline]
    tests = [compare(values[a], values[b], margin=margin) for a, b in names]
    rows = [[values[a][qid] - values[b][qid] for a, b in names] for qid in qrels]
    p_values, pairs = _p_values(tests, np.array(rows), baseline), []
    for (a, b), found, p in zip(names, tests, p_values, strict=True):
        doubt = doubts.get(a) or doubts.get(b, "")
        if not any(values[a].values()) and not any(values[b].values()):
            doubt = doubt or f"{measure} is 0 on each of the {found.n} queries"
        pairs.append({"a": a, "b": b, **_pair(a, b, found, p, measure, len(names), doubt)})
    return {
        "measure": measure,
        "margin": margin,
        "alpha": ALPHA,
        "queries": len(qrels),
        "relevant_queries": len(wanted),
        "baseline": baseline or None,
        "correction": "Holm" if baseline else "Bonferroni",
        "resamples": significance.RESAMPLES,
        "runs": {
            name: {"mean": s.evaluation.mean[measure], "missing": s.missing}
            for name, s in scored.items()
        },
        "pairs": pairs,
        "per_query": values,
    }


def _p_values(
    tests: Sequence[Comparison], differences: np.ndarray, baseline: str
) -> list[dict[str, float]]:
    """Each pair's corrected p-values, and those of the randomisation test."""

    def adjusted(p: list[float]) -> list[float]:
        return significance.holm(p) if baseline else [min(1.0, x * len(p)) for x in p]

    random = significance.randomisation_test(differences)
    columns = {
        "p_t_adjusted": adjusted([found.p_t for found in tests]),
        "p_tost_adjusted": adjusted([found.p_tost for found in tests]),
        "p_randomisation": random,
        "p_randomisation_adjusted": adjusted(random),
    }
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _pair(
    a: str, b: str, found: Comparison, p: Mapping[str, float], measure: str, pairs: int, doubt: str
) -> dict[str, Any]:
    """An entry of ``pairs``; with a ``doubt``, nothing is decided."""
    equivalent, different = p["p_tost_adjusted"] < ALPHA, p["p_t_adjusted"] < ALPHA
    verdict = "equivalent" if equivalent else "different" if different else "undecided"
    words, more = _words(a, b, found, verdict, measure, different), None
    if doubt:
        verdict, words = "undecided", f"Nothing is decided between {a} and {b}: {doubt}."
    elif verdict == "undecided":
        more = significance.more_queries(found, ALPHA / pairs)
        words += " About {more:,} more judged queries would show {would_show}.".format(**more)
    return {**asdict(found), "verdict": verdict, **p, "more_queries": more, "words": words}


def _warn(
    qrels: Qrels, wanted: Qrels, runs: Mapping[str, Run], scored: Mapping[str, Scored]
) -> dict[str, str]:
    """Warn of doubtful comparisons; run → why its comparisons are undecided."""
    if missing := [f"{name} {s.missing:,}" for name, s in scored.items() if s.missing]:
        message = f"judged queries without hits count 0: {', '.join(missing)}, of {len(qrels):,}"
        warnings.warn(message, stacklevel=3)
    if len(wanted) < FEWEST:
        why = f"only {len(wanted)} of the {len(qrels):,} judged queries have a relevant passage;"
        why += f" a verdict needs {FEWEST}"
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
    hint = hint or "are the judgements and the runs of one collection?"
    warnings.warn(f"{why}; {hint}", stacklevel=3)
    return dict.fromkeys(without, why)


def _words(a: str, b: str, found: Comparison, verdict: str, measure: str, significant: bool) -> str:
    """A sentence on a comparison; its subject is the run with the higher mean."""
    low, high = found.ci
    if found.difference < 0:
        a, b, low, high = b, a, -high, -low
    if low == high == 0:
        return f"{a} and {b} have the same {measure} on each of the {found.n} queries."
    higher = f"{measure} {abs(found.difference):.4f} higher, 95 % CI {low:+.4f} to {high:+.4f}"
    if verdict == "different":
        return f"{a} is better than {b} ({higher})."
    if verdict == "undecided":
        return f"{found.n} queries do not decide between {a} and {b} ({a}: {higher})."
    but = f", though {a} is better by a small, significant difference" if significant else ""
    return f"{a} and {b} are equivalent within ±{found.margin:g}{but} ({a}: {higher})."


def _p(value: float) -> str:
    return f"{value:.4f}" if value >= 0.0001 else "< 0.0001"


def comparison_text(found: Mapping[str, Any], style: str = "plain") -> str:
    """Return a result of `compare_runs` as text: tables of runs and pairs, a sentence a pair.

    ``style`` is that of the tables (`aligned`); in LaTeX, all else is a comment, in Markdown code.
    """
    runs = [["run", f"mean {found['measure']}", "queries without hits"]]
    runs += [
        [name, f"{run['mean']:.4f}", f"{run['missing']:,}"] for name, run in found["runs"].items()
    ]
    pairs = [["a", "b", "a − b", "95 % CI", "p (t)", "p (TOST)", "p (random)", "verdict"]]
    for pair in found["pairs"]:
        low, high = pair["ci"]
        sign = "better" if pair["difference"] > 0 else "worse"
        pairs.append(
            [
                pair["a"],
                pair["b"],
                f"{pair['difference']:+.4f}",
                f"[{low:+.4f}, {high:+.4f}]",
                _p(pair["p_t_adjusted"]),
                _p(pair["p_tost_adjusted"]),
                _p(pair["p_randomisation_adjusted"]),
                sign if pair["verdict"] == "different" else pair["verdict"],
            ]
        )
    note = f"{found['queries']:,} judged queries"
    if found["relevant_queries"] < found["queries"]:
        note += f", {found['relevant_queries']:,} of them with a relevant passage"
    note += f"; margin of equivalence ±{found['margin']:g}"
    if (count := len(found["pairs"])) > 1:
        how = "adjusted for" if found["baseline"] else "multiplied by"
        note += f"; p values are {how} the {count} pairs ({found['correction']})"
    note += f"; random: randomisation test, {found['resamples']:,} flips of signs"
    if any(pair["more_queries"] for pair in found["pairs"]):
        note += f"; more queries: estimates for a power of {significance.POWER:.0%}, as if the"
        note += " mean and spread of these differences were the true ones"
    told = [f"{note}.", "", *(pair["words"] for pair in found["pairs"])]
    told += ["", f"Plot: {found['plot']}"] if found.get("plot") else []
    if style == "latex_booktabs":
        told = [f"% {line}".rstrip() for line in told]
    elif style == "github":
        told = ["```text", *told, "```"]
    lines = [*aligned(runs, style=style), "", *aligned(pairs, left=2, style=style), "", *told]
    return "\n".join(lines)


def compared(
    a: Mapping[str, float], b: Mapping[str, float], measure: str, untested: str = ""
) -> dict[str, Any]:
    """Return `compare` by a measure; ``untested``, if given, is the verdict without a test."""
    if len(a) >= FEWEST and not untested:
        return {"measure": measure, **asdict(compare(a, b, however_small=True))}
    return {
        "measure": measure,
        "n": len(a),
        "difference": float(np.mean(list(a.values())) - np.mean(list(b.values()))),
        **dict.fromkeys(("ci", "p_t", "p_tost", "margin")),
        "verdict": untested or "too few queries",
    }


def run_names(paths: Sequence[Path]) -> list[str]:
    """Return a name for each run file: its stem without .gz, after folders if stems are equal.

    Files with equal folders and stems are numbered.
    """
    places = [
        (*path.resolve().parent.parts[1:], Path(path.name.removesuffix(".gz")).stem)
        for path in paths
    ]
    names = {place: place[-1] for place in places}
    for depth in range(2, max(map(len, places), default=0) + 1):
        count = Counter(names.values())
        names = {
            place: "/".join(place[-depth:]) if count[name] > 1 else name
            for place, name in names.items()
        }
    taken = set(names.values())
    result = []
    for place in places:
        name = names[place]
        if places.count(place) > 1:
            name = next(n for i in itertools.count(1) if (n := f"{name}-{i}") not in taken)
            taken.add(name)
        result.append(name)
    return result
