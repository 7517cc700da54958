"""Margin losses with static, adaptive and distributed targets (Gienapp et al. 2025, Section 3).

`margin_loss` is a function of three tensors and needs only torch. `MarginLoss` is the same loss
for the trainer of Sentence Transformers, `CachedMarginLoss` the same with the memory of a
mini-batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus
from torch.utils.checkpoint import checkpoint

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

ORIENTATIONS = ("paper", "released")
ERRORS: dict[str, Callable[[Tensor], Tensor]] = {
    "squared": torch.square,  # the paper's, Eqs. 4 and 5
    "absolute": torch.abs,
    "soft": lambda l_ij: softplus(-l_ij),
}


# fmt: off
@overload
def margin_loss(
    query: Tensor, positive: Tensor, negative: Tensor, *, target: float | str = ...,
    in_batch: bool = ..., orientation: str = ..., error: str = ..., stop_gradient: bool = ...,
    return_targets: Literal[False] = ...,
) -> Tensor: ...
@overload
def margin_loss(
    query: Tensor, positive: Tensor, negative: Tensor, *, target: float | str = ...,
    in_batch: bool = ..., orientation: str = ..., error: str = ..., stop_gradient: bool = ...,
    return_targets: Literal[True],
) -> tuple[Tensor, Tensor]: ...
# fmt: on
def margin_loss(
    query: Tensor,
    positive: Tensor,
    negative: Tensor,
    *,
    target: float | str = "distributed",
    in_batch: bool = False,
    orientation: str = "paper",
    error: str = "squared",
    stop_gradient: bool = False,
    return_targets: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Mean error between the relevance margins of a batch of triples and their targets.

    With φ the cosine similarity and T[i,j] = (1 + φ(d⁺_i, d⁻_j)) / 2, the loss is the mean of l²:

    ============= ======== ==================================== ==== ==============
    target        in_batch l                                    mean equations
    ============= ======== ==================================== ==== ==============
    a number ε    no       φ(q_i, d⁺_i) − φ(q_i, d⁻_i) − ε      B    1, 4
    a number ε    yes      φ(q_i, d⁺_i) − φ(q_i, d⁻_j) − ε      B²   1 with d⁻_j, 5
    "adaptive"    no       φ(q_i, d⁺_i) − φ(q_i, d⁻_i) − T[i,i] B    2, 4
    "adaptive"    yes      φ(q_i, d⁺_i) − φ(q_i, d⁻_j) − T[i,j] B²   2 with d⁻_j, 5
    "distributed" (always) φ(q_i, d⁺_i) − φ(q_i, d⁻_i) − T[i,j] B²   3, 5
    ============= ======== ==================================== ==== ==============

    Args:
        query: (B, D) query embeddings of any norm, B and D at least 1.
        positive: (B, D) embeddings of each query's positive passage.
        negative: (B, D) embeddings of each query's negative passage.
        target: a finite number (the paper tries 0 to 1), "adaptive" or "distributed".
        in_batch: compare every query with the negatives of the whole batch. Not to be set for
            "distributed", which always takes its targets from them.
        orientation: "paper" as above. "released" is what the authors' published code computes: the
            (B,) vector φ(q_i, d⁺_i), or the margin in "distributed", is broadcast along rows, so
            that it has index j instead of i. Both are the same where l has no index j.
        error: "squared" l² (the paper), "absolute" |l| or "soft" log(1 + exp(−l)).
        stop_gradient: take the targets as constants. Else the gradient flows through them.
        return_targets: return the targets as well.

    Returns:
        The loss, a scalar tensor. With `return_targets` a pair (loss, T), T detached, of shape ()
        for a number, (B,) for "adaptive", (B, B) for "adaptive" in-batch and "distributed". Both
        are float32, or float64 if an embedding is, also under autocast. A zero vector has φ = 0
        with everything and gets a zero gradient.

    Raises:
        ValueError: a setting or a shape that is not one of the above.
        TypeError: an embedding that is not a floating-point tensor.
    """
    _check_settings(target, in_batch, orientation, error, stop_gradient)
    _check_embeddings(query, positive, negative)
    dtype = torch.float32
    for embeddings in (query, positive, negative):
        dtype = torch.promote_types(dtype, embeddings.dtype)

    # Autocast would compute cosines in half precision: near 1, bfloat16 has steps of 0.004.
    with torch.autocast(query.device.type, enabled=False):
        q, d_pos, d_neg = (_unit(vectors.to(dtype)) for vectors in (query, positive, negative))
        margin, targets = _margin_and_target(q, d_pos, d_neg, target, in_batch, orientation)
        l_ij = margin - (targets.detach() if stop_gradient else targets)  # Eqs. 1 to 3
        loss = ERRORS[error](l_ij).mean()  # Eq. 4 if there is no j, else Eq. 5
    return (loss, targets.detach()) if return_targets else loss


