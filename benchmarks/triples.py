"""Build and read triples at the size of MS MARCO: 39.8 million, in seeded random order, in bounded memory.

Synthetic ids and rows, texts of a few characters: what is measured is the file of triples. Building starts from ids as
ir_datasets yields them; reading goes once through all triples in batches, as training does. Each runs in
a separate process, whose peak resident memory includes the mapped pages of the files.

    python benchmarks/triples.py [--triples N] [--batch-size B] [--folder F]
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
from torch.utils.data import BatchSampler, DataLoader

from adaptive_margins.data.stored import (
    StoredTexts,
    StoredTriples,
    seeded_order,
    write_texts,
    write_triples,
)
from adaptive_margins.progress import bar

# As in msmarco-passage/train/triples-small.
PASSAGES, QUERIES, TRIPLES = 8_841_823, 808_731, 39_780_811
CHUNK = 100_000


def texts(ids: np.ndarray) -> Iterator[tuple[str, str]]:
    for start in range(0, len(ids), CHUNK):
        part = pa.array(ids[start : start + CHUNK]).cast(pa.string()).to_pylist()
        yield from zip(part, part, strict=True)


def triples(count: int, qids: np.ndarray) -> Iterator[tuple[str, str, str]]:
    rng = np.random.default_rng(1)
    for start in range(0, count, CHUNK):
        size = min(CHUNK, count - start)
        columns = (qids[rng.integers(QUERIES, size=size)], *rng.integers(PASSAGES, size=(2, size)))
        yield from zip(*(pa.array(c).cast(pa.string()).to_pylist() for c in columns), strict=True)


def report(what: str, started: float, count: int) -> None:
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    rate = f"{seconds:.0f} s, {count / seconds:,.0f} a second"
    print(f"{what}: {rate}, peak RSS {peak:.2f} GiB", flush=True)


def stored(folder: Path) -> list[StoredTexts]:
    return [StoredTexts(folder / f"{name}.arrow") for name in ("queries", "passages")]


def build_texts(folder: Path) -> None:
    if (folder / "passages.arrow").is_file():
        return
    qids = np.random.default_rng(0).permutation(1_200_000)[:QUERIES]  # numbers, not in order
    started = time.perf_counter()
    write_texts(folder / "queries.arrow", texts(qids), what="queries", expected=QUERIES)
    passages = texts(np.arange(PASSAGES))
    write_texts(folder / "passages.arrow", passages, what="passages", expected=PASSAGES)
    report("texts (a few characters each) written", started, PASSAGES + QUERIES)


def build_triples(folder: Path, count: int) -> None:
    queries, passages = stored(folder)
    qids = np.array(queries.ids[:], dtype=np.int64)
    path = folder / "triples.arrow"
    if path.is_file():
        return
    started = time.perf_counter()
    for _ in triples(count, qids):
        pass
    print(f"(making {count:,} synthetic triples alone: {time.perf_counter() - started:.0f} s)")
    started = time.perf_counter()
    write_triples(path, triples(count, qids), queries, passages, expected=count)
    report("triples written, making them included", started, count)
    print(f"{path.name} {path.stat().st_size / 1e6:,.0f} MB", flush=True)


def read(folder: Path, count: int, batch_size: int) -> None:
    queries, passages = stored(folder)
    rows = StoredTriples(folder / "triples.arrow", queries, passages).rows
    batches = BatchSampler(seeded_order(count, 1), batch_size, drop_last=True)
    seen = np.zeros(count, dtype=bool)
    total = done = 0
    started = time.perf_counter()
    loader = DataLoader(rows, batch_sampler=batches, collate_fn=list)  # as the trainer's
    pairs = bar("read", zip(loader, batches, strict=True), total=len(batches), unit="batches")
    for batch, numbers in pairs:
        seen[numbers] = True
        total += sum(row["positive"] for row in batch)
        done += len(batch)
    report(f"one pass in batches of {batch_size}", started, done)
    print(f"{seen.sum():,} different rows, mean passage {total / seen.sum():,.0f} of {PASSAGES:,}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--triples", type=int, default=TRIPLES)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--folder", type=Path, help="keep the files here, and use existing ones")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.folder or Path(temporary)
        context = multiprocessing.get_context("spawn")
        for work, arguments in (
            (build_texts, (folder,)),
            (build_triples, (folder, given.triples)),
            (read, (folder, given.triples, given.batch_size)),
        ):
            process = context.Process(target=work, args=arguments)
            process.start()
            process.join()
            if process.exitcode:
                raise SystemExit(f"{work.__name__} ended with {process.exitcode}")


if __name__ == "__main__":
    main()
