"""Embeddings of tokenised texts, in memory, by chunks, or in shards on disk."""

from __future__ import annotations

import copy
import json
import shutil
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from adaptive_margins import progress
from adaptive_margins.encoder.arrays import check_same, read_array, read_settings
from adaptive_margins.encoder.checks import EmbeddingError, EncoderError, one_line
from adaptive_margins.encoder.tokens import Tokens
from adaptive_margins.files import alone, write_text

_BLOCK = 1 << 25  # numbers in a block of embeddings (128 MB of float32)


warnings.filterwarnings("ignore", message="The given NumPy array is not writable")

Precision = Literal["fp32", "bf16", "fp16"]
_AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def token_batches(order: np.ndarray, lengths: np.ndarray, batch_tokens: int) -> list[np.ndarray]:
    """Consecutive slices of ``order`` (ascending lengths) of at most ``batch_tokens`` padded tokens each."""
    batches, start = [], 0
    for end in range(1, len(order) + 1):
        if end == len(order) or (end + 1 - start) * lengths[order[end]] > batch_tokens:
            batches.append(order[start:end])
            start = end
    return batches


def embed(
    model: Any,
    tokens: Tokens,
    rows: Sequence[int] | np.ndarray | None = None,
    *,
    batch_tokens: int = 2048,
    precision: Precision = "fp32",
) -> np.ndarray:
    """Unit-length float32 embeddings, (len(rows), D), of the texts in ``rows`` (all if None); a zero embedding stays zero.

    Texts are batched by length, so that little is padded. ``precision``: of the model's matrix products (autocast, as in
    training; Section 4's mixed precision); pooled embeddings are normalised in float32 in any case.

    Raises:
        EncoderError: an unknown precision.
        EmbeddingError: the model fails, or an embedding is not finite.
    """
    if precision not in _AUTOCAST:
        raise EncoderError(f"precision must be one of {', '.join(_AUTOCAST)}, not {precision!r}")
    rows = np.arange(len(tokens)) if rows is None else np.asarray(rows, dtype=np.int64)
    lengths = tokens.offsets[rows + 1] - tokens.offsets[rows]
    order = np.argsort(lengths, kind="stable")
    out = np.empty((len(rows), model.get_embedding_dimension()), np.float32)
    autocast = torch.autocast(model.device.type, _AUTOCAST[precision], enabled=precision != "fp32")
    was_training = model.training
    model.eval()
    part = order
    try:
        with torch.inference_mode(), autocast:
            for part in token_batches(order, lengths, batch_tokens):
                features = {k: v.to(model.device) for k, v in tokens.batch(rows[part]).items()}
                embedding = model(features)["sentence_embedding"].float()
                out[part] = nn.functional.normalize(embedding, dim=-1).cpu().numpy()
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as e:
        why = one_line(e)
        if isinstance(e, KeyError):  # for example of sentence_embedding, where nothing pools
            why = f"the modules give no {e.args[0]}"
        raise EmbeddingError(
            f"texts of up to {lengths[part].max()} tokens cannot be embedded: {why}"
        ) from e
    finally:
        model.train(was_training)
    if wrong := int((~np.isfinite(out).all(axis=1)).sum()):
        raise EmbeddingError(f"{wrong:,} of {len(out):,} embeddings are not finite ({precision})")
    return out


def length_chunks(lengths: np.ndarray, chunks: int) -> list[np.ndarray]:
    """Positions in ascending order of ``lengths`` (tokens of each text), cut where least is padded.

    Of all ways to make ``chunks`` parts of the sorted texts (fewer, if there are fewer different lengths), each padded to
    its own longest text, this one has the smallest number of tokens, padding included.

    Raises:
        ValueError: no text, or fewer than one chunk.
    """
    if not len(lengths) or chunks < 1:
        raise ValueError(f"{len(lengths)} texts cannot be cut into {chunks} chunks")
    order = np.argsort(lengths, kind="stable")
    values, counts = np.unique(lengths, return_counts=True)
    first = np.concatenate([[0], np.cumsum(counts)])
    # padded[i, j]: tokens of a chunk of all texts from the i-th to the j-th length
    padded = np.where(first[1:] > first[:-1, None], (first[1:] - first[:-1, None]) * values, np.inf)
    best, before = padded[0], []
    for _ in range(min(chunks, len(values)) - 1):
        through = best[:-1, None] + padded[1:]  # by where the chunk before the last one ends
        before.append(through.argmin(axis=0))
        best = through.min(axis=0)
    end, cuts = len(values) - 1, []
    for ends in reversed(before):
        end = ends[end]
        cuts.append(first[end + 1])
    return np.split(order, cuts[::-1])


