"""Frames in the form that the experiments give to the book: committed ones, and small synthetic ones."""

import hashlib
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd

EDITION = Path(__file__).resolve().parents[1] / "book" / "laptop_long"
ENCODERS = ("minilm-3", "minilm-4", "minilm-5")
NDCG, HITS, RECALL = "nDCG@10", "Success(rel=2)@5", "R(rel=2)@20"
MEASURES = (NDCG, HITS)
TESTS = ("test1", "test2")
NAN = float("nan")
VARIANTS = (
    ("static", False), ("static", True), ("adaptive", False), ("adaptive", True), ("distributed", False),
)  # fmt: skip
LISTED = (
    ("self-distillation", "Adaptive", "Rand.", "✗", "ours", 0.482, 0.815, 1280),
    ("self-distillation", "Adaptive", "Rand.", "✓", "ours", 0.471, 0.809, 1024),
    ("self-distillation", "Distributed", "Rand.", "✓", "ours", 0.492, 0.821, 1536),
    ("no distillation", "BM25", "—", "—", "ours", 0.447, 0.762, 0),
    ("no distillation", "Static (tuned)", "Rand.", "✗", "ours", 0.489, 0.818, 1536),
    ("no distillation", "Static (tuned)", "Rand.", "✓", "ours", 0.470, 0.801, 1280),
    ("no distillation", "Static (ε = 1)", "Rand.", "✗", "ours", 0.431, 0.768, 512),
    ("not in the paper", "Softmax (MNRL)", "Rand.", "✓", "not in the paper", 0.487, 0.824, 1536),
    ("not in the paper", "Zero-shot encoder", "—", "—", "not in the paper", 0.438, 0.771, 0),
)


def run_id(*what) -> str:
    """A run id that looks like one: 16 hexadecimal digits."""
    return hashlib.sha256(repr(what).encode()).hexdigest()[:16]


def committed(name: str, encoders=ENCODERS) -> pd.DataFrame:
    """A frame of the profile laptop-long, perhaps with other names for its encoders."""
    frame = pd.read_csv(EDITION / f"{name}.csv")
    return frame.assign(encoder=frame["encoder"].map(dict(zip(ENCODERS, encoders, strict=True))))


def figure3(encoders=ENCODERS, seeds=None) -> pd.DataFrame:
    """With the first seed, and those of ``seeds``; no run has collapsed, and all begin alike."""
    seeds = seeds or {encoders[0]: (1, 2, 3)}
    frame = committed("figure3", encoders)
    pairs = zip(frame["encoder"], frame["seed"], strict=True)
    frame = frame[[seed in seeds.get(encoder, (1,)) for encoder, seed in pairs]]
    start = frame["measure"].map({NDCG: 0.442, HITS: 0.655})
    return frame.assign(collapsed=False, start=start).reset_index(drop=True)


def figure4(encoders=ENCODERS) -> pd.DataFrame:
    return committed("figure4", encoders)


def figure5() -> pd.DataFrame:
    return committed("figure5")


def figure6(encoders=ENCODERS, sizes=(32,), steps=48, span=20, window=4) -> pd.DataFrame:
    rng = np.random.default_rng(6)
    rows = []
    for (e, encoder), size in product(enumerate(encoders), sizes):
        mean = 0.06 + 0.14 * np.exp(-np.arange(1, steps + 1) / (6 + 2 * e))
        mean += rng.normal(0, 0.004, steps)
        for part, chosen in (("first", range(span)), ("last", range(steps - span, steps))):
            for step in chosen:
                low = mean[step] - 0.22 + rng.normal(0, 0.01)
                high = mean[step] + 0.52 + rng.normal(0, 0.02)
                id = run_id("distributed", encoder, size)
                rows.append((encoder, size, part, step + 1, mean[step], low, high, window, span, id))  # fmt: skip
    columns = ["encoder", "batch_size", "part", "step", "mean", "min", "max", "window", "span", "run_id"]  # fmt: skip
    return pd.DataFrame(rows, columns=columns)


def table1() -> pd.DataFrame:
    return pd.DataFrame(
        {
            "encoder": name, "base": f"all-MiniLM-L6-v2, last {k} layers trained", "parameters": 22_713_216,
            "trained": 1_774_464 * k, "embedding": "mean", "dimensions": 384, "run_id": run_id("start", name),
        }
        for k, name in enumerate(ENCODERS, 1)
    )  # fmt: skip


