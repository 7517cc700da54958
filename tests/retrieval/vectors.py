"""Embeddings and rankings for the tests of retrieval."""

import numpy as np


def unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def clustered(n: int, dim: int, seed: int, centre_seed: int = 0) -> np.ndarray:
    """Unit vectors around 20 centres, as embeddings lie."""
    centres = np.random.default_rng(centre_seed).normal(size=(20, dim))
    rng = np.random.default_rng(seed)
    return unit(centres[rng.integers(20, size=n)] + 0.7 * rng.normal(size=(n, dim)))


def names(prefix: str, n: int) -> list[str]:
    return [f"{prefix}{i}" for i in range(n)]


def on_disk(folder, passages: np.ndarray, dtype: str = "float32") -> np.ndarray:
    """The passages as `embed_shards` leaves them."""
    np.save(folder / "embeddings.npy", passages.astype(dtype))
    return np.load(folder / "embeddings.npy", mmap_mode="r")


def as_lists(run):
    return {qid: list(hits.items()) for qid, hits in run.items()}


def brute_force(queries, passages, qids, ids, depth):
    """Inner products in float64, rounded to float32, then trec_eval's order; query by query."""
    run = {}
    for qid, q in zip(qids, queries.astype(float), strict=True):
        products = np.multiply(passages.astype(float), q).sum(axis=1).astype(np.float32).tolist()
        run[qid] = {i: s for s, i in sorted(zip(products, ids, strict=True), reverse=True)[:depth]}
    return run
