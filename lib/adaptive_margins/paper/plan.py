"""The runs of a profile: which are finished, why others are not, and how long they will take.

Times are estimates from two numbers per encoder, seconds per triple in training and per passage in
encoding. They are measured on this machine in a few seconds, or, where the collection, the weights
or the device is not available yet, taken from the profile (``stated``).
"""

from __future__ import annotations

import functools
import os
import re
import time
from collections.abc import Mapping, Set
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from huggingface_hub import try_to_load_from_cache

from adaptive_margins.data import converted
from adaptive_margins.data.stored import COLUMNS
from adaptive_margins.encoder.embed import embed, embed_chunks
from adaptive_margins.encoder.load import open_encoder, weights_folder
from adaptive_margins.encoder.speed import batcher
from adaptive_margins.encoder.tokens import tokenize
from adaptive_margins.errors import AdaptiveMarginsError
from adaptive_margins.files import read_object
from adaptive_margins.losses import margin_loss
from adaptive_margins.paper.experiments import Experiments, fixed_runs, static_rows
from adaptive_margins.paper.inputs import Inputs
from adaptive_margins.paper.runner import describe
from adaptive_margins.paper.store import Store, StoreError, package_versions
from adaptive_margins.paper.teacher import teacher_of
from adaptive_margins.profiles.config import IrDatasetsSettings, Profile
from adaptive_margins.profiles.encoders import EncoderSettings
from adaptive_margins.progress import clock
from adaptive_margins.runs import BM25Run, EncoderRun, RunConfig, TrainingRun
from adaptive_margins.text_tables import aligned, size

_STEPS = 3  # of a calibration; the first one warms up
_PASSAGES = 256  # encoded in a calibration
_ROW = {"loss": "margin", "sampling": "random"} | dict.fromkeys(
    ("kind", "encoder", "target", "in_batch", "seed")
)
"""Fields in which an earlier state of a run does not differ from it, and their defaults."""
_UNKNOWN = "0" * 16  # fingerprint of a collection that has not been fetched; no run has it


class PlanError(AdaptiveMarginsError, RuntimeError):
    """A plan that lacks a number; the message names it and the key of the profile for it."""


