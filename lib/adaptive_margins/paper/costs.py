"""What runs cost before they are made: time, memory, disk and downloads.

Times come from a calibration of about a second on the machine at hand, or, where data, weights or the device are not there
yet, from the speeds the profile states. Sizes come from the collection, or from the counts the profile states.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from typing import Any

import numpy as np
import torch
from transformers.utils import cached_file

from adaptive_margins.data import converted
from adaptive_margins.data.stored import COLUMNS
from adaptive_margins.encoder.embed import embed, embed_chunks
from adaptive_margins.encoder.load import open_encoder, weights_folder
from adaptive_margins.encoder.speed import batcher
from adaptive_margins.encoder.tokens import Tokens, tokenize
from adaptive_margins.errors import AdaptiveMarginsError
from adaptive_margins.files import folder_bytes
from adaptive_margins.losses import margin_loss
from adaptive_margins.paper.inputs import Resources
from adaptive_margins.profiles.config import EncoderSettings, IrDatasetsSettings
from adaptive_margins.retrieval.faiss_index import choose_index, index_bytes
from adaptive_margins.runs import BM25Run, RunConfig, TrainingRun
from adaptive_margins.training import TripleCollator

_CALIBRATION_STEPS = 3
_STATED_RATE = 1e13  # multiplications and additions a second of an A100 in FAISS's k-means, fp32
_KMEANS_ITERATIONS = 10  # FAISS's number for the lists of an IVF index
_RUN_LINE = 12  # bytes of a hit in a gzipped run file


class PlanError(AdaptiveMarginsError, RuntimeError):
    """A plan that lacks a number; the message says which, and where to state it."""


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How much there is of everything; ``candidates``: passages among a set's candidates, each once (at most, if stated)."""

    passages: int
    triples: int
    queries: dict[str, int]
    candidates: dict[str, int]


@dataclasses.dataclass(frozen=True)
class Speed:
    """Triples a second in training, passages a second in embedding; ``measured`` here, or stated by the profile."""

    triples: float
    passages: float
    measured: bool


