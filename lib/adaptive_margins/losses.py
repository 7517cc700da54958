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
    negative: Tensor | None,
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
    negative: Tensor | None,
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
    negative: Tensor | None,
    *,
    target: float | str = "distributed",
    in_batch: bool = False,
    orientation: str = "paper",
    error: str = "squared",
    stop_gradient: bool = False,
    return_targets: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Mean error between the relevance margins of a batch and their targets.

    With φ the cosine similarity and T[i,j] = (1 + φ(d⁺_i, d⁻_j)) / 2, the loss of triples is the
    mean of l²:

    ============= ======== ==================================== ==== ==============
    target        in_batch l                                    mean equations
    ============= ======== ==================================== ==== ==============
    a number ε    no       φ(q_i, d⁺_i) − φ(q_i, d⁻_i) − ε      B    1, 4
    a number ε    yes      φ(q_i, d⁺_i) − φ(q_i, d⁻_j) − ε      B²   1 with d⁻_j, 5
    "adaptive"    no       φ(q_i, d⁺_i) − φ(q_i, d⁻_i) − T[i,i] B    2, 4
    "adaptive"    yes      φ(q_i, d⁺_i) − φ(q_i, d⁻_j) − T[i,j] B²   2 with d⁻_j, 5
    "distributed" (always) φ(q_i, d⁺_i) − φ(q_i, d⁻_i) − T[i,j] B²   3, 5
    ============= ======== ==================================== ==== ==============

    The paper has triples only. For two other kinds of data, l is the same with other negatives:

    - n negatives a query: each is d⁻_i of a triple (q_i, d⁺_i, d⁻_i), and d⁻_j is each of the B·n
      negatives of the batch, so the means are over B·n, B²·n and, for "distributed", B²·n² terms.
    - Pairs: d⁻_j = d⁺_j, the positives of the other queries, j ≠ i, whatever `in_batch`; the mean
      is over B·(B − 1) terms. "distributed" is an error: its targets are for the margin of a
      query's own negative, which pairs lack.

    Args:
        query: (B, D) query embeddings of any norm, B and D at least 1.
        positive: (B, D) embeddings of each query's positive passage.
        negative: (B, D) embeddings of each query's negative passage, (B, n, D) of its n at least 1
            negatives, or None for pairs, B at least 2.
        target: a finite number (the paper tries 0 to 1), "adaptive" or "distributed".
        in_batch: compare every query with all negatives of the batch; not allowed for
            "distributed", whose targets always use them.
        orientation: "paper" as above. "released" is the authors' published code: the (B,) vector
            φ(q_i, d⁺_i), or the margin in "distributed", is broadcast along rows, so that it has
            index j instead of i. Both are the same where l has no index j. For triples only.
        error: "squared" l² (the paper), "absolute" ``|l|`` or "soft" log(1 + exp(−l)).
        stop_gradient: treat the targets as constants, without a gradient.
        return_targets: return the targets as well.

    Returns:
        The loss, a scalar tensor; with `return_targets` (loss, T), T detached, with the shapes of
        `margins_and_targets`. Both are float32, or float64 if an embedding is, also under autocast.
        A zero vector has φ = 0 with all vectors, and a zero gradient.

    Raises:
        ValueError: a setting or a shape that is not one of the above, or a setting that is not for
            this kind of data.
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
    negative: Tensor | None,
    *,
    target: float | str = "distributed",
    in_batch: bool = False,
    orientation: str = "paper",
) -> tuple[Tensor, Tensor]:
    """Return the relevance margins of a batch and their targets.

    Arguments, types and errors are those of `margin_loss`, the mean error of margins − targets.
    Both have gradients.

    Returns:
        Margins and targets, which broadcast against each other. Row i is the query.

        ========= ============= ======== ============================= ============
        negative  target        in_batch margins                       targets
        ========= ============= ======== ============================= ============
        (B, D)    "adaptive"    no       (B,)                          (B,)
        (B, D)    "adaptive"    yes      (B, B)                        (B, B)
        (B, D)    "distributed" (always) (B, 1), or (1, B) if released (B, B)
        (B, n, D) "adaptive"    no       (B, n)                        (B, n)
        (B, n, D) "adaptive"    yes      (B, B·n)                      (B, B·n)
        (B, n, D) "distributed" (always) (B, n, 1)                     (B, 1, B·n)
        None      "adaptive"    (always) (B, B − 1)                    (B, B − 1)
        ========= ============= ======== ============================= ============

        A number has the margins of "adaptive" and a target of shape (). Column j·n + k is of the
        negative [j, k]; the B − 1 columns of pairs are j = 0 … B − 1 without i.
    """
    _check_settings(target, in_batch, orientation)
    _check_embeddings(query, positive, negative)
    _check_kind(negative, target, orientation, len(query))
    others = positive if negative is None else negative
    dtype = torch.float32
    for embeddings in (query, positive, others):
        dtype = torch.promote_types(dtype, embeddings.dtype)

    # Autocast would compute cosines in half precision: near 1, bfloat16 has steps of 0.004.
    with torch.autocast(query.device.type, enabled=False):
        q, d_pos, d_neg = (_unit(vectors.to(dtype)) for vectors in (query, positive, others))
        in_batch = in_batch or negative is None
        if d_neg.ndim == 3 and not in_batch:  # each of the n negatives makes a triple
            q, d_pos = q[:, None], d_pos[:, None]
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
    if negative is None:  # d⁺_i is no negative of q_i
        return _off_diagonal(margins), _off_diagonal(targets) if targets.ndim else targets
    return margins, targets


