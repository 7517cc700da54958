"""The same training step in several ways: this project's, Sentence Transformers', every text padded to its limit."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from datasets import Dataset
from material import PASSAGE_LENGTH, QUERY_LENGTH, Triples
from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.base.losses.merged_forward import column_merging_disabled
from timing import clock
from torch import nn
from torch.nn.functional import pad
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState

from adaptive_margins import training
from adaptive_margins.encoder.load import quiet
from adaptive_margins.encoder.tokens import Tokens, tokenize
from adaptive_margins.evaluation.measures import Evaluation
from adaptive_margins.losses import MarginLoss
from adaptive_margins.runs import TrainingRun

TARGET = "distributed"
Step = Callable[[Any, Triples], tuple[float, float]]
"""(model, a batch of triples) → seconds of a step in a run, collating a batch included; the loss of the run's first step.

The model is not changed.
"""


WARM = 4  # triples of the first step, which is not timed


@dataclass(frozen=True)
class Setting:
    """How steps are trained; ``timed`` steps of all triples are timed, after ``warm`` others."""

    device: str = "cpu"
    precision: str = "fp32"
    optimizer: str = "adamw_torch_fused"
    warm: int = 0
    timed: int = 1


CPU = Setting()


class _Batches:
    """A batch sampler: a first step of a few triples, then all of them, again and again.

    The first step creates the optimiser's state and everything else that a run creates once. The last batch is fetched, as a run fetches one
    ahead, and not trained on.
    """

    def __init__(self, size: int, setting: Setting) -> None:
        everything = list(range(size))
        self.batches = [everything[:WARM], *[everything] * (setting.warm + setting.timed + 1)]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches)


class _Clock(TrainerCallback):
    """Times the steps of a training, and ends it after the last of them; the loss of its first step."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.ends: list[float] = []
        self.loss: float | None = None

    @property
    def found(self) -> tuple[float, float]:
        """Seconds of a step, and the loss of the training's first one."""
        assert self.loss is not None
        return (self.ends[1] - self.ends[0]) / self.setting.timed, self.loss

    def on_step_end(
        self, args: Any, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        done = state.global_step - 1 - self.setting.warm
        if done in (0, self.setting.timed):
            if self.setting.device != "cpu":
                torch.cuda.synchronize()
            self.ends.append(clock())
        control.should_training_stop = done == self.setting.timed
        control.should_evaluate = control.should_save = False
        return control


@contextmanager
def watching(make: Callable[[Trainer], TrainerCallback]) -> Iterator[None]:
    """Add a callback to each Trainer that trains while this is open."""
    train = Trainer.train

    def spy(self: Trainer, *args: Any, **kwargs: Any) -> Any:
        self.add_callback(make(self))
        return train(self, *args, **kwargs)

    with mock.patch.object(Trainer, "train", spy):
        yield


@contextmanager
def _timed(setting: Setting) -> Iterator[_Clock]:
    """The clock of the training while this is open."""
    found, training_step = _Clock(setting), Trainer.training_step

    def spy_on_step(self: Trainer, *args: Any, **kwargs: Any) -> Any:
        loss = training_step(self, *args, **kwargs)
        found.loss = float(loss) if found.loss is None else found.loss
        return loss

    with watching(lambda _: found), mock.patch.object(Trainer, "training_step", spy_on_step):
        yield found


class _Padded(training.TripleCollator):
    """Three forwards, every text padded to its limit: the released code's way."""

    def __call__(self, rows: list[dict[str, int]]) -> dict[str, Any]:
        columns = (
            ("query", self.queries, QUERY_LENGTH),
            ("positive", self.passages, PASSAGE_LENGTH),
            ("negative", self.passages, PASSAGE_LENGTH),
        )
        chunks = []
        for column, tokens, length in columns:
            batch = tokens.batch([row[column] for row in rows])
            missing = (0, length - batch["input_ids"].shape[1])
            chunks.append({
                "input_ids": pad(batch["input_ids"], missing, value=tokens.pad),
                "attention_mask": pad(batch["attention_mask"], missing),
            })  # fmt: skip
        return {"chunks": chunks, "rows": torch.arange(3 * len(rows)).view(3, -1)}


class _Merged(training.TripleCollator):
    """All distinct texts in one forward, padded to the longest."""

    def __init__(self, queries: Tokens, passages: Tokens, *_: Any) -> None:
        super().__init__(queries, passages, 1, Tokens.batch)


def _plain(model: Any) -> Any:
    """A copy with torch's dropout in place of this project's."""
    model = copy.deepcopy(model)
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Dropout):
                setattr(module, name, nn.Dropout(child.p))
    return model


