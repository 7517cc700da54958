"""Outputs of frozen lower layers, cached for all runs, so that training computes the upper layers.

Training without this module (`for_training`) has the same results, but is slower.
"""

from __future__ import annotations

import copy
import hashlib
import importlib.metadata
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from adaptive_margins.encoder.checks import EncoderError, bert_model, read_array
from adaptive_margins.encoder.embed import token_batches
from adaptive_margins.encoder.load import encoder_identity, layer_count, open_encoder
from adaptive_margins.encoder.tokens import Tokens
from adaptive_margins.files import atomic_file, digest, locked, remove_damaged, write_checksums
from adaptive_margins.profiles.encoders import EncoderSettings


@dataclass(frozen=True)
class LoadedEncoder:
    """An encoder, its trained part, and the inputs of that part.

    Attributes:
        whole: the complete model.
        model: the trained part: the same, or its upper layers on cached states.
        queries, passages: inputs of ``model``: token ids, or numbers of cached tokens.
        query_model: the encoder of queries, if it is another one.
    """

    whole: Any
    model: Any
    queries: Tokens
    passages: Tokens
    query_model: Any = None

    def fresh(self) -> Any:
        """Return a copy of ``model`` to train."""
        return _copied(self.model)

    def whole_with(self, trained: Any) -> Any:
        """Return the complete model with the layers of ``trained``."""
        return trained if self.model is self.whole else put_back(self.whole, trained)


def for_training(
    settings: EncoderSettings,
    whole: Any,
    queries: Tokens,
    passages: Tokens,
    *,
    others: Sequence[EncoderSettings],
    cache: Path,
) -> LoadedEncoder:
    """Return the trained part of an encoder: all of it, or its last ``trained_layers`` layers.

    The outputs of the frozen layers are cached in a folder of ``cache``, for all encoders of
    ``others`` with the same base. Raises EncoderError as `open_encoder` and `cached_states` do.
    """
    if settings.trained_layers is None:
        return LoadedEncoder(whole, whole, queries, passages)
    same = [e for e in others if (e.base, e.revision) == (settings.base, settings.revision)]
    layers = {layer_count(e) - e.trained_layers for e in (settings, *same) if e.trained_layers}
    tokens = queries + passages
    texts = hashlib.sha256(tokens.ids.tobytes() + tokens.offsets.tobytes()).hexdigest()
    versions = [f"{name}-{importlib.metadata.version(name)}" for name in ("torch", "transformers")]
    key = digest([encoder_identity(settings), texts, *versions])
    full = settings.model_copy(update={"layers": None})
    tables = cached_states(
        lambda: open_encoder(full, dropout=0.0, device=str(whole.device)),
        tokens,
        sorted(layers),
        cache / key,
    )
    table = tables[layer_count(settings) - settings.trained_layers]
    numbers, start = np.arange(tokens.offsets[-1]), queries.offsets[-1]
    return LoadedEncoder(
        whole,
        upper_layers(whole, settings.trained_layers, table),
        Tokens(numbers[:start], queries.offsets, 0),
        Tokens(numbers[start:], passages.offsets, 0),
    )


class ContextualTokens(nn.Module):
    """Precomputed hidden states by token number, in place of a BERT model's embeddings."""

    def __init__(self, table: np.ndarray) -> None:
        super().__init__()
        self.table = table

    def __deepcopy__(self, memo: dict[int, Any]) -> ContextualTokens:
        return ContextualTokens(self.table)  # the table is read-only and large: copies share it

    def forward(self, input_ids: Tensor, **_: Any) -> Tensor:
        """(B, L) token numbers → (B, L, D) hidden states."""
        states = self.table[input_ids.cpu().numpy().reshape(-1)]
        return torch.from_numpy(states).to(input_ids.device).view(*input_ids.shape, -1)


