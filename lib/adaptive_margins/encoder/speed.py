"""Fast training on a CPU: texts of a step are packed without padding, and dropout draws one random
number for four elements. `adapt` prepares a model, and `batcher` lays out its texts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from adaptive_margins.encoder.tokens import Tokens

Rows = Sequence[int] | np.ndarray

_PACKED = "packed"
_PACKABLE = ("bert", "distilbert", "roberta")  # MPNet's position bias is one of a single text


def register() -> None:
    """Let transformers find the attention of adapted models, in this process."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(_PACKED, _packed_attention)
    AttentionMaskInterface.register(_PACKED, _mask)


def adapt(transformer: Any) -> None:
    """Let a transformer read packed texts as well as padded ones, and draw dropout faster."""
    for module in list(transformer.model.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Dropout:
                setattr(module, name, _Dropout(child.p))
    config = transformer.model.config
    if config.model_type not in _PACKABLE or getattr(config, "is_decoder", False):
        return
    register()
    transformer.model.set_attn_implementation(_PACKED)
    if transformer.model_forward_params is not None:
        transformer.model_forward_params |= {"cu_seq_lens_q"}


def packs(model: Any) -> bool:
    """Return whether a model reads packed texts, faster than padded ones.

    On a GPU, that many small attention kernels cost more than padding.
    """
    return model[0].model.config._attn_implementation == _PACKED and model.device.type == "cpu"


def batcher(model: Any) -> Callable[[Tokens, Rows], dict[str, Tensor]]:
    """Return the function from texts to features of the model: packed or padded."""
    if not packs(model):
        return Tokens.batch
    config = model[0].model.config
    first = config.pad_token_id + 1 if config.model_type == "roberta" else 0
    return lambda tokens, rows: packed(tokens, rows, first)


def default_chunks(model: Any) -> int:
    """Return the number of chunks, by length, of the texts of a step: 1 without padding."""
    return 1 if packs(model) else 4


def tokens_within(model: Any, gigabytes: float, length: int) -> int:
    """Return how many tokens, of texts of ``length``, have about ``gigabytes`` of activations.

    Training keeps, in float32 and for each layer, some 21 numbers a dimension of a token, and on
    CPUs three attention weights a head for each other token of the text.
    """
    config = model[0].model.config.get_text_config()
    weights = 0 if model.device.type == "cuda" else 3 * config.num_attention_heads * length
    numbers = config.num_hidden_layers * (21 * config.hidden_size + weights)
    return int(gigabytes * 1e9 / (4 * numbers))


def packed(tokens: Tokens, rows: Rows, first_position: int) -> dict[str, Tensor]:
    """Features of the texts in ``rows`` end to end, as in Sentence Transformers' FlashAttention.

    ``input_ids`` and ``position_ids``, (1, T), and ``cu_seq_lens_q``.
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
    """Dropout of ``p``, rounded to 1 / 65,536 on a CPU: a 64-bit random number for 4 elements."""
    threshold = round(p * 65_536)
    if x.device.type != "cpu" or not 0 < threshold < 65_536:
        return nn.functional.dropout(x, p)
    random = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    kept = random.view(torch.int16)[: x.numel()].view(x.shape) >= threshold - 32_768
    return x * kept.to(x.dtype).mul_(65_536 / (65_536 - threshold))


def _mask(
    *, attention_mask: Tensor | None, allow_is_bidirectional_skip: bool, **kwargs: Any
) -> Any:
    """The mask of padded texts; None if nothing is padded."""
    from transformers.masking_utils import sdpa_mask

    # On a GPU, the host would wait for the answer whether something is padded.
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
    """Attention within each text of (1, H, T, D / H) packed ones, equal neighbours together."""
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
