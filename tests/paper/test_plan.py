"""What a plan promises, held against what happens; and what it does without data, weights or device."""

from __future__ import annotations

import socket
import time

import pytest
import yaml

from adaptive_margins.paper.costs import PlanError
from adaptive_margins.paper.experiments import Reproduction
from adaptive_margins.paper.plan_text import plan_text, size
from conftest import command


def test_the_laptops_runs_take_what_was_expected(tmp_path):
    """The laptop profile's encoders, lengths and optimiser on a smaller PyDocs: within a factor of 1.5."""
    reproduction = Reproduction.open(
        "laptop",
        tmp_path,
        collection={"packages": ["networkx", "sklearn"], "max_passages": 1200, "validation": 100, "test": 100},
        static={"triples": 512, "seeds": {}},
        distributed={"triples": 512},
        comparison={"triples": 512, "evaluate_every": 128},
        workers=1,
    )  # fmt: skip
    configs = [
        reproduction.zero_shot_run("minilm-3"),
        reproduction.static_run("minilm-3", 0.4, True),
        reproduction.curve_run("minilm-3", "distributed", False, 32),
        reproduction.comparison_run("minilm-3", target="distributed", in_batch=False, patience=9),
    ]  # fmt: skip
    reproduction.encoder("minilm-3")  # shared by all runs, and not part of any
    for name in reproduction.evaluated_sets:
        reproduction.top_candidates(name)
    ratios = []
    for config in configs:
        expected = reproduction.expected_seconds(config)
        since = time.perf_counter()
        reproduction.execute(config)
        ratios.append((time.perf_counter() - since, expected))
    taken, expected = map(sum, zip(*ratios, strict=True))
    assert 1 / 1.5 < taken / expected < 1.5, ratios


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a connection was tried")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def test_the_papers_plan_needs_neither_data_nor_network(tmp_path, no_network):
    reproduction = Reproduction.open("paper", tmp_path)
    plan = reproduction.plan()
    runs = plan.runs
    # 11 ε × 2 × 3 encoders, 2 × 3 adaptive, 2 × 3 distributed, 5 × 3 + 2 for the tables, BM25 and 3 starts; for
    # distilBERT, ε = 0 stands for the tuned one.
    assert len(runs) == 66 + 6 + 6 + 17 + 4
    assert not runs["done"].any()
    assert runs["run_id"].is_unique
    assert not list(tmp_path.iterdir())
    assert "fingerprint" not in vars(
        reproduction
    )  # what is run afterwards is of the real collection
    assert plan.stated == ["distilbert", "roberta", "mpnet"]

    static = runs[(runs["encoder"] == "distilbert") & (runs["triples"] == 2_560_000)].iloc[0]
    reranked = 43 * 1000 / 3090 + 43 / 2 / 3090
    assert static["seconds"] == pytest.approx(0.3 + 2_560_000 / 515 + reranked, rel=1e-6)
    curve = runs[runs["what"] == "adaptive, B 128, 39780811 triples"].iloc[0]
    assert curve["seconds"] == pytest.approx(0.3 + 39_780_811 / 515 + 310 * reranked, rel=1e-6)
    ranked = runs[runs["what"].str.endswith("full ranking") & (runs["triples"] == 0)].iloc[0]
    assert ranked["scratch"] == 8_841_823 * 768 * 2
    assert ranked["seconds"] > 8_841_823 / 3090

    fetched = dict(plan.downloads)
    assert sum("msmarco" in what for what in fetched) >= 6
    assert (
        fetched["distilbert/distilbert-base-uncased@12040accade4e8a0f71eabdb258fecc2e7e948be"]
        == 4 * 66_363_648
    )
    assert sum(fetched.values()) == pytest.approx(10.3e9, rel=0.05)

    text = plan_text(reproduction.profile, plan)
    assert text.startswith("Profile paper: 99 runs, 0 are there.")
    for part in (
        "39,780,811",
        "13.6 GB",
        "To be fetched: 10.3 GB",
        "non-commercial",
        "not measured here",
    ):
        assert part in text  # fmt: skip


def test_the_released_plan_has_its_own_grid(tmp_path, no_network):
    plan = Reproduction.open("released", tmp_path).plan()
    assert len(plan.runs) == 60 + 6 + 6 + 17 + 4


def test_a_plan_that_lacks_a_number_says_which(tmp_path):
    counts = {"passages": None, "TREC-DL20": None}
    with pytest.raises(PlanError, match=r"collection\.counts lacks passages, TREC-DL20"):
        Reproduction.open("paper", tmp_path, collection__counts=counts).plan()
    path = tmp_path / "my.yaml"
    path.write_text(yaml.safe_dump({"extends": "paper", "encoders": {"mpnet": {"stated": None}}}))
    with pytest.raises(PlanError, match=r"encoders\.mpnet\.stated gives no speeds"):
        Reproduction.open(path, tmp_path).plan()


def test_the_command_is_one_message_if_a_number_is_missing(tmp_path):
    path = tmp_path / "my.yaml"
    path.write_text(yaml.safe_dump({"extends": "paper", "encoders": {"mpnet": {"stated": None}}}))
    done = command("plan", "--profile", str(path), home=tmp_path)
    assert done.returncode == 1
    assert done.stdout.startswith("adaptive-margins: profile paper: the collection and the weights")
    assert done.stdout.count("\n") == 1


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (13_581_040_128, "13.6 GB"), (2.5e12, "2.5 TB")],
)
def test_sizes_in_words(count, text):
    assert size(count) == text