@dataclass(frozen=True)
class Plan:
    """The runs of a profile.

    Attributes:
        profile, home: the profile, and the folder of its results.
        runs: a row per run: run_id, encoder, what, triples, done, state ("done", "damaged",
            "stale": finished with other settings, "missing"), why (the settings that differ, or why
            it is missing; "" otherwise), seconds (expected, in one worker; 0 if done).
        seconds: expected for all missing runs, with the profile's workers, and the teacher.
        teacher: seconds that are expected for the teacher, by the profile's speed.
        embeddings: bytes on disk of all passages' embeddings, per worker, while a run is ranked.
        downloads: (what, bytes) that would be fetched first; 0 bytes are an unknown number.
        stated: encoders whose speed is the profile's, not measured.
    """

    profile: Profile
    home: Path
    runs: pd.DataFrame
    seconds: float
    teacher: float
    embeddings: int
    downloads: list[tuple[str, int]]
    stated: list[str]

    @property
    def memory(self) -> int:
        """Bytes that a run may take: 4 GB (those of the laptop took less), embeddings and index."""
        return 4 * 10**9 + 2 * self.embeddings

    def text(self, *, every: bool = False) -> str:
        """The plan for a terminal: a line per kind of run, or ``every`` run."""
        keys = ["encoder", "what", "why", *(["run_id"] if every else [])]
        rows, stale = [], self.runs["state"] == "stale"
        why = self.runs["why"].where(~stale, "stale: " + self.runs["why"])
        for key, group in self.runs.assign(why=why).groupby(keys, sort=False):
            missing = group[~group["done"]]
            seconds = clock(missing["seconds"].mean()) if len(missing) else "—"
            counts = [f"{len(group)}", f"{group['done'].sum()}", f"{group['triples'].iloc[0]:,}"]
            rows.append([*map(str, (key[0], key[1], *key[3:])), *counts, seconds, str(key[2])])
        header = ["encoder", "what", *(["run"] if every else []), "runs", "done", "triples"]
        done, workers = int(self.runs["done"].sum()), self.profile.workers
        book = self.home / "_build" / "html" / "index.html"
        lines = [
            f"Profile {self.profile.name}: {len(self.runs)} runs, {done} are done."
            + f" {stale.sum()} are stale." * bool(stale.any()),
            f"Results: {self.home}",
            f"Book: {book if book.is_file() else 'not built'}",
            "",
        ]
        lines += aligned([[*header, "time", ""], *rows], left=len(header) - 3)
        lines += [
            "",
            f"Time for the others: about {clock(self.seconds)} with {workers} worker(s), as h:mm:ss"
            " or m:ss; early stopping and the training of indexes are not counted.",
            f"Disk while runs are ranked: up to {size(self.embeddings * workers)} of embeddings.",
            *self._sources(),
        ]
        if self.teacher:
            lines.append(
                f"Of the time, fine-tuning and scores of the teacher: {clock(self.teacher)}."
            )
        return "\n".join(lines)

    def values(self) -> dict[str, Any]:
        """The plan for JSON."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        runs = self.runs.to_dict("records")
        return {**found, "profile": self.profile.name, "home": str(self.home), "runs": runs}

    def _sources(self) -> list[str]:
        lines = ["Nothing has to be fetched."]
        if self.downloads:
            unknown = sum(count == 0 for _, count in self.downloads)
            more = f", and {unknown} of unknown size" if unknown else ""
            lines = [f"To be fetched: {size(sum(count for _, count in self.downloads))}{more}."]
            sizes = [(what, size(count) if count else "?") for what, count in self.downloads]
            lines += [f"  {count:>9}  {what}" for what, count in sizes]
            if licence := getattr(self.profile.collection, "licence", ""):
                lines.append(f"Terms: {licence} (accept them with --accept-licence)")
        if self.stated:
            lines.append(f"Speeds of {', '.join(self.stated)} are assumptions of the profile.")
        elif not self.runs["done"].all():
            lines.append("Speeds were measured on this machine just now.")
        return lines


def make_plan(inputs: Inputs, store: Store) -> Plan:
    """The plan of a profile. Fetches nothing, and computes no run.

    Static rows of Table 3 stand for any ε as long as Figure 3's runs are missing.

    Raises:
        PlanError: the collection, weights or device are not available, and the profile states no
            size or speed for them.
    """
    if not inputs.is_available:
        inputs = Inputs(inputs.profile, inputs.home)
        inputs.fingerprint = _UNKNOWN
    profile, estimates = inputs.profile, _Estimates(inputs)
    planned = planned_runs(Experiments(inputs, store))
    previous = _Previous(store, {config.run_id for config in planned})
    rows = []
    missing = set(store.missing(planned))
    for config in planned:
        done = config not in missing
        state, why = previous.state(config, inputs, done)
        rows.append(
            {
                "run_id": config.run_id,
                "encoder": config.encoder,
                "what": describe(config, with_target=False),
                "triples": getattr(config, "triples", 0),
                "done": done,
                "state": state,
                "why": why,
                "seconds": 0.0 if done else estimates.seconds(config),
            }
        )
    frame = pd.DataFrame(rows)
    teacher = teacher_of(inputs)
    taught = any(getattr(config, "teacher", None) for config in missing)
    teaching = teacher.expected_seconds() if teacher and taught else 0.0
    encoders = [] if frame["done"].all() else [*profile.encoders, *profile.untrained]
    return Plan(
        profile=profile,
        home=inputs.home,
        runs=frame,
        seconds=float(frame["seconds"].sum()) / profile.workers + teaching,
        teacher=teaching,
        embeddings=estimates.embedding_bytes() if encoders else 0,
        downloads=_downloads(inputs),
        stated=[name for name in encoders if not estimates.speed(name).measured],
    )


def planned_runs(experiments: Experiments) -> list[RunConfig]:
    """The runs of a profile; of Table 3's static rows some ε until the runs of Figure 3 decide."""
    configs = fixed_runs(experiments)
    for row, candidates in static_rows(experiments).items():
        try:
            target: Any = experiments.tuned_target(*row)
        except StoreError:  # it is not known before the runs of Figure 3 are finished
            target = candidates[0].target
        configs += [config for config in candidates if config.target == target]
    return list(dict.fromkeys(configs))  # the tuned ε may be 1, as in Table 4


