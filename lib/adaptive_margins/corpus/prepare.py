"""Custom corpus → query sets, zero-shot rankings, triples and validation, before any training."""

from __future__ import annotations

import dataclasses
import math
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from adaptive_margins.corpus.evaluate import held_out, warn_of_self
from adaptive_margins.corpus.settings import FinetuneError, Job, Settings
from adaptive_margins.corpus.validation import Validation, with_positive
from adaptive_margins.data.collection import Collection, Texts, Triple
from adaptive_margins.data.mining import Similarity, filter_negatives
from adaptive_margins.data.pseudo_queries import about, pseudo_collection
from adaptive_margins.data.sources import open_collection
from adaptive_margins.data.splits import MOST_TEST, MOST_VALIDATION, fold_queries, split_queries
from adaptive_margins.data.stored import seeded_order
from adaptive_margins.data.trec import Run
from adaptive_margins.data.triples import check_triples, mine_triples
from adaptive_margins.encoder.load import prompts
from adaptive_margins.encoder.tokens import Tokens, tokenize
from adaptive_margins.evaluation.measures import evaluate, relevant
from adaptive_margins.files import digest
from adaptive_margins.progress import say
from adaptive_margins.retrieval.bm25 import BM25, without_hits
from adaptive_margins.retrieval.dense import FUSED, DenseRetriever
from adaptive_margins.retrieval.embedding_cache import cache_folder
from adaptive_margins.runs import TrainingRun

TRIPLE_COST = 6
"""Time of training on a triple, in passages embedded: it has two, and a step takes three times."""

_USED = (
    " The encoder to start from was trained or selected with some of the test queries: its"
    " measures, before and after, are too high."
)


@dataclass(frozen=True)
class SplitCollection:
    """A collection with the query sets train, validation and test."""

    collection: Collection
    split: str  # a sentence on how its queries were split; "" if they were not
    pseudo: dict[str, Any] | None  # number and kinds of pseudo-queries; None if queries are real


def open_split(source: str | Collection, triples: int | None, seed: int) -> SplitCollection:
    """Open a collection and split its queries; pseudo-queries are generated if it has none.

    Args:
        source: a folder, "pydocs" or an ir_datasets id (`open_collection`), or what it returned.
        triples: pseudo-queries to train on, at most; None for the default of `Settings`.
        seed: of the split and of the pseudo-queries.

    Raises:
        DataError: as `open_collection` and `split_queries`.
    """
    collection = source if isinstance(source, Collection) else open_collection(source)
    if any(len(queries) for queries in collection.queries.values()):
        return SplitCollection(*split_queries(collection, seed=seed), _pseudo(collection))
    say(f"{collection.name} has no queries: generating pseudo-queries")
    collection = pseudo_collection(
        collection.passages,
        collection.name,
        collection.sources,
        collection.titles,
        count=triples or Settings.for_device().triples,
        test=MOST_TEST,
        validation=MOST_VALIDATION,
        seed=seed,
    )
    say(about(collection))
    return SplitCollection(collection, "", _pseudo(collection))


def _pseudo(collection: Collection) -> dict[str, Any] | None:
    """Number and kinds of pseudo-queries, also of those that `mine_negatives` saved; else None."""
    if "pseudo-queries" not in collection.sources:
        return None
    qids = (qid for queries in collection.queries.values() for qid in queries.ids)
    kinds = Counter(qid.partition(":")[0] for qid in qids)
    return {"queries": kinds.total(), "kinds": dict(sorted(kinds.items()))}


def open_parts(job: Job) -> list[SplitCollection]:
    """Return the folds of a job, if it has any, and the collection to train the encoder on."""
    collection = open_collection(job.source)
    if job.folds is None:
        found = [open_split(collection, job.triples or job.settings.triples, job.seed)]
        split = found[0].split
    else:
        parts, split = fold_queries(collection, job.folds, seed=job.seed)
        found = [SplitCollection(part, "", None) for part in parts]
    *folds, last = found
    known, trained = held_out(collection, job.model)
    used = {q for name in ("train", "validation") if trained for q in known.queries[name].ids}
    if trained.endswith(_USED) or used & {*last.collection.queries["test"].ids}:
        split += _USED
    return [*folds, dataclasses.replace(last, split=split)]


