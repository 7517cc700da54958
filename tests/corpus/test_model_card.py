"""Model cards: the header as the hub's own library reads it, and no number that is not the report's."""

from __future__ import annotations

import copy
import re
import socket

import pytest
from huggingface_hub import ModelCard, metadata_load

from adaptive_margins.corpus.model_card import model_card

COMPARED = {
    "measure": "nDCG@10", "n": 43, "difference": 0.02718281828, "ci": [-0.0314159, 0.0857816], "p_t": 0.3678794,
    "p_tost": 0.0412345, "margin": 0.05, "verdict": "equivalent",
}  # fmt: skip
REPORT = {
    "model_dir": "/home/somebody/private/output",
    "collection": {
        "name": "Somebody's notes: a \"test\"",
        "source": "/home/somebody/private/notes",
        "fingerprint": "0123456789abcdef",
        "passages": 1398,
        "sets": {"train": 61, "validation": 37, "test": 43},
        "split": "The queries were split by seed.",
        "pseudo": None,
    },
    "encoder": {"name": "minilm", "identity": "53aa" * 16, "parameters": 22713216},
    "target": "distributed",
    "seed": 19,
    "triples": {
        "used": 1536, "chosen": 1984, "available": 6100, "negatives": "bm25",
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
    "measures": {
        "start": {"nDCG@10": 0.411111, "R(rel=1)@100": 0.711},
        "trained": {"nDCG@10": 0.438294, "R(rel=1)@100": 0.722},
        "bm25": {"nDCG@10": 0.355555, "R(rel=1)@100": 0.633},
        "hybrid": {"nDCG@10": 0.444444, "R(rel=1)@100": 0.744},
    },
    "comparisons": {
        "trained vs start": COMPARED,
        "trained vs bm25": {**COMPARED, "difference": 0.0827, "verdict": "better"},
        "hybrid vs trained": {**COMPARED, "difference": -0.0061},
    },
    "verdict": "The trained encoder is equivalent to the one it started from.",
    "seconds": {"training": 312.4, "validation": 20.5},
    "versions": {"python": "3.11.9", "torch": "2.13.0"},
}  # fmt: skip


def report(**changes):
    """The report with other values, by ``a__b=value`` for a value within."""
    changed = copy.deepcopy(REPORT)
    for path, value in changes.items():
        *above, last = path.split("__")
        place = changed
        for key in above:
            place = place[key]
        place[last] = value
    return changed


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a card needs no network")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def sections(card):
    """Heading → text."""
    parts = re.split(r"^##? (.*)\n", ModelCard(card).text, flags=re.MULTILINE)
    return {head: text.strip() for head, text in zip(parts[1::2], parts[2::2], strict=True)}


def cells(table):
    return [[c.strip() for c in row.strip("|").split("|")] for row in table.splitlines()]


def test_the_header_is_the_hubs(tmp_path):
    path = tmp_path / "README.md"
    path.write_text(model_card(REPORT), encoding="utf-8")
    card = ModelCard.load(path)
    data = card.data
    assert metadata_load(path)["model-index"][0]["name"] == data.model_name
    assert data.library_name == "sentence-transformers"
    assert data.pipeline_tag == "sentence-similarity"
    assert data.base_model == "sentence-transformers/all-MiniLM-L6-v2"
    assert (data.license, data.get("license_name")) == ("apache-2.0", None)
    assert {"feature-extraction", "loss:MarginLoss"} <= set(data.tags)
    assert data.model_name == 'all-MiniLM-L6-v2 fine-tuned on Somebody\'s notes: a "test"'
    found = {result.metric_type: result.metric_value for result in data.eval_results}
    assert found == REPORT["measures"]["trained"]
    assert {r.dataset_name for r in data.eval_results} == {REPORT["collection"]["name"]}
    assert {r.dataset_split for r in data.eval_results} == {"test"}


@pytest.mark.parametrize(
    ("name", "base", "link", "said"),
    [
        ("intfloat/e5-base@f52bf8e", "intfloat/e5-base", "https://huggingface.co/intfloat/e5-base", "see https://hugg"),
        ("/home/somebody/private/encoder", None, None, "it started from (encoder) is not known here."),
    ],
)  # fmt: skip
def test_an_unknown_licence_is_said_to_be_unknown(name, base, link, said):
    card = model_card(report(encoder__name=name))
    data = ModelCard(card).data
    assert data.get("base_model") == base
    assert (data.license, data.license_name, data.get("license_link")) == ("other", "unknown", link)
    assert said in sections(card)["Licence"]
    assert "apache" not in card.lower()
    assert "sentence-transformers/all-MiniLM" not in card


def test_what_is_private_stays_so():
    card = model_card(report(encoder__name="/home/somebody/private/encoder"))
    assert "/home/somebody" not in card


def test_every_number_is_the_reports():
    """All numbers of the page stand in the report, but for those of formulas, names, and links."""
    text = ModelCard(model_card(REPORT)).text
    for known in (
        r"```.*?```", r"^    l = .*$", r"\(?https?://\S+", r"\[doi:.*?\]", r"Gienapp et al. 2025", r"Equations \d and \d",
        "all-MiniLM-L6-v2", r"two one-sided", r"nDCG@10|R\(rel=1\)@100", "l²", "95 % interval", r"at \.05", "BM25|bm25",
        r"Apache License 2\.0",
    ):  # fmt: skip
        text = re.sub(known, " ", text, flags=re.DOTALL if "```" in known else re.MULTILINE)

    def numbers(value):
        if isinstance(value, dict):
            return {n for key, v in value.items() for n in numbers(v)}
        if isinstance(value, list):
            return {n for v in value for n in numbers(v)}
        if isinstance(value, str):
            return {value, *re.findall(r"\d+(?:\.\d+)*", value)}
        if value is None:
            return set()
        forms = [f"{value}", f"{value:,}", f"{value:.3f}", f"{value:.2g}", f"{value:g}"]
        return {form.lstrip("-") for form in forms}

    known = numbers(REPORT)
    found = re.findall(r"\d[\d,]*(?:\.\d+)*(?:e-?\d+)?(?:[a-f\d]{12,})?", text)
    assert len(found) > 50
    assert {n.rstrip(",") for n in found} <= known


def test_measures_and_comparisons_stand_in_tables():
    page = sections(model_card(REPORT))["Evaluation"]
    measures, compared = (cells(part) for part in page.split("\n\n") if part.startswith("|"))
    assert measures[0] == ["test queries", "nDCG@10", "R(rel=1)@100"]
    assert measures[2] == ["the encoder it started from", "0.411", "0.711"]
    assert measures[3] == ["this model", "0.438", "0.722"]
    assert [row[0] for row in measures[4:]] == ["BM25", "this model fused with BM25"]
    assert compared[2] == [
        "this model − the encoder it started from", "nDCG@10", "43", "+0.027", "[-0.031, +0.086]", "0.37",
        "0.041, margin 0.05", "equivalent",
    ]  # fmt: skip
    assert compared[3][3::4] == ["+0.083", "better"]
    assert compared[4][3] == "-0.006"
    assert "nDCG@10 0.371 at the start, 0.400 at the best check" in page


def test_too_few_queries_for_a_test():
    few = {
        "measure": "nDCG@10", "n": 1, "difference": 0.25, "ci": None, "p_t": None, "p_tost": None, "verdict": "too few queries",
    }  # fmt: skip
    card = model_card(report(comparisons={"trained vs start": few}))
    table = sections(card)["Evaluation"].split("\n\n")[2]
    assert cells(table)[2][2:] == ["1", "+0.250", "–", "–", "–", "too few queries"]


@pytest.mark.parametrize(
    ("target", "formula", "equations"),
    [
        ("distributed", "l = φ(q_i, d⁺_i) − φ(q_i, d⁻_i) − (1 + φ(d⁺_i, d⁻_j)) / 2", "Equations 3 and 5"),
        ("adaptive", "l = φ(q_i, d⁺_i) − φ(q_i, d⁻_i) − (1 + φ(d⁺_i, d⁻_i)) / 2", "Equations 2 and 4"),
        (0.7, "l = φ(q_i, d⁺_i) − φ(q_i, d⁻_i) − 0.7", "Equations 1 and 4"),
    ],
)  # fmt: skip
def test_the_loss_by_its_equations(target, formula, equations):
    found = sections(model_card(report(target=target)))["Loss"]
    assert found.splitlines()[-1].strip() == formula
    assert equations in found
    assert f"{target}" in found


def test_an_encoder_that_was_kept_says_so():
    card = model_card(report(kept="start", measures__trained=REPORT["measures"]["start"]))
    data = ModelCard(card).data
    assert "loss:MarginLoss" not in data.tags
    title = 'all-MiniLM-L6-v2 kept as it was for Somebody\'s notes: a "test"'
    assert data.model_name == title
    assert "unchanged" in sections(card)[title]
    assert "fine-tuned on" not in card


def test_pseudo_queries_are_said_to_be_such():
    made = {"queries": 120, "kinds": {"title": 70, "inverse cloze": 50}}
    found = sections(model_card(report(collection__pseudo=made)))
    assert "pseudo-queries made from its passages: queries 120, title 70, inverse" in found["Data"]
    assert "Test queries made from the passages" in found["Limits"]
    assert "pseudo" not in model_card(REPORT)


def test_verdict_citation_versions_and_use():
    card = model_card(REPORT)
    found = sections(card)
    assert REPORT["verdict"] in found[ModelCard(card).data.model_name]
    assert "@inproceedings{gienapp2025," in found["Citation"]
    assert ["torch", "2.13.0"] in cells(found["Versions"])
    code = re.search(r"```python\n(.*?)```", found["Use"], re.DOTALL)[1]
    compile(code, "README.md", "exec")
    assert "trust_remote_code" not in code


def test_a_report_that_lacks_an_entry():
    lacking = report()
    del lacking["verdict"]
    with pytest.raises(KeyError, match="verdict"):
        model_card(lacking)