class _Previous:
    """Runs in the store, to explain why one of the plan is missing, or how a finished one differs.

    ``planned`` are the ids of the plan; the configurations of others are read if one is missing.
    """

    def __init__(self, store: Store, planned: Set[str]) -> None:
        self.store, self.planned = store, planned
        self.versions = package_versions()

    @functools.cached_property
    def others(self) -> dict[str, list[dict[str, Any]]]:
        """Configurations of the finished runs that are not in the plan, by `_row`."""
        found: dict[str, list[dict[str, Any]]] = {}
        names = os.listdir(self.store.folder) if self.store.folder.is_dir() else []
        for name in sorted(set(names) - self.planned):
            if not name.startswith("."):  # one that is being written
                config = read_object(self.store.folder / name / "config.json")
                found.setdefault(_row(config), []).append(config)
        return found

    def state(self, config: RunConfig, inputs: Inputs, done: bool) -> tuple[str, str]:
        """State and reason of a run, as in `Plan`."""
        if done:
            try:
                then, now = self.store.get(config).result.get("versions", {}), self.versions
            except StoreError:
                return "damaged", "damaged"
            changed = [f"{p} {then.get(p, '—')} → {now[p]}" for p in now if then.get(p) != now[p]]
            why = f"computed with other packages: {', '.join(changed)}"
            return "done", why if then and changed else ""
        if (inputs.home / "cache" / "work" / config.run_id).is_dir():
            return "missing", "interrupted, or under way"
        values = config.model_dump(mode="json")
        if not (similar := self.others.get(_row(values))):
            return "missing", ""
        nearest = min(similar, key=lambda old: sum(old.get(k) != v for k, v in values.items()))
        return "stale", ", ".join(differences(nearest, values))


def _row(config: Mapping[str, Any]) -> str:
    return repr([config.get(field, default) for field, default in _ROW.items()])


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """The fields in which two configurations differ, as "learning_rate 2e-05 → 1e-05"."""

    def text(value: Any) -> str:
        words = "not known yet" if value == _UNKNOWN else " ".join(str(value).split())
        return f"{words[:12]}…" if re.fullmatch("[0-9a-f]{40,}", words) else words

    return [
        f"{key.replace('collection', 'collection fingerprint')} {text(old.get(key, '—'))} →"
        f" {text(new.get(key, '—'))}"
        for key in dict.fromkeys([*new, *old])
        if old.get(key, "—") != new.get(key, "—")
    ]


class _Speed(NamedTuple):
    """Seconds per triple in training and per passage in encoding; size of an embedding."""

    triple: float
    passage: float
    dimensions: int
    measured: bool


class _Estimates:
    """Expected times of runs from one speed per encoder and the sizes of the collection."""

    def __init__(self, inputs: Inputs) -> None:
        self.inputs = inputs
        self.profile = inputs.profile
        self._speeds: dict[str, _Speed] = {}

    def seconds(self, config: RunConfig) -> float:
        """Expected time of a run in one worker; a query counts as half a passage."""
        if isinstance(config, BM25Run):
            return 1.0 + self._count("passages") / 20_000
        assert isinstance(config, EncoderRun)
        speed = self.speed(config.encoder)
        depth, queries = config.depth, self._count(config.validation)
        validation = min(self._count("passages"), queries * depth) + queries / 2
        evaluations, triples, ranked = 1, 0, 0.0
        if isinstance(config, TrainingRun):
            triples = config.triples
            evaluations = config.steps // (config.evaluate_every or config.steps)
        if config.test_sets:
            queries = sum(self._count(name) for name in config.test_sets)
            ranked = self._count("passages") + queries / 2
        return triples * speed.triple + (evaluations * validation + ranked) * speed.passage

    def _count(self, name: str) -> int:
        """Number of "passages", or of the queries of a set."""
        if self.inputs.is_available:
            collection = self.inputs.collection
            return len(collection.passages if name == "passages" else collection.queries[name])
        if not (count := getattr(self.profile.collection, "counts", {}).get(name)):
            raise PlanError(
                f"profile {self.profile.name}: collection.counts lacks {name}; the collection has"
                " not been fetched, so a plan needs the number"
            )
        return count

    def embedding_bytes(self) -> int:
        """Bytes of the embeddings of all passages, of the encoder with most dimensions."""
        width = {"float32": 4, "float16": 2}[self.profile.ranking.dtype]
        dimensions = max(self.speed(name).dimensions for name in self.profile.encoders)
        return self._count("passages") * dimensions * width

    def speed(self, encoder: str) -> _Speed:
        """Measured if collection, weights and device are available, else as the profile states."""
        if encoder not in self._speeds:
            self._speeds[encoder] = self._speed(encoder)
        return self._speeds[encoder]

    def _speed(self, encoder: str) -> _Speed:
        settings = self.inputs.settings(encoder)
        available = {
            "the collection": self.inputs.is_available,
            "the weights": _has_weights(settings),
            "the device": self.profile.device != "cuda" or torch.cuda.is_available(),
        }
        if all(available.values()):
            return _calibrated(self.inputs, encoder)
        if settings.stated is None:
            lacking = " and ".join(what for what, there in available.items() if not there)
            raise PlanError(
                f"profile {self.profile.name}: {lacking} of encoder {encoder!r} cannot be used here"
                f" yet, and encoders.{encoder}.stated gives no speeds to plan with"
            )
        s = settings.stated
        return _Speed(1 / s.triples_per_second, 1 / s.passages_per_second, s.dimensions, False)


