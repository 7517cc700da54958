"""TrainingRun → trained encoder and learning curve, with Sentence Transformers' trainer."""

from __future__ import annotations

import functools
import importlib.util
import math
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import psutil
import torch
from datasets import Dataset
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.evaluation import SentenceEvaluator
from torch import Tensor, nn
from torch.utils.data import BatchSampler
from transformers import PrinterCallback, TrainerCallback, TrainerControl, TrainerState
from transformers.integrations import TensorBoardCallback, get_reporting_integration_callbacks

from adaptive_margins.checkpoints import COMPLETE, Progress, newest_checkpoint, to_disk
from adaptive_margins.data.stored import seeded_order
from adaptive_margins.distributed import is_first, processes, shared, wait
from adaptive_margins.encoder.load import quiet
from adaptive_margins.encoder.speed import batcher
from adaptive_margins.encoder.tokens import Tokens
from adaptive_margins.errors import ArgumentError
from adaptive_margins.errors import TrainingError as TrainingError
from adaptive_margins.evaluation.measures import Evaluation
from adaptive_margins.files import write_checksums
from adaptive_margins.processes import ending
from adaptive_margins.runs import TrainingRun
from adaptive_margins.teachers import InBatchTeacher
from adaptive_margins.training_step import (
    RecordedLoss,
    TripleCollator,
    check_triples,
    interruptible,
    not_finite,
)

REPORTERS = ("tensorboard", "wandb", "mlflow", "trackio")
"""Integrations of the trainer that `train` reports to; each is also the name of its package."""


@dataclass(frozen=True)
class TrainingResult:
    """The results of a training; the model is left in the state of the selected checkpoint.

    Attributes:
        curve: one row per evaluation, step 0 included: step, triples, seconds of training,
            measures.
        checks: the same per query: step, qid, measure, value.
        targets: one row per step: step, mean, min, max of raw φ(d⁺, d⁻) over the batch.
        kept: the evaluation of the selected checkpoint: the object that the evaluator returned,
            unless that was before an interruption.
        kept_step, best_step, stop_step: the selected step, the best one, and the one at which
            training stopped; or would have stopped (``stop_early`` of the configuration).
        triples: trained on until ``stop_step``.
        train_seconds: of training until ``stop_step``, without evaluations.
        eval_seconds: of all evaluations.
        peak_bytes: largest memory after a step: of the GPU that trains, else of the process.
        states: "selected" and "last" → the trained parameters after that step, on the CPU.
    """

    curve: pd.DataFrame
    checks: pd.DataFrame
    targets: pd.DataFrame
    kept: Evaluation
    kept_step: int
    best_step: int
    stop_step: int
    triples: int
    train_seconds: float
    eval_seconds: float
    peak_bytes: int
    states: dict[str, dict[str, Tensor]]


