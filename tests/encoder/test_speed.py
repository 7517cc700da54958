"""Packed texts and fast dropout, each against the plain way."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModel

from adaptive_margins.encoder import speed
from adaptive_margins.encoder.load import open_encoder, save_encoder
from adaptive_margins.encoder.speed import batcher, packs
from adaptive_margins.encoder.tokens import tokenize
from adaptive_margins.profiles.encoders import EncoderSettings
from conftest import TEXTS, WORDS, write_tokenizer


@pytest.mark.parametrize(
    ("kind", "pooling"),
    [("bert", "mean"), ("bert", "cls"), ("distilbert", "mean"), ("roberta", "cls+linear"), ("mpnet", "cls")],
)  # fmt: skip
def test_packed_texts_have_the_embeddings_of_padded_ones(tiny_folder, tmp_path, kind, pooling):
    settings = EncoderSettings(base=str(tiny_folder(kind)), pooling=pooling)
    model = open_encoder(settings, dropout=0.0).double()
    tokens = tokenize(model, TEXTS, 12)
    save_encoder(model, tmp_path / "model")
    assert "packed" not in (tmp_path / "model" / "config.json").read_text()
    assert packs(model) == (kind != "mpnet")
    layout = batcher(model)
    padded = model(tokens.batch(range(len(tokens))))["sentence_embedding"]
    for rows in (
        range(len(tokens)),
        np.argsort(tokens.lengths),
        [2],
    ):  # equal lengths need not be neighbours
        features = layout(tokens, rows)
        if packs(model):
            assert features["input_ids"].shape == (1, tokens.lengths[list(rows)].sum())
        found = model(features)["sentence_embedding"]
        np.testing.assert_allclose(found.detach(), padded[list(rows)].detach(), rtol=0, atol=1e-12)


def test_dropout_of_packed_texts_keeps_the_mean(bert):
    """Attention weights are dropped, and scaled, as in the padded forward: averages over many draws agree."""
    model = copy.deepcopy(bert)
    for layer in model[0].model.encoder.layer:
        layer.attention.self.dropout.p = 0.5
    tokens = tokenize(model, TEXTS[:1], 12)
    copies = [0] * 4000
    model.train()
    with torch.no_grad():
        states = [
            model(features)["sentence_embedding"]
            for features in (tokens.batch(copies), batcher(model)(tokens, copies))
        ]
    plain = model.eval()(tokens.batch([0]))["sentence_embedding"][0]
    for found in states:
        assert (found - plain).abs().max() > 0.1
    scale = states[0].std(0)
    assert ((states[0].mean(0) - states[1].mean(0)).abs() < 0.1 * scale).all()
    assert ((states[1].std(0) / scale - 1).abs() < 0.1).all()


@pytest.mark.parametrize("scaling", [None, 0.2])
def test_attention_of_packed_texts_with_dropout_is_that_of_a_loop(scaling):
    heads, width, lengths = 2, 4, [3, 3, 4, 1]
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 1, heads, offsets[-1], width, dtype=torch.float64)
    torch.manual_seed(1)
    found, _ = speed._packed_attention(
        torch.nn.Module(), query, key, value, None, dropout=0.3, scaling=scaling, cu_seq_lens_q=torch.tensor(offsets),
    )  # fmt: skip
    torch.manual_seed(1)
    masks = [  # drawn for neighbours of equal length together
        mask
        for count, length in ((2, 3), (1, 4), (1, 1))
        for mask in speed._drop(torch.ones(count, heads, length, length, dtype=torch.float64), 0.3)
    ]
    assert any((mask == 0).any() for mask in masks)
    for text, mask in enumerate(masks):
        rows = range(offsets[text], offsets[text + 1])
        for h in range(heads):
            for i, row in enumerate(rows):
                scores = [
                    (query[0, h, row] @ key[0, h, other]).item() * (scaling or width**-0.5)
                    for other in rows
                ]
                whole = sum(math.exp(score) for score in scores)
                expected = sum(
                    math.exp(score) / whole * mask[h, i, j] * value[0, h, other]
                    for j, (score, other) in enumerate(zip(scores, rows, strict=True))
                )
                torch.testing.assert_close(found[0, row, h], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["bert", "mpnet"])
def test_activations_are_as_large_as_expected(tmp_path, kind):
    config = AutoConfig.for_model(
        kind, vocab_size=40, hidden_size=48, num_hidden_layers=3, num_attention_heads=4, intermediate_size=192
    )  # fmt: skip
    AutoModel.from_config(config).save_pretrained(tmp_path)
    write_tokenizer(tmp_path, kind)
    model = open_encoder(EncoderSettings(base=str(tmp_path))).train()
    length = 60
    tokens = tokenize(model, [" ".join(WORDS[5:] * 9)] * 30, length)
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(batcher(model)(tokens, range(30)))["sentence_embedding"].sum()
        found = sum(size for place, size in kept.items() if place not in weights)
    allowed = speed.tokens_within(model, found / 1e9, length)
    assert 0.75 < allowed / (30 * length) < 1.5


@pytest.mark.parametrize(
    ("p", "dtype"), [(0.1, torch.float32), (0.25, torch.float64), (0.5, torch.bfloat16)]
)
def test_dropout_drops_as_many_and_scales_the_rest(tiny_folder, p, dtype):
    model = open_encoder(EncoderSettings(base=str(tiny_folder("bert"))), dropout=p)
    layer = model[0].model.embeddings.dropout
    x = torch.ones(301, 999, dtype=dtype, requires_grad=True)
    torch.manual_seed(1)
    found = layer.train()(x)
    found.sum().backward()
    assert torch.equal(x.grad, found.detach())
    kept = found != 0
    np.testing.assert_allclose(
        found[kept].detach().float(), 1 / (1 - p), rtol=1e-4 if dtype != torch.bfloat16 else 4e-3
    )
    # Within five standard deviations: of all, of each of the four elements of a random number, and of neighbours.
    for part in (kept, *(kept.flatten()[i::4] for i in range(4))):
        assert abs((~part).double().mean() - p) < 5 * (p * (1 - p) / part.numel()) ** 0.5
    for apart in (1, 2, 3, 4, 8):
        a, b = (~kept).flatten()[:-apart].double(), (~kept).flatten()[apart:].double()
        assert abs(((a - p) * (b - p)).mean()) < 5 * p * (1 - p) / len(a) ** 0.5
    torch.manual_seed(1)
    assert torch.equal(layer(x), found)  # torch's seed decides
    assert not torch.equal(layer(x), found)
    assert layer.eval()(x) is x


@pytest.mark.parametrize(("p", "kept"), [(0.0, 1), (1e-6, 1), (1.0, 0)])
def test_dropout_of_nothing_and_of_all(tiny_folder, p, kept):
    model = open_encoder(EncoderSettings(base=str(tiny_folder("bert"))), dropout=p)
    layer = model[0].model.embeddings.dropout
    torch.manual_seed(1)
    torch.testing.assert_close(layer.train()(torch.ones(7)), torch.full((7,), float(kept)))
