"""A training step: the features of a batch of triples, and the loss with its records."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from torch import Tensor, nn
from torch.nn.functional import normalize

from adaptive_margins.data.stored import COLUMNS
from adaptive_margins.encoder.embed import embed_chunks, length_chunks
from adaptive_margins.encoder.tokens import Tokens
from adaptive_margins.losses import margin_loss
from adaptive_margins.runs import TrainingRun


class TripleCollator:
    """Rows of tokenised texts → features of a step: its distinct texts, sorted by length, in parts.

    ``batch`` makes the features of a part (`encoder.speed.batcher`). All of it is made on the host,
    so that a step does not wait for lengths from the device. ``rows`` (3, B) are the places of the
    three columns' texts (`embed_chunks`).
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
        """One dict per triple, with the rows of its query and of its passages."""
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


class RecordedLoss(nn.Module):
    """The loss of the run; records its value, and mean, min and max of φ over D⁺ × D⁻ (Figure 6).

    The records stay on the device: reading them in every step would make a GPU wait.
    """

    def __init__(self, model: Any, config: TrainingRun) -> None:
        super().__init__()
        self.model = model
        self.config = config
        self.recorded: list[Tensor] = []
        self.softmax = MultipleNegativesRankingLoss(model) if config.loss == "softmax" else None

    def forward(self, chunks: Sequence[dict[str, Tensor]], rows: Tensor) -> Tensor:
        """The loss of a step from the features that `TripleCollator` makes."""
        query, positive, negative = embed_chunks(self.model, chunks, rows)
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
