"""Encoder → ONNX, by torch's own exporter; needs the extra ``onnx`` (onnx, onnxscript, onnxruntime).

Sentence Transformers exports through optimum-onnx, which does not work with transformers 5. What is written here has the
layout and names that it has, so that its ONNX backend can read it.
"""

from __future__ import annotations

import importlib.util
import logging
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adaptive_margins.encoder.checks import one_line
from adaptive_margins.encoder.load import open_encoder, save_encoder
from adaptive_margins.encoder.packing import packs
from adaptive_margins.errors import AdaptiveMarginsError
from adaptive_margins.files import WriteError, check_output, whole_folder, working_folder

TOLERANCE = 1e-4
"""How far a number of an embedding may be from PyTorch's."""
_INPUTS = ("input_ids", "attention_mask")
_OUTPUTS = ("last_hidden_state", "sentence_embedding")
_TRACED = ["a passage", "a somewhat longer passage than that"]
_CHECKED = ["one", "What is a margin?", "A passage of " + 40 * "many " + "words."]


class OnnxError(AdaptiveMarginsError, RuntimeError):
    """A package that is missing, a place that is taken, or a model that cannot be exported as it is."""


def export_onnx(model: str | Path, output: Path) -> Path:
    """Write an encoder as a Sentence Transformers folder with ``onnx/model.onnx`` in it, and return that file's path.

    The graph has inputs ``input_ids`` and ``attention_mask``, (B, L) int64, B and L free; and outputs
    ``last_hidden_state`` (B, L, D) and ``sentence_embedding`` (B, D), float32: the latter is what
    ``SentenceTransformer.encode`` returns (the cosine is yet to be taken, if the encoder does not normalise). Before the
    folder gets its name, ONNX Runtime's embeddings of some texts are compared with PyTorch's.

    Args:
        model: as `encoder.load.open_encoder` takes it: a Sentence Transformers folder, or "minilm".
        output: a folder that does not exist, or is empty. Whole or not at all.

    Raises:
        OnnxError: a package is missing, or the encoder cannot be exported.
        WriteError: the output is taken, or another process writes to it.
        EncoderError: as `open_encoder`.
    """
    if missing := [p for p in ("onnx", "onnxscript", "onnxruntime") if not _installed(p)]:
        raise OnnxError(
            f"to export to ONNX {', '.join(missing)} must be installed: pip install 'adaptive-margins[onnx]'"
        )
    output = Path(output).absolute()
    check_output(output, folder=True)
    encoder = open_encoder(str(model)).eval()
    if packs(encoder) is not None:  # its attention has a loop over the texts
        encoder[0].model.set_attn_implementation("sdpa")
    try:
        with working_folder(output), whole_folder(output, same=lambda _: False) as partial:
            save_encoder(encoder, partial)
            (partial / "onnx").mkdir()
            try:
                _export(encoder, partial / "onnx" / "model.onnx")
            except (RuntimeError, TypeError, ValueError) as error:  # torch's are RuntimeErrors
                kind = encoder[0].model.config.model_type
                first = next(filter(None, map(str.strip, str(error).splitlines())), "")
                raise OnnxError(
                    f"encoder {str(model)!r}, of type {kind!r}, cannot be exported by torch: {first}"
                ) from error
            _compare(encoder, partial / "onnx" / "model.onnx", str(model))
            if (card := Path(model) / "README.md").is_file():
                shutil.copy(card, partial / "README.md")
    except WriteError:
        raise
    except OSError as error:
        raise OnnxError(f"{output} could not be written: {error}") from error
    return output / "onnx" / "model.onnx"


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


class _Graph(nn.Module):
    """All modules of an encoder, with tensors for features."""

    def __init__(self, encoder: Any) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Token embeddings (B, L, D) and embeddings (B, D)."""
        out = self.encoder({"input_ids": input_ids, "attention_mask": attention_mask})
        return out["token_embeddings"], out["sentence_embedding"]


def _features(encoder: Any, texts: list[str]) -> dict[str, Tensor]:
    found = encoder.tokenizer(
        texts, padding=True, truncation=True, max_length=encoder.max_seq_length, return_tensors="pt"
    )
    return {name: found[name] for name in _INPUTS}


def _export(encoder: Any, path: Path) -> None:
    free = {0: torch.export.Dim("batch"), 1: torch.export.Dim("tokens")}
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)  # it warns of torchvision, which nothing here needs
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch about itself
            program = torch.onnx.export(
                _Graph(encoder).eval(), kwargs=_features(encoder, _TRACED), dynamo=True, verbose=False,
                input_names=_INPUTS, output_names=_OUTPUTS, dynamic_shapes=dict.fromkeys(_INPUTS, free),
            )  # fmt: skip
    finally:
        log.setLevel(level)
    assert program is not None
    program.save(str(path))


def _compare(encoder: Any, path: Path, name: str) -> None:
    """Raises OnnxError if ONNX Runtime's embeddings are not the encoder's, of texts of other sizes than those traced."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # an error is raised, too
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    for texts in (_CHECKED, _CHECKED[:1]):
        features = _features(encoder, texts)
        try:
            found = session.run(_OUTPUTS[1:], {k: v.numpy() for k, v in features.items()})[0]
        except Exception as error:  # ONNX Runtime's have no base class of their own
            raise OnnxError(
                f"encoder {name!r}: ONNX Runtime cannot run the exported graph: {one_line(error)}"
            ) from error
        with torch.inference_mode():
            expected = encoder(features)["sentence_embedding"].numpy()
        if (far := abs(found - expected).max()) > TOLERANCE:
            raise OnnxError(
                f"encoder {name!r}: ONNX Runtime's embeddings differ from PyTorch's by up to {far:.2g}, at most {TOLERANCE:g} "
                "was expected; nothing was written"
            )
