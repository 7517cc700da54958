"""The rest of the benchmarks; `make bench-full`: a large encoder, reranking, memory, and growth.

Ratios as in run.py. Growth goes to growth.json, one object a quantity, with the exponent fitted to it.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import run
import torch
from material import PASSAGE_LENGTH, minilm, passages, random_base, triples
from schemes import ours
from timing import GROWTH, LATEST, clock, growth, keep, rounds, row, show, use_processor_time

from adaptive_margins.encoder.embed import embed
from adaptive_margins.encoder.tokens import Tokens, tokenize
from adaptive_margins.retrieval.exact import approximation_recall, exact_search, rerank
from adaptive_margins.retrieval.faiss_index import build_index, choose_index, search_index

MEMORY_LIMIT = (
    16 << 30
)  # of one contestant: a peer that needs more ends with an error instead of the machine


# ---- reranking -------------------------------------------------------------------------------------------------------


def reranking(number: int, queries: int = 24, depth: int = 20) -> list[dict[str, Any]]:
    """Each passage and query embedded once, against each pair embedded for itself, 32 pairs at a time."""
    model = minilm(0.0)
    texts = passages(
        queries * depth // 2, seed=3
    )  # a passage is a candidate of two queries on average
    asked = triples(queries, seed=3).query
    passage_tokens, query_tokens = (
        tokenize(model, texts, PASSAGE_LENGTH),
        tokenize(model, asked, 30),
    )
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

    def pairs() -> dict[str, dict[str, float]]:
        wanted = [(int(q), int(d)) for q, scores in candidates.items() for d in scores]
        found: dict[str, dict[str, float]] = {q: {} for q in candidates}
        model.eval()
        with torch.inference_mode():
            for start in range(0, len(wanted), 32):
                part = wanted[start : start + 32]
                vectors = [
                    torch.nn.functional.normalize(
                        model(tokens.batch([pair[side] for pair in part]))["sentence_embedding"],
                        dim=-1,
                    )
                    for side, tokens in enumerate((query_tokens, passage_tokens))
                ]
                for (q, d), score in zip(
                    part, (vectors[0] * vectors[1]).sum(1).tolist(), strict=True
                ):
                    found[str(q)][str(d)] = score
        return found

    mine, theirs = once(), pairs()
    for q in candidates:
        assert all(abs(mine[q][d] - theirs[q][d]) < 1e-5 for d in candidates[q])

    def rate(_: int, work: Callable[[], object]) -> float:
        started = clock()
        work()
        return queries * depth / (clock() - started)

    found = rounds({"ours": partial(rate, work=once), "peer": partial(rate, work=pairs)}, number)
    setting = f"MiniLM, {queries} queries × {depth} candidates, {len(texts)} passages"
    return [row("reranking / pair by pair", found["ours"], found["peer"], "pairs/s", setting)]


# ---- memory ----------------------------------------------------------------------------------------------------------


def _measure(name: str, dropout: float, size: int, steps: int, send: Any) -> None:
    """In a process of its own: peak memory and seconds of the fastest step."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
    step = {**run.CONTESTANTS, "ours": ours(run.CHUNKS)}[name]
    model, batch = minilm(dropout), triples(size)
    step(model, batch[:4])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        seconds = min(step(model, batch)[0] for _ in range(steps))
    except (MemoryError, RuntimeError) as error:  # torch's allocator raises RuntimeError
        send.send(str(error).splitlines()[0])
        return
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    send.send((seconds, (peak - before) * 1024))


def measured(name: str, dropout: float, size: int, steps: int = 1) -> tuple[float, float] | str:
    """(seconds, bytes above those of a step of 4 triples) of a step in a process of its own, or its error.

    Of several steps the fastest: the first one waits for memory that the process has not touched before.
    """
    context = multiprocessing.get_context("spawn")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=_measure, args=(name, dropout, size, steps, send))
    process.start()
    send.close()
    try:
        return receive.recv()
    except EOFError:
        return "the process was killed"
    finally:
        process.join()


def memory(size: int = 128) -> list[dict[str, Any]]:
    """Peak memory of a step; one measurement each, for it hardly varies."""
    rows = []
    found = {name: measured(name, 0.0, size) for name in run.CONTESTANTS}
    for name, result in found.items():
        mine = found["ours"]
        if name == "ours" or isinstance(mine, str):
            continue
        if isinstance(result, str):
            print(f"peak memory / {name}: {result} (limit {MEMORY_LIMIT >> 30} GiB)")
            continue
        setting = f"MiniLM, B {size}, dropout 0, a step, one measurement"
        rows.append(row(
            f"peak memory / {name}", [mine[1] / 1e9], [result[1] / 1e9], "GB", setting, less_is_better=True
        ))  # fmt: skip
    return rows


