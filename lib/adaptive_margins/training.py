"""TrainingRun → trained encoder + learning curve, through Sentence Transformers' trainer (Sections 4 and 5)."""

from __future__ import annotations

import importlib.util
import json
import math
import os
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
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.utils.data import BatchSampler
from transformers import PrinterCallback, TrainerCallback, TrainerControl, TrainerState
from transformers.integrations import TensorBoardCallback, get_reporting_integration_callbacks

from adaptive_margins.data.stored import COLUMNS, seeded_order
from adaptive_margins.encoder.embed import embed_chunks, length_chunks
from adaptive_margins.encoder.load import quiet
from adaptive_margins.encoder.speed import batcher
from adaptive_margins.encoder.tokens import Tokens
from adaptive_margins.errors import AdaptiveMarginsError
from adaptive_margins.evaluation.measures import Evaluation
from adaptive_margins.losses import margin_loss
from adaptive_margins.runs import TrainingRun

COMPLETE = "COMPLETE"

REPORTERS = ("tensorboard", "wandb", "mlflow", "trackio")
"""Integrations of the trainer that `train` reports to; each is also the name of its package."""


class TrainingError(AdaptiveMarginsError, RuntimeError):
    """Training that cannot go on.

    A loss that is not finite, too few triples, a checkpoint that cannot be written, nothing to report to.
    """


