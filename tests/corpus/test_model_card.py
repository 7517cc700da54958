"""Model cards: the header as the hub's own library reads it, and no number that is not the report's."""

from __future__ import annotations

import copy
import re

import pytest
from huggingface_hub import ModelCard

from adaptive_margins.corpus.model_card import model_card

COMPARED = {
    "measure": "nDCG@10", "n": 43, "difference": 0.02718281828, "ci": [-0.0314159, 0.0857816], "p_t": 0.3678794,
    "p_tost": 0.0412345, "margin": 0.05, "verdict": "equivalent",
}  # fmt: skip
UNTESTED = {**COMPARED, "n": 1, "ci": None, "p_t": None, "p_tost": None, "verdict": "too few queries"}  # fmt: skip
REPORT = {
    "model_dir": "/home/somebody/private/output",
    "collection": {
        "name": "Somebody's notes: a \"test\"", "source": "/home/somebody/private/notes", "passages": 1398,
        "fingerprint": "0123456789abcdef", "sets": {"train": 61, "validation": 37, "test": 43},
        "split": "The queries were split by seed.", "pseudo": None,
    },
    "encoder": {"name": "minilm", "identity": "53aa" * 16, "parameters": 22713216},
    "target": "distributed",
    "seed": 19,
    "triples": {
        "used": 1536, "chosen": 1984, "available": 6100, "negatives": "bm25", "left_out": {"checked": 77},
        "guarded": {"queries": 59, "candidates": 5900, "near_duplicate": 17},
    },
    "settings": {
        "batch_size": 32, "learning_rate": 2e-05, "optimizer": "adamw_torch_fused", "query_length": 64,
        "passage_length": 256, "depth": 100, "device": "cpu",
    },
    "kept": "trained",
    "best_step": 36,
    "stop_step": 48,
    "validation": {"start": {"nDCG@10": 0.3711}, "best": {"nDCG@10": 0.3999}},
    "merge": {"alphas": [0.0, 0.5, 1.0], "values": [0.3711, 0.41234, 0.3999], "alpha": 0.5, "step": 36},
    "hybrid": {"weight": 0.7, "weights": [0.0, 0.7, 1.0], "curve": [0.3, 0.45678, 0.41], "reciprocal_rank": 0.4, "queries": 37},
    "measures": {
        "start": {"nDCG@10": 0.411111, "R(rel=1)@100": 0.711},
        "trained": {"nDCG@10": 0.438294, "R(rel=1)@100": 0.722},
        "bm25": {"nDCG@10": 0.355555, "R(rel=1)@100": 0.633},
        "hybrid": {"nDCG@10": 0.444444, "R(rel=1)@100": 0.744},
    },
    "comparisons": {
        "trained vs start": COMPARED,
        "trained vs bm25": {**COMPARED, "difference": -0.0827, "verdict": "worse"},
        "hybrid vs trained": UNTESTED,
    },
    "verdict": "The trained encoder is equivalent to the one it started from.",
    "seconds": {"training": 312.4, "validation": 20.5},
    "versions": {"python": "3.11.9", "torch": "2.13.0"},
}  # fmt: skip


def card(**changes) -> ModelCard:
    """The card of a report with other values, by ``a__b=value`` for a value within."""
    report = copy.deepcopy(REPORT)
    for path, value in changes.items():
        *above, last = path.split("__")
        place = report
        for key in above:
            place = place[key]
        place[last] = value
    return ModelCard(model_card(report))


def rows(text: str) -> list[list[str]]:
    """The cells of all table rows."""
    found = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in found]


