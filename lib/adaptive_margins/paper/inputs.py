"""What the runs of a profile share: its collection, candidates, tokenised texts and encoders, each made once and kept."""

from __future__ import annotations

import copy
import dataclasses
import functools
import hashlib
import importlib.metadata
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from adaptive_margins.data import converted as msmarco
from adaptive_margins.data import pydocs, stored
from adaptive_margins.data import triples as data_triples
from adaptive_margins.data.collection import Collection, Texts
from adaptive_margins.data.trec import Run, read_run, top, write_run
from adaptive_margins.encoder.load import (
    encoder_identity,
    layer_count,
    open_encoder,
    weights_folder,
)
from adaptive_margins.encoder.speed import cached_states, put_back, upper_layers
from adaptive_margins.encoder.tokens import Tokens, stored_tokens
from adaptive_margins.evaluation.measures import Evaluation, evaluate
from adaptive_margins.files import file_sha256, write_text
from adaptive_margins.paper.store import Store, home
from adaptive_margins.profiles.config import (
    EncoderSettings,
    IrDatasetsSettings,
    Profile,
    PyDocsSettings,
)
from adaptive_margins.progress import say
from adaptive_margins.retrieval.bm25 import BM25
from adaptive_margins.runs import BM25_NAME


class Resources:
    """One profile and its home folder. Nothing is made before it is asked for."""

    def __init__(self, profile: Profile, folder: Path | None = None) -> None:
        self.profile = profile
        self.home = folder or home()
        self.store = Store(self.home / "runs")

    # ---- the collection --------------------------------------------------------------------------------------------

    @functools.cached_property
    def _pointer(self) -> Path:
        """The file that names the collection's fingerprint, once it is made; its name says what determines the collection."""
        settings = self.profile.collection
        wanted: dict[str, Any] = {"collection": settings.model_dump(mode="json")}
        if isinstance(settings, PyDocsSettings):
            wanted |= {
                "negatives": self.profile.candidates.negative_ranks,
                "triples": self.triples_needed,
                "sources": pydocs.source_versions(settings.packages),
                "rules": pydocs.RULES,
            }
        else:
            wanted |= {
                "sources": importlib.metadata.version("ir-datasets"),
                "format": msmarco.FORMAT,
            }
        return self.home / "cache" / "collections" / f"{_digest(wanted)}.json"

    def _kept_collection(self) -> Path | None:
        if not self._pointer.is_file():
            return None
        fingerprint = json.loads(self._pointer.read_text())["fingerprint"]
        folder = self.home / "collections" / fingerprint
        return folder if folder.is_dir() else None

    @property
    def is_made(self) -> bool:
        """Whether the collection has been built, or fetched and converted, in this home folder."""
        return self._kept_collection() is not None

    @property
    def is_at_hand(self) -> bool:
        """Whether the collection can be had without fetching anything: it is made, or built from what is installed."""
        return self.is_made or isinstance(self.profile.collection, PyDocsSettings)

    @functools.cached_property
    def collection(self) -> Collection:
        """The collection as used: passages, query sets, qrels and training triples; kept under ``collections/``."""
        kept = self._kept_collection()
        settings, folder = self.profile.collection, self.home / "collections"
        if isinstance(settings, PyDocsSettings):
            if kept is not None:
                return Collection.load(kept)
            collection = self._build_pydocs()
            if not (folder / collection.fingerprint).is_dir():
                collection.save(folder / collection.fingerprint)
        else:
            if kept is not None:
                return msmarco.StoredCollection.load(kept)
            work = self.home / "cache" / "conversions" / self._pointer.stem
            collection = msmarco.convert(settings, work, folder)
        write_text(self._pointer, json.dumps({"fingerprint": collection.fingerprint}) + "\n")
        return collection

    def _build_pydocs(self) -> Collection:
        settings = self.profile.collection
        assert isinstance(settings, PyDocsSettings) and self.profile.candidates.negative_ranks
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
        bm25 = BM25(collection.passages)
        triples = data_triples.sample_triples(
            collection.qrels["train"],
            bm25.search(collection.queries["train"], high),
            count=self.triples_needed,
            ranks=(low, high),
            seed=settings.seed,
            min_grade=pydocs.OWN,
        )
        return dataclasses.replace(collection, triples=triples)

    @functools.cached_property
    def fingerprint(self) -> str:
        """The collection's fingerprint; part of every run's configuration."""
        return self.collection.fingerprint

    @property
    def folder(self) -> Path:
        """The collection's folder; what is computed from it alone is kept there too."""
        return self.home / "collections" / self.fingerprint

    @property
    def triples_needed(self) -> int:
        """The longest run's triples: every run takes its own from the same ones."""
        p = self.profile
        curves = (p.adaptive.triples, p.distributed.triples, p.comparison.triples)
        return max(p.static.triples, *(triples or 0 for triples in curves))

    @functools.cached_property
    def triples(self) -> Dataset:
        """The training triples: columns query, positive and negative, rows of `queries` and of the passages."""
        triples = self.collection.triples
        if isinstance(triples, stored.StoredTriples):
            return triples.rows
        passages = self.collection.passages
        rows = [(self.queries.row(q), passages.row(p), passages.row(n)) for q, p, n in triples]
        columns = np.array(rows, dtype=np.int32).reshape(-1, 3).T
        return Dataset.from_dict(dict(zip(stored.COLUMNS, columns, strict=True)))

    @property
    def triples_count(self) -> int:
        """How many triples there are; before the collection is made, how many the profile says there will be."""
        if self.is_at_hand:
            return len(self.collection.triples)
        settings = self.profile.collection
        assert isinstance(settings, IrDatasetsSettings)
        return settings.counts.get("triples") or self.triples_needed

    # ---- queries and candidates ------------------------------------------------------------------------------------

    @property
    def evaluated_sets(self) -> list[str]:
        """Every set that something is evaluated on, each once, in the profile's order."""
        p = self.profile
        stopping = [p.comparison.validation] if p.comparison.validation else []
        return list(dict.fromkeys([p.sets.validation, *p.sets.tests, *stopping]))

    @functools.cached_property
    def queries(self) -> Texts:
        """The training queries, in their order, then those of the evaluated sets: one numbering for all that are embedded."""
        sets = self.collection.queries
        names = ["train", *self.evaluated_sets] if "train" in sets else self.evaluated_sets
        ids = [qid for name in names for qid in sets[name].ids]
        texts = [text for name in names for text in sets[name].texts]
        return Texts(ids, texts)

    def query_rows(self, query_set: str) -> np.ndarray:
        """Rows of a set's queries in `queries`."""
        return np.array([self.queries.row(q) for q in self.collection.queries[query_set].ids])

    @functools.cached_property
    def _bm25(self) -> BM25:
        return BM25(self.collection.passages)

    @functools.cache  # noqa: B019  (it lives as long as its process)
    def bm25_ranking(self, query_set: str) -> Run:
        """BM25's ranking of all passages, as deep as anything is evaluated."""
        depth = max(self.profile.candidates.depth, self.profile.measures.full_depth)
        queries = self.collection.queries[query_set]
        return self._kept_run(
            f"bm25-{depth}.{query_set}", lambda: self._bm25.search(queries, depth)
        )

    @functools.cache  # noqa: B019
    def top_candidates(self, query_set: str) -> Run:
        """What is reranked: the first ``candidates.depth`` of BM25's ranking, or of the collection's own candidates.

        Official lists may come without scores (those of TREC DL do, in ir_datasets); then BM25's own are put in.
        """
        depth = self.profile.candidates.depth
        if self.profile.candidates.source == "bm25":
            run = self.bm25_ranking(query_set)
        else:
            assert isinstance(self.collection, msmarco.StoredCollection)
            run = self.collection.candidates[query_set]
            if all(len(set(scores.values())) == 1 for scores in run.values()):
                queries, unscored = self.collection.queries[query_set], run
                run = self._kept_run(
                    f"candidates-bm25.{query_set}", lambda: self._bm25.rescore(queries, unscored)
                )
        return {q: dict(top(scores, depth)) for q, scores in run.items()}

    def _kept_run(self, name: str, make: Callable[[], Run]) -> Run:
        """A ranking of BM25's, made once and kept beside the collection."""
        path = self.folder / f"{name}.run.gz"
        if not path.is_file():
            write_run(make(), path, BM25_NAME)
        return read_run(path, own=True)

    @functools.cache  # noqa: B019
    def candidate_rows(self, query_set: str) -> np.ndarray:
        """Rows of all passages among a set's candidates, each once."""
        run = self.top_candidates(query_set)
        docids = sorted({docid for scores in run.values() for docid in scores})
        return np.array([self.collection.passages.row(docid) for docid in docids], dtype=np.int64)

    def evaluate_ranking(self, run: Run, query_set: str, measures: Sequence[str]) -> Evaluation:
        """`measures.evaluate` with the qrels of a set."""
        return evaluate(self.collection.qrels[query_set], run, measures)

    # ---- encoders --------------------------------------------------------------------------------------------------

    def settings(self, encoder: str) -> EncoderSettings:
        """The profile's entry for an encoder. Raises KeyError with the known names."""
        known = {**self.profile.encoders, **self.profile.untrained}
        if encoder not in known:
            raise KeyError(
                f"encoder {encoder!r} is not in profile {self.profile.name!r}: {sorted(known)}"
            )
        return known[encoder]

    @functools.cache  # noqa: B019
    def encoder(self, name: str) -> LoadedEncoder:
        """Encoder ``name`` of the profile, loaded once per process and kept untouched; see `LoadedEncoder`."""
        settings = self.settings(name)
        dropout, device = self.profile.training.dropout, self.profile.device
        whole = open_encoder(settings, dropout=dropout, device=device)
        queries, passages = self._tokens(settings, whole)
        if settings.trained_layers is None:
            return LoadedEncoder(whole, whole, queries, passages)
        uncut = settings.model_copy(update={"layers": None})
        alike = [
            e
            for e in [*self.profile.encoders.values(), *self.profile.untrained.values()]
            if (e.base, e.revision) == (settings.base, settings.revision)
        ]
        frozen = sorted({_frozen(e) for e in alike if e.trained_layers})
        merged = queries + passages
        texts = hashlib.sha256(merged.ids.tobytes() + merged.offsets.tobytes()).hexdigest()
        key = _digest([encoder_identity(settings), texts])
        tables = cached_states(
            lambda: open_encoder(uncut, dropout=0.0, device=device),
            merged,
            frozen,
            self.home / "cache" / "states" / key,
        )
        model = upper_layers(whole, settings.trained_layers, tables[_frozen(settings)])
        numbers = np.arange(merged.offsets[-1])
        start = queries.offsets[-1]
        return LoadedEncoder(
            whole,
            model,
            Tokens(numbers[:start], queries.offsets, 0),
            Tokens(numbers[start:], passages.offsets, 0),
        )

    def _tokens(self, settings: EncoderSettings, whole: Any) -> tuple[Tokens, Tokens]:
        """Queries and passages, tokenised once for all encoders of the same base and kept as files."""
        lengths = self.profile.lengths
        key = _digest(
            [self.fingerprint, self.evaluated_sets, lengths.model_dump(), _tokenizer(settings)]
        )
        folder = self.home / "cache" / "tokens" / key
        texts = self.collection.passages.texts
        return (
            stored_tokens(
                lambda: whole.tokenizer, self.queries.texts, lengths.query, folder / "queries"
            ),
            stored_tokens(lambda: whole.tokenizer, texts, lengths.passage, folder / "passages"),
        )

    def weights(self, encoder: str) -> str:
        """What pins an encoder's weights; part of every run's configuration."""
        return _weights(self.settings(encoder))


@functools.cache
def _weights(settings: EncoderSettings) -> str:
    return encoder_identity(settings)


@functools.cache
def _tokenizer(settings: EncoderSettings) -> list[str]:
    """What pins an encoder's tokenizer."""
    version = importlib.metadata.version("tokenizers")
    if (folder := weights_folder(settings)) is None:
        return [settings.base, str(settings.revision), version]
    files = sorted(f for f in folder.glob("*") if f.suffix in (".json", ".txt", ".model"))
    return [*(f"{f.name} {file_sha256(f)}" for f in files), version]


def _frozen(settings: EncoderSettings) -> int:
    """How many layers stay as they are."""
    assert settings.trained_layers is not None
    return layer_count(settings) - settings.trained_layers


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


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