@dataclass(frozen=True)
class TrainingResult:
    """What a training run leaves behind; the model itself is left in the state that ``config.keep`` asks for.

    ``curve``: a row per evaluation, step 0 included (step, triples, seconds of training, measures);
    ``checks``: the same in long form, a row per evaluation, query and measure (step, qid, measure, value);
    ``targets``: a row per step (step, mean, min, max of raw φ(d⁺, d⁻) over the batch); ``kept``: the kept step's evaluation.
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


class TripleCollator:
    """Rows of pre-tokenised texts → a step's features: its distinct texts sorted by length, in ``chunks`` parts.

    ``batch`` makes features of a part (`encoder.speed.batcher`). All of it happens on the host, so that a step need not ask
    the device for lengths. ``rows`` (3, B) are the places of the texts of the three columns among those of all chunks
    (`embed_chunks`).
    """

    valid_label_columns: tuple[str, ...] = ()

    def __init__(
        self,
        queries: Tokens,
        passages: Tokens,
        chunks: int,
        batch: Callable[[Tokens, np.ndarray], dict[str, Tensor]],
    ) -> None:
        self.queries, self.passages, self.chunks, self.batch = queries, passages, chunks, batch

    def __call__(self, rows: list[dict[str, int]]) -> dict[str, Any]:
        """One row a triple: the row of its query among the queries, those of its passages among the passages."""
        query, positive, negative = (np.array([row[c] for row in rows]) for c in COLUMNS)
        queries, query_at = np.unique(query, return_inverse=True)
        passages, passage_at = np.unique([positive, negative], return_inverse=True)
        texts = self.queries.take(queries) + self.passages.take(passages)
        parts = length_chunks(texts.lengths, self.chunks)
        place = np.argsort(np.concatenate(parts))
        at = np.vstack([query_at, len(queries) + passage_at.reshape(2, -1)])
        return {
            "chunks": [self.batch(texts, part) for part in parts],
            "rows": torch.from_numpy(place[at]),
        }


class _RecordedLoss(nn.Module):
    """The run's loss on the three columns.

    Of every step it keeps the loss, and mean, min and max of φ over D⁺ × D⁻ (Figure 6), on the device: reading them in every
    step would make a GPU wait.
    """

    def __init__(self, model: Any, config: TrainingRun) -> None:
        super().__init__()
        self.model = model
        self.config = config
        self.recorded: list[Tensor] = []
        self.softmax = MultipleNegativesRankingLoss(model) if config.loss == "softmax" else None

    def forward(self, chunks: Sequence[dict[str, Tensor]], rows: Tensor) -> Tensor:
        query, positive, negative = embed_chunks(self.model, chunks, rows)
        loss = self._loss(query, positive, negative)
        with torch.no_grad():
            similarity = normalize(positive.float(), dim=-1) @ normalize(negative.float(), dim=-1).T
            figures = [loss.float(), similarity.mean(), similarity.min(), similarity.max()]
            self.recorded.append(torch.stack(figures))
        return loss

    def _loss(self, query: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
        if self.softmax is not None:
            return self.softmax.compute_loss_from_embeddings([query, positive, negative], None)
        c = self.config
        assert c.target is not None
        return margin_loss(
            query, positive, negative, target=c.target, in_batch=c.in_batch, orientation=c.orientation,
            error=c.error, stop_gradient=c.stop_gradient,
        )  # fmt: skip


@dataclass
class _Progress:
    """All that a resumed run must know beyond what the trainer keeps; saved with each checkpoint."""

    curve: list[dict[str, float]] = field(default_factory=list)
    checks: list[dict[str, dict[str, float]]] = field(default_factory=list)
    similarities: list[list[float]] = field(default_factory=list)
    best_step: int = 0
    checks_without_gain: int = 0
    train_seconds: float = 0.0
    eval_seconds: float = 0.0
    peak_bytes: int = 0


class _Watch(TrainerCallback):
    """Evaluates, keeps the best state (step 0 may be it), stops early, and keeps the clocks of training and evaluation apart."""

    def __init__(
        self,
        config: TrainingRun,
        model: nn.Module,
        loss: _RecordedLoss,
        evaluator: Callable[[Any], Evaluation],
        checkpoint_every: int,
        on_check: Callable[[pd.DataFrame], None] | None,
    ) -> None:
        self.config = config
        self.model = model
        self.loss = loss
        self.evaluator = evaluator
        self.checkpoint_every = checkpoint_every
        self.on_check = on_check
        self.log: Callable[[dict[str, float]], None] | None = None  # to the integrations, if any
        self.progress = _Progress()
        self.best_state: dict[str, Tensor] = {}
        self.last: Evaluation | None = None
        self._process = psutil.Process()
        self._since = time.perf_counter()

    def read_steps(self) -> None:
        """Fetch what the loss has recorded since the last call. Raises TrainingError if a loss is not finite."""
        if not self.loss.recorded:
            return
        for loss, *similarity in torch.stack(self.loss.recorded).tolist():
            if not math.isfinite(loss):
                c = self.config
                raise TrainingError(
                    f"run {c.run_id}: the loss is {loss} after step {len(self.progress.similarities)} (encoder "
                    f"{c.encoder}, target {c.target}, learning rate {c.learning_rate}); try a smaller rate"
                )
            self.progress.similarities.append(similarity)
        self.loss.recorded.clear()

    def tick(self, clock: Literal["train_seconds", "eval_seconds"] | None) -> None:
        """Book the time since the last call to ``clock`` (None: to neither, as for writing checkpoints)."""
        now = time.perf_counter()
        if clock is not None:
            setattr(self.progress, clock, getattr(self.progress, clock) + now - self._since)
        self._since = now

    def record(self, step: int, evaluation: Evaluation) -> bool:
        """Add a row to the curve; True if it is the best so far (the first of equals stays best)."""
        progress, measure = self.progress, self.config.selection
        value = evaluation.mean[measure]
        gained = not progress.curve or value > max(row[measure] for row in progress.curve)
        row = {
            "step": step,
            "triples": step * self.config.batch_size,
            "seconds": progress.train_seconds,
        }
        progress.curve.append({**row, **evaluation.mean})
        progress.checks.append(evaluation.per_query)
        if gained:
            progress.best_step = step
            if self.config.keep == "best":
                self.best_state = {
                    k: v.detach().cpu().clone() for k, v in trainable(self.model).items()
                }
        progress.checks_without_gain = 0 if gained else progress.checks_without_gain + 1
        self.last = evaluation
        return gained

    def tell(self) -> None:
        """Hand the curve to ``on_check``; the time that it takes is booked to neither clock."""
        if self.on_check is not None:
            self.on_check(pd.DataFrame(self.progress.curve))
        self.tick(None)

    def on_train_begin(
        self, args: Any, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if self.log is not None and self.last is not None:  # not resumed: that is step 0's
            self.log({f"eval_{name}": value for name, value in self.last.mean.items()})
        self.tell()

    def on_step_end(
        self, args: Any, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        every, step = self.config.evaluate_every, state.global_step
        control.should_evaluate = step == self.config.steps or (every > 0 and step % every == 0)
        control.should_save = (
            bool(self.checkpoint_every)
            and step % self.checkpoint_every == 0
            and step < self.config.steps
        )
        resident = (
            torch.cuda.max_memory_allocated()
            if torch.cuda.is_available()
            else self._process.memory_info().rss
        )
        self.progress.peak_bytes = max(self.progress.peak_bytes, resident)
        if control.should_evaluate or control.should_save:
            self.read_steps()
        self.tick("train_seconds")
        return control

    def on_evaluate(
        self, args: Any, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        self.tick("eval_seconds")
        self.tell()
        if self.config.patience and self.progress.checks_without_gain >= self.config.patience:
            control.should_training_stop = True
            control.should_save = False  # a checkpoint here would be resumed past the stop
        return control

    def on_save(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.tick(None)


class _Evaluator(SentenceEvaluator):
    """The trainer's view of the evaluation; the callback records what it finds."""

    def __init__(self, watch: _Watch) -> None:
        super().__init__()
        self.watch = watch

    def __call__(
        self, model: Any, output_path: str | None = None, epoch: float = -1, steps: int = -1
    ) -> dict[str, float]:
        evaluation = self.watch.evaluator(model)
        self.watch.record(steps, evaluation)
        return dict(evaluation.mean)


