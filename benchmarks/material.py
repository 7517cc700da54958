"""What is benchmarked: encoders, and triples of real texts as long as MS MARCO's."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from adaptive_margins.data.pydocs import build_pydocs
from adaptive_margins.encoder.load import open_encoder, quiet, weights_folder
from adaptive_margins.profiles.encoders import EncoderSettings

QUERY_LENGTH, PASSAGE_LENGTH = 30, 200  # Section 4
MEAN_LENGTH, SHAPE = 80, 5.5  # tokens of MS MARCO's passages; gamma with a standard deviation of 34
PACKAGES = ("stdlib", "numpy", "scipy", "pandas")


@dataclass(frozen=True)
class Triples:
    """Texts of triples: row i of the three columns belongs together."""

    query: list[str]
    positive: list[str]
    negative: list[str]

    def __getitem__(self, rows: slice) -> Triples:
        return Triples(self.query[rows], self.positive[rows], self.negative[rows])

    def __len__(self) -> int:
        return len(self.query)


@cache
def minilm(dropout: float) -> Any:
    """all-MiniLM-L6-v2: 6 layers of 384 dimensions."""
    return open_encoder(EncoderSettings(base="minilm"), dropout=dropout)


@cache
def random_base(dropout: float, layers: int = 12, width: int = 768) -> Any:
    """A random BERT of the paper's size with MiniLM's tokenizer."""
    from transformers import AutoTokenizer, BertConfig, BertModel

    heads = max(1, width // 64)
    config = BertConfig(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * width,
    )
    with tempfile.TemporaryDirectory() as folder, quiet():
        BertModel(config).save_pretrained(folder)
        AutoTokenizer.from_pretrained(
            weights_folder(EncoderSettings(base="minilm"))
        ).save_pretrained(folder)
        return open_encoder(EncoderSettings(base=folder), dropout=dropout)


def windows(tokenizer: Any, texts: Sequence[str], lengths: np.ndarray) -> list[str]:
    """Consecutive stretches of the texts' words, of about so many tokens (two special ones included), one a length."""
    words = " ".join(texts).split()
    unique, at = np.unique(words, return_inverse=True)
    ids = tokenizer(unique.tolist(), add_special_tokens=False)["input_ids"]
    ends = np.cumsum(np.array([len(i) for i in ids])[at])
    found, first = [], 0
    for length in lengths:
        before = ends[first - 1] if first else 0
        after = int(np.searchsorted(ends, before + length - 2)) + 1
        if after >= len(words):
            raise ValueError(f"{len(words)} words do not suffice for {len(lengths)} passages")
        found.append(" ".join(words[first:after]))
        first = after
    return found


def passage_lengths(count: int, seed: int) -> np.ndarray:
    """Tokens of ``count`` passages, distributed like MS MARCO's: mean 80, at most 200."""
    drawn = np.random.default_rng(seed).gamma(SHAPE, MEAN_LENGTH / SHAPE, count)
    return np.clip(np.rint(drawn).astype(int), 12, PASSAGE_LENGTH)


@cache
def _pydocs() -> tuple[list[str], list[str]]:
    """Summaries and bodies of docstrings."""
    collection = build_pydocs(
        PACKAGES, seed=1, validation=10, test=10, max_passages=None, max_words=1000
    )
    return list(collection.queries["train"].texts), list(collection.passages.texts)


def passages(count: int, seed: int = 1) -> list[str]:
    """Real text in passages as long as MS MARCO's."""
    return windows(minilm(0.0).tokenizer, _pydocs()[1], passage_lengths(count, seed))


def triples(count: int, seed: int = 1) -> Triples:
    """Queries are summaries, truncated to 30 tokens; positives and negatives are different passages."""
    texts = passages(2 * count, seed)
    summaries = _pydocs()[0]
    chosen = np.random.default_rng(seed).choice(len(summaries), count, replace=False)
    tokenizer = minilm(0.0).tokenizer
    queries = [summaries[i] for i in chosen]
    truncated = tokenizer(
        queries, truncation=True, max_length=QUERY_LENGTH, return_offsets_mapping=True
    )
    ends = [max(end for _, end in offsets) for offsets in truncated["offset_mapping"]]
    queries = [query[:end] for query, end in zip(queries, ends, strict=True)]
    return Triples(queries, texts[:count], texts[count:])


def flops(model: Any, lengths: np.ndarray) -> float:
    """Multiplications and additions of a forward and a backward pass over texts of these lengths, nothing padded.

    Matrix products of the transformer layers only: 12 D² weights a layer for each token, and the two products of the
    attention, 2 L² D; backward twice the forward.
    """
    config = model[0].model.config
    width = config.hidden_size
    inner = getattr(config, "intermediate_size", None) or config.hidden_dim  # DistilBERT's name
    weights = 4 * width * width + 2 * width * inner
    tokens, squares = float(np.sum(lengths)), float(np.sum(np.square(lengths, dtype=np.float64)))
    forward = config.num_hidden_layers * 2 * (weights * tokens + 2 * width * squares)
    return 3 * forward
