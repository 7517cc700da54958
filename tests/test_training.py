"""Training against naive computations: loss, order, schedule, curve, early stopping, clocks, and what a kill leaves."""

from __future__ import annotations

import copy
import gc
import json
import math
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
import weakref
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import psutil
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from torch.utils._python_dispatch import TorchDispatchMode

from adaptive_margins import training
from adaptive_margins.checkpoints import COMPLETE, newest_checkpoint
from adaptive_margins.data.stored import seeded_order
from adaptive_margins.encoder.frozen import hidden_states, upper_layers
from adaptive_margins.encoder.load import open_encoder
from adaptive_margins.encoder.speed import batcher
from adaptive_margins.encoder.tokens import Tokens
from adaptive_margins.errors import ArgumentError
from adaptive_margins.evaluation.measures import Evaluation
from adaptive_margins.losses import margin_loss
from adaptive_margins.paper.reproduction import Reproduction
from adaptive_margins.paper.store import StoredRun
from adaptive_margins.processes import TRY_AGAIN, end_when_asked, ending
from adaptive_margins.profiles.encoders import EncoderSettings
from adaptive_margins.training import TrainingError, train, trainable
from conftest import Bomb, die, flip, in_child, kill_in, linked, run_config

TRIPLES = 40
HOME = ("collections", "cache", "runs")


@pytest.fixture(scope="module")
def material(tiny_folder):
    """A tiny encoder, random texts and triples."""
    rng = np.random.default_rng(5)

    def texts(count: int, longest: int) -> Tokens:
        ids = [[2, *rng.integers(5, 17, size=rng.integers(1, longest)), 3] for _ in range(count)]
        return Tokens(np.concatenate(ids), np.cumsum([0, *map(len, ids)]), 0)

    queries, passages = texts(12, 6), texts(30, 10)
    triples = np.stack(
        [
            rng.integers(12, size=TRIPLES),
            rng.integers(15, size=TRIPLES),
            rng.integers(15, 30, size=TRIPLES),
        ],
        axis=1,
    )
    model = open_encoder(EncoderSettings(base=str(tiny_folder("bert"))), dropout=0.0)
    return SimpleNamespace(queries=queries, passages=passages, triples=triples, model=model)


class Script:
    """An evaluator that says what it was told to, and remembers the weights it saw."""

    def __init__(self, values=(), then=None):
        self.values, self.seen, self.then = list(values), [], then

    def __call__(self, model):
        self.seen.append({k: v.detach().clone() for k, v in trainable(model).items()})
        number = len(self.seen) - 1
        if self.then is not None:
            self.then(number)
        value = self.values[number] if number < len(self.values) else 0.0
        return Evaluation({"nDCG@10": value}, {"nDCG@10": {"q": value, "step": float(number)}})


def measured(model):
    """A measure that depends on the weights, to notice any difference."""
    value = float(sum(p.detach().double().abs().sum() for p in trainable(model).values()))
    return Evaluation({"nDCG@10": value}, {"nDCG@10": {"q": value}})


def run(material, folder, evaluator=None, **values):
    """Train a copy of the tiny model; returns it with the result."""
    names = ("initial", "checkpoint_every", "device", "report_to", "run_name", "on_check", "names")
    options = {k: values.pop(k) for k in names if k in values}
    model = values.pop("model", None) or copy.deepcopy(material.model)
    rows = values.pop("rows", material.triples)
    names = ("query", "positive", "negative")
    triples = Dataset.from_dict(dict(zip(names, rows.T.astype(np.int32), strict=True)))
    result = train(
        run_config(**values), model, triples, material.queries, material.passages, evaluator or Script(),
        folder=folder, **options,
    )  # fmt: skip
    return model, result


def plain_features(material, triples):
    """Three columns, each padded to its own longest text."""
    sets = (material.queries, material.passages, material.passages)
    return [tokens.batch(column) for tokens, column in zip(sets, triples.T, strict=True)]


def texts_of(chunk):
    """The token ids of each text of a padded or packed chunk."""
    if "cu_seq_lens_q" in chunk:
        return chunk["input_ids"][0].split(chunk["cu_seq_lens_q"].diff().tolist())
    rows = zip(chunk["input_ids"], chunk["attention_mask"], strict=True)
    return [ids[mask.bool()] for ids, mask in rows]


@pytest.fixture
def losses(monkeypatch):
    """Every step's loss beside the embeddings it was computed from, each text embedded alone."""
    steps = []
    forward = training.RecordedLoss.forward

    def spy(self, chunks, rows):
        loss = forward(self, chunks, rows)
        vectors = []
        for chunk in chunks:
            for ids in texts_of(chunk):
                one = {"input_ids": ids[None], "attention_mask": torch.ones_like(ids)[None]}
                with torch.no_grad():
                    vectors.append(self.model(one)["sentence_embedding"][0])
        steps.append((loss.item(), list(torch.stack(vectors)[rows])))
        return loss

    monkeypatch.setattr(training.RecordedLoss, "forward", spy)
    return steps


@pytest.fixture
def trainers(monkeypatch):
    """The trainers that were used, and the learning rate of each of their steps."""
    seen = []
    step = training._Trainer.training_step

    def spy(self, *args, **kwargs):
        if self not in seen:
            seen.append(self)
            self.rates = []
        self.rates.append([group["lr"] for group in self.optimizer.param_groups])
        return step(self, *args, **kwargs)

    monkeypatch.setattr(training._Trainer, "training_step", spy)
    return seen


@pytest.fixture
def rows_seen(monkeypatch):
    """The triples in the order in which they were trained on."""
    seen = []
    collate = training.TripleCollator.__call__

    def spy(self, rows):
        seen.extend((r["query"], r["positive"], r["negative"]) for r in rows)
        return collate(self, rows)

    monkeypatch.setattr(training.TripleCollator, "__call__", spy)
    return seen


