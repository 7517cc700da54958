"""What the check of a GPU works on: random encoders of the paper's shapes, synthetic texts, and its sizes."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from material import QUERY_LENGTH, Triples, passage_lengths

from adaptive_margins.encoder.load import open_encoder, quiet
from adaptive_margins.files import atomic_folder
from adaptive_margins.profiles.encoders import EncoderSettings, Pooling

KINDS: dict[str, Pooling] = {"distilbert": "cls", "roberta": "cls+linear", "mpnet": "cls+linear"}
"""The paper's encoders, with their pooling (Table 1)."""

_SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
_NAMES = ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size")
_DISTILBERT = ("n_layers", "dim", "n_heads", "hidden_dim")

Row = dict[str, Any]
Rows = Iterator[Row]


@dataclass(frozen=True)
class Sizes:
    """How much is computed.

    Attributes:
        shape: layers, dimensions, heads and inner dimensions of the encoders; None for their own.
        vocabulary: of the encoders; None for their own.
        triples: of a batch whose gradient is compared.
        steps: of the two optimisers.
        counted: steps in which waits are counted.
        batches: triples a step whose speed is measured, the one of the profiles first.
        warm, timed: steps of these, before the clock starts and while it runs.
        passages: embedded for their rate.
        matrix: rows of the square matrices of the matmul rate.
        vectors, dimensions, queries: of the indexes.
    """

    shape: tuple[int, int, int, int] | None
    vocabulary: int | None
    triples: int
    steps: int
    counted: int
    batches: tuple[int, ...]
    warm: int
    timed: int
    passages: int
    matrix: int
    vectors: tuple[int, ...]
    dimensions: int
    queries: int


REAL = Sizes(
    shape=None, vocabulary=None, triples=8, steps=40, counted=5, batches=(128, 64), warm=3, timed=10,
    passages=4096, matrix=8192, vectors=(100_000, 1_000_000), dimensions=768, queries=256,
)  # fmt: skip
MINIATURE = Sizes(
    shape=(2, 64, 2, 128), vocabulary=200, triples=4, steps=4, counted=2, batches=(4,), warm=0, timed=1,
    passages=16, matrix=128, vectors=(700,), dimensions=16, queries=8,
)  # fmt: skip


@dataclass
class Context:
    """What a part of the check gets.

    Attributes:
        device: "cuda" or "cpu".
        sizes: how much it computes.
        folder: for the random encoders, which later parts read.
        ends: when its process is ended, as `time.time` counts.
        parts: results of earlier parts, by name.
    """

    device: str
    sizes: Sizes
    folder: Path
    ends: float = math.inf
    parts: dict[str, Any] = field(default_factory=dict)

    @property
    def left(self) -> float:
        """Seconds until the part is ended."""
        return self.ends - time.time()


def row(
    what: str,
    value: float | None = None,
    unit: str = "",
    *,
    limit: float | None = None,
    reason: str = "",
    failed: bool = False,
    note: str = "",
    **more: Any,
) -> Row:
    """One line of the table. With a ``limit`` it passes if ``value`` is not above it.

    A line without a value has the reason why; with ``failed``, that is a fault.
    """
    if value is not None and not math.isfinite(value):
        value, reason, failed = None, f"the value is {value}", limit is not None
    passed = None
    if failed:
        passed = False
    elif limit is not None and value is not None:
        passed = value <= limit
    return {
        "what": what, "value": value, "unit": unit, "limit": limit, "passed": passed, "reason": reason,
        "note": note, **more,
    }  # fmt: skip


def encoder(context: Context, kind: str, dropout: float | None) -> Any:
    """A random encoder of a kind, on the CPU; always the same one."""
    folder = context.folder / kind
    if not folder.is_dir():
        with atomic_folder(folder) as partial, quiet():
            _write(kind, context.sizes, partial)
    settings = EncoderSettings(base=str(folder), pooling=KINDS[kind])
    return open_encoder(settings, dropout=dropout, device="cpu")


def _write(kind: str, sizes: Sizes, folder: Path) -> None:
    """A model with its tokenizer, which knows the words w5, w6, …: a token each."""
    from transformers import AutoConfig, AutoModel, BertTokenizer

    pad = 0 if kind == "distilbert" else 1
    names = _DISTILBERT if kind == "distilbert" else _NAMES
    values: dict[str, Any] = dict(zip(names, sizes.shape or (), strict=False))
    if sizes.vocabulary:
        values["vocab_size"] = sizes.vocabulary
    config = AutoConfig.for_model(
        kind, pad_token_id=pad, max_position_embeddings=512 + 2 * pad, **values
    )
    # With the usual 0.02, a random model gives all texts nearly the same embedding, and the
    # differences that the loss consists of would be lost in rounding.
    config.initializer_range = config.hidden_size**-0.5
    torch.manual_seed(1)
    AutoModel.from_config(config).save_pretrained(folder)
    special = [*_SPECIAL[:2][:: -1 if pad else 1], *_SPECIAL[2:]]
    words = [*special, *(f"w{n}" for n in range(len(special), config.vocab_size))]
    vocabulary = {word: n for n, word in enumerate(words)}
    BertTokenizer(vocab=vocabulary, model_max_length=512).save_pretrained(folder)


def triples(sizes: Sizes, count: int, seed: int = 1) -> Triples:
    """Random words in texts as long as MS MARCO's: passages of 80 tokens on average, queries of 8."""
    rng = np.random.default_rng(seed)
    highest = sizes.vocabulary or 30_000

    def texts(lengths: np.ndarray) -> list[str]:
        drawn = rng.integers(len(_SPECIAL), highest, size=int(lengths.sum()))
        words = np.char.add("w", drawn.astype(str))
        return [
            " ".join(part[2:]) for part in np.split(words, np.cumsum(lengths)[:-1])
        ]  # two tokens are special

    queries = np.minimum(rng.integers(5, 12, count), QUERY_LENGTH)
    passages = texts(passage_lengths(2 * count, seed))
    return Triples(texts(queries), passages[:count], passages[count:])
