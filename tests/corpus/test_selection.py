"""What validation decides: against naive loops, with both ends exact, and where fusion or training hurts."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from adaptive_margins.corpus import validation
from adaptive_margins.corpus.validation import best_merge, choose_weight, learned, merged
from adaptive_margins.data.collection import Collection, Texts
from adaptive_margins.evaluation.measures import Evaluation, evaluate
from adaptive_margins.retrieval.dense import hybrid

QUERIES = 20


def run_of(qrels, noise: float, seed: int):
    """A ranking of 60 of 80 passages that finds the relevant one the worse the more noise there is."""
    rng, run = np.random.default_rng(seed), {}
    for qid, judged in qrels.items():
        scores = {f"d{i}": f"d{i}" in judged for i in rng.choice(80, 60, replace=False)}
        run[qid] = {docid: float(one + noise * rng.normal()) for docid, one in scores.items()}
    return run


QRELS = {f"q{i}": {f"d{i}": 1} for i in range(QUERIES)}


def nd(run):
    return evaluate(QRELS, run, ["nDCG@10"]).mean["nDCG@10"]


@pytest.mark.parametrize("noises", [(0.3, 9.0), (9.0, 0.3), (0.5, 0.8)])
def test_the_learned_weight_is_never_worse_than_the_better_ranking(noises):
    runs = {
        name: run_of(QRELS, noise, seed)
        for seed, (name, noise) in enumerate(zip(("dense", "bm25"), noises, strict=True))
    }
    found = learned(runs, {**QRELS, "unjudged": {"d1": 0}})
    assert found["queries"] == QUERIES
    curve = [nd(hybrid(runs["dense"], runs["bm25"], 10, w / 10)) for w in range(11)]
    assert found["curve"] == curve
    assert (curve[0], curve[-1]) == (nd(runs["bm25"]), nd(runs["dense"]))
    assert curve[found["weights"].index(found["weight"])] == max(curve)
    assert found["reciprocal_rank"] == nd(hybrid(runs["dense"], runs["bm25"], 10))


def test_where_fusion_hurts_the_better_ranking_stays_alone():
    good = {qid: {"d77": 2.0, f"d{i}": 3.0} for i, qid in enumerate(QRELS)}
    bad = {qid: {"d77": 9.0, "d78": 8.0} for qid in QRELS}
    for dense, bm25, weight in ((good, bad, 1.0), (bad, good, 0.0)):
        found = learned({"dense": dense, "bm25": bm25}, QRELS)
        assert found["reciprocal_rank"] < max(
            found["curve"]
        )  # it ranks d77, which both have, first
        assert (found["weight"], max(found["curve"])) == (weight, 1.0)
    assert learned({"dense": bad, "bm25": bad}, QRELS)["weight"] == 1  # a draw


def test_the_weight_is_the_encoders_or_learned_on_another_set_or_none(tmp_path, monkeypatch):
    texts = Texts(list(QRELS), ["?"] * QUERIES)
    sets = {
        "train": (texts, QRELS),
        "validation": (texts, {"q3": {"d3": 0}}),
        "test": (texts, QRELS),
    }
    collection = Collection(
        "c",
        Texts([f"d{i}" for i in range(QUERIES)], ["x"] * QUERIES),
        *({name: both[i] for name, both in sets.items()} for i in (0, 1)),
    )
    asked = []

    def rank(queries):
        asked.append(len(queries))
        return {"dense": run_of(QRELS, 0.1, 1), "bm25": run_of(QRELS, 9.0, 2)}

    found = choose_weight("minilm", collection, "test", rank)
    assert asked == [QUERIES] and found["how"] == "the best for 20 queries of train"
    assert found["weight"] > 0.5
    monkeypatch.setattr(validation, "MOST_VALIDATION", 7)
    assert choose_weight("minilm", collection, "test", rank)["queries"] == asked[-1] == 7
    assert choose_weight("minilm", collection, "train", rank)["weight"] is None
    for report, weight in (
        ({"hybrid": {"weight": 0.0}}, 0.0),
        ({"seed": 1}, None),
        ({"hybrid": {"weight": 7.0}}, None),
        ({"hybrid": ["weight"]}, None),
    ):
        (tmp_path / "training.json").write_text(json.dumps(report))
        assert choose_weight(str(tmp_path), collection, "train", rank)["weight"] == weight


# ---- merging -----------------------------------------------------------------------------------------


def test_merged_is_a_loop_and_exact_at_both_ends():
    generator = torch.Generator().manual_seed(1)
    start, trained = ({"a": torch.randn(5, 3, generator=generator), "b": torch.tensor([-0.0, 1e-30])} for _ in range(2))  # fmt: skip
    for alpha in (0.0, 0.25, 0.9, 1.0):
        found = merged(start, trained, alpha)
        for name, values in found.items():
            first, last = start[name].double(), trained[name].double()
            torch.testing.assert_close(
                values.double(), first + alpha * (last - first), rtol=1e-6, atol=1e-7
            )
            if alpha in (0, 1):
                exact = (trained if alpha else start)[name]
                assert values.numpy().tobytes() == exact.numpy().tobytes()


@pytest.mark.parametrize(
    ("peak", "best_step", "errors", "alpha"),
    [(0.5, 20, 1.0, 0.5), (1.0, 20, 1.0, 1.0), (0.0, 0, 1.0, 0.0), (0.25, 0, 1.0, 0.25), (0.5, 20, 1e6, 0.0)],
)  # fmt: skip
def test_the_best_mix_is_chosen_if_its_gain_exceeds_its_error(peak, best_step, errors, alpha):
    torch.manual_seed(3)
    encoder = torch.nn.Linear(4, 3)
    start = {name: value.detach().clone() for name, value in encoder.named_parameters()}
    states = {name: {k: v + torch.randn_like(v) for k, v in start.items()} for name in ("selected", "last")}  # fmt: skip
    trained = states["selected" if best_step else "last"]
    noise = np.random.default_rng(1).normal(size=(30, 2)) / 100

    def values(share):
        return {
            f"q{i}": 0.5 - abs(share - peak) / 4 + a + b * share for i, (a, b) in enumerate(noise)
        }

    def validation(model):
        share = (model.bias - start["bias"]) / (trained["bias"] - start["bias"])
        return Evaluation({}, {"nDCG@10": values(share.mean().item())})

    rows = [
        (step, qid, "nDCG@10", value)
        for step, share in ((0, 0), (10, 0.1), (20, 1))
        for qid, value in values(share).items()
    ]
    checks = pd.DataFrame(rows, columns=["step", "qid", "measure", "value"])
    result = SimpleNamespace(best_step=best_step, stop_step=20, states=states, checks=checks)
    found = best_merge(encoder, result, validation, errors)
    assert (found["alphas"], found["alpha"], found["step"]) == ([0, 0.25, 0.5, 0.75, 1], alpha, 20)
    expected = [np.mean(list(values(share).values())) for share in found["alphas"]]
    assert found["values"] == pytest.approx(expected)
    for name, value in encoder.named_parameters():
        assert value.equal(merged(start, trained, alpha)[name])