def table2() -> pd.DataFrame:
    positive, own = 0.74, 0.31
    rows = [
        ("q", "numpy.fft.fft", "Compute the one-dimensional discrete Fourier <transform>.", NAN, NAN),
        ("d+", "numpy.fft.fft", "This function computes the n-point DFT & more. " * 8, positive, NAN),
        ("d-max", "scipy.fft.dct", "Return the Discrete Cosine Transform.", own, 0.81),
        ("d-mid", "os.path.join", "Join path components.", 0.05, 0.52),
        ("d-min", "abc.ABC", "Helper class.", -0.02, 0.44),
    ]  # fmt: skip
    frame = pd.DataFrame(rows, columns=["role", "id", "text", "rho", "target"])
    return frame.assign(
        loss_table=(positive - frame["rho"] - frame["target"]) ** 2,
        loss_equation=(positive - own - frame["target"]) ** 2,
        run_id=run_id("table2"),
        qid="q17",
    )


def compare(values: dict, reference: str | None, comparisons: int, half: float = 0.03) -> dict:
    """Per run id a test against ``reference`` or the best, as the experiments make it."""
    against = reference or max(values, key=values.get)
    rows = {}
    for id, value in values.items():
        difference, test = value - values[against], {}
        low, high = difference - half, difference + half
        test = {"difference": difference, "low": low, "high": high, "p": 0.01, "p_adjusted": 0.01 * comparisons}  # fmt: skip
        rows[id] = {
            "value": value,
            **(dict.fromkeys(test, NAN) if id == against else test),
            "comparisons": comparisons,
            "equivalent": id != against and low > -0.05 and high < 0.05,
            "reference_run_id": against,
        }
    return rows


def table3(encoders=ENCODERS) -> pd.DataFrame:
    rng = np.random.default_rng(33)
    shift = {"static": 0.010, "adaptive": 0.0, "distributed": 0.012}
    rows = []
    for (e, encoder), name, measure in product(enumerate(encoders), TESTS, (NDCG, RECALL)):
        base = (0.47 if measure == NDCG else 0.80) + 0.008 * e
        values = {
            run_id(encoder, *v): base + shift[v[0]] - 0.015 * v[1] + rng.normal(0, 0.003)
            for v in VARIANTS
        }
        tests = compare(values, None, len(VARIANTS) - 1)
        for (target, in_batch), (id, test) in zip(VARIANTS, tests.items(), strict=True):
            static = target == "static"
            seconds = (79.6 if static else 12.4) * (e + 1) * (40 if static and e == 2 else 1)
            rows.append(
                {
                    "encoder": encoder, "target": target, "epsilon": 0.2 if static else NAN, "in_batch": in_batch,
                    "set": name, "measure": measure, "best": test["reference_run_id"] == id, **test, "seconds": seconds,
                    "sweep_seconds": 66.0 * (e + 1) if static else 0.0, "triples": 1024 + 256 * e, "run_id": id,
                }
            )  # fmt: skip
    return pd.DataFrame(rows)


def table4() -> pd.DataFrame:
    rows = []
    for (s, name), (m, measure) in product(enumerate(TESTS), enumerate((NDCG, RECALL))):
        values = {run_id(x[1], x[3]): x[5 + m] + 0.006 * s for x in LISTED}
        tests = compare(values, run_id("Softmax (MNRL)", "✓"), len(LISTED) - 1)
        for block, loss, sampling, in_batch, source, *_, triples in LISTED:
            id = run_id(loss, in_batch)
            best = max(values[run_id(x[1], x[3])] for x in LISTED if x[0] == block)
            test = {k: v for k, v in tests[id].items() if k != "p"}
            rows.append(
                {
                    "block": block, "loss": loss, "sampling": sampling, "in_batch": in_batch, "source": source, "set": name,
                    "measure": measure, "best": values[id] == best, **test, "seconds": triples / 100, "teacher_seconds": 0.0, "triples": triples, "run_id": id,
                }
            )  # fmt: skip
    return pd.DataFrame(rows)
