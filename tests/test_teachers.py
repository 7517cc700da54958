"""MarginMSE against naive loops, late interaction, cross-encoders, and published scores."""

from __future__ import annotations

import gzip
import itertools
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers.sentence_transformer.losses import MarginMSELoss

from adaptive_margins.data.collection import Collection, Texts
from adaptive_margins.data.text import DataError
from adaptive_margins.encoder.checks import EncoderError
from adaptive_margins.encoder.frozen import LoadedEncoder
from adaptive_margins.encoder.tokens import tokenize
from adaptive_margins.profiles.encoders import EncoderSettings, TeacherSettings
from adaptive_margins.teachers import (
    IN_BATCH_WEIGHT,
    LateInteraction,
    TeacherError,
    dual_margin_mse,
    fine_tune,
    margin_mse,
    open_cross_encoder,
    read_scores,
    score_pairs,
    token_projection,
)
from conftest import TEXTS, in_child, kill_in, write_encoder

B, D = 5, 7


def drawn(seed=1, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    return [normal(B, D) for _ in range(3)], 4 * normal(B), 4 * normal(B), 4 * normal(B, B)


def similarity(a, b, kind):
    product = sum(x * y for x, y in zip(a, b, strict=True))
    if kind == "dot":
        return product
    return product / math.sqrt(sum(x * x for x in a)) / math.sqrt(sum(y * y for y in b))


def naive(texts, positive_scores, negative_scores, in_batch, kind):
    q, p, n = (t.tolist() for t in texts)
    t_pos, t_neg = positive_scores.tolist(), negative_scores.tolist()
    total, count = 0.0, 0
    for i in range(B):
        for j in range(B) if in_batch else [i]:
            margin = similarity(q[i], p[i], kind) - similarity(q[i], n[j], kind)
            total += (margin - (t_pos[i] - (t_neg[i][j] if in_batch else t_neg[i]))) ** 2
            count += 1
    return total / count


@pytest.mark.parametrize("kind", ["dot", "cosine"])
@pytest.mark.parametrize("in_batch", [False, True])
def test_margin_mse_equals_a_naive_loop(kind, in_batch):
    texts, t_pos, pairs, across = drawn()
    t_neg = across if in_batch else pairs
    found = margin_mse(*texts, t_pos, t_neg, similarity=kind)
    assert found.dtype == torch.float64
    assert abs(float(found) - naive(texts, t_pos, t_neg, in_batch, kind)) < 1e-12
    moved = margin_mse(*texts, t_pos + 3, t_neg + 3, similarity=kind)
    assert torch.isclose(moved, found)  # margins alone count


def test_pairs_by_dot_product_equal_sentence_transformers():
    texts, t_pos, t_neg, _ = drawn(3)
    theirs = MarginMSELoss(None).compute_loss_from_embeddings(texts, t_pos - t_neg)
    assert torch.allclose(margin_mse(*texts, t_pos, t_neg), theirs, atol=1e-14)


def test_two_teachers_equal_a_naive_loop():
    texts, t_pos, t_neg, to_negatives = drawn(4)
    to_positives = drawn(5)[3]
    found = dual_margin_mse(texts, torch.stack([t_pos, t_neg]), to_positives, to_negatives)
    q, p, n = texts
    total = 0.0
    for others, scores in ((n, to_negatives), (p, to_positives)):
        for i, j in itertools.product(range(B), range(B)):
            margin = q[i] @ p[i] - q[i] @ others[j]
            total += float(margin - (to_positives[i, i] - scores[i, j])) ** 2 / B**2 / 2
    expected = naive(texts, t_pos, t_neg, False, "dot") + IN_BATCH_WEIGHT * total
    assert abs(float(found) - expected) < 1e-12


def test_half_precision_is_summed_in_float32():
    texts, t_pos, t_neg, _ = drawn(6, torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        found = margin_mse(*texts, t_pos, t_neg)
    assert found.dtype == torch.float32
    exact = naive([t.double() for t in texts], t_pos, t_neg, False, "dot")
    assert float(found) == pytest.approx(exact, rel=1e-5)


# --- late interaction ---------------------------------------------------------------------------


@pytest.mark.parametrize("projected", [False, True])
def test_late_interaction_equals_a_naive_loop(bert, projected):
    tokens = tokenize(bert, TEXTS, 12)
    projection = torch.randn(4, 16) if projected else None
    teacher = LateInteraction(LoadedEncoder(bert, bert, tokens, tokens), projection)
    queries, passages = np.array([3, 0, 1]), np.array([2, 4, 0, 1])
    found = teacher(queries, passages)
    assert found.shape == (3, 4) and found.dtype == torch.float32 and not found.requires_grad

    def embedded(row):
        with torch.no_grad():
            states = bert(tokens.batch([row]))["token_embeddings"][0].double()
        return states if projection is None else states @ projection.double().T

    for a, query in enumerate(queries):
        for b, passage in enumerate(passages):
            expected = sum(
                max(float(torch.cosine_similarity(x, y, dim=0)) for y in embedded(passage))
                for x in embedded(query)
            )
            assert float(found[a, b]) == pytest.approx(expected, abs=1e-4)


def test_the_projection_of_a_colbert_is_found(tmp_path):
    folder = write_encoder(tmp_path / "colbert", "bert")
    settings = EncoderSettings(base=str(folder))
    assert token_projection(settings) is None
    weights = load_file(folder / "model.safetensors")
    linear = torch.randn(4, 16)
    save_file({**weights, "linear.weight": linear}, folder / "model.safetensors", {"format": "pt"})
    assert torch.equal(token_projection(settings), linear)


# --- cross-encoders -----------------------------------------------------------------------------


def settings(folder, **values):
    encoder = {"base": str(folder), "layers": values.pop("layers", None)}
    return TeacherSettings.model_validate(
        {"model": encoder, "in_batch": encoder, "clusters": 2, "pairs_per_second": 1, **values}
    )


def opened(folder, **values):
    return open_cross_encoder(settings(folder, **values), max_length=16, device="cpu")


PAIRS = [(a, b) for a in TEXTS[:6] for b in TEXTS[:6]]


def test_a_cross_encoder_learns_which_pairs_are_relevant(tiny_folder, tmp_path):
    relevant = np.array([b in TEXTS[:3] for _, b in PAIRS])
    labels = relevant.astype(float).tolist()
    pairs, labels = PAIRS * 40, labels * 40
    taught = settings(tiny_folder(), layers=2, learning_rate=5e-3, batch_size=16)
    model = open_cross_encoder(taught, max_length=32, device="cpu")
    assert model.config.num_hidden_layers == 2 and model.max_seq_length == 32
    fine_tune(model, pairs, labels, taught)
    scores = model.predict(PAIRS, show_progress_bar=False)
    assert scores[relevant].mean() > scores[~relevant].mean() + 1
    assert isinstance(model.activation_fn, torch.nn.Identity)  # logits
    again = open_cross_encoder(taught, max_length=32, device="cpu")
    fine_tune(again, pairs, labels, taught)
    np.testing.assert_array_equal(again.predict(PAIRS, show_progress_bar=False), scores)
    again.save_pretrained(str(tmp_path / "model"), create_model_card=False)
    read = open_cross_encoder(taught, max_length=32, device="cpu", folder=tmp_path / "model")
    np.testing.assert_array_equal(read.predict(PAIRS, show_progress_bar=False), scores)


def test_scores_of_a_killed_call_are_not_computed_again(tiny_folder, tmp_path, monkeypatch):
    model = opened(tiny_folder())

    def scored(folder):
        return score_pairs(model, PAIRS.__getitem__, len(PAIRS), folder, shard=10)

    def killed():
        kill_in(model, "predict", 3)
        scored(tmp_path / "killed")

    assert in_child(killed) == "died"
    assert len(list((tmp_path / "killed").glob("*.npz"))) == 2
    calls, predict = [], model.predict
    monkeypatch.setattr(model, "predict", lambda p, **o: calls.append(len(p)) or predict(p, **o))
    resumed, seconds = scored(tmp_path / "killed")
    assert calls == [10, 6] and seconds > 0
    whole, _ = scored(tmp_path / "whole")
    np.testing.assert_array_equal(resumed, whole)
    np.testing.assert_allclose(whole, predict(PAIRS, show_progress_bar=False), atol=1e-5)


def test_scores_that_are_not_finite(tiny_folder, tmp_path):
    model = opened(tiny_folder())
    torch.nn.init.constant_(model.model.classifier.bias, math.nan)
    with pytest.raises(TeacherError, match="4 of 4 scores of the teacher"):
        score_pairs(model, PAIRS.__getitem__, 4, tmp_path)


def test_an_unknown_teacher(tmp_path):
    with pytest.raises(EncoderError, match="unknown encoder 'nothing'"):
        opened("nothing")


# --- published scores ---------------------------------------------------------------------------


@pytest.fixture
def collection():
    queries, passages = Texts(["q1", "q2"], ["a", "b"]), Texts(["10", "20", "30"], ["x", "y", "z"])
    return Collection("small", passages, {"train": queries}, {"train": {}})


TRIPLES = np.array([[0, 0, 1], [1, 2, 0], [0, 0, 2]])
LINES = "1.5\t-2\tq1\t10\t30\n3e0\t.5\tq2\t30\t10\n9.25\t1\tq1\t10\t20\n"


def test_published_scores_are_read_as_they_are(collection, tmp_path):
    path = tmp_path / "scores.tsv.gz"
    path.write_bytes(gzip.compress(LINES.encode()))
    found = read_scores(path, collection, TRIPLES)
    assert found.dtype == np.float32
    assert found.tolist() == [[9.25, 1], [3, 0.5], [1.5, -2]]
    repeated = read_scores(path, collection, TRIPLES[[2, 2, 0]])
    assert repeated.tolist() == [[1.5, -2], [1.5, -2], [9.25, 1]]


@pytest.mark.parametrize(
    "line, fault",
    [
        ("1\t2\tq1\t10", "expected two finite scores"),
        ("1\t2\tq1\t10\t30\t4", "expected two finite scores"),
        ("q1\t10\t30\t1\t2", "expected two finite scores"),
        ("1\tnan\tq1\t10\t30", "expected two finite scores"),
        ("1\t1e39\tq1\t10\t30", "expected two finite scores"),  # as float32
        ("1 2 q1 10 30", "expected two finite scores"),
        ("1\t2\tq9\t10\t30", "no text has the id 'q9'"),
        ("1\t2\tq1\t10\t99", "no text has the id '99'"),
    ],
)
def test_malformed_lines_are_named(collection, tmp_path, line, fault):
    path = tmp_path / "scores.tsv"
    path.write_text(LINES + line + "\n")
    with pytest.raises(DataError, match=rf"scores.tsv:4: {fault}"):
        read_scores(path, collection, TRIPLES)


def test_triples_without_scores_are_counted(collection, tmp_path):
    path = tmp_path / "scores.tsv"
    path.write_text(LINES.splitlines(keepends=True)[0])
    with pytest.raises(TeacherError, match=r"no scores of 2 of 3 triples, first of number 1") as e:
        read_scores(path, collection, TRIPLES)
    assert "q1, 10, 20" in str(e.value)
