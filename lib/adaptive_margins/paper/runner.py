"""How runs are made: configured, trained, ranked and stored, one or many at a time, going on where they were interrupted."""

from __future__ import annotations

import dataclasses
import functools
import gc
import hashlib
import importlib.metadata
import multiprocessing
import os
import shutil
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch

from adaptive_margins.data.trec import Run
from adaptive_margins.encoder.embed import embed, embed_shards
from adaptive_margins.encoder.load import save_encoder
from adaptive_margins.evaluation.measures import Evaluation
from adaptive_margins.files import alone
from adaptive_margins.paper.costs import Costs
from adaptive_margins.paper.inputs import LoadedEncoder
from adaptive_margins.paper.store import R, StoredRun
from adaptive_margins.profiles.config import Profile
from adaptive_margins.progress import clock, say
from adaptive_margins.retrieval.exact import approximation_recall, exact_search, rerank
from adaptive_margins.retrieval.faiss_index import build_index, choose_index, search_index
from adaptive_margins.runs import (
    BM25_NAME,
    BM25Run,
    EncoderRun,
    RunConfig,
    TrainingRun,
    ZeroShotRun,
)
from adaptive_margins.training import TrainingError, train


class Runs(Costs):
    """`Costs` that can also make runs; the store keeps them."""

    # ---- configurations --------------------------------------------------------------------------------------------

    def training_run(self, encoder: str, **values: Any) -> TrainingRun:
        """A run's configuration: the profile's values for ``encoder``, and ``values`` in their place.

        A learning rate "X/B" is divided by the batch size.
        """
        t = self.profile.training
        size = values["batch_size"]
        rate = _rate(values.pop("learning_rate", t.learning_rate), size)
        return TrainingRun.model_validate(
            {
                **self._encoder_values(encoder),
                "orientation": t.orientation,
                "learning_rate": rate,
                "weight_decay": t.weight_decay,
                "decay": 1.0,
                "optimizer": t.optimizer,
                "dropout": t.dropout,
                "chunks": t.chunks,
                "seed": self.profile.seed,
                "evaluate_every": 0,
                "patience": 0,
                "keep": "last",
                "selection": self.profile.measures.selection,
                **values,
            }
        )

    def zero_shot_run(self, encoder: str) -> ZeroShotRun:
        """The encoder without fine-tuning: step 0 of all its runs."""
        return ZeroShotRun.model_validate({**self._encoder_values(encoder), **self._full})

    def bm25_run(self) -> BM25Run:
        """BM25's order of the candidates, and of all passages."""
        return BM25Run.model_validate(
            {
                **self._common,
                **self._full,
                "version": f"bm25s {importlib.metadata.version('bm25s')} lucene",
                "rerank_sets": self.evaluated_sets,
            }
        )

    @property
    def _common(self) -> dict[str, Any]:
        p = self.profile
        return {
            "collection": self.fingerprint,
            "candidates": p.candidates.source,
            "depth": p.candidates.depth,
            "validation": p.sets.validation,
            "rerank_measures": p.measures.rerank,
        }

    @property
    def _full(self) -> dict[str, Any]:
        p = self.profile
        return {
            "test_sets": p.sets.tests,
            "full_measures": p.measures.full,
            "full_depth": p.measures.full_depth,
        }

    def _encoder_values(self, encoder: str) -> dict[str, Any]:
        settings, p = self.settings(encoder), self.profile
        return {
            **self._common,
            "encoder": encoder,
            "weights": self.weights(encoder),
            "pooling": settings.pooling,
            "layers": settings.layers,
            "trained_layers": settings.trained_layers,
            "query_length": p.lengths.query,
            "passage_length": p.lengths.passage,
            "precision": p.training.precision,
        }

    # ---- many runs -------------------------------------------------------------------------------------------------

    def ensure(self, configs: Iterable[R]) -> list[StoredRun[R]]:
        """The finished runs of ``configs``, in order; those that are missing are made first, with progress on stderr."""
        configs = list(configs)
        with self._workers() as pool:
            self._make(configs, pool)
        return [self.store.get(c) for c in configs]

    @contextmanager
    def _workers(self) -> Iterator[ProcessPoolExecutor | None]:
        """One-thread worker processes, started when first used; None if the profile wants one worker: this process."""
        if self.profile.workers == 1:
            yield None
            return
        context = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(
            self.profile.workers, context, _start_worker, (self.profile, self.home)
        )
        try:
            yield pool
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
        pool.shutdown()

    def _make(self, configs: Iterable[RunConfig], pool: ProcessPoolExecutor | None) -> None:
        """Make those of ``configs`` that are not in the store."""
        missing = [c for c in dict.fromkeys(configs) if not self.store.has(c)]
        if not missing:
            return
        for encoder in dict.fromkeys(c.encoder for c in missing if c.encoder != BM25_NAME):
            self.encoder(encoder)  # makes what workers share, with all cores
        for name in self.evaluated_sets:
            self.top_candidates(name)
            self.bm25_ranking(name)
        expected = {c: self.expected_seconds(c) for c in missing}
        progress = _Progress(expected, self.profile.workers)
        # Step 0 first, for the others take it from the store if it is there; then long runs, so that workers end together.
        ordered = sorted(missing, key=lambda c: (isinstance(c, TrainingRun), -expected[c]))
        if pool is None:
            for config in ordered:
                progress.done(config, self.execute(config))
            return
        futures = {pool.submit(_work, config): config for config in ordered}
        for future in as_completed(futures):
            try:
                progress.done(futures[future], future.result())
            except BrokenProcessPool:
                raise TrainingError(
                    "a worker process was killed (out of memory?); finished runs are kept, and the same call makes the rest"
                ) from None

    # ---- one run ---------------------------------------------------------------------------------------------------

    def evaluate_rerank(
        self, encoder: LoadedEncoder, model: Any, config: EncoderRun
    ) -> tuple[Evaluation, Run]:
        """Rerank the validation queries' candidates with ``model``."""
        name = config.validation
        passages = self.candidate_rows(name)
        embedded = functools.partial(
            embed, model, batch_tokens=self.profile.ranking.batch_tokens, precision=config.precision
        )
        run = rerank(
            self.top_candidates(name),
            embedded(encoder.queries, self.query_rows(name)),
            self.collection.queries[name].ids,
            embedded(encoder.passages, passages),
            [self.collection.passages.ids[int(row)] for row in passages],
        )
        return self.evaluate_ranking(run, name, config.rerank_measures), run

    def execute(self, config: RunConfig) -> StoredRun:
        """Make one run in this process and store it; a run that was killed goes on from its last whole checkpoint.

        If another process makes the same run, it is waited for, and its run is returned.
        """
        with alone(self.home / "cache" / "work" / config.run_id):
            return self.store.get(config) if self.store.has(config) else self._execute(config)

    def _execute(self, config: RunConfig) -> StoredRun:
        if isinstance(config, BM25Run):
            return self._execute_bm25(config)
        assert isinstance(config, EncoderRun)
        encoder = self.encoder(config.encoder)
        model = encoder.fresh()
        work = self.home / "cache" / "work" / config.run_id
        result = None
        seen: list[tuple[Evaluation, Run]] = []

        def evaluator(model: Any) -> Evaluation:
            seen.append(self.evaluate_rerank(encoder, model, config))
            return seen[-1][0]

        if not isinstance(config, TrainingRun):
            evaluation = evaluator(model)
        else:
            initial = self._known_start(config)
            result = train(
                config, model, self.triples, encoder.queries, encoder.passages, evaluator,
                initial=initial, folder=work, checkpoint_every=self.profile.training.checkpoint_every,
                device=self.profile.device,
            )  # fmt: skip
            evaluation = result.kept
        evaluations = {"rerank": {config.validation: evaluation}}
        # What was kept is among what was seen, unless it is step 0 from the store or from before an interruption.
        kept = [run for e, run in seen if e.per_query is evaluation.per_query]
        kept = kept or [self.evaluate_rerank(encoder, model, config)[1]]
        runs = {"rerank": {config.validation: kept[0]}}
        extra: dict[str, Any] = {}
        if config.test_sets:
            full_evaluations, full_runs, extra = self._evaluate_full(encoder, model, config, work)
            # A validation set that is a test set, too, keeps what the curve says of it.
            for mode, sets in full_evaluations.items():
                evaluations[mode] = {**sets, **evaluations.get(mode, {})}
            for mode, rankings in full_runs.items():
                runs[mode] = {**rankings, **runs.get(mode, {})}
        save = isinstance(config, TrainingRun) and config.save_model
        stored = self.store.put(
            config,
            result,
            evaluations,
            runs,
            extra=extra,
            save_model=(lambda folder: save_encoder(encoder.whole_with(model), folder))
            if save
            else None,
        )
        shutil.rmtree(work, ignore_errors=True)
        return stored

    def _known_start(self, config: TrainingRun) -> Evaluation | None:
        """Step 0 of a run, if the store has it from the encoder as it comes."""
        start = self.zero_shot_run(config.encoder)
        if not self.store.has(start):
            return None
        stored = self.store.get(start)
        there = config.validation in stored.result["rerank"]
        return stored.evaluation("rerank", config.validation) if there else None

    def _evaluate_full(
        self, encoder: LoadedEncoder, model: Any, config: EncoderRun, work: Path
    ) -> tuple[dict[str, dict[str, Evaluation]], dict[str, dict[str, Run]], dict[str, Any]]:
        """Embed every passage once, then for each test set: rerank, search the FAISS index, and search exactly.

        The shards of embeddings lie in ``work`` under a hash of the weights: a run that was killed while embedding goes on
        with the next shard, and shards of other weights are never mixed in.
        """
        ranking, ids = self.profile.ranking, self.collection.passages.ids
        since = time.perf_counter()
        passages = embed_shards(
            model,
            encoder.passages,
            work / f"passages-{_state_hash(model)}",
            shard=ranking.shard,
            dtype=ranking.dtype,
            devices=ranking.devices or (self.profile.device,),
            precision=config.precision,
            batch_tokens=ranking.batch_tokens,
        )
        embedded = time.perf_counter() - since
        settings = choose_index(*passages.shape, depth=config.full_depth)
        since = time.perf_counter()
        threads = 1 if settings.quick else os.cpu_count() or 1  # one gives the same index again
        seed = config.seed if isinstance(config, TrainingRun) else 0
        index = build_index(passages, settings, seed=seed, threads=threads)
        built = time.perf_counter() - since
        evaluations: dict[str, dict[str, Evaluation]] = {"rerank": {}, "full": {}, "exact": {}}
        runs: dict[str, dict[str, Run]] = {"rerank": {}, "full": {}}
        recall: dict[str, float] = {}
        since = time.perf_counter()
        for name in config.test_sets:
            qids = self.collection.queries[name].ids
            queries = embed(
                model, encoder.queries, self.query_rows(name), precision=config.precision
            )
            rows = self.candidate_rows(name)
            reranked = rerank(
                self.top_candidates(name),
                queries,
                qids,
                passages[rows],
                [ids[int(row)] for row in rows],
            )
            approximate = search_index(
                index, settings, queries, qids, ids, config.full_depth, passages
            )
            exact = exact_search(queries, passages, qids, ids, config.full_depth)
            for mode, run, measures in (
                ("rerank", reranked, config.rerank_measures),
                ("full", approximate, config.full_measures),
                ("exact", exact, config.full_measures),
            ):
                evaluations[mode][name] = self.evaluate_ranking(run, name, measures)
            runs["rerank"][name], runs["full"][name] = reranked, approximate
            recall[name] = approximation_recall(approximate, exact, config.full_depth)
        index_facts = {
            **dataclasses.asdict(settings), "embed_seconds": embedded, "build_seconds": built,
            "search_seconds": time.perf_counter() - since, "recall_of_exact": recall,
        }  # fmt: skip
        return evaluations, runs, {"index": index_facts}

    def _execute_bm25(self, config: BM25Run) -> StoredRun:
        measures = {"rerank": config.rerank_measures, "full": config.full_measures}
        evaluations: dict[str, dict[str, Evaluation]] = {"rerank": {}, "full": {}}
        runs: dict[str, dict[str, Run]] = {"rerank": {}, "full": {}}
        for name in config.rerank_sets:
            runs["rerank"][name] = self.top_candidates(name)
            if name in config.test_sets:
                runs["full"][name] = self.bm25_ranking(name)
        for mode, rankings in runs.items():
            for name, run in rankings.items():
                evaluations[mode][name] = self.evaluate_ranking(run, name, measures[mode])
        return self.store.put(config, None, evaluations, runs)


