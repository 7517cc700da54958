"""Time this project's pieces against a peer, in one process and in turns; `make bench`.

A ratio is ours / peer: below 1 we are faster. Each number is the median of several rounds; a round times
both, one after the other, so that whatever else the machine does hits both alike.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from sentence_transformers.sentence_transformer.losses import MarginMSELoss
from sentence_transformers.util import pairwise_cos_sim
from torch import Tensor, nn

from adaptive_margins.losses import margin_loss

ROUNDS, REPEATS, EPSILON = 15, 100, 0.3


def seconds(step: Callable[[], object]) -> float:
    """Mean seconds of `step` over REPEATS calls."""
    started = time.perf_counter()
    for _ in range(REPEATS):
        step()
    return (time.perf_counter() - started) / REPEATS


def compare(
    name: str, ours: Callable[[], Tensor], peer: Callable[[], Tensor], setting: str
) -> dict[str, Any]:
    """Median seconds of forward and backward of both, their ratio, and the ratio's quartiles."""
    steps = [lambda loss=loss: loss().backward() for loss in (ours, peer)]
    for step in steps:
        seconds(step)
    rounds = []
    for number in range(ROUNDS):
        turn = (0, 1) if number % 2 else (1, 0)
        times = {which: seconds(steps[which]) for which in turn}
        rounds.append((times[0], times[1]))
    ratios = [a / b for a, b in rounds]
    low, ratio, high = statistics.quantiles(ratios, n=4)
    return {
        "name": name,
        "ours": statistics.median(a for a, _ in rounds),
        "peer": statistics.median(b for _, b in rounds),
        "ratio": ratio,
        "spread": [low, high],
        "unit": "s",
        "setting": setting,
    }


def losses() -> list[dict[str, Any]]:
    """margin_loss against Sentence Transformers' MarginMSELoss on the same embeddings.

    The static target computes the same number (checked). The others have no peer there; the same
    MarginMSELoss stands beside them to show what a target of one's own costs.
    """
    peer_loss = MarginMSELoss(nn.Identity(), similarity_fct=pairwise_cos_sim)  # type: ignore[arg-type]
    results = []
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

            kind = "static" if target == EPSILON else target
            setting = f"B {size}, 384 dimensions, forward and backward, {torch.get_num_threads()} thread(s)"
            results.append(compare(f"margin_loss {kind} / MarginMSELoss", ours, peer, setting))
    return results


def main() -> None:
    """Run everything, print it, and write latest.json beside this file."""
    torch.set_num_threads(1)  # matrices this small gain nothing from a second thread
    results = losses()
    for row in results:
        low, high = row["spread"]
        print(
            f"{row['name']:<42} {row['ratio']:.2f} [{low:.2f}, {high:.2f}]  "
            f"{row['ours'] * 1e6:.0f} µs / {row['peer'] * 1e6:.0f} µs  ({row['setting']})"
        )
    (Path(__file__).parent / "latest.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
