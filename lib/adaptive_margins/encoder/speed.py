"""What makes training fast on a CPU; nothing else depends on how it is done.

- Texts of a step are read end to end, without padding: the work is done for real tokens alone.
- Dropout draws one random number for four elements.
- Layers that stay frozen are computed once for all runs (`cached_states`).

`adapt` prepares a model as it is loaded, and `batcher` chooses how its texts are laid out.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from adaptive_margins.encoder.arrays import read_array
from adaptive_margins.encoder.checks import EncoderError, bert_model
from adaptive_margins.encoder.embed import token_batches
from adaptive_margins.encoder.tokens import Tokens
from adaptive_margins.files import whole_file

Rows = Sequence[int] | np.ndarray

_PACKED = "packed"
_PACKABLE = ("bert", "distilbert", "roberta")  # MPNet's position bias is one of a single text


def adapt(transformer: Any) -> None:
    """Let a transformer read packed texts, and draw dropout faster on a CPU.

    Padded texts are read as before.
    """
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    for module in list(transformer.model.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Dropout:
                setattr(module, name, _Dropout(child.p))
    config = transformer.model.config
    if config.model_type not in _PACKABLE or getattr(config, "is_decoder", False):
        return
    AttentionInterface.register(_PACKED, _packed_attention)
    AttentionMaskInterface.register(_PACKED, _mask)
    transformer.model.set_attn_implementation(_PACKED)
    if transformer.model_forward_params is not None:
        transformer.model_forward_params |= {"cu_seq_lens_q"}


def packs(model: Any) -> bool:
    """Whether a model reads packed texts, and gains by it.

    On a GPU so many small attention kernels would cost more than padding does.
    """
    return model[0].model.config._attn_implementation == _PACKED and model.device.type == "cpu"


def batcher(model: Any) -> Callable[[Tokens, Rows], dict[str, Tensor]]:
    """How the texts of a training step become features of the model: packed or padded."""
    if not packs(model):
        return Tokens.batch
    config = model[0].model.config
    first = config.pad_token_id + 1 if config.model_type == "roberta" else 0
    return lambda tokens, rows: packed(tokens, rows, first)


def default_chunks(model: Any) -> int:
    """In how many parts, sorted by length, the texts of a step are encoded: 1 without padding."""
    return 1 if packs(model) else 4


def packed(tokens: Tokens, rows: Rows, first_position: int) -> dict[str, Tensor]:
    """Features of the texts in ``rows`` end to end, nothing padded.

    These are the features that Sentence Transformers makes for FlashAttention: ``input_ids`` and
    ``position_ids``, (1, T), and ``cu_seq_lens_q``.
    """
    texts = tokens.take(rows)
    position = np.arange(texts.offsets[-1]) - np.repeat(texts.offsets[:-1], texts.lengths)
    return {
        "input_ids": torch.from_numpy(texts.ids.astype(np.int64))[None],
        "position_ids": torch.from_numpy(position + first_position)[None],
        "cu_seq_lens_q": torch.from_numpy(texts.offsets.astype(np.int32)),
    }


class _Dropout(nn.Dropout):
    """torch's dropout, its masks drawn by `_drop`."""

    def forward(self, input: Tensor) -> Tensor:
        return _drop(input, self.p) if self.training else input


def _drop(x: Tensor, p: float) -> Tensor:
    """Dropout of ``p``, rounded to 1 / 65,536 on a CPU: a 64-bit random number serves 4 elements.

    torch draws one number for each element, which takes four times as long.
    """
    threshold = round(p * 65_536)
    if x.device.type != "cpu" or not 0 < threshold < 65_536:
        return nn.functional.dropout(x, p)
    random = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    kept = random.view(torch.int16)[: x.numel()].view(x.shape) >= threshold - 32_768
    return x * kept.to(x.dtype).mul_(65_536 / (65_536 - threshold))


