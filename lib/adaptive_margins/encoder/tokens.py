"""Tokenised texts, in memory or memory-mapped."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from adaptive_margins import progress
from adaptive_margins.encoder.checks import EncoderError, read_settings
from adaptive_margins.files import atomic_folder, locked, remove_damaged, write_checksums

_TEXTS = 8192  # texts tokenised at a time; the output is a hundred times their size


@dataclass(frozen=True)
class Tokens:
    """Tokenised texts, end to end: text i is ``ids[offsets[i]:offsets[i + 1]]``.

    ``ids`` has any integer type, and both arrays may be memory-mapped. ``pad`` fills batches.
    """

    ids: np.ndarray
    offsets: np.ndarray
    pad: int

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        """Tokens per text, special tokens included."""
        return np.diff(self.offsets)

    def take(self, rows: Sequence[int] | np.ndarray) -> Tokens:
        """Return the texts in ``rows``, in that order, in memory."""
        rows = np.asarray(rows, dtype=np.int64)
        start, lengths = self.offsets[rows], self.offsets[rows + 1] - self.offsets[rows]
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        position = np.arange(offsets[-1]) + np.repeat(start - offsets[:-1], lengths)
        return Tokens(self.ids[position], offsets, self.pad)

    def __add__(self, other: Tokens) -> Tokens:
        """Concatenate texts with the same ``pad``, in memory."""
        offsets = np.concatenate([self.offsets, other.offsets[1:] + self.offsets[-1]])
        return Tokens(np.concatenate([self.ids, other.ids]), offsets, self.pad)

    def batch(self, rows: Sequence[int] | np.ndarray) -> dict[str, Tensor]:
        """Features of the texts in ``rows``, padded to the longest of L tokens.

        ``input_ids`` and ``attention_mask``, (len(rows), L) int64.
        """
        rows = np.asarray(rows)
        lengths = self.offsets[rows + 1] - self.offsets[rows]
        position = np.arange(lengths.max())
        mask = position < lengths[:, None]
        ids = np.full(mask.shape, self.pad, dtype=np.int64)
        ids[mask] = self.ids[(self.offsets[rows][:, None] + position)[mask]]
        return {
            "input_ids": torch.from_numpy(ids),
            "attention_mask": torch.from_numpy(mask.astype(np.int64)),
        }


def tokenize(encoder: Any, texts: Sequence[str], max_length: int) -> Tokens:
    """Tokenise ``texts``, truncated at ``max_length`` (special tokens included), in memory."""
    tokenizer = encoder.tokenizer
    ids, lengths = _token_ids(tokenizer, texts, max_length)
    return Tokens(ids, np.concatenate([[0], np.cumsum(lengths)]), tokenizer.pad_token_id)


def shorten(encoder: Any, texts: Sequence[str], max_length: int) -> list[str]:
    """Texts truncated after a word, so that none has more than ``max_length`` tokens.

    Special tokens count. A first word that is longer is truncated within.
    """
    result = []
    for start in range(0, len(texts), _TEXTS):
        some = list(texts[start : start + _TEXTS])
        found = encoder.tokenizer(
            some, truncation=True, max_length=max_length, return_offsets_mapping=True
        )["offset_mapping"]
        for text, offsets in zip(some, found, strict=True):
            end = max((stop for _, stop in offsets), default=0)
            if text[end:].strip() and not text[end].isspace():  # within a word
                end = max(text.rfind(" ", 0, end), 0) or end
            result.append(text[:end].rstrip() if text[end:].strip() else text)
    return result


def _token_ids(
    tokenizer: Any, texts: Sequence[str], max_length: int
) -> tuple[np.ndarray, np.ndarray]:
    """The texts' token ids, end to end, in the smallest type that fits; tokens per text (int64)."""
    dtype = np.min_scalar_type(len(tokenizer) - 1)
    parts = [np.empty(0, dtype)]
    lengths: list[int] = []
    for start in range(0, len(texts), _TEXTS):
        found = tokenizer(
            list(texts[start : start + _TEXTS]),
            truncation=True,
            max_length=max_length,
            padding=False,
            return_attention_mask=False,
            return_token_type_ids=False,
        )["input_ids"]
        parts.append(np.fromiter(chain.from_iterable(found), dtype))
        lengths += map(len, found)
    return np.concatenate(parts), np.array(lengths, np.int64)


def count_truncated(
    encoder: Any, texts: Sequence[str], tokens: Tokens, max_length: int
) -> tuple[int, int]:
    """Return how many ``texts`` are too long, and the tokens that `tokenize` left out of them."""
    full, lost = np.flatnonzero(tokens.lengths >= max_length), []
    for start in range(0, len(full), _TEXTS):
        some = [texts[row] for row in full[start : start + _TEXTS].tolist()]
        found = encoder.tokenizer(some, verbose=False, return_attention_mask=False)["input_ids"]
        lost += [len(ids) - max_length for ids in found if len(ids) > max_length]
    return len(lost), sum(lost)


def stored_tokens(
    tokenizer_of: Callable[[], Any],
    texts: Sequence[str],
    max_length: int,
    folder: Path,
    *,
    chunk: int = 100_000,
) -> Tokens:
    """Return what `tokenize` does, cached in ``folder`` (written atomically) and memory-mapped.

    ``tokenizer_of()`` loads the tokenizer, if the folder does not exist. Its name should depend on
    texts and tokenizer, of which only the number of texts and ``max_length`` are checked. ``chunk``
    texts are in memory at a time. Raises EncoderError if the folder has tokens of other texts, or
    cannot be written.
    """
    folder = Path(folder)
    with locked(folder):
        remove_damaged(folder)
        if not folder.exists():
            try:
                with atomic_folder(folder) as partial:
                    _write_tokens(tokenizer_of(), texts, max_length, partial, chunk)
                    write_checksums(partial)
            except OSError as error:
                raise EncoderError(f"tokens could not be written to {folder}: {error}") from error
    expected = {"texts": len(texts), "max_length": max_length}
    found = read_settings(folder / "tokens.json", expected)
    offsets, ids = np.memmap(folder / "offsets.bin", np.int64, "r"), np.empty(0, found["dtype"])
    if offsets[-1]:  # an empty file cannot be mapped
        ids = np.memmap(folder / "ids.bin", found["dtype"], "r")
    return Tokens(np.asarray(ids), np.asarray(offsets), found["pad"])


def _write_tokens(
    tokenizer: Any, texts: Sequence[str], max_length: int, folder: Path, chunk: int
) -> None:
    last = np.zeros(1, np.int64)
    with (
        (folder / "ids.bin").open("wb") as ids_file,
        (folder / "offsets.bin").open("wb") as offsets_file,
        progress.bar(f"tokenising into {folder.parent}", total=len(texts), unit="texts") as bar,
    ):
        offsets_file.write(last.tobytes())
        for start in range(0, max(1, len(texts)), chunk):
            ids, lengths = _token_ids(tokenizer, texts[start : start + chunk], max_length)
            offsets = last[-1] + np.cumsum(lengths)
            ids_file.write(ids.tobytes())
            offsets_file.write(offsets.tobytes())
            last = offsets if len(offsets) else last
            bar.update(len(lengths))
    settings = {"texts": len(texts), "max_length": max_length, "dtype": str(ids.dtype)}
    settings["pad"] = tokenizer.pad_token_id
    (folder / "tokens.json").write_text(json.dumps(settings) + "\n", "utf-8")