def _by_row(values: Tensor, orientation: str) -> Tensor:
    """Broadcast (B,) along columns (value i in row i), or along rows as the released code does."""
    return values[..., None] if orientation == "paper" else values[None, :]


def _off_diagonal(values: Tensor) -> Tensor:
    """(B, B) without its diagonal, (B, B − 1)."""
    # Without the first entry, the diagonal is the last of B + 1 columns. A mask would make the CPU
    # wait for the GPU.
    size = len(values)
    return values.flatten()[1:].view(size - 1, size + 1)[:, :-1].reshape(size, size - 1)


def _phi_i(a: Tensor, b: Tensor) -> Tensor:
    """φ(a_i, b_i) of unit vectors, (B,); (B, n) if b is (B, n, D)."""
    return (a * b).sum(dim=-1)


def _phi_ij(a: Tensor, b: Tensor) -> Tensor:
    """φ(a_i, b_j) of unit vectors, (B, B); (…, B·n) if b is (B, n, D)."""
    return a @ b.flatten(0, -2).T


def _unit(vectors: Tensor) -> Tensor:
    """Rows divided by their norms; a zero row stays zero, with a zero gradient."""
    # First by the largest component, so that no norm over- or underflows. φ does not depend on
    # the scale of its arguments, so the gradient is exact although that divisor is a constant.
    largest = vectors.detach().abs().amax(dim=-1, keepdim=True)
    zero = largest == 0
    vectors = vectors / largest.masked_fill(zero, 1)
    return (vectors / vectors.masked_fill(zero, 1).norm(dim=-1, keepdim=True)).masked_fill(zero, 0)


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


def _check_embeddings(query: Tensor, positive: Tensor, negative: Tensor | None) -> None:
    """Raise unless these are floating-point tensors of the shapes that `margin_loss` takes."""
    named = {"query": query, "positive": positive}
    if negative is not None:
        named["negative"] = negative
    for name, value in named.items():
        if not isinstance(value, Tensor) or not value.is_floating_point():
            kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"{name} is of type {kind}; expected a floating-point tensor")
    fit = query.ndim == 2 and query.shape == positive.shape and query.numel() > 0
    if negative is not None and fit:
        fit = negative.ndim in (2, 3) and negative.numel() > 0
        fit = fit and (negative.shape[0], negative.shape[-1]) == query.shape
    if not fit:
        shapes = ", ".join(f"{name} {tuple(value.shape)}" for name, value in named.items())
        raise ValueError(
            f"shapes are {shapes}; expected one (B, D) for all, or (B, n, D) for negative; "
            "B, n and D at least 1"
        )


