"""The cache of embeddings: what is found again, what is not, damage, kills, two at once, and its limit."""

from __future__ import annotations

import copy
import os
import re
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from adaptive_margins.data.collection import Texts
from adaptive_margins.encoder import embed as encoder_embed
from adaptive_margins.encoder.load import open_encoder, save_encoder
from adaptive_margins.errors import AdaptiveMarginsError
from adaptive_margins.files import HOME_VARIABLE, locked
from adaptive_margins.retrieval.dense import DenseRetriever
from adaptive_margins.retrieval.dense_index import DenseIndex
from adaptive_margins.retrieval.embedding_cache import LIMIT_VARIABLE, cache_folder
from conftest import RANDOM_TEXTS, flip, in_child, kill_in

PASSAGES = Texts([f"d{i}" for i in range(40)], [*RANDOM_TEXTS[:39], " "])
WITH_TEXT = sum(bool(text.strip()) for text in PASSAGES.texts)


@pytest.fixture(scope="module")
def model(tiny_folder):
    return open_encoder(str(tiny_folder("bert")))


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv(HOME_VARIABLE, str(tmp_path / "home"))
    monkeypatch.setenv(LIMIT_VARIABLE, "1")
    return tmp_path / "home"


@pytest.fixture
def embedded(monkeypatch):
    """How many texts each call of `embed` embedded."""
    calls, real = [], encoder_embed.embed

    def spy(*args, rows, **options):
        calls.append(len(rows))
        return real(*args, rows=rows, **options)

    monkeypatch.setattr(encoder_embed, "embed", spy)
    return calls


def retriever(model, passages=PASSAGES, **options):
    return DenseRetriever(model, passages, cache=cache_folder(), **options)


def entries(home):
    return sorted((home / "cache" / "embeddings").glob("[!.]*"))


def test_each_encoder_embeds_each_list_of_texts_once(model, home, embedded, tmp_path):
    expected = DenseRetriever(model, PASSAGES, passage_length=8)
    first = retriever(model, passage_length=8)
    np.testing.assert_allclose(first.embeddings, expected.embeddings, atol=1e-6)
    assert embedded == [WITH_TEXT]
    save_encoder(model, tmp_path / "elsewhere")  # as `train` saves what it has in memory
    same = open_encoder(str(tmp_path / "elsewhere"))
    again = retriever(same, Texts(PASSAGES.ids[::-1], PASSAGES.texts), passage_length=8)
    assert np.array_equal(again.embeddings, first.embeddings)
    assert embedded == [WITH_TEXT]
    count, total = again.truncated["passages"]
    assert again.truncated == first.truncated == expected.truncated
    assert 0 < count < total == WITH_TEXT
    index = DenseIndex.build(retriever(same, passage_length=8), "P", str(tmp_path / "elsewhere"), tmp_path / "i")  # fmt: skip
    assert np.array_equal(index.embeddings, first.embeddings)
    assert embedded == [WITH_TEXT]
    assert len(entries(home)) == 1


def test_whatever_changes_an_embedding_is_another_entry(model, home, embedded):
    def changed(**values):
        other = copy.deepcopy(model)
        for name, value in values.items():
            setattr(other, name, value)
        return other

    weights = copy.deepcopy(model)
    weights[0].model.encoder.layer[2].output.dense.bias.data[0] += 1e-3
    pooling = copy.deepcopy(model)
    pooling[1].pooling_mode = "cls"
    heads = copy.deepcopy(model)
    heads[0].model.config.num_attention_heads = 4
    changes = [
        {}, {"model": weights}, {"model": pooling}, {"model": heads}, {"passage_length": 7}, {"precision": "bf16"},
        {"model": changed(prompts={"query": "", "document": "node "})},
        {"passages": Texts(PASSAGES.ids, [*PASSAGES.texts[:-1], "node"])},
        {"passages": Texts(PASSAGES.ids, [*PASSAGES.texts[1:-1], PASSAGES.texts[0], ""])},
    ]  # fmt: skip
    for change in changes:
        found = retriever(**{"model": model, **change})
        assert found.embeddings.shape == (len(found.rows), 16)
    assert len(embedded) == len(entries(home)) == len(changes)
    assert retriever(changed(prompts={"query": "ask "})).embeddings is not None  # of passages alone
    assert len(entries(home)) == len(changes)


