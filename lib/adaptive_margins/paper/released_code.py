"""Paper and released code: the effect of each of their differences on the scores.

A `Differences` is a reproduction with several seeds. Its methods are the blocks of the chapter,
each a long data frame. All but `choices` and `optimism` have the columns `COMPARED`: a row per
comparison, query set, measure and run, where ``value_…``, ``step_…``, ``epsilon_…``, seed and ids
belong to the run, and the result of `compare` over all runs of the comparison is repeated in each
row.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from adaptive_margins.data.trec import Qrels, Run
from adaptive_margins.encoder.embed import embed
from adaptive_margins.encoder.tokens import tokenize
from adaptive_margins.evaluation.measures import evaluate
from adaptive_margins.paper import Reproduction
from adaptive_margins.paper.experiments import baseline_runs, tuning_runs
from adaptive_margins.paper.released_statistics import (
    COMPARED,
    Comparison,
    optimism,
    pool_qrels,
    rows_of,
)
from adaptive_margins.paper.store import StoredRun
from adaptive_margins.retrieval.exact import exact_search
from adaptive_margins.retrieval.faiss_index import build_index, choose_index, search_index
from adaptive_margins.runs import BM25Run, RunConfig, TrainingRun, ZeroShotRun

DL19_QUERIES = 43
"""Queries of TREC DL 2019 with judgements (paper, Section 4), by which ε and the last step are
chosen.
"""
POOLINGS = {"cls+linear": "[CLS] + Linear", "cls": "[CLS]", "mean": "mean"}


class Differences:
    """The comparisons of a reproduction's reference encoder.

    Args:
        reproduction: its ε is the one that the profile's seed finds.
        seeds: "1,2,3"; None for the profile's.
    """

    def __init__(self, reproduction: Reproduction, seeds: str | int | None = None) -> None:
        self.reproduction = reproduction
        self.profile = reproduction.profile
        named = self.profile.differences.seeds if seeds is None else str(seeds).split(",")
        self.seeds = tuple(dict.fromkeys(map(int, named)))
        self.encoder = self.profile.reference_encoder
        self.test, self.validation = self.profile.sets.tests[0], self.profile.sets.validation
        self.selection = self.profile.measures.selection
        encoders = dict(self.profile.encoders)
        for pooling in POOLINGS:  # the reference encoder under every one, named by `_pooled`
            changes = {"pooling": pooling, "label": ""}
            reference = encoders[self.encoder].model_copy(update=changes)
            encoders.setdefault(self._pooled(pooling), reference)
        pooled = self.profile.model_copy(update={"encoders": encoders})
        self.poolings = Reproduction(pooled, reproduction.home)
        self._ensure = self.poolings.runner.ensure

    # ---- runs ------------------------------------------------------------------------------------

    def _pooled(self, pooling: str) -> str:
        default = self.profile.encoders[self.encoder].pooling
        return self.encoder if pooling == default else f"{self.encoder}-{pooling}"

    def _tune(self) -> None:
        """Compute the runs that ε is tuned on, which the configurations of static rows need."""
        self._ensure(tuning_runs(self.reproduction.experiments, self.profile.encoders))

    def variant(self, target: str, in_batch: bool, **values: Any) -> list[TrainingRun]:
        """A row of Table 3 for each seed, with ``values`` instead of the row's settings."""
        base = self.reproduction.experiments.variant_run(self.encoder, target, in_batch)
        if values.get("keep") == "last":  # that of the stop
            values["stop_early"] = True
        runs = [
            base.model_copy(update={"orientation": "paper", **values, "seed": seed})
            for seed in self.seeds
        ]
        # Only the run of Table 3 itself has its model saved.
        return [c if c == base else c.model_copy(update={"save_model": False}) for c in runs]

    def grid(self) -> dict[float, list[TrainingRun]]:
        """ε → Figure 3's run without in-batch negatives per seed, ranked on the test sets too."""
        full = self.reproduction.experiments.full_ranking()
        static = self.reproduction.experiments.static_run
        return {
            t: [static(self.encoder, t, False, s).model_copy(update=full) for s in self.seeds]
            for t in sorted(self.profile.static.targets)
        }

    def comparisons(self) -> dict[str, list[Comparison]]:
        """Comparisons by block, with ε tuned; of the block "choice", only the checkpoints."""
        in_batch = [("static", True), ("adaptive", True), ("distributed", False)]
        adaptive = [("adaptive", False), ("adaptive", True), ("distributed", False)]
        plain = [("distributed", False), ("static", False)]

        def pairs(
            variants: Any, words: tuple[str, str], setting: str, *values: Any
        ) -> list[Comparison]:
            both = [[self.variant(*v, **{setting: value}) for value in values] for v in variants]
            return [Comparison(_describe(a[0]), *words, a, b) for a, b in both]

        rows = ("margin of query i in row i", "margin of query i in column i")
        targets = ("target as a constant (not stated)", "gradient through the target")
        checkpoints = ("best checkpoint", "last checkpoint")
        blocks = {
            "orientation": pairs(in_batch, rows, "orientation", "paper", "released"),
            "stop_gradient": pairs(adaptive, targets, "stop_gradient", True, False),
            "checkpoint": pairs(plain, checkpoints, "keep", "best", "last"),
            "pooling": self._pooled_comparisons(),
        }
        if self.validation != self.test:
            stopped = pairs(plain, self._chosen, "validation", self.test, self.validation)
            blocks["choice"] = [c._replace(what=f"checkpoint, {c.what}") for c in stopped]
        return blocks

    @property
    def _chosen(self) -> tuple[str, str]:
        return f"chosen on {self.test}, a test set", f"chosen on {self.validation}"

    def _pooled_comparisons(self) -> list[Comparison]:
        e, (first, *rest) = self.poolings.experiments, POOLINGS

        def runs(pooling: str, trained: bool) -> Sequence[RunConfig]:
            name = self._pooled(pooling)
            if not trained:
                return [e.zero_shot_run(name)]
            if name == self.encoder:
                return self.variant("distributed", False)
            loss: dict[str, Any] = {"target": "distributed", "in_batch": False}
            return [e.comparison_run(name, seed=seed, **loss) for seed in self.seeds]

        return [
            Comparison(
                f"{POOLINGS[p]}, {'after' if trained else 'before'} training",
                POOLINGS[first],
                POOLINGS[p],
                runs(first, trained),
                runs(p, trained),
            )
            for p in rest
            for trained in (False, True)
        ]

    def _systems(self) -> list[RunConfig]:
        """BM25, zero-shot encoders, and all rows of Tables 3 and 4."""
        e = self.reproduction.experiments
        return [*baseline_runs(e), *e.table3_runs(), *e.table4_runs()]

    def configs(self) -> list[RunConfig]:
        """All runs of the chapter but those that ε is tuned on, each once."""
        found = [*self._systems(), *(c for configs in self.grid().values() for c in configs)]
        for comparison in (c for block in self.comparisons().values() for c in block):
            found += [*comparison.reference, *comparison.other]
        found += [c for configs in self._stopped().values() for c in configs]
        return list(dict.fromkeys(found))

    def ensure(self) -> int:
        """Compute all runs that are missing; return how many the chapter reads."""
        self._tune()
        return len(self._ensure(self.configs()))

    # ---- blocks ----------------------------------------------------------------------------------

    def orientation(self) -> pd.DataFrame:
        """Margins of query i in row i (paper), or in column i (released code)."""
        return self._ranked("orientation")

    def stop_gradient(self) -> pd.DataFrame:
        """Targets as constants (one reading of the paper), or with a gradient (released code)."""
        return self._ranked("stop_gradient")

    def checkpoint(self) -> pd.DataFrame:
        """The best checkpoint, or the last one, at which early stopping ends the run."""
        return self._ranked("checkpoint")

    def pooling(self) -> pd.DataFrame:
        """[CLS] + Linear (paper, for MPNet and RoBERTa) against [CLS] and mean pooling.

        The linear layer is drawn at random, with the same numbers for every seed.
        """
        return self._ranked("pooling")

    def choice(self) -> pd.DataFrame:
        """ε and the checkpoint chosen on the first test set, or on the validation queries.

        ε is chosen from `grid` for each seed, by the selection measure after reranking; the
        smallest of equals. No rows if the profile validates on the first test set.
        """
        if self.validation == self.test:
            return pd.DataFrame(columns=COMPARED)
        grid = [self._ensure(configs) for configs in self.grid().values()]  # by ascending ε

        def best(runs: Sequence[StoredRun[TrainingRun]], name: str) -> TrainingRun:
            means = [run.evaluation("rerank", name).mean[self.selection] for run in runs]
            return runs[int(np.argmax(means))].config

        by_seed = list(zip(*grid, strict=True))
        sides = [[best(runs, name) for runs in by_seed] for name in (self.test, self.validation)]
        of_target = Comparison("ε of static targets", *self._chosen, *sides)
        return self._ranked("choice", [of_target], reranked=(self.selection,))

    def ideal(self) -> pd.DataFrame:
        """The ideal ranking of nDCG from all judged passages (trec_eval), or from the reranked ones
        only.

        Both from the stored rankings of the validation queries, for BM25, zero-shot encoders and
        all rows of Tables 3 and 4 (column ``system``). The test is over the mean of all systems.
        """
        name = self.validation
        qrels = self.reproduction.inputs.collection.qrels[name]
        self._tune()
        runs = {r.run_id: r for r in self._ensure(self._systems())}  # ε = 1 may be tuned
        frames = []
        measures = [m for m in self.profile.measures.rerank if m.startswith("nDCG")]
        words = ("ideal from all judged passages", "ideal from the reranked candidates")
        for measure in measures:
            sides = []
            for run in runs.values():
                ranking = run.run("rerank", name)
                pooled = evaluate(pool_qrels(qrels, ranking), ranking, [measure])
                judged = run.evaluation("rerank", name).per_query[measure]
                sides.append((run, run, judged, pooled.per_query[measure]))
            pair = Comparison("mean of all systems", *words, (), ())
            rows = rows_of("ideal", pair, ("rerank", name, measure), sides, len(measures))
            systems = [_system(run.config) for run in runs.values()]
            frames.append(pd.DataFrame(rows, columns=COMPARED).assign(system=systems))
        return pd.concat(frames, ignore_index=True)

    def probes(self) -> pd.DataFrame:
        """Full ranking with the chosen number of lists searched, or with one, by the model of Table
        3.

        ``seed`` is that of the index's clusterings. ``Filled@DEPTH`` is the share of queries with
        as many hits as are evaluated, ``Exact@DEPTH`` the share of an exact search's hits that are
        found. No rows where the collection is so small that its index has no lists.
        """
        config = self.reproduction.experiments.variant_run(self.encoder, "distributed", False)
        run, depth = self._ensure([config])[0], config.full_depth
        collection = self.reproduction.inputs.collection
        passages = collection.passages
        model = run.model(self.profile.device)
        settings = choose_index(len(passages), model.get_embedding_dimension(), depth=depth)
        if settings.flat:
            return pd.DataFrame(columns=COMPARED)
        vectors = embed(model, tokenize(model, passages.texts, config.passage_length))
        indexes = {seed: build_index(vectors, settings, seed) for seed in self.seeds}
        measures = [*config.full_measures, f"Filled@{depth}", f"Exact@{depth}"]
        lists = Comparison(
            "searching the index", f"{settings.nprobe} of {settings.nlist} lists", "1 list", (), ()
        )
        rows = []
        for name in config.test_sets:
            texts = collection.queries[name]
            queries = embed(model, tokenize(model, texts.texts, config.query_length))
            exact = exact_search(queries, vectors, texts.ids, passages.ids, depth)
            sides = []
            for index in indexes.values():
                both = [
                    search_index(
                        index,
                        dataclasses.replace(settings, nprobe=nprobe),
                        queries,
                        texts.ids,
                        passages.ids,
                        depth,
                        vectors,
                        fill=False,
                    )
                    for nprobe in (settings.nprobe, 1)
                ]
                many, one = (_probed(r, exact, collection.qrels[name], config) for r in both)
                sides.append((many, one))
            for measure in measures:
                values = [(run, run, many[measure], one[measure]) for many, one in sides]
                number = len(measures) * len(config.test_sets)
                found = rows_of("probes", lists, ("full", name, measure), values, number)
                rows += [{**r, "seed": seed} for r, seed in zip(found, indexes, strict=True)]
        return pd.DataFrame(rows, columns=COMPARED)

    def choices(self) -> pd.DataFrame:
        """What was chosen from: a row per setting (ε, or step), seed and query set, after
        reranking.

        Columns: what, setting, seed, set, measure (the selection measure), value, run_id. ε has a
        row on every evaluated set, a step on the set by which its run stops.
        """
        rows: list[tuple[Any, ...]] = []
        for target, configs in self.grid().items():
            for run in self._ensure(configs):
                for name in dict.fromkeys([self.validation, *self.profile.sets.tests]):
                    value = run.evaluation("rerank", name).mean[self.selection]
                    rows.append(
                        ("ε", target, run.config.seed, name, self.selection, value, run.run_id)
                    )
        for what, configs in self._stopped().items():
            for run in self._ensure(configs):
                c, means = run.config, run.validated(self.selection).mean(axis=1)
                rows += [
                    (what, step, c.seed, c.validation, self.selection, value, run.run_id)
                    for step, value in means.items()
                ]
        columns = ["what", "setting", "seed", "set", "measure", "value", "run_id"]
        return pd.DataFrame(rows, columns=columns)

    def _stopped(self) -> dict[str, list[TrainingRun]]:
        """Runs that stop by the first test set."""
        self._tune()
        both = [self.variant(t, False, validation=self.test) for t in ("distributed", "static")]
        return {f"step, {_describe(configs[0])}": configs for configs in both}

    def optimism(self, draws: int | None = None, size: int = DL19_QUERIES) -> pd.DataFrame:
        """`optimism` of choosing ε, and of choosing the step, by ``size`` queries of the first test
        set.

        Args:
            draws: None for the profile's number.
            size: at most half of the set's queries are taken.

        Returns:
            A row per choice and seed. ``drawn`` and ``others`` are means over the draws,
            ``optimism`` their difference, ``low`` and ``high`` the 2.5th and 97.5th percentile of
            single draws; ``net…`` the same for what is due to the choice.
        """
        draws = self.profile.differences.draws if draws is None else draws
        qids = sorted(self.reproduction.inputs.collection.qrels[self.test])
        size = min(size, len(qids) // 2)
        grid = [self._ensure(configs) for configs in self.grid().values()]
        scores: dict[str, list[np.ndarray]] = {"ε": []}
        for number in range(len(self.seeds)):
            found = [runs[number].evaluation("rerank", self.test) for runs in grid]
            per_query = [evaluation.per_query[self.selection] for evaluation in found]
            scores["ε"].append(np.array([[values[q] for q in qids] for values in per_query]))
        for what, configs in self._stopped().items():
            checks = [run.validated(self.selection) for run in self._ensure(configs)]
            scores[what] = [values[qids].to_numpy() for values in checks]
        about = {"set": self.test, "measure": self.selection}
        rows = []
        for what, matrices in scores.items():
            for seed, matrix in zip(self.seeds, matrices, strict=True):
                drawn = optimism(matrix, size=size, draws=draws)
                counts = {"settings": len(matrix), "chosen": len(set(drawn["chosen"]))}
                counts |= {"size": size, "rest": len(qids) - size, "draws": draws}
                row = {"what": what, **about, "seed": seed, **counts}
                row |= {name: drawn[name].mean() for name in ("drawn", "others")}
                for name, prefix in (("optimism", ""), ("net", "net_")):
                    row[name] = drawn[name].mean()
                    ends = np.percentile(drawn[name], [2.5, 97.5])
                    row[f"{prefix}low"], row[f"{prefix}high"] = ends
                rows.append(row)
        return pd.DataFrame(rows)

    def _ranked(
        self, block: str, more: Sequence[Comparison] = (), reranked: Sequence[str] = ()
    ) -> pd.DataFrame:
        """A block's comparisons on each test set, in the measures of full ranking and in
        ``reranked``.
        """
        self._tune()
        pairs = [*more, *self.comparisons()[block]]
        configs = [c for pair in pairs for c in (*pair.reference, *pair.other)]
        stored = {run.run_id: run for run in self._ensure(configs)}
        cases = [
            (kind, name, measure)
            for name in self.profile.sets.tests
            for kind, measures in (("rerank", reranked), ("full", self.profile.measures.full))
            for measure in measures
        ]
        rows: list[dict[str, Any]] = []
        for pair in pairs:
            for kind, name, measure in cases:
                sides = []
                for both in zip(pair.reference, pair.other, strict=True):
                    a, b = (stored[c.run_id] for c in both)
                    x, y = (r.evaluation(kind, name).per_query[measure] for r in (a, b))
                    sides.append((a, b, x, y))
                rows += rows_of(block, pair, (kind, name, measure), sides, len(pairs) * len(cases))
        return pd.DataFrame(rows, columns=COMPARED)


def _probed(run: Run, exact: Run, qrels: Qrels, config: TrainingRun) -> dict[str, dict[str, float]]:
    depth = config.full_depth
    shared = {q: len(run[q].keys() & exact[q].keys()) / len(exact[q]) for q in exact}
    return {
        **evaluate(qrels, run, config.full_measures).per_query,
        f"Filled@{depth}": {q: float(len(run[q]) == len(exact[q])) for q in exact},
        f"Exact@{depth}": shared,
    }


def _describe(config: TrainingRun) -> str:
    """The loss of a run."""
    name = config.target if isinstance(config.target, str) else f"static, ε = {config.target:g}"
    return f"{name}, in-batch" if config.in_batch else str(name)


def _system(config: RunConfig) -> str:
    """Encoder and loss of a run."""
    if isinstance(config, BM25Run):
        return "BM25"
    if isinstance(config, ZeroShotRun):
        return f"{config.encoder}, zero-shot"
    assert isinstance(config, TrainingRun)
    return f"{config.encoder}, {'softmax' if config.loss == 'softmax' else _describe(config)}"