# ---- loss ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"target": 0.3},
        {"target": 1, "in_batch": True, "error": "soft"},
        {"target": "adaptive", "error": "absolute"},
        {"target": "adaptive", "in_batch": True, "orientation": "released"},
        {"target": "distributed"},
        {"target": "distributed", "orientation": "released", "stop_gradient": True},
    ],
    ids=str,
)
def test_the_loss_is_that_of_the_embeddings(material, tmp_path, losses, settings):
    run(material, tmp_path, triples=12, **settings)
    assert len(losses) == 3
    for loss, columns in losses:
        assert loss == pytest.approx(margin_loss(*columns, **settings).item(), abs=1e-5)


def test_the_softmax_loss_is_sentence_transformers_own(material, tmp_path, losses):
    run(material, tmp_path, loss="softmax", target=None, in_batch=True, triples=4)
    loss, columns = losses[0]
    model = copy.deepcopy(material.model)
    features = plain_features(material, material.triples[seeded_order(TRIPLES, 1)[:4]])
    expected = MultipleNegativesRankingLoss(model)(features, None).item()
    assert loss == pytest.approx(expected, abs=1e-5)
    # And by hand: cosine × 20, all positives and negatives of the batch as choices.
    q, p, n = (torch.nn.functional.normalize(c, dim=-1) for c in columns)
    logits = 20 * q @ torch.cat([p, n]).T
    by_hand = torch.nn.functional.cross_entropy(logits, torch.arange(4)).item()
    assert loss == pytest.approx(by_hand, abs=1e-4)


def test_targets_are_those_of_every_step(material, tmp_path, losses):
    _, result = run(material, tmp_path)
    assert result.targets["step"].tolist() == list(range(1, 8))
    for row, (_, (_, positive, negative)) in zip(result.targets.itertuples(), losses, strict=True):
        similarities = [
            float(p @ n) / math.sqrt(float(p @ p) * float(n @ n))
            for p in positive
            for n in negative
        ]
        expected = (sum(similarities) / 16, min(similarities), max(similarities))
        assert (row.mean, row.min, row.max) == pytest.approx(expected, abs=1e-5)


def test_the_gradient_is_that_of_the_loss(material, tmp_path):
    """One step of Adam from scratch moves each weight by the rate, against the sign of its gradient."""
    model, _ = run(material, tmp_path, triples=4, keep="last", learning_rate=1e-3)
    plain = copy.deepcopy(material.model)
    first = plain_features(material, material.triples[seeded_order(TRIPLES, 1)[:4]])
    margin_loss(*(plain(column)["sentence_embedding"] for column in first)).backward()
    after = dict(model.named_parameters())
    compared = 0
    for name, parameter in plain.named_parameters():
        if parameter.grad is None:
            assert torch.equal(parameter, after[name]), name
            continue
        clear = parameter.grad.abs() > 1e-4  # where Adam's 1e-8 does not matter
        expected = parameter - 1e-3 * parameter.grad.sign()
        np.testing.assert_allclose(
            after[name][clear].detach(), expected[clear].detach(), atol=2e-6, err_msg=name
        )
        compared += int(clear.sum())
    assert compared > 1000


# ---- chunks --------------------------------------------------------------------------------------


LOSSES = [
    *({"target": t, "in_batch": b} for t in (0.3, "adaptive") for b in (False, True)),
    {"target": "distributed"},
    {"target": "distributed", "orientation": "released", "error": "soft", "stop_gradient": True},
    {"loss": "softmax", "target": None, "in_batch": True},
]


@pytest.fixture(scope="module")
def doubles(material):
    """In float64: the tiny model, and its last layer over cached states; with the texts that each reads."""
    model = copy.deepcopy(material.model).double()
    queries, passages = material.queries, material.passages
    texts = queries + passages
    table = np.zeros((texts.offsets[-1], 16))
    hidden_states(model, texts, [2], {2: table})
    numbers = np.arange(len(table))
    start = queries.offsets[-1]
    cached = (
        upper_layers(model, 1, table),
        Tokens(numbers[:start], queries.offsets, 0),
        Tokens(numbers[start:], passages.offsets, 0),
    )
    return {"whole": (model, queries, passages), "upper layer": cached}


def loss_and_gradients(model, loss):
    model.zero_grad()
    loss.backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return loss.item(), found


@pytest.mark.parametrize("settings", LOSSES, ids=str)
def test_chunks_change_neither_loss_nor_gradient(material, doubles, settings):
    """The whole encoder by one loss, its last layer by the next, and so on: a loss sees embeddings alone."""
    encoder = ("whole", "upper layer")[LOSSES.index(settings) % 2]
    model, queries, passages = doubles[encoder]
    config = run_config(**settings)
    distinct = np.stack([np.arange(8), np.arange(8), np.arange(15, 23)], axis=1)
    # A query twice, a passage as positive and as negative, and a whole triple twice.
    repeated = np.array([[0, 1, 16], [0, 2, 1], [3, 1, 17], [4, 5, 2], [4, 5, 2]])
    for triples in (distinct, repeated, distinct[:1]):
        material_ = SimpleNamespace(queries=queries, passages=passages)
        columns = [model(f)["sentence_embedding"] for f in plain_features(material_, triples)]
        if config.loss == "softmax":
            plain = MultipleNegativesRankingLoss(model).compute_loss_from_embeddings(columns, None)
        else:
            plain = margin_loss(*columns, **settings)
        expected, gradients = loss_and_gradients(model, plain)
        assert len(gradients) >= 16
        packed = batcher(model)
        for chunks, layout in ((1, packed), (3, Tokens.batch), (8, packed), (1000, Tokens.batch)):
            rows = [dict(zip(("query", "positive", "negative"), t, strict=True)) for t in triples]
            batch = training.TripleCollator(queries, passages, chunks, layout)(rows)
            texts = len(set(triples[:, 0])) + len(set(triples[:, 1:].ravel()))
            assert sum(len(texts_of(c)) for c in batch["chunks"]) == texts
            assert all(
                ("cu_seq_lens_q" in c) == (layout is not Tokens.batch) for c in batch["chunks"]
            )
            assert len(batch["chunks"]) <= min(chunks, texts)
            loss = training.RecordedLoss(model, config)(batch["chunks"], batch["rows"])
            found, theirs = loss_and_gradients(model, loss)
            assert found == pytest.approx(expected, rel=1e-10, abs=1e-10)
            assert theirs.keys() == gradients.keys()
            for name, gradient in gradients.items():
                np.testing.assert_allclose(theirs[name], gradient, rtol=0, atol=1e-10, err_msg=name)


