"""Margin losses with static, adaptive and distributed targets (Gienapp et al. 2025, Section 3).

`margin_loss` and `margins_and_targets` are functions of three tensors and need only torch.
`MarginLoss` is the same loss for the trainer of Sentence Transformers, `CachedMarginLoss` (in
`cached_loss`) the same with the memory of a mini-batch.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterable
from numbers import Real
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from adaptive_margins.distributed import gathered

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

ORIENTATIONS = ("paper", "released")
_SETTINGS = ("target", "in_batch", "orientation", "error", "stop_gradient")
ERRORS: dict[str, Callable[[Tensor], Tensor]] = {
    "squared": torch.square,  # the paper's, Eqs. 4 and 5
    "absolute": torch.abs,
    "soft": lambda l_ij: softplus(-l_ij),
}


@overload
def margin_loss(
    query: Tensor,
    positive: Tensor,
    negative: Tensor,
    *,
    target: float | str = ...,
    in_batch: bool = ...,
    orientation: str = ...,
    error: str = ...,
    stop_gradient: bool = ...,
    return_targets: Literal[False] = ...,
) -> Tensor: ...
@overload
def margin_loss(
    query: Tensor,
    positive: Tensor,
    negative: Tensor,
    *,
    target: float | str = ...,
    in_batch: bool = ...,
    orientation: str = ...,
    error: str = ...,
    stop_gradient: bool = ...,
    return_targets: Literal[True],
) -> tuple[Tensor, Tensor]: ...
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
        in_batch: compare every query with all negatives of the batch; not allowed for
            "distributed", whose targets always use them.
        orientation: "paper" as above. "released" is the authors' published code: the (B,) vector
            φ(q_i, d⁺_i), or the margin in "distributed", is broadcast along rows, so that it has
            index j instead of i. Both are the same where l has no index j.
        error: "squared" l² (the paper), "absolute" ``|l|`` or "soft" log(1 + exp(−l)).
        stop_gradient: treat the targets as constants, without a gradient.
        return_targets: return the targets as well.

    Returns:
        The loss, a scalar tensor; with `return_targets` (loss, T), T detached, with the shapes of
        `margins_and_targets`. Both are float32, or float64 if an embedding is, also under autocast.
        A zero vector has φ = 0 with all vectors, and a zero gradient.

    Raises:
        ValueError: a setting or a shape that is not one of the above.
        TypeError: an embedding that is not a floating-point tensor.
    """
    _check_settings(target, in_batch, orientation, error, stop_gradient)
    margins, targets = margins_and_targets(
        query, positive, negative, target=target, in_batch=in_batch, orientation=orientation
    )
    l_ij = margins - (targets.detach() if stop_gradient else targets)  # Eqs. 1 to 3
    loss = ERRORS[error](l_ij).mean()  # Eq. 4 if there is no j, else Eq. 5
    return (loss, targets.detach()) if return_targets else loss


def margins_and_targets(
    query: Tensor,
    positive: Tensor,
    negative: Tensor,
    *,
    target: float | str = "distributed",
    in_batch: bool = False,
    orientation: str = "paper",
) -> tuple[Tensor, Tensor]:
    """Return the relevance margins of a batch of triples and their targets.

    Arguments, types and errors are those of `margin_loss`, the mean error of margins − targets.
    Both have gradients.

    Returns:
        Margins: (B, B) in-batch, with row i the query and column j the negative; (B, 1) for
        "distributed", (1, B) if released; else (B,). Targets: () for a number, (B,) for
        "adaptive", (B, B) for "adaptive" in-batch and "distributed".
    """
    _check_settings(target, in_batch, orientation)
    _check_embeddings(query, positive, negative)
    dtype = torch.float32
    for embeddings in (query, positive, negative):
        dtype = torch.promote_types(dtype, embeddings.dtype)

    # Autocast would compute cosines in half precision: near 1, bfloat16 has steps of 0.004.
    with torch.autocast(query.device.type, enabled=False):
        q, d_pos, d_neg = (_unit(vectors.to(dtype)) for vectors in (query, positive, negative))
        if in_batch:  # Eqs. 1 and 2 with d⁻_j for d⁻_i
            margins = _by_row(_phi_i(q, d_pos), orientation) - _phi_ij(q, d_neg)
        elif target == "distributed":  # Eq. 3
            margins = _by_row(_phi_i(q, d_pos) - _phi_i(q, d_neg), orientation)
        else:  # Eqs. 1 and 2
            margins = _phi_i(q, d_pos) - _phi_i(q, d_neg)

        if not isinstance(target, str):  # Eq. 1
            targets = torch.full((), float(target), dtype=dtype, device=q.device)
        elif target == "adaptive" and not in_batch:  # Eq. 2
            targets = (1 + _phi_i(d_pos, d_neg)) / 2
        else:  # Eq. 3, and Eq. 2 with d⁻_j for d⁻_i
            targets = (1 + _phi_ij(d_pos, d_neg)) / 2
    return margins, targets


