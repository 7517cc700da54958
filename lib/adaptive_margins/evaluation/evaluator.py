"""An evaluator for trainers of Sentence Transformers: any collection, any measure, paired tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from sentence_transformers.base.evaluation import BaseEvaluator

from adaptive_margins.data.collection import Collection, Texts
from adaptive_margins.data.sources import open_collection
from adaptive_margins.data.trec import Run
from adaptive_margins.encoder.checks import EncoderError
from adaptive_margins.encoder.load import prompts
from adaptive_margins.errors import ArgumentError
from adaptive_margins.evaluation.comparison import compared
from adaptive_margins.evaluation.measures import Evaluation, cutoff, evaluate, named, relevant
from adaptive_margins.evaluation.significance import FEWEST, paired_interval
from adaptive_margins.retrieval.exact import exact_search


class CollectionEvaluator(BaseEvaluator):
    """Score an encoder's exact ranking of a collection: an evaluator of Sentence Transformers.

    It is given to a ``SentenceTransformerTrainer``, or called with any SentenceTransformer, with
    its prompts and its similarity, cosine or dot product. A call returns the mean of a measure as
    "nDCG@10", its 95 % confidence interval as "nDCG@10_low" and "nDCG@10_high", the mean of a group
    as "nDCG@10_GROUP", and the mean difference from a baseline as "nDCG@10_difference". If it is
    given a folder, ``Collection_evaluation_NAME_results.csv`` there gets the metrics, and
    ``…_per_query.csv`` the values of each query.

    Args:
        collection: a `Collection`, or what `open_collection` opens.
        query_set: the set of judged queries to rank.
        measures: in ir_measures' notation; the first one is ``primary_metric``.
        name: prefix of the metrics, and part of file names.
        groups: query id → group; a query may have none.
        baseline: measure → query id → value of the same queries: ``per_query`` of an earlier call,
            or ``evaluate(qrels, run, measures).per_query`` of any run. May be set later.
        batch_size: texts encoded at a time.

    Attributes:
        run: ranking of the last call, at least 100 deep (as a measure without a cutoff looks):
            query id → docid → score.
        per_query: measure → query id → value, of the last call.
        comparisons: measure → `compare` with the baseline, of the last call; its ``verdict`` is
            "too few queries" if fewer than 10 have a relevant passage.

    Raises:
        ArgumentError, DataError, MeasureError: there are no judgements, ``groups`` are of other
            queries or named as a metric, or as `open_collection`, `evaluate` and `relevant`.
        ArgumentError, EncoderError: when called, if the baseline is of other queries or of other
            measures, or the model's similarity is neither cosine nor dot product.
    """

    def __init__(
        self,
        collection: Collection | str | Path,
        query_set: str = "validation",
        *,
        measures: Sequence[str] = ("nDCG@10",),
        name: str = "",
        groups: Mapping[str, str] | None = None,
        baseline: Mapping[str, Mapping[str, float]] | None = None,
        batch_size: int = 32,
    ) -> None:
        super().__init__()
        if not isinstance(collection, Collection):
            collection = open_collection(collection)
        if not collection.qrels.get(query_set):
            found = ", ".join(known for known, qrels in collection.qrels.items() if qrels)
            message = f"no judgements of {query_set!r}; {collection.name} has {found or 'none'}"
            raise ArgumentError("query_set", message)
        self.qrels, queries = collection.qrels[query_set], collection.queries[query_set]
        self.queries = Texts(list(self.qrels), [queries[qid] for qid in self.qrels])
        rows = zip(collection.passages.ids, collection.passages.texts, strict=True)
        texts = {docid: text for docid, text in rows if text.strip()}
        self.passages = Texts(list(texts), list(texts.values()))
        self.measures = list(dict.fromkeys(map(named, measures)))
        evaluate(self.qrels, {}, self.measures)  # raises now what would end the training
        self._few = {m for m in self.measures if len(relevant(self.qrels, m)) < FEWEST}
        self.name, self.baseline = name, baseline or {}
        self.groups = {qid: str(group) for qid, group in (groups or {}).items() if pd.notna(group)}
        if taken := {"low", "high", "difference"}.intersection(self.groups.values()):
            raise ArgumentError("groups", f"{min(taken)!r} is the name of a metric; rename it")
        if self.groups and self.groups.keys().isdisjoint(self.qrels):
            raise ArgumentError("groups", f"none of {next(iter(self.groups))!r}, … is judged")
        self.batch_size = batch_size
        self.primary_metric = f"{name}_{self.measures[0]}" if name else self.measures[0]

    def __call__(
        self, model: Any, output_path: str | None = None, epoch: float = -1, steps: int = -1
    ) -> dict[str, float]:
        """Rank the queries with the model; return the metrics, with the prefix."""
        self.run = self._rank(model)
        found = evaluate(self.qrels, self.run, self.measures)
        self.per_query = found.per_query
        metrics = self.prefix_name_to_metrics(self._metrics(found), self.name)
        self.store_metrics_in_model_card_data(model, metrics, epoch, steps)
        if output_path:
            stem = "_".join(filter(None, ["Collection_evaluation", self.name]))
            results = pd.DataFrame(list(metrics.items()), columns=["metric", "value"])
            values = pd.DataFrame(self.per_query).rename_axis("qid").reset_index()
            for kind, frame in (("results", results), ("per_query", values)):
                path = Path(output_path, f"{stem}_{kind}.csv")
                path.parent.mkdir(parents=True, exist_ok=True)
                frame = frame.assign(epoch=epoch, steps=steps)[["epoch", "steps", *frame]]
                frame.to_csv(path, mode="a", index=False, header=not path.exists())
        return metrics

    def _rank(self, model: Any) -> Run:
        options = {"batch_size": self.batch_size, "show_progress_bar": False}
        if (similarity := model.similarity_fn_name) not in ("cosine", "dot"):
            raise EncoderError(f"the model's similarity is {similarity}; expected cosine or dot")
        options["normalize_embeddings"] = similarity == "cosine"
        of_queries, of_passages = prompts(model)
        return exact_search(
            model.encode_query(self.queries.texts, prompt=of_queries, **options),
            model.encode_document(self.passages.texts, prompt=of_passages, **options),
            self.queries.ids,
            self.passages.ids,
            max(100, *map(cutoff, self.measures)),
        )

    def _metrics(self, found: Evaluation) -> dict[str, float]:
        metrics, self.comparisons = {}, {}
        baseline = {named(measure): values for measure, values in self.baseline.items()}
        if baseline and baseline.keys().isdisjoint(found.per_query):
            raise ArgumentError("baseline", f"{next(iter(baseline))!r} is not one of the measures")
        for measure, values in found.per_query.items():
            metrics[measure] = found.mean[measure]
            if len(values) > 1:
                _, *interval = paired_interval(values, dict.fromkeys(values, 0.0))
                metrics |= zip((f"{measure}_low", f"{measure}_high"), interval, strict=True)
            for group, mean in pd.Series(values).groupby(self.groups.get).mean().items():
                metrics[f"{measure}_{group}"] = mean
            if (before := baseline.get(measure)) is not None:
                if before.keys() != values.keys():
                    counts = f"its {len(before):,} queries are not the {len(values):,} judged ones"
                    raise ArgumentError("baseline", f"{measure}: {counts}")
                untested = "too few queries" if measure in self._few else ""
                self.comparisons[measure] = pair = compared(values, before, measure, untested)
                metrics[f"{measure}_difference"] = pair["difference"]
        return metrics