@pytest.mark.parametrize("layout", [Tokens.batch, None])
def test_a_step_of_more_tokens_has_the_same_gradient_in_less_memory(material, layout):
    """In parts that the backward pass computes again, with the same dropout; in float32."""
    rows = [dict(zip(("query", "positive", "negative"), t, strict=True)) for t in material.triples[:24]]  # fmt: skip
    kept: list[int] = []

    def bytes_of(tensor):
        kept.append(tensor.untyped_storage().nbytes())
        return tensor

    def step(model, most, again=True):
        torch.manual_seed(1)
        collator = training.TripleCollator(
            material.queries, material.passages, 1, layout or batcher(model), most
        )
        batch = collator(rows)
        chunks = len(batch["chunks"])
        kept.clear()
        config = run_config(target="distributed", chunks=1 if again else chunks)
        loss = training.RecordedLoss(model, config)
        with torch.autograd.graph.saved_tensors_hooks(bytes_of, lambda tensor: tensor):
            value = loss(batch["chunks"], batch["rows"])
        memory = sum(kept)
        return chunks, memory, *loss_and_gradients(model, value)

    def alike(one, other):
        assert one[2] == pytest.approx(other[2], rel=1e-5)
        assert one[3].keys() == other[3].keys()
        found, expected = (torch.cat([g.flatten() for g in step[3].values()]) for step in (one, other))  # fmt: skip
        assert (found - expected).norm() < 1e-5 * expected.norm()

    model = copy.deepcopy(material.model).train()
    whole, parts = step(model, 10**6), step(model, 60)
    assert (whole[0], parts[0] > 4) == (1, True)
    assert parts[1] < whole[1] / 2
    alike(parts, whole)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.3
    alike(step(model, 60), step(model, 60, again=False))
    assert abs(step(model, 60)[2] - whole[2]) > 1e-3  # there is dropout


