"""Embeddings: batches, precision and chunks against single texts; shards on disk, resumed after a kill."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import signal
import sys
import threading
import time
import warnings
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from adaptive_margins.encoder import embed as encoder_embed
from adaptive_margins.encoder.checks import EmbeddingError, EncoderError
from adaptive_margins.encoder.embed import embed, embed_shards, length_chunks
from adaptive_margins.encoder.load import open_encoder
from adaptive_margins.encoder.tokens import tokenize
from adaptive_margins.profiles.encoders import EncoderSettings
from adaptive_margins.ray_tasks import RayError
from conftest import TEXTS as SENTENCES
from conftest import flip, in_child, kill_in


def refuse(*_, **__):
    raise AssertionError("something was embedded")


# ---- in memory


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


@pytest.mark.parametrize("batch_tokens", [1, 20, 2048])
def test_embeddings_do_not_depend_on_the_batch(bert, batch_tokens):
    tokens = tokenize(bert, SENTENCES, 12)
    one_by_one = np.concatenate([embed(bert, tokens, [r]) for r in range(len(SENTENCES))])
    np.testing.assert_allclose(
        embed(bert, tokens, batch_tokens=batch_tokens), one_by_one, atol=1e-5
    )
    rows = [4, 0, 0, 2]
    np.testing.assert_allclose(
        embed(bert, tokens, rows, batch_tokens=batch_tokens), one_by_one[rows], atol=1e-5
    )


@pytest.mark.parametrize(("precision", "digits"), [("bf16", 8), ("fp16", 11)])
def test_mixed_precision_is_close_to_full_and_rounds_as_its_type_does(bert, precision, digits):
    tokens = tokenize(bert, SENTENCES, 12)
    full, mixed = embed(bert, tokens), embed(bert, tokens, precision=precision)
    assert mixed.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(mixed, axis=1), 1, atol=1e-6)
    error = np.abs(mixed - full).max()
    assert 2.0**-24 < error < 16 * 2.0**-digits
    assert np.array_equal(embed(bert, tokens, precision="fp32"), full)
    with torch.autocast("cpu", torch.bfloat16):  # what surrounds a call does not reach into it
        assert np.array_equal(embed(bert, tokens), full)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="not run here: needs a CUDA device")
def test_mixed_precision_on_a_gpu_is_close_to_full_on_the_cpu(tiny_folder):
    model = open_encoder(EncoderSettings(base=str(tiny_folder("bert"))), dropout=0.0)
    tokens = tokenize(model, SENTENCES, 12)
    full = embed(model, tokens)
    model.to("cuda")
    np.testing.assert_allclose(embed(model, tokens), full, atol=1e-4)
    for precision in ("bf16", "fp16"):
        np.testing.assert_allclose(embed(model, tokens, precision=precision), full, atol=0.06)


def test_embed_leaves_the_model_as_it_was(bert):
    tokens = tokenize(bert, SENTENCES, 12)
    for training in (True, False):
        bert.train(training)
        embed(bert, tokens, [0])
        assert bert.training is training
    assert embed(bert, tokens, []).shape == (0, 16)


def test_a_zero_embedding_stays_zero(tiny_folder):
    model = open_encoder(
        EncoderSettings(base=str(tiny_folder("bert")), pooling="cls+linear"), dropout=0.0
    )
    torch.nn.init.zeros_(model[2].linear.weight)
    torch.nn.init.zeros_(model[2].linear.bias)
    assert not embed(model, tokenize(model, SENTENCES, 12)).any()


# ---- on disk


@pytest.fixture
def in_memory(bert, tokens):
    """What shards of 50 are: each embedded on its own."""
    parts = [embed(bert, tokens, range(s, min(s + 50, 230))) for s in range(0, 230, 50)]
    return np.concatenate(parts)


def done(folder):
    return json.loads((folder / "shards.json").read_text())["done"]


@pytest.mark.parametrize("devices", [("cpu",), ("cpu",) * 9])
def test_embeddings_on_disk_do_not_depend_on_the_number_of_devices(
    bert, tokens, in_memory, tmp_path, devices
):
    found = embed_shards(bert, tokens, tmp_path / "e", shard=50, devices=devices)
    assert sorted(p.name for p in (tmp_path / "e").iterdir()) == ["embeddings.npy", "shards.json"]
    parts = (in_memory[start : start + 50] for start in range(0, 230, 50))
    assert json.loads((tmp_path / "e" / "shards.json").read_text()) == {
        "rows": 230,
        "dim": 16,
        "dtype": "float32",
        "shard": 50,
        "done": [0, 1, 2, 3, 4],
        "sha256": {
            str(k): hashlib.sha256(part.tobytes()).hexdigest() for k, part in enumerate(parts)
        },
    }
    assert np.array_equal(found, in_memory)  # bit for bit
    np.testing.assert_allclose(in_memory, embed(bert, tokens), atol=1e-6)


def test_float16_on_disk_is_rounded(bert, tokens, in_memory, tmp_path):
    found = embed_shards(bert, tokens, tmp_path / "e", shard=50, dtype="float16")
    assert (tmp_path / "e" / "embeddings.npy").stat().st_size == 128 + 230 * 16 * 2
    assert np.array_equal(found, in_memory.astype(np.float16))
    assert 0 < np.abs((found.astype(np.float32) ** 2).sum(1) - 1).max() < 2.0**-10


def test_no_text_at_all(bert, tokens, tmp_path):
    assert embed_shards(bert, tokens.take([]), tmp_path / "e").shape == (0, 16)


@pytest.fixture
def seen(monkeypatch):
    """The rows that are embedded."""
    rows_seen = []

    def noting(model, tokens, rows, **keywords):
        rows_seen.extend(rows)
        return embed(model, tokens, rows, **keywords)

    monkeypatch.setattr(encoder_embed, "embed", noting)
    return rows_seen


def test_embedding_goes_on_after_a_kill(bert, tokens, in_memory, tmp_path, seen):
    folder = tmp_path / "e"

    def work():
        kill_in(encoder_embed, "write_text", 4)  # the third shard is written, but not listed
        embed_shards(bert, tokens, folder, shard=50)

    assert in_child(work) == "died"
    assert done(folder) == [0, 1, 2]
    assert np.array_equal(embed_shards(bert, tokens, folder, shard=50), in_memory)
    assert seen == list(range(150, 230))
    embed_shards(bert, tokens, folder, shard=50)
    assert len(seen) == 80


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shard": 60}, "has shard 50, expected 60; delete"),
        ({"dtype": "float16"}, "has dtype 'float32', expected 'float16'; delete"),
    ],
)
def test_other_settings_are_refused(bert, tokens, tmp_path, change, message):
    embed_shards(bert, tokens, tmp_path / "e", shard=50)
    with pytest.raises(EncoderError, match=message):
        embed_shards(bert, tokens, tmp_path / "e", **{"shard": 50, **change})


@pytest.mark.parametrize(
    ("dtype", "change", "damaged"),
    [
        ("float32", lambda path: flip(path, 128), [0]),
        ("float16", lambda path: flip(path, -1), [4]),
        ("float16", lambda path: os.truncate(path, path.stat().st_size * 3 // 5), [2, 3, 4]),
        ("float32", lambda path: os.truncate(path, 0), [0, 1, 2, 3, 4]),
        ("float16", lambda path: np.save(path, np.zeros((50, 17), np.float32)), [0, 1, 2, 3, 4]),
        ("float32", lambda path: path.unlink(), [0, 1, 2, 3, 4]),
    ],
)
def test_damaged_shards_are_named_and_embedded_again(
    bert, tokens, in_memory, tmp_path, seen, dtype, change, damaged
):
    folder = tmp_path / "e"
    embed_shards(bert, tokens, folder, shard=50, dtype=dtype)
    change(folder / "embeddings.npy")
    seen.clear()
    with pytest.warns(
        UserWarning, match=rf"embeddings\.npy: damaged shards {re.escape(str(damaged))}"
    ):
        found = embed_shards(bert, tokens, folder, shard=50, dtype=dtype)
    assert np.array_equal(found, in_memory.astype(dtype))
    assert sorted({row // 50 for row in seen}) == damaged
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        embed_shards(bert, tokens, folder, shard=50, dtype=dtype)
    assert len(seen) == len(set(seen))


def test_a_damaged_list_of_shards_is_named(bert, tokens, tmp_path):
    embed_shards(bert, tokens, tmp_path / "e", shard=50)
    (tmp_path / "e" / "shards.json").write_text("{")
    with pytest.raises(EncoderError, match=r"shards\.json cannot be read"):
        embed_shards(bert, tokens, tmp_path / "e", shard=50)


def test_a_disk_that_is_too_small_is_noticed_before_anything_is_embedded(
    bert, tokens, tmp_path, monkeypatch
):
    usage = type("Usage", (), {"free": 230 * 16 * 4 - 1})
    monkeypatch.setattr(encoder_embed.shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr(encoder_embed, "embed", refuse)
    with pytest.raises(EncoderError, match=r"5 shards need 1\.5e-05 GB of disk, only 1\.5e-05 GB"):
        embed_shards(bert, tokens, tmp_path / "e", shard=50)
    assert not list((tmp_path / "e").iterdir())


def test_a_disk_that_fills_is_an_error_and_the_next_call_goes_on(bert, tokens, in_memory, tmp_path):
    import resource

    folder = tmp_path / "e"

    def fill():
        resource.setrlimit(resource.RLIMIT_FSIZE, (2500, 2500))
        embed_shards(bert, tokens, folder, shard=50)

    told = in_child(fill)
    assert told.startswith(f"EncoderError: {folder}: 5 shards need")
    assert "which could not be written" in told
    assert np.array_equal(embed_shards(bert, tokens, folder, shard=50), in_memory)


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
    assert len(done(tmp_path / "e")) <= 7


# ---- on Ray


class Mortal:
    """A model in two workers at least, the first of which dies."""

    def __init__(self, model, note: Path):
        self.model, self.note = model, note

    def __getattr__(self, name):
        if name == "model":  # it is being unpickled
            raise AttributeError(name)
        return getattr(self.model, name)

    def to(self, device):
        self.model.to(device)
        return self

    def __call__(self, features):
        with suppress(FileExistsError):
            self.note.with_name("dead").touch(exist_ok=False)
            os.kill(os.getpid(), signal.SIGKILL)
        with self.note.open("a") as file:
            file.write(f"{os.getpid()}\n")
        deadline = time.monotonic() + 60
        while len(set(self.note.read_text().split())) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        return self.model(features)


@pytest.mark.timeout(280)
def test_workers_of_ray_embed_the_missing_shards_and_one_that_dies_is_replaced(bert, tokens, tmp_path):  # fmt: skip
    pytest.importorskip("ray.cloudpickle").register_pickle_by_value(sys.modules[__name__])
    alone, folder, note = tmp_path / "alone", tmp_path / "e", tmp_path / "note"
    embed_shards(bert, tokens, alone, shard=50)
    embed_shards(bert, tokens, folder, shard=50)
    about = json.loads((folder / "shards.json").read_text())
    (folder / "shards.json").write_text(json.dumps({**about, "done": [2]}))
    with (folder / "embeddings.npy").open("r+b") as file:
        file.seek(128)
        file.write(bytes(50 * 16 * 4))
    address = os.environ.get("ADAPTIVE_MARGINS_TEST_RAY", "local")
    try:
        embed_shards(Mortal(bert, note), tokens, folder, shard=50, ray=address)
    except RayError as error:  # its raylet ends itself where an agent needs 15 s to start
        if "does not answer" not in str(error):
            raise
        pytest.skip(f"Ray does not start here: {error}")
    workers = note.read_text().split()
    assert len(workers) == 4  # of five shards
    assert len(set(workers)) > 1 and str(os.getpid()) not in workers
    assert note.with_name("dead").exists()
    assert json.loads((folder / "shards.json").read_text()) == about
    assert (folder / "embeddings.npy").read_bytes() == (alone / "embeddings.npy").read_bytes()


def test_errors_of_tasks_are_those_of_this_project(bert, tokens, in_memory, tmp_path, monkeypatch):
    """Without Ray: of what `ray_task` starts, the second task fails, then again, then none."""
    died = type("Died", (Exception,), {"__module__": "ray.exceptions"})
    ours = RuntimeError("a traceback")
    ours.cause = EmbeddingError("of 9 tokens")
    errors, asked, computed = [ours, died("Ray's own")], [], []

    def start(address, function, needs):
        asked.append((address, needs))
        computed.clear()

        def call(sent, device, embed_all):
            future = Future()
            computed.append(len(embed_all.keywords["tokens"]))
            if len(computed) == 2 and errors:
                future.set_exception(errors.pop(0))
            else:
                future.set_result(function(sent, device, embed_all))
            return future

        return call

    ray = SimpleNamespace(put=lambda model: model, get=lambda model: model, shutdown=lambda: None)
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setattr("importlib.util.find_spec", lambda _: object())
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    monkeypatch.setattr(encoder_embed, "ray_task", start)
    monkeypatch.setattr(encoder_embed, "_IN_FLIGHT", 1)
    shards = {"shard": 50, "ray": "local,cpus=2"}
    with pytest.raises(EmbeddingError, match=r"^of 9 tokens$"):
        embed_shards(bert, tokens, tmp_path / "e", **shards)
    with pytest.raises(RayError, match=r"local,cpus=2: Ray's own; finished shards are stored"):
        embed_shards(bert, tokens, tmp_path / "e", **shards)
    assert np.array_equal(embed_shards(bert, tokens, tmp_path / "e", **shards), in_memory)
    assert computed == [50, 50, 30]  # two were finished
    assert asked == [("local", {"num_cpus": 2, "num_gpus": 0})] * 3
