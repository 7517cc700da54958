"""Paper and released code: what each of their differences does to the scores, one after another.

A `Differences` is a reproduction and some seeds. `ensure` makes all runs that the comparisons need; each of the methods
after it is one block of the chapter and returns a long data frame. All but `choices` and `optimism` have the columns
`COMPARED`: a row per comparison, query set, measure and run, where ``value_paper``, ``value_code`` and the runs' ids, seed, ε
and kept step are the row's own, and what `compare` finds over all runs of the comparison stands in each of its rows.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from sentence_transformers import SentenceTransformer

from adaptive_margins.data.trec import Qrels, Run
from adaptive_margins.encoder.embed import embed
from adaptive_margins.encoder.tokens import tokenize
from adaptive_margins.evaluation import significance
from adaptive_margins.evaluation.measures import Evaluation, evaluate
from adaptive_margins.paper.experiments import Reproduction
from adaptive_margins.paper.store import StoredRun
from adaptive_margins.retrieval.exact import exact_search
from adaptive_margins.retrieval.faiss_index import build_index, choose_index, search_index
from adaptive_margins.runs import BM25Run, RunConfig, TrainingRun, ZeroShotRun

DL19_QUERIES = 43
"""Judged queries of TREC DL 2019 (paper, Section 4): what ε and the moment to stop are chosen by."""
POOLINGS = {"cls+linear": "[CLS] + Linear", "cls": "[CLS]", "mean": "mean"}
COMPARED = [
    "block", "what", "paper", "code", "kind", "set", "measure", "seed", "epsilon_paper", "epsilon_code", "step_paper",
    "step_code", "value_paper", "value_code", "difference", "low", "high", "p", "p_adjusted", "comparisons", "verdict",
    "run_id", "reference_run_id",
]  # fmt: skip
SUMMARY = [
    "block", "what", "paper", "code", "kind", "set", "measure", "value_paper", "value_code", "difference", "low", "high",
    "lowest", "highest", "p_adjusted", "comparisons", "verdict", "seeds", "runs",
]  # fmt: skip

PerQuery = Mapping[str, float]


# --- statistics -------------------------------------------------------------------------------------------------------


def compare(
    paper: Sequence[PerQuery],
    code: Sequence[PerQuery],
    *,
    comparisons: int = 1,
    alpha: float = 0.05,
) -> dict[str, Any]:
    """Test whether two settings, each run with several seeds, score alike.

    Each query's values are averaged over the runs of a side; the tests are paired over the queries. So they tell what
    other queries would change, not what other seeds would.

    Args:
        paper: a mapping of query id to value for each run of one side.
        code: the same for the other.
        comparisons: tests in the block (Bonferroni).
        alpha: significance level of the whole block.

    Returns:
        ``difference`` (mean of code − paper), ``low``, ``high`` (its 95 % t interval, for this comparison alone), ``p``,
        ``p_adjusted`` (TOST, ±.05), ``comparisons``, and ``verdict``: "equivalent" if the TOST says so; else "differs" if
        the t interval at confidence 1 − alpha / comparisons leaves out 0; else "undecided".

    Raises:
        ValueError: there are no runs, the queries differ, or as `significance.compare`.
    """
    found = significance.compare(
        mean_over(code), mean_over(paper), alpha=alpha, comparisons=comparisons
    )
    return {
        "difference": found.difference,
        "low": found.ci[0],
        "high": found.ci[1],
        "p": found.p_tost,
        "p_adjusted": min(1.0, found.p_tost * comparisons),
        "comparisons": comparisons,
        "verdict": "differs" if found.verdict in ("better", "worse") else found.verdict,
    }


def mean_over(runs: Sequence[PerQuery]) -> dict[str, float]:
    """Each query's mean over ``runs``. Raises ValueError if there are none, or their queries differ."""
    if not runs:
        raise ValueError("there are no runs to average over")
    for number, run in enumerate(runs[1:], start=2):
        if different := sorted(run.keys() ^ runs[0].keys()):
            raise ValueError(
                f"run {number} and run 1 differ in {len(different)} queries, e.g. {different[:3]}"
            )
    return {qid: float(np.mean([run[qid] for run in runs])) for qid in runs[0]}