def test_a_step_waits_for_no_number(material, tmp_path, monkeypatch):
    """On a GPU, reading a number of a step makes the host wait; only checks and checkpoints may.

    transformers asks once a forward whether anything is padded, when it makes the mask: that is not ours.
    """
    reading = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default}
    reads, steps = [], []

    class Reads(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function in reading and "masking_utils" not in (
                at := "".join(traceback.format_stack())
            ):
                reads.append(at)
            return function(*args, **(kwargs or {}))

    mode = Reads()
    step, end = training._Trainer.training_step, training._Callback.on_step_end

    def watched_step(self, *args, **kwargs):
        mode.__enter__()
        return step(self, *args, **kwargs)

    def watched_end(self, *args, **kwargs):
        steps.append(len(reads))
        mode.__exit__(None, None, None)
        return end(self, *args, **kwargs)

    monkeypatch.setattr(training._Trainer, "training_step", watched_step)
    monkeypatch.setattr(training._Callback, "on_step_end", watched_end)
    run(material, tmp_path)
    assert len(steps) == 7
    assert not reads, reads[0]


# ---- optimiser -----------------------------------------------------------------------------------


def test_weight_decay_spares_layer_norm_and_bias(material, tmp_path, trainers):
    run(material, tmp_path, weight_decay=0.25)
    names = {id(p): name for name, p in trainers[0].model.named_parameters()}
    decays = {
        names[id(p)]: group["weight_decay"]
        for group in trainers[0].optimizer.param_groups
        for p in group["params"]
    }
    assert len(decays) == len(names)
    assert {v for k, v in decays.items() if "LayerNorm" in k or k.endswith("bias")} == {0.0}
    assert {v for k, v in decays.items() if "LayerNorm" not in k and k.endswith("weight")} == {0.25}


def test_the_rate_decays_by_gamma_a_step(material, tmp_path, trainers):
    run(material, tmp_path, decay=0.9, learning_rate=0.02)
    assert len(trainers[0].rates) == 7
    assert trainers[0].args.max_grad_norm == 0  # no gradient is clipped
    for step, rates in enumerate(trainers[0].rates):
        assert rates == [pytest.approx(0.02 * 0.9**step, rel=1e-12)] * len(rates)


@pytest.mark.parametrize(
    ("optimizer", "precision"),
    [("adamw_torch_fused", "bf16"), ("adamw_torch", "fp32"), ("adamw_8bit", "fp32")],
)
def test_optimisers_train(material, tmp_path, trainers, losses, optimizer, precision):
    values = {"optimizer": optimizer, "precision": precision, "keep": "last", "learning_rate": 1e-3}
    model, _ = run(material, tmp_path, **values)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    kind = type(trainers[0].optimizer.optimizer)
    if optimizer == "adamw_8bit":
        assert kind.__module__.startswith("bitsandbytes")
        assert {a["optim_bits"] for a in [trainers[0].optimizer.optimizer.args.__dict__]} == {8}
    else:
        assert kind is torch.optim.AdamW
        fused = {bool(g["fused"]) for g in trainers[0].optimizer.param_groups}
        assert fused == {optimizer == "adamw_torch_fused"}
    moved = [
        float((a - b).detach().abs().max())
        for a, b in zip(trainable(model).values(), trainable(material.model).values(), strict=True)
    ]
    assert 0 < max(moved) < 0.1
    assert len(losses) == 7 and all(math.isfinite(loss) for loss, _ in losses)


def test_frozen_parameters_stay(material, tmp_path):
    model = copy.deepcopy(material.model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad = "layer.2." in name
    trained, _ = run(material, tmp_path, model=model, keep="last", weight_decay=0.5)
    for (name, before), after in zip(
        material.model.named_parameters(), trained.parameters(), strict=True
    ):
        unused = "layer.2." not in name
        assert torch.equal(before, after) == unused, name


# ---- order ---------------------------------------------------------------------------------------


def test_the_order_depends_on_the_seed_alone(material, tmp_path, rows_seen):
    orders = {}
    for number, (seed, values) in enumerate(
        [
            (1, {}),
            (1, {"target": 0.5, "in_batch": True, "learning_rate": 1e-4, "evaluate_every": 3}),
            (1, {"batch_size": 7, "evaluate_every": 0}),
            (1, {"loss": "softmax", "target": None, "in_batch": True}),
            (2, {}),
        ]
    ):
        rows_seen.clear()
        torch.manual_seed(number)
        np.random.seed(number)
        run(material, tmp_path / str(number), seed=seed, **values)
        orders[number] = (seed, list(rows_seen))
    expected = {
        seed: [tuple(r) for r in material.triples[seeded_order(TRIPLES, seed)]] for seed in (1, 2)
    }
    assert expected[1] != expected[2]
    for seed, order in orders.values():
        assert order == expected[seed][:28]


# ---- curve, early stopping, what is kept ---------------------------------------------------------


@pytest.mark.parametrize(("every", "steps"), [(0, [0, 7]), (1, [*range(8)]), (3, [0, 3, 6, 7])])
def test_evaluations_are_every_k_steps_and_at_the_end(material, tmp_path, every, steps):
    script = Script(range(10))
    _, result = run(material, tmp_path, script, evaluate_every=every)
    assert result.curve["step"].tolist() == steps
    assert result.curve["triples"].tolist() == [4 * s for s in steps]
    assert result.curve["nDCG@10"].tolist() == list(range(len(steps)))
    assert list(result.curve.columns) == ["step", "triples", "seconds", "nDCG@10"]
    assert list(result.checks.columns) == ["step", "qid", "measure", "value"]
    means = result.checks.groupby("step")["value"].mean()  # of whatever queries there are
    assert means.to_dict() == dict(zip(steps, result.curve["nDCG@10"], strict=True))
    assert len(script.seen) == len(steps)
    assert (result.stop_step, result.triples) == (7, 28)


def test_a_known_start_is_not_evaluated_again(material, tmp_path):
    script = Script([1.0] * 9)
    start = Evaluation({"nDCG@10": 5.0}, {"nDCG@10": {"q": 5.0}})
    model, result = run(material, tmp_path, script, initial=start)
    assert len(script.seen) == 4
    assert result.curve["nDCG@10"].tolist() == [5.0, 1.0, 1.0, 1.0, 1.0]
    assert result.kept == start
    assert (result.best_step, result.kept_step) == (0, 0)
    same(trainable(model), trainable(material.model))


def same(a, b, tolerance=0.0):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_allclose(
            a[name].detach(), b[name].detach(), rtol=0, atol=tolerance, err_msg=name
        )


@pytest.mark.parametrize(
    ("values", "patience", "stop", "best"),
    [  # evaluations at steps 0, 1, 2, …, 7
        ([5, 4, 3, 2, 1, 0, 0, 0], 2, 2, 0),
        ([0, 5, 4, 6, 5, 5, 9, 9], 2, 5, 3),
        ([0, 5, 5, 5, 5, 9, 9, 9], 3, 4, 1),  # equal is no gain, the first of equals is kept
        ([0, 1, 0, 0, 0, 0, 0, 2], 0, 7, 7),  # 0: no early stopping
        ([0, 1, 0, 0, 0, 0, 0, 0], 6, 7, 1),
        ([1, 0, 0, 0, 0, 0, 0, 0], 1, 1, 0),
    ],
    ids=str,
)
def test_early_stopping_and_the_best_state(material, tmp_path, values, patience, stop, best):
    script = Script(values)
    model, result = run(
        material, tmp_path, script, evaluate_every=1, patience=patience, checkpoint_every=2
    )
    assert (result.stop_step, result.best_step, result.kept_step) == (stop, best, best)
    assert result.curve["step"].tolist() == list(range(stop + 1))
    assert len(result.targets) == stop
    assert result.triples == 4 * stop
    assert result.kept.mean == {"nDCG@10": values[best]}
    assert result.kept.per_query["nDCG@10"] == {"q": values[best], "step": best}
    same(trainable(model), script.seen[best])
    if best:
        assert not torch.equal(
            *(s["0.model.encoder.layer.0.output.dense.weight"] for s in script.seen[best - 1 : best + 1])
        )  # fmt: skip
    else:
        same(trainable(model), trainable(material.model))


@pytest.mark.parametrize(
    ("values", "killed"),
    [([0, 5, 4, 3, 9, 9, 9, 9], True), ([5, 4, 3, 9, 1, 0, 0, 0], False), (range(8), True)],
)
def test_a_run_that_goes_on_selects_what_a_stopped_one_does(material, tmp_path, values, killed):
    settings = {"evaluate_every": 1, "patience": 2, "checkpoint_every": 2}
    stopped, expected = run(material, tmp_path / "a", Script(values), **settings)
    script = Script(values)
    if killed:  # past the stop, and resumed

        def interrupt(number):
            if number == 6 and len(script.seen) == 7:
                raise KeyboardInterrupt

        script.then = interrupt
        with pytest.raises(KeyboardInterrupt):
            run(material, tmp_path / "b", script, **settings, stop_early=False)
        script = Script(values[5:])
    model, found = run(material, tmp_path / "b", script, **settings, stop_early=False)
    names = ("stop_step", "best_step", "kept_step", "triples")
    assert [getattr(found, n) for n in names] == [getattr(expected, n) for n in names]
    assert found.kept.mean == expected.kept.mean
    same(trainable(model), trainable(stopped))
    same(found.states["selected"], trainable(stopped))
    same(found.states["last"], script.seen[-1])
    assert found.curve["step"].tolist() == list(range(8))
    assert len(found.targets) == 7
    seconds = dict(zip(found.curve["step"], found.curve["seconds"], strict=True))
    assert found.train_seconds == seconds[found.stop_step]


def test_keep_last(material, tmp_path):
    script = Script([0, 9, 1, 2, 3])
    model, result = run(material, tmp_path, script, keep="last")
    assert (result.best_step, result.kept_step) == (2, 7)
    assert result.kept.mean == {"nDCG@10": 3}
    same(trainable(model), script.seen[-1])


def test_the_clocks_of_training_and_evaluation_are_kept_apart(material, tmp_path, monkeypatch):
    script = Script(range(9), then=lambda number: time.sleep(0.05))
    save = training._Trainer._save_checkpoint

    def slow(self, *args):
        time.sleep(0.05)
        save(self, *args)

    monkeypatch.setattr(training._Trainer, "_save_checkpoint", slow)
    since = time.perf_counter()
    told = {"on_check": lambda curve: time.sleep(0.05)}  # five times, as evaluations; in no clock
    _, result = run(material, tmp_path, script, checkpoint_every=2, **told)
    whole = time.perf_counter() - since
    assert 0.25 <= result.eval_seconds <= whole - 0.4  # three checkpoints
    assert 0 < result.train_seconds <= whole - 0.65
    seconds = result.curve["seconds"].tolist()
    assert seconds[0] == 0
    assert seconds == sorted(seconds)
    assert seconds[-1] == result.train_seconds
    assert result.peak_bytes > 50e6


# ---- reporting -----------------------------------------------------------------------------------


def scalars(folder):
    """TensorBoard's scalars in a folder: name → [(step, value)]."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    found = events.Tags()["scalars"]
    return {name: [(e.step, e.value) for e in events.Scalars(name)] for name in found}


def test_tensorboard_gets_what_the_run_keeps(material, tmp_path, losses, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where TensorBoard's own default would be
    values = {"evaluate_every": 3, "decay": 0.5, "dropout": 0.2}
    plain_model, plain = run(material, tmp_path / "plain", measured, **values)
    assert not list((tmp_path / "plain").glob("**/events.*"))
    losses.clear()
    model, result = run(
        material, tmp_path / "told", measured, **values,
        report_to=["tensorboard", "tensorboard"], run_name="of a test", on_check=lambda curve: None,
    )  # fmt: skip
    same(trainable(model), trainable(plain_model))
    pd.testing.assert_frame_equal(result.targets, plain.targets)

    assert sorted(p.name for p in tmp_path.iterdir()) == ["plain", "told"]
    found = scalars(tmp_path / "told" / "tensorboard")
    assert found["train/loss"] == [
        (step, pytest.approx(loss, rel=1e-5)) for step, (loss, _) in enumerate(losses, start=1)
    ]
    assert found["train/learning_rate"] == [
        (step, pytest.approx(1e-2 * 0.5 ** (step - 1), rel=1e-6)) for step in range(1, 8)
    ]
    curve = result.curve
    assert curve["step"].tolist() == [0, 3, 6, 7]
    assert curve["nDCG@10"].nunique() == 4
    assert found["eval/nDCG@10"] == [
        (step, np.float32(value)) for step, value in zip(curve["step"], curve["nDCG@10"], strict=True)
    ]  # fmt: skip


def test_tensorboard_has_its_own_variable(material, tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "mine"))
    run(material, tmp_path / "run", measured, report_to=["tensorboard"])
    assert [step for step, _ in scalars(tmp_path / "mine")["eval/nDCG@10"]] == [0, 2, 4, 6, 7]
    assert not list((tmp_path / "run").glob("**/events.*"))


def test_the_curve_is_told_at_every_check_and_when_a_run_is_resumed(material, tmp_path):
    told = []

    def on_check(curve):
        told.append(curve.drop(columns="seconds").to_dict("records"))
        curve.loc[:, "nDCG@10"] = -1.0  # it is theirs to change

    values = {"evaluate_every": 3, "checkpoint_every": 6, "on_check": on_check}
    values["report_to"] = ["tensorboard"]
    _, result = run(material, tmp_path, Script([1, 2, 3, 4]), **values)
    rows = [
        {"step": step, "triples": 4 * step, "nDCG@10": value}
        for step, value in zip([0, 3, 6, 7], [1, 2, 3, 4], strict=True)
    ]
    assert told == [rows[:1], rows[:2], rows[:3], rows]
    assert result.curve["nDCG@10"].tolist() == [1, 2, 3, 4]

    told.clear()
    run(material, tmp_path, Script([5]), **values)  # from the checkpoint of step 6
    assert told == [rows[:3], [*rows[:3], {**rows[3], "nDCG@10": 5}]]
    steps = [step for step, _ in scalars(tmp_path / "tensorboard")["eval/nDCG@10"]]
    assert (steps.count(0), steps.count(3)) == (1, 1)


def test_the_trainer_knows_all_reporters():
    from transformers.integrations import get_reporting_integration_callbacks

    assert len(get_reporting_integration_callbacks(list(training.REPORTERS))) == 4


@pytest.mark.parametrize("name", training.REPORTERS)
def test_a_reporter_that_is_not_installed_is_named_first(material, tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    script = Script()
    with pytest.raises(TrainingError, match=f"report to '{name}'.*: pip install {name}$"):
        run(material, tmp_path, script, report_to=[name])
    assert not script.seen
    assert not list(tmp_path.iterdir())


def test_a_reporter_that_is_half_installed(material, tmp_path, monkeypatch):
    (tmp_path / "trackio.py").write_text("import no_such_thing")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "trackio", raising=False)
    with pytest.raises(TrainingError, match="'trackio' cannot be used: No module named 'no_such_"):
        run(material, tmp_path / "run", report_to=["trackio"])
    assert not (tmp_path / "run").exists()


def test_an_unknown_reporter(material, tmp_path):
    script = Script()
    for name in ("all", "none", "", "TensorBoard"):
        expected = f"cannot report to '{name}'; expected any of tensorboard, wandb, mlflow, trackio"
        with pytest.raises(ArgumentError, match=expected):
            run(material, tmp_path, script, report_to=["tensorboard", name])
    assert not script.seen
    assert not list(tmp_path.iterdir())


# ---- what cannot go on ---------------------------------------------------------------------------


@pytest.mark.parametrize(("rate", "step"), [(1e30, 2), (1e39, 1)])  # the loss, or a parameter
def test_what_is_not_finite_names_run_settings_and_texts(material, tmp_path, rate, step):
    config = run_config(learning_rate=rate, target=0.4)
    names = [f"q{i}" for i in range(12)], [f"d{i}" for i in range(30)]
    with pytest.raises(TrainingError) as error:
        run(material, tmp_path, learning_rate=rate, target=0.4, checkpoint_every=1, names=names)
    said = str(error.value)
    for word in (config.run_id, "tiny", "target 0.4", f"after step {step} ", "try a smaller rate"):
        assert word in said
    rows = material.triples[seeded_order(TRIPLES, config.seed)[4 * step - 4 : 4 * step]]
    assert said.endswith("; ".join(f"q{q} d{p} d{n}" for q, p, n in rows))
    if step == 1:
        assert newest_checkpoint(tmp_path) is None


def test_damage_to_parameters_is_in_no_checkpoint(uninterrupted, tmp_path, monkeypatch):
    go, (expected_model, expected) = uninterrupted
    original, calls = training._Trainer.training_step, []

    def harmful(self, model, *arguments, **values):
        loss = original(self, model, *arguments, **values)
        calls.append(1)
        if len(calls) == 6:
            next(p for p in model.parameters() if p.grad is not None).grad.fill_(math.nan)
        return loss

    with monkeypatch.context() as patch:
        patch.setattr(training._Trainer, "training_step", harmful)
        with pytest.raises(TrainingError, match="a parameter is not finite after step 6"):
            go(tmp_path)
    assert newest_checkpoint(tmp_path).name == "checkpoint-4"
    model, result = go(tmp_path)
    same(trainable(model), trainable(expected_model))
    assert result.kept == expected.kept


def test_a_gpu_that_lacks_memory(material, tmp_path, monkeypatch):
    def lacking(*_, **__):
        raise torch.cuda.OutOfMemoryError("Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(training._Trainer, "training_step", lacking)
    with pytest.raises(TrainingError) as error:
        run(material, tmp_path)
    for word in (run_config().run_id, "step of 4 triples", "CachedMarginLoss", "2.00 GiB"):
        assert word in str(error.value)


def test_too_few_triples(material, tmp_path):
    for triples, rows in ((44, TRIPLES), (28, 27), (28, 0)):
        with pytest.raises(
            TrainingError, match=f"{triples} triples in batches of 4, .* are {rows}"
        ):
            run(material, tmp_path, rows=material.triples[:rows], triples=triples)
    with pytest.raises(TrainingError, match="has 3 triples, fewer than its batch size, 4"):
        run(material, tmp_path, triples=3)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_in_a_checkpoint(material, tmp_path):
    def fill():
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        run(material, tmp_path, checkpoint_every=2)

    told = in_child(fill)
    assert told.startswith(f"TrainingError: run {run_config().run_id}: {tmp_path / 'checkpoint-2'}")
    assert "could not be written" in told
    assert not list(tmp_path.glob("checkpoint-*"))


# ---- killed and resumed --------------------------------------------------------------------------


def kill_before_the_mark_of(name):
    """All of a checkpoint is written and older ones are removed, but it is not marked as complete."""

    def deadly(file):
        if Path(f"/proc/self/fd/{file}").readlink().parent.name == name:
            die()

    os.fsync = deadly


@pytest.fixture(scope="module")
def uninterrupted(material, tiny_folder, tmp_path_factory):
    """A training run as a function of its folder, and what it gives."""
    dropout = 0.2  # so that the state of the random numbers counts, too
    settings = EncoderSettings(base=str(tiny_folder("bert")))
    values = {
        "evaluate_every": 2, "patience": 3, "decay": 0.95, "weight_decay": 0.1, "dropout": dropout, "checkpoint_every": 2,
    }  # fmt: skip

    def go(folder):
        model = open_encoder(settings, dropout=dropout)
        return run(material, folder, measured, model=model, **values)

    return go, go(tmp_path_factory.mktemp("uninterrupted") / "run")


def ended_alike(found, expected):
    """Two trainings: models and results, but for clocks."""
    (model, result), (other_model, other) = found, expected
    same(trainable(model), trainable(other_model))
    columns = ["step", "triples", "nDCG@10"]
    pd.testing.assert_frame_equal(result.curve[columns], other.curve[columns])
    pd.testing.assert_frame_equal(result.targets, other.targets)
    for name in ("best_step", "kept_step", "stop_step", "triples", "kept"):
        assert getattr(result, name) == getattr(other, name)
    seconds = result.curve["seconds"].tolist()
    assert seconds == sorted(seconds)


@pytest.mark.parametrize(
    ("moment", "resumed_from"),
    [
        (lambda: kill_in(training._Trainer, "training_step", 6), 4),
        (lambda: kill_in(training._Trainer, "_save_rng_state", 1), None),  # a checkpoint is half-written
        (lambda: kill_in(training._Trainer, "_save_rng_state", 3), 4),
        (lambda: kill_in(training._Trainer, "evaluate", 2), 2),
        (lambda: kill_before_the_mark_of("checkpoint-6"), 4),
    ],
    ids=["step", "half of the first", "half of the third", "evaluation", "mark"],
)  # fmt: skip
def test_a_killed_run_ends_as_an_uninterrupted_one(uninterrupted, tmp_path, moment, resumed_from):
    go, expected = uninterrupted

    def killed():
        moment()
        go(tmp_path / "killed")

    assert in_child(killed) == "died"
    checkpoint = newest_checkpoint(tmp_path / "killed")
    assert (checkpoint and checkpoint.name) == (resumed_from and f"checkpoint-{resumed_from}")
    ended_alike(go(tmp_path / "killed"), expected)


@pytest.mark.parametrize(("name", "step"), [("SIGTERM", 5), ("SIGUSR1", 6)])
def test_a_run_that_is_asked_to_end_does_so_after_a_checkpoint(uninterrupted, tmp_path, name, step):
    go, expected = uninterrupted
    original, calls = training._Trainer.training_step, []

    def asking(*arguments, **values):
        calls.append(1)
        if len(calls) == step:
            os.kill(os.getpid(), getattr(signal, name))
        return original(*arguments, **values)

    def asked():
        end_when_asked()
        training._Trainer.training_step = asking
        go(tmp_path / "asked")

    process = multiprocessing.get_context("fork").Process(target=asked)
    process.start()
    process.join()
    assert process.exitcode == TRY_AGAIN == 75
    assert newest_checkpoint(tmp_path / "asked").name == f"checkpoint-{step}"
    ended_alike(go(tmp_path / "asked"), expected)


def test_workers_are_asked_too_and_waited_for(tmp_path):
    fork = multiprocessing.get_context("fork")

    def worker(training):
        end_when_asked()
        ending.training = training
        (tmp_path / f"began-{training}").touch()
        while not ending.asked:
            time.sleep(0.01)
        (tmp_path / "checkpoint").touch()

    def parent():
        for trains in (True, False):
            fork.Process(target=worker, args=(trains,)).start()
        end_when_asked()
        while len(list(tmp_path.glob("began-*"))) < 2:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    process = fork.Process(target=parent)
    process.start()
    process.join(30)
    assert process.exitcode == TRY_AGAIN
    assert (tmp_path / "checkpoint").is_file()


def test_a_damaged_checkpoint_is_not_resumed_from(uninterrupted, tmp_path, capsys):
    go, expected = uninterrupted

    def killed():
        kill_in(training._Trainer, "training_step", 7)
        go(tmp_path / "run")

    assert in_child(killed) == "died"
    checked = ["sha256sum", "--strict", "-c", "--quiet", COMPLETE]
    subprocess.run(checked, cwd=tmp_path / "run" / "checkpoint-6", check=True)
    for number, (name, resumed_from) in enumerate([
        ("checkpoint-6/model.safetensors", "checkpoint-4"),
        ("checkpoint-6/COMPLETE", "checkpoint-4"),
        ("progress/6.json", "checkpoint-4"),
        ("checkpoint-6/optimizer.pt", "checkpoint-4"),
        ("progress/4.json", None),  # both checkpoints need it
    ]):  # fmt: skip
        folder = shutil.copytree(tmp_path / "run", tmp_path / str(number))
        flip(folder / name, 30)
        checkpoint = newest_checkpoint(folder)
        assert (checkpoint and checkpoint.name) == resumed_from
        assert "was changed or damaged" in capsys.readouterr().err
        if number >= 3:
            ended_alike(go(folder), expected)


def test_a_step_of_early_stopping_is_not_resumed_past(material, tmp_path):
    """Killed after it stopped but before it was stored, a run stops at the same step again."""
    values = {"evaluate_every": 2, "patience": 1, "checkpoint_every": 2}
    results = [run(material, tmp_path, Script([5, 6, 4, 9, 9]), **values)[1]]
    assert newest_checkpoint(tmp_path).name == "checkpoint-2"
    results.append(run(material, tmp_path, Script([4, 9, 9]), **values)[1])
    assert [r.stop_step for r in results] == [4, 4]
    assert [r.best_step for r in results] == [2, 2]


class Ranking(dict):
    """A ranking that can be referred to weakly."""


@dataclass(frozen=True)
class Reranked(Evaluation):
    ranking: Ranking


@pytest.mark.parametrize("keep", ["best", "last"])
def test_only_the_rankings_of_the_best_and_the_last_evaluation_stay_in_memory(
    material, tmp_path, keep
):
    values, alive, most = [3, 1, 4, 1, 5, 9, 2, 6], weakref.WeakSet(), []

    class Kept(Ranking):
        __hash__ = object.__hash__

    def evaluator(model):
        gc.collect()
        most.append(len(alive))
        value, ranking = values[len(most) - 1], Kept({"q": {"d": 1.0}})
        alive.add(ranking)
        return Reranked({"nDCG@10": value}, {"nDCG@10": {"q": value}}, ranking)

    _, result = run(material, tmp_path, evaluator, evaluate_every=1, keep=keep, checkpoint_every=3)
    assert len(most) == 8
    assert max(most) <= 2
    assert result.kept.mean["nDCG@10"] == (9 if keep == "best" else 6)
    assert isinstance(result.kept, Reranked)
    gc.collect()
    assert set(alive) == {result.kept.ranking}


def test_a_checkpoint_writes_only_what_is_new(material, tmp_path):
    """Progress files are not rewritten; a checkpoint has a checksum more than the one before it."""
    values = {"evaluate_every": 1, "checkpoint_every": 1, "triples": 40}
    _, result = run(material, tmp_path, measured, **values, report_to=["tensorboard"])
    parts = [
        json.loads((tmp_path / "progress" / f"{step}.json").read_text()) for step in range(1, 10)
    ]
    assert [len(p["similarities"]) for p in parts] == [1] * 9
    assert [[e["step"] for e in p["evaluations"]] for p in parts] == [
        [0, 1],
        *([n] for n in range(2, 10)),
    ]
    written = [row for p in parts for row in p["similarities"]]
    np.testing.assert_array_equal(written, result.targets[["mean", "min", "max"]].to_numpy()[:9])
    sizes = {(c / "progress.json").stat().st_size for c in tmp_path.glob("checkpoint-*")}
    assert max(sizes) < 400 + 100 * len(parts)
    state = json.loads((tmp_path / "checkpoint-9" / "trainer_state.json").read_text())
    assert (state["global_step"], state["log_history"]) == (9, [])


def test_a_checkpoint_of_somebody_else_runs_no_code(material, tmp_path):
    folder, flag = tmp_path / "work", tmp_path / "executed"
    run(material, folder, checkpoint_every=3)
    checkpoint = newest_checkpoint(folder)
    names = {file.name for file in checkpoint.iterdir() if file.suffix in (".pt", ".pth", ".bin")}
    assert names == {"optimizer.pt", "scheduler.pt", "rng_state.pth"}
    for name in sorted(names):
        before = (checkpoint / name).read_bytes()
        torch.save(Bomb(flag), checkpoint / name)
        (checkpoint / COMPLETE).write_text("")  # no checksums
        with pytest.raises(TrainingError, match="checkpoint-6 has more than tensors"):
            run(material, folder, checkpoint_every=3)
        assert not flag.exists()
        (checkpoint / name).write_bytes(before)


def same_run(a: StoredRun, b: StoredRun):
    """Equal but for clocks and memory."""
    assert a.config == b.config
    own = {"train_seconds", "eval_seconds", "peak_bytes", "index", "finished"}
    assert {k: v for k, v in a.result.items() if k not in own} == {
        k: v for k, v in b.result.items() if k not in own
    }
    pd.testing.assert_frame_equal(a.curve.drop(columns="seconds"), b.curve.drop(columns="seconds"))
    pd.testing.assert_frame_equal(a.targets, b.targets)
    names = [{p.name for p in r.path.iterdir()} - {"SHA256SUMS"} for r in (a, b)]  # b may be older
    assert names[0] == names[1]
    for file in a.path.glob("*.run.gz"):
        assert file.read_bytes() == (b.path / file.name).read_bytes()


def test_a_killed_run_of_a_profile_leaves_nothing_that_looks_finished(smoke, tmp_path):
    config = smoke.experiments.variant_run("minilm-4", "distributed", False)
    assert config.save_model
    home = linked(smoke.home, tmp_path / "home", *HOME, without=[config.run_id])
    other = Reproduction(smoke.profile, home)
    assert not other.store.has(config)
    checkpoints = home / "cache" / "work" / config.run_id
    other.inputs.encoder(config.encoder)  # once, before processes are forked

    def killed():
        kill_in(training._Trainer, "training_step", 4)
        other.runner.execute(config)

    assert in_child(killed) == "died"
    assert newest_checkpoint(checkpoints).name == "checkpoint-2"
    assert not other.store.has(config)

    def killed_while_storing():
        import adaptive_margins.paper.store as store

        store.write_run = lambda *_: die()
        other.runner.execute(config)

    before = {p.name for p in (home / "runs").iterdir()}
    assert in_child(killed_while_storing) == "died"
    assert not other.store.has(config)
    assert {p.name for p in (home / "runs").glob("[!.]*")} == before
    assert checkpoints.is_dir()

    stored = other.runner.execute(config)
    assert not checkpoints.exists()
    expected = smoke.store.get(config)
    same_run(stored, expected)
    same(*(load_file(r.path / "model" / "model.safetensors") for r in (stored, expected)), 1e-6)


def test_workers_end_with_their_parent_and_the_rest_is_made_later(smoke, tmp_path, forked_workers):
    removed = smoke.experiments.figure4_runs()[:3]
    ids = {c.run_id for c in removed}
    home = linked(smoke.home, tmp_path / "home", *HOME, without=ids)
    two = Reproduction(smoke.profile.model_copy(update={"workers": 2}), home)
    forked = multiprocessing.get_context("fork").Process(target=two.runner.ensure, args=(removed,))
    forked.start()
    parent = psutil.Process(forked.pid)
    runs = home / "runs"
    deadline = time.monotonic() + 200
    while not any((runs / i).exists() for i in ids):
        assert forked.is_alive()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    workers = parent.children(recursive=True)
    assert len(workers) >= 2
    parent.kill()
    forked.join()
    _, alive = psutil.wait_procs(workers, timeout=20)
    assert not alive
    made = {i: (runs / i).stat().st_mtime_ns for i in ids if (runs / i).exists()}
    assert 0 < len(made) < len(ids)
    for path in runs.glob("[!.]*"):
        stored = StoredRun(path)
        assert stored.config.run_id == path.name
        assert stored.result

    Reproduction(smoke.profile, home).runner.ensure(removed)
    assert {i: (runs / i).stat().st_mtime_ns for i in made} == made
    for config in removed:
        same_run(StoredRun(runs / config.run_id), smoke.store.get(config))


@pytest.mark.parametrize("device", ["cuda", "cuda:2"])
def test_of_several_gpus_the_named_one_trains_on_the_whole_batch(
    material, tmp_path, monkeypatch, device
):
    """The trainer would give each GPU in sight a whole batch, and take the first of them."""
    made, seen, current = training.SentenceTransformerTrainingArguments, [], []

    def on_four(**values):
        arguments = made(**values)
        arguments._n_gpu = 4
        return arguments

    def stop(self, *_, **values):
        seen.append(values["args"])
        raise InterruptedError

    monkeypatch.setattr(training, "SentenceTransformerTrainingArguments", on_four)
    monkeypatch.setattr(training._Trainer, "__init__", stop)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    with pytest.raises(InterruptedError):
        run(material, tmp_path, device=device)
    assert seen[0].train_batch_size == 4
    if device != "cuda":
        assert (str(seen[0].device), current) == (device, [device])