def _margin_and_target(
    q: Tensor, d_pos: Tensor, d_neg: Tensor, target: float | str, in_batch: bool, orientation: str
) -> tuple[Tensor, Tensor]:
    """Relevance margin and target of Eqs. 1 to 3, for unit vectors q, d⁺, d⁻ of shape (B, D)."""

    def by_row(values: Tensor) -> Tensor:
        """(B,) to a matrix: value i in row i; in column i as the released code broadcasts it."""
        return values[:, None] if orientation == "paper" else values[None, :]

    if in_batch:  # Eqs. 1 and 2 with d⁻_j for d⁻_i
        margin = by_row(_phi_i(q, d_pos)) - _phi_ij(q, d_neg)
    elif target == "distributed":  # Eq. 3
        margin = by_row(_phi_i(q, d_pos) - _phi_i(q, d_neg))
    else:  # Eqs. 1 and 2
        margin = _phi_i(q, d_pos) - _phi_i(q, d_neg)

    if not isinstance(target, str):  # Eq. 1
        return margin, torch.full((), float(target), dtype=q.dtype, device=q.device)
    if target == "adaptive" and not in_batch:  # Eq. 2
        return margin, (1 + _phi_i(d_pos, d_neg)) / 2
    return margin, (1 + _phi_ij(d_pos, d_neg)) / 2  # Eq. 3, and Eq. 2 with d⁻_j for d⁻_i


def _phi_i(a: Tensor, b: Tensor) -> Tensor:
    """φ(a_i, b_i) of unit vectors, (B,)."""
    return (a * b).sum(dim=1)


def _phi_ij(a: Tensor, b: Tensor) -> Tensor:
    """φ(a_i, b_j) of unit vectors, (B, B)."""
    return a @ b.T


def _unit(vectors: Tensor) -> Tensor:
    """Rows divided by their norms; a zero row stays zero and gets a zero gradient."""
    # First by the largest component, so that no norm over- or underflows. φ does not depend on
    # the scale of its arguments, so the gradient is exact although that divisor is a constant.
    largest = vectors.detach().abs().amax(dim=1, keepdim=True)
    zero = largest == 0
    vectors = vectors / largest.masked_fill(zero, 1)
    return (vectors / vectors.masked_fill(zero, 1).norm(dim=1, keepdim=True)).masked_fill(zero, 0)


def _check_settings(
    target: float | str, in_batch: bool, orientation: str, error: str, stop_gradient: bool
) -> None:
    """Raise ValueError for a setting that `margin_loss` does not have."""
    if isinstance(target, str):
        known = target in ("adaptive", "distributed")
    else:
        known = isinstance(target, Real) and not isinstance(target, bool)
        known = known and -math.inf < target < math.inf
    if not known:
        expected = 'a finite number, "adaptive" or "distributed"'
        raise ValueError(f"target is {target!r}; expected {expected}")
    for name, value, allowed in (
        ("in_batch", in_batch, (True, False)),
        ("orientation", orientation, ORIENTATIONS),
        ("error", error, tuple(ERRORS)),
        ("stop_gradient", stop_gradient, (True, False)),
    ):
        if value not in allowed:
            raise ValueError(f"{name} is {value!r}; expected {' or '.join(map(repr, allowed))}")
    if in_batch and target == "distributed":
        raise ValueError(
            'in_batch is True with target "distributed"; expected False, because '
            "distributed targets use every negative of the batch already"
        )


