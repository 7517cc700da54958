"""Tokens: batches against loops, and the same in files, complete or not there."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from adaptive_margins.encoder import tokens as encoder_tokens
from adaptive_margins.encoder.checks import EncoderError
from adaptive_margins.encoder.embed import embed
from adaptive_margins.encoder.tokens import Tokens, _token_ids, shorten, stored_tokens, tokenize
from conftest import RANDOM_LENGTH as LENGTH
from conftest import RANDOM_TEXTS as TEXTS
from conftest import TEXTS as SENTENCES
from conftest import in_child, kill_in


def refuse():
    raise AssertionError("the tokenizer was loaded")


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
    tokens = tokenize(bert, SENTENCES, length)
    for row, text in enumerate(SENTENCES):
        expected = bert.tokenizer(text)["input_ids"]
        if len(expected) > length:
            expected = expected[: length - 1] + expected[-1:]  # [SEP] stays
        assert tokens.batch([row])["input_ids"][0].tolist() == expected


@pytest.mark.parametrize("length", [4, 7, 40])
def test_shortened_texts_are_the_most_words_that_fit(bert, length):
    texts = [
        *SENTENCES,
        "unbelievably-long_identifier.with.many.parts",
        "",
        "  spaces  at both ends ",
    ]
    for text, short in zip(texts, shorten(bert, texts, length), strict=True):
        words, fits = text.split(), []
        for n in range(len(words) + 1):
            if len(bert.tokenizer(" ".join(words[:n]))["input_ids"]) <= length:
                fits = words[:n]
        assert len(bert.tokenizer(short)["input_ids"]) <= length
        assert text.startswith(short)
        if fits or not words:
            assert short.split() == fits
            assert short == text or fits != words
        else:  # within the first word
            assert words[0].startswith(short.strip()) and short.strip()


def test_taken_and_joined_texts_are_those_of_a_loop():
    rng = np.random.default_rng(2)
    texts = [rng.integers(5, 99, size=n).tolist() for n in (3, 1, 7, 4, 1)]
    tokens = Tokens(np.concatenate(texts), np.cumsum([0, *map(len, texts)]), pad=7)
    for rows in ([], [3], [4, 1, 1, 0]):
        joined = tokens.take(rows) + tokens
        found = np.split(joined.ids, joined.offsets[1:-1])
        assert [f.tolist() for f in found] == [*(texts[r] for r in rows), *texts]
        assert joined.pad == 7


# ---- in files


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


def test_a_killed_process_leaves_nothing_that_looks_complete(bert, tokens, tmp_path):
    folder = tmp_path / "tokens"

    def work():
        kill_in(encoder_tokens, "_token_ids", 3)
        stored_tokens(lambda: bert.tokenizer, TEXTS, LENGTH, folder, chunk=50)

    assert in_child(work) == "died"
    assert not folder.exists()
    stored = stored_tokens(lambda: bert.tokenizer, TEXTS, LENGTH, folder, chunk=50)
    assert np.array_equal(stored.ids, tokens.ids)
    assert np.array_equal(stored.offsets, tokens.offsets)
    assert not list(tmp_path.glob(".*.partial"))


def test_token_files_that_are_not_the_expected_ones(bert, tmp_path):
    folder = tmp_path / "tokens"
    stored = stored_tokens(lambda: bert.tokenizer, TEXTS, LENGTH, folder)
    with pytest.raises(EncoderError, match=r"tokens\.json has texts 230, expected 229; delete"):
        stored_tokens(refuse, TEXTS[1:], LENGTH, folder)
    for name, change, message in (
        ("ids.bin", lambda p: os.truncate(p, 100), ""),
        ("ids.bin", Path.unlink, ""),
        ("tokens.json", lambda p: p.write_text("{"), r"tokens\.json cannot be read .*delete"),
        (
            "tokens.json",
            lambda p: p.write_text("[]"),
            r"tokens\.json: expected a JSON dict, not \[\]; delete",
        ),
    ):
        copy = tmp_path / "copy"
        shutil.copytree(folder, copy)
        change(copy / name)
        without = shutil.copytree(copy, tmp_path / "without")
        (without / "SHA256SUMS").unlink()  # as an older version wrote them
        if message:
            with pytest.raises(EncoderError, match=message):
                stored_tokens(refuse, TEXTS, LENGTH, without)
        again = stored_tokens(lambda: bert.tokenizer, TEXTS, LENGTH, copy)
        assert np.array_equal(again.ids, stored.ids)
        shutil.rmtree(copy)
        shutil.rmtree(without)


def test_a_disk_that_fills_leaves_nothing(bert, tmp_path):
    import resource

    def fill():
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        stored_tokens(lambda: bert.tokenizer, TEXTS, LENGTH, tmp_path / "tokens", chunk=50)

    message = f"EncoderError: tokens could not be written to {tmp_path / 'tokens'}: "
    assert in_child(fill).startswith(message)
    assert not list(tmp_path.iterdir())


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
