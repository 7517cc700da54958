"""The benchmarks compare what they say: equal losses, real-token FLOPs, lengths like MS MARCO's, ratios the right way up."""

from __future__ import annotations

import importlib
import json
import signal
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from adaptive_margins import training
from adaptive_margins.encoder.embed import embed_shards
from adaptive_margins.losses import MarginLoss

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"
with pytest.MonkeyPatch.context() as _patch:  # the scripts import each other by their names
    _patch.syspath_prepend(FOLDER)
    expect, material, pages, run, schemes, timing, trials = map(
        importlib.import_module,
        ("expect", "material", "pages", "run", "schemes", "timing", "trials"),
    )

WORDS = "the shape of an array is returned unless np.ndarray.reshape raises ValueError: out-of-range".split()  # noqa: SIM905


@pytest.fixture(scope="module", autouse=True)
def some_text():
    """Random sentences in the place of PyDocs, which takes a while to build."""
    rng = np.random.default_rng(1)
    texts = [" ".join(rng.choice(WORDS, 60)) for _ in range(200)]
    summaries = [" ".join(rng.choice(WORDS, n)) for n in rng.integers(3, 60, size=40)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(material, "_pydocs", lambda: (summaries, texts))
        yield


@pytest.fixture(scope="module")
def encoder():
    return material.random_base(0.0, layers=2, width=64)


def test_passages_are_as_long_as_ms_marcos(encoder):
    drawn = material.passage_lengths(20_000, seed=1)
    assert drawn.mean() == pytest.approx(80, abs=1)
    assert (drawn.min(), drawn.max()) == (12, 200)
    lengths = drawn[:100]
    texts = material.windows(encoder.tokenizer, material._pydocs()[1], lengths)
    found = [len(ids) for ids in encoder.tokenizer(texts)["input_ids"]]
    longest_word = max(
        len(i) for i in encoder.tokenizer(WORDS, add_special_tokens=False)["input_ids"]
    )
    assert all(0 <= f - n < longest_word for f, n in zip(found, lengths, strict=True))
    # One after the other, nothing left out and nothing twice.
    words = " ".join(material._pydocs()[1]).split()
    assert " ".join(texts).split() == words[: len(" ".join(texts).split())]
    with pytest.raises(ValueError, match="12000 words do not suffice for 900 passages"):
        material.windows(encoder.tokenizer, material._pydocs()[1], np.full(900, 80))


def test_queries_are_cut_and_all_texts_differ():
    found = material.triples(20)
    queries = material.minilm(0.0).tokenizer(found.query)["input_ids"]
    assert max(map(len, queries)) == 30
    assert min(map(len, queries)) < 20
    assert len({*found.positive, *found.negative}) == 40


def test_flops_are_those_that_torch_counts(encoder):
    ids = torch.randint(1000, 2000, (1, 37))
    # The fused kernel of the CPU is not among those that are counted.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        encoder[0].model(input_ids=ids).last_hidden_state.sum()
    pooler = 2 * 64 * 64
    assert material.flops(encoder, np.array([37])) == 3 * (counter.get_total_flops() - pooler)
    one, two = (material.flops(encoder, np.array(n)) for n in ([37], [37, 37]))
    assert two == 2 * one


def test_all_contestants_make_the_same_step(encoder, monkeypatch):
    """The one that is timed has all triples, and is the last."""
    batch, sizes = material.triples(6), []
    for loss in (training.RecordedLoss, MarginLoss):

        def spy(self, features, labels=None, forward=loss.forward):
            rows = labels.shape[1] if torch.is_tensor(labels) else None
            sizes.append(rows or len(next(iter(features))["input_ids"]))
            return forward(self, features, labels)

        monkeypatch.setattr(loss, "forward", spy)
    before = {k: v.clone() for k, v in encoder.state_dict().items()}
    wrong = {**run.CONTESTANTS, "wrong": lambda *_: (1.0, run.CONTESTANTS["ours"](encoder, batch)[1] + 2e-5)}  # fmt: skip
    with pytest.raises(AssertionError, match=r"wrong: loss .* ours"):
        run.same_loss(encoder, batch, wrong)
    assert sizes == (len(run.CONTESTANTS) + 1) * [schemes.WARM, 6]
    assert all(torch.equal(v, before[k]) for k, v in encoder.state_dict().items())


def test_the_padded_contestant_pads_to_the_limits(encoder):
    batch = material.triples(5)
    tokens = schemes.tokens_of(encoder, batch)
    rows = [{"query": i, "positive": i, "negative": i + 5} for i in range(5)]
    chunks = schemes._Padded(*tokens, 1, None)(rows)["chunks"]
    assert [tuple(c["input_ids"].shape) for c in chunks] == [(5, 30), (5, 200), (5, 200)]
    expected = [tokens[0].lengths, tokens[1].lengths[:5], tokens[1].lengths[5:]]
    assert [c["attention_mask"].sum(1).tolist() for c in chunks] == [e.tolist() for e in expected]


def test_merging_is_switched_on_and_off(encoder, monkeypatch):
    """The peers differ in their number of forwards: three, or two with positives and negatives in one."""
    sizes = []
    forward = type(encoder).forward

    def spy(self, features, *args, **kwargs):
        sizes.append(len(features["input_ids"]))
        return forward(self, features, *args, **kwargs)

    monkeypatch.setattr(type(encoder), "forward", spy)
    for merged, expected in ((False, [4, 4, 4]), (True, [4, 8])):
        sizes.clear()
        schemes.sentence_transformers(merged)(encoder, material.triples(4))
        assert sizes == 2 * expected  # a step before the one that is timed


def test_a_ratio_above_one_is_in_our_favour():
    rates = timing.row("n", [20.0, 30.0, 40.0], [10.0, 10.0, 10.0], "triples/s", "s")
    assert (rates["ours"], rates["peer"], rates["ratio"]) == (30, 10, 3)
    assert rates["spread"] == [2, 4]
    seconds = timing.row("n", [1.0], [4.0], "s", "s", less_is_better=True)
    assert (seconds["ratio"], seconds["spread"]) == (4, [4, 4])


def test_contestants_take_turns():
    calls = []
    found = timing.rounds({n: lambda r, n=n: calls.append((r, n)) or float(r) for n in "ab"}, 3)
    assert calls == [(0, "a"), (0, "b"), (1, "b"), (1, "a"), (2, "a"), (2, "b")]
    assert found == {"a": [0, 1, 2], "b": [0, 1, 2]}


def test_the_exponent_of_a_power():
    sizes = [10.0, 30.0, 200.0]
    assert timing.exponent(sizes, [7 * s**1.5 for s in sizes]) == pytest.approx(1.5)


def test_rows_replace_their_like_and_leave_the_others(tmp_path):
    path = tmp_path / "latest.json"
    a, b, c = (timing.row(n, [v], [1.0], "s", "x") for n, v in (("a", 1.0), ("b", 2.0), ("a", 3.0)))
    timing.keep(path, [a, b])
    timing.keep(path, [c])
    assert [(r["name"], r["ours"]) for r in json.loads(path.read_text())] == [("b", 2), ("a", 3)]
    assert [p.name for p in tmp_path.iterdir()] == ["latest.json"]


def test_the_books_pages_are_written_from_the_measurements():
    book = FOLDER.parent / "book"
    expected = {
        FOLDER / "RESULTS.md": pages.speed(),
        book / "speed_table.md": pages.speed_table(),
        book / "faults_table.md": pages.faults_table(),
        book / "hosts_table.md": pages.hosts_table(),
        book / "what_to_expect.md": pages.expect(pages.trainings()),
    }
    for path, text in expected.items():
        assert path.read_text("utf-8") == text, "run benchmarks/pages.py"
    rows = pages.read("latest")
    assert all(row["spread"][0] <= row["ratio"] <= row["spread"][1] for row in rows)
    assert len({(row["name"], row["setting"]) for row in rows}) == len(rows)


def test_the_page_on_trainings_counts_and_averages():
    def trained(seed, kept, verdict, difference):
        found = {
            "difference": difference, "ci": [difference - 0.01, difference + 0.01], "p_t": 0.0123, "p_tost": 0.25,
            "verdict": verdict,
        }  # fmt: skip
        scores = {"start": 0.4, "trained": 0.4 + difference, "bm25": 0.3, "hybrid": 0.5}
        return {
            "collection": {"name": "Zoo", "sets": {"test": 90}}, "encoder": "MiniLM", "target": "distributed", "seed": seed,
            "triples": {"used": 2048}, "kept": kept, "measures": {s: {"nDCG@10": v} for s, v in scores.items()},
            "seconds": {"a": 60.0, "b": 5.0}, "machine": "A machine", "date": "2026-01-02",
            "merge": {"alpha": 0.5}, "hybrid": {"weight": 0.3},
            "comparisons": {
                "trained vs start": found, "trained vs bm25": {"verdict": "better"},
                "hybrid vs trained": {"verdict": "better" if seed < 3 else "worse"}, "hybrid vs bm25": {"verdict": verdict},
            },
        }  # fmt: skip

    rows = [
        trained(1, "trained", "better", 0.05),
        trained(2, "trained", "worse", -0.03),
        trained(3, "start", "equivalent", 0.0),
    ]
    assert pages.summary(rows) == (
        "In 1 of 3 trainings the original encoder was kept; in 1 the trained one was better on the test queries, in 1 the"
        " trained one was **worse** on the test queries.\n"
    )
    assert pages.fused(rows) == (
        "Fusing the encoder with BM25 was better than the encoder alone in 2, better than BM25 alone in 1, and better than both"
        " in 1; it was worse than one of them in 2.\n"
    )
    lines = [[c.strip() for c in x.strip("|").split("|")] for x in pages.expect(rows).splitlines()]
    means = next(line for line in lines if line[:3] == ["Zoo, MiniLM", "nDCG@10", "90"])
    assert means[3:] == ["0.400", "0.407", "0.300", "0.500", "2 of 3"]
    each = [line for line in lines if line[0] == "Zoo, MiniLM" and line[2] == "2,048"]
    assert each[0][3:] == [
        "0.5",
        "0.3",
        "+0.050 [+0.040, +0.060]",
        "better",
        "better",
        "better",
        "1:05",
        "2026-01-02",
    ]
    assert each[2][5:7] == ["original kept", ""]


def test_a_training_keeps_its_date_and_its_neighbours(tmp_path, monkeypatch):
    """Those of an earlier call are read, not trained again, and not dated anew."""
    trained = []

    def finetune(source, folder, *, seed, **_):
        trained.append(seed)
        folder.mkdir()
        (folder / "training.json").write_text("{}")

    def load(folder):
        seed = int(folder.name[-1])
        report = {"collection": {"source": "zoo"}, "target": "distributed", "seed": seed}
        return types.SimpleNamespace(report=report)

    monkeypatch.setattr(expect, "finetune", finetune)
    monkeypatch.setattr(expect, "Finetuned", types.SimpleNamespace(load=load))
    out = tmp_path / "out.json"
    for date, seeds in (("first", "1"), ("second", "12"), ("third", "3")):
        monkeypatch.setattr(expect, "stamp", lambda date=date: {"machine": "A", "date": date})
        command = ["expect.py", str(out), str(tmp_path / "work"), "Zoo=zoo", "--seeds", *seeds]
        monkeypatch.setattr(sys, "argv", command)
        expect.main()
    rows = json.loads(out.read_text())
    assert [(row["seed"], row["date"]) for row in rows] == [(1, "first"), (2, "second"), (3, "third")]  # fmt: skip
    assert trained == [1, 2, 3]


def test_faults_are_tried_and_counted(bert, tokens, tmp_path):
    place = tmp_path / "shards"

    def embed() -> bytes:
        return embed_shards(bert, tokens, place, shard=4).tobytes()

    work = trials.Work("shards", embed, [place], embed)
    (killed,) = trials.interrupted(work, signal.SIGKILL, 5)
    assert killed["trials"] >= 2
    damaged = trials.rotten("shards", trials.some(place), embed)
    assert [row["trials"] for row in damaged] == [2, 2]
    assert 0 < killed["noticed"] <= killed["trials"]  # one may end just before its signal
    for row in (killed, *damaged):  # pytest keeps the warnings that name a file
        assert row["equal"] == row["trials"]
    # What is not noticed or not equal is counted as such.
    lost = trials.rotten("a file", [place / "embeddings.npy"], time.monotonic)
    assert [(row["noticed"], row["equal"]) for row in lost] == [(0, 0), (0, 0)]


def test_all_that_was_tried_ended_equal():
    for row in (row for part in pages.read("faults").values() for row in part):
        assert row["equal"] == row["trials"] >= row["noticed"] > 0, row