def given_triples(
    collection: Collection, settings: Settings, asked: int | None, seed: int
) -> tuple[list[Triple], dict[str, Any]]:
    """Choose among a collection's triples by seed, all several times if they are few; facts.

    Those that contradict the judgements or have no difference to learn are left out, with a
    warning; FinetuneError if none is left.
    """
    available, wanted = collection.triples, asked or settings.triples
    drawn = (available[row] for row in seeded_order(len(available), seed))
    queries, qrels = collection.queries["train"], collection.qrels["train"]
    chosen, checked = check_triples(drawn, queries, qrels, collection.passages, wanted=wanted)
    if checked.reasons:
        counts = f"{checked.reasons}, of {checked.checked:,} checked"
        left_out = f"triples of training queries left out: {counts}"
        if not chosen:
            raise FinetuneError(f"{collection.name} has no triple to train on; {left_out}")
        warnings.warn(f"{collection.name}: {left_out}", stacklevel=2)
    distinct = len(set(chosen))
    if chosen and len(chosen) < wanted:
        pairs = len({triple[:2] for triple in chosen})
        wanted = asked or max(len(chosen), min(wanted, settings.passes * pairs))
        chosen = [chosen[i % len(chosen)] for i in range(wanted)]
    facts = {
        "available": len(available),
        "distinct": distinct,
        "negatives": "given",
        "left_out": dataclasses.asdict(checked),
        "guarded": {},
    }
    return chosen, facts


def _mined_triples(
    job: Job, collection: Collection, miner: BM25 | DenseRetriever, zero_shot: DenseRetriever
) -> tuple[list[Triple], dict[str, Any]]:
    """Mine negatives from the miner's best passages, without likely positives; facts of them."""
    passages, queries = collection.passages, collection.queries["train"]
    settings, seed = job.settings, job.seed
    qrels = with_positive(collection.qrels["train"])
    pairs = sum(grade > 0 for judged in qrels.values() for grade in judged.values())
    count = job.triples or min(settings.triples, settings.passes * pairs)
    qids = sorted(qrels)
    if len(qids) > count:  # of the others no triple would be drawn
        qids = [qids[row] for row in seeded_order(len(qids), seed)[:count]]
    qrels = {qid: qrels[qid] for qid in qids}
    texts = Texts(qids, [queries[qid] for qid in qids])
    similarity = cosines(zero_shot, texts)
    found = miner.search(texts, settings.negatives_depth)
    candidates, counts = filter_negatives(found, qrels, passages, similarity=similarity, seed=seed)
    if not candidates:
        raise FinetuneError(f"{collection.name} has no triple to train on; {counts.none_left()}")
    qrels = {qid: qrels[qid] for qid in candidates}
    triples = mine_triples(qrels, candidates, passages, count=count, seed=seed)
    positives = {qid: sum(grade > 0 for grade in judged.values()) for qid, judged in qrels.items()}
    facts = {
        "available": sum(len(hits) * positives[qid] for qid, hits in candidates.items()),
        "negatives": job.negatives,
        "guarded": dataclasses.asdict(counts),
    }
    return triples, facts


def cosines(retriever: DenseRetriever, queries: Texts) -> Similarity:
    """Return the encoder's similarity of queries and passages, for `filter_negatives`."""
    embeddings = retriever.embed_queries(queries.texts)

    def similarity(qid: str, docids: list[str]) -> np.ndarray:
        rows = np.array([retriever.passages.row(docid) for docid in docids])
        scores: np.ndarray = retriever.embeddings_of(rows) @ embeddings[queries.row(qid)]
        return scores

    return similarity


