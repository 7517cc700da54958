"""Embed, index and search a synthetic collection in bounded memory; writes large.json, from which pages.py writes a page.

    python benchmarks/large.py [ROWS DIM]

Each phase is a process: the first embedding is killed half-way, the next goes on, and a third meets a damaged shard.
"""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import resource
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import psutil
import torch
from timing import stamp
from torch import Tensor, nn

from adaptive_margins.data.trec import Run
from adaptive_margins.encoder.embed import embed, embed_shards
from adaptive_margins.encoder.tokens import Tokens
from adaptive_margins.files import read_object, write_text
from adaptive_margins.retrieval import faiss_index
from adaptive_margins.retrieval.exact import approximation_recall, exact_search

GROUPS, TOPICS, WORDS, OWN, PAD = 64, 4000, 30_000, 200, 34_000
QUERIES, DEPTH = 500, 100


class StandIn(nn.Module):
    """Embeds a text as the sum of vectors of its topic (they lie in groups) and its words: no transformer, a lookup."""

    device = torch.device("cpu")

    def __init__(self, dim: int) -> None:
        super().__init__()
        draw = partial(torch.randn, generator=torch.Generator().manual_seed(1))
        topics = 2 * draw(GROUPS, dim)[torch.arange(TOPICS) % GROUPS] + 2 * draw(TOPICS, dim)
        deviation = (1 + 12 * torch.arange(dim) / dim) ** -0.5  # uneven, as of text embeddings
        vectors = torch.cat([draw(WORDS, dim), topics]) * deviation @ torch.linalg.qr(draw(dim, dim)).Q  # fmt: skip
        vectors = nn.functional.pad(vectors, (0, 0, 0, 1))  # a row of zeros for PAD
        self.table = nn.EmbeddingBag.from_pretrained(vectors, mode="sum", padding_idx=PAD)
        self.get_embedding_dimension = lambda: dim

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"sentence_embedding": self.table(features["input_ids"])}


def texts(rows: int, folder: Path) -> Tokens:
    """A topic each, of which some have many texts and most have few, and 6 to 20 words, half of them among its own."""
    if (folder / "ids.npy").exists():
        return Tokens(*(np.load(folder / f"{n}.npy", mmap_mode="r") for n in ("ids", "offsets")), PAD)  # fmt: skip
    rng = np.random.default_rng(2)
    weights = np.arange(1, TOPICS + 1) ** -0.7
    topic = rng.choice(TOPICS, rows, p=weights / weights.sum())
    lengths = rng.integers(7, 22, size=rows)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    anywhere = WORDS * rng.random(offsets[-1]) ** 2  # some words are frequent
    own = (7919 * np.repeat(topic, lengths) + rng.integers(OWN, size=offsets[-1])) % WORDS
    ids = np.where(rng.random(offsets[-1]) < 0.5, own, anywhere).astype(np.int32)
    ids[offsets[:-1]] = WORDS + topic
    np.save(folder / "offsets.npy", offsets)
    np.save(folder / "ids.npy", ids)
    return texts(rows, folder)


