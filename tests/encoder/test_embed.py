"""Token files and shards of embeddings: the same numbers as in memory, whole or not at all, resumed after a kill."""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import shutil
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from adaptive_margins.encoder import embed as encoder_embed
from adaptive_margins.encoder import tokens as encoder_tokens
from adaptive_margins.encoder.checks import EncoderError
from adaptive_margins.encoder.embed import Shards, embed, embed_shards
from adaptive_margins.encoder.load import load_encoder
from adaptive_margins.encoder.tokens import _token_ids, stored_tokens, tokenize
from adaptive_margins.profiles.config import EncoderSettings
from conftest import WORDS, in_child

LENGTH = 9


def some_texts(n: int) -> list[str]:
    rng = np.random.default_rng(5)
    return [" ".join(rng.choice(WORDS[5:], size=rng.integers(0, 12))) for _ in range(n)]


TEXTS = some_texts(230)


@pytest.fixture(scope="module")
def bert(tiny_folder):
    return load_encoder(EncoderSettings(base=str(tiny_folder("bert"))), dropout=0.0)


@pytest.fixture(scope="module")
def tokens(bert):
    return tokenize(bert, TEXTS, LENGTH)


def refuse():
    raise AssertionError("the tokenizer was loaded")


def killed(work) -> None:
    """Run ``work`` in a forked process, which it must not survive."""
    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join(30)
    assert process.exitcode == -signal.SIGKILL


def kill_at(call: int, function):
    """``function``, but its ``call``-th call (from 1) is the end of the process, as kill -9 is."""
    calls = 0

    def counted(*arguments, **keywords):
        nonlocal calls
        calls += 1
        if calls == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **keywords)

    return counted


# ---- tokens ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 7, 230, 100_000])
def test_stored_tokens_are_those_of_tokenize(bert, tokens, tmp_path, chunk):
    stored = stored_tokens(lambda: bert.tokenizer, TEXTS, LENGTH, tmp_path / "tokens", chunk=chunk)
    assert len(stored) == len(TEXTS) and stored.pad == tokens.pad
    assert np.array_equal(stored.ids, tokens.ids)
    assert np.array_equal(stored.offsets, tokens.offsets)
    assert stored.ids.dtype == np.uint8  # 17 words
    rows = [3, 0, 229, 3]
    for key, value in tokens.batch(rows).items():
        assert stored.batch(rows)[key].equal(value)
    assert np.array_equal(embed(bert, stored, rows), embed(bert, tokens, rows))
    assert [p.name for p in tmp_path.iterdir()] == ["tokens"]
    again = stored_tokens(refuse, TEXTS, LENGTH, tmp_path / "tokens")
    assert np.array_equal(again.ids, tokens.ids)


def test_ids_take_the_smallest_type_that_holds_the_vocabulary(bert, tmp_path):
    class Large:
        """The tokenizer, its last ids moved to the end of a larger vocabulary."""

        pad_token_id = 0

        def __init__(self, size):
            self.size = size

        def __len__(self):
            return self.size

        def __call__(self, texts, **keywords):
            found = bert.tokenizer(texts, **keywords)["input_ids"]
            return {"input_ids": [[self.size - 1 - t for t in ids] for ids in found]}

    for size, dtype in ((256, np.uint8), (257, np.uint16), (30_522, np.uint16), (65_537, np.uint32)):  # fmt: skip
        stored = stored_tokens(lambda size=size: Large(size), TEXTS[:9], LENGTH, tmp_path / str(size))  # fmt: skip
        assert stored.ids.dtype == dtype
        plain = tokenize(bert, TEXTS[:9], LENGTH)
        assert np.array_equal(size - 1 - stored.ids.astype(np.int64), plain.ids)
        assert stored.batch([1])["input_ids"][0].tolist() == [
            size - 1 - t for t in plain.batch([1])["input_ids"][0].tolist()
        ]


def test_no_text_at_all(bert, tmp_path):
    stored = stored_tokens(lambda: bert.tokenizer, [], LENGTH, tmp_path / "tokens")
    assert len(stored) == 0
    assert len(embed_shards(bert, stored, tmp_path / "shards")) == 0


