"""Measures of a run (ir_measures)."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

import ir_measures
import numpy as np
from ir_measures.measures import diversity

from adaptive_margins.data.trec import MAX_GRADE, Qrels, Run, top
from adaptive_margins.errors import AdaptiveMarginsError

_EXAMPLES = '"nDCG@10", "Success(rel=2)@5", "R(rel=2)@50", "RR(rel=2)@10"'


class MeasureError(AdaptiveMarginsError, ValueError):
    """A measure that is unknown or cannot be computed; the message names it and the reason."""


@dataclass(frozen=True)
class Evaluation:
    """Scores of a run.

    Attributes:
        mean: measure → mean over the queries of the qrels.
        per_query: measure → query id → value.
    """

    mean: dict[str, float]
    per_query: dict[str, dict[str, float]]


def evaluate(qrels: Qrels, run: Run, measures: Sequence[str]) -> Evaluation:
    """Score a run by measures in ir_measures' notation, e.g. "nDCG@10" or "Success(rel=2)@5".

    Each query of the qrels counts; one without hits or relevant passages counts 0. Other queries
    of the run are ignored. Hits are ranked as in trec_eval (`top`), whatever tool computes the
    measure.

    Raises:
        MeasureError: a measure is unknown or cannot be computed, e.g. for the given grades.
        ValueError: there are no qrels or no measures, or a score is not a finite number.
    """
    if not qrels:
        raise ValueError("the qrels are empty: there is no query to evaluate")
    if not measures:
        raise ValueError("no measure was given")
    parsed = {notation: _measure(notation) for notation in measures}
    # Tools differ in their handling of ids, ties and empty lists. So queries are numbered, hits are
    # named by their ranks, and other judged passages by the next numbers. Scores are positive, as
    # Compat takes 0 for passages that were not found.
    queries = {str(number): qid for number, qid in enumerate(qrels, start=1)}
    judged: Qrels = {}
    ranked: Run = {}
    for number, qid in queries.items():
        ids = {docid: str(r) for r, (docid, _) in enumerate(top(run.get(qid, {})), start=1)}
        if ids:
            ranked[number] = {rank: 1.0 + len(ids) - int(rank) for rank in ids.values()}
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
    """Values of a measure for ``queries`` (number → id), 0 if the tool returns none."""
    values = dict.fromkeys(queries, 0.0)
    try:
        for metric in ir_measures.iter_calc([measure], judged, ranked):
            values[metric.query_id] = float(metric.value)
    except Exception as error:  # whatever a tool raises
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        if ir_measures.gdeval.supports(measure):
            reason += "; it takes grades of at most 4: map them, or use another, such as nDCG@10"
        raise MeasureError(f"{notation} cannot be computed for this run ({reason})") from error
    for number, value in values.items():
        if not math.isfinite(value):
            raise MeasureError(f"{notation} of query {queries[number]!r} is {value}, not a number")
    return list(values.values())


def relevant(qrels: Qrels, measure: str) -> Qrels:
    """Return the judgements of at least the measure's ``rel`` (default 1), without empty queries.

    Raises MeasureError if no query has any, or the measure is unknown or cannot be computed.
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
            f"no query has a relevant passage: {len(qrels):,} judged queries, grades"
            f" {counts or 'none'}; {measure} needs grade {level} or more"
        )
    return found


def cutoff(measure: str) -> int:
    """Return a measure's cutoff; 1 if it has none."""
    return int(_measure(measure).params.get("cutoff", 1))


def named(measure: str) -> str:
    """Return the measure's full name, with ``rel=1`` (ir_measures' default) where it applies.

    "R@100" is "R(rel=1)@100", "MRR@10" is "RR(rel=1)@10"; "Success(rel=2)@5" and measures of
    grades, like "nDCG@10", are unchanged. Raises MeasureError for one that cannot be computed.
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
    """Parse a measure; MeasureError if it is unknown or crashes later, as nDCG@-3 does."""
    try:
        return _parsed(notation)
    except (NameError, SyntaxError, TypeError, ValueError) as error:
        meant = _meant(str(notation))
        way_out = f"did you mean {meant}?" if meant else f"examples of measures: {_EXAMPLES}"
        raise MeasureError(
            f"cannot compute the measure {notation!r} ({_reason(error)}); {way_out}"
        ) from error


def _parsed(notation: str) -> ir_measures.Measure:
    """Parse a measure, and check that a tool computes it with its parameters."""
    measure = ir_measures.parse_measure(notation)
    _check_parameters(measure)
    ir_measures.evaluator([measure], {})
    return measure


def _check_parameters(measure: ir_measures.Measure) -> None:
    try:
        measure.validate_params()
    except AssertionError as error:  # "invalid param max_rel=<object object at 0x…>"
        raise ValueError(re.sub("=<.*>", " is missing", str(error))) from None
    for name in ("cutoff", "rel"):
        if (value := measure.params.get(name, 1)) < 1:
            raise ValueError(f"{name} must be at least 1, not {value}")
    for name in ("p", "recall"):
        if not 0 <= (value := measure.params.get(name, 0)) <= 1:
            raise ValueError(f"{name} must be between 0 and 1, not {value}")
    if (recall := measure.params.get("recall", 0)) != round(recall, 2):  # ir_measures rounds it
        raise ValueError(f"recall must have at most two decimals, not {recall}")
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
    """A measure in ir_measures' notation, from trec_eval's or a misspelt one; "" if unknown."""
    if "," in notation and "(" not in notation and "@" in notation:
        return " ".join(notation.replace(",", " ").split()) + " (separated by spaces)"
    found = re.fullmatch(r"([A-Za-z_-]+?)(?:_?cut|_?at)?[@._]?(\d*)", notation, re.ASCII)
    names = {name.casefold(): name for name in ir_measures.measures.registry}
    names |= {"hits": "Success", "hit": "Success", "hr": "Success", "prec": "P", "reciprank": "RR"}
    if not found or not (name := names.get(re.sub(r"[\W_]", "", found[1]).casefold())):
        return ""
    for at in (found[2], "10"):
        with suppress(ValueError):
            return str(_parsed(f"{name}@{at}" if at else name))
    return ""
