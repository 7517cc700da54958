"""A collection of one's own → an encoder fine-tuned on it with the margin loss, and whether it became better.

The loss has no hyperparameters to tune (Section 3), so one path is enough: queries are split if they are not, negatives are
mined if there are no triples, training stops when validation says so, and the encoder that it started from is kept
unless the trained one is better by more than chance would explain. All measures are of a full, exact ranking of the test queries.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import math
import platform
import shutil
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from datasets import Dataset
from safetensors import SafetensorError

from adaptive_margins import __version__
from adaptive_margins.corpus.model_card import model_card
from adaptive_margins.data.collection import Collection, Texts, Triple, read_queries
from adaptive_margins.data.mining import Checked, check_triples, guard, mine_triples
from adaptive_margins.data.pseudo_queries import about, pseudo_collection
from adaptive_margins.data.sources import (
    MOST_TEST,
    MOST_VALIDATION,
    open_collection,
    split_queries,
)
from adaptive_margins.data.stored import COLUMNS, seeded_order
from adaptive_margins.data.trec import (
    Qrels,
    Run,
    qrels_text,
    read_qrels,
    read_run,
    run_tag,
    top,
    write_run,
)
from adaptive_margins.encoder.embed import Precision
from adaptive_margins.encoder.load import (
    default_device,
    encoder_identity,
    open_encoder,
    prompts,
    save_encoder,
)
from adaptive_margins.encoder.packing import packs
from adaptive_margins.encoder.tokens import count_truncated, tokenize
from adaptive_margins.errors import AdaptiveMarginsError, ArgumentError
from adaptive_margins.evaluation.measures import Evaluation, cutoff, evaluate, named, relevant
from adaptive_margins.evaluation.significance import compare
from adaptive_margins.files import whole_file, whole_folder, working_folder
from adaptive_margins.losses import MarginLoss
from adaptive_margins.progress import clock, say
from adaptive_margins.retrieval.bm25 import BM25, without_hits
from adaptive_margins.retrieval.dense import DenseRetriever, hybrid
from adaptive_margins.retrieval.exact import count_self
from adaptive_margins.runs import TrainingRun
from adaptive_margins.training import REPORTERS, TrainingResult, check_reporters, train

SELECTION = "nDCG@10"
"""The measure that decides, on the validation queries, which step is kept (Section 5.4)."""
RUNS = ("start", "trained", "bm25", "hybrid")
"""What is compared on the test queries: the encoder before and after, BM25, and the latter two fused."""
_COMPARISONS = (("trained", "start"), ("trained", "bm25"), ("hybrid", "trained"))
_TENSORBOARD = "tensorboard"


class FinetuneError(AdaptiveMarginsError, ValueError):
    """Fine-tuning that cannot begin, or whose result cannot be written or read; the message says what was expected."""


@dataclass(frozen=True)
class Settings:
    """What the paper leaves to whoever trains. None of it is a parameter of the loss; `for_device` gives the defaults.

    Attributes:
        batch_size: triples a step (B); fewer triples make one smaller batch.
        triples: to train on at most.
        passes: over the distinct pairs of query and positive at most, each time with another negative.
        learning_rate, weight_decay, optimizer: as in transformers' TrainingArguments.
        precision: of matrix products.
        checks: evaluations a run, after the one at step 0.
        patience: checks without a gain that end the training.
        standard_errors: of the paired differences on validation, by which the best check must exceed step 0 for the trained
            encoder to be kept: the one-standard-error rule of Breiman et al. (1984), Classification and Regression Trees,
            Section 3.4.3.
        negatives_depth: rank to which the candidates go that negatives are mined from.
        check_share: what a check may cost, as a share of the training since the last one.
        check_passages: what a check may embed in any case, however short the training.
    """

    batch_size: int = 32  # takes up to 8.4 GB with MiniLM and passages of 256 tokens
    triples: int = 2048  # about five minutes with MiniLM on two cores
    passes: int = 5
    learning_rate: float = 2e-5  # customary for encoders that are already trained contrastively
    weight_decay: float = 1e-6  # Section 4
    optimizer: str = "adamw_torch_fused"  # Section 4: 8-bit Adam, 24 times slower a step on a CPU
    precision: Precision = "fp32"
    checks: int = 8
    patience: int = 3
    standard_errors: float = 1.0
    negatives_depth: int = 100
    check_share: float = 1 / 3
    check_passages: int = 1000  # about ten seconds with MiniLM on two cores

    @classmethod
    def for_device(cls, device: str) -> Settings:
        """The defaults: on a GPU the paper's batch size and mixed precision, and triples for about as many minutes."""
        if device.startswith("cuda"):
            return cls(batch_size=128, triples=100_000, precision="bf16")
        return cls()