class Costs(Resources):
    """`Resources` that can say what a run costs."""

    @functools.cached_property
    def sizes(self) -> Sizes:
        """Of the collection if it is made, else as the profile states. Raises PlanError if it does not."""
        settings, depth = self.profile.collection, self.profile.candidates.depth
        if self.is_at_hand:
            sets = self.evaluated_sets
            return Sizes(
                passages=len(self.collection.passages),
                triples=len(self.collection.triples),
                queries={name: len(self.collection.queries[name]) for name in sets},
                candidates={name: len(self.candidate_rows(name)) for name in sets},
            )
        assert isinstance(settings, IrDatasetsSettings)
        needed = ["passages", *self.evaluated_sets]
        counts = {key: count for key, count in settings.counts.items() if count is not None}
        if missing := [key for key in needed if key not in counts]:
            raise PlanError(
                f"profile {self.profile.name}: collection.counts lacks {', '.join(missing)}; the collection is not there yet,"
                " so a plan needs the numbers"
            )
        return Sizes(
            passages=counts["passages"],
            triples=self.triples_count,
            queries={name: counts[name] for name in self.evaluated_sets},
            candidates={
                name: min(counts["passages"], depth * counts[name]) for name in self.evaluated_sets
            },
        )

    # ---- time ------------------------------------------------------------------------------------------------------

    @functools.cache  # noqa: B019
    def speed(self, encoder: str) -> Speed:
        """Measured if collection, weights and device are there, else as stated; PlanError if there is neither."""
        settings = self.settings(encoder)
        device = self.profile.device
        lacking = [
            what
            for what, there in (
                ("the collection", self.is_at_hand),
                ("the weights", _are_here(settings)),
                ("the device", device != "cuda" or torch.cuda.is_available()),
            )
            if not there
        ]  # fmt: skip
        if not lacking:
            triple, passage = self._calibrate(encoder)
            return Speed(1 / triple if triple else math.inf, 1 / passage, measured=True)
        if settings.stated is None:
            raise PlanError(
                f"profile {self.profile.name}: {' and '.join(lacking)} of encoder {encoder!r} cannot be used here yet, and"
                f" encoders.{encoder}.stated gives no speeds to plan with"
            )
        return Speed(settings.stated.triples_per_second, settings.stated.passages_per_second, False)

    def _calibrate(self, encoder: str) -> tuple[float, float]:
        """Seconds a triple in training and seconds a passage in embedding; on a CPU in one thread, as workers compute."""
        settings = self.settings(encoder)
        size = self.profile.static.batch_size
        passages = self.collection.passages
        count = min(256, len(passages))
        if settings.trained_layers is not None:
            loaded = self.encoder(encoder)
            model, queries, texts = loaded.fresh(), loaded.queries, loaded.passages
            rows = self.triples[: min(_CALIBRATION_STEPS * size, len(self.triples))]
            columns = [np.array(rows[c]) for c in COLUMNS]
            sample = np.arange(count)
        else:  # only a sample is tokenised: a plan must not wait for millions of texts
            model = open_encoder(
                settings, dropout=self.profile.training.dropout, device=self.profile.device
            )
            some = list(self.collection.triples[: _CALIBRATION_STEPS * size])
            train = self.collection.queries.get("train")
            lengths = self.profile.lengths
            queries = tokenize(
                model, [train[q] for q, _, _ in some] if train else [], lengths.query
            )
            chosen = [passages[d] for t in some for d in t[1:]] + list(passages.texts[:count])
            texts = tokenize(model, chosen, lengths.passage)
            columns = [np.arange(len(some)), np.arange(len(some)) * 2, np.arange(len(some)) * 2 + 1]
            sample = np.arange(2 * len(some), len(chosen))
        threads = torch.get_num_threads()
        if self.profile.device == "cpu":
            torch.set_num_threads(1)
        try:
            triple = 0.0
            if encoder in self.profile.encoders and len(columns[0]):
                triple = self._seconds_a_triple(model, queries, texts, columns, size)
            embed(model, texts, sample[:32])
            since = time.perf_counter()
            embed(model, texts, sample, batch_tokens=self.profile.ranking.batch_tokens)
            return triple, (time.perf_counter() - since) / len(sample)
        finally:
            torch.set_num_threads(threads)

    def _seconds_a_triple(
        self, model: Any, queries: Tokens, passages: Tokens, columns: list[np.ndarray], size: int
    ) -> float:
        """Collating, forward and backward as in training; the optimiser's step is small beside them."""
        step = max(1, min(size, len(columns[0]) // _CALIBRATION_STEPS))
        collate = TripleCollator(queries, passages, self.profile.training.chunks, batcher(model))
        times = []
        for start in range(0, len(columns[0]) - step + 1, step):
            since = time.perf_counter()
            rows = zip(*(column[start : start + step] for column in columns), strict=True)
            batch = collate([dict(zip(COLUMNS, row, strict=True)) for row in rows])
            chunks = [{k: v.to(model.device) for k, v in c.items()} for c in batch["chunks"]]
            margin_loss(*embed_chunks(model, chunks, batch["rows"].to(model.device))).backward()
            if self.profile.device == "cuda":
                torch.cuda.synchronize()
            times.append((time.perf_counter() - since) / step)
        return float(np.median(times[1:] or times))  # the first one warms up

    def expected_seconds(self, config: RunConfig) -> float:
        """What one worker is expected to need for a run (a query counts as half a passage)."""
        if isinstance(config, BM25Run):
            return 1.0 + self.sizes.passages / 20_000
        speed, sizes = self.speed(config.encoder), self.sizes
        passage = 1 / speed.passages

        def rerank(name: str) -> float:
            return (sizes.candidates[name] + sizes.queries[name] / 2) * passage

        checks, train = 1, 0.0
        if isinstance(config, TrainingRun):
            train = config.triples / speed.triples
            if config.evaluate_every:
                checks = config.steps // config.evaluate_every
        full = 0.0
        if config.test_sets:
            tests = sum(sizes.queries[name] for name in config.test_sets)
            full = (sizes.passages + tests / 2) * passage + self.index_seconds(
                self.parameters(config.encoder)[1]
            )
        return 0.3 + train + checks * rerank(config.validation) + full

    def index_seconds(self, dim: int) -> float:
        """Training the index and searching it; most of it is k-means over the sample."""
        if self.sizes.passages < 100_000:
            return min(4.0, self.sizes.passages / 1500)
        settings = choose_index(self.sizes.passages, dim, depth=self.profile.measures.full_depth)
        distances = 2.0 * settings.train * settings.nlist * settings.dim
        return _KMEANS_ITERATIONS * distances / self._multiplications_a_second

    @functools.cached_property
    def _multiplications_a_second(self) -> float:
        if self.profile.device == "cuda":
            return _STATED_RATE
        matrix = np.ones((1024, 1024), np.float32)
        matrix @ matrix
        since = time.perf_counter()
        for _ in range(10):
            matrix @ matrix
        return 10 * 2 * 1024**3 / (time.perf_counter() - since)

    # ---- sizes -----------------------------------------------------------------------------------------------------

    @functools.cache  # noqa: B019
    def parameters(self, encoder: str) -> tuple[int, int]:
        """Number of parameters and of dimensions."""
        settings = self.settings(encoder)
        if settings.stated is not None:
            return settings.stated.parameters, settings.stated.dimensions
        whole = self.encoder(encoder).whole
        return sum(p.numel() for p in whole.parameters()), whole.get_embedding_dimension()

    def disk_bytes(self, config: RunConfig) -> int:
        """What a run keeps: its run files, curves, and the model if it is saved."""
        depth = {name: config.depth for name in (config.validation, *config.test_sets)}
        hits = sum(self.sizes.queries[name] * k for name, k in depth.items())
        hits += sum(self.sizes.queries[name] * config.full_depth for name in config.test_sets)
        if not isinstance(config, TrainingRun):
            return _RUN_LINE * hits + 20_000
        model = 4 * self.parameters(config.encoder)[0] if config.save_model else 0
        return _RUN_LINE * hits + 50 * config.steps + model + 20_000

    def scratch_bytes(self, config: RunConfig) -> int:
        """What a run needs while it is made: two checkpoints (weights, best weights, optimiser), then the embeddings."""
        if isinstance(config, BM25Run):
            return 0
        parameters, dimensions = self.parameters(config.encoder)
        checkpoints = 0
        if isinstance(config, TrainingRun) and self.profile.training.checkpoint_every:
            moments = 2 if config.optimizer == "adamw_8bit" else 8
            checkpoints = 2 * parameters * (4 + moments + (4 if config.keep == "best" else 0))
        width = {"float32": 4, "float16": 2}[self.profile.ranking.dtype]
        embeddings = self.sizes.passages * dimensions * width if config.test_sets else 0
        return max(checkpoints, embeddings)

    def memory_bytes(self, config: RunConfig) -> int:
        """Host memory of the largest step: the model and its optimiser, or the index while it is trained."""
        if isinstance(config, BM25Run):
            return (
                1100 * self.sizes.passages
            )  # measured: 42 postings a passage, 27 bytes each while indexing
        parameters, dimensions = self.parameters(config.encoder)
        base = 700_000_000 + 16 * parameters
        if not config.test_sets:
            return base
        settings = choose_index(self.sizes.passages, dimensions, depth=config.full_depth)
        return base + index_bytes(settings, self.sizes.passages) + settings.training_bytes

    def shared_bytes(self) -> int:
        """Disk for the collection and its tokenised texts, as they lie in Arrow and token files."""
        lengths, sizes = self.profile.lengths, self.sizes
        estimate = 370 * sizes.passages + 12 * sizes.triples
        collection = folder_bytes(self.folder) if self.is_made else estimate
        bases = {(e.base, e.revision) for e in self.profile.encoders.values()}
        return collection + len(bases) * 2 * sizes.passages * min(lengths.passage, 80)

    def downloads(self) -> list[tuple[str, int]]:
        """(what, bytes) that the profile would fetch and that is not here yet."""
        settings, found = self.profile.collection, []
        if isinstance(settings, IrDatasetsSettings) and not self.is_made:
            found += converted.downloads(settings)
        for name in [*self.profile.encoders, *self.profile.untrained]:
            encoder = self.settings(name)
            if not _are_here(encoder):
                found.append((f"{encoder.base}@{encoder.revision}", 4 * self.parameters(name)[0]))
        return found


def _are_here(settings: EncoderSettings) -> bool:
    """Whether an encoder can be loaded without a network."""
    if weights_folder(settings) is not None:
        return True
    found = cached_file(
        settings.base,
        "model.safetensors",
        revision=settings.revision,
        local_files_only=True,
        _raise_exceptions_for_missing_entries=False,
    )
    return found is not None
