"""Runs of other systems: TREC run files in a folder, scored as this project's runs are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from adaptive_margins.data.text import Problems
from adaptive_margins.data.trec import Qrels, Run, read_run, visible
from adaptive_margins.evaluation.measures import Evaluation, cutoff, evaluate
from adaptive_margins.markup import active

SUFFIXES = (".run", ".trec", ".txt")
"""What a run file's name may end in; ``.gz`` may follow."""


def read_external_runs(folder: Path, sets: Sequence[str]) -> dict[str, dict[str, Run]]:
    """Read ``folder/SET/NAME.run`` for each of ``sets``: name → set → run, both sorted.

    The suffix may be any of `SUFFIXES`, with ``.gz`` or without. A NAME that is a key of
    ``book/printed/table3.csv`` or ``table4.csv`` is that row of the paper. Hidden files are
    ignored; a folder that does not exist has no runs.

    Raises:
        DataError: a folder is not one of ``sets``, a file has another suffix or lies elsewhere,
            two files have one name, a file has no hits, or it is malformed (as `read_run`).
    """
    folder = Path(folder)
    if not folder.exists():
        return {}
    problems = Problems()
    paths: dict[tuple[str, str], Path] = {}
    for place in visible(folder):
        if not place.is_dir() or place.name not in sets:
            known = ", ".join(sets)
            problems.add(place, 0, f"expected a folder named like a query set of this run: {known}")
            continue
        for path in visible(place):
            name = path.name.removesuffix(".gz")
            stem, dot, suffix = name.rpartition(".")
            if not path.is_file() or not stem or dot + suffix not in SUFFIXES:
                allowed = ", ".join(f"NAME{suffix}" for suffix in SUFFIXES)
                problems.add(
                    path, 0, f"expected a run file named {allowed}, or one of these with .gz"
                )
            elif fault := active(stem):
                problems.add(path, 0, fault)
            elif (stem, place.name) in paths:
                other = paths[stem, place.name].name
                problems.add(path, 0, f"{other} is a run named {stem!r}, too; keep one of them")
            else:
                paths[stem, place.name] = path
    problems.check()
    found: dict[str, dict[str, Run]] = {}
    for (name, query_set), path in sorted(paths.items()):
        found.setdefault(name, {})[query_set] = read_run(path)
    return found


@dataclass(frozen=True)
class Scored:
    """Scores of a run.

    Attributes:
        evaluation: of the measures that could be computed, perhaps none.
        refused: measure → why it was not computed.
        missing: number of judged queries without hits, which count 0.
    """

    evaluation: Evaluation
    refused: dict[str, str]
    missing: int


def score(
    run: Run,
    qrels: Qrels,
    measures: Sequence[str],
    *,
    passages: int | None = None,
    complete: bool = False,
) -> Scored:
    """Score a run by the measures that it is deep enough for.

    Every judged query counts, as with ``trec_eval -c``; others are ignored. A measure with a cutoff
    k is refused if no judged query has k hits (Recall@1000 of 100 hits is another measure), and
    every measure if no judged query is in the run.

    A run of all ``passages`` of the collection is deep enough, and so is a ``complete`` one, which
    has all hits that could be found. Raises ValueError as `evaluate` does.
    """
    depths = [len(run[qid]) for qid in qrels if run.get(qid)]
    refused = {}
    for notation in measures:
        needed = cutoff(notation)
        if not qrels.keys() & run.keys():
            refused[notation] = f"none of the {len(qrels)} judged queries is in the run"
        elif not complete and (most := max(depths, default=0)) < min(needed, passages or needed):
            refused[notation] = (
                f"{notation} needs {needed:,} hits a query; the run has at most {most:,}"
            )
    allowed = [notation for notation in measures if notation not in refused]
    evaluation = evaluate(qrels, run, allowed) if allowed else Evaluation({}, {})
    return Scored(evaluation, refused, len(qrels) - len(depths))


def finds_relevant(run: Run, relevant: Qrels) -> bool:
    """Whether a run has any of the ``relevant`` passages (`measures.relevant`) of its queries."""
    return any(not judged.keys().isdisjoint(run.get(qid, {})) for qid, judged in relevant.items())