def embed_chunks(model: Any, chunks: Sequence[Mapping[str, Tensor]], rows: Tensor) -> Tensor:
    """Embeddings with gradients, (*rows.shape, D), of texts that go through ``model`` chunk by chunk.

    ``chunks`` are the features of distinct texts, padded or packed; ``rows`` (int64) counts texts through all
    chunks, and a text may occur in it any number of times. Without dropout the result is that of any other batching, but
    for rounding. With dropout all occurrences of a text share its one mask; texts do not, as in any batch.
    """
    return torch.cat([model(dict(chunk))["sentence_embedding"] for chunk in chunks])[rows]


class Shards:
    """Embeddings in parts of equal size, the last one excepted: files of `embed_shards`, or one array in memory.

    Float16 files hold rows that were of unit length before they were rounded: `take` and `blocks` return the rounded values
    as float32, and a row's squared length may differ from 1 by up to about 2⁻¹⁰.
    """

    def __init__(self, parts: Sequence[np.ndarray], dim: int) -> None:
        self.dim = dim
        self._parts = list(parts)
        self._first = np.cumsum([0, *map(len, self._parts)])

    @classmethod
    def of(cls, array: np.ndarray) -> Shards:
        """One part: (n, D) embeddings in memory, kept as float32 (not copied if they are).

        Raises:
            ValueError: another number of dimensions than two.
        """
        matrix = np.ascontiguousarray(array, dtype=np.float32)
        if matrix.ndim != 2:
            raise ValueError(f"embeddings must have shape (n, D), not {matrix.shape}")
        return cls([matrix], matrix.shape[1])

    @classmethod
    def open(cls, folder: Path) -> Shards:
        """What `embed_shards` wrote to ``folder``, memory-mapped.

        Raises:
            EncoderError: a file is missing, damaged, or not of the size and type that ``shards.json`` says.
        """
        path = Path(folder) / "shards.json"
        if set(settings := read_settings(path)) != {"rows", "dim", "dtype", "shard"}:
            raise EncoderError(
                f"{path} describes no shards; delete {path.parent} to compute it again"
            )
        rows, dim, dtype, shard = (settings[k] for k in ("rows", "dim", "dtype", "shard"))
        parts = []
        for start in range(0, rows, shard):
            path = _shard_path(Path(folder), start // shard)
            if not path.is_file():
                raise EncoderError(f"{path} is missing: not all texts are embedded yet")
            parts.append(read_array(path, (min(shard, rows - start), dim), np.dtype(dtype)))
        return cls(parts, dim)

    def __len__(self) -> int:
        return int(self._first[-1])

    def take(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """The embeddings in ``rows``, in that order: (len(rows), D) float32.

        Raises:
            IndexError: a row below 0 or above the last.
        """
        rows = np.asarray(rows, dtype=np.int64)
        if len(rows) and not 0 <= rows.min() <= rows.max() < len(self):
            raise IndexError(f"rows {rows.min()} to {rows.max()} of {len(self)} embeddings")
        if len(self._parts) == 1:
            return self._parts[0][rows].astype(np.float32, copy=False)
        out = np.empty((len(rows), self.dim), np.float32)
        part_of = np.searchsorted(self._first, rows, side="right") - 1
        for part in np.unique(part_of):
            here = part_of == part
            out[here] = self._parts[part][rows[here] - self._first[part]]
        return out

    def blocks(self) -> Iterator[tuple[int, np.ndarray]]:
        """All embeddings in order: (number of the first row, (rows, D) float32), at most 128 MB a block."""
        size = max(1, _BLOCK // max(1, self.dim))
        for first, part in zip(self._first.tolist(), self._parts, strict=False):
            for start in range(0, len(part), size):
                yield first + start, part[start : start + size].astype(np.float32, copy=False)


def embed_shards(
    model: Any,
    tokens: Tokens,
    folder: Path,
    *,
    shard: int = 65536,
    dtype: Literal["float32", "float16"] = "float32",
    devices: Sequence[str] = ("cpu",),
    precision: Precision = "fp32",
    batch_tokens: int = 2048,
) -> Shards:
    """Embeddings of all texts, computed by `embed` once and kept in ``folder``, one ``.npy`` file a shard.

    Each file appears when it is whole, and only missing ones are computed: a killed process loses the shards it was at. Memory
    holds one shard a device. Progress and the time left are said on stderr.

    Args:
        model: embeds the texts; moved to the one device, or copied to each of several.
        tokens: of all texts, in order.
        folder: its name should follow from model, texts and precision: ``shards.json`` holds rows, dim, dtype and shard only.
        shard: rows of a file.
        dtype: of the files. Float16 halves them; see `Shards`.
        devices: of one node, e.g. ("cuda:0", "cuda:1"); each takes the next missing shard, so the files do not depend on
            their number.
        precision, batch_tokens: see `embed`.

    Raises:
        EncoderError: the folder was begun with other settings, or the disk has not enough room.
    """
    folder = Path(folder)
    rows, dim = len(tokens), model.get_embedding_dimension()
    settings = {"rows": rows, "dim": dim, "dtype": dtype, "shard": shard}
    if dtype not in ("float32", "float16") or shard < 1 or not devices:
        raise EncoderError(
            f"shards are float32 or float16, of at least 1 row, from at least 1 device; not {settings}, {devices!r}"
        )
    with alone(folder):
        folder.mkdir(exist_ok=True)
        about = folder / "shards.json"
        if about.exists():
            check_same(about, read_settings(about), settings)
        else:
            write_text(about, json.dumps(settings) + "\n")
        missing = [k for k in range(-(-rows // shard)) if not _shard_path(folder, k).is_file()]
        if missing:
            _embed_missing(
                model, tokens, folder, missing, settings, devices, precision, batch_tokens
            )
    return Shards.open(folder)


def _embed_missing(
    model: Any,
    tokens: Tokens,
    folder: Path,
    missing: list[int],
    settings: Mapping[str, Any],
    devices: Sequence[str],
    precision: Precision,
    batch_tokens: int,
) -> None:
    rows, shard = settings["rows"], settings["shard"]
    todo = sum(min(shard, rows - k * shard) for k in missing)
    size = todo * settings["dim"] * np.dtype(settings["dtype"]).itemsize
    needed = f"{folder}: {len(missing)} shards need {size / 1e9:.2g} GB of disk"
    if (free := shutil.disk_usage(folder).free) < size:
        raise EncoderError(f"{needed}, only {free / 1e9:.2g} GB are free")
    queue, stop = iter(missing), False  # next() of a list's iterator is atomic
    lock = threading.Lock()

    def work(device: str) -> None:
        nonlocal stop
        its_model = model if len(devices) == 1 else copy.deepcopy(model)
        its_model.to(device)
        for k in queue:
            if stop:
                return
            part = np.arange(k * shard, min(rows, (k + 1) * shard))
            path = _shard_path(folder, k)
            partial = path.with_name(f"{path.name}.partial")
            try:
                array = embed(
                    its_model, tokens, part, batch_tokens=batch_tokens, precision=precision
                )
                array = array.astype(settings["dtype"], copy=False)
                header = np.lib.format.header_data_from_array_1_0(array)
                # Not np.save: it does not notice that the last bytes found no room.
                with partial.open("wb") as file:
                    np.lib.format.write_array_header_1_0(file, header)
                    file.write(array.data)
                partial.replace(path)
                with lock:
                    bar.update(len(part))
            except BaseException:
                stop = True
                partial.unlink(missing_ok=True)
                raise

    what = f"embedding into {folder.name}"
    with (
        progress.bar(what, total=rows, unit="texts", done=rows - todo) as bar,
        ThreadPoolExecutor(len(devices)) as pool,
    ):
        try:
            for done in [pool.submit(work, device) for device in devices]:
                done.result()
        except OSError as error:
            raise EncoderError(f"{needed}, which could not be written: {error}") from error
        finally:
            stop = True  # interrupted: the threads finish their shard and end


def _shard_path(folder: Path, number: int) -> Path:
    return folder / f"{number:05d}.npy"