@dataclass(frozen=True)
class Finetuned:
    """A finished fine-tuning: a Sentence Transformers folder, and the report that stands in its ``training.json``."""

    folder: Path
    report: dict[str, Any]

    @classmethod
    def load(cls, folder: Path) -> Finetuned:
        """Open what `finetune` wrote. Raises FinetuneError if the folder is not that."""
        path = Path(folder) / "training.json"
        try:
            return cls(Path(folder), json.loads(path.read_text("utf-8")))
        except (OSError, ValueError) as error:
            raise FinetuneError(
                f"{folder} is not a folder that `train` wrote: {path.name} cannot be read ({error})"
            ) from None

    @property
    def curve(self) -> pd.DataFrame:
        """The learning curve on validation: a row per check, step 0 included (step, triples, seconds, measure)."""
        return pd.read_parquet(self.folder / "curve.parquet")

    @property
    def targets(self) -> pd.DataFrame:
        """A row per step: mean, min and max of φ(d⁺, d⁻) over the batch (Figure 6)."""
        return pd.read_parquet(self.folder / "targets.parquet")

    @property
    def queries(self) -> Texts:
        """The test queries."""
        return read_queries(self.folder / "queries.test.tsv", own=True)

    @property
    def qrels(self) -> Qrels:
        """The judgements of the test queries."""
        return read_qrels(self.folder / "qrels.test.txt", own=True)

    def run(self, name: str) -> Run:
        """The ranking of all passages for the test queries by one of `RUNS`."""
        return read_run(self.folder / "runs" / f"{name}.test.run.gz", own=True)

    def per_query(self, measure: str = SELECTION) -> pd.DataFrame:
        """A row per judged test query: qid, query, the measure of each of `RUNS`, and difference = trained - start.

        The largest losses come first, the largest gains last.

        Raises:
            ValueError: the measure is unknown.
        """
        queries, qrels = self.queries, self.qrels
        table = pd.DataFrame({"qid": list(qrels), "query": [queries[qid] for qid in qrels]})
        for name in RUNS:
            values = evaluate(qrels, self.run(name), [measure]).per_query[measure]
            table[name] = [values[qid] for qid in qrels]
        table["difference"] = table["trained"] - table["start"]
        return table.sort_values("difference", kind="stable", ignore_index=True)


def finetune(
    source: str,
    output: Path,
    *,
    model: str = "minilm",
    target: float | Literal["adaptive", "distributed"] = "distributed",
    seed: int = 1,
    measures: Sequence[str] = (SELECTION, "R(rel=1)@100"),
    negatives: Literal["bm25", "encoder"] = "bm25",
    device: str | None = None,
    triples: int | None = None,
    report_to: Sequence[str] = (),
    on_check: Callable[[pd.DataFrame], None] | None = None,
    settings: Settings | None = None,
) -> Finetuned:
    """Fine-tune an encoder on a collection, and compare it with what it started from and with BM25.

    Work is kept in ``OUTPUT.work`` beside the output: the same call goes on where a killed one stopped. The output appears
    when it is whole: the encoder as a Sentence Transformers folder with a model card, ``training.json`` (the report),
    ``curve.parquet``, ``targets.parquet``, ``runs/NAME.test.run.gz`` of `RUNS`, ``qrels.test.txt`` and ``queries.test.tsv``.
    Deterministic for a seed on one machine. Stages, checks and the time left are said on stderr.

    Args:
        source: a folder, "pydocs" or an ir_datasets id (`open_collection`).
        output: a folder that does not exist, or is empty.
        model: the encoder to start from (`open_encoder`).
        target: ε, "adaptive" or "distributed" (Section 3).
        seed: of splitting, mining, the order of triples, and dropout.
        measures: on the test queries, in ir_measures' notation; the first one is that of the comparisons.
        negatives: whose best passages the negatives are mined from, if the collection has no triples.
        device: as torch calls it; None takes a GPU if there is one.
        triples: to train on; None leaves it to ``settings``.
        report_to: see `train`.
        on_check: gets the learning curve so far, after each check.
        settings: in the place of the device's defaults.

    Raises:
        FinetuneError: a value is not one of the above, or there are too few triples.
        WriteError: the output is not empty, another process writes to it, or it cannot be written.
        DataError, EncoderError, TrainingError: the collection, the encoder, or a step of training is at fault.
    """
    output = Path(output).expanduser().absolute()
    device = device or default_device()
    settings = settings or Settings.for_device(device)
    if not 0 <= seed < 2**32:  # numpy takes no other
        raise ArgumentError("seed", f"seed is {seed}; expected 0 to {2**32 - 1:,}")
    measures = _check(target, measures, negatives, device, triples, report_to)
    with working_folder(output) as work:
        return _finetune(
            source, output, work, model, target, seed, measures, negatives, device, triples, report_to,
            on_check, settings,
        )  # fmt: skip


