"""The example that exports an encoder to ONNX: its graph gives PyTorch's embeddings."""

from __future__ import annotations

import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Pooling, Transformer

from adaptive_margins.files import WriteError
from page_snippets import run_section

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "export_onnx.py"
TEXTS = ["the", "a graph of the matrix", "sort the array of edge and node " * 20, ""]


@pytest.fixture
def example():
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    return runpy.run_path(str(EXAMPLE))


def test_embeddings_are_those_of_pytorch(example, tiny_folder, tmp_path, monkeypatch):
    import onnxruntime

    torch.manual_seed(3)
    linear = Dense(16, 6, activation_function=torch.nn.Tanh())
    modules = [Transformer(str(tiny_folder("bert"))), Pooling(16, pooling_mode="mean"), linear]
    plain = SentenceTransformer(modules=modules, device="cpu")
    plain.save_pretrained(str(tmp_path / "encoder"), create_model_card=False)
    path = example["main"](str(tmp_path / "encoder"), str(tmp_path / "my_encoder_onnx"))
    session = onnxruntime.InferenceSession(str(path))
    for texts in (TEXTS, TEXTS[:1]):
        inputs = {name: v.numpy() for name, v in example["features"](plain, texts).items()}
        (found,) = session.run(["sentence_embedding"], inputs)
        np.testing.assert_allclose(found, plain.encode(texts), atol=1e-4)
    monkeypatch.chdir(tmp_path)  # as the page "Other libraries" serves it
    found = run_section("ONNX Runtime")["embeddings"]
    again = SentenceTransformer(str(tmp_path / "my_encoder_onnx"), device="cpu")
    texts = ["how do I sort an array?", "numpy.sort returns a sorted copy."]
    np.testing.assert_allclose(found, again.encode(texts), atol=1e-4)
    np.testing.assert_allclose(again.encode(TEXTS), plain.encode(TEXTS), atol=1e-6)
    with torch.no_grad():
        plain[2].linear.bias += 1e-3
    assert example["difference"](plain, path) > 1e-4


def test_a_folder_that_is_taken_is_refused(example, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(WriteError, match="not an empty folder"):
        example["main"]("minilm", str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
