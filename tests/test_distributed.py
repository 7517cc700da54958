"""Losses over the triples of several processes, on the CPU with gloo: equal to one process with all of them."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import socket
import sys
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from datasets import Dataset
from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from adaptive_margins.checkpoints import Progress, newest_checkpoint
from adaptive_margins.distributed import gathered
from adaptive_margins.errors import TrainingError
from adaptive_margins.losses import CachedMarginLoss, MarginLoss, margin_loss
from conftest import TEXTS
from test_training import Script, material, measured, run  # noqa: F401

SETTINGS = [
    {"target": 0.3, "in_batch": False},
    {"target": 0.3, "in_batch": True},
    {"target": "adaptive", "in_batch": False},
    {"target": "adaptive", "in_batch": True, "orientation": "released", "error": "soft"},
    {"target": "distributed"},
    {"target": "distributed", "orientation": "released", "stop_gradient": True},
]
CASES = [(3, settings) for settings in SETTINGS]
CASES += [(5, settings) for settings in SETTINGS[1:3]]  # three negatives
CASES += [(5, {"target": "distributed"}), (2, {"target": "adaptive"})]
"""Columns and settings; two columns are pairs."""
SIZES = [3, 3, 3, 1]
"""Triples of each of four processes; the last batch of an epoch is smaller."""


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


def on_ranks(number: int, work) -> list[Any]:
    """What ``work(rank)`` returns on each of some processes that `torch.distributed` connects, as torchrun would."""
    context = multiprocessing.get_context("fork")
    results, port = context.SimpleQueue(), str(free_port())

    def start(rank: int) -> None:
        os.environ |= dict.fromkeys(("RANK", "LOCAL_RANK"), str(rank))
        os.environ |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(number))
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        # What an earlier training in this process has found out: each rank would be the first.
        AcceleratorState._reset_state(reset_partial_state=True)
        try:
            torch.distributed.init_process_group("gloo")
            results.put((rank, pickle.dumps(work(rank)), ""))
        except BaseException as error:
            results.put((rank, None, f"rank {rank}: {type(error).__name__}: {error}"))
        os._exit(0)

    processes = [context.Process(target=start, args=(rank,)) for rank in range(number)]
    for process in processes:
        process.start()
    found = sorted(results.get() for _ in processes)
    for process in processes:
        process.join()
    return [error or pickle.loads(value) for _, value, error in found]


def test_loss_and_gradients_are_those_of_one_process():
    """Each query and positive against the negatives of all ranks; gradients as DDP averages them, in 64-bit floats."""
    generator = torch.Generator().manual_seed(3)
    texts = torch.randn(5, sum(SIZES), 6, generator=generator, dtype=torch.float64)
    encoder = nn.Linear(6, 4).double()

    def work(rank):
        found = []
        model = DistributedDataParallel(encoder)
        for columns, settings in CASES:
            model.zero_grad()
            own = model(texts[:columns, sum(SIZES[:rank]) : sum(SIZES[: rank + 1])])
            loss = MarginLoss(encoder, gather_across_devices=True, **settings)
            value = loss.compute_loss_from_embeddings(list(own))
            value.backward()
            found.append([value.item(), *(p.grad.numpy() for p in encoder.parameters())])
        return found

    for found in on_ranks(len(SIZES), work):
        for (columns, settings), (value, *gradients) in zip(CASES, found, strict=True):
            encoder.zero_grad()
            query, positive, *negatives = encoder(texts[:columns])
            negative = torch.stack(negatives, dim=1).squeeze(1) if negatives else None
            want = margin_loss(query, positive, negative, **settings)
            want.backward()
            assert value == pytest.approx(want.item(), rel=1e-13)
            for gradient, parameter in zip(gradients, encoder.parameters(), strict=True):
                torch.testing.assert_close(
                    torch.from_numpy(gradient), parameter.grad, rtol=1e-11, atol=1e-13
                )


def test_rows_of_all_processes_in_the_order_of_their_ranks():
    def work(rank):
        return gathered(torch.full((SIZES[rank], 2), float(rank))).tolist()

    want = [[float(rank)] * 2 for rank, size in enumerate(SIZES) for _ in range(size)]
    assert on_ranks(4, work) == [want] * 4
    vectors = torch.randn(3, 2)
    assert gathered(vectors) is vectors  # one process needs no distribution


def test_the_trainer_on_two_processes_trains_as_on_one(tiny_folder, tmp_path):
    """Sentence Transformers' trainer under torchrun; the processes' batches together are that of one process."""
    from sentence_transformers import SentenceTransformer

    folder, texts = str(tiny_folder("bert")), [text for text in TEXTS if text]
    columns = {
        name: [texts[(i * step + i // 3) % len(texts)] for i in range(16)]
        for name, step in (("query", 1), ("positive", 2), ("negative", 3))
    }

    def trained(batch_size: int, place: str) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        model = SentenceTransformer(folder, device="cpu")
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        arguments = SentenceTransformerTrainingArguments(
            output_dir=str(tmp_path / place), per_device_train_batch_size=batch_size, max_steps=2,
            learning_rate=0.05, optim="sgd", lr_scheduler_type="constant", max_grad_norm=0.0,
            use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True,
            accelerator_config={"use_seedable_sampler": True},
        )  # fmt: skip
        settings = {"target": "distributed", "gather_across_devices": True}
        loss = CachedMarginLoss(model, mini_batch_size=3, **settings)
        trainer = SentenceTransformerTrainer(
            model=model, args=arguments, train_dataset=Dataset.from_dict(columns), loss=loss
        )
        trainer.train()
        return {name: p.detach().clone() for name, p in model.named_parameters()}

    alone = trained(8, "alone")
    start = dict(SentenceTransformer(folder, device="cpu").named_parameters())
    assert any(not torch.equal(alone[name], start[name]) for name in alone)

    def work(rank):
        return {name: value.numpy() for name, value in trained(4, f"rank{rank}").items()}

    for found in on_ranks(2, work):
        for name, value in found.items():
            torch.testing.assert_close(torch.from_numpy(value), alone[name], rtol=1e-4, atol=1e-6)


# ---- a run -----------------------------------------------------------------------------------------

BATCHES = {"evaluate_every": 2, "learning_rate": 1e-3}  # of 4 triples, 7 steps


def assert_equal_runs(found, expected):
    """Curve, targets and weights of two results."""
    for name in ("curve", "targets"):
        here, there = (
            getattr(result, name).drop(columns="seconds", errors="ignore")
            for result in (found, expected)
        )
        np.testing.assert_allclose(here, there, rtol=1e-4, atol=1e-5, err_msg=name)
    assert (found.kept_step, found.stop_step) == (expected.kept_step, expected.stop_step)
    for which, state in expected.states.items():
        for name, value in state.items():
            if name.endswith("key.bias"):  # has no gradient but rounding errors, which Adam scales
                continue
            np.testing.assert_allclose(found.states[which][name], value, atol=1e-4, err_msg=name)


@pytest.mark.parametrize(
    "values",
    [{}, {"loss": "softmax", "target": None, "in_batch": True}],
    ids=["margins", "softmax"],
)
def test_a_run_on_two_processes_is_that_of_one(material, tmp_path, values):  # noqa: F811
    """The batch, its loss and targets are the same; only the first process evaluates."""
    settings = {**BATCHES, **values}
    _, alone = run(material, tmp_path / "alone", measured, **settings)

    def work(rank):
        evaluator = measured if rank == 0 else Script(then=sys.exit)
        return run(material, tmp_path / "two", evaluator, **settings)[1]

    both = on_ranks(2, work)
    assert not [found for found in both if isinstance(found, str)]
    for found in both:
        assert_equal_runs(found, alone)


def test_a_run_goes_on_with_another_number_of_processes(material, tmp_path, monkeypatch):  # noqa: F811
    save = Progress.save

    def saved(self, *arguments):
        (tmp_path / f"saved by {os.environ.get('RANK')}").touch()
        save(self, *arguments)

    monkeypatch.setattr(Progress, "save", saved)
    settings = {**BATCHES, "checkpoint_every": 3}
    _, alone = run(material, tmp_path / "alone", measured, **settings)

    def fails(model):
        if fails.calls == 2:  # at step 4, after the checkpoint
            raise InterruptedError("no power")
        fails.calls += 1
        return measured(model)

    fails.calls = 0
    errors = on_ranks(2, lambda rank: run(material, tmp_path / "two", fails, **settings)[1])
    assert "rank 0: InterruptedError" in errors[0]
    assert errors[1].startswith("rank 1: ")  # it does not wait for ever
    assert (tmp_path / "saved by 0").exists() and not (tmp_path / "saved by 1").exists()
    assert newest_checkpoint(tmp_path / "two").name == "checkpoint-3"
    _, resumed = run(material, tmp_path / "two", measured, **settings)
    assert_equal_runs(resumed, alone)


def test_batches_that_cannot_be_shared_are_refused(material, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(TrainingError, match="batches of 4 triples, which 3 processes cannot share"):
        run(material, tmp_path, Script())
