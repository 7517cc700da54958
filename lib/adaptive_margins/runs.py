"""The kinds of run, as configurations: BM25, a zero-shot encoder, a training, and its transfer.

A configuration holds everything that determines the results of its run, and nothing else. Its hash
is the id of the run, and the run's ``config.json`` holds it; `read_run_config` reads that file.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, model_validator

from adaptive_margins.files import digest

CODE_VERSION = 6
"""Raised by hand when the same configuration would give other numbers; part of every run's id."""

BM25_NAME = "bm25"


class RunConfig(BaseModel):
    """What all kinds of run have in common: the collection, and what is measured on it.

    Attributes:
        encoder: name of the encoder in the profile; "bm25" for BM25.
        collection: fingerprint of the collection.
        candidates: whose first ``depth`` passages are reranked, BM25's or those that come with the
            collection.
        depth: passages per query that are reranked.
        validation: the query set that is reranked in every run.
        rerank_measures: measures after reranking, in ir_measures' notation.
        test_sets: query sets that are reranked, and ranked in full; none for most training runs.
        full_measures: measures of the full ranking.
        full_depth: hits per query of the full ranking.
        code_version: see `CODE_VERSION`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: str
    encoder: str
    collection: str
    candidates: Literal["bm25", "official"] = "bm25"
    depth: int
    validation: str
    rerank_measures: tuple[str, ...]
    test_sets: tuple[str, ...] = ()
    full_measures: tuple[str, ...] = ()
    full_depth: int = 0
    code_version: int = CODE_VERSION

    @property
    def run_id(self) -> str:
        """16 hex digits of the SHA-256 of the configuration as canonical JSON."""
        return digest(self.model_dump(mode="json"))


class BM25Run(RunConfig):
    """BM25: its order of the candidates, and its ranking of all passages.

    ``version`` names the implementation; ``rerank_sets`` are the query sets that are reranked.
    """

    kind: Literal["bm25"] = "bm25"
    encoder: Literal["bm25"] = "bm25"
    version: str
    rerank_sets: tuple[str, ...]


class EncoderRun(RunConfig):
    """What zero-shot and training runs have in common: the encoder and what it reads.

    Attributes:
        weights: SHA-256 or commit of the pretrained weights.
        pooling: how a text's embedding is made of those of its tokens.
        layers: layers of the truncated encoder; None for all.
        trained_layers: trained layers, counted from the top; None for all parameters.
        query_length: maximum length of a query in tokens; ``passage_length`` that of a passage.
        precision: of the computations, e.g. "fp32".
    """

    weights: str
    pooling: str
    layers: int | None
    trained_layers: int | None
    query_length: int
    passage_length: int
    precision: Literal["fp32", "bf16", "fp16"]


class ZeroShotRun(EncoderRun):
    """A pretrained encoder without fine-tuning: step 0 of all its training runs."""

    kind: Literal["zero-shot"] = "zero-shot"


class TransferRun(EncoderRun):
    """A trained encoder on a collection that it was not trained on.

    Attributes:
        source: id of the training run.
        checkpoint: that of its selected step, or of its last one.
    """

    kind: Literal["transfer"] = "transfer"
    source: str
    checkpoint: Literal["selected", "last"]


class TrainingRun(EncoderRun):
    """An encoder fine-tuned with one loss.

    Attributes:
        loss: "margin" (`losses.margin_loss`), "softmax" (MultipleNegativesRankingLoss) or
            "margin-mse" (`teachers.margin_mse`).
        target: ε, "adaptive" or "distributed"; None for the other losses.
        in_batch: whether the other negatives of a batch count too; False for "distributed".
        similarity: of two embeddings under MarginMSE; the margin loss always takes the cosine.
        teacher: identity of the teacher, for MarginMSE and all sampling but "random"; else None.
        sampling: how batches are drawn from the triples (`topics.sampled_order`): "random";
            "topics", each from one cluster of queries; "topics-balanced" (TAS-B), whose pairs are
            also drawn evenly over the bins of the teacher's margin; "topics-hard", without the
            easiest pairs.
        orientation: see `losses.margin_loss`, as for ``error`` and ``stop_gradient``.
        batch_size: triples per step.
        chunks: parts in which a step's texts are encoded; it changes rounding and speed.
        triples: training budget.
        learning_rate: of the first step.
        decay: γ, the factor of the learning rate per step (Section 5.4).
        dropout: None for that of the encoder.
        seed: of the order of the triples, of dropout, and of the index.
        evaluate_every: steps between evaluations; 0 for the last step only.
        patience: evaluations without a gain before early stopping; 0 for none.
        stop_early: whether training ends there. If not, it goes on for the rest of the curve, while
            the selected checkpoint, time and triples are those of the run that had stopped.
        keep: the checkpoint that is selected.
        selection: the measure that decides about the best checkpoint.
        save_model: whether the selected model is stored with the results.
    """

    kind: Literal["training"] = "training"
    loss: Literal["margin", "softmax", "margin-mse"] = "margin"
    target: float | Literal["adaptive", "distributed"] | None
    in_batch: bool
    similarity: Literal["cosine", "dot"] = "cosine"
    teacher: str | None = None
    sampling: Literal["random", "topics", "topics-balanced", "topics-hard"] = "random"
    orientation: Literal["paper", "released"] = "paper"
    error: Literal["squared", "absolute", "soft"] = "squared"
    stop_gradient: bool = False
    batch_size: int = Field(gt=0)
    chunks: int = 1
    triples: int
    learning_rate: float
    weight_decay: float
    decay: float
    optimizer: str
    dropout: float | None
    seed: int
    evaluate_every: int
    patience: int
    stop_early: bool = True
    keep: Literal["best", "last"]
    selection: str
    save_model: bool = False

    @model_validator(mode="after")
    def _loss_and_target_agree(self) -> TrainingRun:
        if self.keep == "last" and not self.stop_early:
            raise ValueError("the last checkpoint can be selected only if training stops early")
        if (self.target is None) == (self.loss == "margin"):
            raise ValueError(f"target {self.target} does not go with loss {self.loss!r}")
        if (self.loss == "margin-mse" or self.sampling != "random") and self.teacher is None:
            what = "MarginMSE" if self.sampling == "random" else f"sampling {self.sampling!r}"
            raise ValueError(f"{what} needs a teacher, which has scores and clusters of queries")
        return self

    @property
    def steps(self) -> int:
        """Optimiser steps: complete batches only."""
        return self.triples // self.batch_size


AnyRun = BM25Run | ZeroShotRun | TransferRun | TrainingRun
_ANY_RUN: TypeAdapter[AnyRun] = TypeAdapter(Annotated[AnyRun, Field(discriminator="kind")])


def read_run_config(text: str) -> AnyRun:
    """Read the text of a ``config.json``. Raises pydantic.ValidationError if it is not one."""
    return _ANY_RUN.validate_json(text)