@pytest.mark.parametrize("call", [1, 2, 5])
def test_tokenising_goes_on_after_a_kill(bert, tokens, tmp_path, monkeypatch, call):
    folder = tmp_path / "tokens"
    real = _token_ids

    def work():
        encoder_tokens._token_ids = kill_at(call, real)
        stored_tokens(lambda: bert.tokenizer, TEXTS, LENGTH, folder, chunk=50)

    killed(work)
    assert not folder.exists()
    partial = tmp_path / "tokens.partial"
    assert (partial / "offsets.bin").stat().st_size == 8 * (1 + 50 * (call - 1))
    with (partial / "ids.bin").open("ab") as file:  # half a chunk
        file.write(b"\7" * 11)
    with (partial / "offsets.bin").open("ab") as file:  # half a number
        file.write(b"\7" * 3)
    seen = []

    def counting(tokenizer, texts, length):
        seen.append(len(texts))
        return real(tokenizer, texts, length)

    monkeypatch.setattr(encoder_tokens, "_token_ids", counting)
    stored = stored_tokens(lambda: bert.tokenizer, TEXTS, LENGTH, folder, chunk=50)
    assert sum(seen) == 230 - 50 * (call - 1)
    assert np.array_equal(stored.ids, tokens.ids)
    assert np.array_equal(stored.offsets, tokens.offsets)


def test_an_interrupted_folder_of_other_texts_is_refused(bert, tmp_path):
    folder = tmp_path / "tokens"

    def work():
        encoder_tokens._token_ids = kill_at(2, encoder_tokens._token_ids)
        stored_tokens(lambda: bert.tokenizer, TEXTS, LENGTH, folder, chunk=50)

    killed(work)
    with pytest.raises(EncoderError, match=r"tokens\.partial/tokens\.json says max_length 9, expected 8; delete"):  # fmt: skip
        stored_tokens(lambda: bert.tokenizer, TEXTS, 8, folder)


def test_token_files_that_are_not_the_expected_ones(bert, tmp_path):
    folder = tmp_path / "tokens"
    stored_tokens(lambda: bert.tokenizer, TEXTS, LENGTH, folder)
    with pytest.raises(EncoderError, match=r"tokens\.json says texts 230, expected 229; delete"):
        stored_tokens(refuse, TEXTS[1:], LENGTH, folder)
    for name, change, message in (
        ("ids.bin", lambda p: os.truncate(p, 100), r"ids\.bin has 100 bytes, expected \d+; delete"),
        ("offsets.bin", lambda p: os.truncate(p, 0), r"offsets\.bin has 0 bytes, expected 1848"),
        ("ids.bin", Path.unlink, r"ids\.bin is missing; delete"),
        ("tokens.json", lambda p: p.write_text("{"), r"tokens\.json cannot be read .*delete"),
        ("tokens.json", lambda p: p.write_text("[]"), r"tokens\.json cannot be read \(not an obj"),
    ):
        copy = tmp_path / "copy"
        shutil.copytree(folder, copy)
        change(copy / name)
        with pytest.raises(EncoderError, match=message):
            stored_tokens(refuse, TEXTS, LENGTH, copy)
        shutil.rmtree(copy)


def test_a_disk_that_fills_while_tokenising(bert, tokens, tmp_path):
    folder = tmp_path / "tokens"

    def fill():
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        stored_tokens(lambda: bert.tokenizer, TEXTS, LENGTH, folder, chunk=50)

    told = in_child(fill)
    assert told.startswith(f"EncoderError: {folder}.partial could not be written")
    assert "run it again: what is whole there is kept" in told
    assert not folder.exists()
    stored = stored_tokens(lambda: bert.tokenizer, TEXTS, LENGTH, folder, chunk=50)
    assert np.array_equal(stored.ids, tokens.ids)


def test_two_processes_do_not_write_the_same_folder(bert, tokens, tmp_path):
    folder, real = tmp_path / "tokens", _token_ids

    def work(name):
        def slow(*arguments):
            with (tmp_path / name).open("a") as file:
                file.write("x")
            time.sleep(0.05)
            return real(*arguments)

        encoder_tokens._token_ids = slow
        stored_tokens(lambda: bert.tokenizer, TEXTS, LENGTH, folder, chunk=50)

    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=work, args=(name,)) for name in "ab"]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
        assert process.exitcode == 0
    written = [(tmp_path / n).read_text() for n in "ab" if (tmp_path / n).exists()]
    assert sum(map(len, written)) == 5  # each chunk once, by whichever process
    assert np.array_equal(stored_tokens(refuse, TEXTS, LENGTH, folder).ids, tokens.ids)
    assert not (tmp_path / "tokens.partial").exists()


# ---- shards ----------------------------------------------------------------------------------------------------------


