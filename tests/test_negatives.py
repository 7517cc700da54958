"""The losses of several negatives a query, and of pairs, against loops written from `book/method.md`."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.base.sampler import BatchSamplers
from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss

from adaptive_margins.losses import CachedMarginLoss, MarginLoss, margin_loss, margins_and_targets
from test_losses import WORDS, assert_equal, gradients, name, tiny_encoder  # noqa: F401

KINDS = [(0.3, False), (0.3, True), ("adaptive", False), ("adaptive", True), ("distributed", False)]
ERRORS = {"squared": torch.square, "absolute": torch.abs, "soft": lambda x: (1 + (-x).exp()).log()}
every_kind = pytest.mark.parametrize(("target", "in_batch"), KINDS)
pairs_kinds = pytest.mark.parametrize(("target", "in_batch"), KINDS[:4])


def embeddings(size, negatives=None, dim=4, seed=0):
    """Query, positive, and negative (B, n, D), or none, in float64 with gradients."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(size, dim)] * 2 + ([(size, negatives, dim)] if negatives else [])
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
        for shape in shapes
    ]


def phi(a, b):
    return torch.dot(a, b) / (a.norm() * b.norm())


def inner_terms(query, positive, negative, target, in_batch, stop_gradient=False):
    """Every l of the definitions, one number at a time."""
    terms = []
    for i, (q, d_pos) in enumerate(zip(query, positive, strict=True)):

        def margin(d_neg, q=q, d_pos=d_pos):
            return phi(q, d_pos) - phi(q, d_neg)

        def scaled(d_neg, d_pos=d_pos):
            if not isinstance(target, str):
                return torch.tensor(target, dtype=torch.float64)
            t = (1 + phi(d_pos, d_neg)) / 2
            return t.detach() if stop_gradient else t

        if negative is None:
            own = every = [d for j, d in enumerate(positive) if j != i]
        else:
            own, every = negative[i], [d_neg for row in negative for d_neg in row]
        if target == "distributed":
            terms += [margin(d_neg) - scaled(other) for d_neg in own for other in every]
        else:
            terms += [margin(d_neg) - scaled(d_neg) for d_neg in (every if in_batch else own)]
    return torch.stack(terms)


def assert_loss_and_gradients(loss, want, parts):
    assert loss.shape == () and loss.dtype == torch.float64
    assert loss.item() == pytest.approx(want.item(), rel=0, abs=1e-12)
    got, expected = (torch.autograd.grad(x, parts, retain_graph=True) for x in (loss, want))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


@every_kind
@pytest.mark.parametrize(("size", "negatives"), [(1, 3), (3, 1), (4, 2)])
def test_several_negatives_are_those_of_the_loops(target, in_batch, size, negatives):
    parts = embeddings(size, negatives)
    terms = inner_terms(*parts, target, in_batch)
    for error, function in ERRORS.items():
        loss = margin_loss(*parts, target=target, in_batch=in_batch, error=error)
        assert_loss_and_gradients(loss, function(terms).mean(), parts)
    stopped = margin_loss(*parts, target=target, in_batch=in_batch, stop_gradient=True)
    terms = inner_terms(*parts, target, in_batch, stop_gradient=True)
    assert_loss_and_gradients(stopped, terms.square().mean(), parts)


@pairs_kinds
@pytest.mark.parametrize("size", [2, 5])
def test_pairs_are_those_of_the_loops(target, in_batch, size):
    parts = embeddings(size)
    terms = inner_terms(*parts, None, target, in_batch)
    for error, function in ERRORS.items():
        loss = margin_loss(*parts, None, target=target, in_batch=in_batch, error=error)
        assert_loss_and_gradients(loss, function(terms).mean(), parts)
    others = [[j for j in range(size) if j != i] for i in range(size)]
    negative = parts[1][torch.tensor(others)]  # the same, as B − 1 negatives of the query's own
    assert_loss_and_gradients(
        margin_loss(*parts, None, target=target, stop_gradient=True),
        margin_loss(*parts, negative, target=target, stop_gradient=True),
        parts,
    )


def test_a_case_worked_by_hand():
    # φ(q_1,d⁺_1) = 1; its negatives have φ 0 and −1 with both of them, so that the margins are 1
    # and 2 and the targets ½ and 0. The positive of another query has φ 0.
    query, positive = torch.eye(2, dtype=torch.float64), 3 * torch.eye(2, dtype=torch.float64)
    negative = torch.tensor([[[0.0, 4.0], [-1.0, 0.0]]], dtype=torch.float64)
    one = (query[:1], positive[:1], negative)
    assert margin_loss(*one, target="adaptive").item() == pytest.approx((0.5**2 + 2**2) / 2)
    assert margin_loss(*one, target=1).item() == pytest.approx(1 / 2)
    distributed = (0.5**2 + 1**2 + 1.5**2 + 2**2) / 4
    assert margin_loss(*one, target="distributed").item() == pytest.approx(distributed)
    assert margin_loss(query, positive, None, target="adaptive").item() == pytest.approx(0.5**2)
    assert margin_loss(query, positive, None, target=0.2).item() == pytest.approx(0.8**2)


