"""Frozen layers computed once, against the plain forward; the cache, complete or not there."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer

from adaptive_margins.encoder import frozen
from adaptive_margins.encoder.checks import EncoderError
from adaptive_margins.encoder.embed import embed
from adaptive_margins.encoder.frozen import cached_states, hidden_states, put_back, upper_layers
from adaptive_margins.encoder.load import open_encoder, save_encoder
from adaptive_margins.encoder.tokens import Tokens, tokenize
from adaptive_margins.profiles.encoders import EncoderSettings
from conftest import TEXTS, flip, in_child, plain_embeddings


def states_of(model, tokens, layers):
    out = {k: np.zeros((tokens.offsets[-1], 16), np.float32) for k in layers}
    hidden_states(model, tokens, layers, out, batch_tokens=40)
    return out


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
    whole = open_encoder(settings, dropout=0.0)
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


def test_cached_layers_equal_the_plain_forward_for_every_third_text(smoke):
    loaded = smoke.inputs.encoder("minilm-4")
    profile = smoke.profile
    for cached, texts, length in (
        (loaded.queries, smoke.inputs.queries.texts, profile.lengths.query),
        (loaded.passages, smoke.inputs.collection.passages.texts, profile.lengths.passage),
    ):
        assert len(cached) == len(texts)
        rows = range(0, len(texts), 3)
        whole = embed(loaded.whole, tokenize(loaded.whole, [texts[i] for i in rows], length))
        np.testing.assert_allclose(embed(loaded.model, cached, rows), whole, atol=1e-5)
        plain = plain_embeddings(loaded.whole, [texts[i] for i in rows[:3]], length)
        np.testing.assert_allclose(whole[:3], plain, atol=1e-5)


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
    assert sorted(p.name for p in folder.iterdir()) == ["SHA256SUMS", "layer1.npy", "layer2.npy"]
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
    (folder / "SHA256SUMS").unlink()  # as a cache of an older version
    os.truncate(path, path.stat().st_size - 1 if size < 0 else size)
    with pytest.raises(EncoderError, match=r"layer1\.npy .*delete it to compute it again"):
        cached_states(refuse, tokens, [1, 2], folder)


@pytest.mark.parametrize("byte", [-1, 200])
def test_a_damaged_cache_is_computed_again(bert, cache, capsys, byte):
    tokens, folder = cache
    expected = {
        k: np.array(table) for k, table in cached_states(refuse, tokens, [1], folder).items()
    }
    cached_states(lambda: bert, tokens, [1, 0], folder)  # the older files are not hashed again
    flip(folder / "layer1.npy", byte)
    found = cached_states(lambda: bert, tokens, [1], folder)
    assert np.array_equal(found[1], expected[1])
    assert f"{folder / 'layer1.npy'} was changed" in capsys.readouterr().err
    cached_states(refuse, tokens, [1], folder)


def test_a_cache_of_other_texts_or_another_type_is_refused(cache):
    tokens, folder = cache
    shorter = Tokens(tokens.ids[:-1], np.append(tokens.offsets[:-1], tokens.offsets[-1] - 1), 0)
    with pytest.raises(
        EncoderError,
        match=rf"layer1\.npy holds float32 of shape \({tokens.offsets[-1]}, 16\), expected",
    ):
        cached_states(refuse, shorter, [1], folder)
    (folder / "SHA256SUMS").unlink()
    np.save(folder / "layer2.npy", np.zeros((tokens.offsets[-1], 16)))
    with pytest.raises(EncoderError, match=r"layer2\.npy .*float64.*delete it"):
        cached_states(refuse, tokens, [2], folder)


def test_an_error_in_the_middle_leaves_no_cache(bert, tmp_path, monkeypatch):
    tokens = tokenize(bert, TEXTS, 12)

    def fail(*_, **__):
        raise MemoryError("in the middle")

    monkeypatch.setattr(frozen, "hidden_states", fail)
    with pytest.raises(MemoryError):
        cached_states(lambda: bert, tokens, [1], tmp_path / "states")
    assert not list((tmp_path / "states").iterdir())


def test_a_full_disk_is_an_error_that_says_so(bert, tmp_path):
    tokens = tokenize(bert, TEXTS * 20, 12)

    import resource

    def fill():
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        cached_states(lambda: bert, tokens, [1], tmp_path / "states")

    told = in_child(fill)
    assert told.startswith(f"EncoderError: {tmp_path / 'states'}: ")
    assert "File too large" in told
    assert not list((tmp_path / "states").iterdir())