def all_rows(shards: Shards) -> np.ndarray:
    blocks = list(shards.blocks())
    assert [first for first, _ in blocks] == np.cumsum([0, *(len(b) for _, b in blocks)]).tolist()[:-1]  # fmt: skip
    return np.concatenate([block for _, block in blocks])


@pytest.fixture
def in_memory(bert, tokens):
    """What shards of 50 are: each embedded on its own."""
    parts = [embed(bert, tokens, range(s, min(s + 50, 230))) for s in range(0, 230, 50)]
    return np.concatenate(parts)


@pytest.mark.parametrize("devices", [("cpu",), ("cpu", "cpu"), ("cpu",) * 9])
def test_shards_are_the_embeddings_whatever_the_number_of_devices(
    bert, tokens, in_memory, tmp_path, devices
):
    shards = embed_shards(bert, tokens, tmp_path / "e", shard=50, devices=devices)
    assert sorted(p.name for p in (tmp_path / "e").iterdir()) == [
        *(f"{k:05d}.npy" for k in range(5)),
        "shards.json",
    ]
    assert json.loads((tmp_path / "e" / "shards.json").read_text()) == {
        "rows": 230, "dim": 16, "dtype": "float32", "shard": 50,
    }  # fmt: skip
    assert (len(shards), shards.dim) == (230, 16)
    assert np.array_equal(all_rows(shards), in_memory)  # bit for bit
    np.testing.assert_allclose(in_memory, embed(bert, tokens), atol=1e-6)


@pytest.mark.parametrize("on_disk", [True, False])
def test_take_and_blocks(bert, tokens, in_memory, tmp_path, monkeypatch, on_disk):
    shards = Shards.of(in_memory)
    if on_disk:
        embed_shards(bert, tokens, tmp_path / "e", shard=50)
        shards = Shards.open(tmp_path / "e")
    rows = np.random.default_rng(0).integers(0, 230, size=400)
    found = shards.take(rows)
    assert np.array_equal(found, in_memory[rows]) and found.dtype == np.float32
    assert shards.take([]).shape == (0, 16)
    for wrong in ([0, -1], [230]):
        with pytest.raises(IndexError, match=r"rows .* of 230 embeddings"):
            shards.take(wrong)
    for size in (1, 16 * 7, 16 * 1000):
        monkeypatch.setattr(encoder_embed, "_BLOCK", size)
        assert max(len(block) for _, block in shards.blocks()) <= max(1, size // 16)
        assert np.array_equal(all_rows(shards), in_memory)
    with pytest.raises(ValueError, match=r"shape \(n, D\), not \(5,\)"):
        Shards.of(np.zeros(5))


def test_float16_shards_are_the_rounded_embeddings(bert, tokens, in_memory, tmp_path):
    shards = embed_shards(bert, tokens, tmp_path / "e", shard=50, dtype="float16")
    assert (tmp_path / "e" / "00000.npy").stat().st_size == 128 + 50 * 16 * 2
    rounded = in_memory.astype(np.float16).astype(np.float32)
    assert np.array_equal(all_rows(shards), rounded)
    assert np.array_equal(shards.take([7, 229]), rounded[[7, 229]])
    assert shards.take([0]).dtype == np.float32
    assert 0 < np.abs((rounded**2).sum(1) - 1).max() < 2.0**-10


def test_embedding_goes_on_after_a_kill(bert, tokens, in_memory, tmp_path, monkeypatch):
    folder, real = tmp_path / "e", embed

    def work():
        write = np.lib.format.write_array_header_1_0

        def half(file, header):
            write(file, header)
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)

        def third(*arguments, **keywords):
            if (folder / "00001.npy").exists():
                np.lib.format.write_array_header_1_0 = half
            return real(*arguments, **keywords)

        encoder_embed.embed = third
        embed_shards(bert, tokens, folder, shard=50)

    killed(work)
    assert sorted(p.name for p in folder.iterdir()) == [
        "00000.npy", "00001.npy", "00002.npy.partial", "shards.json",
    ]  # fmt: skip
    with pytest.raises(EncoderError, match=r"00002\.npy is missing: not all texts are embedded"):
        Shards.open(folder)
    seen = []

    def counting(model, tokens, rows, **keywords):
        seen.extend(rows.tolist())
        return real(model, tokens, rows, **keywords)

    monkeypatch.setattr(encoder_embed, "embed", counting)
    shards = embed_shards(bert, tokens, folder, shard=50)
    assert seen == list(range(100, 230))
    assert np.array_equal(all_rows(shards), in_memory)
    assert not list(folder.glob("*.partial"))
    seen.clear()
    embed_shards(bert, tokens, folder, shard=50)
    assert seen == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shard": 60}, "says shard 50, expected 60; delete"),
        ({"dtype": "float16"}, "says dtype 'float32', expected 'float16'; delete"),
        ({"dtype": "int8"}, "float32 or float16"),
        ({"shard": 0}, "at least 1 row"),
        ({"devices": ()}, "at least 1 device"),
    ],
)
def test_other_settings_are_refused(bert, tokens, tmp_path, change, message):
    embed_shards(bert, tokens, tmp_path / "e", shard=50)
    with pytest.raises(EncoderError, match=message):
        embed_shards(bert, tokens, tmp_path / "e", **{"shard": 50, **change})


