"""A training step: the features of a batch of triples, the loss with its records, and errors."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from torch import Tensor, nn
from torch.nn.functional import normalize

from adaptive_margins.data.stored import COLUMNS
from adaptive_margins.distributed import gathered, processes
from adaptive_margins.encoder.embed import embed_chunks, length_chunks, token_batches
from adaptive_margins.encoder.tokens import Tokens
from adaptive_margins.errors import TrainingError
from adaptive_margins.losses import margin_loss
from adaptive_margins.processes import TRY_AGAIN, ending
from adaptive_margins.runs import TrainingRun
from adaptive_margins.teachers import SCORES, InBatchTeacher, dual_margin_mse, margin_mse


class TripleCollator:
    """Rows of tokenised texts → features of a step: its distinct texts, sorted by length, in parts.

    ``batch`` makes the features of a part (`encoder.speed.batcher`). All of it is made on the host,
    so that a step does not wait for lengths from the device. ``rows`` (3, B) are the places of the
    three columns' texts (`embed_chunks`). Only texts of more than ``most`` tokens are in more than
    ``chunks`` parts.
    """

    valid_label_columns: tuple[str, ...] = ()

    def __init__(
        self,
        queries: Tokens,
        passages: Tokens,
        chunks: int,
        batch: Callable[[Tokens, np.ndarray], dict[str, Tensor]],
        most: int = 2**40,
    ) -> None:
        self.queries, self.passages, self.chunks, self.batch = queries, passages, chunks, batch
        self.most = most

    def __call__(self, rows: list[dict[str, int]]) -> dict[str, Any]:
        """One dict per triple: the rows of its query and of its passages, and a teacher's scores.

        With scores, the places are followed by (2, B) scores and the (3, B) rows.
        """
        query, positive, negative = (np.array([row[c] for row in rows]) for c in COLUMNS)
        queries, query_at = np.unique(query, return_inverse=True)
        passages, passage_at = np.unique([positive, negative], return_inverse=True)
        texts = self.queries.take(queries) + self.passages.take(passages)
        parts = length_chunks(texts.lengths, self.chunks)
        if texts.offsets[-1] > self.most:
            parts = token_batches(np.concatenate(parts), texts.lengths, self.most // self.chunks)
        place = np.argsort(np.concatenate(parts))
        at = np.vstack([query_at, len(queries) + passage_at.reshape(2, -1)])
        features = {
            "chunks": [self.batch(texts, part) for part in parts],
            "rows": torch.from_numpy(place[at]),
        }
        if SCORES[0] in rows[0]:
            scores = torch.tensor([[row[name] for row in rows] for name in SCORES])
            features["rows"] = (features["rows"], scores, np.vstack([query, positive, negative]))
        return features


class RecordedLoss(nn.Module):
    """The loss of the run; records its value, and mean, min and max of φ over D⁺ × D⁻ (Figure 6).

    The records stay on the device: reading them in every step would make a GPU wait. ``in_batch``
    scores pairs across the batch, for MarginMSE.
    """

    def __init__(
        self, model: Any, config: TrainingRun, in_batch: InBatchTeacher | None = None
    ) -> None:
        super().__init__()
        self.model = model
        self.config = config
        self.in_batch = in_batch
        self.recorded: list[Tensor] = []
        self.softmax = MultipleNegativesRankingLoss(model) if config.loss == "softmax" else None

    def forward(self, chunks: Sequence[dict[str, Tensor]], rows: Any) -> Tensor:
        """The loss of a step from the features that `TripleCollator` makes."""
        rows, *teacher = rows if isinstance(rows, tuple) else (rows,)
        again = len(chunks) > self.config.chunks  # there are more for the memory's sake
        embeddings = embed_chunks(self.model, chunks, rows, again=again)
        query, positive, negative = map(gathered, embeddings)  # the batch of all processes
        if self.config.loss == "margin-mse":
            loss = self._distilled(query, positive, negative, *teacher)
        else:
            loss = self._loss(query, positive, negative)
        with torch.no_grad():
            similarity = normalize(positive.float(), dim=-1) @ normalize(negative.float(), dim=-1).T
            values = [loss.float(), similarity.mean(), similarity.min(), similarity.max()]
            self.recorded.append(torch.stack(values))
        return loss

    def _loss(self, query: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
        if self.softmax is not None:
            return self.softmax.compute_loss_from_embeddings([query, positive, negative], None)
        c = self.config
        assert c.target is not None
        return margin_loss(
            query,
            positive,
            negative,
            target=c.target,
            in_batch=c.in_batch,
            orientation=c.orientation,
            error=c.error,
            stop_gradient=c.stop_gradient,
        )

    def _distilled(
        self, query: Tensor, positive: Tensor, negative: Tensor, scores: Tensor, triples: np.ndarray
    ) -> Tensor:
        texts, similarity = (query, positive, negative), self.config.similarity
        scores = gathered(scores.T).T
        if not self.config.in_batch:
            return margin_mse(*texts, *scores, similarity=similarity)
        assert self.in_batch is not None
        size = len(query)
        if processes() > 1:  # of one, they are on the host already
            triples = gathered(torch.from_numpy(triples.T).to(query.device)).T.cpu().numpy()
        across = self.in_batch(triples[0], triples[1:].reshape(-1))  # (B, 2B)
        return dual_margin_mse(texts, scores, across[:, :size], across[:, size:], similarity)


def check_triples(
    config: TrainingRun, triples: Dataset, order: np.ndarray, in_batch: InBatchTeacher | None
) -> None:
    """TrainingError unless a run can be trained on ``triples`` in this ``order``."""
    if config.batch_size % processes():
        raise TrainingError(
            f"run {config.run_id} has batches of {config.batch_size} triples, which"
            f" {processes()} processes cannot share evenly; start another number of them"
        )
    if not config.steps:
        raise TrainingError(
            f"run {config.run_id} has {config.triples} triples, fewer than its batch size,"
            f" {config.batch_size}"
        )
    if config.steps * config.batch_size > len(order):
        raise TrainingError(
            f"run {config.run_id} needs {config.triples} triples in batches of"
            f" {config.batch_size}, there are {len(order)}"
        )
    if config.loss != "margin-mse":
        return
    if lacking := [name for name in SCORES if name not in triples.column_names]:
        raise TrainingError(
            f"run {config.run_id}: MarginMSE needs a teacher's scores, but the triples have no"
            f" column {' and '.join(lacking)}; give the profile a teacher"
        )
    if config.in_batch and in_batch is None:
        raise TrainingError(f"run {config.run_id}: MarginMSE in-batch needs an in-batch teacher")


def not_finite(
    config: TrainingRun,
    triples: Dataset,
    order: np.ndarray,
    names: Sequence[Sequence[Any]],
    step: int,
    what: str,
) -> TrainingError:
    """The error of a step after which ``what`` is not finite; it names the texts of the step."""
    batch = triples[order[(step - 1) * config.batch_size : step * config.batch_size]]
    columns = [[names[c != "query"][row] for row in batch[c]] for c in COLUMNS]
    texts = "; ".join(" ".join(map(str, triple)) for triple in zip(*columns, strict=True))
    return TrainingError(
        f"run {config.run_id}: {what} after step {step} (encoder {config.encoder}, target"
        f" {config.target}, learning rate {config.learning_rate}); try a smaller rate, or look at"
        f" the texts of the step, as query positive negative: {texts}"
    )


@contextmanager
def interruptible(config: TrainingRun, checkpoint: Path | None) -> Iterator[None]:
    """Errors in the block name the run; a process that is asked to end does so after the block."""
    ending.training = True
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise TrainingError(
            f"run {config.run_id}: a step of {config.batch_size} triples does not fit into the"
            " memory of the GPU; a smaller batch_size, shorter lengths or bf16 make it another run,"
            f" and CachedMarginLoss, in a training of your own, splits the batch. {error}"
        ) from error
    except UnpicklingError as error:
        raise TrainingError(
            f"run {config.run_id}: a file of {checkpoint} has more than tensors and numbers, and is"
            " not loaded, because that could run code; is the checkpoint somebody else's? Remove it"
        ) from error
    finally:
        ending.training = False
    if ending.asked:
        os._exit(TRY_AGAIN)