@dataclass(frozen=True)
class Optimism:
    """What choosing the best of several settings by some of the queries does to their score; one entry a draw.

    Attributes:
        chosen: (draws,) row of the setting with the best mean on the drawn queries (the first of equals).
        drawn: (draws,) its mean on the drawn queries, which it was chosen by.
        others: (draws,) its mean on all other queries.
        unchosen: (draws,) drawn minus others, averaged over all settings: what the split does without a choice.
    """

    chosen: np.ndarray
    drawn: np.ndarray
    others: np.ndarray
    unchosen: np.ndarray

    @property
    def values(self) -> np.ndarray:
        """Optimism of each draw: drawn minus others."""
        return self.drawn - self.others

    @property
    def net(self) -> np.ndarray:
        """What of it is due to the choice: the same on average, because ``unchosen`` is 0 then, but less scattered."""
        return self.values - self.unchosen


def optimism(scores: np.ndarray, *, size: int, draws: int, seed: int = 1) -> Optimism:
    """By how much a score flatters that was also what the setting was chosen by.

    For a draw S of ``size`` queries, without replacement, let ĉ(S) = argmax_c mean_{q∈S} x_c(q). The draw's optimism is

        mean_{q∈S} x_ĉ(S)(q) − mean_{q∉S} x_ĉ(S)(q).

    For a setting fixed in advance its expectation over S is 0, so what remains on average is due to the choice.

    Args:
        scores: (C, N) value of each of C settings for each of N queries.
        size: queries to choose by, 1 to N − 1.
        draws: how often; at least 1.
        seed: of the draws; the same seed, N and ``size`` draw the same queries.

    Raises:
        ValueError: a shape, size or number of draws that is not one of the above, or a score that is not finite.
    """
    scores = np.asarray(scores, np.float64)
    if scores.ndim != 2 or not len(scores) or not np.isfinite(scores).all():
        raise ValueError(
            f"scores must be finite, of shape (settings, queries), not {scores.shape} with "
            f"{int((~np.isfinite(scores)).sum())} that are not finite"
        )
    n = scores.shape[1]
    if not 1 <= size < n:
        raise ValueError(f"size must be from 1 to {n - 1} for {n} queries, not {size}")
    if draws < 1:
        raise ValueError(f"draws must be at least 1, not {draws}")
    rng = np.random.default_rng(seed)
    inside, outside = np.empty((draws, len(scores))), np.empty((draws, len(scores)))
    for draw in range(draws):
        order = rng.permutation(n)
        inside[draw] = scores[:, order[:size]].mean(axis=1)
        outside[draw] = scores[:, order[size:]].mean(axis=1)
    chosen = inside.argmax(axis=1)
    rows = np.arange(draws)
    return Optimism(
        chosen, inside[rows, chosen], outside[rows, chosen], (inside - outside).mean(axis=1)
    )


def pool_qrels(qrels: Qrels, pool: Run) -> Qrels:
    """The judgements of the passages in ``pool`` only: an nDCG with them has its ideal ranking from the pool.

    Every query of ``qrels`` stays, if need be without a judgement; its nDCG is then 0.
    """
    return {
        qid: {docid: grade for docid, grade in judged.items() if docid in pool.get(qid, {})}
        for qid, judged in qrels.items()
    }


def parse_seeds(seeds: str | int) -> tuple[int, ...]:
    """``"1,2,3"`` as numbers. Raises ValueError unless they are different whole numbers from 0 on, at least one."""
    try:
        numbers = tuple(int(part) for part in str(seeds).split(","))
    except ValueError:
        numbers = ()
    if not numbers or len(set(numbers)) < len(numbers) or min(numbers) < 0:
        raise ValueError(
            f'seeds is {seeds!r}; expected different whole numbers from 0 on, such as "1,2,3"'
        )
    return numbers


# --- the comparisons --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Comparison:
    """Two settings, as the configurations of their runs, seed by seed."""

    what: str
    paper: str
    code: str
    reference: Sequence[RunConfig]
    other: Sequence[RunConfig]