def _calibrated(inputs: Inputs, encoder: str) -> _Speed:
    """Measure an encoder; on a CPU in one thread, as workers compute."""
    model, collate, columns, sample = _material(inputs, encoder)  # frozen layers: all threads
    threads = torch.get_num_threads()
    if inputs.profile.device == "cpu":
        torch.set_num_threads(1)
    try:
        times = [0.0]
        if encoder in inputs.profile.encoders:
            steps = np.array_split(columns, _STEPS, axis=1)
            times = [_step_seconds(model, collate, rows) for rows in steps if rows.shape[1]]
        embed(model, collate.passages, sample[:32])
        since = time.perf_counter()
        embed(model, collate.passages, sample, batch_tokens=inputs.profile.ranking.batch_tokens)
        passage = (time.perf_counter() - since) / len(sample)
        dimensions = model.get_embedding_dimension()
        return _Speed(float(np.median(times[1:] or times)), passage, dimensions, True)
    finally:
        torch.set_num_threads(threads)


def _material(inputs: Inputs, encoder: str) -> tuple[Any, Any, np.ndarray, np.ndarray]:
    """A model, its collator, (3, n) rows of triples, and rows of passages to encode."""
    from adaptive_margins.training_step import TripleCollator

    settings, p = inputs.settings(encoder), inputs.profile
    some = inputs.triples[: _STEPS * p.static.batch_size]
    columns = np.array([some[column] for column in COLUMNS])
    if settings.trained_layers is not None:
        loaded = inputs.encoder(encoder)
        model, queries, passages = loaded.fresh(), loaded.queries, loaded.passages
        sample = np.arange(min(_PASSAGES, len(passages)))
    else:  # only a sample is tokenised: a plan must not wait for millions of texts
        model = open_encoder(settings, dropout=p.training.dropout, device=p.device)
        texts, n = inputs.collection.passages.texts, columns.shape[1]
        asked = [inputs.queries.texts[int(i)] for i in columns[0]]
        chosen = [texts[int(i)] for i in columns[1:].ravel()]
        queries = tokenize(model, asked, p.lengths.query)
        passages = tokenize(model, [*chosen, *texts[:_PASSAGES]], p.lengths.passage)
        columns = np.arange(n) + np.array([[0], [0], [n]])
        sample = np.arange(2 * n, len(passages))
    collate = TripleCollator(queries, passages, p.training.chunks, batcher(model))
    return model, collate, columns, sample


def _step_seconds(model: Any, collate: Any, rows: np.ndarray) -> float:
    """Seconds per triple of a step; the optimiser's part is small."""
    since = time.perf_counter()
    batch = collate([dict(zip(COLUMNS, row, strict=True)) for row in rows.T])
    chunks = [{k: v.to(model.device) for k, v in c.items()} for c in batch["chunks"]]
    margin_loss(*embed_chunks(model, chunks, batch["rows"].to(model.device))).backward()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return (time.perf_counter() - since) / rows.shape[1]


def _downloads(inputs: Inputs) -> list[tuple[str, int]]:
    """(what, bytes) that the profile would fetch and that is not on this machine yet."""
    settings, found = inputs.profile.collection, []
    if isinstance(settings, IrDatasetsSettings) and not inputs.is_available:
        found += converted.downloads(settings)
    models = [*inputs.profile.encoders.values(), *inputs.profile.untrained.values()]
    if teacher := inputs.profile.teacher:
        models += [teacher.in_batch]
        models += [teacher.model] if teacher.model and not teacher.scores else []
    for part in dict.fromkeys(x for model in models for x in (model, model.of_queries)):
        if not _has_weights(part):
            count = 4 * part.stated.parameters if part.stated else 0
            found.append((f"{part.base}@{part.revision}", count))
    return found


def _has_weights(settings: EncoderSettings) -> bool:
    """Whether an encoder can be loaded without a network."""
    if settings.query_base is not None and not _has_weights(settings.of_queries):
        return False
    if weights_folder(settings) is not None:
        return True
    name, revision = "model.safetensors", settings.revision
    return isinstance(try_to_load_from_cache(settings.base, name, revision=revision), str)