def _finetune(
    source: str,
    output: Path,
    work: Path,
    model: str,
    target: float | Literal["adaptive", "distributed"],
    seed: int,
    measures: Sequence[str],
    negatives: str,
    device: str,
    triples: int | None,
    report_to: Sequence[str],
    on_check: Callable[[pd.DataFrame], None] | None,
    settings: Settings,
) -> Finetuned:
    clocks = _Clocks()
    identity = encoder_identity(model)  # an encoder that cannot be used is told first
    encoder = open_encoder(model, device=device, seed=seed)

    with clocks.stage("collection", f"reading {source}"):
        collection, split, pseudo = open_split(source, triples or settings.triples, seed)
        sets = {name: len(qrels) for name, qrels in collection.qrels.items()}
        counts = ", ".join(f"{sets[name]:,} {name}" for name in ("train", "validation", "test"))
        say(f"{collection.name}: {len(collection.passages):,} passages; queries: {counts}. {split}")
        usable, *_ = [len(relevant(collection.qrels["test"], measure)) for measure in measures]
        evaluate(collection.qrels["test"], {}, measures)  # what cannot be computed is told now
        if count := count_self(collection.queries["test"], collection.passages):
            warnings.warn(
                f"{count:,} of the {len(collection.queries['test']):,} test queries are themselves"
                " passages, with the same id, and are ranked like others",
                stacklevel=2,
            )
    with clocks.stage("encoding", f"embedding the passages with {model}"):
        start = _start(encoder, identity, collection, settings.precision, work)
    with clocks.stage("ranking", "ranking with BM25 and with the encoder as it comes"):
        test, validating = collection.queries["test"], collection.queries["validation"]
        depth = max(100, *map(cutoff, measures))
        bm25 = BM25(collection.passages)
        runs = {"start": start.search(test, depth), "bm25": bm25.search(test, depth)}
        judged = {qid: runs["bm25"][qid] for qid in collection.qrels["test"]}
        bm25_facts = {
            "queries": len(judged),
            "without_hits": without_hits(judged),
            "bigram_passages": bm25.bigram_passages,
        }
        rankings = [system.search(validating, 100) for system in (bm25, start)]
        truncated = dict(start.truncated)
    with clocks.stage("triples", "choosing triples"):
        miner = bm25 if negatives == "bm25" else start
        chosen, facts = _triples(collection, miner, start, settings, triples, seed)
        if len(chosen) < 2:
            raise FinetuneError(
                f"{source} gives {len(chosen)} triples to train on; at least 2 are needed"
            )
        say(_told(facts, len(chosen)))
    batch_size = min(settings.batch_size, len(chosen))
    steps = len(chosen) // batch_size
    check_every = math.ceil(steps / settings.checks)
    # A triple has two passages, and a step takes three times as long as embedding alone.
    budget = round(settings.check_share * 6 * check_every * batch_size)
    validation = _Validation(
        collection, rankings, max(budget, settings.check_passages), settings.precision, seed
    )
    config = TrainingRun(
        encoder=model, weights=identity, pooling="", layers=None, trained_layers=None,
        query_length=start.query_length, passage_length=start.passage_length, loss="margin", target=target, in_batch=False,
        batch_size=batch_size, chunks=4 if packs(encoder) is None else 1, triples=len(chosen),
        learning_rate=settings.learning_rate, weight_decay=settings.weight_decay, decay=1.0, optimizer=settings.optimizer,
        precision=settings.precision, dropout=None, seed=seed, evaluate_every=check_every, patience=settings.patience,
        keep="best", selection=SELECTION, validation="validation", depth=_Validation.DEPTH, rerank_measures=(SELECTION,),
        collection=collection.fingerprint,
    )  # fmt: skip
    say(
        f"training: {steps:,} steps of {batch_size} triples, a check by {len(validation.queries):,} validation queries"
        f" on {len(validation.passages):,} passages every {check_every:,} steps"
    )
    rows, query_texts, passage_texts = _numbered(chosen, collection, prompts(encoder))
    checkpoints = (
        work
        / f"training-{_digest([config.run_id, rows.tolist(), validation.queries.ids, validation.passages.ids])}"
    )
    query_tokens = tokenize(encoder, query_texts, config.query_length)
    long = count_truncated(encoder, query_texts, query_tokens, config.query_length)
    count, total = truncated["queries"]
    start.truncated = {**truncated, "queries": (count + long, total + len(query_texts))}
    start.warn_truncated()
    truncated = start.truncated
    del start, miner, bm25, rankings  # the encoder changes from here on, and they take room
    result = train(
        config, encoder, Dataset.from_dict(dict(zip(COLUMNS, rows, strict=True))),
        query_tokens, tokenize(encoder, passage_texts, config.passage_length),
        validation, folder=checkpoints, checkpoint_every=check_every, device=device, report_to=report_to,
        run_name=output.name, on_check=_Told(steps, on_check),
    )  # fmt: skip
    clocks.seconds |= {"training": result.train_seconds, "validation": result.eval_seconds}
    gain, error = _gain(result)
    improved = bool(gain > settings.standard_errors * error)  # not if either is not a number
    with clocks.stage("ranking", "ranking the test queries"):
        if improved:
            retriever = DenseRetriever(
                encoder, collection.passages, precision=settings.precision, warn=False
            )
            runs["trained"] = retriever.search(test, depth)
        else:
            with warnings.catch_warnings(action="ignore"):  # they were shown at the start
                encoder = open_encoder(model, device=device, seed=seed)
            runs["trained"] = runs["start"]
        runs["hybrid"] = hybrid(runs["trained"], runs["bm25"], depth=depth)
    evaluations = {name: evaluate(collection.qrels["test"], runs[name], measures) for name in RUNS}
    withheld = 2 * bm25_facts["without_hits"] > bm25_facts["queries"]

    report: dict[str, Any] = {
        "model_dir": str(output),
        "collection": {
            "name": collection.name,
            "source": str(source),
            "fingerprint": collection.fingerprint,
            "passages": len(collection.passages),
            "sets": sets,
            "split": split,
            "pseudo": pseudo,
        },
        "encoder": {
            "name": model,
            "identity": identity,
            "parameters": sum(p.numel() for p in encoder.parameters()),
        },
        "target": target,
        "seed": seed,
        "triples": {"used": result.triples, "chosen": len(chosen), **facts},
        "truncated": {
            **{what: count for what, (count, _) in truncated.items()},
            "limit": config.query_length,
        },
        "settings": {
            **dataclasses.asdict(settings),
            "triples": triples or settings.triples,
            "batch_size": batch_size,
            "steps": steps,
            "check_every": check_every,
            "query_length": config.query_length,
            "passage_length": config.passage_length,
            "device": device,
            "depth": depth,
        },
        "bm25": bm25_facts,
        "kept": "trained" if improved else "start",
        "best_step": result.best_step,
        "stop_step": result.stop_step,
        "validation": {
            "queries": len(validation.queries),
            "passages": len(validation.passages),
            "start": {SELECTION: float(result.curve[SELECTION].iloc[0])},
            "best": dict(result.kept.mean),
            "difference": gain,
            "standard_error": None if math.isnan(error) else error,
        },
        "relevant_queries": usable,
        "measures": {name: evaluation.mean for name, evaluation in evaluations.items()},
        "comparisons": {
            f"{a} vs {b}": _compared(
                evaluations[a],
                evaluations[b],
                measures[0],
                "too few queries"
                if usable < 2
                else "withheld"
                if withheld and "start" not in (a, b)
                else "",
            )
            for a, b in _COMPARISONS
        },
    }
    report["verdict"] = verdict(report)
    report["seconds"] = {name: round(seconds, 1) for name, seconds in clocks.seconds.items()}
    report["versions"] = _versions()
    report = json.loads(json.dumps(report))  # what is read again is what was returned
    try:
        with whole_folder(output, same=lambda _: False) as partial:
            save_encoder(encoder, partial)
            _write(partial, report, result, runs, collection)
            if (checkpoints / _TENSORBOARD).is_dir():
                shutil.copytree(checkpoints / _TENSORBOARD, partial / _TENSORBOARD)
    except (OSError, SafetensorError) as problem:
        raise FinetuneError(
            f"{output} could not be written: {problem}; the work is kept in {work}, and the same call goes on from there"
        ) from problem
    say(report["verdict"])
    return Finetuned(output, report)