def numbered(
    triples: Sequence[Triple], collection: Collection, prompts: tuple[str, str]
) -> tuple[np.ndarray, Texts, Texts]:
    """Return triples as rows (3, n) of distinct queries and passages, and these with prompts.

    The first row has rows of the queries, the others of the passages.
    """
    ids = np.array(triples, object)
    queries, qids = pd.factorize(ids[:, 0])
    pairs, docids = pd.factorize(ids[:, 1:].ravel())
    return (
        np.vstack([queries, pairs.reshape(-1, 2).T]).astype(np.int32),
        Texts(qids.tolist(), [prompts[0] + collection.queries["train"][qid] for qid in qids]),
        Texts(docids.tolist(), [prompts[1] + collection.passages[docid] for docid in docids]),
    )


# ---- zero-shot encoder, BM25, tokens ---------------------------------------------------------


@dataclass
class Stages:
    """Seconds of each stage of this process."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, name: str, what: str) -> Iterator[None]:
        """Announce a stage, and add the time that its block takes."""
        say(what)
        since = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - since


def check_test_set(data: SplitCollection, measures: Sequence[str]) -> int:
    """The number of test queries with a relevant passage; or a MeasureError."""
    collection = data.collection
    sizes = ", ".join(
        f"{len(collection.qrels[name]):,} {name}" for name in ("train", "validation", "test")
    )
    say(f"{collection.name}: {len(collection.passages):,} passages; queries: {sizes}. {data.split}")
    queries, qrels = collection.queries["test"], collection.qrels["test"]
    usable, *_ = [len(relevant(qrels, measure)) for measure in measures]
    evaluate(qrels, {}, measures)
    warn_of_self(queries, collection.passages)
    return usable


@dataclass(frozen=True)
class Prepared:
    """Inputs of training and report that need BM25 or the zero-shot encoder."""

    runs: dict[str, Run]  # "start" and "bm25" → ranking of the test queries
    validating: dict[str, Run]  # "dense" (zero-shot) and "bm25" → that of the validation queries
    bm25: dict[str, int]  # queries, those without hits, and passages split into bigrams
    rows: np.ndarray  # (3, n) triples, as rows of the texts
    names: tuple[Sequence[str], Sequence[str]]  # ids of the queries and of the passages
    queries: Tokens
    passages: Tokens
    facts: dict[str, Any]  # of the triples, for the report
    validation: Validation  # evaluates the encoder in training
    truncated: dict[str, Any]  # `DenseRetriever.truncation`
    lengths: tuple[int, int]  # tokens of a query and of a passage, at most

    @property
    def count(self) -> int:
        """Triples."""
        return self.rows.shape[1]

    def digest(self, config: TrainingRun) -> str:
        """A name for everything that determines the training."""
        validation = self.validation
        ids = [validation.queries.ids, validation.passages.ids]
        return digest([config.run_id, self.rows.tolist(), *ids])


def prepare(job: Job, work: Path, data: SplitCollection, encoder: Any, stages: Stages) -> Prepared:
    """Rank with BM25 and the zero-shot encoder, and choose the triples.

    Both retrievers are freed at the end: the encoder changes in training, and they take memory.
    """
    collection, settings = data.collection, job.settings
    with stages("encoding", f"embedding the passages with {job.model}"):
        cache, precision = cache_folder(job.cache) or work / "embeddings", settings.precision
        options: dict[str, Any] = {"precision": precision, "cache": cache, "warn": False}
        zero_shot = DenseRetriever(encoder, collection.passages, **options)
        assert len(zero_shot.embeddings) == len(zero_shot.rows)
    with stages("ranking", "ranking with BM25 and with the zero-shot encoder"):
        test, validating = (collection.queries[name] for name in ("test", "validation"))
        bm25 = BM25(collection.passages)
        deep = max(job.depth, FUSED)
        runs = {"start": zero_shot.search(test, deep), "bm25": bm25.search(test, deep)}
        judged = {qid: runs["bm25"][qid] for qid in collection.qrels["test"]}
        bm25_facts = {
            "queries": len(judged),
            "without_hits": without_hits(judged),
            "bigram_passages": bm25.bigram_passages,
        }
        ranked = {"bm25": bm25.search(validating, deep)}
        ranked["dense"] = zero_shot.search(validating, deep)
    with stages("triples", "choosing triples"):
        miner = bm25 if job.negatives == "bm25" else zero_shot
        chosen, facts = _triples(job, data, miner, zero_shot)
    rows, asked, read = numbered(chosen, collection, prompts(encoder))
    queries = tokenize(encoder, asked.texts, zero_shot.query_length)
    _count_queries(zero_shot, [test, validating], asked)
    zero_shot.warn_truncated()
    passages = tokenize(encoder, read.texts, zero_shot.passage_length)
    tokens = queries.lengths[rows[0]] + passages.lengths[rows[1:]].sum(axis=0)
    mean = float(passages.lengths.mean())
    count = _affordable(job, tokens, mean * len(collection.passages))
    facts["tokens"] = int(tokens[:count].sum())
    if "distinct" in facts:  # the first ones are
        facts["distinct"] = min(facts["distinct"], count)
    more = " (--triples n for more)" if count < len(tokens) else ""
    say(f"{count:,} triples of {facts['tokens']:,} tokens to train on{more}")
    budget = _budget(settings, count, mean)
    return Prepared(
        runs=runs,
        validating=ranked,
        bm25=bm25_facts,
        rows=rows[:, :count],
        names=(asked.ids, read.ids),
        queries=queries,
        passages=passages,
        facts=facts,
        validation=Validation(collection, [*ranked.values()], budget, precision, job.seed),
        truncated=zero_shot.truncation,
        lengths=(zero_shot.query_length, zero_shot.passage_length),
    )


def _count_queries(zero_shot: DenseRetriever, ranked: Sequence[Texts], trained_on: Texts) -> None:
    """Count truncated queries again, each once: folds test those that they train on."""
    prompt, _ = prompts(zero_shot.model)
    texts = {qid: prompt + queries[qid] for queries in ranked for qid in queries}
    every = list({**texts, **dict(zip(trained_on.ids, trained_on.texts, strict=True))}.values())
    zero_shot.truncated["queries"] = zero_shot.lost["queries"] = (0, 0)
    zero_shot.count(every, tokenize(zero_shot.model, every, zero_shot.query_length), "queries")


def _triples(
    job: Job, data: SplitCollection, miner: BM25 | DenseRetriever, zero_shot: DenseRetriever
) -> tuple[list[Triple], dict[str, Any]]:
    collection = data.collection
    if len(collection.triples):
        chosen, facts = given_triples(collection, job.settings, job.triples, job.seed)
    else:
        chosen, facts = _mined_triples(job, collection, miner, zero_shot)
    if len(chosen) < 2:
        raise FinetuneError(
            f"{job.source} gives {len(chosen)} triples to train on; at least 2 are needed"
        )
    source = "given" if facts["negatives"] == "given" else f"mined with {facts['negatives']}"
    say(f"{len(chosen):,} triples, {source}")
    return chosen, facts


def batches(settings: Settings, triples: int) -> tuple[int, int]:
    """Triples a step, and steps between two evaluations."""
    batch_size = min(settings.batch_size, triples)
    every = math.ceil(triples // batch_size / settings.checks)
    return batch_size, max(every, settings.check_steps)


def _affordable(job: Job, tokens: np.ndarray, passages: float) -> int:
    """How many triples, of these ``tokens`` each, to train on, unless a number is asked for.

    ``passages`` are the tokens of all passages, which are embedded before and after training. A
    token costs at least three times as much in training.
    """
    if job.triples is not None:
        return len(tokens)
    most = max(job.settings.tokens - passages / 2, job.settings.least_tokens)
    affordable = int((tokens.cumsum() <= most).sum())
    return min(len(tokens), max(job.settings.batch_size, affordable))


def _budget(settings: Settings, triples: int, tokens: float) -> int:
    """Passages, of ``tokens`` on average, that an evaluation may embed."""
    batch_size, every = batches(settings, triples)
    share = round(settings.check_share * TRIPLE_COST * every * batch_size)
    return max(share, min(settings.check_passages, int(settings.check_tokens / tokens)))
