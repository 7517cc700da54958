"""Write an encoder as a Sentence Transformers folder with an ONNX graph, checked against PyTorch.

    pip install 'adaptive-margins[onnx]'
    python examples/export_onnx.py my_encoder my_encoder_onnx

The graph has inputs ``input_ids`` and ``attention_mask``, (B, L) int64, and outputs
``last_hidden_state`` (B, L, D) and ``sentence_embedding`` (B, D), float32. The folder has the names
and places that the ONNX backend of Sentence Transformers reads; its exporter, optimum-onnx,
does not work with transformers 5.
"""

from __future__ import annotations

import logging
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from adaptive_margins.encoder.load import open_encoder, save_encoder
from adaptive_margins.encoder.speed import packs
from adaptive_margins.files import atomic_folder, check_output

TOLERANCE = 1e-4
"""Largest difference between a number of an ONNX embedding and of PyTorch's."""
INPUTS = ("input_ids", "attention_mask")
OUTPUTS = ("last_hidden_state", "sentence_embedding")
TRACED = ["a passage", "a somewhat longer passage than that"]
CHECKED = ["one", "What is a margin?", "A passage of " + 40 * "many " + "words."]


class Graph(nn.Module):
    """All modules of an encoder, with tensors in place of a dictionary of features."""

    def __init__(self, encoder: Any) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Return token embeddings (B, L, D) and text embeddings (B, D)."""
        out = self.encoder({"input_ids": input_ids, "attention_mask": attention_mask})
        return out["token_embeddings"], out["sentence_embedding"]


def features(encoder: Any, texts: list[str]) -> dict[str, Tensor]:
    """Return the token ids and the attention mask of texts, truncated at the encoder's limit."""
    limit = encoder.max_seq_length
    tokens = encoder.tokenizer(
        texts, padding=True, truncation=True, max_length=limit, return_tensors="pt"
    )
    return {name: tokens[name] for name in INPUTS}


def export(encoder: Any, path: Path) -> None:
    """Trace the encoder and write its graph; batch size and length stay free."""
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it asks for torchvision
    free = {0: torch.export.Dim("batch"), 1: torch.export.Dim("tokens")}
    with warnings.catch_warnings(action="ignore"):  # of torch about itself
        program = torch.onnx.export(
            Graph(encoder).eval(),
            kwargs=features(encoder, TRACED),
            dynamo=True,
            verbose=False,
            input_names=INPUTS,
            output_names=OUTPUTS,
            dynamic_shapes=dict.fromkeys(INPUTS, free),
        )
    assert program is not None
    program.save(str(path))


def difference(encoder: Any, path: Path) -> float:
    """Return the largest difference of ONNX Runtime's embeddings of texts from PyTorch's."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    largest = 0.0
    for texts in (CHECKED, CHECKED[:1]):  # other sizes than those traced
        inputs = features(encoder, texts)
        arrays = {name: value.numpy() for name, value in inputs.items()}
        (found,) = session.run(["sentence_embedding"], arrays)
        with torch.inference_mode():
            expected = encoder(inputs)["sentence_embedding"].numpy()
        largest = max(largest, float(np.abs(found - expected).max()))
    return largest


def main(model: str, output: str) -> Path:
    """Export an encoder to a new folder, and return the path of its graph."""
    folder = Path(output)
    check_output(folder, folder=True)
    encoder = open_encoder(model, device="cpu").eval()
    if packs(encoder):  # packed attention has a loop over the texts
        encoder[0].model.set_attn_implementation("sdpa")
    with atomic_folder(folder, same=lambda _: False) as partial:
        save_encoder(encoder, partial)
        path = partial / "onnx" / "model.onnx"
        path.parent.mkdir()
        export(encoder, path)
        if (far := difference(encoder, path)) > TOLERANCE:
            sys.exit(f"ONNX embeddings differ from PyTorch's by {far:.2g}, more than {TOLERANCE:g}")
    return folder / "onnx" / "model.onnx"


if __name__ == "__main__":
    print(main(*sys.argv[1:]))
