"""Inputs shared by all runs of a profile: collection, candidates, tokens and encoders."""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from adaptive_margins.data import converted, pydocs, stored
from adaptive_margins.data.collection import Collection, Texts, Triple
from adaptive_margins.data.text import DataError
from adaptive_margins.data.trec import Qrels, Run, read_run, truncated, write_run
from adaptive_margins.data.triples import sample_triples
from adaptive_margins.encoder.checks import EncoderError
from adaptive_margins.encoder.frozen import LoadedEncoder, for_training
from adaptive_margins.encoder.load import encoder_identity, open_encoder, prompts, weights_folder
from adaptive_margins.encoder.tokens import Tokens, shorten, stored_tokens
from adaptive_margins.files import digest, file_sha256, read_object, write_text
from adaptive_margins.profiles.config import IrDatasetsSettings, Profile, PyDocsSettings
from adaptive_margins.profiles.encoders import EncoderSettings
from adaptive_margins.progress import say
from adaptive_margins.retrieval.bm25 import BM25
from adaptive_margins.runs import BM25_NAME, CODE_VERSION

if TYPE_CHECKING:
    from datasets import Dataset

IN_BATCH_TEACHER = "in-batch teacher"
"""Name of the encoder of a profile's ``teacher.in_batch``."""


class Inputs:
    """Inputs shared by all runs of a profile, built at their first use and cached in ``home``."""

    def __init__(self, profile: Profile, home: Path) -> None:
        self.profile = profile
        self.home = home
        self.teacher: Any = None  # see `teacher.teacher_of`
        for name in ("bm25_ranking", "top_candidates", "candidate_rows", "encoder"):
            # Decorated methods would keep this object, with its encoders, to the process's end.
            setattr(self, name, functools.cache(getattr(self, name)))

    # ---- the collection ------------------------------------------------------------------------

    @functools.cached_property
    def _pointer(self) -> Path:
        """The file that holds the collection's fingerprint once it is built.

        Its name is a hash of everything that determines the collection.
        """
        settings = self.profile.collection
        key: dict[str, Any] = {"collection": settings.model_dump(mode="json")}
        if isinstance(settings, PyDocsSettings):
            key |= {
                "negatives": self.profile.candidates.negative_ranks,
                "triples": _longest_budget(self.profile),
                "sources": pydocs.source_versions(settings.packages),
                "rules": pydocs.RULES,
                "bm25": _versions("bm25s", "PyStemmer"),  # negatives are sampled from its ranking
                "lengths": self.profile.lengths.model_dump(),  # no text is longer
                "tokenizer": _tokenizer(self.settings(self.profile.reference_encoder)),
            }
        else:
            key["sources"] = _versions("ir-datasets")
            key["format"] = converted.FORMAT
        return self.home / "cache" / "collections" / f"{digest(key)}.json"

    @property
    def _built(self) -> Path | None:
        """The collection's folder if it has been built, or fetched and converted; else None."""
        folder = self.home / "collections" / str(read_object(self._pointer).get("fingerprint"))
        return folder if folder.is_dir() else None

    @property
    def is_available(self) -> bool:
        """Whether the collection can be used without fetching anything."""
        return isinstance(self.profile.collection, PyDocsSettings) or self._built is not None

    @functools.cached_property
    def collection(self) -> Collection:
        """Passages, query sets, qrels and training triples; stored under ``collections/``."""
        built, folder = self._built, self.home / "collections"
        settings = self.profile.collection
        if isinstance(settings, IrDatasetsSettings):
            if built is not None:
                return converted.StoredCollection.load(built)
            work = self.home / "cache" / "conversions" / self._pointer.stem
            collection: Collection = converted.convert(settings, work, folder)
        elif built is not None:
            return Collection.load(built)
        else:
            say("building the collection from installed packages")
            values = settings.model_dump(exclude={"kind"})
            collection = pydocs.build_pydocs(**values, shorten=shortener(self.profile))
            qrels, bm25 = collection.qrels["train"], BM25(collection.passages)
            count = _longest_budget(self.profile)
            triples = sampled_triples(self.profile, collection, qrels, bm25, count)
            collection = dataclasses.replace(collection, triples=triples)
            collection.save(folder / collection.fingerprint)
        write_text(self._pointer, json.dumps({"fingerprint": collection.fingerprint}) + "\n")
        return collection

    @functools.cached_property
    def fingerprint(self) -> str:
        """The collection's fingerprint; part of every run's configuration."""
        return self.collection.fingerprint

    @functools.cached_property
    def triples(self) -> Dataset:
        """Training triples: columns query, positive and negative, rows of queries and passages."""
        triples = self.collection.triples
        if isinstance(triples, stored.StoredTriples):
            return triples.rows
        from datasets import Dataset

        passages = self.collection.passages
        rows = [(self.queries.row(q), passages.row(p), passages.row(n)) for q, p, n in triples]
        columns = np.array(rows, dtype=np.int32).reshape(-1, 3).T
        return Dataset.from_dict(dict(zip(stored.COLUMNS, columns, strict=True)))

    @property
    def triples_count(self) -> int:
        """Number of triples; the profile's number as long as the collection has to be fetched."""
        if self.is_available:
            return len(self.collection.triples)
        counts = getattr(self.profile.collection, "counts", {})
        return counts.get("triples") or _longest_budget(self.profile)

    # ---- queries and candidates ----------------------------------------------------------------

    @property
    def evaluated_sets(self) -> list[str]:
        """All query sets that something is evaluated on, each once."""
        sets, stopping = self.profile.sets, self.profile.comparison.validation
        return list(dict.fromkeys([sets.validation, *sets.tests, stopping or sets.validation]))

    @functools.cached_property
    def queries(self) -> Texts:
        """Training queries, then those of the evaluated sets: one numbering for all of them.

        A query may be in several sets. Raises DataError if its texts differ.
        """
        sets = self.collection.queries
        names = ["train", *self.evaluated_sets] if "train" in sets else self.evaluated_sets
        found: dict[str, str] = {}
        for name in names:
            for qid, text in zip(sets[name].ids, sets[name].texts, strict=True):
                if found.setdefault(qid, text) != text:
                    raise DataError(
                        f"query {qid!r} of {name!r} has another text in an earlier one of"
                        f" {', '.join(names)}; expected the same, or another id"
                    )
        return Texts(list(found), list(found.values()))

    def query_rows(self, query_set: str) -> np.ndarray:
        """Rows of a set's queries in `queries`."""
        return np.array([self.queries.row(q) for q in self.collection.queries[query_set].ids])

    @functools.cached_property
    def bm25(self) -> BM25:
        """BM25 over all passages."""
        return BM25(self.collection.passages)

    def bm25_ranking(self, query_set: str) -> Run:
        """BM25's ranking of all passages, to the largest depth of the profile."""
        depth = max(self.profile.candidates.depth, self.profile.measures.full_depth)
        queries = self.collection.queries[query_set]
        return self._cached_run(f"{depth}.{query_set}", lambda: self.bm25.search(queries, depth))

    def top_candidates(self, query_set: str) -> Run:
        """The candidates that are reranked: the best of BM25's, or of the collection's.

        Official lists may have no scores (those of TREC DL in ir_datasets); BM25 then scores them.
        """
        depth = self.profile.candidates.depth
        if self.profile.candidates.source == "bm25":
            run = self.bm25_ranking(query_set)
        else:
            assert isinstance(self.collection, converted.StoredCollection)
            run = self.collection.candidates[query_set]
            if all(len(set(scores.values())) == 1 for scores in run.values()):
                queries, unscored = self.collection.queries[query_set], run
                run = self._cached_run(
                    f"candidates.{query_set}", lambda: self.bm25.rescore(queries, unscored)
                )
        return truncated(run, depth)

    def _cached_run(self, name: str, compute: Callable[[], Run]) -> Run:
        """A ranking of BM25, computed once per version of it and stored with the collection."""
        name = f"{'-'.join(_versions('bm25s', 'PyStemmer'))}.{CODE_VERSION}.{name}"
        path = self.home / "collections" / self.fingerprint / f"{name}.run.gz"
        if not path.is_file():
            write_run(compute(), path, BM25_NAME)
        return read_run(path, trusted=True)

    def candidate_rows(self, query_set: str) -> np.ndarray:
        """Rows of all passages among a set's candidates, each once."""
        run = self.top_candidates(query_set)
        docids = sorted({docid for scores in run.values() for docid in scores})
        return np.array([self.collection.passages.row(docid) for docid in docids], dtype=np.int64)

    # ---- encoders ------------------------------------------------------------------------------

    def settings(self, encoder: str) -> EncoderSettings:
        """The profile's entry for an encoder. Raises KeyError with the known names."""
        known = {**self.profile.encoders, **self.profile.untrained}
        if self.profile.teacher is not None:
            known[IN_BATCH_TEACHER] = self.profile.teacher.in_batch
        if encoder not in known:
            raise KeyError(
                f"encoder {encoder!r} is not in profile {self.profile.name!r}: {sorted(known)}"
            )
        return known[encoder]

    def weights(self, encoder: str) -> str:
        """What identifies an encoder's pretrained weights; part of every run's configuration.

        Also its encoder of queries and its similarity, where these are not the usual ones.
        """
        settings = self.settings(encoder)
        parts = [_weights(settings)]
        if settings.query_base is not None:
            parts.append(f"queries {_weights(settings.of_queries)}")
        if settings.similarity != "cosine":
            parts.append(settings.similarity)
        return ", ".join(parts)

    def encoder(self, name: str) -> LoadedEncoder:
        """Encoder ``name`` of the profile with its tokens, loaded once.

        Raises:
            EncoderError: as `open_encoder`; or two encoders do not fit each other.
        """
        settings = self.settings(name)
        whole, of_queries = self._models(name, settings)
        loaded = for_training(
            settings,
            whole,
            self._tokens("queries", settings.of_queries, of_queries),
            self._tokens("passages", settings, whole),
            others=[*self.profile.encoders.values(), *self.profile.untrained.values()],
            cache=self.home / "cache" / "states",
        )
        if of_queries is whole:
            return loaded
        return dataclasses.replace(loaded, query_model=of_queries)

    def _models(self, name: str, settings: EncoderSettings) -> tuple[Any, Any]:
        """The encoder of passages and that of queries, which may be the same."""
        dropout, device = self.profile.training.dropout, self.profile.device
        whole = of_queries = open_encoder(settings, dropout=dropout, device=device)
        if settings.query_base is not None:
            of_queries = open_encoder(settings.of_queries, dropout=dropout, device=device)
            dims = [model.get_embedding_dimension() for model in (whole, of_queries)]
            if dims[0] != dims[1]:
                raise EncoderError(
                    f"encoder {name!r} has {dims[0]} dimensions for passages and {dims[1]} for"
                    f" queries; {settings.base} and {settings.query_base} do not fit each other"
                )
        if found := [p for model in (whole, of_queries) for p in prompts(model) if p]:
            raise EncoderError(
                f"encoder {name!r} has the prompt {found[0]!r}; expected one without prompts, which"
                " texts do not get here"
            )
        return whole, of_queries

    def _tokens(
        self, kind: Literal["queries", "passages"], settings: EncoderSettings, model: Any
    ) -> Tokens:
        """Queries or passages, tokenised once for all encoders with the same tokenizer.

        They are truncated at the encoder's own limit, with a warning, if that is lower.
        """
        lengths = self.profile.lengths.model_dump()
        texts, name = self.collection.passages.texts, "passage"
        if kind == "queries":
            texts, name = self.queries.texts, "query"
        length = lengths[name]
        if (limit := model.max_seq_length) < length:
            warnings.warn(
                f"encoder {settings.base!r} reads at most {limit} tokens: its {kind} are not"
                f" truncated at {length}, as those of others, but at {limit}",
                stacklevel=2,
            )
            lengths[name] = length = limit
        key = [self.fingerprint, self.evaluated_sets, lengths, _tokenizer(settings)]
        folder = self.home / "cache" / "tokens" / digest(key) / kind
        return stored_tokens(lambda: model.tokenizer, texts, length, folder)


