"""Which runs each figure and table of the paper needs, as data; and how they are made.

A `Reproduction` is a profile with its collection. Each of its methods ``figure3`` … ``table4`` asks the store for the runs it
needs, makes those that are missing, and returns what the figure or table shows, as a long data frame with run ids.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import multiprocessing
import os
import shutil
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.connection import wait
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pandas as pd
import torch
from sentence_transformers import SentenceTransformer

from adaptive_margins import retrieval
from adaptive_margins.data import pydocs
from adaptive_margins.data import triples as data_triples
from adaptive_margins.data.collection import Collection, Run, Texts
from adaptive_margins.encoders import (
    Tokens,
    cached_states,
    embed,
    load_config,
    load_encoder,
    put_back,
    save_encoder,
    tokenize,
    upper_layers,
    weights_identity,
)
from adaptive_margins.evaluation import Evaluation, evaluate, paired_interval, paired_tost
from adaptive_margins.losses import margin_loss
from adaptive_margins.profiles import EncoderSettings, Profile, load_profile
from adaptive_margins.store import Store, StoredRun, StoreError, home, write_text
from adaptive_margins.training import RunConfig, TrainingError, train

BM25_NAME = "bm25"
VARIANTS = (
    ("static", False),
    ("static", True),
    ("adaptive", False),
    ("adaptive", True),
    ("distributed", False),
)
"""The five rows per encoder of Table 3: target and in-batch negatives."""


class Reproduction:
    """One profile, its collection and its results. Opening it builds the collection if it is not there yet."""

    def __init__(self, profile: Profile, folder: Path | None = None) -> None:
        self.profile = profile
        self.home = folder or home()
        self.store = Store(self.home / "runs")
        self._tokenised: dict[tuple[str, str | None], tuple[Tokens, Tokens]] = {}

    @classmethod
    def open(
        cls, profile: str | Path = "laptop", folder: Path | None = None, **overrides: Any
    ) -> Reproduction:
        """Open a profile by name or YAML path; ``overrides`` as in `profiles.load_profile`."""
        return cls(load_profile(profile, **overrides), folder)

    # ---- data ------------------------------------------------------------------------------------------------------

    @functools.cached_property
    def collection(self) -> Collection:
        """The collection as used: passages, query sets, qrels and training triples; kept under ``collections/``."""
        settings = self.profile.collection
        key = _digest(
            {
                "collection": settings.model_dump(mode="json"),
                "negatives": self.profile.candidates.negative_ranks,
                "triples": self.triples_needed,
                "sources": pydocs.source_versions(settings.packages),
                "rules": [_file_digest(m) for m in (pydocs, data_triples, retrieval)],
            }
        )
        pointer = self.home / "cache" / "collections" / f"{key}.json"
        if pointer.is_file():
            folder = self.home / "collections" / json.loads(pointer.read_text())["fingerprint"]
            if folder.is_dir():
                return Collection.load(folder)
        say("building the collection from installed packages")
        collection = pydocs.build_pydocs(
            settings.packages,
            seed=settings.seed,
            validation=settings.validation,
            test=settings.test,
            max_passages=settings.max_passages,
            max_words=settings.max_words,
        )
        low, high = self.profile.candidates.negative_ranks
        bm25 = retrieval.BM25(collection.passages)
        triples = data_triples.sample_triples(
            collection.qrels["train"],
            bm25.search(collection.queries["train"], high),
            count=self.triples_needed,
            ranks=(low, high),
            seed=settings.seed,
            min_grade=pydocs.OWN,
        )
        collection = dataclasses.replace(collection, triples=triples)
        folder = self.home / "collections" / collection.fingerprint
        if not folder.is_dir():
            collection.save(folder)
        write_text(pointer, json.dumps({"fingerprint": collection.fingerprint}) + "\n")
        return collection

    @property
    def triples_needed(self) -> int:
        """The longest run's triples: every run takes its own from the same list."""
        p = self.profile
        return max(
            p.static.triples, p.adaptive.triples, p.distributed.triples, p.comparison.triples
        )

    @property
    def evaluated_sets(self) -> list[str]:
        """Validation and test sets, each once, in the profile's order."""
        return list(dict.fromkeys([self.profile.sets.validation, *self.profile.sets.tests]))

    @functools.cached_property
    def candidates(self) -> dict[str, Run]:
        """BM25's ranking of each evaluated set, as deep as full ranking is evaluated; kept beside the collection."""
        depth = max(self.profile.candidates.depth, self.profile.measures.full_depth)
        folder = self.home / "collections" / self.collection.fingerprint
        found: dict[str, Run] = {}
        bm25 = None
        for name in self.evaluated_sets:
            path = folder / f"bm25-{depth}.{name}.run.gz"
            if not path.is_file():
                bm25 = bm25 or retrieval.BM25(self.collection.passages)
                retrieval.write_run(
                    bm25.search(self.collection.queries[name], depth), path, BM25_NAME
                )
            found[name] = retrieval.read_run(path)
        return found

    def top_candidates(self, query_set: str) -> Run:
        """The candidates that are reranked: BM25's first ``candidates.depth``."""
        depth = self.profile.candidates.depth
        return {
            q: dict(retrieval.top(scores, depth))
            for q, scores in self.candidates[query_set].items()
        }

    @functools.cached_property
    def queries(self) -> Texts:
        """All queries that are embedded (evaluated sets and those in triples), in one numbering."""
        sets = self.collection.queries
        used = sorted({qid for qid, _, _ in self.collection.triples})
        train = sets["train"]
        ids, texts = list(used), [train[q] for q in used]
        for name in self.evaluated_sets:
            ids += sets[name].ids
            texts += sets[name].texts
        return Texts(ids, texts)

    # ---- encoders --------------------------------------------------------------------------------------------------

    def encoder(self, name: str) -> LoadedEncoder:
        """Encoder ``name`` of the profile, loaded once per process and kept untouched; see `LoadedEncoder`."""
        return self._encoder(name)

    def _settings(self, encoder: str) -> EncoderSettings:
        known = {**self.profile.encoders, **self.profile.untrained}
        if encoder not in known:
            raise KeyError(
                f"encoder {encoder!r} is not in profile {self.profile.name!r}: {sorted(known)}"
            )
        return known[encoder]

    @functools.cache  # noqa: B019  (a Reproduction lives as long as its process)
    def _encoder(self, name: str) -> LoadedEncoder:
        settings = self._settings(name)
        dropout, device = self.profile.training.dropout, self.profile.device
        whole = load_encoder(settings, dropout=dropout, device=device)
        queries, passages = self._tokens(settings.base, settings.revision, whole)
        if settings.trained_layers is None:
            return LoadedEncoder(whole, whole, queries, passages)
        uncut = settings.model_copy(update={"layers": None})
        alike = [
            e
            for e in self.profile.encoders.values()
            if (e.base, e.revision) == (settings.base, settings.revision)
        ]
        frozen = sorted({self._frozen(e) for e in alike if e.trained_layers})
        merged = Tokens(
            np.concatenate([queries.ids, passages.ids]),
            np.concatenate([queries.offsets, passages.offsets[1:] + queries.offsets[-1]]),
            queries.pad,
        )
        texts = hashlib.sha256(merged.ids.tobytes() + merged.offsets.tobytes()).hexdigest()
        key = _digest([weights_identity(settings), texts])
        tables = cached_states(
            lambda: load_encoder(uncut, dropout=0.0, device=device),
            merged,
            frozen,
            self.home / "cache" / "states" / key,
        )
        model = upper_layers(whole, settings.trained_layers, tables[self._frozen(settings)])
        numbers = np.arange(merged.offsets[-1])
        start = queries.offsets[-1]
        return LoadedEncoder(
            whole,
            model,
            Tokens(numbers[:start], queries.offsets, 0),
            Tokens(numbers[start:], passages.offsets, 0),
        )

    def _frozen(self, settings: EncoderSettings) -> int:
        """How many layers stay as they are."""
        assert settings.trained_layers is not None
        layers = settings.layers or int(load_config(settings).num_hidden_layers)
        return layers - settings.trained_layers

    def _tokens(self, base: str, revision: str | None, whole: Any) -> tuple[Tokens, Tokens]:
        """Queries and passages, tokenised once for all encoders of the same base."""
        if (base, revision) not in self._tokenised:
            lengths = self.profile.lengths
            self._tokenised[base, revision] = (
                tokenize(whole, self.queries.texts, lengths.query),
                tokenize(whole, self.collection.passages.texts, lengths.passage),
            )
        return self._tokenised[base, revision]

    # ---- configurations --------------------------------------------------------------------------------------------

    def config(self, encoder: str, **values: Any) -> RunConfig:
        """A run's configuration: the profile's values for ``encoder``, and ``values`` in their place."""
        p = self.profile
        settings = self._settings(encoder)
        return RunConfig.model_validate(
            {
                "encoder": encoder,
                "weights": self._weights(settings),
                "pooling": settings.pooling,
                "layers": settings.layers,
                "trained_layers": settings.trained_layers,
                "query_length": p.lengths.query,
                "passage_length": p.lengths.passage,
                "loss": "margin",
                "learning_rate": p.training.learning_rate,
                "weight_decay": p.training.weight_decay,
                "decay": 1.0,
                "optimizer": p.training.optimizer,
                "precision": p.training.precision,
                "dropout": p.training.dropout,
                "seed": p.seed,
                "evaluate_every": 0,
                "patience": 0,
                "keep": "last",
                "selection": p.measures.selection,
                "validation": p.sets.validation,
                "depth": p.candidates.depth,
                "rerank_measures": p.measures.rerank,
                "collection": self.collection.fingerprint,
                **values,
            }
        )

    @functools.cache  # noqa: B019
    def _weights(self, settings: EncoderSettings) -> str:
        return weights_identity(settings)

    @property
    def _full(self) -> dict[str, Any]:
        p = self.profile
        return {
            "test_sets": p.sets.tests,
            "full_measures": p.measures.full,
            "full_depth": p.measures.full_depth,
        }

    def untrained_config(self, encoder: str) -> RunConfig:
        """The encoder as it comes: step 0 of all its runs."""
        return self.config(
            encoder,
            loss="none",
            target=None,
            in_batch=False,
            batch_size=0,
            triples=0,
            **self._full,
            **_UNTRAINED,
        )

    def bm25_config(self) -> RunConfig:
        """BM25's own order, as candidates and over all passages."""
        some = next(iter(self.profile.encoders))
        return self.untrained_config(some).model_copy(
            update={
                "encoder": BM25_NAME,
                "weights": f"bm25s {importlib.metadata.version('bm25s')} lucene",
                "pooling": "",
                "layers": None,
                "trained_layers": None,
                "query_length": 0,
                "passage_length": 0,
            }
        )

    def static_config(
        self, encoder: str, target: float, in_batch: bool, seed: int | None = None
    ) -> RunConfig:
        """Section 5.1: one point of Figure 3."""
        s = self.profile.static
        return self.config(
            encoder, target=target, in_batch=in_batch, batch_size=s.batch_size, triples=s.triples,
            seed=self.profile.seed if seed is None else seed,
        )  # fmt: skip

    def curve_config(self, encoder: str, target: str, in_batch: bool, batch_size: int) -> RunConfig:
        """Sections 5.2 and 5.3: one line of Figure 4 or 5."""
        s = self.profile.adaptive if target == "adaptive" else self.profile.distributed
        return self.config(
            encoder, target=target, in_batch=in_batch, batch_size=batch_size, triples=s.triples, keep="best",
            evaluate_every=s.evaluate_every // batch_size,
        )  # fmt: skip

    def comparison_config(self, encoder: str, **values: Any) -> RunConfig:
        """Section 5.4: with decay and early stopping, best step kept, ranked in full."""
        s = self.profile.comparison
        size = s.batch_sizes[0]
        return self.config(
            encoder, **{
                "batch_size": size, "triples": s.triples, "decay": s.decay, "patience": s.patience, "keep": "best",
                "evaluate_every": s.evaluate_every // size, **self._full, **values,
            },
        )  # fmt: skip

    def figure3_configs(self) -> list[RunConfig]:
        """ε × in-batch × encoders, and the further seeds."""
        s = self.profile.static
        seeds = {
            e: [self.profile.seed, *(x for x in s.seeds.get(e, ()) if x != self.profile.seed)]
            for e in self.profile.encoders
        }
        return [
            self.static_config(e, target, in_batch, seed)
            for e in self.profile.encoders
            for in_batch in (False, True)
            for seed in seeds[e]
            for target in s.targets
        ]

    def figure4_configs(self) -> list[RunConfig]:
        """Adaptive targets with and without in-batch negatives."""
        return [
            self.curve_config(e, "adaptive", in_batch, self.profile.adaptive.batch_sizes[0])
            for e in self.profile.encoders
            for in_batch in (False, True)
        ]

    def figure5_configs(self) -> list[RunConfig]:
        """Distributed targets by batch size."""
        return [
            self.curve_config(e, "distributed", False, size)
            for e in self.profile.encoders
            for size in self.profile.distributed.batch_sizes
        ]

    def tuned_target(self, encoder: str, in_batch: bool) -> float:
        """The ε of Figure 3 with the best selection measure on validation (the smallest of equals)."""
        measure = self.profile.measures.selection
        runs = {
            t: self.store.get(self.static_config(encoder, t, in_batch))
            for t in self.profile.static.targets
        }
        means = {
            t: r.evaluation("rerank", self.profile.sets.validation).mean[measure]
            for t, r in runs.items()
        }
        return max(means, key=lambda t: (means[t], -t))

    def variant_config(self, encoder: str, target: str, in_batch: bool) -> RunConfig:
        """A row of Table 3; a static row needs Figure 3's runs."""
        value: float | str = self.tuned_target(encoder, in_batch) if target == "static" else target
        save = encoder == self.profile.reference_encoder and target == "distributed"
        return self.comparison_config(encoder, target=value, in_batch=in_batch, save_model=save)

    def table3_configs(self) -> list[RunConfig]:
        """Five rows per encoder."""
        return [
            self.variant_config(e, *variant) for e in self.profile.encoders for variant in VARIANTS
        ]

    def table4_configs(self) -> list[RunConfig]:
        """What Table 4 needs beyond Table 3: ε = 1 and the softmax loss, trained alike."""
        e = self.profile.reference_encoder
        return [
            self.comparison_config(e, target=1.0, in_batch=False),
            self.comparison_config(e, loss="softmax", target=None, in_batch=True),
        ]

    def start_configs(self) -> list[RunConfig]:
        """BM25 and every encoder as it comes."""
        encoders = [*self.profile.encoders, *self.profile.untrained]
        return [self.bm25_config(), *(self.untrained_config(e) for e in encoders)]

    # ---- running ---------------------------------------------------------------------------------------------------

    def ensure(self, configs: Iterable[RunConfig]) -> list[StoredRun]:
        """The finished runs of ``configs``, in order; those that are missing are made first, with progress on stderr."""
        configs = list(configs)
        missing = [c for c in dict.fromkeys(configs) if not self.store.has(c)]
        if missing:
            with self._workers() as pool:
                self._make(missing, pool)
        return [self.store.get(c) for c in configs]

    def stages(self) -> list[list[RunConfig]]:
        """All runs, in stages that need the ones before: starts; figures; then (ε now known) the tables."""
        first = self.start_configs()
        second = [*self.figure3_configs(), *self.figure4_configs(), *self.figure5_configs()]
        return [first, second]

    def run_all(self) -> None:
        """Make every run of the profile that is not in the store."""
        self.announce()
        with self._workers() as pool:
            first, second = self.stages()
            self._make([c for c in dict.fromkeys([*first, *second]) if not self.store.has(c)], pool)
            last = [
                *self.table3_configs(),
                *self.table4_configs(),
            ]  # needs the ε that Figure 3 finds
            self._make([c for c in dict.fromkeys(last) if not self.store.has(c)], pool)

    def announce(self) -> None:
        """Say how many runs are missing and how long they will take, by a short calibration on this machine."""
        plan = self.plan()
        todo = plan[~plan["done"]]
        if todo.empty:
            say(f"profile {self.profile.name}: all {len(plan)} runs are there")
            return
        say(
            f"profile {self.profile.name}: {len(plan) - len(todo)} of {len(plan)} runs are there; to be made:"
        )
        for (encoder, what), group in todo.groupby(["encoder", "what"], sort=False):
            say(f"  {len(group):3d} × {group['seconds'].mean():6.1f} s  {encoder} {what}")
        total = todo["seconds"].sum() / self.profile.workers
        say(f"  {len(todo):3d} runs, about {clock(total)} with {self.profile.workers} workers")

    def plan(self) -> pd.DataFrame:
        """One row a run: encoder, what, seconds (expected, one worker), done. Static rows of Table 3 stand for any ε."""
        first, second = self.stages()
        rows = [(c, self.store.has(c)) for c in dict.fromkeys([*first, *second])]
        for encoder in self.profile.encoders:
            for target, in_batch in VARIANTS:
                try:
                    config = self.variant_config(encoder, target, in_batch)
                    rows.append((config, self.store.has(config)))
                except StoreError:  # ε is not known before Figure 3 is
                    rows.append(
                        (self.comparison_config(encoder, target=0.0, in_batch=in_batch), False)
                    )
        rows += [(c, self.store.has(c)) for c in self.table4_configs()]
        rows = list(dict(rows).items())  # ε = 1 may be the tuned one
        return pd.DataFrame(
            [
                {
                    "encoder": c.encoder,
                    "what": describe(c, with_target=False),
                    "seconds": 0.0 if done else self.expected_seconds(c),
                    "done": done,
                }
                for c, done in rows
            ]
        )

    @functools.cache  # noqa: B019
    def calibrate(self, encoder: str) -> tuple[float, float]:
        """Seconds a triple in training and seconds a passage in embedding, one thread, measured in about a second."""
        loaded = self.encoder(encoder)
        model = loaded.fresh()
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            some_rows = self.triple_rows(encoder)
            size = min(self.profile.static.batch_size, len(some_rows) // 3)
            rows = some_rows[: 3 * size].reshape(3, -1, 3)
            since = 0.0
            for i, batch in enumerate(rows):
                if i == 1:
                    since = time.perf_counter()
                columns = [
                    loaded.queries.batch(batch[:, 0]),
                    loaded.passages.batch(batch[:, 1]),
                    loaded.passages.batch(batch[:, 2]),
                ]
                margin_loss(*(model(c)["sentence_embedding"] for c in columns)).backward()
            triple = (time.perf_counter() - since) / (2 * rows.shape[1])
            since = time.perf_counter()
            some = np.arange(min(256, len(loaded.passages)))
            embed(model, loaded.passages, some)
            return triple, (time.perf_counter() - since) / len(some)
        finally:
            torch.set_num_threads(threads)

    def expected_seconds(self, config: RunConfig) -> float:
        """What one worker is expected to need for a run, by `calibrate` (a query counts as half a passage)."""
        if config.encoder == BM25_NAME:
            return 1.0
        triple, passage = self.calibrate(config.encoder)
        needed = self._validation_rows
        validation = (len(needed[1]) + len(needed[0]) / 2) * passage
        checks = config.steps // config.evaluate_every if config.evaluate_every else 1
        tests = sum(len(self.collection.queries[s]) for s in config.test_sets)
        passages = len(self.collection.passages)
        index = min(4.0, passages / 1500)  # training, and searching the test sets
        full = (passages + tests / 2) * passage + index if config.test_sets else 0.0
        return 0.3 + config.triples * triple + checks * validation + full

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

    def _make(self, missing: Sequence[RunConfig], pool: ProcessPoolExecutor | None) -> None:
        if not missing:
            return
        for encoder in dict.fromkeys(c.encoder for c in missing if c.encoder != BM25_NAME):
            self.encoder(encoder)  # computes what workers share, with all cores
        self.candidates  # noqa: B018
        starts = [c for c in missing if c.loss == "none"]
        others = [c for c in missing if c.loss != "none"]
        expected = {c: self.expected_seconds(c) for c in missing}
        progress = _Progress(expected, self.profile.workers)
        for group in (starts, others):  # step 0 first: the others take it from the store
            ordered = sorted(
                group, key=expected.__getitem__, reverse=True
            )  # long runs first, so that workers end together
            if pool is None:
                for config in ordered:
                    progress.done(config, self.execute(config))
                continue
            futures = {pool.submit(_work, config): config for config in ordered}
            for future in as_completed(futures):
                try:
                    progress.done(futures[future], future.result())
                except BrokenProcessPool:
                    raise TrainingError(
                        "a worker process was killed (out of memory?); finished runs are kept, and the same call makes "
                        "the rest"
                    ) from None

    def triple_rows(self, encoder: str) -> np.ndarray:
        """The training triples as (N, 3) rows of `queries` and of the passages."""
        passages = self.collection.passages
        rows = [
            (self.queries.row(q), passages.row(p), passages.row(n))
            for q, p, n in self.collection.triples
        ]
        return np.array(rows, dtype=np.int64)

    @functools.cached_property
    def _validation_rows(self) -> tuple[np.ndarray, np.ndarray]:
        return self._rows(self.profile.sets.validation)

    def _rows(self, query_set: str) -> tuple[np.ndarray, np.ndarray]:
        """Rows of a set's queries, and of all passages among their candidates."""
        candidates = self.top_candidates(query_set)
        passages = sorted(
            {self.collection.passages.row(d) for scores in candidates.values() for d in scores}
        )
        return np.array(
            [self.queries.row(q) for q in self.collection.queries[query_set].ids]
        ), np.array(passages)

    def evaluate_rerank(
        self, encoder: LoadedEncoder, model: Any, config: RunConfig
    ) -> tuple[Evaluation, Run]:
        """Rerank the validation queries' candidates with ``model``."""
        query_rows, passage_rows = self._validation_rows
        run = retrieval.rerank(
            self.top_candidates(config.validation),
            embed(model, encoder.queries, query_rows),
            [self.queries.ids[r] for r in query_rows],
            embed(model, encoder.passages, passage_rows),
            [self.collection.passages.ids[r] for r in passage_rows],
        )
        return evaluate(self.collection.qrels[config.validation], run, config.rerank_measures), run

    def execute(self, config: RunConfig) -> StoredRun:
        """Make one run in this process and store it; a run that was killed goes on from its last whole checkpoint."""
        if config.encoder == BM25_NAME:
            return self._execute_bm25(config)
        encoder = self.encoder(config.encoder)
        model = encoder.fresh()
        work = self.home / "cache" / "work" / config.run_id
        result = None
        seen: list[tuple[Evaluation, Run]] = []

        def evaluator(model: Any) -> Evaluation:
            seen.append(self.evaluate_rerank(encoder, model, config))
            return seen[-1][0]

        if config.loss == "none":
            evaluation = evaluator(model)
        else:
            start = self.untrained_config(config.encoder)
            initial = (
                self.store.get(start).evaluation("rerank", config.validation)
                if self.store.has(start)
                else None
            )
            result = train(
                config, model, self.triple_rows(config.encoder), encoder.queries, encoder.passages, evaluator,
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
            full_evaluations, full_runs, extra = self._evaluate_full(encoder, model, config)
            for mode, sets in full_evaluations.items():
                evaluations.setdefault(mode, {}).update(sets)
            for mode, rankings in full_runs.items():
                runs.setdefault(mode, {}).update(rankings)
        stored = self.store.put(
            config, result, evaluations, runs, extra=extra,
            save_model=(lambda folder: save_encoder(encoder.whole_with(model), folder)) if config.save_model else None,
        )  # fmt: skip
        _remove(work)
        return stored

    def _evaluate_full(
        self, encoder: LoadedEncoder, model: Any, config: RunConfig
    ) -> tuple[dict[str, dict[str, Evaluation]], dict[str, dict[str, Run]], dict[str, Any]]:
        """Embed every passage once, then for each test set: rerank, search the FAISS index, and search exactly."""
        since = time.perf_counter()
        passages = embed(model, encoder.passages)
        ids = self.collection.passages.ids
        embedded = time.perf_counter() - since
        settings = retrieval.choose_index(len(ids), passages.shape[1], depth=config.full_depth)
        since = time.perf_counter()
        index = retrieval.build_index(passages, settings, seed=config.seed)
        built = time.perf_counter() - since
        evaluations: dict[str, dict[str, Evaluation]] = {"rerank": {}, "full": {}, "exact": {}}
        runs: dict[str, dict[str, Run]] = {"rerank": {}, "full": {}}
        recall: dict[str, float] = {}
        for name in config.test_sets:
            queries = self.collection.queries[name]
            embedded_queries = embed(
                model, encoder.queries, [self.queries.row(q) for q in queries.ids]
            )
            qrels = self.collection.qrels[name]
            reranked = retrieval.rerank(
                self.top_candidates(name), embedded_queries, queries.ids, passages, ids
            )
            approximate = retrieval.search_index(
                index, settings, embedded_queries, queries.ids, ids, config.full_depth
            )
            exact = retrieval.exact_search(
                embedded_queries, passages, queries.ids, ids, config.full_depth
            )
            evaluations["rerank"][name] = evaluate(qrels, reranked, config.rerank_measures)
            evaluations["full"][name] = evaluate(qrels, approximate, config.full_measures)
            evaluations["exact"][name] = evaluate(qrels, exact, config.full_measures)
            runs["rerank"][name], runs["full"][name] = reranked, approximate
            recall[name] = retrieval.approximation_recall(approximate, exact, config.full_depth)
        index_facts = {
            **dataclasses.asdict(settings), "embed_seconds": embedded, "build_seconds": built, "recall_of_exact": recall,
        }  # fmt: skip
        return evaluations, runs, {"index": index_facts}

    def _execute_bm25(self, config: RunConfig) -> StoredRun:
        measures = {"rerank": config.rerank_measures, "full": config.full_measures}
        evaluations: dict[str, dict[str, Evaluation]] = {"rerank": {}, "full": {}}
        runs: dict[str, dict[str, Run]] = {"rerank": {}, "full": {}}
        for name in self.evaluated_sets:
            qrels = self.collection.qrels[name]
            runs["rerank"][name] = self.top_candidates(name)
            evaluations["rerank"][name] = evaluate(qrels, runs["rerank"][name], measures["rerank"])
            if name in config.test_sets:
                runs["full"][name] = self.candidates[name]
                evaluations["full"][name] = evaluate(qrels, self.candidates[name], measures["full"])
        return self.store.put(config, None, evaluations, runs)

    # ---- what is shown ---------------------------------------------------------------------------------------------

    def table1(self) -> pd.DataFrame:
        """Encoders: parameters, embedding, dimensions."""
        rows = []
        for name, settings in self.profile.encoders.items():
            run = self.ensure([self.untrained_config(name)])[0]
            whole, model = self.encoder(name).whole, self.encoder(name).model
            rows.append(
                {
                    "encoder": name,
                    "base": settings.label or settings.base,
                    "parameters": sum(p.numel() for p in whole.parameters()),
                    "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
                    "embedding": {"cls": "[CLS]", "cls+linear": "[CLS] + Linear", "mean": "mean"}[
                        settings.pooling
                    ],
                    "dimensions": whole.get_embedding_dimension(),
                    "run_id": run.run_id,
                }
            )
        return pd.DataFrame(rows)

    def figure3(self) -> pd.DataFrame:
        """Static targets: a row per ε, seed and measure, on the validation set after the last step."""
        starts = {e: self.ensure([self.untrained_config(e)])[0] for e in self.profile.encoders}
        rows = []
        for run in self.ensure(self.figure3_configs()):
            c = run.config
            start = starts[c.encoder]
            before = start.evaluation("rerank", c.validation).mean
            for measure, value in run.evaluation("rerank", c.validation).mean.items():
                rows.append(
                    {
                        "encoder": c.encoder, "in_batch": c.in_batch, "target": c.target, "seed": c.seed, "measure": measure,
                        "value": value, "start": before[measure], "run_id": run.run_id, "start_run_id": start.run_id,
                    }
                )  # fmt: skip
        frame = pd.DataFrame(rows)
        frame.insert(
            7,
            "maximum",
            _is_first_maximum(frame, ["encoder", "in_batch", "seed", "measure"])
            & (frame["seed"] == self.profile.seed),
        )
        return frame

    def figure4(self) -> pd.DataFrame:
        """Adaptive targets: learning curves on the validation set."""
        return self._curves(self.figure4_configs())

    def figure5(self) -> pd.DataFrame:
        """Distributed targets: learning curves by batch size."""
        return self._curves(self.figure5_configs())

    def _curves(self, configs: Sequence[RunConfig]) -> pd.DataFrame:
        frames = []
        for run in self.ensure(configs):
            c = run.config
            long = run.curve.melt(["step", "triples"], list(c.rerank_measures), "measure", "value")
            frames.append(
                long.assign(
                    encoder=c.encoder,
                    in_batch=c.in_batch,
                    batch_size=c.batch_size,
                    seed=c.seed,
                    run_id=run.run_id,
                )
            )
        frame = pd.concat(frames, ignore_index=True)
        frame["maximum"] = _is_first_maximum(frame, ["run_id", "measure"])
        columns = [
            "encoder",
            "in_batch",
            "batch_size",
            "seed",
            "step",
            "triples",
            "measure",
            "value",
            "maximum",
            "run_id",
        ]
        return frame[columns]

    def gains(self, configs: Sequence[RunConfig] | None = None) -> pd.DataFrame:
        """Best step against step 0 on validation, with a paired 95 % t interval, for Figures 4 and 5 (or ``configs``)."""
        rows = []
        for run in self.ensure(configs or [*self.figure4_configs(), *self.figure5_configs()]):
            c = run.config
            start = self.ensure([self.untrained_config(c.encoder)])[0].evaluation(
                "rerank", c.validation
            )
            kept = run.evaluation("rerank", c.validation)
            for measure in c.rerank_measures:
                difference, low, high = paired_interval(
                    kept.per_query[measure], start.per_query[measure]
                )
                rows.append(
                    {
                        "encoder": c.encoder, "loss": c.target, "in_batch": c.in_batch, "batch_size": c.batch_size,
                        "measure": measure, "start": start.mean[measure], "best": kept.mean[measure],
                        "difference": difference, "low": low, "high": high, "step": run.result["kept_step"],
                        "run_id": run.run_id,
                    }
                )  # fmt: skip
        return pd.DataFrame(rows)

    def figure6(self) -> pd.DataFrame:
        """Distribution of raw φ(d⁺, d⁻) over training, smoothed; first and last batches of Figure 5's largest batch size."""
        window, span = self.profile.target_plot.window, self.profile.target_plot.span
        size = max(self.profile.distributed.batch_sizes)
        frames = []
        for run in self.ensure([c for c in self.figure5_configs() if c.batch_size == size]):
            smooth = run.targets[["mean", "min", "max"]].rolling(window, min_periods=1).mean()
            smooth.insert(0, "step", run.targets["step"])
            for part, rows in (("first", smooth.head(span)), ("last", smooth.tail(span))):
                frames.append(
                    rows.assign(
                        encoder=run.config.encoder,
                        batch_size=size,
                        part=part,
                        window=window,
                        span=len(rows),
                        run_id=run.run_id,
                    )
                )
        columns = [
            "encoder",
            "batch_size",
            "part",
            "step",
            "mean",
            "min",
            "max",
            "window",
            "span",
            "run_id",
        ]
        return pd.concat(frames, ignore_index=True)[columns]

    def table2(self) -> pd.DataFrame:
        """A training instance under the fine-tuned reference encoder: its highest, middle and lowest target.

        From the first training batch, the query whose targets T[i, :] are spread widest; ρ = φ(q_i, ·), t = T[i, j].
        ``loss_table`` is what the paper's Table 2 shows, (ρ(d⁺) − ρ(d⁻_j) − t)²; ``loss_equation`` is Eq. 3 squared.
        """
        self.ensure(
            [c for c in self.figure3_configs() if c.encoder == self.profile.reference_encoder]
        )
        config = self.variant_config(self.profile.reference_encoder, "distributed", False)
        run = self.ensure([config])[0]
        model = SentenceTransformer(str(run.path / "model"), device=self.profile.device)
        order = np.random.default_rng(config.seed).permutation(len(self.collection.triples))[
            : config.batch_size
        ]
        batch = [self.collection.triples[i] for i in order]
        texts, passages = self.collection.queries["train"], self.collection.passages
        q, p, n = (
            torch.from_numpy(embed(model, tokenize(model, column, length)))
            for column, length in (
                ([texts[b[0]] for b in batch], config.query_length),
                ([passages[b[1]] for b in batch], config.passage_length),
                ([passages[b[2]] for b in batch], config.passage_length),
            )
        )
        _, targets = margin_loss(q, p, n, target="distributed", return_targets=True)
        i = int((targets.max(1).values - targets.min(1).values).argmax())
        t = targets[i]
        picks = {
            "d-max": int(t.argmax()),
            "d-mid": int((t - t.mean()).abs().argmin()),
            "d-min": int(t.argmin()),
        }
        rho_positive, rho = float(q[i] @ p[i]), (n @ q[i]).tolist()
        rows: list[dict[str, Any]] = [
            {"role": "q", "id": batch[i][0], "text": texts[batch[i][0]]},
            {"role": "d+", "id": batch[i][1], "text": passages[batch[i][1]], "rho": rho_positive},
        ]
        for role, j in picks.items():
            target = float(t[j])
            rows.append(
                {
                    "role": role, "id": batch[j][2], "text": passages[batch[j][2]], "rho": rho[j], "target": target,
                    "loss_table": (rho_positive - rho[j] - target) ** 2,
                    "loss_equation": (rho_positive - rho[i] - target) ** 2,
                }
            )  # fmt: skip
        columns = ["role", "id", "text", "rho", "target", "loss_table", "loss_equation"]
        return pd.DataFrame(rows, columns=columns).assign(run_id=run.run_id, qid=batch[i][0])

    def table3(self) -> pd.DataFrame:
        """Every encoder × target × in-batch, ranked in full; TOST against the best per encoder, set and measure."""
        self.ensure(self.figure3_configs())
        runs = dict(
            zip(
                ((e, *v) for e in self.profile.encoders for v in VARIANTS),
                self.ensure(self.table3_configs()),
                strict=True,
            )
        )
        rows = []
        for (encoder, target, in_batch), run in runs.items():
            sweep = self._sweep_seconds(encoder, in_batch) if target == "static" else 0.0
            siblings = [r for (e, _, _), r in runs.items() if e == encoder]
            for name, measure, value, best, test in _compare(run, siblings, None, self.profile):
                rows.append(
                    {
                        "encoder": encoder, "target": target,
                        "epsilon": run.config.target if target == "static" else float("nan"),
                        "in_batch": in_batch, "set": name, "measure": measure, "value": value, "best": best, **test,
                        "seconds": run.result["train_seconds"] + sweep, "sweep_seconds": sweep,
                        "triples": run.result["triples"], "run_id": run.run_id,
                    }
                )  # fmt: skip
        columns = [
            "encoder", "target", "epsilon", "in_batch", "set", "measure", "value", "best", "difference", "low", "high", "p",
            "p_adjusted", "comparisons", "equivalent", "seconds", "sweep_seconds", "triples", "run_id", "reference_run_id",
        ]  # fmt: skip
        return pd.DataFrame(rows)[columns]

    def _sweep_seconds(self, encoder: str, in_batch: bool) -> float:
        """Training time of the ε grid that a static row was tuned on."""
        return float(
            sum(
                self.store.get(self.static_config(encoder, t, in_batch)).result["train_seconds"]
                for t in self.profile.static.targets
            )
        )

    def table4(self) -> pd.DataFrame:
        """The reference encoder's rows beside baselines; TOST against the softmax loss, the run most people would make."""
        self.ensure(self.figure3_configs())
        e = self.profile.reference_encoder
        wanted = [self.variant_config(e, *v) for v in VARIANTS]
        tuned_no, tuned_yes, adaptive_no, adaptive_yes, distributed = self.ensure(wanted)
        default, softmax = self.ensure(self.table4_configs())
        bm25, start = self.ensure([self.bm25_config(), self.untrained_config(e)])
        # block, loss, sampling, in-batch, source, run
        listed = [
            ("self-distillation", "Adaptive", "Rand.", "✗", "ours", adaptive_no),
            ("self-distillation", "Adaptive", "Rand.", "✓", "ours", adaptive_yes),
            ("self-distillation", "Distributed", "Rand.", "✓", "ours", distributed),
            ("no distillation", "BM25", "—", "—", "ours", bm25),
            ("no distillation", "Static (tuned)", "Rand.", "✗", "ours", tuned_no),
            ("no distillation", "Static (tuned)", "Rand.", "✓", "ours", tuned_yes),
            ("no distillation", "Static (ε = 1)", "Rand.", "✗", "ours", default),
            ("not in the paper", "Softmax (MNRL)", "Rand.", "✓", "not in the paper", softmax),
            ("not in the paper", "Encoder as it comes", "—", "—", "not in the paper", start),
        ]
        for name, settings in self.profile.untrained.items():
            run = self.ensure([self.untrained_config(name)])[0]
            loss = f"{settings.label or name} as it comes"
            listed.append(("not in the paper", loss, "—", "—", "not in the paper", run))
        rows = []
        for block, loss, sampling, in_batch, source, run in listed:
            block_runs = [r for b, *_, r in listed if b == block]
            everything = [r for *_, r in listed]
            for name, measure, value, best, test in _compare(
                run, block_runs, softmax, self.profile, len(everything) - 1
            ):
                rows.append(
                    {
                        "block": block, "loss": loss, "sampling": sampling, "in_batch": in_batch, "source": source,
                        "set": name, "measure": measure, "value": value, "best": best, **test,
                        "triples": run.result["triples"], "run_id": run.run_id,
                    }
                )  # fmt: skip
        columns = [
            "block", "loss", "sampling", "in_batch", "source", "set", "measure", "value", "best", "difference", "low", "high",
            "p_adjusted", "equivalent", "triples", "run_id", "reference_run_id",
        ]  # fmt: skip
        return pd.DataFrame(rows)[columns]

    def references(self) -> dict[str, float]:
        """BM25's own order on the validation candidates, by measure."""
        return (
            self.ensure([self.bm25_config()])[0]
            .evaluation("rerank", self.profile.sets.validation)
            .mean
        )


@dataclasses.dataclass(frozen=True)
class LoadedEncoder:
    """``whole``: the ordinary model. ``model``: what is trained (the same, or its upper layers over cached states).

    ``queries`` and ``passages`` are what ``model`` reads: token ids, or numbers of cached tokens.
    """

    whole: Any
    model: Any
    queries: Tokens
    passages: Tokens

    def fresh(self) -> Any:
        """A copy of ``model`` to train."""
        return copy.deepcopy(self.model)

    def whole_with(self, trained: Any) -> Any:
        """The ordinary model that ``trained`` stands for."""
        return trained if self.model is self.whole else put_back(self.whole, trained)


def describe(config: RunConfig, with_target: bool = True) -> str:
    """A run in words, for progress lines."""
    if config.encoder == BM25_NAME:
        return "own order"
    if config.loss == "none":
        return "as it comes, full ranking"
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


def clock(seconds: float) -> str:
    """Seconds as m:ss or h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def say(text: str) -> None:
    """A line for whoever waits."""
    print(text, file=sys.stderr, flush=True)


_UNTRAINED: dict[str, Any] = {
    "learning_rate": 0.0, "weight_decay": 0.0, "optimizer": "", "seed": 0, "dropout": None, "precision": "fp32",
}  # fmt: skip


def _compare(
    run: StoredRun,
    group: Sequence[StoredRun],
    reference: StoredRun | None,
    profile: Profile,
    comparisons: int | None = None,
) -> Iterable[tuple[str, str, float, bool, dict[str, Any]]]:
    """For each test set and measure: value, best of ``group`` or not, and TOST against ``reference`` (or that best)."""
    for name in profile.sets.tests:
        evaluations = {r.run_id: r.evaluation("full", name) for r in group}
        own = run.evaluation("full", name)
        for measure in profile.measures.full:
            best_id = max(evaluations, key=lambda r, m=measure: evaluations[r].mean[m])  # type: ignore[misc]
            against = (
                next(r for r in group if r.run_id == best_id) if reference is None else reference
            )
            test: dict[str, Any] = dict.fromkeys(
                ("difference", "low", "high", "p", "p_adjusted"), float("nan")
            )
            test |= {
                "comparisons": comparisons or len(group) - 1,
                "equivalent": False,
                "reference_run_id": against.run_id,
            }
            if run.run_id != against.run_id:
                other = against.evaluation("full", name)
                tost = paired_tost(
                    own.per_query[measure],
                    other.per_query[measure],
                    comparisons=test["comparisons"],
                )
                test |= {
                    k: getattr(tost, k)
                    for k in ("difference", "low", "high", "p", "p_adjusted", "equivalent")
                }
            yield name, measure, own.mean[measure], run.run_id == best_id, test


def _is_first_maximum(frame: pd.DataFrame, by: list[str]) -> pd.Series:
    """True in the first row of each group that has the group's largest value."""
    best = frame.groupby(by, sort=False)["value"].idxmax()
    return frame.index.to_series().isin(best)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def _file_digest(module: ModuleType) -> str:
    """Hash of a module's source: other rules make another collection."""
    return hashlib.sha256(Path(str(module.__file__)).read_bytes()).hexdigest()[:16]


def _remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)


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


_worker: Reproduction | None = None


def _start_worker(profile: Profile, folder: Path) -> None:
    """A worker computes in one thread and ends with its parent, even if that was killed."""
    global _worker
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(1)
    _worker = Reproduction(profile, folder)
    parent = multiprocessing.parent_process()
    if parent is not None:

        def end_with_parent() -> None:
            wait([parent.sentinel])
            os._exit(1)

        threading.Thread(target=end_with_parent, daemon=True).start()


def _work(config: RunConfig) -> StoredRun:
    assert _worker is not None
    return _worker.execute(config)
