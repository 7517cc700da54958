"""Time this project's code against its peers: `make bench` and `make bench-full`.

    python benchmarks/run.py [--parts PART …] [--rounds N] [--processor-time]

A comparison is a ratio measured in this process, in turns: ours, peer, ours, peer … Above 1, ours is faster or needs less.
It is the median of the rounds' ratios, its spread their quartiles; it goes to latest.json. What is measured at several
sizes goes to growth.json, with the exponent fitted to it.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from material import PASSAGE_LENGTH, Triples, flops, minilm, passages, random_base, triples
from schemes import Step, merged, ours, padded, sentence_transformers, tokens_of
from sentence_transformers.sentence_transformer.losses import MarginMSELoss
from sentence_transformers.util import pairwise_cos_sim
from timing import GROWTH, LATEST, clock, growth, keep, rounds, row, show, use_processor_time
from torch import Tensor, nn

from adaptive_margins.encoder.embed import embed
from adaptive_margins.encoder.tokens import tokenize
from adaptive_margins.losses import margin_loss
from adaptive_margins.retrieval.exact import approximation_recall, exact_search, rerank
from adaptive_margins.retrieval.faiss_index import build_index, choose_index, search_index

Rows = list[dict[str, Any]]
CHUNKS = 1
CONTESTANTS: dict[str, Step] = {
    "ours": ours(CHUNKS),
    "Sentence Transformers, a forward pass per column": sentence_transformers(merged=False),
    "Sentence Transformers, positives and negatives in one pass": sentence_transformers(
        merged=True
    ),
    "every text padded to its limit": padded(),
    "all texts in one batch, not sorted": merged(),
}
REPEATS, EPSILON = 100, 0.3
MEMORY_LIMIT = 16 << 30
"""Bytes for one contestant: a peer that needs more ends with an error instead of the machine."""


def seconds(work: Callable[[], object]) -> float:
    """Seconds that a call takes."""
    started = clock()
    work()
    return clock() - started


# ---- training, encoding, loss ------------------------------------------------------------------------------------------


def sgemm() -> float:
    """Multiplications and additions a second of a product of two float32 matrices of 2048²."""
    matrix = torch.ones(2048, 2048)
    return 3 * 2 * 2048**3 / seconds(lambda: [matrix @ matrix for _ in range(3)])


def same_loss(model: Any, batch: Triples, contestants: dict[str, Step]) -> None:
    """Raise AssertionError unless all contestants compute the same loss; ``model`` has no dropout."""
    found = {name: step(model, batch)[1] for name, step in contestants.items()}
    expected = found["ours"]
    for name, loss in found.items():
        assert abs(loss - expected) < 1e-5, f"{name}: loss {loss}, ours {expected}"


def training(
    encoder: Callable[[float], Any], name: str, size: int, number: int, dropouts: tuple[float, ...]
) -> Rows:
    """Triples/s of a step of each contestant, and the share of the sgemm rate that ours reaches on real tokens."""
    data = triples(size * number)
    parts = [data[r * size : (r + 1) * size] for r in range(number)]
    same_loss(encoder(0.0), data[:4], CONTESTANTS)
    rows = []
    for dropout in dropouts:
        model = encoder(dropout)
        setting = f"{name}, B {size}, dropout {dropout:g}"

        def rate(r: int, step: Step, model: Any = model) -> float:
            return size / step(model, parts[r])[0]

        for step in CONTESTANTS.values():
            step(model, data[:4])
        measured = {n: partial(rate, step=step) for n, step in CONTESTANTS.items()}
        found = rounds({**measured, "sgemm": lambda _: sgemm()}, number)
        product, mine = found.pop("sgemm"), found.pop("ours")
        for n, theirs in found.items():
            rows.append(row(f"training / {n}", mine, theirs, "triples/s", setting))
        lengths = [np.concatenate([t.lengths for t in tokens_of(model, p)]) for p in parts]
        done = [r / size * flops(model, n) / 1e9 for r, n in zip(mine, lengths, strict=True)]
        peak = [p / 1e9 for p in product]
        rows.append(row("share of the sgemm rate, real tokens", done, peak, "GFLOP/s", setting))
    return rows


def encoding(encoder: Callable[[float], Any], name: str, count: int, number: int) -> Rows:
    """Passages/s from texts to unit vectors, tokenising included."""
    model = encoder(0.0)
    model.max_seq_length = PASSAGE_LENGTH
    texts = passages(count * number, seed=2)
    parts = [texts[r * count : (r + 1) * count] for r in range(number)]

    def mine(r: int) -> np.ndarray:
        return embed(model, tokenize(model, parts[r], PASSAGE_LENGTH))

    def theirs(r: int) -> np.ndarray:
        return model.encode(parts[r], normalize_embeddings=True, show_progress_bar=False)

    np.testing.assert_allclose(mine(0)[:32], theirs(0)[:32], atol=1e-5)
    contestants = {"ours": mine, "peer": theirs}
    rates = {n: lambda r, f=f: count / seconds(partial(f, r)) for n, f in contestants.items()}
    found = rounds(rates, number)
    setting = f"{name}, {count} passages of mean 80 tokens, the other in batches of 32"
    what = "encoding / SentenceTransformer.encode"
    return [row(what, found["ours"], found["peer"], "passages/s", setting)]


def loss(number: int) -> Rows:
    """`margin_loss` against Sentence Transformers' MarginMSELoss, on the same embeddings.

    The static target computes the same number (asserted). The others have no peer there; the same MarginMSELoss is
    shown next to them.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # matrices this small gain nothing from a second thread
    peer_loss = MarginMSELoss(nn.Identity(), similarity_fct=pairwise_cos_sim)  # type: ignore[arg-type]
    rows = []
    for size in (32, 128):
        torch.manual_seed(1)
        triple = [torch.randn(size, 384, requires_grad=True) for _ in range(3)]
        labels = torch.full((size,), EPSILON)
        peer = partial(peer_loss.compute_loss_from_embeddings, triple, labels)
        torch.testing.assert_close(margin_loss(*triple, target=EPSILON), peer())
        for target in (EPSILON, "adaptive", "distributed"):
            contestants = {"ours": partial(margin_loss, *triple, target=target), "peer": peer}

            def mean(_: int, loss: Callable[[], Tensor]) -> float:
                return seconds(lambda: [loss().backward() for _ in range(REPEATS)]) / REPEATS

            for each in contestants.values():
                mean(0, each)
            found = rounds({n: partial(mean, loss=f) for n, f in contestants.items()}, number)
            name = f"margin_loss {'static' if target == EPSILON else target} / MarginMSELoss"
            setting = f"B {size}, 384 dimensions, forward and backward, 1 thread"
            rows.append(row(name, found["ours"], found["peer"], "s", setting, less_is_better=True))
    torch.set_num_threads(threads)
    return rows