def describe(config: RunConfig, with_target: bool = True) -> str:
    """A run in words, for progress lines."""
    if isinstance(config, BM25Run):
        return "candidates in BM25's order, full ranking"
    if isinstance(config, ZeroShotRun):
        return "zero-shot, full ranking"
    assert isinstance(config, TrainingRun)
    if config.loss == "softmax":
        name = "softmax"
    elif isinstance(config.target, str):
        name = config.target
    else:
        name = f"static ε = {config.target:g}" if with_target else "static"
    return (
        f"{name}{', in-batch' if config.in_batch else ''}, B {config.batch_size}, {config.triples} triples"
        f"{', early stopping, full ranking' if config.patience else ''}"
    )


def _rate(value: float | str, batch_size: int) -> float:
    """A learning rate as the profile gives it, for a batch size."""
    if not isinstance(value, str):
        return value
    return float(value.removesuffix("/B")) / batch_size


def _state_hash(model: Any) -> str:
    """Hash of a model's parameters."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


class _Progress:
    """A line per finished run: count, what, seconds, elapsed, time left by how the expectations held so far."""

    def __init__(self, expected: Mapping[RunConfig, float], workers: int) -> None:
        self.waiting, self.total, self.workers = dict(expected), len(expected), workers
        self.finished = 0.0
        self.since = time.perf_counter()

    def done(self, config: RunConfig, run: StoredRun) -> None:
        self.finished += self.waiting.pop(config)
        elapsed = time.perf_counter() - self.since
        rest = sum(self.waiting.values())
        # The other workers are on average half through a run.
        under_way = rest / max(len(self.waiting), 1) * min(self.workers - 1, len(self.waiting)) / 2
        left = clock(elapsed / (self.finished + under_way) * (rest - under_way))
        say(
            f"[{self.total - len(self.waiting):3d}/{self.total}] {config.encoder} {describe(config)}: "
            f"{run.result['train_seconds'] + run.result['eval_seconds']:.1f} s | {clock(elapsed)} elapsed, about {left} left"
        )


_worker: Runs | None = None


def _start_worker(profile: Profile, folder: Path) -> None:
    """A worker computes in one thread and ends with its parent, even if that was killed."""
    global _worker
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(1)
    _worker = Runs(profile, folder)
    gc.freeze()  # the trainer collects garbage at the end of a run: half a million objects of imports are none
    parent = multiprocessing.parent_process()
    if parent is not None:

        def end_with_parent() -> None:
            wait([parent.sentinel])
            os._exit(1)

        threading.Thread(target=end_with_parent, daemon=True).start()


def _work(config: RunConfig) -> StoredRun:
    assert _worker is not None
    return _worker.execute(config)