def test_damaged_shards_are_named(bert, tokens, tmp_path):
    folder = tmp_path / "e"
    embed_shards(bert, tokens, folder, shard=50)
    os.truncate(folder / "00003.npy", 200)
    with pytest.raises(EncoderError, match=r"00003\.npy cannot be read .*delete it"):
        Shards.open(folder)
    np.save(folder / "00003.npy", np.zeros((50, 17), np.float32))
    with pytest.raises(EncoderError, match=r"00003\.npy holds float32 of shape \(50, 17\), expected .* \(50, 16\)"):  # fmt: skip
        Shards.open(folder)
    (folder / "shards.json").write_text('{"rows": 1}')
    with pytest.raises(EncoderError, match=r"shards\.json describes no shards; delete"):
        Shards.open(folder)
    with pytest.raises(EncoderError, match=r"shards\.json cannot be read"):
        Shards.open(tmp_path / "nothing")


def test_a_disk_that_is_too_small_is_noticed_before_anything_is_embedded(
    bert, tokens, tmp_path, monkeypatch
):
    usage = type("Usage", (), {"free": 230 * 16 * 4 - 1})
    monkeypatch.setattr(encoder_embed.shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr(encoder_embed, "embed", refuse)
    with pytest.raises(EncoderError, match=r"5 shards need 1\.5e-05 GB of disk, only 1\.5e-05 GB"):
        embed_shards(bert, tokens, tmp_path / "e", shard=50)
    assert [p.name for p in (tmp_path / "e").iterdir()] == ["shards.json"]


@pytest.mark.parametrize("devices", [("cpu",), ("cpu", "cpu")])
def test_a_disk_that_fills_leaves_whole_shards_only(bert, tokens, in_memory, tmp_path, devices):
    folder = tmp_path / "e"

    def fill():
        resource.setrlimit(resource.RLIMIT_FSIZE, (2500, 2500))  # the last shard, of 30 rows, fits
        embed_shards(bert, tokens, folder, shard=50, devices=devices)

    told = in_child(fill)
    assert told.startswith(f"EncoderError: {folder}: 5 shards need")
    assert "which could not be written" in told
    assert not list(folder.glob("*.partial"))
    assert np.array_equal(all_rows(embed_shards(bert, tokens, folder, shard=50)), in_memory)


def test_each_device_has_its_own_model(bert, tokens, tmp_path, monkeypatch):
    real, seen = embed, {}

    def noting(model, tokens, rows, **keywords):
        seen.setdefault(threading.get_ident(), set()).add(id(model))
        time.sleep(0.05)
        return real(model, tokens, rows, **keywords)

    monkeypatch.setattr(encoder_embed, "embed", noting)
    embed_shards(bert, tokens, tmp_path / "two", shard=50, devices=("cpu", "cpu"))
    used = set.union(*seen.values())
    assert len(seen) == len(used) == 2 and id(bert) not in used
    seen.clear()
    embed_shards(bert, tokens, tmp_path / "one", shard=50)
    assert list(seen.values()) == [{id(bert)}]


def test_an_error_of_one_device_ends_the_others(bert, tokens, tmp_path, monkeypatch):
    real = embed

    def fail(model, tokens, rows, **keywords):
        if rows[0] == 50:
            raise MemoryError("in the middle")
        time.sleep(0.1)
        return real(model, tokens, rows, **keywords)

    monkeypatch.setattr(encoder_embed, "embed", fail)
    with pytest.raises(MemoryError, match="in the middle"):
        embed_shards(bert, tokens, tmp_path / "e", shard=10, devices=("cpu", "cpu"))
    assert not list((tmp_path / "e").glob("*.partial"))
    assert len(list((tmp_path / "e").glob("*.npy"))) <= 7
