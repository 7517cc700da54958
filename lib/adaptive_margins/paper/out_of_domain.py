"""Table 3's encoders, zero-shot encoders and BM25 on collections that nothing was trained on."""

from __future__ import annotations

import importlib.metadata
import json
import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any, Literal

import pandas as pd

from adaptive_margins.data import pydocs
from adaptive_margins.data.collection import Collection, Texts
from adaptive_margins.data.sources import open_collection
from adaptive_margins.data.text import DataError
from adaptive_margins.data.trec import Qrels
from adaptive_margins.data.words import words_of
from adaptive_margins.evaluation.measures import MeasureError, relevant
from adaptive_margins.evaluation.significance import compare
from adaptive_margins.files import digest, read_object, write_text
from adaptive_margins.paper.experiments import VARIANTS, tuning_runs
from adaptive_margins.paper.inputs import shortener
from adaptive_margins.paper.reproduction import Reproduction
from adaptive_margins.paper.store import StoredRun
from adaptive_margins.profiles.config import CandidateSettings, SetSettings
from adaptive_margins.retrieval.exact import count_self
from adaptive_margins.runs import TransferRun

FOLDER = "out_of_domain"
"""The store of these runs, next to ``runs/`` of the home folder."""
TEST, ALL, ZERO_SHOT = "test", "all", "zero-shot"
"""The query set of each collection; in frames, all collections or targets; a zero-shot encoder."""
CHECKPOINTS: tuple[Literal["selected", "last"], ...] = ("selected", "last")
_SAMPLE = 20_000  # training passages whose words are counted
_SYSTEM = ["encoder", "target", "in_batch", "checkpoint", "measure"]