def verdict(report: Mapping[str, Any]) -> str:
    """What a report comes to, in words with numbers and 95 % intervals."""
    measure = next(iter(report["measures"]["start"]))
    compared = report["comparisons"]
    means = {name: values[measure] for name, values in report["measures"].items()}
    if report["kept"] == "start":
        v = report["validation"]
        best, start = (_number(v[key][SELECTION]) for key in ("best", "start"))
        why = (
            f"{SELECTION} {best} at the best check against {start} at the start, a difference of not more than"
            f" {report['settings']['standard_errors']:g} standard error"
            if report["best_step"]
            else f"no check has a better {SELECTION} than the start's {start}"
        )
        first = (
            f"Training did not help on the validation queries ({why}), so the original encoder was kept:"
            f" {measure} {_number(means['start'])} on the test queries"
        )
    else:
        first = _in_words(
            "the trained encoder", "the one it started from", compared["trained vs start"],
            means["trained"], means["start"],
        )  # fmt: skip
    hybrid = "its fusion with BM25"
    sentences = [
        first,
        _in_words("it", "BM25", compared["trained vs bm25"], means["trained"], means["bm25"]),
        _in_words(hybrid, "the encoder alone", compared["hybrid vs trained"], means["hybrid"], means["trained"]),
    ]  # fmt: skip
    if report["collection"]["pseudo"]:
        sentences.append(
            "All queries are pseudo-queries made from the passages: this says less than real queries would"
        )
    bm25 = report["bm25"]
    if bm25["without_hits"]:
        withheld = compared["trained vs bm25"]["verdict"] == "withheld"
        sentences.append(
            f"BM25 finds nothing for {bm25['without_hits']:,} of {bm25['queries']:,} test queries"
            + (", so nothing is concluded from it" if withheld else "")
        )
    if bm25["bigram_passages"]:
        sentences.append(
            f"{bm25['bigram_passages']:,} of {report['collection']['passages']:,} passages have text"
            " without spaces between words, which BM25 splits into character bigrams"
        )
    n = compared["trained vs start"]["n"]
    usable = report["relevant_queries"]
    of_them = f", of which {usable} with a relevant passage" if usable < n else ""
    sentences.append(f"Intervals are of 95 %, over {n} test queries{of_them}")
    return ". ".join(sentences) + "."


