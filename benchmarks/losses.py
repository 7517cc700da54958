"""`margin_loss` against Sentence Transformers' MarginMSELoss, on the same embeddings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from sentence_transformers.sentence_transformer.losses import MarginMSELoss
from sentence_transformers.util import pairwise_cos_sim
from timing import clock, rounds, row
from torch import Tensor, nn

from adaptive_margins.losses import margin_loss

REPEATS, EPSILON = 100, 0.3


def _seconds(loss: Callable[[], Tensor]) -> float:
    """Mean seconds of a forward and backward pass."""
    started = clock()
    for _ in range(REPEATS):
        loss().backward()
    return (clock() - started) / REPEATS


def compare(number: int) -> list[dict[str, Any]]:
    """The static target computes the same number (asserted). The others have no peer there.

    The same MarginMSELoss stands beside them to show what a target of one's own costs.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # matrices this small gain nothing from a second thread
    peer_loss = MarginMSELoss(nn.Identity(), similarity_fct=pairwise_cos_sim)  # type: ignore[arg-type]
    rows = []
    for size in (32, 128):
        torch.manual_seed(1)
        triple = [torch.randn(size, 384, requires_grad=True) for _ in range(3)]
        labels = torch.full((size,), EPSILON)

        def peer(triple: list[Tensor] = triple, labels: Tensor = labels) -> Tensor:
            return peer_loss.compute_loss_from_embeddings(triple, labels)

        torch.testing.assert_close(margin_loss(*triple, target=EPSILON), peer())
        for target in (EPSILON, "adaptive", "distributed"):

            def ours(triple: list[Tensor] = triple, target: float | str = target) -> Tensor:
                return margin_loss(*triple, target=target)

            contestants = {"ours": ours, "peer": peer}
            for loss in contestants.values():
                _seconds(loss)
            found = rounds(
                {name: lambda _, loss=loss: _seconds(loss) for name, loss in contestants.items()},
                number,
            )
            kind = "static" if target == EPSILON else target
            rows.append(row(
                f"margin_loss {kind} / MarginMSELoss", found["ours"], found["peer"], "s",
                f"B {size}, 384 dimensions, forward and backward, 1 thread", less_is_better=True,
            ))  # fmt: skip
    torch.set_num_threads(threads)
    return rows