# ---- growth ----------------------------------------------------------------------------------------------------------


def training_growth(sizes: tuple[int, ...] = (16, 32, 64, 128, 256)) -> list[dict[str, Any]]:
    """Triples/s and peak memory of a step of ours as the batch grows."""
    found = []
    for size in sizes:
        result = measured("ours", 0.0, size, steps=3)
        if isinstance(result, str):
            raise RuntimeError(f"B {size}: {result}")
        found.append(result)
    setting = f"MiniLM, dropout 0, {run.CHUNKS} chunks"
    rates = [size / seconds for size, (seconds, _) in zip(sizes, found, strict=True)]
    gigabytes = [peak / 1e9 for _, peak in found]
    unit = "triples a batch"
    return [
        growth("training", list(sizes), rates, unit, "triples/s", setting),
        growth("peak memory of a step", list(sizes), gigabytes, unit, "GB", setting),
    ]


def encoding_growth(sizes: tuple[int, ...] = (1000, 2000, 5000, 10_000)) -> list[dict[str, Any]]:
    """Seconds to embed passages."""
    model = minilm(0.0)
    tokens = tokenize(model, passages(max(sizes), seed=4), PASSAGE_LENGTH)
    seconds = []
    for size in sizes:
        part: Tokens = tokens.take(np.arange(size))
        started = clock()
        embed(model, part)
        seconds.append(clock() - started)
    return [growth("encoding", list(sizes), seconds, "passages", "s", "MiniLM, mean 80 tokens")]


def index_growth(
    sizes: tuple[int, ...] = (1000, 10_000, 100_000, 1_000_000), dim: int = 128
) -> list[dict[str, Any]]:
    """Seconds to build an index, to search it, and to search exactly: clustered synthetic unit vectors, 100 queries."""
    rng = np.random.default_rng(1)
    centres = rng.standard_normal((256, dim), dtype=np.float32)

    def unit(count: int) -> np.ndarray:
        vectors = centres[rng.integers(256, size=count)] + rng.standard_normal(
            (count, dim), dtype=np.float32
        )
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    everything, queries = unit(max(sizes)), unit(100)
    qids = [str(q) for q in range(len(queries))]
    times: dict[str, list[float]] = {
        "building an index": [],
        "searching it": [],
        "searching exactly": [],
    }
    recall = []
    for size in sizes:
        vectors, ids = everything[:size], [str(i) for i in range(size)]
        settings = choose_index(size, dim, depth=100)
        started = clock()
        index = build_index(vectors, settings, seed=1, threads=torch.get_num_threads())
        times["building an index"].append(clock() - started)
        started = clock()
        found = search_index(index, settings, queries, qids, ids, 100, vectors)
        times["searching it"].append(clock() - started)
        started = clock()
        exact = exact_search(queries, vectors, qids, ids, 100)
        times["searching exactly"].append(clock() - started)
        recall.append(approximation_recall(found, exact, 100))
        seconds = ", ".join(f"{name} {times[name][-1]:.4g} s" for name in times)
        print(f"  {size} vectors: {seconds}, recall of exact {recall[-1]:.3f}", flush=True)
    setting = f"{dim} dimensions, 256 clusters, 100 queries, depth 100"
    return [
        growth(name, list(sizes), seconds, "vectors", "s", setting)
        for name, seconds in times.items()
    ]


PARTS = ("rerank", "large", "memory", "growth", "index")


def main() -> None:
    """Run the parts asked for, print them, and keep them in latest.json and growth.json next to this file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument(
        "--processor-time", action="store_true", help="in one thread; for a busy machine"
    )
    given = parser.parse_args()
    if given.processor_time:
        use_processor_time()
    parts: dict[str, Callable[[], list[dict[str, Any]]]] = {
        "rerank": lambda: reranking(given.rounds),
        "large": lambda: (
            run.training(random_base, "random BERT, 12 × 768", 8, given.rounds, (0.1,))
            + run.encoding(random_base, "random BERT, 12 × 768", 48, given.rounds)
        ),
        "memory": memory,
    }
    for name, part in parts.items():
        if name in given.parts:
            rows = part()
            show(rows)
            keep(LATEST, rows)
    growing = {"growth": (training_growth, encoding_growth), "index": (index_growth,)}
    for name in given.parts:
        for grown in growing.get(name, ()):
            rows = grown()
            for r in rows:
                values = ", ".join(
                    f"{s:g}: {v:.3g}" for s, v in zip(r["sizes"], r["values"], strict=True)
                )
                print(
                    f"{r['name']:<24} exponent {r['exponent']:.2f}  {values} {r['unit']}  ({r['setting']})"
                )
            keep(GROWTH, rows)


if __name__ == "__main__":
    main()