def _in_words(one: str, other: str, compared: Mapping[str, Any], a: float, b: float) -> str:
    """What `_compared` found of two systems, ``a`` and ``b`` their means."""
    numbers = f"{compared['measure']} {_number(a)} against {_number(b)}"
    if compared["ci"] is not None:
        low, high = (_number(x, sign=True) for x in compared["ci"])
        numbers += f", {_number(compared['difference'], sign=True)} [{low}, {high}]"
    words = {
        "better": f"{one} is better than {other}",
        "worse": f"{one} is worse than {other}",
        "equivalent": f"{one} is equivalent to {other} within ±{_number(compared['margin'] or 0)}",
        "undecided": f"whether {one} is better or worse than {other} is undecided",
        "too few queries": f"there are too few queries to compare {one} with {other}",
        "withheld": f"{one} is not compared with {other}",
    }[compared["verdict"]]
    return f"{words[0].upper()}{words[1:]}: {numbers}"


def _number(value: float, *, sign: bool = False) -> str:
    """Three digits, no zero before the point: .412, +.027, −.003."""
    text = f"{abs(value):.3f}".removeprefix("0")
    if value < 0 and float(text):
        return f"−{text}"
    return f"+{text}" if sign else text


def _check(
    target: float | str,
    measures: Sequence[str],
    negatives: str,
    device: str,
    triples: int | None,
    report_to: Sequence[str],
) -> list[str]:
    """What can be wrong before anything is read; the measures with their levels in their names."""
    try:
        MarginLoss(None, target=target)
    except ValueError as error:
        raise ArgumentError("target", str(error)) from None
    try:
        measures = [named(measure) for measure in measures]
        evaluate({"q": {"d": 1}}, {"q": {"d": 1.0}}, measures)
    except ValueError as error:
        raise ArgumentError("measures", str(error)) from None
    if negatives not in ("bm25", "encoder"):
        raise ArgumentError(
            "negatives", f"negatives is {negatives!r}; expected 'bm25' or 'encoder'"
        )
    if triples is not None and triples < 2:
        raise ArgumentError("triples", f"triples is {triples}; expected at least 2")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ArgumentError("device", f"device is {device!r}, but torch finds no GPU here")
    if unknown := set(report_to) - set(REPORTERS):
        raise ArgumentError(
            "report_to",
            f"cannot report to {min(unknown)!r}; expected any of {', '.join(REPORTERS)}",
        )
    check_reporters(report_to)
    return measures