def project(
    model: Any,
    tokens: tuple[Tokens, Tokens],
    size: int,
    steps: int,
    setting: Setting = CPU,
    chunks: int = 1,
) -> training.TrainingResult:
    """Train ``model`` in batches of ``size`` by this project's trainer, without an evaluation.

    ``tokens`` are queries, and positives followed by negatives; the triples are read in order, again and again.
    """
    queries, passages = tokens
    numbers = np.arange(size * steps, dtype=np.int32) % len(queries)
    rows = Dataset.from_dict(
        {"query": numbers, "positive": numbers, "negative": numbers + len(queries)}
    )
    nothing = Evaluation({"nDCG@10": 0.0}, {"nDCG@10": {}})
    with tempfile.TemporaryDirectory() as folder:
        return training.train(
            config(size, chunks, steps, setting), model.to(setting.device), rows, queries, passages, lambda _: nothing,
            initial=nothing, folder=Path(folder), device=setting.device, order=np.arange(len(rows)),
        )  # fmt: skip


def ours(
    chunks: int,
    collator: Callable[..., Any] = training.TripleCollator,
    copied: Callable[[Any], Any] = copy.deepcopy,
    setting: Setting = CPU,
) -> Step:
    """This project's trainer, its texts tokenised beforehand, in so many chunks."""

    def step(model: Any, triples: Triples) -> tuple[float, float]:
        size, steps = len(triples), setting.warm + setting.timed + 2  # as many as are fetched
        with (
            _timed(setting) as output,
            mock.patch.object(training, "TripleCollator", collator),
            mock.patch.object(training, "BatchSampler", lambda *_, **__: _Batches(size, setting)),
        ):
            tokens = tokens_of(model, triples)
            project(copied(model), tokens, size, steps, setting, chunks)
        return output.found

    return step


def padded() -> Step:
    """Every text padded to 30 or 200 tokens, one forward a column, torch's dropout; otherwise as `ours`."""
    return ours(1, _Padded, _plain)


def merged() -> Step:
    """All texts in one forward, padded to the longest of them, torch's dropout; otherwise as `ours`."""
    return ours(1, _Merged, _plain)


def sentence_transformers(merged: bool, setting: Setting = CPU) -> Step:
    """Sentence Transformers' trainer with the same loss, which tokenises in every step, as it does."""

    def step(model: Any, triples: Triples) -> tuple[float, float]:
        model = _plain(model)
        model.max_seq_length = PASSAGE_LENGTH
        with tempfile.TemporaryDirectory() as folder:
            arguments = SentenceTransformerTrainingArguments(
                output_dir=folder,
                max_steps=setting.warm + setting.timed + 2,
                batch_sampler=lambda *_, **__: _Batches(len(triples), setting),
                per_device_train_batch_size=len(triples),
                learning_rate=1e-5,
                optim=setting.optimizer,
                bf16=setting.precision == "bf16",
                max_grad_norm=0.0,
                logging_strategy="no",
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                use_cpu=setting.device == "cpu",
                dataloader_pin_memory=setting.device != "cpu",
            )
            arguments._n_gpu = min(arguments.n_gpu, 1)  # not split over several GPUs
            trainer = SentenceTransformerTrainer(
                model=model,
                args=arguments,
                train_dataset=Dataset.from_dict(vars(triples)),
                loss=MarginLoss(model, target=TARGET),
            )
            with (
                quiet(),
                _timed(setting) as output,
                nullcontext() if merged else column_merging_disabled(),
            ):
                trainer.train()
            return output.found

    return step


def tokens_of(model: Any, triples: Triples) -> tuple[Tokens, Tokens]:
    """Queries; positives, then negatives."""
    return (
        tokenize(model, triples.query, QUERY_LENGTH),
        tokenize(model, triples.positive + triples.negative, PASSAGE_LENGTH),
    )


def config(size: int, chunks: int, steps: int, setting: Setting) -> TrainingRun:
    """So many steps of ``size`` triples, without an evaluation before the last one."""
    return TrainingRun(
        encoder="benchmark", weights="", pooling="mean", layers=None, trained_layers=None, query_length=QUERY_LENGTH,
        passage_length=PASSAGE_LENGTH, loss="margin", target=TARGET, in_batch=False, batch_size=size, chunks=chunks,
        triples=steps * size, learning_rate=1e-5, weight_decay=0.0, decay=1.0, optimizer=setting.optimizer,
        precision=setting.precision, dropout=None, seed=1, evaluate_every=0, patience=0, keep="last",
        selection="nDCG@10", validation="", depth=0, rerank_measures=("nDCG@10",), collection="",
    )  # fmt: skip
