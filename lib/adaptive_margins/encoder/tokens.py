"""Tokenised texts, in memory or memory-mapped."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from adaptive_margins import progress
from adaptive_margins.encoder.arrays import check_same, read_settings, settle
from adaptive_margins.encoder.checks import EncoderError
from adaptive_margins.files import alone

_TEXTS = 8192  # texts given to a tokenizer at a time: what it returns is a hundred times their size


@dataclass(frozen=True)
class Tokens:
    """Tokenised texts, end to end: text i is ``ids[offsets[i]:offsets[i + 1]]``; ``pad`` fills batches.

    ``ids`` may have any integer type, and both arrays may be memory-mapped.
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
        """The texts in ``rows``, in that order, in memory."""
        rows = np.asarray(rows, dtype=np.int64)
        start, lengths = self.offsets[rows], self.offsets[rows + 1] - self.offsets[rows]
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        position = np.arange(offsets[-1]) + np.repeat(start - offsets[:-1], lengths)
        return Tokens(self.ids[position], offsets, self.pad)

    def __add__(self, other: Tokens) -> Tokens:
        """These texts, then the other ones, in memory. They are padded alike."""
        if self.pad != other.pad:
            raise ValueError(f"texts padded with {self.pad} and with {other.pad} cannot be joined")
        offsets = np.concatenate([self.offsets, other.offsets[1:] + self.offsets[-1]])
        return Tokens(np.concatenate([self.ids, other.ids]), offsets, self.pad)

    def batch(self, rows: Sequence[int] | np.ndarray) -> dict[str, Tensor]:
        """Features of the texts in ``rows``, padded to the longest: input_ids and attention_mask, (len(rows), L)."""
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

    def packed(self, rows: Sequence[int] | np.ndarray, first_position: int) -> dict[str, Tensor]:
        """Features of the texts in ``rows`` end to end, nothing padded: input_ids and position_ids (1, T), cu_seq_lens_q.

        These are the features that Sentence Transformers makes for FlashAttention; ``first_position`` is `packs`' answer.
        """
        texts = self.take(rows)
        position = np.arange(texts.offsets[-1]) - np.repeat(texts.offsets[:-1], texts.lengths)
        return {
            "input_ids": torch.from_numpy(texts.ids.astype(np.int64))[None],
            "position_ids": torch.from_numpy(position + first_position)[None],
            "cu_seq_lens_q": torch.from_numpy(texts.offsets.astype(np.int32)),
        }


def tokenize(encoder: Any, texts: Sequence[str], max_length: int) -> Tokens:
    """Token ids of ``texts`` cut at ``max_length`` (special tokens included), in memory."""
    tokenizer = encoder.tokenizer
    ids, lengths = _token_ids(tokenizer, texts, max_length)
    return Tokens(ids, np.concatenate([[0], np.cumsum(lengths)]), tokenizer.pad_token_id)


def _token_ids(
    tokenizer: Any, texts: Sequence[str], max_length: int
) -> tuple[np.ndarray, np.ndarray]:
    """The texts' token ids, end to end, in the smallest type that holds the vocabulary; tokens per text (int64)."""
    parts = [np.empty(0, _id_type(tokenizer))]
    lengths: list[int] = []
    for start in range(0, len(texts), _TEXTS):
        found = tokenizer(
            list(texts[start : start + _TEXTS]), truncation=True, max_length=max_length, padding=False,
            return_attention_mask=False, return_token_type_ids=False,
        )["input_ids"]  # fmt: skip
        parts.append(np.fromiter(chain.from_iterable(found), parts[0].dtype))
        lengths += map(len, found)
    return np.concatenate(parts), np.array(lengths, np.int64)


def count_truncated(encoder: Any, texts: Sequence[str], tokens: Tokens, max_length: int) -> int:
    """Return how many of ``texts`` are longer than ``max_length``; ``tokens``: `tokenize`'s result."""
    full, count = np.flatnonzero(tokens.lengths >= max_length), 0
    for start in range(0, len(full), _TEXTS):
        some = [texts[row] for row in full[start : start + _TEXTS].tolist()]
        found = encoder.tokenizer(some, verbose=False, return_attention_mask=False)["input_ids"]
        count += sum(len(ids) > max_length for ids in found)
    return count


def _id_type(tokenizer: Any) -> np.dtype:
    return np.min_scalar_type(len(tokenizer) - 1)