class OutOfDomain:
    """The collections of a profile's ``out_of_domain``, and how systems do on them.

    Every system reads the same texts, truncated to the lengths of the profile.

    Args:
        reproduction: its missing runs are computed.
        folder: one more collection, in a layout of `data.folder.read_folder`; "" for none.
    """

    def __init__(self, reproduction: Reproduction, folder: str = "") -> None:
        self.reproduction, self.folder = reproduction, folder
        self.profile, self.home = reproduction.profile, reproduction.home
        self.settings = reproduction.profile.out_of_domain

    # ---- collections ---------------------------------------------------------------------------

    @cached_property
    def collections(self) -> dict[str, Collection]:
        """Name → collection with the query set `TEST`, built once for the same versions and sizes.

        Raises:
            DataError: there is none; a package is in the training collection; a collection has
                fewer than 2 judged test queries or no relevant passage, or its queries are
                passages; the folder has the name of another collection; a package is not installed,
                or has too few docstrings.
            LicenceError, DownloadError: as `data.ir_datasets.read_collection`.
        """
        s, trained = self.settings, getattr(self.profile.collection, "packages", ())
        if both := sorted({*s.packages} & {*trained}):
            raise DataError(f"out_of_domain.packages: {both[0]} is in the training collection")
        found = {name: self._cached(name) for name in (*s.packages, *s.collections)}
        if self.folder:
            opened = self._opened(self.folder)
            if opened.name in (*found, ALL):
                raise DataError(f"{self.folder}: {opened.name!r} is taken here; rename the folder")
            found[opened.name] = self._saved(opened)
        if not found:
            raise DataError(
                f"profile {self.profile.name!r} has no out_of_domain.packages or collections; add"
                " some, or name a folder"
            )
        return found

    def _cached(self, source: str) -> Collection:
        s, is_package = self.settings, source in self.settings.packages
        ir_datasets = {"ir-datasets": importlib.metadata.version("ir-datasets")}
        key = {
            "source": source,
            "versions": pydocs.source_versions([source]) if is_package else ir_datasets,
            "rules": pydocs.RULES,
            "sizes": [s.queries, s.passages, self._max_words],
            "lengths": self.profile.lengths.model_dump(),
            "encoder": self.reproduction.inputs.weights(self.profile.reference_encoder),
        }
        pointer = self.home / "cache" / "collections" / f"{digest(key)}.json"
        built = self.home / "collections" / str(read_object(pointer).get("fingerprint"))
        if built.is_dir():
            return Collection.load(built)
        collection = self._saved(self._package(source) if is_package else self._opened(source))
        write_text(pointer, json.dumps({"fingerprint": collection.fingerprint}) + "\n")
        return collection

    def _saved(self, collection: Collection) -> Collection:
        collection.save(self.home / "collections" / collection.fingerprint)
        return collection

    @property
    def _max_words(self) -> int:
        return getattr(self.profile.collection, "max_words", 60)

    @cached_property
    def _shorten(self) -> Callable[[Literal["query", "passage"], list[str]], list[str]]:
        return shortener(self.profile)

    def _package(self, package: str) -> Collection:
        """Docstrings of a package by the rules of PyDocs, without a split."""
        built = pydocs.build_pydocs(
            [package],
            seed=1,
            validation=1,
            test=1,
            max_passages=self.settings.passages,
            max_words=self._max_words,
            shorten=self._shorten,
        )
        asked = sorted((q, texts[q]) for texts in built.queries.values() for q in texts.ids)
        queries = dict(asked[: self.settings.queries])  # ids are in the order of a hash: at random
        qrels = {q: j for judged in built.qrels.values() for q, j in judged.items() if q in queries}
        texts = Texts(list(queries), list(queries.values()))
        return Collection(package, built.passages, {TEST: texts}, {TEST: qrels}, built.sources)

    def _opened(self, source: str) -> Collection:
        """The judged test queries of a folder or an ir_datasets id, and all passages with a text.

        What is without text is left out with its judgements, and a warning.
        """
        found = open_collection(source)
        if not (judged := found.qrels.get(TEST)):
            raise DataError(f"{source} has no judged test queries, but {sorted(found.queries)}")
        asked, passages = found.queries[TEST], found.passages
        if count := count_self(asked, passages):
            raise DataError(f"{source}: {count:,} queries are passages, which is not supported")
        passages = _with_text(passages.ids, self._shorten("passage", list(passages.texts)))
        qrels = {q: {p: g for p, g in judged[q].items() if p in passages} for q in judged}
        ids = [q for q in asked.ids if qrels.get(q)]
        queries = _with_text(ids, self._shorten("query", [asked[q] for q in ids]))
        qrels = {q: qrels[q] for q in queries.ids}
        counts = [len(found.passages) - len(passages), len(judged) - len(qrels)]
        counts += [sum(map(len, judged.values())) - sum(map(len, qrels.values()))]
        if any(counts):
            what = "{:,} passages, {:,} queries and {:,} judgements".format(*counts)
            warnings.warn(f"{source}: left out, as there is no text: {what}", stacklevel=2)
        if len(queries) < 2:
            raise DataError(f"{source}: {len(queries)} judged test queries; a test needs 2 or more")
        if not _is_reached(measure := self.profile.measures.full[0], qrels):
            raise DataError(f"{source}: no query has a passage that is relevant for {measure}")
        return Collection(found.name, passages, {TEST: queries}, {TEST: qrels}, found.sources)

    def domains(self) -> pd.DataFrame:
        """A row per collection: queries, passages, its `word_overlap` with the training collection,
        and how many passages are also there. Of that at most 20,000 passages are compared.
        """
        texts = self.reproduction.inputs.collection.passages.texts
        trained = [texts[i] for i in range(0, len(texts), -(-len(texts) // _SAMPLE))]
        rows = [
            {
                "domain": name,
                "queries": len(c.queries[TEST]),
                "passages": len(c.passages),
                "word_overlap": word_overlap(trained, c.passages.texts),
                "identical": len({*trained} & {*c.passages.texts}),
                "collection": c.fingerprint,
            }
            for name, c in self.collections.items()
        ]
        return pd.DataFrame(rows)

    # ---- runs ----------------------------------------------------------------------------------

    @property
    def _encoders(self) -> list[str]:
        return [*self.profile.encoders] if self.settings.every else [self.profile.reference_encoder]

    @cached_property
    def _trained(self) -> list[tuple[str, bool, StoredRun[Any]]]:
        """Target, in-batch and run of each row of Table 3, for each seed."""
        e, runner = self.reproduction.experiments, self.reproduction.runner
        runner.ensure(tuning_runs(e, self._encoders))
        rows = [
            (target, in_batch, e.variant_run(encoder, target, in_batch, seed))
            for encoder in self._encoders
            for target, in_batch in VARIANTS
            for seed in self.profile.row_seeds(encoder)[: None if self.settings.every else 1]
        ]
        stored = runner.ensure([config for *_, config in rows])
        return [(*row[:2], run) for row, run in zip(rows, stored, strict=True)]

    def _on(self, collection: Collection) -> Reproduction:
        """The profile with another collection and store. Runs take seconds: no worker processes."""
        p = self.profile
        changes = {
            "sets": SetSettings(validation=TEST, tests=(TEST,)),
            "comparison": p.comparison.model_copy(update={"validation": None}),
            "candidates": CandidateSettings(depth=p.candidates.depth),
            "workers": 1,
        }
        changed = p.model_copy(update=changes)
        other = Reproduction(changed, self.home, runs=self.home / FOLDER)
        other.inputs.collection = collection
        return other

    def _runs(self, collection: Collection) -> Iterator[tuple[Any, ...]]:
        """Encoder, target, in-batch, checkpoint, seed, source and run of each system."""
        on = self._on(collection)
        yield "bm25", "BM25", False, "", 0, "", on.bm25()
        for encoder in [*self._encoders, *self.profile.untrained]:
            yield encoder, ZERO_SHOT, False, "", 0, "", on.zero_shot(encoder)
        for target, in_batch, source in self._trained:
            encoder, seed = source.config.encoder, source.config.seed
            values = on.experiments.zero_shot_run(encoder).model_dump(exclude={"kind"})
            is_last = source.result["kept_step"] == source.curve["step"].iloc[-1]
            for checkpoint in CHECKPOINTS:
                which = CHECKPOINTS[0] if is_last else checkpoint
                config = TransferRun(**values, source=source.run_id, checkpoint=which)
                run = on.runner.ensure([config])[0]
                yield encoder, target, in_batch, checkpoint, seed, source.run_id, run

    @cached_property
    def results(self) -> pd.DataFrame:
        """A row per collection, system, seed, measure and query; missing runs are computed.

        The systems are BM25, the zero-shot encoders, and the selected and the last checkpoint of
        the rows of Table 3, whose run is ``source``; all ranked in full. A collection lacks a
        measure whose level of relevance none of its judgements reaches, as rel=2 with binary ones.
        """
        frames = []
        for name, collection in self.collections.items():
            measures, qrels = self.profile.measures.full, collection.qrels[TEST]
            reached = [measure for measure in measures if _is_reached(measure, qrels)]
            for *system, run in self._runs(collection):
                about = dict(zip([*_SYSTEM[:4], "seed", "source"], system, strict=True))
                about |= {"domain": name, "run_id": run.run_id}
                found = run.evaluation("full", TEST).per_query
                for measure in reached:
                    scores = found[measure]
                    frame = pd.DataFrame({"qid": list(scores), "value": list(scores.values())})
                    frames.append(frame.assign(measure=measure, **about))
        return pd.concat(frames, ignore_index=True)

    # ---- what they show ------------------------------------------------------------------------

    def scores(self) -> pd.DataFrame:
        """A row per collection, or `ALL` of them, system and measure.

        ``value`` is the mean over queries and seeds, ``difference`` that to the zero-shot encoder
        (of BM25: to the reference encoder), with its 95 % confidence interval (low, high) and the
        verdict of `significance.compare`.
        """
        found, rows = self.results, []
        both = pd.concat([found.assign(group=found["domain"]), found.assign(group=ALL)])
        starts = found[found["target"] == ZERO_SHOT]
        for key, frame in both.groupby(["group", *_SYSTEM], sort=False):
            about = dict(zip(["domain", *_SYSTEM], key, strict=True))
            encoder = self.profile.reference_encoder if key[1] == "bm25" else key[1]
            start = starts[(starts["encoder"] == encoder) & (starts["measure"] == key[-1])]
            tested = _tested(frame, start[start["domain"].isin(frame["domain"])])
            run_ids = " ".join(frame["run_id"].unique())
            rows.append({**about, "value": frame["value"].mean(), **tested, "run_ids": run_ids})
        return pd.DataFrame(rows)

    def early_stopping(self) -> pd.DataFrame:
        """The selected minus the last checkpoint, over the queries of all collections, and seeds.

        A row per encoder, target or `ALL` of them, and measure: of ``runs``, the number that are
        ``distinct`` (the last step is not the selected one), and the test as in `scores`, if any.
        """
        found, rows = self.results[self.results["source"] != ""], []
        both = pd.concat([found, found.assign(target=ALL, in_batch=False)])
        keys = [key for key in _SYSTEM if key != "checkpoint"]
        for key, frame in both.groupby(keys, sort=False):
            selected, last = (frame[frame["checkpoint"] == name] for name in CHECKPOINTS)
            ids = frame.groupby("source")["run_id"].nunique()  # one a collection, or two
            distinct = int((ids > frame["domain"].nunique()).sum())
            counts = {"runs": len(ids), "distinct": distinct}
            tested = _tested(selected, last) | ({} if distinct else {"verdict": "no test"})
            rows.append({**dict(zip(keys, key, strict=True)), **counts, **tested})
        return pd.DataFrame(rows)


def word_overlap(one: Iterable[str], other: Iterable[str]) -> float:
    """Weighted Jaccard similarity of the word frequencies of two lists of texts, from 0 to 1.

    J = Σ_w min(p_w, q_w) / Σ_w max(p_w, q_w), with p_w and q_w the shares of word w: the measure by
    which BEIR compares its collections (Thakur et al., NeurIPS 2021; Ioffe, ICDM 2010).
    """
    counts = [Counter(word for text in texts for word in words_of(text)) for texts in (one, other)]
    p, q = ({word: n / c.total() for word, n in c.items()} for c in counts)
    smaller = math.fsum(min(p[word], q[word]) for word in p.keys() & q.keys())  # in any order
    return smaller / (2 - smaller)  # the shares of each sum to 1


def _is_reached(measure: str, qrels: Qrels) -> bool:
    """Whether any passage has the grade that is relevant for a measure."""
    try:
        return bool(relevant(qrels, measure))
    except MeasureError:
        return False


def _with_text(ids: Sequence[str], texts: Sequence[str]) -> Texts:
    """The texts that are not empty."""
    kept = [(i, text) for i, text in zip(ids, texts, strict=True) if text.strip()]
    return Texts([i for i, _ in kept], [text for _, text in kept])


def _tested(a: pd.DataFrame, b: pd.DataFrame) -> dict[str, Any]:
    """The test over the mean scores of each query of each collection, for each seed."""
    means = (frame.groupby(["seed", "domain", "qid"])["value"].mean() for frame in (a, b))
    sides: Any = ([x.droplevel(0).to_dict() for _, x in m.groupby("seed")] for m in means)
    found = compare(*sides)
    low, high = found.ci
    return {"difference": found.difference, "low": low, "high": high, "verdict": found.verdict}