def _check_kind(negative: Tensor | None, target: float | str, orientation: str, size: int) -> None:
    """Raise ValueError if a setting or the batch size is not for this kind of data."""
    pairs = "(query, positive) pairs"
    if orientation == "released" and (negative is None or negative.ndim == 3):
        kind = pairs if negative is None else f"negatives of shape {tuple(negative.shape)}"
        raise ValueError(
            f"orientation is 'released' with {kind}; expected 'paper', because the published code "
            "has one negative a query"
        )
    if negative is None and target == "distributed":
        raise ValueError(
            f'target is "distributed" with {pairs}; expected "adaptive" or a number, or a column '
            "of negatives, because distributed targets are for the margin of a query's own negative"
        )
    if negative is None and size < 2:
        raise ValueError(
            f"the batch has 1 of {pairs}; expected at least 2, because the negatives of a query "
            "are the other positives: use a larger batch size, and dataloader_drop_last=True if "
            "only the last batch of an epoch has 1"
        )


class MarginLoss(nn.Module):
    """`margin_loss` for the trainer of Sentence Transformers.

    It needs no teacher model and no scores: "adaptive" and "distributed" targets are computed from
    the similarity of two passages by the encoder in training.

    Args:
        model: the SentenceTransformer to train.
        target, in_batch, orientation, error, stop_gradient: as `margin_loss` has them.
        gather_across_devices: with several processes, compute the loss of the data of all of them,
            as one process with the whole batch would. Averaged over the processes, as DDP does, the
            gradients are those of that one process. Batches may differ in size.

    Raises:
        ValueError: a setting that `margin_loss` does not have, or not for this kind of data; data
            with fewer than two text columns; or a batch of one pair.

    References:
        - Gienapp et al. 2025, Section 3: https://doi.org/10.1145/3731120.3744594

    Inputs:
        +------------------------------------------------+------------------------+
        | Inputs                                         | Labels                 |
        +================================================+========================+
        | (query, positive, negative) triples            | none (ignored, if any) |
        +------------------------------------------------+------------------------+
        | (query, positive, negative_1, ..., negative_n) | none (ignored, if any) |
        +------------------------------------------------+------------------------+
        | (query, positive) pairs, not for "distributed" | none (ignored, if any) |
        +------------------------------------------------+------------------------+

        Text columns in this order, whatever their names. The negatives of a pair are the positives
        of the batch's other pairs, of which there must be one.

    Recommendations:
        - With ``in_batch=True`` and for pairs use ``BatchSamplers.NO_DUPLICATES``, or the negative
          of one query may be the positive of another. "distributed" margins are of the query's own
          negatives.
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
        """Embed the token features of the text columns and return their loss, a scalar tensor."""
        # Imported here, because `margin_loss` needs only torch.
        from sentence_transformers.base.losses.merged_forward import embed_columns

        embeddings = embed_columns(self.model, sentence_features)
        return self.compute_loss_from_embeddings(embeddings, labels)

    def compute_loss_from_embeddings(
        self, embeddings: list[Tensor], labels: Tensor | None = None
    ) -> Tensor:
        """Return the loss of [query, positive, *negatives], each (B, D); labels are not used."""
        if len(embeddings) < 2:
            raise ValueError(
                f"the data has {len(embeddings)} text columns; "
                "expected at least 2: query, positive and, if there are any, negatives"
            )
        if self.gather_across_devices:
            embeddings = [gathered(vectors) for vectors in embeddings]
        query, positive, *negatives = embeddings
        negative = negatives[0] if negatives else None
        if len(negatives) > 1:
            negative = torch.stack(negatives, dim=1)
        settings = {name: getattr(self, name) for name in _SETTINGS}
        return margin_loss(query, positive, negative, **settings)

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
