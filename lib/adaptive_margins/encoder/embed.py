"""Embeddings of tokenised texts, in memory, by chunks, or in shards on disk."""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from itertools import islice
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from adaptive_margins import progress
from adaptive_margins.encoder.checks import (
    EmbeddingError,
    EncoderError,
    one_line,
    read_array,
    read_settings,
)
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

    Raises EmbeddingError if the model fails, or an embedding is not finite.
    """
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
    """
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
    shards with their SHA-256: a killed process loses only unfinished ones, and damaged ones are
    embedded again, with a UserWarning. Memory holds one shard a device.

    Args:
        model: moved to the one device, or copied to each of several.
        folder: its name should depend on model, texts and precision, which are not checked.
        dtype: of the file. With float16, the squared length of a row may differ from 1 by 2⁻¹⁰.
        devices: of one node, e.g. ("cuda:0", "cuda:1"); the result does not depend on them.
        tokens, precision, batch_tokens, normalize: see `embed`.
        ray: embed on "local" Ray or a cluster, "ADDRESS[,gpus=N][,cpus=N]": a shard is a task, of a
            GPU if the first device is one, else of a core. Bytes may depend on the processor.

    Raises:
        EncoderError: the folder has other settings, or the disk lacks space.
        RayError: Ray cannot be used, or its workers die again and again.
    """
    folder = Path(folder)
    rows, dim = len(tokens), model.get_embedding_dimension()
    settings = {"rows": rows, "dim": dim, "dtype": dtype, "shard": shard}
    path, about = folder / "embeddings.npy", folder / "shards.json"
    options: dict[str, Any] = {"batch_tokens": batch_tokens, "precision": precision}
    options["normalize"] = normalize
    work = functools.partial(embed, tokens=tokens, **options)
    with locked(folder):
        done = _intact_shards(path, about, settings) if about.exists() else {}
        missing = {k: _rows(k, settings) for k in range(-(-rows // shard)) if k not in done}
        size = sum(_place(k, settings)[1] for k in missing)
        needed = f"{folder}: {len(missing)} shards need {size / 1e9:.2g} GB of disk"
        try:
            folder.mkdir(exist_ok=True)
            if (free := shutil.disk_usage(folder).free) < size:
                raise EncoderError(f"{needed}, only {free / 1e9:.2g} GB are free")
            if not done:
                np.lib.format.open_memmap(path, "w+", np.dtype(dtype), (rows, dim))
            if missing:
                if ray:
                    shards = _on_ray(model, work, devices[0], ray, missing)
                else:
                    shards = _on_devices(model, work, devices, missing)
                _write_shards(shards, path, about, settings, done)
        except OSError as error:
            raise EncoderError(f"{needed}, which could not be written: {error}") from error
    return read_array(path, (rows, dim), np.dtype(dtype))


def _intact_shards(path: Path, about: Path, settings: Mapping[str, Any]) -> dict[int, str]:
    """Shard → SHA-256 of the complete shards; damaged ones are left out, with a warning."""
    found = read_settings(about, settings)
    done, known = found.get("done", []), found.get("sha256", {})
    intact: dict[int, str] = {}
    with suppress(OSError), path.open("rb") as file:
        for k in progress.bar("checking shards", done, unit="shards"):
            start, size = _place(k, settings)
            file.seek(start)
            sha256 = hashlib.sha256(file.read(size)).hexdigest()
            if sha256 == known.get(str(k)):
                intact[k] = sha256
    if damaged := sorted(set(done) - set(intact)):
        warnings.warn(f"{path}: damaged shards {damaged} are embedded again", stacklevel=3)
    return intact


def _rows(k: int, settings: Mapping[str, Any]) -> range:
    """The rows of shard ``k``."""
    return range(k * settings["shard"], min(settings["rows"], (k + 1) * settings["shard"]))


def _place(k: int, settings: Mapping[str, Any]) -> tuple[int, int]:
    """Where shard ``k`` begins in the file, and its bytes."""
    row = settings["dim"] * np.dtype(settings["dtype"]).itemsize
    return _HEADER + k * settings["shard"] * row, len(_rows(k, settings)) * row


def _write_shards(
    shards: Iterable[tuple[int, np.ndarray]],
    path: Path,
    about: Path,
    settings: Mapping[str, Any],
    done: dict[int, str],
) -> None:
    bar = progress.bar(
        f"embedding into {path.parent.name}",
        total=settings["rows"],
        unit="texts",
        done=sum(len(_rows(k, settings)) for k in done),
    )
    with bar:
        for k, array in shards:
            array = array.astype(settings["dtype"], copy=False)
            with path.open("r+b") as file:
                file.seek(_place(k, settings)[0])
                file.write(array.data)
            done[k] = hashlib.sha256(array.reshape(-1).data).hexdigest()
            listed = {**settings, "done": sorted(done), "sha256": done}
            write_text(about, json.dumps(listed) + "\n")
            bar.update(len(array))


def _completed(
    start: Callable[[range], Future[np.ndarray]], most: int, missing: Mapping[int, range]
) -> Iterator[tuple[int, np.ndarray]]:
    """Shards and their embeddings in any order, ``most`` of them started at a time."""
    waiting, running = iter(missing.items()), dict[Future[np.ndarray], int]()
    while True:
        for k, rows in islice(waiting, most - len(running)):
            running[start(rows)] = k
        if not running:
            return
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            yield running.pop(future), future.result()


def _on_devices(
    model: Any,
    work: Callable[..., np.ndarray],
    devices: Sequence[str],
    missing: Mapping[int, range],
) -> Iterator[tuple[int, np.ndarray]]:
    free = SimpleQueue[Any]()  # models, as many as threads
    for device in devices:
        free.put((model if len(devices) == 1 else copy.deepcopy(model)).to(device))

    def compute(rows: range) -> np.ndarray:
        its_model = free.get()
        try:
            return work(its_model, rows=rows)
        finally:
            free.put(its_model)

    with ThreadPoolExecutor(len(devices)) as pool:
        yield from _completed(lambda rows: pool.submit(compute, rows), len(devices), missing)


def _on_ray(
    model: Any,
    work: functools.partial[np.ndarray],
    device: str,
    where: str,
    missing: Mapping[int, range],
) -> Iterator[tuple[int, np.ndarray]]:
    address, given = ray_options(where, None)
    needs = {"num_cpus": 1, "num_gpus": int(device.startswith("cuda")), **given}
    task, tokens = ray_task(address, _task, needs), work.keywords["tokens"]
    try:
        import ray

        own = model.device
        sent = [ray.put(model.to("cpu"))]  # in a list, or Ray would read it for each task
        model.to(own)

        def start(rows: range) -> Future[np.ndarray]:
            some = functools.partial(work, tokens=tokens.take(rows))
            return task(sent, "cuda" if needs["num_gpus"] else "cpu", some)

        yield from _completed(start, _IN_FLIGHT, missing)
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