def _by_row(values: Tensor, orientation: str) -> Tensor:
    """Broadcast (B,) along columns (value i in row i), or along rows as the released code does."""
    return values[:, None] if orientation == "paper" else values[None, :]


def _phi_i(a: Tensor, b: Tensor) -> Tensor:
    """φ(a_i, b_i) of unit vectors, (B,)."""
    return (a * b).sum(dim=1)


def _phi_ij(a: Tensor, b: Tensor) -> Tensor:
    """φ(a_i, b_j) of unit vectors, (B, B)."""
    return a @ b.T


def _unit(vectors: Tensor) -> Tensor:
    """Rows divided by their norms; a zero row stays zero, with a zero gradient."""
    # First by the largest component, so that no norm over- or underflows. φ does not depend on
    # the scale of its arguments, so the gradient is exact although that divisor is a constant.
    largest = vectors.detach().abs().amax(dim=1, keepdim=True)
    zero = largest == 0
    vectors = vectors / largest.masked_fill(zero, 1)
    return (vectors / vectors.masked_fill(zero, 1).norm(dim=1, keepdim=True)).masked_fill(zero, 0)


def _check_settings(
    target: float | str,
    in_batch: bool,
    orientation: str,
    error: str = "squared",
    stop_gradient: bool = False,
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

    It needs triples only, no teacher model and no scores: "adaptive" and "distributed" targets are
    computed from the similarity of the two passages by the encoder in training.

    Args:
        model: the SentenceTransformer to train.
        target, in_batch, orientation, error, stop_gradient: as `margin_loss` has them.
        gather_across_devices: with several processes, compute the loss of the triples of all of
            them, as one process with the whole batch would. Averaged over the processes, as DDP
            does, the gradients are those of that one process. Batches may differ in size.

    Raises:
        ValueError: a setting that `margin_loss` does not have, or data with other than three text
            columns.

    References:
        - Gienapp et al. 2025, Section 3: https://doi.org/10.1145/3731120.3744594

    Inputs:
        +-------------------------------------+------------------------+
        | Inputs                              | Labels                 |
        +=====================================+========================+
        | (query, positive, negative) triples | none (ignored, if any) |
        +-------------------------------------+------------------------+

        Three text columns in this order, whatever their names.

    Recommendations:
        - With ``in_batch=True`` use ``BatchSamplers.NO_DUPLICATES``, or the negative of one triple
          may be the positive of another. "distributed" margins have one negative a query.
        - With several processes, the batch is that of each process, unless
          ``gather_across_devices=True``.

    Relations:
        - :class:`MarginMSELoss` takes the target of each triple as a label from a teacher model,
          and the dot product in place of the cosine.
        - :class:`CachedMarginLoss` is equal and needs the memory of a mini-batch.

    Example:
        ::

            loss = MarginLoss(model, target="distributed")
            trainer = SentenceTransformerTrainer(model=model, train_dataset=triples, loss=loss)
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
        gather_across_devices: bool = False,
    ) -> None:
        super().__init__()
        _check_settings(target, in_batch, orientation, error, stop_gradient)
        self.model = model
        self.target = target
        self.in_batch = in_batch
        self.orientation = orientation
        self.error = error
        self.stop_gradient = stop_gradient
        self.gather_across_devices = gather_across_devices

    def forward(
        self, sentence_features: Iterable[dict[str, Any]], labels: Tensor | None = None
    ) -> Tensor:
        """Embed the token features of the three columns and return their loss, a scalar tensor."""
        # Imported here, because `margin_loss` needs only torch.
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
        if self.gather_across_devices:
            embeddings = [gathered(vectors) for vectors in embeddings]
        return margin_loss(*embeddings, **{name: getattr(self, name) for name in _SETTINGS})

    def get_config_dict(self) -> dict[str, Any]:
        """Return the settings, as Sentence Transformers writes them to the model card."""
        return {name: getattr(self, name) for name in (*_SETTINGS, "gather_across_devices")}

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


def __getattr__(name: str) -> Any:
    """Return `CachedMarginLoss`, whose base class takes seconds to import, when asked for."""
    if name == "CachedMarginLoss":
        return importlib.import_module("adaptive_margins.cached_loss").CachedMarginLoss
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