class _Clocks:
    """Seconds of each stage of this process."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str, what: str) -> Iterator[None]:
        say(what)
        since = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - since


# ---- what is trained on --------------------------------------------------------------------------------------------


def open_split(source: str, count: int, seed: int) -> tuple[Collection, str, dict[str, Any] | None]:
    """A collection with the sets train, validation and test; how it was split; and of what its pseudo-queries are, if any.

    ``count``: pseudo-queries to train on, at most.
    """
    collection = open_collection(source)
    if any(len(queries) for queries in collection.queries.values()):
        return *split_queries(collection, seed=seed), None
    say(f"{collection.name} has no queries: making pseudo-queries")
    collection = pseudo_collection(
        collection.passages, collection.name, collection.sources, collection.titles, count=count, test=MOST_TEST,
        validation=MOST_VALIDATION, seed=seed,
    )  # fmt: skip
    say(about(collection))
    kinds = Counter(
        qid.partition(":")[0] for queries in collection.queries.values() for qid in queries.ids
    )
    return collection, "", {"queries": kinds.total(), "kinds": dict(sorted(kinds.items()))}


def _start(
    encoder: Any, identity: str, collection: Collection, precision: Precision, work: Path
) -> DenseRetriever:
    """The encoder as it comes, with the passages' embeddings: kept in ``work``, for the call after a kill."""
    key = _digest([identity, collection.fingerprint, precision])
    path = work / f"embeddings-{key}.npy"
    try:
        known = np.load(path)
    except (EOFError, OSError, ValueError):  # there is none, or the disk was full or lost power
        known = None
    retriever = DenseRetriever(
        encoder, collection.passages, precision=precision, embeddings=known, warn=False
    )
    if known is not None:
        retriever.passage_tokens(retriever.rows)  # counts those that are truncated
        return retriever
    with whole_file(path) as partial, partial.open("wb") as file:
        np.save(file, retriever.embeddings)
    return retriever


def _triples(
    collection: Collection,
    miner: BM25 | DenseRetriever,
    start: DenseRetriever,
    settings: Settings,
    asked: int | None,
    seed: int,
) -> tuple[list[Triple], dict[str, Any]]:
    """The triples to train on, and where they come from: the collection's own, else mined from the miner's candidates."""
    if len(collection.triples):
        triples, checked = _own_triples(collection, settings, asked, seed)
        return triples, {
            "available": len(collection.triples),
            "distinct": len(set(triples)),
            "negatives": "given",
            "left_out": dataclasses.asdict(checked),
            "guarded": {},
        }
    passages, queries = collection.passages, collection.queries["train"]
    qrels = _with_positive(collection.qrels["train"])
    pairs = sum(grade > 0 for judged in qrels.values() for grade in judged.values())
    count = asked or min(settings.triples, settings.passes * pairs)
    qids = sorted(qrels)
    if len(qids) > count:  # of the others no triple would be drawn
        qids = [qids[row] for row in seeded_order(len(qids), seed)[:count]]
    texts = Texts(qids, [queries[qid] for qid in qids])
    embeddings = dict(zip(qids, start.embed_queries(texts.texts), strict=True))

    def similarity(qid: str, docids: list[str]) -> np.ndarray:
        rows = [passages.row(docid) for docid in docids]
        scores: np.ndarray = start.embeddings[rows] @ embeddings[qid]
        return scores

    candidates, guarded = guard(
        miner.search(texts, settings.negatives_depth), {qid: qrels[qid] for qid in qids}, passages,
        similarity=similarity, seed=seed,
    )  # fmt: skip
    if not candidates:
        raise FinetuneError(f"{collection.name} has no triple to train on; {guarded.none_left()}")
    triples = mine_triples(
        {qid: qrels[qid] for qid in candidates}, candidates, passages, count=count, seed=seed
    )
    available = sum(
        len(hits) * sum(grade > 0 for grade in qrels[qid].values())
        for qid, hits in candidates.items()
    )
    source = "bm25" if isinstance(miner, BM25) else "encoder"
    return triples, {
        "available": available,
        "negatives": source,
        "guarded": dataclasses.asdict(guarded),
    }


