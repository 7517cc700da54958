"""Embeddings of passages, computed once for all commands and left in files of limited size."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from adaptive_margins.encoder.load import prompts, state_hash
from adaptive_margins.errors import AdaptiveMarginsError
from adaptive_margins.files import digest, folder_bytes, home, locked, read_object

LIMIT_VARIABLE = "ADAPTIVE_MARGINS_CACHE_GB"
"""Gigabytes that the cache may have; 5 if it is not set, 0 for no cache."""


def cache_folder(use: bool = True) -> Path | None:
    """Return ``cache/embeddings`` of `home`; None if it is not to be used, or cannot be written."""
    if not use or not _limit():
        return None
    folder = home() / "cache" / "embeddings"
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    return folder if os.access(folder, os.W_OK) else None


def cached_embeddings(retriever: Any, folder: Path | None) -> np.ndarray | None:
    """Return the embeddings of a `DenseRetriever`'s rows, memory-mapped; computed if need be.

    None without a ``folder``, or if they are too many for the cache. Those used longest ago are
    removed if the folder has more than $ADAPTIVE_MARGINS_CACHE_GB.
    """
    limit = _limit() or math.inf  # without a `cache_folder`, it is one for this command alone
    size = 4 * len(retriever.rows) * retriever.model.get_embedding_dimension()
    if folder is None or size > limit:
        return None
    place = folder / _key(retriever)
    with locked(place.with_suffix(".use")):
        if not read_object(place / "passages" / "shards.json"):  # it is damaged, or was not written
            shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True, exist_ok=True)
        found: np.ndarray = retriever.embed_into(place / "passages", "float32")
        os.utime(place)
    with suppress(OSError):  # another process removes some, too
        used = sorted(folder.glob("[!.]*"), key=lambda path: path.stat().st_mtime)
        while len(used) > 1 and sum(map(folder_bytes, used)) > limit:
            oldest = used.pop(0)
            with suppress(OSError), locked(oldest.with_suffix(".use"), wait=False):
                shutil.rmtree(oldest)
    return found


def _limit() -> float:
    """Bytes that the cache may have."""
    given = os.environ.get(LIMIT_VARIABLE) or "5"
    if not given.replace(".", "", 1).isdecimal():
        expected = "expected gigabytes, such as 2.5, or 0 for no cache"
        raise AdaptiveMarginsError(f"${LIMIT_VARIABLE} is {given!r}; {expected}")
    return float(given) * 1e9


def _key(retriever: Any) -> str:
    """A hash of the texts, and of all that their embeddings depend on in the model."""
    model, tokenizer, known = retriever.model, retriever.model.tokenizer, hashlib.sha256()
    for row in retriever.rows.tolist():
        text = retriever.passages.texts[row]
        known.update(f"{len(text)} {text}".encode("utf-8", "surrogatepass"))
    config = json.loads(model[0].model.config.to_json_string(use_diff=False))
    for name in ("_name_or_path", "transformers_version", "dtype", "architectures"):
        config.pop(name, None)  # they change when a model is saved
    fast = getattr(tokenizer, "backend_tokenizer", None)
    words = json.loads(fast.to_str()) if fast else tokenizer.get_vocab()
    words |= {"truncation": None, "padding": None}  # of the last call
    shape = prompts(model)[1], retriever.passage_length, model.get_embedding_dimension()
    versions = retriever.precision, model.device.type, torch.__version__, transformers.__version__
    known.update(state_hash(model).encode())
    return digest([known.hexdigest(), str(model), config, words, shape, versions])
