"""What only runs with a CUDA device. Skipped without one: these lines have not been run where this was written."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from adaptive_margins import paper
from adaptive_margins.encoder.embed import embed, embed_shards
from adaptive_margins.encoder.load import open_encoder
from adaptive_margins.encoder.tokens import tokenize
from adaptive_margins.paper.plan import _Estimates
from adaptive_margins.profiles.encoders import EncoderSettings

needs_cuda = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="not run here: needs a CUDA device"
)
needs_two = pytest.mark.skipif(
    torch.cuda.device_count() < 2, reason="not run here: needs two CUDA devices"
)
TEXTS = ["the graph of a node", "sort a matrix", "path", "return the shape of the array"]


def open_on(device, miniature, tmp_path, **values):
    """The miniature with the same collection in a home of its own, on another device."""
    for name in ("collections", "cache"):
        if not (tmp_path / name).exists():
            (tmp_path / name).mkdir()
            for part in (miniature.home / name).iterdir():
                (tmp_path / name / part.name).symlink_to(part)
    overrides = {"device": device, "workers": 1, "ranking__devices": [device], **values}
    return paper.open(miniature.home / "miniature-paper.yaml", tmp_path, **overrides)


@needs_cuda
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_run_on_a_gpu(miniature, tmp_path, precision):
    """Training with 8-bit Adam and mixed precision, checkpoints, shards, index and rankings; close to the CPU's in fp32."""
    values = {
        "training__precision": precision,
        "training__learning_rate": 1e-3,
        "training__dropout": 0.0,
    }
    gpu = open_on("cuda", miniature, tmp_path / "gpu", **values)
    config = gpu.experiments.comparison_run("distilbert", target="distributed", in_batch=False)
    run = gpu.runner.execute(config)
    assert run.result["peak_bytes"] > 0
    assert np.isfinite(run.targets[["mean", "min", "max"]].to_numpy()).all()
    if precision == "fp32":
        cpu = open_on("cpu", miniature, tmp_path / "cpu", **values)
        other = cpu.runner.execute(config)
        np.testing.assert_allclose(run.targets["mean"], other.targets["mean"], atol=0.02)
        for name in ("TREC-DL19", "TREC-DL20"):
            difference = (
                run.evaluation("full", name).mean["nDCG@10"]
                - other.evaluation("full", name).mean["nDCG@10"]
            )
            assert abs(difference) < 0.05


@needs_cuda
def test_calibration_waits_for_the_gpu(miniature, tmp_path):
    speed = _Estimates(open_on("cuda", miniature, tmp_path).inputs).speed("roberta")
    assert speed.measured
    assert speed.triple > 0 and speed.passage > 0


@needs_two
def test_shards_by_several_gpus_are_those_of_one(tiny_folder, tmp_path):
    model = open_encoder(EncoderSettings(base=str(tiny_folder("bert"))), dropout=0.0, device="cuda")
    tokens = tokenize(model, TEXTS * 50, 12)
    devices = tuple(f"cuda:{i}" for i in range(torch.cuda.device_count()))
    shards = embed_shards(model, tokens, tmp_path / "e", shard=16, devices=devices)
    np.testing.assert_allclose(shards, embed(model, tokens), atol=1e-5)


@needs_two
def test_training_uses_one_gpu_and_the_batch_that_was_asked_for(miniature, tmp_path):
    run = open_on("cuda", miniature, tmp_path).run_one(
        miniature.experiments.static_run("roberta", 0.3, True).run_id
    )
    assert run.result["triples"] == run.config.triples
    assert len(run.targets) == run.config.steps