def _with_positive(qrels: Qrels) -> Qrels:
    """The judgements of those queries that have a relevant passage."""
    return {qid: judged for qid, judged in qrels.items() if any(g > 0 for g in judged.values())}


def _told(facts: Mapping[str, Any], count: int) -> str:
    """A line on the triples."""
    if facts["negatives"] == "given":
        return (
            f"{count:,} triples to train on: {facts['distinct']:,} different ones of the"
            f" {facts['available']:,} that training queries have"
        )
    miner = "BM25's" if facts["negatives"] == "bm25" else "the encoder's"
    guarded = facts["guarded"]
    dropped = sum(guarded[k] for k in ("same_text", "near_duplicate", "too_similar"))
    return (
        f"{count:,} triples of {guarded['queries']:,} queries; negatives from {miner} candidates, of which"
        f" {dropped:,} of {guarded['candidates']:,} were left out because they may be relevant"
    )


def _own_triples(
    collection: Collection, settings: Settings, asked: int | None, seed: int
) -> tuple[list[Triple], Checked]:
    """A seeded choice of the collection's triples, checked; all of them several times if they are few."""
    own, wanted = collection.triples, asked or settings.triples
    drawn = (own[row] for row in seeded_order(len(own), seed))
    queries, qrels = collection.queries["train"], collection.qrels["train"]
    chosen, checked = check_triples(drawn, queries, qrels, collection.passages, wanted=wanted)
    if checked.reasons:
        said = f"triples of training queries left out: {checked.reasons}, of {checked.checked:,} checked"
        if not chosen:
            raise FinetuneError(f"{collection.name} has no triple to train on; {said}")
        warnings.warn(f"{collection.name}: {said}", stacklevel=2)
    if chosen and len(chosen) < wanted:
        pairs = len({triple[:2] for triple in chosen})
        wanted = asked or max(len(chosen), min(wanted, settings.passes * pairs))
        chosen = [chosen[i % len(chosen)] for i in range(wanted)]
    return chosen, checked


def _numbered(
    triples: Sequence[Triple], collection: Collection, prompts: tuple[str, str]
) -> tuple[np.ndarray, list[str], list[str]]:
    """Triples as rows (3, n) of the queries' and passages' texts that they have, each once; and these texts with prompts."""
    queries = {qid: row for row, qid in enumerate(dict.fromkeys(q for q, _, _ in triples))}
    docids = dict.fromkeys(docid for _, *pair in triples for docid in pair)
    passages = {docid: row for row, docid in enumerate(docids)}
    rows = np.array([(queries[q], passages[p], passages[n]) for q, p, n in triples], np.int32)
    return (
        rows.T,
        [prompts[0] + collection.queries["train"][qid] for qid in queries],
        [prompts[1] + collection.passages[docid] for docid in passages],
    )


# ---- what decides --------------------------------------------------------------------------------------------------


class _Validation:
    """`SELECTION` of a full ranking of a part of the collection, small enough to be embedded at every check.

    The part is all of it if that is cheap; else what BM25 and the encoder as it comes rank highest for any validation query,
    and all relevant passages: as deep as ``budget`` passages allow, and if not even the top 10 fit, for fewer queries. Every
    query ranks the whole part, so that neither system's candidates are the only ones that a trained encoder can find.
    """

    DEPTH = 10  # of the rankings, as deep as the measure looks
    _DEPTHS = (100, 50, 20, 10)
    _FEWEST = 20  # queries, whatever they cost: a standard error of fewer says little

    def __init__(
        self,
        collection: Collection,
        rankings: Sequence[Run],
        budget: int,
        precision: Precision,
        seed: int,
    ) -> None:
        passages, queries = collection.passages, collection.queries["validation"]
        qrels = _with_positive(collection.qrels["validation"])
        known = sorted(qrels)
        qids = [known[row] for row in seeded_order(len(known), seed)]

        def needed(qid: str, depth: int) -> set[str]:
            best = {docid for run in rankings for docid, _ in top(run.get(qid, {}), depth)}
            return best | {docid for docid, grade in qrels[qid].items() if grade > 0}

        docids: set[str] = set()
        if len(passages) <= budget:
            docids = set(passages.ids)
        else:
            for depth in self._DEPTHS:
                docids = set().union(*(needed(qid, depth) for qid in qids))
                if len(docids) <= budget:
                    break
            else:
                docids = set()
                chosen: list[str] = []
                for qid in qids:
                    more = docids | needed(qid, self._DEPTHS[-1])
                    if len(more) > budget and len(chosen) >= self._FEWEST:
                        break
                    docids, chosen = more, [*chosen, qid]
                qids = chosen
        self.precision = precision
        self.qrels = {qid: qrels[qid] for qid in sorted(qids)}
        self.queries = Texts(list(self.qrels), [queries[qid] for qid in self.qrels])
        ids = [docid for docid in passages.ids if docid in docids]
        self.passages = Texts(ids, [passages[docid] for docid in ids])

    def __call__(self, encoder: Any) -> Evaluation:
        """The encoder's measure, over all queries of ``qrels``."""
        retriever = DenseRetriever(encoder, self.passages, precision=self.precision, warn=False)
        return evaluate(self.qrels, retriever.search(self.queries, self.DEPTH), [SELECTION])