def _copied(encoder: Any) -> Any:
    """Copy an encoder, but for its tokenizer, which nothing changes and is slow to copy."""
    tokenizer = encoder.tokenizer
    return copy.deepcopy(encoder, {id(tokenizer): tokenizer})


def upper_layers(encoder: Any, trained_layers: int, table: np.ndarray) -> Any:
    """Copy ``encoder`` with only its last ``trained_layers`` layers, which read from ``table``."""
    upper = _copied(encoder)
    model = bert_model(upper[0].model)
    model.embeddings = ContextualTokens(table)
    model.encoder.layer = model.encoder.layer[-trained_layers:]
    model.pooler = None
    return upper


def put_back(encoder: Any, upper: Any) -> Any:
    """Copy ``encoder`` with the layers of `upper_layers` and the modules after them."""
    complete = _copied(encoder)
    trained = bert_model(upper[0].model).encoder.layer
    last = bert_model(complete[0].model).encoder.layer[-len(trained) :]
    # The linear layer of cls+linear is trained too.
    for target, source in zip(
        [*last, *list(complete)[1:]], [*trained, *list(upper)[1:]], strict=True
    ):
        target.load_state_dict(source.state_dict())
    return complete


def cached_states(
    encoder: Callable[[], Any], tokens: Tokens, layers: Sequence[int], folder: Path
) -> dict[int, np.ndarray]:
    """Return `hidden_states` of ``layers``, cached in ``folder`` and memory-mapped (float32).

    ``encoder()`` loads the encoder if a layer is missing. Raises EncoderError for a file that
    cannot be written, or has changed.
    """
    paths = {k: folder / f"layer{k}.npy" for k in layers}
    rows = int(tokens.offsets[-1])
    with locked(folder):
        remove_damaged(folder)
        missing = [k for k, path in paths.items() if not path.is_file()]
        if missing:
            model = encoder()
            shape = (rows, model.get_embedding_dimension())
            try:
                with ExitStack() as files:
                    partial = {k: files.enter_context(atomic_file(paths[k])) for k in missing}
                    out = {k: _allocate(partial[k], shape) for k in missing}
                    hidden_states(model, tokens, missing, out)
                    for table in out.values():
                        table.flush()
                write_checksums(folder)
            except OSError as error:
                size = len(missing) * shape[0] * shape[1] * 4 / 1e9
                raise EncoderError(
                    f"{folder}: {size:.2g} GB of hidden states could not be written: {error};"
                    " nothing was left there"
                ) from error
    return {k: read_array(path, (rows, None), np.float32) for k, path in paths.items()}


def hidden_states(
    encoder: Any,
    tokens: Tokens,
    layers: Sequence[int],
    out: Mapping[int, np.ndarray],
    batch_tokens: int = 2048,
) -> None:
    """Write the output of the first k transformer layers, (tokens, D), to ``out[k]``."""
    model = copy.deepcopy(bert_model(encoder[0].model)).eval()
    model.encoder.layer = model.encoder.layer[: max(1, *layers)]  # without layers, no states
    model.pooler = None
    order = np.argsort(tokens.lengths, kind="stable")
    with torch.inference_mode():
        for rows in token_batches(order, tokens.lengths, batch_tokens):
            features = tokens.batch(rows)
            keep = features["attention_mask"].bool().numpy()
            features = {k: v.to(model.device) for k, v in features.items()}
            states = model(**features, output_hidden_states=True).hidden_states
            spans = [np.arange(tokens.offsets[r], tokens.offsets[r + 1]) for r in rows]
            place = np.concatenate(spans)
            for k in layers:
                out[k][place] = states[k].cpu().numpy()[keep]


def _allocate(path: Path, shape: tuple[int, int]) -> np.memmap:
    """An empty table on disk whose space is reserved, if the system can do that."""
    # If the disk became full later, a memory-mapped write would kill the process.
    table = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=shape)
    if hasattr(os, "posix_fallocate"):
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, file.seek(0, os.SEEK_END))
    return table