def _check_embeddings(query: Tensor, positive: Tensor, negative: Tensor) -> None:
    """Raise unless all are floating-point tensors of one shape (B, D), B and D at least 1."""
    named = {"query": query, "positive": positive, "negative": negative}
    for name, value in named.items():
        if not isinstance(value, Tensor) or not value.is_floating_point():
            kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"{name} is of type {kind}; expected a floating-point tensor")
    one_shape = query.shape == positive.shape == negative.shape
    if not one_shape or query.ndim != 2 or query.numel() == 0:
        shapes = ", ".join(f"{name} {tuple(value.shape)}" for name, value in named.items())
        raise ValueError(f"shapes are {shapes}; expected one (B, D) for all, B and D at least 1")


class MarginLoss(nn.Module):
    """`margin_loss` for the trainer of Sentence Transformers.

    It needs triples only, no teacher model and no scores: with "adaptive" and "distributed" targets
    the encoder in training itself says, by the similarity of the two passages, how far apart their
    similarities to the query should be.

    Args:
        model: the SentenceTransformer to train.
        target: a finite number ε, "adaptive" or "distributed".
        in_batch: compare every query with the negatives of the whole batch (not "distributed").
        orientation: "paper", or "released" for what the authors' published code computes.
        error: "squared" (the paper), "absolute" or "soft".
        stop_gradient: take the targets as constants.

    Raises:
        ValueError: a setting that `margin_loss` does not have (already when constructed), or data
            with other than three text columns.

    References:
        - Gienapp et al. 2025, Section 3: https://doi.org/10.1145/3731120.3744594

    Requirements:
        1. (query, positive, negative) triples: three text columns in this order, whatever their
           names.

    Inputs:
        +-------------------------------------+------------------------+
        | Inputs                              | Labels                 |
        +=====================================+========================+
        | (query, positive, negative) triples | none (ignored, if any) |
        +-------------------------------------+------------------------+

    Formulas:
        With φ the cosine similarity, the loss is the mean of l² over i (Eq. 4), or i and j (Eq. 5).

        - ``target=ε`` (Eq. 1): l_i = φ(q_i, d⁺_i) − φ(q_i, d⁻_i) − ε
        - ``"adaptive"`` (Eq. 2): l_i = φ(q_i, d⁺_i) − φ(q_i, d⁻_i) − (1 + φ(d⁺_i, d⁻_i)) / 2
        - ``"distributed"`` (Eq. 3): l_ij = φ(q_i, d⁺_i) − φ(q_i, d⁻_i) − (1 + φ(d⁺_i, d⁻_j)) / 2
        - ``in_batch=True``: Eqs. 1 and 2 with d⁻_j in place of d⁻_i

    Recommendations:
        - With ``in_batch=True`` use ``BatchSamplers.NO_DUPLICATES``, or the negative of one triple
          may be the positive of another. "distributed" compares a query with its own negative only.
        - With several processes, the batch is that of each process.

    Relations:
        - :class:`MarginMSELoss` takes the target of each triple as a label from a teacher model,
          and the dot product in place of the cosine.
        - :class:`CachedMarginLoss` is equal and needs the memory of a mini-batch, whatever the
          size of the batch.

    Example:
        ::

            from datasets import Dataset
            from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer

            from adaptive_margins.losses import MarginLoss

            model = SentenceTransformer("microsoft/mpnet-base")
            train_dataset = Dataset.from_dict({
                "query": ["where is wild rice grown", "how long do cats sleep"],
                "positive": ["Wild rice grows in shallow lakes.", "Cats sleep 12 hours a day."],
                "negative": ["Rice is boiled for 20 minutes.", "Most cats have four kittens."],
            })
            loss = MarginLoss(model, target="distributed")

            trainer = SentenceTransformerTrainer(
                model=model,
                train_dataset=train_dataset,
                loss=loss,
            )
            trainer.train()
    """

    def __init__(
        self,
        model: SentenceTransformer,
        target: float | str = "distributed",
        *,
        in_batch: bool = False,
        orientation: str = "paper",
        error: str = "squared",
        stop_gradient: bool = False,
    ) -> None:
        super().__init__()
        _check_settings(target, in_batch, orientation, error, stop_gradient)
        self.model = model
        self.target = target
        self.in_batch = in_batch
        self.orientation = orientation
        self.error = error
        self.stop_gradient = stop_gradient

    def forward(
        self, sentence_features: Iterable[dict[str, Any]], labels: Tensor | None = None
    ) -> Tensor:
        """Embed the token features of the three columns and return their loss, a scalar tensor."""
        # Imported here, so that whoever wants `margin_loss` alone needs nothing but torch.
        from sentence_transformers.base.losses.merged_forward import embed_columns

        embeddings = embed_columns(self.model, sentence_features)
        return self.compute_loss_from_embeddings(embeddings, labels)

    def compute_loss_from_embeddings(
        self, embeddings: list[Tensor], labels: Tensor | None = None
    ) -> Tensor:
        """Return the loss of [query, positive, negative], each (B, D); labels are not used."""
        if len(embeddings) != 3:
            raise ValueError(
                f"the data has {len(embeddings)} text columns; "
                "expected 3: query, positive, negative"
            )
        # Of this class, because a subclass may have settings that `margin_loss` does not have.
        return margin_loss(*embeddings, **MarginLoss.get_config_dict(self))

    def get_config_dict(self) -> dict[str, Any]:
        """Return the settings, as Sentence Transformers writes them to the model card."""
        names = ("target", "in_batch", "orientation", "error", "stop_gradient")
        return {name: getattr(self, name) for name in names}

    @property
    def citation(self) -> str:
        """BibTeX entry of the paper, as Sentence Transformers writes it to the model card."""
        return """
@inproceedings{gienapp2025,
    title = {Learning Effective Representations for Retrieval Using Self-Distillation with
        Adaptive Relevance Margins},
    author = {Lukas Gienapp and Niklas Deckers and Martin Potthast and Harrisen Scells},
    booktitle = {15th International Conference on Innovative Concepts and Theories in Information
        Retrieval (ICTIR 2025)},
    year = {2025},
    doi = {10.1145/3731120.3744594},
}
"""