class _Trainer(SentenceTransformerTrainer):
    """Sentence Transformers' trainer with decay per step, and checkpoints that hold the trained parameters only."""

    watch: _Watch

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> Any:
        if self.lr_scheduler is None:  # type: ignore[has-type]
            decay = self.watch.config.decay
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
                optimizer or self.optimizer, lambda step: decay**step
            )
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def add_model_card_callback(self, default_args_dict: dict[str, Any]) -> None:
        """No card for a run: its config.json says more, and the rows here are numbers, not texts."""

    def collect_features(self, inputs: dict[str, Any]) -> tuple[list[dict[str, Tensor]], Tensor]:
        """What `_RecordedLoss` takes: the chunks, and where the columns' texts are in them."""
        return inputs["chunks"], inputs["rows"]

    def _save(
        self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None
    ) -> None:
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        save_file(
            {k: v.detach().cpu().contiguous() for k, v in trainable(self.model).items()},
            folder / "model.safetensors",
        )
        if self.watch.best_state:
            save_file(
                {k: v.contiguous() for k, v in self.watch.best_state.items()},
                folder / "best.safetensors",
            )
        (folder / "progress.json").write_text(json.dumps(vars(self.watch.progress)))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        try:
            super()._save_checkpoint(model, trial)
            for (
                file
            ) in folder.iterdir():  # the marker must not reach the disk before what it vouches for
                with file.open("rb") as written:
                    os.fsync(written.fileno())
            (folder / COMPLETE).touch()
        except (
            OSError,
            SafetensorError,
            RuntimeError,
        ) as error:  # RuntimeError: torch.save on a full disk
            shutil.rmtree(folder, ignore_errors=True)
            raise TrainingError(
                f"run {self.watch.config.run_id}: {folder} could not be written: {error}"
            ) from error

    def _load_from_checkpoint(self, checkpoint_path: str, model: nn.Module | None = None) -> None:
        folder = Path(checkpoint_path)
        self.model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
        best = folder / "best.safetensors"
        self.watch.best_state = load_file(best) if best.is_file() else {}
        vars(self.watch.progress).update(json.loads((folder / "progress.json").read_text()))


