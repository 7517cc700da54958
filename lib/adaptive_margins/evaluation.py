"""Measures (ir_measures), and paired t tests of equivalence (TOST) and of difference."""

from __future__ import annotations

import io
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, replace

import ir_measures
import numpy as np
from ir_measures.measures import diversity
from scipy.special import stdtr, stdtrit  # Student's t; scipy.stats takes a second to import

from adaptive_margins.data.trec import MAX_GRADE, Qrels, Run, top
from adaptive_margins.errors import AdaptiveMarginsError

_CONSTANT = 1e-12  # differences of measures that spread less are equal but for rounding
_GDEVAL_GRADE = 4  # gdeval's largest grade
_EXAMPLES = '"nDCG@10", "Success(rel=2)@5", "R(rel=2)@50", "RR(rel=2)@10"'


class MeasureError(AdaptiveMarginsError, ValueError):
    """A measure that is unknown or cannot be computed; the message names it, and says why."""


@dataclass(frozen=True)
class Evaluation:
    """What a run scores.

    Attributes:
        mean: measure → mean over the queries of the qrels.
        per_query: measure → query id → value.
    """

    mean: dict[str, float]
    per_query: dict[str, dict[str, float]]


def evaluate(qrels: Qrels, run: Run, measures: Sequence[str]) -> Evaluation:
    """Score a run by measures in ir_measures' notation, e.g. "nDCG@10" or "Success(rel=2)@5".

    Each query of the qrels counts; one without hits, or without a relevant passage, counts 0.
    Queries of the run that the qrels do not judge are ignored. Hits are ranked as trec_eval does
    (`top`), whatever tool computes the measure.

    Raises:
        MeasureError: a measure is unknown or cannot be computed, e.g. for grades that it cannot take.
        ValueError: there are no qrels or no measures, or a score is not a finite number.
    """
    if not qrels:
        raise ValueError("the qrels are empty: there is no query to evaluate")
    if not measures:
        raise ValueError("no measure was given")
    parsed = {notation: _measure(notation) for notation in measures}
    # What tools make of ids, ties and empty lists differs. So queries are numbered, and a hit is
    # called by its rank; the other judged passages get numbers after that.
    queries = {str(number): qid for number, qid in enumerate(qrels, start=1)}
    judged: Qrels = {}
    ranked: Run = {}
    for number, qid in queries.items():
        ids = {docid: str(r) for r, (docid, _) in enumerate(top(run.get(qid, {})), start=1)}
        if ids:
            ranked[number] = {rank: -float(rank) for rank in ids.values()}
        judged[number] = {
            ids.setdefault(docid, str(len(ids) + 1)): grade for docid, grade in qrels[qid].items()
        }
    per_query = {
        notation: dict(zip(qrels, _values(notation, measure, judged, ranked, queries), strict=True))
        for notation, measure in parsed.items()
    }
    mean = {m: float(np.mean(list(values.values()))) for m, values in per_query.items()}
    return Evaluation(mean, per_query)


def _values(
    notation: str,
    measure: ir_measures.Measure,
    judged: Qrels,
    ranked: Run,
    queries: Mapping[str, str],
) -> list[float]:
    """The measure of each of the ``queries`` (number → id), 0 where the tool has none."""
    if ir_measures.gdeval.supports(measure):
        highest, number = max((max(row.values(), default=0), n) for n, row in judged.items())
        if highest > _GDEVAL_GRADE:
            raise MeasureError(
                f"{notation} takes grades up to {_GDEVAL_GRADE} (it is computed by gdeval), but query"
                f" {queries[number]!r} has a judgement of grade {highest}; map the grades to 0 to"
                f" {_GDEVAL_GRADE}, or use a measure that takes any, such as nDCG@10"
            )
    values = dict.fromkeys(queries, 0.0)
    try:
        for metric in ir_measures.iter_calc([measure], judged, ranked):
            if metric.query_id not in values:
                raise MeasureError(f"{notation}: unknown query {metric.query_id!r} in the results")
            values[metric.query_id] = float(metric.value)
    except MeasureError:
        raise
    except Exception as error:  # whatever a tool raises
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise MeasureError(f"{notation} cannot be computed for this run ({reason})") from error
    for number, value in values.items():
        if not math.isfinite(value):
            raise MeasureError(f"{notation} of query {queries[number]!r} is {value}, not a number")
    return list(values.values())


def relevant(qrels: Qrels, measure: str) -> Qrels:
    """The judgements that count as relevant for a measure, without queries that have none.

    These are grades from the measure's ``rel`` on, which is 1 if it has none.

    Raises:
        MeasureError: no query has any, or the measure is unknown or cannot be computed.
    """
    level = _measure(measure).params.get("rel", 1)
    found = {
        qid: {docid: grade for docid, grade in judged.items() if grade >= level}
        for qid, judged in qrels.items()
    }
    found = {qid: judged for qid, judged in found.items() if judged}
    if not found:
        grades = Counter(grade for judged in qrels.values() for grade in judged.values())
        counts = ", ".join(f"{grade} ({grades[grade]:,})" for grade in sorted(grades))
        raise MeasureError(
            f"no query has a relevant passage: {len(qrels):,} judged queries, grades {counts or 'none'};"
            f" {measure} needs grade {level} or more"
        )
    return found