def test_shapes_and_columns_of_margins_and_targets():
    query, positive, negative = parts = embeddings(3, 2)
    shapes = {
        (0.3, False): [(3, 2), ()],
        (0.3, True): [(3, 6), ()],
        ("adaptive", False): [(3, 2), (3, 2)],
        ("adaptive", True): [(3, 6), (3, 6)],
        ("distributed", False): [(3, 2, 1), (3, 1, 6)],
    }
    for (target, in_batch), want in shapes.items():
        found = margins_and_targets(*parts, target=target, in_batch=in_batch)
        assert [tuple(values.shape) for values in found] == want
    margins, targets = margins_and_targets(*parts, target="adaptive", in_batch=True)
    margin = phi(query[2], positive[2]) - phi(query[2], negative[1, 0])
    torch.testing.assert_close(margins[2, 1 * 2 + 0], margin)
    for target, shape in ((0.3, ()), ("adaptive", (3, 2))):
        margins, targets = margins_and_targets(query, positive, None, target=target)
        assert (margins.shape, targets.shape) == ((3, 2), shape)
    torch.testing.assert_close(targets[1, 1], (1 + phi(positive[1], positive[2])) / 2)


# What is rejected --------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", [MarginLoss, CachedMarginLoss])
def test_what_is_not_defined_is_rejected(loss):
    pair, several = embeddings(3), embeddings(3, 2)
    columns = [*several[:2], *several[2].unbind(1)]
    model = torch.nn.Identity()
    for data in (pair, columns):
        released = loss(model, target=0.3, orientation="released")
        with pytest.raises(
            ValueError, match=r"orientation is 'released' with .*; expected 'paper'"
        ):
            released.compute_loss_from_embeddings(data)
    with pytest.raises(
        ValueError, match=r'target is "distributed" with .*; expected "adaptive" or'
    ):
        loss(model).compute_loss_from_embeddings(pair)
    with pytest.raises(ValueError, match=r"the batch has 1 of .*; expected at least 2.*drop_last"):
        loss(model, "adaptive").compute_loss_from_embeddings([part[:1] for part in pair])


# In Sentence Transformers ------------------------------------------------------------------------

DATA = {
    "five columns": [{"target": 0.3, "in_batch": True}, {"target": "adaptive"}, {}],
    "pairs": [{"target": 0.3}, {"target": "adaptive"}],
}


def features_of(model, columns):
    """Texts of 1 to 12 words, tokenised."""
    lengths = torch.randint(1, 13, (columns, 7), generator=torch.Generator().manual_seed(columns))
    texts = [[" ".join(WORDS[-length:]) for length in column] for column in lengths.tolist()]
    return [model.preprocess(column) for column in texts]


@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("kind", ["plain", "Matryoshka"])
def test_cached_loss_and_gradients_are_the_uncached_ones(tiny_encoder, data, kind):  # noqa: F811
    model = tiny_encoder().double().train()
    features = features_of(model, 5 if data == "five columns" else 2)
    for settings in DATA[data]:
        found = []
        for inner in (MarginLoss(model, **settings), CachedMarginLoss(model, mini_batch_size=3, **settings)):  # fmt: skip
            loss = inner if kind == "plain" else MatryoshkaLoss(model, inner, [16, 8, 4])
            value = loss([dict(column) for column in features], None)
            value.backward()
            found.append((value.item(), gradients(model)))
        if kind == "plain":
            query, positive, *negatives = (model(dict(f))["sentence_embedding"] for f in features)
            negative = torch.stack(negatives, dim=1) if negatives else None
            want = margin_loss(query, positive, negative, **settings).item()
            assert found[0][0] == pytest.approx(want, rel=0, abs=1e-12)
        assert found[1][0] == pytest.approx(found[0][0], rel=0, abs=1e-12)
        assert_equal(found[1][1], found[0][1], 1e-12)


def test_trains_on_both_in_sentence_transformers(tiny_encoder, tmp_path):  # noqa: F811
    """Two data sets, as MarginMSELoss has them, labels included; their first losses are those of the embeddings."""
    model = tiny_encoder()
    words = list(itertools.permutations(WORDS, 2))
    texts = iter(" ".join(pair) for pair in words)
    names = ("query", "positive", "negative_1", "negative_2", "negative_3")
    tuples = {column: list(itertools.islice(texts, 8)) for column in names}
    pairs = {column: list(itertools.islice(texts, 8)) for column in names[:2]}

    def embedded(columns):
        return [model.encode(column, convert_to_tensor=True) for column in columns.values()]

    query, positive, *negatives = embedded(tuples)
    want = {
        "tuples": margin_loss(query, positive, torch.stack(negatives, dim=1)).item(),
        "pairs": margin_loss(*embedded(pairs), None, target="adaptive").item(),
    }
    data = {
        "tuples": Dataset.from_dict({**tuples, "label": [[0.3, 0.2, 0.1]] * 8}),
        "pairs": Dataset.from_dict(pairs),
    }
    trainer = SentenceTransformerTrainer(
        model=model,
        args=SentenceTransformerTrainingArguments(
            output_dir=str(tmp_path), max_steps=4, per_device_train_batch_size=8, per_device_eval_batch_size=8,
            learning_rate=1e-2, save_strategy="no", report_to="none", use_cpu=True, disable_tqdm=True,
            batch_sampler=BatchSamplers.NO_DUPLICATES,
        ),
        train_dataset=data,
        eval_dataset=data,
        loss={
            "tuples": MarginLoss(model),
            "pairs": CachedMarginLoss(model, target="adaptive", mini_batch_size=3),
        },
    )  # fmt: skip
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    for which, value in want.items():
        assert before[f"eval_{which}_loss"] == pytest.approx(value, abs=2e-4)
        assert np.isfinite(after[f"eval_{which}_loss"])
        assert after[f"eval_{which}_loss"] < value
