"""The same training step in several ways: this project's, Sentence Transformers', every text padded to its limit."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
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


WARM = 4  # triples of the step before the one that is timed


class _Batches:
    """A batch sampler: a first step of a few triples, then all of them, and again.

    The first step creates the optimiser's state and everything else that a run creates once. The third batch is fetched, as a run fetches one
    ahead, and not trained on.
    """

    def __init__(self, size: int) -> None:
        everything = list(range(size))
        self.batches = [everything[:WARM], everything, everything]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches)


class _Clock(TrainerCallback):
    """Seconds from the end of the first step to the end of the second, where training is stopped."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(
        self, args: Any, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        self.ends.append(clock())
        control.should_training_stop = len(self.ends) == 2
        control.should_evaluate = control.should_save = False
        return control


@contextmanager
def _timed() -> Iterator[list[tuple[float, float]]]:
    """Of each Trainer.train while this is open: seconds of its second step, and the loss of its first."""
    found, losses = [], []
    train, training_step = Trainer.train, Trainer.training_step

    def spy(self: Trainer, *args: Any, **kwargs: Any) -> Any:
        ends = _Clock()
        self.add_callback(ends)
        losses.clear()
        output = train(self, *args, **kwargs)
        found.append((ends.ends[1] - ends.ends[0], losses[0]))
        return output

    def spy_on_step(self: Trainer, *args: Any, **kwargs: Any) -> Any:
        loss = training_step(self, *args, **kwargs)
        if not losses:
            losses.append(float(loss))
        return loss

    with (
        mock.patch.object(Trainer, "train", spy),
        mock.patch.object(Trainer, "training_step", spy_on_step),
    ):
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


def ours(
    chunks: int,
    collator: type = training.TripleCollator,
    copied: Callable[[Any], Any] = copy.deepcopy,
) -> Step:
    """This project's trainer, its texts tokenised beforehand, in so many chunks."""

    def step(model: Any, triples: Triples) -> tuple[float, float]:
        queries, passages = tokens_of(model, triples)
        size = len(triples)
        numbers = np.tile(np.arange(size, dtype=np.int32), 3)  # as many as a run asks for
        rows = Dataset.from_dict(
            {"query": numbers, "positive": numbers, "negative": numbers + size}
        )
        nothing = Evaluation({"nDCG@10": 0.0}, {"nDCG@10": {}})
        with (
            tempfile.TemporaryDirectory() as folder,
            _timed() as outputs,
            mock.patch.object(training, "TripleCollator", collator),
            mock.patch.object(training, "BatchSampler", lambda *_, **__: _Batches(size)),
        ):
            training.train(
                config(size, chunks), copied(model), rows, queries, passages, lambda _: nothing,
                initial=nothing, folder=Path(folder),
            )  # fmt: skip
        return outputs[0]

    return step


def padded() -> Step:
    """Every text padded to 30 or 200 tokens, one forward a column, torch's dropout; otherwise as `ours`."""
    return ours(1, _Padded, _plain)


def merged() -> Step:
    """All texts in one forward, padded to the longest of them, torch's dropout; otherwise as `ours`."""
    return ours(1, _Merged, _plain)


def sentence_transformers(merged: bool) -> Step:
    """Sentence Transformers' trainer with the same loss, which tokenises in every step, as it does."""

    def step(model: Any, triples: Triples) -> tuple[float, float]:
        model = _plain(model)
        model.max_seq_length = PASSAGE_LENGTH
        with tempfile.TemporaryDirectory() as folder:
            arguments = SentenceTransformerTrainingArguments(
                output_dir=folder,
                max_steps=3,
                batch_sampler=lambda *_, **__: _Batches(len(triples)),
                per_device_train_batch_size=len(triples),
                learning_rate=1e-5,
                optim="adamw_torch_fused",
                max_grad_norm=0.0,
                logging_strategy="no",
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                use_cpu=True,
                dataloader_pin_memory=False,
            )
            trainer = SentenceTransformerTrainer(
                model=model,
                args=arguments,
                train_dataset=Dataset.from_dict(vars(triples)),
                loss=MarginLoss(model, target=TARGET),
            )
            with (
                quiet(),
                _timed() as outputs,
                nullcontext() if merged else column_merging_disabled(),
            ):
                trainer.train()
                return outputs[0]

    return step


def tokens_of(model: Any, triples: Triples) -> tuple[Tokens, Tokens]:
    """Queries; positives, then negatives."""
    return (
        tokenize(model, triples.query, QUERY_LENGTH),
        tokenize(model, triples.positive + triples.negative, PASSAGE_LENGTH),
    )


def config(size: int, chunks: int) -> TrainingRun:
    """Three steps of ``size`` triples; `_Batches` changes their sizes, and the last is not trained on."""
    return TrainingRun(
        encoder="benchmark", weights="", pooling="mean", layers=None, trained_layers=None, query_length=QUERY_LENGTH,
        passage_length=PASSAGE_LENGTH, loss="margin", target=TARGET, in_batch=False, batch_size=size, chunks=chunks,
        triples=3 * size, learning_rate=1e-5, weight_decay=0.0, decay=1.0, optimizer="adamw_torch_fused", precision="fp32",
        dropout=None, seed=1, evaluate_every=0, patience=0, keep="last", selection="nDCG@10", validation="", depth=0,
        rerank_measures=("nDCG@10",), collection="",
    )  # fmt: skip