def trainable(model: nn.Module) -> dict[str, Tensor]:
    """The parameters that training changes, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that was written whole; half-written ones are removed."""
    whole = []
    for checkpoint in folder.glob("checkpoint-*"):
        if (checkpoint / COMPLETE).is_file():
            whole.append(checkpoint)
        else:
            shutil.rmtree(checkpoint)
    return max(whole, key=lambda c: int(c.name.rsplit("-", 1)[1]), default=None)


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
) -> TrainingResult:
    """Train ``model`` in place on ``triples``: columns query, positive and negative, rows of the two `Tokens`.

    ``evaluator`` gives the validation measures of a model; ``initial`` is its result at step 0 where it is known already.
    ``folder`` takes checkpoints and is resumed from. The order of the triples depends on their number and ``config.seed``
    alone, so all runs of a grid see the same one, and shorter runs the beginning of it.

    ``report_to`` names any of `REPORTERS`: they get loss and learning rate every few steps, and the measures of every
    evaluation, step 0 included. Each is set up by its own environment variables, which also say whether anything leaves the
    machine; TensorBoard's files go to $TENSORBOARD_LOGGING_DIR, else to ``folder / "tensorboard"``. ``run_name`` is what
    the others call the run. ``on_check`` gets the curve so far when training begins, and after each evaluation. None of
    this changes what is computed.

    Raises:
        TrainingError: the triples do not suffice for one pass, the loss is not finite, or one of ``report_to`` is unknown
            or cannot be used.
    """
    reporters = _reporters(report_to, folder)
    if config.steps * config.batch_size > len(triples) or not config.steps:
        raise TrainingError(
            f"run {config.run_id} needs {config.triples} triples in batches of {config.batch_size}, there are {len(triples)}"
        )

    def batches(dataset: Dataset, batch_size: int, **_: Any) -> BatchSampler:
        order = seeded_order(len(dataset), config.seed)
        return BatchSampler(order[: config.steps * batch_size], batch_size, drop_last=True)

    loss = _RecordedLoss(model, config)
    watch = _Watch(config, model, loss, evaluator, checkpoint_every, on_check)
    checkpoint = newest_checkpoint(folder)
    if checkpoint is None:
        watch.tick(None)
        first = initial or evaluator(model)
        watch.tick("eval_seconds")
        watch.record(0, first)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()  # of the process's earlier runs
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(folder),
        max_steps=config.steps,
        per_device_train_batch_size=config.batch_size,
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        optim=config.optimizer,
        dataloader_pin_memory=device != "cpu",
        max_grad_norm=0.0,  # the paper names no clipping, and the released code has none
        bf16=config.precision == "bf16",
        fp16=config.precision == "fp16",
        seed=config.seed,
        batch_sampler=batches,
        logging_strategy="steps" if reporters else "no",
        logging_steps=max(1, min(10, config.steps // 20)) if reporters else 500,
        logging_nan_inf_filter=False,  # it would look at every step's loss; _Watch does at checks and checkpoints
        eval_strategy="no",  # _Watch says when
        save_strategy="no",
        save_total_limit=2,  # the older one is removed before the newer one is marked
        report_to="none",  # _reporters are among the callbacks
        run_name=run_name or None,
        disable_tqdm=True,
        use_cpu=device == "cpu",
    )
    # With several GPUs in sight the trainer would split batches over them, each as large as one was to be.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    trainer = _Trainer(
        model=model,
        args=arguments,
        train_dataset=triples,
        loss=loss,
        evaluator=_Evaluator(watch),
        data_collator=TripleCollator(queries, passages, config.chunks, batcher(model)),
        callbacks=[*reporters, watch],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.watch = watch
    watch.log = trainer.log if reporters else None
    with quiet():
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)

    progress = watch.progress
    stop_step = trainer.state.global_step
    if watch.last is None:
        raise TrainingError(f"run {config.run_id} ended without an evaluation")
    kept_step, kept = stop_step, watch.last
    if config.keep == "best":
        model.load_state_dict(watch.best_state, strict=False)
        best = next(i for i, row in enumerate(progress.curve) if row["step"] == progress.best_step)
        mean = {m: progress.curve[best][m] for m in watch.last.mean}
        kept_step, kept = (
            progress.best_step,
            Evaluation(mean=mean, per_query=progress.checks[best]),
        )
    targets = pd.DataFrame(progress.similarities, columns=["mean", "min", "max"])
    targets.insert(0, "step", np.arange(1, len(targets) + 1))
    return TrainingResult(
        curve=pd.DataFrame(progress.curve),
        checks=_long(progress),
        targets=targets,
        kept=kept,
        kept_step=kept_step,
        best_step=progress.best_step,
        stop_step=stop_step,
        triples=stop_step * config.batch_size,
        train_seconds=progress.train_seconds,
        eval_seconds=progress.eval_seconds,
        peak_bytes=progress.peak_bytes,
    )


def check_reporters(names: Sequence[str]) -> None:
    """TrainingError for a name that is none of `REPORTERS`, or whose package is not installed."""
    for name in names:
        if name not in REPORTERS:
            raise TrainingError(
                f"cannot report to {name!r}; expected any of {', '.join(REPORTERS)}"
            )
        if importlib.util.find_spec(name) is None:
            raise TrainingError(f"to report to {name!r} its package is needed: pip install {name}")


def _reporters(names: Sequence[str], folder: Path) -> list[TrainerCallback]:
    """The trainer's integrations of these names; TrainingError for one that is unknown or cannot be used."""
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


def _long(progress: _Progress) -> pd.DataFrame:
    rows = [
        (row["step"], qid, measure, value)
        for row, check in zip(progress.curve, progress.checks, strict=True)
        for measure, values in check.items()
        for qid, value in values.items()
    ]
    return pd.DataFrame(rows, columns=["step", "qid", "measure", "value"])
