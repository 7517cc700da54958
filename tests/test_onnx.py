"""Exported encoders against PyTorch, read by ONNX Runtime and by the tokenizer's own library alone."""

from __future__ import annotations

import contextlib
import io
import shutil
import sys

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Pooling, Transformer

from adaptive_margins import onnx
from adaptive_margins.encoder.checks import EncoderError
from adaptive_margins.files import WriteError, alone
from adaptive_margins.onnx import OnnxError, export_onnx

TEXTS = [
    "the",
    "a graph of the matrix",
    "sort the array of edge and node, return the shape of the path " * 3,
    "unknown words",
    "",
]


def encoder_folder(base, folder):
    """A Sentence Transformers folder of a tiny transformer, whose mean goes through a linear layer."""
    torch.manual_seed(3)
    modules = [
        Transformer(str(base)),
        Pooling(16, pooling_mode="mean"),
        Dense(16, 6, activation_function=torch.nn.Tanh()),
    ]
    SentenceTransformer(modules=modules).save_pretrained(str(folder), create_model_card=False)
    return folder


@pytest.fixture(scope="module")
def exported(tiny_folder, tmp_path_factory):
    """A folder, and what was written for it."""
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    home = tmp_path_factory.mktemp("onnx")
    folder = encoder_folder(tiny_folder("bert"), home / "encoder")
    (folder / "README.md").write_text("the card")
    (folder / "training.json").write_text("{}")
    with contextlib.redirect_stdout(io.StringIO()) as said:
        path = export_onnx(folder, home / "exported")
    assert not said.getvalue()  # it is for --json
    return folder, path


def test_embeddings_are_those_of_pytorch(exported):
    import onnxruntime
    from tokenizers import Tokenizer

    folder, path = exported
    assert path.relative_to(path.parents[1]).as_posix() == "onnx/model.onnx"
    session = onnxruntime.InferenceSession(str(path))
    inputs, outputs = (
        {each.name: each.type for each in listed}
        for listed in (session.get_inputs(), session.get_outputs())
    )
    assert inputs == dict.fromkeys(["input_ids", "attention_mask"], "tensor(int64)")
    assert outputs == dict.fromkeys(["last_hidden_state", "sentence_embedding"], "tensor(float)")

    tokenizer = Tokenizer.from_file(str(path.parents[1] / "tokenizer.json"))
    tokenizer.enable_truncation(64)
    tokenizer.enable_padding()
    plain = SentenceTransformer(str(folder))
    for texts in (TEXTS, TEXTS[1:2], TEXTS[:2]):
        read = tokenizer.encode_batch(texts)
        features = {
            "input_ids": np.array([e.ids for e in read]),
            "attention_mask": np.array([e.attention_mask for e in read]),
        }
        found = session.run(["sentence_embedding"], features)[0]
        expected = plain.encode(texts)
        assert found.shape == (len(texts), 6)
        assert len(texts) == 1 or np.ptp(expected, axis=0).max() > 0.1
        np.testing.assert_allclose(found, expected, atol=1e-4)


def test_the_folder_is_an_encoder_with_its_card(exported):
    folder, path = exported
    output = path.parents[1]
    assert (output / "README.md").read_text() == "the card"
    assert not (output / "training.json").exists()
    again = SentenceTransformer(str(output))
    np.testing.assert_allclose(
        again.encode(TEXTS), SentenceTransformer(str(folder)).encode(TEXTS), atol=1e-6
    )


def test_an_export_that_computes_something_else_is_refused(exported, tmp_path, monkeypatch):
    folder, path = exported
    other = SentenceTransformer(str(folder))
    with torch.no_grad():
        other[2].linear.bias += 1e-3
    other.save_pretrained(str(tmp_path / "other"), create_model_card=False)
    monkeypatch.setattr(onnx, "_export", lambda _, to: shutil.copy(path, to))
    with pytest.raises(OnnxError, match=r"differ from PyTorch's by up to .*, at most 0.0001"):
        export_onnx(tmp_path / "other", tmp_path / "exported")
    assert [p.name for p in tmp_path.iterdir()] == ["other"]


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_package_is_named(tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(
        OnnxError, match=rf"\b{package}\b.* must be .*: pip install 'adaptive-margins\["
    ):
        export_onnx("minilm", tmp_path / "none")
    assert not list(tmp_path.iterdir())


def test_a_place_that_is_taken_is_left_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(onnx, "_installed", lambda name: True)
    (tmp_path / "file").write_text("mine")
    for taken in (tmp_path, tmp_path / "file"):
        with pytest.raises(WriteError, match="exists and is not an empty folder"):
            export_onnx("minilm", taken)
    with alone(tmp_path / "new"), pytest.raises(WriteError, match="another process is writing"):
        export_onnx("minilm", tmp_path / "new")
    with pytest.raises(EncoderError, match="nowhere"):
        export_onnx(tmp_path / "nowhere", tmp_path / "new")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_texts_longer_than_the_limit_are_compared_as_far_as_it_reads(tiny_folder, tmp_path):
    encoder = SentenceTransformer(str(encoder_folder(tiny_folder("bert"), tmp_path / "short")))
    encoder.max_seq_length = 8
    assert onnx._features(encoder, onnx._CHECKED)["input_ids"].shape == (len(onnx._CHECKED), 8)