def stored_tokens(
    tokenizer_of: Callable[[], Any],
    texts: Sequence[str],
    max_length: int,
    folder: Path,
    *,
    chunk: int = 100_000,
) -> Tokens:
    """Token ids of ``texts`` as `tokenize` gives them, computed once and kept in ``folder`` as memory-mapped files.

    The folder appears when it is whole. A killed process leaves FOLDER.partial, and the next one goes on from its last
    chunk; of several processes one writes while the others wait. Progress and the time left are said on stderr.

    Args:
        tokenizer_of: loads the tokenizer, if it is needed.
        texts: any sequence whose slices are lists of strings; at most ``chunk`` of them are in memory.
        max_length: tokens of a text at most, special tokens included.
        folder: ``ids.bin`` (unsigned integers), ``offsets.bin`` (int64) and ``tokens.json``, which describes them. Its
            name should follow from the texts and the tokenizer: only their number and ``max_length`` are checked.
        chunk: texts tokenised before they are written.

    Raises:
        EncoderError: the folder holds tokens of other texts, is damaged, or cannot be written.
    """
    folder = Path(folder)
    with alone(folder):
        if not folder.exists():
            partial = folder.with_name(f"{folder.name}.partial")
            partial.mkdir(exist_ok=True)
            _write_tokens(tokenizer_of(), texts, max_length, partial, chunk)
            partial.replace(folder)
    found = read_settings(folder / "tokens.json")
    expected = {**found, "texts": len(texts), "max_length": max_length}
    check_same(folder / "tokens.json", found, expected)
    offsets = _mapped(folder / "offsets.bin", np.int64, len(texts) + 1)
    return Tokens(
        _mapped(folder / "ids.bin", np.dtype(found["dtype"]), int(offsets[-1])),
        offsets,
        found["pad"],
    )


def _write_tokens(
    tokenizer: Any, texts: Sequence[str], max_length: int, folder: Path, chunk: int
) -> None:
    dtype = _id_type(tokenizer)
    settings = {
        "texts": len(texts), "max_length": max_length, "pad": tokenizer.pad_token_id, "dtype": str(dtype),
    }  # fmt: skip
    ids_path, offsets_path = folder / "ids.bin", folder / "offsets.bin"
    try:
        settle(folder / "tokens.json", settings)
        with ids_path.open("ab") as ids_file, offsets_path.open("ab") as offsets_file:
            if not offsets_file.tell():
                offsets_file.write(bytes(8))
                offsets_file.flush()
            # Ids are written before their offsets: whatever has an offset is there, what comes after is half a chunk.
            done = offsets_file.tell() // 8 - 1
            last = int(np.memmap(offsets_path, np.int64, "r", shape=(done + 1,))[-1])
            if ids_file.tell() < last * dtype.itemsize:
                raise EncoderError(f"{ids_path} is too short; delete {folder} to start anew")
            ids_file.truncate(last * dtype.itemsize)
            offsets_file.truncate((done + 1) * 8)
            bar = progress.bar(
                f"tokenising into {folder.name}", total=len(texts), unit="texts", done=done
            )
            for start in range(done, len(texts), chunk):
                ids, lengths = _token_ids(tokenizer, texts[start : start + chunk], max_length)
                offsets = last + np.cumsum(lengths)
                for file, array in ((ids_file, ids), (offsets_file, offsets)):
                    file.write(array.tobytes())
                    file.flush()
                last = int(offsets[-1])
                bar.update(len(lengths))
            bar.close()
    except OSError as error:
        raise EncoderError(
            f"{folder} could not be written: {error}; make room for about {max_length * len(texts) * dtype.itemsize / 1e9:.2g} "
            "GB at most and run it again: what is whole there is kept"
        ) from error


def _mapped(path: Path, dtype: Any, count: int) -> np.ndarray:
    """A file of ``count`` numbers, memory-mapped."""
    expected = count * np.dtype(dtype).itemsize
    found = path.stat().st_size if path.is_file() else -1
    if found != expected:
        what = "is missing" if found < 0 else f"has {found} bytes, expected {expected}"
        raise EncoderError(f"{path} {what}; delete {path.parent} to compute it anew")
    if not count:
        return np.empty(0, dtype)
    return np.asarray(np.memmap(path, dtype, "r", shape=(count,)))