# ---- reranking -------------------------------------------------------------------------------------------------------


def reranking(number: int, queries: int = 24, depth: int = 20) -> Rows:
    """Each passage and query embedded once, against each pair embedded for itself, 32 pairs at a time."""
    model = minilm(0.0)
    texts = passages(queries * depth // 2, seed=3)  # a passage is a candidate of two queries
    passage_tokens = tokenize(model, texts, PASSAGE_LENGTH)
    query_tokens = tokenize(model, triples(queries, seed=3).query, 30)
    rng = np.random.default_rng(1)
    candidates = {
        str(q): {str(d): 0.0 for d in rng.choice(len(texts), depth, replace=False)}
        for q in range(queries)
    }

    def once() -> dict[str, dict[str, float]]:
        used = sorted({int(d) for scores in candidates.values() for d in scores})
        return rerank(
            candidates, embed(model, query_tokens), [str(q) for q in range(queries)],
            embed(model, passage_tokens, used), [str(d) for d in used],
        )  # fmt: skip

    def unit(batch: Any) -> Tensor:
        return nn.functional.normalize(model(batch)["sentence_embedding"], dim=-1)

    @torch.inference_mode()
    def pairs() -> dict[str, dict[str, float]]:
        wanted = [(int(q), int(d)) for q, scores in candidates.items() for d in scores]
        found: dict[str, dict[str, float]] = {q: {} for q in candidates}
        model.eval()
        for start in range(0, len(wanted), 32):
            part = wanted[start : start + 32]
            q_vectors = unit(query_tokens.batch([q for q, _ in part]))
            d_vectors = unit(passage_tokens.batch([d for _, d in part]))
            for (q, d), score in zip(part, (q_vectors * d_vectors).sum(1).tolist(), strict=True):
                found[str(q)][str(d)] = score
        return found

    mine, theirs = once(), pairs()
    for q in candidates:
        assert all(abs(mine[q][d] - theirs[q][d]) < 1e-5 for d in candidates[q])
    contestants = {"ours": once, "peer": pairs}
    rates = {n: lambda _, f=f: queries * depth / seconds(f) for n, f in contestants.items()}
    found = rounds(rates, number)
    setting = f"MiniLM, {queries} queries × {depth} candidates, {len(texts)} passages"
    return [row("reranking / pair by pair", found["ours"], found["peer"], "pairs/s", setting)]


# ---- memory ----------------------------------------------------------------------------------------------------------


def _measure(name: str, size: int, steps: int, send: Any) -> None:
    """In a separate process: seconds of the fastest step and its peak memory."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
    step, model, batch = CONTESTANTS[name], minilm(0.0), triples(size)
    step(model, batch[:4])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        fastest = min(step(model, batch)[0] for _ in range(steps))
    except (MemoryError, RuntimeError) as error:  # torch's allocator raises RuntimeError
        send.send(str(error).splitlines()[0])
        return
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    send.send((fastest, (peak - before) * 1024))


def measured(name: str, size: int, steps: int = 1) -> tuple[float, float] | str:
    """(seconds, bytes above those of a step of 4 triples) of a step in a separate process, or its error.

    Of several steps the fastest: the first one waits for memory that the process has not touched before.
    """
    context = multiprocessing.get_context("spawn")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=_measure, args=(name, size, steps, send))
    process.start()
    send.close()
    try:
        return receive.recv()
    except EOFError:
        return "the process was killed"
    finally:
        process.join()


def memory(size: int = 128) -> Rows:
    """Peak memory of a step; one measurement each, because it hardly varies."""
    rows = []
    mine = measured("ours", size)
    for name in list(CONTESTANTS)[1:]:
        theirs = measured(name, size)
        if isinstance(mine, str) or isinstance(theirs, str):
            print(f"peak memory / {name}: {theirs}, ours: {mine} (limit {MEMORY_LIMIT >> 30} GiB)")
            continue
        setting = f"MiniLM, B {size}, dropout 0, a step, one measurement"
        both = [mine[1] / 1e9], [theirs[1] / 1e9]
        rows.append(row(f"peak memory / {name}", *both, "GB", setting, less_is_better=True))
    return rows


# ---- growth ----------------------------------------------------------------------------------------------------------


def training_growth(sizes: tuple[int, ...] = (16, 32, 64, 128, 256)) -> Rows:
    """Triples/s and peak memory of a step of ours as the batch grows."""
    rates, gigabytes = [], []
    for size in sizes:
        found = measured("ours", size, steps=3)
        if isinstance(found, str):
            raise RuntimeError(f"B {size}: {found}")
        rates.append(size / found[0])
        gigabytes.append(found[1] / 1e9)
    unit, setting = "triples a batch", f"MiniLM, dropout 0, {CHUNKS} chunk"
    return [
        growth("training", list(sizes), rates, unit, "triples/s", setting),
        growth("peak memory of a step", list(sizes), gigabytes, unit, "GB", setting),
    ]


def encoding_growth(sizes: tuple[int, ...] = (1000, 2000, 5000, 10_000)) -> Rows:
    """Seconds to embed passages."""
    model = minilm(0.0)
    tokens = tokenize(model, passages(max(sizes), seed=4), PASSAGE_LENGTH)
    times = [seconds(partial(embed, model, tokens.take(np.arange(size)))) for size in sizes]
    return [growth("encoding", list(sizes), times, "passages", "s", "MiniLM, mean 80 tokens")]


def index_growth(
    sizes: tuple[int, ...] = (1000, 10_000, 100_000, 1_000_000), dim: int = 128
) -> Rows:
    """Seconds to build an index, to search it, and to search exactly: clustered synthetic unit vectors, 100 queries."""
    rng = np.random.default_rng(1)
    centres = rng.standard_normal((256, dim), dtype=np.float32)

    def unit(count: int) -> np.ndarray:
        noise = rng.standard_normal((count, dim), dtype=np.float32)
        vectors = centres[rng.integers(256, size=count)] + noise
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    everything, queries = unit(max(sizes)), unit(100)
    qids = [str(q) for q in range(len(queries))]
    times: dict[str, list[float]] = {
        name: [] for name in ("building an index", "searching it", "searching exactly")
    }
    for size in sizes:
        vectors, ids = everything[:size], [str(i) for i in range(size)]
        settings = choose_index(size, dim, depth=100)
        ends = [clock()]
        index = build_index(vectors, settings, seed=1, threads=torch.get_num_threads())
        ends.append(clock())
        found = search_index(index, settings, queries, qids, ids, 100, vectors)
        ends.append(clock())
        exact = exact_search(queries, vectors, qids, ids, 100)
        ends.append(clock())
        for taken, spent in zip(times.values(), np.diff(ends).tolist(), strict=True):
            taken.append(spent)
        recall = approximation_recall(found, exact, 100)
        print(f"  {size} vectors: {np.diff(ends)} s, recall of exact {recall:.3f}", flush=True)
    setting = f"{dim} dimensions, 256 clusters, 100 queries, depth 100"
    return [growth(n, list(sizes), spent, "vectors", "s", setting) for n, spent in times.items()]


LARGE = random_base, "random BERT, 12 × 768"
PARTS: dict[str, Callable[[int], Rows]] = {
    "training": lambda number: training(minilm, "MiniLM", 32, number, (0.1, 0.0)),
    "encoding": lambda number: encoding(minilm, "MiniLM", 256, number),
    "loss": loss,
    "rerank": reranking,
    "large": lambda number: training(*LARGE, 8, number, (0.1,)) + encoding(*LARGE, 48, number),
    "memory": lambda _: memory(),
    "growth": lambda _: training_growth() + encoding_growth(),
    "index": lambda _: index_growth(),
}


def main() -> None:
    """Run the parts asked for, print them, and keep them in latest.json and growth.json next to this file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS)[:3])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--processor-time", action="store_true", help="in one thread; for a busy machine")  # fmt: skip
    given = parser.parse_args()
    if given.processor_time:
        use_processor_time()
    for name in given.parts:
        rows = PARTS[name](given.rounds)
        show(rows)
        keep(GROWTH if name in ("growth", "index") else LATEST, rows)


if __name__ == "__main__":
    main()
