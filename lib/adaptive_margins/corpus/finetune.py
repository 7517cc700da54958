"""Custom corpus → fine-tuned encoder, and whether it is better than the zero-shot encoder and BM25.

The loss has no hyperparameters to tune (Section 3), so the procedure is fixed: queries are split
unless the collection has query sets, negatives are mined if there are no triples, and validation
stops the training, chooses the loss if several are trained with, mixes the result with the
zero-shot encoder, and weighs the fusion with BM25. All measures are of a full, exact ranking of the
test queries.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import math
import platform
import shutil
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import pandas as pd
from datasets import Dataset
from safetensors import SafetensorError

from adaptive_margins import __version__
from adaptive_margins.corpus.choice import about_choice, about_training
from adaptive_margins.corpus.finetuned import (
    RUNS,
    Finetuned,
    about_collection,
    comparisons,
    not_worse,
    number,
    second_collection,
    verdict,
    write_results,
)
from adaptive_margins.corpus.prepare import (
    TRIPLE_COST,
    Prepared,
    SplitCollection,
    Stages,
    batches,
    check_test_set,
    open_parts,
    prepare,
)
from adaptive_margins.corpus.settings import (
    FinetuneError,
    Job,
    OnCheck,
    Settings,
    Target,
    loss_name,
)
from adaptive_margins.corpus.validation import ALPHAS, DEPTH, SELECTION, best_merge, gain, learned
from adaptive_margins.data.stored import COLUMNS
from adaptive_margins.data.trec import Run, truncated
from adaptive_margins.distributed import is_first, shared, wait
from adaptive_margins.encoder.load import encoder_identity, open_encoder, options_of, save_encoder
from adaptive_margins.encoder.options import EncoderOptions
from adaptive_margins.encoder.speed import default_chunks, tokens_within
from adaptive_margins.evaluation.measures import Evaluation, evaluate
from adaptive_margins.files import atomic_folder, digest, read_object, working_folder, write_text
from adaptive_margins.progress import bar, clock, say
from adaptive_margins.retrieval.dense import FUSED, DenseRetriever, hybrid
from adaptive_margins.retrieval.embedding_cache import cache_folder
from adaptive_margins.runs import TrainingRun
from adaptive_margins.training import TrainingResult, train

_TENSORBOARD = "tensorboard"
_FOLD = ("target", "best_step", "merge", "hybrid", "relevant_queries", "measures")


def finetune(
    source: str,
    output: Path,
    *,
    model: str = "minilm",
    target: Target = "distributed",
    seed: int = 1,
    measures: Sequence[str] = (SELECTION, "R(rel=1)@100"),
    negatives: Literal["bm25", "encoder"] = "bm25",
    device: str | None = None,
    triples: int | None = None,
    report_to: Sequence[str] = (),
    on_check: OnCheck | None = None,
    settings: Settings | None = None,
    options: EncoderOptions | None = None,
    folds: int | None = None,
    also: str | None = None,
    cache: bool = True,
) -> Finetuned:
    """Fine-tune an encoder on a collection, and compare it with the zero-shot encoder and BM25.

    Intermediate files are in ``OUTPUT.work`` next to the output: the same call resumes a killed
    one. The output appears once it is complete: the encoder as a Sentence Transformers folder
    with a model card, ``training.json`` (the report), ``curve.parquet``, ``targets.parquet``,
    ``runs/NAME.test.run.gz`` of `RUNS`, ``qrels.test.txt`` and ``queries.test.tsv``. Deterministic
    for a seed on one machine. Stages, evaluations and the time left go to stderr.

    Args:
        source: a folder, "pydocs" or an ir_datasets id (`open_collection`).
        output: a folder that does not exist, or is empty.
        model: the encoder to start from (`open_encoder`).
        target: ε, "adaptive" or "distributed" (Section 3); "softmax"
            (MultipleNegativesRankingLoss); or "all": all of `settings.ALL`, of which the one that
            is best on validation is kept.
        seed: of splitting, mining, the order of triples, and dropout; 0 to 2³² − 1.
        measures: on the test queries, in ir_measures' notation; the first one is compared.
        negatives: the retriever that negatives are mined with, if there are no triples.
        device: as torch calls it; None takes a GPU if there is one.
        triples: to train on, at least 2; None leaves it to ``settings``.
        report_to: see `train`.
        on_check: gets the learning curve so far, after each evaluation.
        settings: in the place of the device's defaults.
        options: prompts, dimensions and length of the encoder, saved with it.
        folds: number of folds of a cross-validation, at least 3: each query of the only set is
            tested once, by an encoder that was neither trained nor validated on it. The encoder in
            the output is trained and validated on all of them.
        also: a second collection, to test whether the trained encoder became worse there.
        cache: whether embeddings are looked up, and left, in the `cache_folder`.

    Raises:
        ArgumentError: a value is not one of the above.
        FinetuneError: there are too few triples, or the output cannot be written.
        WriteError: the output is not empty, or another process writes to it.
        DataError, EncoderError, TrainingError: the collection, the encoder, or a step of training
            is at fault.
    """
    job = Job.of(**locals())
    if is_first():
        with working_folder(job.output) as work:
            _finetune(job, work)
            shared(None)  # the end of `_follow`
    else:
        _follow(job)
    wait()
    return Finetuned.load(job.output)


def _follow(job: Job) -> None:
    """Train with the first process, which prepares and writes."""
    nothing: Any = None
    while task := shared(nothing):
        _train(job, *task)


_Task = tuple[TrainingRun, Prepared, Path, Evaluation]


def _finetune(job: Job, work: Path, fold: SplitCollection | None = None, left: int = 1) -> None:
    """Prepare, train, rank, compare and write, or do so for a fold, ``left`` of which are left."""
    stages = Stages()
    identity = encoder_identity(job.model)  # an encoder that cannot be used is reported first
    encoder = open_encoder(job.model, job.options, device=job.device, seed=job.seed)
    with stages("collection", f"reading {job.source}"):
        *folds, data = [fold] if fold else open_parts(job)
        usable = check_test_set(data, job.measures)
    if job.also:
        with stages("forgetting", f"ranking {job.also} with the zero-shot encoder"):
            second, about = second_collection(job)
            before = second(encoder)
    tested = [_fold(job, work, identity, part, len(folds) + 1 - i) for i, part in enumerate(folds)]
    prepared = prepare(job, work, data, encoder, stages)
    given = (data, encoder, identity, prepared)
    config, folder, result, losses = _trained(job, work, *given, stages, left)
    with stages("validation", "merging the trained encoder with the original one"):
        merge = best_merge(encoder, result, prepared.validation, job.settings.standard_errors)
    with stages("ranking", "ranking the test queries"):
        runs, fusion = _rank(job, data, encoder if merge["alpha"] else None, prepared)
    for name in ("trained", "hybrid") if tested else ():
        runs[name] = {qid: hits for done in tested for qid, hits in done.run(name).items()}
    qrels = data.collection.qrels["test"]
    evaluations = {name: evaluate(qrels, runs[name], job.measures) for name in RUNS}
    report: dict[str, Any] = {
        **_about_inputs(job, data, identity, encoder),
        **_about_training(job, config, prepared, result, merge),
        "hybrid": fusion,
        "relevant_queries": usable,
        "measures": {name: evaluation.mean for name, evaluation in evaluations.items()},
        "comparisons": comparisons(evaluations, job.measures[0], usable, prepared.bm25),
    }
    if tested:
        report["folds"] = [{name: done.report[name] for name in _FOLD} for done in tested]
        stages.seconds["folds"] = sum(sum(done.report["seconds"].values()) for done in tested)
    if len(losses) > 1:
        report["choice"] = about_choice(losses, report, qrels, runs)
    if job.also:
        with stages("forgetting", f"ranking {job.also} with the encoder that is kept"):
            report["also"] = {**about, **not_worse(second(encoder), before)}
    report["verdict"] = verdict(report)
    report["seconds"] = {name: round(seconds, 1) for name, seconds in stages.seconds.items()}
    report["versions"] = _versions()
    with _complete(job, work) as partial:
        save_encoder(encoder, partial)
        write_results(partial, report, result, runs, data.collection)
        if (folder / _TENSORBOARD).is_dir():
            shutil.copytree(folder / _TENSORBOARD, partial / _TENSORBOARD)
    say(report["verdict"])


def _fold(job: Job, work: Path, identity: str, fold: SplitCollection, left: int) -> Finetuned:
    """Train and test for a fold; the result is in ``work``, where a resumed call finds it."""
    say(f"{left - 1} of {job.folds} folds are left")
    part = dataclasses.replace(job, output=work, on_check=None, folds=None, also=None)
    output = work / f"fold-{digest([fold.collection.fingerprint, identity, repr(part)])}"
    if not (output / "training.json").is_file():
        _finetune(dataclasses.replace(part, output=output, on_check=job.on_check), work, fold, left)
        for finished in work.glob("training-*"):  # hundreds of megabytes each
            shutil.rmtree(finished, ignore_errors=True)
    return Finetuned.load(output)


# ---- training and ranking ---------------------------------------------------------------------


def _trained(
    job: Job,
    work: Path,
    data: SplitCollection,
    encoder: Any,
    identity: str,
    prepared: Prepared,
    stages: Stages,
    left: int,
) -> tuple[TrainingRun, Path, TrainingResult, list[dict[str, Any]]]:
    """Train with each loss; the first best one on validation, its folder, and the rows of all.

    Of a loss that was beaten no checkpoints are kept, and it is not trained again.
    """
    with stages("validation", "evaluating the zero-shot encoder on the validation queries"):
        start = prepared.validation(encoder)
    configs = [_config(job, target, data, encoder, identity, prepared) for target in job.targets]
    seconds, count = stages.seconds["validation"], len(configs)
    passage = seconds / len(prepared.validation.passages)
    first = configs[0]
    evaluations = first.steps / first.evaluate_every
    each = TRIPLE_COST * passage * first.triples + seconds * evaluations
    rest = seconds * len(ALPHAS) + passage * len(data.collection.passages)
    total = clock(left * (count * each + rest))
    say(f"{left * count} × training, with validation and ranking: about {total} at most")
    rows: list[dict[str, Any]] = []
    best: tuple[float, _Task, TrainingResult | None] | None = None
    for config in configs:
        name = prepared.digest(config)
        task: _Task = (config, prepared, work / f"training-{name}", start)
        path, result = work / f"loss-{name}.json", None
        if not (row := read_object(path)):
            result = _train(job, *shared(task))
            row = about_training(_target(config), result)
            write_text(path, json.dumps(row))
        for stage, seconds in row["seconds"].items():
            stages.seconds[stage] = stages.seconds.get(stage, 0.0) + seconds
        rows.append(row)
        ahead = best is None or row["value"] > best[0]
        if best is not None:
            shutil.rmtree((best[1] if ahead else task)[2], ignore_errors=True)
        if ahead:
            best = row["value"], task, result
    assert best is not None
    _, task, result = best
    return task[0], task[2], result or _train(job, *shared(task)), rows


def _target(config: TrainingRun) -> Target:
    return "softmax" if config.target is None else config.target


def _config(
    job: Job, target: Any, data: SplitCollection, encoder: Any, identity: str, prepared: Prepared
) -> TrainingRun:
    settings, softmax = job.settings, target == "softmax"
    batch_size, every = batches(settings, prepared.count)
    query_length, passage_length = prepared.lengths
    return TrainingRun(
        encoder=job.model,
        weights=digest([identity, options_of(encoder)]),  # a run has no prompts or dimensions
        pooling="",  # it is part of the weights' folder
        layers=None,
        trained_layers=None,
        query_length=query_length,
        passage_length=passage_length,
        precision=settings.precision,
        loss="softmax" if softmax else "margin",
        target=None if softmax else target,
        in_batch=softmax,
        batch_size=batch_size,
        chunks=default_chunks(encoder),
        triples=prepared.count,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        decay=1.0,
        optimizer=settings.optimizer,
        dropout=None,
        seed=job.seed,
        evaluate_every=every,
        patience=settings.patience,
        keep="best",
        selection=SELECTION,
        validation="validation",
        depth=DEPTH,
        rerank_measures=(SELECTION,),
        collection=data.collection.fingerprint,
    )


def _train(
    job: Job, config: TrainingRun, prepared: Prepared, folder: Path, start: Evaluation
) -> TrainingResult:
    """Train the zero-shot encoder, whose validation is known."""
    validation, every = prepared.validation, config.evaluate_every
    name = loss_name(_target(config))
    say(
        f"training, {name}: {config.steps:,} steps of {config.batch_size} triples, an evaluation by"
        f" {len(validation.queries):,} validation queries on {len(validation.passages):,} passages"
        f" every {every:,} steps"
    )
    seen: list[int] = []
    with bar("training", total=config.steps, unit="steps") as steps:

        def on_check(curve: pd.DataFrame) -> None:
            last = curve.iloc[-1]
            step = int(last["step"])
            if not seen:  # a resumed run has done these steps before
                steps.initial = step
            seen.append(step)
            steps.update(step - steps.n)
            value = number(last[SELECTION])
            say(f"step {step:,} of {config.steps:,}: validation {SELECTION} {value}")
            if job.on_check is not None:
                job.on_check(curve)

        with warnings.catch_warnings(action="ignore"):  # they were shown at the start
            encoder = open_encoder(job.model, job.options, device=job.device, seed=job.seed)
        return train(
            config,
            encoder,
            Dataset.from_dict(dict(zip(COLUMNS, prepared.rows, strict=True))),
            prepared.queries,
            prepared.passages,
            validation,
            initial=start,
            folder=folder,
            checkpoint_every=every,
            device=job.device,
            report_to=job.report_to,
            run_name=job.output.name if len(job.targets) == 1 else f"{job.output.name}, {name}",
            on_check=on_check,
            names=prepared.names,
            most=tokens_within(encoder, job.settings.memory, prepared.passages.lengths.max()),
        )


def _rank(
    job: Job, data: SplitCollection, encoder: Any | None, prepared: Prepared
) -> tuple[dict[str, Run], dict[str, Any]]:
    """All of `RUNS`, and how the last one was fused; without an encoder, by the zero-shot one."""
    validating, runs = prepared.validating, {**prepared.runs, "trained": prepared.runs["start"]}
    if encoder is not None:
        passages, precision = data.collection.passages, job.settings.precision
        retriever = DenseRetriever(
            encoder, passages, precision=precision, cache=cache_folder(job.cache), warn=False
        )
        queries, deep = data.collection.queries, max(job.depth, FUSED)
        runs["trained"] = retriever.search(queries["test"], deep)
        validating = {**validating, "dense": retriever.search(queries["validation"], deep)}
    fusion = learned(validating, data.collection.qrels["validation"])
    fused = hybrid(runs["trained"], runs["bm25"], job.depth, fusion["weight"])
    runs = {name: truncated(run, job.depth) for name, run in runs.items()}
    return {**runs, "hybrid": fused}, fusion


# ---- report -----------------------------------------------------------------------------------


def _about_inputs(job: Job, data: SplitCollection, identity: str, encoder: Any) -> dict[str, Any]:
    size = sum(parameter.numel() for parameter in encoder.parameters())
    return {
        "model_dir": str(job.output),
        "collection": {
            **about_collection(data.collection, str(job.source)),
            "sets": {name: len(qrels) for name, qrels in data.collection.qrels.items()},
            "split": data.split,
            "pseudo": data.pseudo,
        },
        "encoder": {"name": job.model, "identity": identity, "parameters": size},
        "options": options_of(encoder),
    }


def _about_training(
    job: Job, config: TrainingRun, prepared: Prepared, result: TrainingResult, merge: dict[str, Any]
) -> dict[str, Any]:
    difference, error = gain(result.checks, result.best_step)
    return {
        "target": _target(config),
        "seed": job.seed,
        "triples": {"used": result.triples, "chosen": prepared.count, **prepared.facts},
        "truncated": {**prepared.truncated, "limit": config.query_length},
        "settings": {
            **dataclasses.asdict(job.settings),
            "triples": job.triples or job.settings.triples,
            "batch_size": config.batch_size,
            "steps": config.steps,
            "check_every": config.evaluate_every,
            "query_length": config.query_length,
            "passage_length": config.passage_length,
            "device": job.device,
            "depth": job.depth,
        },
        "bm25": prepared.bm25,
        "kept": "trained" if merge["alpha"] else "start",
        "best_step": result.best_step,
        "stop_step": result.stop_step,
        "validation": {
            "queries": len(prepared.validation.queries),
            "passages": len(prepared.validation.passages),
            "start": {SELECTION: float(result.curve[SELECTION].iloc[0])},
            "best": dict(result.kept.mean),
            "difference": difference,
            "standard_error": None if math.isnan(error) else error,
        },
        "merge": merge,
    }


def _versions() -> dict[str, str]:
    packages = ("torch", "transformers", "sentence-transformers", "datasets")
    return {
        "python": platform.python_version(),
        "adaptive-margins": __version__,
        **{package: importlib.metadata.version(package) for package in packages},
    }


@contextmanager
def _complete(job: Job, work: Path) -> Iterator[Path]:
    """The output folder, written atomically."""
    try:
        with atomic_folder(job.output, same=lambda _: False) as partial:
            yield partial
    except (OSError, SafetensorError) as problem:
        raise FinetuneError(
            f"{job.output} could not be written: {problem}; intermediate files are in {work}, and"
            " the same call resumes from them"
        ) from problem