@pytest.mark.filterwarnings("ignore:.*damaged shards")
@pytest.mark.parametrize("file", ["passages/embeddings.npy", "passages/shards.json", "passages.tokens/ids.bin"])  # fmt: skip
def test_what_is_damaged_is_computed_again(model, home, embedded, file):
    expected = np.array(retriever(model).embeddings)
    (entry,) = entries(home)
    if file.endswith(".json"):
        (entry / file).write_text('{"rows":')
    else:
        flip(entry / file)
    assert np.array_equal(retriever(model).embeddings, expected)
    assert embedded == [WITH_TEXT] * (1 if "tokens" in file else 2)
    assert np.array_equal(retriever(model).embeddings, expected)
    assert embedded == [WITH_TEXT] * (1 if "tokens" in file else 2)


@pytest.mark.parametrize("moment", [("embed", 1), ("write_text", 1)])
def test_a_killed_process_leaves_nothing_that_counts(model, home, embedded, moment):
    def killed():
        kill_in(encoder_embed, *moment)
        print(retriever(model).embeddings.shape)

    assert in_child(killed) == "died"
    assert np.array_equal(retriever(model).embeddings, retriever(model).embeddings)
    assert embedded == [WITH_TEXT]


def test_two_at_once_embed_once(model, embedded):
    barrier = threading.Barrier(2)

    def both(_):
        barrier.wait()
        return retriever(model).embeddings

    with ThreadPoolExecutor(2) as pool:
        one, other = pool.map(both, range(2))
    assert np.array_equal(one, other)
    assert embedded == [WITH_TEXT]


def test_what_was_used_longest_ago_goes_first(model, home, embedded, monkeypatch):
    lengths = [5, 6, 7]
    for age, length in enumerate(lengths):
        assert len(retriever(model, passage_length=length).embeddings)
        for entry in set(entries(home)):
            os.utime(entry, (entry.stat().st_atime, entry.stat().st_mtime - 10 + age))
    assert len(retriever(model, passage_length=5).embeddings)  # the first is the newest now
    kept = {entry.name for entry in entries(home)}
    size = sum(f.stat().st_size for f in entries(home)[0].rglob("*") if f.is_file())
    monkeypatch.setenv(LIMIT_VARIABLE, f"{3.5 * size / 1e9:.9f}")
    assert len(retriever(model, passage_length=8).embeddings)
    found = {entry.name for entry in entries(home)}
    assert (len(found), len(kept & found)) == (3, 2)
    assert len(embedded) == 4
    for length, more in ((5, 0), (7, 0), (6, 1)):
        assert len(retriever(model, passage_length=length).embeddings)
        assert len(embedded) == 4 + more

    monkeypatch.setenv(LIMIT_VARIABLE, f"{2.5 * size / 1e9:.9f}")
    oldest = min(entries(home), key=lambda entry: entry.stat().st_mtime)
    with locked(oldest.with_suffix(".use")):  # another process reads it
        assert len(retriever(model, passage_length=9).embeddings)
    assert oldest.exists()
    monkeypatch.setenv(LIMIT_VARIABLE, "0.0000001")  # fewer than one needs
    before = entries(home)
    assert len(retriever(model, passage_length=4).embeddings)
    assert entries(home) == before


def test_where_nothing_is_kept(model, home, monkeypatch):
    assert cache_folder(use=False) is None
    monkeypatch.setenv(LIMIT_VARIABLE, "0")
    assert cache_folder() is None
    assert not home.exists()
    for wrong in ("five", "-1", "nan", "1e3"):
        monkeypatch.setenv(LIMIT_VARIABLE, wrong)
        with pytest.raises(AdaptiveMarginsError, match=re.escape(f"${LIMIT_VARIABLE} is '{wrong}'; expected gigabytes")):  # fmt: skip
            cache_folder()
    monkeypatch.setenv(LIMIT_VARIABLE, "1")
    monkeypatch.setenv(HOME_VARIABLE, "/proc")  # where no folder can be made
    assert cache_folder() is None