def _gain(result: TrainingResult) -> tuple[float, float]:
    """Mean and standard error of the best check's differences from step 0, over the validation queries."""
    values = result.checks[result.checks["measure"] == SELECTION].pivot(
        index="qid", columns="step", values="value"
    )
    differences = np.asarray(values[result.best_step] - values[0], np.float64)
    if len(differences) < 2:
        return float(differences.mean()), math.nan
    error = differences.std(ddof=1) / math.sqrt(len(differences))
    return float(differences.mean()), float(error)


def _compared(a: Evaluation, b: Evaluation, measure: str, untested: str = "") -> dict[str, Any]:
    """`compare` by a measure; without a test, and with ``untested`` as verdict, if that is given."""
    x, y = a.per_query[measure], b.per_query[measure]
    if untested := "too few queries" if len(x) < 2 else untested:
        return {
            "measure": measure, "n": len(x), "difference": a.mean[measure] - b.mean[measure], "ci": None, "p_t": None,
            "p_tost": None, "margin": None, "verdict": untested,
        }  # fmt: skip
    return {"measure": measure, **dataclasses.asdict(compare(x, y, however_small=True))}


class _Told:
    """Says each check's value and the time left, and hands the curve on."""

    def __init__(self, steps: int, on_check: Callable[[pd.DataFrame], None] | None) -> None:
        self.steps, self.on_check = steps, on_check
        self.since = time.monotonic()
        self.first: int | None = None

    def __call__(self, curve: pd.DataFrame) -> None:
        last = curve.iloc[-1]
        step, now = int(last["step"]), time.monotonic()
        text = f"step {step:,} of {self.steps:,}: validation {SELECTION} {_number(last[SELECTION])}"
        if self.first is None:
            self.first = step
        elif step > self.first:
            left = (now - self.since) / (step - self.first) * (self.steps - step)
            text += f" | {clock(now - self.since)} elapsed, at most about {clock(left)} left"
        say(text)
        if self.on_check is not None:
            self.on_check(curve)


# ---- what is left behind -------------------------------------------------------------------------------------------


def _write(
    folder: Path,
    report: Mapping[str, Any],
    result: TrainingResult,
    runs: Mapping[str, Run],
    collection: Collection,
) -> None:
    """All files but the encoder's."""
    (folder / "README.md").write_text(model_card(report), encoding="utf-8")
    text = json.dumps(report, indent=2, ensure_ascii=False) + "\n"
    (folder / "training.json").write_text(text, encoding="utf-8")
    result.curve.to_parquet(folder / "curve.parquet", index=False)
    result.targets.to_parquet(folder / "targets.parquet", index=False)
    for name, run in runs.items():
        tag = run_tag(name, run, report["settings"]["depth"], len(collection.passages))
        write_run(run, folder / "runs" / f"{name}.test.run.gz", tag)
    queries, qrels = collection.queries["test"], collection.qrels["test"]
    lines = [f"{qid}\t{' '.join(queries[qid].split())}\n" for qid in queries.ids]
    (folder / "queries.test.tsv").write_text("".join(lines), encoding="utf-8")
    (folder / "qrels.test.txt").write_text(qrels_text(qrels), encoding="utf-8")


def _versions() -> dict[str, str]:
    packages = ("torch", "transformers", "sentence-transformers", "datasets")
    return {
        "python": platform.python_version(),
        "adaptive-margins": __version__,
        **{package: importlib.metadata.version(package) for package in packages},
    }


def _digest(values: Any) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:16]
