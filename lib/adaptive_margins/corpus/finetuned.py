"""The folder that `finetune` writes: its files, and the comparison of its rankings."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pandas as pd

from adaptive_margins.corpus.model_card import model_card
from adaptive_margins.corpus.settings import FinetuneError, Job, loss_name
from adaptive_margins.corpus.validation import SELECTION, Validation, with_positive
from adaptive_margins.data.collection import Collection, Texts, read_queries
from adaptive_margins.data.sources import open_collection
from adaptive_margins.data.text import DataError
from adaptive_margins.data.trec import (
    Qrels,
    Run,
    qrels_text,
    read_qrels,
    read_run,
    run_tag,
    write_run,
)
from adaptive_margins.evaluation.comparison import compared
from adaptive_margins.evaluation.measures import Evaluation, evaluate
from adaptive_margins.evaluation.significance import (
    FEWEST,
    Comparison,
    more_queries,
    paired_interval,
)
from adaptive_margins.training import TrainingResult

RUNS = ("start", "trained", "bm25", "hybrid")
"""Rankings of the test queries: the encoder before and after, BM25, and the latter two fused."""
_PAIRS = [("trained", "start"), ("trained", "bm25"), ("hybrid", "trained"), ("hybrid", "bm25")]
_PAIRS += [("hybrid", "dense"), ("dense", "bm25")]  # of an encoder that was not trained here


@dataclass(frozen=True)
class Finetuned:
    """A finished fine-tuning: a Sentence Transformers folder, and its report, ``training.json``."""

    folder: Path
    report: dict[str, Any]

    @classmethod
    def load(cls, folder: Path) -> Finetuned:
        """Open what `finetune` wrote. Raises FinetuneError if the folder is not that."""
        path = Path(folder) / "training.json"
        try:
            return cls(Path(folder), json.loads(path.read_text("utf-8")))
        except (OSError, ValueError) as error:
            raise FinetuneError(
                f"{folder} is not a folder that `train` wrote: {path.name} cannot be read ({error})"
            ) from None

    @property
    def curve(self) -> pd.DataFrame:
        """The learning curve on validation: a row per evaluation, step 0 included."""
        return pd.read_parquet(self.folder / "curve.parquet")

    @property
    def targets(self) -> pd.DataFrame:
        """A row per step: mean, min and max of φ(d⁺, d⁻) over the batch (Figure 6)."""
        return pd.read_parquet(self.folder / "targets.parquet")

    @property
    def queries(self) -> Texts:
        """The test queries."""
        return read_queries(self.folder / "queries.test.tsv", trusted=True)

    @property
    def qrels(self) -> Qrels:
        """The judgements of the test queries."""
        return read_qrels(self.folder / "qrels.test.txt", trusted=True)

    def run(self, name: str) -> Run:
        """The ranking of all passages for the test queries by one of `RUNS`."""
        return read_run(self.folder / "runs" / f"{name}.test.run.gz", trusted=True)

    def per_query(self, measure: str = SELECTION, other: str = "start") -> pd.DataFrame:
        """Return the values of a measure: a row per test query with judgements.

        Columns: qid, query, one for each of `RUNS`, and difference = trained − ``other``, by which
        the rows are sorted, the largest loss first.

        Raises:
            ValueError: the measure is unknown.
        """
        queries, qrels = self.queries, self.qrels
        table = pd.DataFrame({"qid": list(qrels), "query": [queries[qid] for qid in qrels]})
        for name in RUNS:
            values = evaluate(qrels, self.run(name), [measure]).per_query[measure]
            table[name] = table["qid"].map(values)
        table["difference"] = table["trained"] - table[other]
        return table.sort_values("difference", kind="stable", ignore_index=True)


def write_results(
    folder: Path,
    report: Mapping[str, Any],
    result: TrainingResult,
    runs: Mapping[str, Run],
    collection: Collection,
) -> None:
    """Write the files that `Finetuned` reads, and the model card, next to the encoder."""
    text = json.dumps(report, indent=2, ensure_ascii=False) + "\n"
    queries, qrels = collection.queries["test"], collection.qrels["test"]
    lines = [f"{qid}\t{' '.join(queries[qid].split())}\n" for qid in queries.ids]
    for name, content in (
        ("README.md", model_card(report)),
        ("training.json", text),
        ("queries.test.tsv", "".join(lines)),
        ("qrels.test.txt", qrels_text(qrels)),
    ):
        (folder / name).write_text(content, encoding="utf-8")
    result.curve.to_parquet(folder / "curve.parquet", index=False)
    result.targets.to_parquet(folder / "targets.parquet", index=False)
    for name, run in runs.items():
        tag = run_tag(name, run, report["settings"]["depth"], len(collection.passages))
        write_run(run, folder / "runs" / f"{name}.test.run.gz", tag)


def about_collection(collection: Collection, source: str) -> dict[str, Any]:
    """Return what a report states of its collection."""
    return {
        "name": collection.name,
        "source": source,
        "fingerprint": collection.fingerprint,
        "passages": len(collection.passages),
    }


# ---- what is forgotten -------------------------------------------------------------------------


def second_collection(job: Job) -> tuple[Validation, dict[str, Any]]:
    """Open the collection that shows what is forgotten; its evaluation, of all passages, and facts.

    Its queries are those of "test", or else of "validation" or "train".

    Raises:
        DataError: as `open_collection`; or no query has a relevant passage.
    """
    source = str(job.also)
    collection = open_collection(source)
    for name in ("test", "validation", "train"):
        if qrels := with_positive(collection.qrels.get(name, {})):
            queries, passages = {"validation": collection.queries[name]}, collection.passages
            part = Collection(source, passages, queries, {"validation": qrels})
            evaluate = Validation(part, [], len(passages), job.settings.precision, job.seed)
            return evaluate, {**about_collection(collection, source), "set": name}
    raise DataError(
        f"{source}: no query has a relevant passage, but what is forgotten is measured with queries"
    )


def not_worse(trained: Evaluation, start: Evaluation) -> dict[str, Any]:
    """Compare; the verdict is "not worse", "worse", "undecided" or "too few queries".

    "not worse" is one half of TOST: by a one-sided t test at .05 the mean difference is above
    −margin, as is the confidence interval of 90 %. A smaller loss than that may be significant.
    """
    a, b = (evaluation.per_query[SELECTION] for evaluation in (trained, start))
    found = compared(a, b, SELECTION)
    if found["ci"] is not None:
        within = paired_interval(a, b, confidence=0.9)[1] > -found["margin"] and any(b.values())
        other = "worse" if found["verdict"] == "worse" else "undecided"
        found["verdict"] = "not worse" if within else other
    return {"start": start.mean[SELECTION], "trained": trained.mean[SELECTION], **found}


# ---- the outcome ------------------------------------------------------------------------------


def comparisons(
    evaluations: Mapping[str, Evaluation], measure: str, usable: int, bm25: Mapping[str, int]
) -> dict[str, dict[str, Any]]:
    """Compare pairs of rankings; not with BM25 if it finds nothing for most of the queries."""
    withheld = 2 * bm25["without_hits"] > bm25["queries"]
    found = {}
    for a, b in (pair for pair in _PAIRS if evaluations.keys() >= {*pair}):
        untested = "withheld" if withheld and "start" not in (a, b) else ""
        untested = "too few queries" if usable < FEWEST else untested
        x, y = (evaluations[name].per_query[measure] for name in (a, b))
        found[f"{a} vs {b}"] = compared(x, y, measure, untested)
    return found


_WORDS = {
    "better": "{a} is better than {b}",
    "worse": "{a} is worse than {b}",
    "equivalent": "{a} is equivalent to {b} within ±{margin}",
    "not worse": "{a} is not worse than {b} by more than {margin}",
    "undecided": "whether {a} is better or worse than {b} is undecided",
    "too few queries": "there are too few queries to compare {a} with {b}",
    "withheld": "{a} is not compared with {b}",
}


def verdict(report: Mapping[str, Any]) -> str:
    """Return the outcome of a report in sentences, with 95 % confidence intervals."""
    pseudo = (
        "All queries are pseudo-queries from the passages; real queries would be better evidence"
    )
    alpha, weight, also = report["merge"]["alpha"], report["hybrid"]["weight"], report.get("also")
    mix = f"Its parameters are {alpha:g} · the trained + {1 - alpha:g} · the original ones"
    fusion = f"Its weight next to BM25, chosen on validation, is {weight:g} (0: BM25, 1: it alone)"
    sentences = [
        _compared(report, "trained", "start") if alpha else _kept(report),
        *([mix] if 0 < alpha < 1 else []),
        _compared(report, "trained", "bm25"),
        fusion,
        *(_compared(report, "hybrid", b) for b in ("trained", "bm25") if 0 < weight < 1),
    ]
    if folds := report.get("folds"):
        pairs = (pair.split(" vs ") for pair in report["comparisons"])
        sentences = [_FOLDS.format(len(folds)), *(_compared(report, a, b) for a, b in pairs)]
        sentences += [] if alpha else [f"The encoder in the folder: {_kept(report)}"]
    sentences = [
        *([_chosen(report)] if "choice" in report else []),
        *sentences,
        *([_compared(report, "trained", "start", also)] if also and alpha else []),
        *([pseudo] if report["collection"]["pseudo"] else []),
        *_limits_of_bm25(report),
    ]
    n, usable = report["comparisons"]["trained vs start"]["n"], report["relevant_queries"]
    of_them = f", of which {usable} with a relevant passage" if usable < n else ""
    sentences.append(f"Confidence intervals are of 95 %, over {n} test queries{of_them}")
    return ". ".join(sentences) + "."


_FOLDS = (
    "Each query was ranked by the one of {} encoders that was not trained on it: together they are"
    " the trained encoder here; the one in the folder was trained in the same way"
)


def _chosen(report: Mapping[str, Any]) -> str:
    """What the choice of a loss may have cost."""
    found = report["choice"]
    names = ("validation_gain", "test_gain", "optimism")
    there, test, optimism = (number(found[name], sign=True) for name in names)
    error = found["standard_error"]
    folds = "The encoders of the folds, each with the best loss there,"
    who = folds if "folds" in report else "What is kept of it"
    return (
        f"Of {len(found['trainings'])} losses {loss_name(found['chosen'])} was the best on"
        f" validation. {who} gained {there} {SELECTION} on validation and {test} on the test"
        f" queries, on which nothing was chosen: an optimism of {optimism}"
        + ("" if error is None else f" (standard error {number(error)})")
    )


def _kept(report: Mapping[str, Any]) -> str:
    """Why the trained encoder was not kept."""
    start, *others = report["merge"]["values"]
    limit = f"a gain of not more than {report['settings']['standard_errors']:g} standard error"
    if report["merge"]["standard_error"] is None:
        limit = "one query is too few to show a gain"
    why = (
        f"{SELECTION} {number(max(others))} at best, alone or mixed with the original, against"
        f" {number(start)} at the start: {limit}"
    )
    measure, value = next(iter(report["measures"]["start"].items()))
    return (
        f"Training did not help on the validation queries ({why}), so the original encoder was"
        f" kept: {measure} {number(value)} on the test queries"
    )


def _compared(
    report: Mapping[str, Any], a: str, b: str, also: Mapping[str, Any] | None = None
) -> str:
    """A sentence on two of `RUNS`, or on the first two as ``also`` found on another collection."""
    found = also or report["comparisons"][f"{a} vs {b}"]
    trained = "the trained encoder" if b == "start" else "it"
    if also and "folds" in report:  # whose encoders together are "the trained encoder"
        trained = "the encoder in the folder"
    names = {
        "trained": trained if a == "trained" else "the encoder alone",
        "start": "the one it started from",
        "bm25": "BM25",
        "hybrid": "its fusion with BM25",
    }
    margin = number(found["margin"] or 0)
    words = _WORDS[found["verdict"]].format(a=names[a], b=names[b], margin=margin)
    text = f"{words[0].upper()}{words[1:]}"
    if also:
        text = f"On {also['name']} ({also['n']:,} queries) {words}"
    means = also or {name: report["measures"][name][found["measure"]] for name in (a, b)}
    text += f": {found['measure']} {number(means[a])} against {number(means[b])}"
    text += f", {change(found)}" if found["ci"] is not None else ""
    if found["verdict"] == "undecided" and not also and found["ci"][0] < found["ci"][1]:
        tested = Comparison(**{field.name: found[field.name] for field in fields(Comparison)})
        more = more_queries(tested, 0.05)
        text += ". About {more:,} more judged queries would show {would_show}".format(**more)
    return text


def _limits_of_bm25(report: Mapping[str, Any]) -> list[str]:
    bm25, sentences = report["bm25"], []
    if bm25["without_hits"]:
        withheld = report["comparisons"]["trained vs bm25"]["verdict"] == "withheld"
        text = (
            f"BM25 finds nothing for {bm25['without_hits']:,} of {bm25['queries']:,} test queries"
        )
        sentences.append(text + (", so nothing is concluded from it" if withheld else ""))
    if bm25["bigram_passages"]:
        sentences.append(
            f"{bm25['bigram_passages']:,} of {report['collection']['passages']:,} passages have"
            " text without spaces between words, which BM25 splits into character bigrams"
        )
    return sentences


def change(found: Mapping[str, Any]) -> str:
    """Return the difference of a comparison, with its confidence interval if there is one."""
    ends = ", ".join(number(end, sign=True) for end in found["ci"] or ())
    return number(found["difference"], sign=True) + (f" [{ends}]" if ends else "")


def number(value: float, *, sign: bool = False) -> str:
    """Return three digits, no zero before the point: .412, +.027, −.003."""
    text = f"{abs(value):.3f}".removeprefix("0")
    if value < 0 and float(text):
        return f"−{text}"
    return f"+{text}" if sign else text