def questions(passages: Tokens) -> Tokens:
    """Queries near passages: the topic and half of the words of a text, and three words more."""
    rng = np.random.default_rng(3)
    parts = []
    for row in rng.choice(len(passages), QUERIES, replace=False):
        topic, *words = passages.ids[passages.offsets[row] : passages.offsets[row + 1]]
        words = rng.choice(words, len(words) // 2, replace=False)
        parts.append([topic, *words, *rng.integers(WORDS, size=3)])
    return Tokens(np.concatenate(parts), np.cumsum([0, *map(len, parts)]), passages.pad)


@dataclasses.dataclass(frozen=True)
class Large:
    """A collection of ``rows`` passages, and its files."""

    folder: Path
    rows: int
    dim: int
    shard: int = 65_536

    def embed(self) -> dict[str, Any]:
        """Embed what is missing; warnings are of damaged shards."""
        result: dict[str, Any] = {"complete before": len(self.complete())}
        with warnings.catch_warnings(record=True, action="always") as caught:
            options = {"shard": self.shard, "dtype": "float16", "batch_tokens": 65_536}
            embed_shards(StandIn(self.dim), texts(self.rows, self.folder), self.folder, **options)
        return {**result, "warnings": [str(w.message) for w in caught]}

    def complete(self) -> list[int]:
        return read_object(self.folder / "shards.json").get("done", [])

    def stored(self, mode: Any = "r") -> np.ndarray:
        return np.load(self.folder / "embeddings.npy", mmap_mode=mode)

    def build(self) -> dict[str, Any]:
        """Index the embeddings on disk."""
        settings = faiss_index.choose_index(self.rows, self.dim, depth=DEPTH)
        add, begun = faiss_index._add, []
        faiss_index._add = lambda *given: begun.append(time.process_time()) or add(*given)
        index = faiss_index.build_index(self.stored(), settings, seed=1)
        adding = time.process_time() - begun[0]
        faiss.write_index(index, str(self.folder / "passages.faiss"))
        return {"settings": dataclasses.asdict(settings), "adding": adding}

    def search(self, exactly: bool) -> dict[str, Any]:
        """The best hits by the index or by all embeddings, and seconds of a query."""
        queries = embed(StandIn(self.dim), questions(texts(self.rows, self.folder)))
        qids, ids = [list(map(str, range(n))) for n in (len(queries), self.rows)]
        search: Callable[..., Run] = partial(exact_search, passage_embeddings=self.stored())
        if not exactly:
            index = faiss.read_index(str(self.folder / "passages.faiss"))
            settings = faiss_index.choose_index(self.rows, self.dim, depth=DEPTH)
            search = partial(faiss_index.search_index, index, settings, embeddings=self.stored())
        since = time.process_time()
        run = search(query_embeddings=queries, qids=qids, ids=ids, depth=DEPTH)
        return {"run": run, "a query": (time.process_time() - since) / len(qids)}


def phase(work: Callable[[], dict[str, Any]], until: Any = None) -> dict[str, Any]:
    """What ``work`` finds in another process of one thread, its seconds and peak bytes; killed once ``until()``."""
    receive, send = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=_phase, args=(work, send))
    process.start()
    send.close()
    while until is not None and process.is_alive():
        if until():
            process.kill()
        time.sleep(0.001)
    with suppress(EOFError):
        return receive.recv()
    return {}


def _phase(work: Callable[[], dict[str, Any]], send: Any) -> None:
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    process, peak = psutil.Process(), 0

    def watch() -> None:
        nonlocal peak
        while True:
            memory = process.memory_info()
            peak = max(peak, memory.rss - memory.shared)
            time.sleep(0.02)

    threading.Thread(target=watch, daemon=True).start()
    time.sleep(0.1)  # its first look
    wall, cpu = time.perf_counter(), time.process_time()
    found = work()
    found |= {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    send.send({**found, "memory": peak, "with mapped files": 1024 * resident})


def measure(large: Large) -> dict[str, Any]:
    """All phases: what they took, and the share of the exact hits that the index finds."""
    count = -(-large.rows // large.shard)
    phase(lambda: {"texts": len(texts(large.rows, large.folder))})  # writes them
    killed = phase(large.embed, until=lambda: len(large.complete()) >= count // 2)
    phases = {"imports alone": phase(dict), "embedding, after a kill": phase(large.embed)}
    large.stored("r+").view(np.uint16)[large.rows // 2, 0] ^= 4  # a bit
    phases["checking all shards, embedding one again"] = phase(large.embed)
    phases["building the index"] = built = phase(large.build)
    runs = []
    for name in ("searching it", "searching exactly"):
        phases[name] = phase(partial(large.search, name == "searching exactly"))
        runs.append(phases[name].pop("run"))
    return {
        "rows": large.rows, "dim": large.dim, "shards": count, "killed": not killed,
        "recall": approximation_recall(*runs, DEPTH), "queries": QUERIES, "depth": DEPTH,
        "settings": built.pop("settings"), "blas": os.environ.get("OPENBLAS_CORETYPE", ""), "adding": built.pop("adding"),
        "bytes": {path.name: path.stat().st_size for path in large.folder.iterdir()}, "phases": phases, **stamp(),
    }  # fmt: skip


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as work:
        measured = measure(Large(Path(work), *map(int, sys.argv[1:] or (1_000_000, 384))))
    write_text(Path(__file__).with_name("large.json"), json.dumps(measured, indent=1) + "\n")