def cutoff(measure: str, default: int = 1) -> int:
    """How many hits of a query a measure looks at; ``default`` if it has no cutoff."""
    return int(_measure(measure).params.get("cutoff", default))


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


def named(measure: str) -> str:
    """Return the measure's full name: no alias, and rel=1 where it has a relevance level but none is given.

    "R@100" is "R(rel=1)@100", "MRR@10" is "RR(rel=1)@10"; "Success(rel=2)@5" and measures of grades,
    like "nDCG@10", stay as they are. ir_measures' own default is 1, too: the values are the same.

    Raises:
        MeasureError: the measure is unknown or cannot be computed.
    """
    parsed = _measure(measure)
    level = parsed.SUPPORTED_PARAMS.get("rel")
    if level is None or level.default != 1 or "rel" in parsed.params:
        alias = re.match(r"\w+", measure)
        if alias and not ir_measures.measures.registry[alias[0]].params:
            return f"{parsed.NAME}{measure[alias.end() :]}"
        return measure
    values = {"rel": 1, **parsed.params}
    at = values.pop(parsed.AT_PARAM, None)
    name = f"{parsed.NAME}({','.join(f'{key}={value!r}' for key, value in values.items())})"
    return name if at is None else f"{name}@{at}"


def _measure(notation: str) -> ir_measures.Measure:
    """Parse and check a measure; ir_measures accepts some that later crash, such as nDCG@-3."""
    try:
        measure = ir_measures.parse_measure(notation)
        _check_parameters(measure)
        ir_measures.evaluator([measure], {})
    except (NameError, SyntaxError, TypeError, ValueError) as error:
        meant = _meant(str(notation))
        way_out = f"did you mean {meant}?" if meant else f"examples of measures: {_EXAMPLES}"
        raise MeasureError(
            f"cannot compute the measure {notation!r} ({_reason(error)}); {way_out}"
        ) from error
    return measure


def _check_parameters(measure: ir_measures.Measure) -> None:
    known = measure.SUPPORTED_PARAMS
    for name in measure.params:
        if name not in known:
            raise ValueError(f"it has no parameter {name!r}, but {', '.join(known) or 'none'}")
    for name, info in known.items():
        if name not in measure.params:
            if info.required:
                raise ValueError(f"{name} is missing")
        elif not info.validate(value := measure.params[name]):
            raise ValueError(
                f"{name}={value!r} is not of type {info.dtype.__name__} or not allowed"
            )
    for name in ("cutoff", "rel"):
        if (value := measure.params.get(name, 1)) < 1:
            raise ValueError(f"{name} must be at least 1, not {value}")
    for name in ("p", "recall"):
        if not 0 <= (value := measure.params.get(name, 0)) <= 1:
            raise ValueError(f"{name} must be between 0 and 1, not {value}")
    for gain in measure.params.get("gains", {}).values():
        if type(gain) is not int or gain > MAX_GRADE:
            raise ValueError(f"gains must be integers of at most {MAX_GRADE:,}, not {gain!r}")
    if type(measure).__module__ == diversity.__name__:
        raise ValueError("it needs judgements by intent (subtopic), which qrels here do not have")


def _reason(error: Exception) -> str:
    """Why a measure cannot be computed, in a line."""
    text = str(error)
    if text.startswith("problem parsing measure") or isinstance(error, SyntaxError):
        return "expected NAME, NAME@CUTOFF or NAME(PARAMETER=VALUE)@CUTOFF"
    if text.startswith("measure not found: "):
        return f"ir_measures has no measure {text.removeprefix('measure not found: ')}"
    if text.startswith("Unsupported measures"):
        if ways := re.findall(r"^ - .*?\((.*)\)$", text, re.MULTILINE):
            return f"a package is missing: {' or '.join(ways)}"
        return "no tool of ir_measures computes it with these parameters"
    return " ".join(text.split()) or "invalid parameters"


def _meant(notation: str) -> str:
    """What a measure in another notation is in ir_measures'; "" if that is not known.

    trec_eval's names (ndcg_cut_10), other cases and separators (ndcg@10, Recall_100, hits@5), lists
    with commas.
    """
    if "," in notation and "(" not in notation and "@" in notation:
        return " ".join(notation.replace(",", " ").split()) + " (separated by spaces)"
    try:
        with redirect_stdout(io.StringIO()):  # it prints which parts of a group it skips
            return " ".join(map(str, ir_measures.parse_trec_measure(notation)[:3]))
    except (KeyError, TypeError, ValueError):
        pass
    found = re.fullmatch(r"([A-Za-z_-]+?)(?:_?cut|_?at)?[@._]?(\d*)", notation, re.ASCII)
    names = {name.casefold(): name for name in ir_measures.measures.registry}
    names |= {"hits": "Success", "hit": "Success", "hr": "Success", "prec": "P"}
    name = names.get(re.sub(r"[\W_]", "", found[1]).casefold()) if found else None
    for at in (found[2], "10") if found and name else ():
        try:
            parsed = ir_measures.parse_measure(f"{name}@{at}" if at else name)
            _check_parameters(parsed)
            ir_measures.evaluator([parsed], {})
        except ValueError:
            continue
        return str(parsed)
    return ""
