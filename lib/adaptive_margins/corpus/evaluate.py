"""Rank the queries of a collection with an encoder, and score the ranking."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from adaptive_margins.corpus.finetuned import Finetuned, about_collection, comparisons
from adaptive_margins.corpus.validation import choose_weight
from adaptive_margins.data.collection import Collection, Texts
from adaptive_margins.data.sources import open_collection
from adaptive_margins.data.splits import fold_queries, split_queries
from adaptive_margins.data.text import DataError, alike
from adaptive_margins.data.trec import Qrels, Run, read_marked_run, run_tag, truncated, write_run
from adaptive_margins.encoder.load import default_device, encoder_identity, open_encoder, options_of
from adaptive_margins.encoder.options import EncoderOptions
from adaptive_margins.errors import ArgumentError
from adaptive_margins.evaluation.external_runs import Scored, finds_relevant, score
from adaptive_margins.evaluation.measures import Evaluation, cutoff, evaluate, named, relevant
from adaptive_margins.retrieval.bm25 import BM25, without_hits
from adaptive_margins.retrieval.dense import FUSED, DenseRetriever, hybrid
from adaptive_margins.retrieval.embedding_cache import cache_folder
from adaptive_margins.retrieval.exact import count_self, without_self

DEPTH = 100
"""Passages that are ranked for a query, at least, if no depth is given."""


@dataclass(frozen=True)
class CorpusEvaluation:
    """A scored ranking."""

    evaluation: Evaluation  # measure → mean, and → query id → value, over all judged queries
    run: Run  # query id → docid → cosine similarity, or fused score (`hybrid`)
    report: dict[str, Any]  # what ``evaluate --json`` prints, without the values of each query


def evaluate_encoder(
    source: str,
    model: str,
    *,
    mode: Literal["full", "rerank", "hybrid"] = "full",
    query_set: str | None = None,
    candidates: Path | None = None,
    depth: int | None = None,
    measures: Sequence[str] = ("nDCG@10", "R(rel=1)@100"),
    exclude_self: bool = False,
    options: EncoderOptions | None = None,
    device: str | None = None,
    run_out: Path | None = None,
    cache: bool = True,
) -> CorpusEvaluation:
    """Rank a set of queries with an encoder and score the ranking.

    If `finetune` split this collection to train the encoder, its test queries alone are ranked.

    Args:
        source: a folder, "pydocs" or an ir_datasets id (`open_collection`).
        model: an encoder (`open_encoder`).
        mode: "full" ranks all passages (exact search), "rerank" orders candidates again, "hybrid"
            fuses the full ranking with BM25's (`choose_weight`) and compares all three.
        query_set: None takes the test set, or the only one.
        candidates: a TREC run to rerank, in the place of BM25's best passages.
        depth: passages ranked for a query; None takes 100, or what the measures need.
        measures: in ir_measures' notation.
        exclude_self: leave out the passage whose id is the query's.
        options: prompts, dimensions and length of the encoder.
        device: as torch calls it; None takes a GPU if there is one.
        run_out: a file to write the ranking to, as a TREC run.
        cache: whether embeddings are looked up, and left, in the `cache_folder`.

    Raises:
        ArgumentError: the query set is not there, or the depth is too small for a measure.
        DataError: the collection or the candidates are malformed, or nothing is judged.
        MeasureError, EncoderError: a measure or the encoder cannot be used.
    """
    measures = [named(measure) for measure in measures]
    if candidates and mode != "rerank":
        raise ArgumentError("candidates", f"candidates are reranked with mode rerank, not {mode}")
    collection, split = held_out(open_collection(source), model)
    name = _set(collection, query_set)
    queries, qrels, passages = collection.queries[name], collection.qrels[name], collection.passages
    judged = _judged(qrels, measures, f"{source}: none of the queries of {name!r} is judged")
    given, complete = _given(candidates, queries, passages)
    depth = _depth(depth, given, measures, len(passages))
    encoder = open_encoder(model, options or EncoderOptions(), device=device or default_device())
    retriever = DenseRetriever(encoder, passages, cache=cache_folder(cache))
    if not exclude_self:
        warn_of_self(queries, passages, "; --exclude-self leaves them out, as BEIR does")
    fused: dict[str, Any] = {}
    if mode == "full":
        run = retriever.search(queries, depth or DEPTH, exclude_self=exclude_self)
    elif mode == "hybrid":
        settings = (depth or DEPTH, exclude_self, measures)
        run, fused["hybrid"] = _hybrid(retriever, collection, name, model, *settings)
    else:
        run = retriever.rerank(queries, _candidates(collection, name, given, depth, exclude_self))
    # A ranking by this call is complete; external candidates may be truncated.
    complete = complete and not (candidates and depth)
    available = len(passages) - exclude_self
    scored = score(run, qrels, measures, passages=available, complete=complete)
    _check_scores(scored, candidates, run, qrels, judged)
    most = max(map(len, run.values()))
    if run_out:
        asked = depth if depth and not candidates else most + complete
        write_run(run, Path(run_out), run_tag("adaptive-margins", run, asked, len(passages)))
    report = {
        "measures": scored.evaluation.mean,
        "queries": len(qrels),
        "relevant_queries": {measure: len(found) for measure, found in judged.items()},
        "missing": scored.missing,
        "run": str(run_out) if run_out else None,
        "mode": mode,
        "set": name,
        "depth": depth or most,
        "model": model,
        "identity": encoder_identity(model),
        "options": options_of(encoder),
        "collection": about_collection(collection, source),
        "split": split,
        "excluded_self": exclude_self,
        "truncated": {**retriever.truncation, "limit": retriever.query_length},
        **fused,
    }
    return CorpusEvaluation(scored.evaluation, run, report)


def held_out(collection: Collection, model: str) -> tuple[Collection, str]:
    """Return the collection split as for the training of the encoder, and a sentence about it.

    `finetune` splits a collection without training queries. All of its queries would test such an
    encoder on those that it was trained on. It is the same collection if the split gives the test
    queries that are stored with the encoder. Any other collection is returned as it is, with "";
    there is a warning if it has some of these queries, as a later version has.
    """
    files = ("training.json", "queries.test.tsv")
    if not all((Path(model) / name).is_file() for name in files):
        return collection, ""
    done = Finetuned.load(Path(model))
    if not (split := done.report.get("collection", {}).get("split")):
        return collection, ""
    seed, folds, tested = done.report["seed"], done.report.get("folds"), _asked(done.queries)
    with suppress(DataError):  # too few queries: it is another collection
        if folds:
            (*_, parts), _ = fold_queries(collection, len(folds), seed=seed)
        else:
            parts, _ = split_queries(collection, seed=seed)
        if _asked(parts.queries["test"]) == tested:
            return parts, f"The encoder was trained on this collection. {split}"
    here = set().union(*map(_asked, collection.queries.values()))
    if here & tested and here - tested:
        warnings.warn(
            f"{model} was trained with queries of {collection.name}, which has changed since:"
            " measures of them may be too high",
            stacklevel=3,
        )
    return collection, ""


def _asked(queries: Texts) -> set[tuple[str, str]]:
    """Ids and texts, as they are stored with an encoder."""
    return {(qid, " ".join(queries[qid].split())) for qid in queries.ids}


def _set(collection: Collection, wanted: str | None) -> str:
    """The set of queries to rank."""
    there = [name for name, queries in collection.queries.items() if len(queries)]
    if not there:
        raise DataError(f"{collection.name} has passages, but no queries to evaluate with")
    name = wanted or ("test" if len(there) > 1 else there[0])
    if name not in there:
        message = f"{collection.name} has no queries {name!r}; it has {', '.join(there)}"
        raise ArgumentError("query_set", message)
    return name


def _judged(qrels: Qrels, measures: Sequence[str], unjudged: str) -> dict[str, Qrels]:
    """Measure → relevant passages; what cannot be computed is an error before any encoding."""
    if not qrels:
        raise DataError(f"{unjudged}; nothing to evaluate")
    judged = {measure: relevant(qrels, measure) for measure in measures}
    evaluate(qrels, {}, measures)
    return judged


def _depth(
    depth: int | None, given: Run | None, measures: Sequence[str], passages: int
) -> int | None:
    """Passages to rank for a query; None for all candidates of a given run."""
    needed = max(map(cutoff, measures))
    if depth is None and given is None:
        depth = max(DEPTH, needed)
    if depth is not None and depth < min(needed, passages):
        short = f"{depth} passages a query are too few for {' '.join(measures)}"
        raise ArgumentError("depth", f"{short}: {needed} are needed")
    return depth


def _given(path: Path | None, queries: Texts, passages: Texts) -> tuple[Run | None, bool]:
    """The candidates of the queries in a file, if one is given, and whether they are complete.

    DataError if there are none, or a passage is unknown.
    """
    if path is None:
        return None, True
    candidates, complete = read_marked_run(path)
    asked = {qid: hits for qid, hits in candidates.items() if qid in queries}
    if not asked:
        hint = alike(candidates, queries.ids)
        what = f"{path} has none of the {len(queries):,} queries that are asked"
        raise DataError(f"{what}; {hint}" if hint else what)
    unknown = [docid for hits in asked.values() for docid in hits if docid not in passages]
    if unknown:
        hint = alike(unknown, passages.ids) or "is it a run of this collection?"
        count = sum(map(len, asked.values()))
        raise DataError(
            f"{path}: {len(unknown):,} of {count:,} candidates are unknown passages, first"
            f" {unknown[0]!r}; {hint}"
        )
    return asked, complete


def _candidates(
    collection: Collection, name: str, given: Run | None, depth: int | None, exclude_self: bool
) -> Run:
    """The best ``depth`` passages of each query, by the given run or by BM25."""
    if given is None:
        more = (depth or DEPTH) + exclude_self
        given = BM25(collection.passages).search(collection.queries[name], more)
        without_hits({qid: hits for qid, hits in given.items() if qid in collection.qrels[name]})
    if exclude_self:
        given = without_self(given)
    return truncated(given, depth)


def _hybrid(
    retriever: DenseRetriever,
    collection: Collection,
    name: str,
    model: str,
    depth: int,
    exclude_self: bool,
    measures: Sequence[str],
) -> tuple[Run, dict[str, Any]]:
    """The fused ranking; and its weight, the measures of all three rankings, and paired tests."""
    bm25, deeper, qrels = BM25(collection.passages), max(depth, FUSED), collection.qrels[name]

    def rank(queries: Texts) -> dict[str, Run]:
        dense = retriever.search(queries, deeper, exclude_self=exclude_self)
        found = bm25.search(queries, deeper + exclude_self)
        return {"dense": dense, "bm25": without_self(found, deeper) if exclude_self else found}

    fusion, runs = choose_weight(model, collection, name, rank), rank(collection.queries[name])
    fused = hybrid(runs["dense"], runs["bm25"], depth, fusion["weight"])
    runs = {system: truncated(run, depth) for system, run in runs.items()} | {"hybrid": fused}
    found = {system: evaluate(qrels, run, measures) for system, run in runs.items()}
    empty = without_hits({qid: runs["bm25"][qid] for qid in qrels})
    facts = {"queries": len(qrels), "without_hits": empty}
    return fused, {
        **fusion,
        "bm25": facts,
        "measures": {system: evaluation.mean for system, evaluation in found.items()},
        "comparisons": comparisons(found, measures[0], len(relevant(qrels, measures[0])), facts),
    }


def warn_of_self(queries: Texts, passages: Texts, way: str = "") -> None:
    """Warn if queries are passages, too, and name the ``way`` out."""
    if count := count_self(queries, passages):
        warnings.warn(
            f"{count:,} of {len(queries):,} queries are themselves passages, with the same id, and"
            f" are ranked like others{way}",
            stacklevel=3,
        )


def _check_scores(
    scored: Scored, candidates: Path | None, run: Run, qrels: Qrels, judged: dict[str, Qrels]
) -> None:
    """Raise DataError for a measure that was refused; warn where scores are unreliable."""
    if scored.refused:
        raise DataError(f"{candidates}: {'; '.join(scored.refused.values())}")
    if scored.missing and candidates:
        warnings.warn(
            f"judged queries without candidates count 0: {scored.missing:,} of {len(qrels):,}",
            stacklevel=3,
        )
    for found in judged.values():
        if not finds_relevant(run, found):
            count = sum(map(len, found.values()))
            warnings.warn(
                f"none of the {count:,} relevant passages is among the hits", stacklevel=3
            )
            break