@dataclass(eq=False)
class _Callback(TrainerCallback):
    """Evaluation, the best checkpoint (step 0 included), early stopping, and two timers."""

    config: TrainingRun
    model: nn.Module
    evaluator: Callable[[Any], Evaluation]
    loss: RecordedLoss
    progress: Progress
    checkpoint_every: int
    on_check: Callable[[pd.DataFrame], None] | None
    failure: Callable[[int, str], TrainingError]  # of a step
    log: Callable[[dict[str, float]], None] | None = None  # to the reporters, if any
    best_state: dict[str, Tensor] = field(default_factory=dict)
    best: Evaluation | None = None
    last: Evaluation | None = None
    evaluated: Evaluation | None = None  # in the first process, until it is recorded
    _since: float = field(default_factory=time.perf_counter)

    def timer(self, name: Literal["train_seconds", "eval_seconds"] | None) -> None:
        """Add the time since the last call to a timer; None, as for checkpoints, to neither."""
        now = time.perf_counter()
        if name is not None:
            setattr(self.progress, name, getattr(self.progress, name) + now - self._since)
        self._since = now

    def record(self, step: int, evaluation: Evaluation) -> None:
        """Record an evaluation of the model, and remember it if it is the best.

        Of equal ones, the first is the best. Only the best and the last evaluation are referred to:
        an evaluator may return large ones, with their rankings.
        """
        progress, patience = self.progress, self.config.patience
        value = evaluation.mean[self.config.selection]
        gained = not progress.evaluations or value > progress.best_value
        if not progress.stopped_step:
            progress.without_gain = 0 if gained else progress.without_gain + 1
            if gained:
                progress.best_step, progress.best_value = step, value
                self.best = evaluation
                if self.config.keep == "best":
                    self.best_state = _copied(self.model)
            if patience and progress.without_gain >= patience:
                progress.stopped_step, progress.stopped_seconds = step, progress.train_seconds
        progress.evaluations.append(
            {
                "step": step,
                "triples": step * self.config.batch_size,
                "seconds": progress.train_seconds,
                "mean": evaluation.mean,
                "per_query": evaluation.per_query,
            }
        )
        self.last = evaluation

    def read_records(self) -> None:
        """Fetch the records of the steps from the device. Raises TrainingError for a bad loss."""
        if not self.loss.recorded:
            return
        for loss, *similarity in torch.stack(self.loss.recorded).tolist():
            self.progress.similarities.append(similarity)
            if not math.isfinite(loss):
                raise self.failure(len(self.progress.similarities), f"the loss is {loss}")
        self.loss.recorded.clear()
        # The next loss would be the first to show it, after a checkpoint.
        if not all(parameter.isfinite().all() for parameter in trainable(self.model).values()):
            raise self.failure(len(self.progress.similarities), "a parameter is not finite")

    def _report(self) -> None:
        if self.on_check is not None:
            self.on_check(self.progress.curve())
        self.timer(None)

    def on_train_begin(
        self, args: Any, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if self.log is not None and self.last is not None:  # step 0; a resumed run has logged it
            self.log({f"eval_{name}": value for name, value in self.last.mean.items()})
        self._report()

    def on_step_end(
        self, args: Any, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        step, last = state.global_step, state.global_step == self.config.steps
        evaluate_every, save_every = self.config.evaluate_every, self.checkpoint_every
        control.should_evaluate = last or (evaluate_every > 0 and step % evaluate_every == 0)
        control.should_save = not last and save_every > 0 and step % save_every == 0
        if args.device.type == "cuda":
            memory = torch.cuda.max_memory_allocated()
        else:
            memory = psutil.Process().memory_info().rss
        self.progress.peak_bytes = max(self.progress.peak_bytes, memory)
        due = control.should_evaluate or control.should_save
        if (due or processes() == 1) and shared(ending.asked):
            control.should_save, control.should_training_stop = not last, True
        if due or control.should_save:
            self.read_records()
        self.timer("train_seconds")
        return control

    def on_evaluate(
        self, args: Any, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        self.record(state.global_step, _from_first(self.evaluated))
        self.evaluated = None
        self.timer("eval_seconds")
        self._report()
        if self.config.stop_early and self.progress.stopped_step:
            control.should_training_stop = True
            control.should_save = False  # a checkpoint here would be resumed past the stop
        return control

    def on_save(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.timer(None)


def _from_first(evaluation: Evaluation | None) -> Evaluation:
    """The first process's evaluation: itself there, its measures in the others."""
    measures = shared((evaluation.mean, evaluation.per_query) if evaluation else ({}, {}))
    return evaluation or Evaluation(*measures)


class _Evaluator(SentenceEvaluator):
    """The trainer's view of the evaluation; it calls this in the first process."""

    def __init__(self, callback: _Callback) -> None:
        super().__init__()
        self.callback = callback

    def __call__(
        self, model: Any, output_path: str | None = None, epoch: float = -1, steps: int = -1
    ) -> dict[str, float]:
        self.callback.evaluated = self.callback.evaluator(model)
        return dict(self.callback.evaluated.mean)


class _Trainer(SentenceTransformerTrainer):
    """Sentence Transformers' trainer with decay per step and small checkpoints.

    A checkpoint has the trained parameters, those of the best step, and the state of the run.
    """

    callback: _Callback

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> Any:
        if self.lr_scheduler is None:  # type: ignore[has-type]
            decay = self.callback.config.decay
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
                optimizer or self.optimizer, lambda step: decay**step
            )
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def add_model_card_callback(self, default_args_dict: dict[str, Any]) -> None:
        """A run has no model card: the rows here are numbers, not texts."""

    def collect_features(self, inputs: dict[str, Any]) -> tuple[list[dict[str, Tensor]], Tensor]:
        """The arguments of `RecordedLoss`: the chunks, and the places of the columns' texts."""
        return inputs["chunks"], inputs["rows"]

    def _save(
        self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None
    ) -> None:
        if not is_first():  # transformers 5.23 calls this in every process
            return
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        states = {"model": _copied(self.model), "best": self.callback.best_state}
        for name, state in states.items():
            if state:
                save_file(state, folder / f"{name}.safetensors")
        self.callback.progress.save(folder, self.state.global_step)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        self.state.log_history.clear()  # it would grow with the steps; the reporters have it
        try:
            super()._save_checkpoint(model, trial)
            wait()  # for the others' random states
            if is_first():
                to_disk(folder.iterdir())  # all of it, before the marker
                write_checksums(folder, COMPLETE, **self.callback.progress.checksums)
        except (OSError, SafetensorError, RuntimeError) as error:  # torch.save: the last
            if is_first():  # another's may be that the first has marked it, and gone
                shutil.rmtree(folder, ignore_errors=True)
            raise TrainingError(
                f"run {self.callback.config.run_id}: {folder} could not be written: {error}"
            ) from error

    def _load_from_checkpoint(self, checkpoint_path: str, model: nn.Module | None = None) -> None:
        folder = Path(checkpoint_path)
        self.model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
        best = folder / "best.safetensors"
        self.callback.best_state = load_file(best) if best.is_file() else {}


def trainable(model: nn.Module) -> dict[str, Tensor]:
    """The parameters that training changes, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _copied(model: nn.Module) -> dict[str, Tensor]:
    options: dict[str, Any] = {"copy": True, "memory_format": torch.contiguous_format}
    return {name: p.detach().to("cpu", **options) for name, p in trainable(model).items()}


def train(
    config: TrainingRun,
    model: Any,
    triples: Dataset,
    queries: Tokens,
    passages: Tokens,
    evaluator: Callable[[Any], Evaluation],
    *,
    initial: Evaluation | None = None,
    folder: Path,
    checkpoint_every: int = 0,
    device: str = "cpu",
    report_to: Sequence[str] = (),
    run_name: str = "",
    on_check: Callable[[pd.DataFrame], None] | None = None,
    order: np.ndarray | None = None,
    in_batch: InBatchTeacher | None = None,
    names: tuple[Sequence[Any], Sequence[Any]] = (range(2**40), range(2**40)),
    most: int = 2**40,
) -> TrainingResult:
    """Train ``model`` in place; a call that was interrupted is resumed.

    Without ``order``, that of the triples depends on their number and ``config.seed`` alone: all
    runs of a grid see the same one, and shorter runs the beginning of it.

    Args:
        config: the run.
        model: a SentenceTransformer; changed.
        triples: columns query, positive and negative: rows of ``queries`` and ``passages``; for
            MarginMSE also `teachers.SCORES`.
        queries, passages: tokenised texts.
        evaluator: returns the validation measures of a model.
        initial: its result at step 0, if that is known.
        folder: for checkpoints; read if there are any.
        checkpoint_every: steps between checkpoints; 0 for none.
        device: as torch names it.
        report_to: any of `REPORTERS`: they get loss and learning rate every few steps, and all
            evaluations. Each is configured by its environment variables, which also decide whether
            anything leaves the machine; TensorBoard's files go to $TENSORBOARD_LOGGING_DIR, else to
            ``folder / "tensorboard"``.
        run_name: the name that the reporters show.
        on_check: called with the learning curve so far, at the beginning and after each evaluation.
        order: numbers of triples, batch by batch (`topics.sampled_order`).
        in_batch: the teacher of pairs across a batch, for MarginMSE in-batch.
        names: ids of queries and of passages, for errors; by default their rows.
        most: tokens whose activations are in memory; a step of more computes them again.

    Raises:
        ArgumentError: a reporter is unknown.
        TrainingError: there are fewer triples than one pass needs, MarginMSE has no scores, loss or
            parameters are not finite, memory is too small, or a reporter cannot be used.
    """
    reporters = _reporters(report_to, folder)
    order = seeded_order(len(triples), config.seed) if order is None else order
    check_triples(config, triples, order, in_batch)
    callback = _Callback(
        config,
        model,
        evaluator,
        RecordedLoss(model, config, in_batch),
        Progress(folder / "progress"),
        checkpoint_every,
        on_check,
        failure=functools.partial(not_finite, config, triples, order, names),
    )
    checkpoint = shared(newest_checkpoint(folder) if is_first() else None)
    callback.progress.load(checkpoint)
    if checkpoint is None:
        callback.timer(None)
        callback.record(0, _from_first((initial or evaluator(model)) if is_first() else None))
        callback.timer("eval_seconds")
    arguments = _arguments(
        config, folder, device, order, reporting=bool(reporters), run_name=run_name
    )
    if arguments.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()  # of earlier runs in this process
    trainer = _Trainer(
        model=model,
        args=arguments,
        train_dataset=triples,
        loss=callback.loss,
        evaluator=_Evaluator(callback),
        data_collator=TripleCollator(queries, passages, config.chunks, batcher(model), most),
        callbacks=[*reporters, callback],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.callback = callback
    callback.log = trainer.log if reporters else None
    with quiet(), interruptible(config, checkpoint):
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    return _result(callback, callback.progress.stopped_step or trainer.state.global_step)


def _arguments(
    config: TrainingRun,
    folder: Path,
    device: str,
    order: np.ndarray,
    *,
    reporting: bool,
    run_name: str,
) -> SentenceTransformerTrainingArguments:
    def batches(dataset: Dataset, batch_size: int, **_: Any) -> BatchSampler:
        used = order[: config.steps * config.batch_size]
        return BatchSampler(used, batch_size, drop_last=True)  # each process takes its share

    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(folder),
        max_steps=config.steps,
        per_device_train_batch_size=config.batch_size // processes(),
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        optim=config.optimizer,
        dataloader_pin_memory=device != "cpu",
        max_grad_norm=0.0,  # the paper names no clipping, and the released code has none
        bf16=config.precision == "bf16",
        fp16=config.precision == "fp16",
        seed=config.seed,
        batch_sampler=batches,
        dataloader_drop_last=processes() > 1,  # the trainer would set it, and say so
        logging_strategy="steps" if reporting else "no",
        logging_steps=max(1, min(10, config.steps // 20)) if reporting else 500,
        logging_nan_inf_filter=False,  # it reads the loss of every step; _Callback does so rarely
        eval_strategy="no",  # _Callback decides
        save_strategy="no",
        save_total_limit=2,  # the older one is removed before the newer one is marked
        report_to="none",  # the reporters are among the callbacks
        run_name=run_name or None,
        disable_tqdm=True,
        use_cpu=device == "cpu",
    )
    # With several GPUs the trainer would split batches over them, each as large as one was to be,
    # and it would take the first of them, whichever is named.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    if device.startswith("cuda:") and processes() == 1:
        arguments._setup_devices = torch.device(device)
        torch.cuda.set_device(device)
    return arguments


def _result(callback: _Callback, stop_step: int) -> TrainingResult:
    """Leave the model in the state of the selected checkpoint, and collect the results."""
    config, progress = callback.config, callback.progress
    kept_step, kept = stop_step, callback.last
    last = selected = _copied(callback.model)
    if config.keep == "best":
        selected = callback.best_state
        callback.model.load_state_dict(selected, strict=False)
        kept_step, kept = progress.best_step, callback.best
    if kept is None:  # it was before the checkpoint that this call was resumed from
        values = next(e for e in progress.evaluations if e["step"] == kept_step)
        kept = Evaluation(values["mean"], values["per_query"])
    return TrainingResult(
        curve=progress.curve(),
        checks=progress.checks(),
        targets=progress.targets(),
        kept=kept,
        kept_step=kept_step,
        best_step=progress.best_step,
        stop_step=stop_step,
        triples=stop_step * config.batch_size,
        train_seconds=progress.stopped_seconds or progress.train_seconds,
        eval_seconds=progress.eval_seconds,
        peak_bytes=progress.peak_bytes,
        states={"selected": selected, "last": last},
    )


def check_reporters(names: Sequence[str]) -> None:
    """ArgumentError for a name that is none of `REPORTERS`; TrainingError without its package."""
    for name in names:
        if name not in REPORTERS:
            expected = f"expected any of {', '.join(REPORTERS)}"
            raise ArgumentError("report_to", f"cannot report to {name!r}; {expected}")
        if importlib.util.find_spec(name) is None:
            raise TrainingError(f"to report to {name!r} its package is needed: pip install {name}")


def _reporters(names: Sequence[str], folder: Path) -> list[TrainerCallback]:
    """The trainer's integrations; TrainingError for one that is unknown or cannot be used."""
    check_reporters(names)
    reporters = []
    for name in dict.fromkeys(names):
        try:
            (kind,) = get_reporting_integration_callbacks([name])
            reporters.append(kind())
        except Exception as error:  # whatever a package raises that is half installed
            raise TrainingError(f"{name!r} cannot be used: {error}") from error
        if isinstance(reporters[-1], TensorBoardCallback) and reporters[-1].logging_dir is None:
            reporters[-1].logging_dir = str(folder / "tensorboard")
    return reporters
