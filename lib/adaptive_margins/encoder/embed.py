"""Embeddings of tokenised texts, in memory, by chunks, or in shards on disk."""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import os
import shutil
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from adaptive_margins import progress
from adaptive_margins.encoder.arrays import read_array, read_settings
from adaptive_margins.encoder.checks import EmbeddingError, EncoderError, one_line
from adaptive_margins.encoder.speed import register
from adaptive_margins.encoder.tokens import Tokens
from adaptive_margins.files import locked, write_text
from adaptive_margins.ray_tasks import RayError, leave_ray, ray_options, ray_task

warnings.filterwarnings("ignore", message="The given NumPy array is not writable")

Precision = Literal["fp32", "bf16", "fp16"]
_HEADER = 128  # bytes of a .npy file before the rows of a matrix
_IN_FLIGHT = 64  # shards that Ray computes, or has queued, at a time
_AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def token_batches(order: np.ndarray, lengths: np.ndarray, batch_tokens: int) -> list[np.ndarray]:
    """Split ``order`` (ascending lengths) into batches of up to ``batch_tokens`` padded tokens."""
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
    normalize: bool = True,
) -> np.ndarray:
    """Embed the texts in ``rows`` (all if None), batched by length: (len(rows), D) float32.

    Embeddings have length 1, unless ``normalize`` is False; a zero embedding stays zero.
    ``precision`` is that of the model's matrix products (autocast, as in training; Section 4's
    mixed precision); pooled embeddings are normalised in float32 in any case.

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
                if normalize:
                    embedding = nn.functional.normalize(embedding, dim=-1)
                out[part] = embedding.cpu().numpy()
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
    """Split positions, sorted by ``lengths`` (tokens), into ``chunks`` with the least padding.

    Each chunk is padded to its longest text. There are fewer, if there are fewer different lengths.

    Raises:
        ValueError: no text, or fewer than one chunk.
    """
    if not len(lengths) or chunks < 1:
        raise ValueError(f"{len(lengths)} texts cannot be split into {chunks} chunks")
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


def embed_chunks(
    model: Any, chunks: Sequence[Mapping[str, Tensor]], rows: Tensor, *, again: bool = False
) -> Tensor:
    """Embed distinct texts chunk by chunk, with gradients: (*rows.shape, D).

    ``chunks`` are features of texts, padded or packed; ``rows`` (int64) are positions of texts in
    all chunks together, any number of times each. Without dropout, the result equals that of any
    other batching but for rounding; with dropout, all occurrences of a text share a mask.

    With ``again``, the backward pass computes each chunk again, with the same dropout, so that
    memory holds the activations of one (gradient checkpointing: Chen et al., arXiv 1604.06174).
    """

    def embedded(chunk: Mapping[str, Tensor]) -> Any:
        return model(dict(chunk))["sentence_embedding"]

    *first, last = chunks  # the backward pass begins with the last one
    once = functools.partial(checkpoint, embedded, use_reentrant=False) if again else embedded
    return torch.cat([*map(once, first), embedded(last)])[rows]


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
    normalize: bool = True,
    ray: str = "",
) -> np.ndarray:
    """Embed all texts once, by `embed`, into ``folder``: (n, D) of ``dtype``, memory-mapped.

    ``embeddings.npy`` is written ``shard`` rows at a time, and ``shards.json`` lists the complete
    shards with their SHA-256, so that a killed process loses only unfinished ones, and damaged ones
    are noticed by the next call. Memory holds one shard a device.

    Args:
        model: the encoder; moved to the one device, or copied to each of several.
        tokens: of all texts, in order.
        folder: its name should depend on model, texts and precision, which are not checked.
        shard: rows that are embedded at a time.
        dtype: of the file. With float16, the squared length of a row may differ from 1 by 2⁻¹⁰.
        devices: of one node, e.g. ("cuda:0", "cuda:1"); the result does not depend on them.
        precision, batch_tokens, normalize: see `embed`.
        ray: embed on "local" Ray or a cluster, "ADDRESS[,gpus=N][,cpus=N]": a shard is a task, of a
            GPU if the first device is one, else of a core. Model and tokens are sent to workers,
            and this process writes what they return. Bytes may depend on processor and threads.

    Warns:
        UserWarning: shards have been damaged; they are embedded again.

    Raises:
        EncoderError: the folder has other settings, or the disk lacks space.
        RayError: Ray cannot be used, or its workers die again and again.
    """
    folder = Path(folder)
    rows, dim = len(tokens), model.get_embedding_dimension()
    settings = {"rows": rows, "dim": dim, "dtype": dtype, "shard": shard}
    if dtype not in ("float32", "float16") or shard < 1 or not devices:
        raise EncoderError(
            "shards are float32 or float16, of at least 1 row, from at least 1 device; not"
            f" {settings}, {devices!r}"
        )
    path, about = folder / "embeddings.npy", folder / "shards.json"
    with locked(folder):
        done = _intact_shards(path, about, settings) if about.exists() else {}
        missing = sorted(set(range(-(-rows // shard))) - set(done))
        size = sum(_place(k, settings)[1] for k in missing)
        needed = f"{folder}: {len(missing)} shards need {size / 1e9:.2g} GB of disk"
        try:
            folder.mkdir(exist_ok=True)
            if (free := shutil.disk_usage(folder).free) < size:
                raise EncoderError(f"{needed}, only {free / 1e9:.2g} GB are free")
            if not done:
                np.lib.format.open_memmap(path, "w+", np.dtype(dtype), (rows, dim))
            if missing:
                work = functools.partial(
                    embed,
                    tokens=tokens,
                    batch_tokens=batch_tokens,
                    precision=precision,
                    normalize=normalize,
                )
                _write_shards(model, work, devices, ray, path, about, settings, done, missing)
        except OSError as error:
            raise EncoderError(f"{needed}, which could not be written: {error}") from error
    return read_array(path, (rows, dim), np.dtype(dtype))


def _intact_shards(path: Path, about: Path, settings: Mapping[str, Any]) -> dict[int, str]:
    """Shard → SHA-256 of the complete shards; damaged ones are left out, with a warning."""
    found = read_settings(about, settings)
    done, known = found.get("done", []), found.get("sha256", {})  # older versions wrote none
    intact: dict[int, str] = {}
    with suppress(OSError), path.open("rb") as file:
        for k in progress.bar("checking shards", done, unit="shards"):
            start, size = _place(k, settings)
            file.seek(start)
            content = file.read(size)
            sha256 = hashlib.sha256(content).hexdigest()
            if len(content) == size and known.get(str(k), sha256) == sha256:
                intact[k] = sha256
    if damaged := sorted(set(done) - set(intact)):
        warnings.warn(f"{path}: damaged shards {damaged} are embedded again", stacklevel=3)
    return intact


def _place(k: int, settings: Mapping[str, Any]) -> tuple[int, int]:
    """Where shard ``k`` begins in the file, and its bytes."""
    row = settings["dim"] * np.dtype(settings["dtype"]).itemsize
    first = k * settings["shard"]
    return _HEADER + first * row, (min(settings["rows"], first + settings["shard"]) - first) * row


def _write_shards(
    model: Any,
    embed_rows: functools.partial[np.ndarray],
    devices: Sequence[str],
    ray: str,
    path: Path,
    about: Path,
    settings: Mapping[str, Any],
    done: dict[int, str],
    missing: Sequence[int],
) -> None:
    rows, shard = settings["rows"], settings["shard"]
    queue, lock, stop = iter(missing), threading.Lock(), threading.Event()
    bar = progress.bar(
        f"embedding into {path.parent.name}",
        total=rows,
        unit="texts",
        done=rows - sum(min(shard, rows - k * shard) for k in missing),
    )

    def part(k: int) -> np.ndarray:
        return np.arange(k * shard, min(rows, (k + 1) * shard))

    def write(k: int, array: np.ndarray) -> None:
        array = array.astype(settings["dtype"], copy=False)
        with path.open("r+b") as file:
            file.seek(_place(k, settings)[0])
            file.write(array.data)
        sha256 = hashlib.sha256(array.reshape(-1).data).hexdigest()
        with lock:
            done[k] = sha256
            listed = {**settings, "done": sorted(done), "sha256": done}
            write_text(about, json.dumps(listed) + "\n")
            bar.update(len(array))

    def work(device: str) -> None:
        its_model = model if len(devices) == 1 else copy.deepcopy(model)
        its_model.to(device)
        try:
            for k in queue:  # next() of a list's iterator is atomic
                if stop.is_set():
                    return
                write(k, embed_rows(its_model, rows=part(k)))
        except BaseException:
            stop.set()
            raise

    if ray:
        with bar:
            for k, array in _on_ray(model, embed_rows, devices[0], ray, part, queue):
                write(k, array)
        return
    with bar, ThreadPoolExecutor(len(devices)) as pool:
        try:
            for finished in [pool.submit(work, device) for device in devices]:
                finished.result()
        finally:
            stop.set()  # interrupted: the threads finish their shard and end


def _on_ray(
    model: Any,
    embed_rows: functools.partial[np.ndarray],
    device: str,
    where: str,
    part: Callable[[int], np.ndarray],
    queue: Iterator[int],
) -> Iterator[tuple[int, np.ndarray]]:
    """Shards and their embeddings, computed by tasks of Ray, in any order."""
    address, given = ray_options(where, None)
    needs = {"num_cpus": 1, "num_gpus": int(device.startswith("cuda")), **given}
    task = ray_task(address, _task, needs)
    tokens, running = embed_rows.keywords["tokens"], dict[Future[Any], int]()
    try:
        import ray

        own = model.device
        sent = [ray.put(model.to("cpu"))]  # in a list, or Ray would read it for each task
        model.to(own)
        while True:
            for k in islice(queue, _IN_FLIGHT - len(running)):
                some = functools.partial(embed_rows, tokens=tokens.take(part(k)))
                running[task(sent, "cuda" if needs["num_gpus"] else "cpu", some)] = k
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                yield running.pop(future), future.result()
    except Exception as error:
        error = getattr(error, "cause", error)
        if type(error).__module__.startswith("ray."):
            hint = "finished shards are stored, and the same call computes the others"
            error = RayError(f"Ray at {where}: {one_line(error)}; {hint}")
        raise error from None
    finally:
        leave_ray()


def _task(sent: Sequence[Any], device: str, embed_all: Callable[..., np.ndarray]) -> np.ndarray:
    return embed_all(_received(sent[0], device))


@functools.lru_cache(1)
def _received(sent: Any, device: str) -> Any:
    """The model, once in each worker."""
    import ray

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    register()
    return ray.get(sent).to(device)
