"""Time a training step, encoding and the loss against their peers; `make bench`.

Each figure is a ratio measured in this process, in turns: ours, peer, ours, peer … A ratio above 1 is in our favour. It
is the median of the rounds' ratios, its spread their quartiles.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import losses
import numpy as np
import torch
from material import PASSAGE_LENGTH, Triples, flops, minilm, passages, triples
from schemes import Step, merged, ours, padded, sentence_transformers, tokens_of
from timing import LATEST, clock, keep, rounds, row, show, use_processor_time

from adaptive_margins.encoder.embed import embed
from adaptive_margins.encoder.tokens import tokenize

CHUNKS = 1
CONTESTANTS: dict[str, Step] = {
    "ours": ours(CHUNKS),
    "Sentence Transformers, a forward a column": sentence_transformers(merged=False),
    "Sentence Transformers, merged forward": sentence_transformers(merged=True),
    "every text padded to its limit": padded(),
    "merged, not sorted": merged(),
}


def sgemm() -> float:
    """Multiplications and additions a second of a product of two float32 matrices of 2048²."""
    matrix = torch.ones(2048, 2048)
    started = clock()
    for _ in range(3):
        matrix @ matrix
    return 3 * 2 * 2048**3 / (clock() - started)


def same_loss(model: Any, batch: Triples, contestants: dict[str, Step]) -> None:
    """Raise AssertionError unless all contestants compute the same loss; ``model`` has no dropout."""
    found = {name: step(model, batch)[1] for name, step in contestants.items()}
    expected = found["ours"]
    for name, loss in found.items():
        assert abs(loss - expected) < 1e-5, f"{name}: loss {loss}, ours {expected}"


def training(
    encoder: Callable[[float], Any], name: str, size: int, number: int, dropouts: tuple[float, ...]
) -> list[dict[str, Any]]:
    """Triples/s of a step of each contestant, and the share of the sgemm rate that ours reaches on real tokens."""
    data = triples(size * number)
    same_loss(encoder(0.0), data[:4], CONTESTANTS)
    rows = []
    for dropout in dropouts:
        model = encoder(dropout)
        setting = f"{name}, B {size}, dropout {dropout:g}"

        def rate(r: int, step: Step, model: Any = model) -> float:
            return size / step(model, data[r * size : (r + 1) * size])[0]

        for step in CONTESTANTS.values():
            step(model, data[:4])
        measured = {n: partial(rate, step=step) for n, step in CONTESTANTS.items()}
        found = rounds({**measured, "sgemm": lambda _: sgemm()}, number)
        product = found.pop("sgemm")
        mine = found.pop("ours")
        rows += [
            row(f"training / {n}", mine, theirs, "triples/s", setting)
            for n, theirs in found.items()
        ]
        real = [
            flops(
                model,
                np.concatenate(
                    [t.lengths for t in tokens_of(model, data[r * size : (r + 1) * size])]
                ),
            )
            for r in range(number)
        ]
        done = [rate / size * work / 1e9 for rate, work in zip(mine, real, strict=True)]
        rows.append(
            row(
                "share of the sgemm rate, real tokens",
                done,
                [p / 1e9 for p in product],
                "GFLOP/s",
                setting,
            )
        )
    return rows


def encoding(
    encoder: Callable[[float], Any], name: str, count: int, number: int
) -> list[dict[str, Any]]:
    """Passages/s from texts to unit vectors, tokenising included."""
    model = encoder(0.0)
    model.max_seq_length = PASSAGE_LENGTH
    texts = passages(count * number, seed=2)

    def of(r: int) -> list[str]:
        return texts[r * count : (r + 1) * count]

    def mine(r: int) -> np.ndarray:
        return embed(model, tokenize(model, of(r), PASSAGE_LENGTH))

    def theirs(r: int) -> np.ndarray:
        return model.encode(of(r), normalize_embeddings=True, show_progress_bar=False)

    def rate(r: int, work: Callable[[int], np.ndarray]) -> float:
        started = clock()
        work(r)
        return count / (clock() - started)

    np.testing.assert_allclose(mine(0)[:32], theirs(0)[:32], atol=1e-5)
    found = rounds({"ours": partial(rate, work=mine), "peer": partial(rate, work=theirs)}, number)
    setting = f"{name}, {count} passages of mean 80 tokens, batch size 32 there"
    return [
        row(
            "encoding / SentenceTransformer.encode",
            found["ours"],
            found["peer"],
            "passages/s",
            setting,
        )
    ]


def main() -> None:
    """Run everything, print it, and write latest.json next to this file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--processor-time", action="store_true", help="in one thread; for a busy machine"
    )
    given = parser.parse_args()
    number = given.rounds
    if given.processor_time:
        use_processor_time()
    for part in (
        partial(training, minilm, "MiniLM", 32, number, (0.1, 0.0)),
        partial(encoding, minilm, "MiniLM", 256, number),
        partial(losses.compare, number),
    ):
        rows = part()
        show(rows)
        keep(LATEST, rows)


if __name__ == "__main__":
    main()
