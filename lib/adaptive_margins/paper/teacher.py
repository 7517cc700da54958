"""The teacher of a profile: computed once for all runs, before the first that needs it."""

from __future__ import annotations

import functools
import json
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from adaptive_margins.data.stored import COLUMNS
from adaptive_margins.data.trec import Run
from adaptive_margins.encoder.checks import read_array
from adaptive_margins.encoder.embed import embed
from adaptive_margins.encoder.load import encoder_identity, quiet
from adaptive_margins.evaluation.measures import evaluate
from adaptive_margins.files import (
    atomic_file,
    atomic_folder,
    digest,
    file_sha256,
    locked,
    read_object,
    write_text,
)
from adaptive_margins.paper.inputs import IN_BATCH_TEACHER, Inputs, sampled_triples
from adaptive_margins.progress import say
from adaptive_margins.runs import CODE_VERSION, TrainingRun
from adaptive_margins.teachers import (
    SCORES,
    LateInteraction,
    TeacherError,
    fine_tune,
    open_cross_encoder,
    read_scores,
    score_pairs,
    token_projection,
)
from adaptive_margins.topics import query_clusters, sampled_order

if TYPE_CHECKING:
    from datasets import Dataset


class Teacher:
    """Scores of all triples, clusters of their queries, and the in-batch teacher.

    They are stored in ``cache/teachers/KEY``, a hash of all that determines the scores.
    """

    def __init__(self, inputs: Inputs) -> None:
        assert inputs.profile.teacher is not None
        self.inputs = inputs
        self.settings = inputs.profile.teacher

    # ---- identity ------------------------------------------------------------------------------

    @functools.cached_property
    def _key(self) -> str:
        s = self.settings
        key = {"collection": self.inputs.fingerprint, "code": CODE_VERSION, "more": s.negatives}
        if s.scores is not None:
            if not Path(s.scores).is_file():
                raise TeacherError(f"teacher.scores: there is no file {s.scores}")
            return digest({**key, "file": file_sha256(Path(s.scores))})
        model = s.model or s.in_batch
        key |= {"model": encoder_identity(model), "layers": model.layers, "cross": bool(s.model)}
        key |= {"lengths": self.inputs.profile.lengths.model_dump()}
        return digest({**key, "training": [s.triples, s.batch_size, s.learning_rate, s.seed]})

    @functools.cached_property
    def identity(self) -> str:
        """What determines scores, clusters and in-batch scores; part of a run's configuration.

        Raises:
            EncoderError: a model is unknown, or its weights are not the pinned ones.
            TeacherError: the file of scores does not exist.
        """
        s = self.settings
        in_batch = [encoder_identity(s.in_batch), s.in_batch.layers]
        return digest([self._key, s.clusters, s.bins, s.hard_margin, in_batch, s.scale])

    @property
    def folder(self) -> Path:
        """Where the scores are stored."""
        return self.inputs.home / "cache" / "teachers" / self._key

    @property
    def about(self) -> dict[str, Any]:
        """Seconds of fine-tuning and scoring, pairs, and validation scores; {} if not computed."""
        return read_object(self.folder / "about.json")

    def expected_seconds(self) -> float:
        """Expected seconds of fine-tuning (three times a scored pair) and scoring."""
        if self.about or self.settings.scores is not None:
            return 0.0
        known, s = self.inputs.triples_count, self.settings
        pairs = known * (1 + s.negatives if s.negatives else 1) + 6 * min(s.triples or 0, known)
        return pairs / s.pairs_per_second

    # ---- what runs use -------------------------------------------------------------------------

    @functools.cached_property
    def triples(self) -> np.ndarray:
        """(N, 3) rows: the collection's triples, then further ones of the same queries."""
        known = self.inputs.triples
        rows = np.column_stack([np.asarray(known[column]) for column in COLUMNS])
        if self.settings.negatives is None:
            return rows
        inputs, c = self.inputs, self.inputs.collection
        unseen = dict.fromkeys(c.triples)
        asked = {qid: c.qrels["train"][qid] for qid, _, _ in unseen}
        count = self.settings.negatives * len(asked)
        sampled = sampled_triples(inputs.profile, c, asked, inputs.bm25, count)
        new = [triple for triple in dict.fromkeys(sampled) if triple not in unseen]
        further = [(inputs.queries.row(q), *map(c.passages.row, both)) for q, *both in new]
        return np.concatenate([rows, np.array(further, np.int32).reshape(-1, 3)])

    @functools.cached_property
    def scores(self) -> np.ndarray:
        """(N, 2) float32: scores of positives and negatives; computed by `prepare`."""
        return read_array(self.folder / "scores.npy", (len(self.triples), 2), np.float32)

    @functools.cached_property
    def in_batch(self) -> LateInteraction:
        """The teacher of pairs across a batch."""
        projection = token_projection(self.settings.in_batch)
        return LateInteraction(self.inputs.encoder(IN_BATCH_TEACHER), projection)

    def across(self, queries: np.ndarray, passages: np.ndarray) -> Tensor:
        """Scores of `in_batch`, times the profile's ``scale``."""
        return self.in_batch(queries, passages) * self.settings.scale

    def order(self, config: TrainingRun, steps: int | None = None) -> np.ndarray:
        """Numbers of triples as a run sees them (`topics.sampled_order`), or of its first steps."""
        queries = self.triples[:, 0]
        if config.sampling == "random":  # the collection's triples, in the order of other runs
            queries = clusters = queries[: len(self.inputs.triples)]
        else:
            clusters = self._clusters(config)
        return sampled_order(
            config.sampling,
            queries,
            self.scores[:, 0] - self.scores[:, 1],
            clusters,
            count=(steps or config.steps) * config.batch_size,
            batch_size=config.batch_size,
            seed=config.seed,
            bins=self.settings.bins,
            hard_margin=self.settings.hard_margin,
        )

    def dataset(self) -> Dataset:
        """Triples with their scores, times the profile's ``scale``."""
        from datasets import Dataset

        columns = [*self.triples.T, *(self.scores * np.float32(self.settings.scale)).T]
        return Dataset.from_dict(dict(zip((*COLUMNS, *SCORES), columns, strict=True)))

    def _clusters(self, config: TrainingRun) -> np.ndarray:
        """(N,) the cluster of each triple's query, by the zero-shot embeddings of the encoder."""
        rows, place = np.unique(self.triples[:, 0], return_inverse=True)
        of = [config.encoder, config.weights, config.pooling, config.layers, self.settings.clusters]
        file = self.folder / f"clusters-{digest(of)}.npy"
        if not file.is_file():
            loaded = self.inputs.encoder(config.encoder)
            embeddings = embed(loaded.model, loaded.queries, rows, precision=config.precision)
            _save(file, query_clusters(embeddings, self.settings.clusters)[:, None])
        found: np.ndarray = read_array(file, (len(rows), 1), np.int64)[place, 0]
        return found

    # ---- computing -----------------------------------------------------------------------------

    def prepare(self) -> None:
        """Compute and store the scores unless they are; a killed call is resumed."""
        with locked(self.folder):
            if not self.about:
                about = self._published() if self.settings.scores is not None else self._scored()
                write_text(self.folder / "about.json", json.dumps(about) + "\n")
                for rest in ("pairs", "validation"):
                    shutil.rmtree(self.folder / rest, ignore_errors=True)

    def _published(self) -> dict[str, Any]:
        path = Path(str(self.settings.scores))
        _save(self.folder / "scores.npy", read_scores(path, self.inputs.collection, self.triples))
        return {"seconds": 0.0, "pairs": 0, "source": path.name, "validation": {}}

    def _scored(self) -> dict[str, Any]:
        """Score each pair of query and passage once, and rerank the validation candidates."""
        model, seconds = self._cross_encoder()
        queries, passages = self.inputs.queries.texts, self.inputs.collection.passages.texts
        width = len(passages)
        pairs = self.triples[:, :1].astype(np.int64) * width + self.triples[:, 1:]
        distinct, place = np.unique(pairs, return_inverse=True)

        def pair(i: int) -> tuple[str, str]:
            query, passage = divmod(int(distinct[i]), width)
            return queries[query], passages[passage]

        say(f"teacher: scoring {len(distinct):,} pairs")
        if model is None:
            found, scoring = self._by_late_interaction(distinct // width, distinct % width)
        else:
            found, scoring = score_pairs(model, pair, len(distinct), self.folder / "pairs")
        _save(self.folder / "scores.npy", found[place].reshape(-1, 2))
        return {
            "seconds": seconds + scoring,
            "train_seconds": seconds,
            "score_seconds": scoring,
            "pairs": len(distinct),
            "source": (self.settings.model or self.settings.in_batch).base,
            "validation": self._validated(model),
        }

    def _by_late_interaction(
        self, queries: np.ndarray, passages: np.ndarray
    ) -> tuple[np.ndarray, float]:
        """Scores of pairs, sorted by query, by the in-batch teacher, and the seconds they took."""
        since, parts = time.perf_counter(), []
        rows, number = np.unique(queries, return_inverse=True)
        for start in range(0, len(rows), 16):
            first, last = np.searchsorted(number, [start, start + 16])
            some, column = np.unique(passages[first:last], return_inverse=True)
            scores = self.in_batch(rows[start : start + 16], some).cpu().numpy()
            parts.append(scores[number[first:last] - start, column])
        return np.concatenate(parts), time.perf_counter() - since

    def _cross_encoder(self) -> tuple[Any, float]:
        """The cross-encoder (or None), fine-tuned if the profile says so, and the seconds of it."""
        s, p, place = self.settings, self.inputs.profile, self.folder / "model"
        length = p.lengths.query + p.lengths.passage
        opened = functools.partial(open_cross_encoder, s, max_length=length, device=p.device)
        if s.model is None or s.triples is None:
            return (opened() if s.model else None), 0.0
        if not place.is_dir():
            model, since = opened(), time.perf_counter()
            collection = self.inputs.collection
            train, passages = collection.queries["train"], collection.passages
            some = collection.triples[: s.triples]
            pairs = [(train[q], passages[d]) for q, *both in some for d in both]
            say(f"teacher: fine-tuning on {len(pairs):,} pairs")
            fine_tune(model, pairs, [1.0, 0.0] * len(some), s)
            with atomic_folder(place) as folder, quiet():
                model.save_pretrained(str(folder), create_model_card=False)
                (folder / "seconds.json").write_text(json.dumps(time.perf_counter() - since))
        return opened(folder=place), float(json.loads((place / "seconds.json").read_text()))

    def _validated(self, model: Any) -> dict[str, dict[str, float]]:
        """Mean measures of both teachers, of the candidates of the validation set reranked."""
        inputs, name = self.inputs, self.inputs.profile.sets.validation
        queries, passages = inputs.collection.queries[name], inputs.collection.passages
        candidates = inputs.top_candidates(name)
        keys = [(qid, docid) for qid, hits in candidates.items() for docid in hits]
        runs: dict[str, Run] = {"in-batch": {}}
        if model is not None:
            pairs = [(queries[qid], passages[docid]) for qid, docid in keys]
            folder = self.folder / "validation"
            found, _ = score_pairs(model, pairs.__getitem__, len(pairs), folder)
            runs["cross-encoder"] = {}
            for (qid, docid), value in zip(keys, found.tolist(), strict=True):
                runs["cross-encoder"].setdefault(qid, {})[docid] = value
        for qid, hits in candidates.items():
            rows = [passages.row(docid) for docid in hits]
            values = self.in_batch(np.array([inputs.queries.row(qid)]), np.array(rows))[0]
            runs["in-batch"][qid] = dict(zip(hits, values.tolist(), strict=True))
        qrels, measures = inputs.collection.qrels[name], inputs.profile.measures.rerank
        return {which: dict(evaluate(qrels, run, measures).mean) for which, run in runs.items()}


def teacher_of(inputs: Inputs) -> Teacher | None:
    """The teacher of a profile, or None; the same for all callers: its files are hashed once."""
    if inputs.profile.teacher is not None and inputs.teacher is None:
        inputs.teacher = Teacher(inputs)
    found: Teacher | None = inputs.teacher
    return found


def _save(path: Path, array: np.ndarray) -> None:
    with atomic_file(path) as partial, partial.open("wb") as file:
        np.save(file, array)