def shortener(profile: Profile) -> Callable[[Literal["query", "passage"], list[str]], list[str]]:
    """The truncation of queries and of passages to what a profile's reference encoder reads."""
    encoder = open_encoder(profile.encoders[profile.reference_encoder])
    limit = encoder.max_seq_length
    return lambda kind, texts: shorten(encoder, texts, min(limit, getattr(profile.lengths, kind)))


def sampled_triples(
    profile: Profile, collection: Collection, qrels: Qrels, bm25: BM25, count: int
) -> list[Triple]:
    """Triples of the queries in ``qrels``, whose negatives are from BM25's ranking."""
    settings, ranks = profile.collection, profile.candidates.negative_ranks
    assert isinstance(settings, PyDocsSettings) and ranks is not None
    queries = Texts(list(qrels), [collection.queries["train"][qid] for qid in qrels])
    found, seed = bm25.search(queries, ranks[1]), settings.seed
    return sample_triples(qrels, found, count=count, ranks=ranks, seed=seed, min_grade=pydocs.OWN)


def _longest_budget(profile: Profile) -> int:
    """Triples of the longest run; shorter runs use the first of the same triples."""
    curves = (profile.adaptive, profile.distributed, profile.comparison)
    budgets = [*profile.comparison.budgets.values(), *(curve.triples or 0 for curve in curves)]
    return max(profile.static.triples, *budgets)


_weights = functools.cache(encoder_identity)


@functools.cache
def _tokenizer(settings: EncoderSettings) -> list[str]:
    """What identifies an encoder's tokenizer."""
    (version,) = _versions("tokenizers")
    if (folder := weights_folder(settings)) is None:
        return [settings.base, str(settings.revision), version]
    files = sorted(f for f in folder.glob("*") if f.suffix in (".json", ".txt", ".model"))
    return [*(f"{f.name} {file_sha256(f)}" for f in files), version]


def _versions(*packages: str) -> list[str]:
    return [f"{name}-{importlib.metadata.version(name)}" for name in packages]