class CachedMarginLoss(MarginLoss):
    """`MarginLoss` of large batches with the memory of a mini-batch, by gradient caching.

    Targets from the whole batch want large batches, but `MarginLoss` keeps the activations of the
    encoder for all texts of a batch until its backward pass. This class keeps those of one
    mini-batch. (1) All texts are embedded in mini-batches, without their activations but with the
    states of the random number generators. (2) The loss gives the gradient of each embedding. (3)
    Each mini-batch is embedded again, with the same dropout, and its gradients are propagated back.
    Loss and gradients are those of `MarginLoss`, for the time of one more forward pass.

    Beside a mini-batch there remain the (B, D) embeddings and, for in-batch and distributed
    targets, some (B, B) matrices. Mini-batches are made of texts of similar length, each padded to
    the longest in it.

    Args:
        model: the SentenceTransformer to train.
        target: a finite number ε, "adaptive" or "distributed".
        mini_batch_size: how many texts are embedded at a time, at least 1. Loss and gradients do
            not depend on it, but the random numbers of dropout do.
        in_batch: compare every query with the negatives of the whole batch (not "distributed").
        orientation: "paper", or "released" for what the authors' published code computes.
        error: "squared" (the paper), "absolute" or "soft".
        stop_gradient: take the targets as constants.

    Raises:
        ValueError: a setting that `MarginLoss` does not have, a `mini_batch_size` that is not a
            whole number of at least 1, or data with other than three text columns.

    References:
        - Gao et al. 2021, Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup,
          Section 3: https://arxiv.org/abs/2101.06983
        - Gienapp et al. 2025, Section 3: https://doi.org/10.1145/3731120.3744594

    Requirements, Inputs, Formulas:
        As :class:`MarginLoss`.

    Relations:
        - :class:`CachedMultipleNegativesRankingLoss` does the same for a contrastive loss.
        - Losses that replace the model's forward pass for a while, :class:`MatryoshkaLoss` and
          :class:`AdaptiveLayerLoss`, have not been tried with this one, which embeds again later.

    Example:
        ::

            from datasets import Dataset
            from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
            from sentence_transformers import SentenceTransformerTrainingArguments

            from adaptive_margins.losses import CachedMarginLoss

            model = SentenceTransformer("microsoft/mpnet-base")
            train_dataset = Dataset.from_dict({
                "query": ["where is wild rice grown", "how long do cats sleep"],
                "positive": ["Wild rice grows in shallow lakes.", "Cats sleep 12 hours a day."],
                "negative": ["Rice is boiled for 20 minutes.", "Most cats have four kittens."],
            })
            loss = CachedMarginLoss(model, target="distributed", mini_batch_size=32)

            trainer = SentenceTransformerTrainer(
                model=model,
                args=SentenceTransformerTrainingArguments(per_device_train_batch_size=1024),
                train_dataset=train_dataset,
                loss=loss,
            )
            trainer.train()
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
    ) -> None:
        super().__init__(
            model,
            target,
            in_batch=in_batch,
            orientation=orientation,
            error=error,
            stop_gradient=stop_gradient,
        )
        whole = isinstance(mini_batch_size, Integral) and not isinstance(mini_batch_size, bool)
        if not whole or mini_batch_size < 1:
            raise ValueError(
                f"mini_batch_size is {mini_batch_size!r}; expected a whole number of at least 1"
            )
        self.mini_batch_size = mini_batch_size

    def forward(
        self, sentence_features: Iterable[dict[str, Any]], labels: Tensor | None = None
    ) -> Tensor:
        """Embed the token features of the three columns and return their loss, a scalar tensor."""
        embeddings = [self._embed_column(features) for features in sentence_features]
        return self.compute_loss_from_embeddings(embeddings, labels)

    def _embed_column(self, features: dict[str, Any]) -> Tensor:
        """(B, D) embeddings of the texts of a column, mini-batch by mini-batch."""
        from sentence_transformers.base.losses import RandContext
        from sentence_transformers.base.losses.gradcache import _minibatch_ranges

        prompt_length = features.get("prompt_length")
        if isinstance(prompt_length, Tensor):  # one number for all texts, not to be cut into rows
            features = {**features, "prompt_length": int(prompt_length.flatten()[0])}
        features, order = _longest_first(features)
        tensors = [value for value in features.values() if isinstance(value, Tensor)]
        embeddings = [
            # Drops the activations, and embeds again when the backward pass comes to this
            # mini-batch, under the same autocast. That is steps 1 to 3 above. It can restore the
            # random numbers too, but not those of Apple's GPUs, which RandContext does.
            checkpoint(
                self._embed_rows,
                features,
                begin,
                end,
                use_reentrant=False,
                preserve_rng_state=False,
                context_fn=lambda: (nullcontext(), RandContext(*tensors)),
            )
            for begin, end in _minibatch_ranges(features, self.mini_batch_size)
        ]
        return torch.cat(embeddings)[order]

    def _embed_rows(self, features: dict[str, Any], begin: int, end: int) -> Tensor:
        """(end − begin, D) embeddings of some texts, padded to the longest of them."""
        from sentence_transformers.base.losses.gradcache import _create_minibatch

        return self.model(_create_minibatch(features, begin, end))["sentence_embedding"]

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
    """Token features sorted from the longest text to the shortest, and what restores the order."""
    mask = features.get("attention_mask")
    tensors = {key: value for key, value in features.items() if isinstance(value, Tensor)}
    # Images, and texts that are packed without padding, have tensors with other rows than texts.
    if mask is None or any(value.shape[:1] != mask.shape[:1] for value in tensors.values()):
        return features, slice(None)
    order = mask.sum(dim=1).argsort(descending=True, stable=True)
    ordered = {key: value[order] for key, value in tensors.items()}
    return {**features, **ordered}, order.argsort()
