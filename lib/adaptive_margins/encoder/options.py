"""What can be chosen of an encoder for a custom corpus: prompts, dimensions and length."""

from __future__ import annotations

from dataclasses import dataclass

CORPUS_LENGTH = 256
"""Tokens of a text that are read at most, if no length is asked for."""


@dataclass(frozen=True)
class EncoderOptions:
    """How an encoder reads a custom corpus; None leaves a choice to the encoder.

    Attributes:
        query_prompt, passage_prompt: text before each one, in the place of the stored; "" for none.
        dimensions: the first ones of each embedding are used alone, at least 1 (Matryoshka
            embeddings: Kusupati et al., NeurIPS 2022).
        max_length: of a text in tokens, prompt and special tokens included; None takes the
            encoder's limit, but at most 256 unless `finetune` saved it.
    """

    query_prompt: str | None = None
    passage_prompt: str | None = None
    dimensions: int | None = None
    max_length: int | None = None
