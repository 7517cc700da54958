"""`CachedMarginLoss`: large batches with the memory of a mini-batch; import it from `losses`."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from numbers import Integral
from typing import TYPE_CHECKING, Any

import torch
from sentence_transformers.base.losses import (
    CachedLossMixin,
    RandContext,
    has_static_embedding_input,
)
from sentence_transformers.base.model import BaseModel
from torch import Tensor

from adaptive_margins.losses import MarginLoss

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


class CachedMarginLoss(CachedLossMixin, MarginLoss):
    """`MarginLoss` of large batches with the memory of a mini-batch, by gradient caching.

    It embeds the texts in mini-batches without activations, computes the gradient of each
    embedding, and embeds each mini-batch again, with the same dropout, for the backward pass. Loss
    and gradients are those of `MarginLoss`, for the same data and the time of one more forward
    pass. Memory holds the activations of a mini-batch, the (B, D) embeddings of each column and
    the terms of the loss, of which `margin_loss` states the number.

    Args:
        model: the SentenceTransformer to train.
        target, in_batch, orientation, error, stop_gradient, gather_across_devices: as `MarginLoss`
            has them.
        mini_batch_size: texts embedded at a time, at least 1. Loss and gradients do not depend on
            it, except for the random numbers of dropout.

    Raises:
        ValueError: as `MarginLoss`; or a `mini_batch_size` that is not an integer of at least 1.

    References:
        - Gao et al. 2021, Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup,
          Section 3: https://arxiv.org/abs/2101.06983

    Relations:
        - :class:`MatryoshkaLoss` around this loss equals that around `MarginLoss`.
        - :class:`AdaptiveLayerLoss` and :class:`Matryoshka2dLoss` need `MarginLoss`; around this
          loss they warn, and fail in the first step.
    """

    def __init__(
        self,
        model: SentenceTransformer,
        target: float | str = "distributed",
        *,
        mini_batch_size: int = 32,
        in_batch: bool = False,
        orientation: str = "paper",
        error: str = "squared",
        stop_gradient: bool = False,
        gather_across_devices: bool = False,
    ) -> None:
        super().__init__(
            model,
            target,
            in_batch=in_batch,
            orientation=orientation,
            error=error,
            stop_gradient=stop_gradient,
            gather_across_devices=gather_across_devices,
        )
        if isinstance(model, BaseModel) and has_static_embedding_input(model):
            raise ValueError(
                "the model looks up embeddings (StaticEmbedding), which cannot be split into "
                "mini-batches and needs no gradient caching; use MarginLoss"
            )
        integral = isinstance(mini_batch_size, Integral) and not isinstance(mini_batch_size, bool)
        if not integral or mini_batch_size < 1:
            raise ValueError(
                f"mini_batch_size is {mini_batch_size!r}; expected an integer of at least 1"
            )
        self.mini_batch_size = mini_batch_size

    def forward(
        self, sentence_features: Iterable[dict[str, Any]], labels: Tensor | None = None
    ) -> Tensor:
        """Embed the token features of the text columns and return their loss, a scalar tensor."""
        columns, orders = zip(*map(_longest_first, sentence_features), strict=True)
        return super().forward_cached(columns, orders)  # in place of labels

    def calculate_loss(
        self, reps: list[list[Tensor]], orders: Any = None, *, with_backward: bool = False
    ) -> Tensor:
        """Return the loss of each column's mini-batches of embeddings, in their old order."""
        columns = [torch.cat(rep)[order] for rep, order in zip(reps, orders, strict=True)]
        loss = self.compute_loss_from_embeddings(columns)
        if with_backward:
            loss.backward()
            loss = loss.detach()
        return loss

    def embed_minibatch(
        self, *args: Any, random_state: RandContext | None = None, **kwargs: Any
    ) -> tuple[Tensor, RandContext | None]:
        """Embed under the autocast of the first pass; the backward pass is mostly outside of it."""
        with getattr(random_state, "autocast", nullcontext()):
            reps, state = super().embed_minibatch(*args, random_state=random_state, **kwargs)
        if state is not None:
            kind = reps.device.type
            state.autocast = torch.autocast(
                kind,
                dtype=torch.get_autocast_dtype(kind),
                enabled=torch.is_autocast_enabled(kind),
                cache_enabled=False,  # casts of the first pass have no gradients
            )
        return reps, state

    def get_config_dict(self) -> dict[str, Any]:
        """Return the settings, as Sentence Transformers writes them to the model card."""
        return {**super().get_config_dict(), "mini_batch_size": self.mini_batch_size}

    @property
    def citation(self) -> str:
        """BibTeX entries of both papers, as Sentence Transformers writes them to the model card."""
        return (
            super().citation
            + """
@inproceedings{gao2021,
    title = {Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup},
    author = {Luyu Gao and Yunyi Zhang and Jiawei Han and Jamie Callan},
    booktitle = {6th Workshop on Representation Learning for NLP (RepL4NLP 2021)},
    year = {2021},
}
"""
        )


def _longest_first(features: dict[str, Any]) -> tuple[dict[str, Any], Tensor | slice]:
    """Token features by descending text length, and the index that restores the order."""
    # Mini-batches of texts of similar length have little padding: half the time for passages.
    prompt_length = features.get("prompt_length")
    if isinstance(prompt_length, Tensor):  # one number for all texts
        features = {**features, "prompt_length": int(prompt_length.flatten()[0])}
    mask = features.get("attention_mask")
    tensors = {key: value for key, value in features.items() if isinstance(value, Tensor)}
    # The tensors of images, and of packed texts, have other rows than texts.
    if mask is None or any(value.shape[:1] != mask.shape[:1] for value in tensors.values()):
        return features, slice(None)
    order = mask.sum(dim=1).argsort(descending=True, stable=True)
    return {**features, **{key: value[order] for key, value in tensors.items()}}, order.argsort()