def _mask(
    *, attention_mask: Tensor | None, allow_is_bidirectional_skip: bool, **kwargs: Any
) -> Any:
    """The mask of padded texts; None where nothing is padded.

    Not on a GPU: to find out whether something is padded would make the host wait.
    """
    from transformers.masking_utils import sdpa_mask

    on_host = attention_mask is None or attention_mask.device.type == "cpu"
    return sdpa_mask(
        attention_mask=attention_mask,
        allow_is_bidirectional_skip=allow_is_bidirectional_skip and on_host,
        **kwargs,
    )


def _packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    cu_seq_lens_q: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention within each text of (1, H, T, D / H) packed ones.

    Neighbours of equal length are computed together, without a mask.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if cu_seq_lens_q is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    groups = [(length, len(list(g))) for length, g in groupby(cu_seq_lens_q.diff().tolist())]
    sizes = [length * count for length, count in groups]
    # Split once: the gradient of a slice would be as large as all of it.
    split = [x[0].split(sizes, dim=1) for x in (query, key, value)]
    parts = []
    for (length, count), *qkv in zip(groups, *split, strict=True):
        q, k, v = (x.unflatten(1, (count, length)).transpose(0, 1) for x in qkv)
        if dropout:  # torch's attention has no fused kernel with dropout on a CPU
            weights = (q * (scaling or q.shape[-1] ** -0.5)) @ k.transpose(-1, -2)
            out = _drop(weights.softmax(-1), dropout) @ v
        else:
            out = nn.functional.scaled_dot_product_attention(q, k, v, scale=scaling)
        parts.append(out.transpose(1, 2).flatten(0, 1))
    return torch.cat(parts)[None], None


# ---- frozen layers ----------------------------------------------------------------------------


class ContextualTokens(nn.Module):
    """In place of a BERT model's embeddings: precomputed hidden states, by token number."""

    def __init__(self, table: np.ndarray) -> None:
        super().__init__()
        self.table = table

    def __deepcopy__(self, memo: dict[int, Any]) -> ContextualTokens:
        return ContextualTokens(self.table)  # the table is read-only and large: copies share it

    def forward(self, input_ids: Tensor, **_: Any) -> Tensor:
        """(B, L) token numbers → (B, L, D) hidden states."""
        states = self.table[input_ids.cpu().numpy().reshape(-1)]
        return torch.from_numpy(states).to(input_ids.device).view(*input_ids.shape, -1)


def upper_layers(encoder: Any, trained_layers: int, table: np.ndarray) -> Any:
    """A copy of ``encoder`` with its last ``trained_layers`` layers, which read from ``table``."""
    upper = copy.deepcopy(encoder)
    model = bert_model(upper[0].model)
    model.embeddings = ContextualTokens(table)
    model.encoder.layer = model.encoder.layer[-trained_layers:]
    model.pooler = None
    return upper


def put_back(encoder: Any, upper: Any) -> Any:
    """A copy of ``encoder`` with the layers of `upper_layers` and the modules after them."""
    whole = copy.deepcopy(encoder)
    trained = bert_model(upper[0].model).encoder.layer
    last = bert_model(whole[0].model).encoder.layer[-len(trained) :]
    # The linear layer of cls+linear is trained too.
    for target, source in zip([*last, *list(whole)[1:]], [*trained, *list(upper)[1:]], strict=True):
        target.load_state_dict(source.state_dict())
    return whole


def cached_states(
    encoder: Callable[[], Any], tokens: Tokens, layers: Sequence[int], folder: Path
) -> dict[int, np.ndarray]:
    """`hidden_states` of ``layers``, computed once and memory-mapped from ``folder`` (float32).

    ``encoder`` loads the encoder; it is called if a layer is missing. Raises EncoderError for a
    file that cannot be written, or is not what was written.
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
                f"{folder} could not be filled with {size:.2g} GB of hidden states: {error};"
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
    model.encoder.layer = model.encoder.layer[: max(1, *layers)]  # without any, no states are given
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
    """An empty table on disk, its room reserved where the system can do that.

    On a disk that is full only later, a mapped write would end the process without an error.
    """
    table = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=shape)
    if hasattr(os, "posix_fallocate"):
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, file.seek(0, os.SEEK_END))
    return table
