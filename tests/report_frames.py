"""Synthetic frames in the form that experiments gives to report: realistic, seeded, small."""

from itertools import product

import numpy as np
import pandas as pd

ENCODERS = ("minilm-1", "minilm-2", "minilm-3")
NDCG, HITS, RECALL = "nDCG@10", "Success(rel=2)@5", "R(rel=2)@20"
MEASURES = (NDCG, HITS)
TESTS = ("test1", "test2")


def run_id(*what) -> str:
    """A run id that looks like one: 16 hexadecimal digits."""
    import hashlib

    return hashlib.sha256(repr(what).encode()).hexdigest()[:16]


def mark_maxima(frame: pd.DataFrame, by: list[str], seed: int = 1) -> pd.DataFrame:
    """Set ``maximum`` on the first highest value of each curve, among the rows of ``seed``."""
    frame = frame.copy()
    frame["maximum"] = False
    best = frame[frame["seed"] == seed].groupby(by, sort=False)["value"].idxmax()
    frame.loc[best, "maximum"] = True
    return frame


def figure3(encoders=ENCODERS, targets=(0.0, 0.2, 0.4, 0.6, 0.8, 1.0), seeds=None) -> pd.DataFrame:
    seeds = seeds or {encoders[0]: (1, 2, 3)}
    rng = np.random.default_rng(3)
    rows = []
    for (e, encoder), in_batch in product(enumerate(encoders), (False, True)):
        for seed, target in product(seeds.get(encoder, (1,)), targets):
            for measure in MEASURES:
                base = 0.442 if measure == NDCG else 0.655
                peak = (0.2, 0.3, 0.4)[e % 3] + (0.2 if measure == HITS else 0)
                value = base + 0.008 * e + 0.028 - 0.07 * (target - peak) ** 2
                value += rng.normal(0, 0.0025) - (0.012 if in_batch else 0)
                rows.append(
                    {
                        "encoder": encoder,
                        "in_batch": in_batch,
                        "target": target,
                        "seed": seed,
                        "measure": measure,
                        "value": value,
                        "start": base,
                        "maximum": False,
                        "run_id": run_id(encoder, target, in_batch, seed),
                        "start_run_id": run_id("start", encoder),
                    }
                )
    return mark_maxima(pd.DataFrame(rows), ["encoder", "in_batch", "measure"])


def curves(kind: str, encoders=ENCODERS, sizes=(32,), in_batches=(False, True)) -> pd.DataFrame:
    rng = np.random.default_rng(4)
    rows = []
    for (e, encoder), in_batch, size in product(enumerate(encoders), in_batches, sizes):
        for triples in range(0, 1537, 128):
            x = triples / 1536
            for measure in MEASURES:
                base = 0.442 if measure == NDCG else 0.655
                gain = (0.03 + 0.008 * e) * (1 - np.exp(-3 * x)) - 0.006 * x**3
                value = (
                    base
                    + gain
                    - (0.01 * x if in_batch else 0)
                    + 0.004 * (kind == "distributed") * x
                )
                value += rng.normal(0, 0.002) if triples else 0
                rows.append(
                    {
                        "encoder": encoder,
                        "in_batch": in_batch,
                        "batch_size": size,
                        "seed": 1,
                        "step": triples // size,
                        "triples": triples,
                        "measure": measure,
                        "value": value,
                        "maximum": False,
                        "run_id": run_id(kind, encoder, in_batch, size),
                    }
                )
    return mark_maxima(pd.DataFrame(rows), ["encoder", "in_batch", "batch_size", "measure"])


def figure4(**kwargs) -> pd.DataFrame:
    return curves("adaptive", **kwargs)


def figure5(sizes=(16, 32), **kwargs) -> pd.DataFrame:
    return curves("distributed", sizes=sizes, in_batches=(False,), **kwargs)


def figure6(encoders=ENCODERS, sizes=(32,), steps=48, span=20, window=4) -> pd.DataFrame:
    rng = np.random.default_rng(6)
    rows = []
    for (e, encoder), size in product(enumerate(encoders), sizes):
        mean = 0.06 + 0.14 * np.exp(-np.arange(1, steps + 1) / (6 + 2 * e))
        mean += rng.normal(0, 0.004, steps)
        for part, chosen in (("first", range(span)), ("last", range(steps - span, steps))):
            rows += [
                {
                    "encoder": encoder,
                    "batch_size": size,
                    "part": part,
                    "step": step + 1,
                    "mean": mean[step],
                    "min": mean[step] - 0.22 + rng.normal(0, 0.01),
                    "max": mean[step] + 0.52 + rng.normal(0, 0.02),
                    "window": window,
                    "span": span,
                    "run_id": run_id("distributed", encoder, size),
                }
                for step in chosen
            ]
    return pd.DataFrame(rows)


def gains(loss: str = "adaptive") -> pd.DataFrame:
    frame = figure4() if loss == "adaptive" else figure5()
    best = frame[frame["maximum"]]
    start = frame[frame["step"] == 0].set_index(["run_id", "measure"])["value"]
    rows = []
    for row in best.itertuples():
        first = start[row.run_id, row.measure]
        difference = row.value - first
        rows.append(
            {
                "encoder": row.encoder,
                "loss": loss,
                "in_batch": row.in_batch,
                "measure": row.measure,
                "start": first,
                "best": row.value,
                "difference": difference,
                "low": difference - 0.012,
                "high": difference + 0.012,
                "run_id": row.run_id,
            }
        )
    return pd.DataFrame(rows)