def test_the_header_is_the_hubs():
    data = card().data
    assert data.library_name == "sentence-transformers"
    assert data.pipeline_tag == "sentence-similarity"
    assert data.base_model == "sentence-transformers/all-MiniLM-L6-v2"
    assert (data.license, data.get("license_name")) == ("apache-2.0", None)
    assert {"feature-extraction", "loss:MarginLoss"} <= set(data.tags)
    assert data.model_name == 'all-MiniLM-L6-v2 fine-tuned on Somebody\'s notes: a "test"'
    found = {result.metric_type: result.metric_value for result in data.eval_results}
    assert found == REPORT["measures"]["trained"]
    assert {(r.dataset_name, r.dataset_split) for r in data.eval_results} == {(REPORT["collection"]["name"], "test")}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "base", "link"),
    [
        ("intfloat/e5-base@f52bf8e", "intfloat/e5-base", "https://huggingface.co/intfloat/e5-base"),
        ("/home/somebody/private/encoder", None, None),
    ],
)
def test_an_unknown_licence_is_unknown_and_private_paths_stay_private(name, base, link):
    found = card(encoder__name=name)
    data = found.data
    assert data.get("base_model") == base
    assert (data.license, data.license_name, data.get("license_link")) == ("other", "unknown", link)
    assert "Apache" not in found.text and "/home/somebody" not in str(found)
    assert (link or "(encoder) is not known") in found.text


def test_tables_have_the_reports_values():
    found = rows(card().text)
    for row in (
        ["test queries", "nDCG@10", "R(rel=1)@100"],
        ["the encoder it started from", "0.411", "0.711"],
        ["this model fused with BM25", "0.444", "0.744"],
        [
            "this model − the encoder it started from", "nDCG@10", "43", "+0.027", "[-0.031, +0.086]", "0.37",
            "0.041, margin 0.05", "equivalent",
        ],
        ["this model − BM25", "nDCG@10", "43", "-0.083", "[-0.031, +0.086]", "0.37", "0.041, margin 0.05", "worse"],
        ["this model fused with BM25 − this model", "nDCG@10", "1", "+0.027", "–", "–", "–", "too few queries"],
        ["passages", "1,398"], ["test queries", "43"], ["available", "6100"], ["seed", "19"],
        ["learning_rate", "2e-05"], ["torch", "2.13.0"],
    ):  # fmt: skip
        assert row in found
    text = " ".join(card().text.split())
    for part in (
        "nDCG@10 0.371 at the start, 0.400 at the best",
        "by α: 0: 0.371, 0.5: 0.412, 1: 0.400; chosen: 0.5.",
        "weight of this model: 0: 0.300, 0.7: 0.457, 1: 0.410; chosen: 0.7.",
        "training 312.4, validation 20.5",
        "near duplicate 17",
        "checked 77",
        REPORT["verdict"],
        "The queries were split by seed.",
        "@inproceedings{gienapp2025,",
    ):
        assert part in text
    assert "{{" not in text and "None" not in text


@pytest.mark.parametrize(
    ("target", "formula", "equations"),
    [
        ("distributed", "(1 + φ(d⁺_i, d⁻_j)) / 2", "Equations 3 and 5"),
        ("adaptive", "(1 + φ(d⁺_i, d⁻_i)) / 2", "Equations 2 and 4"),
        (0.7, "0.7", "Equations 1 and 4"),
    ],
)
def test_the_loss_by_its_equations(target, formula, equations):
    text = card(target=target).text
    assert f"\n    l = φ(q_i, d⁺_i) − φ(q_i, d⁻_i) − {formula}\n" in text
    assert equations in text


def test_the_softmax_loss_is_not_called_a_margin_loss():
    found = card(target="softmax")
    assert "loss:MultipleNegativesRankingLoss" in found.data.tags
    assert "with a softmax loss" in found.text and "argin loss" not in found.text
    assert "φ(q_i" not in found.text and "gienapp" not in found.text


def test_what_only_some_cards_have():
    kept = card(kept="start")
    assert "loss:MarginLoss" not in kept.data.tags
    assert kept.data.model_name.startswith("all-MiniLM-L6-v2 kept as it was for ")
    assert "fine-tuned on" not in str(kept)
    pseudo = {"queries": 120, "kinds": {"title": 70, "inverse cloze": 50}}
    text = card(collection__pseudo=pseudo).text
    assert "queries 120, title 70, inverse cloze 50" in text
    assert "pseudo" not in card().text
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    compile(code, "README.md", "exec")
