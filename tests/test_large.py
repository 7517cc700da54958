"""The benchmark of collections larger than memory, in small: killed, resumed, damaged, indexed, searched."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path

import numpy as np
import pytest

from adaptive_margins.encoder.embed import embed
from adaptive_margins.retrieval.faiss_index import choose_index

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"
with pytest.MonkeyPatch.context() as _patch:
    _patch.syspath_prepend(FOLDER)
    large, pages = map(importlib.import_module, ("large", "pages"))


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return large.Large(tmp_path_factory.mktemp("large"), 20_000, 64, shard=1000)


@pytest.fixture(scope="module")
def found(small):
    return large.measure(small)


def test_a_kill_loses_only_shards_that_were_not_complete(small, found):
    assert found["killed"] and found["shards"] == 20
    survived = found["phases"]["embedding, after a kill"]["complete before"]
    assert 10 <= survived < 20
    assert small.complete() == list(range(20))


def test_a_damaged_shard_is_named_and_embedded_again(small, found):
    (warning,) = found["phases"]["checking all shards, embedding one again"]["warnings"]
    assert re.search(r"embeddings\.npy: damaged shards \[(9|10)\] are embedded again", warning)
    model, tokens = large.StandIn(64), large.texts(20_000, small.folder)
    expected = np.concatenate([embed(model, tokens, range(k, k + 1000)) for k in range(0, 20_000, 1000)])  # fmt: skip
    stored = np.load(small.folder / "embeddings.npy")
    np.testing.assert_allclose(stored, expected, atol=1e-3)


def test_the_index_finds_nearly_all_that_exact_search_finds(found):
    assert found["recall"] >= 0.97
    assert found["phases"]["searching exactly"]["memory"] > 0


def test_the_page_is_written_from_the_measurement(found, monkeypatch):
    assert (FOLDER.parent / "book" / "scale_table.md").read_text("utf-8") == pages.large()
    assert pages.read("large")["recall"] >= 0.97
    monkeypatch.setattr(pages, "read", lambda _: json.loads(json.dumps(found)))
    shown = pages.large()
    assert f"**{found['recall']:.2%}** of the exact top 100" in shown
    index = found["bytes"]["passages.faiss"]
    settings = choose_index(20_000, 64, depth=100)
    predicted = 20_000 * (settings.m + 8) + settings.nlist * (4 * 64 + pages.HNSW_LINKS)
    assert predicted == pytest.approx(index, rel=0.1)
