"""Frozen lower layers computed once for a collection."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from adaptive_margins.encoder.arrays import read_array
from adaptive_margins.encoder.checks import EncoderError
from adaptive_margins.encoder.embed import token_batches
from adaptive_margins.encoder.load import bert_model
from adaptive_margins.encoder.tokens import Tokens
from adaptive_margins.files import whole_file


class ContextualTokens(nn.Module):
    """Stands where a BERT model has its embeddings: returns precomputed hidden states of tokens, by token number."""

    def __init__(self, table: np.ndarray) -> None:
        super().__init__()
        self.table = table

    def __deepcopy__(self, memo: dict[int, Any]) -> ContextualTokens:
        return ContextualTokens(self.table)  # the table is read-only and large: copies share it

    def forward(self, input_ids: Tensor, **_: Any) -> Tensor:
        """(B, L) token numbers → (B, L, D) hidden states."""
        states = self.table[input_ids.cpu().numpy().reshape(-1)]
        return torch.from_numpy(states).to(input_ids.device).view(*input_ids.shape, -1)


def hidden_states(
    encoder: Any,
    tokens: Tokens,
    layers: Sequence[int],
    out: Mapping[int, np.ndarray],
    batch_tokens: int = 2048,
) -> None:
    """Write what comes out of the first k transformer layers, for each k in ``layers``, to ``out[k]`` (tokens, D)."""
    model = copy.deepcopy(bert_model(encoder[0].model)).eval()
    model.encoder.layer = model.encoder.layer[: max(1, *layers)]  # without any, no states are given
    model.pooler = None
    order = np.argsort(tokens.lengths, kind="stable")
    with torch.inference_mode():
        for rows in token_batches(order, tokens.lengths, batch_tokens):
            features = tokens.batch(rows)
            keep = features["attention_mask"].bool().numpy()
            features = {k: v.to(model.device) for k, v in features.items()}
            states = model(**features, output_hidden_states=True).hidden_states
            place = np.concatenate(
                [np.arange(tokens.offsets[r], tokens.offsets[r + 1]) for r in rows]
            )
            for k in layers:
                out[k][place] = states[k].cpu().numpy()[keep]


def upper_layers(encoder: Any, trained_layers: int, table: np.ndarray) -> Any:
    """A copy of ``encoder`` that has only its last ``trained_layers`` layers and reads their input from ``table``."""
    upper = copy.deepcopy(encoder)
    model = bert_model(upper[0].model)
    model.embeddings = ContextualTokens(table)
    model.encoder.layer = model.encoder.layer[-trained_layers:]
    model.pooler = None
    return upper


def put_back(encoder: Any, upper: Any) -> Any:
    """A copy of ``encoder`` with the layers of ``upper`` (made by `upper_layers`) and what follows them: an ordinary model."""
    whole = copy.deepcopy(encoder)
    trained = bert_model(upper[0].model).encoder.layer
    for target, source in zip(
        bert_model(whole[0].model).encoder.layer[-len(trained) :], trained, strict=True
    ):
        target.load_state_dict(source.state_dict())
    for target, source in zip(list(whole)[1:], list(upper)[1:], strict=True):
        target.load_state_dict(source.state_dict())  # the linear layer of cls+linear is trained too
    return whole


def cached_states(
    encoder: Callable[[], Any], tokens: Tokens, layers: Sequence[int], folder: Path
) -> dict[int, np.ndarray]:
    """`hidden_states` of ``layers``, computed once and kept in ``folder`` as memory-mapped float32 files, one a layer.

    ``encoder`` loads the encoder, if it is needed. Raises EncoderError for a file that cannot be written, or is not what
    was written.
    """
    paths = {k: folder / f"layer{k}.npy" for k in layers}
    missing = [k for k, path in paths.items() if not path.is_file()]
    rows = int(tokens.offsets[-1])
    if missing:
        model = encoder()
        shape = (rows, model.get_embedding_dimension())
        try:
            with ExitStack() as files:
                partial = {k: files.enter_context(whole_file(paths[k])) for k in missing}
                out = {k: _allocate(partial[k], shape) for k in missing}
                hidden_states(model, tokens, missing, out)
                for table in out.values():
                    table.flush()
        except OSError as error:
            size = len(missing) * shape[0] * shape[1] * 4 / 1e9
            raise EncoderError(
                f"{folder} could not be filled with {size:.2g} GB of hidden states: {error}; nothing was left there"
            ) from error
    return {k: read_array(path, rows, np.dtype(np.float32)) for k, path in paths.items()}


def _allocate(path: Path, shape: tuple[int, int]) -> np.memmap:
    table = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=shape)
    with path.open(
        "r+b"
    ) as file:  # on a disk that is full only later, a mapped write ends the process without a word
        os.posix_fallocate(file.fileno(), 0, file.seek(0, os.SEEK_END))
    return table