class Differences:
    """The comparisons of a reproduction's reference encoder, each with every one of ``seeds`` ("1,2,3"; None: the profile's).

    ε is the one that `Reproduction.tuned_target` finds with the profile's seed.
    """

    def __init__(self, reproduction: Reproduction, seeds: str | int | None = None) -> None:
        self.reproduction = reproduction
        self.profile = reproduction.profile
        self.seeds = self.profile.differences.seeds if seeds is None else parse_seeds(seeds)
        self.encoder = self.profile.reference_encoder
        self.test = self.profile.sets.tests[0]

    # ---- runs ------------------------------------------------------------------------------------------------------

    @functools.cached_property
    def poolings(self) -> Reproduction:
        """The same reproduction with the reference encoder under every pooling, named by `_pooled`."""
        own = self.profile.encoders[self.encoder]
        pooled = {
            self._pooled(p): own.model_copy(update={"pooling": p, "label": ""})
            for p in POOLINGS
            if p != own.pooling
        }
        profile = self.profile.model_copy(update={"encoders": {**self.profile.encoders, **pooled}})
        return Reproduction(profile, self.reproduction.home)

    def _pooled(self, pooling: str) -> str:
        own = self.profile.encoders[self.encoder].pooling
        return self.encoder if pooling == own else f"{self.encoder}-{pooling}"

    def _tune(self) -> None:
        """Make the runs that ε is tuned on: the static rows' configurations need them."""
        self.reproduction.ensure(self.reproduction.figure3_runs())

    def variant(self, target: str, in_batch: bool, **values: Any) -> list[TrainingRun]:
        """A row of Table 3 for each seed, with ``values`` in the place of the row's own."""
        base = self.reproduction.variant_run(self.encoder, target, in_batch)
        configs = []
        for seed in self.seeds:
            config = base.model_copy(update={"orientation": "paper", **values, "seed": seed})
            # Only Table 3's own run has its model saved.
            configs.append(
                config if config == base else config.model_copy(update={"save_model": False})
            )
        return configs

    def grid(self) -> dict[float, list[TrainingRun]]:
        """ε → Figure 3's run without in-batch negatives for each seed, ranked on the test sets too."""
        full = {
            "test_sets": self.profile.sets.tests,
            "full_measures": self.profile.measures.full,
            "full_depth": self.profile.measures.full_depth,
        }
        return {
            target: [
                self.reproduction.static_run(self.encoder, target, False, seed).model_copy(
                    update=full
                )
                for seed in self.seeds
            ]
            for target in sorted(self.profile.static.targets)
        }

    def comparisons(self) -> dict[str, list[Comparison]]:
        """What is compared with what, by block; ε must be known (`ensure`). Of "choice" only the checkpoints."""
        validation = self.profile.sets.validation
        in_batch = [("static", True), ("adaptive", True), ("distributed", False)]
        adaptive = [("adaptive", False), ("adaptive", True), ("distributed", False)]
        plain = [("distributed", False), ("static", False)]

        def pairs(
            variants: Iterable[tuple[str, bool]],
            paper: str,
            code: str,
            ours: dict[str, Any],
            theirs: dict[str, Any],
        ) -> list[Comparison]:
            found = []
            for target, negatives in variants:
                a, b = (self.variant(target, negatives, **values) for values in (ours, theirs))
                found.append(Comparison(_describe(a[0]), paper, code, a, b))
            return found  # fmt: skip

        blocks = {
            "orientation": pairs(
                in_batch, "margin of query i in row i", "margin of query i in column i",
                {"orientation": "paper"}, {"orientation": "released"},
            ),
            "stop_gradient": pairs(
                adaptive, "target as a constant (not stated)", "gradient through the target",
                {"stop_gradient": True}, {"stop_gradient": False},
            ),
            "checkpoint": pairs(
                plain, "best checkpoint", "last checkpoint", {"keep": "best"}, {"keep": "last"}
            ),
            "pooling": self._pooled_comparisons(),
        }  # fmt: skip
        if validation != self.test:
            blocks["choice"] = [
                dataclasses.replace(c, what=f"checkpoint, {c.what}")
                for c in pairs(plain, *self._chosen, {"validation": self.test}, {"validation": validation})
            ]  # fmt: skip
        return blocks

    @property
    def _chosen(self) -> tuple[str, str]:
        return (
            f"chosen on {self.test}, a test set",
            f"chosen on {self.profile.sets.validation}",
        )

    def _pooled_comparisons(self) -> list[Comparison]:
        start, trained = {}, {}
        for pooling in POOLINGS:
            name = self._pooled(pooling)
            start[pooling] = [self.poolings.zero_shot_run(name)]
            trained[pooling] = (
                self.variant("distributed", False)
                if name == self.encoder
                else [
                    self.poolings.comparison_run(
                        name, target="distributed", in_batch=False, seed=seed
                    )
                    for seed in self.seeds
                ]
            )
        first, *rest = POOLINGS
        return [
            Comparison(
                f"{POOLINGS[p]}, {when} training", POOLINGS[first], POOLINGS[p], runs[first], runs[p]
            )
            for p in rest
            for when, runs in (("before", start), ("after", trained))
        ]  # fmt: skip

    def _systems(self) -> list[RunConfig]:
        """BM25, encoders as they come, and all rows of Tables 3 and 4."""
        r = self.reproduction
        return [*r.baseline_runs(), *r.table3_runs(), *r.table4_runs()]

    def configs(self) -> list[RunConfig]:
        """All runs of the chapter but those that ε is tuned on, each once."""
        found = [*self._systems(), *(c for configs in self.grid().values() for c in configs)]
        for block in self.comparisons().values():
            for comparison in block:
                found += [*comparison.reference, *comparison.other]
        found += [c for configs in self._stopped().values() for c in configs]
        return list(dict.fromkeys(found))

    def ensure(self) -> int:
        """Make all runs that are missing, as parallel as the profile says; returns how many the chapter reads."""
        self._tune()
        return len(self.poolings.ensure(self.configs()))

    # ---- blocks ----------------------------------------------------------------------------------------------------

    def orientation(self) -> pd.DataFrame:
        """In-batch margins and Equation 3 with φ(q_i, d⁺_i), or m_i, in row i (paper) or in column i (released code)."""
        return self._ranked("orientation")

    def stop_gradient(self) -> pd.DataFrame:
        """Targets as constants (one reading of the paper, which does not say), or with a gradient (released code)."""
        return self._ranked("stop_gradient")

    def checkpoint(self) -> pd.DataFrame:
        """The best checkpoint, or the last one: that of the moment when early stopping ends the run."""
        return self._ranked("checkpoint")

    def pooling(self) -> pd.DataFrame:
        """[CLS] + Linear (paper, for MPNet and RoBERTa) against [CLS] and mean pooling, before and after training.

        The linear layer is drawn at random, with the same numbers for every seed.
        """
        return self._ranked("pooling")

    def choice(self) -> pd.DataFrame:
        """ε and the checkpoint chosen on the first test set itself, or on the validation queries; the second set is clean.

        ε is chosen seed by seed from `grid`, by the selection measure after reranking; the smallest of equals. Without
        rows if the profile validates on the first test set, because there is nothing to compare with then.
        """
        validation = self.profile.sets.validation
        if validation == self.test:
            return pd.DataFrame(columns=COMPARED)
        grid = {t: self.reproduction.ensure(c) for t, c in self.grid().items()}
        chosen = {
            name: [
                grid[self._best_target(grid, number, name)][number].config
                for number in range(len(self.seeds))
            ]
            for name in (self.test, validation)
        }
        of_target = Comparison(
            "ε of static targets", *self._chosen, chosen[self.test], chosen[validation]
        )
        return self._ranked("choice", [of_target], reranked=(self.profile.measures.selection,))

    def _best_target(
        self, grid: Mapping[float, Sequence[StoredRun]], number: int, query_set: str
    ) -> float:
        measure = self.profile.measures.selection
        return max(
            grid, key=lambda t: (grid[t][number].evaluation("rerank", query_set).mean[measure], -t)
        )

    def ideal(self) -> pd.DataFrame:
        """The ideal ranking of nDCG from all judged passages (trec_eval), or from the reranked candidates only.

        Both from the stored rankings of the validation queries: BM25, encoders as they come, and every row of Tables 3 and
        4; the column ``system`` says which. The tests are over the mean of all systems.
        """
        name = self.profile.sets.validation
        qrels = self.reproduction.collection.qrels[name]
        self._tune()
        runs = {
            r.run_id: r for r in self.reproduction.ensure(self._systems())
        }  # ε = 1 may be tuned
        frames = []
        measures = [m for m in self.profile.measures.rerank if m.startswith("nDCG")]
        for measure in measures:
            sides = []
            for run in runs.values():
                ranking = run.run("rerank", name)
                pooled = evaluate(pool_qrels(qrels, ranking), ranking, [measure])
                judged = run.evaluation("rerank", name).per_query[measure]
                sides.append((run, run, judged, pooled.per_query[measure]))
            rows = _rows(
                "ideal", "mean of all systems", "ideal from all judged passages",
                "ideal from the reranked candidates", "rerank", name, measure, sides, len(measures),
            )  # fmt: skip
            systems = [_system(run.config) for run in runs.values()]
            frames.append(pd.DataFrame(rows, columns=COMPARED).assign(system=systems))
        return pd.concat(frames, ignore_index=True)

    def probes(self) -> pd.DataFrame:
        """Full ranking with the chosen number of lists searched, or with one, and no more, by the model that Table 3 saved.

        ``seed`` is that of the index's clusterings. Beside the scores there is ``Filled@DEPTH``, the share of queries that get as
        many hits as are evaluated, and ``Exact@DEPTH``, the share of an exact search's hits that are found. Without rows where
        the collection is so small that its index has no lists.
        """
        config = self.reproduction.variant_run(self.encoder, "distributed", False)
        run = self.reproduction.ensure([config])[0]
        passages = self.reproduction.collection.passages
        model = SentenceTransformer(str(run.path / "model"), device=self.profile.device)
        depth = config.full_depth
        settings = choose_index(len(passages), model.get_embedding_dimension(), depth=depth)
        if settings.flat:
            return pd.DataFrame(columns=COMPARED)

        def embedded(texts: Sequence[str], length: int) -> np.ndarray:
            return embed(model, tokenize(model, texts, length))

        vectors = embedded(passages.texts, config.passage_length)
        indexes = {seed: build_index(vectors, settings, seed) for seed in self.seeds}
        measures = [*config.full_measures, f"Filled@{depth}", f"Exact@{depth}"]
        comparisons = len(measures) * len(config.test_sets)
        rows = []
        for name in config.test_sets:
            texts = self.reproduction.collection.queries[name]
            queries = embedded(texts.texts, config.query_length)
            exact = exact_search(queries, vectors, texts.ids, passages.ids, depth)
            sides = []
            for index in indexes.values():
                many, one = (
                    search_index(
                        index, dataclasses.replace(settings, nprobe=nprobe), queries, texts.ids, passages.ids, depth, vectors,
                        fill=False,
                    )
                    for nprobe in (settings.nprobe, 1)
                )  # fmt: skip
                sides.append(tuple(self._probed(run, exact, name, config) for run in (many, one)))
            for measure in measures:
                found = _rows(
                    "probes", "searching the index", f"{settings.nprobe} of {settings.nlist} lists", "1 list", "full", name,
                    measure, [(run, run, many[measure], one[measure]) for many, one in sides], comparisons,
                )  # fmt: skip
                rows += [{**r, "seed": seed} for r, seed in zip(found, indexes, strict=True)]
        return pd.DataFrame(rows, columns=COMPARED)

    def _probed(
        self, run: Run, exact: Run, query_set: str, config: RunConfig
    ) -> dict[str, dict[str, float]]:
        depth = config.full_depth
        qrels = self.reproduction.collection.qrels[query_set]
        scored: Evaluation = evaluate(qrels, run, config.full_measures)
        return {
            **scored.per_query,
            f"Filled@{depth}": {q: float(len(run[q]) == len(exact[q])) for q in exact},
            f"Exact@{depth}": {q: len(run[q].keys() & exact[q].keys()) / len(exact[q]) for q in exact},
        }  # fmt: skip

    def choices(self) -> pd.DataFrame:
        """What was chosen from: a row per setting (ε, or step), seed and query set, in the selection measure after reranking.

        Columns: what, setting, seed, set, measure, value, run_id. ε has a row on every evaluated set, a step on the set that
        its run stops by.
        """
        measure = self.profile.measures.selection
        rows: list[tuple[Any, ...]] = []
        for target, configs in self.grid().items():
            for run in self.reproduction.ensure(configs):
                for name in dict.fromkeys([self.profile.sets.validation, *self.profile.sets.tests]):
                    value = run.evaluation("rerank", name).mean[measure]
                    rows.append(("ε", target, run.config.seed, name, measure, value, run.run_id))
        self._tune()
        for what, configs in self._stopped().items():
            for run in self.reproduction.ensure(configs):
                means = _checks(run, measure).mean(axis=1)
                rows += [
                    (what, step, run.config.seed, run.config.validation, measure, value, run.run_id)
                    for step, value in means.items()
                ]
        columns = ["what", "setting", "seed", "set", "measure", "value", "run_id"]
        return pd.DataFrame(rows, columns=columns)

    def _stopped(self) -> dict[str, list[TrainingRun]]:
        """Runs that stop by the first test set."""
        found = {}
        for target in ("distributed", "static"):
            configs = self.variant(target, False, validation=self.test)
            found[f"step, {_describe(configs[0])}"] = configs
        return found

    def optimism(self, draws: int | None = None, size: int = DL19_QUERIES) -> pd.DataFrame:
        """`optimism` of choosing ε, and of choosing the step, by ``size`` queries of the first test set.

        ``draws`` None is the profile's number.

        A row per choice and seed. ``drawn`` and ``others`` are means over the draws, ``optimism`` their difference, ``low`` and
        ``high`` the 2.5th and 97.5th percentile of single draws; ``net``… the same for what is due to the choice.
        ``size`` is at most half of the set's queries. A step is chosen among those that the run was evaluated at.
        """
        draws = self.profile.differences.draws if draws is None else draws
        measure = self.profile.measures.selection
        qids = sorted(self.reproduction.collection.qrels[self.test])
        size = min(size, len(qids) // 2)
        grid = {t: self.reproduction.ensure(configs) for t, configs in self.grid().items()}
        scores: dict[str, list[np.ndarray]] = {"ε": []}
        for number in range(len(self.seeds)):
            by_query = [
                runs[number].evaluation("rerank", self.test).per_query[measure]
                for runs in grid.values()
            ]
            scores["ε"].append(np.array([[values[q] for q in qids] for values in by_query]))
        self._tune()
        for what, configs in self._stopped().items():
            runs = self.reproduction.ensure(configs)
            scores[what] = [_checks(run, measure)[qids].to_numpy() for run in runs]
        rows = []
        for what, matrices in scores.items():
            for seed, matrix in zip(self.seeds, matrices, strict=True):
                found = optimism(matrix, size=size, draws=draws)
                low, high = np.percentile(found.values, [2.5, 97.5])
                net_low, net_high = np.percentile(found.net, [2.5, 97.5])
                rows.append(
                    {
                        "what": what, "set": self.test, "measure": measure, "seed": seed, "settings": len(matrix),
                        "chosen": len(set(found.chosen)), "size": size, "rest": len(qids) - size, "draws": draws,
                        "drawn": found.drawn.mean(), "others": found.others.mean(), "optimism": found.values.mean(),
                        "low": low, "high": high, "net": found.net.mean(), "net_low": net_low, "net_high": net_high,
                    }
                )  # fmt: skip
        return pd.DataFrame(rows)

    # ---- helpers ---------------------------------------------------------------------------------------------------

    def _ranked(
        self, block: str, more: Sequence[Comparison] = (), reranked: Sequence[str] = ()
    ) -> pd.DataFrame:
        """A block's comparisons on each test set, in the measures of full ranking and those in ``reranked``."""
        self._tune()
        comparisons = [*more, *self.comparisons()[block]]
        runs = self.poolings.ensure(
            c for pair in comparisons for c in (*pair.reference, *pair.other)
        )
        stored = {run.run_id: run for run in runs}
        cases = [
            (kind, name, measure)
            for name in self.profile.sets.tests
            for kind, measures in (("rerank", reranked), ("full", self.profile.measures.full))
            for measure in measures
        ]
        rows: list[dict[str, Any]] = []
        for pair in comparisons:
            for kind, name, measure in cases:
                sides = []
                for configs in zip(pair.reference, pair.other, strict=True):
                    a, b = (stored[c.run_id] for c in configs)
                    x, y = (r.evaluation(kind, name).per_query[measure] for r in (a, b))
                    sides.append((a, b, x, y))
                rows += _rows(
                    block, pair.what, pair.paper, pair.code, kind, name, measure, sides, len(comparisons) * len(cases)
                )  # fmt: skip
        return pd.DataFrame(rows, columns=COMPARED)


def summarise(frames: Iterable[pd.DataFrame]) -> pd.DataFrame:
    """Frames with the columns `COMPARED` in one, a row a comparison: the columns `SUMMARY`.

    Values are means over the runs; ``lowest`` and ``highest`` are the smallest and largest mean difference of a single run;
    ``seeds`` and ``runs`` (ids, the paper's side first) are lists joined by blanks.
    """
    keys = ["block", "what", "paper", "code", "kind", "set", "measure"]
    rows = []
    for frame in frames:
        for key, group in frame.groupby(keys, sort=False):
            each = group["value_code"] - group["value_paper"]
            first = group.iloc[0]
            runs = dict.fromkeys([*group["reference_run_id"], *group["run_id"]])
            rows.append(
                {
                    **dict(zip(keys, key, strict=True)),
                    "value_paper": group["value_paper"].mean(), "value_code": group["value_code"].mean(),
                    **{c: first[c] for c in ("difference", "low", "high", "p_adjusted", "comparisons", "verdict")},
                    "lowest": each.min(), "highest": each.max(), "runs": " ".join(runs),
                    "seeds": " ".join(map(str, dict.fromkeys(group["seed"]))),
                }
            )  # fmt: skip
    return pd.DataFrame(rows, columns=SUMMARY)


def _rows(
    block: str,
    what: str,
    paper: str,
    code: str,
    kind: str,
    query_set: str,
    measure: str,
    sides: Sequence[tuple[StoredRun, StoredRun, PerQuery, PerQuery]],
    comparisons: int,
) -> list[dict[str, Any]]:
    """One comparison: a row for each (paper's run, code's run, and their values by query)."""
    test = compare([s[2] for s in sides], [s[3] for s in sides], comparisons=comparisons)
    return [
        {
            "block": block, "what": what, "paper": paper, "code": code, "kind": kind, "set": query_set, "measure": measure,
            "seed": getattr(other.config, "seed", 0),
            "epsilon_paper": _epsilon(reference), "epsilon_code": _epsilon(other),
            "step_paper": reference.result["kept_step"], "step_code": other.result["kept_step"],
            "value_paper": float(np.mean(list(before.values()))),
            "value_code": float(np.mean(list(after.values()))),
            **test, "run_id": other.run_id, "reference_run_id": reference.run_id,
        }
        for reference, other, before, after in sides
    ]  # fmt: skip


def _epsilon(run: StoredRun) -> float:
    """ε of a static run, else NaN."""
    target = getattr(run.config, "target", None)
    return float("nan") if target is None or isinstance(target, str) else float(target)


def _checks(run: StoredRun, measure: str) -> pd.DataFrame:
    """Values during training: a row a step, a column a query."""
    checks = run.checks
    return checks[checks["measure"] == measure].pivot(index="step", columns="qid", values="value")


def _describe(config: TrainingRun) -> str:
    """The loss of a run."""
    name = config.target if isinstance(config.target, str) else f"static, ε = {config.target:g}"
    return f"{name}, in-batch" if config.in_batch else str(name)


def _system(config: RunConfig) -> str:
    """Encoder and loss of a run."""
    if isinstance(config, BM25Run):
        return "BM25"
    if isinstance(config, ZeroShotRun):
        return f"{config.encoder}, as it comes"
    assert isinstance(config, TrainingRun)
    return f"{config.encoder}, {'softmax' if config.loss == 'softmax' else _describe(config)}"
